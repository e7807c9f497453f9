"""Renders in, video out: the multi-step guided teacher and the few-step student as diffusers pipelines.

Both hold the same components and differ only in how they sample, so a student folder is the teacher's folder with
another UNet. Frames are [B, F, 3, H, W] in [0, 1]; latents are [B, 4, F, h, w], scaled, float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModel, CLIPVisionModelWithProjection

from fvgen.diffusion.samplers import Generators, OnStep, ddim, few_step
from fvgen.diffusion.schedule import timesteps
from fvgen.errors import UserError
from fvgen.models.denoiser import Condition, Denoiser, Teacher
from fvgen.models.viewcrafter.encoders import FixedPrompts
from fvgen.models.viewcrafter.projector import ImageProjector
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.base import NovelViewPipeline, OnStepEnd
from fvgen.pipelines.frames import VideoOutput

__all__ = ["FVGenPipeline", "NovelViewPipeline", "ViewCrafterPipeline"]


class ViewCrafterPipeline(NovelViewPipeline):
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
        parts = (vae, unet, image_encoder, image_projector, prompts, text_encoder, tokenizer, fast_decoder)
        super().__init__(*parts, base_scale, image_resize, zero_snr, prediction, conditioning)
        self.register_to_config(steps=steps, guidance=guidance, guidance_rescale=guidance_rescale)
        self.register_to_config(spacing=spacing, keep_last_scale=keep_last_scale)

    def teacher(
        self,
        guidance: float | None = None,
        image_guidance: float | None = None,
        guidance_rescale: float | None = None,
        negative_prompt: str | None = None,
    ) -> Teacher:
        """The frozen guided denoiser inside; guidance and rescale default to the model's own."""
        if image_guidance is not None and not self.conditioning.has_text:
            raise UserError(
                "this model sees no text from which the image could be told apart; leave image guidance out"
            )
        guidance = self.config.guidance if guidance is None else guidance
        rescale = self.config.guidance_rescale if guidance_rescale is None else guidance_rescale
        null_context = self.null_context(negative_prompt)
        return Teacher(self.unet, self.schedule, null_context, guidance, rescale, image_guidance)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        generator: Generators,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
        *,
        image_guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        negative_prompt: str | None = None,
        eta: float = 1.0,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, 4, F, h, w] for a condition: ancestral DDIM (eta 1) at the model's spacing, as published.

        Args:
            image_guidance_scale: separate guidance by the image tokens, a third evaluation a step. As in ViewCrafter's
                sampler for it, the result keeps the last timestep's scale (see `keep_last_scale` of `ddim`).
            latents: x_T [B, 4, F, h, w], drawn if not given.
        """
        teacher = self.teacher(guidance_scale, image_guidance_scale, guidance_rescale, negative_prompt)
        return ddim(
            partial(teacher, condition=condition),
            self.initial_noise(condition, generator, latents),
            self.schedule,
            timesteps(self.config.spacing, self.config.steps if num_inference_steps is None else num_inference_steps),
            eta=eta,
            generator=generator,
            on_step=on_step,
            keep_last_scale=self.config.keep_last_scale or teacher.nfe == 3,
        )

    @torch.no_grad()
    def __call__(
        self,
        render: Any,
        generator: Generators | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
        *,
        photographs: Mapping[int, Any] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        image_guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        eta: float = 1.0,
        fps: int | None = None,
        reference: Tensor | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | tuple | VideoOutput:
        """Renders [B, F, 3, H, W] in [0, 1], known frames replaced by photographs, to video of the same shape.

        NFE: 2 a step, 1 with guidance 1, 3 with `image_guidance_scale`.

        Args:
            render: a tensor [B, F, 3, H, W], an array [B, F, H, W, 3], or PIL images (see `as_frames`).
            generator: one for all clips, or a list of one per clip; seed 0 on the CPU by default.
            num_inference_steps, guidance_scale, guidance_rescale: the model's own by default.
            on_step: told about every step (see `fvgen.diffusion.samplers.SamplerStep`); may return other latents.
            photographs: frame index to photograph, for renders whose known frames are not replaced yet.
            prompt, negative_prompt: texts other than ViewCrafter's own; they need text encoder and tokenizer.
            image_guidance_scale: see `sample`.
            eta: 1 is ancestral sampling, as published, 0 deterministic.
            fps: the UNet's frame rate (ViewCrafter's `frame_stride`), its default if not given.
            reference: [3, H, W] or [B, 3, H, W] in [0, 1], for a model that looks at a photograph beside the clip.
            latents: x_T [B, 4, F, h, w], drawn if not given.
            callback_on_step_end: diffusers' callback (pipeline, index, timestep, tensors) -> changed tensors.
            callback_on_step_end_tensor_inputs: which tensors it is given, of "latents" and "x0".
            output_type: "pt", "np", "pil" or "latent", see `fvgen.pipelines.frames.VideoOutput`.
            return_dict: False for a tuple. With neither this nor `output_type` the result is the plain tensor.

        Raises:
            UserError: a render of the wrong shape, size or range, or with non-finite values; parts of the model on
                different devices or of different types; options that do not exist.
        """
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        sample = partial(
            self.sample,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_rescale=guidance_rescale,
            negative_prompt=negative_prompt,
            eta=eta,
            latents=latents,
        )
        return self._generate(
            render,
            photographs,
            generator,
            prompt,
            fps,
            steps,
            sample,
            on_step,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            output_type,
            return_dict,
            reference,
        )


class FVGenPipeline(NovelViewPipeline):
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
        parts = (vae, unet, image_encoder, image_projector, prompts, text_encoder, tokenizer, fast_decoder)
        super().__init__(*parts, base_scale, image_resize, zero_snr, prediction, conditioning)
        self.register_to_config(steps=steps)

    @classmethod
    def from_teacher(cls, teacher: NovelViewPipeline, unet: ViewCrafterUNet, steps: int = 4) -> FVGenPipeline:
        """A student with the teacher's other components and settings."""
        parts = {name: part for name, part in teacher.components.items() if name != "unet"}
        names = ("base_scale", "image_resize", "zero_snr", "prediction", "conditioning")
        settings = {name: teacher.config[name] for name in names}
        return cls(unet=unet, **parts, **settings, steps=steps)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        generator: Generators,
        num_inference_steps: int | None = None,
        on_step: OnStep | None = None,
        *,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, 4, F, h, w] for a condition, in as many network evaluations as steps."""
        denoiser = partial(Denoiser(self.unet, self.schedule), condition=condition)
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        noise = self.initial_noise(condition, generator, latents)
        return few_step(denoiser, noise, self.schedule, steps, generator=generator, on_step=on_step)

    @torch.no_grad()
    def __call__(
        self,
        render: Any,
        generator: Generators | None = None,
        num_inference_steps: int | None = None,
        on_step: OnStep | None = None,
        *,
        photographs: Mapping[int, Any] | None = None,
        prompt: str | Sequence[str] | None = None,
        fps: int | None = None,
        reference: Tensor | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | tuple | VideoOutput:
        """Renders [B, F, 3, H, W] in [0, 1], known frames replaced by photographs, to video of the same shape.

        Arguments, results and errors are those of `ViewCrafterPipeline`, without guidance. NFE: 1 a step.
        """
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        sample = partial(self.sample, num_inference_steps=steps, latents=latents)
        return self._generate(
            render,
            photographs,
            generator,
            prompt,
            fps,
            steps,
            sample,
            on_step,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            output_type,
            return_dict,
            reference,
        )
