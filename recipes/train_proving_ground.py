"""Train VAE and teacher of the proving ground: built-in clips of which little is given, mixed with the usual.

    python recipes/train_proving_ground.py --out DIR [--device cuda] [--minutes 8] [--clips 3072] [--seed 0]

Made for a few minutes of one GPU, where the tiny preset's recipes are for hours of a CPU: large batches, and the UNet's
forward and backward pass as one CUDA graph, since networks this small wait for the launches of their kernels. A quarter
of the minutes goes to the VAE (4x smaller, 8 channels), the rest to the teacher, whose architecture is the tiny
preset's with wider layers. How many iterations fit is measured in the first of them; the learning rate comes down to
zero in any case. DIR gets vae, teacher, and log.json with what was done.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from train_tiny_teacher import DROPOUT, EMA_DECAY, build_optimizer, build_teacher, warm_up_and_cosine
from train_tiny_vae import KL_WEIGHT, build_vae, edge_error

from fvgen.clips.builtin import builtin_clips
from fvgen.clips.worlds import WORLDS
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.pipelines.folders import save_model

VAE_WIDTHS, LATENT_CHANNELS, UNET_CHANNELS = (32, 64, 128), 8, 48
CROP, VAE_BATCH, BATCH = 32, 64, 64
TRIAL = 40  # iterations that tell how many fit
VAE_SHARE = 0.25  # of the minutes


def read_clips(count: int, workers: int) -> dict[str, Tensor]:
    """truth and render [N, F, 3, H, W] uint8 and known [N, F] of equally many clips of either world."""
    rows: dict[str, list[Tensor]] = {"truth": [], "render": [], "known": []}
    for name in ("builtin", "builtin-sparse"):
        clips = builtin_clips("train", count // 2, workers, WORLDS[name])
        for index in range(len(clips)):
            clip = clips[index]
            rows["truth"].append(clip.truth.mul(255).round().to(torch.uint8))
            rows["render"].append(clip.render.mul(255).round().to(torch.uint8))
            rows["known"].append(clip.known)
    return {key: torch.stack(value) for key, value in rows.items()}


class Budget:
    """How many iterations fit into ``seconds``, the first ``TRIAL`` of them included."""

    def __init__(self, seconds: float, device: str) -> None:
        self.start, self.seconds, self.device = time.perf_counter(), seconds, device
        self.iterations = 10**9

    def spent(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - self.start

    def after(self, iteration: int) -> None:
        """Called after every iteration: the second half of the trial is what the others will take."""
        if iteration == TRIAL // 2:
            self.half = self.spent()
        if iteration == TRIAL:
            now = self.spent()
            each = (now - self.half) / (TRIAL - TRIAL // 2)
            self.iterations = TRIAL + max(0, int((self.seconds - now) / each))


def train_vae(clips: dict[str, Tensor], seconds: float, device: str, seed: int) -> tuple[AutoencoderKL, dict]:
    """On crops of photographs and renders, two to one, as the tiny preset's VAE."""
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    truth, render = (clips[name].flatten(0, 1).to(device) for name in ("truth", "render"))
    frames = torch.cat([truth, truth, render])
    vae = build_vae(VAE_WIDTHS, LATENT_CHANNELS).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    budget, iteration, loss = Budget(seconds, device), 0, torch.zeros(())
    height, width = frames.shape[-2:]
    inside = torch.arange(CROP, device=device)
    while iteration < budget.iterations:
        iteration += 1
        rate = 2e-3 * warm_up_and_cosine(iteration, min(budget.iterations, 10**9))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(frames), (VAE_BATCH,), generator=generator, device=device)
        top = torch.randint(height - CROP + 1, (VAE_BATCH, 1, 1), generator=generator, device=device)
        left = torch.randint(width - CROP + 1, (VAE_BATCH, 1, 1), generator=generator, device=device)
        rows, columns = top + inside[None, :, None], left + inside[None, None, :]
        image = frames[chosen[:, None, None], :, rows, columns].permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(image).latent_dist
        sample = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator, device=device)
        decoded = vae.decode(sample).sample
        kl = posterior.kl().sum() / image.numel()
        loss = (decoded - image).abs().mean() + 0.5 * edge_error(decoded, image) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        budget.after(iteration)
        if iteration % 500 == 0:
            psnr = 10 * math.log10(4 / (decoded - image).square().mean().item())
            print(f"vae {iteration} of {budget.iterations}: {psnr:.2f} dB, {budget.spent():.0f} s", flush=True)
    vae.eval()
    with torch.no_grad():
        some = truth[:: max(1, len(truth) // 512)].float() / 127.5 - 1
        latents = vae.encode(some).latent_dist.mean
        psnr = 10 * math.log10(4 / (vae.decode(latents).sample - some).square().mean().item())
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    facts = {"iterations": iteration, "batch": VAE_BATCH, "seconds": round(budget.spent()), "psnr": round(psnr, 2)}
    return vae, facts


@torch.no_grad()
def encode(clips: dict[str, Tensor], pipeline: ViewCrafterPipeline, device: str) -> dict[str, Tensor]:
    """Latents of truth and render [N, C, F, h, w] and the end photographs [N, 2, 3, H, W] in [-1, 1], on the device."""
    found: dict[str, list[Tensor]] = {"truth": [], "render": []}
    for name, rows in found.items():
        for part in clips[name].split(64):
            images = part.to(device).flatten(0, 1).float() / 127.5 - 1
            latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
            rows.append(latents.unflatten(0, part.shape[:2]).transpose(1, 2).contiguous())
    ends = clips["truth"][:, [0, -1]].to(device).float() / 127.5 - 1
    whole = {name: torch.cat(rows) for name, rows in found.items()}
    return whole | {"ends": ends, "turns": clips["known"][:, -1].to(device)}  # known at both ends: may be walked back


class Velocity(nn.Module):
    """The UNet as a graph takes it: tensors in, one tensor out."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, t, context).sample


def loss_of(
    pipeline: ViewCrafterPipeline, velocity: Callable, data: dict[str, Tensor], generator: torch.Generator
) -> Tensor:
    """`train_tiny_teacher.loss_of` on a device: the squared error of the velocity over a random batch."""
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    schedule = pipeline.schedule.to(device)
    chosen = torch.randint(len(data["truth"]), (BATCH,), generator=generator, device=device)
    z0, render, ends = (data[key][chosen] for key in ("truth", "render", "ends"))
    back = (uniform(BATCH) < 0.5) & data["turns"][chosen]
    z0, render = (torch.where(back[:, None, None, None, None], z.flip(2), z) for z in (z0, render))
    photograph = torch.where(back[:, None, None, None], ends[:, 1], ends[:, 0])
    t = torch.randint(1000, (BATCH,), generator=generator, device=device)
    noise = torch.randn(z0.shape, generator=generator, device=device)
    u = uniform(BATCH, 1, 1)
    text = torch.where(u < 2 * DROPOUT, pipeline.prompts.negative, pipeline.prompts.positive)
    no_image = (u >= DROPOUT) & (u < 3 * DROPOUT)
    shown = torch.where(no_image[..., None], photograph.new_zeros(()), photograph)
    context = torch.cat([text, pipeline.image_tokens(shown)], dim=1)
    prediction = velocity(torch.cat([schedule.add_noise(z0, noise, t), render], dim=1), t, context)
    return (prediction - schedule.velocity(z0, noise, t)).square().mean()


def train_teacher(
    clips: dict[str, Tensor], vae: AutoencoderKL, seconds: float, device: str, seed: int, graph: bool
) -> tuple[ViewCrafterPipeline, dict]:
    """The average of the weights of a training of so many seconds."""
    pipeline = build_teacher(vae.cpu(), seed, UNET_CHANNELS).to(device)
    data = encode(clips, pipeline, device)
    trained = (pipeline.unet, pipeline.image_encoder, pipeline.image_projector)
    averaged = [copy.deepcopy(part).requires_grad_(False) for part in trained]
    parameters = [p for part in trained for p in part.parameters()]
    averages = [p for part in averaged for p in part.parameters()]
    generator = torch.Generator(device).manual_seed(seed)
    velocity, graphed = as_graph(pipeline, data, device) if graph else (Velocity(pipeline.unet), False)
    optimizer = build_optimizer(parameters, 4e-3)
    rates = [group["lr"] for group in optimizer.param_groups]
    budget, iteration, recent = Budget(seconds, device), 0, torch.zeros((), device=device)
    while iteration < budget.iterations:
        iteration += 1
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm_up_and_cosine(iteration, min(budget.iterations, 10**9))
        loss = loss_of(pipeline, velocity, data, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, parameters, 1 - min(EMA_DECAY, (1 + iteration) / (10 + iteration)))
        recent += loss.detach()
        budget.after(iteration)
        if iteration % 250 == 0:
            mean = recent.item() / 250
            recent.zero_()
            print(f"teacher {iteration} of {budget.iterations}: {mean:.4f}, {budget.spent():.0f} s", flush=True)
    for part, average in zip(trained, averaged, strict=True):
        part.load_state_dict(average.state_dict())
    facts = {"iterations": iteration, "batch": BATCH, "seconds": round(budget.spent()), "cuda_graph": graphed}
    return pipeline.to("cpu"), facts


def as_graph(pipeline: ViewCrafterPipeline, data: dict[str, Tensor], device: str) -> tuple[Callable, bool]:
    """The UNet's passes as one CUDA graph, and whether that is so: elsewhere the UNet itself."""
    module = Velocity(pipeline.unet)
    if not device.startswith("cuda"):
        return module, False
    x = torch.cat([data["truth"][:BATCH], data["render"][:BATCH]], dim=1)
    t = torch.zeros(BATCH, dtype=torch.long, device=device)
    tokens = pipeline.image_tokens(data["ends"][:BATCH, 0])
    context = torch.cat([pipeline.prompts.positive.expand(BATCH, -1, -1), tokens], dim=1).detach().requires_grad_()
    return torch.cuda.make_graphed_callables(module, (x, t, context)), True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="for both networks, without making clips")
    parser.add_argument("--clips", type=int, default=3072)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--no-graph", action="store_true", help="no CUDA graph, where it fails")
    parser.add_argument("--vae", type=Path, help="a VAE that is there already")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_float32_matmul_precision("high")  # TensorFloat-32 where there is any, as convolutions use it
    start = time.perf_counter()
    clips = read_clips(args.clips, args.workers)
    print(f"{args.clips} clips after {time.perf_counter() - start:.0f} s", flush=True)
    log: dict[str, dict] = {"clips": {"count": args.clips}}
    seconds = 60 * args.minutes
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae).eval()
    else:
        vae, log["vae"] = train_vae(clips, VAE_SHARE * seconds, args.device, args.seed)
        save_model(vae, args.out / "vae")
        seconds *= 1 - VAE_SHARE
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline, log["teacher"] = train_teacher(clips, vae, seconds, args.device, args.seed, not args.no_graph)
    save_model(pipeline.to(dtype=torch.float16), args.out / "teacher")
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log))


if __name__ == "__main__":
    main()
