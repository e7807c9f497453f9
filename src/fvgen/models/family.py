"""What a family of teachers is, and which there are.

A family is a package ``fvgen.models.NAME`` with a module ``family`` that holds a `FAMILY`; a package of somebody else's
calls `register`. Nobody outside a family's own folder names its networks, counts their channels, knows their taps or
how a condition is joined.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fvgen.errors import UserError, did_you_mean
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Call

if TYPE_CHECKING:
    from fvgen.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Size:
    """Frames [batch, frames, 3, height, width] of the clips that pass at a time."""

    batch: int
    frames: int
    height: int
    width: int


class LatentGrid(NamedTuple):
    """Channels of latents, and how many frames and (along a side) pixels a latent stands for."""

    channels: int
    frames: int
    pixels: int


@dataclass(frozen=True)
class Blueprint:
    """A teacher without weights, to plan with: its settings as ``model_index.json`` and the folders beside it say.

    ``network`` builds it on the default device; ``example`` gives latents [B, C, F, h, w] and a condition of zeros for
    clips of some size, or raises UserError for a size that does not fit; ``schedule`` its noise levels; ``guidance``
    its own; ``latent_grid`` of its VAE; ``with_cameras`` the blueprint of `NovelViewPipeline.with_cameras`, by its
    settings, where there is one; ``camera_guidance`` the weight of the camera path.
    """

    network: Callable[[], nn.Module]
    example: Callable[[Size], tuple[Any, Condition]]
    schedule: Callable[[], NoiseSchedule]
    guidance: float
    latent_grid: LatentGrid | None = None
    with_cameras: Callable[[Mapping[str, Any]], Blueprint] | None = None
    camera_guidance: float = 1.0


@dataclass(frozen=True)
class Family:
    """One row: what everybody else asks of a family.

    Args:
        name: its own.
        teachers, students: class names of its pipelines, as ``model_index.json`` writes them; the first one is made.
        pipeline: class name -> subclass of `fvgen.pipelines.base.NovelViewPipeline` (imported when asked for: diffusers
            takes seconds).
        call: how its network is run, see `fvgen.models.denoiser.Call`.
        tap_widths: network -> width of the features at each tap, in the order in which they are computed.
        default_tap: network -> where the discriminator looks if nobody says otherwise.
        lora_targets: ends of the names of the layers that get an adapter.
        blueprint: a folder's JSON files by component (``{"": model_index, "unet": ..., ...}``) -> `Blueprint`.
        published: names of published models that need no folder to be planned with, and their JSON files.
        start: condition -> clean latents [B, C, F, h, w] of the render, for methods that begin there; None where a
            condition does not hold them.
        leap: class name of the student's pipeline that begins there, among ``students``; "" for none.
    """

    name: str
    teachers: tuple[str, ...]
    students: tuple[str, ...]
    pipeline: Callable[[str], type[Any]]
    call: Call
    tap_widths: Callable[[nn.Module], dict[str, int]]
    default_tap: Callable[[nn.Module], str]
    lora_targets: tuple[str, ...]
    blueprint: Callable[[Mapping[str, Mapping[str, Any]]], Blueprint]
    published: Mapping[str, Mapping[str, Mapping[str, Any]]]
    start: Callable[[Condition], Tensor] | None = None
    leap: str = ""

    def widths(self, network: nn.Module, taps: tuple[str, ...]) -> list[int]:
        """Of the features at ``taps``. Raises UserError for a tap that the network does not have."""
        known = self.tap_widths(network)
        for tap in taps:
            if tap not in known:
                raise UserError(f"taps={tap}: this teacher's network has no such tap; choose among {', '.join(known)}")
        return [known[tap] for tap in taps]

    def student_of(self, teacher: Any, network: nn.Module, steps: int) -> Any:
        """A student pipeline with the teacher's other components and settings."""
        return self.pipeline(self.students[0]).from_teacher(teacher, network, steps)

    def leap_of(self, teacher: Any, network: nn.Module, t: int, t_max: int) -> Any:
        """A student that begins at the render, noised to ``t``, with the teacher's other components and settings."""
        return self.pipeline(self.leap).from_teacher(teacher, network, t=t, t_max=t_max)


_REGISTERED: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known to this process, as `FAMILY` in a package of fvgen's is."""
    _REGISTERED[family.name] = family


def families() -> dict[str, Family]:
    """All that are known, by name."""
    import fvgen.models as home

    for package in pkgutil.iter_modules(home.__path__):
        if package.ispkg and package.name not in _REGISTERED:
            register(import_module(f"{home.__name__}.{package.name}.family").FAMILY)
    return dict(_REGISTERED)


def family_of(pipeline_class: str) -> Family | None:
    """The family whose teacher or student has this class name."""
    known = families().values()
    return next((family for family in known if pipeline_class in (*family.teachers, *family.students)), None)


def published(name: str) -> tuple[Family, Mapping[str, Mapping[str, Any]]] | None:
    """Family and settings of a published model by name, for planning without its weights."""
    found = ((family, family.published[name]) for family in families().values() if name in family.published)
    return next(found, None)


def named(name: str) -> Family:
    """A family by its name. Raises UserError for an unknown one."""
    known = families()
    if name not in known:
        raise UserError(f"there is no family {name!r}{did_you_mean(name, known)}")
    return known[name]
