"""What LaLRM's numbers mean: Gaussians along the rays of a clip's own frames.

The paper gives no activations; these are chosen so that zeros are a fair start at any size of scene and image, and
that a Gaussian can be no wider than a few of its neighbours (docs/wonderland.md has the relatives' choices):

    distance   near^(1-w) far^w,  w = sigmoid(x + b)      along the ray; b puts zeros at ``typical``; linear in w where
                                                          far / near <= 50
    scale      distance / focal  exp(clamp(x, -3, 1.5)) / 2   focal in Gaussians: zeros are half the way to the next one
    opacity    sigmoid(x - 1), where there is one for every pixel sigmoid(x - 2)
    colour     sigmoid(x)
    rotation   normalise(x + (1, 0, 0, 0))                w x y z
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras
from fvgen.geometry.conventions import quaternion_product, rotation_to_quaternion
from fvgen.geometry.gaussians import LEAST_ALPHA, Gaussians
from fvgen.geometry.plucker import LINEAR, normalised, packed, rays, spread

if TYPE_CHECKING:  # diffusers takes seconds to import
    from fvgen.models.lalrm import LaLRM

START = 0.5  # ways to the next Gaussian: twice that is four times the pairs to draw, and blurs more than it closes
LEAST_SCALE, MOST_SCALE = -3.0, 1.5  # logarithms
FAINT, FAINTER = 1.0, 2.0  # what opacities' numbers start below, on coarse and full grids
COLOR, SCALE, ROTATION, OPACITY, DISTANCE = slice(0, 3), slice(3, 6), slice(6, 10), 10, 11


def distances(x: Tensor, near: float, far: float, typical: float) -> Tensor:
    """Of numbers of any shape; 0 gives ``typical``, -inf ``near``, inf ``far``."""
    low, middle, high = (math.log(d) if far / near > LINEAR else d for d in (near, typical, far))
    share = (middle - low) / (high - low)
    return spread(torch.sigmoid(x + math.log(share / (1 - share))), near, far)


def gaussians_along(numbers: Tensor, cameras: Cameras, settings: Mapping[str, Any]) -> Gaussians:
    """F H' W' Gaussians of ``numbers`` [12, F, H', W'], in the world of ``cameras`` (of the F frames); ``settings``:
    near, far, typical and pitch of a `LaLRM`."""
    height, width = numbers.shape[2:]
    origins, directions = rays(cameras.to(numbers.device), height, width)
    rows = numbers.permute(1, 2, 3, 0)  # [F, H', W', 12]
    away = distances(rows[..., DISTANCE, None], settings["near"], settings["far"], settings["typical"])
    focal = cameras.intrinsics[:, 0, 0].to(numbers) * width / cameras.width
    size = START * away / focal[:, None, None, None] * rows[..., SCALE].clamp(LEAST_SCALE, MOST_SCALE).exp()
    unturned = torch.tensor([1.0, 0.0, 0.0, 0.0]).to(numbers)
    faint = FAINTER if settings["pitch"] == 1 else FAINT
    return Gaussians(
        (origins[:, None, None] + away * directions).flatten(0, 2),
        size.flatten(0, 2),
        torch.nn.functional.normalize(rows[..., ROTATION] + unturned, dim=-1).flatten(0, 2),
        torch.sigmoid(rows[..., OPACITY] - faint).flatten(),
        torch.sigmoid(rows[..., COLOR]).flatten(0, 2),
    )


def own_grid(made: Gaussians, cameras: Cameras, height: int) -> tuple[Tensor, Tensor]:
    """(colours [F, 3, H', W'], depths [F, H', W']) of `gaussians_along`, each Gaussian as its own frame has it."""
    frames = len(cameras)
    poses = cameras.world_from_cam.to(made.means)
    offsets = made.means.unflatten(0, (frames, -1)) - poses[:, None, :3, 3]
    depths = (offsets * poses[:, None, :3, 2]).sum(-1).unflatten(1, (height, -1))
    return made.colors.unflatten(0, (frames, height, -1)).permute(0, 3, 1, 2), depths


@torch.no_grad()
def reconstructed(lalrm: LaLRM, latents: Tensor, cameras: Cameras, wanted: Tensor | None = None) -> Gaussians:
    """Gaussians in the cameras' own world and units from scaled ``latents`` [1, C, F', h, w] of a clip; those that
    nobody can see are left out. ``wanted``: [F] bool, only those of these frames. Raises UserError as `normalised`
    does."""
    path, scale = normalised(cameras)
    numbers = lalrm(latents.to(lalrm.device, lalrm.dtype), packed(path)[None].float().to(lalrm.device))[0].float()
    path = path.to(dtype=torch.float32)
    chosen = slice(None) if wanted is None else wanted
    seen = gaussians_along(numbers.cpu()[:, chosen], path[chosen], lalrm.config)
    seen = seen[seen.opacities >= LEAST_ALPHA]
    pose = cameras.world_from_cam[0].double()
    means = (seen.means.double() / scale) @ pose[:3, :3].T + pose[:3, 3]
    turned = quaternion_product(rotation_to_quaternion(pose[:3, :3]), seen.rotations.double())
    return Gaussians(means.float(), seen.scales / scale, turned.float(), seen.opacities, seen.colors)
