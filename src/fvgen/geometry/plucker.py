"""Cameras as a network reads them: rays through pixels, and their Plücker embeddings (Wonderland, section 3.2).

    d = normalise(R K^-1 [u, v, 1])        o = the camera's centre        p = (o x d, d)

u, v are pixel centres (the top-left one is at 0.5, 0.5), axes are OpenCV's. The paper prints d' = R K^-1 [u, v, 1] + t,
which is a point and no direction; p is what everybody else's is (CameraCtrl, AC3D, Long-LRM, LGM): moment, then
direction. Focal lengths enter through rays alone.

F frames, H W of any grid that spans the image, C channels, F' latent frames.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, pixel_rays, pose_problem

PACKED = 12 + 9
"""Numbers of a camera in a `packed` path."""
LINEAR = 50.0  # far / near up to which `spread` is even
STILL = 1e-6
"""A path whose poses differ less from its first (lengths in scene units, rotations by matrix entry) does not move."""


def rays(cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Origins [F, 3] and unit directions [F, H, W, 3] in the world, through the centres of a grid of H x W pixels that
    spans the cameras' images."""
    scale = _image_scale(height / cameras.height, width / cameras.width, cameras.intrinsics)
    grid = replace(cameras, intrinsics=cameras.intrinsics * scale, height=height, width=width)
    return cameras.centers, normalize(pixel_rays(grid), dim=-1)


def spread(share: Tensor, near: float, far: float) -> Tensor:
    """Distances along rays at shares in [0, 1], of any shape, of the way from ``near`` to ``far``: evenly, or evenly in
    the logarithm where far / near is above `LINEAR`."""
    logarithmic = far / near > LINEAR
    low, high = (share.new_full((), math.log(d) if logarithmic else d) for d in (near, far))
    between = torch.lerp(low, high, share)
    return between.exp() if logarithmic else between


def plucker(cameras: Cameras, height: int | None = None, width: int | None = None) -> Tensor:
    """[F, 6, H, W]: moment in scene units, then unit direction, at every pixel of the grid (the cameras' own by
    default)."""
    origins, directions = rays(cameras, height or cameras.height, width or cameras.width)
    moments = torch.linalg.cross(origins[:, None, None].expand_as(directions), directions)
    return torch.cat([moments, directions], dim=-1).permute(0, 3, 1, 2)


def normalised(cameras: Cameras, least: float = 1e-3) -> tuple[Cameras, float]:
    """The path as seen from its first camera, with lengths multiplied so that the furthest camera is at distance 1;
    and that factor, for depths to be multiplied by as well.

    The first camera becomes the identity, exactly. Where no camera is further than ``least`` (scene units) from the
    first, as on a path that only turns, the factor is 1 / least: noise of the poses is not blown up without bound.
    (Ours: the paper normalises "as RealEstate10K does" and does not say how.)

    Raises UserError for a path with a camera that is none (`judge_cameras`), and for one that neither moves nor turns.
    """
    judge_cameras(cameras)
    relative = seen_from(cameras, cameras).world_from_cam
    relative[0] = torch.eye(4, dtype=relative.dtype)
    if len(cameras) > 1 and (relative - relative[0]).abs().max() < STILL:
        raise UserError("the camera path has no motion (every pose is the first one's); give one that moves or turns")
    scale = 1 / max(relative[:, :3, 3].norm(dim=-1).max().item(), least)
    relative[:, :3, 3] *= scale
    return replace(cameras, world_from_cam=relative.to(cameras.world_from_cam)), scale


def judge_cameras(cameras: Cameras) -> None:
    """Raises UserError where one of them holds NaN or infinity, is no rigid motion, or has no focal length."""
    for number, (pose, lens) in enumerate(zip(cameras.world_from_cam, cameras.intrinsics, strict=True)):
        problem = pose_problem(pose)
        if problem is None and not torch.isfinite(lens).all():
            problem = "has intrinsics with NaN or infinity"
        if problem is None and not (lens[0, 0] > 0 and lens[1, 1] > 0):
            problem = f"has focal lengths {lens[0, 0].item():g} and {lens[1, 1].item():g}, which must be above 0"
        if problem is not None:
            raise UserError(f"camera {number} of the path {problem}; give rigid poses and a lens in pixels")


def seen_from(cameras: Cameras, others: Cameras, scale: float = 1.0) -> Cameras:
    """``others``, in float64, in the world whose origin is the first of ``cameras``, lengths times ``scale``."""
    first = cameras[:1].to(dtype=torch.float64)  # far from the origin float32 is coarse
    relative = first.cam_from_world @ others.world_from_cam.double()
    relative[:, :3, 3] *= scale
    return replace(others, world_from_cam=relative)


def folded(x: Tensor, squeeze: int = 4) -> Tensor:
    """Frames [..., F, C, H, W] to latent frames [..., F', squeeze C, H, W]: latent frame 0 is frame 0, repeated, and
    latent frame i > 0 frames (i - 1) squeeze + 1 to i squeeze, in order, as CogVideoX's causal VAE groups them."""
    frames = x.shape[-4]
    assert (frames - 1) % squeeze == 0, f"{frames} frames are not one more than a multiple of {squeeze}"
    first = x.narrow(-4, 0, 1)
    whole = torch.cat([first] * (squeeze - 1) + [x], dim=-4)
    return whole.unflatten(-4, (-1, squeeze)).flatten(-4, -3)


def packed(cameras: Cameras) -> Tensor:
    """[F, 21]: the first three rows of the camera-to-world pose, then intrinsics in units of image width and height.

    All that rays of any grid are made of, in a few kilobytes: the embeddings of a clip are as large as its pixels.
    """
    unit = cameras.intrinsics / _image_scale(cameras.height, cameras.width, cameras.intrinsics)
    return torch.cat([cameras.world_from_cam[:, :3].flatten(1), unit.flatten(1)], dim=1)


def unpacked(path: Tensor, height: int, width: int) -> Cameras:
    """Cameras of H x W images from `packed` [F, 21]."""
    pose, unit = path[:, :12].unflatten(1, (3, 4)), path[:, 12:].unflatten(1, (3, 3))
    last = torch.tensor([0.0, 0.0, 0.0, 1.0]).to(path).expand(len(path), 1, 4)
    return Cameras(torch.cat([pose, last], dim=1), unit * _image_scale(height, width, unit), height, width)


def _image_scale(height: float, width: float, like: Tensor) -> Tensor:
    """[3, 1]: what rows of intrinsics are multiplied by where an image gets so many times higher and wider."""
    return torch.tensor([[width], [height], [1.0]]).to(like)
