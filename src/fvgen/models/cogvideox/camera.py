"""CogVideoX's transformer guided by a camera path (Wonderland, Liang et al. 2025, section 3.2 and figure A3).

    o_v = patch_embed(z_t ++ image)                           the base's video tokens [B, N, D], text alongside
    o_l = encoder_l(p),  o_c = encoder_c(p)                   p: Plücker embedding; both end in a linear layer at 0
    LoRA branch:     x_0 = [o_v ; o_l] W^T + b                W starts as [I | default], b as 0; LoRA on q, k, v, out
    control branch:  y_0 = o_v + o_c,  y_i = copy_i(y_i-1)    trainable copies of the first blocks, i = 1 .. N
                     x_i = block_i(x_i-1) + zero_i(y_i)       linear layers that start at 0

At the start the output is the base's, bit for bit. The columns of W that o_l meets keep their random start: were they 0
too, they and the encoder's last layer would wait for one another's gradient for ever. AC3D's variant (Bahmani et al.
2025) is ``branch_width`` > 0, a thin branch of its own small blocks, and ``control_t_min``: it controls the first
denoising steps alone, and below them the network is the base, bit for bit; we let the LoRA branch have that too. The
encoders' layers are ours: the paper says "3D convolutions and an unfolding".

Letters as in `fvgen.models.cogvideox.transformer`; F frames, s pixels to a latent pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    ModelMixin,  # noqa: F401 (diffusers looks for the name where it finds the class of a component)
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from fvgen.errors import UserError, did_you_mean
from fvgen.geometry.plucker import folded, plucker, unpacked
from fvgen.models.cogvideox.transformer import Block, Rotary, block_by_block, through
from fvgen.models.cogvideox.vae import SQUEEZE

BRANCHES = ("lora", "control", "dual")
BASE = frozenset(signature(CogVideoXTransformer3DModel.__init__).parameters) - {"self"}
RAY = 6  # moment and direction


def ray_grid(path: Tensor, height: int, width: int, factor: int) -> Tensor:
    """[B, 4 6 s s, F', h, w]: the Plücker embeddings of all pixels behind a latent pixel, from `packed` paths
    [B, F, 21]: frames folded as the VAE folds them, pixels by ``factor`` s."""
    clips, frames = path.shape[:2]
    embedding = plucker(unpacked(path.flatten(0, 1), height * factor, width * factor))
    return pixel_unshuffle(folded(embedding.unflatten(0, (clips, frames)), SQUEEZE), factor).transpose(1, 2)


def zero(layer: nn.Linear) -> nn.Linear:
    """The same layer, at 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class CameraEncoder(nn.Module):
    """`ray_grid` [B, C, F', h, w] to tokens [B, F' h/p w/p, D], 0 at the start."""

    def __init__(self, channels: int, inside: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.compress = nn.Sequential(
            nn.Conv3d(channels, inside, 1), nn.SiLU(), nn.Conv3d(inside, inside, 3, padding=1), nn.SiLU()
        )
        self.embed = nn.Linear(inside * patch * patch, width)
        self.last = zero(nn.Linear(width, width))

    def forward(self, rays: Tensor) -> Tensor:
        x = pixel_unshuffle(self.compress(rays).transpose(1, 2), self.patch)  # [B, F', C p p, h/p, w/p]
        return self.last(self.embed(x.permute(0, 1, 3, 4, 2).flatten(1, 3)))


class Fusion(nn.Linear):
    """[o_v ; o_l] to tokens: o_v at the start. The half for o_l starts as any linear layer does."""

    def __init__(self, width: int) -> None:
        super().__init__(2 * width, width)
        with torch.no_grad():
            self.weight[:, :width] = torch.eye(width)
        nn.init.zeros_(self.bias)


class LoraLinear(nn.Linear):
    """x -> W x + b + up(down(x)), alpha = rank, up 0 at the start (Hu et al. 2021). W and b keep the names that they
    had in the layer ``like``. ``looking`` [B, 1, 1]: the clips for which up counts; None for all."""

    looking: Tensor | None = None

    def __init__(self, like: nn.Linear, rank: int) -> None:
        super().__init__(like.in_features, like.out_features, like.bias is not None)
        self.camera_down = nn.Linear(like.in_features, rank, bias=False)
        self.camera_up = nn.Linear(rank, like.out_features, bias=False)
        nn.init.zeros_(self.camera_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        learnt = self.camera_up(self.camera_down(x))
        return super().forward(x) + (learnt if self.looking is None else learnt * self.looking)


class Looking:
    """A block with LoRA as a function, for the clips that ``looking`` says. Computed again in a backward pass it still
    knows which: a rollout has other steps between its two passes."""

    def __init__(self, block: nn.Module, looking: Tensor) -> None:
        self.block, self.looking = block, looking

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        for layer in self.block.attn1.modules():  # by kind: an adapter of peft's may have taken a layer's name
            if isinstance(layer, LoraLinear):
                layer.looking = self.looking
        return self.block(*inputs)


class ControlBranch(nn.Module):
    """Blocks beside the first ones of the base: as wide and with its text tokens, or thin (``width`` below ``base``)
    with projections of both."""

    def __init__(self, encoder: CameraEncoder, blocks: list[nn.Module], width: int, base: int) -> None:
        super().__init__()
        self.encoder, self.blocks = encoder, nn.ModuleList(blocks)
        self.video, self.text = (nn.Identity() if width == base else nn.Linear(base, width) for _ in range(2))
        self.outs = nn.ModuleList(zero(nn.Linear(width, base)) for _ in blocks)


class CameraTransformer(CogVideoXTransformer3DModel):
    """The base's arguments, then:

    Args:
        branch: "lora", "control" or "dual", both.
        control_blocks: N, how many of the first blocks have one beside them.
        branch_width: channels of the control branch, a multiple of a head's; 0 for the base's.
        camera_lora_rank: of q, k, v, out in every block, with the LoRA branch; 0 for none.
        encoder_width: channels of the encoders' convolutions.
        control_t_min: the camera is not looked at below this timestep: the network is the base there, LoRA or not.
        space_factor: s.

    Raises UserError for settings that do not fit each other.
    """

    wants_cameras = True

    @property
    def cameras_from(self) -> int:
        """The lowest timestep at which the camera is looked at."""
        return self.config.control_t_min

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int | None = 16,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        time_embed_dim: int = 512,
        ofs_embed_dim: int | None = None,
        text_embed_dim: int = 4096,
        num_layers: int = 30,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_width: int = 90,
        sample_height: int = 60,
        sample_frames: int = 49,
        patch_size: int = 2,
        patch_size_t: int | None = None,
        temporal_compression_ratio: int = 4,
        max_text_seq_length: int = 226,
        activation_fn: str = "gelu-approximate",
        timestep_activation_fn: str = "silu",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        spatial_interpolation_scale: float = 1.875,
        temporal_interpolation_scale: float = 1.0,
        use_rotary_positional_embeddings: bool = False,
        use_learned_positional_embeddings: bool = False,
        patch_bias: bool = True,
        branch: str = "dual",
        control_blocks: int = 21,
        branch_width: int = 0,
        camera_lora_rank: int = 256,
        encoder_width: int = 256,
        control_t_min: int = 0,
        space_factor: int = 8,
    ) -> None:
        super().__init__(**{name: value for name, value in dict(locals()).items() if name in BASE})
        if branch not in BRANCHES:
            raise UserError(f"branch={branch!r} is unknown{did_you_mean(branch, BRANCHES)}")
        base, rays = num_attention_heads * attention_head_dim, SQUEEZE * RAY * space_factor**2
        self.camera_encoder = self.camera_fusion = self.camera_control = None
        if branch != "lora":
            width = branch_width or base
            if control_blocks > num_layers:
                raise UserError(f"control_blocks={control_blocks}: the base has {num_layers} blocks; give no more")
            if width % attention_head_dim:
                raise UserError(f"branch_width={width} is no multiple of a head's {attention_head_dim}; give one")
            like = (attention_head_dim, time_embed_dim, dropout, activation_fn, attention_bias, True)
            affine = (norm_elementwise_affine, norm_eps)
            heads = width // attention_head_dim
            blocks = [CogVideoXBlock(width, heads, *like, *affine) for _ in range(control_blocks)]
            encoder = CameraEncoder(rays, encoder_width, width, patch_size)
            self.camera_control = ControlBranch(encoder, blocks, width, base)
        if branch != "control":
            self.camera_encoder = CameraEncoder(rays, encoder_width, base, patch_size)
            self.camera_fusion = Fusion(base)
            for attention in (block.attn1 for block in self.transformer_blocks) if camera_lora_rank else ():
                for name in ("to_q", "to_k", "to_v"):
                    setattr(attention, name, LoraLinear(getattr(attention, name), camera_lora_rank))
                attention.to_out[0] = LoraLinear(attention.to_out[0], camera_lora_rank)

    @classmethod
    def from_base(
        cls, base: CogVideoXTransformer3DModel, copy_blocks: bool = True, **settings: Any
    ) -> CameraTransformer:
        """Of an image-to-video transformer, whose weights are copied. ``copy_blocks``: those of its first blocks also
        into the control branch, where that is as wide."""
        network = cls(**{name: value for name, value in base.config.items() if name in BASE}, **settings)
        nn.Module.to(network, base.device, base.dtype).train(base.training)  # diffusers' own warns of an empty list
        missing, surplus = network.load_state_dict(base.state_dict(), strict=False)
        assert not surplus and all(network.is_guide(name) for name in missing), (missing, surplus)
        control = network.camera_control
        if copy_blocks and control is not None and not network.config.branch_width:
            for block, original in zip(control.blocks, base.transformer_blocks, strict=False):
                block.load_state_dict(original.state_dict())
        return network

    @staticmethod
    def is_guide(name: str) -> bool:
        """Whether a parameter of this name is beside the base's own."""
        return "camera_" in name

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        image_rotary_emb: Rotary | None = None,
        *,
        camera_path: Tensor | None,
    ) -> Transformer2DModelOutput:
        """The base's, in its layout; ``camera_path`` [B, F, 21] as `fvgen.geometry.plucker.packed` gives it, of paths
        that are `normalised`, in float32. None: the base's."""
        inputs = hidden_states, encoder_hidden_states, timestep, image_rotary_emb
        return Transformer2DModelOutput(sample=block_by_block(self, *inputs, camera_path=camera_path)[0])

    def guided(
        self,
        video: Tensor,
        text: Tensor,
        embedding: Tensor,
        rotary: Rotary | None,
        grid: tuple[int, int, int],
        t: Tensor,
        camera_path: Tensor | None,
    ) -> tuple[Tensor, Iterator[Tensor], Sequence[Block]]:
        """Video tokens [B, N, D] as the first block sees them, what is added to them behind each of the first, and the
        blocks."""
        lora = self.camera_fusion is not None and self.config.camera_lora_rank
        if camera_path is None:
            nobody = torch.zeros(1, 1, 1, dtype=torch.bool, device=t.device)
            return video, iter(()), self._looking(nobody) if lora else self.transformer_blocks
        p, looking = self.config.patch_size, (t >= self.config.control_t_min).view(-1, 1, 1)
        with torch.no_grad():
            rays = ray_grid(camera_path, p * grid[1], p * grid[2], self.config.space_factor).to(video.dtype)
        additions: Iterator[Tensor] = iter(())
        if self.camera_control is not None:
            additions = self._additions(video, text, embedding, rotary, rays, looking)
        if self.camera_fusion is not None:
            fused = self.camera_fusion(torch.cat([video, self.camera_encoder(rays)], dim=-1))
            video = torch.where(looking, fused, video)
        return video, additions, self._looking(looking) if lora else self.transformer_blocks

    def _looking(self, looking: Tensor) -> list[Block]:
        return [Looking(block, looking) for block in self.transformer_blocks]

    def _additions(
        self, video: Tensor, text: Tensor, embedding: Tensor, rotary: Rotary | None, rays: Tensor, looking: Tensor
    ) -> Iterator[Tensor]:
        """One at a time, so that not all are kept; the branch carries text tokens of its own."""
        control = self.camera_control
        y, text = control.video(video) + control.encoder(rays), control.text(text)
        for block, out in zip(control.blocks, control.outs, strict=True):
            y, text = through(self, block, y, text, embedding, rotary)
            yield out(y) * looking
