"""The published UNet at full size with random weights: seconds and peak memory of a forward and of a training pass.

    python benchmarks/full_size.py [--preset full|tiny] [--device D] [--out FILE]

What is measured, in bfloat16: one forward pass of 16 frames at 320x512, and one forward and backward pass of the same
with activation checkpointing; on a CPU the peak is that of the whole process. On a CUDA device also the forward pass of
25 frames at 576x1024, eager and compiled (after warming up), and the seconds that teacher (50 guided steps) and student
(4 steps) take for such a clip, decoding included. Why: to know what a machine needs before a checkpoint is fetched.
--preset tiny runs everything at a size that takes seconds. The weights are random: only time and memory mean something.
The last line is JSON; FILE gets it as well, and FILE with the ending .md a table.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from fvgen.convert.sizes import vae_config
from fvgen.diffusion.samplers import ddim, few_step
from fvgen.diffusion.schedule import NoiseSchedule, trailing_timesteps
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Denoiser, Teacher
from fvgen.models.viewcrafter.family import call
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.folders import check_device
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import atomic_path, write_json

VAE = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "in_channels": 3, "out_ch": 3, "z_channels": 4}
PRESETS = {
    "full": {
        "unet": {},
        "vae": {"ddconfig": {**VAE, "resolution": 256}},
        "small": (16, 40, 64),  # frames and latent size of the pass on any device
        "large": (25, 72, 128),  # and of those on CUDA
        "steps": (50, 4),
    },
    "tiny": {
        "unet": {"model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (1,), "num_head_channels": 16},
        "vae": {"ddconfig": {**VAE, "ch": 32, "resolution": 32}},
        "small": (4, 8, 8),
        "large": (5, 8, 16),
        "steps": (3, 2),
    },
}
GIB = 2**30


def cheap_weights(module: nn.Module, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Fill a module on the meta device: norms as the identity, all else from one small pool of random numbers."""
    module = nn.Module.to(module, dtype).to_empty(device=device)
    pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 0.02
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                flat = parameter.view(-1)
                for start in range(0, len(flat), len(pool)):
                    flat[start : start + len(pool)] = pool[: len(flat) - start]
    return module.eval()


