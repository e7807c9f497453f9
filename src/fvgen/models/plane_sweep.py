"""A plane sweep through a clip's latents: at which distances do its frames agree? (Collins 1996; as a cost volume of
learnt features Yao et al. 2018, and in front of Gaussians MVSplat, Chen et al. 2024)

    f      = normalise(conv(gelu(conv(gelu(conv(z))))))          r maps of C channels for a latent frame: one a frame
    X_k    = o_i + d_k ray_i(p)                                  distance d_k from frame i, through its pixel p
    s_k(p) = a mean over the frames j that see X_k of  <f_i(p), f_j(where j sees X_k)>
    n_k(p) = share of the frames j that see it

A transformer could find this out by itself; in small, in as many updates, it did not (docs/wonderland.md). Every frame
is compared with up to `SOURCES` frames, spread over the clip, but itself. Pixels here are the latents'.

Letters: F frames in F' latent frames, r = squeeze, K planes, S sources, a = sharpness, which is learnt.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, normalize
from torch.utils.checkpoint import checkpoint

from fvgen.geometry.cameras import Cameras, project
from fvgen.geometry.plucker import folded, rays, unpacked

SOURCES = 9
IN_FRONT = 0.05  # units of the path: a camera sees nothing nearer
WIDTH, CHANNELS = 64, 16  # of the layers before, and of the features that are compared
SHARP = 4.0  # a, at the start


class PlaneSweep(nn.Module):
    """Args: channels: of the latents. squeeze: r."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.squeeze = squeeze
        widths = (channels, WIDTH, WIDTH, squeeze * CHANNELS)
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.features = nn.Sequential(convolutions[0], nn.GELU(), convolutions[1], nn.GELU(), convolutions[2])
        self.sharpness = nn.Parameter(torch.tensor(SHARP))

    def forward(self, latents: Tensor, path: Tensor, away: Tensor, again: bool = False) -> Tensor:
        """[B, F', 2 r K, h, w] of scaled ``latents`` [B, C, F', h, w] and ``path`` [B, F, 21], `packed` and
        `normalised`: similarities and shares at distances ``away`` [K] along the rays, grouped by latent frame as the
        VAE groups frames. ``again``: nothing is kept for the backward pass but the features."""
        clips, _, frames, h, w = latents.shape
        maps = self.features(latents.transpose(1, 2).flatten(0, 1)).unflatten(1, (self.squeeze, -1))
        maps = maps.unflatten(0, (clips, frames)).flatten(1, 2)[:, self.squeeze - 1 :]  # latent frame 0 is one frame
        maps = normalize(maps.float(), dim=2)
        volumes = []
        for seen, own in zip(maps, path, strict=True):
            rows = [seen, unpacked(own.float(), h, w), away]
            parts = [
                checkpoint(agreement, frame, *rows, use_reentrant=False) if again else agreement(frame, *rows)
                for frame in range(len(seen))
            ]
            alike, share = (torch.stack(each) for each in zip(*parts, strict=True))
            volumes.append(folded(torch.cat([self.sharpness * alike, share], dim=1), self.squeeze))
        return torch.stack(volumes).to(latents.dtype)


def agreement(frame: int, features: Tensor, cameras: Cameras, away: Tensor) -> tuple[Tensor, Tensor]:
    """(mean similarity, share of the sources that see the place), [K, h, w], of a frame's pixels at distances ``away``
    [K] along their rays; ``features`` [F, C, h, w] of all frames, ``cameras`` F of that size. Where no source sees it,
    both are 0."""
    count, _, h, w = features.shape
    most = min(count, SOURCES)
    sources = [other for i in range(most) if (other := round(i * (count - 1) / max(1, most - 1))) != frame]
    origin, directions = rays(cameras[[frame]], h, w)
    points = origin[0] + away[:, None, None, None] * directions[0]
    pixels, depth = project(points.flatten(0, 2), cameras[sources])
    grid = 2 * pixels / pixels.new_tensor([w, h]) - 1  # [S, K h w, 2]
    sees = (depth > IN_FRONT) & (grid.abs() < 1).all(-1)
    grid = torch.where(sees[..., None], grid, 0.0).unflatten(1, (len(away), -1))
    there = grid_sample(features[sources], grid, padding_mode="border", align_corners=False)  # [S, C, K, h w]
    alike = (there * features[frame].flatten(1)[:, None]).sum(1)
    sees = sees.unflatten(1, (len(away), -1)).to(alike)
    many = sees.sum(0)
    alike, share = (alike * sees).sum(0) / many.clamp(min=1), many / max(1, len(sources))
    return alike.unflatten(1, (h, w)), share.unflatten(1, (h, w))
