"""Two photographs without poses to a scene: affine SIFT matches, an essential matrix, and one assumption.

Two views tell each other's direction but neither their distance, which becomes the unit, nor, in practice, the focal
length (all of 0.6 to 2.8 image sides explain the matches of ordinary pairs equally well): it comes from EXIF, else from
`USUAL_FOCAL`. Affine SIFT (Morel and Yu 2009) compares simulated tilts of both photographs, for wide baselines.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, project
from fvgen.scenes.colmap_write import write_model
from fvgen.scenes.formats import read_scene
from fvgen.scenes.images import load_image
from fvgen.scenes.readers.photographs import Photographs, copy_photograph
from fvgen.scenes.scene import Scene
from fvgen.system.doors import open_image
from fvgen.system.files import atomic_path, new_folder
from fvgen.system.packages import install

USUAL_FOCAL = 0.8  # of the longer side: a phone's main camera
SIDE = 640  # pixels on the longer side that features are sought at
FEATURES = 9000  # of each photograph, the strongest
TILTS = 2
RATIO = 0.85  # of the distances to the best and to the next best match elsewhere
THRESHOLD = 1.0  # pixels at SIDE
FEWEST = 30  # points that both show
LEAST_PARALLAX = math.radians(0.7)  # median angle at the points: below it they were taken from one place
FOCAL_35MM = 0xA405  # EXIF


class Pair(NamedTuple):
    """Cameras of both views at the photographs' size, points [N, 3] and where they are seen [N, 2 (view), 2 (x, y)]."""

    cameras: Cameras
    points: Tensor
    pixels: Tensor


def pose_pair(photographs: Photographs, folder: str | Path) -> Scene:
    """The posed scene of two photographs in ``folder``, as COLMAP lays it out. The unit is their distance.

    Raises UserError where OpenCV is missing, where they share too little, and where they were taken from one place.
    """
    folder = Path(folder)
    first, second = (load_image(path) for path in photographs.image_paths)
    focal = focal_length(photographs.image_paths[0], photographs.height, photographs.width)
    pair = two_views(first, second, focal, photographs.name)
    with atomic_path(folder) as temporary:
        new_folder(temporary / "images")
        names = [copy_photograph(path, temporary / "images").name for path in photographs.image_paths]
        x, y = pair.pixels[:, 0].floor().long().unbind(-1)
        colors = torch.from_numpy(first)[y.clamp(0, first.shape[0] - 1), x.clamp(0, first.shape[1] - 1)].float() / 255
        count = len(pair.points)
        point = torch.arange(count).repeat(2)
        view = torch.tensor([0, 1]).repeat_interleave(count)
        tracks = (point, view, pair.pixels.transpose(0, 1).reshape(-1, 2))
        write_model(temporary / "sparse" / "0", pair.cameras, names, pair.points, colors, tracks)
    return read_scene(folder, "colmap")


def pose_single(photograph: Photographs, folder: str | Path) -> Scene:
    """One photograph as a scene: the world is its camera's. Depth must come from a network that knows metres."""
    height, width = photograph.height, photograph.width
    focal = focal_length(photograph.image_paths[0], height, width)
    cameras = Cameras(torch.eye(4)[None], _intrinsics(focal, height, width, 1), height, width)
    with atomic_path(folder) as temporary:
        new_folder(temporary / "images")
        name = copy_photograph(photograph.image_paths[0], temporary / "images").name
        nothing = (torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0, 2))
        write_model(temporary / "sparse" / "0", cameras, [name], torch.empty(0, 3), torch.empty(0, 3), nothing)
    return read_scene(folder, "colmap")


def focal_length(path: Path, height: int, width: int) -> float:
    """Pixels: from the EXIF tag FocalLengthIn35mmFilm (36 mm across the longer side), else the usual one."""
    try:
        with open_image(path) as image:
            said = image.getexif().get_ifd(0x8769).get(FOCAL_35MM, 0)
    except Exception:  # a damaged tag is no tag; damaged pixels are told by `load_image`
        said = 0
    share = float(said) / 36 if isinstance(said, int | float) and 8 <= said <= 400 else USUAL_FOCAL
    return share * max(height, width)


