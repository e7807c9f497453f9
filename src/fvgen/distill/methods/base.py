"""What a method is to the trainer, the planner and the benchmarks: learners, an iteration, something to export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fvgen.distill.draws import Draws
from fvgen.distill.learners import Learner
from fvgen.system.processes import ALONE, World

if TYPE_CHECKING:  # the libraries behind the networks take seconds and a quarter of a gigabyte to import
    from fvgen.clips.latents import LatentBatch
    from fvgen.distill.settings import StageConfig
    from fvgen.models.denoiser import Teacher
    from fvgen.models.family import Family

Metrics = dict[str, Tensor]
MONITOR = "monitor/"
"""Prefix of metrics that go to monitor.jsonl rather than to metrics.jsonl."""


class Part(NamedTuple):
    """Some clips of one global batch, and the random numbers that are theirs."""

    batch: LatentBatch
    draws: Draws


Deal = Callable[[], list[Part]]
"""Hands out the next global batch: this process's clips of it, in one part or several."""


class MakeLearner(Protocol):
    """``average``: keep the average of its weights. ``start_at``: named float32 weights that it was rounded from."""

    def __call__(
        self, name: str, module: nn.Module, average: bool = False, start_at: Mapping[str, Tensor] | None = None
    ) -> Learner: ...


@dataclass(frozen=True)
class Setup:
    """What a method is built from: ``teacher`` on its device, ``start_from`` the folder of an earlier stage or None,
    and ``learner``, which gives a network its engine. ``base``: the teacher's pipeline, or when planning its
    `fvgen.models.family.Blueprint`."""

    config: StageConfig
    family: Family
    teacher: Teacher
    learner: MakeLearner
    start_from: Path | None = None
    world: World = ALONE
    base: Any = None

    @property
    def device(self) -> torch.device:
        """Where the teacher is, and all others go."""
        return next(self.teacher.network.parameters()).device


class Method:
    """One way to learn. ``learners`` and ``states`` (by name) are all that a checkpoint holds of it.

    exported: the learners whose weights `export` wants.
    followers: networks that neither learn nor have a state of their own: their weights follow a learner's.
    needs: what a batch must hold beside latents and condition, as names that the data may offer: "views".
    runs_teacher: whether the teacher's network is run; else it takes no room on the device.
    samples: whether `sample` gives "latents" or "frames".
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    runs_teacher: ClassVar[bool] = True
    samples: ClassVar[str] = "latents"
    exported: tuple[str, ...] = ("student",)
    followers: tuple[nn.Module, ...] = ()
    learners: dict[str, Learner]
    states: dict[str, Any]

    @classmethod
    def build(cls, setup: Setup) -> Method:
        """The networks, from the teacher or an earlier stage. Raises UserError where those do not fit."""
        raise AttributeError(f"{cls.__name__} cannot be built")

    def iterate(self, iteration: int, deal: Deal) -> list[Metrics]:
        """One iteration, the numbers of each part. ``iteration`` counts from 1."""
        raise AttributeError(f"{type(self).__name__} has no iteration")

    def sample(self, batch: LatentBatch, seed: int) -> Tensor:
        """Latents [B, C, F, h, w], or frames [B, F, 3, H, W] in [0, 1] (see ``samples``), for the batch's conditions as
        the student makes them now."""
        raise AttributeError(f"{type(self).__name__} has no samples")

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], base: Any, config: StageConfig) -> None:
        """Write what the stage leaves below ``folder``: ``student`` and whatever goes with it.

        weights: by learner, whole tensors by parameter name, averaged where an average is kept. base: the teacher's
        pipeline.
        """
        raise AttributeError(f"{type(self).__name__} cannot be exported")
