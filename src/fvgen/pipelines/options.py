"""What every pipeline's call takes beside its sampler's own arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

    from fvgen.pipelines.cameras import GivenCameras

OnStepEnd = Callable[[Any, int, int, dict], dict | None]  # diffusers' callback_on_step_end


class CallOptions(TypedDict, total=False):
    """Keywords of a pipeline's call; any may be left out.

    photographs: frame index to photograph, for renders whose known frames are not replaced yet.
    prompt: a text (or one per clip) other than the model's own; needs text encoder and tokenizer.
    fps: the network's frame rate where it has one (ViewCrafter's `frame_stride`), its default if not given.
    reference: [3, H, W] or [B, 3, H, W] in [0, 1], for a model that looks at a photograph beside the clip; [n, 3, H, W]
        or [B, n, 3, H, W] for one that looks at n of the clip's own frames, in their place.
    cameras: `fvgen.geometry.cameras.Cameras` of the F frames at H x W, one path for all clips or a list of one per
        clip, for a model that is guided by them; where the world is and how long its unit is does not matter.
    callback_on_step_end: diffusers' callback (pipeline, index, timestep, tensors) -> changed tensors.
    callback_on_step_end_tensor_inputs: which tensors it is given, of "latents" and "x0".
    output_type: "pt", "np", "pil" or "latent", see `fvgen.pipelines.frames.VideoOutput`.
    return_dict: False for a tuple. With neither this nor `output_type` the result is the plain tensor.
    """

    photographs: Mapping[int, Any] | None
    prompt: str | Sequence[str] | None
    fps: int | None
    reference: Tensor | None
    cameras: GivenCameras
    callback_on_step_end: OnStepEnd | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    output_type: str | None
    return_dict: bool | None
