"""Coverage-guided fuzzing of all text and headers that fvgen parses itself, where atheris is installed.

`pip install atheris`; it has wheels for Linux alone. tests/test_fuzz.py knows what the files mean, this one does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPOSITORY
from lvdm_files import write_yaml
from scene_files import document, world, write_colmap, write_images

from fvgen.geometry.conventions import to_realestate10k

RUNS = 3000
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed; pip install atheris"),
]


def nerfstudio(corpus: Path) -> None:
    (corpus / "0").write_text(json.dumps(document()))


def colmap(corpus: Path) -> None:
    model = write_colmap(corpus.parent / "scene", binary=False) / "sparse" / "0"
    (corpus / "0").write_bytes((model / "images.txt").read_bytes())


def realestate10k(corpus: Path) -> None:
    (corpus / "0").write_text(to_realestate10k(world()[0], [1, 2, 3, 4], "https://example.org/clip"))


def settings(corpus: Path) -> None:
    for name in ("tiny.yaml", "viewcrafter_8x80gb.yaml"):
        (corpus / name).write_bytes((REPOSITORY / "recipes" / "configs" / name).read_bytes())


def lvdm(corpus: Path) -> None:
    write_yaml(corpus / "0")


def ply(corpus: Path) -> None:
    header = (
        "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    )
    (corpus / "0").write_text(header + "0 1 2\n")


SEEDS = {call.__name__: call for call in (nerfstudio, colmap, realestate10k, settings, lvdm, ply)}


@pytest.mark.parametrize("target", SEEDS)
def test_guided_noise_is_answered(tmp_path, target):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    SEEDS[target](corpus)
    if target == "nerfstudio":  # photographs at hand, so that reading goes on behind them
        write_images(tmp_path)
        (tmp_path / "images").rename(tmp_path / "beside")
    command = [sys.executable, REPOSITORY / "tests" / "atheris_worker.py", target, corpus, str(RUNS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), *sys.path])}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"Done {RUNS} runs" in done.stdout + done.stderr
