"""Dense depth from posed photographs by multi-view stereo: no network, no weights, a CPU will do.

Plane sweep: every other photograph is warped onto planes before the reference view (Collins 1996), compared in small
windows by zero-mean normalised correlation, the best half of the photographs counting for each pixel, for a surface
hides from some of them; semi-global matching (Hirschmüller 2008) makes neighbouring pixels agree; and what another
view's depth contradicts is dropped. Where to look for surfaces is told by triangulated SIFT features (OpenCV).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, pad

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, pixel_rays, project
from fvgen.system.packages import install

PLANES = 80
NEIGHBOURS = 4
WINDOW = 5  # pixels
PARALLAX = 0.12  # radians: the angle between the rays of two views that is sought; less is vague, more looks different
SMALL_STEP, LARGE_STEP = 0.1, 1.0  # penalties of semi-global matching, in units of correlation
WITNESSES = 4  # views whose depth checks that of the reference
AGREE = 0.06  # relative: two views that differ by more in depth contradict each other
FEW_MATCHES = 12  # with fewer triangulated features there is no telling where the surfaces are


class TooFewFeatures(UserError):
    """Photographs that share too little; another source of points may still do."""


def stereo_depth(
    images: Tensor,
    cameras: Cameras,
    reference: Sequence[int],
    names: Sequence[str] | None = None,
    found: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Depth [K, H, W] (camera z, scene units; 0 is unknown) of the ``reference`` views of images [V, 3, H, W].

    Images are in [0, 1]; ``names`` of the views are for error messages; ``found`` are depths
    [M] of a view's surfaces that are known already, for views whose features tell too little. About two seconds on one
    core for a view of 256x168, and for each of the WITNESSES that it is checked against, unless they were needed
    before. Raises UserError
    where OpenCV is missing, TooFewFeatures where a view shares too little with the others.
    """
    names = names or [f"view {number}" for number in range(len(images))]
    grey = images.mean(1)
    features = {}
    ranges: dict[int, tuple[float, float]] = {}
    maps: dict[int, Tensor] = {}

    def depth_of(view: int) -> Tensor:
        if view not in maps:
            ranges[view] = _depth_range(grey, cameras, view, features, names[view], (found or {}).get(view))
            others = _neighbours(cameras, view, ranges[view])
            maps[view] = _sweep(grey, cameras, view, others, ranges[view])
        return maps[view]

    out = []
    for view in reference:
        depth = depth_of(view)
        witnesses = _neighbours(cameras, view, ranges[view])[:WITNESSES]
        out.append(torch.where(_confirmed(depth, cameras, view, {n: depth_of(n) for n in witnesses}), depth, 0.0))
    return torch.stack(out)


# --- Where to look ---


def _depth_range(
    grey: Tensor, cameras: Cameras, view: int, features: dict, name: str, known: Tensor | None
) -> tuple[float, float]:
    """Nearest and farthest depth of the surfaces that a view shows, from features triangulated with its neighbours, or
    from what is known where these are too few."""
    _, found = triangulated_features(grey, cameras, view, features)
    if len(found) < FEW_MATCHES and known is not None:
        found = known
    if len(found) < FEW_MATCHES:
        raise TooFewFeatures(
            f"{name} shares {len(found)} features with its neighbours, too few for stereo; add photographs between "
            "them or give depth maps"
        )
    low, high = torch.quantile(found, torch.tensor([0.02, 0.98])).tolist()
    return 0.75 * low, 1.5 * high


