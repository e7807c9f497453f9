"""Train VAE and teacher of the proving ground: built-in clips of which little is given, mixed with the usual.

    python recipes/train_proving_ground.py --out DIR [--device cuda] [--minutes 7] [--clips 8192] [--init DIR]
        [--data builtin-...]

Made for a few minutes of one GPU, where the tiny preset's recipes are for hours of a CPU. Networks this small wait for
the launches of their kernels, so that each whole update (batch, passes, optimiser, average) is one CUDA graph; clips
are made by the CPU's other cores while the VAE learns from the first of them. A quarter of the minutes goes to the VAE
(4x smaller, 8 channels), the rest to the teacher, whose architecture is the tiny preset's with wider layers. Learning
rates come down with the clock, so that the last minute is the best. DIR gets vae, teacher, and log.json with what was
done.

--init goes on with a teacher of this recipe's, whose VAE is taken as it is; --data takes one kind of built-in clips
in place of the mix. With a small --batch and --rate an hour of a CPU is enough for both together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from train_tiny_teacher import DROPOUT, build_teacher
from train_tiny_vae import KL_WEIGHT, build_vae, edge_error

from fvgen.clips.builtin import DATA_SEED, FRAMES, HEIGHT, WIDTH
from fvgen.clips.rooms import synthetic_clip
from fvgen.clips.worlds import WORLDS
from fvgen.models.viewcrafter.encoders import clip_pixels
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.pipelines.folders import load_pipeline, save_model

VAE_WIDTHS, LATENT_CHANNELS, UNET_CHANNELS = (24, 48, 96), 8, 40
CROP, VAE_BATCH, BATCH = 32, 64, 64
VAE_RATE, TEACHER_RATE, EMA_DECAY = 2e-3, 1.5e-3, 0.999
FIRST = 1024  # clips that the VAE is trained on
VAE_SHARE = 0.25  # of the minutes
MIX = ("builtin-sparse", "builtin", "builtin-sparse", "builtin-closed")  # one clip each in turn


# --- Clips ---


def make_clip(index: int, mix: Sequence[str] = MIX) -> tuple:
    """Truth and render [F, 3, H, W] uint8 and known [F], as arrays."""
    world = WORLDS[mix[index % len(mix)]]
    clip = synthetic_clip("train", DATA_SEED, index // len(mix), FRAMES, HEIGHT, WIDTH, world)
    images = [frames.mul(255).round().to(torch.uint8).numpy() for frames in (clip.truth, clip.render)]
    return *images, clip.known.numpy()


def collected(made: list[Future]) -> dict[str, Tensor]:
    """truth and render [N, F, 3, H, W] uint8 and known [N, F] of clips, when all are there."""
    rows = zip(*(future.result() for future in made), strict=True)
    names = ("truth", "render", "known")
    return {name: torch.stack([torch.from_numpy(x) for x in row]) for name, row in zip(names, rows, strict=True)}


# --- A training by the clock ---


def trained(
    name: str,
    loss_of: Callable[[torch.Generator], Tensor],
    parts: list[nn.Module],
    rate: float,
    seconds: float,
    seed: int,
    graphed: bool = True,
) -> dict:
    """AdamW on ``loss_of`` until the time is over; the parts end as the running averages of their weights. ``graphed``:
    on a GPU as one CUDA graph, for which nothing in ``loss_of`` may come from the CPU."""
    parameters = [p for part in parts for p in part.parameters()]
    device = parameters[0].device
    averages = [p.detach().clone() for p in parameters]
    generator = torch.Generator(device).manual_seed(seed)
    lr, weight = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, capturable=on_gpu)
    recent = torch.zeros((), device=device)

    def update() -> None:
        optimizer.zero_grad()
        loss = loss_of(generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            steps = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(averages, steps)
            recent.add_(loss)

    update_graph = as_graph(update, generator) if on_gpu and graphed else update
    start, iteration, told = time.perf_counter(), 0, 0
    while True:
        if on_gpu and iteration % 20 == 0:
            torch.cuda.synchronize()  # the clock is to tell what is done, not what is asked for
        done = (time.perf_counter() - start) / seconds
        if done >= 1:
            break
        warm_up = min(1.0, (iteration + 1) / 200)
        lr.fill_(rate * warm_up * 0.5 * (1 + math.cos(math.pi * done)))
        weight.fill_(1 - min(EMA_DECAY, (1 + iteration) / (10 + iteration)))
        update_graph()
        iteration += 1
        if iteration % 1000 == 0:
            mean, told = recent.item() / (iteration - told), iteration
            recent.zero_()
            print(f"{name} {iteration}: {mean:.4f}, {time.perf_counter() - start:.0f} of {seconds:.0f} s", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(parameters, averages)
    return {"iterations": iteration, "seconds": round(time.perf_counter() - start)}


def as_graph(update: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
    """An update as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the optimiser makes its state, libraries choose their kernels
        for _ in range(5):
            update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        update()
    return graph.replay


