"""Train VAE and teacher of VideoScene's kind on built-in clips: CogVideoX's classes in small.

    python recipes/train_videoscene_teacher.py --out DIR [--image-condition ends|renders] [--device cuda] [--minutes 10]

An interpolation model ("ends": it sees first and last frame, noised as CogvideX-Interpolation's are) or one that sees
the whole render ("renders", the stronger teacher). Clips of 9 frames of 48x64 from `builtin-closed` and `builtin`; the
VAE squeezes space 4x and time 4x. A third of the minutes goes to the VAE, the rest to the transformer, by
`train_proving_ground`'s loop. The objective is the squared error of the velocity at uniform timesteps, as their code
has it. DIR gets `teacher` (a CogVideoXTeacherPipeline) and log.json. benchmarks/videoscene.py says how good it is
against its prior, before any student is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from torch import Tensor
from torch.nn.functional import l1_loss
from train_proving_ground import collected, trained

from fvgen.clips.builtin import DATA_SEED, HEIGHT, WIDTH
from fvgen.clips.rooms import synthetic_clip
from fvgen.clips.worlds import WORLDS
from fvgen.models.cogvideox.family import FAMILY
from fvgen.models.cogvideox.pipelines import CogVideoXTeacherPipeline
from fvgen.models.cogvideox.prompts import EncodedPrompts
from fvgen.models.condition import Condition
from fvgen.pipelines.folders import load_pipeline, save_model

FRAMES = 9  # 8k + 1
MIX = ("builtin-closed", "builtin-closed", "builtin", "builtin-closed")
TOKENS, TEXT = 2, 32  # of the prompt, which says nothing here
VAE_RATE, TEACHER_RATE = 1e-3, 1e-3
KL_WEIGHT = 1e-6
VAE_SHARE = 1 / 3
AT_ONCE = 32  # clips that are encoded together


def make_clip(index: int) -> tuple:
    """Truth and render [F, 3, H, W] uint8 and known [F], as arrays."""
    world = WORLDS[MIX[index % len(MIX)]]
    clip = synthetic_clip("train", DATA_SEED, index, FRAMES, HEIGHT, WIDTH, world)
    images = [frames.mul(255).round().to(torch.uint8).numpy() for frames in (clip.truth, clip.render)]
    return *images, clip.known.numpy()


def build_vae(seed: int, widths: tuple[int, ...] = (32, 64, 96)) -> AutoencoderKLCogVideoX:
    """CogVideoX's class, one level shorter: 4x in space, 4x in time, 16 channels."""
    torch.manual_seed(seed)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * len(widths),
        up_block_types=("CogVideoXUpBlock3D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=HEIGHT,
        sample_width=WIDTH,
    )
    # Posteriors start narrow, as those of `train_tiny_vae`: at the default of 1 the noise drowns every detail.
    vae.encoder.conv_out.conv.bias.data[vae.config.latent_channels :] = -6.0
    return vae


def build_teacher(
    vae: AutoencoderKLCogVideoX, seed: int, image_condition: str, layers: int, heads: int
) -> CogVideoXTeacherPipeline:
    """The published classes and settings in small; rotary positions."""
    torch.manual_seed(seed)
    factor, channels = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=32,
        num_layers=layers,
        in_channels=2 * channels,
        out_channels=channels,
        time_embed_dim=128,
        text_embed_dim=TEXT,
        max_text_seq_length=TOKENS,
        sample_frames=FRAMES,
        sample_height=HEIGHT // factor,
        sample_width=WIDTH // factor,
        patch_size=2,
        use_rotary_positional_embeddings=True,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    prompt = torch.randn(1, TOKENS, TEXT, generator=torch.Generator().manual_seed(seed))
    prompts = EncodedPrompts.of(prompt, torch.zeros_like(prompt))
    settings = {"image_condition": image_condition, "image_noise": image_condition == "ends", "guidance": 1.0}
    return CogVideoXTeacherPipeline(vae, transformer.eval(), scheduler, prompts, **settings)


