"""Building blocks of ViewCrafter's video UNet: residual, spatial and temporal attention blocks.

Letters: B batch, F frames, C channels, H W latent size, N tokens, M context tokens, D width.

Every block maps features [B*F, C, H, W] (frames of one clip are consecutive) to the same layout and takes what it
needs from `Conditions`. Temporal parts see the same memory as [B, C, F, H, W]; in channels-last memory all changes of
layout in this file are views.

Architecture: ViewCrafter (Yu et al. 2024), which follows DynamiCrafter (Xing et al. 2023).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from einops import rearrange
from torch import Tensor, nn

RESNET_EPS = 1e-5
TRANSFORMER_EPS = 1e-6


class Conditions(NamedTuple):
    """What every block may look at, computed once per forward pass."""

    embedding: Tensor  # [B, E] sum of the timestep's and the frame rate's embedding
    text: Tensor  # [B, M, D] text tokens, shared by all frames
    image: Tensor  # [B, M, D] image tokens shared by all frames, or [B*F, M, D] one set per frame
    frames: int  # F


def zero_init(layer: nn.Module) -> nn.Module:
    """Fill a layer's parameters with zeros, so that its residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def frames_to_clip(x: Tensor, frames: int) -> Tensor:
    """[B*F, C, H, W] -> [B, C, F, H, W]."""
    return rearrange(x, "(b f) c h w -> b c f h w", f=frames)


def clip_to_frames(x: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B*F, C, H, W]."""
    return rearrange(x, "b c f h w -> (b f) c h w")


class TemporalConvStage(nn.Module):
    """Group norm over all frames, SiLU, dropout, convolution over three frames: [B, C, F, H*W] -> same.

    Positions are one axis here, because a 2-D convolution of size 3x1 takes half the time of a 3-D one of size 3x1x1
    on a CPU.
    """

    def __init__(self, channels: int, groups: int, dropout: float):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=RESNET_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.dropout(F.silu(self.norm(x))))


class TemporalConv(nn.Module):
    """Four temporal stages around a skip connection; the last one starts at zero."""

    def __init__(self, channels: int, groups: int, dropout: float):
        super().__init__()
        rates = (0.0, dropout, dropout, dropout)
        self.stages = nn.Sequential(*(TemporalConvStage(channels, groups, rate) for rate in rates))
        zero_init(self.stages[-1].conv)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        clip = rearrange(x, "(b f) c h w -> b c f (h w)", f=frames)
        return rearrange(clip + self.stages(clip), "b c f (h w) -> (b f) c h w", h=x.shape[2])


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the embedding added in between, a skip connection, then a temporal convolution."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, groups: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=RESNET_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding_proj = nn.Linear(embedding_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=RESNET_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same_width = in_channels == out_channels
        self.skip = nn.Identity() if same_width else nn.Conv2d(in_channels, out_channels, 1)
        self.temporal = TemporalConv(out_channels, groups, dropout)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        shift = self.embedding_proj(F.silu(conditions.embedding))
        h = h + shift.repeat_interleave(conditions.frames, dim=0)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.temporal(self.skip(x) + h, conditions.frames)


class InputConv(nn.Conv2d):
    """The first convolution, with the signature of a block."""

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        return super().forward(x)


class Downsample(nn.Module):
    """Halve the latent size with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        return self.down(x)


class Upsample(nn.Module):
    """Double the latent size by nearest neighbours, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of queries [G*R, N, D] to a context [G, M, D_context] (itself by default).

    R consecutive query sequences may share one context: they are folded into one longer sequence, so that keys and
    values are computed once per clip and not once per frame. With `image_branch`, the queries also attend to a second
    context through keys and values of its own, and both results are added before the output layer.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        image_branch: bool = False,
        learnable_image_scale: bool = False,
    ):
        super().__init__()
        inner, source = heads * head_dim, context_dim or width
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(source, inner, bias=False)
        self.to_v = nn.Linear(source, inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        if image_branch:
            self.to_k_image = nn.Linear(source, inner, bias=False)
            self.to_v_image = nn.Linear(source, inner, bias=False)
        self.image_gate = nn.Parameter(torch.zeros(())) if image_branch and learnable_image_scale else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        folded = q.reshape(k.shape[0], -1, q.shape[-1])
        q_heads, k_heads, v_heads = (rearrange(x, "g n (a d) -> g a n d", a=self.heads) for x in (folded, k, v))
        out = F.scaled_dot_product_attention(q_heads, k_heads, v_heads)
        return rearrange(out, "g a n d -> g n (a d)").reshape(q.shape)

    def forward(self, x: Tensor, context: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.to_q(x)
        out = self._attend(q, self.to_k(context), self.to_v(context))
        if image is not None and image.shape[1] > 0:
            from_image = self._attend(q, self.to_k_image(image), self.to_v_image(image))
            scale = 1.0 if self.image_gate is None else torch.tanh(self.image_gate) + 1.0
            out = out + scale * from_image
        return self.to_out(out)


class TransformerLayer(nn.Module):
    """Pre-norm layer: self-attention, a second attention, GEGLU feed-forward.

    The second attention looks at text and image tokens if `context_dim` is given, else at the sequence itself.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        learnable_image_scale: bool = False,
    ):
        super().__init__()
        crosses = context_dim is not None
        self.norm_attn1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, head_dim)
        self.norm_attn2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, head_dim, context_dim, crosses, learnable_image_scale)
        self.norm_ff = nn.LayerNorm(width)
        self.ff = FeedForward(width, activation_fn="geglu")

    def forward(self, x: Tensor, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm_attn1(x))
        x = x + self.attn2(self.norm_attn2(x), text, image)
        return x + self.ff(self.norm_ff(x))


class SpatialTransformer(nn.Module):
    """Attention among the positions of each frame, and from them to the text and image tokens."""

    def __init__(
        self, channels: int, head_dim: int, groups: int, context_dim: int, learnable_image_scale: bool = False
    ):
        super().__init__()
        heads = channels // head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.layer = TransformerLayer(channels, heads, head_dim, context_dim, learnable_image_scale)
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        tokens = self.proj_out(self.layer(tokens, conditions.text, conditions.image))
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


class TemporalTransformer(nn.Module):
    """Attention among the frames at each position; its group norm takes statistics over the whole clip."""

    def __init__(self, channels: int, heads: int, head_dim: int, groups: int):
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Linear(channels, inner)
        self.layer = TransformerLayer(inner, heads, head_dim)
        self.proj_out = zero_init(nn.Linear(inner, channels))

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        height, width = x.shape[2:]
        clip = self.norm(frames_to_clip(x, conditions.frames))
        tokens = self.proj_in(rearrange(clip, "b c f h w -> (b h w) f c"))
        tokens = self.proj_out(self.layer(tokens))
        return x + rearrange(tokens, "(b h w) f c -> (b f) c h w", h=height, w=width)


class Stage(nn.ModuleList):
    """Layers applied one after the other, all with the same conditions."""

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        for layer in self:
            x = layer(x, conditions)
        return x