# --- The VAE ---


def train_vae(clips: dict[str, Tensor], seconds: float, device: str, seed: int) -> tuple[AutoencoderKL, dict]:
    """On crops of photographs and renders, two to one, as the tiny preset's VAE."""
    torch.manual_seed(seed)
    truth, render = (clips[name].flatten(0, 1).to(device) for name in ("truth", "render"))
    frames = torch.cat([truth, truth, render])
    vae = build_vae(VAE_WIDTHS, LATENT_CHANNELS).to(device, memory_format=torch.channels_last)
    height, width = frames.shape[-2:]
    inside = torch.arange(CROP, device=device)

    def loss_of(generator: torch.Generator) -> Tensor:
        def below(count: int, *shape: int) -> Tensor:
            return torch.randint(count, shape, generator=generator, device=device)

        chosen, batch = below(len(frames), VAE_BATCH), VAE_BATCH
        rows = below(height - CROP + 1, batch, 1, 1) + inside[None, :, None]
        columns = below(width - CROP + 1, batch, 1, 1) + inside[None, None, :]
        image = frames[chosen[:, None, None], :, rows, columns].permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(image).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().sum() / image.numel()
        return (decoded - image).abs().mean() + 0.5 * edge_error(decoded, image) + KL_WEIGHT * kl

    facts = trained("vae", loss_of, [vae], VAE_RATE, seconds, seed)
    vae.eval()
    with torch.no_grad():
        some = truth[:: max(1, len(truth) // 512)].float() / 127.5 - 1
        latents = vae.encode(some).latent_dist.mean
        psnr = 10 * math.log10(4 / (vae.decode(latents).sample.clamp(-1, 1) - some).square().mean().item())
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    print(f"vae: {psnr:.2f} dB", flush=True)
    return vae, facts | {"batch": VAE_BATCH, "psnr": round(psnr, 2)}


# --- The teacher ---


@torch.no_grad()
def encoded(clips: dict[str, Tensor], pipeline: ViewCrafterPipeline, device: str) -> dict[str, Tensor]:
    """Latents of truth and render [N, C, F, h, w] and the end photographs as CLIP sees them [N, 2, 3, S, S], on the
    device; every clip as it is and mirrored."""
    found: dict[str, list[Tensor]] = {"truth": [], "render": [], "ends": []}
    for mirrored in (False, True):
        for name in ("truth", "render"):
            for part in clips[name].split(64):
                images = (part.flip(-1) if mirrored else part).to(device).float() / 127.5 - 1
                latents = pipeline.vae.encode(images.flatten(0, 1)).latent_dist.mean
                latents = latents.unflatten(0, part.shape[:2]) * pipeline.vae.config.scaling_factor
                found[name].append(latents.transpose(1, 2).contiguous())
                if name == "truth":
                    found["ends"].append(for_clip(images[:, [0, -1]].flatten(0, 1), pipeline).unflatten(0, (-1, 2)))
    both_ends = clips["known"][:, -1].repeat(2).to(device)  # known at both ends: may be walked back
    return {name: torch.cat(rows) for name, rows in found.items()} | {"turns": both_ends}


def for_clip(photographs: Tensor, pipeline: ViewCrafterPipeline) -> Tensor:
    """[B, 3, H, W] in [-1, 1] to the image encoder's input [B, 3, S, S]."""
    return clip_pixels(photographs, pipeline.image_encoder.config.image_size, pipeline.config.image_resize)


def train_teacher(
    clips: dict[str, Tensor],
    pipeline: ViewCrafterPipeline,
    seconds: float,
    device: str,
    seed: int,
    batch: int = BATCH,
    rate: float = TEACHER_RATE,
) -> tuple[ViewCrafterPipeline, dict]:
    """`train_tiny_teacher`'s objective: the squared error of the velocity, conditions dropped now and then."""
    pipeline = pipeline.to(device, torch.float32)
    data, schedule = encoded(clips, pipeline, device), pipeline.schedule.to(device)
    prompts, grey = pipeline.prompts, for_clip(torch.zeros(1, 3, HEIGHT, WIDTH, device=device), pipeline)

    def loss_of(generator: torch.Generator) -> Tensor:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        chosen = torch.randint(len(data["truth"]), (batch,), generator=generator, device=device)
        z0, render, ends = (data[key][chosen] for key in ("truth", "render", "ends"))
        back = (uniform(batch) < 0.5) & data["turns"][chosen]
        z0, render = (torch.where(back[:, None, None, None, None], z.flip(2), z) for z in (z0, render))
        photograph = torch.where(back[:, None, None, None], ends[:, 1], ends[:, 0])
        t = torch.randint(1000, (batch,), generator=generator, device=device)
        noise = torch.randn(z0.shape, generator=generator, device=device)
        u = uniform(batch, 1, 1)
        text = torch.where(u < 2 * DROPOUT, prompts.negative, prompts.positive)
        no_image = (u >= DROPOUT) & (u < 3 * DROPOUT)
        shown = torch.where(no_image[..., None], grey, photograph)
        tokens = pipeline.image_projector(pipeline.image_encoder(shown).last_hidden_state)
        x_t = torch.cat([schedule.add_noise(z0, noise, t), render], dim=1)
        prediction = pipeline.unet(x_t, t, torch.cat([text, tokens], dim=1)).sample
        return (prediction - schedule.velocity(z0, noise, t)).square().mean()

    parts = [pipeline.unet, pipeline.image_encoder, pipeline.image_projector]
    facts = trained("teacher", loss_of, parts, rate, seconds, seed)
    return pipeline.to("cpu"), facts | {"batch": batch, "rate": rate, "clips": len(data["truth"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all, the making of clips included")
    parser.add_argument("--clips", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that make clips")
    parser.add_argument("--init", type=Path, help="a teacher of this recipe's to go on from, with its VAE")
    parser.add_argument("--data", choices=WORLDS, help="one kind of built-in clips in place of the mix")
    parser.add_argument("--batch", type=int, default=BATCH, help="of the teacher")
    parser.add_argument("--rate", type=float, default=TEACHER_RATE, help="the teacher's, at its highest")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    pool = ProcessPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(1,))
    mix = (args.data,) if args.data else MIX
    made = [pool.submit(make_clip, index, mix) for index in range(args.clips)]
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 where there is any, as convolutions use it
    args.out.mkdir(parents=True, exist_ok=True)
    log: dict[str, dict] = {"clips": {"count": args.clips, "mix": mix}}
    if args.init:
        pipeline = load_pipeline(args.init, ViewCrafterPipeline)
    else:
        first = collected(made[:FIRST])
        print(f"{len(first['truth'])} clips after {time.perf_counter() - start:.0f} s", flush=True)
        vae, log["vae"] = train_vae(first, VAE_SHARE * 60 * args.minutes, args.device, args.seed)
        save_model(vae, args.out / "vae")
        pipeline = build_teacher(vae.cpu(), args.seed, UNET_CHANNELS)
    clips = collected(made)
    pool.shutdown()
    spent = time.perf_counter() - start
    print(f"{args.clips} clips after {spent:.0f} s", flush=True)
    pipeline, log["teacher"] = train_teacher(
        clips, pipeline, 60 * args.minutes - spent, args.device, args.seed, args.batch, args.rate
    )
    save_model(pipeline.to(dtype=torch.float16), args.out / "teacher")
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log))


if __name__ == "__main__":
    main()
