"""`fvgen convert`: published checkpoints to model folders, and back bit for bit.

A component at a time, so that never more than one is in memory. What no network holds is kept beside them, see
`fvgen.convert.leftovers`. Which models there are and how they are used is in `fvgen.convert.kinds`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from fvgen.convert.components import COMPONENTS, key_map
from fvgen.convert.kinds import vae_names
from fvgen.convert.leftovers import (
    LEFTOVERS,
    Shapes,
    buffer_shapes,
    check_leftovers,
    check_schedule,
    read_leftovers,
    unused_shapes,
    write_leftovers,
)
from fvgen.convert.lvdm_yaml import LvdmConfig, read_lvdm_config
from fvgen.convert.names import rename
from fvgen.convert.weights_file import CheckpointFile
from fvgen.errors import UserError, did_you_mean, short
from fvgen.models.viewcrafter.conditioning import Conditioning
from fvgen.models.viewcrafter.encoders import EMPTY_IDS, PROMPT, PROMPT_IDS, FixedPrompts, encode_tokens, padded_ids
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.pipelines.card import write_card
from fvgen.pipelines.folders import quiet
from fvgen.pipelines.hub import fetch_file
from fvgen.pipelines.presets import model_folder
from fvgen.pipelines.strict import DAMAGE, INDEX, judge_component, load_alone
from fvgen.system.doors import not_finite, read_object, there
from fvgen.system.files import atomic_path, busy, judge_output, write_state, write_tensors

__all__ = ["COMPONENTS", "LEFTOVERS", "check_shapes", "convert", "convert_back", "expected_shapes", "newer_name"]

ALL = tuple(COMPONENTS)
SHARD = "1GB"
TOLD = 20  # names in a refusal
IDS = {PROMPT: PROMPT_IDS, "": EMPTY_IDS}  # the texts that can be encoded without a tokenizer


def convert(
    config: str, checkpoint: str, out: str | Path, only: Sequence[str] = ALL, layout: str | None = None
) -> Path:
    """Write a published checkpoint as a `ViewCrafterPipeline` folder; returns the folder.

    Args:
        config: its yaml; a path, or an address or file on the Hub (see `fvgen.pipelines.hub.fetch_file`).
        checkpoint: `.ckpt` or `.pth` in either of its forms, or `.safetensors`; a path, or an address as well.
        out: a folder that does not exist or is empty.
        only: components to convert; the others may be missing from the checkpoint.
        layout: "ends" for DynamiCrafter_512_Interp, whose published yaml is DynamiCrafter_512's.

    Raises:
        UserError: a yaml of another model, a damaged checkpoint, one with missing or unexpected weights or weights of
            other shapes, an output folder that is in use. Nothing is written then.
    """
    read = [name for name in (config, checkpoint) if there(name)]
    out, only = judge_output(out, inputs=read), _check_components(only)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"output {out} exists and is no empty folder; choose another --out or delete it")
    lvdm = read_lvdm_config(fetch_file(config), layout)
    file = CheckpointFile(fetch_file(checkpoint), newer_name)
    check_shapes(file.shapes, lvdm, only, file.path)
    check_schedule(file, lvdm)
    with busy(out), atomic_path(out) as folder, quiet():
        for component in only:
            _write_component(component, file, lvdm, folder)
        write_leftovers(file, lvdm, only, folder)
        _write_index(lvdm, only, folder)
    return out


def convert_back(folder: str | Path, out: str | Path, config: str | None = None, only: Sequence[str] = ALL) -> Path:
    """Write a folder that `convert` made as one checkpoint in the published names; returns the file.

    Args:
        folder: the model folder.
        out: a `.ckpt`, `.pth` or `.safetensors` that does not exist, or a folder for a `model.ckpt`.
        config: the model's yaml, with whose sizes the folder is compared; by default those in the folder hold.
        only: components to write.

    Raises:
        UserError: a folder without the weights, or with others than its configuration says. Nothing is written then.
    """
    folder, only, out = model_folder(folder), _check_components(only), judge_output(out, inputs=[folder])
    if out.suffix not in (".ckpt", ".pth", ".pt", ".safetensors"):
        out = out / "model.ckpt"
    if os.path.lexists(out):
        raise UserError(f"output file {out} exists; choose another --out or delete it")
    layout = _layout(folder)
    asked = layout if layout == "ends" else None  # the others' yamls say themselves what they are
    lvdm = None if config is None else read_lvdm_config(fetch_file(config), asked)
    state: dict[str, Tensor] = {}
    for component in only:
        state |= _read_component(component, folder, lvdm, layout)

    def text_tower() -> Mapping[str, Tensor]:
        return state if "text_encoder" in only else _read_component("text_encoder", folder, None, layout)

    left = read_leftovers(folder, only, text_tower)
    check_leftovers(left, folder, only)
    state |= left
    if (name := not_finite(state.items())) is not None:
        raise UserError(f"{folder}: {short(name)} holds NaN or an infinity; convert again")
    with busy(out), atomic_path(out) as temporary:
        if out.suffix == ".safetensors":
            write_tensors(temporary, state)
        else:
            write_state(temporary, {"state_dict": state})
    return out


def expected_shapes(lvdm: LvdmConfig, only: Sequence[str] = ALL) -> Shapes:
    """Name to shape of all that a checkpoint has for some components and its noise schedule."""
    expected = buffer_shapes(lvdm)
    for component in only:
        network = lvdm.build_empty(component)
        theirs = key_map(component, network, lvdm.kind.vae_names).to_theirs(network.state_dict())
        expected |= {COMPONENTS[component].prefix + key: tuple(value.shape) for key, value in theirs.items()}
        expected |= unused_shapes(component, lvdm)
    return expected


def check_shapes(found: Mapping[str, tuple[int, ...]], lvdm: LvdmConfig, only: Sequence[str], path: Path) -> None:
    """Raises UserError that lists what is missing, unexpected or of another shape."""
    expected = expected_shapes(lvdm, only)
    ignored = tuple(row.prefix for name, row in COMPONENTS.items() if name not in only)
    whole = not ignored
    missing = [key for key in expected if key not in found and (whole or "." in key)]
    unexpected = [key for key in found if key not in expected and not key.startswith(ignored)]
    differing = [
        f"{key} {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    told = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems.items() if keys]
    if told:
        raise UserError(
            f"the checkpoint {path} does not fit its yaml, which is {lvdm.kind.name}'s ({'; '.join(told)}); "
            "give the two that belong together"
        )


def newer_name(name: str) -> str:
    """DynamiCrafter's 256-pixel model calls the embedding of the frame rate otherwise."""
    return rename(name, [("framestride_embed", "fps_embedding")])


