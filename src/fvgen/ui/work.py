"""What the page does, in a process of its own: it calls the functions behind `fvgen generate`, and decides nothing.

A visitor's folder holds ``photographs``, ``look`` (the path before anything is generated) and one folder for each
choice of settings, so that a walk that was cancelled goes on where it was when the same is asked for again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import fvgen.splats  # noqa: F401 (imported by `generate` where a scene is asked for: seconds that can be spent before)
from fvgen.system.files import atomic_path, new_folder, remove
from fvgen.ui.look import write_look
from fvgen.ui.order import Order, Send
from fvgen.ui.results import pack, write_comparison
from fvgen.walks.chain import SEAM
from fvgen.walks.film import judge_film, write_film
from fvgen.walks.run import FPS, VIEWS, Choices, generate, judge_choices, load_walker, plan_walk, walk_needs


def look(send: Send, folder: Path, order: Order) -> None:
    """Poses, points, path and renders of the first model, as ``look/look.html`` and ``look/render.mp4``."""
    _enter(folder)
    paths = [Path(name) for name in order.photographs]
    numbers = (order.frames, order.steps, order.size, order.seed)
    choices = Choices(order.models[0][1], order.trajectory, *numbers, "auto", VIEWS, SEAM, None)
    judge_choices(paths, choices, order.device)
    judge_film()
    needs = walk_needs(load_walker(choices.model, order.device), choices)
    plan = plan_walk(paths, choices, needs, lambda line: send("told", line), {})
    if plan.warning:
        send("told", f"warning: {plan.warning}")
    with atomic_path("look") as temporary:
        new_folder(temporary)
        write_look(temporary / "look.html", plan)
        write_film(temporary / "render.mp4", plan.rendered.frames, FPS)


def make(send: Send, folder: Path, order: Order) -> None:
    """`generate` with every model, a page to compare the films, and all of it as ``walk.zip``."""
    _enter(folder)
    place = Path(order.folder)
    for other in Path().glob("[0-9a-f]" * 12):
        if other != place:
            remove(other)
    for name, model in order.models:
        send("model", name)
        generate(
            [Path(path) for path in order.photographs],
            place / name,
            model=model,
            trajectory=order.trajectory,
            frames=order.frames,
            steps=order.steps,
            size=order.size,
            seed=order.seed,
            scene=order.scene,
            device=order.device,
            told=lambda line: send("told", line),
            on_progress=lambda done, total: send("step", "clips", done, total),
            on_fit=lambda done, total: send("step", "steps of the fit", done, total) if done % 10 == 0 else None,
        )
    write_comparison(place, [name for name, _ in order.models], FPS)
    pack(place)


def _enter(folder: Path) -> None:
    """Everything that is written on the way stays in the visitor's folder: poses that are kept for later, temporary
    files. Paths in run.json do not tell where that is."""
    os.chdir(folder)
    tempfile.tempdir = str(new_folder(folder / "tmp"))
    os.environ["FVGEN_CACHE"] = str(folder / "cache")
