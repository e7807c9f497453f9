"""LaLRM: a clip's latents and its cameras to 3D Gaussians in one pass (Wonderland, Liang et al. 2025, section 3.3).

    l = conv(z)                    latents [B, C, F', h, w], patches of p, frame by frame     to D channels
    c = conv(fold(plucker))        rays of the pixels behind each patch, frames folded as the VAE folds them
    s = conv(sweep(z, cameras))    where frames agree, patches of p, where there are planes
    x = LN(W [LN l ; LN c ; LN s]) N = F' h/p w/p tokens
    x = x + attention(LN x);  x = x + mlp(LN x)                                               L times
    g = transposed conv(x)         12 numbers for each Gaussian, [B, 12, F, H', W']

Blocks are GS-LRM's, as the paper says: before each part a norm, no bias anywhere, MLPs four times as wide, GELU, no
positions (rays carry them). F = r (F' - 1) + 1 frames come out of F' latent frames by a kernel of r + 1 in time, and
g x g Gaussians out of a token, one for ``pitch`` x ``pitch`` pixels. What the numbers mean: `fvgen.splats.raymap`.
The sweep (`fvgen.models.plane_sweep`) is ours; without planes the network is the paper's.

Letters: s pixels to a latent pixel, r frames to a latent frame, D channels of a token.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fvgen.errors import UserError
from fvgen.geometry.plucker import folded, plucker, spread, unpacked
from fvgen.models.family import LatentGrid
from fvgen.models.plane_sweep import PlaneSweep

NUMBERS = 12  # of a Gaussian: colour 3, scale 3, rotation 4, opacity, distance
QUIET = 0.3  # the last layer starts this much smaller than layers do: Gaussians begin near what zeros mean


class Block(nn.Module):
    """Attention and MLP, each on the norm of what it is added to."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm_attention, self.norm_mlp = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to the same."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class LaLRM(ModelMixin, ConfigMixin):
    """Args:
        latent_channels: C. time_squeeze, space_squeeze: r (1 or 4) and s of the VAE.
        patch: p. width: D, a multiple of head_dim. layers: L.
        pitch: pixels from a Gaussian to the next, a divisor of p s; 1 is one for every pixel, 2 the paper's.
        near, far, typical: distances along a ray, in units of a `normalised` path; ``typical`` is where they start.
        cameras: look at the rays; else tokens know nothing of where the camera was (an ablation).
        planes: of a sweep through the clip, spread from ``near`` to ``far`` as distances are; 0 for none.

    Raises UserError for settings that do not fit each other.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        time_squeeze: int = 4,
        space_squeeze: int = 8,
        patch: int = 2,
        width: int = 1024,
        layers: int = 24,
        head_dim: int = 64,
        pitch: int = 2,
        near: float = 0.2,
        far: float = 20.0,
        typical: float = 3.0,
        cameras: bool = True,
        planes: int = 0,
    ) -> None:
        super().__init__()
        side = patch * space_squeeze
        if width % head_dim:
            raise UserError(f"width={width} is no multiple of head_dim={head_dim}; give one")
        if side % pitch:
            raise UserError(f"pitch={pitch} does not divide a token's {side} pixels; give one that does")
        if not 0 < near < typical < far:
            raise UserError(f"near={near}, typical={typical}, far={far} are not 0 < near < typical < far; give such")
        if planes and not cameras:
            raise UserError(f"planes={planes} need to know the cameras; set cameras=true, or planes=0")
        self.latents = nn.Conv2d(latent_channels, width, patch, patch, bias=False)
        self.norm_latents, self.norm = (nn.LayerNorm(width, bias=False) for _ in range(2))
        if cameras:
            self.rays = nn.Conv2d(6 * time_squeeze, width, side, side, bias=False)
            self.norm_rays = nn.LayerNorm(width, bias=False)
            self.fuse = nn.Linear((3 if planes else 2) * width, width, bias=False)
        if planes:
            self.sweep = PlaneSweep(latent_channels, time_squeeze)
            self.volume = nn.Conv2d(2 * time_squeeze * planes, width, patch, patch, bias=False)
            self.norm_volume = nn.LayerNorm(width, bias=False)
        self.blocks = nn.ModuleList(Block(width, head_dim) for _ in range(layers))
        kernel, step, cut = (time_squeeze + 1, time_squeeze, time_squeeze // 2) if time_squeeze > 1 else (1, 1, 0)
        grown = (side // pitch,) * 2
        self.gaussians = nn.ConvTranspose3d(width, NUMBERS, (kernel, *grown), (step, *grown), (cut, 0, 0), bias=False)
        with torch.no_grad():
            self.gaussians.weight.mul_(QUIET)
        self.gradient_checkpointing = False

    @property
    def latent_grid(self) -> LatentGrid:
        """What a latent stands for that it takes."""
        return LatentGrid(self.config.latent_channels, self.config.time_squeeze, self.config.space_squeeze)

    def forward(self, latents: Tensor, path: Tensor) -> Tensor:
        """[B, 12, F, H', W'] of scaled ``latents`` [B, C, F', h, w] and ``path`` [B, F, 21], `packed` and `normalised`
        cameras of the F frames. H' = s h / pitch."""
        config, side = self.config, self.config.space_squeeze * self.config.patch
        clips, _, frames, h, w = latents.shape
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        assert h % config.patch == 0 and w % config.patch == 0, (h, w)
        x = self.norm_latents(_tokens(self.latents(latents.transpose(1, 2).flatten(0, 1)), clips))
        if config.cameras:
            with torch.no_grad():
                size = h * config.space_squeeze, w * config.space_squeeze
                embedding = plucker(unpacked(path.flatten(0, 1), *size)).unflatten(0, (clips, -1))
                grouped = folded(embedding, config.time_squeeze).to(x.dtype)
            assert grouped.shape[1] == frames, (grouped.shape, frames)
            rays = self.norm_rays(_tokens(self.rays(grouped.flatten(0, 1)), clips))
            parts = [x, rays]
            if config.planes:
                shares = (torch.arange(config.planes, device=x.device) + 0.5) / config.planes
                volume = self.sweep(latents, path, spread(shares, config.near, config.far), again)
                parts.append(self.norm_volume(_tokens(self.volume(volume.flatten(0, 1)), clips)))
            x = self.fuse(torch.cat(parts, dim=-1))
        x = self.norm(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        grid = (frames, h * config.space_squeeze // side, w * config.space_squeeze // side)
        return self.gaussians(x.transpose(1, 2).unflatten(2, grid))


def _tokens(features: Tensor, clips: int) -> Tensor:
    """[B F', D, y, x] to [B, F' y x, D]."""
    return features.unflatten(0, (clips, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)
