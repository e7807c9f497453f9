"""CogVideoX's published folders and VideoScene's weights over them, as model folders of fvgen's.

A diffusers folder (CogvideoX-Interpolation, CogVideoX-5B-I2V and their like) becomes a teacher; a transformer's
checkpoint over such a folder or such a teacher becomes a `VideoScenePipeline`. Settings are those of the folder's own
JSON files, never a class's defaults; weights go from file to file, a shard in memory at a time, in the type that they
are stored in. Facts: `hanyang-21/VideoScene` at 70e9c84, diffusers 0.38 to 0.42; no published weights were at hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from torch import Tensor, nn

from fvgen.convert.weights_file import CheckpointFile
from fvgen.errors import UserError, did_you_mean, first_line, short
from fvgen.models.cogvideox.family import noise_schedule
from fvgen.models.cogvideox.pipelines import CogVideoXTeacherPipeline
from fvgen.models.cogvideox.prompts import EncodedPrompts
from fvgen.models.cogvideox.vae import latent_size, space_factor
from fvgen.models.cogvideox.videoscene import RELEASED, VideoScenePipeline
from fvgen.pipelines.card import write_card
from fvgen.pipelines.folders import quiet
from fvgen.pipelines.strict import DAMAGE, INDEX, judge_component, judge_json
from fvgen.system.doors import load_tensors, not_finite, read_object, there
from fvgen.system.files import atomic_path, busy, judge_output, new_folder, write_json, write_tensors
from fvgen.system.weights import DAMAGE as DAMAGED_WEIGHTS
from fvgen.system.weights import read_weights_file

Shapes = Mapping[str, tuple[int, ...]]
FOLDERS = ("CogVideoXImageToVideoPipeline", "CogVideoXTeacherPipeline")
NETWORKS: Mapping[str, type[nn.Module]] = {"transformer": CogVideoXTransformer3DModel, "vae": AutoencoderKLCogVideoX}
SCHEDULERS = {cls.__name__: cls for cls in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)}
ATTENTION = ".attn1."
PATCHES = "30x45"  # what both codes refer all rotary positions to
PRESET = "re10k"


def convert_cogvideox(
    checkpoint: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    prompts: str | Path | None = None,
    preset: str | None = None,
) -> Path:
    """A teacher from a diffusers folder, or VideoScene from its transformer's weights over one; returns the folder.

    Args:
        checkpoint: the folder, or the weights (`model.safetensors`).
        out: a folder that does not exist or is empty.
        base: with weights: the folder that they were trained over, of diffusers' layout or a teacher of fvgen's.
        prompts: the encoded prompt ([1, N, D], as `prompt_embeds.pt`); a teacher of fvgen's has its own.
        preset: with weights: one of `RELEASED`, "re10k" if not given.

    Raises:
        UserError: a folder or weights of another kind, a scheduler of other settings, weights that are missing, surplus
            or of another shape (only all attention layers may come alone), prompts that do not fit. Nothing is written.
    """
    checkpoint = Path(checkpoint)
    files = [path for path in (checkpoint, base, prompts) if path is not None and there(path)]
    out = judge_output(out, inputs=files)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"output {out} exists and is no empty folder; choose another --out or delete it")
    if checkpoint.is_dir():
        for option, value in (("--base", base), ("--preset", preset)):
            if value is not None:
                raise UserError(f"{option} goes with a file of weights, and {checkpoint} is a folder; leave it out")
        return _write(checkpoint, out, prompts, None, None)
    file = CheckpointFile(checkpoint)
    if base is None:
        alone = all(ATTENTION in name for name in file.shapes)
        held = "holds attention layers only, no whole transformer" if alone else "has neither settings nor a VAE"
        raise UserError(f"{checkpoint} {held}; add --base FOLDER, the interpolation model that it was trained over")
    chosen = PRESET if preset is None else preset
    if chosen not in RELEASED:
        raise UserError(f"there is no preset {chosen!r}{did_you_mean(chosen, RELEASED)}")
    return _write(Path(base), out, prompts, file, chosen)


def _write(base: Path, out: Path, prompts: str | Path | None, file: CheckpointFile | None, preset: str | None) -> Path:
    index, places, scheduler = judge_base(base)
    networks = {name: _empty(place, NETWORKS[name]) for name, place in places.items() if name in NETWORKS}
    transformer, vae = networks["transformer"].config, networks["vae"].config
    height, width = (side * space_factor(vae) for side in (transformer.sample_height, transformer.sample_width))
    latent_size(transformer, vae, transformer.sample_frames, height, width)  # judges what family it is of
    for name, network in networks.items():
        check_whole(shapes_in(places[name]), shapes_of(network), places[name])
    if file is not None:
        check_over(file, shapes_of(networks["transformer"]))
    text = _prompts(prompts, base, index, transformer)
    settings: dict[str, Any] = {"image_condition": "ends", "rotary_base": PATCHES}
    if index.get("_class_name") == FOLDERS[1]:
        settings = {key: index[key] for key in settings if key in index}
    parts = {**networks, "scheduler": scheduler, "prompts": text}
    if preset is not None:
        pipeline: Any = VideoScenePipeline(**parts, **settings, **RELEASED[preset])
    else:
        # One prompt is known: guidance, which needs another, would give the same as none.
        pipeline = CogVideoXTeacherPipeline(**parts, **settings, guidance=1.0)
    with busy(out), atomic_path(out) as folder, quiet():
        new_folder(folder)
        for name in NETWORKS:
            replaced = file.tensors() if file is not None and name == "transformer" else {}
            _write_network(places[name], folder / name, replaced)
        new_folder(folder / "scheduler")
        write_json(folder / "scheduler" / "scheduler_config.json", read_object(_settings_file(places["scheduler"])))
        text.save_pretrained(folder / "prompts")
        pipeline.save_config(folder)
        write_card(pipeline, folder)
    return out


# --- The base ---


def judge_base(base: Path) -> tuple[dict[str, Any], dict[str, Path], Any]:
    """What a folder's index says, the folders of transformer, VAE and scheduler, and the scheduler itself. Raises
    UserError for a folder of another kind, and for a scheduler of other settings than CogVideoX's."""
    if not there(base / INDEX):
        raise UserError(f"{base} is no model folder (it has no {INDEX}); give one of diffusers' layout")
    index = read_object(base / INDEX)
    judge_json(index, base / INDEX)
    if (kind := index.get("_class_name")) not in FOLDERS:
        raise UserError(f"{base} holds a {short(kind)}; give a folder of {' or '.join(FOLDERS)}")
    places = {name: base / name for name in (*NETWORKS, "scheduler")}
    for name, cls in NETWORKS.items():
        judge_component(places[name], cls)
    settings = read_object(_settings_file(places["scheduler"]), "copy the model again")
    judge_json(settings, places["scheduler"])
    cls = SCHEDULERS.get(settings.get("_class_name"), CogVideoXDDIMScheduler)
    try:
        noise_schedule(settings)
    except UserError as error:
        raise UserError(f"{_settings_file(places['scheduler'])}: {error}") from error
    return index, places, cls.from_config(settings)


