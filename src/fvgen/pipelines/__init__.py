"""Renders in, video out: what all pipelines share, and every family's own by name.

The names are imported when they are first used: diffusers takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline

__all__ = ["FVGenPipeline", "ViewCrafterPipeline"]  # what most people want


def __getattr__(name: str) -> Any:
    from fvgen.models.family import family_of

    family = None if name.startswith("_") else family_of(name)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return family.pipeline(name)
