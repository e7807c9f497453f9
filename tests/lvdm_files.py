"""A small ViewCrafter yaml and a whole checkpoint of random weights that belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fvgen.convert.command import BUFFERS, TO_THEIRS
from fvgen.convert.lvdm_yaml import read_lvdm_config
from fvgen.convert.names import PREFIXES
from fvgen.diffusion.schedule import NoiseSchedule

CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2},
}


def lvdm_settings() -> dict[str, Any]:
    """The yaml's content."""
    unet = {
        "in_channels": 8,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "dropout": 0.1,
        "num_head_channels": 32,
        "context_dim": 16,
        "use_linear": True,
        "use_checkpoint": True,
        "temporal_length": 16,
        "default_fs": 10,
    }
    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    projector = {
        "dim": 16,
        "depth": 1,
        "dim_head": 8,
        "heads": 3,
        "num_queries": 16,
        "video_length": 3,
        "embedding_dim": 32,
        "output_dim": 16,
        "ff_mult": 2,
    }
    openclip = "lvdm.modules.encoders.condition.FrozenOpenCLIP"
    params = {
        "rescale_betas_zero_snr": True,
        "parameterization": "v",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": 1000,
        "conditioning_key": "hybrid",
        "scale_factor": 0.2,
        "use_dynamic_rescale": True,
        "base_scale": 0.3,
        "unet_config": {"target": "lvdm.modules.networks.openaimodel3d.UNetModel", "params": unet},
        "first_stage_config": {
            "target": "lvdm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 4, "ddconfig": ddconfig},
        },
        "cond_stage_config": {"target": f"{openclip}Embedder", "params": {"layer": "penultimate", "model_cfg": CLIP}},
        "img_cond_stage_config": {
            "target": f"{openclip}ImageEmbedderV2",
            "params": {"freeze": True, "model_cfg": CLIP},
        },
        "image_proj_stage_config": {"target": "lvdm.modules.encoders.resampler.Resampler", "params": projector},
    }
    return {"model": {"target": "lvdm.models.ddpm3d.VIPLatentDiffusion", "params": params}}


def write_yaml(path: Path, content: dict | None = None) -> Path:
    path.write_text(yaml.safe_dump(content or lvdm_settings()))
    return path


def lvdm_state(config: Path, same_text: bool = True) -> dict[str, Tensor]:
    """A whole checkpoint in ViewCrafter's names; the second CLIP's text half equals the first's, or does not."""
    torch.manual_seed(0)
    lvdm = read_lvdm_config(config)
    state = {}
    for component, to_theirs in TO_THEIRS.items():
        ours = lvdm.build_empty(component).state_dict()
        theirs = to_theirs({key: torch.randn(value.shape) for key, value in ours.items()})
        state |= {PREFIXES[component] + key: value for key, value in theirs.items()}
    first, second = PREFIXES["text_encoder"], PREFIXES["image_encoder"]
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
    schedule = NoiseSchedule.viewcrafter(0.3)
    known = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alphas_cumprod,
        "sqrt_alphas_cumprod": schedule.signal,
        "sqrt_one_minus_alphas_cumprod": schedule.sigma,
    }
    state |= {name: known.get(name, torch.randn(1000)).clone() for name in BUFFERS}
    return state | {"scale_arr": torch.cat([schedule.scale_arr, torch.full((400,), 0.3)])}
