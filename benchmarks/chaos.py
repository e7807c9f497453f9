"""A stage that everything happens to: signals, a full disk, data that vanish, a clock set back; and ends as if nothing.

    python benchmarks/chaos.py [--faults 100] [--zero-faults 0] [--iterations 4] [--seed 0] [--out FILE.json]

What is measured: `recipes/stage2_dmd.py` of the tiny preset runs once undisturbed. Then the same command is started
again and again, a random fault at a random moment of each start (every second one while something is being written),
until it is through; when that was too early for all faults, once more from the start. Why: a week on rented machines
has every one of these. After each start: an end that was allowed (exit code, one sentence), no process left, no lock
held, all checkpoints whole; at each end: student and metrics.jsonl the same bytes as undisturbed, and nothing
half-written is left. ``--zero-faults`` does the same to two processes under the deepspeed launcher. The last line is
JSON. (benchmarks/resume.py has SIGKILL alone.)
"""

from __future__ import annotations

import collections
import contextlib
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resume import WRITTEN, contents, intact

from fvgen.clips.builtin import builtin_clips
from fvgen.errors import UserError
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import TEMPORARY, locked, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST = 300.0  # seconds of a start; more is a hang
GRACE = 20.0  # seconds in which the others of a run end after one of them
SERVER = multiprocessing.get_context("forkserver")  # starts in a moment what else would import for seconds
SERVER.set_forkserver_preload(["fvgen.distill.trainer", "torch._dynamo"])


@dataclass
class Start:
    """One start of the command: the process at its head, whose session all others share, and where its files are."""

    pid: int
    ended: Callable[[float], int | None]  # waits so many seconds; the exit code, None while it lives
    clips: Path
    out: Path
    log: Path

    def everyone(self) -> list[int]:
        """Its processes that live, itself among them."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            except OSError:  # ended meanwhile
                continue
            if int(session) == self.pid and state != "Z":
                found.append(int(entry.name))
        return found

    def workers(self) -> list[int]:
        """Those that train: the ranks of a launcher, else the one that there is."""
        ranks = []
        for pid in self.everyone():
            with contextlib.suppress(OSError):
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    ranks.append(pid)
        return ranks or [self.pid]


def train(words: list[str], log: str, clock_back: bool) -> None:
    """The recipe, in a process of its own."""
    import torch

    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(REPOSITORY)
    torch.set_num_threads(1)
    if clock_back:
        now = time.time
        time.time = lambda: now() - 86_400 * 400
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def send(number: int, to_all: bool = False) -> Callable[[Start, random.Random], None]:
    """To everyone, or to one of those that train: what the front process of DeepSpeed's launcher gets alone it keeps to
    itself."""

    def fault(start: Start, rng: random.Random) -> None:
        for pid in start.everyone() if to_all else [rng.choice(start.workers())]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    return fault


def pause(start: Start, rng: random.Random) -> None:
    """SIGSTOP, and SIGCONT a second later: a suspended machine."""
    pids = start.everyone()
    for number, seconds in ((signal.SIGSTOP, rng.uniform(0.2, 1.5)), (signal.SIGCONT, 0.0)):
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        time.sleep(seconds)


def full_disk(start: Start, rng: random.Random) -> None:
    """From now on no file may grow beyond so many bytes: the system's own error, as on a full disk."""
    for pid in start.everyone():
        try:
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (rng.choice([0, 1000, 100_000]), hard))
        except ProcessLookupError:
            continue


def _away(what: Callable[[Start], Path]) -> Callable[[Start, random.Random], None]:
    def fault(start: Start, rng: random.Random) -> None:
        path = what(start)
        hidden = path.with_name("hidden")
        try:
            path.rename(hidden)
        except FileNotFoundError:
            return
        start.ended(rng.uniform(2, 8))
        if path.exists():  # made anew meanwhile: ours was first
            shutil.rmtree(path)
        hidden.rename(path)

    return fault


FAULTS: dict[str, Callable[[Start, random.Random], None]] = {
    "SIGKILL": send(signal.SIGKILL),
    "SIGKILL to all": send(signal.SIGKILL, to_all=True),
    "SIGTERM": send(signal.SIGTERM),
    "SIGINT": send(signal.SIGINT, to_all=True),  # as a terminal does
    "SIGHUP": send(signal.SIGHUP, to_all=True),
    "SIGSTOP and SIGCONT": pause,
    "full disk": full_disk,
    "data gone": _away(lambda start: start.clips),
    "output folder gone": _away(lambda start: start.out),
    "clock set back": lambda start, rng: send(signal.SIGKILL, to_all=True)(start, rng),  # the start itself has it
}
SILENT = ("SIGKILL", "SIGKILL to all", "SIGHUP", "clock set back")  # leave no time for a sentence


