"""A stage-2 iteration of the published model with random weights: seconds, peak memory, utilisation.

    python benchmarks/stage2_iteration.py --device cuda [key=value ...] [--out FILE]
    deepspeed --num_gpus 1 benchmarks/stage2_iteration.py --device cuda --deepspeed recipes/deepspeed/zero2.json \\
        share_backbone=true student_lora=true --out benchmarks/results/stage2_iteration.json

What is measured, on random clips of 16 frames at 320x512 (--frames, --height, --width): iterations of `fvgen.distill`'s
own updates and engines, one critic update each, bfloat16 with activation checkpointing, guidance 7.5, unless key=value
settings say otherwise; the median of --iterations after two for warming up. Utilisation is the model's work (without
what checkpointing computes again) per second over --tflops, the GPU's peak. Why: FVGen says that memory kept it to 16
frames on eight such GPUs. --channels 32 makes a small network of the same shape, for trying this out on a CPU. The last
line of the output is JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from full_size import cheap_weights

from fvgen.cli import Parser, deepspeed_setting, guarded, positive
from fvgen.clips.latents import LatentBatch
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.config import StageConfig, parse_overrides, stage_config
from fvgen.distill.draws import Draws
from fvgen.distill.ema import EMA
from fvgen.distill.engines import join_world, make_engine, shard_frozen
from fvgen.distill.monitor import peak_memory_gb
from fvgen.distill.players import assemble
from fvgen.distill.steps import Players, roll_out, update_critics, update_student
from fvgen.distill.zero_settings import clips_at_a_time
from fvgen.models.critic import DiscriminatorHead
from fvgen.models.denoiser import Condition, Teacher
from fvgen.models.viewcrafter.unet import IMAGE_TOKENS_PER_FRAME, ViewCrafterUNet
from fvgen.pipelines.folders import check_device
from fvgen.planning.simulate import Size, simulate
from fvgen.system.files import write_json
from fvgen.system.processes import World

WARM_UP = 2


def unet_of(channels: int) -> dict[str, Any]:
    """Settings of ViewCrafter's UNet (320 channels), or of a narrower one of the same build."""
    narrow = {"model_channels": channels, "num_head_channels": 16, "norm_num_groups": 16, "init_attn_heads": 2}
    return narrow if channels != 320 else {}


def make_players(config: StageConfig, unet_settings: dict[str, Any], frames: int, world: World) -> tuple[Players, EMA]:
    """All of stage 2 around a teacher of random weights."""
    with torch.device("meta"):
        unet = ViewCrafterUNet(**unet_settings)
    unet = cheap_weights(unet, config.device, getattr(torch, config.precision))
    tokens = unet.config.text_tokens + IMAGE_TOKENS_PER_FRAME * frames
    null = torch.zeros(1, tokens, unet.config.context_dim, device=config.device)
    teacher = Teacher(unet, NoiseSchedule.viewcrafter(base_scale=0.7), null, config.guidance).to(config.device)
    head = DiscriminatorHead(unet.config.model_channels * unet.config.channel_mult[-1], config.head_channels)
    players = assemble(
        config, teacher, head.to(config.device), None, lambda module, lr: make_engine(module, lr, config, world), world
    )
    ema = EMA(players.student_engine, config.ema_decay)
    shard_frozen(teacher, config, world)
    return players, ema


def random_batch(unet: ViewCrafterUNet, size: Size) -> LatentBatch:
    shape = (size.batch, unet.config.out_channels, size.frames, size.height, size.width)
    tokens = unet.config.text_tokens + IMAGE_TOKENS_PER_FRAME * size.frames
    latents, rendered = (torch.randn(shape, device=unet.device) for _ in range(2))
    context = torch.randn(size.batch, tokens, unet.config.context_dim, device=unet.device, dtype=unet.dtype)
    return LatentBatch(latents, Condition(rendered, context))


def iterate(players: Players, config: StageConfig, ema: EMA, batch: LatentBatch, number: int) -> None:
    """As `fvgen.distill.Trainer.iterate` with one critic update, all clips at once."""
    draws = Draws(torch.Generator().manual_seed(number))
    rollout = roll_out(players, config, batch, draws)
    update_critics(players, config, rollout, draws)
    update_student(players, config, rollout, draws)
    ema.update()


def measure(
    config: StageConfig, world: World, unet_settings: dict[str, Any], size: Size, iterations: int
) -> dict[str, Any]:
    """Seconds, and peak memory of this process."""
    torch.manual_seed(0)
    players, ema = make_players(config, unet_settings, size.frames, world)
    batch, seconds = random_batch(players.teacher.unet, size), []
    for number in range(WARM_UP + iterations):
        start = time.perf_counter()
        iterate(players, config, ema, batch, number)
        if config.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "device": torch.cuda.get_device_name() if config.device.startswith("cuda") else platform.processor(),
        "processes": world.size,
        "seconds": round(statistics.median(seconds[WARM_UP:]), 3),
        "peak_gb": round(peak_memory_gb(config.device), 2),
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deepspeed", default="", help="JSON file of DeepSpeed settings; none is the plain engine")
    parser.add_argument("--local_rank", type=int, default=0, help="the deepspeed launcher's own; RANK counts")
    parser.add_argument("--frames", type=positive, default=16)
    parser.add_argument("--height", type=positive, default=320)
    parser.add_argument("--width", type=positive, default=512)
    parser.add_argument("--channels", type=positive, default=320, help="of the UNet's first level")
    parser.add_argument("--iterations", type=positive, default=5)
    parser.add_argument("--tflops", type=float, default=989.0, help="the GPU's peak; an H100's dense bfloat16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()

    given = parse_overrides(deepspeed_setting(args.deepspeed) + args.settings)
    common = {"out": "unused", "batch_size": 1, "critic_updates": 1, "guidance": 7.5, "device": args.device}
    config = stage_config("dmd", common | {"precision": "bfloat16", "checkpoint_activations": True} | given)
    unet_settings = unet_of(args.channels)
    check_device(config.device)
    world = join_world(config)
    size = Size(clips_at_a_time(config, world.size), args.frames, args.height // 8, args.width // 8)
    row = measure(config, world, unet_settings, size, args.iterations)
    if not world.is_main:
        return
    once = config.model_copy(update={"checkpoint_activations": False, "deepspeed": ""})
    tflop = simulate(once, unet_settings, size).flops / 1e12
    row |= {"tflop": round(tflop, 4), "utilisation": round(tflop / row["seconds"] / args.tflops, 4)}
    row |= {"frames": args.frames, "height": args.height, "width": args.width, "channels": args.channels}
    row["settings"] = {key: value for key, value in config.model_dump().items() if key in common | given}
    if args.out:
        write_json(args.out, row)
    print(json.dumps(row))


if __name__ == "__main__":
    guarded(main)
