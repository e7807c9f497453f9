"""Students that learn from the teacher's trajectories alone: neither head nor fake score.

`OdePairs` is the start of CausVid (Yin et al. 2025, section 4.3) and of DMD before it: from pure noise the teacher runs
its ODE (DDIM, eta 0), and from each of the student's timesteps on that way the student is to reach its end. Here the
student sees all frames at once, as its teacher does.

`Consistency` is latent consistency distillation (Luo et al. 2023, algorithm 1; Song et al. 2023): two neighbouring
points of one trajectory, of which the teacher makes the second by one DDIM step from the first, are to have one answer;
the second's comes from the average of the student's weights, and at the clean end it is the point itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fvgen.diffusion.samplers import SamplerStep, ddim, few_step
from fvgen.diffusion.schedule import trailing_timesteps
from fvgen.distill.draws import Draws
from fvgen.distill.learners import Learner
from fvgen.distill.methods.base import Deal, Method, Metrics, Setup
from fvgen.distill.settings import Data, Memory, MethodSettings, Run
from fvgen.models.condition import Condition

if TYPE_CHECKING:  # the libraries behind the networks take seconds and a quarter of a gigabyte to import
    from fvgen.clips.latents import LatentBatch
    from fvgen.distill.settings import StageConfig
    from fvgen.models.denoiser import Denoiser, Teacher


class RegressionSettings(MethodSettings):
    """What both have."""

    student_steps: Literal[1, 2, 4, 8] = Field(4, description="NFE of the student")
    guidance: float | None = Field(None, ge=0, description="on the teacher; null takes its own")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the student's averaged weights, which are the result")


class OdePairsSettings(RegressionSettings):
    """The steps of the teacher's ODE, a multiple of the student's."""

    ode_steps: int = Field(8, ge=1, le=1000, description="steps of the teacher's trajectory")

    @model_validator(mode="after")
    def _passes_the_students_timesteps(self) -> OdePairsSettings:
        if self.ode_steps % self.student_steps:
            raise ValueError(
                f"ode_steps={self.ode_steps} does not pass the student's {self.student_steps} timesteps; give a "
                "multiple"
            )
        return self


class ConsistencySettings(RegressionSettings):
    """The grid of neighbours, and how far the target lags behind."""

    grid: int = Field(20, ge=1, le=1000, description="trailing timesteps of which two neighbours are compared")
    target_decay: float = Field(0.95, ge=0, lt=1, description="of the average that gives the target")

    def judge(self, run: Run, data: Data, memory: Memory) -> None:
        if memory.deepspeed:
            raise ValueError("the target follows whole weights, which DeepSpeed may shard; leave deepspeed out")


class Regression(Method):
    """A student, its teacher, and a loss between them."""

    def __init__(self, settings: RegressionSettings, teacher: Teacher, student: Learner) -> None:
        self.settings, self.teacher = settings, teacher
        self.learners, self.states = {"student": student}, {}

    @classmethod
    def build(cls, setup: Setup) -> Regression:
        from fvgen.distill.methods.networks import denoisers  # takes seconds to import

        torch.manual_seed(setup.config.run.seed)  # initial weights of adapters
        networks, exact = denoisers(setup, ["student"])
        student = setup.learner("student", networks["student"], average=True, start_at=exact.get("student"))
        return cls(setup.config.method, setup.teacher, student)

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], base: Any, config: StageConfig) -> None:
        from fvgen.distill.methods.written import write_adapter, write_student

        write_student(config, base, weights["student"], folder / "student")
        if config.memory.student_lora:
            write_adapter(weights["student"], folder)

    @property
    def student(self) -> Denoiser:
        return self.learners["student"].module

    def iterate(self, iteration: int, deal: Deal) -> list[Metrics]:
        rows = []
        for batch, draws in deal():
            loss = self.loss(batch, draws)
            norm = self.learners["student"].update(loss)
            rows.append({"loss_student": loss, "grad_norm_student": norm})
        self.after_update()
        average = self.learners["student"].average
        if average is not None:
            average.update()
        return rows

    def loss(self, batch: LatentBatch, draws: Draws) -> Tensor:
        """The student's error over a batch, a scalar."""
        raise AttributeError(f"{type(self).__name__} has no loss")

    def after_update(self) -> None:
        """What follows the student."""

    def sample(self, batch: LatentBatch, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents.device)
        return few_step(
            lambda x_t, t: self.student(x_t, t, batch.condition),
            noise,
            self.teacher.schedule,
            self.settings.student_steps,
            generator=generator,
        )


class OdePairs(Regression):
    """From every timestep of the student's to the end of the teacher's own way."""

    settings: OdePairsSettings

    def loss(self, batch: LatentBatch, draws: Draws) -> Tensor:
        points, end = self.trajectory(batch.condition, draws.normal(batch.latents))
        t = torch.tensor([*points], device=end.device).repeat_interleave(len(end))
        condition = batch.condition.expanded(len(end)).rows(torch.arange(len(t), device=end.device) % len(end))
        x0 = self.student(torch.cat([*points.values()]), t, condition)
        return (x0 - end.repeat(len(points), 1, 1, 1, 1)).square().mean()

    @torch.no_grad()
    def trajectory(self, condition: Condition, x_T: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """x_t [B, C, F, h, w] at each of the student's timesteps on the teacher's way from x_T, and its clean end."""
        steps, wanted = trailing_timesteps(self.settings.ode_steps), trailing_timesteps(self.settings.student_steps)
        points = {steps[-1]: x_T} if steps[-1] in wanted else {}

        def keep(step: SamplerStep) -> None:
            following = steps[len(steps) - 2 - step.index] if step.index + 1 < len(steps) else None
            if following in wanted:
                points[following] = step.x

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return self.teacher(x_t, t, condition)

        end = ddim(denoise, x_T, self.teacher.schedule, steps, on_step=keep, denoise_last=True)
        return points, end


class Consistency(Regression):
    """One answer for two neighbours."""

    settings: ConsistencySettings

    def __init__(self, settings: ConsistencySettings, teacher: Teacher, student: Learner) -> None:
        super().__init__(settings, teacher, student)
        self.target = copy.deepcopy(student.module).requires_grad_(False)
        self.states = {"target": self.target}

    def loss(self, batch: LatentBatch, draws: Draws) -> Tensor:
        schedule, latents, condition = self.teacher.schedule, batch.latents, batch.condition
        grid = torch.tensor([0, *trailing_timesteps(self.settings.grid)], device=latents.device)
        index = draws.integers(1, len(grid), latents)
        t, t_next = grid[index], grid[index - 1]
        x_t = schedule.add_noise(latents, draws.normal(latents), t)
        with torch.no_grad():
            x0 = self.teacher(x_t, t, condition)
            x_next = schedule.add_noise(x0, schedule.eps_from_x0(x_t, x0, t), t_next)
            clean = (t_next == 0).view(-1, 1, 1, 1, 1)
            goal = torch.where(clean, x0, self.target(x_next, t_next, condition))
        return (self.student(x_t, t, condition) - goal).square().mean()

    @torch.no_grad()
    def after_update(self) -> None:
        ours, theirs = list(self.target.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - self.settings.target_decay)
