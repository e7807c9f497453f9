"""Which folder a model's name leads to. (Nothing here imports torch or diffusers: a wrong name is told at once.)"""

from __future__ import annotations

from pathlib import Path

from fvgen.errors import UserError
from fvgen.system.doors import problem

SHIPPED = Path(__file__).parents[1] / "weights"


def model_folder(name: str | Path) -> Path:
    """The folder of a shipped preset ("tiny") or of a path; raises UserError when neither exists."""
    for folder in (Path(name), SHIPPED / str(name)):
        if problem(folder / "model_index.json") is None:
            return folder
    presets = ", ".join(sorted(p.name for p in SHIPPED.glob("*") if p.is_dir()))
    raise UserError(
        f"{str(name)[:200]} is no model folder (it has no model_index.json); give one, or a preset: {presets}"
    )
