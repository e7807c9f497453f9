"""ViewCrafter's cleaning of DUSt3R's points against recordings of DUSt3R and of ViewCrafter's copy of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras
from fvgen.geometry.confidence import clean_confidence, clip_depth, fused_confidence, viewcrafter_mask
from fvgen.geometry.pointcloud import unproject

PAIR_VIEWER = "align_upstream_pairviewer_2views"
ALIGNED = [
    "align_upstream_pco_2views_cosine",
    "align_upstream_pco_3views_linear",
    "align_viewcrafter_pco_2views_linear",
    "align_viewcrafter_pco_3views_linear",
]


def recording(shared: Path, name: str) -> dict[str, Tensor]:
    with np.load(shared / "reference" / "dust3r" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def cameras_of(recorded: dict[str, Tensor]) -> Cameras:
    return Cameras(recorded["c2w"], recorded["intrinsics"], *recorded["depthmaps"].shape[1:])


@pytest.mark.parametrize("name", [PAIR_VIEWER, *ALIGNED])
def test_confidence_of_an_image_is_the_largest_of_its_pairs(shared, name):
    recorded = recording(shared, name)
    edges = [tuple(edge) for edge in recorded["edges"].tolist()]
    fused = fused_confidence(edges, recorded["pred1_conf"], recorded["pred2_conf"], len(recorded["c2w"]))
    assert torch.equal(fused, recorded["im_conf"])


@pytest.mark.parametrize("name", [PAIR_VIEWER, *ALIGNED])
def test_cameras_are_handed_over_with_the_half_pixel_shift(shared, name):
    """DUSt3R's world points are its depth along rays through whole-numbered pixels: poses and lenses need no change."""
    recorded = recording(shared, name)
    depth, images = recorded["depthmaps"], recorded["images"].permute(0, 3, 1, 2)
    points, colors = unproject(depth, images, cameras_of(recorded), half_pixel_shift=True)
    assert (depth > 0).all()
    torch.testing.assert_close(points, recorded["pts3d"].reshape(-1, 3), atol=1e-5, rtol=1e-5)
    assert torch.equal(colors, recorded["images"].reshape(-1, 3))  # view after view, row after row


@pytest.mark.parametrize("name", ALIGNED)
def test_cleaning(shared, name):
    """756 to 2,510 points go; rounding may move one that lies on the border between two pixels."""
    recorded = recording(shared, name)
    cleaned = clean_confidence(recorded["im_conf"], recorded["depthmaps"], recorded["pts3d"], cameras_of(recorded))
    gone = recorded["im_conf_cleaned"] == 0
    assert gone.sum() > 700
    assert ((cleaned == 0) != gone).sum() <= 2
    same = (cleaned == 0) == gone
    assert torch.equal(cleaned[same], recorded["im_conf_cleaned"][same])
    assert ((cleaned > 1.0986123) != recorded["mask_cleaned_thr_log3"]).sum() <= 2
    assert torch.equal(
        viewcrafter_mask(recorded["im_conf_cleaned"], recorded["depthmaps"]), recorded["mask_cleaned_thr_log3"]
    )
    assert torch.equal(viewcrafter_mask(recorded["im_conf"], recorded["depthmaps"]), recorded["mask_thr_log3"])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.62])
def test_far_points_stay_whatever_their_confidence(shared, share):
    recorded = recording(shared, "align_viewcrafter_pco_2views_linear")
    mask = viewcrafter_mask(torch.zeros_like(recorded["depthmaps"]), recorded["depthmaps"], share)
    assert torch.equal(mask, recorded[f"bgmask_{share}"])
    both = viewcrafter_mask(recorded["im_conf_cleaned"], recorded["depthmaps"], share)
    assert torch.equal(both, mask | recorded["mask_cleaned_thr_log3"])


def test_low_images_have_no_background():
    with pytest.raises(ValueError, match="more than 80 rows, not 48"):
        viewcrafter_mask(torch.ones(1, 48, 64), torch.ones(1, 48, 64), 0.2)


@pytest.mark.parametrize("name", ALIGNED[2:])
def test_clipped_depth(shared, name):
    recorded = recording(shared, name)
    clipped = clip_depth(recorded["depthmaps"], 0.7)
    assert (clipped < recorded["depthmaps"]).any()
    images = recorded["images"].permute(0, 3, 1, 2)
    points, _ = unproject(clipped, images, cameras_of(recorded), half_pixel_shift=True)
    torch.testing.assert_close(points, recorded["pts3d_clip0.7"].reshape(-1, 3), atol=1e-5, rtol=1e-5)
    assert torch.equal(clip_depth(recorded["depthmaps"]), recorded["depthmaps"])


def test_the_surer_of_two_views_wins():
    """Two cameras in one place: what the second sees nearer and less surely goes, and nothing else."""
    cameras = Cameras(torch.eye(4).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1), 2, 2)
    depth = torch.stack([torch.full((2, 2), 2.0), torch.tensor([[1.0, 1.0], [3.0, 1.9999]])])
    confidence = torch.stack([torch.full((2, 2), 5.0), torch.tensor([[2.0, 9.0], [2.0, 2.0]])])
    points, _ = unproject(depth, torch.zeros(2, 3, 2, 2), cameras, half_pixel_shift=True)
    cleaned = clean_confidence(confidence, depth, points.reshape(2, 2, 2, 3), cameras)
    assert cleaned[1].tolist() == [[0.0, 9.0], [2.0, 2.0]]
    assert torch.equal(cleaned[0], confidence[0])
