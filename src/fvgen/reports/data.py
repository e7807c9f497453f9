"""The clips that models are scored on, wherever they are: built-in ones, a folder of clips, prepared shards that kept
their frames, or scenes, photographs and videos, which are prepared first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.progress import Progress

from fvgen.clips.builtin import builtin_clips
from fvgen.clips.folder import ClipFolder
from fvgen.clips.views import capture_order
from fvgen.clips.worlds import WORLDS, is_builtin
from fvgen.errors import UserError
from fvgen.posing.chunks import SUFFIX
from fvgen.posing.sources import Source, find_sources, open_source
from fvgen.scenes.subset import write_subset
from fvgen.shards.prepare import prepare
from fvgen.shards.reader import ShardClips, ShardSet, holds_shards

BUILTIN_CLIPS = 16

Kind = Literal["builtin", "shards", "clips", "scenes"]
Clips = ClipFolder | ShardClips  # both have a length, `Clip`s by place, names, frames, height and width
T = TypeVar("T")


def kind_of(data: str | Path) -> Kind:
    """What a user's word for data means, told by its files without reading them. Raises UserError for nothing known."""
    if is_builtin(data):
        return "builtin"
    if holds_shards(data):
        return "shards"
    if (Path(data) / "index.json").exists() and not any(Path(data).glob(f"*{SUFFIX}")):  # pixelSplat has one, too
        return "clips"
    find_sources([data])
    return "scenes"


def open_clips(
    data: str | Path, prepared: str | Path, model: str, builtin: int = BUILTIN_CLIPS, **choices: Any
) -> Clips:
    """The clips of ``data`` with their pixels.

    Args:
        data: a word of `WORLDS` (the test split), or a path of any `kind_of`; shards may be at an address, too.
        prepared: a folder for the shards of scenes; what is there already is taken as it is.
        model: preset or folder of the model whose needs decide how scenes are prepared, see `render_needs`.
        builtin: how many of the built-in ones.
        choices: for scenes, of `fvgen.shards.prepare.prepare`.

    Raises UserError for data that are damaged, hold no pixels, or give no clip.
    """
    kind = kind_of(data)
    if kind == "builtin":
        return builtin_clips("test", builtin, world=WORLDS[str(data)])
    if kind == "clips":
        return ClipFolder(data)
    if kind == "scenes":
        data = prepare_scenes([data], prepared, teacher=model, keep_frames=True, **choices)
    return ShardSet(data).clips()


def prepare_scenes(sources: Sequence[str | Path], out: str | Path, **choices: Any) -> Path:
    """`prepare` with a bar, and a line on stderr for each scene or clip that was skipped; returns ``out``."""
    with Progress() as bar:
        task = bar.add_task(f"clips for {Path(out).name}", total=None)
        tally = prepare(
            sources, out, on_progress=lambda done, total: bar.update(task, completed=done, total=total), **choices
        )
    for entry in tally.skipped:
        print(f"fvgen: skipped {entry.name}: {entry.reason}", file=sys.stderr)
    return Path(out)


def split(scenes: Sequence[T]) -> tuple[list[T], list[T]]:
    """(train, held out): every fourth of two or more scenes is held out, at least one, beginning with the second."""
    train = [scene for index, scene in enumerate(scenes) if index % 4 != 1]
    return train, list(scenes[1::4])


def split_views(source: Source, frames: int, folder: Path) -> tuple[Source, Source]:
    """(train, held out) of a single scene: the last quarter of its photographs in the order of their names, at least
    ``frames``, is held out, so that what judges shows places that no clip to train on ends in.

    Raises UserError for a scene of fewer than 2 ``frames``.
    """
    scene = open_source(source.path).scene
    if len(scene) < 2 * frames:
        raise UserError(
            f"the one scene {source.name} has {len(scene)} photographs with poses, of which clips of {frames} frames "
            f"cannot hold any back; give {2 * frames} or more, another scene with --held-out, or a folder of scenes"
        )
    order = capture_order(scene)
    held = max(frames, len(scene) // 4)
    parts = {"train": order[:-held], "held-out": order[-held:]}
    made = [Source(f"{source.name}-{name}", write_subset(scene, views, folder / name)) for name, views in parts.items()]
    return made[0], made[1]
