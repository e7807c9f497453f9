"""ViewCrafter's video UNet, at any size, with named feature taps.

Stages, in order: `input.0`, `init_attn`, `input.1` ..., `middle`, `output.0` .... Each can be tapped by its name.
With the published sizes (res block R, spatial transformer S, temporal transformer T, down D, up U):

    input   0 conv | 1,2 RST at 320 | 3 D | 4,5 RST at 640 | 6 D | 7,8 RST at 1280 | 9 D | 10,11 R at 1280
    middle  RSTR
    output  0,1 R | 2 RU | 3,4 RST | 5 RSTU | 6,7 RST | 8 RSTU | 9,10,11 RST

`init_attn` is a temporal transformer of its own width between `input.0` and the first skip connection.
Input and output follow the convention of the library: latents [B, C, F, H, W], timesteps 0..999, velocity out.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from fvgen.errors import UserError
from fvgen.models.viewcrafter.blocks import (
    RESNET_EPS,
    Conditions,
    Downsample,
    InputConv,
    ResBlock,
    SpatialTransformer,
    Stage,
    TemporalTransformer,
    Upsample,
    clip_to_frames,
    frames_to_clip,
    zero_init,
)

IMAGE_TOKENS_PER_FRAME = 16


@dataclass
class UNetOutput(BaseOutput):
    """`sample`: [B, C_out, F, H, W], None if the pass stopped at a tap. `features`: tap name -> [B, C, F, h, w]."""

    sample: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)


class ViewCrafterUNet(ModelMixin, ConfigMixin):
    """Predicts the velocity of noisy latents from renders' latents, text and image tokens.

    Args:
        in_channels: channels of the noisy latents followed by those of the condition latents.
        out_channels: channels of the prediction.
        model_channels: width of the first level; level i has model_channels * channel_mult[i].
        channel_mult: one factor per level, each level has half the resolution of the previous one; the first must be 1.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: down-sampling factors at which transformers follow the residual blocks; the middle
            always has them.
        num_head_channels: width of an attention head.
        context_dim: width of text and image tokens.
        dropout: rate inside residual and temporal convolution blocks.
        text_tokens: this many leading tokens of the context are text, the others come from the image.
        default_fps: frame rate assumed where none is given.
        temporal_length: number of frames the weights were trained with; recorded only, any number runs.
        norm_num_groups: groups of every group norm.
        init_attn_heads: heads of the first temporal transformer, which runs at full resolution with the inner width
            init_attn_heads * num_head_channels; 8 in the published weights, fewer make small models much cheaper.
        image_cross_attention_scale_learnable: give every cross-attention a learned gate for its image branch.

    Raises:
        UserError: widths that the group norms or the heads cannot divide.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        model_channels: int = 320,
        channel_mult: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (4, 2, 1),
        num_head_channels: int = 64,
        context_dim: int = 1024,
        dropout: float = 0.1,
        text_tokens: int = 77,
        default_fps: int = 10,
        temporal_length: int = 16,
        norm_num_groups: int = 32,
        init_attn_heads: int = 8,
        image_cross_attention_scale_learnable: bool = False,
    ):
        super().__init__()
        _check_widths(model_channels, channel_mult, num_head_channels, norm_num_groups)
        groups, embedding_dim = norm_num_groups, 4 * model_channels
        self.gradient_checkpointing = False

        def res_block(width_in: int, width_out: int) -> ResBlock:
            return ResBlock(width_in, width_out, embedding_dim, groups, dropout)

        def transformers(width: int) -> list[nn.Module]:
            spatial = SpatialTransformer(
                width, num_head_channels, groups, context_dim, image_cross_attention_scale_learnable
            )
            return [spatial, TemporalTransformer(width, width // num_head_channels, num_head_channels, groups)]

        def level(width_in: int, width_out: int, factor: int) -> list[nn.Module]:
            attention = transformers(width_out) if factor in attention_resolutions else []
            return [res_block(width_in, width_out), *attention]

        self.time_embedding = TimestepEmbedding(model_channels, embedding_dim)
        self.fps_embedding = TimestepEmbedding(model_channels, embedding_dim)
        self.init_attn = TemporalTransformer(model_channels, init_attn_heads, num_head_channels, groups)

        last_level = len(channel_mult) - 1
        width, skips = model_channels, [model_channels]
        self.input_blocks = nn.ModuleList([Stage([InputConv(in_channels, model_channels, 3, padding=1)])])
        for i, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage(level(width, mult * model_channels, 2**i)))
                width = mult * model_channels
                skips.append(width)
            if i < last_level:
                self.input_blocks.append(Stage([Downsample(width)]))
                skips.append(width)

        self.middle_block = Stage([res_block(width, width), *transformers(width), res_block(width, width)])

        self.output_blocks = nn.ModuleList()
        for i, mult in reversed(list(enumerate(channel_mult))):
            for j in range(num_res_blocks + 1):
                layers = level(width + skips.pop(), mult * model_channels, 2**i)
                width = mult * model_channels
                if i > 0 and j == num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Stage(layers))

        self.norm_out = nn.GroupNorm(groups, model_channels, eps=RESNET_EPS)
        self.conv_out = zero_init(nn.Conv2d(model_channels, out_channels, 3, padding=1))

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names of all stages in the order in which they run."""
        inputs = [f"input.{i}" for i in range(1, len(self.input_blocks))]
        outputs = [f"output.{i}" for i in range(len(self.output_blocks))]
        return ("input.0", "init_attn", *inputs, "middle", *outputs)

    @property
    def tap_widths(self) -> dict[str, int]:
        """Channels of the features at each tap, in the same order."""
        base, widths = self.config.model_channels, {}
        level = [mult * base for mult in self.config.channel_mult]
        last = len(level) - 1
        for name in self.tap_names:
            part, _, index = name.partition(".")
            if part == "input":
                # a level has its residual blocks and, but for the last, a down-sampling: level 0 starts behind input.0
                depth = max(0, int(index) - 1) // (self.config.num_res_blocks + 1)
                widths[name] = level[min(depth, last)] if index != "0" else base
            elif part == "output":
                widths[name] = level[last - int(index) // (self.config.num_res_blocks + 1)]
            else:
                widths[name] = base if part == "init_attn" else level[-1]
        return widths

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,
        fps: Tensor | None = None,
        taps: tuple[str, ...] = (),
        only_taps: bool = False,
        return_dict: bool = True,
        cut: bool = False,
    ) -> UNetOutput | tuple:
        """Predict the velocity, record features, or both.

        Args:
            sample: [B, in_channels, F, H, W] noisy latents, then condition latents; H and W divisible by the
                down-sampling factor 2 ** (levels - 1).
            timestep: [B] or a single value, 0..999.
            encoder_hidden_states: [B, M, D] text tokens, then image tokens. Exactly `text_tokens` + 16 F of them
                means 16 image tokens per frame, seen by that frame only; with any other number all frames see all.
            fps: [B] frame rates; `default_fps` if not given.
            taps: names of stages whose features are recorded (see `tap_names`).
            only_taps: stop after the last tap, nothing behind it is computed and `sample` is None.
            cut: end the graph at the last tap: what lies behind it runs without one, `sample` carries no gradient.
            return_dict: False gives the tuple (sample,), or (sample, features) with taps.

        Raises:
            UserError: unknown tap, or a latent size that cannot be halved often enough.
        """
        self._check_call(sample, taps, only_taps)
        conditions = self._conditions(sample, timestep, encoder_hidden_states, fps)
        features: dict[str, Tensor] = {}
        x, skips = clip_to_frames(sample), []
        with_graph = torch.is_grad_enabled()
        for name in self.tap_names:
            with torch.set_grad_enabled(with_graph):
                x = self._run_stage(name, x, skips, conditions)
            if name in taps:
                features[name] = frames_to_clip(x, conditions.frames)
                if len(features) == len(set(taps)):
                    if only_taps:
                        return UNetOutput(None, features) if return_dict else (None, features)
                    with_graph = with_graph and not cut
        with torch.set_grad_enabled(with_graph):
            x = self.conv_out(F.silu(self.norm_out(x)))
        velocity = frames_to_clip(x, conditions.frames)
        if return_dict:
            return UNetOutput(velocity, features)
        return (velocity, features) if taps else (velocity,)

    def features(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,
        fps: Tensor | None = None,
        tap: str = "middle",
    ) -> Tensor:
        """Features [B, C, F, h, w] of one stage; the network is not run beyond it. Arguments as for `forward`."""
        return self(sample, timestep, encoder_hidden_states, fps, taps=(tap,), only_taps=True).features[tap]

    def _run_stage(self, name: str, x: Tensor, skips: list[Tensor], conditions: Conditions) -> Tensor:
        """Run one stage on [B*F, C, H, W], adding to `skips` on the way down and taking from it on the way up."""
        part, _, index = name.partition(".")
        if part == "output":
            return self._run(self.output_blocks[int(index)], torch.cat([x, skips.pop()], dim=1), conditions)
        if part == "middle":
            return self._run(self.middle_block, x, conditions)
        x = self._run(self.init_attn if part == "init_attn" else self.input_blocks[int(index)], x, conditions)
        if name != "input.0":  # the first skip connection starts behind init_attn
            skips.append(x)
        return x

    def _run(self, block: nn.Module, x: Tensor, conditions: Conditions) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, conditions)
        return block(x, conditions)

    def _conditions(self, sample: Tensor, timestep: Tensor | int, context: Tensor, fps: Tensor | None) -> Conditions:
        batch, frames = sample.shape[0], sample.shape[2]
        fps = self.config.default_fps if fps is None else fps
        embedding = self.time_embedding(self._sinusoid(timestep, sample))
        embedding = embedding + self.fps_embedding(self._sinusoid(fps, sample))
        text, image = context.tensor_split([self.config.text_tokens], dim=1)
        if image.shape[1] == IMAGE_TOKENS_PER_FRAME * frames:
            image = image.reshape(batch * frames, IMAGE_TOKENS_PER_FRAME, -1)
        return Conditions(embedding, text, image, frames)

    def _sinusoid(self, value: Tensor | int, sample: Tensor) -> Tensor:
        """[B] or one number -> [B, model_channels]: cosines first, then sines, in the type of `sample`."""
        batch = sample.shape[0]
        if isinstance(value, Tensor):
            values = value.to(sample.device).expand(batch)
        else:  # filled there: the copy of a number would wait for the GPU at every step
            values = torch.full((batch,), value, device=sample.device)
        width = self.config.model_channels
        return get_timestep_embedding(values, width, flip_sin_to_cos=True, downscale_freq_shift=0).to(sample.dtype)

    def _check_call(self, sample: Tensor, taps: tuple[str, ...], only_taps: bool) -> None:
        assert sample.ndim == 5 and sample.shape[1] == self.config.in_channels, f"sample of shape {sample.shape}"
        assert taps or not only_taps, "only_taps needs at least one tap"
        factor = 2 ** (len(self.config.channel_mult) - 1)
        if sample.shape[3] % factor or sample.shape[4] % factor:
            size = f"{sample.shape[3]}x{sample.shape[4]}"
            raise UserError(f"Latents of {size} cannot go through this UNet: use sides divisible by {factor}.")
        unknown = [name for name in taps if name not in self.tap_names]
        if unknown:
            raise UserError(f"The UNet has no stage {unknown[0]!r} to tap: choose one of {', '.join(self.tap_names)}.")


def _check_widths(model_channels: int, channel_mult: tuple[int, ...], head_channels: int, groups: int) -> None:
    if channel_mult[0] != 1:
        raise UserError(f"The UNet's channel_mult {tuple(channel_mult)} is impossible: it must start at 1.")
    if model_channels % groups:
        raise UserError(
            f"The UNet's model_channels {model_channels} is no multiple of norm_num_groups {groups}: change either."
        )
    widths = [mult * model_channels for mult in channel_mult]
    if any(width % head_channels for width in widths):
        raise UserError(f"The UNet's widths {widths} must be multiples of num_head_channels {head_channels}.")
