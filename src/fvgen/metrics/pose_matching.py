"""Where the camera of a generated frame stands, in a scene that is known exactly: the pose at which it looks like that.

For frames too small for structure from motion. Direct image alignment (Lucas and Kanade 1981; with depth and poses as
in Kerl et al. 2013, "Robust odometry estimation for RGB-D cameras"): a view of the scene, rendered with its depth X(u),
is carried into the frame, and the motion T between the cameras is refined to

    min over T of  sum over u of rho(frame(pi(T X(u))) - view(u)),   rho(r) = |r|^2 / (|r|^2 + c^2)

by damped Gauss-Newton steps on blurred, then sharper images; then the scene is rendered at the pose that was found, and
so on until both are one view. Each frame starts from the camera that it was asked for, from the path's first, from its
neighbours and from those that look most like it, so that a frame that ignores its camera is found where it is.

N pairs of a frame and a view, F frames, K starts, P pixels. Cameras as in `fvgen.geometry.cameras`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras, pixel_rays
from fvgen.metrics.cameras import path_errors

Render = Callable[[Cameras], tuple[Tensor, Tensor]]
"""V cameras to images [V, 3, H, W] in [0, 1] and depths [V, H, W] (camera z, scene units)."""


class Level(NamedTuple):
    """blur: deviation in pixels; stride: between the view's pixels that count; steps: of Gauss and Newton."""

    blur: float
    stride: int
    steps: int


COARSE = (Level(4.0, 2, 10), Level(2.0, 2, 10))
FINE = (Level(1.5, 1, 6), Level(1.0, 1, 6))
ALIGNED, STEPS = 1, 5  # renders that are followed by `FINE`, and by a single step
LIGHT = 1e-3  # damping of single steps
ALIKE = 4  # starts by likeness, beside the four by place
KEPT = 2  # of the starts, after `COARSE`
OUTLIER = 0.1  # c, in units of [0, 1]
OUTSIDE = 0.5  # rho of a pixel that leaves the frame: it tells nothing for or against
SEEN_BLUR = 1.0  # pixels, of the images whose likeness decides
MOST_RESIDUAL = 0.2
"""1 - correlation above which a frame counts as not found; tests/test_pose_matching.py holds it against what true,
blurred and noisy frames leave (below) and frames of another room (above)."""


class Matched(NamedTuple):
    """world_from_cam: [F, 4, 4] float64, NaN where no pose was found; residual: [F] 1 - correlation of the frame and
    the scene at the best pose; failures: how many were not found."""

    world_from_cam: Tensor
    residual: Tensor
    failures: int


@torch.no_grad()
def match_poses(frames: Tensor, asked: Cameras, render: Render) -> Matched:
    """The poses of ``frames`` [F, 3, H, W] in [0, 1] that were ``asked`` for along a path through a scene; their
    lenses are taken as asked."""
    views, depth = render(asked)
    starts = start_views(frames, views)  # [F, K]
    count, kept = starts.shape[1], min(KEPT, starts.shape[1])
    frame = torch.arange(len(frames)).repeat_interleave(count)
    start = starts.flatten()
    motion, cost = align(frames[frame], views[start], depth[start], asked[start], asked[frame].intrinsics, COARSE)
    poses = moved(asked.world_from_cam[start].double(), motion).unflatten(0, (-1, count))
    best = cost.unflatten(0, (-1, count)).argsort(dim=1)[:, :kept]
    poses = poses.gather(1, best[..., None, None].expand(-1, -1, 4, 4))

    frame = torch.arange(len(frames)).repeat_interleave(kept)
    poses, residual = refined(frames[frame], poses.flatten(0, 1), asked[frame], render)
    chosen = residual.unflatten(0, (-1, kept)).argmin(dim=1) + kept * torch.arange(len(frames))
    poses, residual = poses[chosen], residual[chosen]
    lost = ~(residual <= MOST_RESIDUAL)
    poses[lost] = torch.nan
    return Matched(poses, residual, int(lost.sum()))


def matched_errors(matched: Matched, asked: Cameras) -> dict[str, float | None]:
    """`path_errors` of the frames that were found, and ``T_err_scene``: the mean distance over the path's extent (from
    its first camera to the farthest), in the scene's own scale.

    The first frame is the photograph that a model is given: it is taken where it was asked to be, and enters neither
    means nor ``failures``, how many frames were not found. Names that end in "_all" count these as frames that stayed
    at the first; the others are None where no frame was found.
    """
    truth = asked.world_from_cam.double()
    found, first = matched.world_from_cam.clone(), truth[0]
    found[0] = first
    placed = found.flatten(1).isfinite().all(dim=1)
    still = torch.where(placed[:, None, None], found, first)
    extent = (truth[:, :3, 3] - first[:3, 3]).norm(dim=1).max().clamp(min=1e-12)
    errors: dict[str, float | None] = {"failures": int((~placed).sum()), "residual": matched.residual[1:].mean().item()}
    for ending, poses, wanted in (("", found[placed], truth[placed]), ("_all", still, truth)):
        away = (poses[:, :3, 3] - wanted[:, :3, 3]).norm(dim=1).mean() / extent
        scores = path_errors(poses, wanted) | {"T_err_scene": away.item()}
        count = len(poses) - 1  # the first is among these means, and is 0
        own = {name: value * (count + 1) / count if count else None for name, value in scores.items()}
        errors |= {f"{name}{ending}": value for name, value in own.items()}
    return errors


