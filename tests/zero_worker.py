"""Runs stages one after the other in the processes that the deepspeed launcher started: starting them takes longer than
the stages.

    deepspeed --num_accelerators 2 tests/zero_worker.py JOBS.json

JOBS.json is a list of settings, each with its ``stage`` and ``out``. A refused one leaves its sentence in OUT.refused.
With ``poisoned`` that clip's latents are not numbers; with ``remember`` OUT.start holds what the learners start from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fvgen.distill import Trainer, stage_config
from fvgen.distill.learners import Learner
from fvgen.errors import UserError


def train(settings: dict) -> None:
    poisoned, remember = settings.pop("poisoned", None), settings.pop("remember", False)
    trainer = Trainer(stage_config(settings["method"], settings))
    if poisoned is not None:
        trainer.latents.tensors["latents"][poisoned] = torch.nan
    if remember:
        starts = {name: start(learner) for name, learner in trainer.method.learners.items()}
        if trainer.world.is_main:
            torch.save(starts, f"{settings['out']}.start")
    trainer.train()


def start(learner: Learner) -> tuple[torch.dtype, dict[str, torch.Tensor]]:
    """The type of its weights, and its masters."""
    return next(learner.module.parameters()).dtype, learner.engine.gather(learner.engine.masters)


def main() -> None:
    for settings in json.loads(Path(sys.argv[-1]).read_text()):
        try:
            train(settings)
        except UserError as error:
            Path(f"{settings['out']}.refused").write_text(str(error))


if __name__ == "__main__":
    main()
