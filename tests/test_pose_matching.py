"""Cameras of frames, found again in scenes that are known exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from fvgen.clips.rooms import drawn_scene, render_scene
from fvgen.geometry.cameras import Cameras, pinhole, pixel_rays, project
from fvgen.geometry.off_path import off_path
from fvgen.metrics import pose_matching
from fvgen.metrics.cameras import rotation_angle
from fvgen.metrics.pose_matching import (
    MOST_RESIDUAL,
    Matched,
    align,
    blurred,
    correlation,
    match_poses,
    matched_errors,
    moved,
    start_views,
    twist,
)

FRAMES, HEIGHT, WIDTH = 3, 48, 64


def room(index: int, frames: int = FRAMES):
    """(render, cameras) of a built-in scene, its first ``frames`` of nine."""
    scene, cameras, _ = drawn_scene("test", 0, index, 9, HEIGHT, WIDTH)
    return partial(render_scene, scene), cameras[:frames]


@pytest.fixture(scope="module")
def known():
    render, cameras = room(1)
    return render, cameras, render(cameras)[0]


def off(matched: Matched, truth: Cameras, cameras: Cameras):
    """Degrees, and distances over the path's extent."""
    extent = (cameras.centers - cameras.centers[0]).norm(dim=1).max()
    found, wanted = matched.world_from_cam, truth.world_from_cam.double()
    turn = rotation_angle(found[:, :3, :3], wanted[:, :3, :3]).rad2deg()
    return turn, (found[:, :3, 3] - wanted[:, :3, 3]).norm(dim=1) / extent


def nudged(cameras: Cameras, degrees: float, share: float, seed: int = 0) -> Cameras:
    """Each camera turned and moved in a random direction, by a share of the path's extent."""
    generator = torch.Generator().manual_seed(seed)
    turn, way = torch.nn.functional.normalize(torch.randn(2, len(cameras), 3, generator=generator).double(), dim=-1)
    extent = (cameras.centers - cameras.centers[0]).norm(dim=1).max()
    step = torch.cat([share * extent * way, torch.deg2rad(torch.tensor(degrees)) * turn], dim=1)
    poses = cameras.world_from_cam.double() @ torch.linalg.matrix_exp(twist(step))
    return replace(cameras, world_from_cam=poses.float())


def test_true_frames_are_found_from_cameras_beside_them(known):
    render, cameras, frames = known
    matched = match_poses(frames, nudged(cameras, 3.0, 0.1), render)
    turn, shift = off(matched, cameras, cameras)
    assert matched.failures == 0 and turn.max() < 0.1 and shift.max() < 0.01


def test_a_frame_is_found_where_it_is_and_not_where_it_was_asked_to_be(known):
    render, cameras, frames = known
    still = match_poses(frames[:1].expand(FRAMES, -1, -1, -1), cameras, render)
    turn, shift = off(still, cameras[[0] * FRAMES], cameras)
    assert still.failures == 0 and turn.max() < 0.1 and shift.max() < 0.01
    errors = matched_errors(still, cameras)
    gone = (cameras.centers - cameras.centers[0]).norm(dim=1)
    assert errors["T_err_scene"] == pytest.approx((gone[1:].mean() / gone.max()).item(), abs=0.01)

    beside = off_path(cameras, FRAMES, torch.Generator().manual_seed(0), 0.2, 0.2)
    matched = match_poses(render(beside)[0], cameras, render)
    turn, shift = off(matched, beside, cameras)
    assert matched.failures == 0 and turn.max() < 0.1 and shift.max() < 0.01


def test_blur_and_noise_cost_little(known):
    """0.2 degrees is usual, a frame with little on it may have more."""
    render, cameras, frames = known
    noise = 0.05 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    matched = match_poses((blurred(frames, 1.0) + noise).clamp(0, 1), cameras, render)
    turn, shift = off(matched, cameras, cameras)
    assert matched.failures == 0 and turn.mean() < 0.5 and shift.mean() < 0.02
    assert matched.residual.max() < MOST_RESIDUAL / 4


def test_what_shows_nothing_of_the_scene_is_a_failure(known):
    render, cameras, frames = known
    noise = torch.rand(frames[:1].shape, generator=torch.Generator().manual_seed(0))
    other = room(11)
    shown = other[0](other[1][:1])[0]
    wrong = torch.cat([torch.full_like(noise, 0.5), noise, shown])
    matched = match_poses(wrong, cameras, render)
    assert matched.failures == FRAMES and matched.world_from_cam.isnan().all()
    assert matched.residual.min() > 2 * MOST_RESIDUAL


