"""A whole ViewCrafter pipeline of random weights and a handful of clips: small enough to train on in a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel
from viewcrafter_reference import small_unet

from fvgen.clips.clip import Clip
from fvgen.models.viewcrafter.encoders import FixedPrompts
from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline
from fvgen.models.viewcrafter.projector import ImageProjector

FRAMES, HEIGHT, WIDTH = 4, 16, 24
LATENTS = (4, FRAMES, 4, 6)  # of one clip
TEXT_TOKENS, CONTEXT = 5, 32
STEPS = 6  # of the teacher


def small_teacher(**changes) -> ViewCrafterPipeline:
    """All parts of the published pipeline; no layer is left at zero, so that everything shows in the output."""
    unet = small_unet(model_channels=16, context_dim=CONTEXT, text_tokens=TEXT_TOKENS, temporal_length=FRAMES)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.9,
    )
    clip = CLIPVisionConfig(
        hidden_size=CONTEXT,
        intermediate_size=CONTEXT,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=CONTEXT,
    )
    projector = ImageProjector(
        dim=CONTEXT,
        depth=1,
        dim_head=8,
        heads=4,
        video_length=FRAMES,
        embedding_dim=CONTEXT,
        output_dim=CONTEXT,
        ff_mult=1,
    )
    prompts = FixedPrompts.random(TEXT_TOKENS, CONTEXT, torch.Generator().manual_seed(0))
    settings = {"steps": STEPS} | changes
    return ViewCrafterPipeline(vae.eval(), unet, CLIPVisionModel(clip).eval(), projector, prompts, **settings)


def student_of(teacher: ViewCrafterPipeline, steps: int = 4) -> FVGenPipeline:
    """The same parts, sampled in few steps."""
    parts = {name: teacher.components[name] for name in ("vae", "unet", "image_encoder", "image_projector", "prompts")}
    return FVGenPipeline(**parts, base_scale=teacher.config.base_scale, steps=steps)


def small_clips(count: int, seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> list[Clip]:
    """Blobs of colour that move; the render lacks a third of the pixels, except in the known first and last frame."""
    generator = torch.Generator().manual_seed(seed)
    return [_clip(f"blob-{index}", generator, height, width) for index in range(count)]


def _clip(name: str, generator: torch.Generator, height: int, width: int) -> Clip:
    coarse = torch.rand(1, 3, FRAMES, 3, 4, generator=generator)
    truth = torch.nn.functional.interpolate(coarse, size=(FRAMES, height, width), mode="trilinear")[0].transpose(0, 1)
    known = torch.zeros(FRAMES, dtype=torch.bool)
    known[[0, -1]] = True
    hole = (torch.rand(FRAMES, 1, height, width, generator=generator) < 1 / 3) & ~known[:, None, None, None]
    return Clip(name, truth.contiguous(), truth.masked_fill(hole, 0), known)


def random_latents(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, *LATENTS, generator=torch.Generator().manual_seed(seed))


def small_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with letters for words: "a" is 1, ... "z" 26, and the last two ids are start and end."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["!", *(f"{letter}</w>" for letter in letters), *letters, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    return CLIPTokenizer.from_pretrained(folder)
