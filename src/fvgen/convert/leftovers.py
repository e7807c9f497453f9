"""What a checkpoint holds beside the networks' weights, kept in one file so that the way back is bit for bit.

That is the schedule's buffers, CLIP's logit scales, and the text half of the second CLIP, of which only the image half
is ever run; usually it equals the first CLIP's, and then only that is written down.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fvgen.convert.components import COMPONENTS
from fvgen.convert.lvdm_yaml import LvdmConfig
from fvgen.convert.weights_file import CheckpointFile
from fvgen.diffusion.schedule import TIMESTEPS
from fvgen.errors import UserError, short
from fvgen.pipelines.strict import INDEX
from fvgen.system.doors import Unreadable, open_tensors, parse_json, read_object
from fvgen.system.files import write_tensors

LEFTOVERS = "lvdm_leftovers.safetensors"
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
SCALES = 1400  # entries of scale_arr, of which 1000 are used
BUFFER_TOLERANCE = 1e-3  # of a value in 0..1 that may have been stored in half precision
FIRST_CLIP, SECOND_CLIP = COMPONENTS["text_encoder"].prefix, COMPONENTS["image_encoder"].prefix

Shapes = dict[str, tuple[int, ...]]


def buffer_shapes(lvdm: LvdmConfig) -> Shapes:
    """Names and shapes of the schedule's buffers; scale_arr only where latents have a dynamic scale."""
    return _buffers(lvdm.base_scale is not None)


def _buffers(scaled: bool) -> Shapes:
    return {name: (TIMESTEPS,) for name in BUFFERS} | ({"scale_arr": (SCALES,)} if scaled else {})


def unused_shapes(component: str, lvdm: LvdmConfig) -> Shapes:
    """Names (with prefix) and shapes of what a component has and no network of ours holds."""
    if component == "text_encoder":
        return {FIRST_CLIP + "logit_scale": ()}
    if component != "image_encoder":
        return {}
    text = lvdm.open_clip["text_cfg"]
    return second_text_shapes(text["context_length"], text["vocab_size"], text["width"], lvdm.open_clip["embed_dim"])


def second_text_shapes(context_length: int, vocab_size: int, width: int, embed_dim: int) -> Shapes:
    """What a checkpoint has of the second CLIP's text half."""
    shapes: Shapes = {
        "logit_scale": (),
        "positional_embedding": (context_length, width),
        "text_projection": (width, embed_dim),
        "token_embedding.weight": (vocab_size, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    return {SECOND_CLIP + key: shape for key, shape in shapes.items()}


def check_schedule(file: CheckpointFile, lvdm: LvdmConfig) -> None:
    """Raises UserError for a checkpoint with the buffers of another noise schedule than its yaml's."""
    schedule = lvdm.schedule
    expected = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alphas_cumprod,
        "sqrt_alphas_cumprod": schedule.signal,
        "sqrt_one_minus_alphas_cumprod": schedule.sigma,
    }
    if lvdm.base_scale is not None:
        tail = torch.full((SCALES - TIMESTEPS,), lvdm.base_scale)
        expected["scale_arr"] = torch.cat([schedule.scale_arr, tail])
    for name, buffer in file.tensors(lambda name: name in expected).items():
        if not torch.allclose(buffer.float(), expected[name], rtol=0, atol=BUFFER_TOLERANCE):
            raise UserError(
                f"the checkpoint {file.path} was trained with another noise schedule than its yaml says ({name} "
                "differs); give the two that belong together"
            )


def write_leftovers(file: CheckpointFile, lvdm: LvdmConfig, only: Collection[str], folder: Path) -> None:
    """Write what the checkpoint has of them, for the components in ``only``, into the folder."""
    wanted = {key for component in only for key in unused_shapes(component, lvdm)} | set(buffer_shapes(lvdm))
    kept, same = dict(sorted(file.tensors(wanted.__contains__).items())), {}
    if (folder / "text_encoder").is_dir():
        twins = {key: FIRST_CLIP + key.removeprefix(SECOND_CLIP) for key in kept if key.startswith(SECOND_CLIP)}
        others = file.tensors(set(twins.values()).__contains__)
        same = {key: twin for key, twin in twins.items() if _identical(kept[key], others[twin])}
    tensors = {key: value.contiguous() for key, value in kept.items() if key not in same}
    write_tensors(folder / LEFTOVERS, tensors, metadata={"same": json.dumps(same)})


def read_leftovers(
    folder: Path, only: Collection[str], text_tower: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The leftovers of the components; the schedule's buffers too where all components are wanted.

    Args:
        folder: the model folder.
        only: components.
        text_tower: gives the first CLIP's weights in the checkpoint's names; asked only if the second equals it.

    Raises:
        UserError: a folder without the file.
    """
    path = folder / LEFTOVERS
    if not path.is_file() and not {"text_encoder", "image_encoder"} & set(only):
        return {}  # a student, say, whose UNet alone is wanted
    if not path.is_file():
        raise UserError(
            f"{folder} has no {LEFTOVERS}, so `fvgen convert` did not make it; give the folder that it made"
        )
    with open_tensors(path, "convert again") as file:
        same = parse_json((file.metadata() or {}).get("same", "{}"), path, "convert again")
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    if not isinstance(same, dict) or not all(isinstance(twin, str) for twin in same.values()):
        raise Unreadable(path, "its list of equal weights is none", "convert again")
    prefixes = tuple(COMPONENTS[component].prefix for component in only)
    if any(key.startswith(prefixes) for key in same):
        first = {**kept, **text_tower()}
        if lost := next((twin for twin in same.values() if twin not in first), None):
            raise Unreadable(path, f"it names {short(lost)}, which is nowhere", "convert again")
        kept |= {key: first[twin].clone() for key, twin in same.items() if key.startswith(prefixes)}
    whole = len(only) == len(COMPONENTS)
    return {key: x for key, x in kept.items() if key.startswith(prefixes) or (whole and "." not in key)}


def check_leftovers(found: Mapping[str, Tensor], folder: Path, only: Collection[str]) -> None:
    """Compare leftovers with all that the components, as their settings in the folder say, must have of them: what is
    written from them is then whole.

    Raises UserError for a file that lacks some, has others or others' shapes.
    """
    expected: Shapes = {}
    if len(only) == len(COMPONENTS):
        base_scale = read_object(folder / INDEX).get("base_scale")
        expected |= _buffers(base_scale is not None)
    if "text_encoder" in only:
        expected[FIRST_CLIP + "logit_scale"] = ()
    if "image_encoder" in only:
        expected |= _second_text(found)
    if wrong := sorted(key for key in {*found, *expected} if _shape(found, key) != expected.get(key)):
        raise Unreadable(folder / LEFTOVERS, f"{short(wrong[0])} is missing or of another shape", "convert again")
    for key, tensor in found.items():
        if not tensor.is_floating_point():
            raise Unreadable(folder / LEFTOVERS, f"{short(key)} holds no weights", "convert again")


def _shape(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(tensors[key].shape) if key in tensors else None


def _second_text(found: Mapping[str, Tensor]) -> Shapes:
    """The table of the second CLIP's text half, at the sizes that its own embeddings have."""

    def size(name: str, axis: int) -> int:
        shape = _shape(found, SECOND_CLIP + name) or ()
        return shape[axis] if len(shape) > axis else -1

    width = size("ln_final.weight", 0)
    sizes = {"context_length": size("positional_embedding", 0), "vocab_size": size("token_embedding.weight", 0)}
    return second_text_shapes(width=width, embed_dim=size("text_projection", 1), **sizes)


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
