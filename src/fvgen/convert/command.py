"""`fvgen convert`: ViewCrafter's checkpoints to model folders, and back bit for bit.

A component at a time, so that never more than one is in memory. What no network holds is kept in `LEFTOVERS` beside
them: the schedule's buffers, CLIP's logit scales, and the second CLIP's text half (unless it equals the first's).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from fvgen.convert import names
from fvgen.convert.lvdm_yaml import LvdmConfig, read_lvdm_config
from fvgen.convert.names import PREFIXES
from fvgen.convert.weights_file import CheckpointFile
from fvgen.diffusion.schedule import TIMESTEPS, NoiseSchedule
from fvgen.errors import UserError, did_you_mean
from fvgen.models.viewcrafter.encoders import EMPTY_IDS, PROMPT_IDS, FixedPrompts, encode_tokens, padded_ids
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.models.viewcrafter.projector import ImageProjector
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.card import write_card
from fvgen.pipelines.folders import model_folder, quiet
from fvgen.pipelines.hub import fetch_file
from fvgen.system.files import atomic_path

COMPONENTS = tuple(PREFIXES)
TO_OURS = {
    "unet": names.unet_from_lvdm,
    "vae": names.vae_from_lvdm,
    "image_projector": names.projector_from_lvdm,
    "image_encoder": names.image_encoder_from_lvdm,
    "text_encoder": names.text_encoder_from_lvdm,
}
TO_THEIRS = {
    "unet": names.unet_to_lvdm,
    "vae": names.vae_to_lvdm,
    "image_projector": names.projector_to_lvdm,
    "image_encoder": names.image_encoder_to_lvdm,
    "text_encoder": names.text_encoder_to_lvdm,
}
CLASSES = {
    "unet": ViewCrafterUNet,
    "vae": AutoencoderKL,
    "image_projector": ImageProjector,
    "image_encoder": CLIPVisionModelWithProjection,
    "text_encoder": CLIPTextModelWithProjection,
}
LEFTOVERS = "lvdm_leftovers.safetensors"
SHARD = "1GB"
SCALES = 1400  # entries of ViewCrafter's scale_arr, of which 1000 are used
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
BUFFER_TOLERANCE = 1e-3  # of a value in 0..1 that may have been stored in half precision
TOLD = 20  # names in a refusal

Shapes = dict[str, tuple[int, ...]]


def convert(config: str, checkpoint: str, out: str | Path, only: Sequence[str] = COMPONENTS) -> Path:
    """Write a ViewCrafter checkpoint as a `ViewCrafterPipeline` folder; returns the folder.

    Args:
        config: ViewCrafter's yaml; a path, or an address or file on the Hub (see `fvgen.pipelines.hub.fetch_file`).
        checkpoint: `.ckpt` or `.pth` in either of its forms, or `.safetensors`; a path, or an address as well.
        out: a folder that does not exist or is empty.
        only: components to convert; the others may be missing from the checkpoint.

    Raises:
        UserError: a yaml of another model, a damaged checkpoint, one with missing or unexpected weights or weights of
            other shapes, an output folder that is in use. Nothing is written then.
    """
    out, only = _check_out(out), _check_components(only)
    lvdm = read_lvdm_config(fetch_file(config))
    file = CheckpointFile(fetch_file(checkpoint), newer_name)
    check_shapes(file.shapes, lvdm, only, file.path)
    leftovers = _leftovers(file, lvdm, only)
    with atomic_path(out) as folder, quiet():
        for component in only:
            _write_component(component, file, lvdm, folder)
        _write_leftovers(file, leftovers, folder)
        _write_index(lvdm, only, folder)
    return out


def convert_back(
    folder: str | Path, out: str | Path, config: str | None = None, only: Sequence[str] = COMPONENTS
) -> Path:
    """Write a folder that `convert` made as one checkpoint in ViewCrafter's names; returns the file.

    Args:
        folder: the model folder.
        out: a `.ckpt`, `.pth` or `.safetensors` that does not exist, or a folder for a `model.ckpt`.
        config: ViewCrafter's yaml, with which the folder is compared; by default the sizes in the folder hold.
        only: components to write.

    Raises:
        UserError: a folder without the weights, or with others than its configuration says. Nothing is written then.
    """
    folder, only, out = model_folder(folder), _check_components(only), Path(out)
    if out.suffix not in (".ckpt", ".pth", ".pt", ".safetensors"):
        out = out / "model.ckpt"
    if out.exists():
        raise UserError(f"output file {out} exists; choose another --out or delete it")
    lvdm = None if config is None else read_lvdm_config(fetch_file(config))
    state: dict[str, Tensor] = {}
    for component in only:
        theirs = TO_THEIRS[component](_read_component(component, folder, lvdm))
        state |= {PREFIXES[component] + key: value for key, value in theirs.items()}
    state |= _read_leftovers(folder, only, state)
    with atomic_path(out) as temporary:
        save_file(state, temporary) if out.suffix == ".safetensors" else torch.save({"state_dict": state}, temporary)
    return out


def check_shapes(found: Mapping[str, tuple[int, ...]], lvdm: LvdmConfig, only: Sequence[str], path: Path) -> None:
    """Raises UserError that lists what is missing, unexpected or of another shape."""
    expected = dict(_buffer_shapes())
    for component in only:
        expected |= _expected(component, lvdm)
    ignored = tuple(PREFIXES[component] for component in COMPONENTS if component not in only)
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
            f"the checkpoint {path} does not fit its yaml ({'; '.join(told)}); give the two that belong together"
        )


def _expected(component: str, lvdm: LvdmConfig) -> Shapes:
    """Names and shapes of all that a component has in a whole checkpoint."""
    ours = TO_THEIRS[component](lvdm.build_empty(component).state_dict())
    shapes = {key: tuple(value.shape) for key, value in ours.items()} | _unused_shapes(component, lvdm)
    return {PREFIXES[component] + key: shape for key, shape in shapes.items()}


def _unused_shapes(component: str, lvdm: LvdmConfig) -> Shapes:
    """What of a component no network of ours holds."""
    if component == "text_encoder":
        return {"logit_scale": ()}
    if component != "image_encoder":
        return {}
    text, width = lvdm.open_clip["text_cfg"], lvdm.open_clip["text_cfg"]["width"]
    return {
        "logit_scale": (),
        "positional_embedding": (text["context_length"], width),
        "text_projection": (width, lvdm.open_clip["embed_dim"]),
        "token_embedding.weight": (text["vocab_size"], width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }


def _buffer_shapes() -> Shapes:
    return {name: (TIMESTEPS,) for name in BUFFERS} | {"scale_arr": (SCALES,)}


def _write_component(component: str, file: CheckpointFile, lvdm: LvdmConfig, folder: Path) -> None:
    prefix = PREFIXES[component]
    unused = {prefix + key for key in _unused_shapes(component, lvdm)}
    theirs = file.tensors(lambda name: name.startswith(prefix) and name not in unused)
    model = lvdm.build_empty(component)
    state = TO_OURS[component]({key.removeprefix(prefix): value for key, value in theirs.items()})
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder / component, max_shard_size=SHARD)


def _leftovers(file: CheckpointFile, lvdm: LvdmConfig, only: Sequence[str]) -> set[str]:
    """Names of the leftovers; raises UserError for buffers of another schedule."""
    schedule = NoiseSchedule.viewcrafter(lvdm.base_scale)
    tail = torch.full((SCALES - TIMESTEPS,), lvdm.base_scale)
    expected = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alphas_cumprod,
        "sqrt_alphas_cumprod": schedule.signal,
        "sqrt_one_minus_alphas_cumprod": schedule.sigma,
        "scale_arr": torch.cat([schedule.scale_arr, tail]),
    }
    for name, buffer in file.tensors(lambda name: name in expected).items():
        if not torch.allclose(buffer.float(), expected[name], rtol=0, atol=BUFFER_TOLERANCE):
            raise UserError(
                f"the checkpoint {file.path} was trained with another noise schedule than its yaml says ({name} "
                "differs); give the two that belong together"
            )
    wanted = {PREFIXES[component] + key for component in only for key in _unused_shapes(component, lvdm)}
    return {name for name in file.shapes if name in wanted or name in _buffer_shapes()}


def _write_leftovers(file: CheckpointFile, wanted: set[str], folder: Path) -> None:
    """The second CLIP's text half is usually the first one's: then only that is written down."""
    first, second = PREFIXES["text_encoder"], PREFIXES["image_encoder"]
    kept, same = dict(sorted(file.tensors(wanted.__contains__).items())), {}
    if (folder / "text_encoder").is_dir():
        twins = {key: first + key.removeprefix(second) for key in kept if key.startswith(second)}
        others = file.tensors(set(twins.values()).__contains__)
        same = {key: twin for key, twin in twins.items() if _identical(kept[key], others[twin])}
    tensors = {key: value.contiguous() for key, value in kept.items() if key not in same}
    save_file(tensors, folder / LEFTOVERS, metadata={"same": json.dumps(same)})


def _read_leftovers(folder: Path, only: Sequence[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The leftovers of the components; the schedule's buffers too where all are wanted."""
    path = folder / LEFTOVERS
    if not path.is_file() and not {"text_encoder", "image_encoder"} & set(only):
        return {}  # a student, say, whose UNet alone is wanted
    if not path.is_file():
        raise UserError(
            f"{folder} has no {LEFTOVERS}, so `fvgen convert` did not make it; give the folder that it made"
        )
    with safe_open(path, framework="pt") as file:
        same = json.loads((file.metadata() or {}).get("same", "{}"))
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    prefixes = tuple(PREFIXES[component] for component in only)
    if PREFIXES["text_encoder"] not in prefixes and any(key.startswith(prefixes) for key in same):
        text = names.text_encoder_to_lvdm(_read_component("text_encoder", folder, None))
        state = {**state, **{PREFIXES["text_encoder"] + key: value for key, value in text.items()}}
    twins = {**kept, **state}
    kept |= {key: twins[twin].clone() for key, twin in same.items() if key.startswith(prefixes)}
    return {
        key: x
        for key, x in kept.items()
        if key.startswith(prefixes) or ("." not in key and len(only) == len(COMPONENTS))
    }


