"""LaLRM: shapes and sizes of the paper, what its numbers mean, and that it can learn a scene."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from checks import refusal
from small_cameras import cameras

from fvgen.geometry.gaussians import render_gaussians
from fvgen.geometry.plucker import normalised, packed
from fvgen.models.lalrm import LaLRM
from fvgen.splats.raymap import distances, gaussians_along, reconstructed

SMALL = {"latent_channels": 4, "space_squeeze": 4, "width": 32, "layers": 2, "head_dim": 16}


def small(**changes) -> LaLRM:
    torch.manual_seed(0)
    return LaLRM(**SMALL | changes)


def path(frames: int) -> torch.Tensor:
    return packed(normalised(cameras(0, frames, 32, 48))[0])[None].float()


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_papers_sizes():
    with torch.device("meta"):
        half, full = LaLRM(), LaLRM(pitch=1)
    assert count(half.blocks) == 24 * 12 * 1024**2 + 24 * 2 * 1024  # 302.0 M, and the norms' gains
    assert count(half.latents) == 16 * 4 * 1024  # 0.07 M
    assert count(half.rays) == 6 * 4 * 16 * 16 * 1024  # 6.3 M
    assert count(half.fuse) == 2 * 1024**2  # 2.1 M
    assert (count(half.gaussians), count(full.gaussians)) == (1024 * 12 * 5 * 64, 1024 * 12 * 5 * 256)  # 3.9, 15.7 M
    assert not any(name.endswith("bias") for name, _ in half.named_parameters())
    z, p = torch.zeros(1, 16, 13, 60, 90, device="meta"), torch.zeros(1, 49, 21, device="meta")
    assert half(z, p).shape == (1, 12, 49, 240, 360)
    assert 49 * 240 * 360 == 4_233_600


@pytest.mark.parametrize(("frames", "latent", "squeeze"), [(9, 3, 4), (17, 5, 4), (49, 13, 4), (5, 5, 1)])
def test_frames_come_back(frames, latent, squeeze):
    network = small(time_squeeze=squeeze)
    assert network(torch.randn(1, 4, latent, 4, 6), path(frames)).shape == (1, 12, frames, 8, 12)


@pytest.mark.parametrize("planes", [0, 5])
def test_one_for_every_pixel_and_recomputation(planes):
    network, z = small(pitch=1, planes=planes), torch.randn(1, 4, 3, 4, 6)
    plain = network(z, path(9))
    assert plain.shape == (1, 12, 9, 16, 24)
    network.enable_gradient_checkpointing()
    torch.testing.assert_close(network(z, path(9)), plain, rtol=0, atol=0)
    network(z, path(9)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_without_cameras_the_path_is_not_looked_at():
    blind, z = small(cameras=False), torch.randn(1, 4, 3, 4, 6)
    other = packed(normalised(cameras(7, 9, 32, 48))[0])[None].float()
    assert torch.equal(blind(z, path(9)), blind(z, other))
    seeing = small()
    assert not torch.equal(seeing(z, path(9)), seeing(z, other))


def test_settings_that_do_not_fit():
    assert "no multiple of head_dim=24" in refusal(lambda: small(head_dim=24))
    assert "pitch=3 does not divide a token's 8 pixels" in refusal(lambda: small(pitch=3))
    assert "0 < near < typical < far" in refusal(lambda: small(near=4.0))
    assert "planes=5 need to know the cameras" in refusal(lambda: small(planes=5, cameras=False))


def test_zeros_are_the_stated_start():
    walk = normalised(cameras(1, 9, 32, 48))[0]
    made = gaussians_along(torch.zeros(12, 9, 8, 12), walk, small().config)
    assert len(made) == 9 * 8 * 12
    away = (made.means.unflatten(0, (9, -1)) - walk.centers[:, None]).norm(dim=-1)
    torch.testing.assert_close(away, torch.full_like(away, 3.0), rtol=1e-5, atol=0)
    # neighbours in the middle of an image are two scales apart
    grid = made.means.unflatten(0, (9, 8, 12))
    apart = (grid[:, 4, 5] - grid[:, 4, 6]).norm(dim=-1)
    scale = made.scales.unflatten(0, (9, 8, 12))[:, 4, 5, 0]
    torch.testing.assert_close(apart, 2 * scale, rtol=0.02, atol=0)  # the arc of a ray against its tangent
    assert torch.allclose(made.opacities, torch.tensor(1 / (1 + math.e)))
    assert torch.allclose(made.colors, torch.tensor(0.5))
    assert torch.equal(made.rotations, torch.tensor([1.0, 0, 0, 0]).expand(len(made), 4))


@pytest.mark.parametrize("far", [8.0, 20.0])  # linear, logarithmic
def test_distances_have_their_ends(far):
    x = torch.tensor([-40.0, 0.0, 40.0])
    torch.testing.assert_close(distances(x, 0.2, far, 3.0), torch.tensor([0.2, 3.0, far]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("planes", [0, 5])
def test_the_worlds_place_and_unit_do_not_matter(planes):
    network, z = small(planes=planes), torch.randn(1, 4, 3, 4, 6)
    walk = cameras(3, 9, 32, 48).to(dtype=torch.float64)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, 0.3, -0.2], [-0.3, 0, 0.5], [0.2, -0.5, 0]]).double())
    moved = walk.world_from_cam.clone()
    moved[:, :3, 3] *= 2  # twice as large, then turned and carried away
    turn[:3, 3] = torch.tensor([5.0, -3.0, 2.0])
    there = replace(walk, world_from_cam=turn @ moved)
    one, other = reconstructed(network, z, walk), reconstructed(network, z, there)
    torch.testing.assert_close(other.scales, 2 * one.scales, rtol=1e-4, atol=0)
    expected = 2 * one.means.double() @ turn[:3, :3].T + turn[:3, 3]
    torch.testing.assert_close(other.means.double(), expected, rtol=0, atol=1e-4)
    pictures = [render_gaussians(each, seen[[4]])[0] for each, seen in ((one, walk), (other, there))]
    torch.testing.assert_close(*pictures, rtol=0, atol=2e-3)  # a pair at 1/255 may fall out


def test_it_saves_and_loads(tmp_path):
    network, z = small(), torch.randn(1, 4, 3, 4, 6)
    network.save_pretrained(tmp_path)
    assert torch.equal(LaLRM.from_pretrained(tmp_path)(z, path(9)), network(z, path(9)))
