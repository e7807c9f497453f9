"""Peak memory of a stage-2 iteration, measured and predicted: three models, activation checkpointing, LoRA sharing.

    python benchmarks/memory.py [--channels 96] [--frames 4] [--side 16] [--rank 8] [--device cpu] [--out FILE.json]

Every way to run gets a process of its own, in which the plain engine trains random networks of ViewCrafter's
architecture (``--channels`` instead of 320) on random clips for two iterations. Measured is what the process's
resident memory (on a GPU: its allocated memory) grew by from before the networks were made to its peak; predicted is
what `fvgen plan` says. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

# The C library keeps freed memory for later unless it is told to give large blocks back: their number is measured here.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "65536")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json


def stage_settings(device: str, rank: int, **changes: object) -> dict[str, Any]:
    common = {"out": "unused", "batch_size": 1, "critic_updates": 1, "guidance": 1.0, "device": device}
    return common | ({"lora_rank": rank} if "share_backbone" in changes else {}) | changes


def measure(settings: dict[str, Any], channels: int, frames: int, side: int) -> float:
    """GB that two iterations need, in this process."""
    import torch
    from stage2_iteration import blueprint_of, iterate, make_method, random_batch

    from fvgen.distill.config import stage_config
    from fvgen.models.family import Size
    from fvgen.system.processes import ALONE

    config = stage_config("dmd", settings)
    warm_up = torch.nn.Conv2d(4, 4, 3)  # libraries load their kernels at the first use
    torch.optim.AdamW(warm_up.parameters())
    warm_up(torch.randn(1, 4, 8, 8)).sum().backward()
    if config.memory.share_backbone:
        import peft  # noqa: F401
    on_gpu = config.run.device.startswith("cuda")
    before = 0.0 if on_gpu else resident("VmRSS")

    blueprint, size = blueprint_of(channels), Size(1, frames, 8 * side, 8 * side)
    method = make_method(config, blueprint, size, ALONE)
    batch = random_batch(blueprint, size, config.run.device)
    for number in (1, 2):
        iterate(method, batch, number)
    return torch.cuda.max_memory_allocated() / 1e9 if on_gpu else resident("VmHWM") - before


def resident(key: str) -> float:
    """GB of this process now (VmRSS) or at most so far (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e9


def predict(settings: dict[str, Any], channels: int, frames: int, side: int) -> tuple[float, float]:
    """(GB, TFLOP of an iteration) by `fvgen.planning.plan`."""
    from stage2_iteration import FAMILY, blueprint_of

    from fvgen.distill.config import stage_config
    from fvgen.models.family import Size
    from fvgen.planning.plan import CPU_RUNTIME_GB, RUNTIME_GB, SHARES, Choice, Hardware, estimate
    from fvgen.planning.simulate import simulate

    config = stage_config("dmd", settings)
    profile = simulate(config, FAMILY, blueprint_of(channels), Size(1, frames, 8 * side, 8 * side))
    share = next(
        name for name, value in SHARES.items() if value == (config.memory.share_backbone, config.memory.student_lora)
    )
    choice = Choice(0, config.memory.checkpoint_activations, share)
    runtime = RUNTIME_GB if config.run.device.startswith("cuda") else CPU_RUNTIME_GB
    return estimate(config, profile, choice, Hardware(1, runtime_gb=runtime)).total, profile.flops / 1e12


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--channels", type=positive, default=96)
    parser.add_argument("--frames", type=positive, default=4)
    parser.add_argument("--side", type=positive, default=16, help="of the latents")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ways: dict[str, dict[str, object]] = {
        "three models": {},
        "three models, activation checkpointing": {"checkpoint_activations": True},
        "LoRA fake score": {"share_backbone": True},
        "LoRA both": {"share_backbone": True, "student_lora": True},
        "LoRA both, activation checkpointing": {
            "share_backbone": True,
            "student_lora": True,
            "checkpoint_activations": True,
        },
    }
    size = (args.channels, args.frames, args.side)
    rows = {}
    for name, changes in ways.items():
        settings = stage_settings(args.device, args.rank, **changes)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(measure, (settings, *size))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            predicted, tflop = pool.apply(predict, (settings, *size))
        error = predicted / measured - 1
        rows[name] = {"measured_gb": round(measured, 3), "predicted_gb": round(predicted, 3), "error": round(error, 3)}
        rows[name]["tflop"] = round(tflop, 4)
        rows[name]["of_three_models"] = round(measured / rows["three models"]["measured_gb"], 3)
        print(f"{name:42s} {rows[name]}", flush=True)
    result = {"channels": args.channels, "frames": args.frames, "side": args.side, "rank": args.rank, "rows": rows}
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
