"""Point maps from DUSt3R (Wang et al. 2024), a user's own copy of it: `dust3r_model` finds and loads it.

Two jobs. `run`: depth of posed photographs, the poses and lenses given to its global alignment, so that depth comes out
in scene units. `reconstruct`: photographs without poses to a scene with poses, lenses and depth maps, as ViewCrafter
starts: minimum spanning tree, 300 steps of Adam at 0.01, linearly falling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from fvgen.clips.views import pose_distance
from fvgen.depth.dust3r_model import Dust3r, load_dust3r, missing
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.confidence import LEAST, clean_confidence
from fvgen.geometry.conventions import to_opengl
from fvgen.scenes.formats import read_scene
from fvgen.scenes.images import fit_depth, fit_image, load_image
from fvgen.scenes.readers.photographs import Photographs, copy_photograph
from fvgen.scenes.scene import Scene
from fvgen.system.files import atomic_path, new_folder, write_text

PATCH = 16
COMPLETE = 8  # views up to which all are compared with all
OFFSETS = (1, 2, 4)  # beyond, each with those that are so many places further
ITERATIONS = 300
RATE = 0.01
SEED = 0  # the alignment starts from random poses


class Aligned(NamedTuple):
    """The result of global alignment, DUSt3R's pixels (see `fvgen.geometry.confidence`), without the padding.

    depth, confidence: [V, H, W]; 0 in ``depth`` is a point that was cleaned away.
    """

    cameras: Cameras
    depth: Tensor
    confidence: Tensor


def lacks(scene: Scene) -> str | None:
    return missing() or (None if len(scene) > 1 else "one photograph has nothing to be aligned with")


def run(scene: Scene, views: Sequence[int], height: int, width: int) -> Tensor:
    """A single view gets the company of the one beside it. Raises UserError where all were taken from one place."""
    chosen = list(dict.fromkeys(views))
    if len(chosen) == 1:
        chosen.append(_beside(scene, chosen[0]))
    centers = scene.cameras.centers[chosen]
    if not (centers - centers[0]).any():
        raise UserError(
            f"{scene.image_paths[chosen[0]]} and its neighbours were taken from one place, so DUSt3R's scale stays "
            "open; choose another source of points"
        )
    dust3r = load_dust3r()
    size = working_size(height, width, dust3r.side)
    images = torch.stack([fit_image(scene.image(view), *size) for view in chosen])
    depth = align(dust3r, images, scene.cameras[chosen].fitted(*size)).depth
    return torch.stack([fit_depth(depth[chosen.index(view)], height, width) for view in views])


def reconstruct(photographs: Photographs, folder: str | Path) -> Scene:
    """Poses, focal lengths and depth maps, written to ``folder`` as a nerfstudio scene, whole or not at all.

    One photograph is compared with itself. The scale is arbitrary. Raises UserError where DUSt3R cannot run.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} is already there; choose another folder for the reconstruction")
    dust3r = load_dust3r()
    size = working_size(photographs.height, photographs.width, dust3r.side)
    paths = photographs.image_paths if len(photographs) > 1 else photographs.image_paths * 2
    aligned = align(dust3r, torch.stack([fit_image(load_image(path), *size) for path in paths]))
    with atomic_path(folder) as temporary:
        _write_scene(temporary, photographs, aligned)
    return read_scene(folder, "nerfstudio")


# --- Pairs and sizes ---


def choose_pairs(views: int) -> list[tuple[int, int]]:
    """Directed pairs, each both ways, (1, 0) before (0, 1): all of them for up to `COMPLETE` views.

    A directed pair at 512x288 takes 31 MB while aligning, so that thirty views all with all would need 27 GB; beyond
    `COMPLETE` views each is paired with those `OFFSETS` places further, around the end: at most six times V pairs,
    and 6 GB for thirty views.
    """
    if views <= COMPLETE:
        one_way = [(i, j) for i in range(views) for j in range(i)]
    else:
        one_way = sorted({(max(i, k), min(i, k)) for i in range(views) for k in ((i + o) % views for o in OFFSETS)})
    return one_way + [(j, i) for i, j in one_way]


