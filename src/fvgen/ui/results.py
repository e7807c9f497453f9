"""What a visitor gets beside what `generate` writes: a page to compare films, and all of it as one file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from fvgen.system.doors import packaged_text, read_object
from fvgen.system.files import atomic_path, write_text


def write_comparison(place: Path, models: list[str], fps: int) -> None:
    """compare.html over the films of the models in ``place``, in the order render, student, teacher."""
    first = read_object(place / models[0] / "run.json")["result"]
    films = {"render": f"{models[0]}/render.mp4"} | {
        "video" if name == "walk" else name: f"{name}/video.mp4" for name in sorted(models)
    }
    facts = {"films": films, "fps": fps, "frames": len(first["frames"]), "known": sorted(map(int, first["known"]))}
    page = packaged_text("fvgen.ui", "compare.html").replace("FACTS", json.dumps(facts))
    with atomic_path(place / "compare.html") as temporary:
        write_text(temporary, page)


def pack(place: Path) -> None:
    """walk.zip: all that is in ``place``, whole or not at all. Films and pictures are packed already."""
    files = sorted(file for file in place.rglob("*") if file.is_file() and file.name != "walk.zip")
    with atomic_path(place / "walk.zip") as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for file in files:
            plain = file.suffix in (".mp4", ".png")
            archive.write(file, file.relative_to(place), zipfile.ZIP_STORED if plain else zipfile.ZIP_DEFLATED)
