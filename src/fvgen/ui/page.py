"""What stands on the page, and which answer belongs to which button. Imports Gradio; `fvgen.ui.serve` sets its
environment first."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from fvgen.ui import parts
from fvgen.ui.answers import BOTH, Answers, Asked, State
from fvgen.ui.examples import EXAMPLES, photographs_of_example
from fvgen.ui.order import USUAL
from fvgen.walks.paths import FROM_ONE, THROUGH

MOST_WAITING = 200  # jobs in the queue; beyond, visitors are told that it is full


def build(answers: Answers, jobs: int) -> gr.Blocks:
    """The page, not yet served; ``jobs`` are at work at once."""
    limits, many = answers.limits, len(answers.models) > 1
    with gr.Blocks(title="fvgen", analytics_enabled=False) as page:
        gr.HTML(parts.INTRO, elem_id="intro")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                files = gr.File(
                    label=f"Photographs, 2 to {limits.photographs}", file_count="multiple", height=210,
                    elem_id="photographs",
                )  # fmt: skip
                gr.HTML(parts.kinds(limits.file_bytes))
                tries = {name: gr.Button(f"Try {name}", size="sm", elem_classes="try") for name in EXAMPLES}
                with gr.Row():
                    path = gr.Dropdown([USUAL, THROUGH, *FROM_ONE], value=USUAL, label="Path", min_width=140)
                    amount = gr.Number(0, label="How far", min_width=140, visible=False)
                with gr.Row():
                    steps = gr.Number(0, label="Steps (0: the model's own)", precision=0, minimum=0, min_width=140)
                    names = [BOTH, *answers.models] if many else list(answers.models)
                    which = gr.Dropdown(names, value=names[0], label="Models", min_width=140, visible=many)
                scene = gr.Checkbox(label="Fit a 3D scene at the end (a minute or more)", elem_id="scene")
                with gr.Accordion("Size, length, seed", open=False):
                    with gr.Row():
                        height = gr.Number(0, label="Height (0: the model's)", precision=0, minimum=0, min_width=120)
                        width = gr.Number(0, label="Width (0: the model's)", precision=0, minimum=0, min_width=120)
                    with gr.Row():
                        frames = gr.Number(0, label="Frames (0: as needed)", precision=0, minimum=0, min_width=120)
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
                with gr.Row():
                    look = gr.Button("Look", min_width=90, elem_id="look")
                    make = gr.Button("Generate", variant="primary", min_width=90, elem_id="generate")
                    cancel = gr.Button("Cancel", variant="stop", min_width=90, elem_id="cancel")
            with gr.Column(scale=3, min_width=320):
                nothing = parts.told("Nothing yet: drop photographs, or try an example.")
                status = gr.HTML(nothing, elem_id="status")
                result = gr.HTML("", elem_id="result")
                seen = gr.HTML("", elem_id="seen")

        def on_look(request: gr.Request, *asked):
            yield from shown(answers.look(request.session_hash, Asked(*asked)))

        def on_make(request: gr.Request, *asked):
            yield from shown(answers.make(request.session_hash, Asked(*asked)))

        def on_cancel(request: gr.Request):
            return answers.stop(request.session_hash)

        def on_files(request: gr.Request, files):
            return answers.judge(request.session_hash, files)

        def on_leave(request: gr.Request):
            answers.sessions.close(request.session_hash)

        asked = [files, path, amount, steps, which, scene, height, width, frames, seed]
        work = {"concurrency_id": "work", "concurrency_limit": jobs, "show_progress_on": status}
        looking = look.click(on_look, asked, [status, seen], api_name="look", scroll_to_output=True, **work)
        making = make.click(on_make, asked, [status, result], api_name="generate", scroll_to_output=True, **work)
        cancel.click(on_cancel, None, [status], cancels=[looking, making], queue=False, api_name="cancel")
        hidden = {"queue": False, "show_progress": "hidden"}
        files.change(on_files, [files], [status], api_name="judge", **hidden)
        path.change(how_far, [path], [amount], api_visibility="private", **hidden)
        for name, button in tries.items():
            place = answers.sessions.root / "examples"
            button.click(
                lambda name=name, place=place: list(map(str, photographs_of_example(name, place))),
                None, [files], api_visibility="private", concurrency_id="examples", concurrency_limit=1,
            )  # fmt: skip
        page.unload(on_leave)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=4, api_open=False)
    return page


def shown(states: Iterator[State]) -> Iterator[tuple]:
    """Nothing new leaves what is there."""
    for status, made in states:
        yield status, gr.skip() if made is None else made


def how_far(path: str) -> gr.Number:
    """The field for a path's amount, where it has one."""
    row = FROM_ONE.get(path)
    label = f"How far, {row.unit} (0: {row.amount:g})" if row else "How far"
    return gr.Number(0, label=label, visible=row is not None)
