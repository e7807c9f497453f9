"""The network of the fair step benchmark: a library-free video transformer.

Sizes as in the comparison with FastGen: width 128, depth 4, 4 heads, patch (1, 2, 2), latents [2, 4, 8, 16, 16],
context [2, 16, 64]; adaptive layer norms, self-attention over all 512 tokens, cross-attention, a GELU feed-forward:
1.51 M parameters. Its `call` is what a family's is, so that fvgen's own
method drives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fvgen.models.condition import Condition
from fvgen.models.denoiser import Prediction

LATENTS, CONTEXT = (2, 4, 8, 16, 16), (2, 16, 64)
TAP, TAPS = 2, ("block.2",)  # the discriminator looks at what this block puts out


class StepHead(nn.Module):
    """A discriminator of the compared size, 0.26 M parameters: [B, D, F, h, w] to logits [B, F/2, h/2, w/2]."""

    def __init__(self, width: int = 128, inner: int = 32) -> None:
        super().__init__()
        self.down, self.out = nn.Conv3d(width, inner, 4, stride=2, padding=1), nn.Conv3d(inner, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(F.leaky_relu(self.down(features), 0.2)).squeeze(1)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """[B] -> [B, width]."""
    half = width // 2
    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward: [B, N, D] -> same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.modulation = nn.Linear(width, 6 * width)
        self.to_qkv, self.out_self = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.to_q, self.to_kv, self.out_cross = (nn.Linear(width, n * width) for n in (1, 2, 1))
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def _attend(self, *q_k_v: Tensor) -> Tensor:
        heads = (rearrange(x, "b n (a d) -> b a n d", a=self.heads) for x in q_k_v)
        return rearrange(F.scaled_dot_product_attention(*heads), "b a n d -> b n (a d)")

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        h = self.norms[0](x) * (1 + scale1) + shift1
        x = x + gate1 * self.out_self(self._attend(*self.to_qkv(h).chunk(3, dim=-1)))
        x = x + self.out_cross(self._attend(self.to_q(self.norms[1](x)), *self.to_kv(context).chunk(2, dim=-1)))
        return x + gate2 * self.feed_forward(self.norms[2](x) * (1 + scale2) + shift2)


class StepNetwork(nn.Module):
    """[B, 4, F, H, W] latents, [B] timesteps and [B, M, D'] context to a velocity."""

    def __init__(self, channels: int = 4, width: int = 128, depth: int = 4, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.width = width
        self.patches = nn.Conv3d(channels, width, (1, 2, 2), (1, 2, 2))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.context = nn.Linear(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.out = nn.Linear(width, 4 * channels)

    def forward(
        self, x_t: Tensor, t: Tensor, context: Tensor, tapped: bool = False, stop: bool = False, cut: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """(velocity, features [B, D, F, h, w] of the one tap where ``tapped``): see `fvgen.models.denoiser.Call`."""
        time = self.time(sinusoid(t, 256))
        context, x, features = self.context(context), self.patches(x_t), None
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        with_graph = torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            with torch.set_grad_enabled(with_graph):
                x = block(x, time, context)
            if index == TAP and tapped:
                features = x.transpose(1, 2).unflatten(2, grid)
                if stop:
                    return None, features
                with_graph = with_graph and not cut
        with torch.set_grad_enabled(with_graph):
            x = self.out(x).unflatten(1, grid)
            velocity = rearrange(x, "b f h w (c p q) -> b c f (h p) (w q)", p=2, q=2)
        return velocity, features


def call(
    network: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    taps: Sequence[str] = (),
    stop: bool = False,
    cut: bool = False,
) -> Prediction:
    """How fvgen runs it: the family's part of this benchmark."""
    context = condition.expanded(len(x_t))["context"]
    velocity, features = network(x_t, t, context, bool(taps), stop, cut)
    return Prediction(velocity, dict.fromkeys(taps, features))
