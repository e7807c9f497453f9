"""`fvgen reconstruct`: a data set of posed views, as `fvgen generate` writes it, to 3D Gaussians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.gaussians import Gaussians, render_gaussians
from fvgen.metrics import score_images
from fvgen.pipelines.folders import check_device
from fvgen.scenes.formats import read_scene
from fvgen.scenes.images import fit_image
from fvgen.scenes.readers.nerfstudio import generated_views, stated
from fvgen.scenes.scene import Scene, local
from fvgen.splats.fitting import FitSettings, fit, seeds
from fvgen.splats.ply import read_points, write_splat
from fvgen.splats.viewer import write_viewer
from fvgen.system.doors import read_json
from fvgen.system.files import judge_output, writable_folder, write_json

WRITTEN = ("scene.ply", "scene.html", "scene.json")
MADE_BY = "fvgen reconstruct"  # in scene.json: whose the files are
HOLDOUT = "holdout"  # beside a data set: views to score on
LARGEST = 512  # pixels of the longer side, unless told otherwise
Told = Callable[[str], None]


def reconstruct(
    dataset: str | Path,
    out: str | Path | None = None,
    settings: FitSettings | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    device: str = "cpu",
    told: Told = lambda line: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Fit Gaussians to all views of ``dataset``; returns the folder with scene.ply, scene.html and scene.json (cameras,
    settings, and how well each view is shown).

    Args:
        dataset: a posed scene in any format that is read; views that its transforms.json calls generated weigh less.
        out: where to write; the data set's own folder if not given.
        size: height and width of the views; their own, at most 512 pixels, if None.

    Raises UserError (one sentence, nothing written) for a data set without points, and for files in the way.
    """
    settings, dataset = settings or FitSettings(), Path(dataset)
    folder = dataset if out is None else Path(out)
    check_device(device)
    judge_out(folder, dataset)
    scene = read_scene(dataset)
    points, colors = start_points(dataset, scene)
    height, width = size or _size(scene)
    cameras = scene.cameras.fitted(height, width)
    images = torch.stack([fit_image(scene.image(view), height, width) for view in range(len(cameras))])
    generated = generated_views(dataset, scene)
    told(f"{len(images)} views of {height}x{width}, {sum(generated)} of them generated; {len(points)} points")
    generator = torch.Generator().manual_seed(seed)
    start = seeds(points, colors, settings.most, generator)
    weights = torch.where(torch.tensor(generated), settings.generated_weight, 1.0)
    masks = scene.shown(range(len(cameras)), height, width)
    made = fit(images, cameras, start, settings, weights, seed, device, on_step, masks)
    quality = scores(made, images, cameras, masks)
    given = [value for value, other in zip(quality, generated, strict=True) if not other]
    told(f"{len(made)} Gaussians; {sum(given) / max(1, len(given)):.2f} dB on the photographs")
    unseen = held_out(made, dataset / HOLDOUT, height, width)
    if unseen and unseen["psnr"] is not None:
        told(f"{unseen['views']} photographs held out: {unseen['psnr']:.2f} dB, SSIM {unseen['ssim']:.3f}")
    writable_folder(folder)
    names = [path.name for path in scene.image_paths]
    views = [
        {"name": name, "generated": was, "psnr": round(value, 3), "world_from_cam": pose, "intrinsics": lens}
        for name, was, value, pose, lens in zip(
            names, generated, quality, cameras.world_from_cam.tolist(), cameras.intrinsics.tolist(), strict=True
        )
    ]
    facts: dict[str, Any] = {"made_by": MADE_BY, "dataset": str(dataset), "seed": seed}
    facts |= {"gaussians": len(made), "height": height, "width": width, "settings": asdict(settings)}
    facts |= {"holdout": unseen} if unseen else {}
    # First: it tells whose the others are, should the process end between them.
    write_json(folder / "scene.json", facts | {"axes": "OpenCV: x right, y down, z forward", "views": views})
    write_splat(folder / "scene.ply", made)
    write_viewer(folder / "scene.html", made, cameras)
    return folder


def start_points(dataset: Path, scene: Scene) -> tuple[Tensor, Tensor]:
    """Points [N, 3] and colours [N, 3]: the scene's own, or those of the PLY file that its transforms.json names.

    Raises UserError where there are none.
    """
    if scene.points is not None and len(scene.points):
        grey = torch.full_like(scene.points, 0.5)
        return scene.points, grey if scene.point_colors is None else scene.point_colors
    name = stated(dataset).get("ply_file_path")
    if isinstance(name, str):
        points, colors = read_points(local(dataset, name))
        if len(points):
            return points, colors
    raise UserError(f"{dataset} has no points to start from; give a data set with sparse/0 or points.ply")


@torch.no_grad()
def scores(gaussians: Gaussians, images: Tensor, cameras: Cameras, masks: Tensor | None = None) -> list[float]:
    """PSNR (dB) of every view; over what ``masks`` [V, H, W] show of it, 100 where that is nothing."""
    found = []
    for view in range(len(cameras)):
        shown = render_gaussians(gaussians, cameras[[view]])[0][0].clamp(0, 1)
        errors = (shown - images[view]).square()
        counted = errors if masks is None else errors[:, masks[view]]
        error = counted.mean().clamp(min=1e-10) if counted.numel() else torch.tensor(1e-10)
        found.append((-10 * error.log10()).item())
    return found


@torch.no_grad()
def held_out(gaussians: Gaussians, folder: Path, height: int, width: int) -> dict[str, Any]:
    """Every metric over the photographs that `fvgen generate --holdout` kept back; empty where there are none."""
    if not (folder / "transforms.json").is_file():
        return {}
    scene = read_scene(folder)
    cameras = scene.cameras.fitted(height, width)
    truth = torch.stack([fit_image(scene.image(view), height, width) for view in range(len(cameras))])
    masks = scene.shown(range(len(cameras)), height, width)
    return {"views": len(truth)} | score_images(render_gaussians(gaussians, cameras)[0].clamp(0, 1), truth, masks)


def judge_out(folder: Path, dataset: Path) -> None:
    """Raises UserError where something that is not ours would be replaced, or the folder cannot be one."""
    if folder.resolve() != dataset.resolve():
        judge_output(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; choose a folder")
    there = [name for name in WRITTEN if (folder / name).exists()]
    if there and not _ours(folder / "scene.json"):
        raise UserError(
            f"--out {folder} holds a {there[0]} that fvgen reconstruct did not write; choose another folder"
        )
    inside = folder.resolve() != dataset.resolve() and dataset.resolve() in folder.resolve().parents
    if inside and not folder.exists():
        raise UserError(f"--out {folder} would lie inside the data set; choose the data set itself or another folder")


def _ours(file: Path) -> bool:
    if not file.is_file():
        return False
    found = read_json(file)
    return isinstance(found, dict) and found.get("made_by") == MADE_BY


def _size(scene: Scene) -> tuple[int, int]:
    height, width = scene.cameras.height, scene.cameras.width
    scale = min(1.0, LARGEST / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
