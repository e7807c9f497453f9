"""How good points from photographs are: depth, poses, and renders of views that were held out.

    python benchmarks/points.py --data DIR [--parts depth poses renders focal] [--views 2] [--name points]

What is measured, without network weights, on the real scenes of DIR:

* depth: `point_maps(..., "stereo")` on evenly spaced views, with the scene's points and depth maps hidden from it; the
  relative error at the points that were found in the view, and at all pixels where the scene's own depth map knows more
  (median, 90th percentile), the share of these that got a depth, processor seconds per view with its neighbours.
* poses: `pose_photographs(..., "colmap")` on the photographs alone, against the published poses after the best
  similarity: rotation (degrees) and position (share of the cameras' extent), median and largest; focal length.
* renders: the cloud of the first and last view of a five-view path, drawn in the three between; PSNR over the pixels
  that are covered (opacity over a half), and their share. For each source of points that the scene allows.
* focal: two photographs alone, a tenth of the scene apart, posed with the usual focal length and with the true one:
  that focal length over the true one, rotation and direction of the second camera against the published ones (degrees).

Each part replaces its section of results/NAME.json and keeps the others; NAME.md is written from it. The last line is
JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from pages import page
from torch import Tensor

from fvgen.clips.views import choose_views
from fvgen.depth.maps import DEPTHS, STEREO_SIDE, point_maps
from fvgen.errors import UserError
from fvgen.geometry.cameras import project
from fvgen.geometry.pointcloud import render_points, unproject
from fvgen.posing.reconstruct import pose_photographs
from fvgen.posing.two_views import USUAL_FOCAL, two_views
from fvgen.scenes.formats import Scene, read_scene
from fvgen.scenes.images import fit_depth, fit_image
from fvgen.scenes.readers.photographs import Photographs
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import atomic_path, write_json

RESULTS = Path(__file__).parent / "results"
TARGETS = "targets for depth at points: median error at most 5 %, coverage at least 60 %"
FRAMES = 5


def working_size(scene: Scene) -> tuple[int, int]:
    scale = STEREO_SIDE / max(scene.cameras.height, scene.cameras.width)
    return round(scene.cameras.height * scale), round(scene.cameras.width * scale)


# --- Depth ---


def measure_depth(scene: Scene, count: int) -> dict:
    """Errors and coverage of stereo over ``count`` views of a scene with points."""
    height, width = working_size(scene)
    views = torch.linspace(0, len(scene) - 1, count + 2)[1:-1].long().tolist()
    bare = replace(scene, points=None, point_colors=None, observations=None, depth_paths=None)
    start = time.process_time()
    depth, _ = point_maps(bare, views, height, width, "stereo")
    seconds = (time.process_time() - start) / count
    at_points = [_at_points(scene, view, one) for view, one in zip(views, depth, strict=True)]
    row = {"scene": scene.name, "size": f"{height}x{width}", "views": count}
    row |= {f"points_{key}": value for key, value in _errors(*map(torch.cat, zip(*at_points, strict=True))).items()}
    row |= {"pixels_covered": round((depth > 0).float().mean().item(), 3), "seconds_per_view": round(seconds, 1)}
    if scene.depth_paths:
        true = torch.stack([fit_depth(scene.depth(view), height, width) for view in views])
        row |= {f"maps_{key}": value for key, value in _errors(depth[true > 0], true[true > 0]).items()}
    return row


def _at_points(scene: Scene, view: int, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate and truth [M] at the points that were found in a view."""
    height, width = depth.shape
    pixels, true = project(scene.points, scene.cameras[[view]].fitted(height, width))
    x, y = pixels[0].floor().long().unbind(-1)
    shown = scene.seen_by(view) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return depth[y[shown], x[shown]], true[0, shown]


def _errors(estimate: Tensor, true: Tensor) -> dict:
    known = estimate > 0
    median, most = torch.quantile((estimate / true - 1).abs()[known], torch.tensor([0.5, 0.9])).tolist()
    share = known.float().mean().item()
    return {
        "count": len(true),
        "median_error": round(median, 4),
        "p90_error": round(most, 4),
        "covered": round(share, 3),
    }


# --- Poses ---


def measure_poses(scene: Scene) -> dict:
    """COLMAP's poses of the photographs alone against those of the scene."""
    photographs = Photographs(scene.name, scene.image_paths, scene.cameras.height, scene.cameras.width)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        ours = pose_photographs(photographs, Path(folder) / "scene", "colmap").scene
    seconds = time.process_time() - start
    names = [path.name for path in scene.image_paths]
    theirs = scene.cameras[[names.index(path.name) for path in ours.image_paths]].to(dtype=torch.float64)
    found = ours.cameras.to(dtype=torch.float64)
    rotation, centers = _similarity(found.centers, theirs.centers)
    turn = rotation @ found.world_from_cam[:, :3, :3]
    chord = (turn - theirs.world_from_cam[:, :3, :3]).flatten(1).norm(dim=-1)
    angle = torch.rad2deg(2 * (chord / 8**0.5).clamp(max=1).asin())
    extent = torch.cdist(theirs.centers, theirs.centers).max()
    offset = (centers - theirs.centers).norm(dim=-1) / extent
    focal = (found.intrinsics[:, 0, 0] / theirs.intrinsics[:, 0, 0]).median().item()
    return {
        "scene": scene.name,
        "photographs": len(scene),
        "posed": len(ours),
        "rotation_median": round(angle.median().item(), 3),
        "rotation_largest": round(angle.max().item(), 3),
        "position_median": round(offset.median().item(), 4),
        "position_largest": round(offset.max().item(), 4),
        "focal_ratio": round(focal, 4),
        "seconds": round(seconds, 1),
    }


