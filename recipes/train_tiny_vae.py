"""Train the VAE of the tiny preset on the built-in scenes: diffusers' AutoencoderKL, 4x smaller, 4 channels.

    python recipes/train_tiny_vae.py --data DIR --out DIR [--iterations 6000] [--seed 0]

Trained on 32x32 crops of photographs and point renders alike, since ViewCrafter encodes both. The loss is the absolute
error of the picture and of its gradients (edges carry the perceived sharpness) and a faint KL term: the latents only
need to be smooth enough for diffusion, not Gaussian. `scaling_factor` is 1 / (standard deviation of the latents).
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fvgen.clips.folder import ClipFolder
from fvgen.pipelines.folders import save_model

CROP = 32
BATCH = 8
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-6


def build_vae(widths: tuple[int, ...] = (16, 32, 64), latent_channels: int = 4) -> AutoencoderKL:
    """The tiny preset's VAE, 0.6 M parameters; no attention, so that it takes images of any size."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    # Posteriors start narrow (standard deviation 0.05): at the default of 1 the noise drowns every detail for
    # thousands of iterations.
    vae.quant_conv.bias.data[vae.config.latent_channels :] = -6.0
    return vae


def crops(frames: Tensor, generator: torch.Generator) -> Tensor:
    """A random batch [BATCH, 3, CROP, CROP] in [-1, 1] from uint8 frames [N, 3, H, W], half of them mirrored."""
    _, _, height, width = frames.shape
    chosen = torch.randint(frames.shape[0], (BATCH,), generator=generator).tolist()
    tops = torch.randint(height - CROP + 1, (BATCH,), generator=generator).tolist()
    lefts = torch.randint(width - CROP + 1, (BATCH,), generator=generator).tolist()
    batch = [
        frames[i, :, y : y + CROP, x : x + CROP].flip(-1) if i % 2 else frames[i, :, y : y + CROP, x : x + CROP]
        for i, y, x in zip(chosen, tops, lefts, strict=True)
    ]
    return torch.stack(batch).float() / 127.5 - 1


def edge_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical gradients of two images [B, C, H, W]."""
    return sum((a.diff(dim=d) - b.diff(dim=d)).abs().mean() for d in (-1, -2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of prepared clips")
    parser.add_argument("--out", required=True, help="folder to write the VAE to")
    parser.add_argument("--iterations", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    folder = ClipFolder(args.data)
    clips = [folder[i] for i in range(len(folder))]
    # Two photographs for every render: fidelity to the photographs is what the metrics see.
    frames = torch.cat([torch.cat([c.truth, c.truth, c.render]) for c in clips]).mul(255).round().to(torch.uint8)

    vae = build_vae().to(memory_format=torch.channels_last)  # convolutions run twice as fast so on a CPU
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, args.iterations, pct_start=0.05)
    start = time.perf_counter()
    for iteration in range(1, args.iterations + 1):
        image = crops(frames, generator).to(memory_format=torch.channels_last)
        posterior = vae.encode(image).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().sum() / image.numel()
        loss = (decoded - image).abs().mean() + 0.5 * edge_error(decoded, image) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if iteration % 200 == 0 or iteration == args.iterations:
            psnr = 10 * math.log10(4 / (decoded - image).square().mean().item())
            seconds = time.perf_counter() - start
            print(f"{iteration} loss {loss.item():.4f} psnr {psnr:.2f} kl {kl.item():.2f} {seconds:.0f} s", flush=True)

    with torch.no_grad():
        sample = torch.cat([c.truth for c in clips[:32]]) * 2 - 1
        deviation = vae.encode(sample).latent_dist.sample(generator).std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    save_model(vae, args.out)


if __name__ == "__main__":
    main()
