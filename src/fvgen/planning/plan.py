"""What will training need? Memory by part and seconds per iteration, for every way to run it, before any of it starts.

Activations, gradients and work come from `fvgen.planning.simulate`; weights, optimiser states and buffers from
arithmetic that follows what `fvgen.distill.engines` and DeepSpeed 0.19 keep. Seconds come from counted work and given
rates: they rank choices, and are no promise.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fvgen
from fvgen.clips.worlds import is_builtin
from fvgen.distill.config import changed
from fvgen.distill.settings import StageConfig
from fvgen.errors import UserError
from fvgen.models.family import Blueprint, Family, Size, published
from fvgen.pipelines.folders import folder_blueprint
from fvgen.pipelines.presets import model_folder
from fvgen.planning.cache import remembered
from fvgen.planning.simulate import STILL, Profile

GB = 1e9
MASTER = MOMENT = 4  # bytes of a float32: a master weight, and each of AdamW's two moments
BUCKET = 200_000_000  # elements, as in recipes/deepspeed
LIVE = 500_000_000  # most elements that ZeRO-3 gathers at once, as in recipes/deepspeed/zero3.json
FITS = 0.95  # of the memory: the allocator needs some room
RUNTIME_GB = 1.5  # CUDA context, kernels and communication on a GPU
CPU_RUNTIME_GB = 0.09  # what libraries keep from their first use on: benchmarks/memory.py --channels 32
RECIPES = {"gan": "stage1_gan.py", "dmd": "stage2_dmd.py"}
RECIPES |= {name: f"{name}.py" for name in ("leap", "camera", "lalrm")}
A_MACHINE = 8  # GPUs at most; more are several machines, which a hostfile names
SHARES = {"three models": (False, False), "LoRA fake score": (True, False), "LoRA both": (True, True)}


@dataclass(frozen=True)
class Hardware:
    """The machines. ``tflops`` is the peak rate of one GPU in the training's type, ``utilisation`` the part of it that
    is reached, ``link`` GB/s between GPUs and ``host_link`` between GPU and CPU memory."""

    gpus: int = 8
    memory_gb: float = 80.0
    tflops: float = 989.0  # H100 SXM, bfloat16, dense
    utilisation: float = 0.35
    link: float = 200.0
    host_link: float = 25.0
    runtime_gb: float = RUNTIME_GB


@dataclass(frozen=True)
class Choice:
    """One way to run: ZeRO stage (0 is the plain engine), what is offloaded, and what is shared."""

    zero: int
    checkpoint_activations: bool
    share: str
    offload_optimizer: bool = False
    offload_teacher: bool = False

    def describe(self) -> str:
        words = [f"ZeRO-{self.zero}" if self.zero else "plain", self.share]
        words += ["activation checkpointing"] * self.checkpoint_activations
        words += ["optimiser on the CPU"] * self.offload_optimizer + ["teacher on the CPU"] * self.offload_teacher
        return ", ".join(words)

    def on_cpu(self) -> str:
        """What is offloaded, in a word."""
        if self.offload_optimizer and self.offload_teacher:
            return "both"
        return "AdamW" if self.offload_optimizer else "teacher" if self.offload_teacher else "-"

    def settings(self) -> dict[str, Any]:
        """What differs in `StageConfig`."""
        shares, student = SHARES[self.share]
        offload = "_offload" if self.offload_optimizer else ""
        return {
            "checkpoint_activations": self.checkpoint_activations,
            "share_backbone": shares,
            "student_lora": student,
            "offload_teacher": self.offload_teacher,
            "deepspeed": f"recipes/deepspeed/zero{self.zero}{offload}.json" if self.zero else "",
        }


@dataclass(frozen=True)
class Estimate:
    """GB on one GPU by part, and what an iteration takes."""

    choice: Choice
    weights: float
    gradients: float
    optimizer: float  # moments, master weights and the result's average
    activations: float
    buffers: float
    seconds: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def estimate(config: StageConfig, profile: Profile, choice: Choice, hardware: Hardware) -> Estimate:
    """``profile`` is that of the choice's checkpointing and sharing, for one part of one process's clips."""
    narrow = 2 if config.memory.precision == "bfloat16" else 4
    zero, n = choice.zero, hardware.gpus if choice.zero else 1
    learning = {name: count for name, count in profile.parameters.items() if name not in STILL}
    width = {name: 4 if name == "head" else narrow for name in learning}  # the head stays float32
    weights = sum(count * width[name] for name, count in learning.items()) / (n if zero == 3 else 1)
    weights += profile.parameters.get("followers", 0) * narrow
    if not choice.offload_teacher:
        weights += profile.parameters["teacher"] * narrow / (n if zero == 3 else 1)

    # The plain engine optimises float32 weights themselves; everything else has float32 masters beside them.
    masters = {name: MASTER if zero or width[name] == 2 else 0 for name in learning}
    states = sum(count * (masters[name] + 2 * MOMENT) for name, count in learning.items())
    result = config.method.all_learners[0]
    optimizer = (0 if choice.offload_optimizer else states / n) + learning[result] * MASTER / n  # the average

    activations, gradients = profile.peak(1 / n if zero >= 2 else 1.0)
    # During a step there are no activations but the float32 gradients of the own partition beside those of the weights.
    largest = max(learning.values())
    step = largest * (4 / n + narrow / (n if zero >= 2 else 1)) if masters[result] else 0.0
    buffers = hardware.runtime_gb * GB + max(0.0, step - activations - gradients)
    if zero:
        buffers += 2 * min(BUCKET, largest) * narrow
    if zero == 3 or choice.offload_teacher:
        buffers += min(LIVE, profile.parameters["teacher"]) * narrow
    return Estimate(
        choice,
        *(part / GB for part in (weights, gradients, optimizer, activations, buffers)),
        seconds=_seconds(config, profile, choice, hardware, narrow),
    )


def _seconds(config: StageConfig, profile: Profile, choice: Choice, hardware: Hardware, narrow: int) -> float:
    """Work at the reached rate, plus what travels and cannot hide: reduce-scatter of gradients and all-gather of
    weights per update; with ZeRO-3 also the weights of every pass; with offload gradients down and weights up."""
    compute = config.memory.accumulation * profile.flops / (hardware.tflops * 1e12 * hardware.utilisation)
    learning = sum(count for name, count in profile.parameters.items() if name not in STILL)
    travels = 2 * learning * narrow * (hardware.gpus - 1) / hardware.gpus if choice.zero else 0.0
    if choice.zero == 3:
        travels += 8 * profile.parameters["teacher"] * narrow * config.memory.accumulation
    host = 2 * learning * 4 / max(1, hardware.gpus) if choice.offload_optimizer else 0.0
    host += 4 * profile.parameters["teacher"] * narrow * config.memory.accumulation if choice.offload_teacher else 0.0
    return compute + travels / (hardware.link * GB) + host / (hardware.host_link * GB)


def choices(hardware: Hardware, stages: Iterable[int] | None = None) -> list[Choice]:
    """All that can be run on the machines: one GPU gains nothing from ZeRO but its offloading."""
    found = []
    for share, checkpointing in product(SHARES, (False, True)):
        for zero in stages or ((0, 2) if hardware.gpus == 1 else (1, 2, 3)):
            if zero == 3 and share != "three models":
                continue
            for offload in (False, True) if zero >= 2 else (False,):
                for teacher in (False, True) if zero and share == "three models" else (False,):
                    found.append(Choice(zero, checkpointing, share, offload, teacher))
    return found


Profiles = dict[tuple[str, bool], Profile]


def profiles(config: StageConfig, family: Family, blueprint: Blueprint, size: Size) -> Profiles:
    """By sharing and checkpointing, what an iteration takes; ``size.batch`` is one process's part."""
    found: Profiles = {}
    for share, checkpointing in track(list(product(SHARES, (False, True))), "following iterations"):
        with suppress(UserError):  # a way to share that the method does not have
            stage = changed(config, **Choice(0, checkpointing, share).settings())
            found[share, checkpointing] = remembered(stage, family, blueprint, size)
    return found