def working_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The image's size at which its long side is ``side``."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def padded(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Images [V, 3, H, W] with their borders repeated up to whole patches, and how many pixels (left, top) came first.

    DUSt3R's own loader cuts the border off instead, and then nothing is known there.
    """
    height, width = images.shape[-2:]
    x, y = -width % PATCH, -height % PATCH
    return pad(images, [x // 2, x - x // 2, y // 2, y - y // 2], mode="replicate"), (x // 2, y // 2)


def _beside(scene: Scene, view: int) -> int:
    """The nearest view that was taken from another place."""
    distance = pose_distance(scene.cameras, 1.0)[view]
    moved = (scene.cameras.centers - scene.cameras.centers[view]).norm(dim=-1) > 0
    return int(distance.masked_fill(~moved, math.inf).argmin())


# --- Alignment ---


def align(dust3r: Dust3r, images: Tensor, cameras: Cameras | None = None) -> Aligned:
    """DUSt3R and its global alignment on images [V, 3, H, W] in [0, 1]; with ``cameras`` these are kept as they are."""
    height, width = images.shape[-2:]
    whole, (left, top) = padded(images)
    views = [
        {"img": 2 * image[None] - 1, "true_shape": np.int32([image.shape[-2:]]), "idx": i, "instance": str(i)}
        for i, image in enumerate(whole)
    ]
    device = next(dust3r.network.parameters()).device.type  # mini-dust3r takes no torch.device
    pairs = [(views[i], views[j]) for i, j in choose_pairs(len(views))]
    output = dust3r.inference(pairs, dust3r.network, device, batch_size=1, verbose=False)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(SEED)
        scene = dust3r.global_aligner(
            output, device=device, mode=dust3r.mode, verbose=False, optimize_pp=cameras is not None
        )
        if cameras is not None:
            # DUSt3R's pixel i is the ray through i, ours through i + 0.5.
            center = cameras.intrinsics[:, :2, 2] - 0.5 + torch.tensor([left, top])
            scene.preset_focal(cameras.intrinsics[:, [0, 1], [0, 1]].mean(1).tolist())
            scene.preset_principal_point(center.numpy())
            scene.preset_pose(cameras.world_from_cam.numpy())
        init = "mst" if cameras is None else "known_poses"
        scene.compute_global_alignment(init=init, niter=ITERATIONS, schedule="linear", lr=RATE)
    inner = (slice(None), slice(top, top + height), slice(left, left + width))
    depth = torch.stack([one.detach().cpu() for one in scene.get_depthmaps()])
    confidence = torch.stack([one.detach().cpu() for one in scene.im_conf])
    points = torch.stack([one.detach().cpu() for one in scene.get_pts3d()])
    found = Cameras(scene.get_im_poses().detach().cpu(), scene.get_intrinsics().detach().cpu(), *whole.shape[-2:])
    if not all(part.isfinite().all() for part in (depth, found.world_from_cam, found.intrinsics)):
        raise UserError(f"DUSt3R could not align the {len(images)} photographs; give some that show more in common")
    if len(images) > 2:  # ViewCrafter draws all points of one or two views
        confidence = clean_confidence(confidence, depth, points, found)
        depth = torch.where(confidence > LEAST, depth, 0.0)
    intrinsics = found.intrinsics - torch.tensor([[0, 0, left], [0, 0, top], [0, 0, 0]])
    found = Cameras(found.world_from_cam, intrinsics, height, width)
    return Aligned(found if cameras is None else cameras, depth[inner], confidence[inner])


def _write_scene(folder: Path, photographs: Photographs, aligned: Aligned) -> None:
    """transforms.json, copies of the photographs, 16-bit depth maps of their size."""
    new_folder(folder / "images")
    new_folder(folder / "depth")
    height, width = photographs.height, photographs.width
    cameras = aligned.cameras.fitted(height, width)
    unit = aligned.depth.max().item() / 65535
    frames = []
    for i, path in enumerate(photographs.image_paths):
        copy = copy_photograph(path, folder / "images")
        levels = (fit_depth(aligned.depth[i], height, width) / unit).round()
        Image.fromarray(levels.numpy().astype(np.uint16)).save(folder / "depth" / f"{i:04d}.png")
        matrix = cameras.intrinsics[i].tolist()
        frames.append(
            {
                "file_path": f"images/{copy.name}",
                "depth_file_path": f"depth/{i:04d}.png",
                "transform_matrix": to_opengl(cameras.world_from_cam[[i]].double())[0].tolist(),
                "fl_x": matrix[0][0],
                "fl_y": matrix[1][1],
                "cx": matrix[0][2],
                "cy": matrix[1][2],
            }
        )
    document = {"w": width, "h": height, "depth_unit_scale_factor": unit, "frames": frames}
    write_text(folder / "transforms.json", json.dumps(document, indent=1))
