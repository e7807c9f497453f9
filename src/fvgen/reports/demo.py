"""`fvgen demo`: distil a student from the tiny teacher, compare both on scenes new to them, write a report."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fvgen.clips.builtin import FRAMES, HEIGHT, WIDTH, builtin_clips
from fvgen.clips.clip import Clip
from fvgen.clips.folder import ClipFolder
from fvgen.clips.from_scenes import prepare_scenes, read_scenes, split_scenes
from fvgen.distill import RunConfig, read_metrics, read_yaml, run, run_config
from fvgen.errors import UserError
from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline
from fvgen.pipelines.folders import check_device, load_pipeline
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
from fvgen.reports.page import ReportClip, write_report
from fvgen.scenes.formats import Scene
from fvgen.system.files import TEMPORARY, atomic_path, no_leftovers, writable_folder

TEST_CLIPS = 16
REAL_CLIPS_PER_SCENE = 12
SHOWN_CLIPS = 6
OURS = {"stage1_gan", "stage2_dmd", "data", "student", "report.json", "report.html"}


@dataclass(frozen=True)
class DemoData:
    """What to train on (a `StageConfig.data`), and the clips that judge."""

    name: str
    train: str
    test: ClipFolder


def demo(out: str | Path, data: str | Path | None = None, seed: int = 0, device: str = "cpu") -> dict:
    """Both stages and the report, in ``out``; the same call again resumes. Returns the report (docs/report.md).

    ``data``: a folder of real scenes (nerfstudio or COLMAP), some of which are held out; None for the built-in ones.
    Raises UserError for data, folders or devices that cannot work, before anything is written.
    """
    out = Path(out)
    check_device(device)
    scenes = None if data is None else split_scenes(read_scenes(data))
    teacher = load_pipeline("tiny", ViewCrafterPipeline).to(device)
    with no_leftovers(out, out / "data"):
        claim(out)
        demo_data = builtin_data() if scenes is None else real_data(data, scenes, out)
    settings = read_yaml(str(files("fvgen") / "configs" / "tiny.yaml"))
    config = run_config({**settings, "data": demo_data.train, "seed": seed, "device": device}, out)
    student_folder = run(config)
    with atomic_path(out / "student") as folder:
        shutil.copytree(student_folder, folder)

    clips = [demo_data.test[index] for index in range(len(demo_data.test))]
    ways = few_step_teachers(teacher, config.dmd.student_steps)
    results = evaluate(contestants(teacher, config, out) | ways, clips, teacher, seed)
    rows = {name: score(result, clips) for name, result in results.items()}
    few = {name: rows.pop(name) for name in ways}
    results["teacher_few"] = results[best(few)]
    rows |= {"render": score_renders(clips), "teacher_few": few[best(few)]}

    order = ("render", "teacher", "teacher_few", "gan_init", "student")
    report = {
        "data": demo_data.name,
        "scenes": sorted({clip.name.rsplit("-", 1)[0] if data else clip.name for clip in clips}),
        "frames": demo_data.test.frames,
        "height": demo_data.test.height,
        "width": demo_data.test.width,
        "seed": seed,
        "device": device,
        "rows": {name: rows[name] for name in order},
        "teacher_few_by": best(few),
        "teacher_few_ways": few,
        "speedup": rows["teacher"]["seconds_per_clip"] / rows["student"]["seconds_per_clip"],
        "stages": [stage_summary(stage.out) for stage in (config.gan, config.dmd)],
    }
    videos = {name: results[name].videos for name in order[1:]}
    shown = range(0, len(clips), max(1, len(clips) // SHOWN_CLIPS))
    pictures = [report_clip(clips[i], {name: video[i] for name, video in videos.items()}) for i in shown]
    curves = {"Stage 1: GAN": read_metrics(config.gan.out), "Stage 2: DMD": read_metrics(config.dmd.out)}
    write_report(out, report, pictures[:SHOWN_CLIPS], curves)
    return report


def builtin_data() -> DemoData:
    """Built-in scenes: `StageConfig.data` makes the training clips itself."""
    return DemoData("built-in scenes", "builtin", builtin_clips("test", TEST_CLIPS))


def real_data(data: str | Path, scenes: tuple[list[Scene], list[Scene]], out: Path) -> DemoData:
    """Real scenes, prepared under ``out``/data at the tiny preset's size."""
    train, held_out = (
        prepare_scenes(part, out / "data" / name, REAL_CLIPS_PER_SCENE, FRAMES, HEIGHT, WIDTH)
        for name, part in zip(("train", "test"), scenes, strict=True)
    )
    return DemoData(Path(data).resolve().name, str(train.path), held_out)


def contestants(teacher: ViewCrafterPipeline, config: RunConfig, out: Path) -> dict[str, Contestant]:
    """The teacher as published, and the student after each stage."""
    gan_init = load_pipeline(Path(config.gan.out) / "student", FVGenPipeline).to(config.dmd.device)
    student = load_pipeline(out / "student", FVGenPipeline).to(config.dmd.device)
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
    summary = json.loads((Path(stage_folder) / "summary.json").read_text())
    return {"name": summary["stage"], "iterations": summary["iterations"], "seconds": summary["seconds"]}


def report_clip(clip: Clip, videos: dict) -> ReportClip:
    """What the page animates of one clip."""
    return ReportClip(clip.name, {"render": clip.render, **videos, "truth": clip.truth})


def print_table(report: dict, console: Console) -> None:
    """The report's table in the terminal."""
    table = Table("", "NFE", "s/clip", "PSNR", "SSIM", "LPIPS", "FID", title=f"held-out scenes: {report['data']}")
    for name, row in report["rows"].items():
        cells = [row["nfe"], row["seconds_per_clip"], row["psnr"], row["ssim"], row["lpips"], row["fid"]]
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in cells))
    console.print(table)
    reasons = {f"{key} is missing: {why}" for row in report["rows"].values() for key, why in row["why_null"].items()}
    for reason in sorted(reasons):
        console.print(reason, style="dim")
    console.print(f"The student is {report['speedup']:.1f} times as fast as its teacher.")
