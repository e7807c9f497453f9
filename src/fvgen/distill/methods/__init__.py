"""The methods: one file each, one row each.

A row names the method's settings, its class, and settings that are fixed: FVGen's two stages are one method (`dmd`)
with and without distribution matching.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fvgen.distill.methods.base import Method
from fvgen.distill.methods.camera import Camera, CameraSettings
from fvgen.distill.methods.controls import FrozenHead, RandomGradient
from fvgen.distill.methods.data_forcing import DataForcing, DataForcingSettings
from fvgen.distill.methods.dmd import Dmd
from fvgen.distill.methods.dmd2 import Dmd2, Dmd2Settings
from fvgen.distill.methods.dmd_settings import DmdSettings
from fvgen.distill.methods.lalrm import Lalrm, LalrmSettings
from fvgen.distill.methods.leap import Leap, LeapSettings
from fvgen.distill.methods.regression import Consistency, ConsistencySettings, OdePairs, OdePairsSettings
from fvgen.distill.settings import MethodSettings
from fvgen.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Row:
    """``fixed``: values that make this row what it is."""

    method: type[Method]
    settings: type[MethodSettings]
    fixed: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Row] = {
    # FVGen, section 4.1: the student learns to look real to the teacher's features.
    "gan": Row(Dmd, DmdSettings, {"dmd_weight": 0.0}),
    # Section 4.2: softened-reverse-KL distribution matching, in which the adversarial update goes on.
    "dmd": Row(Dmd, DmdSettings),
    # Rivals: docs/method.md says where each comes from and departs.
    "dmd2": Row(Dmd2, Dmd2Settings),
    "f-distill": Row(Dmd2, Dmd2Settings, {"ratio_norm": "batch"}),
    "data-forcing": Row(DataForcing, DataForcingSettings),
    "ode-pairs": Row(OdePairs, OdePairsSettings),
    "consistency": Row(Consistency, ConsistencySettings),
    # VideoScene: one evaluation, from a noised render. docs/videoscene.md says what is the paper's and what is ours.
    "leap": Row(Leap, LeapSettings),
    # Wonderland's camera guidance, which makes a teacher. docs/wonderland.md says what is the paper's and what is ours.
    "camera": Row(Camera, CameraSettings),
    # Wonderland's reconstruction: latents to 3D Gaussians.
    "lalrm": Row(Lalrm, LalrmSettings),
    # Controls, which must fail.
    "control-random-gradient": Row(RandomGradient, DmdSettings, {"dmd_weight": 0.0}),
    "control-frozen-head": Row(FrozenHead, DmdSettings, {"dmd_weight": 0.0}),
}


def method_named(name: str) -> Row:
    """A row of the table. Raises UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}{did_you_mean(name, METHODS)}")
    return METHODS[name]
