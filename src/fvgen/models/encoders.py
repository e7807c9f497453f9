"""What goes before the image projector: prompts encoded ahead of time, photographs made ready for CLIP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

# Mean and standard deviation of CLIP's training images (Radford et al. 2021).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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


def clip_pixels(image: Tensor, size: int) -> Tensor:
    """Photographs [B, 3, H, W] in [-1, 1] to CLIP's input [B, 3, size, size]; the aspect ratio is not kept."""
    resized = F.interpolate(image, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (image.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (resized / 2 + 0.5 - mean) / std
