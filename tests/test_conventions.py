"""Conversions: round trips over thousands of random cameras, other libraries, and PyTorch3D's recordings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch3d_recordings import recorded_cameras, recording
from random_cameras import random_cameras
from scipy.spatial.transform import Rotation

from fvgen.geometry.cameras import Cameras, pose_problem, project
from fvgen.geometry.conventions import (
    from_colmap,
    from_opengl,
    from_pytorch3d,
    from_realestate10k,
    quaternion_product,
    quaternion_to_rotation,
    rotation_to_quaternion,
    to_colmap,
    to_opengl,
    to_pytorch3d,
    to_realestate10k,
    world_to_ndc,
)

SEEDS = st.integers(0, 2**31)
MANY = 60  # cameras an example, so that 50 examples are thousands of cases


def check_same(found: Cameras, expected: Cameras, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found.world_from_cam, expected.world_from_cam, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.intrinsics, expected.intrinsics, rtol=0, atol=tolerance)
    assert (found.height, found.width) == (expected.height, expected.width)


ROUND_TRIPS = {
    "opengl": lambda c: Cameras(from_opengl(to_opengl(c.world_from_cam)), c.intrinsics, c.height, c.width),
    "colmap": lambda c: from_colmap(to_colmap(c)),
    "pytorch3d, pixels": lambda c: from_pytorch3d(to_pytorch3d(c)),
    "pytorch3d, ndc": lambda c: from_pytorch3d(to_pytorch3d(c, in_ndc=True)),
    "realestate10k": lambda c: from_realestate10k(to_realestate10k(c, list(range(len(c)))), c.height, c.width)[1],
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, height=st.integers(1, 2000), width=st.integers(1, 2000))
def test_round_trips(name, seed, height, width):
    cameras = random_cameras(seed, MANY, height, width)
    there_and_back = ROUND_TRIPS[name](cameras)
    check_same(there_and_back, cameras)
    assert pose_problem(there_and_back.world_from_cam[0]) is None


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_one_convention_into_the_next(seed):
    """COLMAP, then PyTorch3D, then a RealEstate10K file, then nerfstudio: the same cameras in the end."""
    cameras = random_cameras(seed, MANY)
    chained = from_pytorch3d(to_pytorch3d(from_colmap(to_colmap(cameras)), in_ndc=True))
    text = to_realestate10k(chained, list(range(MANY)), "https://example.org/clip")
    check_same(from_realestate10k(text, cameras.height, cameras.width)[1], cameras)


def test_from_opengl_is_its_own_inverse_and_turns_two_axes():
    poses = random_cameras(1).world_from_cam
    turned = from_opengl(poses)
    assert torch.equal(from_opengl(turned), poses)
    assert torch.equal(turned[:, :, 0], poses[:, :, 0]) and torch.equal(turned[:, :, 3], poses[:, :, 3])
    assert torch.equal(turned[:, :, 1:3], -poses[:, :, 1:3])
    assert all(pose_problem(pose) is None for pose in turned)  # still right-handed


# --- COLMAP ---


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_quaternions_are_scipys(seed):
    rotation = random_cameras(seed, MANY).world_from_cam[:, :3, :3]
    ours = rotation_to_quaternion(rotation)
    theirs = torch.from_numpy(Rotation.from_matrix(rotation.numpy()).as_quat(scalar_first=True))
    same = (ours * theirs).sum(-1).abs()  # q and -q are one rotation
    torch.testing.assert_close(same, torch.ones(MANY, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (ours[:, 0] >= 0).all()
    torch.testing.assert_close(quaternion_to_rotation(theirs), rotation, rtol=0, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_the_product_of_quaternions_is_that_of_rotations(seed):
    a, b = (random_cameras(s, MANY).world_from_cam[:, :3, :3] for s in (seed, seed + 1))
    product = quaternion_product(rotation_to_quaternion(a), rotation_to_quaternion(b))
    torch.testing.assert_close(quaternion_to_rotation(product), a @ b, rtol=0, atol=1e-10)


def test_colmap_projects_the_same():
    """x = R X + t, then u = fx x / z + cx: COLMAP's documentation."""
    cameras = random_cameras(3, MANY)
    views, points = to_colmap(cameras), torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    rotation = Rotation.from_quat(views.quaternion.numpy(), scalar_first=True).as_matrix()
    local = np.einsum("vij,nj->vni", rotation, points.numpy()) + views.translation.numpy()[:, None]
    pixels = views.params[:, None, :2].numpy() * local[..., :2] / local[..., 2:] + views.params[:, None, 2:].numpy()
    torch.testing.assert_close(torch.from_numpy(pixels), project(points, cameras)[0], rtol=1e-6, atol=1e-6)


