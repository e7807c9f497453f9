"""A stage-2 iteration of the published model with random weights: seconds, peak memory, utilisation.

    python benchmarks/stage2_iteration.py --device cuda [key=value ...] [--out FILE]
    deepspeed --num_gpus 1 benchmarks/stage2_iteration.py --device cuda --deepspeed recipes/deepspeed/zero2.json \\
        share_backbone=true student_lora=true --out benchmarks/results/stage2_iteration.json

What is measured, on random clips of 16 frames at 320x512 (--frames, --size): iterations of `fvgen.distill`'s
own updates and engines, one critic update each, bfloat16 with activation checkpointing, guidance 7.5, unless key=value
settings say otherwise; the median of --iterations after two for warming up; and what `fvgen plan` predicts of the
memory (without the 1.5 GB that a GPU keeps for itself). Utilisation is the model's work (without what checkpointing
computes again) per second over --tflops, the GPU's peak. Why: FVGen says that memory kept it to 16 frames on eight such
GPUs. --channels 32 makes a small network of the same shape, for trying this out on a CPU. The last line of the output
is JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import cheap_weights

from fvgen.calls import numbers
from fvgen.clips.latents import LatentBatch
from fvgen.distill.config import changed, parse_overrides, stage_config
from fvgen.distill.draws import Draws
from fvgen.distill.engines import join_world, shard_frozen
from fvgen.distill.learners import make_learner
from fvgen.distill.methods import METHODS
from fvgen.distill.methods.base import Method, Part, Setup
from fvgen.distill.monitor import peak_memory_gb
from fvgen.distill.settings import StageConfig
from fvgen.distill.zero_settings import clips_at_a_time, zero_settings
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Teacher
from fvgen.models.family import Blueprint, Size, named
from fvgen.pipelines.folders import check_device
from fvgen.planning.cache import remembered
from fvgen.planning.plan import CPU_RUNTIME_GB, SHARES, Choice, Hardware, estimate
from fvgen.system.command import Parser, deepspeed_setting, guarded, positive
from fvgen.system.files import write_json
from fvgen.system.processes import World

WARM_UP = 2
COMMON = {
    "batch_size": 1,
    "critic_updates": 1,
    "guidance": 7.5,
    "precision": "bfloat16",
    "checkpoint_activations": True,
}
FAMILY = named("viewcrafter")


def settings(device: str, **given: Any) -> StageConfig:
    """Of an iteration, unless they are given otherwise."""
    return stage_config("dmd", {"out": "unused", "device": device} | COMMON | given)


def blueprint_of(channels: int) -> Blueprint:
    """ViewCrafter's published sizes (320 channels), or a narrower network of the same build."""
    files = dict(FAMILY.published["viewcrafter"])
    if channels != 320:
        narrow = {"num_head_channels": 16, "norm_num_groups": 16, "init_attn_heads": 2}
        files["unet"] = {"model_channels": channels, **narrow}
    return FAMILY.blueprint(files)


def make_method(config: StageConfig, blueprint: Blueprint, size: Size, world: World) -> Method:
    """All of a stage around a teacher of random weights."""
    with torch.device("meta"):
        network = blueprint.network()
    network = cheap_weights(network, config.run.device, getattr(torch, config.memory.precision))
    _, condition = blueprint.example(size)
    nulls = [{name: condition[name][:1] for name in ("text_tokens", "image_tokens")}]
    schedule = blueprint.schedule().to(config.run.device)
    teacher = Teacher(network, schedule, FAMILY.call, nulls, config.method.guidance).to(config.run.device)
    setup = Setup(config, FAMILY, teacher, partial(make_learner, config, world), world=world)
    method = METHODS[config.name].method.build(setup)
    shard_frozen(teacher, config, world)
    return method


def random_batch(blueprint: Blueprint, size: Size, device: str) -> LatentBatch:
    latents, condition = blueprint.example(size)
    noise = {name: torch.randn(tensor.shape, device=device) for name, tensor in condition.items()}
    return LatentBatch(torch.randn(latents.shape, device=device), Condition(**noise))


