"""`fvgen demo`: distil a student from a teacher, compare both on scenes new to them, write a report."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fvgen.clips.clip import Clip
from fvgen.clips.worlds import is_builtin
from fvgen.diagnosis import diagnose
from fvgen.distill import RunConfig, read_metrics, read_yaml, run, run_config
from fvgen.distill.run_folder import read_summary
from fvgen.errors import UserError
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.pipelines.presets import model_folder
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.posing.sources import Source, find_sources
from fvgen.reports.data import Clips, kind_of, open_clips, prepare_scenes, split, split_views
from fvgen.reports.evaluate import (
    Contestant,
    best,
    evaluate,
    few_step_teachers,
    score,
    score_renders,
    student_contestant,
    teacher_contestant,
)
from fvgen.reports.page import CLIPS, REPORT, ReportClip, table, write_report
from fvgen.scenes.formats import read_scene, scene_format
from fvgen.system.doors import there
from fvgen.system.files import TEMPORARY, atomic_path, judge_output, no_leftovers, writable_folder

REAL_CLIPS_PER_SCENE = 12
SHOWN_CLIPS = 6
OURS = {"stage1_gan", "stage2_dmd", "data", "student", REPORT, CLIPS, "report.html"}


@dataclass(frozen=True)
class DemoData:
    """Where clips come from, judged but not made yet.

    train: a `StageConfig.data`, or scenes. test: for `open_clips`, or scenes; none where one scene is to be split.
    """

    name: str
    train: str | list[Source]
    test: str | list[Source]


def demo(
    out: str | Path,
    data: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    *,
    held_out: str | Path | None = None,
    teacher: str = "tiny",
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> dict:
    """Both stages and the report, in ``out``; the same call again resumes. Returns the report (docs/report.md).

    Args:
        data: to train on: scenes, photographs or videos, which are prepared in ``out``; prepared shards; a folder of
            clips; None for the built-in ones.
        held_out: of the same kinds, and with pixels: what judges. Of scenes some are held out where it is not given.
        teacher: a preset or the folder of any teacher.
        frames, size: of clips that are made from scenes; the teacher's own by default, see `render_needs`.

    Raises UserError for data, models, folders or devices that cannot work, before anything is written.
    """
    read = [path for path in (data, held_out) if path is not None and not is_builtin(str(path)) and there(path)]
    out = judge_output(out, inputs=read)
    check_device(device)
    found = judged(data, held_out)
    model_folder(teacher)
    with no_leftovers(out, out / "data"):
        claim(out)
        pipeline = load_pipeline(teacher, TeacherPipeline).to(device)
        choices = {"frames": frames, "size": size, "clips_per_scene": REAL_CLIPS_PER_SCENE, "device": device}
        train, test = made(found, out / "data", teacher, choices, pipeline.frames)
        pipeline.check_clip(test.frames, test.height, test.width)
    settings = read_yaml(str(files("fvgen") / "configs" / "tiny.yaml"))
    config = run_config({**settings, "teacher": teacher, "data": train, "seed": seed, "device": device}, out)
    student_folder = run(config)
    with atomic_path(out / "student") as folder:
        shutil.copytree(student_folder, folder)

    clips = [test[index] for index in range(len(test))]
    ways = few_step_teachers(pipeline, config.dmd.method.student_steps)
    results = evaluate(contestants(pipeline, config, out) | ways, clips, pipeline, seed)
    rows = {name: score(result, clips) for name, result in results.items()}
    few = {name: rows.pop(name) for name in ways}
    results["teacher_few"] = results[best(few)]
    rows |= {"render": score_renders(clips), "teacher_few": few[best(few)]}

    order = ("render", "teacher", "teacher_few", "gan_init", "student")
    report = {
        "data": found.name,
        "clips": len(clips),
        "scenes": sorted({clip.name if is_builtin(str(found.test)) else clip.name.rsplit("-", 1)[0] for clip in clips}),
        "frames": test.frames,
        "height": test.height,
        "width": test.width,
        "seed": seed,
        "device": device,
        "rows": {name: rows[name] for name in order},
        "teacher_few_by": best(few),
        "teacher_few_ways": few,
        "speedup": rows["teacher"]["seconds_per_clip"] / rows["student"]["seconds_per_clip"],
        "stages": [stage_summary(stage.run.out) for stage in (config.gan, config.dmd)],
    }
    videos = {name: results[name].videos for name in order[1:]}
    shown = torch.linspace(0, len(clips) - 1, min(SHOWN_CLIPS, len(clips))).round().long().tolist()
    pictures = [report_clip(clips[i], {name: video[i] for name, video in videos.items()}) for i in shown]
    curves = {"Stage 1: GAN": read_metrics(config.gan.run.out), "Stage 2: DMD": read_metrics(config.dmd.run.out)}
    found = [each for stage in (config.gan, config.dmd) for each in diagnose(stage.run.out)]
    write_report(out, report, pictures, curves, found)
    return report


def judged(data: str | Path | None, held_out: str | Path | None) -> DemoData:
    """What is to be trained on and what judges. Raises UserError for what cannot be either, or is not there."""
    kind = "builtin" if data is None else kind_of(data)
    name = "built-in scenes" if kind == "builtin" else Path(data).resolve().name
    if kind == "scenes":
        scenes = find_sources([data])
        for scene in scenes:
            if scene.path.is_dir() and scene_format(scene.path):
                read_scene(scene.path)
        if held_out is None:
            return DemoData(name, *split(scenes)) if len(scenes) > 1 else DemoData(name, scenes, [])
        train: str | list[Source] = scenes
    elif held_out is None and kind != "builtin":
        raise UserError(f"{data} is prepared and cannot be split; say with --held-out which clips judge")
    else:
        train = str(data or kind)
    test = str(held_out or data or kind)
    if kind_of(test) != "scenes":
        open_clips(test, "unused", "unused")
    return DemoData(name, train, test)


def made(found: DemoData, folder: Path, teacher: str, choices: dict, frames: int) -> tuple[str, Clips]:
    """What to train on, as a `StageConfig.data`, and the clips that judge: scenes are prepared below ``folder``.
    ``frames``: the teacher's own."""
    train, test = found.train, found.test
    if test == []:
        one, other = split_views(train[0], choices["frames"] or frames, folder / "split")
        train, test = [one], [other]
    if isinstance(train, list):
        train = str(prepare_scenes([scene.path for scene in train], folder / "train", teacher=teacher, **choices))
    if isinstance(test, list):
        test = str(
            prepare_scenes(
                [scene.path for scene in test], folder / "test", teacher=teacher, keep_frames=True, **choices
            )
        )
    return train, open_clips(test, folder / "test", teacher, **choices)


