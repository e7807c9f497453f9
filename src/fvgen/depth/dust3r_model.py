"""A user's own DUSt3R: found, imported, and its published weights read without running anything that they say.

DUSt3R (code and weights) is CC BY-NC-SA 4.0, non-commercial, and no part of it is here. Code: the checkout of
naver/dust3r (with its submodule croco) that FVGEN_DUST3R names, else the package mini-dust3r. Weights:
FVGEN_DUST3R_WEIGHTS, a .pth file as published, or a folder of config.json and model.safetensors, or the name of a
repository on the Hub in that layout. DUSt3R's own `load_model` runs the text in the .pth file as Python, and fails on
torch >= 2.6, which refuses the pickled argparse.Namespace in it; here that class is allowed and the text is parsed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fvgen.errors import UserError, first_line
from fvgen.system.doors import read_object
from fvgen.system.weights import read_weights_file

LICENCE = "DUSt3R and its weights are CC BY-NC-SA 4.0: what you make with them is for non-commercial use only"
CLASS = "AsymmetricCroCo3DStereo"
HUB_EXAMPLE = "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt"


class Dust3r(NamedTuple):
    """The parts of DUSt3R that are used: the network, `inference`, `global_aligner`, its mode, and the image side."""

    network: nn.Module
    inference: Any
    global_aligner: Any
    mode: Any
    side: int


def missing() -> str | None:
    """Which part of DUSt3R is not on this machine, or None."""
    if not os.environ.get("FVGEN_DUST3R") and not find_spec("mini_dust3r"):
        return "FVGEN_DUST3R names no checkout of naver/dust3r, and mini-dust3r is not installed"
    if not os.environ.get("FVGEN_DUST3R_WEIGHTS"):
        return f"FVGEN_DUST3R_WEIGHTS names no weights (a .pth file, a folder, or {HUB_EXAMPLE})"
    return None


def load_dust3r() -> Dust3r:
    """DUSt3R as the environment names it; says its licence on stderr. Raises UserError for what cannot be used."""
    if reason := missing():
        raise UserError(f"DUSt3R cannot run ({reason}); set the variables, see docs/data.md")
    return _load(os.environ.get("FVGEN_DUST3R", ""), os.environ["FVGEN_DUST3R_WEIGHTS"])


@lru_cache(maxsize=1)
def _load(checkout: str, weights: str) -> Dust3r:
    print(f"fvgen: {LICENCE}", file=sys.stderr)
    package, inference, cloud = _modules(checkout)
    settings, state = read_weights(_located(weights))
    network = _built(getattr(package, CLASS), settings, state, weights)
    network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    mode = cloud.GlobalAlignerMode.PointCloudOptimizer
    side = max(settings.get("img_size", (224, 224)))
    return Dust3r(network, inference.inference, cloud.global_aligner, mode, side)


def _modules(checkout: str) -> tuple[ModuleType, ModuleType, ModuleType]:
    """Its modules model, inference and cloud_opt."""
    package = "mini_dust3r"
    if checkout:
        package, folder = "dust3r", Path(checkout).resolve()
        if not (folder / "dust3r" / "model.py").is_file():
            raise UserError(f"FVGEN_DUST3R names {checkout}, no checkout of naver/dust3r; correct the variable")
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        return tuple(importlib.import_module(f"{package}.{part}") for part in ("model", "inference", "cloud_opt"))
    except ImportError as error:
        cure = "install its requirements, `roma` and `trimesh` among them, and `git submodule update --init` for croco"
        raise UserError(f"{package} cannot be imported ({first_line(error)}); {cure}") from error


def _located(weights: str) -> Path:
    """The file or folder on this machine."""
    path = Path(weights)
    if path.exists():
        return path
    from fvgen.pipelines.hub import fetch_file, fetch_folder  # it imports diffusers, which takes seconds

    if path.suffix in (".pth", ".safetensors") or weights.startswith(("http://", "https://")):
        return fetch_file(weights)
    if weights.count("/") == 1:
        return fetch_folder(weights, ("config.json", "model.safetensors"))
    raise UserError(f"FVGEN_DUST3R_WEIGHTS names {weights}, which does not exist; give a .pth file or {HUB_EXAMPLE}")


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The constructor's arguments and the state dict of a published checkpoint; see the head of this file.

    Raises UserError for a file that is damaged or something else.
    """
    try:
        if path.is_dir():
            settings = read_object(path / "config.json")
            settings = {key: _plain(value) for key, value in settings.items()}
            return settings, read_weights_file(path / "model.safetensors")
        content = read_weights_file(path, allowed=[argparse.Namespace])
        return parse_arguments(content["args"].model), content["model"]
    except (OSError, EOFError, RuntimeError, ValueError, SyntaxError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no weights of DUSt3R ({first_line(error)}); download them again") from error
    except (UnpicklingError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or not DUSt3R's ({first_line(error)}); download it again") from error


def parse_arguments(text: str) -> dict[str, Any]:
    """The keyword arguments in a text such as ``AsymmetricCroCo3DStereo(img_size=(512, 512), ...)``: literals and inf.

    Raises ValueError (SyntaxError for what is no Python) for anything else: nothing in it is ever run.
    """
    call = ast.parse(text.strip(), mode="eval").body
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == CLASS and not call.args):
        raise ValueError(f"it is no {CLASS}")
    return {str(word.arg): _literal(word.value) for word in call.keywords}


def _literal(node: ast.expr) -> Any:
    """`ast.literal_eval`, and ``inf``, which DUSt3R's modes use as a bound."""
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_literal(node.operand)
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(entry) for entry in node.elts)
    return ast.literal_eval(node)


def _plain(value: Any) -> Any:
    """An entry of config.json: lists are tuples, and a mode may be the text of a tuple."""
    if isinstance(value, str) and value.startswith("("):
        return _literal(ast.parse(value, mode="eval").body)
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def _built(network: type[nn.Module], settings: dict[str, Any], state: dict[str, Tensor], weights: str) -> nn.Module:
    """The network with its weights. Its landscape rule and ManyAR patches are for training: same keys, not needed."""
    settings = settings | {"landscape_only": False}
    if settings.get("patch_embed_cls") == "ManyAR_PatchEmbed":
        settings["patch_embed_cls"] = "PatchEmbedDust3R"
    try:
        built = network(**settings)
        absent = built.load_state_dict(state, strict=False).missing_keys
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        raise UserError(f"the weights {weights} do not fit this DUSt3R ({first_line(error)}); give others") from error
    if absent:
        raise UserError(f"the weights {weights} lack {len(absent)} entries, {absent[0]} first; give the published ones")
    return built
