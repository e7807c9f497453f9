"""Distillation: `run` a config, or use its parts.

The names below are imported when they are first used: the libraries behind `Trainer` take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvgen.distill.config import (
        RunConfig,
        changed,
        read_stage_config,
        read_stages,
        read_yaml,
        run_config,
        stage_config,
    )
    from fvgen.distill.export import export_checkpoint
    from fvgen.distill.guards import stopped_by_sigterm
    from fvgen.distill.run_folder import check_paths, read_metrics
    from fvgen.distill.settings import StageConfig
    from fvgen.distill.trainer import Trainer, run

__all__ = [
    "RunConfig",
    "StageConfig",
    "Trainer",
    "changed",
    "check_paths",
    "export_checkpoint",
    "read_metrics",
    "read_stage_config",
    "read_stages",
    "read_yaml",
    "run",
    "run_config",
    "stage_config",
    "stopped_by_sigterm",
]
_HOMES = {
    "StageConfig": "settings",
    "Trainer": "trainer",
    "run": "trainer",
    "check_paths": "run_folder",
    "read_metrics": "run_folder",
    "export_checkpoint": "export",
    "stopped_by_sigterm": "guards",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'config')}"), name)
