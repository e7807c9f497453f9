"""The settings of a stage by owner: each says what it holds, what it refuses, and what may change on resume.

On the page, in YAML and on the command line, all are flat ``key: value`` lines (`fvgen.distill.config` sorts them); no
two owners have a setting of the same name. What is a method's own stands in `fvgen.distill.methods`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Owner(BaseModel):
    """Frozen, no unknown names, no silent conversions, no infinite numbers. ``resumable``: what may be changed when a
    run is resumed, because it does not change what an update means."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    resumable: ClassVar[frozenset[str]] = frozenset()


class Run(Owner):
    """Where from, where to, how long."""

    resumable = frozenset({"out", "iterations"})

    out: str = Field(min_length=1, description="folder of this run; the same command again resumes it")
    teacher: str = Field("tiny", description="a teacher's model folder, or the name of a shipped preset")
    init: str = Field(
        "", description="folder of an earlier stage whose student and head to start from; '' for the teacher"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1)
    device: str = Field("cpu", description="where to train, as torch names it: cpu, cuda, cuda:1")
    iterations: int = Field(200, ge=1, le=10**9)


class Data(Owner):
    """What to learn from."""

    resumable = frozenset({"workers"})

    data: str = Field("builtin", description="'builtin' scenes, a folder of clips, or shards (a folder, s3://, ...)")
    clips: int = Field(64, ge=1, le=1_000_000, description="how many built-in clips to train on; ignored for a folder")
    batch_size: int = Field(4, ge=1, le=65_536)
    workers: int = Field(
        0, ge=0, le=1024, description="processes that read clips ahead; 0 is a thread, enough but for slow places"
    )


class Optimizer(Owner):
    """AdamW of one learner. ``LEARNER_lr`` is its own rate; the others hold for all learners, as ``LEARNER_beta1`` for
    one."""

    lr: float = Field(5e-5, gt=0)
    lr_warmup: int = Field(0, ge=0, le=10**9, description="iterations in which the rate rises to lr")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the rate after that; cosine falls to 0 at the last iteration"
    )
    beta1: float = Field(0.0, ge=0, lt=1, description="AdamW's first moment; 0 is usual where critics move")
    beta2: float = Field(0.999, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="largest gradient norm of each network")

    def rate(self, iteration: int, total: int) -> float:
        """Of the iteration numbered 1 to ``total``: lr times a share that rises in a line, then is 1 or half a cosine's
        wave."""
        if iteration <= self.lr_warmup:
            return self.lr * iteration / self.lr_warmup
        if self.lr_schedule == "constant":
            return self.lr
        gone = (iteration - 1 - self.lr_warmup) / (total - self.lr_warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * gone))


class Memory(Owner):
    """How the work is done: types, parts, sharing, sharding."""

    resumable = frozenset({"deepspeed", "accumulation", "offload_teacher", "checkpoint_activations"})

    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of weights and activations; with bfloat16 the optimisers keep float32 master weights"
    )
    accumulation: int = Field(
        1, ge=1, le=65_536, description="parts in which each process passes its clips, to save memory"
    )
    checkpoint_activations: bool = Field(False, description="compute activations again instead of keeping them")
    fused: bool | None = Field(None, description="AdamW in one kernel; null means on a GPU (last bits differ)")
    share_backbone: bool = Field(
        False, description="the fake score is a LoRA adapter on the one frozen teacher instead of a network of its own"
    )
    student_lora: bool = Field(False, description="so is the student; needs share_backbone")
    lora_rank: int = Field(16, ge=1, le=8192)
    deepspeed: str = Field("", description="JSON file of DeepSpeed settings; '' trains in one plain process")
    offload_teacher: bool = Field(False, description="keep the frozen teacher in the CPU's memory; needs deepspeed")

    @model_validator(mode="after")
    def _consistent(self) -> Memory:
        if self.student_lora and not self.share_backbone:
            raise ValueError("student_lora=true needs share_backbone=true: the adapter sits on the shared teacher")
        if self.offload_teacher and not self.deepspeed:
            raise ValueError("offload_teacher=true needs deepspeed=FILE: DeepSpeed moves the weights to and fro")
        if self.offload_teacher and self.share_backbone:
            raise ValueError(
                "offload_teacher=true does not go with share_backbone=true: the teacher is then part of what learns; "
                "remove one of them"
            )
        return self


