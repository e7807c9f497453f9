"""Train VAE and teacher of CogVideoX's classes, in small, on built-in clips.

    python recipes/train_cogvideox_world.py --out DIR [--image-condition ends|renders|first] [--device cuda]
        [--minutes 10] [--vae-minutes 3] [--vae DIR] [--init DIR] [--data DIR|builtin-...]

Teachers of three kinds: an interpolation model ("ends": it sees first and last frame, noised as CogvideX-
Interpolation's are), one that sees the whole render ("renders", the strongest; both are VideoScene's), and one that
sees the first frame alone ("first", the base of Wonderland's camera guidance, which lifts its blindness to where the
camera goes). Clips of 9 frames of 48x64 from `builtin-coarse` and `builtin-closed`; the VAE squeezes space 4x and time
4x. Both are trained by `train_proving_ground`'s loop. The VAE's objective is the absolute error of pixels and edges,
and, where the weights are at hand, LPIPS of a few frames, as CogVideoX's own was trained; the transformer's is the
squared error of the velocity at uniform timesteps. DIR gets `teacher` (a CogVideoXTeacherPipeline) and log.json.
benchmarks/videoscene.py says how good it is against its prior, before any student is trained.

--vae: a teacher of this recipe's, or recipes/weights/world-vae, whose VAE is taken as it is, or trained on where
--vae-minutes is given. --init: a teacher of this recipe's and of these sizes, of any kind, to go on from, with its VAE.
--data: a folder of clips, or one kind of built-in ones (kept in fvgen's cache), in place of the mix; their latents are
kept beside them, so that a second teacher of the same kind costs no second encoding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from train_proving_ground import collected, trained

from fvgen.clips.builtin import DATA_SEED, HEIGHT, WIDTH, builtin_clips
from fvgen.clips.folder import ClipFolder
from fvgen.clips.latents import load_latents
from fvgen.clips.rooms import synthetic_clip
from fvgen.clips.worlds import WORLDS, is_builtin
from fvgen.metrics.image import lpips_network
from fvgen.metrics.weights import Unavailable
from fvgen.models.cogvideox.family import FAMILY
from fvgen.models.cogvideox.pipelines import CogVideoXTeacherPipeline
from fvgen.models.cogvideox.prompts import EncodedPrompts
from fvgen.models.condition import Condition
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.system.doors import load_tensors

FRAMES = 9  # 8k + 1
MIX = ("builtin-coarse", "builtin-coarse", "builtin-coarse", "builtin-closed")
TOKENS, TEXT = 2, 32  # of the prompt, which says nothing here
VAE_RATE, TEACHER_RATE = 3e-3, 1e-3
KL_WEIGHT = 1e-6
LPIPS_WEIGHT, LPIPS_FRAMES = 0.2, 3  # of every clip
WIDTHS = (32, 64, 96)
AT_ONCE = 32  # clips that are encoded together


def make_clip(index: int) -> tuple:
    """Truth and render [F, 3, H, W] uint8 and known [F], as arrays."""
    world = WORLDS[MIX[index % len(MIX)]]
    clip = synthetic_clip("train", DATA_SEED, index, FRAMES, HEIGHT, WIDTH, world)
    images = [frames.mul(255).round().to(torch.uint8).numpy() for frames in (clip.truth, clip.render)]
    return *images, clip.known.numpy()


def folder_of(data: str, count: int, workers: int) -> ClipFolder:
    """A folder of clips, or ``count`` built-in ones of a kind."""
    return builtin_clips("train", count, workers, WORLDS[data], FRAMES) if is_builtin(data) else ClipFolder(data)


def all_clips(count: int, workers: int, data: ClipFolder | None) -> dict[str, Tensor]:
    """truth and render [N, F, 3, H, W] uint8 and known [N, F], made or from a folder of clips."""
    if data is not None:
        return load_tensors(data.path / "clips.safetensors")
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return collected([pool.submit(make_clip, index) for index in range(count)])


def build_vae(seed: int, widths: Sequence[int] = WIDTHS) -> AutoencoderKLCogVideoX:
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


def load_vae(folder: Path) -> AutoencoderKLCogVideoX:
    """From the folder of a teacher, or one of its own."""
    own = folder / "vae" if (folder / "vae").is_dir() else folder
    return AutoencoderKLCogVideoX.from_pretrained(own, torch_dtype=torch.float32, use_safetensors=True)


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


def perceptual(device: str) -> nn.Module | None:
    """LPIPS, where its weights are at hand."""
    try:
        return lpips_network(device)[0]
    except Unavailable as error:
        print(f"vae: without LPIPS ({error})", flush=True)
        return None


def train_vae(
    vae: AutoencoderKLCogVideoX, clips: dict[str, Tensor], seconds: float, device: str, seed: int, batch: int, crop: int
) -> dict:
    """In place, on square crops of clips, photographs and renders two to one; returns what was done."""
    vae.to(device).train().requires_grad_(True)
    distance = perceptual(device)
    truth, render = (clips[name].to(device) for name in ("truth", "render"))
    everything = torch.cat([truth, truth, render])
    room = [max(0, size - crop) + 1 for size in everything.shape[-2:]]

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(everything), (batch,), generator=generator, device=device)
        y, x = (int(torch.randint(size, (), generator=generator, device=device)) for size in room)
        video = everything[chosen, ..., y : y + crop, x : x + crop].transpose(1, 2).float() / 127.5 - 1
        posterior = vae.encode(video).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        edges = sum(l1_loss(decoded.diff(dim=d), video.diff(dim=d)) for d in (-1, -2, -3))
        loss = l1_loss(decoded, video) + 0.5 * edges + KL_WEIGHT * posterior.kl().sum() / video.numel()
        if distance is not None:
            some = torch.randperm(video.shape[2], generator=generator, device=device)[:LPIPS_FRAMES]
            pair = [x[:, :, some].transpose(1, 2).flatten(0, 1) for x in (decoded, video)]
            loss = loss + LPIPS_WEIGHT * distance(*pair).mean()
        return loss

    facts = trained("vae", loss_of, [vae], VAE_RATE, seconds, seed, graphed=False)
    vae.eval()
    with torch.no_grad():
        some = truth[:: max(1, len(truth) // AT_ONCE)][:AT_ONCE].transpose(1, 2).float() / 127.5 - 1
        latents = vae.encode(some).latent_dist.mean
        psnr = -10 * math.log10(((vae.decode(latents).sample.clamp(-1, 1) - some) / 2).square().mean().item())
        # The schedule is made for latents of unit variance: means of channels, which no clip changes, would take most.
        center, spread = (each.tolist() for each in (latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))))
        vae.register_to_config(latents_mean=center, latents_std=spread, scaling_factor=1.0)
    print(f"vae: {psnr:.2f} dB", flush=True)
    return facts | {"batch": batch, "crop": crop, "psnr": round(psnr, 2), "lpips": distance is not None}


@torch.no_grad()
def encoded(clips: dict[str, Tensor], pipeline: CogVideoXTeacherPipeline, device: str) -> tuple[Tensor, Condition]:
    """Latents of the truth and what the teacher sees, on the device: every clip, mirrored too, and walked back where
    both ends are known."""
    generator, rows, seen = torch.Generator().manual_seed(0), [], []
    both = clips["known"][:, -1]
    for mirrored, back in product((False, True), repeat=2):
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
    data: tuple[Tensor, Condition], pipeline: CogVideoXTeacherPipeline, until: float, device: str, seed: int, batch: int
) -> dict:
    """The transformer, in place and until the clock stands there; returns what was done."""
    latents, condition = data
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
    parser.add_argument("--image-condition", choices=["ends", "renders", "first"], default="ends")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all, the making of clips included")
    parser.add_argument("--vae-minutes", type=float, help="of these, for the VAE: 3; 0 with --vae")
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that make clips")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6, help="of 32 channels each")
    parser.add_argument("--batch", type=int, default=64, help="of the teacher")
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--vae-crop", type=int, default=64, help="pixels of a crop's side; a small one: more updates")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the VAE's levels")
    parser.add_argument("--vae", type=Path, help="a teacher or recipes/weights/world-vae, whose VAE is taken")
    parser.add_argument("--init", type=Path, help="a teacher of this recipe's to go on from, with its VAE")
    parser.add_argument("--data", help="a folder of clips, or a kind of built-in ones, in place of the mix")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.vae = args.vae or args.init
    if args.vae_minutes is None:
        args.vae_minutes = 0.0 if args.vae else 3.0

    start = time.perf_counter()
    folder = folder_of(args.data, args.clips, args.workers) if args.data else None
    clips = all_clips(args.clips, args.workers, folder)
    print(f"{len(clips['truth'])} clips after {time.perf_counter() - start:.0f} s", flush=True)
    torch.set_float32_matmul_precision("high")
    log: dict[str, dict] = {
        "clips": {"count": len(clips["truth"]), "data": args.data or MIX},
        "arguments": {"seed": args.seed},
    }
    log["arguments"] |= {"image_condition": args.image_condition, "layers": args.layers, "heads": args.heads}
    vae = load_vae(args.vae) if args.vae else build_vae(args.seed, args.widths)
    if args.vae_minutes:
        seconds = 60 * args.vae_minutes
        log["vae"] = train_vae(vae, clips, seconds, args.device, args.seed, args.vae_batch, args.vae_crop)
    pipeline = build_teacher(vae.cpu(), args.seed, args.image_condition, args.layers, args.heads)
    if args.init:
        earlier = load_pipeline(args.init, CogVideoXTeacherPipeline).transformer
        pipeline.transformer.load_state_dict(earlier.state_dict())
    save_model(pipeline, args.out / "teacher")  # of the VAE alone so far: a kill from here on costs only the teacher
    pipeline.to(args.device)
    if folder is not None:
        whole = load_latents(folder, pipeline)
        data = whole.batch(torch.arange(len(whole)), args.device)
        data = (data.latents, data.condition)
    else:
        data = encoded(clips, pipeline, args.device)
    until = start + 60 * args.minutes
    log["teacher"] = train_teacher(data, pipeline, until, args.device, args.seed, args.batch)
    save_model(pipeline.to("cpu"), args.out / "teacher")
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log))


if __name__ == "__main__":
    main()
