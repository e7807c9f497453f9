"""The rasteriser bit by bit against PyTorch3D's recordings, and against a search over all pairs."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch3d_recordings import SCENES, recorded_cameras, recording
from torch import Tensor

from fvgen.geometry import rasterize
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.conventions import world_to_ndc
from fvgen.geometry.rasterize import composite, pixel_centers, rasterize_points


def composited(idx: Tensor, dists: Tensor, recorded: dict[str, Tensor], background: Tensor | None) -> Tensor:
    """[V, H, W, C] from packed indices, view by view."""
    count, radius = recorded["points_ndc"].shape[1], recorded["radius"].item()
    images = []
    for view, (packed, distance) in enumerate(zip(idx.movedim(-1, 1), dists.movedim(-1, 1), strict=True)):
        point = torch.where(packed >= 0, packed - view * count, -1)
        images.append(composite(point, distance, recorded["features"], radius, background)[0])
    return torch.stack(images)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("candidates", [rasterize.CANDIDATES, 500])
def test_every_bit_is_pytorch3ds(request, monkeypatch, name, candidates):
    """`candidates` 500 draws the cloud in many small portions."""
    monkeypatch.setattr(rasterize, "CANDIDATES", candidates)
    recorded = recording(name, request)
    size, kept = tuple(recorded["image_size"].tolist()), recorded["points_per_pixel"].item()
    idx, zbuf, dists = rasterize_points(recorded["points_ndc"], size, recorded["radius"].item(), kept)
    assert torch.equal(idx, recorded["idx"].long())
    assert torch.equal(zbuf, recorded["zbuf"]) and torch.equal(dists, recorded["dists"])
    assert torch.equal(composited(idx, dists, recorded, None), recorded["image_alpha"])
    assert torch.equal(composited(idx, dists, recorded, recorded["background"]), recorded["image_alpha_bg"])


@pytest.mark.parametrize("name", SCENES)
def test_projection_from_cameras(request, name):
    """4e-6: what the recording's `stable` allows for."""
    recorded = recording(name, request)
    ndc = world_to_ndc(recorded["points"], recorded_cameras(recorded))
    finite = recorded["points_ndc"].abs().amax(-1) < 3  # beyond it the point is far outside and 1e-6 is relative
    torch.testing.assert_close(ndc[finite], recorded["points_ndc"][finite], rtol=1e-6, atol=4e-6)


def test_a_whole_frame(shared):
    """ViewCrafter's settings at 320x512: 327680 points; the recording is the SHA-256 of every complete array."""
    folder = shared / "reference" / "pytorch3d"
    hashes = json.loads((folder / "full_320x512_hashes.json").read_text())
    with np.load(folder / "full_320x512_input.npz") as file:
        recorded = {key: torch.from_numpy(np.atleast_1d(file[key])) for key in file.files}
    points = recorded["points_q"].float() * recorded["points_scale"]
    ndc = world_to_ndc(points, recorded_cameras(recorded))
    if _sha256(ndc) != hashes["sha256_points_ndc"]:
        pytest.skip("this machine's matrix product rounds otherwise than the recording's")
    radius = recorded["radius"].item()
    idx, zbuf, dists = rasterize_points(ndc, (320, 512), radius, recorded["points_per_pixel"].item())
    image, _ = composite(idx[0].movedim(-1, 0), dists[0].movedim(-1, 0), recorded["features_u8"].float() / 255, radius)
    assert _sha256(idx.int()) == hashes["sha256_idx_int32"]
    assert _sha256(zbuf) == hashes["sha256_zbuf_float32"] and _sha256(dists) == hashes["sha256_dists_float32"]
    assert _sha256(image) == hashes["sha256_image_alpha"]


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def search(points: Tensor, size: tuple[int, int], radius: float, kept: int) -> tuple[list, list, list]:
    """Every pixel against every point, in PyTorch3D's words: sort the hits by (depth, index), keep the first."""
    height, width = size
    reach = np.float32(radius) * np.float32(radius)
    x, y = pixel_centers(width, height, points).numpy(), pixel_centers(height, width, points).numpy()
    out = ([], [], [])
    for row in y:
        for column in x:
            hits = []
            for number, (px, py, pz) in enumerate(points.numpy()):
                square = (column - px) * (column - px) + (row - py) * (row - py)
                if pz >= 0 and square < reach:
                    hits.append((pz, number, square))
            hits = sorted(hits)[:kept] + [(-1, -1, -1)] * kept
            for values, take in zip(out, (1, 0, 2), strict=True):
                values.append([hit[take] for hit in hits[:kept]])
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    radius=st.sampled_from([0.01, 0.25, 0.5, 1.0, 3.0]),
    kept=st.integers(1, 5),
    exact=st.booleans(),
)
def test_against_a_search_over_all_pairs(seed, size, radius, kept, exact):
    """Any aspect, disks from a fraction of a pixel to the whole image; `exact`: many ties and points on borders."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(30, 3, generator=generator) * torch.tensor([1.5, 1.5, 1.0])
    if exact:
        points = (points * 4).round() / 4
    points[0, 2], points[1, 0], points[2, 1], points[3, 2] = torch.nan, torch.nan, torch.inf, -0.0
    idx, zbuf, dists = rasterize_points(points[None], size, radius, kept)
    for ours, theirs in zip((idx, zbuf, dists), search(points, size, radius, kept), strict=True):
        assert torch.equal(ours.reshape(-1, kept), torch.tensor(np.array(theirs), dtype=ours.dtype))


def test_empty_clouds_and_packed_indices():
    idx, zbuf, dists = rasterize_points(torch.empty(2, 0, 3), (3, 4), 0.1, 2)
    assert idx.shape == zbuf.shape == dists.shape == (2, 3, 4, 2)
    assert (idx == -1).all() and (zbuf == -1).all() and (dists == -1).all()
    points = torch.tensor([[[0.0, 0, -1], [0, 0, 1]]]).repeat(3, 1, 1)
    assert rasterize_points(points, (1, 1), 1.0, 1)[0].flatten().tolist() == [1, 3, 5]  # view * 2 + 1


@pytest.mark.parametrize("shape", [(5, 3), (1, 5, 2)])
def test_points_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"points_ndc must be \[V, N, 3\]"):
        rasterize_points(torch.zeros(shape), (4, 4), 0.1, 1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), height=st.integers(1, 40), width=st.integers(1, 40))
def test_ndc_is_the_readme_formula(seed, height, width):
    """x = (W/2 - u) 2 / min(H, W), y likewise, depth as it is; and pixel centres lie where pixels are."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.tensor([[30.0, 0, 7], [0, 40, 5], [0, 0, 1]], dtype=torch.float64)[None]
    points = torch.randn(20, 3, generator=generator, dtype=torch.float64) + torch.tensor([0, 0, 5.0])
    ndc = world_to_ndc(points, Cameras(torch.eye(4, dtype=torch.float64)[None], matrix, height, width))[0]
    u, v, _ = (matrix[0] @ (points / points[:, 2:]).T).unbind(0)
    short = min(height, width)
    expected = torch.stack([(width / 2 - u) * 2 / short, (height / 2 - v) * 2 / short, points[:, 2]], dim=-1)
    torch.testing.assert_close(ndc, expected, rtol=1e-10, atol=1e-10)
    centers = pixel_centers(width, height, points)
    torch.testing.assert_close(centers, (width / 2 - torch.arange(width).double() - 0.5) * 2 / short)
