"""Camera errors: closed forms, invariances, and evo's numbers where it is installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fvgen.metrics.cameras import (
    Similarity,
    absolute_error,
    camera_error,
    path_errors,
    pose_similarity,
    relative_errors,
    rotation_angle,
    similarity,
)


def turned(axis: Tensor, angle: float) -> Tensor:
    """[3, 3] by Rodrigues' formula."""
    x, y, z = torch.nn.functional.normalize(axis.double(), dim=0)
    k = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.matrix_exp(angle * k)


def path(count: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    for pose in poses:
        pose[:3, :3] = turned(torch.randn(3, generator=generator), torch.rand((), generator=generator).item() * 2)
        pose[:3, 3] = torch.randn(3, generator=generator).double()
    return poses


MOTION = Similarity(
    torch.tensor(2.5, dtype=torch.float64), turned(torch.tensor([1.0, 2, 3]), 0.7), torch.tensor([3.0, -1, 2]).double()
)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.3, math.pi / 2, math.pi])
def test_angles_are_exact_even_near_zero(angle):
    a = turned(torch.tensor([1.0, -1, 0.5]), 0.4)
    found = rotation_angle(a[None], (a @ turned(torch.tensor([0.2, 1, 1]), angle))[None])
    assert found.item() == pytest.approx(angle, abs=1e-7 if angle == math.pi else 1e-12)


@pytest.mark.parametrize("of", [lambda a, b: similarity(a[:, :3, 3], b[:, :3, 3]), pose_similarity])
def test_a_similarity_is_found_again(of):
    poses = path()
    found = of(poses, MOTION.moved(poses))
    for one, other in zip(found, MOTION, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_mirror_is_no_similarity():
    points = path()[:, :3, 3]
    found = similarity(points, points * torch.tensor([-1.0, 1, 1]))
    assert torch.linalg.det(found.rotation).item() == pytest.approx(1)


def test_errors_are_those_that_were_put_in():
    truth = path(6)
    given = torch.tensor([True, False, False, True, False, True])
    found = truth.clone()
    found[1, :3, :3] = truth[1, :3, :3] @ turned(torch.tensor([0.0, 1, 0]), 0.2)
    found[2, :3, 3] += torch.tensor([0.0, 3, 4]).double()
    found[4] = torch.nan
    error = camera_error(MOTION.moved(found), truth, given)
    nan = math.nan
    torch.testing.assert_close(
        error.rotation, torch.tensor([0, 0.2, 0, 0, nan, 0]).double(), atol=1e-7, rtol=0, equal_nan=True
    )
    torch.testing.assert_close(
        error.position, torch.tensor([0, 0, 5.0, 0, nan, 0]).double(), atol=1e-9, rtol=0, equal_nan=True
    )
    assert error.failures == 1
    with pytest.raises(ValueError, match="two are needed"):
        camera_error(found, truth, torch.tensor([True, *[False] * 5]))


def test_a_path_in_line_is_aligned_by_its_rotations():
    """Two photographs, or a walk straight ahead: centres alone leave a turn about the line open."""
    truth = path(4)
    truth[:, :3, 3] = torch.arange(4.0).double()[:, None] * torch.tensor([1.0, 0, 0]).double()
    error = camera_error(MOTION.moved(truth), truth, torch.ones(4, dtype=torch.bool))
    assert error.rotation.max() < 1e-7 and error.position.max() < 1e-9


def test_relative_errors_do_not_see_where_the_world_stands():
    truth = path()
    rigid = Similarity(torch.ones((), dtype=torch.float64), MOTION.rotation, MOTION.shift)
    angles, distances = relative_errors(rigid.moved(truth), truth)
    assert angles.max() < 1e-7 and distances.max() < 1e-9
    found = truth.clone()
    found[3, :3, 3] += truth[3, :3, :3] @ torch.tensor([0.1, 0, 0]).double()
    assert relative_errors(found, truth)[1][2].item() == pytest.approx(0.1)
    assert absolute_error(MOTION.moved(truth), truth) < 1e-9


def test_path_errors_know_both_scale_rules():
    truth = path()
    error = path_errors(MOTION.moved(truth), truth)
    assert max(error.values()) < 1e-6  # scale, rotation and shift are the first view's
    found = truth.clone()
    found[:, :3, :3] = truth[:, :3, :3] @ turned(torch.tensor([0.0, 0, 1]), 0.1)
    found[0] = truth[0]
    assert path_errors(found, truth)["R_err"] == pytest.approx(0.1 * 5 / 6)


def test_evo_agrees():
    evo = pytest.importorskip("evo.core.metrics")
    from evo.core.trajectory import PosePath3D

    truth, found = path(8), path(8)
    found[:, :3, 3] = found[:, :3, 3] + 0.1 * path(8, 3)[:, :3, 3]
    ours = absolute_error(MOTION.moved(found), truth)
    reference, estimate = (PosePath3D(poses_se3=list(p.numpy())) for p in (truth, MOTION.moved(found)))
    estimate.align(reference, correct_scale=True)
    ape = evo.APE(evo.PoseRelation.translation_part)
    ape.process_data((reference, estimate))
    assert ours == pytest.approx(ape.get_statistic(evo.StatisticsType.rmse), rel=1e-6)
