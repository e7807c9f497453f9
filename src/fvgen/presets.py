"""Model folders by name: teachers that ship with the package, or any folder of the user's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TypeVar

import diffusers
import torch
from safetensors import SafetensorError

from fvgen.errors import UserError
from fvgen.pipeline import NovelViewPipeline

SHIPPED = Path(__file__).parent / "weights"
P = TypeVar("P", bound=NovelViewPipeline)


def model_folder(name: str | Path) -> Path:
    """The folder of a shipped preset ("tiny") or of a path; raises UserError when neither exists."""
    for folder in (Path(name), SHIPPED / str(name)):
        if (folder / "model_index.json").is_file():
            return folder
    presets = ", ".join(sorted(p.name for p in SHIPPED.glob("*") if p.is_dir()))
    raise UserError(f"{name} is no model folder (it has no model_index.json); give one, or a preset: {presets}")


def load_pipeline(name: str | Path, kind: type[P]) -> P:
    """A pipeline in float32, whatever type its weights are stored in. Raises UserError for a damaged or other folder."""
    folder = model_folder(name)
    found = model_kind(folder)
    if found != kind.__name__:
        raise UserError(f"{folder} holds a {found}, but a {kind.__name__} is needed here; give another model folder")
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers.pipelines.pipeline_utils").setLevel(logging.ERROR)
    try:
        return kind.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"model folder {folder} is damaged or incomplete ({reason}); write or copy it again") from error


def model_kind(folder: Path) -> str:
    """The class name that ``model_index.json`` gives."""
    try:
        return json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'model_index.json'} is damaged; write or copy the model again") from error
