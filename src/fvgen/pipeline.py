"""Renders in, video out: the multi-step guided teacher and the few-step student as diffusers pipelines.

Both hold the same components and differ only in how they sample, so a student folder is the teacher's folder with
another UNet. Frames are [B, F, 3, H, W] in [0, 1]; latents are [B, 4, F, h, w], scaled.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from einops import rearrange
from torch import Tensor
from transformers import CLIPVisionModel

from fvgen.errors import UserError
from fvgen.models.conditioning import ImageProjector
from fvgen.models.encoders import FixedPrompts, clip_pixels
from fvgen.models.teacher import Condition, Denoiser, Teacher
from fvgen.models.unet import ViewCrafterUNet
from fvgen.samplers import OnStep, ddim, few_step
from fvgen.schedule import NoiseSchedule, trailing_timesteps

RANGE_TOLERANCE = 1e-3  # renders may overshoot [0, 1] by rounding, not by another scale


class NovelViewPipeline(DiffusionPipeline):
    """What teacher and student share: encoders, decoder, schedule. Not called itself.

    Args:
        vae: pixels to latents and back.
        unet: predicts the velocity.
        image_encoder, image_projector: the first frame's photograph to context tokens.
        prompts: the encoded text prompt and the encoded empty text.
        base_scale: last value of ViewCrafter's dynamic rescale of latents (0.7 for 320x512, 0.3 for 576x1024).
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: ViewCrafterUNet,
        image_encoder: CLIPVisionModel,
        image_projector: ImageProjector,
        prompts: FixedPrompts,
        base_scale: float = 0.7,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, unet=unet, image_encoder=image_encoder, image_projector=image_projector, prompts=prompts
        )
        self.register_to_config(base_scale=base_scale)

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.viewcrafter(base_scale=self.config.base_scale).to(self.unet.device)

    @torch.no_grad()
    def encode_frames(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Frames [B, F, 3, H, W] in [0, 1] to a posterior sample of scaled latents [B, 4, F, h, w]."""
        flat = rearrange(frames, "b f c h w -> (b f) c h w").to(self.vae.device, self.vae.dtype) * 2 - 1
        flat = flat.contiguous(memory_format=torch.channels_last)
        latents = self.vae.encode(flat).latent_dist.sample(generator) * self.vae.config.scaling_factor
        return rearrange(latents, "(b f) c h w -> b c f h w", b=frames.shape[0]).contiguous()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, F, h, w] to frames [B, F, 3, H, W] in [0, 1], clamped."""
        flat = rearrange(latents, "b c f h w -> (b f) c h w") / self.vae.config.scaling_factor
        flat = flat.contiguous(memory_format=torch.channels_last)
        frames = self.vae.decode(flat).sample.clamp(-1, 1) / 2 + 0.5
        return rearrange(frames, "(b f) c h w -> b f c h w", b=latents.shape[0])

    def image_tokens(self, photograph: Tensor) -> Tensor:
        """Photographs [B, 3, H, W] in [-1, 1] to context tokens [B, 16 F, D]; zeros (grey) are the null image."""
        pixels = clip_pixels(photograph, self.image_encoder.config.image_size)
        return self.image_projector(self.image_encoder(pixels).last_hidden_state)

    @torch.no_grad()
    def condition(self, render: Tensor, generator: torch.Generator | None = None) -> Condition:
        """All that the UNet sees of renders [B, F, 3, H, W] in [0, 1]; the first frame feeds the image branch."""
        render = render.to(self.unet.device)
        text = self.prompts.positive.expand(render.shape[0], -1, -1)
        context = torch.cat([text, self.image_tokens(render[:, 0] * 2 - 1)], dim=1)
        return Condition(self.encode_frames(render, generator), context)

    @torch.no_grad()
    def null_context(self) -> Tensor:
        """[1, M, D]: the empty prompt and the tokens of a grey image, for classifier-free guidance."""
        size = self.image_encoder.config.image_size
        grey = torch.zeros(1, 3, size, size, device=self.unet.device)
        return torch.cat([self.prompts.negative, self.image_tokens(grey)], dim=1)

    def encoder_fingerprint(self) -> str:
        """Twelve hex digits that change with any weight that goes into latents or context."""
        digest = hashlib.sha256()
        for part in (self.vae, self.image_encoder, self.image_projector, self.prompts):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def initial_noise(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """x_T, standard normal, drawn on the CPU so that a seed gives the same clip on every device."""
        shape = condition.render_latents.shape
        return torch.randn(shape, generator=generator).to(condition.render_latents)

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError for frames that VAE and UNet cannot halve as often as they need to."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1 + len(self.unet.config.channel_mult) - 1)
        if height % factor or width % factor:
            raise UserError(f"frames of {height}x{width} do not fit this model; use multiples of {factor}")

    def _check(self, render: Tensor) -> None:
        if render.ndim != 5 or render.shape[2] != 3:
            raise UserError(f"render has shape {tuple(render.shape)}; give frames as [batch, frames, 3, height, width]")
        self.check_size(*render.shape[3:])
        if not torch.isfinite(render).all():
            raise UserError("the render holds NaN or infinity; check the point cloud and the cameras")
        if render.min() < -RANGE_TOLERANCE or render.max() > 1 + RANGE_TOLERANCE:
            low, high = render.min().item(), render.max().item()
            raise UserError(f"the render's values lie in {low:g}..{high:g}; scale them to 0..1")


class ViewCrafterPipeline(NovelViewPipeline):
    """The teacher: DDIM with classifier-free guidance, two network evaluations a step."""

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: ViewCrafterUNet,
        image_encoder: CLIPVisionModel,
        image_projector: ImageProjector,
        prompts: FixedPrompts,
        base_scale: float = 0.7,
        steps: int = 50,
        guidance: float = 7.5,
        guidance_rescale: float = 0.7,
    ) -> None:
        super().__init__(vae, unet, image_encoder, image_projector, prompts, base_scale)
        self.register_to_config(steps=steps, guidance=guidance, guidance_rescale=guidance_rescale)

    def teacher(self, guidance: float | None = None) -> Teacher:
        """The frozen guided denoiser inside; guidance defaults to the model's own."""
        guidance = self.config.guidance if guidance is None else guidance
        return Teacher(self.unet, self.schedule, self.null_context(), guidance, self.config.guidance_rescale)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        generator: torch.Generator,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents [B, 4, F, h, w] for a condition: ancestral DDIM (eta 1) at trailing timesteps, as published."""
        denoiser = partial(self.teacher(guidance_scale), condition=condition)
        timesteps = trailing_timesteps(self.config.steps if num_inference_steps is None else num_inference_steps)
        noise = self.initial_noise(condition, generator)
        return ddim(denoiser, noise, self.schedule, timesteps, eta=1.0, generator=generator, on_step=on_step)

    @torch.no_grad()
    def __call__(
        self,
        render: Tensor,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Renders [B, F, 3, H, W] in [0, 1], known frames replaced by photographs, to video of the same shape.

        Steps and guidance default to the model's own. NFE: 2 a step, 1 with guidance 1. Raises UserError for a
        render of the wrong shape, size or range, or with non-finite values.
        """
        self._check(render)
        generator = generator or torch.Generator().manual_seed(0)
        condition = self.condition(render, generator)
        return self.decode_latents(self.sample(condition, generator, num_inference_steps, guidance_scale, on_step))


class FVGenPipeline(NovelViewPipeline):
    """The student: a few steps of x0-prediction and re-noising, no guidance, one network evaluation a step."""

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: ViewCrafterUNet,
        image_encoder: CLIPVisionModel,
        image_projector: ImageProjector,
        prompts: FixedPrompts,
        base_scale: float = 0.7,
        steps: int = 4,
    ) -> None:
        super().__init__(vae, unet, image_encoder, image_projector, prompts, base_scale)
        self.register_to_config(steps=steps)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        generator: torch.Generator,
        num_inference_steps: int | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents [B, 4, F, h, w] for a condition, in as many network evaluations as steps."""
        denoiser = partial(Denoiser(self.unet, self.schedule), condition=condition)
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        noise = self.initial_noise(condition, generator)
        return few_step(denoiser, noise, self.schedule, steps, generator=generator, on_step=on_step)

    @torch.no_grad()
    def __call__(
        self,
        render: Tensor,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Renders [B, F, 3, H, W] in [0, 1], known frames replaced by photographs, to video of the same shape.

        Raises UserError for a render of the wrong shape, size or range, or with non-finite values.
        """
        self._check(render)
        generator = generator or torch.Generator().manual_seed(0)
        condition = self.condition(render, generator)
        return self.decode_latents(self.sample(condition, generator, num_inference_steps, on_step))
