"""scene.html: a page that shows Gaussians and needs nothing else, no network and no other file.

The page's own script projects the Gaussians as `fvgen.geometry.gaussians` does, sorts them by depth when the camera
turns, and draws them back to front with WebGL 2, a textured square each. Drag to turn, wheel to come nearer, shift and
drag to move, a button for every camera.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch

from fvgen.geometry.cameras import Cameras
from fvgen.geometry.gaussians import Gaussians, rotation_matrices
from fvgen.system.doors import packaged_text
from fvgen.system.files import atomic_path

MOST_BUTTONS = 60


def write_viewer(file: str | Path, gaussians: Gaussians, cameras: Cameras) -> None:
    """Raises UserError when the disk is full."""
    root = rotation_matrices(gaussians.rotations) * gaussians.scales[:, None, :]
    covariance = root @ root.transpose(1, 2)
    upper = covariance[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    rows = torch.cat([gaussians.means, upper, gaussians.colors.clamp(0, 1), gaussians.opacities[:, None]], dim=1)
    data = base64.b64encode(rows.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()).decode()
    chosen = range(0, len(cameras), max(1, -(-len(cameras) // MOST_BUTTONS)))
    views = [
        {
            "pose": cameras.cam_from_world[v].flatten().tolist(),
            "lens": cameras.intrinsics[v].flatten().tolist(),
            "name": v,
        }
        for v in chosen
    ]
    facts = {"count": len(gaussians), "height": cameras.height, "width": cameras.width, "views": views}
    page = packaged_text("fvgen.splats", "viewer.html")
    page = page.replace("/*FACTS*/", json.dumps(facts)).replace("/*DATA*/", data)
    with atomic_path(Path(file)) as temporary:
        temporary.write_text(page, encoding="utf-8")
