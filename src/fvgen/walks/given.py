"""What a walk starts from: 1 to `MOST` photographs, a folder of them, a video, or a posed scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fvgen.clips.views import capture_order
from fvgen.depth.depth_pro import lacks as lacks_depth_pro
from fvgen.depth.dust3r_model import missing as lacks_dust3r
from fvgen.errors import UserError
from fvgen.posing.chunks import in_chunk
from fvgen.posing.sources import open_photographs, open_source, the_scene_of
from fvgen.scenes.formats import find_scenes, scene_format
from fvgen.scenes.readers.photographs import VIDEOS, Photographs, holds_photographs, photographs_of, read_photographs
from fvgen.scenes.scene import Scene

MOST = 50  # photographs without poses: COLMAP compares all with all


@dataclass(frozen=True)
class Given:
    """scene: the photographs with poses. format: of `fvgen.posing.sources.Opened`. order: its views as they were
    given, or by file name. left_out: photographs that have no part in it, and why."""

    scene: Scene
    format: str
    order: list[int]
    left_out: dict[str, str]


def hold_out(given: Given, count: int) -> tuple[Given, list[int]]:
    """Without ``count`` photographs, evenly chosen between the first and the last, and which views those are: they are
    posed with the others and give nothing else. Raises UserError where fewer than two would be left."""
    order = given.order
    if count > len(order) - 2:
        raise UserError(f"--holdout {count} of {len(order)} photographs leaves fewer than two; hold out fewer")
    step = (len(order) - 1) / (count + 1)
    held = sorted({round((k + 1) * step) for k in range(count)})
    return replace(given, order=[v for k, v in enumerate(order) if k not in held]), [order[k] for k in held]


def judge(paths: Sequence[str | Path]) -> None:
    """Raises UserError for what cannot be given, before anything is posed, from names and headers alone."""
    _photographs(paths)


def open_given(paths: Sequence[str | Path], points: str = "auto") -> Given:
    """Read, and pose what has no poses (kept in fvgen's cache). ``points``: see `point_maps`; "dust3r" also poses.

    Raises UserError for anything wrong with them.
    """
    photographs = _photographs(paths)
    if photographs is None:
        opened = open_source(paths[0], points)
    else:
        if len(photographs) == 1 and points != "flat" and (lack := _lacks_single()):
            raise UserError(lack)
        whole = len(paths) == 1 and Path(paths[0]).is_dir()
        opened = open_source(paths[0], points) if whole else open_photographs(paths, points)
    order = capture_order(opened.scene)
    left_out = dict(opened.left_out)
    if photographs is not None:
        left_out |= {path.name: "the same bytes as another photograph" for path in photographs.duplicates}
        # The copy of a photograph keeps its name or gets a suffix (`copy_photograph`).
        names = [path.name for path in photographs.image_paths]
        views = {path.name: view for view, path in enumerate(opened.scene.image_paths)}
        order = [views[stored] for name in names for stored in (name, f"{name}.png") if stored in views]
    return Given(opened.scene, opened.format, order, left_out)


def _photographs(paths: Sequence[str | Path]) -> Photographs | None:
    """The photographs without poses that the paths name; None for a posed scene or a video."""
    files = [Path(path) for path in paths]
    if not files:
        raise UserError("no photographs were given; name 1 to 50 of them, a folder of them, a video or a posed scene")
    if len(files) == 1 and in_chunk(files[0]):
        the_scene_of(files[0])
        return None
    for file in files:
        if not file.exists():
            raise UserError(f"photograph {file} does not exist; check the path")
    if len(files) > 1 and (wrong := [file for file in files if file.is_dir() or file.suffix.lower() in VIDEOS]):
        raise UserError(f"{wrong[0]} is no photograph; give one folder or one video alone, or photographs only")
    if files[0].is_dir():
        if scene_format(files[0]) or not (holds_photographs(files[0]) or (files[0] / "images").is_dir()):
            if not scene_format(files[0]):
                scenes = find_scenes(files[0])
                raise UserError(f"{files[0]} holds {len(scenes)} scenes; give one of them, such as {scenes[0]}")
            return None
        photographs = read_photographs(files[0])
    elif files[0].suffix.lower() in VIDEOS:
        return None
    else:
        photographs = photographs_of(files, files[0].resolve().parent.name or "photographs")
    if len(photographs) + len(photographs.duplicates) > MOST:
        count = len(photographs) + len(photographs.duplicates)
        raise UserError(
            f"{count} photographs without poses are more than {MOST}; give fewer, or pose them with COLMAP first"
        )
    if len(photographs) == 1 and photographs.duplicates:
        raise UserError(f"the photographs of {photographs.name} are identical; take the second one from another place")
    return photographs


def lacks_depth(paths: Sequence[str | Path]) -> bool:
    """Whether this is one photograph, and nothing here can tell its depth."""
    photographs = _photographs(paths)
    return photographs is not None and len(photographs) == 1 and _lacks_single() is not None


def _lacks_single() -> str | None:
    """Why one photograph will not do here, or None."""
    if lacks_dust3r() is None or lacks_depth_pro(None) is None:
        return None
    return (
        "one photograph tells no depth by itself; give a second one taken from another place, or bring Depth Pro "
        "(FVGEN_DEPTH_PRO names its folder, or FVGEN_DOWNLOAD=1 fetches apple/DepthPro-hf) or DUSt3R (FVGEN_DUST3R)"
    )
