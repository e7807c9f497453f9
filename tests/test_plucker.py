"""Plücker embeddings, against the geometry of lines and pinholes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from checks import refusal

from fvgen.geometry.cameras import Cameras, pinhole, project
from fvgen.geometry.plucker import folded, normalised, plucker, rays

EPS = torch.finfo(torch.float64).eps


def turned(angles: torch.Tensor) -> torch.Tensor:
    """[V, 3, 3] rotations about x, y, z in turn."""
    skew = torch.zeros(len(angles), 3, 3, dtype=torch.float64)
    x, y, z = angles.double().unbind(1)
    skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0] = x, y, z
    return torch.linalg.matrix_exp(skew - skew.transpose(1, 2))


def path(views: int = 5, height: int = 12, width: int = 20, seed: int = 0) -> Cameras:
    """Random rigid poses, centred principal point, float64."""
    generator = torch.Generator().manual_seed(seed)
    poses = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    poses[:, :3, :3] = turned(torch.randn(views, 3, generator=generator))
    poses[:, :3, 3] = torch.randn(views, 3, generator=generator).double() * 3
    return Cameras(poses, pinhole(views, height, width, 70).double(), height, width)


def test_a_pixels_ray_goes_where_the_pixel_sees():
    """origin + s d projects back onto the pixel's centre, at any distance."""
    cameras = path()
    origins, directions = rays(cameras, 12, 20)
    assert torch.equal(origins, cameras.centers)
    for view, (row, column), distance in ((0, (0, 0), 0.5), (3, (11, 19), 7.0), (4, (5, 8), 2.0)):
        point = origins[view] + distance * directions[view, row, column]
        pixel, depth = project(point[None], cameras[[view]])
        torch.testing.assert_close(pixel[0, 0], torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64))
        assert depth > 0


def test_directions_are_unit_and_moments_stand_on_them():
    moment, direction = plucker(path()).split(3, dim=1)
    torch.testing.assert_close(direction.norm(dim=1), torch.ones_like(direction[:, 0]))
    assert (moment * direction).sum(1).abs().max() < 64 * EPS * moment.norm(dim=1).max()


def test_the_moment_is_the_lines_and_not_the_points():
    """Any other point of the line has the same moment: what makes it an embedding of lines."""
    cameras = path()
    origins, directions = rays(cameras, 12, 20)
    along = origins[:, None, None] + 2.5 * directions
    moment = plucker(cameras)[:, :3].permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.linalg.cross(along, directions), moment)


def test_closed_form_of_a_camera_that_looks_ahead():
    """One pixel of focal length 1 at the principal point: direction z, moment (y, -x, 0) of the centre."""
    pose = torch.eye(4)[None].clone()
    pose[0, :3, 3] = torch.tensor([2.0, 3.0, 5.0])
    camera = Cameras(pose, torch.tensor([[[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]]]), 1, 1)
    assert plucker(camera).flatten().tolist() == [3.0, -2.0, 0.0, 0.0, 0.0, 1.0]


def test_the_first_axis_of_the_grid_points_down_and_the_second_right():
    direction = plucker(normalised(path())[0])[0, 3:]  # of the identity
    assert (direction[0].diff(dim=1) > 0).all() and (direction[1].diff(dim=0) > 0).all()


def test_another_grid_is_the_same_image():
    """Twice as fine: between four pixel centres of the fine grid lies one of the coarse, on whose ray their mean of
    unit-z directions is."""
    cameras = path()
    _, coarse = rays(cameras, 12, 20)
    _, fine = rays(cameras, 24, 40)
    forward = cameras.world_from_cam[:, :3, 2]
    flat = fine / torch.einsum("vhwi,vi->vhw", fine, forward)[..., None]  # unit depth: linear in the pixel
    mean = flat.unflatten(2, (20, 2)).unflatten(1, (12, 2)).mean(dim=(2, 4))
    torch.testing.assert_close(torch.nn.functional.normalize(mean, dim=-1), coarse)


def test_normalised_forgets_where_the_world_is_and_how_it_is_measured():
    cameras = path()
    found, scale = normalised(cameras)
    assert torch.equal(found.world_from_cam[0], torch.eye(4, dtype=torch.float64))
    assert found.centers.norm(dim=1).max().item() == pytest.approx(1, abs=4 * EPS)
    moved = cameras.world_from_cam.clone()
    moved[:, :3, 3] *= 7
    world = torch.eye(4, dtype=torch.float64)
    world[:3, :3], world[:3, 3] = turned(torch.tensor([[0.3, -1.0, 2.0]]))[0], torch.tensor([40.0, -3.0, 9.0])
    again, other = normalised(replace(cameras, world_from_cam=world @ moved))
    torch.testing.assert_close(again.world_from_cam, found.world_from_cam)
    assert other == pytest.approx(scale / 7)


def test_normalised_keeps_what_cameras_see():
    """A point moved into the new world lands on the same pixel."""
    cameras = path()
    found, scale = normalised(cameras)
    points = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 5
    inside = cameras.cam_from_world[0]
    there = scale * (points @ inside[:3, :3].T + inside[:3, 3])
    before, after = project(points, cameras), project(there, found)
    torch.testing.assert_close(after[0], before[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after[1], scale * before[1])


def test_a_path_that_only_turns_has_a_scale_and_one_that_does_nothing_is_refused():
    still = path()[[0] * 4]
    assert "no motion" in refusal(lambda: normalised(still))
    turning = still.world_from_cam.clone()
    turning[:, :3, :3] = turning[:, :3, :3] @ turned(torch.tensor([[0, 0.1 * k, 0] for k in range(4)]))
    found, scale = normalised(replace(still, world_from_cam=turning))
    assert scale == 1000 and found.centers.abs().max() < 1000 * 64 * EPS
    poses = path().world_from_cam.clone()
    poses[2, 0, 3] = math.nan
    assert "NaN" in refusal(lambda: normalised(replace(path(), world_from_cam=poses)))
    grown = path().world_from_cam.clone()
    grown[:, :3, :3] *= 3
    assert "camera 0 of the path is no rotation" in refusal(lambda: normalised(replace(path(), world_from_cam=grown)))
    for value, said in ((0.0, "focal lengths"), (math.inf, "infinity")):
        lenses = path().intrinsics.clone()
        lenses[1, 0, 0] = value
        answer = refusal(lambda lenses=lenses: normalised(replace(path(), intrinsics=lenses)))
        assert "camera 1" in answer and said in answer


def test_folding_groups_frames_as_the_vae_does():
    """Frames that hold their own number."""
    frames = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 2, 1, 1)
    found = folded(frames[None])
    assert found.shape == (1, 3, 8, 1, 1)
    assert found[0, :, ::2, 0, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert torch.equal(found[0, :, ::2], found[0, :, 1::2])
    with pytest.raises(AssertionError):
        folded(frames[:8])


def test_folding_keeps_a_frames_channels_together():
    x = torch.arange(2.0).view(1, 2, 1, 1) + 10 * torch.arange(5.0).view(5, 1, 1, 1)
    assert folded(x)[1].flatten().tolist() == [10, 11, 20, 21, 30, 31, 40, 41]