def inputs(unet: ViewCrafterUNet, size: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy and condition latents, a timestep, and a context of the published length."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 8, *size, generator=generator).to(device, unet.dtype)
    tokens = unet.config.text_tokens + 256
    context = torch.randn(1, tokens, unet.config.context_dim, generator=generator).to(device, unet.dtype)
    return sample, torch.tensor([500], device=device), context


def measured(what: str, call: Callable[[], object], device: str, repeats: int = 1) -> dict:
    """Median seconds of a call and the peak of memory up to its end."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"what": what, "seconds": round(seconds, 3), "peak_gib": round(peak / GIB, 2)}
    print(row, flush=True)
    return row


def any_device(unet: ViewCrafterUNet, size: tuple[int, int, int], device: str) -> list[dict]:
    """A forward pass, and a forward and backward pass with activation checkpointing."""
    arguments = inputs(unet, size, device)
    with torch.no_grad():
        if device.startswith("cuda"):  # whose first pass loads kernels; a CPU's takes minutes
            unet(*arguments)
        rows = [measured("forward", lambda: unet(*arguments), device)]
    unet.enable_gradient_checkpointing()
    unet.requires_grad_(True)

    def both() -> None:
        unet(*arguments).sample.float().square().mean().backward()

    if device.startswith("cuda"):
        both()
    rows.append(measured("forward and backward, activation checkpointing", both, device))
    assert all(parameter.grad is not None for parameter in unet.parameters())
    unet.disable_gradient_checkpointing()
    unet.requires_grad_(False)
    unet.zero_grad(set_to_none=True)
    return rows


@torch.no_grad()
def eager_and_compiled(
    unet: ViewCrafterUNet, size: tuple[int, int, int], device: str, backend: str = "inductor"
) -> Iterator[dict]:
    """The forward pass either way; the first compiled one compiles."""
    arguments = inputs(unet, size, device)
    unet(*arguments)
    yield measured("forward, eager", lambda: unet(*arguments), device)
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    for which in ("first compiled", "compiled"):
        yield measured(f"forward, {which}", lambda: compiled(*arguments, return_dict=False), device)


@torch.no_grad()
def seconds_per_clip(
    unet: ViewCrafterUNet, vae: AutoencoderKL, size: tuple[int, int, int], steps: tuple[int, int], device: str
) -> Iterator[dict]:
    """What teacher and student take for a clip, decoding included."""
    arguments = inputs(unet, size, device)
    schedule = NoiseSchedule.viewcrafter(0.3).to(device)
    text, image = arguments[2].tensor_split([unet.config.text_tokens], dim=1)
    condition = Condition(render_latents=arguments[0][:, 4:].float(), text_tokens=text, image_tokens=image)
    noise = torch.randn(condition["render_latents"].shape, generator=torch.Generator().manual_seed(2)).to(device)
    teacher_steps, student_steps = steps

    def decode(latents: Tensor) -> None:
        for frame in latents.transpose(1, 2).flatten(0, 1).to(vae.dtype).split(1):
            vae.decode(frame / vae.config.scaling_factor)

    def teach() -> None:
        teacher = partial(Teacher(unet, schedule, call, [{}]), condition=condition)
        generator = torch.Generator().manual_seed(3)
        decode(ddim(teacher, noise, schedule, trailing_timesteps(teacher_steps), eta=1.0, generator=generator))

    def study() -> None:
        student = partial(Denoiser(unet, schedule, call), condition=condition)
        decode(few_step(student, noise, schedule, student_steps, generator=torch.Generator().manual_seed(3)))

    study()
    yield measured(f"clip of the student, {student_steps} steps", study, device)
    yield measured(f"clip of the teacher, {teacher_steps} guided steps", teach, device)


def note(result: dict) -> str:
    """The results as a short page."""
    rows = [f"| {row['what']} | {row['seconds']} | {row['peak_gib']} |" for row in result["rows"]]
    frames, height, width = result["small"]
    return "\n".join(
        [
            "# The UNet at full size\n" if result["preset"] == "full" else "# The UNet, tiny preset\n",
            f"{result['parameters']:,} parameters, random weights, bfloat16, batch 1; {frames} frames of "
            f"{8 * height}x{8 * width}. {result['machine']}, {result['threads']} threads, torch {result['torch']}.\n",
            "| pass | seconds | peak memory, GiB |",
            "|---|---|---|",
            *rows,
            "\nMade by `benchmarks/full_size.py`. The peak is that of the process up to the end of the pass (of the "
            "device's allocations on CUDA).",
            "",
        ]
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, help="of the CPU; torch's own number if not given")
    parser.add_argument("--out", help="file for the results, such as benchmarks/results/full_size.json")
    args = parser.parse_args()
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    with torch.device("meta"):
        unet, vae = ViewCrafterUNet(**preset["unet"]), AutoencoderKL(**vae_config(preset["vae"]))
    rows = [measured("building", lambda: cheap_weights(unet, args.device), args.device)]
    rows += any_device(unet, preset["small"], args.device)
    cuda = args.device.startswith("cuda")
    if cuda:
        large = preset["large"]
        rows += [row | {"what": f"large {row['what']}"} for row in eager_and_compiled(unet, large, args.device)]
        rows += seconds_per_clip(unet, cheap_weights(vae, args.device), large, preset["steps"], args.device)
    result = {
        "preset": args.preset,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "small": preset["small"],
        "large": preset["large"],
        "machine": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.out:
        write_json(args.out, result)
        with atomic_path(Path(args.out).with_suffix(".md")) as temporary:
            temporary.write_text(note(result))
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