# --- Parts ---


def start_views(frames: Tensor, views: Tensor) -> Tensor:
    """[F, K] numbers of the ``views`` [F, 3, H, W] of the path that each frame starts from: its own, the first, those
    before and after, and those most like it."""
    own = torch.arange(len(views))
    near = [own, torch.zeros_like(own), (own - 1).clamp(min=0), (own + 1).clamp(max=len(own) - 1)]
    dim, light = (blurred(images, COARSE[0].blur) for images in (frames, views))
    likeness = torch.stack([correlation(frame.expand_as(light), light) for frame in dim])
    return torch.cat([torch.stack(near, dim=1), likeness.topk(min(ALIKE, len(views)), dim=1).indices], dim=1)


def refined(frames: Tensor, poses: Tensor, lens: Cameras, render: Render) -> tuple[Tensor, Tensor]:
    """Poses [N, 4, 4] of frames, aligned to what the scene shows there, and their residuals [N].

    After the first render whole alignments, then single steps of Gauss and Newton from no motion, where nothing is
    interpolated: a frame carried by parts of a pixel is blurred by it, and sticks to where it is not. Of all poses the
    one that looks most like the frame is kept.
    """
    best, least = poses, torch.full((len(poses),), torch.inf, dtype=torch.float64)
    still = torch.eye(4, dtype=torch.float64).repeat(len(frames), 1, 1)
    for turn in range(ALIGNED + STEPS + 1):
        cameras = replace(lens, world_from_cam=poses.to(lens.world_from_cam))
        views, depth = render(cameras)
        residual = 1 - correlation(blurred(frames, SEEN_BLUR), blurred(views, SEEN_BLUR))
        better = residual < least
        best, least = torch.where(better[:, None, None], poses, best), torch.where(better, residual, least)
        if turn < ALIGNED:
            motion, _ = align(frames, views, depth, cameras, cameras.intrinsics, FINE)
        else:
            light, colors = blurred(frames, SEEN_BLUR), blurred(views, SEEN_BLUR).flatten(2)
            maps = torch.cat([light, *slopes(light)], dim=1)
            _, curve, push = system(maps, colors, camera_points(cameras, depth).flatten(1, 2), lens.intrinsics, still)
            motion = stepped(still, curve, push, torch.full((len(frames),), LIGHT, dtype=torch.float64))
        poses = moved(poses, motion)
    return best, least


def camera_points(cameras: Cameras, depth: Tensor) -> Tensor:
    """[N, H, W, 3] of depths [N, H, W], in each camera's own axes."""
    own = replace(cameras, world_from_cam=torch.eye(4).to(cameras.world_from_cam).expand(len(cameras), 4, 4))
    return depth[..., None] * pixel_rays(own)


def stepped(motion: Tensor, curve: Tensor, push: Tensor, damping: Tensor) -> Tensor:
    """Motions after one damped step of the normal equations."""
    diagonal = curve.diagonal(dim1=1, dim2=2)
    held = curve + torch.diag_embed(damping[:, None] * diagonal + 1e-9 * diagonal.amax(1, keepdim=True) + 1e-12)
    return torch.linalg.matrix_exp(twist(-torch.linalg.solve(held, push))) @ motion


