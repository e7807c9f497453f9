"""The student's half of a pipeline: a few steps of x0-prediction and re-noising, no guidance."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fvgen.diffusion.samplers import Generators, OnStep, few_step
from fvgen.models.condition import Condition
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.pipelines.frames import VideoOutput

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from fvgen.pipelines.options import CallOptions


class StudentPipeline(NovelViewPipeline):
    """A family's student. Its ``steps`` are what a call takes where it is not told otherwise; 1, 2, 4 and 8 are usual;
    one network evaluation a step."""

    @classmethod
    def from_teacher(cls, teacher: NovelViewPipeline, network: nn.Module, steps: int = 4) -> Self:
        """A student with the teacher's other components and settings."""
        parts = {name: part for name, part in teacher.components.items() if name != cls.network_part}
        settings = {name: teacher.config[name] for name in cls.settings}
        return cls(**{cls.network_part: network}, **parts, **settings, steps=steps)

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
        """Latents [B, C, F, h, w] for a condition, in as many network evaluations as steps."""
        denoiser = partial(self.denoiser(), condition=condition)
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
        latents: Tensor | None = None,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple | VideoOutput:
        """Renders [B, F, 3, H, W] in [0, 1], known frames replaced by photographs, to video of the same shape.

        Arguments, results and errors are those of the teacher's call, without guidance. NFE: 1 a step.
        """
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        sample = partial(self.sample, num_inference_steps=steps, latents=latents)
        return self._generate(render, generator, steps, sample, on_step=on_step, **options)
