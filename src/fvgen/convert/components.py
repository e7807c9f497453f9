"""One row for each network of a checkpoint: where it is in file and yaml, what the yaml may say, what it is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from fvgen.convert.names import DIFFUSERS_VAE, KEY_MAPS, KeyMap, vae_key_map
from fvgen.models.viewcrafter.projector import ImageProjector
from fvgen.models.viewcrafter.unet import ViewCrafterUNet

# Key of a yaml: (the value that all published models have, the class's default where the key is absent).
Switches = Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Component:
    """One network.

    Args:
        prefix: of its names in a whole checkpoint.
        section: of the yaml, below model.params.
        target: class that the section must name.
        network: our class.
        switches: what would make another network; sizes are free.
    """

    prefix: str
    section: str
    target: str
    network: type[nn.Module]
    switches: Switches = field(default_factory=dict)


COMPONENTS = {
    "unet": Component(
        "model.diffusion_model.",
        "unet_config",
        "UNetModel",
        ViewCrafterUNet,
        {
            "dims": (2, 2),
            "transformer_depth": (1, 1),
            "use_linear": (True, False),
            "temporal_conv": (True, False),
            "temporal_attention": (True, True),
            "temporal_selfatt_only": (True, True),
            "use_relative_position": (False, True),
            "use_causal_attention": (False, False),
            "addition_attention": (True, False),
            "image_cross_attention": (True, False),
            "fs_condition": (True, False),
            "use_scale_shift_norm": (False, False),
            "resblock_updown": (False, False),
            "conv_resample": (True, True),
            "tempspatial_aware": (False, False),
        },
    ),
    "vae": Component("first_stage_model.", "first_stage_config", "AutoencoderKL", AutoencoderKL),
    "image_projector": Component("image_proj_model.", "image_proj_stage_config", "Resampler", ImageProjector),
    "image_encoder": Component(
        "embedder.model.",
        "img_cond_stage_config",
        "FrozenOpenCLIPImageEmbedderV2",
        CLIPVisionModelWithProjection,
        {"antialias": (True, True)},
    ),
    "text_encoder": Component(
        "cond_stage_model.model.",
        "cond_stage_config",
        "FrozenOpenCLIPEmbedder",
        CLIPTextModelWithProjection,
        {"layer": ("penultimate", "last")},
    ),
}
VAE_SWITCHES: Switches = {"double_z": (True, True), "attn_resolutions": ([], None), "dropout": (0.0, 0.0)}


def key_map(component: str, network: nn.Module, vae_names: str) -> KeyMap:
    """Names of a component's weights; `network` is one of its size, `vae_names` "lvdm" or "diffusers"."""
    if component != "vae":
        return KEY_MAPS[component]
    return DIFFUSERS_VAE if vae_names == "diffusers" else vae_key_map(len(network.config.block_out_channels))
