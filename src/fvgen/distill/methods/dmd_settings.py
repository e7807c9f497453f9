"""The settings of `fvgen.distill.methods.dmd`, and what of its work they leave out."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fvgen.distill.settings import Data, Memory, MethodSettings, Run
from fvgen.errors import did_you_mean
from fvgen.objectives.divergences import DIVERGENCES
from fvgen.objectives.gan import KINDS

STEP_COUNTS = (1, 2, 4, 8)


class DmdSettings(MethodSettings):
    """``dmd_weight=0`` is a GAN without distribution matching (FVGen's stage 1), ``gan_weight=0`` the reverse."""

    all_learners: ClassVar[tuple[str, ...]] = ("student", "head", "fake_score")

    student_steps: Literal[1, 2, 4, 8] = Field(4, description="NFE of the student")
    any_step: bool = Field(
        False,
        description="learn to sample in 1, 2, 4 and 8 steps, each as often; student_steps is then only its default",
    )
    student_input: Literal["noised", "simulated"] = Field(
        "noised",
        description="what the student denoises: noised real clips (FVGen algorithm 1) or its own earlier steps (DMD2)",
    )
    critic_updates: int = Field(
        2, ge=1, description="updates of head and fake score per student update (two-time-scale rule)"
    )
    head_warmup: int = Field(0, ge=0, description="first iterations in which only the critics learn")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the student's averaged weights, which are the result")

    gan_weight: float = Field(1.0, ge=0, description="of the adversarial loss in the student's loss")
    gan_kind: str = Field("non_saturating", description=f"one of {', '.join(KINDS)}")
    r1_weight: float = Field(0.0, ge=0, description="of the approximate gradient penalty on real clips; 0 is off")
    r1_sigma: float = Field(0.05, gt=0, description="its perturbation, in units of the noised latents")
    regression_weight: float = Field(
        0.0, ge=0, description="of the mean squared error to the true latents (noised input only); the paper has none"
    )
    balance: bool = Field(
        False,
        description="divide the adversarial loss by its gradient's mean size at the student's output, as Eq. 8 does "
        "with the matching one: gan_weight then means the same at every size and age of the head",
    )
    head_pair_floor: float = Field(
        0.0, ge=0, lt=1, description="the head learns again (up to 4 times) from pairs of which it orders fewer rightly"
    )
    head_channels: int = Field(64, ge=8, multiple_of=8)
    taps: str = Field("", description="where the head looks, names with commas between; '' is the family's own choice")
    t_min: int = Field(20, ge=0, le=999, description="lowest timestep at which samples are noised for the critics")
    t_max: int = Field(979, ge=0, le=999, description="highest one")
    tau_shift: float = Field(
        1.0,
        gt=0,
        le=100,
        description="s: the share u of the way from t_min to t_max becomes s u / (1 + (s - 1) u); 1 is uniform",
    )

    dmd_weight: float = Field(1.0, ge=0, description="of the distribution-matching loss in the student's loss")
    divergence: str = Field("softened_reverse_kl", description=f"one of {', '.join(DIVERGENCES)}")
    guidance: float | None = Field(None, ge=0, description="on the real score; null takes the teacher's own")
    ratio_bins: int = Field(10, ge=1, le=1000, description="bins of timesteps with a running mean of the weight each")
    ratio_decay: float = Field(0.99, gt=0, lt=1, description="of those running means")
    ratio_norm: Literal["running", "batch"] = Field(
        "running", description="weights are divided by their running means, or by the batch's own (f-distill)"
    )
    fake_score_start: Literal["teacher", "student"] = Field(
        "teacher", description="the fake score starts as the teacher, or as the earlier stage's student (init=...)"
    )

    same_noise: bool = Field(
        False,
        description="judge the student at the tau and noise at which the head has just learnt (FVGen algorithm 1 as "
        "printed): one teacher pass to the tap fewer",
    )
    one_pass: bool = Field(
        False,
        description="the fake score, too, learns there (same_noise only): the pass that it learns from is the one that "
        "judges the student",
    )

    @property
    def matching(self) -> bool:
        """Whether there is a fake score."""
        return self.dmd_weight > 0

    @property
    def weighing(self) -> bool:
        """Whether density ratios weigh the matching loss."""
        return self.matching and not DIVERGENCES[self.divergence].constant

    @property
    def judging(self) -> bool:
        """Whether there is a head: for the adversarial loss, or for the ratios."""
        return self.gan_weight > 0 or self.weighing

    def learners(self) -> tuple[str, ...]:
        return ("student", *["head"] * self.judging, *["fake_score"] * self.matching)

    def idle(self) -> dict[str, str]:
        idle: dict[str, str] = {}
        if not self.matching:
            matching = ("divergence", "guidance", "ratio_bins", "ratio_decay", "ratio_norm", "fake_score_start")
            idle |= dict.fromkeys(matching, "where dmd_weight is 0")
        if not self.judging:
            of_head = ("gan_kind", "r1_weight", "head_channels", "taps", "head_pair_floor")
            idle |= dict.fromkeys(of_head, "where no head learns")
        if not self.gan_weight:
            idle["balance"] = "where gan_weight is 0"
        if not self.matching or not self.same_noise:
            idle["one_pass"] = "without same_noise and a fake score"
        if not self.judging or not self.r1_weight:
            idle["r1_sigma"] = "where r1_weight is 0"
        if not self.judging and not self.matching:
            of_critics = ("t_min", "t_max", "tau_shift", "same_noise", "critic_updates", "head_warmup")
            idle |= dict.fromkeys(of_critics, "without critics")
        return idle

    @model_validator(mode="after")
    def _consistent(self) -> DmdSettings:
        for field, table in (("divergence", DIVERGENCES), ("gan_kind", KINDS)):
            value = getattr(self, field)
            if value not in table:
                raise ValueError(f"{field}={value!r} is unknown{did_you_mean(value, table)}")
        if self.t_min > self.t_max:
            raise ValueError(f"t_min={self.t_min} lies above t_max={self.t_max}; swap them")
        if self.regression_weight > 0 and self.student_input == "simulated":
            raise ValueError("regression_weight needs student_input=noised: a simulated clip has no true latents")
        if not (self.gan_weight or self.regression_weight or self.dmd_weight):
            raise ValueError("gan_weight, regression_weight and dmd_weight are all 0: there is nothing to learn from")
        return self

    def judge(self, run: Run, data: Data, memory: Memory) -> None:
        if self.fake_score_start == "student" and not run.init:
            raise ValueError("fake_score_start=student needs init=..., the earlier stage whose student that is")
        if self.fake_score_start == "student" and memory.share_backbone:
            raise ValueError("fake_score_start=student needs a fake score of its own; leave share_backbone out")
        if self.same_noise and memory.accumulation > 1:
            raise ValueError("same_noise=true needs accumulation=1: it keeps the graph of the whole batch")
        if self.head_warmup >= run.iterations:
            raise ValueError(
                f"head_warmup={self.head_warmup} leaves the student none of {run.iterations} iterations; lower it"
            )
