"""Image metrics, and one call that scores a set of images with all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fvgen.metrics.frechet import (
    fid,
    frechet_distance,
    inception_features,
    kernel_distance,
    kid,
    kid_squeeze,
    squeeze_features,
)
from fvgen.metrics.image import check_images, lpips, psnr, ssim
from fvgen.metrics.weights import Unavailable

__all__ = [
    "METRICS",
    "Unavailable",
    "fid",
    "frechet_distance",
    "inception_features",
    "kernel_distance",
    "kid",
    "kid_squeeze",
    "lpips",
    "psnr",
    "score_images",
    "squeeze_features",
    "ssim",
]

METRICS = ("psnr", "ssim", "lpips", "fid", "kid", "kid_squeeze")


def score_images(
    predicted: Tensor, truth: Tensor, shown: Tensor | None = None, clip_of: Tensor | None = None
) -> dict[str, object]:
    """Every metric of ``predicted`` against ``truth``, both [N, 3, H, W] in [0, 1], ready for JSON.

    Keys: each name of `METRICS`, a float (psnr, ssim and lpips averaged over the images) or None;
    ``lpips_net``, the backbone of lpips or None; ``n``, the number of images; ``why_null``, one sentence for
    each metric that is None. A None is never stood in for: see `fvgen.metrics.weights`.

    shown: [N, H, W] bool, where the truth is one; everywhere if not given. What is hidden is black in both before
    anything is measured, so that no score depends on what either has there; PSNR and SSIM average over shown pixels
    alone, the networks of the others see whole images. Images without a shown pixel are left out.

    clip_of: [N] integers from 0, the clip that each image is of: adds ``by_clip``, for each of psnr, ssim and lpips
    that could be measured its means by clip, None for a clip without images. Frames of a clip are alike; clips are not.

    Raises UserError when FVGEN_WEIGHTS names no folder or a weights file is damaged.
    """
    if shown is not None:
        kept = shown.flatten(1).any(dim=1)
        predicted, truth, shown = predicted[kept], truth[kept], shown[kept]
        predicted, truth = (torch.where(shown[:, None], images, 0.0) for images in (predicted, truth))
    scores: dict[str, object] = dict.fromkeys(METRICS) | {
        "lpips_net": None,
        "n": predicted.shape[0],
        "why_null": {},
    }
    clips = int(clip_of.max()) + 1 if clip_of is not None and len(clip_of) else 0
    if clip_of is not None:
        clip_of = clip_of if shown is None else clip_of[kept]
        scores["by_clip"] = {}
    if not len(predicted):
        return scores | {"why_null": dict.fromkeys(METRICS, "masks hide all of every image")}
    if not torch.isfinite(predicted).all():
        reason = "the predicted images hold NaN or infinite values"
        return scores | {"why_null": dict.fromkeys(METRICS, reason)}
    check_images(predicted, truth)
    for names, compute in _GROUPS.items():
        try:
            found = dict(zip(names, compute(predicted, truth, shown), strict=True))
        except Unavailable as reason:
            scores["why_null"] |= {name: str(reason) for name in names if name in METRICS}
            continue
        for name, value in found.items():
            scores[name] = _mean(value) if isinstance(value, Tensor) else value
            if clip_of is not None and isinstance(value, Tensor):
                parts = [value[clip_of == clip] for clip in range(clips)]
                scores["by_clip"][name] = [_mean(part) if len(part) else None for part in parts]
    return scores


def _inception_distances(predicted: Tensor, truth: Tensor, shown: Tensor | None) -> tuple[float, float]:
    features = inception_features(predicted), inception_features(truth)
    return frechet_distance(*features), kernel_distance(*features)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


# Predicted, truth and where it is shown; one run of a network fills several names. A tensor holds a value per image.
_GROUPS: dict[tuple[str, ...], Callable[[Tensor, Tensor, Tensor | None], tuple]] = {
    ("psnr",): lambda *images: (psnr(*images),),
    ("ssim",): lambda *images: (ssim(*images),),
    ("lpips", "lpips_net"): lambda predicted, truth, shown: lpips(predicted, truth),
    ("fid", "kid"): _inception_distances,
    ("kid_squeeze",): lambda predicted, truth, shown: (kid_squeeze(predicted, truth),),
}
