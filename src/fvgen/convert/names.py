"""The published weights in our modules and back: the one place where their parameter names are known.

ViewCrafter, DynamiCrafter and GenFusion name everything alike but for GenFusion's VAE. Theirs are the names in the
public checkpoints, each network without its prefix (`fvgen.convert.components`). Ours are those of
`ViewCrafterUNet`, `ImageProjector`, diffusers' `AutoencoderKL` and transformers' `CLIPTextModelWithProjection` and
`CLIPVisionModelWithProjection`. A name is a path of dot-separated segments; each rule replaces a run of whole segments.

What no network of ours holds: the schedule's buffers, CLIP's logit scale, and the text half of the checkpoint's second
CLIP (`embedder.model.` without `visual.`), of which only the image half is ever run. See `fvgen.convert.command`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]
State = dict[str, Tensor]

# (theirs, ours), applied in this order; from ours to theirs, the other way round.
UNET_RULES: Rules = (
    ("framestride_embed.0", "fps_embedding.linear_1"),  # DynamiCrafter's 256-pixel model has the older name;
    ("framestride_embed.2", "fps_embedding.linear_2"),  # on the way back the rules below come first
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

VAE_RULES: Rules = (
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
    ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
    ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
    ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
    ("norm_out", "conv_norm_out"),
    ("nin_shortcut", "conv_shortcut"),
)

CLIP_LAYER_RULES: Rules = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn", "self_attn"),
)

TEXT_RULES: Rules = (
    ("transformer.resblocks", "text_model.encoder.layers"),
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
    ("text_projection", "text_projection.weight"),
    *CLIP_LAYER_RULES,
)

IMAGE_RULES: Rules = (
    ("visual.transformer.resblocks", "vision_model.encoder.layers"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1", "vision_model.embeddings.patch_embedding"),
    ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.ln_post", "vision_model.post_layernorm"),
    ("visual.proj", "visual_projection.weight"),
    *CLIP_LAYER_RULES,
)

NOTHING = re.compile(r"(?!)")
QKV = ("q_proj", "k_proj", "v_proj")
FUSED = re.compile(r"(.*\.attn)\.in_proj_(weight|bias)")
SPLIT = re.compile(rf"(.*\.attn)\.({'|'.join(QKV)})\.(weight|bias)")


@dataclass(frozen=True)
class KeyMap:
    """How names and shapes of one network's weights differ between their modules and ours.

    Args:
        rules: names.
        flattened: our weights that lack `axes` last axes of size 1 (convolutions that became linear layers, or 3-D
            ones that became 2-D).
        transposed: our weights that are theirs transposed.
        fused_qkv: their attention layers hold queries, keys and values in one matrix, ours in three.
        unused: their weights that no network of ours holds.
    """

    rules: Rules
    flattened: re.Pattern = NOTHING
    axes: int = 1
    transposed: re.Pattern = NOTHING
    fused_qkv: bool = False
    unused: re.Pattern = NOTHING

    def to_ours(self, state: Mapping[str, Tensor]) -> State:
        """The state dict in our names and shapes, from theirs; views of the same memory but for transposed weights."""
        used = {key: value for key, value in state.items() if not self.unused.fullmatch(key)}
        split = _split_qkv(used) if self.fused_qkv else used
        renamed = {rename(key, self.rules): value for key, value in split.items()}
        return self._reshape(renamed, lambda x: x.reshape(x.shape[: x.ndim - self.axes]))

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """The state dict in their names and shapes, from ours; without what is `unused`."""
        shaped = self._reshape(state, lambda x: x.reshape(*x.shape, *[1] * self.axes))
        renamed = {rename(key, inverse(self.rules)): value for key, value in shaped.items()}
        return _join_qkv(renamed) if self.fused_qkv else renamed

    def _reshape(self, state: Mapping[str, Tensor], flatten: Callable[[Tensor], Tensor]) -> State:
        """Both ways: transposing undoes itself, and `flatten` is given for the direction."""

        def shaped(key: str, value: Tensor) -> Tensor:
            if self.flattened.fullmatch(key):
                return flatten(value)
            return value.T.contiguous() if self.transposed.fullmatch(key) else value

        return {key: shaped(key, value) for key, value in state.items()}


# Component: its names. The VAE's depend on its size: see `vae_key_map`.
KEY_MAPS = {
    "unet": KeyMap(UNET_RULES, re.compile(r"init_attn\.proj_(in|out)\.weight|.*\.temporal\.stages\.\d\.conv\.weight")),
    "image_projector": KeyMap(PROJECTOR_RULES),
    "image_encoder": KeyMap(
        IMAGE_RULES,
        transposed=re.compile(r"visual_projection\.weight"),
        fused_qkv=True,
        unused=re.compile(r"(?!visual\.).*"),
    ),
    "text_encoder": KeyMap(
        TEXT_RULES,
        transposed=re.compile(r"text_projection\.weight"),
        fused_qkv=True,
        unused=re.compile("logit_scale"),
    ),
}
DIFFUSERS_VAE = KeyMap(())  # GenFusion's is diffusers' own, saved as it is


def vae_key_map(levels: int) -> KeyMap:
    """For a VAE of so many resolutions: they count the decoder's from the finest, diffusers from the coarsest."""
    rules = list(VAE_RULES)
    for i in range(levels):
        rules += [(f"down.{i}.block", f"down_blocks.{i}.resnets")]
        rules += [(f"down.{i}.downsample", f"down_blocks.{i}.downsamplers.0")]
        rules += [(f"up.{i}.block", f"up_blocks.{levels - 1 - i}.resnets")]
        rules += [(f"up.{i}.upsample", f"up_blocks.{levels - 1 - i}.upsamplers.0")]
    return KeyMap(tuple(rules), re.compile(r".*\.attentions\.0\.to_(q|k|v|out\.0)\.weight"), axes=2)


def rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply (old, new) rules to one parameter name, each where `old` is a run of whole segments."""
    for old, new in rules:
        key = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, key)
    return key


def inverse(rules: Rules) -> Rules:
    """The rules that undo `rules`."""
    return tuple((new, old) for old, new in reversed(rules))


def _split_qkv(state: Mapping[str, Tensor]) -> State:
    """Their `attn.in_proj_weight` [3 D, D] as `attn.q_proj.weight` and so on; other entries as they are."""
    split: State = {}
    for key, value in state.items():
        if found := FUSED.fullmatch(key):
            parts = value.chunk(3)
            split |= {f"{found[1]}.{name}.{found[2]}": part for name, part in zip(QKV, parts, strict=True)}
        else:
            split[key] = value
    return split


def _join_qkv(state: Mapping[str, Tensor]) -> State:
    """Undoes `_split_qkv`."""
    joined: State = {}
    for key, value in state.items():
        if not (found := SPLIT.fullmatch(key)):
            joined[key] = value
        elif found[2] == QKV[0]:
            parts = [state[f"{found[1]}.{name}.{found[3]}"] for name in QKV]
            joined[f"{found[1]}.in_proj_{found[3]}"] = torch.cat(parts)
    return joined
