"""Pictures of any place, by name and one after the other: what `fvgen evaluate` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.scenes.formats import Scene, read_scene, scene_format
from fvgen.scenes.images import load_image
from fvgen.scenes.readers.photographs import VIDEOS, is_picture, video_frames
from fvgen.system.doors import there


@dataclass(frozen=True)
class Frames:
    """Named pictures, read one after the other: ``read`` gives [3, H, W] in [0, 1] each, in the order of ``names``.
    ``scene``: of a posed data set, whose views they are."""

    place: Path
    names: list[str]
    read: Callable[[], Iterator[Tensor]]
    scene: Scene | None = None


def open_frames(place: str | Path) -> Frames:
    """Of a folder of pictures, a data set (its views), or a video. Raises UserError."""
    path = Path(place)
    if not there(path):
        raise UserError(f"{path} does not exist; check the path")
    if path.suffix.lower() in VIDEOS:
        count = sum(1 for _ in video_frames(path))

        def decoded() -> Iterator[Tensor]:
            return (_tensor(pixels()) for pixels in video_frames(path))

        return Frames(path, [f"{k:05d}" for k in range(count)], decoded)
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a video; give a folder of pictures, a data set or a video")
    if scene_format(path):
        scene = read_scene(path)
        views = range(len(scene.image_paths))
        names = [file.stem for file in scene.image_paths]
        return Frames(path, names, lambda: (_tensor(scene.image(view)) for view in views), scene)
    files = sorted(file for file in path.iterdir() if is_picture(file))
    if not files:
        raise UserError(f"{path} holds no pictures; give a folder of pictures, a data set or a video")
    return Frames(path, [file.stem for file in files], lambda: (_tensor(load_image(file)) for file in files))


def matched(predicted: Frames, truth: Frames) -> list[str]:
    """The names under which pairs are listed: pictures match by name where all names do, else by their order. Raises
    UserError where neither is possible."""
    if predicted.names == truth.names:
        return predicted.names
    if len(predicted.names) == len(truth.names) and not set(predicted.names) & set(truth.names):
        return predicted.names
    only = sorted(set(predicted.names) ^ set(truth.names))
    if len(predicted.names) != len(truth.names):
        raise UserError(
            f"{predicted.place} has {len(predicted.names)} pictures, {truth.place} has {len(truth.names)}; give sets "
            "that match"
        )
    raise UserError(f"{predicted.place} and {truth.place} do not match: {only[0]} is in one of them; name them alike")


def _tensor(pixels: Any) -> Tensor:
    """uint8 [H, W, 3] to [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
