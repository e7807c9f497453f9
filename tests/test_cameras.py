"""Cameras against closed forms, round trips, and images that are really cropped and resized."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cameras import random_cameras
from torch import Tensor

from fvgen.geometry.cameras import (
    Cameras,
    fit_box,
    look_at,
    pinhole,
    pixel_rays,
    pose_problem,
    project,
)

UP = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def rigid(angle: float = 0.3) -> Tensor:
    """A turn about z and a shift: a proper [4, 4] pose."""
    pose = torch.eye(4, dtype=torch.float64)
    c, s = math.cos(angle), math.sin(angle)
    pose[:2, :2] = torch.tensor([[c, -s], [s, c]])
    pose[:3, 3] = torch.tensor([1.0, -2.0, 3.0])
    return pose


# --- Projection ---


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), x=st.floats(0, 1), y=st.floats(0, 1))
def test_points_on_a_ray_project_to_its_pixel(seed, x, y):
    cameras = random_cameras(seed)
    depth = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9 + 0.1
    points = cameras.centers[:, None, None] + depth[..., None] * pixel_rays(cameras, (x, y))
    rows, columns = torch.meshgrid(torch.arange(7).double(), torch.arange(9).double(), indexing="ij")
    for view in range(3):
        pixels, found = project(points[view].reshape(-1, 3), cameras[[view]])
        torch.testing.assert_close(pixels[0, :, 0], columns.flatten() + x, rtol=0, atol=1e-9)
        torch.testing.assert_close(pixels[0, :, 1], rows.flatten() + y, rtol=0, atol=1e-9)
        torch.testing.assert_close(found[0], depth[view].flatten(), rtol=0, atol=1e-9)


def test_project_is_the_textbook_pinhole():
    """At the origin and looking along z: u = fx X / Z + cx, v = fy Y / Z + cy."""
    intrinsics = torch.tensor([[[10.0, 0, 4], [0, 20, 3], [0, 0, 1]]])
    cameras = Cameras(torch.eye(4)[None], intrinsics, 6, 8)
    pixels, depth = project(torch.tensor([[0.0, 0, 2], [1, -1, 2], [1, 1, -2]]), cameras)
    assert pixels.tolist() == [[[4, 3], [9, -7], [-1, -7]]]
    assert depth.tolist() == [[2, 2, -2]]


def test_a_point_in_the_camera_plane_stays_finite():
    camera = Cameras(torch.eye(4)[None], torch.eye(3)[None], 1, 1)
    pixels, depth = project(torch.tensor([[1.0, 2, 0], [0, 0, 0]]), camera)
    assert torch.isfinite(pixels).all() and depth.tolist() == [[0, 0]]


def test_default_rays_pass_through_pixel_centres():
    cameras = Cameras(torch.eye(4)[None], pinhole(1, 2, 4, 90), 2, 4)  # 90 degrees across 4 pixels: focal length 2
    assert pixel_rays(cameras)[0, 0, 0].tolist() == [-0.75, -0.25, 1]


# --- Poses ---


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_cam_from_world_is_the_inverse(seed):
    cameras = random_cameras(seed)
    torch.testing.assert_close(cameras.cam_from_world, torch.linalg.inv(cameras.world_from_cam), rtol=0, atol=1e-10)


def test_the_camera_centre_is_the_origin_of_its_own_frame():
    cameras = random_cameras(4)
    homogeneous = torch.cat([cameras.centers, torch.ones(3, 1, dtype=torch.float64)], dim=-1)
    local = torch.einsum("vij,vj->vi", cameras.cam_from_world, homogeneous)
    torch.testing.assert_close(local, torch.tensor([[0.0, 0, 0, 1]] * 3, dtype=torch.float64), rtol=0, atol=1e-10)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_look_at(seed):
    generator = torch.Generator().manual_seed(seed)
    position, target = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) * 3
    poses = look_at(position, target, UP)
    assert all(pose_problem(pose) is None for pose in poses)
    assert torch.equal(poses[:, :3, 3], position)
    cameras = Cameras(poses, pinhole(5, 48, 64, 60).double(), 48, 64)
    for view in range(5):
        pixels, depth = project(torch.stack([target[view], target[view] + 0.1 * UP]), cameras[[view]])
        torch.testing.assert_close(pixels[0, 0], pixels.new_tensor([32, 24]), rtol=0, atol=1e-6)  # image centre
        torch.testing.assert_close(depth[0, 0], (target - position)[view].norm())
        assert pixels[0, 1, 1] < pixels[0, 0, 1] or depth[0, 1] < 0  # up in the world is up in the image
        torch.testing.assert_close(pixels[0, 1, 0], pixels[0, 0, 0], rtol=0, atol=1e-6)  # and the horizon is level


@pytest.mark.parametrize("up", [[0.0, 0, 1], [0, 2e-3, 0], [1, 1, 1]])
@pytest.mark.parametrize("tilt", [0.0, 1e-12, 1e-7])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_look_at_straight_along_up(up, tilt, sign, dtype):
    """Nothing says where the image's top is; the pose must be a rotation all the same, and always the same one."""
    up = torch.tensor(up, dtype=dtype)
    direction = sign * up / up.norm() + tilt * torch.tensor([1.0, -1, 0], dtype=dtype)
    position = torch.tensor([[1.0, 2, 3]], dtype=dtype)
    poses = look_at(position.repeat(2, 1), position + torch.stack([direction, 5 * direction]), up)
    assert all(pose_problem(pose) is None for pose in poses)
    torch.testing.assert_close(poses[:, :3, 2], torch.nn.functional.normalize(direction, dim=0).expand(2, 3))
    torch.testing.assert_close(poses[0], poses[1])


