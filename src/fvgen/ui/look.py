"""The cloud, the photographs' cameras and the path as one thing to turn about: `fvgen.splats.viewer`'s page, for which
points are small opaque Gaussians and lines are rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.geometry.gaussians import Gaussians
from fvgen.geometry.pointcloud import unproject
from fvgen.splats.viewer import write_viewer
from fvgen.walks.run import Plan

MOST_POINTS = 60_000
HEIGHT = 600  # of the pictures that the page opens with: lines stay sharp at this size
PYRAMID = 0.09  # of the typical depth: how far a camera's pyramid reaches
LINE = 0.004  # of the typical depth: half a line's width
BLUE, ORANGE, GREEN, RED = (0.35, 0.65, 1.0), (0.98, 0.57, 0.24), (0.3, 0.85, 0.4), (0.95, 0.3, 0.3)
LEGEND = "blue: photographs; orange: the path, from green to red"


def write_look(file: Path, plan: Plan) -> None:
    """The page of a planned walk; its first camera stands behind all, the others are the photographs'."""
    cloud, path = plan.cloud, plan.rendered.cameras
    depth, lens = cloud.typical, cloud.cameras.to(dtype=torch.float32)
    points, colors = unproject(cloud.depth, cloud.photographs, cloud.cameras)
    kept = torch.linspace(0, len(points) - 1, min(MOST_POINTS, len(points))).round().long()
    pixel = depth / lens.intrinsics[0, 0, 0].item()  # what one covers there
    parts = [balls(points[kept], colors[kept], 0.65 * pixel)]
    for view in range(len(lens)):
        parts.append(lines(pyramid(lens[[view]], PYRAMID * depth), BLUE, LINE * depth))
    centers = path.centers.float()
    parts.append(lines(list(pairwise(centers)), ORANGE, LINE * depth))
    for frame, color in ((0, GREEN), (len(path) - 1, RED)):
        parts.append(lines(pyramid(path[[frame]], 0.7 * PYRAMID * depth), color, LINE * depth))
        parts.append(balls(centers[[frame]], torch.tensor([color]), 2 * LINE * depth))
    size = round(HEIGHT * lens.width / lens.height)
    shown = lens.fitted(HEIGHT, size)
    behind = overview(lens, points.median(dim=0).values, size)
    cameras = Cameras(
        torch.cat([behind.world_from_cam, shown.world_from_cam]),
        torch.cat([behind.intrinsics, shown.intrinsics]),
        HEIGHT,
        size,
    )
    names = ["all", *(f"photograph {k + 1}" for k in range(len(shown)))]
    write_viewer(file, joined(parts), cameras, names, f"{len(kept)} points; {LEGEND}.")


def overview(cameras: Cameras, target: Tensor, width: int) -> Cameras:
    """One camera behind and above the given ones, facing the ``target`` [3] that they see."""
    poses = cameras.world_from_cam.float()
    forward, up = poses[:, :3, 2].mean(0), -poses[:, :3, 1].mean(0)
    middle = cameras.centers.float().mean(0)
    spread = (cameras.centers.float() - middle).norm(dim=-1).max().item()
    back = 0.7 * (target - middle).norm().item() + 2 * spread
    position = middle - back * forward + 0.5 * back * up
    pose = look_at(position[None], target.float()[None], up)
    return Cameras(pose, pinhole(1, HEIGHT, width, 60.0), HEIGHT, width)


def pyramid(camera: Cameras, reach: float) -> list[tuple[Tensor, Tensor]]:
    """The eight edges of what one camera sees, ``reach`` deep, and a tick on its upper side."""
    u, v = camera.width, camera.height
    fx, fy, cx, cy = camera.intrinsics[0, [0, 1, 0, 1], [0, 1, 2, 2]].float().tolist()
    slopes = [((x - cx) / fx, (y - cy) / fy) for x, y in ((0, 0), (u, 0), (u, v), (0, v), (u / 2, -v / 4))]
    turn, center = camera.world_from_cam[0, :3, :3].float(), camera.centers[0].float()
    a, b, c, d, tick = (center + reach * turn @ torch.tensor([x, y, 1.0]) for x, y in slopes)
    edges = [(center, corner) for corner in (a, b, c, d)]
    return [*edges, (a, b), (b, c), (c, d), (d, a), (a, tick), (tick, b)]


def lines(ends: Sequence[tuple[Tensor, Tensor]], color: tuple[float, float, float], radius: float) -> Gaussians:
    """Rows of Gaussians, as near as their radius."""
    rows = []
    for a, b in ends:
        count = 2 + min(400, int((b - a).norm().item() / radius))
        rows.append(torch.lerp(a, b, torch.linspace(0, 1, count)[:, None]))
    centers = torch.cat(rows)
    return balls(centers, torch.tensor(color).expand(len(centers), 3), 0.6 * radius)


def balls(means: Tensor, colors: Tensor, deviation: float) -> Gaussians:
    """Round, opaque, at means [N, 3] with colours [N, 3]."""
    count = len(means)
    turn = torch.tensor([[1.0, 0, 0, 0]]).expand(count, 4)
    return Gaussians(means.float(), torch.full((count, 3), deviation), turn, torch.full((count,), 0.98), colors.float())


def joined(parts: Sequence[Gaussians]) -> Gaussians:
    """All of them as one."""
    return Gaussians(*(torch.cat([getattr(p, name) for p in parts]) for name in Gaussians.__dataclass_fields__))