def two_views(first: np.ndarray, second: np.ndarray, focal: float, name: str) -> Pair:
    """Cameras and points of two photographs uint8 [H, W, 3] with this focal length in pixels. Raises UserError as
    `pose_pair` does; ``name`` is theirs in messages."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"posing two photographs needs OpenCV; `{install('photos')}`, or give poses") from error
    height, width = first.shape[:2]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # several would put the features in another order each time
    try:
        a, b = _matches(cv2, first, second)
        cure = "take them with more overlap, add a third between them, or bring DUSt3R (FVGEN_DUST3R, docs/data.md)"
        if len(a) < FEWEST:
            raise UserError(
                f"the two photographs of {name} share only {len(a)} points, at least {FEWEST} needed; {cure}"
            )
        matrix = _intrinsics(focal, height, width, 1)[0].double().numpy()
        scale = max(height, width) / SIDE
        essential, inliers = cv2.findEssentialMat(
            a, b, matrix, method=cv2.USAC_MAGSAC, prob=0.9999, threshold=THRESHOLD * scale, maxIters=20000
        )
        if essential is None or essential.shape != (3, 3):
            raise UserError(f"no two cameras explain what the two photographs of {name} share; {cure}")
        _, rotation, shift, inliers = cv2.recoverPose(essential, a, b, matrix, mask=inliers)
        keep = inliers[:, 0] > 0
        a, b = a[keep], b[keep]
    finally:
        cv2.setNumThreads(threads)
    poses = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    poses[1, :3, :3] = torch.from_numpy(rotation.T)
    poses[1, :3, 3] = torch.from_numpy(-rotation.T @ shift[:, 0])
    cameras = Cameras(poses, torch.from_numpy(matrix).repeat(2, 1, 1), height, width)
    points, angle = _meeting(torch.from_numpy(a), torch.from_numpy(b), cameras)
    pixels, depth = project(points, cameras)
    seen = torch.stack([torch.from_numpy(a), torch.from_numpy(b)])
    good = ((pixels - seen).norm(dim=-1).amax(0) < 2 * THRESHOLD * scale) & (depth > 0).all(0)
    if int(good.sum()) < FEWEST:
        raise UserError(
            f"the two photographs of {name} share only {int(good.sum())} points that lie before both cameras, at least "
            f"{FEWEST} are needed; {cure}"
        )
    if angle[good].median() < LEAST_PARALLAX:
        raise UserError(
            f"the two photographs of {name} were taken from one place, so they tell no depth; move sideways"
        )
    return Pair(cameras.to(dtype=torch.float32), points[good].float(), seen[:, good].transpose(0, 1).float())


def _matches(cv2, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[M, 2] pixels each (pixel centres at 0.5) of mutual best matches."""
    places, words = [], []
    for image in (first, second):
        scale = SIDE / max(image.shape[:2])
        small = cv2.resize(
            cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA
        )
        finder = cv2.AffineFeature_create(cv2.SIFT_create(contrastThreshold=0.02), TILTS, 0)
        keys, found = finder.detectAndCompute(small, None)
        if not keys:
            return np.empty((0, 2)), np.empty((0, 2))
        best = np.argsort([-key.response for key in keys], kind="stable")[:FEATURES]
        size = np.array([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0]])
        places.append((np.array([keys[i].pt for i in best]) + 0.5) * size)
        word = torch.from_numpy(found[best])
        words.append((word / word.sum(1, keepdim=True).clamp(min=1e-6)).sqrt())  # RootSIFT (Arandjelovic 2012)
    likeness = words[0] @ words[1].T
    near = 6 * max(first.shape[:2]) / SIDE
    there, ratio = _best(likeness, places[1], near)
    back, _ = _best(likeness.T, places[0], near)
    mutual = np.linalg.norm(places[0][back[there]] - places[0], axis=1) < near / 2
    keep = np.flatnonzero(mutual & (ratio < RATIO))
    both = np.concatenate([places[0][keep], places[1][there[keep]]], axis=1)
    _, unique = np.unique(np.round(both / near * 3), axis=0, return_index=True)  # of several tilts one
    return both[np.sort(unique), :2], both[np.sort(unique), 2:]


def _best(likeness: Tensor, places: np.ndarray, near: float) -> tuple[np.ndarray, np.ndarray]:
    """For each row the best column, and its distance over that of the best one that lies elsewhere."""
    values, index = likeness.topk(min(6, likeness.shape[1]), dim=1)
    index = index.numpy()
    elsewhere = np.linalg.norm(places[index] - places[index[:, :1]], axis=-1) > near
    next_best = torch.where(torch.from_numpy(elsewhere), values, -1.0).amax(1)
    distance = (2 - 2 * torch.stack([values[:, 0], next_best])).clamp(min=0).sqrt()
    return index[:, 0], (distance[0] / distance[1].clamp(min=1e-9)).numpy()


def _meeting(a: Tensor, b: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Points [N, 3] nearest to both rays of each match, and the angles between the rays [N]."""
    back = torch.linalg.inv(cameras.intrinsics)
    rays = [
        torch.nn.functional.normalize(
            torch.cat([x, torch.ones_like(x[:, :1])], dim=1) @ (cameras.world_from_cam[v, :3, :3] @ back[v]).T, dim=1
        )
        for v, x in enumerate((a.double(), b.double()))
    ]
    offset = cameras.centers[1] - cameras.centers[0]
    cosine = (rays[0] * rays[1]).sum(1)
    size = (1 - cosine**2).clamp(min=1e-12)
    along = ((rays[0] @ offset) - cosine * (rays[1] @ offset)) / size
    other = (cosine * (rays[0] @ offset) - (rays[1] @ offset)) / size
    one, two = along[:, None] * rays[0] + cameras.centers[0], other[:, None] * rays[1] + cameras.centers[1]
    return (one + two) / 2, cosine.clamp(-1, 1).acos()


def _intrinsics(focal: float, height: int, width: int, views: int) -> Tensor:
    matrix = torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    return matrix.repeat(views, 1, 1)
