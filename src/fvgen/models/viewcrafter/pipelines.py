"""ViewCrafter's pipelines: renders in, video out, by the multi-step guided teacher or the few-step student.

Both hold the same components and differ only in how they sample, so a student folder is the teacher's folder with
another UNet. Frames are [B, F, 3, H, W] in [0, 1]; latents are [B, 4, F, h, w], scaled, float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModel, CLIPVisionModelWithProjection

from fvgen.diffusion.samplers import Generators, normal
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.errors import UserError
from fvgen.models.condition import Condition
from fvgen.models.family import LatentGrid
from fvgen.models.viewcrafter.conditioning import Conditioning
from fvgen.models.viewcrafter.encoders import FixedPrompts, clip_pixels, encode_tokens, token_ids
from fvgen.models.viewcrafter.family import FAMILY
from fvgen.models.viewcrafter.projector import ImageProjector
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.base import NovelViewPipeline, unusual_settings
from fvgen.pipelines.hub import fetch_decoder
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline

PIXELS_AT_ONCE = 2**19  # frames go through the VAE in groups of about so many pixels: one by one at 576x1024
# Settings that change latents or tokens and show in no weight, as all published models have them.
USUAL = {
    "vae": {
        **{"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None},
        **{"act_fn": "silu", "norm_num_groups": 32},
    },
    "image_encoder": {"num_attention_heads": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "image_projector": {"heads": 12, "dim_head": 64},
}


class _ViewCrafterParts(NovelViewPipeline):
    """What teacher and student share: encoders, decoder, schedule.

    Args:
        vae: pixels to latents and back.
        unet: predicts the velocity.
        image_encoder, image_projector: the first frame's photograph to context tokens.
        prompts: the encoded text prompt and the encoded empty text.
        text_encoder, tokenizer: for other prompts; not needed otherwise.
        fast_decoder: decodes in place of the VAE, see `enable_fast_decoder`.
        base_scale: last value of ViewCrafter's dynamic rescale of latents (0.7 for 320x512, 0.3 for 576x1024), None for
            none.
        image_resize: how photographs become CLIP's input, see `fvgen.models.viewcrafter.encoders.clip_pixels`.
        zero_snr, prediction: see `fvgen.diffusion.schedule.NoiseSchedule.lvdm`.
        conditioning: fields of `fvgen.models.viewcrafter.conditioning.Conditioning`; ViewCrafter's own by default.
    """

    family = FAMILY
    network_part = "unet"
    settings = ("base_scale", "image_resize", "zero_snr", "prediction", "conditioning")
    model_cpu_offload_seq = "text_encoder->image_encoder->image_projector->unet->vae->fast_decoder"
    _exclude_from_cpu_offload: ClassVar = ["prompts"]
    _optional_components: ClassVar = ["prompts", "text_encoder", "tokenizer", "fast_decoder"]

    def _keep(self, parts: Mapping[str, Any]) -> None:
        """``parts``: components and settings by name, as a class's own `__init__` was given them."""
        self.register_modules(**{name: part for name, part in parts.items() if name in PARTS})
        settings = {name: value for name, value in parts.items() if name not in PARTS}
        self.register_to_config(**settings | {"conditioning": asdict(Conditioning.of(settings["conditioning"]))})

    @property
    def schedule(self) -> NoiseSchedule:
        settings = (self.config.base_scale, self.config.zero_snr, self.config.prediction)
        return NoiseSchedule.lvdm(*settings).to(self._execution_device)

    @property
    def holds_renders(self) -> bool:
        return self.conditioning.holds_renders

    @property
    def conditioning(self) -> Conditioning:
        """How the model is told what to show."""
        return Conditioning.of(self.config.conditioning)

    @torch.no_grad()
    def encode_frames(self, frames: Tensor, generator: Generators | None = None, noise: Tensor | None = None) -> Tensor:
        """Frames [B, F, C, H, W] in [0, 1] to a posterior sample of scaled latents [B, 4, F, h, w].

        The sample is the mean plus the standard deviation times `noise` [B*F, 4, h, w], drawn if it is not given.
        """
        flat = rearrange(frames, "b f c h w -> (b f) c h w").to(self._execution_device, self.vae.dtype) * 2 - 1
        flat = flat.contiguous(memory_format=torch.channels_last)
        posteriors = [self.vae.encode(part).latent_dist for part in flat.split(_frames_at_once(flat))]
        mean = torch.cat([posterior.mean for posterior in posteriors]).float()
        std = torch.cat([posterior.std for posterior in posteriors]).float()
        noise = normal(mean.shape, generator) if noise is None else noise
        latents = (mean + std * noise.to(mean)) * self.vae.config.scaling_factor
        return rearrange(latents, "(b f) c h w -> b c f h w", b=frames.shape[0]).contiguous()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, F, h, w] to frames [B, F, C, H, W] in [0, 1], clamped, float32."""
        decoder = self.decoder
        # A decoder on a GPU stays there; one that waits on the CPU is fetched by its hook or is to work there.
        device = decoder.device if decoder.device.type == "cuda" else self._execution_device
        flat = rearrange(latents, "b c f h w -> (b f) c h w").to(device, decoder.dtype)
        flat = flat / decoder.config.scaling_factor
        flat = flat.contiguous(memory_format=torch.channels_last)
        pixels = flat.shape[2] * flat.shape[3] * self._vae_factor**2
        parts = [decoder.decode(part).sample for part in flat.split(_at_once(pixels))]
        frames = torch.cat(parts).float().clamp(-1, 1) / 2 + 0.5
        return rearrange(frames, "(b f) c h w -> b f c h w", b=latents.shape[0])

    def enable_fast_decoder(self, decoder: str | Path | AutoencoderTiny) -> None:
        """Decode with an `AutoencoderTiny`: tens of times as fast, a little less sharp.

        Args:
            decoder: the model, its folder, or a name: "taesd" has been trained for exactly ViewCrafter's latents. A
                name is looked for in the Hub's cache; it is fetched if FVGEN_DOWNLOAD=1 allows that.

        Raises:
            UserError: no such folder, a download that is not allowed, or a decoder for other latents.
        """
        decoder = decoder if isinstance(decoder, AutoencoderTiny) else fetch_decoder(decoder)
        if decoder.config.out_channels != self.vae.config.out_channels:
            raise UserError(
                f"the fast decoder gives {decoder.config.out_channels} channels, the model's frames have "
                f"{self.vae.config.out_channels}; give one that was trained for this VAE"
            )
        ours, its = self.vae.config.latent_channels, decoder.config.latent_channels
        factor = 2 ** (len(decoder.config.num_decoder_blocks) - 1)
        if (its, factor) != (ours, self._vae_factor):
            raise UserError(
                f"the fast decoder takes {its} channels and enlarges {factor} times, the model's latents need {ours} "
                f"and {self._vae_factor}; give one that was trained for this VAE"
            )
        self.register_modules(fast_decoder=decoder.to(self.vae.device, self.vae.dtype).eval())

    def disable_fast_decoder(self) -> None:
        """Decode with the VAE again."""
        self.register_modules(fast_decoder=None)

    def enable_vae_slicing(self) -> None:
        """One frame at a time through the VAE, at any size (large frames go one by one in any case)."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Frames in overlapping tiles through the VAE: less memory, and faint differences where tiles meet."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def image_tokens(self, photograph: Tensor) -> Tensor:
        """Photographs [B, 3, H, W] in [-1, 1] to context tokens [B, 16 F, D]; zeros (grey) are the null image."""
        pixels = clip_pixels(photograph, self.image_encoder.config.image_size, self.config.image_resize)
        return self.image_projector(self.image_encoder(pixels.to(self.image_encoder.dtype)).last_hidden_state)

    @torch.no_grad()
    def text_tokens(self, prompt: str | Sequence[str] | None = None) -> Tensor:
        """[1 or B, M, D] text tokens: of the model's fixed prompt, or of a text (or one per clip).

        Raises UserError for a text where text encoder or tokenizer are missing, and for none where `prompts` are.
        """
        if prompt is None and self.prompts is not None:
            return self.prompts.positive
        if prompt == "" and self.prompts is not None:
            return self.prompts.negative
        if prompt is None or self.text_encoder is None or self.tokenizer is None:
            missing = [name for name in ("text_encoder", "tokenizer") if getattr(self, name) is None]
            wrong = "the model has no encoded prompt" if prompt is None else f"prompt {prompt!r} cannot be encoded"
            cure = f"load the model with {' and '.join(missing)}" if missing else "give a prompt"
            raise UserError(f"{wrong}; {cure}")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        return encode_tokens(self.text_encoder, token_ids(self.tokenizer, texts, self.unet.config.text_tokens))

    @torch.no_grad()
    def condition(
        self,
        render: Tensor,
        generator: Generators | None = None,
        prompt: str | Sequence[str] | None = None,
        fps: int | None = None,
        reference: Tensor | None = None,
    ) -> Condition:
        """All that the UNet sees of renders [B, F, C, H, W] in [0, 1], as `conditioning` says.

        ``text_tokens`` [1 or B, M, D], ``image_tokens`` [B, N, D], ``render_latents`` [B, 4, F, h, w], ``fps`` [B].
        `reference`: a photograph [3, H, W] or [B, 3, H, W] in [0, 1], for a model that looks at one beside the clip.
        """
        rules, render, batch = self.conditioning, render.to(self._execution_device), render.shape[0]
        image, text = self.image_tokens(rules.photograph(render, reference) * 2 - 1), None
        if rules.has_text:
            text = self.text_tokens(prompt).to(image)
            if len(text) not in (1, batch):
                raise UserError(f"{len(text)} prompts do not fit {batch} clips; give one, or one per clip")
        elif prompt is not None:
            raise UserError(f"prompt {prompt!r} cannot take effect: this model sees no text; leave it out")
        rates = None if fps is None else torch.full((batch,), fps, device=render.device)
        latents = rules.spread(self.encode_frames(rules.frames_to_encode(render), generator), render.shape[1])
        return Condition(render_latents=latents, text_tokens=text, image_tokens=image, fps=rates)

    @torch.no_grad()
    def nulls(self, negative_prompt: str | None = None) -> tuple[Mapping[str, Tensor], ...]:
        """The empty prompt (if texts are seen) and the tokens of a grey image; the empty prompt alone. Render latents
        stay as they are."""
        size = self.image_encoder.config.image_size
        image = self.image_tokens(torch.zeros(1, 3, size, size, device=self._execution_device))
        if not self.conditioning.has_text:
            return ({"image_tokens": image},)
        text = self.text_tokens(negative_prompt or "").to(image)
        return {"text_tokens": text, "image_tokens": image}, {"text_tokens": text}

    def encoding_parts(self) -> Iterator[tuple[str, Any]]:
        yield "image_resize", self.config.image_resize
        if self.conditioning != Conditioning():  # clips that were encoded before there was a choice keep their digest
            yield "conditioning", self.conditioning
        if unusual := unusual_settings(self.components, USUAL):  # ... and so do those of the published models
            yield "settings", unusual
        for name in ("vae", "image_encoder", "image_projector", "prompts"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    @property
    def network(self) -> ViewCrafterUNet:
        return self.unet

    @property
    def decoder(self) -> nn.Module:
        return self.vae if self.fast_decoder is None else self.fast_decoder

    @property
    def frames(self) -> int:
        return self.unet.config.temporal_length

    @property
    def frame_size(self) -> tuple[int, int]:
        """Published models were trained at 320x512 or more, the tiny one at 48x64."""
        return (320, 512) if self.half_pixel_shift else (48, 64)

    @property
    def half_pixel_shift(self) -> bool:
        return self.config.image_resize == "viewcrafter"

    def check_render(self, render: Tensor) -> None:
        self.conditioning.check(render)

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        return tuple(condition["render_latents"].shape)

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raises UserError for frames that VAE and UNet cannot halve as often as they need to."""
        factor = self.size_multiple
        if height % factor or width % factor:
            raise UserError(f"frames of {height}x{width} do not fit this model; use multiples of {factor}")

    @property
    def latent_grid(self) -> LatentGrid:
        return LatentGrid(self.vae.config.latent_channels, 1, self._vae_factor)

    @property
    def size_multiple(self) -> int:
        """Frame height and width must be multiples of this."""
        return self._vae_factor * 2 ** (len(self.unet.config.channel_mult) - 1)

    @property
    def _vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


PARTS = (
    *("vae", "unet", "image_encoder", "image_projector", "prompts", "text_encoder", "tokenizer", "fast_decoder"),
    "policy",
)


class ViewCrafterPipeline(_ViewCrafterParts, TeacherPipeline):
    """The teacher: DDIM with classifier-free guidance, two network evaluations a step.

    Args:
        steps, guidance, guidance_rescale: what a call uses where it is not told otherwise.
        spacing: of the timesteps, "trailing" or "uniform".
        keep_last_scale: see `fvgen.diffusion.samplers.ddim`; DynamiCrafter's and GenFusion's samplers do.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: ViewCrafterUNet,
        image_encoder: CLIPVisionModel | CLIPVisionModelWithProjection,
        image_projector: ImageProjector,
        prompts: FixedPrompts | None = None,
        text_encoder: CLIPTextModelWithProjection | None = None,
        tokenizer: CLIPTokenizer | None = None,
        fast_decoder: AutoencoderTiny | None = None,
        base_scale: float | None = 0.7,
        image_resize: str = "viewcrafter",
        zero_snr: bool = True,
        prediction: str = "v",
        conditioning: Mapping[str, Any] | None = None,
        steps: int = 50,
        guidance: float = 7.5,
        guidance_rescale: float = 0.7,
        spacing: str = "trailing",
        keep_last_scale: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._keep(given)


class FVGenPipeline(_ViewCrafterParts, StudentPipeline):
    """The student: a few steps of x0-prediction and re-noising, no guidance, one network evaluation a step.

    Args:
        steps: what a call uses where it is not told otherwise; 1, 2, 4 and 8 are usual.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: ViewCrafterUNet,
        image_encoder: CLIPVisionModel | CLIPVisionModelWithProjection,
        image_projector: ImageProjector,
        prompts: FixedPrompts | None = None,
        text_encoder: CLIPTextModelWithProjection | None = None,
        tokenizer: CLIPTokenizer | None = None,
        fast_decoder: AutoencoderTiny | None = None,
        base_scale: float | None = 0.7,
        image_resize: str = "viewcrafter",
        zero_snr: bool = True,
        prediction: str = "v",
        conditioning: Mapping[str, Any] | None = None,
        steps: int = 4,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._keep(given)


def _at_once(pixels: int) -> int:
    """How many frames of so many pixels go through the VAE together."""
    return max(1, PIXELS_AT_ONCE // pixels)


def _frames_at_once(frames: Tensor) -> int:
    return _at_once(frames.shape[2] * frames.shape[3])
