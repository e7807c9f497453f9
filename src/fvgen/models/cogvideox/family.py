"""CogVideoX's row in the table of families: a transformer over video and text tokens that sees image latents beside the
noisy ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fvgen.diffusion.schedule import TIMESTEPS, NoiseSchedule
from fvgen.errors import UserError, short
from fvgen.geometry.plucker import PACKED
from fvgen.models.cogvideox.published import PUBLISHED
from fvgen.models.cogvideox.transformer import taps_of, velocity_and_taps, width_of
from fvgen.models.cogvideox.vae import SQUEEZE, latent_size, space_factor
from fvgen.models.condition import CAMERA_PATH, Condition
from fvgen.models.denoiser import Prediction
from fvgen.models.family import Blueprint, Family, LatentGrid, Size

GUIDANCE = 6.0
LEAP = "VideoScenePipeline"
CAMERA = "CameraTransformer"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
"""All linear layers of the blocks but those of their adaptive norms; peft compares ends of names."""
SCHEDULER: Mapping[str, Any] = {
    **{"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"},
    **{"timestep_spacing": "trailing", "clip_sample": False, "beta_start": None, "beta_end": None},
    "snr_shift_scale": None,
}
"""What a scheduler must say, and what (None: any number). None of it is the default of diffusers' classes."""


def call(
    network: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    taps: Sequence[str] = (),
    stop: bool = False,
    cut: bool = False,
) -> Prediction:
    """Noisy latents, then ``image_latents`` [B, C, F', h, w], on the channels; ``text_tokens`` [B, N, D]; for a network
    that looks at cameras ``camera_path`` [B, F, 21], which stays float32; without it such a network is its base."""
    dtype = next(network.parameters()).dtype
    everything = condition.expanded(len(x_t))
    sample = torch.cat([x_t.to(dtype), everything["image_latents"].to(dtype)], dim=1).transpose(1, 2)
    text = everything["text_tokens"].to(dtype)
    guide = {CAMERA_PATH: everything.get(CAMERA_PATH)} if getattr(network, "wants_cameras", False) else {}
    velocity, features = velocity_and_taps(network, sample, text, t, taps, stop, cut, **guide)
    return Prediction(None if velocity is None else velocity.transpose(1, 2), features)


def tap_widths(network: nn.Module) -> dict[str, int]:
    """Every block is a tap, and all are as wide."""
    return dict.fromkeys(taps_of(network), width_of(network))


def default_tap(network: nn.Module) -> str:
    """Behind the first half of the blocks."""
    taps = taps_of(network)
    return taps[(len(taps) - 1) // 2]


def noise_schedule(scheduler: Mapping[str, Any]) -> NoiseSchedule:
    """Of a scheduler's settings, DDIM's or DPM's: both make the same table of them.

    Raises UserError for settings that none of the published models has, and where one is missing that decides: the
    libraries would fill in their class's default, another model's.
    """
    for name, value in SCHEDULER.items():
        if name not in scheduler:
            raise UserError(f"the scheduler's settings lack {name}; copy its scheduler_config.json again")
        if value is not None and scheduler[name] != value:
            raise UserError(
                f"the teacher's scheduler says {name}={scheduler[name]}; give a teacher of CogVideoX's own noise "
                f"levels ({name}={value})"
            )
    for name, value in {"num_train_timesteps": TIMESTEPS, "trained_betas": None, "set_alpha_to_one": True}.items():
        if scheduler.get(name, value) != value:
            raise UserError(
                f"the teacher's scheduler says {name}={short(scheduler[name])}; give a teacher of CogVideoX's own "
                f"noise levels ({name}={value})"
            )
    return NoiseSchedule.cogvideox(*(scheduler[name] for name in ("beta_start", "beta_end", "snr_shift_scale")))


def start(condition: Condition) -> Tensor:
    """Clean latents [B, C, F', h, w] of the render: of their own where the image channels hold less."""
    return condition["render_latents" if "render_latents" in condition else "image_latents"]


def blueprint(files: Mapping[str, Mapping[str, Any]]) -> Blueprint:
    """From the JSON files of a model folder, by component."""
    index, transformer, vae = files.get("", {}), files["transformer"], files["vae"]
    guided = transformer.get("_class_name") == CAMERA

    def network() -> nn.Module:
        from diffusers import CogVideoXTransformer3DModel

        from fvgen.models.cogvideox.camera import CameraTransformer

        kind = CameraTransformer if guided else CogVideoXTransformer3DModel
        return kind(**{k: v for k, v in transformer.items() if not k.startswith("_")})

    def example(size: Size) -> tuple[Tensor, Condition]:
        shape = latent_size(transformer, vae, size.frames, size.height, size.width)
        latents = torch.zeros(size.batch, vae["latent_channels"], *shape)
        text = torch.zeros(1, transformer["max_text_seq_length"], transformer["text_embed_dim"])
        beside = latents if index.get("image_condition", "renders") != "renders" else None
        path = torch.zeros(size.batch, size.frames, PACKED) if guided else None
        return latents, Condition(image_latents=latents, text_tokens=text, render_latents=beside, camera_path=path)

    def with_cameras(settings: Mapping[str, Any]) -> Blueprint:
        described = {"_class_name": CAMERA, "space_factor": space_factor(vae), **settings}
        return blueprint({**files, "transformer": {**transformer, **described}})

    guidance, weight = float(index.get("guidance", GUIDANCE)), float(index.get("camera_guidance", 1.0))
    schedule = partial(noise_schedule, files["scheduler"])
    return Blueprint(network, example, schedule, guidance, latent_grid(vae), with_cameras, weight)


def latent_grid(vae: Mapping[str, Any]) -> LatentGrid:
    """Of a VAE's settings."""
    return LatentGrid(vae["latent_channels"], SQUEEZE, space_factor(vae))


def pipeline(class_name: str) -> type[Any]:
    """One of the pipeline classes."""
    module = "videoscene" if class_name == LEAP else "pipelines"
    return getattr(import_module(f"fvgen.models.cogvideox.{module}"), class_name)


FAMILY = Family(
    name="cogvideox",
    teachers=("CogVideoXTeacherPipeline",),
    students=("CogVideoXStudentPipeline", LEAP),
    pipeline=pipeline,
    call=call,
    tap_widths=tap_widths,
    default_tap=default_tap,
    lora_targets=LORA_TARGETS,
    blueprint=blueprint,
    published=PUBLISHED,
    start=start,
    leap=LEAP,
)
