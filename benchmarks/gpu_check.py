"""All that wants to be known of a GPU, in one go of at most nine minutes; started by `make gpu-check`.

    python benchmarks/gpu_check.py [--device cuda] [--preset full|tiny] [--parts NAME ...] [--minutes 9] [--out DIR]
    make gpu-check DEVICE=cpu SIZE=tiny      # the rehearsal: everything but the numbers

What is measured is what `PARTS` says, each part in a process of its own with a time limit of its own. Its rows go to
DIR/PART.json as soon as they are known, so that a cut leaves results; at the end, and after every part, DIR/README.md
shows all that are there (--parts measures some of them again). DIR is benchmarks/results/gpu, for a rehearsal
runs/gpu-check. Nothing is installed or fetched: a part whose packages are missing says so. What `fvgen plan` predicts
is computed beside the other parts, on the CPU; compiling goes on there as well. Weights are random; only time and
memory mean something, and in the parts "tests" and "demo" numbers.

Columns: peak_gb, most that tensors took (GB); predicted_gb, what the plan says of that, and error, by how much it is
off; tflop, the model's work without what checkpointing computes again; utilisation, that per second over the GPU's
dense bfloat16 peak. The last line is JSON; the exit code is 1 where a part failed or was cut.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pages import page

from fvgen.errors import UserError
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import atomic_path, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0}  # dense bfloat16
PATIENT = 40  # seconds that a test may take before the log says where it is
PATIENCE = 20  # times as long may a rehearsal take, on a CPU that others use as well
SHARING = {"share_backbone": True, "student_lora": True}
ZERO = "recipes/deepspeed/zero2.json"
# Frames, height and width of the clips: the paper's, and ViewCrafter's largest.
CLIPS = {"full": ((16, 320, 512), (25, 576, 1024)), "tiny": ((2, 64, 64), (3, 64, 128))}


class Skipped(Exception):
    """A part that cannot be done here, and why."""


@dataclass
class Report:
    """A part's file: whole after every row."""

    file: Path
    device: str
    size: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.size == "full"

    @property
    def dtype(self) -> Any:
        """bfloat16, which CPUs without instructions for it convolve a hundred times as slowly as float32."""
        import torch

        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def clips(self) -> tuple[tuple[int, int, int], ...]:
        return CLIPS[self.size]

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.write("running")

    def write(self, state: str, **facts: Any) -> None:
        write_json(self.file, {"state": state, **facts, "rows": self.rows})


# --- The parts. They import what they need: one that is cut or cannot be imported must not take others along. ---


def tests(report: Report) -> None:
    """The tests that are marked gpu."""
    import pytest

    class Teller:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or not report.passed:
                why = "" if report.passed else str(report.longrepr[-1] if report.skipped else report.longrepr)
                lines = [line for line in why.splitlines() if line.startswith("E ")] or why.splitlines()[-1:]
                row = {"test": report.nodeid.partition("::")[2], "outcome": report.outcome}
                rows.add(**row, seconds=round(report.duration, 2), why=" ".join(lines)[:200])

    rows = report
    os.environ["FVGEN_TEST_DEVICE"] = report.device
    os.chdir(REPOSITORY)
    quick = [] if report.full else ["-k", "not resumes"]  # the part "demo" trains as well
    told = ["-o", f"faulthandler_timeout={PATIENT}"]  # where a test hangs stands in the log, which a cut leaves
    pytest.main(["tests/test_gpu.py", "-m", "gpu", "-q", "-p", "no:cacheprovider", *told, *quick], plugins=[Teller()])
    if bad := [row["test"] for row in report.rows if row["outcome"] == "failed"]:
        raise AssertionError(f"{len(bad)} tests failed: {', '.join(bad)}")
    if not report.rows:
        raise AssertionError("pytest found no test")


def demo(report: Report) -> None:
    """The tiny preset trained and sampled on the CPU and on the device: the same numbers within bounds."""
    import devices

    work = {"iterations": 5, "clips": 2, "steps": 50, "trained_on": 16}
    if not report.full:
        work = {"iterations": 1, "clips": 1, "steps": 2, "trained_on": 4}
    both = [devices.measure(device, **work) for device in ("cpu", report.device)]
    for row in devices.compare(*both):
        report.add(**row)
    if bad := [row["what"] for row in report.rows if not row.get("agrees", True)]:
        raise AssertionError(f"not the CPU's: {', '.join(bad)}")


