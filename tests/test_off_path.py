"""Views off a path: where they are, and what they look at."""

from __future__ import annotations

from dataclasses import replace

import torch
from small_cameras import cameras

from fvgen.geometry.cameras import project
from fvgen.geometry.off_path import AHEAD, off_path


def drawn(count: int = 64, **changes):
    walk = cameras(2, 9, 32, 48).to(dtype=torch.float64)
    return walk, off_path(walk, count, torch.Generator().manual_seed(0), **changes)


def test_they_are_a_shift_away_from_the_line_and_up_to_an_overshoot_beyond():
    walk, views = drawn(shift=0.3, beyond=0.2)
    start, way = walk.centers[0], walk.centers[-1] - walk.centers[0]  # a straight walk
    extent = way.norm()
    along = (views.centers - start) @ way / extent**2
    assert along.min() < -0.05 and along.max() > 1.05  # 64 of them: some beyond each end
    assert along.min() > -0.2 - 0.3 - 1e-9 and along.max() < 1.2 + 0.3 + 1e-9  # a shift may lie along the way
    line = start + (along.clamp(-0.2, 1.2) * extent)[:, None] * way / extent
    assert ((views.centers - line).norm(dim=-1) <= 0.3 * extent + 1e-9).all()
    on = off_path(walk, 64, torch.Generator().manual_seed(0), shift=0.0, beyond=0.0).centers
    along = (on - start) @ way / extent**2
    torch.testing.assert_close(start + along[:, None] * way, on, rtol=0, atol=1e-6)  # the walk is in float32
    assert along.min() >= 0 and along.max() <= 1


def test_they_look_at_what_a_frame_looks_at():
    walk, views = drawn()
    extent = torch.cdist(walk.centers, walk.centers).max()
    targets = walk.centers + AHEAD * extent * walk.world_from_cam[:, :3, 2]
    pixels, depth = project(targets, views)
    off = (pixels - torch.tensor([24.0, 16.0], dtype=torch.float64)).norm(dim=-1)
    assert (off.amin(dim=1) < 1e-6).all() and (depth > 0).all()
    turned = views.world_from_cam[:, :3, :3]
    torch.testing.assert_close(turned @ turned.mT, torch.eye(3).double().expand(64, 3, 3), rtol=0, atol=1e-9)


def test_size_and_place_of_the_world_do_not_matter():
    walk, views = drawn()
    moved = walk.world_from_cam.clone()
    moved[:, :3, 3] = 3 * moved[:, :3, 3] + 5
    again = off_path(replace(walk, world_from_cam=moved), 64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.centers, 3 * views.centers + 5, rtol=0, atol=1e-9)
    torch.testing.assert_close(again.world_from_cam[:, :3, :3], views.world_from_cam[:, :3, :3], rtol=0, atol=1e-9)


def test_a_path_in_one_place_gives_its_own_views():
    walk = cameras(2, 9, 32, 48)
    still = replace(walk, world_from_cam=walk.world_from_cam[:1].expand(9, 4, 4))
    assert torch.equal(off_path(still, 3, torch.Generator()).world_from_cam, still.world_from_cam[:3])
