"""ViewCrafter's configuration files: which networks of which sizes, checked to be ViewCrafter's.

A file describes more than this library can build: every switch that would make another network or another diffusion is
compared with ViewCrafter's value, and refused where it differs. Sizes are free.

The sizes of the CLIP towers are not in the file, which names a model of open_clip at most; for other sizes give
open_clip's own description of a model (`embed_dim`, `vision_cfg`, `text_cfg`) as `model_cfg` in their `params`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from fvgen.convert.names import (
    image_config_from_open_clip,
    text_config_from_open_clip,
    unet_config_from_lvdm,
    vae_config_from_lvdm,
)
from fvgen.errors import UserError, first_line
from fvgen.models.viewcrafter.projector import ImageProjector
from fvgen.models.viewcrafter.unet import ViewCrafterUNet

MODEL = "VIPLatentDiffusion"
# Component: (section below model.params, class that it must name).
SECTIONS = {
    "unet": ("unet_config", "UNetModel"),
    "vae": ("first_stage_config", "AutoencoderKL"),
    "image_projector": ("image_proj_stage_config", "Resampler"),
    "image_encoder": ("img_cond_stage_config", "FrozenOpenCLIPImageEmbedderV2"),
    "text_encoder": ("cond_stage_config", "FrozenOpenCLIPEmbedder"),
}
# Values that a file may state, but not otherwise.
MODEL_SWITCHES = {
    "parameterization": "v",
    "rescale_betas_zero_snr": True,
    "beta_schedule": "linear",
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "timesteps": 1000,
    "conditioning_key": "hybrid",
    "scale_by_std": False,
    "use_ema": False,
    "use_dynamic_rescale": True,
}
SWITCHES = {
    "unet": {
        "dims": 2,
        "transformer_depth": 1,
        "use_linear": True,
        "temporal_conv": True,
        "temporal_attention": True,
        "temporal_selfatt_only": True,
        "use_relative_position": False,
        "use_causal_attention": False,
        "addition_attention": True,
        "image_cross_attention": True,
        "fs_condition": True,
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "conv_resample": True,
        "tempspatial_aware": False,
    },
    "text_encoder": {"layer": "penultimate"},
    "image_encoder": {"antialias": True},
    "image_projector": {},
    "vae": {},
}
VAE_SWITCHES = {"double_z": True, "attn_resolutions": [], "dropout": 0.0}

# open_clip's description of the model that ViewCrafter uses.
VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
DAMAGED = "the yaml {path} is damaged ({reason}); give a ViewCrafter configuration file"


@dataclass(frozen=True)
class LvdmConfig:
    """What a configuration file says: base_scale and how to build each component (on the default device)."""

    base_scale: float
    builders: dict[str, Callable[[], nn.Module]]
    open_clip: Mapping[str, Any]  # open_clip's description of the second CLIP, `embedder`

    def build_empty(self, component: str) -> nn.Module:
        """The component without weights, on the meta device."""
        with torch.device("meta"):
            return self.builders[component]().eval()


def read_lvdm_config(path: str | Path) -> LvdmConfig:
    """Read a ViewCrafter yaml. Raises UserError for one that is damaged or describes another model."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise UserError(f"cannot read the yaml {path} ({reason}); give a ViewCrafter configuration file") from error
    except yaml.YAMLError as error:
        raise UserError(DAMAGED.format(path=path, reason=first_line(error))) from error
    try:
        return _lvdm_config(content, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(DAMAGED.format(path=path, reason=reason)) from error


def _lvdm_config(content: Any, path: str | Path) -> LvdmConfig:
    model = content["model"]
    _check_class(model, MODEL, "model", path)
    params = model["params"]
    _check_switches(params, MODEL_SWITCHES, "model", path)
    sections = {}
    for component, (name, kind) in SECTIONS.items():
        _check_class(params[name], kind, name, path)
        sections[component] = params[name].get("params") or {}
        _check_switches(sections[component], SWITCHES[component], name, path)
    vae, clip = sections["vae"], _open_clip(sections["image_encoder"], path)
    _check_switches(vae["ddconfig"], VAE_SWITCHES, "first_stage_config", path)
    if vae["embed_dim"] != vae["ddconfig"]["z_channels"]:
        raise UserError(f"the yaml {path} has another embed_dim than z_channels, which AutoencoderKL cannot have")
    text = text_config_from_open_clip(_open_clip(sections["text_encoder"], path))
    builders = {
        "unet": partial(ViewCrafterUNet, **unet_config_from_lvdm(sections["unet"])),
        "vae": partial(AutoencoderKL, **vae_config_from_lvdm(vae, params["scale_factor"])),
        "image_projector": partial(ImageProjector, **sections["image_projector"]),
        "image_encoder": partial(
            _build, CLIPVisionModelWithProjection, CLIPVisionConfig, image_config_from_open_clip(clip)
        ),
        "text_encoder": partial(_build, CLIPTextModelWithProjection, CLIPTextConfig, text),
    }
    return LvdmConfig(float(params["base_scale"]), builders, clip)


def _build(model: type, config: type, settings: dict) -> nn.Module:
    return model(config(**settings))


def _open_clip(params: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    """open_clip's description of a tower's model."""
    if "model_cfg" in params:
        return params["model_cfg"]
    arch = params.get("arch", "ViT-H-14")
    if arch != "ViT-H-14":
        raise UserError(
            f"the yaml {path} names the open_clip model {arch}, only ViT-H-14 is known here; give its description "
            "(embed_dim, vision_cfg, text_cfg) as model_cfg beside arch"
        )
    return VIT_H_14


def _check_class(section: Mapping[str, Any], expected: str, name: str, path: str | Path) -> None:
    found = str(section["target"])
    if found.rsplit(".", 1)[-1] != expected:
        raise UserError(f"the yaml {path} is of another model: its {name} is {found}, not {expected}")


def _check_switches(params: Mapping[str, Any], expected: Mapping[str, Any], name: str, path: str | Path) -> None:
    for key, value in expected.items():
        if key in params and params[key] != value:
            raise UserError(
                f"the yaml {path} is of another model: {name} has {key}={params[key]!r}, ViewCrafter's is {value!r}"
            )
