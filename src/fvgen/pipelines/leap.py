"""The half of a pipeline that leaps: one evaluation from a noised render."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fvgen.diffusion.samplers import Generators, OnStep, leap
from fvgen.errors import UserError
from fvgen.models.condition import Condition
from fvgen.pipelines.frames import VideoOutput
from fvgen.pipelines.student import StudentPipeline

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from fvgen.pipelines.base import NovelViewPipeline
    from fvgen.pipelines.options import CallOptions


def judge_renders(pipeline: NovelViewPipeline) -> None:
    """Raises UserError for a model whose conditions hold no latents of the render: there is nothing to leap from."""
    if not pipeline.holds_renders:
        raise UserError(
            "this model sees one or both ends of a clip and not its render, from which a leap starts; give another"
        )


class LeapPipeline(StudentPipeline):
    """A family's student that starts from a render, noised to ``t``, and not from noise: one evaluation.

    ``t`` is what a call uses where it is not told otherwise and no ``policy`` (`fvgen.models.policy.DDPNet`, a
    component that may be missing) chooses it clip by clip; ``t_max`` is the largest that the student was trained on.
    """

    closed_renders = True
    policy: nn.Module | None

    @classmethod
    def from_teacher(
        cls, teacher: NovelViewPipeline, network: nn.Module, steps: int = 1, t: int = 459, t_max: int = 599
    ) -> Self:
        """A student with the teacher's other components and settings."""
        parts = {name: part for name, part in teacher.components.items() if name != cls.network_part}
        settings = {name: teacher.config[name] for name in cls.settings}
        return cls(**{cls.network_part: network}, **parts, **settings, steps=steps, t=t, t_max=t_max)

    def judge_settings(self) -> None:
        """Raises UserError for a ``t`` beyond ``t_max``, and a model that sees no render."""
        judge_renders(self)
        if self.config.t > self.config.t_max:
            raise UserError(f"t={self.config.t} is beyond t_max={self.config.t_max}; give one below")

    def timesteps_of(self, start: Tensor, t: int | None = None) -> Tensor:
        """[B]: where to land with clips that start at ``start`` [B, C, F, h, w]. Raises UserError for a ``t`` outside
        what the student was trained on."""
        chosen, t_max = self.config.t if t is None else t, self.config.t_max
        if not 0 <= chosen <= t_max:
            raise UserError(f"t={chosen} is outside the timesteps that the student was trained on; give 0 to {t_max}")
        if t is not None or self.policy is None:
            return torch.full((len(start),), chosen, dtype=torch.long, device=start.device)
        return self.policy.choose(start).clamp(max=t_max)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        generator: Generators,
        num_inference_steps: int | None = None,
        on_step: OnStep | None = None,
        *,
        latents: Tensor | None = None,
        t: int | None = None,
    ) -> Tensor:
        """Latents [B, C, F, h, w] for a condition, in as many network evaluations as steps; ``latents`` is the noise
        that the render is given, drawn if it is not given."""
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        start = self.family.start(condition).float()
        chosen = self.timesteps_of(start, t)
        if steps > int(chosen.min()) + 1:
            raise UserError(f"{steps} steps do not fit below t={int(chosen.min())}; give fewer")
        noise = self.initial_noise(condition, generator, latents)
        denoiser = partial(self.denoiser(), condition=condition)
        return leap(denoiser, start, self.schedule, chosen, noise, steps, generator=generator, on_step=on_step)

    @torch.no_grad()
    def __call__(
        self,
        render: Any,
        generator: Generators | None = None,
        num_inference_steps: int | None = None,
        on_step: OnStep | None = None,
        *,
        latents: Tensor | None = None,
        t: int | None = None,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple | VideoOutput:
        """Renders [B, F, 3, H, W] in [0, 1], closed ones best, to video of the same shape.

        Arguments, results and errors are those of the student's call; ``t``: where to land, for all clips. NFE: 1 a
        step.
        """
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        sample = partial(self.sample, num_inference_steps=steps, latents=latents, t=t)
        return self._generate(render, generator, steps, sample, on_step=on_step, **options)
