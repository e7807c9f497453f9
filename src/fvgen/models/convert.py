"""ViewCrafter's weights in our modules and back: the one place where their parameter names are known.

Theirs are the names in the public checkpoints: the state dict of the UNet without its `model.diffusion_model.` prefix
and that of `image_proj_model`. A name is a path of dot-separated segments; each rule replaces a run of whole segments.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

Rules = tuple[tuple[str, str], ...]

# (theirs, ours), applied in this order; from ours to theirs, the other way round.
UNET_RULES: Rules = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("fps_embedding.0", "fps_embedding.linear_1"),
    ("fps_embedding.2", "fps_embedding.linear_2"),
    ("init_attn.0", "init_attn"),
    ("out.0", "norm_out"),
    ("out.2", "conv_out"),
    ("op", "down"),
    ("norm1", "norm_attn1"),
    ("norm2", "norm_attn2"),
    ("norm3", "norm_ff"),
    ("transformer_blocks.0", "layer"),
    ("to_out.0", "to_out"),
    ("to_k_ip", "to_k_image"),
    ("to_v_ip", "to_v_image"),
    ("alpha", "image_gate"),
    ("temopral_conv.conv1.0", "temporal.stages.0.norm"),
    ("temopral_conv.conv1.2", "temporal.stages.0.conv"),
    ("temopral_conv.conv2.0", "temporal.stages.1.norm"),
    ("temopral_conv.conv2.3", "temporal.stages.1.conv"),
    ("temopral_conv.conv3.0", "temporal.stages.2.norm"),
    ("temopral_conv.conv3.3", "temporal.stages.2.conv"),
    ("temopral_conv.conv4.0", "temporal.stages.3.norm"),
    ("temopral_conv.conv4.3", "temporal.stages.3.conv"),
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "embedding_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "skip"),
)

PROJECTOR_RULES: Rules = (
    ("norm1", "norm_tokens"),
    ("norm2", "norm_latents"),
)

# Our weights that lack a last axis of size 1: theirs are 1-D convolutions where we have linear layers, and 3-D
# convolutions where we have 2-D ones.
UNET_FLATTENED = re.compile(r"init_attn\.proj_(in|out)\.weight|.*\.temporal\.stages\.\d\.conv\.weight")


def rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply (old, new) rules to one parameter name, each where `old` is a run of whole segments."""
    for old, new in rules:
        key = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, key)
    return key


def inverse(rules: Rules) -> Rules:
    """The rules that undo `rules`."""
    return tuple((new, old) for old, new in reversed(rules))


def unet_from_lvdm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's state dict in our names and shapes, from theirs."""
    renamed = {rename(key, UNET_RULES): value for key, value in state.items()}
    return {key: value.squeeze(-1) if UNET_FLATTENED.fullmatch(key) else value for key, value in renamed.items()}


def unet_to_lvdm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's state dict in their names and shapes, from ours."""
    shaped = {key: value.unsqueeze(-1) if UNET_FLATTENED.fullmatch(key) else value for key, value in state.items()}
    return {rename(key, inverse(UNET_RULES)): value for key, value in shaped.items()}


def unet_config_from_lvdm(params: Mapping) -> dict:
    """Arguments of `ViewCrafterUNet` from the `unet_config.params` of a ViewCrafter configuration file.

    Only what varies is taken over; the architecture's fixed switches are not ours to set.
    """
    same = (
        "in_channels",
        "out_channels",
        "model_channels",
        "num_res_blocks",
        "num_head_channels",
        "context_dim",
        "dropout",
        "temporal_length",
        "image_cross_attention_scale_learnable",
    )
    config = {name: params[name] for name in same if name in params}
    config |= {name: tuple(params[name]) for name in ("channel_mult", "attention_resolutions") if name in params}
    return config | ({"default_fps": params["default_fs"]} if "default_fs" in params else {})


def projector_from_lvdm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image projector's state dict in our names, from theirs."""
    return {rename(key, PROJECTOR_RULES): value for key, value in state.items()}


def projector_to_lvdm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image projector's state dict in their names, from ours."""
    return {rename(key, inverse(PROJECTOR_RULES)): value for key, value in state.items()}