def contestants(teacher: TeacherPipeline, config: RunConfig, out: Path) -> dict[str, Contestant]:
    """The teacher as published, and the student after each stage."""
    gan_init = load_pipeline(Path(config.gan.run.out) / "student", StudentPipeline).to(config.dmd.run.device)
    student = load_pipeline(out / "student", StudentPipeline).to(config.dmd.run.device)
    return {
        "teacher": teacher_contestant(teacher),
        "gan_init": student_contestant(gan_init),
        "student": student_contestant(student),
    }


def claim(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier demo, even one that was killed while it wrote."""
    if out.is_dir() and (foreign := [p.name for p in out.iterdir() if p.name not in OURS and TEMPORARY not in p.name]):
        raise UserError(f"output folder {out} holds something else ({sorted(foreign)[0]}); choose another --out")
    writable_folder(out)


def stage_summary(stage_folder: str) -> dict:
    """Name, iterations and seconds of a finished stage."""
    summary = read_summary(Path(stage_folder))
    return {"name": summary.stage, "iterations": summary.iterations, "seconds": summary.seconds}


def report_clip(clip: Clip, videos: dict) -> ReportClip:
    """What the page animates of one clip."""
    known = clip.known.nonzero()[:, 0].tolist()
    return ReportClip(clip.name, {"render": clip.render, **videos, "truth": clip.truth}, known)


def print_table(report: dict, console: Console) -> None:
    """The page's table in the terminal."""
    header, rows, notes = table(report["rows"])
    shown = Table("", *header, title=f"held-out scenes: {report['data']}, {report['clips']} clips")
    for name, cells in rows:
        shown.add_row(name, *(cell.text for cell in cells))
    console.print(shown)
    for note in notes:
        console.print(note, style="dim")
    console.print(f"The student is {report['speedup']:.1f} times as fast as its teacher.")
