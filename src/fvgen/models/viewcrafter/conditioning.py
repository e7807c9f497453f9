"""What the published models of ViewCrafter's family are told beside the noise: settings, and the little they compute.

Four layouts fill the UNet's condition channels, always [B, 4, F, h, w] of scaled latents:

    renders       ViewCrafter            every frame of the point renders, photographs in place of known frames
    first_frame   DynamiCrafter          the first frame, the same latents for all
    ends          its interpolation      the first and the last frame in their places, exact zeros between them
    renders_rgbd  GenFusion              every frame of the renders, a fourth channel of disparity beside the colours

Frames are [B, F, C, H, W] in [0, 1], C 3 colours, and 4 with disparity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fvgen.errors import UserError, did_you_mean
from fvgen.models.viewcrafter.encoders import PROMPT

# Layout: its frames' channels.
LAYOUTS = {"renders": 3, "first_frame": 3, "ends": 3, "renders_rgbd": 4}
CONTEXTS = ("text_image", "image")
IMAGE_SOURCES = ("first_frame", "reference")
NEAREST = 1e-6  # GenFusion's smallest disparity, so that depth is finite


@dataclass(frozen=True)
class Conditioning:
    """How one published model is conditioned; the defaults are ViewCrafter's.

    Args:
        layout: what fills the condition channels, one of `LAYOUTS`.
        context: "text_image" has the text's tokens before the image's, with and without guidance; "image" has none.
        image_source: the photograph that becomes image tokens, the clip's "first_frame" or a "reference" beside it.
        prompt: the text where none is given; None with context "image".

    Raises:
        UserError: a choice that does not exist.
    """

    layout: str = "renders"
    context: str = "text_image"
    image_source: str = "first_frame"
    prompt: str | None = PROMPT

    def __post_init__(self) -> None:
        choices = {"layout": LAYOUTS, "context": CONTEXTS, "image_source": IMAGE_SOURCES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise UserError(f"there is no {name} {value!r} in conditioning{did_you_mean(str(value), known)}")

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> Conditioning:
        """From the entry in a model_index.json; None, as in older folders, is ViewCrafter's own."""
        try:
            return cls(**(settings or {}))
        except TypeError as error:
            raise UserError(f"conditioning has settings that are unknown here ({error}); update fvgen") from error

    @property
    def channels(self) -> int:
        """Of a frame."""
        return LAYOUTS[self.layout]

    @property
    def holds_renders(self) -> bool:
        """Whether the condition channels have every frame of the render."""
        return self.layout.startswith("renders")

    @property
    def has_text(self) -> bool:
        """Whether text tokens come before the image's."""
        return self.context == "text_image"

    def check(self, render: Tensor) -> None:
        """Raises UserError for frames [B, F, C, H, W] with another number of channels, or too few to have two ends."""
        if render.shape[2] != self.channels:
            raise UserError(
                f"render has shape {tuple(render.shape)}, but this model's frames have {self.channels} channels "
                f"(layout {self.layout}); give them as [batch, frames, {self.channels}, height, width]"
            )
        if self.layout == "ends" and render.shape[1] < 2:
            raise UserError("a clip of one frame has no two ends to fill between; give at least two frames")

    def frames_to_encode(self, render: Tensor) -> Tensor:
        """Of frames [B, F, C, H, W] those [B, N, C, H, W] that the VAE has to see; N is F, 1 or 2."""
        if self.layout == "first_frame":
            return render[:, :1]
        return render[:, [0, -1]] if self.layout == "ends" else render

    def spread(self, latents: Tensor, frames: int) -> Tensor:
        """Latents [B, 4, N, h, w] of `frames_to_encode` in their places: [B, 4, F, h, w]."""
        if self.layout == "first_frame":
            return latents.expand(-1, -1, frames, -1, -1).contiguous()
        if self.layout == "ends":
            spread = latents.new_zeros(*latents.shape[:2], frames, *latents.shape[3:])
            spread[:, :, [0, -1]] = latents
            return spread
        return latents

    def photograph(self, render: Tensor, reference: Tensor | None = None) -> Tensor:
        """The colours [B, 3, H, W] that feed the image branch, from frames [B, F, C, H, W] or the reference.

        Raises UserError for a reference (one [3, H, W] or [1, 3, H, W] for all clips, or one per clip) that is missing,
        not asked for or of another shape.
        """
        if self.image_source == "first_frame":
            if reference is not None:
                raise UserError("this model looks at the clip's first frame; leave the reference photograph out")
            return render[:, 0, :3]
        if reference is None:
            raise UserError("this model looks at a photograph beside the clip; give one as reference")
        rows = reference[None] if reference.ndim == 3 else reference
        if rows.ndim != 4 or rows.shape[1] != 3 or rows.shape[0] not in (1, render.shape[0]):
            raise UserError(f"reference has shape {tuple(reference.shape)}; give [3, height, width], or one per clip")
        return rows.expand(render.shape[0], -1, -1, -1).to(render)


def disparity(depth: Tensor) -> Tensor:
    """Depth [B, F, 1, H, W] (0 where unknown) to disparity in [0, 1] of the same shape, 0 where unknown.

    As GenFusion's caller makes it: 1 / depth, its range over a clip's known pixels stretched to [0, 1].
    """
    known = depth > 0
    inverse = torch.where(known, 1 / depth.clamp(min=torch.finfo(depth.dtype).tiny), torch.zeros_like(depth))
    flat, there = inverse.flatten(1), known.flatten(1)
    low = flat.masked_fill(~there, torch.inf).amin(1)
    high = flat.masked_fill(~there, -torch.inf).amax(1)
    shape = (-1, *[1] * (depth.ndim - 1))
    low, span = low.view(shape), (high - low).view(shape)
    stretched = (inverse - low) / torch.where(span > 0, span, torch.ones_like(span))
    return torch.where(known, stretched, torch.zeros_like(depth))


def with_disparity(render: Tensor, depth: Tensor) -> Tensor:
    """Renders [B, F, 3, H, W] in [0, 1] and their depth [B, F, 1, H, W] as frames [B, F, 4, H, W] in [0, 1]."""
    return torch.cat([render, disparity(depth).to(render)], dim=2)


def depth_of(frames: Tensor) -> Tensor:
    """Depth [B, F, 1, H, W] up to the scale and shift of disparity, from decoded frames [B, F, 4, H, W]."""
    return 1 / (frames[:, :, 3:].clamp(0, 1) + NEAREST)