def forward(report: Report) -> None:
    """The published UNet in bfloat16: forward passes, and one with its backward pass under activation checkpointing."""
    import full_size

    from fvgen.system.work import Work

    unet = random_unet(report)
    for frames, height, width in report.clips:
        arguments = full_size.inputs(unet, (frames, height // 8, width // 8), report.device)
        with full_size.torch.no_grad(), Work() as work:
            unet(*arguments)
        with full_size.torch.no_grad():
            row = full_size.measured("forward", lambda arguments=arguments: unet(*arguments), report.device, repeats=3)
        report.add(clip=clip_name((frames, height, width)), **timed(row, work.flops / 1e12))
    frames, height, width = report.clips[0]
    for row in full_size.any_device(unet, (frames, height // 8, width // 8), report.device)[1:]:
        report.add(clip=clip_name((frames, height, width)), **timed(row))


def iteration(report: Report, which: int = 0) -> None:
    """A stage-2 iteration at 16 frames of 320x512: one frozen network with adapters, ZeRO-2, bfloat16."""
    import stage2_iteration

    from fvgen.distill.engines import join_world
    from fvgen.models.family import Size

    if not find_spec("peft"):
        raise Skipped("peft is not installed, which makes the adapters")
    config = iteration_settings(report)
    size, world = Size(1, *report.clips[which]), join_world(config)
    repeats = 3 if report.full else 1
    row = stage2_iteration.measure(config, world, blueprint_of(report), size, repeats)
    engine = "ZeRO-2" if config.memory.deepspeed else "plain (deepspeed is not installed)"
    report.add(clip=clip_name(report.clips[which]), engine=engine, seconds=row["seconds"], peak_gb=row["peak_gb"])


def iteration_large(report: Report) -> None:
    """The same at 25 frames of 576x1024."""
    iteration(report, 1)


def clips(report: Report) -> None:
    """Seconds per clip, decoding included: the student's 4 steps, the teacher's 50 guided ones."""
    import full_size

    preset, unet = full_size.PRESETS[report.size], random_unet(report)
    with full_size.torch.device("meta"):
        vae = full_size.AutoencoderKL(**full_size.vae_config(preset["vae"]))
    vae = full_size.cheap_weights(vae, report.device, report.dtype)
    for frames, height, width in report.clips:
        size = (frames, height // 8, width // 8)
        for row in full_size.seconds_per_clip(unet, vae, size, preset["steps"], report.device):
            report.add(clip=clip_name((frames, height, width)), **timed(row))


def compiled(report: Report) -> None:
    """The forward pass at 16 frames of 320x512, eager and compiled, from the cache that "compiling" has filled."""
    import full_size

    frames, height, width = report.clips[0]
    size, backend = (frames, height // 8, width // 8), "inductor" if report.full else "eager"
    for row in full_size.eager_and_compiled(random_unet(report), size, report.device, backend):
        report.add(clip=clip_name(report.clips[0]), backend=backend, **timed(row))


def compiling(report: Report) -> None:
    """Compiling the UNet for the part "compiled", beside the parts before it."""
    compiled(report)


def renderer(report: Report) -> None:
    """The point renderer at ViewCrafter's settings."""
    import renderer as benchmark

    for views in (1, 4) if report.full else (1,):
        _, height, width = report.clips[0]
        report.add(**benchmark.measure(height, width, views, 3 if report.full else 1, report.device))


def gaussians(report: Report) -> None:
    """The same clouds as Gaussians, by gsplat where it is installed."""
    if not find_spec("gsplat"):
        raise Skipped("gsplat is not installed")
    if report.device == "cpu":
        raise Skipped("gsplat needs a GPU")
    import full_size
    import gsplat
    import torch
    from renderer import clouds

    _, height, width = report.clips[0]
    points, colors, cameras = (x.to(report.device) for x in clouds(height, width, 4))
    count = len(points)
    turns = torch.tensor([1.0, 0, 0, 0], device=report.device).expand(count, 4)
    scales, opacities = torch.full((count, 3), 0.005, device=report.device), torch.full((count,), 0.9).to(report.device)
    views, lenses = cameras.cam_from_world, cameras.intrinsics

    def render() -> None:
        gsplat.rasterization(points, turns, scales, opacities, colors, views, lenses, width, height)

    report.add(**full_size.measured("first call, which may compile gsplat", render, report.device))
    row = full_size.measured("4 views", render, report.device, repeats=5)
    report.add(**row, seconds_per_view=round(row["seconds"] / 4, 5), points=count)


def predictions(report: Report) -> None:
    """What `fvgen plan` says of these iterations."""
    import stage2_iteration

    from fvgen.models.family import Size
    from fvgen.system.processes import ALONE

    stage2_iteration.torch.set_num_threads(1)
    config, blueprint = iteration_settings(report), blueprint_of(report)
    for clip in report.clips:
        report.add(clip=clip_name(clip), **stage2_iteration.predict(config, ALONE, blueprint, Size(1, *clip)))


def random_unet(report: Report) -> Any:
    """The published UNet, or the tiny preset's of `full_size`, with cheap weights on the device."""
    import full_size

    with full_size.torch.device("meta"):
        unet = full_size.ViewCrafterUNet(**full_size.PRESETS[report.size]["unet"])
    return full_size.cheap_weights(unet, report.device, report.dtype)


def iteration_settings(report: Report) -> Any:
    """ZeRO-2 where DeepSpeed is installed and there is a GPU, else the plain engine."""
    import stage2_iteration

    zero = {"deepspeed": str(REPOSITORY / ZERO)} if find_spec("deepspeed") and report.device == "cuda" else {}
    cheap = {"precision": "float32"} if report.device == "cpu" else {}
    return stage2_iteration.settings(report.device, **SHARING, **zero, **cheap)


def blueprint_of(report: Report) -> Any:
    """The published network, or the tiny preset's."""
    import full_size
    import stage2_iteration

    if report.full:
        return stage2_iteration.blueprint_of(320)
    files = dict(stage2_iteration.FAMILY.published["viewcrafter"])
    return stage2_iteration.FAMILY.blueprint(files | {"unet": full_size.PRESETS["tiny"]["unet"]})


def clip_name(clip: tuple[int, int, int]) -> str:
    return f"{clip[0]}x{clip[1]}x{clip[2]}"


def timed(row: dict[str, Any], tflop: float | None = None) -> dict[str, Any]:
    """A row of `full_size.measured`, in the columns of this page."""
    named = {"what": row["what"], "seconds": row["seconds"], "peak_gb": round(row["peak_gib"] * 2**30 / 1e9, 2)}
    return named if tflop is None else named | {"tflop": round(tflop, 3)}


@dataclass(frozen=True)
class Part:
    """``limit``: seconds, of which all of `PARTS` together take less than nine minutes."""

    run: Callable[[Report], None]
    limit: int


# What matters most first: a machine may be taken away at any moment.
PARTS = {
    "forward": Part(forward, 45),
    "iteration": Part(iteration, 60),
    "iteration_large": Part(iteration_large, 75),
    "clips": Part(clips, 85),
    "renderer": Part(renderer, 10),
    "gaussians": Part(gaussians, 20),
    "tests": Part(tests, 125),
    "demo": Part(demo, 55),
    "compiled": Part(compiled, 60),
}
# Of the CPU alone (but for a pass or two), while the others are at work.
BESIDE = {"predictions": Part(predictions, 530), "compiling": Part(compiling, 470)}
NEEDED_BY = {"predictions": "iteration", "compiling": "compiled"}  # the parts whose names start so


# --- One part, in this process ---


def run_part(name: str, report: Report) -> None:
    """Exit code 0 for all ends that the report tells."""
    start = time.perf_counter()
    try:
        report.write("running")
        {**PARTS, **BESIDE}[name].run(report)
        state, facts = "done", {}
    except Skipped as reason:
        state, facts = "skipped", {"why": str(reason)}
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "fvgen":
            raise
        state, facts = "skipped", {"why": f"{error.name} is not installed"}
    except AssertionError as error:
        state, facts = "failed", {"why": str(error)}
    report.write(state, seconds=round(time.perf_counter() - start, 1), **facts)


# --- All parts, each in a process of its own ---


class Child:
    """A part at work."""

    def __init__(self, name: str, device: str, size: str, out: Path) -> None:
        self.name, self.file, self.start = name, out / f"{name}.json", time.monotonic()
        self.limit = {**PARTS, **BESIDE}[name].limit * (1 if size == "full" else PATIENCE)
        self.file.unlink(missing_ok=True)
        self.log = out / f"{name}.log"
        command = [sys.executable, __file__, "--part", name, "--device", device, "--preset", size, "--out", str(out)]
        paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if device == "cpu":
            environment["OMP_NUM_THREADS"] = "1"  # several parts at once: their threads would wait for each other
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def finish(self, end: float) -> dict[str, Any]:
        """Wait for its limit or, where that is earlier, until ``end``; what it leaves, and in which state."""
        end = min(end, self.start + self.limit)
        try:
            code = self.process.wait(max(0.0, end - time.monotonic()))
            facts = {} if code == 0 else {"state": "failed", "why": f"exit code {code}: {self.last_line()}"}
        except subprocess.TimeoutExpired:
            facts = {"state": "cut", "why": f"not done after {end - self.start:.0f} s"}
        finally:
            self.end()
        found = json.loads(self.file.read_text()) if self.file.is_file() else {"rows": []}
        found |= facts | {"wall_seconds": round(time.monotonic() - self.start, 1)}
        write_json(self.file, found)
        if found["state"] in ("done", "skipped"):
            self.log.unlink(missing_ok=True)
        return found

    def end(self) -> None:
        """All processes of the part."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else "nothing was printed"


def facts_of(device: str, size: str) -> dict[str, Any]:
    """The settings of the page: on which machine, with what."""
    commit = "unknown"
    with suppress(OSError, subprocess.CalledProcessError):  # a machine without git, a copy without its history
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    script = (
        "import torch, json; print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.get_device_name()"
        " if torch.cuda.is_available() else '']))"
    )
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    version, cuda, gpu = json.loads(asked.stdout) if asked.returncode == 0 else ("none", None, "")
    if device.startswith("cuda") and not gpu:
        raise UserError("there is no GPU that torch can use; rehearse with DEVICE=cpu SIZE=tiny")
    hardware = gpu if device.startswith("cuda") else platform.machine()
    peak = next((peak for name, peak in PEAKS.items() if name in hardware), None)
    facts = {"command": f"make gpu-check DEVICE={device} SIZE={size}", "commit": commit}
    return facts | {"hardware": hardware, "peak_tflops": peak, "torch": version, "cuda": cuda}


def summary(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """All that lies in the folder, as `pages.page` takes it; a part's rows with what was predicted of them."""
    files = {name: out / f"{name}.json" for name in {**PARTS, **BESIDE}}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    predicted = {row["clip"]: row for row in found.get("predictions", {}).get("rows", [])}
    overview = [
        {"part": name, "what": ({**PARTS, **BESIDE}[name].run.__doc__ or "").strip()}
        | {key: part.get(key, "") for key in ("state", "wall_seconds", "why")}
        for name, part in found.items()
    ]
    parts = {"overview": overview}
    for name, part in found.items():
        if name == "predictions" or not part["rows"]:
            continue
        known = predicted if name.startswith("iteration") else {}
        rows = [row | known.get(row.get("clip"), {}) for row in part["rows"]]
        parts[name.replace("_", ", ")] = [judged(row, facts) for row in rows]
    return {"settings": facts, "parts": parts}


def judged(row: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The row and the prediction's error and the utilisation, where it has what these need and there is a GPU."""
    row = dict(row)
    if facts["peak_tflops"] is None:
        return row
    if "predicted_gb" in row and "peak_gb" in row:
        row["error"] = f"{100 * (row['predicted_gb'] / row['peak_gb'] - 1):+.1f} %"
    if "tflop" in row:
        row["utilisation"] = f"{100 * row['tflop'] / row['seconds'] / facts['peak_tflops']:.1f} %"
    return row


def write_page(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """README.md and summary.json; returns the latter."""
    found = summary(out, facts)
    write_json(out / "summary.json", found)
    remarks = ["weights are random: time and memory alone mean something, but in the parts tests and demo"]
    with atomic_path(out / "README.md") as temporary:
        temporary.write_text(page("A GPU, checked", "gpu_check.py", remarks, found))
    return found


def check(device: str, size: str, names: list[str], minutes: float, out: Path) -> dict[str, Any]:
    """The summary of what was found; the parts that did not end well are in its overview."""
    end = time.monotonic() + 60 * minutes * (1 if size == "full" else PATIENCE)
    facts = facts_of(device, size)
    out.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the parts, in sessions of their own, end too
    wanted = [beside for beside, start in NEEDED_BY.items() if any(name.startswith(start) for name in names)]
    beside = {name: Child(name, device, size, out) for name in wanted}
    try:
        for name in names:
            if name == "compiled":
                tell("compiling", beside["compiling"].finish(end))
            tell(name, Child(name, device, size, out).finish(end))
            write_page(out, facts)
        if "predictions" in beside:
            tell("predictions", beside["predictions"].finish(end))
    finally:
        for child in beside.values():
            child.end()
        signal.signal(signal.SIGTERM, before)
    return write_page(out, facts)


def tell(name: str, ended: dict[str, Any]) -> None:
    print(f"{name:16s} {ended['state']:8s} {ended['wall_seconds']:6.1f} s  {ended.get('why', '')}", flush=True)


def main() -> None:
    parser = Parser(__doc__, {"--size": "--preset full|tiny"})
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", choices=sorted(CLIPS), default="full")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--minutes", type=positive, default=9, help="for all parts together")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--part", choices=[*PARTS, *BESIDE], help="this one, in this process")
    args = parser.parse_args()
    rehearsal = REPOSITORY / "runs" / "gpu-check"
    real = args.preset == "full" and args.device.startswith("cuda")
    out = args.out or (REPOSITORY / "benchmarks" / "results" / "gpu" if real else rehearsal)
    if args.part:
        run_part(args.part, Report(out / f"{args.part}.json", args.device, args.preset))
        return
    found = check(args.device, args.preset, args.parts, args.minutes, out)
    print(json.dumps(found))
    if any(row["state"] not in ("done", "skipped") for row in found["parts"]["overview"]):
        sys.exit(1)


if __name__ == "__main__":
    guarded(main)
