"""The plane sweep of a LaLRM: on a scene known in closed form, and frame by frame."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from small_cameras import cameras
from torch import Tensor

from fvgen.geometry.cameras import Cameras, pinhole, project
from fvgen.geometry.plucker import normalised, packed, rays, spread, unpacked
from fvgen.models.plane_sweep import SOURCES, PlaneSweep, agreement

H, W, RADIUS = 24, 36, 2.0


def walk(frames: int = 5) -> Cameras:
    """Half a unit aside and back again, without a turn."""
    poses = torch.eye(4).repeat(frames, 1, 1)
    turn = torch.linspace(0, 2 * math.pi, frames + 1)[:-1]
    poses[:, :2, 3] = 0.5 * torch.stack([1 - turn.cos(), turn.sin()], dim=-1)
    return Cameras(poses, pinhole(frames, H, W, 60), H, W)


def sphere(path: Cameras) -> Tensor:
    """[F, 32, H, W] unit features, smooth in space, of a sphere around the first camera as every frame sees it."""
    origins, directions = rays(path, H, W)
    offset = (origins - origins[0])[:, None, None]
    along = (offset * directions).sum(-1)
    far = -along + (along.square() - offset.square().sum(-1) + RADIUS**2).sqrt()
    places = offset + far[..., None] * directions
    waves = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 2
    phase = places @ waves
    return torch.cat([phase.cos(), phase.sin()], dim=-1).permute(0, 3, 1, 2) / 4


def test_frames_agree_where_the_surface_is():
    path, away = walk(), torch.tensor([1.0, 1.4, RADIUS, 2.8, 4.0])
    alike, share = agreement(0, sphere(path), path, away)
    # Between two pixels a wave's phase moves by |wave| x RADIUS / focal; half of that is lost to interpolation at most.
    waves = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 2
    step = waves.norm(dim=0).max() * RADIUS / path.intrinsics[0, 0, 0] * math.sqrt(2)
    # Border pixels are clamped: a place up to half a pixel beyond the outermost centre has that centre's feature.
    inside = alike[2, 4:-4, 9:-9]
    assert (inside > (step / 2).cos() ** 2).all() and (share[2, 4:-4, 9:-9] > 0).all()
    assert (alike.argmax(0)[4:-4, 9:-9] == 2).all()


def test_who_sees_a_place_counts():
    path, away = walk(), torch.tensor([0.4, 2.0])
    features = sphere(path)
    alike, share = agreement(1, features, path, away)
    origins, directions = rays(path, H, W)
    for k, y, x in ((0, 0, 0), (0, 12, 30), (1, 3, 35), (1, 12, 18)):
        place = origins[1] + away[k] * directions[1, y, x]
        pixels, depth = project(place[None], path[[0, 2, 3, 4]])
        sees = (depth[:, 0] > 0.05) & (pixels[:, 0] > 0).all(-1) & (pixels[:, 0] < torch.tensor([W, H])).all(-1)
        assert share[k, y, x].item() == sees.float().mean().item()
    assert share.min() == 0 and share.max() == 1
    # Nobody else looks that way.
    poses = path.world_from_cam.clone()
    poses[[0, 2, 3, 4], :3, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    alike, share = agreement(1, features, replace(path, world_from_cam=poses), away)
    assert not alike.any() and not share.any()


def test_long_clips_are_compared_with_some_of_their_frames():
    path = walk(2 * SOURCES - 1)  # of which every other one is a source
    features = sphere(path)
    away = torch.tensor([RADIUS])
    expected = agreement(0, features[::2], path[torch.arange(0, len(path), 2)], away)
    torch.testing.assert_close(agreement(0, features, path, away), expected, rtol=0, atol=0)
    _, share = agreement(1, features, path, away)  # no source itself: all of them are compared with it
    assert torch.equal(share * SOURCES, (share * SOURCES).round())


def test_frames_come_out_of_latent_frames_and_go_back_into_them():
    torch.manual_seed(0)
    sweep, z, away = PlaneSweep(3, squeeze=4), torch.randn(1, 3, 3, 6, 8), torch.tensor([1.0, 2.0, 4.0])
    path = packed(normalised(cameras(0, 9, 48, 64))[0]).float()
    volume = sweep(z, path[None], away)
    assert volume.shape == (1, 3, 2 * 4 * 3, 6, 8)
    assert torch.equal(sweep(z, path[None], away, again=True), volume)
    maps = sweep.features(z[0].transpose(0, 1)).unflatten(1, (4, -1))  # [latent frame, its frame, C, h, w]
    of = [(0, 3), *((1 + (f - 1) // 4, (f - 1) % 4) for f in range(1, 9))]
    features = torch.nn.functional.normalize(torch.stack([maps[i, j] for i, j in of]), dim=1)
    for frame, (latent, place) in enumerate(of):
        alike, share = agreement(frame, features, unpacked(path, 6, 8), away)
        slices = volume[0, latent].unflatten(0, (4, 6))
        found = slices[place]
        torch.testing.assert_close(found, torch.cat([4 * alike, share]), rtol=1e-5, atol=1e-6)
        if frame == 0:  # it is all of its latent frame
            assert all(torch.equal(each, found) for each in slices)


def test_shares_are_spread_between_the_ends():
    share = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(spread(share, 1.0, 9.0), torch.tensor([1.0, 5.0, 9.0]))
    torch.testing.assert_close(spread(share, 1.0, 100.0), torch.tensor([1.0, 10.0, 100.0]), rtol=1e-5, atol=0)
