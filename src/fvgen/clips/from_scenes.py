"""Real scenes to a folder of prepared clips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import track

from fvgen.clips.clip import Clip, render_clip
from fvgen.clips.folder import ClipFolder, save_clips
from fvgen.clips.from_scene import photographs
from fvgen.clips.views import choose_views
from fvgen.depth.maps import scene_cloud
from fvgen.errors import UserError
from fvgen.geometry.pointcloud import point_radius
from fvgen.scenes.formats import find_scenes, read_scene
from fvgen.scenes.scene import Scene


def read_scenes(folder: str | Path) -> list[Scene]:
    """All scenes below ``folder``, read and checked; raises UserError for the first thing wrong with any of them."""
    return [read_scene(path) for path in find_scenes(folder)]


def split_scenes(scenes: Sequence[Scene]) -> tuple[list[Scene], list[Scene]]:
    """(train, held out): every fourth scene is held out, at least one, beginning with the second.

    Raises UserError for a single scene: what the student has seen cannot judge it.
    """
    if len(scenes) < 2:
        raise UserError("one scene cannot be split into training and held-out scenes; give a folder with two or more")
    train = [scene for index, scene in enumerate(scenes) if index % 4 != 1]
    return train, list(scenes[1::4])


def prepare_scenes(
    scenes: Sequence[Scene],
    out: str | Path,
    per_scene: int,
    frames: int,
    height: int,
    width: int,
    seed: int = 0,
    half_pixel_shift: bool = False,
) -> ClipFolder:
    """``per_scene`` clips of each scene, first and last photograph known, written to ``out``; kept if already there.

    ``half_pixel_shift`` is for a published ViewCrafter teacher: see `unproject`.
    Raises UserError when ``out`` holds clips of other scenes, sizes or seeds.
    """
    source = {"kind": "photographs", "scenes": [scene.name for scene in scenes], "seed": seed}
    if half_pixel_shift:
        source["half_pixel_shift"] = True
    if not (Path(out) / "index.json").exists():
        clips: list[Clip] = []
        for scene in track(scenes, "photographs"):
            clips += clips_by_pose(scene, per_scene, frames, height, width, seed, half_pixel_shift)
        save_clips(out, clips, source)
    folder = ClipFolder(out)
    found = (folder.index.get("source"), len(folder), folder.frames, folder.height, folder.width)
    if found != (source, per_scene * len(scenes), frames, height, width):
        raise UserError(f"{out} holds clips of other scenes or settings; delete it or choose another folder")
    return folder


def clips_by_pose(
    scene: Scene, count: int, frames: int, height: int, width: int, seed: int, half_pixel_shift: bool = False
) -> Iterator[Clip]:
    """``count`` different clips of a scene, named NAME-00 and so on; the same seed gives the same clips.

    The cloud of each comes from its first and last frame: see `scene_cloud`, and `unproject` for the shift.
    Raises UserError when the scene has too few views, or neither depth maps nor points.
    """
    generator, known = torch.Generator().manual_seed(seed), (0, frames - 1)
    for index, views in enumerate(choose_views(scene, frames, count, generator)):
        truth, cameras = photographs(scene, views, height, width)
        cloud = scene_cloud(scene, [views[frame] for frame in known], truth[list(known)], half_pixel_shift)
        name = f"{scene.name}-{index:02d}"
        yield render_clip(name, truth, cameras, *cloud, known, point_radius(height, width))[0]