def _settings_file(place: Path) -> Path:
    return place / "scheduler_config.json"


def _empty(place: Path, cls: type[nn.Module]) -> nn.Module:
    """On the meta device, from the settings in its folder."""
    settings = read_object(place / "config.json", "copy the model again")
    try:
        with torch.device("meta"):
            return cls.from_config(settings)
    except DAMAGE as error:
        raise UserError(f"{place} holds no {cls.__name__} ({first_line(error)}); copy the model again") from error


# --- Weights ---


def shapes_of(network: nn.Module) -> Shapes:
    """Name to shape of all that a network's file holds."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def shapes_in(place: Path) -> Shapes:
    """The same of a component's folder, from its shards."""
    found: dict[str, tuple[int, ...]] = {}
    for shard in sorted(place.glob("*.safetensors")):
        found |= CheckpointFile(shard).shapes
    return found


def check_whole(found: Shapes, expected: Shapes, where: object) -> None:
    """Raises UserError for the first weight that is missing, surplus or of another shape."""
    for name in sorted({*found, *expected}):
        if name not in found:
            raise UserError(f"{where} lacks {short(name)}; copy it again")
        if name not in expected:
            raise UserError(f"{where} holds {short(name)}, which the model does not have; give the model's own weights")
        if found[name] != expected[name]:
            raise UserError(
                f"{where}: {short(name)} is {list(found[name])}, the model's is {list(expected[name])}; give the "
                "model's own weights"
            )