# --- PyTorch3D ---


@pytest.mark.parametrize("case", range(4))
def test_pytorch3d_cameras(request, case):
    """R, T, view and NDC coordinates against the real PyTorch3D; OpenCV pixels against its float64 formula."""
    recorded = {
        key.removeprefix(f"c{case}_"): value
        for key, value in recording("cameras", request).items()
        if key.startswith(f"c{case}_")
    }
    cameras = recorded_cameras(recorded)
    views = to_pytorch3d(cameras)
    torch.testing.assert_close(views.R, recorded["R"], rtol=0, atol=1e-6)
    torch.testing.assert_close(views.T, recorded["T"], rtol=0, atol=1e-6)
    view = recorded["points"] @ views.R + views.T[:, None]
    torch.testing.assert_close(view, recorded["points_view"], rtol=1e-6, atol=4e-6)
    ndc = world_to_ndc(recorded["points"], cameras)
    torch.testing.assert_close(ndc, recorded["points_ndc"], rtol=1e-5, atol=4e-6)
    pixels = project(recorded["points"].double(), cameras.to(dtype=torch.float64))[0]
    torch.testing.assert_close(pixels, recorded["opencv_uv"], rtol=1e-6, atol=1e-4)
    check_same(from_pytorch3d(views), cameras, 2e-6)


def test_ndc_intrinsics_are_those_of_the_image_plane():
    """A point in direction (a, b, 1) of PyTorch3D's axes falls on NDC (fx a + px, fy b + py)."""
    cameras = random_cameras(5, 4, 30, 50)
    views = to_pytorch3d(cameras, in_ndc=True)
    points = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).double()
    local = points @ views.R + views.T[:, None]
    expected = views.focal_length[:, None] * local[..., :2] / local[..., 2:] + views.principal_point[:, None]
    torch.testing.assert_close(world_to_ndc(points, cameras)[..., :2], expected, rtol=1e-8, atol=1e-8)


def test_shared_focal_length_and_principal_point():
    views = to_pytorch3d(random_cameras(0))
    views = views._replace(
        focal_length=torch.tensor([[9.0]]).double(), principal_point=torch.tensor([[4.0, 3]]).double()
    )
    matrix = from_pytorch3d(views).intrinsics
    assert torch.equal(matrix, torch.tensor([[9.0, 0, 4], [0, 9, 3], [0, 0, 1]]).double().expand(3, 3, 3))


# --- RealEstate10K ---


@pytest.mark.parametrize("name", ["0f47577ab3441480", "2f25826f0d0ef09a"])
def test_published_camera_files(shared, name):
    """Rotations to their printed digits; the text that we write back holds the same numbers."""
    text = (shared / "data" / "re10k" / f"{name}.txt").read_text()
    timestamps, cameras = from_realestate10k(text, 360, 640)
    assert len(cameras) == 16 and timestamps == sorted(timestamps)
    assert all(pose_problem(pose) is None for pose in cameras.world_from_cam)
    assert ((cameras.intrinsics[:, 0, 2] - 320).abs() < 1).all()  # the principal point is the image's centre
    rows = [np.array(line.split()[1:], dtype=float) for line in text.splitlines()[1:] if line.strip()]
    back = to_realestate10k(cameras, timestamps, text.splitlines()[0]).splitlines()
    assert back[0] == text.splitlines()[0]
    assert np.allclose([np.array(line.split()[1:], dtype=float) for line in back[1:]], rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no frames"),
        ("address\n", "no frames"),
        ("address\n1 2 3\n", "line 2 is not"),
        ("address\n" + "1 " * 19 + "\n1.5 " + "1 " * 18, "line 3 is not"),
        ("address\n1 " + "x " * 18, "line 2 is not"),
    ],
)
def test_damaged_camera_files(text, words):
    with pytest.raises(ValueError, match=words):
        from_realestate10k(text, 4, 4)
