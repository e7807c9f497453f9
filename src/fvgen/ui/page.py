"""The page: what stands on it, and what happens when something is pressed. Imports Gradio; `fvgen.ui.serve` sets its
environment first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from fvgen.errors import UserError
from fvgen.ui import order, parts
from fvgen.ui.examples import EXAMPLES, photographs_of_example
from fvgen.ui.limits import Limits, judge_uploads
from fvgen.ui.order import USUAL, Order
from fvgen.ui.sessions import Sessions, take_photographs
from fvgen.walks.paths import FROM_ONE, THROUGH

BOTH = "both"
MOST_WAITING = 200  # jobs in the queue; beyond, visitors are told that it is full
LAST_LINES = 8  # of what a job says


@dataclass(frozen=True)
class Settings:
    """models: folder or preset by name, "walk" alone or "student" and "teacher". jobs: at work at once."""

    models: dict[str, str]
    device: str
    limits: Limits
    jobs: int


def build(settings: Settings, sessions: Sessions) -> gr.Blocks:
    """The page, not yet served."""
    limits = settings.limits
    with gr.Blocks(title="fvgen", analytics_enabled=False, delete_cache=None) as page:
        gr.HTML(parts.INTRO, elem_id="intro")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                files = gr.File(
                    file_count="multiple", height=210, elem_id="photographs",
                    label=f"Photographs, 2 to {limits.photographs}",
                )  # fmt: skip
                gr.HTML(parts.kinds(limits.file_bytes))
                tries = [(name, gr.Button(f"Try {name}", size="sm")) for name in EXAMPLES]
                with gr.Row():
                    path = gr.Dropdown([USUAL, THROUGH, *FROM_ONE], value=USUAL, label="Path", min_width=140)
                    amount = gr.Number(0, label="How far", min_width=140, visible=False, elem_id="amount")
                with gr.Row():
                    steps = gr.Number(0, label="Steps (0: the model's own)", precision=0, minimum=0, min_width=140)
                    which = gr.Dropdown(
                        [BOTH, *settings.models], value=BOTH, label="Models", min_width=140,
                        visible=len(settings.models) > 1,
                    )  # fmt: skip
                scene = gr.Checkbox(label="Fit a 3D scene at the end (a minute or more)")
                with gr.Accordion("Size, length, seed", open=False):
                    with gr.Row():
                        height = gr.Number(0, label="Height (0: the model's)", precision=0, minimum=0, min_width=120)
                        width = gr.Number(0, label="Width (0: the model's)", precision=0, minimum=0, min_width=120)
                    with gr.Row():
                        frames = gr.Number(0, label="Frames (0: as needed)", precision=0, minimum=0, min_width=120)
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
                with gr.Row():
                    look = gr.Button("Look first", min_width=100, elem_id="look")
                    make = gr.Button("Generate", variant="primary", min_width=100, elem_id="generate")
                    cancel = gr.Button("Cancel", variant="stop", min_width=100, elem_id="cancel")
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(parts.told("Nothing yet: drop photographs, or try an example."), elem_id="status")
                result = gr.HTML("", elem_id="result")
                seen = gr.HTML("", elem_id="seen")
        asked = [files, path, amount, steps, which, scene, height, width, frames, seed]

        def order_of(session, files, path, amount, steps, which, scene, height, width, frames, seed) -> Order:  # noqa: PLR0913
            names = list(settings.models) if which == BOTH or len(settings.models) == 1 else [which]
            if any(name not in settings.models for name in names):
                raise UserError("there is no such model here; choose one of the list")
            trajectory = order.path_words(path, amount or None)
            size, number = order.frame_size(height or None, width or None, limits.frame_pixels), order.seed_of(seed)
            photographs = take_photographs(session, [Path(file) for file in files or []], sessions.uploads, limits)
            models = tuple((name, settings.models[name]) for name in names)
            return Order(
                tuple(map(str, photographs)), models, trajectory, frames or None, steps or None, size, number, bool(scene),
                settings.device,
            )  # fmt: skip

        def run(call: Callable[..., None], finished: Callable, verb: str, request: gr.Request, asked: Sequence):
            """Yields (state, what was made): a generator for both buttons."""
            lines: list[str] = []
            try:
                session = sessions.of(request.session_hash)
                wanted = order_of(session, *asked)
                yield parts.told(f"{verb} ..."), gr.skip()
                with sessions.job(session, call, session.folder, wanted) as running:
                    for message in follow(running.messages(60 * limits.minutes), lines, verb):
                        if isinstance(message, tuple):
                            break
                        yield message, gr.skip()
                if message[0] == "done":
                    yield parts.told("Done.", lines), finished(session, wanted)
                elif message[0] == "stopped":
                    yield parts.told("Cancelled.", lines), gr.skip()
                else:
                    yield parts.refused(message[1], lines), gr.skip()
            except UserError as error:
                yield parts.refused(str(error), lines), gr.skip()

        def look_at(request: gr.Request, *asked):
            yield from run(order.look, show_look, "Looking", request, asked)

        def generate(request: gr.Request, *asked):
            yield from run(order.make, show_walk, "Generating", request, asked)

        def stop(request: gr.Request) -> str:
            sessions.stop(request.session_hash)
            return parts.told("Cancelled. The same settings again go on where this was.")

        def leave(request: gr.Request) -> None:
            sessions.close(request.session_hash)

        def judge(files: list[str] | None, request: gr.Request) -> str:
            try:
                session = sessions.of(request.session_hash)
                session.uploads |= {Path(file) for file in files or []}
                names = judge_uploads([Path(file) for file in files or []], sessions.uploads, limits)
            except UserError as error:
                return parts.refused(str(error))
            return parts.told(f"{len(names)} photographs. Look first, or generate at once.")

        def how_far(path: str) -> gr.Number:
            row = FROM_ONE.get(path)
            label = f"How far, {row.unit} (0: {row.amount:g})" if row else "How far"
            return gr.Number(0, label=label, visible=row is not None)

        one_at_a_time = {
            "concurrency_id": "work", "concurrency_limit": settings.jobs, "show_progress_on": status,
            "scroll_to_output": True,
        }  # fmt: skip
        path.change(how_far, [path], [amount], queue=False, show_progress="hidden", api_visibility="private")
        looking = look.click(look_at, asked, [status, seen], api_name="look", **one_at_a_time)
        making = make.click(generate, asked, [status, result], api_name="generate", **one_at_a_time)
        cancel.click(stop, None, [status], cancels=[looking, making], queue=False, api_name="cancel")
        files.change(judge, [files], [status], queue=False, show_progress="hidden", api_name="judge")
        for name, button in tries:
            button.click(
                lambda name=name: [str(file) for file in photographs_of_example(name, sessions.root / "examples")],
                None, [files], api_name="example", concurrency_limit=1,
            )  # fmt: skip
        page.unload(leave)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=4, api_open=False)
    return page


def follow(messages: Iterator[tuple | None], lines: list[str], verb: str) -> Iterator[str | tuple]:
    """HTML while a job goes on, with what it says added to ``lines``; then its last message."""
    begun, done, total, model = time.monotonic(), 0, 0, ""
    for message in messages:
        kind = message[0] if message else None
        if kind in ("done", "refused", "failed", "stopped"):
            yield message
            return
        if kind == "told":
            lines[:] = [*lines, message[1]][-LAST_LINES:]
        elif kind == "clips":
            done, total = message[1:]
        elif kind == "model":
            model, done, total = ("" if message[1] == "walk" else f", {message[1]}"), 0, 0
        clips = f", clip {done} of {total}" if total else ""
        yield parts.told(f"{verb}{model}{clips}: {time.monotonic() - begun:.0f} s", lines, done, total)
    yield ("stopped",)


def show_look(session, wanted: Order) -> str:
    return parts.looked(f"walks/{session.token}", str(time.time_ns()))


def show_walk(session, wanted: Order) -> str:
    names = [name for name, _ in wanted.models]
    place = session.folder / wanted.folder
    scenes = [name for name in names if (place / name / "scene.html").is_file()]
    return parts.made(f"walks/{session.token}", wanted.folder, names, scenes, (place / "walk.zip").stat().st_size)
