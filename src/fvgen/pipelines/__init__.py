"""Renders in, video out: what all pipelines share, and the two that most people want.

The names below are imported when they are first used: diffusers takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline

__all__ = ["FVGenPipeline", "ViewCrafterPipeline"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fvgen.models.viewcrafter.pipelines"), name)