@dataclass
class Chaos:
    """The run that is disturbed."""

    settings: Mapping[str, Any]
    scratch: Path
    processes: int
    rng: random.Random
    survived: collections.Counter = field(default_factory=collections.Counter)
    ends: collections.Counter = field(default_factory=collections.Counter)
    starts: int = 0

    @property
    def clips(self) -> Path:
        return Path(self.settings["data"])

    def start(self, out: Path, clock_back: bool = False) -> Start:
        words = ["recipes/stage2_dmd.py", "--config", "recipes/configs/tiny.yaml"]
        words += [*(f"{key}={value}" for key, value in self.settings.items()), f"out={out}"]
        log = self.scratch / "log.txt"
        log.unlink(missing_ok=True)
        self.starts += 1
        pid, ended = self._launched(words, log) if self.processes > 1 else self._forked(words, log, clock_back)
        return Start(pid, ended, self.clips, out, log)

    def _forked(self, words: list[str], log: Path, clock_back: bool) -> tuple[int, Callable[[float], int | None]]:
        process = SERVER.Process(target=train, args=(words, str(log), clock_back))
        process.start()

        def ended(seconds: float) -> int | None:
            process.join(seconds)
            return process.exitcode

        return process.pid, ended

    def _launched(self, words: list[str], log: Path) -> tuple[int, Callable[[float], int | None]]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        launcher = shutil.which("deepspeed", path=path)
        if launcher is None:
            raise UserError("DeepSpeed is not installed; pip install -e '.[train]', or leave --zero-faults out")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(REPOSITORY / "src")}
        port = str(self.rng.randrange(20_000, 32_000))  # below those that the system hands out
        command = [sys.executable, launcher, "--num_accelerators", str(self.processes), "--master_port", port, *words]
        command.append("deepspeed=recipes/deepspeed/zero2.json")
        with log.open("wb") as written:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=written, stderr=written, start_new_session=True
            )

        def ended(seconds: float) -> int | None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            return process.poll()

        return process.pid, ended

    def finish(self, start: Start, fault: str | None) -> int:
        """Wait for the end and judge it. Raises UserError for whatever must not be."""
        code = start.ended(LONGEST)
        if code is None:
            send(signal.SIGKILL, to_all=True)(start, self.rng)
            raise UserError(f"a start with the fault {fault!r} hung for {LONGEST:.0f} s; this is a bug")
        deadline = time.monotonic() + GRACE
        while (left := start.everyone()) and time.monotonic() < deadline:
            time.sleep(0.1)
        said = start.log.read_text(errors="replace")
        if left:
            send(signal.SIGKILL, to_all=True)(start, self.rng)
            raise UserError(f"{len(left)} processes lived on after {fault!r} (exit {code}): {said[-1500:]}")
        if "Traceback" in said and self.processes == 1:
            raise UserError(f"a traceback after {fault!r} (exit {code}): {said[-1500:]}")
        if (
            self.processes == 1
            and code not in (0, 2, 130)
            and fault not in SILENT
            and (fault, code) != ("SIGTERM", -15)
        ):
            raise UserError(f"exit code {code} after {fault!r}: {said[-1500:]}")
        if start.out.exists():
            with locked(start.out / ".lock"):
                pass
            intact(start.out)
        return code

    def disturbed(self, out: Path, duration: float, number: int) -> int:
        """One start with one fault; its exit code."""
        fault = self.rng.choice(list(FAULTS if self.processes == 1 else [f for f in FAULTS if "clock" not in f]))
        pattern = self.rng.choice(WRITTEN) if number % 2 else None
        start = self.start(out, clock_back=fault == "clock set back")
        struck = fault == "clock set back"
        moment = time.monotonic() + self.rng.uniform(0.02, 0.9) * duration
        while start.ended(0.002) is None:
            if (pattern and any(out.glob(pattern))) or (pattern is None and time.monotonic() > moment):
                FAULTS[fault](start, self.rng)
                struck = True
                break
        code = self.finish(start, fault)
        self.survived[fault] += struck
        self.ends[f"{fault}: {code}"] += 1
        print(f"start {self.starts}: {fault}, exit {code}, {self.survived.total()} faults", flush=True)
        return code

    def run(self, faults: int) -> dict[str, Any]:
        begin, whole = time.monotonic(), self.scratch / "whole"
        code = self.finish(self.start(whole), None)
        if code:
            raise UserError(f"the undisturbed run ended with {code}: {(self.scratch / 'log.txt').read_text()[-1500:]}")
        duration, out, finished = time.monotonic() - begin, self.scratch / "disturbed", 0
        while self.survived.total() < faults or finished == 0:
            if self.survived.total() < faults:
                self.disturbed(out, duration, self.starts)
            else:
                self.finish(self.start(out), None)
            if (out / "summary.json").exists():
                self.finish(self.start(out), None)  # a finished run started again finds nothing to do, or exports
                if contents(out) != contents(whole):
                    raise UserError("the disturbed run ended with other bytes than the undisturbed one; this is a bug")
                if halves := [str(x) for x in out.rglob(f"*{TEMPORARY}*")]:
                    raise UserError(f"half-written files are left: {halves}")
                finished += 1
                shutil.rmtree(out)
        facts = {"faults": dict(self.survived), "ends": dict(sorted(self.ends.items())), "starts": self.starts}
        facts |= {"processes": self.processes, "finished_runs": finished, "identical": True}
        return facts | {"undisturbed_seconds": round(duration, 1), "seconds": round(time.monotonic() - begin)}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--faults", type=int, default=100, help="of a run of one process")
    parser.add_argument("--zero-faults", type=int, default=0, help="of a run of two, under ZeRO-2")
    parser.add_argument("--iterations", type=positive, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="what is there from an earlier call stays, unless it is measured again"
    )
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(builtin_clips("train", 8).path, Path(folder) / "clips")
        settings = {"teacher": "tiny", "data": f"{folder}/clips", "iterations": args.iterations}
        settings |= {"checkpoint_every": 1, "critic_updates": 1, "track": "false", "sample_every": 0}
        settings |= {"student_input": "noised"}  # cheaper: what is at stake here is files and processes
        for name, faults, processes in (
            ("one process", args.faults, 1),
            ("ZeRO-2, two processes", args.zero_faults, 2),
        ):
            if faults:
                scratch = Path(folder) / str(processes)
                scratch.mkdir()
                result[name] = Chaos(
                    settings | {"batch_size": processes}, scratch, processes, random.Random(args.seed)
                ).run(faults)
                print(json.dumps(result[name]), flush=True)
                if args.out:
                    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
