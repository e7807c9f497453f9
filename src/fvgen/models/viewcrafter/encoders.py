"""What goes before the image projector and the UNet's text branch: prompts and photographs, made ready and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from fvgen.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

# Mean and standard deviation of CLIP's training images (Radford et al. 2021).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PROMPT = "Rotating view of a scene"  # ViewCrafter's only one
# CLIP's ids of PROMPT and of the empty text, start and end included: what a checkpoint without a tokenizer needs.
PROMPT_IDS = (49406, 32265, 1093, 539, 320, 3562, 49407)
EMPTY_IDS = (49406, 49407)

RESIZES = ("viewcrafter", "antialias")


class FixedPrompts(ModelMixin, ConfigMixin):
    """The only two prompts that ViewCrafter ever uses, already encoded: its fixed sentence and the empty one.

    Both are [1, tokens, dim]. The text tower is needed once, to fill them, and never again.
    """

    @register_to_config
    def __init__(self, tokens: int = 77, dim: int = 1024) -> None:
        super().__init__()
        self.register_buffer("positive", torch.zeros(1, tokens, dim))
        self.register_buffer("negative", torch.zeros(1, tokens, dim))

    @classmethod
    def random(cls, tokens: int, dim: int, generator: torch.Generator) -> FixedPrompts:
        """Standard normal tokens: for a teacher that is trained from scratch, two labels are all that prompts are."""
        prompts = cls(tokens, dim)
        prompts.positive.normal_(generator=generator)
        prompts.negative.normal_(generator=generator)
        return prompts

    @classmethod
    def encoded(cls, positive: Tensor, negative: Tensor) -> FixedPrompts:
        """From encoded texts, each [1, tokens, dim]."""
        prompts = cls(*positive.shape[1:])
        prompts.positive.copy_(positive)
        prompts.negative.copy_(negative)
        return prompts


def clip_pixels(image: Tensor, size: int, resize: str = "viewcrafter") -> Tensor:
    """Photographs [B, 3, H, W] in [-1, 1] to CLIP's input [B, 3, size, size]; the aspect ratio is not kept.

    Args:
        image: values outside [-1, 1] are not clipped.
        size: side of CLIP's square input.
        resize: "viewcrafter" blurs and resizes as its published models need it (see `resize_viewcrafter`);
            "antialias" is torch's own antialiased bilinear interpolation, with which the tiny teacher was trained.
    """
    if resize == "viewcrafter":
        resized = resize_viewcrafter(image.float(), size)
    elif resize == "antialias":
        resized = F.interpolate(image, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    else:
        raise UserError(f"image_resize {resize!r} is unknown; choose one of {', '.join(RESIZES)}")
    mean, std = (resized.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (resized / 2 + 0.5 - mean) / std


def resize_viewcrafter(image: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, C, size, size]: Gaussian blur if either side shrinks, then bicubic between corner centres.

    With f the factor by which an axis shrinks, its blur has a standard deviation of max((f - 1) / 2, 0.001) pixels and
    int(4 sigma) taps, at least 3, made odd; borders are mirrored. That is what kornia 0.9 does with `antialias`.
    """
    factors = [side / size for side in image.shape[2:]]
    if max(factors) > 1:
        for axis, factor in enumerate(factors):
            image = _blur(image, max((factor - 1) / 2, 0.001), 2 + axis)
    return F.interpolate(image, size=(size, size), mode="bicubic", align_corners=True)


def _blur(image: Tensor, sigma: float, axis: int) -> Tensor:
    """Blur [B, C, H, W] along one of its last two axes."""
    taps = max(int(4 * sigma), 3) | 1
    offsets = torch.arange(taps, device=image.device, dtype=image.dtype) - taps // 2
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)  # a normalised Gaussian
    along_height = axis == 2
    pad = taps // 2
    padded = F.pad(image, (0, 0, pad, pad) if along_height else (pad, pad, 0, 0), mode="reflect")
    weight = kernel.view(1, 1, -1, 1) if along_height else kernel.view(1, 1, 1, -1)
    channels = image.shape[1]
    return F.conv2d(padded, weight.expand(channels, -1, -1, -1), groups=channels)


def encode_tokens(encoder: CLIPTextModelWithProjection, ids: Tensor) -> Tensor:
    """Token ids [B, 77] to text tokens [B, 77, D]: the last layer but one, then the final norm."""
    hidden = encoder(ids.to(encoder.device), output_hidden_states=True).hidden_states[-2]
    return getattr(encoder, "text_model", encoder).final_layer_norm(hidden)


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str], length: int = 77) -> Tensor:
    """Texts to ids [B, length], cut or padded with 0 (open_clip's habit, which is not the tokenizer's own)."""
    rows = tokenizer(list(prompts), truncation=True, max_length=length).input_ids
    return padded_ids(rows, length)


def padded_ids(rows: Sequence[Sequence[int]], length: int = 77) -> Tensor:
    """Rows of ids as one tensor [B, length], filled up with 0."""
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