def _write_component(component: str, file: CheckpointFile, lvdm: LvdmConfig, folder: Path) -> None:
    prefix, unused = COMPONENTS[component].prefix, unused_shapes(component, lvdm)
    theirs = file.tensors(lambda name: name.startswith(prefix) and name not in unused)
    network = lvdm.build_empty(component)
    names = key_map(component, network, lvdm.kind.vae_names)
    if (wrong := not_finite(theirs.items())) is not None:
        raise UserError(f"the checkpoint {file.path}: {short(wrong)} holds NaN or an infinity; give an intact one")
    network.load_state_dict(
        names.to_ours({key.removeprefix(prefix): value for key, value in theirs.items()}), assign=True
    )
    network.save_pretrained(folder / component, max_shard_size=SHARD)


def _write_index(lvdm: LvdmConfig, only: Sequence[str], folder: Path) -> None:
    """model_index.json, the model card, and the encoded prompts where there is a text tower that knows them."""
    parts: dict[str, nn.Module | None] = {name: lvdm.build_empty(name) if name in only else None for name in ALL}
    prompts = _prompts(folder, lvdm.kind.conditioning) if "text_encoder" in only else None
    if prompts is not None:
        prompts.save_pretrained(folder / "prompts")
    pipeline = ViewCrafterPipeline(**parts, prompts=prompts, **lvdm.kind.pipeline_settings(lvdm.base_scale))
    pipeline.save_config(folder)
    if "unet" in only and "vae" in only:
        write_card(pipeline, folder)


@torch.no_grad()
def _prompts(folder: Path, conditioning: Conditioning) -> FixedPrompts | None:
    """The model's own prompt and the empty one; None if it sees no text. A tower with fewer words than CLIP, as tests
    have, reads others in their place, which is said: so every converted model can be sampled and scored."""
    if not conditioning.has_text:
        return None
    encoder = load_alone(folder / "text_encoder", CLIPTextModelWithProjection).float().eval()
    ids, words = [IDS[conditioning.prompt], EMPTY_IDS], encoder.config.vocab_size
    if words <= max(max(row) for row in ids):
        print(f"fvgen: the text encoder knows {words} words, not CLIP's: the prompt becomes others", file=sys.stderr)
        ids = [[number % words for number in row] for row in ids]
    positive, negative = encode_tokens(encoder, padded_ids(ids, encoder.config.max_position_embeddings)).split(1)
    return FixedPrompts.encoded(positive, negative)


def _layout(folder: Path) -> str:
    """The conditioning layout in a folder's model_index.json."""
    index = read_object(folder / INDEX, "convert again")
    settings = index.get("conditioning")
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{folder / INDEX}: conditioning is {short(settings)}; convert again")
    return Conditioning.of(settings).layout


def _read_component(component: str, folder: Path, lvdm: LvdmConfig | None, layout: str) -> dict[str, Tensor]:
    """A component's weights in the checkpoint's names, memory-mapped, compared with its configuration."""
    place = folder / component
    judge_component(place, COMPONENTS[component].network)
    state: dict[str, Tensor] = {}
    for shard in sorted(place.glob("*.safetensors")):
        state |= CheckpointFile(shard).tensors()
    network = _empty(component, place) if lvdm is None else lvdm.build_empty(component)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    wrong = sorted(
        key for key in shapes.keys() | state.keys() if key not in state or state[key].shape != shapes.get(key)
    )
    if wrong:
        raise UserError(
            f"{place} does not fit its configuration ({len(wrong)} weights differ: {_some(wrong)}); convert again"
        )
    theirs = key_map(component, network, vae_names(layout)).to_theirs(state)
    return {COMPONENTS[component].prefix + key: value for key, value in theirs.items()}


def _empty(component: str, place: Path) -> nn.Module:
    """The component on the meta device, from the configuration in its own folder."""
    kind = COMPONENTS[component].network
    settings = read_object(place / "config.json", "convert again")
    try:
        with torch.device("meta"):
            if component in ("image_encoder", "text_encoder"):
                return kind(kind.config_class(**settings))
            return kind.from_config(settings)
    except DAMAGE as error:
        raise UserError(f"{place} holds no {kind.__name__} that can be read; convert again, or leave it out") from error


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - TOLD} more" if len(keys) > TOLD else ""
    return ", ".join(keys[:TOLD]) + more


def _check_components(only: Sequence[str]) -> tuple[str, ...]:
    for name in only:
        if name not in COMPONENTS:
            raise UserError(f"there is no component {name!r}{did_you_mean(name, COMPONENTS)}")
    return tuple(name for name in ALL if name in only)
