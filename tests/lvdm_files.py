"""Yamls of the published models, at published and at small sizes, and random checkpoints that belong to them.

What the published files say is repeated here in our own words, key by key where it matters to reading them; what only
training uses is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fvgen.convert.components import COMPONENTS, key_map
from fvgen.convert.leftovers import BUFFERS
from fvgen.convert.lvdm_yaml import read_lvdm_config

CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2},
}
UNET = {
    "in_channels": 8,
    "out_channels": 4,
    "dropout": 0.1,
    "transformer_depth": 1,
    "use_linear": True,
    "use_checkpoint": True,
    "temporal_conv": True,
    "temporal_attention": True,
    "temporal_selfatt_only": True,
    "use_relative_position": False,
    "use_causal_attention": False,
    "temporal_length": 16,
    "addition_attention": True,
    "image_cross_attention": True,
    "fs_condition": True,
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "in_channels": 3,
    "out_ch": 3,
    "attn_resolutions": [],
    "dropout": 0.0,
}
PUBLISHED = {
    "unet": {
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "context_dim": 1024,
    },
    "vae": {"resolution": 256, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    "projector": {
        "dim": 1024,
        "depth": 4,
        "dim_head": 64,
        "heads": 12,
        "num_queries": 16,
        "embedding_dim": 1280,
        "output_dim": 1024,
        "ff_mult": 4,
        "video_length": 16,
    },
    "clip": {},
    "scale_factor": 0.18215,
}
SMALL = {
    "unet": {
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_head_channels": 32,
        "context_dim": 16,
    },
    "vae": {"resolution": 32, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1},
    "projector": {
        "dim": 16,
        "depth": 1,
        "dim_head": 8,
        "heads": 3,
        "num_queries": 16,
        "video_length": 3,
        "embedding_dim": 32,
        "output_dim": 16,
        "ff_mult": 2,
    },
    "clip": {"model_cfg": CLIP},
    "scale_factor": 0.2,
}
COMMON = {
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "timesteps": 1000,
    "conditioning_key": "hybrid",
    "scale_by_std": False,
    "use_ema": False,
    "uncond_type": "empty_seq",
}
V = {
    "rescale_betas_zero_snr": True,
    "parameterization": "v",
    "use_dynamic_rescale": True,
    "fps_condition_type": "fps",
    "perframe_ae": True,
}
VIEWCRAFTER, DYNAMICRAFTER = "VIPLatentDiffusion", "LatentVisualDiffusion"
# Published yaml: (its class, what it says of the model, what it says of the UNet).
YAMLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ViewCrafter_25": (VIEWCRAFTER, {**V, "base_scale": 0.3, "loop_video": "Flase"}, {"default_fs": 10}),
    "ViewCrafter_25_512": (VIEWCRAFTER, {**V, "base_scale": 0.7, "loop_video": False}, {"default_fs": 10}),
    "DynamiCrafter_512": (DYNAMICRAFTER, {**V, "base_scale": 0.7}, {"default_fs": 24}),
    "DynamiCrafter_1024": (DYNAMICRAFTER, {**V, "base_scale": 0.3}, {"default_fs": 10}),
    "DynamiCrafter_512_Interp": (DYNAMICRAFTER, {**V, "base_scale": 0.7}, {"default_fs": 24}),  # DynamiCrafter_512's
    "DynamiCrafter_512_Interp, training": (
        DYNAMICRAFTER,
        {**V, "base_scale": 0.7, "interp_mode": True},
        {"default_fs": 10},
    ),
    "DynamiCrafter_256": (DYNAMICRAFTER, {}, {"default_fs": 3, "image_cross_attention_scale_learnable": True}),
    "GenFusion": (
        DYNAMICRAFTER,
        {
            **V,
            "base_scale": 0.7,
            "interp_mode": True,
            "first_stage_key": "gt_rgb",
            "first_stage_depth_key": "gt_depth",
            "cond_stage_depth_key": "artifact_depth",
        },
        {"default_fs": 30},
    ),
}
LAYOUTS = {"DynamiCrafter_512_Interp": "ends"}  # what has to be asked for


def lvdm_settings(name: str = "ViewCrafter_25", sizes: dict[str, Any] = SMALL) -> dict[str, Any]:
    """The content of a model's yaml."""
    target, model, unet = YAMLS[name]
    openclip = "lvdm.modules.encoders.condition.FrozenOpenCLIP"
    params = {
        **COMMON,
        **model,
        "scale_factor": sizes["scale_factor"],
        "unet_config": {
            "target": "lvdm.modules.networks.openaimodel3d.UNetModel",
            "params": {**UNET, **sizes["unet"], **unet},
        },
        "first_stage_config": {
            "target": "lvdm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 4, "ddconfig": {**VAE, **sizes["vae"]}},
        },
        "cond_stage_config": {
            "target": f"{openclip}Embedder",
            "params": {"freeze": True, "layer": "penultimate", **sizes["clip"]},
        },
        "img_cond_stage_config": {"target": f"{openclip}ImageEmbedderV2", "params": {"freeze": True, **sizes["clip"]}},
        "image_proj_stage_config": {
            "target": "lvdm.modules.encoders.resampler.Resampler",
            "params": dict(sizes["projector"]),
        },
    }
    return {"model": {"target": f"lvdm.models.ddpm3d.{target}", "params": params}}


def write_yaml(path: Path, content: dict | None = None) -> Path:
    path.write_text(yaml.safe_dump(content or lvdm_settings()))
    return path


def lvdm_state(config: Path, same_text: bool = True, layout: str | None = None) -> dict[str, Tensor]:
    """A whole checkpoint in the published names; the second CLIP's text half equals the first's, or does not."""
    torch.manual_seed(0)
    lvdm = read_lvdm_config(config, layout)
    state = {}
    for component, row in COMPONENTS.items():
        network = lvdm.build_empty(component)
        random = {key: torch.randn(value.shape) for key, value in network.state_dict().items()}
        theirs = key_map(component, network, lvdm.kind.vae_names).to_theirs(random)
        state |= {row.prefix + key: value for key, value in theirs.items()}
    first, second = COMPONENTS["text_encoder"].prefix, COMPONENTS["image_encoder"].prefix
    state[first + "logit_scale"], state[second + "logit_scale"] = torch.tensor(4.6), torch.tensor(4.5)
    for key in (
        "positional_embedding",
        "text_projection",
        "token_embedding.weight",
        "ln_final.weight",
        "ln_final.bias",
    ):
        text = state[first + key]
        state[second + key] = text.clone() if same_text else torch.randn_like(text)
    schedule, scale = lvdm.schedule, lvdm.base_scale
    known = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alphas_cumprod,
        "sqrt_alphas_cumprod": schedule.signal,
        "sqrt_one_minus_alphas_cumprod": schedule.sigma,
    }
    state |= {name: known.get(name, torch.randn(1000)).clone() for name in BUFFERS}
    return state if scale is None else state | {"scale_arr": torch.cat([schedule.scale_arr, torch.full((400,), scale)])}
