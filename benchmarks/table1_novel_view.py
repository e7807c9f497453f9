"""FVGen's Table 1 and the setting of its Table 2: novel views between 5 photographs (clips chained) and between 2.

    python benchmarks/table1_novel_view.py [--teacher tiny] [--student DIR ...] [--data builtin|DATA ...]
        [--split FILE.json] [--given 5 2] [--scenes 6] [--first 16] [--seeds 0 1 2] [--steps 4] [--size HxW]
        [--points auto] [--device cpu] [--work DIR] [--name table1_novel_view-tiny]

What is measured: K photographs are given, evenly along a capture; a clip of the model's length runs from each to the
next (16 frames: 5 -> 56, 2 -> 14), and every frame that was not given is scored against its photograph. Rows: the point
render; the photographs themselves cross-faded; the teacher in all its steps, in as few as a student by the best of its
ways, and each student. All see the same renders, seams and noise. Means over seeds, which draw the noise; differences
to the teacher are paired by seed. Why: it is what a user sees, and what the paper's first table reports.

--data takes scenes with poses, photographs or videos; --split a JSON of {scene: {"context": [...], "target": [...]}},
numbers of views in file order, as MVSplat360's lists of DL3DV are. Built-in rooms begin with --first, for earlier ones
chose settings. Interrupted, the same command goes on. Writes benchmarks/results/NAME.json and .md; the last line is
JSON.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chain import room
from pages import page
from tables import METRICS, bracket, cell, commit, write_results
from torch import Tensor

from fvgen.calls import existing, numbers
from fvgen.clips.clip import Clip
from fvgen.clips.worlds import is_builtin
from fvgen.errors import UserError
from fvgen.metrics.intervals import paired
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.posing.sources import find_sources
from fvgen.reports.evaluate import (
    Contestant,
    best,
    few_step_teachers,
    score_videos,
    student_contestant,
    teacher_contestant,
)
from fvgen.scenes.images import fit_image
from fvgen.shards.encoders import RenderNeeds, render_needs
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.doors import read_object
from fvgen.system.files import write_json
from fvgen.walks.chain import chain
from fvgen.walks.given import open_given
from fvgen.walks.paths import Walk
from fvgen.walks.render import Rendered, make_cloud, render_walk

PAPER = [
    {"data": data, "model": model, "PSNR": psnr, "SSIM": ssim, "LPIPS": lpips, "FID": fid, "s": seconds}
    for data, model, psnr, ssim, lpips, fid, seconds in (
        ("mip-360", "DepthSplat", 11.23, 0.213, 0.715, 32.45, 4.2),
        ("mip-360", "MVSplat360", 12.28, 0.285, 0.682, 25.69, 87.2),
        ("mip-360", "ViewCrafter", 16.35, 0.346, 0.433, 16.28, 66.3),
        ("mip-360", "FVGen", 16.28, 0.352, 0.429, 17.44, 5.1),
        ("TNT", "DepthSplat", 12.43, 0.263, 0.677, 35.88, 4.3),
        ("TNT", "MVSplat360", 14.18, 0.301, 0.532, 25.23, 87.3),
        ("TNT", "ViewCrafter", 18.69, 0.402, 0.208, 23.94, 65.9),
        ("TNT", "FVGen", 18.72, 0.411, 0.210, 23.64, 5.0),
    )
]
TEACHER = "teacher"


@dataclass(frozen=True)
class Case:
    """A walk through given views: its renders and its true frames."""

    name: str
    truth: Tensor
    shown: Tensor | None
    rendered: Rendered

    @property
    def clip(self) -> Clip:
        return Clip(self.name, self.truth, self.rendered.frames, self.rendered.known, shown=self.shown)


@dataclass(frozen=True)
class Sampled:
    """A contestant as `fvgen.walks.chain.chain` calls a pipeline."""

    pipeline: NovelViewPipeline
    contestant: Contestant

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def __call__(self, render: Tensor, generator: torch.Generator, steps: int | None) -> Tensor:
        condition = self.pipeline.condition(render, generator)
        return self.pipeline.decode_latents(self.contestant.sample(condition, generator))


# --- Walks ---


def evenly(count: int, among: int) -> list[int]:
    """``count`` of 0..among-1 with both ends."""
    return sorted({round(k * (among - 1) / max(1, count - 1)) for k in range(count)})


def cases(args: Any, given: int, needs: RenderNeeds) -> Iterator[Case]:
    """The walks between ``given`` views, scene by scene."""
    frames = (given - 1) * (needs.frames - 1) + 1
    if is_builtin(args.data[0]):
        for index in range(args.first, args.first + args.scenes):
            truth, cloud, walk = room(index, frames, (needs.height, needs.width), evenly(given, frames))
            yield Case(f"test-{index}", truth, None, render_walk(cloud, walk, needs.half_pixel_shift))
        return
    split = read_object(args.split) if args.split else None
    for source in find_sources(args.data)[: args.scenes]:
        yield of_scene(source.path, split, given, frames, needs, args.points)


def of_scene(
    path: Path, split: Mapping[str, Any] | None, given: int, frames: int, needs: RenderNeeds, points: str
) -> Case:
    """A walk along a scene's own views: those of its ``split``, else ``frames`` evenly along the capture. Raises
    UserError where there are too few."""
    found = open_given([path], points)
    scene, order = found.scene, found.order
    if split is not None:
        context, target = lists_of(split, path.name, len(order), given)
        chosen = sorted({*context, *target})
    else:
        chosen = evenly(min(frames, len(order)), len(order))
        if len(chosen) < given + 1:
            raise UserError(f"{path} has {len(order)} views; {given} of them given leave none to score")
        context = [chosen[k] for k in evenly(given, len(chosen))]
    views = [order[k] for k in chosen]
    known = {chosen.index(k): order[k] for k in context}
    size = (needs.height, needs.width)
    cameras = scene.cameras.fitted(*size)[views]
    cloud = make_cloud(scene, [order[k] for k in context], *size, points)
    truth = torch.stack([fit_image(scene.image(view), *size) for view in views])
    return Case(
        path.name, truth, scene.shown(views, *size), render_walk(cloud, Walk(cameras, known), needs.half_pixel_shift)
    )


def lists_of(split: Mapping[str, Any], name: str, count: int, given: int) -> tuple[list[int], list[int]]:
    """(context, target) of a scene. Raises UserError for what is no such list of its views."""
    lists = split.get(name)
    parts = [lists.get(key) for key in ("context", "target")] if isinstance(lists, dict) else []
    if len(parts) != 2 or not all(
        isinstance(part, list) and part and all(type(k) is int and 0 <= k < count for k in part) for part in parts
    ):
        raise UserError(
            f'the split has no lists "context" and "target" of views 0 to {count - 1} for {name}; give another --split'
        )
    if len(parts[0]) != given:
        raise UserError(f"the split gives {len(parts[0])} views of {name}, --given {given}; let them agree")
    return parts[0], parts[1]


def cross_fade(case: Case) -> Tensor:
    """The given photographs, each fading into the next: no model, no geometry, and right in the middle by chance."""
    frames, places = case.truth.clone(), case.rendered.known.nonzero().flatten().tolist()
    for at in range(len(frames)):
        before = max([k for k in places if k <= at], default=places[0])
        after = min([k for k in places if k >= at], default=places[-1])
        share = 0.0 if after == before else (at - before) / (after - before)
        frames[at] = torch.lerp(case.truth[before], case.truth[after], share)
    return frames


# --- Scores ---


def scored(args: Any, given: int, seed: int, needs: RenderNeeds) -> dict[str, dict[str, Any]]:
    """Rows by name, of one seed."""
    found = list(cases(args, given, needs))
    clips = [case.clip for case in found]
    rows = {
        "render": score_videos([clip.render for clip in clips], clips),
        "cross-fade": score_videos([cross_fade(case) for case in found], clips),
    }
    pipeline = load_pipeline(args.teacher, TeacherPipeline).to(args.device)
    rows[TEACHER] = walked(found, pipeline, teacher_contestant(pipeline), seed)
    few = {
        way: walked(found, pipeline, each, seed) | {"way": way}
        for way, each in few_step_teachers(pipeline, args.steps).items()
    }
    rows[f"teacher, {args.steps} steps, best way"] = few[best(few)]
    for folder in args.student:
        student = load_pipeline(folder.format(seed=seed), StudentPipeline).to(args.device)
        rows[folder] = walked(found, student, student_contestant(student), seed)
    return rows


def walked(found: Sequence[Case], pipeline: NovelViewPipeline, contestant: Contestant, seed: int) -> dict[str, Any]:
    """Scores of a contestant's walks."""
    model: Any = Sampled(pipeline, contestant)
    videos = [chain(model, case.rendered, pipeline.frames, seed=1000 * seed + 100 * k) for k, case in enumerate(found)]
    return {"nfe": contestant.nfe} | score_videos(videos, [case.clip for case in found])