def measure(config: StageConfig, world: World, blueprint: Blueprint, size: Size, iterations: int) -> dict[str, Any]:
    """Seconds, and peak memory of this process."""
    torch.manual_seed(0)
    method = make_method(config, blueprint, size, world)
    batch, seconds = random_batch(blueprint, size, config.run.device), []
    for number in range(1, WARM_UP + iterations + 1):
        start = time.perf_counter()
        iterate(method, batch, number)
        if config.run.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "device": torch.cuda.get_device_name() if config.run.device.startswith("cuda") else platform.processor(),
        "processes": world.size,
        "seconds": round(statistics.median(seconds[WARM_UP:]), 3),
        "peak_gb": round(peak_memory_gb(config.run.device), 2),
    }


def predict(config: StageConfig, world: World, blueprint: Blueprint, size: Size) -> dict[str, Any]:
    """GB of one GPU that `fvgen plan` predicts, and the model's TFLOP: without what checkpointing computes again."""
    memory = config.memory
    share = next(name for name, way in SHARES.items() if way == (memory.share_backbone, memory.student_lora))
    zero = zero_settings(config, world)["zero_optimization"] if memory.deepspeed else {"stage": 0}
    offloads = ("offload_optimizer" in zero, memory.offload_teacher)
    choice = Choice(zero["stage"], memory.checkpoint_activations, share, *offloads)
    runtime = 0.0 if config.run.device.startswith("cuda") else CPU_RUNTIME_GB  # allocated tensors alone are measured
    profile = remembered(config, FAMILY, blueprint, size)
    predicted = estimate(config, profile, choice, Hardware(world.size, runtime_gb=runtime)).total
    once = remembered(changed(config, checkpoint_activations=False, deepspeed=""), FAMILY, blueprint, size)
    return {"predicted_gb": round(predicted, 2), "tflop": round(once.flops / 1e12, 4)}


def iterate(method: Method, batch: LatentBatch, number: int) -> None:
    """The method's own iteration on one batch, all clips at once."""
    method.iterate(number, lambda: [Part(batch, Draws(torch.Generator().manual_seed(number)))])


def main() -> None:
    parser = Parser(__doc__, dict.fromkeys(("--height", "--width"), "--size HEIGHTxWIDTH"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deepspeed", default="", help="JSON file of DeepSpeed settings; none is the plain engine")
    parser.add_argument("--local_rank", type=int, default=0, help="the deepspeed launcher's own; RANK counts")
    parser.add_argument("--frames", type=positive, default=16)
    parser.add_argument("--size", default="320x512", help="HEIGHTxWIDTH")
    parser.add_argument("--channels", type=positive, default=320, help="of the UNet's first level")
    parser.add_argument("--iterations", type=positive, default=5)
    parser.add_argument("--tflops", type=float, default=989.0, help="the GPU's peak; an H100's dense bfloat16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()

    given = parse_overrides(deepspeed_setting(args.deepspeed) + args.settings)
    config = settings(args.device, **given)
    blueprint = blueprint_of(args.channels)
    check_device(config.run.device)
    world = join_world(config)
    size = Size(clips_at_a_time(config, world.size), args.frames, *numbers(args.size, "x", "size", "320x512"))
    row = measure(config, world, blueprint, size, args.iterations)
    if not world.is_main:
        return
    row |= predict(config, world, blueprint, size)
    row["utilisation"] = round(row["tflop"] / row["seconds"] / args.tflops, 4)
    row |= {"frames": args.frames, "height": size.height, "width": size.width, "channels": args.channels}
    row["settings"] = {key: value for key, value in config.words().items() if key in COMMON | given}
    if args.out:
        write_json(args.out, row)
    print(json.dumps(row))


if __name__ == "__main__":
    guarded(main)
