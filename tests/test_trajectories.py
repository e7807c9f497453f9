"""Camera paths: exact ends, smoothness, closed forms, and ViewCrafter's recorded ones."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cameras import random_cameras
from torch import Tensor
from viewcrafter_reference import recording

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, pose_problem, project
from fvgen.geometry.conventions import to_opengl, to_pytorch3d
from fvgen.geometry.trajectories import (
    dolly,
    interpolate,
    key_frames,
    look_at_path,
    orbit,
    pan,
    read_path,
    spiral,
    write_path,
)
from fvgen.geometry.viewcrafter_paths import (
    read_txt,
    single_view_target,
    single_view_txt,
    sparse_interpolation,
    to_camera_frame,
    to_object_frame,
)

SEEDS = st.integers(0, 2**31)
UP = (0.0, 0.0, 1.0)
POSITIONS = torch.tensor([[3.0, 0, 1], [0, 3, 2], [-3, 0, 1]])
ONE_CAMERA = {
    "orbit": lambda camera, frames: orbit(camera, frames, 70.0, 3.0),
    "orbit about z": lambda camera, frames: orbit(camera, frames, -300.0, 3.0, UP),
    "spiral": lambda camera, frames: spiral(camera, frames, 0.4, 3.0),
    "dolly": lambda camera, frames: dolly(camera, frames, 1.0, -0.5, 0.25),
    "pan": lambda camera, frames: pan(camera, frames, 40.0, -20.0),
}


def local(path: Cameras) -> Tensor:
    """[F, 4, 4] float64: poses in the first camera's frame."""
    return torch.linalg.inv(path.world_from_cam[0]) @ path.world_from_cam


def check_smooth(make, frames: int = 200) -> None:
    """Velocities are continuous: the change from step to step falls with the square of the step's length."""
    poses = make(frames).world_from_cam
    step = (poses[1:] - poses[:-1]).flatten(1)
    change = (step[1:] - step[:-1]).norm(dim=-1)
    assert change.max() < 60 * step.norm(dim=-1).max() / frames


@pytest.mark.parametrize("name", ONE_CAMERA)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, frames=st.integers(2, 30))
def test_paths_from_one_camera(name, seed, frames):
    camera = random_cameras(seed)[[1]]
    path = ONE_CAMERA[name](camera, frames)
    assert len(path) == frames and (path.height, path.width) == (camera.height, camera.width)
    assert torch.equal(path.world_from_cam[0], camera.world_from_cam[0])
    assert torch.equal(path.intrinsics, camera.intrinsics.expand(frames, 3, 3))
    assert all(pose_problem(pose) is None for pose in path.world_from_cam)
    check_smooth(lambda n: ONE_CAMERA[name](camera, n))


