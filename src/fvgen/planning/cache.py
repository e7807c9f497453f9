"""Profiles on disk, in fvgen's cache: following the published network takes minutes, and gives the same every time.

A profile is kept under a digest of all that it depends on: this package's code, the libraries' versions, the network's
settings, the shapes of clip and condition, and those settings of a stage that change what an iteration does.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fvgen
from fvgen.clips.builtin import cache_folder
from fvgen.distill.settings import StageConfig
from fvgen.errors import CannotWrite
from fvgen.models.family import Blueprint, Family, Size
from fvgen.planning.simulate import Profile, simulate
from fvgen.system.doors import read_bytes, read_object
from fvgen.system.files import write_json

LIBRARIES = ("torch", "diffusers", "peft")
OF_ENGINES = {"deepspeed", "offload_teacher", "fused"}  # memory settings that an iteration does not see
KNOWN = ("fvgen", "diffusers")  # whose networks say all about themselves in their config


def remembered(config: StageConfig, family: Family, blueprint: Blueprint, size: Size) -> Profile:
    """`simulate`'s profile, from the cache where it was followed before. Networks of other packages are always followed
    anew: their code is not known here."""
    with torch.device("meta"):
        network = blueprint.network()
    if type(network).__module__.split(".")[0] not in KNOWN:
        return simulate(config, family, blueprint, size)
    latents, condition = blueprint.example(size)
    facts = {
        "code": _code(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "family": family.name,
        "network": [type(network).__name__, dict(network.config)],
        "shapes": [list(latents.shape), {name: list(tensor.shape) for name, tensor in condition.items()}],
        "guidance": [blueprint.guidance, blueprint.camera_guidance],
        "latent_grid": blueprint.latent_grid,
        "method": [config.name, config.method.model_dump()],
        "memory": config.memory.model_dump(exclude=OF_ENGINES),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
    file = cache_folder() / "profiles" / f"{digest}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return _read(file)
    profile = simulate(config, family, blueprint, size)
    with suppress(CannotWrite, OSError):  # a plan is worth more than its cache
        write_json(file, asdict(profile))
    return profile


def _read(file: Path) -> Profile:
    found = read_object(file)
    timeline = tuple((int(activations), int(gradients)) for activations, gradients in found["timeline"])
    return Profile(float(found["flops"]), timeline, {str(k): int(v) for k, v in found["parameters"].items()})


@cache
def _code() -> str:
    """Of this package: a version's number stays while its code moves."""
    root = Path(fvgen.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + read_bytes(file))
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
