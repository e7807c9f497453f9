"""Real scenes to a folder of prepared clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from fvgen.clips.clip import Clip, ClipFolder, make_clip, save_clips
from fvgen.clips.photographed import scene_clips
from fvgen.clips.rooms import RADIUS
from fvgen.errors import UserError
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
            for photo in scene_clips(scene, per_scene, frames, height, width, seed, half_pixel_shift):
                clips.append(make_clip(*photo, RADIUS))
        save_clips(out, clips, source)
    folder = ClipFolder(out)
    found = (folder.index.get("source"), len(folder), folder.frames, folder.height, folder.width)
    if found != (source, per_scene * len(scenes), frames, height, width):
        raise UserError(f"{out} holds clips of other scenes or settings; delete it or choose another folder")
    return folder