def rows_of(by_seed: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The page's rows: means over seeds and, in brackets, the difference to the teacher."""
    rows = []
    for name in by_seed[0]:
        each = [seed[name] for seed in by_seed]
        row: dict[str, Any] = {"model": name, "NFE a clip": each[0].get("nfe", 0), "way": each[0].get("way", "")}
        for metric, digits in zip(METRICS, (2, 3, 4, 3, 1), strict=True):
            values = [one[metric] for one in each]
            mean = None if None in values else statistics.mean(values)
            row[metric] = cell(mean, digits)
            if name != TEACHER:
                row[metric] += bracket(paired(values, [seed[TEACHER][metric] for seed in by_seed]), digits)
        rows.append(row | {"views": each[0]["n"]})
    return rows


def kept(file: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """An earlier call's rows, if it was given the same."""
    if not file.is_file():
        return None
    found = read_object(file)
    return found["rows"] if found.get("settings") == dict(settings) else None


def note(result: Mapping[str, Any]) -> str:
    """The result as a page of Markdown."""
    remark = "means over seeds; in brackets the difference to the teacher, paired by seed, with its 95 % interval"
    return page("Novel views between photographs (FVGen, Table 1)", "table1_novel_view.py", [remark], result)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--teacher", default="tiny", help="preset or model folder")
    parser.add_argument("--student", nargs="+", default=[], help="model folders; {seed} stands for the seed's number")
    parser.add_argument("--data", nargs="+", default=["builtin"], help="scenes, photographs, videos, or builtin")
    parser.add_argument("--split", type=Path, help="JSON: which views of each scene are given and which are scored")
    parser.add_argument("--given", type=positive, nargs="+", default=[5, 2], help="photographs that are given")
    parser.add_argument("--scenes", type=positive, default=6, help="at most so many")
    parser.add_argument("--first", type=int, default=16, help="of the built-in rooms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, default=4, help="of the untrained teacher beside the students")
    parser.add_argument("--size", help="of the frames, HEIGHTxWIDTH; the teacher's own if not given")
    parser.add_argument("--points", default="auto", help="where depth comes from, as `fvgen generate` takes it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/table1"), help="where rows are kept, seed by seed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the files go")
    parser.add_argument("--name", default="table1_novel_view-tiny", help="of the files")
    args = parser.parse_args()
    for path in args.data:
        existing(path)
    if min(args.given) < 2:
        raise UserError("--given 1 leaves nothing between photographs; give 2 or more")
    if args.first < 0:
        raise UserError(f"--first {args.first} is below 0; give the number of a room")
    check_device(args.device)
    size = numbers(args.size, "x", "size", "320x512") if args.size else None
    teacher = load_pipeline(args.teacher, TeacherPipeline)
    needs = render_needs(teacher, teacher.frames, size, None)
    others = ("seeds", "work", "out", "name", "given")
    told = {key: str(value) for key, value in vars(args).items() if key not in others}
    parts: dict[str, list[dict[str, Any]]] = {}
    by_seed: dict[str, Any] = {}
    for given in args.given:
        found = []
        for seed in args.seeds:
            file, settings = args.work / f"{args.name}-{given}-{seed}.json", told | {"given": given, "seed": seed}
            rows = kept(file, settings)
            if rows is None:
                rows = scored(args, given, seed, needs)
                write_json(file, {"settings": settings, "rows": rows})
            print(f"{given} given, seed {seed}: " + ", ".join(f"{n} {cell(r['psnr'], 2)}" for n, r in rows.items()))
            found.append(rows)
        parts[f"{given} photographs given"], by_seed[str(given)] = rows_of(found), found
    settings = {
        "command": shlex.join(["python", "benchmarks/table1_novel_view.py", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "clip": f"{needs.frames} frames of {needs.height}x{needs.width}",
        "seeds": args.seeds,
    }
    result = {"settings": settings, "parts": parts | {"the paper's own numbers, 5 -> 56": PAPER}, "by_seed": by_seed}
    write_results(args.out, args.name, result, note(result))
    print(json.dumps({"settings": settings, "parts": parts}))


if __name__ == "__main__":
    guarded(main)
