"""The networks: ViewCrafter's UNet and image projector, and the denoisers built on them.

The names below are imported when they are first used: diffusers takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvgen.models.conditioning import ImageProjector
    from fvgen.models.teacher import Condition, Denoiser, Teacher
    from fvgen.models.unet import ViewCrafterUNet

__all__ = ["Condition", "Denoiser", "ImageProjector", "Teacher", "ViewCrafterUNet"]
_HOMES = {"ImageProjector": "conditioning", "ViewCrafterUNet": "unet"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'teacher')}"), name)
