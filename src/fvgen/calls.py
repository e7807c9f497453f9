"""What the commands of cli.py do: judge what costs nothing to judge, import what takes seconds, call, print."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fvgen.clips.worlds import is_builtin
from fvgen.errors import UserError, short
from fvgen.pipelines.presets import model_folder
from fvgen.system.doors import there

MOST_SIDE = 65_536  # pixels


def ui(model: str, student: str | None, most: dict[str, Any], options: dict[str, Any]) -> None:
    from fvgen.ui.serve import serve  # judges port and folder before what takes seconds

    serve({"walk": model} if student is None else {"student": student, "teacher": model}, most=most, **options)


def evaluate(predicted: Path, truth: Path | None, out: Path | None, cameras: bool) -> None:
    existing(*(place for place in (predicted, truth) if place is not None))
    from fvgen.reports.compare import compare  # takes seconds to import

    result = compare(predicted, truth, out, cameras)
    if failed := result.get("camera_error", {}).get("failed"):
        share = f"{len(failed)} of {result['camera_error']['generated']}"
        print(f"fvgen: {share} generated frames have no camera error: {', '.join(failed)}", file=sys.stderr)
    for name, reason in result["why_null"].items():
        print(f"fvgen: {name} is null: {reason}", file=sys.stderr)
    print(json.dumps({key: value for key, value in result.items() if key not in ("frames", "why_null")}))


def reconstruct(
    dataset: Path, out: Path | None, size: str | None, given: dict[str, Any], seed: int, device: str
) -> None:
    existing(dataset)
    both = numbers(size, "x", "size", "48x64") if size else None

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fvgen.splats import FitSettings  # takes seconds to import
    from fvgen.splats import reconstruct as run_reconstruct
    from fvgen.walks.run import say

    columns = (TextColumn("fit"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        folder = run_reconstruct(
            dataset,
            out,
            FitSettings(**given),
            both,
            seed,
            device,
            say,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{folder / 'scene.ply'}, {folder / 'scene.html'}")


def generate(photographs: list[Path], out: Path, size: str | None, options: dict[str, Any]) -> None:
    existing(*photographs, what="photograph")
    both = numbers(size, "x", "size", "320x512") if size else None

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fvgen.walks.run import generate as run_generate  # takes seconds to import
    from fvgen.walks.run import say

    columns = (TextColumn("clips"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        made = run_generate(
            photographs,
            out,
            size=both,
            told=say,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            **options,
        )
    print(f"{made / 'video.mp4'}, {made / 'run.html'}")


def prepare(sources: list[Path], out: Path, size: str | None, part: str, options: dict) -> None:
    existing(*sources)
    model_folder(options["teacher"])
    both = numbers(size, "x", "size", "320x512") if size else None
    share = numbers(part, "/", "part", "2/8")

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fvgen.shards.prepare import prepare as run_prepare  # takes seconds to import

    columns = (TextColumn("clips"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        tally = run_prepare(
            sources,
            out,
            size=both,
            part=share,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            **options,
        )
    print(f"{tally.clips} clips in {out}")
    for reason, count in tally.dropped.most_common():
        print(f"  dropped {count}: {reason}")
    for entry in tally.skipped:
        print(f"  skipped {entry.name}: {entry.reason}")


def inspect(path: str, out: Path, clips: int | None, teacher: str | None) -> None:
    existing(path)
    if teacher is not None:
        model_folder(teacher)
    from fvgen.reports.contact_sheet import inspect as run_inspect  # takes seconds to import

    print(run_inspect(path, out, clips, teacher))


def existing(*paths: str | Path, what: str = "data folder") -> None:
    """Judge paths before anything is imported that takes seconds. Raises UserError for the first that is not there;
    addresses (s3://...) and the words for built-in clips pass."""
    for path in paths:
        inside = Path(path).parent.is_file()  # a scene in a chunk, or the reader will say what not
        if not is_builtin(path) and "://" not in str(path) and not there(path) and not inside:
            raise UserError(f"{what} {path} does not exist; check the path")


def numbers(text: str, separator: str, name: str, example: str) -> tuple[int, int]:
    """ "320x512" to (320, 512). Raises UserError for anything but two numbers of at least 1."""
    found = re.fullmatch(rf"0*([1-9]\d{{0,5}}){re.escape(separator)}0*([1-9]\d{{0,5}})", text, re.ASCII)
    if found is None or max(int(found[1]), int(found[2])) > MOST_SIDE:
        raise UserError(f"--{name} {short(text)} is not understood; write, for example, {example}")
    return int(found[1]), int(found[2])


def convert(
    config: str | None,
    checkpoint: str,
    out: Path,
    only: str | None,
    to_lvdm: bool,
    layout: str | None,
    cogvideox: dict[str, str | None],
) -> None:
    existing(*filter(None, [config]), what="--config")
    if any(cogvideox.values()) or (Path(checkpoint).is_dir() and not to_lvdm):
        if config or only or to_lvdm or layout:
            raise UserError("--config, --only, --to-lvdm and --layout are for ViewCrafter's relatives; leave them out")
        existing(*filter(None, [checkpoint, cogvideox["base"], cogvideox["prompts"]]), what="file or folder")
        from fvgen.convert.cogvideox import convert_cogvideox  # takes seconds to import

        print(convert_cogvideox(checkpoint, out, **cogvideox))
        return
    from fvgen.convert import command as conversion  # takes seconds to import

    components = conversion.ALL if only is None else [name.strip() for name in only.split(",")]
    if to_lvdm and layout:
        raise UserError("a model folder says its own layout; leave --layout out")
    if to_lvdm:
        written = conversion.convert_back(checkpoint, out, config, components)
    elif config is None:
        raise UserError("converting a checkpoint needs its yaml; add --config")
    else:
        written = conversion.convert(config, checkpoint, out, components, layout)
    print(written)


def demo(out: Path, data: str | None, seed: int, device: str, size: str | None, options: dict[str, Any]) -> None:
    existing(*(path for path in (data, options["held_out"]) if path))
    model_folder(options["teacher"])
    both = numbers(size, "x", "size", "320x512") if size else None
    from fvgen.reports.demo import demo as run_demo  # takes seconds to import
    from fvgen.reports.demo import print_table

    console = Console()
    report = run_demo(out, data, seed, device, size=both, **options)
    print_table(report, console)
    console.print(f"Pictures: {out / 'report.html'}")


def policy(
    run: Path, data: str | None, out: Path | None, settings: dict[str, Any], clips: int, lpips: float, device: str
) -> None:
    existing(run, what="run folder")
    existing(*filter(None, [data]))
    if settings["method"] not in ("full", "reinforce"):
        raise UserError(f"--method {short(settings['method'])}: there are full and reinforce")

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fvgen.distill.policy import FitSettings, refit  # takes seconds to import

    columns = (TextColumn("clips"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        told = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        made, report = refit(run, data, out, FitSettings(**settings), clips, lpips, device, told)
    for part in ("learnt", "held_out"):
        row = report[part]
        taken = ", ".join(f"{t}: {count}" for t, count in row["histogram"].items())
        constant = f"best constant t={report['best_constant']} {row['best_constant']:.4f}"
        print(f"{part}: policy {row['policy']:.4f}, {constant}, best of each {row['oracle']:.4f}; clips by t: {taken}")
    print(f"Student: {made}")


def export(run: Path, out: Path, iteration: int | None) -> None:
    existing(run, what="run folder")
    from fvgen.distill import export_checkpoint  # takes seconds to import

    print(f"Student: {export_checkpoint(run, out, iteration)}")


def doctor(as_json: bool) -> None:
    from fvgen.doctor.report import examine, print_report

    with Console(stderr=True).status("") as status:
        report = examine(told=lambda words: status.update(f"{words} ..."))
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report, Console())
    if not report["ok"]:
        sys.exit(1)


def diagnose(run: Path, as_json: bool) -> None:
    existing(run, what="run folder")
    from fvgen.diagnosis import diagnose as run_diagnose  # takes seconds to import
    from fvgen.diagnosis import text_of

    found = run_diagnose(run)
    if as_json:
        print(json.dumps({"stages": [each.as_json() for each in found]}))
    else:
        print("\n\n".join(text_of(each) for each in found))


def report(runs: list[Path], out: Path) -> None:
    existing(*runs, what="run folder")
    from fvgen.reports.runs_page import report as run_report  # takes seconds to import

    print(run_report(runs, out))


def plan(
    file: Path,
    gpus: int,
    memory: float,
    stage: str,
    frames: int | None,
    size_words: str | None,
    rate: tuple[float, float],
    words: list[str] | None,
) -> None:
    existing(file, what="--config")
    both = numbers(size_words, "x", "size", "320x512") if size_words else None
    from fvgen.distill import read_stage_config  # takes seconds to import
    from fvgen.distill.methods import METHODS
    from fvgen.models.family import Size
    from fvgen.planning.plan import Hardware, clip_size, command, print_plan, profiles, teacher_blueprint
    from fvgen.planning.plan import plan as make_plan

    if stage not in METHODS:
        raise UserError(f"--stage {stage}: there are {' and '.join(METHODS)}")
    given = [] if any(word.startswith("out=") for word in words or []) else ["out=unused"]
    config = read_stage_config(stage, file, [*given, *(words or [])])
    family, blueprint = teacher_blueprint(config.run.teacher)
    frames, height, width = clip_size(config.data.data, frames, both)
    parts, clips = gpus * config.memory.accumulation, config.data.batch_size
    if clips % parts:
        raise UserError(f"batch_size={clips} does not divide among {gpus} GPUs; give a multiple of {parts}")
    size = Size(clips // parts, frames, height, width)
    blueprint.example(size)  # judges the size
    hardware = Hardware(gpus, memory, *rate)
    estimates = make_plan(config, profiles(config, family, blueprint, size), hardware)
    print_plan(estimates, hardware, Console(), lambda choice: command(choice, hardware, config, file, words or ()))
