"""Clips at the pipelines' doors: what may come in as a render, what goes out, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor, nn

from fvgen.errors import UserError
from fvgen.scenes.images import load_image, rgb, upright

OUTPUT_TYPES = ("pt", "np", "pil", "latent")
RANGE_TOLERANCE = 1e-3  # renders may overshoot [0, 1] by rounding, not by another scale


@dataclass
class VideoOutput(BaseOutput):
    """`frames`: [B, F, 3, H, W] in [0, 1] for "pt", [B, F, H, W, 3] for "np", a list of B lists of F images for "pil",
    scaled latents [B, C, F, h, w] for "latent".
    """

    frames: Tensor | np.ndarray | list[list[Image.Image]]


def as_frames(render: Any) -> Tensor:
    """Frames [B, F, 3, H, W] from such a tensor, from an array [B, F, H, W, 3] or [F, H, W, 3], or from PIL images.

    Tensors and arrays of floats are taken as they are; arrays of bytes and images are scaled to [0, 1]. Images are a
    list of F of one clip, or a list of such lists. Raises UserError for anything else.
    """
    if isinstance(render, Tensor):
        return render
    if isinstance(render, str | bytes):
        raise UserError("a render cannot be a name; give a tensor, an array, PIL images or a list of image files")
    if isinstance(render, Sequence) and render and isinstance(render[0], str | Path | Image.Image):
        render = [render]
    if isinstance(render, Sequence) and render and all(isinstance(clip, Sequence) and clip for clip in render):
        clips = [[_pixels(image) for image in clip] for clip in render]
        if len({image.shape for clip in clips for image in clip}) > 1 or len({len(clip) for clip in clips}) > 1:
            raise UserError("the render's images differ in size or its clips in length; give all the same")
        render = np.stack([np.stack(clip) for clip in clips])
    if not isinstance(render, np.ndarray):
        raise UserError(f"a render cannot be a {type(render).__name__}; give a tensor, an array or PIL images")
    array = render[None] if render.ndim == 4 else render
    frames = torch.from_numpy(array / np.float32(255) if array.dtype == np.uint8 else array).float()
    return frames.movedim(-1, 2) if frames.ndim == 5 else frames


def _pixels(image: Any) -> np.ndarray:
    """[H, W, 3] of an image or of its file, by the one door for pixels: upright, 8 bits, alpha laid on white."""
    if isinstance(image, str | Path):
        return load_image(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"the render holds a {type(image).__name__} among its images; give PIL images or files")
    return rgb(upright(image))


def with_photographs(render: Tensor, photographs: Mapping[int, Any] | None) -> Tensor:
    """The render [B, F, 3, H, W] with photographs in place of the frames that they show.

    Args:
        photographs: frame index (negative ones count from the end) to a photograph of the render's size: [3, H, W] or
            [B, 3, H, W] in [0, 1], or a PIL image or a file, which are turned upright.
    """
    if not photographs or render.ndim != 5:
        return render
    filled = render.clone()
    for index, photograph in photographs.items():
        image = as_frames([photograph])[0, 0] if isinstance(photograph, str | Path | Image.Image) else photograph
        if isinstance(image, np.ndarray):
            image = as_frames(image[None])[0, 0] if image.shape[-1:] == (3,) else torch.from_numpy(image)
        if not -render.shape[1] <= index < render.shape[1]:
            raise UserError(f"there is no frame {index} for a photograph; the render has {render.shape[1]} frames")
        if tuple(image.shape[-3:]) != tuple(render.shape[2:]):
            sizes = f"{tuple(image.shape)}, the render's frames {tuple(render.shape[2:])}"
            raise UserError(f"the photograph of frame {index} has shape {sizes}; resize and crop it to the same")
        filled[:, index] = image.to(filled)
    return filled


def check_render(render: Tensor) -> None:
    """Raises UserError for a render that is not [B, F, 3 or 4, H, W] of finite numbers in [0, 1]."""
    if render.ndim != 5 or render.shape[2] not in (3, 4):
        raise UserError(f"render has shape {tuple(render.shape)}; give frames as [batch, frames, 3, height, width]")
    if not render.numel():
        raise UserError(f"render has shape {tuple(render.shape)}; give at least one clip of at least one frame")
    if not torch.isfinite(render).all():
        raise UserError("the render holds NaN or infinity; check the point cloud and the cameras")
    if render.min() < -RANGE_TOLERANCE or render.max() > 1 + RANGE_TOLERANCE:
        low, high = render.min().item(), render.max().item()
        raise UserError(f"the render's values lie in {low:g}..{high:g}; scale them to 0..1")


def check_parts(parts: Mapping[str, Any]) -> None:
    """Raises UserError for networks on several devices or of several types; a float32 VAE or decoder suits any.

    Networks that accelerate moves about (`enable_model_cpu_offload`) may be anywhere.
    """
    kinds: dict[str, set[tuple[torch.dtype, str]]] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            tensors = [x for x in (*part.parameters(), *part.buffers()) if x.is_floating_point()]
            moved = hasattr(part, "_hf_hook")
            kinds[name] = {(x.dtype, "" if moved else str(x.device)) for x in tensors}
    devices = {name: {device for _, device in found if device} for name, found in kinds.items()}
    if len(set().union(*devices.values())) > 1:
        told = ", ".join(f"{name} on {' and '.join(sorted(found))}" for name, found in devices.items() if found)
        raise UserError(f"the model's parts are on different devices ({told}); move it whole: pipeline.to('cuda')")
    dtypes = {name: {dtype for dtype, _ in found} for name, found in kinds.items()}
    for name in ("vae", "fast_decoder"):
        if dtypes.get(name) == {torch.float32}:
            dtypes.pop(name)
    if len(set().union(*dtypes.values())) > 1:
        names = {
            name: " and ".join(sorted(str(x).removeprefix("torch.") for x in found)) for name, found in dtypes.items()
        }
        told = ", ".join(f"{name} {found}" for name, found in names.items() if found)
        raise UserError(
            f"the model's parts have different types ({told}); convert it whole: pipeline.to(torch.float32)"
        )


def check_output_type(output_type: str | None) -> None:
    """Raises UserError for a type that no pipeline can give."""
    if output_type is not None and output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type {output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}")


def answer(frames: Tensor, output_type: str | None, return_dict: bool | None) -> Tensor | tuple | VideoOutput:
    """What a pipeline returns: the plain tensor, or, where either option is given, diffusers' form of it."""
    if output_type is None and return_dict is None:
        return frames
    if output_type in ("np", "pil"):
        processor = VideoProcessor(do_normalize=False)
        frames = frames[:, :, :3] if output_type == "pil" else frames  # disparity would be taken for transparency
        frames = processor.postprocess_video(frames.transpose(1, 2), output_type)
    return (frames,) if return_dict is False else VideoOutput(frames)
