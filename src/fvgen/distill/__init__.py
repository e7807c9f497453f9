"""Distillation: `run` a config, or use its parts."""

from fvgen.distill.config import RunConfig, StageConfig, read_stage_config, read_yaml, run_config, stage_config
from fvgen.distill.trainer import Trainer, read_metrics, run

__all__ = [
    "RunConfig",
    "StageConfig",
    "Trainer",
    "read_metrics",
    "read_stage_config",
    "read_yaml",
    "run",
    "run_config",
    "stage_config",
]
