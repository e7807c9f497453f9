"""Recordings of PyTorch3D's renderer, for the tests that compare with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras

SCENES = [
    "random_r0.01",
    "random_r0.08",
    "broadcast_focal",
    "two_layers_k1",
    "two_layers_k3",
    "two_layers_k10",
    "two_layers_r0.05_k20",
    "behind_outside",
    "border_r_half_px",
    "border_r_1px",
    "border_r_2px",
    "overlap_ties_k4",
    "overlap_ties_k10",
    "tall_offcentre_fxfy",
    "odd_size_c5",
    "single_point",
    "nothing_visible",
]
SHIPPED = {"border_r_2px", "overlap_ties_k4", "behind_outside", "single_point"}  # in tests/recorded


def recording(name: str, request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """All arrays of a recording; scalars have the shape [1]. Most are not shipped: the test is skipped without."""
    if name in SHIPPED:
        folder = Path(__file__).parent / "recorded" / "pytorch3d"
    else:
        folder = request.getfixturevalue("shared") / "reference" / "pytorch3d"
    with np.load(folder / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.atleast_1d(file[key])) for key in file.files}


def recorded_cameras(recorded: dict[str, Tensor]) -> Cameras:
    """The cameras of a scene file: focal lengths and principal points may be shared by the views."""
    intrinsics = torch.eye(3).repeat(len(recorded["c2w"]), 1, 1)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = recorded["focal"][:, 0], recorded["focal"][:, -1]
    intrinsics[:, :2, 2] = recorded["principal_point"]
    return Cameras(recorded["c2w"], intrinsics, *recorded["image_size"].tolist())
