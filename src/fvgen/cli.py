"""`fvgen`: the words of its commands; what they do is in calls.py. A user's mistake is one sentence on stderr and exit
code 2."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fvgen import __version__, calls
from fvgen.errors import UserError
from fvgen.system.command import guarded, interrupted, renamed, reopen_closed

MOST, MOST_FRAMES = 1_000_000, 10_000  # what is beyond would never end, and is a slip of the finger

RENAMED = dict.fromkeys(("--height", "--width"), "--size HEIGHTxWIDTH")  # options of earlier versions

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil slow novel-view video diffusion into 4-step students.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"fvgen {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the student and the report; run again to resume.")],
    data: Annotated[str | None, typer.Option(help="Scenes, shards or clips; the built-in ones if not given.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Clips that judge; a part of the scenes if not given.")] = None,
    teacher: Annotated[str, typer.Option(help="Preset or model folder.")] = "tiny",
    frames: Annotated[
        int | None, typer.Option(min=2, max=MOST_FRAMES, help="Of clips made from scenes; else the teacher's own.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of clips made from scenes, HEIGHTxWIDTH.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of training and sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Distil a student from a teacher, the tiny one if no other is given, and compare them on held-out scenes."""
    options = {"held_out": held_out, "teacher": teacher, "frames": frames}
    guarded(partial(calls.demo, out, data, seed, device, size, options))


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Option(help="The published checkpoint; with --to-lvdm a model folder.")],
    out: Annotated[Path, typer.Option(help="New model folder; with --to-lvdm a .ckpt or .safetensors.")],
    config: Annotated[str | None, typer.Option(help="Its yaml (path, URL or Hub file).")] = None,
    only: Annotated[str | None, typer.Option(help="unet,vae,image_projector,image_encoder,text_encoder")] = None,
    to_lvdm: Annotated[bool, typer.Option("--to-lvdm", help="From a model folder back to one checkpoint.")] = False,
    layout: Annotated[str | None, typer.Option(help="ends: for DynamiCrafter_512_Interp, which has no yaml.")] = None,
    base: Annotated[str | None, typer.Option(help="VideoScene: the CogVideoX folder below its weights.")] = None,
    prompts: Annotated[str | None, typer.Option(help="CogVideoX: the encoded prompt, a .pt or .safetensors.")] = None,
    preset: Annotated[str | None, typer.Option(help="VideoScene: re10k (t = 549) or demo (t = 459).")] = None,
) -> None:
    """Convert checkpoints of ViewCrafter, DynamiCrafter and GenFusion to model folders, and back; CogVideoX's folders
    and VideoScene's weights."""
    cogvideox = {"base": base, "prompts": prompts, "preset": preset}
    guarded(partial(calls.convert, config, checkpoint, out, only, to_lvdm, layout, cogvideox))


