"""Paths that a model cannot follow, told before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, project
from fvgen.metrics.cameras import rotation_angle
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.walks.chain import Span
from fvgen.walks.render import Cloud, ranges

STILL = 1e-3
"""A clip whose cameras move by less of the photograph's depth, and turn by less in radians, stands still: what is left
is rounding, and a guided model, which sees every path at size 1, would take it for a walk."""
MOST_LONG = 100.0  # times the photograph's depth
BEHIND = 1.05  # times the depth of the surface before a camera: depth is not that exact


def judge_clips(pipeline: NovelViewPipeline, spans: Sequence[Span], height: int, width: int) -> None:
    """Raises UserError where a clip of the walk has a number of frames that the model cannot take: a path from a file
    may be shorter than a clip."""
    for length in sorted({span.stop - span.start for span in spans}):
        pipeline.check_clip(length, height, width)


def judge_guided(path: Cameras, cloud: Cloud, spans: Sequence[Span]) -> None:
    """For models that are guided by cameras, which see paths without scale and do not look at the points: raises
    UserError for one whose units are not the photographs', that stands still for a whole clip, or that goes through
    what a single photograph shows.

    Looking away from it is no mistake: that is what such models are for. Where depth is a wall that stands for none
    (`fvgen.depth.flat`) only a path without motion is one.
    """
    centers, depth, known = path.centers.double(), cloud.typical, cloud.backend != "flat"
    extent = (centers - cloud.cameras.centers[0].double()).norm(dim=1).max().item()
    if known and not extent <= MOST_LONG * depth:
        raise UserError(
            f"the path goes {extent:.3g} from the first photograph, which shows what is {depth:.3g} away: its lengths "
            "are not in the scene's units; scale it"
        )
    for span in spans:
        part = path[span.start : span.stop]
        shift = (part.centers - part.centers[0]).norm(dim=1).max().item()
        turn = rotation_angle(part.world_from_cam[:, :3, :3], part.world_from_cam[:1, :3, :3]).max().item()
        if shift < STILL * depth and turn < STILL:
            raise UserError(
                f"the camera path has no motion in frames {span.start}-{span.stop - 1} ({shift:.2g} where the scene is "
                f"{depth:.3g} away); give one that moves or turns, in the scene's units"
            )
    if known and len(cloud.views) == 1 and (behind := behind_surfaces(path, cloud)):
        raise UserError(
            f"frames {ranges(behind)} of the path are behind what the photograph shows; shorten the path, or turn it "
            "aside"
        )


def behind_surfaces(path: Cameras, cloud: Cloud) -> list[int]:
    """Frames whose camera is within the first view's image, but farther away than the surface that is seen there."""
    pixels, away = project(path.centers.to(cloud.depth), cloud.cameras[:1])
    height, width = cloud.depth.shape[1:]
    x, y = pixels[0].floor().long().unbind(dim=-1)
    inside = (away[0] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    surface = cloud.depth[0, y.clamp(0, height - 1), x.clamp(0, width - 1)]
    return torch.where(inside & (surface > 0) & (away[0] > BEHIND * surface))[0].tolist()
