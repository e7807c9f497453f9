"""The discriminator: a small 3D-convolutional head on features of the frozen teacher.

FVGen, section 4.1: the teacher's middle block sees the noised clip, the head tells real from fake. Only the head
learns. The teacher is cut at the tap, so nothing behind the middle block is computed or kept for the backward pass.
"""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fvgen.models.denoiser import Condition, Teacher


class DiscriminatorHead(ModelMixin, ConfigMixin):
    """Features [B, C, F, h, w] to one logit per place and time [B, F, h, w]; positive means real.

    The paper names no layers. Ours: three 3x3x3 convolutions, group norm and leaky ReLU between them. Logits stay
    local (apart from the norms' statistics, each sees 7 frames and 7x7 feature cells), so a clip is judged in many
    places at once.

    Args:
        in_channels: width of the tapped features.
        channels: width inside.
        norm_num_groups: groups of the norms; must divide ``channels``.
    """

    @register_to_config
    def __init__(self, in_channels: int, channels: int = 64, norm_num_groups: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(norm_num_groups, in_channels),
            nn.Conv3d(in_channels, channels, 3, padding=1),
            nn.GroupNorm(norm_num_groups, channels),
            nn.LeakyReLU(0.2),
            nn.Conv3d(channels, channels, 3, padding=1),
            nn.GroupNorm(norm_num_groups, channels),
            nn.LeakyReLU(0.2),
            nn.Conv3d(channels, 1, 3, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(next(self.parameters()).dtype)).squeeze(1)


def logits_of(head: DiscriminatorHead, teacher: Teacher, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Logits [B, F, h', w'] of noised clips x_t [B, 4, F, h, w] at timesteps t [B]."""
    return head(teacher.features(x_t, t, condition, tap="middle"))