def test_closed_forms():
    camera = random_cameras(4)[[0]]
    eye = torch.eye(4, dtype=torch.float64)
    moved = local(dolly(camera, 5, forward=2.0, right=1.0, up=0.5))
    expected = eye.repeat(5, 1, 1)
    expected[:, :3, 3] = torch.linspace(0, 1, 5).double()[:, None] * torch.tensor([1.0, -0.5, 2.0])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-9)

    turned = local(pan(camera, 4, yaw=90.0))[-1]  # looks where its right was
    torch.testing.assert_close(turned[:3, 2], torch.tensor([1.0, 0, 0]).double(), rtol=0, atol=1e-9)
    turned = local(pan(camera, 4, pitch=90.0))[-1]  # looks up; y is down
    torch.testing.assert_close(turned[:3, 2], torch.tensor([0.0, -1, 0]).double(), rtol=0, atol=1e-9)

    quarter = local(orbit(camera, 7, 90.0, 3.0))[-1]  # stands to the right of the point, facing it
    torch.testing.assert_close(quarter[:3, 3], torch.tensor([3.0, 0, 3]).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(quarter[:3, 2], torch.tensor([-1.0, 0, 0]).double(), rtol=0, atol=1e-9)
    whole = orbit(camera, 7, 360.0, 3.0)
    torch.testing.assert_close(whole.world_from_cam[-1], camera.world_from_cam[0], rtol=0, atol=1e-9)

    wound = spiral(camera, 33, 0.4, 3.0)
    assert torch.equal(wound.world_from_cam[-1], camera.world_from_cam[0])
    offset = local(wound)[:, :3, 3]
    torch.testing.assert_close(offset.norm(dim=-1).max(), torch.tensor(0.4).double())
    assert offset[:, 2].abs().max() < 1e-9  # in the camera's own plane


@pytest.mark.parametrize("name", ["orbit", "spiral"])
def test_what_a_camera_circles_stays_in_place(name):
    camera = random_cameras(6)[[0]]
    target = camera.centers[0] + 3.0 * camera.world_from_cam[0, :3, 2]
    pixels, depth = project(target[None], ONE_CAMERA[name](camera, 20))
    assert (depth > 2.9).all()
    torch.testing.assert_close(pixels[:, 0], camera.intrinsics[:, :2, 2].expand(20, 2), rtol=0, atol=1e-6)


# --- Through views ---


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, views=st.integers(2, 8), extra=st.integers(0, 40))
def test_interpolation_meets_every_view(seed, views, extra):
    cameras = random_cameras(seed, views)
    path = interpolate(cameras, views + extra)
    keys = key_frames(cameras, views + extra)
    assert keys[0] == 0 and keys[-1] == views + extra - 1 and sorted(set(keys)) == keys
    assert torch.equal(path.world_from_cam[keys], cameras.world_from_cam)
    assert torch.equal(path.intrinsics[keys], cameras.intrinsics)
    assert all(pose_problem(pose) is None for pose in path.world_from_cam)
    low, high = cameras.intrinsics.amin(0), cameras.intrinsics.amax(0)
    assert ((path.intrinsics >= low - 1e-9) & (path.intrinsics <= high + 1e-9)).all()


def test_interpolation_is_smooth_and_straight_between_two():
    cameras = random_cameras(11, 5)
    check_smooth(lambda frames: interpolate(cameras, frames))
    two = interpolate(cameras[:2], 11).centers
    torch.testing.assert_close(two, torch.lerp(two[0], two[-1], torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]))


def test_equal_views_do_no_harm():
    cameras = random_cameras(1, 2)[[0, 0, 1]]
    assert interpolate(cameras, 9).world_from_cam.isfinite().all()
    assert interpolate(cameras[[0, 1]], 9).world_from_cam.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(frames=st.integers(2, 30), x=st.floats(-1, 1), z=st.floats(-1, 1))
def test_look_at_path(frames, x, z):
    target = torch.tensor([x, 0.2, z], dtype=torch.float64)
    lens = random_cameras(0)[[0]]
    path = look_at_path(POSITIONS, target, frames, lens)
    assert torch.equal(path.centers[[0, -1]], POSITIONS[[0, -1]].double())
    pixels, depth = project(target[None], path)
    assert (depth > 0).all()
    torch.testing.assert_close(pixels[:, 0], lens.intrinsics[:, :2, 2].expand(frames, 2), rtol=0, atol=1e-6)