class Log(Owner):
    """What is kept and shown; all of it may change on resume."""

    resumable = frozenset(
        {"checkpoint_every", "keep_checkpoints", "keep_best_by", "max_skips", "sample_every", "track"}
    )

    checkpoint_every: int = Field(50, ge=1, le=10**9, description="iterations between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, le=10**9, description="how many of the newest to keep")
    keep_best_by: str = Field(
        "", description="also keep the checkpoint before which this metric's mean was lowest, e.g. loss_student"
    )
    max_skips: int = Field(
        3, ge=1, le=10**9, description="iterations in a row with a loss or gradient that is not finite"
    )
    sample_every: int = Field(
        100,
        ge=0,
        le=10**9,
        description="iterations between sample clips of the student and their spread; also after the last; 0 is never",
    )
    track: bool = Field(True, description="curves for TensorBoard and Weights & Biases where those are installed")


class MethodSettings(Owner):
    """The base of a method's own settings. A setting that others make idle is refused where it is given.

    all_learners: names of all networks that may learn; the first has an average, which is the result.
    optimizer: what differs from `Optimizer`'s defaults where nobody says otherwise.
    whole: networks must be whole in every process, which ZeRO-3 does not leave them.
    result: the folder below ``out`` with the pipeline that the stage leaves.
    """

    all_learners: ClassVar[tuple[str, ...]] = ("student",)
    optimizer: ClassVar[Mapping[str, Any]] = {}
    whole: ClassVar[bool] = False
    result: ClassVar[str] = "student"

    def learners(self) -> tuple[str, ...]:
        """Names of the networks that learn under these settings, each with an `Optimizer` of its own."""
        return ("student",)

    def idle(self) -> dict[str, str]:
        """Settings that have no effect beside the others, and why."""
        return {}

    def trains(self, name: str) -> bool:
        """Whether a student's weight of this name learns; the others stay the teacher's, and its very tensors."""
        return True

    def base_of(self, teacher: Any, seed: int) -> Any:
        """The pipeline that is trained with, made of the ``teacher`` that was given: data are encoded for it, and the
        method is built on it. What is random in it comes from ``seed``. Raises UserError where it cannot be made."""
        return teacher

    def blueprint_of(self, blueprint: Any) -> Any:
        """The same of a `fvgen.models.family.Blueprint`, to plan with."""
        return blueprint

    def student_of(self, base: Any, network: Any) -> Any:
        """The pipeline that a stage leaves: ``base``, the teacher's, with the student's network."""
        return base.family.student_of(base, network, self.student_steps)

    def judge(self, run: Run, data: Data, memory: Memory) -> None:
        """Raises ValueError, one sentence, where the other owners' settings do not go with these."""


OWNERS: dict[str, type[Owner]] = {"run": Run, "data": Data, "memory": Memory, "log": Log}

SHARED = tuple(key for key in Optimizer.model_fields if key != "lr")
"""An optimiser's settings that may be given once for all learners."""


class StageConfig(BaseModel):
    """One stage: a row of the table of methods, and every setting with its owner."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # of the method
    run: Run
    data: Data
    memory: Memory
    log: Log
    method: Any  # its own `MethodSettings`
    optim: dict[str, Optimizer]  # by learner

    def words(self) -> dict[str, Any]:
        """All settings that have an effect, flat, as they are written; `stage_config` reads them again."""
        idle = self.method.idle()
        words: dict[str, Any] = {"method": self.name}
        for owner in self._owners():
            words |= {key: value for key, value in owner.model_dump().items() if key not in idle}
        first = next(iter(self.optim.values()))
        words |= {key: getattr(first, key) for key in SHARED}
        for learner, optimizer in self.optim.items():
            words[f"{learner}_lr"] = optimizer.lr
            differing = {key: getattr(optimizer, key) for key in SHARED if getattr(optimizer, key) != words[key]}
            words |= {f"{learner}_{key}": value for key, value in differing.items()}
        return words

    def resumable(self) -> frozenset[str]:
        """Settings that may differ when a run is resumed."""
        return frozenset().union(*(owner.resumable for owner in self._owners()))

    def _owners(self) -> tuple[Owner, ...]:
        return self.run, self.data, self.method, self.memory, self.log