def align(
    frames: Tensor, views: Tensor, depth: Tensor, cameras: Cameras, lenses: Tensor, levels: tuple[Level, ...]
) -> tuple[Tensor, Tensor]:
    """Motions [N, 4, 4] float64 that take points of each view's camera into its frame's, from none, and their mean rho
    [N]. ``lenses`` [N, 3, 3] are the frames'."""
    points = camera_points(cameras, depth)
    motion = torch.eye(4, dtype=torch.float64).repeat(len(frames), 1, 1)
    cost = depth.new_zeros(len(frames))
    for level in levels:
        light = blurred(frames, level.blur)
        every = slice(level.stride // 2, None, level.stride)
        colors = blurred(views, level.blur)[..., every, every].flatten(2)  # [N, 3, P]
        motion, cost = gauss_newton(light, colors, points[:, every, every].flatten(1, 2), lenses, motion, level.steps)
    return motion, cost


def gauss_newton(
    frames: Tensor, colors: Tensor, points: Tensor, lenses: Tensor, motion: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """``steps`` damped steps (Levenberg and Marquardt), each pair with its own damping; a step that makes things worse
    is not taken."""
    maps = torch.cat([frames, *slopes(frames)], dim=1)
    cost, curve, push = system(maps, colors, points, lenses, motion)
    damping = torch.full((len(frames),), 1e-2, dtype=torch.float64)
    for _ in range(steps):
        tried = stepped(motion, curve, push, damping)
        found = system(maps, colors, points, lenses, tried)
        better = found[0] < cost
        motion = torch.where(better[:, None, None], tried, motion)
        cost = torch.where(better, found[0], cost)
        curve = torch.where(better[:, None, None], found[1], curve)
        push = torch.where(better[:, None], found[2], push)
        damping = torch.where(better, damping / 4, damping * 8).clamp(1e-6, 1e6)
    return motion, cost


def system(
    maps: Tensor, colors: Tensor, points: Tensor, lenses: Tensor, motion: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean rho [N], and J^T W J [N, 6, 6] and J^T W r [N, 6] of a motion's change, translation first, float64.

    maps: [N, 9, H, W], the frames with their slopes along x and y; colors [N, 3, P] and points [N, P, 3] of the views.
    """
    height, width = maps.shape[-2:]
    x, y, z = (points.double() @ motion[:, :3, :3].mT + motion[:, None, :3, 3]).to(points).unbind(dim=-1)
    before = z > 1e-3
    depth = torch.where(before, z, 1.0)
    fx, fy, cx, cy = (lenses[:, i, j, None].to(points) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    u, v = fx * x / depth + cx, fy * y / depth + cy
    inside = before & (u > 0.5) & (u < width - 0.5) & (v > 0.5) & (v < height - 0.5)
    grid = torch.stack([2 * u / width - 1, 2 * v / height - 1], dim=-1)[:, None]
    sampled = torch.nn.functional.grid_sample(maps, grid, align_corners=False, padding_mode="border")[:, :, 0]
    color, gx, gy = sampled.split(3, dim=1)  # [N, 3, P] each
    off = color - colors
    square = off.square().sum(dim=1)
    rho = torch.where(inside, square / (square + OUTLIER**2), OUTSIDE)
    weight = torch.where(inside, OUTLIER**2 / (square + OUTLIER**2).square(), 0.0)  # d rho / d |r|^2

    zero = torch.zeros_like(x)
    ax, ay, bx, by = fx / depth, fy / depth, x / depth, y / depth
    # Of u and v by the six: translation along x, y, z, and turns about them.
    of_u = torch.stack([ax, zero, -ax * bx, -fx * bx * by, fx * (1 + bx * bx), -fx * by], dim=-1)
    of_v = torch.stack([zero, ay, -ay * by, -fy * (1 + by * by), fy * bx * by, fy * bx], dim=-1)
    uu, uv, vv = ((weight * (a * b).sum(dim=1)) for a, b in ((gx, gx), (gx, gy), (gy, gy)))
    ru, rv = ((weight * (g * off).sum(dim=1)) for g in (gx, gy))
    half = uu[..., None] * of_u + uv[..., None] * of_v, uv[..., None] * of_u + vv[..., None] * of_v
    curve = of_u.mT @ half[0] + of_v.mT @ half[1]
    push = (of_u * ru[..., None] + of_v * rv[..., None]).sum(dim=1)
    return rho.mean(dim=1), curve.double(), push.double()


def moved(poses: Tensor, motion: Tensor) -> Tensor:
    """Camera-to-world [N, 4, 4] of the frames, from the views' and the motions into the frames' cameras."""
    return poses.double() @ torch.linalg.inv(motion)


def twist(step: Tensor) -> Tensor:
    """[N, 6], translation then turn, as matrices [N, 4, 4] whose exponentials are motions."""
    out = step.new_zeros(len(step), 4, 4)
    out[:, :3, 3] = step[:, :3]
    a, b, c = step[:, 3:].unbind(dim=1)
    out[:, 2, 1], out[:, 0, 2], out[:, 1, 0] = a, b, c
    return out - torch.nn.functional.pad(out[:, :3, :3].mT, (0, 1, 0, 1))


def slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y, zero at the borders they lack neighbours at."""
    x, y = torch.zeros_like(images), torch.zeros_like(images)
    x[..., 1:-1] = (images[..., 2:] - images[..., :-2]) / 2
    y[..., 1:-1, :] = (images[..., 2:, :] - images[..., :-2, :]) / 2
    return x, y


def blurred(images: Tensor, deviation: float) -> Tensor:
    """By a Gaussian of so many pixels, cut at three deviations."""
    from torchvision.transforms.functional import gaussian_blur  # a second to import

    reach = min(round(3 * deviation), min(images.shape[-2:]) - 1)
    return gaussian_blur(images, [2 * reach + 1] * 2, [deviation] * 2)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """[N] of images [N, 3, H, W] over pixels and channels, -1 to 1; 0 where one of them is flat."""
    a, b = ((x - x.mean(dim=1, keepdim=True)).double() for x in (a.flatten(1), b.flatten(1)))
    size = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(size > 1e-9, (a * b).sum(dim=1) / size.clamp(min=1e-9), 0.0)
