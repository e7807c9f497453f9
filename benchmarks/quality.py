"""PSNR, SSIM, LPIPS, FID and seconds per clip of any models on the same clips, wherever these come from.

    python benchmarks/quality.py --model DIR [DIR ...] --data DATA [--few-steps N] [--steps N] [--guidance G]
        [--clips N] [--first K] [--seed S] [--device D] [--prepared DIR] [--size HxW] [--frames F]

What is measured: every frame of every clip that the point cloud was not made from, against the photograph; seconds are
medians over clips of what a user waits for: encoding the render, sampling, decoding. Why: the one number that a user
compares, for teachers, students, or any stage in between. All models see the same clips and the same noise, one model
in memory at a time.

--data takes prepared shards that kept their frames (a folder, s3://...), a folder of clips, the word builtin, or
scenes, photographs and videos, which are prepared into --prepared as the first model needs them. --few-steps also
scores each teacher untrained in so many steps, in every way that `fvgen demo` tries. The last line is JSON.
"""

from __future__ import annotations

import json
from typing import Any

from fvgen.calls import existing, numbers
from fvgen.clips.worlds import is_builtin
from fvgen.errors import UserError
from fvgen.system.command import Parser, guarded, positive


def score_model(model: str, clips: list, args: Any) -> list[dict]:
    """Its row, and with --few-steps those of a teacher's ways; each names the model."""
    from fvgen.pipelines.base import NovelViewPipeline
    from fvgen.pipelines.folders import load_pipeline
    from fvgen.pipelines.teacher import TeacherPipeline
    from fvgen.reports.evaluate import evaluate, few_step_teachers, score, student_contestant, teacher_contestant

    pipeline = load_pipeline(model, NovelViewPipeline).to(args.device)
    if isinstance(pipeline, TeacherPipeline):
        contestants = {"": teacher_contestant(pipeline, args.steps, args.guidance)}
        for steps in args.few_steps:
            ways = few_step_teachers(pipeline, steps)
            contestants |= {(steps, way): contestant for way, contestant in ways.items()}
    else:
        if args.steps:
            pipeline.register_to_config(steps=args.steps)
        contestants = {"": student_contestant(pipeline)}
    results = evaluate(contestants, clips, pipeline, args.seed)
    ways = {key: {"way": key[1]} if key else {} for key in results}
    return [{"model": model, **ways[key], **score(result, clips)} for key, result in results.items()]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, nargs="+", help="model folders, or names of shipped presets")
    parser.add_argument("--data", required=True, help="shards with frames, clips, scenes, or builtin")
    parser.add_argument("--prepared", default="runs/quality-clips", help="where scenes are prepared")
    parser.add_argument("--size", help="of clips made from scenes, HEIGHTxWIDTH; the first model's own if not given")
    parser.add_argument("--frames", type=positive, help="the same, number of frames")
    parser.add_argument("--steps", type=positive, help="sampling steps; the model's own if not given")
    parser.add_argument(
        "--few-steps", type=positive, nargs="+", default=[], metavar="N", help="also untrained in so many"
    )
    parser.add_argument("--guidance", type=float, help="of a teacher; its own if not given")
    parser.add_argument("--clips", type=positive, help="at most this many clips")
    parser.add_argument("--first", type=int, default=0, help="the clip to begin with: built-in 0 to 15 chose settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    existing(args.data)
    size = numbers(args.size, "x", "size", "320x512") if args.size else None

    import torch  # this and what follows takes seconds to import

    from fvgen.pipelines.folders import check_device
    from fvgen.pipelines.presets import model_folder
    from fvgen.reports.data import BUILTIN_CLIPS, kind_of, open_clips
    from fvgen.reports.evaluate import score_renders
    from fvgen.shards.encoders import load_encoders

    kind_of(args.data)
    for model in args.model:
        model_folder(model)
    check_device(args.device)
    if args.first < 0:
        raise UserError(f"--first {args.first} is below 0; give the number of a clip")
    choices = {"size": size, "frames": args.frames, "device": args.device}
    if is_builtin(args.data):
        choices["builtin"] = max(BUILTIN_CLIPS, args.first + (args.clips or 1))
    found = open_clips(args.data, args.prepared, args.model[0], **choices)
    for model in args.model:  # before hours are spent on another one
        load_encoders(model).check_clip(found.frames, found.height, found.width)
    chosen = range(len(found))[args.first :][: args.clips]
    if not chosen:
        raise UserError(f"--first {args.first} leaves none of {len(found)} clips; give a smaller one")
    clips = [found[index] for index in chosen]
    render = score_renders(clips)
    told("render", render)
    rows = []
    for model in args.model:
        for row in score_model(model, clips, args):
            told(" by ".join(row[key] for key in ("model", "way") if key in row), row)
            rows.append(row)
    facts = {
        "data": args.data,
        "clips": len(clips),
        "first": args.first,
        "frames": found.frames,
        "height": found.height,
    }
    facts |= {"width": found.width, "seed": args.seed, "device": args.device, "torch": torch.__version__}
    print(json.dumps({**facts, "render": render, "models": rows}))


def told(name: str, row: dict) -> None:
    """A row for the eye."""
    silent = ("why_null", "model", "way")
    print(name, {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items() if key not in silent})


if __name__ == "__main__":
    guarded(main)