@app.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="Posed scenes, photographs, videos, or folders of these.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; run again to resume.")],
    frames: Annotated[
        int | None, typer.Option(min=2, max=MOST_FRAMES, help="Of a clip; the teacher's own number if not given.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; 320x512, or 48x64 for tiny, if not given.")] = None,
    max_stride: Annotated[int, typer.Option(min=1, max=MOST, help="Strides are drawn from 1 to this.")] = 4,
    teacher: Annotated[str, typer.Option(help="Preset or model folder whose encoders are used.")] = "tiny",
    points: Annotated[str, typer.Option(help="auto, depth, stereo, ...")] = "auto",
    clips_per_scene: Annotated[int, typer.Option(min=1, max=MOST, help="How many are tried of each scene.")] = 8,
    clips_per_shard: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tried for one file; a kill costs no more work.")
    ] = 32,
    known_views: Annotated[
        int, typer.Option(min=1, max=MOST_FRAMES, help="Frames that the point cloud is made from.")
    ] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    keep_frames: Annotated[bool, typer.Option("--keep-frames", help="Keep pixels too: to score models on.")] = False,
    others: Annotated[
        int, typer.Option(min=0, max=MOST_FRAMES, help="Photographs near a clip to keep with its frames, for LaLRM.")
    ] = 0,
    closed: Annotated[bool | None, typer.Option(help="Renders without holes; as the model wants if not given.")] = None,
    part: Annotated[str, typer.Option(help="I/N: the I-th of N shares of the scenes, for job arrays.")] = "1/1",
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="Processes; one per core if not given.")] = None,
    device: Annotated[str, typer.Option(help="Of the encoders: cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Make shards of encoded training clips from photographs and videos."""
    options = {
        "frames": frames, "max_stride": max_stride, "teacher": teacher, "points": points, "seed": seed,
        "clips_per_scene": clips_per_scene, "known_views": known_views, "workers": workers, "device": device,
        "clips_per_shard": clips_per_shard, "keep_frames": keep_frames, "closed": closed,
        "others": others,
    }  # fmt: skip
    guarded(partial(calls.prepare, sources, out, size, part, options))


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Shard folder (or its address), a scene, photographs or a video.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("inspect.html"),
    clips: Annotated[
        int | None, typer.Option(min=1, max=1000, help="To show; 8, or 2 of a scene, if not given.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model folder whose VAE decodes; the shards' if a preset.")
    ] = None,
) -> None:
    """Show shards or a scene on one HTML page."""
    guarded(partial(calls.inspect, path, out, clips, teacher))


@app.command()
def generate(
    photographs: Annotated[list[Path], typer.Argument(help="1 to 50, a folder of them, a video, or a posed scene.")],
    out: Annotated[Path, typer.Option(help="Folder for the walk-through; run again to resume.")],
    model: Annotated[str, typer.Option(help="Preset, model folder, or ORGANISATION/NAME on the Hub.")] = "tiny",
    trajectory: Annotated[
        str | None,
        typer.Option(help="through, focus, orbit, spiral, dolly, pan (orbit:30), a file or folder."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="A clip from photograph to photograph if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the sampler; the model's own if not given.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; the model's own if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    points: Annotated[str, typer.Option(help="auto, depth, stereo, ...")] = "auto",
    views: Annotated[int, typer.Option(help="Photographs that give points and are visited.")] = 5,
    seams: Annotated[str | None, typer.Option(help="How clips are chained; see docs/generate.md.")] = None,
    scene: Annotated[bool, typer.Option("--scene", help="Fit 3D Gaussians at the end.")] = False,
    holdout: Annotated[int, typer.Option(help="Photographs that are given nowhere, to score the scene on.")] = 0,
    dataparser: Annotated[Path | None, typer.Option(help="dataparser_transforms.json of a nerfstudio path.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Make a walk-through video of photographs, and a data set of all its views."""
    options = {
        "model": model, "trajectory": trajectory, "frames": frames, "steps": steps, "seed": seed, "points": points,
        "views": views, "scene": scene, "holdout": holdout, "dataparser_transforms": dataparser, "device": device,
    } | ({} if seams is None else {"seams": seams})  # fmt: skip
    guarded(partial(calls.generate, photographs, out, size, options))


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen at; any but 127.0.0.1 lets others in.")] = "127.0.0.1",
    model: Annotated[str, typer.Option(help="Preset, model folder, or ORGANISATION/NAME on the Hub.")] = "tiny",
    student: Annotated[str | None, typer.Option(help="The same of its student, to compare both.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where the work folder is made; the system's temporary one.")
    ] = None,
    max_photographs: Annotated[int, typer.Option(min=1, max=50, help="Of one visitor.")] = 50,
    max_megabytes: Annotated[int, typer.Option(min=1, max=1024, help="Of one photograph.")] = 32,
    max_minutes: Annotated[float, typer.Option(min=0.1, max=MOST, help="Of one job.")] = 30.0,
    keep_minutes: Annotated[float, typer.Option(min=1, max=MOST, help="Until a silent visitor is forgotten.")] = 60.0,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="At work at once; the others queue.")] = 1,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in this machine's browser.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Serve a page for `generate` in the browser: photographs, path, progress, comparison, 3D scene, download."""
    most = {"photographs": max_photographs, "file_bytes": max_megabytes << 20, "minutes": max_minutes}
    options = {"host": host, "port": port, "work": work, "keep_minutes": keep_minutes, "jobs": jobs}
    guarded(partial(calls.ui, model, student, most, options | {"browser": browser, "device": device}))


@app.command()
def evaluate(
    predicted: Annotated[Path, typer.Argument(help="A folder of pictures, a data set, or a video.")],
    truth: Annotated[
        Path | None, typer.Argument(help="The same of what it should be; names match, or the order.")
    ] = None,
    cameras: Annotated[
        bool, typer.Option("--cameras", help="Also camera errors and consistency, by structure from motion: minutes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the scores; a CSV of all frames goes beside it.")
    ] = None,
) -> None:
    """PSNR, SSIM, LPIPS, FID and KID of any number of pictures; whether they obey their cameras."""
    guarded(partial(calls.evaluate, predicted, truth, out, cameras))


@app.command()
def reconstruct(
    dataset: Annotated[Path, typer.Argument(help="Posed views: what generate writes, or any scene that is read.")],
    out: Annotated[Path | None, typer.Option(help="Folder for scene.ply and scene.html; the data set's own.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the views; their own, at most 512.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Of the fit.")] = None,
    gaussians: Annotated[int | None, typer.Option(help="At most so many.")] = None,
    generated_weight: Annotated[float | None, typer.Option(help="Of generated views; photographs have 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Fit 3D Gaussians to posed views: scene.ply, and a page to look at it."""
    chosen = {"iterations": iterations, "most": gaussians, "generated_weight": generated_weight}
    given = {name: value for name, value in chosen.items() if value is not None}
    guarded(partial(calls.reconstruct, dataset, out, size, given, seed, device))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a stage: the out=DIR of its recipe.")],
    out: Annotated[Path, typer.Option(help="Folder for the student, in the format of diffusers.")],
    iteration: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Which checkpoint; the newest if not given.")
    ] = None,
) -> None:
    """Write the averaged student of a checkpoint as a model folder; the run may still be going on."""
    guarded(partial(calls.export, run, out, iteration))


@app.command()
def policy(
    run: Annotated[Path, typer.Argument(help="Folder of a finished stage of method leap, or such a student's.")],
    data: Annotated[str | None, typer.Option(help="Shards or clips to learn from; the run's own if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Model folder: the student with its policy; RUN/policy.")] = None,
    method: Annotated[
        str, typer.Option(help="full: all rewards at once; reinforce: one a draw, as the paper.")
    ] = "full",
    clips: Annotated[int, typer.Option(min=1, max=MOST, help="In the table at most; every fifth only judges.")] = 256,
    lpips: Annotated[float, typer.Option(min=0, max=1000, help="Weight of LPIPS beside the squared error.")] = 0.0,
    iterations: Annotated[int, typer.Option(min=1, max=MOST, help="Of the policy's training.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Learn where a leap should land, clip by clip: a table of rewards of the finished student, and a small network."""
    settings = {"method": method, "iterations": iterations, "seed": seed}
    guarded(partial(calls.policy, run, data, out, settings, clips, lpips, device))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead; docs/doctor.md.")] = False,
) -> None:
    """What works on this machine, what is missing for what, and the command for each cure; exit code 1 if the core
    fails."""
    guarded(partial(calls.doctor, as_json))


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="Folder of a stage (the out=DIR of its recipe), or of a demo.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a run's numbers say went wrong, the most serious first, and what to try; it may still be going on."""
    guarded(partial(calls.diagnose, run, as_json))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of stages, of demos, or of recipes/distill.py.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Put runs on one HTML page, seeds of one method or several methods: numbers, pictures, curves, diagnosis."""
    guarded(partial(calls.report, runs, out))


@app.command()
def plan(
    config: Annotated[Path, typer.Option(help="YAML file of settings, as for the recipes.")],
    gpus: Annotated[int, typer.Option(min=1, max=MOST, help="Processes, one GPU each.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0.1, max=1e6, help="GB of one GPU.")] = 80.0,
    stage: Annotated[str, typer.Option(help="gan or dmd")] = "dmd",
    frames: Annotated[
        int | None, typer.Option(min=1, max=MOST_FRAMES, help="Of a clip; those of the data if not given.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; that of the data if not given.")] = None,
    tflops: Annotated[float, typer.Option(min=0.001, max=1e9, help="Peak rate of one GPU.")] = 989.0,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1.0, help="Part of it that is reached.")] = 0.35,
    settings: Annotated[list[str] | None, typer.Argument(help="key=value that differ from the file")] = None,
) -> None:
    """Predict memory and seconds per iteration for every way to train, and print the command of the best one; nothing
    is trained.

    teacher=viewcrafter plans for the published model without its weights. What was followed once is kept in fvgen's
    cache.
    """
    guarded(partial(calls.plan, config, gpus, gpu_memory, stage, frames, size, (tflops, utilisation), settings))


def main() -> None:
    reopen_closed()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        code = app(standalone_mode=False)
        if code == 130:  # newer typer's answer to Ctrl-C before a command had begun
            raise KeyboardInterrupt
        sys.exit(code)
    except Exception as error:
        # typer's own errors; their class is click's or, in newer versions, a copy of it
        if type(error).__name__ == "Abort":  # Ctrl-C before a command had begun
            interrupted()
        if not hasattr(error, "format_message"):
            raise
        complaint = " ".join(error.format_message().split()).rstrip(".")
        sentence = str(UserError(renamed(complaint, RENAMED) or f"{complaint}; see --help"))
        print(f"fvgen: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        interrupted()


if __name__ == "__main__":
    main()
