"""What makes a clip unfit for training, measured and judged: the filters of `fvgen prepare`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fvgen.clips.clip import Clip

# By which a clip is judged; see docs/data.md. The values are ours: the papers give none.
LIMITS = {"points": 0.02, "overlap": 0.2, "sharpness": 0.2, "motion": 0.05}
REASONS = {
    "points": "too few points",
    "overlap": "too little overlap",
    "sharpness": "motion blur",
    "motion": "static clip",
}
MEANINGS = {  # of the figures: what to call them, unit, explanation
    "points": ("points per pixel", "", "of the cloud that is rendered, over the pixels of a frame"),
    "overlap": ("overlap", "", "share of the frame where the cloud is seen, in the worst frame that is not given"),
    "sharpness": ("sharpness", "", "of the blurriest frame, over the clip's median"),
    "motion": ("movement", "rad", "length of the camera's path, in radians of turn and parallax"),
}
LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


def measure(clip: Clip, points: int, seen: Tensor, motion: float) -> dict[str, float]:
    """The figures that `LIMITS` are about.

    points: how many the cloud has, here per pixel of a frame. seen: [F, H, W] bool; overlap is the share of the worst
    novel frame where the cloud is seen. sharpness: of the blurriest frame over the clip's median. motion: length of the
    path in radians.
    """
    height, width = clip.truth.shape[-2:]
    sharp = sharpness(clip.truth)
    return {
        "points": round(points / (height * width), 4),
        "overlap": round(seen[~clip.known].float().mean((1, 2)).min().item(), 4),
        "sharpness": round((sharp.min() / sharp.median().clamp(min=1e-9)).item(), 4),
        "motion": round(motion, 4),
    }


def verdict(figures: dict[str, float], limits: dict[str, float]) -> str | None:
    """Why a clip is dropped, in words of `REASONS`, or None."""
    return next((REASONS[key] for key in REASONS if not figures[key] >= limits[key]), None)


def sharpness(frames: Tensor) -> Tensor:
    """[F]: variance of the Laplacian (Pech-Pacheco et al. 2000) of grey frames [F, 3, H, W], over that of the frame:
    neither contrast nor brightness counts."""
    grey = frames.mean(1, keepdim=True)
    edges = conv2d(grey, LAPLACIAN.to(grey)[None, None])
    return edges.var(dim=(1, 2, 3)) / grey.var(dim=(1, 2, 3)).clamp(min=1e-6)
