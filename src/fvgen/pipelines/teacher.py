"""The teacher's half of a pipeline: many steps of DDIM with classifier-free guidance."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fvgen.diffusion.samplers import Generators, OnStep, ddim
from fvgen.diffusion.schedule import timesteps
from fvgen.errors import UserError
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Teacher, frozen
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.pipelines.frames import VideoOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fvgen.pipelines.options import CallOptions


class TeacherPipeline(NovelViewPipeline):
    """A family's teacher, two network evaluations a step. Its ``steps``, ``guidance`` and ``guidance_rescale`` are what
    a call uses where it is not told otherwise.

    eta, denoise_last: of the family's own sampler, see `fvgen.diffusion.samplers.ddim`; those here are ViewCrafter's.
    """

    eta: ClassVar[float] = 1.0
    denoise_last: ClassVar[bool] = False

    def teacher(
        self,
        guidance: float | None = None,
        image_guidance: float | None = None,
        guidance_rescale: float | None = None,
        negative_prompt: str | None = None,
        camera_guidance: float | None = None,
    ) -> Teacher:
        """The guided denoiser inside, which freezes the network for good unless it is made inside
        `fvgen.models.denoiser.frozen`; guidance, rescale and the camera's weight default to the model's own.

        Raises UserError for a weight of the camera where the network looks at none.
        """
        guidance = self.config.guidance if guidance is None else guidance
        rescale = self.config.guidance_rescale if guidance_rescale is None else guidance_rescale
        nulls = self.nulls(negative_prompt)
        camera = self.config.get("camera_guidance", 1.0) if camera_guidance is None else camera_guidance
        if camera != 1.0 and not self.wants_cameras:
            raise UserError(f"camera_guidance={camera:g} has no effect: this model is not guided by cameras; set 1")
        weights = guidance, rescale, image_guidance, camera
        return Teacher(self.network, self.schedule, self.family.call, nulls, *weights)

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
        camera_guidance_scale: float | None = None,
        eta: float | None = None,
        latents: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> Tensor:
        """Latents [B, C, F, h, w] for a condition: DDIM at the model's spacing, as published.

        Args:
            image_guidance_scale: separate guidance by the image tokens, a third evaluation a step. As in ViewCrafter's
                sampler for it, the result keeps the last timestep's scale (see `keep_last_scale` of `ddim`).
            camera_guidance_scale: weight of the camera path, for a model that is guided by one: an evaluation more at
                the steps at which it looks.
            latents: x_T [B, C, F, h, w], drawn if not given.
            teacher: what `teacher` made before, in place of all guidance: many clips then share one null condition.
        """
        guidance = (guidance_scale, image_guidance_scale, guidance_rescale, negative_prompt, camera_guidance_scale)
        if teacher is not None and guidance != (None,) * 5:
            raise UserError("a teacher was given, which has its own guidance; leave guidance and negative_prompt out")
        spacing = self.config.get("spacing", "trailing")
        with frozen(self.network):
            teacher = teacher or self.teacher(*guidance)
            return ddim(
                partial(teacher, condition=condition),
                self.initial_noise(condition, generator, latents),
                self.schedule,
                timesteps(spacing, self.config.steps if num_inference_steps is None else num_inference_steps),
                eta=self.eta if eta is None else eta,
                generator=generator,
                on_step=on_step,
                denoise_last=self.denoise_last,
                keep_last_scale=self.config.get("keep_last_scale", False) or teacher.image_guidance is not None,
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
        negative_prompt: str | None = None,
        image_guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        camera_guidance_scale: float | None = None,
        eta: float | None = None,
        latents: Tensor | None = None,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple | VideoOutput:
        """Renders [B, F, 3, H, W] in [0, 1], known frames replaced by photographs, to video of the same shape.

        NFE: 2 a step, 1 with guidance 1, 3 with `image_guidance_scale` (1 where both are 1); one more with
        `camera_guidance_scale` at the steps at which the model looks at the camera.

        Args:
            render: a tensor [B, F, 3, H, W], an array [B, F, H, W, 3], or PIL images (see `as_frames`).
            generator: one for all clips, or a list of one per clip; seed 0 on the CPU by default.
            num_inference_steps, guidance_scale, guidance_rescale, camera_guidance_scale: the model's own by default.
            on_step: told about every step (see `fvgen.diffusion.samplers.SamplerStep`); may return other latents.
            negative_prompt: a text other than the model's own; needs text encoder and tokenizer.
            image_guidance_scale: see `sample`.
            eta: 1 is ancestral sampling, 0 deterministic; the family's own by default.
            latents: x_T [B, C, F, h, w], drawn if not given.
            options: see `fvgen.pipelines.options.CallOptions`.

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
            camera_guidance_scale=camera_guidance_scale,
            negative_prompt=negative_prompt,
            eta=eta,
            latents=latents,
        )
        return self._generate(render, generator, steps, sample, on_step=on_step, **options)
