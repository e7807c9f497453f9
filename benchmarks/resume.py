"""Exact resume, the long way: a stage is killed again and again, saving included, and ends with the same student.

    python benchmarks/resume.py [--kills 20] [--iterations 12] [--stage gan|dmd] [--seed 0] [--out FILE.json]

A stage of the tiny preset runs once undisturbed. Then the same stage runs in processes that get SIGKILL at random
moments (every other one while a file or folder is being written) and are started again, until one of them finishes; if
that was too early for all kills, once more from the start. All files of student and head, and metrics.jsonl, must be
the same bytes each time, and after every kill all checkpoints must be intact. The last line of the output is JSON.
(tests/test_trainer.py has the short version.)
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fvgen.distill.checkpoint import INDEX, CheckpointFolder, checksum
from fvgen.errors import UserError
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json

WRITTEN = (
    *("checkpoints/*.partial*", "checkpoints/*.partial*", "student.partial*", "head.partial*"),
    *("summary.json.partial*", "metrics.jsonl.partial*"),
)


def train(settings: dict[str, Any]) -> None:
    """A whole stage, or what is left of it; in a process of its own."""
    import torch

    from fvgen.distill import run, stage_config

    torch.set_num_threads(1)
    run(stage_config(settings["method"], settings))


def contents(out: Path) -> dict[str, str]:
    """A digest of every file that must be the same."""
    files = [out / "metrics.jsonl", *(path for part in ("student", "head") for path in (out / part).rglob("*"))]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files) if f.is_file()}


def intact(out: Path) -> int:
    """How many checkpoints there are; raises UserError if one of them is not what was written."""
    folder = CheckpointFolder(out / "checkpoints", 1)
    for iteration in folder.iterations():
        path = folder.path(iteration)
        for name, expected in json.loads((path / INDEX).read_text())["sha256"].items():
            if checksum(path / name) != expected:
                raise UserError(f"{path / name} is damaged after a kill; this must never happen")
    return len(folder.iterations())


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=positive, default=20)
    parser.add_argument("--iterations", type=positive, default=12)
    parser.add_argument("--stage", choices=("gan", "dmd"), default="dmd")
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["fvgen.distill.trainer", "torch._dynamo"])
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        common = {"method": args.stage, "teacher": args.teacher, "data": args.data, "clips": 8, "batch_size": 2}
        common |= {"iterations": args.iterations, "checkpoint_every": 1, "critic_updates": 1, "track": False}
        whole, killed = ({**common, "out": f"{scratch}/{name}"} for name in ("whole", "killed"))
        start = time.monotonic()
        undisturbed = server.Process(target=train, args=(whole,))
        undisturbed.start()
        undisturbed.join()
        duration, out = time.monotonic() - start, Path(killed["out"])
        struck = while_writing = starts = finished = 0
        while True:
            process = server.Process(target=train, args=(killed,))
            process.start()
            starts += 1
            pattern = moments.choice(WRITTEN) if starts % 2 else None
            moment = time.monotonic() + moments.uniform(0.05, 0.6) * duration
            while process.is_alive() and struck < args.kills:
                writing = pattern is not None and any(out.glob(pattern))
                if writing or (pattern is None and time.monotonic() > moment):
                    time.sleep(moments.uniform(0, 0.01) if writing else 0)
                    process.kill()
                    struck, while_writing = struck + 1, while_writing + writing
                    break
                time.sleep(0.001)
            process.join()
            kept = intact(out)
            print(f"start {starts}: exit {process.exitcode}, {kept} checkpoints, {struck} kills", flush=True)
            if process.exitcode == 0:
                same = contents(out) == contents(Path(whole["out"]))
                finished += 1
                if struck >= args.kills or not same:
                    break
                shutil.rmtree(out)
    result = {"kills": struck, "while_writing": while_writing, "finished_runs": finished, "identical": same}
    result |= {"stage": args.stage, "iterations": args.iterations, "undisturbed_seconds": round(duration, 1)}
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))
    if not same:
        raise UserError("the killed run ended with other bytes than the undisturbed one; this is a bug")


if __name__ == "__main__":
    guarded(main)