def test_errors_count_frames_that_were_not_found():
    cameras = room(1)[1]
    truth, nothing = cameras.world_from_cam.double(), torch.zeros(FRAMES, dtype=torch.float64)
    exact = matched_errors(Matched(truth, nothing, 0), cameras)
    assert exact["failures"] == 0
    assert all(abs(value) < 1e-5 for name, value in exact.items() if "_err" in name)

    lost = truth.clone()
    lost[2] = torch.nan
    errors = matched_errors(Matched(lost, nothing, 1), cameras)
    assert errors["failures"] == 1 and errors["R_err"] < 1e-5
    turn = rotation_angle(truth[2, :3, :3], truth[0, :3, :3]).item()
    gone = (truth[:, :3, 3] - truth[0, :3, 3]).norm(dim=1)
    behind = FRAMES - 1  # the first frame is given
    assert errors["R_err_all"] == pytest.approx(turn / behind, rel=1e-6)
    assert errors["T_err_scene_all"] == pytest.approx((gone[2] / gone.max() / behind).item(), rel=1e-6)

    nowhere = matched_errors(Matched(torch.full_like(truth, torch.nan), nothing, FRAMES), cameras)
    assert nowhere["failures"] == behind and nowhere["residual"] == 0
    assert all(nowhere[name] is None for name in nowhere if "_err" in name and not name.endswith("_all"))
    assert nowhere["T_err_scene_all"] == pytest.approx((gone.sum() / behind / gone.max()).item())


# --- Parts, on a wall whose appearance is a formula ---


def wall(cameras: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the plane z = 3 with smooth waves on it: images and depths."""
    rays = pixel_rays(cameras)
    depth = (3 - cameras.centers[:, None, None, 2]) / rays[..., 2]
    x, y, _ = (cameras.centers[:, None, None] + depth[..., None] * rays).unbind(dim=-1)
    waves = [(2.1 * x + y).sin() * (1.7 * y).cos(), (1.3 * x - 2.3 * y).sin(), (2.9 * y + 0.5).cos() * x.cos()]
    return 0.5 + 0.4 * torch.stack(waves, dim=1), depth


def before_the_wall(*steps: list[float]) -> Cameras:
    """From the origin, by twists."""
    poses = torch.linalg.matrix_exp(twist(torch.tensor(steps, dtype=torch.float64)))
    return Cameras(poses.float(), pinhole(len(steps), HEIGHT, WIDTH, 60), HEIGHT, WIDTH)


def test_one_alignment_finds_a_known_motion():
    cameras = before_the_wall([0.0] * 6, [0.1, -0.06, 0.12, 0.02, -0.03, 0.04])
    images, depth = wall(cameras)
    motion, cost = align(
        images[1:],
        images[:1],
        depth[:1],
        cameras[[0]],
        cameras.intrinsics[1:],
        pose_matching.COARSE + pose_matching.FINE,
    )
    found = replace(cameras[[1]], world_from_cam=moved(cameras.world_from_cam[:1], motion).float())
    points = pose_matching.camera_points(cameras[[0]], depth[:1]).flatten(0, 2)
    # A plane hardly tells a turn from a shift, so where its points go is what counts. The rims of both images, which
    # show different things, were mirrored by the blur: hence no exact answer.
    pixels, wanted = (project(points, camera)[0] for camera in (found, cameras[[1]]))
    was = project(points, cameras[[0]])[0]
    assert (was - wanted).norm(dim=-1).mean() > 2
    assert (pixels - wanted).norm(dim=-1).mean() < 0.2
    assert cost < 0.1
    far = align(images[1:], images[:1] * 0, depth[:1], cameras[[0]], cameras.intrinsics[1:], pose_matching.FINE)[1]
    assert far > 0.5


def test_the_systems_slope_is_that_of_its_cost():
    """J^T W r is half the derivative of the mean rho (times the pixels), by central differences; smooth images, so
    that slopes by differences of neighbours are slopes."""
    cameras = before_the_wall([0.0] * 6, [0.02, -0.01, 0.03, 0.005, -0.004, 0.006])
    images, depth = wall(cameras)
    inner = (slice(8, -8), slice(8, -8))  # what stays inside
    colors = images[:1, :, inner[0], inner[1]].flatten(2)
    points = pose_matching.camera_points(cameras[[0]], depth[:1])[:, inner[0], inner[1]].flatten(1, 2)
    maps = torch.cat([images[1:], *pose_matching.slopes(images[1:])], dim=1)
    still = torch.eye(4, dtype=torch.float64)[None]

    def cost(step: torch.Tensor) -> float:
        motion = torch.linalg.matrix_exp(twist(step[None]))
        return pose_matching.system(maps, colors, points, cameras.intrinsics[1:], motion)[0].item()

    push = pose_matching.system(maps, colors, points, cameras.intrinsics[1:], still)[2][0]
    small = 1e-3 * torch.eye(6, dtype=torch.float64)
    slope = torch.tensor([(cost(d) - cost(-d)) / 2e-3 for d in small]).double() * colors.shape[2] / 2
    torch.testing.assert_close(push, slope, rtol=0.05, atol=0.02 * slope.abs().max().item())


def test_starts_hold_own_first_neighbours_and_the_likest(known):
    frames = known[2]
    starts = start_views(frames[[2, 2, 2]], frames)
    assert starts[:, 0].tolist() == [0, 1, 2] and not starts[:, 1].any()
    assert starts[:, 2].tolist() == [0, 0, 1] and starts[:, 3].tolist() == [1, 2, 2]
    assert starts[:, 4].tolist() == [2] * 3


def test_correlation_is_one_of_a_brighter_copy_and_nothing_of_a_flat_one():
    image = torch.rand(1, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    values = correlation(image.expand(3, -1, -1, -1), torch.cat([0.5 * image + 0.2, 1 - image, torch.ones_like(image)]))
    torch.testing.assert_close(values, torch.tensor([1.0, -1.0, 0.0]).double(), rtol=0, atol=1e-6)
