"""Settings of the published models, to plan with: no weights of theirs are anywhere near.

The numbers are those that the model cards and tables of other projects agree on; a model's own folder has the last
word. All of it that is not given here is the default of diffusers' classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Files = Mapping[str, Mapping[str, Any]]

_TRANSFORMER = {
    "attention_head_dim": 64,
    "in_channels": 32,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": None,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
}
_VAE = {
    "block_out_channels": (128, 256, 256, 512),
    "latent_channels": 16,
    "temporal_compression_ratio": 4,
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def _files(
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any] | None = None,
) -> Files:
    return {
        "": index or {},
        "transformer": _TRANSFORMER | transformer,
        "vae": _VAE | vae,
        "scheduler": _SCHEDULER | scheduler,
    }


_5B = (
    {
        "num_attention_heads": 48,
        "num_layers": 42,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    },
    {"scaling_factor": 0.7},
    {"snr_shift_scale": 1.0},
)

PUBLISHED: Mapping[str, Files] = {
    "cogvideox-5b-i2v": _files(*_5B),
    # feizhengcong/CogvideoX-Interpolation, VideoScene's teacher: the same network, fine-tuned to see both ends.
    "cogvideox-interpolation": _files(*_5B, {"image_condition": "ends", "rotary_base": "30x45", "guidance": 1.0}),
    # Text to video as published, with 16 channels in; here with a patch embedding that takes the render's 16 too.
    "cogvideox-2b": _files(
        {
            "num_attention_heads": 30,
            "num_layers": 30,
            "use_rotary_positional_embeddings": False,
            "use_learned_positional_embeddings": False,
        },
        {"scaling_factor": 1.15258426},
        {"snr_shift_scale": 3.0},
    ),
}