def check_over(file: CheckpointFile, expected: Shapes) -> None:
    """Weights that replace a base's: all of them, or all of the attention layers' and no other. Raises UserError."""
    attention = {name: shape for name, shape in expected.items() if ATTENTION in name}
    alone = bool(file.shapes) and all(ATTENTION in name for name in file.shapes)
    check_whole(file.shapes, attention if alone else expected, file.path)
    if (wrong := not_finite(file.tensors().items())) is not None:
        raise UserError(f"{file.path}: {short(wrong)} holds NaN or an infinity; give an intact file")


def _write_network(place: Path, out: Path, replaced: Mapping[str, Tensor]) -> None:
    new_folder(out)
    for source in sorted(place.glob("*.json")):
        write_json(out / source.name, read_object(source))
    for shard in sorted(place.glob("*.safetensors")):
        tensors = load_tensors(shard)
        write_tensors(out / shard.name, {name: replaced.get(name, x) for name, x in tensors.items()}, {"format": "pt"})


# --- Prompts ---


def _prompts(file: str | Path | None, base: Path, index: Mapping[str, Any], transformer: Any) -> EncodedPrompts:
    """Of the file, for both prompts, or those of a teacher of fvgen's."""
    if file is None:
        if index.get("_class_name") != FOLDERS[1]:
            raise UserError(
                f"{base} has a text encoder and no encoded prompt; add --prompts FILE, such as VideoScene's "
                "prompt_embeds.pt, or encode one as docs/cogvideox.md says"
            )
        from fvgen.pipelines.strict import load_alone

        return load_alone(base / "prompts", EncodedPrompts)
    tensor = read_prompt(Path(file))
    wanted = transformer.max_text_seq_length, transformer.text_embed_dim
    if tuple(tensor.shape[1:]) != wanted:
        raise UserError(f"{file} holds a prompt of {list(tensor.shape[1:])}, the model takes {list(wanted)}")
    return EncodedPrompts.of(tensor, tensor)


def read_prompt(file: Path) -> Tensor:
    """[1, N, D] float32 of an encoded prompt: a tensor [1, N, D] or [N, D], alone or as the only one of a dictionary;
    code in the file is never run. Raises UserError for anything else."""
    try:
        content = read_weights_file(file)
    except DAMAGED_WEIGHTS as error:
        raise UserError(f"{file} cannot be read as a prompt ({first_line(error)}); copy it again") from error
    if isinstance(content, Mapping) and len(content) == 1:
        (content,) = content.values()
    if not isinstance(content, Tensor) or content.ndim not in (2, 3) or not content.is_floating_point():
        raise UserError(f"{file} holds no encoded prompt; give one tensor [1, tokens, width]")
    tensor = content.float() if content.ndim == 3 else content.float()[None]
    if tensor.shape[0] != 1 or not_finite([("prompt", tensor)]):
        raise UserError(
            f"{file} holds {len(tensor)} prompts or numbers that are none; give one tensor [1, tokens, width]"
        )
    return tensor
