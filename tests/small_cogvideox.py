"""A whole CogVideoX pipeline of random weights, small enough to train on in a test."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from torch import Tensor

from fvgen.models.cogvideox.pipelines import CogVideoXTeacherPipeline
from fvgen.models.cogvideox.prompts import EncodedPrompts

FRAMES, HEIGHT, WIDTH = 9, 32, 48
LATENTS = (16, 3, 4, 6)  # of one clip
TOKENS, TEXT, BLOCKS = 8, 32, 2
POSITIONS = {
    "rotary": {"use_rotary_positional_embeddings": True},
    "learned": {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
    "sinusoids": {},
}


def transformer(positions: str = "rotary", **changes) -> CogVideoXTransformer3DModel:
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_layers": BLOCKS,
        "in_channels": 32,
        "time_embed_dim": 32,
        "text_embed_dim": TEXT,
        "max_text_seq_length": TOKENS,
        "sample_frames": FRAMES,
        "sample_height": LATENTS[2],
        "sample_width": LATENTS[3],
        "patch_size": 2,
    }
    torch.manual_seed(0)
    network = CogVideoXTransformer3DModel(**settings | POSITIONS[positions] | changes).eval()
    if positions == "learned":  # as after training: no longer the sinusoids that a fresh one starts with
        network.patch_embed.pos_embedding.add_(0.1 * torch.randn(network.patch_embed.pos_embedding.shape))
    return network


def small_vae(**changes) -> AutoencoderKLCogVideoX:
    settings = {
        "block_out_channels": (4, 4, 4, 4),
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "scaling_factor": 0.7,
    }
    torch.manual_seed(1)
    return AutoencoderKLCogVideoX(**settings | changes).eval()


def small_scheduler(**changes) -> CogVideoXDDIMScheduler:
    """The published 5B models' settings, none of which is the class's default."""
    settings = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    return CogVideoXDDIMScheduler(**settings | changes)


def small_teacher(positions: str = "rotary", vae: dict | None = None, **settings) -> CogVideoXTeacherPipeline:
    generator = torch.Generator().manual_seed(2)
    prompts = EncodedPrompts.of(*torch.randn(2, 1, TOKENS, TEXT, generator=generator))
    parts = small_vae(**vae or {}), transformer(positions), small_scheduler(), prompts
    return CogVideoXTeacherPipeline(*parts, **{"steps": 2} | settings)


def video(clips: int = 1, frames: int = FRAMES, seed: int = 0) -> Tensor:
    """[B, F, 3, H, W] in [0, 1], smooth."""
    coarse = torch.rand(clips, 3, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (frames, HEIGHT, WIDTH), mode="trilinear").transpose(1, 2)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
