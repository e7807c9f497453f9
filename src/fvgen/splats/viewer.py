"""scene.html: a page that shows 3D Gaussians and needs nothing else, no network and no other file.

From a given camera the page shows what `fvgen.geometry.gaussians` shows, enlarged: the low-pass of 0.3 square pixels is
meant in the given cameras' pixels, so that a fit at 48x64 does not come apart on a screen of 1920. Colours beyond 0 to
1, which a fit may leave, are cut, as other viewers cut what is below 0. The script in viewer.html does the arithmetic;
`SPLAT` is what it reads.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from fvgen.geometry.cameras import Cameras
from fvgen.geometry.gaussians import LEAST_ALPHA, Gaussians
from fvgen.system.doors import packaged_text
from fvgen.system.files import atomic_path, write_text

LEAST_SCALE = 1e-30  # has a logarithm
SPLAT = np.dtype(  # 32 bytes a Gaussian, two texels of the page's texture
    [
        ("mean", "<f4", 3),
        ("color", "u1", 4),  # red, green, blue, opacity: 255 is 1
        ("rotation", "<i2", 4),  # w x y z of a unit quaternion: 32767 is 1
        ("log_scale", "<f2", 4),  # natural logarithms, the fourth unused: 0.2 % off at most between e^-8 and e^8
    ]
)


def write_viewer(
    file: str | Path, gaussians: Gaussians, cameras: Cameras, names: Sequence[str] | None = None, about: str = ""
) -> None:
    """Write the page ``file``, whole or not at all. It opens with the first camera and has a button for each.

    cameras: at least one, of the size that the Gaussians were fitted at. names: what stands on the buttons; numbers if
    None. about: what the page says of itself; the number of Gaussians if empty. Raises UserError when the disk is full
    or the folder not writable.
    """
    assert len(cameras) > 0, "a page without cameras does not know where to stand"
    splats = pack(gaussians)
    lens = cameras.intrinsics[:, [0, 1, 0, 1], [0, 1, 2, 2]]
    facts = {
        "count": len(splats),
        "height": cameras.height,
        "width": cameras.width,
        "poses": cameras.world_from_cam[:, :3].tolist(),
        "lenses": lens.tolist(),
        "names": [str(k + 1) for k in range(len(cameras))] if names is None else list(names),
        "about": about or f"{len(splats):,} Gaussians.",
    }
    page = packaged_text("fvgen.splats", "viewer.html")
    page = page.replace("FACTS", json.dumps(facts, allow_nan=False).replace("<", "\\u003c"))
    page = page.replace("SPLATS", base64.b64encode(splats.tobytes()).decode())
    with atomic_path(file) as temporary:
        write_text(temporary, page)


@torch.no_grad()
def pack(gaussians: Gaussians) -> np.ndarray:
    """Those that can be seen as an array of `SPLAT`; colours beyond 0 to 1 are cut."""
    seen = gaussians[gaussians.opacities >= LEAST_ALPHA].to("cpu")
    splats = np.zeros(len(seen), SPLAT)
    splats["mean"] = seen.means
    splats["color"] = torch.cat([seen.colors, seen.opacities[:, None]], dim=1).clamp(0, 1).mul(255).round()
    splats["rotation"] = normalize(seen.rotations, dim=-1).mul(32767).round()
    splats["log_scale"][:, :3] = seen.scales.clamp(min=LEAST_SCALE).log()
    return splats
