"""`fvgen evaluate --cameras`: do generated frames obey the cameras that were asked for, and agree with one another?

Structure from motion runs over given and generated frames together, which needs no weights; what cannot be placed or
matched is counted. docs/report.md says what the numbers are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.metrics.cameras import CameraError, camera_error
from fvgen.metrics.consistency import match_distance, reprojection_distance, track_lengths
from fvgen.posing.together import Together, place_together
from fvgen.reports.frames import Frames
from fvgen.scenes.readers.nerfstudio import generated_views

FEWEST = 3  # pictures in all
AGREE = 0.5  # pixels off the commanded cameras below which a match agrees: SIFT's own error is 0.1 to 0.4 in true clips
OBEYED = (5.0, 0.05)  # degrees, and share of the cameras' extent, within which a frame is where it should be
PER_CAMERA = ("rotation_degrees", "position", "sampson", "agreeing")


@dataclass(frozen=True)
class Commanded:
    """V pictures and the cameras that were asked for. generated: [V] bool, the others are given. numbers: which picture
    of the predicted place each generated one is. read: the pictures [3, H, W], in order."""

    cameras: Cameras
    generated: Tensor
    numbers: list[int]
    read: Callable[[], Iterator[Tensor]]


class CameraScores(NamedTuple):
    """scores: the families "camera_error" and "consistency". rows: by the number of the predicted picture, its
    `PER_CAMERA`. why: of a family that has no numbers."""

    scores: dict[str, dict[str, Any]]
    rows: dict[int, dict[str, float | None]]
    why: dict[str, str]


def commanded(ours: Frames, theirs: Frames | None) -> Commanded:
    """Cameras are those of ``ours`` where its transforms.json says which views are generated, else of ``theirs``: whose
    pictures are the given ones, those that are not generated where it says so, else all of them.

    Raises UserError where neither has cameras, and for fewer than three pictures.
    """
    flags = [] if ours.scene is None else generated_views(ours.place, ours.scene)
    if any(flags):
        cameras, read = ours.scene.cameras, ours.read
        numbers = [number for number, flag in enumerate(flags) if flag]
    elif theirs is None or theirs.scene is None:
        raise UserError(
            f"--cameras needs the cameras that were asked for, and {(theirs or ours).place} does not say them; give "
            "what fvgen generate wrote, or the posed data set of the true pictures as the second place"
        )
    else:
        flags = generated_views(theirs.place, theirs.scene)
        numbers = [number for number, flag in enumerate(flags) if flag]
        cameras = theirs.scene.cameras

        def chosen() -> Iterator[Tensor]:
            return (mine if flag else true for flag, mine, true in zip(flags, ours.read(), theirs.read(), strict=True))

        read = chosen
        if not numbers:
            numbers = list(range(len(flags)))
            twice = [*numbers, *numbers]
            flags, cameras = [False] * len(flags) + [True] * len(flags), cameras[twice]

            def both() -> Iterator[Tensor]:
                return itertools.chain(theirs.read(), ours.read())

            read = both
    if len(flags) < FEWEST:
        raise UserError(
            f"{ours.place} has {len(flags)} pictures, given and generated, and --cameras needs {FEWEST}; make more"
        )
    return Commanded(cameras, torch.tensor(flags), numbers, lambda: _of_size(read(), cameras, ours))


def camera_scores(asked: Commanded, names: list[str]) -> CameraScores:
    """Both families; ``names`` of the predicted pictures. Raises UserError where pycolmap is missing."""
    found = place_together(asked.read(), asked.cameras, ~asked.generated)
    cameras = asked.cameras.to(dtype=torch.float64)
    distances = {pair: match_distance(*both.unbind(1), cameras, *pair) for pair, both in found.matches.items()}
    error, why = _error(found, asked)
    views = asked.generated.nonzero().flatten().tolist()
    rows = {}
    for view, number in zip(views, asked.numbers, strict=True):
        own = torch.cat([torch.empty(0).double(), *(x for pair, x in distances.items() if view in pair)])
        rows[number] = {
            "rotation_degrees": _number(error.rotation[view].rad2deg()),
            "position": _number(error.position[view]),
            "sampson": _number(own.median()) if len(own) else None,
            "agreeing": int((own < AGREE).sum()),
        }
    failed = [names[n] for n in asked.numbers if rows[n]["rotation_degrees"] is None]
    own_error = error.rotation[~asked.generated].rad2deg()
    scores = {
        "camera_error": _error_summary(rows, asked, int(found.world_from_cam[~asked.generated, 0, 0].isfinite().sum()))
        | {"given_rotation_degrees": _number(own_error[own_error.isfinite()].mean()), "failed": failed},
        "consistency": _consistency(found, asked, distances, rows),
    }
    return CameraScores(scores, rows, {"camera_error": why} if why else {})


def _error(found: Together, asked: Commanded) -> tuple[CameraError, str | None]:
    """And why no frame has one."""
    try:
        return camera_error(found.world_from_cam, asked.cameras.world_from_cam, ~asked.generated), None
    except ValueError as reason:
        nothing = torch.full((len(asked.generated),), torch.nan, dtype=torch.float64)
        return CameraError(nothing, nothing, len(nothing)), f"{reason} to tell where the generated ones are"


def _error_summary(rows: dict[int, dict], asked: Commanded, given_placed: int) -> dict[str, Any]:
    """Means are of the frames that were placed; ``obeyed`` is a share of all."""
    centers = asked.cameras.centers.double()
    extent = torch.cdist(centers, centers).max().item()
    turns, offsets = (
        torch.tensor([row[name] for row in rows.values() if row[name] is not None], dtype=torch.float64)
        for name in ("rotation_degrees", "position")
    )
    within = (turns <= OBEYED[0]) & (offsets <= OBEYED[1] * extent)
    return {
        "rotation_degrees": _number(turns.mean()),
        "rotation_degrees_median": _number(turns.median()) if len(turns) else None,
        "position": _number(offsets.mean()),
        "position_median": _number(offsets.median()) if len(offsets) else None,
        "position_of_extent": _number(offsets.mean() / extent) if extent > 0 else None,
        "extent": extent,
        "obeyed": int(within.sum()) / len(rows),
        "given": int((~asked.generated).sum()),
        "given_placed": given_placed,
        "generated": len(rows),
        "failures": len(rows) - len(turns),
    }


def _consistency(
    found: Together, asked: Commanded, distances: dict[tuple[int, int], Tensor], rows: dict[int, dict]
) -> dict[str, Any]:
    seen = asked.generated[found.view]
    placed = Cameras(found.world_from_cam, asked.cameras.intrinsics, asked.cameras.height, asked.cameras.width)
    error = reprojection_distance(found.points[found.point[seen]], placed, found.pixels[seen], found.view[seen])
    all_distances = [x for pair, x in distances.items() if asked.generated[list(pair)].any()]
    everything = torch.cat([torch.empty(0).double(), *all_distances])
    return {
        "registered": found.world_from_cam[asked.generated, 0, 0].isfinite().double().mean().item(),
        "track_length": _number(track_lengths(found.point, seen).double().mean()),
        "reprojection": _number(error.mean()),
        "observations": int(seen.sum()) / len(rows),
        "sampson": _number(everything.median()) if len(everything) else None,
        "agreeing": sum(row["agreeing"] for row in rows.values()) / len(rows),
        "unmatched": sum(row["sampson"] is None for row in rows.values()),
    }


def _number(value: Tensor) -> float | None:
    number = value.item()
    return number if math.isfinite(number) else None


def _of_size(pictures: Iterator[Tensor], cameras: Cameras, ours: Frames) -> Iterator[Tensor]:
    for picture in pictures:
        height, width = picture.shape[1:]
        if (height, width) != (cameras.height, cameras.width):
            raise UserError(
                f"a picture of {ours.place} is {height}x{width} and its camera is for {cameras.height}x{cameras.width};"
                " resize it"
            )
        yield picture
