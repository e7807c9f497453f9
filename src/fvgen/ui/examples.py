"""Photographs to try the page with: of built-in rooms, so that nobody's licence is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from fvgen.clips.rooms import make_scene, render_scene, scene_generator
from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.system.files import atomic_path, new_folder
from fvgen.walks.dataset import save_png

HEIGHT, WIDTH = 240, 320


class Example(NamedTuple):
    """A room of the test split by its number; positions and targets of its photographs, metres."""

    room: int
    positions: tuple[tuple[float, float, float], ...]
    targets: tuple[tuple[float, float, float], ...]


EXAMPLES = {
    "a room, two photographs": Example(3, ((-1.6, -0.9, 1.4), (-1.2, -1.25, 1.5)), ((0.8, 0.9, 1.0), (0.9, 0.8, 1.0))),
}


def photographs_of_example(name: str, folder: Path) -> list[Path]:
    """PNG files of an example, made in ``folder`` where they are not there yet."""
    example, place = EXAMPLES[name], folder / f"room-{EXAMPLES[name].room}-{len(EXAMPLES[name].positions)}"
    if not place.is_dir():
        count = len(example.positions)
        up = torch.tensor([0.0, 0.0, 1.0])
        poses = look_at(torch.tensor(example.positions), torch.tensor(example.targets), up)
        cameras = Cameras(poses, pinhole(count, HEIGHT, WIDTH, 64), HEIGHT, WIDTH)
        images, _ = render_scene(make_scene(scene_generator("test", 0, example.room), "room"), cameras)
        with atomic_path(place) as temporary:
            new_folder(temporary)
            for number, image in enumerate(images, 1):
                save_png(temporary / f"room-{number}.png", image)
    return sorted(place.iterdir())