def triangulated_features(
    grey: Tensor, cameras: Cameras, view: int, features: dict | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels [M, 2] and depths [M] of a view's features that any of its eight nearest neighbours shows as well.

    grey: [V, H, W] in [0, 1]; ``features`` keeps those of each view from call to call. Raises UserError without OpenCV.
    """
    features = {} if features is None else features
    center, forward = cameras.centers, cameras.world_from_cam[:, :3, 2]
    distance = (center - center[view]).norm(dim=-1)
    similar = (forward @ forward[view] > 0.7) & (distance > 1e-9)
    near = [n for n in distance.argsort().tolist() if similar[n]]
    found = [_triangulated(grey, cameras, view, other, features) for other in near[:8]]
    pixels, depths = zip(*found, strict=True) if found else ((torch.empty(0, 2),), (torch.empty(0),))
    return torch.cat(pixels), torch.cat(depths)


def _triangulated(grey: Tensor, cameras: Cameras, view: int, other: int, features: dict) -> tuple[Tensor, Tensor]:
    """Pixels [M, 2] and depths [M] in ``view`` of the features that both show, where their rays really meet."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"stereo needs OpenCV; `{install('photos')}`, or give depth maps") from error
    for n in (view, other):
        if n not in features:
            keys, words = cv2.SIFT_create(1500).detectAndCompute((grey[n] * 255).byte().numpy(), None)
            features[n] = (np.array([key.pt for key in keys], dtype=np.float32).reshape(-1, 2) + 0.5, words)
    (here, words), (there, other_words) = features[view], features[other]
    if min(len(here), len(there)) < 2:
        return torch.empty(0, 2), torch.empty(0)
    pairs = cv2.BFMatcher().knnMatch(words, other_words, k=2)
    good = [first for first, second in pairs if first.distance < 0.75 * second.distance]
    a = torch.from_numpy(here[[match.queryIdx for match in good]])
    b = torch.from_numpy(there[[match.trainIdx for match in good]])
    ray_a, ray_b = _rays(a, cameras, view), _rays(b, cameras, other)
    # The two points a along the one ray and b along the other that are nearest to each other.
    offset = cameras.centers[other] - cameras.centers[view]
    aa, bb, ab = (ray_a * ray_a).sum(-1), (ray_b * ray_b).sum(-1), (ray_a * ray_b).sum(-1)
    scale = aa * bb - ab * ab
    depth = (bb * (ray_a @ offset) - ab * (ray_b @ offset)) / scale
    back = (ab * (ray_a @ offset) - aa * (ray_b @ offset)) / scale
    points = cameras.centers[view] + depth[:, None] * ray_a
    pixels, _ = project(points, cameras[[other]])
    meet = ((pixels[0] - b).norm(dim=-1) < 2) & (depth > 0) & (back > 0) & (scale > 3e-4 * aa * bb)
    return a[meet], depth[meet]


def _rays(pixels: Tensor, cameras: Cameras, view: int) -> Tensor:
    """[M, 3] directions in the world with unit camera z."""
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=-1)
    return homogeneous @ torch.linalg.inv(cameras.intrinsics[view]).T @ cameras.world_from_cam[view, :3, :3].T


def _neighbours(cameras: Cameras, view: int, limits: tuple[float, float]) -> list[int]:
    """The views to compare with, best first: looking the same way, with about PARALLAX at the typical depth."""
    typical = (limits[0] * limits[1]) ** 0.5
    pose = cameras.world_from_cam
    target = pose[view, :3, 3] + typical * pose[view, :3, 2]
    toward = torch.nn.functional.normalize(target - pose[:, :3, 3], dim=-1)
    parallax = (toward @ toward[view]).clamp(-1, 1).acos()
    seen = (pose[:, :3, 2] * toward).sum(-1).clamp(-1, 1).acos()  # how far off its axis each has the target
    score = (parallax / PARALLAX).log().abs() + 2 * seen
    score[view] = torch.inf
    return [n for n in score.argsort().tolist() if score[n] < 4][:NEIGHBOURS]


# --- Plane sweep ---


