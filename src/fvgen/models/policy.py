"""DDPNet (VideoScene, Wang et al. 2025, section 3.3): looks at a render's latents and says where a leap should land."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

ARMS = tuple(60 * i - 1 for i in range(1, 11))  # 59 ... 599
WIDTHS = (32, 64, 96, 128)


class DDPNet(ModelMixin, ConfigMixin):
    """Four 2-D convolutions of stride 2, frames folded into the batch, features averaged over space and frames, and a
    logit for each of K timesteps. (The paper says "4 layers with normalisation and activation"; the rest is ours.)

    Args:
        channels: C of the latents.
        arms: the K timesteps that it chooses among.
        widths: of the convolutions, multiples of 8.
    """

    @register_to_config
    def __init__(self, channels: int = 16, arms: Sequence[int] = ARMS, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        layers, before = [], channels
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(before, len(arms))

    def forward(self, start: Tensor) -> Tensor:
        """Logits [B, K] of clean latents [B, C, F, h, w]."""
        frames = start.transpose(1, 2).flatten(0, 1).to(self.head.weight.dtype)
        features = self.layers(frames).mean(dim=(2, 3)).unflatten(0, (len(start), -1)).mean(dim=1)
        return self.head(features)

    @torch.no_grad()
    def choose(self, start: Tensor) -> Tensor:
        """[B] timesteps: the likeliest arm of each clip."""
        arms = torch.tensor(self.config.arms, device=start.device)
        return arms[self(start).argmax(dim=1)]
