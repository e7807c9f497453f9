"""PSNR, SSIM, LPIPS, FID and seconds per clip of any model folder on any prepared clips.

    python benchmarks/quality.py --model DIR --data DIR [--steps N] [--guidance G] [--clips N] [--seed S] [--device D]

What is measured: every frame of every clip that the point cloud was not made from, against the photograph; seconds are
the median over clips of sampling and decoding. Why: the one number that a user compares, for a teacher, a student, or
any stage in between. --data takes a folder of prepared clips, a folder of real scenes (prepared at the size of the
tiny preset into --prepared), or the word builtin. The last line is JSON.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from fvgen.cli import Parser, guarded, positive
from fvgen.clips.builtin import FRAMES, HEIGHT, WIDTH, builtin_clips
from fvgen.clips.folder import ClipFolder
from fvgen.clips.from_scenes import prepare_scenes, read_scenes
from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline
from fvgen.pipelines.folders import check_device, load_pipeline, model_folder, model_kind
from fvgen.reports.evaluate import Contestant, evaluate, score, score_renders, student_contestant


def clip_folder(data: str, prepared: str) -> ClipFolder:
    """Prepared clips from a folder of them, of real scenes, or from the built-in test scenes."""
    if data == "builtin":
        return builtin_clips("test", 16)
    if (Path(data) / "index.json").exists() or not Path(data).is_dir():
        return ClipFolder(data)
    return prepare_scenes(read_scenes(data), prepared, 8, FRAMES, HEIGHT, WIDTH)


def contestant(model: str, steps: int | None, guidance: float | None, device: str) -> tuple:
    """The pipeline and how to sample from it."""
    if model_kind(model_folder(model)) == "ViewCrafterPipeline":
        teacher = load_pipeline(model, ViewCrafterPipeline).to(device)
        steps = steps or teacher.config.steps
        sample = partial(teacher.sample, num_inference_steps=steps, guidance_scale=guidance)
        return teacher, Contestant(sample, steps, steps * teacher.teacher(guidance).nfe)
    student = load_pipeline(model, FVGenPipeline).to(device)
    if steps:
        student.register_to_config(steps=steps)
    return student, student_contestant(student)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="a model folder, or the name of a shipped preset")
    parser.add_argument("--data", required=True, help="prepared clips, real scenes, or builtin")
    parser.add_argument("--prepared", default="runs/quality-clips", help="where real scenes are prepared")
    parser.add_argument("--steps", type=positive, help="sampling steps; the model's own if not given")
    parser.add_argument("--guidance", type=float, help="of a teacher; its own if not given")
    parser.add_argument("--clips", type=positive, help="at most this many clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    check_device(args.device)
    pipeline, chosen = contestant(args.model, args.steps, args.guidance, args.device)
    folder = clip_folder(args.data, args.prepared)
    clips = [folder[index] for index in range(min(len(folder), args.clips or len(folder)))]
    rows = {"render": score_renders(clips)}
    rows["model"] = score(evaluate({"model": chosen}, clips, pipeline, args.seed)["model"], clips)
    for name, row in rows.items():
        print(name, {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items() if key != "why_null"})
    print(json.dumps({"model": args.model, "data": args.data, "clips": len(clips), "torch": torch.__version__, **rows}))


if __name__ == "__main__":
    guarded(main)