def _sweep(grey: Tensor, cameras: Cameras, view: int, others: list[int], limits: tuple[float, float]) -> Tensor:
    """[H, W] depth of one view, everywhere: flat areas take part through their borders, and `_confirmed` judges."""
    inverse = torch.linspace(1 / limits[1], 1 / limits[0], PLANES)
    rays = pixel_rays(cameras[[view]])[0]
    reference = grey[view]
    mean, deviation = _moments(reference)
    cost = torch.empty(PLANES, *reference.shape)
    ahead = [_onto(cameras, view, other, rays) for other in others]
    for plane, value in enumerate(inverse.tolist()):
        costs = []
        for other, (slope, shift) in zip(others, ahead, strict=True):
            warped, inside = _warped(grey[other], slope / value + shift)
            other_mean, other_deviation = _moments(warped)
            covariance = _box(reference * warped) - mean * other_mean
            correlation = covariance / (deviation * other_deviation)
            costs.append(torch.where(inside, 1 - correlation, 1.0).clamp(0, 1))
        best = torch.stack(costs).sort(dim=0).values[: (len(others) + 1) // 2]
        cost[plane] = best.mean(0)
    total = _semi_global(cost, reference)
    chosen = total.argmin(0)
    return 1 / _refined(total, chosen, inverse)


def _onto(cameras: Cameras, view: int, other: int, rays: Tensor) -> tuple[Tensor, Tensor]:
    """slope [H, W, 3] and shift [3]: the point at depth d on each ray falls on pixel slope d + shift, homogeneous."""
    pose = cameras.cam_from_world[other]
    matrix = cameras.intrinsics[other]
    shift = matrix @ (pose[:3, :3] @ cameras.centers[view] + pose[:3, 3])
    return rays @ (matrix @ pose[:3, :3]).T, shift


def _warped(image: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The image [H, W] at homogeneous pixels [H, W, 3], and where those are inside it and in front of its camera."""
    height, width = image.shape
    depth = place[..., 2]
    unit = 2 * place[..., :2] / depth.clamp(min=1e-6)[..., None] / place.new_tensor([width, height]) - 1
    inside = (unit.abs() < 1).all(-1) & (depth > 1e-6)
    out = grid_sample(image[None, None], unit.clamp(-2, 2)[None], padding_mode="border", align_corners=False)
    return out[0, 0], inside


def _box(image: Tensor) -> Tensor:
    """[H, W] mean over WINDOW x WINDOW pixels."""
    border = WINDOW // 2
    return avg_pool2d(pad(image[None, None], [border] * 4, mode="replicate"), WINDOW, 1)[0, 0]


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over each window; noise of 2 grey levels in 255 keeps flat areas uncorrelated."""
    mean = _box(image)
    return mean, (_box(image * image) - mean * mean).clamp(min=0).add((2 / 255) ** 2).sqrt()


def _semi_global(cost: Tensor, image: Tensor) -> Tensor:
    """[D, H, W] costs summed along four straight paths to each pixel, changes of plane penalised."""
    total = torch.zeros_like(cost)
    for turned in (False, True):
        volume, picture = (cost.transpose(1, 2), image.T) if turned else (cost, image)
        for flipped in (False, True):
            volume_, picture_ = (volume.flip(1), picture.flip(0)) if flipped else (volume, picture)
            summed = _one_way(volume_, picture_)
            summed = summed.flip(1) if flipped else summed
            total += summed.transpose(1, 2) if turned else summed
    return total


def _one_way(cost: Tensor, image: Tensor) -> Tensor:
    """Along axis 1 (rows): L(p) = cost(p) + min(L(q), L(q) one plane off + small, best L(q) + large) - best L(q)."""
    out = torch.empty_like(cost)
    out[:, 0] = last = cost[:, 0]
    edge = (image[1:] - image[:-1]).abs()
    large = (LARGE_STEP / (1 + 20 * edge)).clamp(min=1.5 * SMALL_STEP)  # a change of depth costs less at an edge
    for row in range(1, cost.shape[1]):
        best = last.amin(0)
        beside = pad(last.T[:, None], [1, 1], value=torch.inf)[:, 0].T  # [D + 2, W]
        step = torch.minimum(beside[:-2], beside[2:]) + SMALL_STEP
        last = cost[:, row] + torch.minimum(torch.minimum(last, step), best + large[row - 1]) - best
        out[:, row] = last
    return out


def _refined(total: Tensor, chosen: Tensor, inverse: Tensor) -> Tensor:
    """[H, W] inverse depth at the minimum of the parabola through the best plane and those beside it."""
    inner = chosen.clamp(1, len(inverse) - 2)
    before, here, after = (total.gather(0, (inner + step)[None])[0] for step in (-1, 0, 1))
    bend = before + after - 2 * here
    shift = torch.where(bend > 1e-6, (before - after) / (2 * bend).clamp(min=1e-6), 0.0).clamp(-0.5, 0.5)
    shift = torch.where(inner == chosen, shift, 0.0)
    return inverse[chosen] + shift * (inverse[1] - inverse[0])


# --- Check ---


def _confirmed(depth: Tensor, cameras: Cameras, view: int, witnesses: dict[int, Tensor]) -> Tensor:
    """[H, W] bool: some witness that shows the point has about its depth there."""
    height, width = depth.shape
    points = cameras.centers[view] + depth[..., None] * pixel_rays(cameras[[view]])[0]
    confirmed = torch.zeros_like(depth, dtype=torch.bool)
    for other, its_depth in witnesses.items():
        pixels, expected = project(points.reshape(-1, 3), cameras[[other]])
        x, y = pixels[0].floor().unbind(-1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (expected[0] > 0)
        flat = torch.where(inside, y * width + x, 0.0).long()
        ratio = its_depth.flatten()[flat] / expected[0]
        confirmed |= (inside & ((ratio - 1).abs() < AGREE)).reshape(height, width)
    return confirmed
