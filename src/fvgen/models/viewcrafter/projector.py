"""From an image embedder's tokens to the image tokens that the UNet attends to.

Letters: B batch, L embedder tokens, N learned latents (queries), D width.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn


class ResamplerAttention(nn.Module):
    """Latents [B, N, D] attend to image tokens [B, L, D] and to themselves; both are normalised separately."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        context = torch.cat([self.norm_tokens(tokens), latents], dim=1)
        q, (k, v) = self.to_q(latents), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (rearrange(x, "b n (a d) -> b a n d", a=self.heads) for x in (q, k, v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b a n d -> b n (a d)"))


def feed_forward(width: int, mult: int) -> nn.Sequential:
    """LayerNorm, then two linear layers without biases around a GELU."""
    hidden = width * mult
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
    )


class ImageProjector(ModelMixin, ConfigMixin):
    """ViewCrafter's resampler: a fixed number of image tokens per frame from any number of embedder tokens.

    The architecture is the perceiver resampler of IP-Adapter (Ye et al. 2023) with learned latents for every frame.

    Args:
        dim: width of the latents.
        depth: number of attention and feed-forward layers.
        dim_head: width of an attention head.
        heads: number of heads; heads * dim_head need not equal `dim`.
        num_queries: image tokens per frame.
        video_length: frames that have tokens of their own (16 in the published models, whatever the clip's length).
        embedding_dim: width of the embedder's tokens (1280 for CLIP ViT-H).
        output_dim: width of the UNet's context.
        ff_mult: width of the feed-forward layers in units of `dim`.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 1024,
        depth: int = 4,
        dim_head: int = 64,
        heads: int = 12,
        num_queries: int = 16,
        video_length: int = 16,
        embedding_dim: int = 1280,
        output_dim: int = 1024,
        ff_mult: int = 4,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_queries * video_length, dim) / dim**0.5)
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([ResamplerAttention(dim, heads, dim_head), feed_forward(dim, ff_mult)]) for _ in range(depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Embedder tokens [B, L, embedding_dim] -> image tokens [B, video_length * num_queries, output_dim]."""
        tokens = self.proj_in(tokens)
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        for attention, transform in self.layers:
            latents = latents + attention(tokens, latents)
            latents = latents + transform(latents)
        return self.norm_out(self.proj_out(latents))