def _write_index(lvdm: LvdmConfig, only: Sequence[str], folder: Path) -> None:
    """model_index.json, the model card, and the encoded prompts where there is a text tower that knows them."""
    parts: dict[str, nn.Module | None] = {name: lvdm.build_empty(name) if name in only else None for name in COMPONENTS}
    prompts = _prompts(folder) if "text_encoder" in only else None
    if prompts is not None:
        prompts.save_pretrained(folder / "prompts")
    pipeline = ViewCrafterPipeline(**parts, prompts=prompts, base_scale=lvdm.base_scale, image_resize="viewcrafter")
    pipeline.save_config(folder)
    if "unet" in only and "vae" in only:
        write_card(pipeline, folder)


@torch.no_grad()
def _prompts(folder: Path) -> FixedPrompts | None:
    """ViewCrafter's two prompts; None if the tower has another vocabulary than CLIP's."""
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", local_files_only=True).float().eval()
    if encoder.config.vocab_size <= max(PROMPT_IDS):
        return None
    length = encoder.config.max_position_embeddings
    positive, negative = encode_tokens(encoder, padded_ids([PROMPT_IDS, EMPTY_IDS], length)).split(1)
    return FixedPrompts.encoded(positive, negative)


def _read_component(component: str, folder: Path, lvdm: LvdmConfig | None) -> dict[str, Tensor]:
    """A component's state dict in our names, memory-mapped, compared with its configuration."""
    place = folder / component
    state: dict[str, Tensor] = {}
    for shard in sorted(place.glob("*.safetensors")):
        state |= CheckpointFile(shard).tensors()
    expected = _empty(component, place) if lvdm is None else lvdm.build_empty(component)
    shapes = {key: value.shape for key, value in expected.state_dict().items()}
    wrong = sorted(
        key for key in shapes.keys() | state.keys() if key not in state or state[key].shape != shapes.get(key)
    )
    if wrong:
        raise UserError(
            f"{place} does not fit its configuration ({len(wrong)} weights differ: {_some(wrong)}); convert again"
        )
    return state


def _empty(component: str, place: Path) -> nn.Module:
    """The component on the meta device, from the configuration in its own folder."""
    kind = CLASSES[component]
    try:
        with torch.device("meta"):
            if component in ("image_encoder", "text_encoder"):
                return kind(kind.config_class.from_pretrained(place, local_files_only=True))
            return kind.from_config(kind.load_config(place, local_files_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{place} holds no {kind.__name__} that can be read; convert again, or leave it out") from error


def newer_name(name: str) -> str:
    """A 256-pixel ancestor of ViewCrafter called the embedding of the frame rate otherwise."""
    return names.rename(name, [("framestride_embed", "fps_embedding")])


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - TOLD} more" if len(keys) > TOLD else ""
    return ", ".join(keys[:TOLD]) + more


def _check_out(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"output {out} exists and is no empty folder; choose another --out or delete it")
    return out


def _check_components(only: Sequence[str]) -> tuple[str, ...]:
    for name in only:
        if name not in COMPONENTS:
            raise UserError(f"there is no component {name!r}{did_you_mean(name, COMPONENTS)}")
    return tuple(name for name in COMPONENTS if name in only)
