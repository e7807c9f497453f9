"""The examples run as they stand, in order, in an empty folder; what they leave behind is what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "examples").glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The working folder of all of them: later ones may start from what earlier ones wrote."""
    return tmp_path_factory.mktemp("examples")


def printed(name: str, folder: Path) -> str:
    changes = {"PYTHONPATH": str(REPOSITORY / "src"), "FVGEN_CACHE": str(folder / "cache"), "FVGEN_PROGRESS": "0"}
    command = [sys.executable, str(REPOSITORY / "examples" / name)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | changes, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_they_are_numbered_short_and_in_the_list():
    text = (REPOSITORY / "examples" / "README.md").read_text()
    assert re.findall(r"^\| \[(.+?)\]", text, re.M) == [file.name for file in EXAMPLES]
    assert all(file.read_text().count("\n") <= 50 for file in EXAMPLES)
    tested = {name.removeprefix("test_example_") for name in globals() if name.startswith("test_example_")}
    assert tested == {file.name[:2] for file in EXAMPLES}


@pytest.mark.slow
def test_example_01(folder):
    pytest.importorskip("cv2")
    pytest.importorskip("av")
    assert "video.mp4" in printed("01_walk.py", folder)
    walk = folder / "runs" / "examples" / "walk"
    assert (walk / "video.mp4").is_file() and (walk / "run.html").is_file()


@pytest.mark.slow
def test_example_02(folder):
    out = printed("02_distil.py", folder)
    assert out.count("'loss_student_dmd'") == 4 and "4 steps make a video of [1, 8, 3, 48, 64]" in out


@pytest.mark.slow
def test_example_03(folder):
    assert "h is largest at r = 2.0" in printed("03_own_objective.py", folder)
    assert (folder / "runs" / "examples" / "triangular" / "student" / "model_index.json").is_file()


@pytest.mark.slow
def test_example_04(folder):
    out = printed("04_evaluate.py", folder)
    rows = json.loads((folder / "runs" / "examples" / "scores.json").read_text())
    assert rows["teacher, 8 steps"]["psnr"] > rows["render"]["psnr"] + 3 and rows["render"]["n"] == 18
    (gain,) = re.findall(r"eight steps over two: ([+-][\d.]+) dB", out)  # clips have as many views, so means agree
    assert float(gain) == pytest.approx(rows["teacher, 8 steps"]["psnr"] - rows["teacher, 2 steps"]["psnr"], abs=0.01)


@pytest.mark.slow
def test_example_05(folder):
    if not (folder / "runs" / "examples" / "walk").is_dir():
        pytest.skip("it starts from the first example's walk")
    out = printed("05_scene.py", folder)
    (covered,) = re.findall(r"new_view.png: (\d+)% of it covered", out)
    assert int(covered) > 50 and (folder / "runs" / "examples" / "scene" / "scene.ply").is_file()


def test_the_row_of_the_third_is_bounded():
    """h = 8 r^2 / (r + 1)^3 has its maximum 32/27 at r = 2 and overflows nowhere."""
    from torch.nn.functional import softplus

    log_r = torch.tensor([-1e4, 0.0, 2.0, 1e4]).index_fill(0, torch.tensor([2]), torch.tensor(2.0).log())
    h = 8 * (2 * log_r - 3 * softplus(log_r)).exp()
    torch.testing.assert_close(h, torch.tensor([0.0, 1.0, 32 / 27, 0.0]))
