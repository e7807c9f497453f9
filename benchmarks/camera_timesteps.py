"""At which timesteps a model needs to be told the camera's path, because the noisy latents do not tell it themselves.

    python benchmarks/camera_timesteps.py [--vae recipes/weights/world-vae] [--rooms 64] [--out DIR]

Rooms of `builtin-paths` have four paths z_1 .. z_4 from one first frame. Who knows these four and sees
x_t = sqrt(ab_t) z_k + sqrt(1 - ab_t) e gives the true one the probability

    p_k = softmax_j( -|x_t - sqrt(ab_t) z_j|^2 / (2 (1 - ab_t)) )_k

and is left with the squared error |E z - z_k|^2 under it. Reported are both, the error as a share of what is left
without x_t (at four paths 3/4 of their spread). A network that does not know the four needs more; but where this
observer needs no path, a good denoiser learns nothing from one. The noise levels are CogVideoX-5B's.

Writes benchmarks/results/camera_timesteps.json and .md; the last line is JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from pages import page
from tables import commit, write_results
from torch import Tensor

from fvgen.clips.builtin import DATA_SEED, HEIGHT, WIDTH
from fvgen.clips.rooms import synthetic_clip
from fvgen.clips.worlds import WORLDS
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.models.cogvideox.vae import encode
from fvgen.system.command import Parser, guarded, positive

VAE = Path(__file__).resolve().parents[1] / "recipes" / "weights" / "world-vae"
WORLD = WORLDS["builtin-paths"]
FRAMES = 9
TIMES = (300, 500, 600, 700, 800, 850, 900, 930, 950, 970, 990)


@torch.no_grad()
def latents_of_rooms(vae: AutoencoderKLCogVideoX, rooms: int) -> Tensor:
    """[rooms, paths, N] scaled latents of training clips."""
    rows = []
    for index in range(rooms * WORLD.paths):
        clip = synthetic_clip("train", DATA_SEED, index, FRAMES, HEIGHT, WIDTH, WORLD)
        rows.append(encode(vae, clip.truth[None])[0].flatten() * vae.config.scaling_factor)
    return torch.stack(rows).double().unflatten(0, (rooms, WORLD.paths))


def told(z: Tensor, signal: float, generator: torch.Generator) -> tuple[float, float]:
    """Mean probability of the true path, and the share of the squared error that is left, at alpha bar ``signal``."""
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
    x = signal**0.5 * z + (1 - signal) ** 0.5 * noise
    distance = torch.cdist(x, signal**0.5 * z).square()
    probability = torch.softmax(-distance / (2 * (1 - signal)), dim=-1)
    left = (probability @ z - z).square().mean() / (z.mean(1, keepdim=True) - z).square().mean()
    return probability.diagonal(dim1=1, dim2=2).mean().item(), left.item()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--vae", type=Path, default=VAE)
    parser.add_argument("--rooms", type=positive, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    vae = AutoencoderKLCogVideoX.from_pretrained(args.vae, torch_dtype=torch.float32, use_safetensors=True).eval()
    z, signals = latents_of_rooms(vae, args.rooms), NoiseSchedule.cogvideox().alphas_cumprod.double()
    rows = []
    for t in TIMES:
        signal = signals[t].item()
        probability, left = told(z, signal, torch.Generator().manual_seed(t))
        rows.append({"t": t, "signal to noise": signal / (1 - signal), "probability": probability, "error left": left})
    settings = {"commit": commit(), "vae": args.vae.name, "rooms": args.rooms, "paths a room": WORLD.paths}
    shown = [
        {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]
    remarks = ["Probability of the true path of four given the noisy latents, and the squared error left."]
    text = page(
        "Where the path must be told", "camera_timesteps.py", remarks, {"settings": settings, "parts": {"rows": shown}}
    )
    write_results(args.out, "camera_timesteps", settings | {"rows": rows}, text)
    print(json.dumps(rows))


if __name__ == "__main__":
    guarded(main)