def plan(config: StageConfig, found: Profiles, hardware: Hardware) -> list[Estimate]:
    """Every choice's estimate, the fastest that fits first.

    What fits stays below 95 % of the memory. Full fine-tuning comes before adapters: they are another training, not
    only another way to run the same one.
    """
    possible = [
        choice
        for choice in choices(hardware)
        if (choice.share, choice.checkpoint_activations) in found
        and not (config.method.whole and (choice.zero == 3 or choice.offload_teacher))
    ]
    estimates = [
        estimate(config, found[choice.share, choice.checkpoint_activations], choice, hardware) for choice in possible
    ]
    return sorted(estimates, key=lambda e: _preference(e, hardware))


def _preference(e: Estimate, hardware: Hardware) -> tuple[bool, float, float]:
    if e.total > FITS * hardware.memory_gb:
        return True, e.total, 0.0
    return False, float(e.choice.share != "three models"), e.seconds


def teacher_blueprint(teacher: str) -> tuple[Family, Blueprint]:
    """Of a model folder or preset, or of a published model by name, for which no weights are needed."""
    if found := published(teacher):
        family, files = found
        return family, family.blueprint(files)
    return folder_blueprint(model_folder(teacher))


def clip_size(data: str, frames: int | None, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Frames, height and width as given, or those of the prepared clips."""
    if frames and size:
        return frames, *size
    if is_builtin(data):
        from fvgen.clips.builtin import FRAMES, HEIGHT, WIDTH

        found = FRAMES, HEIGHT, WIDTH
    else:
        from fvgen.clips.folder import ClipFolder
        from fvgen.shards.reader import ShardSet, holds_shards

        clips = ShardSet(data) if holds_shards(data) else ClipFolder(Path(data))
        found = clips.frames, clips.height, clips.width
    return frames or found[0], *(size or found[1:])


def command(
    choice: Choice, hardware: Hardware, config: StageConfig, file: str | Path, words: Sequence[str] = ()
) -> str:
    """The line that trains so. ``file`` and ``words`` were planned with and make ``config``; what differs from them
    follows, and names in capitals are to be filled in."""
    settings = choice.settings()
    zero = settings.pop("deepspeed")
    said = dict(word.partition("=")[::2] for word in words)
    said |= {key: str(value).lower() for key, value in settings.items() if value != getattr(config.memory, key)}
    said.pop("deepspeed", None)
    if not zero and config.memory.deepspeed:
        said["deepspeed"] = ""
    if published(config.run.teacher):
        said["teacher"] = "FOLDER"  # a name to plan with; to train its weights are needed
    if not config.run.device.startswith("cuda"):
        said["device"] = "cuda"
    if config.name == "dmd" and not config.run.init:
        said["init"] = "STAGE_1"
    said.setdefault("out", "OUT")
    launcher = ["python"]
    if zero:
        launcher = ["deepspeed", *(["--num_gpus", str(hardware.gpus)] if hardware.gpus <= A_MACHINE else [])]
    recipe = [recipe_file(RECIPES[config.name]), "--config"] if config.name in RECIPES else [recipe_file("distill.py")]
    line = [*launcher, *recipe, str(file)]
    line += ["--deepspeed", recipe_file(f"deepspeed/{Path(zero).name}")] if zero else []
    return shlex.join([*line, *(f"{key}={value}" for key, value in said.items())])


def recipe_file(name: str) -> str:
    """A file of fvgen's recipes, as seen from here or, elsewhere, in the checkout that runs."""
    near, checkout = Path("recipes") / name, Path(fvgen.__file__).parents[2] / "recipes" / name
    return str(checkout if checkout.exists() and not near.exists() else near)


def print_plan(estimates: list[Estimate], hardware: Hardware, console: Console, line: Callable[[Choice], str]) -> None:
    """The table, and the recommendation below it with the ``line`` that trains so."""
    columns = ("ZeRO", "LoRA", "ckpt", "on CPU", *"WGOAB", "sum", "s", "fits")
    table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # 80 columns wide
    table.caption = "GB on one GPU: Weights, Gradients, Optimiser, Activations, Buffers; s per iteration"
    for e in estimates:
        parts = (e.weights, e.gradients, e.optimizer, e.activations, e.buffers, e.total)
        lora = e.choice.share.removeprefix("LoRA ").replace("three models", "-")
        way = (str(e.choice.zero or "-"), lora, "yes" if e.choice.checkpoint_activations else "-")
        fits = "yes" if e.total <= FITS * hardware.memory_gb else "no"
        table.add_row(*way, e.choice.on_cpu(), *(f"{part:.1f}" for part in parts), f"{e.seconds:.2f}", fits)
    console.print(table)
    best = estimates[0]
    if best.total > FITS * hardware.memory_gb:
        console.print(
            f"Nothing fits {hardware.memory_gb:g} GB; nearest is {best.choice.describe()} with {best.total:.1f} GB. "
            "Take fewer frames, a smaller batch_size, or more GPUs."
        )
        return
    console.print(f"Recommended: {best.choice.describe()} ({best.total:.1f} GB of {hardware.memory_gb:g} GB).")
    console.print(f"  {line(best.choice)}", soft_wrap=True, markup=False, highlight=False)
