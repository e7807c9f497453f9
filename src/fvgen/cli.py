"""`fvgen`: parse, then call. A user's mistake is one sentence on stderr and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fvgen.errors import Stopped, UserError

QUIET_SECONDS = 10.0

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil slow novel-view video diffusion into 4-step students.",
)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the student and the report; run again to resume.")],
    data: Annotated[Path | None, typer.Option(help="Folder of real scenes; the built-in ones if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of training and sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Distil a student from the tiny teacher and compare them on held-out scenes."""
    guarded(partial(_demo, out, data, seed, device))


def _demo(out: Path, data: Path | None, seed: int, device: str) -> None:
    from fvgen.demo import demo as run_demo  # takes seconds to import
    from fvgen.demo import print_table

    console = Console()
    report = run_demo(out, data, seed, device)
    print_table(report, console)
    console.print(f"Pictures: {out / 'report.html'}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a stage: the out=DIR of its recipe.")],
    out: Annotated[Path, typer.Option(help="Folder for the student, in the format of diffusers.")],
    iteration: Annotated[int | None, typer.Option(min=1, help="Which checkpoint; the newest if not given.")] = None,
) -> None:
    """Write the averaged student of a checkpoint as a model folder; the run may still be going on."""
    guarded(partial(_export, run, out, iteration))


def _export(run: Path, out: Path, iteration: int | None) -> None:
    from fvgen.distill import export_checkpoint

    print(f"Student: {export_checkpoint(run, out, iteration)}")


@app.command()
def plan(
    config: Annotated[Path, typer.Option(help="YAML file of settings, as for the recipes.")],
    gpus: Annotated[int, typer.Option(min=1, help="Processes, one GPU each.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GB of one GPU.")] = 80.0,
    stage: Annotated[str, typer.Option(help="gan or dmd")] = "dmd",
    frames: Annotated[int | None, typer.Option(min=1, help="Of a clip; those of the data if not given.")] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    tflops: Annotated[float, typer.Option(min=0.001, help="Peak rate of one GPU.")] = 989.0,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1.0, help="Part of it that is reached.")] = 0.35,
    settings: Annotated[list[str] | None, typer.Argument(help="key=value that differ from the file")] = None,
) -> None:
    """Predict memory and seconds per iteration for every way to train, and recommend one; nothing is trained.

    teacher=viewcrafter plans for the published model without its weights.
    """
    guarded(partial(_plan, config, gpus, gpu_memory, stage, (frames, height, width), (tflops, utilisation), settings))


def _plan(
    file: Path,
    gpus: int,
    memory: float,
    stage: str,
    clip: tuple[int | None, int | None, int | None],
    rate: tuple[float, float],
    words: list[str] | None,
) -> None:
    from fvgen.distill import read_stage_config
    from fvgen.plan import Hardware, clip_size, print_plan, profiles, unet_settings
    from fvgen.plan import plan as make_plan
    from fvgen.simulate import Size

    if stage not in ("gan", "dmd"):
        raise UserError(f"--stage {stage}: there are gan and dmd")
    given = [] if any(word.startswith("out=") for word in words or []) else ["out=unused"]
    config = read_stage_config(stage, file, [*given, *(words or [])])
    unet, factor = unet_settings(config.teacher)
    frames, height, width = clip_size(config.data, *clip)
    parts = gpus * config.accumulation
    if config.batch_size % parts:
        raise UserError(f"batch_size={config.batch_size} does not divide among {gpus} GPUs; give a multiple of {parts}")
    levels = len(unet.get("channel_mult", (1, 2, 4, 4)))
    multiple = factor * 2 ** (levels - 1)
    if height % multiple or width % multiple:
        raise UserError(f"frames of {height}x{width} do not fit this model; use multiples of {multiple}")
    size = Size(config.batch_size // parts, frames, height // factor, width // factor)
    hardware = Hardware(gpus, memory, *rate)
    print_plan(make_plan(config, profiles(config, unet, size), hardware), hardware, Console())


def guarded(call: Callable[[], object]) -> None:
    """Run ``call``; a `UserError` becomes one sentence on stderr and exit code 2, Ctrl-C exit code 130, an end that was
    asked for and came in order exit code 0."""
    try:
        call()
    except Stopped as stopped:
        print(f"fvgen: {stopped}", file=sys.stderr)
        sys.exit(0)
    except UserError as error:
        if int(os.environ.get("RANK", 0)) > 0:
            # All processes of a run make the same mistake. The launcher ends the others when the first one has ended;
            # a sentence that only this one has to say comes through.
            time.sleep(QUIET_SECONDS)
        print(f"fvgen: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fvgen: interrupted; the same command again resumes", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """The parser of recipes and benchmarks: ``description`` keeps its lines, a mistake is a `UserError`."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def deepspeed_setting(file: str) -> list[str]:
    """A recipe's --deepspeed option as a setting."""
    return [f"deepspeed={file}"] if file else []


def positive(text: str) -> int:
    """An integer of at least 1, as a type for `argparse`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main() -> None:
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        # typer's own errors; their class is click's or, in newer versions, a copy of it
        if not hasattr(error, "format_message"):
            raise
        sentence = " ".join(error.format_message().split()).rstrip(".")
        print(f"fvgen: {sentence}; see --help", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