def test_look_at_itself_is_refused():
    with pytest.raises(ValueError, match="its target"):
        look_at(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([0.0, 0, 1]))


def test_to_changes_precision_alone():
    cameras = random_cameras(0)
    single = cameras.to(dtype=torch.float32)
    assert single.world_from_cam.dtype == single.intrinsics.dtype == torch.float32
    assert torch.equal(single.world_from_cam, cameras.world_from_cam.float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pose: pose[:3, :3].mul_(2), "scaled or sheared"),
        (lambda pose: pose[0].mul_(1.001), "scaled or sheared"),
        (lambda pose: pose[:3, 0].add_(0.01 * pose[:3, 1]), "scaled or sheared"),
        (lambda pose: pose[:3, :3].zero_(), "scaled or sheared"),
        (lambda pose: pose[:3, 0].neg_(), "mirrored"),
        (lambda pose: pose[:3, :3].neg_(), "mirrored"),
        (lambda pose: pose[0, 0].fill_(math.nan), "NaN"),
        (lambda pose: pose[1, 3].fill_(math.inf), "infinity"),
        (lambda pose: pose[3, 3].fill_(2), "last row"),
        (lambda pose: pose[3, 0].fill_(1e-3), "last row"),
    ],
)
def test_pose_problem(change, words):
    pose = rigid()
    assert pose_problem(pose) is None
    change(pose)
    assert words in pose_problem(pose)


def test_pose_problem_of_other_shapes():
    assert pose_problem(rigid()[:3]) is None
    assert "3x3, not 4x4" in pose_problem(rigid()[:3, :3])


def test_pose_problem_allows_printed_digits():
    """Six digits after the point, as trackers print them, are a rotation; two are not."""
    poses = random_cameras(7, views=50).world_from_cam
    assert all(pose_problem((pose * 1e6).round() / 1e6) is None for pose in poses)
    assert any(pose_problem((pose * 1e2).round() / 1e2) for pose in poses)


# --- Intrinsics ---


@pytest.mark.parametrize("degrees", [20.0, 55.0, 90.0, 120.0])
def test_pinhole_spans_the_field_of_view(degrees):
    cameras = Cameras(torch.eye(4)[None], pinhole(1, 48, 64, degrees), 48, 64)
    left, right = pixel_rays(cameras, (0.0, 0.0))[0, 24, 0], pixel_rays(cameras, (1.0, 0.0))[0, 24, -1]
    angle = torch.nn.functional.cosine_similarity(left, right, dim=0).acos()
    assert math.degrees(angle.item()) == pytest.approx(degrees, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 300)] * 4)
def test_fit_box_is_the_largest_centred_box_of_that_shape(height, width, new_height, new_width):
    left, top, right, bottom = fit_box(height, width, new_height, new_width)
    assert (right - left) * new_height == pytest.approx((bottom - top) * new_width)
    assert left == pytest.approx(width - right, abs=1e-9) and top == pytest.approx(height - bottom, abs=1e-9)
    assert min(left, top) == pytest.approx(0, abs=1e-9) and max(left, top) >= -1e-9


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    factor=st.integers(1, 4),
    margin=st.integers(0, 3),
    wide=st.booleans(),
)
def test_fitted_is_in_step_with_a_real_crop_and_resize(seed, size, factor, margin, wide):
    """An image that shows every pixel's own ray, cropped and averaged by hand, shows the rays of `fitted`."""
    height, width = size
    old_height, old_width = height * factor + 2 * margin * (not wide), width * factor + 2 * margin * wide
    cameras = random_cameras(seed, 2, old_height, old_width)
    image = pixel_rays(cameras).permute(0, 3, 1, 2)
    top, left = (old_height - height * factor) // 2, (old_width - width * factor) // 2
    cropped = image[:, :, top : top + height * factor, left : left + width * factor]
    resized = torch.nn.functional.avg_pool2d(cropped, factor)  # rays are linear in the pixel, so means are exact
    fitted = cameras.fitted(height, width)
    assert (fitted.height, fitted.width) == (height, width)
    torch.testing.assert_close(pixel_rays(fitted).permute(0, 3, 1, 2), resized, rtol=0, atol=1e-9)


def test_fitted_to_the_same_size_changes_nothing_and_never_writes_to_the_original():
    cameras = random_cameras(3)
    before = cameras.intrinsics.clone()
    assert torch.equal(cameras.fitted(7, 9).intrinsics, before)
    cameras.fitted(4, 4)
    assert torch.equal(cameras.intrinsics, before)


def test_indexing_keeps_a_batch():
    cameras = random_cameras(2)
    assert len(cameras) == 3 and len(cameras[1:]) == 2 and len(cameras[[2]]) == 1
    assert torch.equal(cameras[[2, 0]].centers, cameras.centers[[2, 0]])
    assert (cameras[[1]].height, cameras[[1]].width) == (7, 9)