BAD_PATHS = {
    "one frame": (lambda c: orbit(c[[0]], 1, 10.0, 1.0), UserError, "at least two frames"),
    "too few frames": (lambda c: interpolate(c, 2), UserError, "ask for at least 3"),
    "one view": (lambda c: interpolate(c[[0]], 5), UserError, "at least two of them"),
    "several cameras": (lambda c: pan(c, 5, 10.0), ValueError, "starts from one camera"),
    "no axis": (lambda c: orbit(c[[0]], 5, 10.0, 1.0, (0, 0, 0)), ValueError, "must have a direction"),
    "equal positions": (lambda c: look_at_path(torch.zeros(2, 3), torch.ones(3), 5, c[[0]]), UserError, "repeats"),
    "one position": (lambda c: look_at_path(torch.zeros(1, 3), torch.ones(3), 5, c[[0]]), UserError, "two or more"),
    "sparse with one": (lambda c: sparse_interpolation(c[[0]], 25), UserError, "two views"),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_paths_that_cannot_be(case):
    make, kind, words = BAD_PATHS[case]
    with pytest.raises(kind, match=words):
        make(random_cameras(0))


# --- Files ---


def test_a_written_path_is_read_back(tmp_path):
    cameras = random_cameras(2, 5)
    write_path(tmp_path / "path.json", cameras)
    read = read_path(tmp_path / "path.json", cameras.height, cameras.width)
    assert torch.equal(read.world_from_cam, cameras.world_from_cam)
    torch.testing.assert_close(read.intrinsics, cameras.intrinsics, rtol=1e-12, atol=0)


def test_nerfstudio_camera_path(tmp_path):
    poses = random_cameras(2, 5).world_from_cam
    views = [{"camera_to_world": pose.flatten().tolist(), "fov": 90.0, "aspect": 2} for pose in to_opengl(poses)]
    document = {"camera_type": "perspective", "render_height": 100, "render_width": 200, "camera_path": views}
    (tmp_path / "path.json").write_text(json.dumps(document))
    read = read_path(tmp_path / "path.json", 50, 50)
    torch.testing.assert_close(read.world_from_cam, poses)
    expected = torch.tensor([[25.0, 0, 25], [0, 25, 25], [0, 0, 1]]).double()  # 90 degrees over 50 rows
    torch.testing.assert_close(read.intrinsics, expected.expand(5, 3, 3))


GOOD = {
    "world_from_cam": [np.eye(4).tolist()],
    "intrinsics": [[9, 0, 4], [0, 9, 4], [0, 0, 1]],
    "height": 8,
    "width": 8,
}
BAD_FILES = {
    "no JSON": ("{", "cannot be read as JSON"),
    "another layout": ({"frames": []}, "not laid out"),
    "a list": ([1], "not laid out"),
    "no poses": (GOOD | {"world_from_cam": []}, "not laid out"),
    "ragged": (GOOD | {"world_from_cam": [[[1, 2], [3]]]}, "not laid out"),
    "text": (GOOD | {"world_from_cam": "x"}, "not laid out"),
    "two intrinsics": (GOOD | {"intrinsics": [GOOD["intrinsics"]] * 2}, "not laid out"),
    "scaled": (GOOD | {"world_from_cam": [(2 * np.eye(4)).tolist()]}, "pose 0 is no rotation"),
    "mirrored": (GOOD | {"world_from_cam": [np.diag([1.0, 1, -1, 1]).tolist()]}, "pose 0 is mirrored"),
    "NaN": (GOOD | {"world_from_cam": [(math.nan * np.eye(4)).tolist()]}, "pose 0 holds NaN"),
    "no focal length": (GOOD | {"intrinsics": np.zeros((3, 3)).tolist()}, "view 0 is not positive"),
    "size": (GOOD | {"height": 0}, "not laid out"),
    "fov": ({"camera_path": [{"camera_to_world": np.eye(4).tolist(), "fov": 200}]}, "not laid out"),
    "empty": ({"camera_path": []}, "not laid out"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_path_files(tmp_path, case):
    contents, words = BAD_FILES[case]
    file = tmp_path / "pfad mit ü.json"
    file.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    with pytest.raises(UserError, match=words) as caught:
        read_path(file, 8, 8)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_path_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_path(tmp_path / "nowhere.json", 8, 8)


# --- ViewCrafter's own ---


@pytest.fixture(scope="module")
def recorded(shared) -> dict[str, Tensor]:
    return recording(shared, "trajectory")


def cameras_in(recorded: dict[str, Tensor], poses: Tensor) -> Cameras:
    matrix = torch.eye(3).repeat(len(poses), 1, 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = recorded["focals"][:, 0]
    matrix[:, :2, 2] = recorded["principal_points"]
    return Cameras(poses, matrix, 288, 512)


def check_path(path: Cameras, recorded: dict[str, Tensor], name: str) -> None:
    """R and T as they are handed to PyTorch3D, focal length and principal point: to float32 rounding."""
    views = to_pytorch3d(path)
    torch.testing.assert_close(views.R, recorded[f"{name}.R"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(views.T, recorded[f"{name}.T"].double(), rtol=0, atol=3e-6)
    focal, center = recorded[f"{name}.focal"].double(), recorded[f"{name}.pp"].double()
    torch.testing.assert_close(views.focal_length, focal.expand(len(path), 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(views.principal_point, center.expand(len(path), 2), rtol=1e-6, atol=0)


def test_viewcrafter_frames(recorded):
    cameras = cameras_in(recorded, recorded["c2w"])
    for view in (0, -1):
        moved, points = to_camera_frame(cameras, recorded["points"], view)
        torch.testing.assert_close(moved.world_from_cam, recorded[f"kth{view}.c2w"], rtol=0, atol=1e-6)
        torch.testing.assert_close(points, recorded[f"kth{view}.points"], rtol=0, atol=2e-6)
    radius, elevation = recorded["obj.radius"].item(), recorded["obj.elevation"].item()
    moved, points = to_object_frame(cameras, recorded["points"], -1, radius, elevation)
    torch.testing.assert_close(moved.world_from_cam, recorded["obj.c2w"], rtol=0, atol=1e-6)
    torch.testing.assert_close(points, recorded["obj.points"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", [0, 1])
def test_viewcrafter_single_view_target(recorded, case):
    anchor = cameras_in(recorded, recorded["obj.c2w"])[[2]]
    theta, phi, r, _, _ = recorded[f"spec{case}.args_theta_phi_r_dx_dy"].tolist()
    path = single_view_target(anchor, 25, theta, phi, r, *recorded[f"spec{case}.dx_dy_world"].tolist())
    check_path(path, recorded, f"spec{case}")


@pytest.mark.parametrize("case", [0, 1, 2])
def test_viewcrafter_single_view_txt(recorded, tmp_path, case):
    anchor = cameras_in(recorded, recorded["obj.c2w"])[[2]]
    lines = [" ".join(map(repr, recorded[f"txt{case}.{key}"].tolist())) for key in ("phi", "theta", "r")]
    (tmp_path / "path.txt").write_text("\n".join(lines) + "\n")
    check_path(single_view_txt(anchor, 25, *read_txt(tmp_path / "path.txt")), recorded, f"txt{case}")


def test_viewcrafter_sparse_interpolation(recorded):
    cameras = cameras_in(recorded, recorded["c2w"])
    path = sparse_interpolation(cameras, 25)
    assert len(path) == recorded["interp.n_views"].item()
    torch.testing.assert_close(path.world_from_cam, recorded["interp.c2w_path"], rtol=0, atol=1e-6)
    check_path(path, recorded, "interp")
    check_path(cameras.to(dtype=torch.float64), recorded, "plain")


def test_viewcrafter_paths_that_pytorch3d_was_given(shared):
    """A second recording: four views, other angles, fx and fy apart."""
    with np.load(shared / "reference" / "pytorch3d" / "viewcrafter_trajectories.npz") as file:
        recorded = {key: torch.from_numpy(np.atleast_1d(file[key])) for key in file.files}
    matrix = torch.eye(3).repeat(4, 1, 1)
    matrix[:, [0, 1], [0, 1]], matrix[:, :2, 2] = recorded["in_focal"].expand(4, 2), recorded["in_pp"]
    cameras = Cameras(recorded["in_c2w"], matrix, *recorded["image_size"].tolist())
    moved, _ = to_object_frame(cameras, recorded["in_points"], -1, 2.5, 5.0)
    torch.testing.assert_close(moved.world_from_cam[[-1]], recorded["anchor_c2w"], rtol=0, atol=1e-6)
    anchor = moved[[3]]
    paths = {
        "specified": single_view_target(anchor, 25, 20, 40, -0.2, 0.1, -0.05),
        "txt_linear": single_view_txt(anchor, 25, (0, 10, 30), (0, -5, 5), (0, 0.1, 0.2)),
        "txt_smooth": single_view_txt(anchor, 25, (0, 3, 25, 30, 20), (0, 1, 0, -1, 0), (0, 0.02, 0.05, 0.25, 0.1)),
        "interp2": sparse_interpolation(cameras[:2], 25),
        "interp4": sparse_interpolation(cameras, 25),
    }
    for name, path in paths.items():
        views = to_pytorch3d(path)
        torch.testing.assert_close(views.R, recorded[f"{name}_R"].double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(views.T, recorded[f"{name}_T"].double(), rtol=0, atol=3e-6)
        torch.testing.assert_close(views.focal_length, recorded[f"{name}_focal"].double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(views.principal_point, recorded[f"{name}_pp"].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "text", ["", "0 1\n0 1\n", "0 1\n0 x\n0 1\n", "0 1\n1 2\n0 1\n", "0\n0 1\n0 1\n", "0 nan\n0 1\n0 1"]
)
def test_damaged_txt_paths(tmp_path, text):
    (tmp_path / "path.txt").write_text(text)
    with pytest.raises(UserError, match=r"path\.txt"):
        read_txt(tmp_path / "path.txt")
