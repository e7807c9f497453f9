"""How far cameras are from those that were asked for, after the similarity that no reconstruction can know.

Formulas: Umeyama 1991 (the similarity); Sturm et al. 2012 (ATE, RPE); Wonderland (Liang et al. 2025), section 4.1 and
its supplement, and CameraCtrl (He et al. 2024) for R_err and T_err. All poses are [V, 4, 4] camera-to-world, rotations
in radians, lengths in the units of ``truth``; a pose that is not finite is a view that could not be placed: it is
counted, and enters no mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Similarity(NamedTuple):
    """x -> scale rotation x + shift."""

    scale: Tensor
    rotation: Tensor
    shift: Tensor

    def moved(self, world_from_cam: Tensor) -> Tensor:
        """Poses [V, 4, 4] in the other world."""
        out = world_from_cam.clone()
        out[:, :3, :3] = self.rotation @ world_from_cam[:, :3, :3]
        out[:, :3, 3] = self.scale * world_from_cam[:, :3, 3] @ self.rotation.T + self.shift
        return out


class CameraError(NamedTuple):
    """rotation, position: [V] angles and distances, NaN where a view could not be placed; failures: how many."""

    rotation: Tensor
    position: Tensor
    failures: int


def similarity(source: Tensor, target: Tensor) -> Similarity:
    """The least-squares similarity from points [N, 3] to points [N, 3] (Umeyama, equations 39 to 42), never mirrored.

    Points on one line leave a turn about it open; one point, or N in one place, leave scale and rotation at one. Raises
    ValueError for none.
    """
    if not len(source):
        raise ValueError("a similarity needs at least one pair of points")
    x, y = source.double(), target.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    variance = (x - mean_x).square().sum(1).mean()
    eye = torch.eye(3, dtype=torch.float64, device=x.device)
    if variance <= 1e-18:
        return Similarity(torch.ones_like(variance), eye, mean_y - mean_x)
    u, s, vh = torch.linalg.svd((y - mean_y).T @ (x - mean_x) / len(x))
    flip = eye.clone()
    flip[2, 2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
    rotation = u @ flip @ vh
    scale = (s * flip.diagonal()).sum() / variance
    return Similarity(scale, rotation, mean_y - scale * rotation @ mean_x)


def pose_similarity(found: Tensor, truth: Tensor) -> Similarity:
    """Of poses: the mean rotation between them, then scale and shift of the centres. Unlike `similarity` it needs no
    three views that are not in line, as the photographs of a walk often are."""
    difference = (truth[:, :3, :3].double() @ found[:, :3, :3].double().transpose(1, 2)).sum(0)
    u, _, vh = torch.linalg.svd(difference)
    flip = torch.eye(3, dtype=torch.float64, device=u.device)
    flip[2, 2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
    rotation = u @ flip @ vh
    x, y = found[:, :3, 3].double() @ rotation.T, truth[:, :3, 3].double()
    moved, wanted = x - x.mean(0), y - y.mean(0)
    spread = moved.square().sum()
    scale = (moved * wanted).sum() / spread if spread > 1e-18 else spread.new_ones(())
    return Similarity(scale, rotation, y.mean(0) - scale * x.mean(0))


def rotation_angle(a: Tensor, b: Tensor) -> Tensor:
    """[V] angle between rotations [V, 3, 3], 0 to pi: 2 asin(|A - B| / sqrt(8)), which is arccos((tr(A^T B) - 1) / 2)
    without its loss of digits near zero."""
    return 2 * torch.asin(((a - b).flatten(-2).norm(dim=-1) / 8**0.5).clamp(max=1))


def camera_error(found: Tensor, truth: Tensor, given: Tensor) -> CameraError:
    """Errors [V] of poses after the similarity that takes the ``given`` ones [V] (bool) to their truth.

    Raises ValueError where fewer than two of the given views were placed: nothing then tells the scale.
    """
    found, truth = found.double(), truth.double()
    placed = found.flatten(1).isfinite().all(dim=1)
    anchors = placed & given
    if anchors.sum() < 2:
        raise ValueError(f"{int(anchors.sum())} of {int(given.sum())} given views were placed, two are needed")
    moved = pose_similarity(found[anchors], truth[anchors]).moved(found)
    rotation = rotation_angle(moved[:, :3, :3], truth[:, :3, :3])
    position = (moved[:, :3, 3] - truth[:, :3, 3]).norm(dim=-1)
    nothing = rotation.new_full((), torch.nan)
    return CameraError(
        torch.where(placed, rotation, nothing), torch.where(placed, position, nothing), int((~placed).sum())
    )


def absolute_error(found: Tensor, truth: Tensor) -> float:
    """ATE: root of the mean squared distance of centres after `similarity` (Sturm et al., equation 7, with scale)."""
    moved = similarity(found[:, :3, 3], truth[:, :3, 3]).moved(found.double())
    return (moved[:, :3, 3] - truth[:, :3, 3].double()).square().sum(1).mean().sqrt().item()


def relative_errors(found: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """RPE from each view to the next (Sturm et al., equation 1): angles [V - 1] and distances [V - 1]."""

    def steps(poses: Tensor) -> Tensor:
        return torch.linalg.solve(poses[:-1].double(), poses[1:].double())

    off = torch.linalg.solve(steps(truth), steps(found))
    eye = torch.eye(3, dtype=off.dtype, device=off.device).expand(len(off), 3, 3)
    return rotation_angle(off[:, :3, :3], eye), off[:, :3, 3].norm(dim=-1)


def path_errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """R_err (mean angle) and T_err (mean distance) of a path relative to its first view, T_err under both rules for the
    scale in use: the least squares one (at least 0: a path that was walked backwards is not turned round), and each
    path divided by its farthest view from the first."""
    relative = [torch.linalg.solve(poses[:1].double(), poses.double()) for poses in (found, truth)]
    centers = [poses[:, :3, 3] for poses in relative]
    spread = centers[0].square().sum()
    scale = ((centers[0] * centers[1]).sum() / spread).clamp(min=0) if spread > 0 else spread.new_ones(())
    longest = [c.norm(dim=1).max().clamp(min=1e-12) for c in centers]
    return {
        "R_err": rotation_angle(relative[0][:, :3, :3], relative[1][:, :3, :3]).mean().item(),
        "T_err_least_squares": (scale * centers[0] - centers[1]).norm(dim=1).mean().item(),
        "T_err_farthest": (centers[0] / longest[0] - centers[1] / longest[1]).norm(dim=1).mean().item(),
    }