def train_vae(clips: dict[str, Tensor], seconds: float, device: str, seed: int, batch: int) -> tuple:
    """On whole clips, photographs and renders two to one; returns the VAE and what was done."""
    vae = build_vae(seed).to(device)
    truth, render = (clips[name].to(device) for name in ("truth", "render"))
    everything = torch.cat([truth, truth, render])

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(everything), (batch,), generator=generator, device=device)
        video = everything[chosen].transpose(1, 2).float() / 127.5 - 1
        posterior = vae.encode(video).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        edges = sum(l1_loss(decoded.diff(dim=d), video.diff(dim=d)) for d in (-1, -2, -3))
        return l1_loss(decoded, video) + 0.5 * edges + KL_WEIGHT * posterior.kl().sum() / video.numel()

    facts = trained("vae", loss_of, [vae], VAE_RATE, seconds, seed, graphed=False)
    vae.eval()
    with torch.no_grad():
        some = truth[:: max(1, len(truth) // AT_ONCE)][:AT_ONCE].transpose(1, 2).float() / 127.5 - 1
        latents = vae.encode(some).latent_dist.mean
        psnr = -10 * math.log10(((vae.decode(latents).sample.clamp(-1, 1) - some) / 2).square().mean().item())
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    print(f"vae: {psnr:.2f} dB", flush=True)
    return vae, facts | {"batch": batch, "psnr": round(psnr, 2)}


@torch.no_grad()
def encoded(clips: dict[str, Tensor], pipeline: CogVideoXTeacherPipeline, device: str) -> tuple[Tensor, Condition]:
    """Latents of the truth and what the teacher sees, on the device: every clip, mirrored too, and walked back where
    both ends are known."""
    generator, rows, seen = torch.Generator().manual_seed(0), [], []
    both = clips["known"][:, -1]
    for mirrored in (False, True):
        for back in (False, True):
            chosen = both.nonzero().flatten() if back else torch.arange(len(both))
            for part in chosen.split(AT_ONCE):
                pair = [clips[name][part].float() / 255 for name in ("truth", "render")]
                pair = [video.flip(-1) if mirrored else video for video in pair]
                truth, render = (video.flip(1) if back else video for video in pair)
                rows.append(pipeline.encode_frames(truth, generator))
                seen.append(pipeline.condition(render, generator)["image_latents"])
    text = pipeline.prompts.positive.to(device)
    return torch.cat(rows), Condition(image_latents=torch.cat(seen), text_tokens=text)


def train_teacher(
    clips: dict[str, Tensor], pipeline: CogVideoXTeacherPipeline, until: float, device: str, seed: int, batch: int
) -> dict:
    """The transformer, in place and until the clock stands there; returns what was done."""
    pipeline.to(device)
    latents, condition = encoded(clips, pipeline, device)
    seconds = max(1.0, until - time.perf_counter())
    schedule = pipeline.schedule
    network = pipeline.transformer.train()

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator, device=device)
        t = torch.randint(1000, (batch,), generator=generator, device=device)
        z0 = latents[chosen]
        noise = torch.randn(z0.shape, generator=generator, device=device)
        output = FAMILY.call(network, schedule.add_noise(z0, noise, t), t, condition.rows(chosen)).output
        return (output - schedule.velocity(z0, noise, t)).square().mean()

    facts = trained("teacher", loss_of, [network], TEACHER_RATE, seconds, seed, graphed=False)
    pipeline.transformer.eval()
    return facts | {"batch": batch, "clips": len(latents)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image-condition", choices=["ends", "renders"], default="ends")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all, the making of clips included")
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that make clips")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6, help="of 32 channels each")
    parser.add_argument("--batch", type=int, default=64, help="of the teacher; the VAE's is a quarter")
    parser.add_argument("--vae", type=Path, help="a teacher of this recipe's whose VAE is taken as it is")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    pool = ProcessPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(1,))
    clips = collected([pool.submit(make_clip, index) for index in range(args.clips)])
    pool.shutdown()
    spent = time.perf_counter() - start
    print(f"{args.clips} clips after {spent:.0f} s", flush=True)
    torch.set_float32_matmul_precision("high")
    log: dict[str, dict] = {"clips": {"count": args.clips, "mix": MIX}, "arguments": {"seed": args.seed}}
    log["arguments"] |= {"image_condition": args.image_condition, "layers": args.layers, "heads": args.heads}
    if args.vae:
        vae = load_pipeline(args.vae, CogVideoXTeacherPipeline).vae
    else:
        seconds = VAE_SHARE * (60 * args.minutes - spent)
        vae, log["vae"] = train_vae(clips, seconds, args.device, args.seed, max(1, args.batch // 4))
    pipeline = build_teacher(vae.cpu(), args.seed, args.image_condition, args.layers, args.heads)
    log["teacher"] = train_teacher(clips, pipeline, start + 60 * args.minutes, args.device, args.seed, args.batch)
    save_model(pipeline.to("cpu"), args.out / "teacher")
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log))


if __name__ == "__main__":
    main()
