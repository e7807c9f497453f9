"""Coverage-guided damage to one kind of file, in a process that atheris ends itself: exit code 0 is no finding.

python tests/atheris_worker.py TARGET CORPUS RUNS
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fvgen"]):
    from fvgen.convert.lvdm_yaml import read_lvdm_config
    from fvgen.distill.config import read_stage_config
    from fvgen.errors import LONGEST, UserError
    from fvgen.geometry.conventions import from_realestate10k
    from fvgen.scenes.colmap_files import read_shots
    from fvgen.scenes.readers.nerfstudio import read_nerfstudio
    from fvgen.splats.ply import read_points


def realestate10k(file: Path) -> None:
    try:
        from_realestate10k(file.read_text(errors="replace"), 1, 1)
    except ValueError:
        return  # what its reader turns into a sentence


TARGETS: dict[str, tuple[str, Callable[[Path], object]]] = {  # name of the file, who reads it
    "nerfstudio": ("transforms.json", lambda file: read_nerfstudio(file.parent)),
    "colmap": ("images.txt", lambda file: read_shots(file.parent)),
    "realestate10k": ("clip.txt", realestate10k),
    "settings": ("settings.yaml", lambda file: read_stage_config("gan", file, ["out=x"])),
    "lvdm": ("model.yaml", read_lvdm_config),
    "ply": ("scene.ply", read_points),
}


def main() -> None:
    name, corpus, runs = sys.argv[1:]
    file, read = TARGETS[name]
    place = Path(tempfile.mkdtemp()) / file
    for beside in Path(corpus).with_name("beside").glob("*"):
        (place.parent / beside.name).write_bytes(beside.read_bytes())

    def one(data: bytes) -> None:
        place.write_bytes(data)
        try:
            read(place)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) <= LONGEST + 10, str(error)

    atheris.Setup([sys.argv[0], f"-runs={runs}", "-seed=1", "-timeout=10", "-max_len=4096", corpus], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
