"""How large the networks are: constructor arguments of ours from what yamls and open_clip say of theirs.

What a yaml leaves out has the default of the class that it names, which is not always that of our class: such keys are
written down here, and all others must be there (KeyError).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# open_clip's description of the model that all published models use.
VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
PROJECTOR = (
    *("dim", "depth", "dim_head", "heads", "num_queries"),
    *("video_length", "embedding_dim", "output_dim", "ff_mult"),
)


def unet_config(params: Mapping[str, Any]) -> dict:
    """Arguments of `ViewCrafterUNet` from `unet_config.params`; only what varies among published models is taken."""
    same = (
        "in_channels",
        "out_channels",
        "model_channels",
        "num_res_blocks",
        "num_head_channels",
        "context_dim",
        "temporal_length",
    )
    return {
        **{name: params[name] for name in same},
        **{name: tuple(params[name]) for name in ("channel_mult", "attention_resolutions")},
        "dropout": params.get("dropout", 0.0),
        "default_fps": params.get("default_fs", 4),
        "image_cross_attention_scale_learnable": params.get("image_cross_attention_scale_learnable", False),
    }


def vae_config(params: Mapping[str, Any], scale_factor: float = 0.18215) -> dict:
    """Arguments of `AutoencoderKL` from `first_stage_config.params` and the model's `scale_factor`."""
    inner = params["ddconfig"]
    levels = len(inner["ch_mult"])
    return {
        "in_channels": inner["in_channels"],
        "out_channels": inner["out_ch"],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(inner["ch"] * mult for mult in inner["ch_mult"]),
        "layers_per_block": inner["num_res_blocks"],
        "latent_channels": inner["z_channels"],
        "sample_size": inner["resolution"],
        "scaling_factor": scale_factor,
    }


def projector_config(params: Mapping[str, Any]) -> dict:
    """Arguments of `ImageProjector` from `image_proj_stage_config.params`. Raises ValueError for a key beside them."""
    if unknown := sorted(set(params) - set(PROJECTOR)):
        raise ValueError(f"its image_proj_stage_config has an unknown {unknown[0]!r}")
    return {name: params[name] for name in PROJECTOR}


def text_config(model: Mapping[str, Any]) -> dict:
    """Arguments of transformers' `CLIPTextConfig` from open_clip's description of a model.

    The last two ids are those of start and end, and padding is 0, as in CLIP's vocabulary of 49,408.
    """
    text = model["text_cfg"]
    return {
        "vocab_size": text["vocab_size"],
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4)),
        "projection_dim": model["embed_dim"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": text["vocab_size"] - 2,
        "eos_token_id": text["vocab_size"] - 1,
    }


def image_config(model: Mapping[str, Any]) -> dict:
    """Arguments of transformers' `CLIPVisionConfig` from open_clip's description of a model."""
    vision = model["vision_cfg"]
    return {
        "hidden_size": vision["width"],
        "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4)),
        "projection_dim": model["embed_dim"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }
