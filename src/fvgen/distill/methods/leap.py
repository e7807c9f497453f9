"""Leap flow distillation (VideoScene, Wang et al. 2025, section 3.2 and algorithm 1): consistency distillation below T'
alone, from renders that are noised, so that one evaluation at an intermediate timestep makes a clip of a render.

    x1    = sqrt(ab_1) k_1 x0r + sqrt(1 - ab_1) e            x0r: latents of the render; t1 on the grid, e ~ N(0, I)
    x0_   = one DDIM step of the frozen teacher from x1 to t0 = t1 - k
    f     = c_skip(t) x + c_out(t) x0_theta(x, t)            the network's answer, which is x itself at t = 0
    loss  = d( f_theta(x1, t1), stopgrad f_target(x0_, t0) )
    target <- mu target + (1 - mu) theta

The target is the average that is exported; its network follows at the start of each iteration, and so has nothing of
its own to save. Both papers and code leave T', k, d, c_skip and mu open: docs/videoscene.md says where each default is
from. Printed slips that are not followed: the paper's Euler step (for time that explodes in variance; CogVideoX's does
not) and its division by sqrt(ab), which is 0 at 999.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fvgen.diffusion.consistency import BOUNDARIES, SCALING, SIGMA_DATA, consistency, ddim_step, lcm_boundary, leap_grid
from fvgen.diffusion.samplers import leap
from fvgen.distill.draws import Draws
from fvgen.distill.learners import Learner
from fvgen.distill.methods.base import Deal, Method, Metrics, Setup
from fvgen.distill.settings import Data, Memory, MethodSettings, Run
from fvgen.errors import UserError
from fvgen.objectives.consistency import pseudo_huber, squared

if TYPE_CHECKING:  # the libraries behind the networks take seconds and a quarter of a gigabyte to import
    from fvgen.clips.latents import LatentBatch
    from fvgen.distill.settings import StageConfig
    from fvgen.models.denoiser import Denoiser, Teacher
    from fvgen.models.family import Family


class LeapSettings(MethodSettings):
    """Defaults are the paper's (learning rate, trained layers) or, where it says nothing, those of latent consistency
    models; weight decay 1e-2 is every method's default."""

    optimizer: ClassVar[Mapping[str, float]] = {"lr": 3e-5, "beta1": 0.9}
    whole: ClassVar[bool] = True

    start: Literal["render", "truth", "mixed"] = Field(
        "render", description="latents that are noised: the render's, the true ones, or for each clip either"
    )
    t: int = Field(459, ge=0, le=999, description="where the student is to land, unless a policy chooses")
    t_max: int = Field(599, ge=0, le=999, description="T', the largest timestep that it learns; 999 is from pure noise")
    k: int = Field(
        20, ge=1, le=1000, description="timesteps between neighbours; 50 in runs of a few hundred iterations"
    )
    distance: Literal["pseudo_huber", "l2"] = Field("pseudo_huber", description="between two answers")
    huber_c: float = Field(0.001, gt=0, le=100, description="of pseudo_huber, in the latents' units")
    boundary: Literal["lcm", "switch"] = Field(
        "lcm", description="c_skip and c_out: of latent consistency models, or 1 and 0 at t = 0 and 0 and 1 elsewhere"
    )
    timestep_scaling: float = Field(SCALING, gt=0, le=1e4, description="of boundary lcm")
    sigma_data: float = Field(SIGMA_DATA, gt=0, le=1e4, description="of boundary lcm")
    guidance: float | None = Field(1.0, ge=0, description="on the teacher's step; null takes the teacher's own")
    ema_decay: float = Field(0.95, ge=0, lt=1, description="mu of the target, which is the result")
    trained: str = Field(
        "attn1", description="words, separated by commas, of which a weight's name holds one if it learns; '' is all"
    )

    def trains(self, name: str) -> bool:
        return not self.trained or any(word.strip() in name for word in self.trained.split(","))

    def base_of(self, teacher: Any, seed: int) -> Any:
        from fvgen.pipelines.leap import judge_renders  # takes seconds to import

        judge_renders(teacher)
        return teacher

    def student_of(self, base: Any, network: Any) -> Any:
        return base.family.leap_of(base, network, self.t, self.t_max)

    def idle(self) -> dict[str, str]:
        idle = {} if self.distance == "pseudo_huber" else {"huber_c": "where distance is l2"}
        if self.boundary != "lcm":
            idle |= dict.fromkeys(("timestep_scaling", "sigma_data"), "where boundary is not lcm")
        return idle

    @model_validator(mode="after")
    def _consistent(self) -> LeapSettings:
        if self.t > self.t_max:
            raise ValueError(f"t={self.t} is outside the timesteps that the student learns; give at most {self.t_max}")
        if self.k > self.t_max + 1:
            raise ValueError(f"k={self.k} leaves no timestep up to t_max={self.t_max}; give a smaller one")
        return self

    def judge(self, run: Run, data: Data, memory: Memory) -> None:
        if memory.share_backbone and not memory.student_lora:
            raise ValueError("share_backbone=true means adapters for student and target; set student_lora=true as well")
        if memory.offload_teacher:
            raise ValueError("offload_teacher=true would take away weights that the student shares; leave it out")


class Leap(Method):
    """A student, the target that is its average, and the frozen teacher between two points of a trajectory."""

    def __init__(
        self, settings: LeapSettings, teacher: Teacher, student: Learner, target: nn.Module, family: Family
    ) -> None:
        self.settings, self.teacher, self.family = settings, teacher, family
        self.learners, self.states = {"student": student}, {}
        self.target = target.requires_grad_(False)
        self.followers = (self.target,)
        self.following = _pairs(student.module, self.target)
        self.grid = leap_grid(settings.k, settings.t_max)

    @classmethod
    def build(cls, setup: Setup) -> Leap:
        from fvgen.distill.methods.networks import denoisers  # takes seconds to import

        if setup.family.start is None or not setup.family.leap:
            raise UserError(f"teachers of the family {setup.family.name} hold no renders to leap from; give another")
        settings, adapted = setup.config.method, setup.config.memory.student_lora
        torch.manual_seed(setup.config.run.seed)  # initial weights of adapters
        names = ["student", *["target"] * adapted]  # as adapters both sit on the teacher
        networks, exact = denoisers(setup, names, settings.trains)
        student = setup.learner("student", networks["student"], average=True, start_at=exact.get("student"))
        target = networks["target"] if adapted else _copied(student.module)
        return cls(settings, setup.teacher, student, target, setup.family)

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], base: Any, config: StageConfig) -> None:
        from fvgen.distill.methods.written import write_adapter, write_student

        write_student(config, base, weights["student"], folder / "student")
        if config.memory.student_lora:
            write_adapter(weights["student"], folder)

    @property
    def student(self) -> Denoiser:
        return self.learners["student"].module

    def iterate(self, iteration: int, deal: Deal) -> list[Metrics]:
        learner, rows = self.learners["student"], []
        self.follow()
        for batch, draws in deal():
            loss = self.loss(batch, draws)
            rows.append({"loss_student": loss, "grad_norm_student": learner.update(loss)})
        if learner.average is not None:
            learner.average.update()
        return rows

    def follow(self) -> None:
        """Give the target's network the average's weights."""
        learner = self.learners["student"]
        if learner.average is not None:  # the planner keeps none
            learner.engine.spread(learner.average.shards, self.following)

    def loss(self, batch: LatentBatch, draws: Draws) -> Tensor:
        """Between the student's answer at a point and the target's at the teacher's next one, a scalar."""
        schedule, condition, start = self.teacher.schedule, batch.condition, self.start_of(batch, draws)
        grid = torch.tensor(self.grid, device=start.device)
        t = grid[draws.integers(0, len(grid), start)]
        t_next = (t - self.settings.k).clamp(min=0)
        x_t = schedule.add_noise(start, draws.normal(start), t)
        with torch.no_grad():
            x_next = ddim_step(schedule, x_t, self.teacher(x_t, t, condition), t, t_next)
            goal = self.answer(self.target, x_next, t_next, condition)
        return self.distance(self.answer(self.student, x_t, t, condition), goal).mean()

    def start_of(self, batch: LatentBatch, draws: Draws) -> Tensor:
        """Clean latents [B, C, F, h, w] that are noised."""
        if self.settings.start == "truth":
            return batch.latents
        render = self.family.start(batch.condition).to(batch.latents)
        if self.settings.start == "render":
            return render
        chosen = draws.integers(0, 2, render).bool().view(-1, *[1] * (render.ndim - 1))
        return torch.where(chosen, render, batch.latents)

    def answer(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """f(x_t, t)."""
        boundary = BOUNDARIES[self.settings.boundary]
        if self.settings.boundary == "lcm":
            settings = {"sigma_data": self.settings.sigma_data, "scaling": self.settings.timestep_scaling}
            boundary = partial(lcm_boundary, **settings)
        return consistency(x_t, denoiser(x_t, t, condition), t, boundary)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """[B]."""
        return pseudo_huber(a, b, self.settings.huber_c) if self.settings.distance == "pseudo_huber" else squared(a, b)

    def sample(self, batch: LatentBatch, seed: int) -> Tensor:
        start = self.family.start(batch.condition).to(batch.latents)
        start = start.expand(len(batch.latents), *start.shape[1:])
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)).to(start)
        t = torch.full((len(start),), self.settings.t, dtype=torch.long, device=start.device)
        return leap(lambda x_t, t: self.student(x_t, t, batch.condition), start, self.teacher.schedule, t, noise)


def _copied(student: nn.Module) -> nn.Module:
    """Another network whose weights that do not learn are the student's own tensors."""
    return copy.deepcopy(student, {id(p): p for p in student.parameters() if not p.requires_grad})


def _pairs(student: nn.Module, target: nn.Module) -> list[Tensor]:
    """The target's weights in the order of the student's that learn. An adapter's name holds its role's."""
    learning = [place for place, p in enumerate(student.parameters()) if p.requires_grad]
    theirs = list(target.parameters())
    assert len(theirs) == len(list(student.parameters()))
    return [theirs[place] for place in learning]
