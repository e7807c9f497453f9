"""recipes/slurm.sh, run by bash with small stand-ins for Slurm's own commands: how is each process started?"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "recipes" / "slurm.sh"
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> scontrol.log; fi',
    # As since Slurm 22.05: a step has the cores that srun itself is told.
    "srun": 'echo "$1" > srun.log; while [[ $1 == --* ]]; do shift; done\n'
    'SLURM_NTASKS=16 SLURM_PROCID=9 SLURM_LOCALID=1 exec "$@"',
    "python": 'printf "%s\\n" "$RANK/$WORLD_SIZE/$LOCAL_RANK $MASTER_ADDR:$MASTER_PORT" "$@" > python.log\n$TRAIN',
}


@pytest.fixture
def submit(tmp_path):
    """The job in ``tmp_path``; ``train`` is a bash command in place of the training."""
    bin_ = tmp_path / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for name, body in COMMANDS.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_ / name).chmod(0o755)

    def call(train: str = "true", **variables: str) -> subprocess.CompletedProcess:
        given = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "8", "TRAIN": train}
        environment = {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"} | given | variables
        return subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return call


def test_every_process_knows_its_place_and_gets_its_cores(submit, tmp_path):
    outcome = submit("touch done/summary.json", CONFIG="my config.yaml", INIT="runs/gan", OUT="done")
    assert outcome.returncode != 0 and "touch" in outcome.stderr  # no such folder: a run that fails is not queued again
    assert not (tmp_path / "scontrol.log").exists()
    (tmp_path / "done").mkdir()
    outcome = submit("touch done/summary.json", CONFIG="my config.yaml", INIT="runs/gan", OUT="done")
    assert outcome.returncode == 0, outcome.stderr
    assert not (tmp_path / "scontrol.log").exists()
    first, *words = (tmp_path / "python.log").read_text().splitlines()
    assert first == "9/16/1 node7:24711"
    assert words[:3] == ["recipes/stage2_dmd.py", "--config", "my config.yaml"]
    assert {"device=cuda", "init=runs/gan", "out=done", "iterations=5000"} <= set(words)
    assert (tmp_path / "srun.log").read_text() == "--cpus-per-task=8\n"


def test_a_run_that_was_stopped_is_queued_again(submit, tmp_path):
    assert submit(CONFIG="X.yaml", INIT="runs/gan").returncode == 0
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"


def test_without_settings_nothing_starts(submit, tmp_path):
    outcome = submit(INIT="runs/gan")
    assert outcome.returncode != 0 and "CONFIG=X.yaml" in outcome.stderr
    assert not (tmp_path / "python.log").exists()
