"""The discriminator's head: small 3D convolutions on features of a large frozen network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class DiscriminatorHead(ModelMixin, ConfigMixin):
    """Features [B, C, F, h, w] to one logit per place and time [B, F, h, w]; positive means real.

    The paper names no layers. Ours: three 3x3x3 convolutions, group norm and leaky ReLU between them. Logits stay
    local (apart from the norms' statistics, each sees 7 frames and 7x7 feature cells), so a clip is judged in many
    places at once.

    Args:
        in_channels: width of the tapped features; a list of widths for as many taps, each with a tower of its own.
        channels: width inside.
        norm_num_groups: groups of the norms; must divide ``channels`` and the widths.
    """

    @register_to_config
    def __init__(self, in_channels: int | list[int], channels: int = 64, norm_num_groups: int = 8) -> None:
        super().__init__()
        first, *others = [in_channels] if isinstance(in_channels, int) else in_channels
        self.layers = _tower(first, channels, norm_num_groups)
        self.others = nn.ModuleList(_tower(width, channels, norm_num_groups) for width in others)

    def forward(self, *features: Tensor) -> Tensor:
        """Logits [B, F, h, w] of the features at the one tap; of several, all their logits in a row, [B, N]."""
        dtype = next(self.parameters()).dtype
        towers = (self.layers, *self.others)
        # Contiguous: with channels last, torch 2.6's GroupNorm crashes where its input needs no gradient.
        logits = [tower(x.to(dtype).contiguous()).squeeze(1) for tower, x in zip(towers, features, strict=True)]
        return logits[0] if len(logits) == 1 else torch.cat([each.flatten(1) for each in logits], dim=1)


def _tower(width: int, channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.GroupNorm(groups, width),
        nn.Conv3d(width, channels, 3, padding=1),
        nn.GroupNorm(groups, channels),
        nn.LeakyReLU(0.2),
        nn.Conv3d(channels, channels, 3, padding=1),
        nn.GroupNorm(groups, channels),
        nn.LeakyReLU(0.2),
        nn.Conv3d(channels, 1, 3, padding=1),
    )


def head_for(widths: Sequence[int], channels: int) -> DiscriminatorHead:
    """A fresh head for taps of these widths."""
    return DiscriminatorHead(widths[0] if len(widths) == 1 else list(widths), channels)
