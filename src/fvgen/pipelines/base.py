"""What teacher and student share: components, conditions, encoding and decoding, and the frame of a call.

Frames are [B, F, 3, H, W] in [0, 1]; latents are [B, 4, F, h, w], scaled, float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from einops import rearrange
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModel, CLIPVisionModelWithProjection

from fvgen.diffusion.samplers import Generators, OnStep, SamplerStep, normal
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.errors import UserError
from fvgen.models.denoiser import Condition
from fvgen.models.viewcrafter.conditioning import Conditioning
from fvgen.models.viewcrafter.encoders import FixedPrompts, clip_pixels, encode_tokens, token_ids
from fvgen.models.viewcrafter.projector import ImageProjector
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.frames import (
    VideoOutput,
    answer,
    as_frames,
    check_output_type,
    check_parts,
    check_render,
    with_photographs,
)
from fvgen.pipelines.hub import FolderOnHub, fetch_decoder

PIXELS_AT_ONCE = 2**19  # frames go through the VAE in groups of about so many pixels: one by one at 576x1024

OnStepEnd = Callable[[Any, int, int, dict], dict | None]  # diffusers' callback_on_step_end


class NovelViewPipeline(FolderOnHub, DiffusionPipeline):
    """What teacher and student share: encoders, decoder, schedule. Not called itself.

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

    model_cpu_offload_seq = "text_encoder->image_encoder->image_projector->unet->vae->fast_decoder"
    _exclude_from_cpu_offload: ClassVar = ["prompts"]
    _optional_components: ClassVar = ["prompts", "text_encoder", "tokenizer", "fast_decoder"]
    _callback_tensor_inputs: ClassVar = ["latents", "x0"]

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
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            image_encoder=image_encoder,
            image_projector=image_projector,
            prompts=prompts,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            fast_decoder=fast_decoder,
        )
        self.register_to_config(
            base_scale=base_scale,
            image_resize=image_resize,
            zero_snr=zero_snr,
            prediction=prediction,
            conditioning=asdict(Conditioning.of(conditioning)),
        )

    @property
    def schedule(self) -> NoiseSchedule:
        settings = (self.config.base_scale, self.config.zero_snr, self.config.prediction)
        return NoiseSchedule.lvdm(*settings).to(self._execution_device)

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
        decoder = self.vae if self.fast_decoder is None else self.fast_decoder
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
            wanted = "no prompt was given and the model has no encoded one" if prompt is None else f"prompt {prompt!r}"
            cure = f"load the model with {' and '.join(missing)}" if missing else "give a prompt"
            raise UserError(f"{wanted} cannot be encoded; {cure}")
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

        `reference`: a photograph [3, H, W] or [B, 3, H, W] in [0, 1], for a model that looks at one beside the clip.
        """
        rules, render, batch = self.conditioning, render.to(self._execution_device), render.shape[0]
        image = self.image_tokens(rules.photograph(render, reference) * 2 - 1)
        context = image
        if rules.has_text:
            text = self.text_tokens(prompt)
            if len(text) not in (1, batch):
                raise UserError(f"{len(text)} prompts do not fit {batch} clips; give one, or one per clip")
            context = torch.cat([text.to(image).expand(batch, -1, -1), image], dim=1)
        elif prompt is not None:
            raise UserError(f"prompt {prompt!r} cannot take effect: this model sees no text; leave it out")
        rates = None if fps is None else torch.full((batch,), fps, device=render.device)
        latents = self.encode_frames(rules.frames_to_encode(render), generator)
        return Condition(rules.spread(latents, render.shape[1]), context, rates)

    @torch.no_grad()
    def null_context(self, negative_prompt: str | None = None) -> Tensor:
        """[1, M, D]: the empty prompt (if texts are seen) and the tokens of a grey image, for guidance."""
        size = self.image_encoder.config.image_size
        image = self.image_tokens(torch.zeros(1, 3, size, size, device=self._execution_device))
        if not self.conditioning.has_text:
            return image
        return torch.cat([self.text_tokens(negative_prompt or "").to(image), image], dim=1)

    def encoder_fingerprint(self) -> str:
        """Twelve hex digits that change with any weight or setting that goes into latents or context."""
        digest = hashlib.sha256(self.config.image_resize.encode())
        if self.conditioning != Conditioning():  # clips that were encoded before there was a choice keep their digest
            digest.update(repr(self.conditioning).encode())
        for part in (self.vae, self.image_encoder, self.image_projector, self.prompts):
            for name, tensor in sorted(part.state_dict().items() if part else ()):
                digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def initial_noise(self, condition: Condition, generator: Generators, latents: Tensor | None = None) -> Tensor:
        """x_T, standard normal; a generator of the CPU, with a seed, gives the same clip on every device.

        `latents` are taken instead if they are given; UserError if their shape is not the render latents'.
        """
        shape = condition.render_latents.shape
        if latents is not None and latents.shape != shape:
            raise UserError(f"latents have shape {tuple(latents.shape)}, this render needs {tuple(shape)}")
        return (normal(shape, generator) if latents is None else latents).to(condition.render_latents)

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError for frames that VAE and UNet cannot halve as often as they need to."""
        factor = self.size_multiple
        if height % factor or width % factor:
            raise UserError(f"frames of {height}x{width} do not fit this model; use multiples of {factor}")

    @property
    def size_multiple(self) -> int:
        """Frame height and width must be multiples of this."""
        return self._vae_factor * 2 ** (len(self.unet.config.channel_mult) - 1)

    @property
    def _vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _generate(
        self,
        render: Any,
        photographs: Mapping[int, Any] | None,
        generator: Generators | None,
        prompt: str | Sequence[str] | None,
        fps: int | None,
        steps: int,
        sample: Callable[..., Tensor],
        on_step: OnStep | None,
        callback_on_step_end: OnStepEnd | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        output_type: str | None,
        return_dict: bool | None,
        reference: Tensor | None = None,
    ) -> Tensor | tuple | VideoOutput:
        """The body of both calls: check, encode, ``sample(condition, generator, on_step=...)``, decode, answer."""
        check_output_type(output_type)
        self._check_callback(callback_on_step_end_tensor_inputs)
        check_parts(self.components)
        render = with_photographs(as_frames(render), photographs)
        check_render(render)
        self.conditioning.check(render)
        self.check_size(*render.shape[3:])
        generator = generator or torch.Generator().manual_seed(0)
        condition = self.condition(render, generator, prompt, fps, reference)
        with self.progress_bar(total=steps) as bar:

            def told(step: SamplerStep) -> Tensor | None:
                bar.update()
                changed = None if on_step is None else on_step(step)
                if callback_on_step_end is None:
                    return changed
                tensors = {"latents": step.x if changed is None else changed, "x0": step.x0}
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, step.index, step.timestep, given) or {}
                return returned.get("latents", tensors["latents"])

            latents = sample(condition, generator, on_step=told)
        frames = latents if output_type == "latent" else self.decode_latents(latents)
        self.maybe_free_model_hooks()
        return answer(frames, output_type, return_dict)

    def _check_callback(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise UserError(f"callback_on_step_end_tensor_inputs names {unknown[0]!r}; choose among {known}")


def _at_once(pixels: int) -> int:
    """How many frames of so many pixels go through the VAE together."""
    return max(1, PIXELS_AT_ONCE // pixels)


def _frames_at_once(frames: Tensor) -> int:
    return _at_once(frames.shape[2] * frames.shape[3])