def _similarity(points: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation of the similarity that brings points [V, 3] nearest to target, and the points there (Umeyama)."""
    mean, goal = points.mean(0), target.mean(0)
    u, s, v = torch.linalg.svd((target - goal).T @ (points - mean))
    sign = torch.tensor([1.0, 1.0, torch.linalg.det(u @ v).sign()], dtype=points.dtype)
    rotation = u @ sign.diag() @ v
    scale = (s * sign).sum() / (points - mean).square().sum()
    return rotation, scale * (points - mean) @ rotation.T + goal


# --- Renders ---


def measure_renders(scene: Scene, source: str) -> dict:
    """PSNR of the views between the two that the cloud comes from."""
    height, width = working_size(scene)
    views = choose_views(scene, FRAMES, 1, torch.Generator().manual_seed(0))[0]
    truth = torch.stack([fit_image(scene.image(view), height, width) for view in views])
    cameras = scene.cameras[views].fitted(height, width)
    ends = [0, FRAMES - 1]
    depth, used = point_maps(scene, [views[0], views[-1]], height, width, source)
    points, colors = unproject(depth, truth[ends], cameras[ends])
    images, opacity, _ = render_points(points, colors, cameras[list(range(1, FRAMES - 1))])
    covered = opacity > 0.5
    error = (images.permute(0, 3, 1, 2) - truth[1:-1]).square().mean(1)[covered].mean()
    return {
        "scene": scene.name,
        "points_from": used,
        "size": f"{height}x{width}",
        "psnr_covered": round(-10 * error.log10().item(), 2),
        "covered": round(covered.float().mean().item(), 3),
    }


# --- Focal length of a pair ---


def measure_focal(scene: Scene) -> dict:
    """What it costs that two photographs do not tell their focal length."""
    views = [0, max(1, len(scene) // 10)]
    first, second = (scene.image(view) for view in views)
    true = scene.cameras.intrinsics[0, 0, 0].item()
    usual = USUAL_FOCAL * max(scene.cameras.height, scene.cameras.width)
    one, other = scene.cameras.cam_from_world[views].double()
    theirs = one @ torch.linalg.inv(other)
    row = {"scene": scene.name, "usual_over_true": round(usual / true, 3)}
    for name, focal in (("usual", usual), ("true", true)):
        try:
            ours = two_views(first, second, focal, scene.name).cameras.world_from_cam[1].double()
        except UserError as error:
            row[f"{name}_refused"] = str(error).split(";")[0]
            continue
        chord = (ours[:3, :3] - theirs[:3, :3]).norm()
        cosine = torch.nn.functional.cosine_similarity(ours[:3, 3], theirs[:3, 3], dim=0)
        row[f"{name}_rotation"] = round(torch.rad2deg(2 * (chord / 8**0.5).clamp(max=1).asin()).item(), 2)
        row[f"{name}_direction"] = round(torch.rad2deg(cosine.clamp(-1, 1).acos()).item(), 2)
    return row


def note(results: dict) -> str:
    """The results as a page of Markdown."""
    return page("Points from photographs", "points.py", [TARGETS], results)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of scenes")
    parser.add_argument(
        "--parts", default=["depth", "poses", "renders"], choices=["depth", "poses", "renders", "focal"], nargs="+"
    )
    parser.add_argument("--depth-scenes", default=["fox", "hololens_office", "vr_apartment"], nargs="+")
    parser.add_argument("--pose-scenes", nargs="+", help="default: all of DIR")
    parser.add_argument("--render-scenes", nargs="+", help="default: all of DIR")
    parser.add_argument("--views", default=2, type=positive, help="views of a scene whose depth is measured")
    parser.add_argument("--name", default="points", help="of the files in benchmarks/results")
    args = parser.parse_args()

    torch.set_num_threads(1)
    file = RESULTS / f"{args.name}.json"
    results = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    results["settings"] = {"hardware": "2-core CPU, one thread", "torch": torch.__version__}
    data = Path(args.data)
    everything = sorted(path.name for path in data.iterdir() if path.is_dir())
    for part in args.parts:
        rows = results["parts"][part] = []
        if part == "depth":
            tasks = [(measure_depth, name, args.views) for name in args.depth_scenes]
        elif part == "poses":
            tasks = [(measure_poses, name) for name in args.pose_scenes or everything]
        elif part == "focal":
            tasks = [(measure_focal, name) for name in args.pose_scenes or everything]
        else:
            sources = ("depth", "stereo", "colmap")
            tasks = [(measure_renders, name, s) for name in args.render_scenes or everything for s in sources]
        for measure, name, *rest in tasks:
            scene = read_scene(data / name)
            if measure is measure_renders and DEPTHS[rest[0]].lacks(scene):
                continue
            rows.append(measure(scene, *rest))
            print(rows[-1], flush=True)
            write_json(file, results)
            with atomic_path(RESULTS / f"{args.name}.md") as temporary:
                temporary.write_text(note(results))
    print(json.dumps(results))


if __name__ == "__main__":
    guarded(main)
