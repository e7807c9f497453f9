"""What a visitor asks for. Nothing heavy is imported here: jobs run elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from fvgen.errors import UserError, short
from fvgen.walks.paths import FROM_ONE, THROUGH

Send = Callable[..., None]
USUAL = "the usual one"  # through two or more photographs, round one


@dataclass(frozen=True)
class Order:
    """What a visitor asks for; see `fvgen.walks.run.generate`. photographs: paths below the visitor's folder. models:
    a folder or preset by its name on the page, "walk" alone, or "student" and "teacher"."""

    photographs: tuple[str, ...]
    models: tuple[tuple[str, str], ...]
    trajectory: str | None
    frames: int | None
    steps: int | None
    size: tuple[int, int] | None
    seed: int
    scene: bool
    device: str

    @property
    def folder(self) -> str:
        """The name of the folder for what is made of it. A scene is fitted to a walk that is there already."""
        facts = {name: value for name, value in asdict(self).items() if name != "scene"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def path_words(name: str, amount: float | None) -> str | None:
    """A path as `--trajectory` has it, or None for the usual one. Only presets: a path's file would be one of this
    machine's. Raises UserError for a name that is none."""
    if name == USUAL:
        return None
    if name not in (THROUGH, *FROM_ONE):
        raise UserError(f"there is no path {short(name)}; choose one of the list")
    return name if amount is None or name == THROUGH else f"{name}:{amount:g}"


def frame_size(height: int | None, width: int | None, most: int) -> tuple[int, int] | None:
    """None: the model's own. Raises UserError for half a size, and for one of more than ``most`` pixels."""
    if height is None and width is None:
        return None
    if height is None or width is None or min(height, width) < 2:
        raise UserError("a size is a height and a width of at least 2; give both, or none for the model's own")
    if height * width > most:
        raise UserError(f"{height}x{width} has more than {most} pixels, the most that is made here; ask for less")
    return height, width


def seed_of(number: int | None) -> int:
    """0 where none is given. Raises UserError beyond what `--seed` takes."""
    if number is not None and not 0 <= number < 2**32:
        raise UserError(f"seed {number} is not possible; give 0 to {2**32 - 1}")
    return number or 0
