"""The worked examples of the documents, run as they stand: files under their names, then what uses them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fvgen.distill import read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]


def examples(document: str) -> list[tuple[str, str]]:
    """(first line's name, code) of every Python block."""
    blocks = re.findall(r"```python\n# (.+?)\n(.*?)```", (REPOSITORY / "docs" / document).read_text(), re.DOTALL)
    assert blocks
    return blocks


@pytest.mark.parametrize(
    ("number", "run", "loss"), [(0, "moving", "loss_student_motion"), (1, "own", "loss_student_dmd")]
)
def test_an_objective_and_a_teacher_of_ones_own(clip_folder, teacher_folder, tmp_path, number, run, loss):
    (name, module), (kind, use) = examples("extending.md")[2 * number : 2 * number + 2]
    assert name.endswith(".py") and kind == "use it" and module.count("\n") < 100
    (tmp_path / name).write_text(module)
    common = {"data": str(clip_folder), "batch_size": 2, "critic_updates": 1, "head_channels": 8, "sample_every": 0}
    if number == 0:
        common["teacher"] = str(teacher_folder)
    (tmp_path / "use.py").write_text(f"common = {common!r}\n{use}\nprint(student)\n")
    outcome = subprocess.run(
        [sys.executable, "use.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY / "src"), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    rows = read_metrics(tmp_path / "runs" / run)
    assert len(rows) == 2 and all(row[loss] > 0 for row in rows)
