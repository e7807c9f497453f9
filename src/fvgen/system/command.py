"""A process of ours as its shell sees it: sentences on stderr, exit codes, and the words of recipes and benchmarks."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

from fvgen.errors import Stopped, UserError, first_line, short
from fvgen.system.environment import number

QUIET_SECONDS = 10.0
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate", re.IGNORECASE)


def guarded(call: Callable[[], object]) -> None:
    """Run ``call``; a `UserError` becomes one sentence on stderr and exit code 2, Ctrl-C exit code 130, an end that was
    asked for and came in order exit code 0. What the system refuses where nobody expected it is the user's to mend,
    too: a sentence that names it."""
    reopen_closed()
    try:
        call()
        sys.stdout.flush()
    except Stopped as stopped:
        print(f"fvgen: {stopped}", file=sys.stderr)
        sys.exit(0)
    except UserError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        interrupted()
    except BrokenPipeError:  # `fvgen ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        refuse(f"{where}{error.strerror or first_line(error)}; mend that and run the same command again")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        refuse(
            f"there is not enough memory ({first_line(error)}); take smaller clips, a smaller batch or fewer workers"
        )


def interrupted() -> NoReturn:
    """The end of a command that Ctrl-C stopped."""
    print("fvgen: interrupted; the same command again resumes", file=sys.stderr)
    sys.exit(130)


def refuse(sentence: str) -> NoReturn:
    """The end of a command that the user has to mend something for."""
    try:
        others = number("RANK", 0) > 0
    except UserError as error:
        sentence, others = str(error), False
    if others:
        # All processes of a run make the same mistake. The launcher ends the others when the first one has ended; a
        # sentence that only this one has to say comes through.
        time.sleep(QUIET_SECONDS)
    with suppress(OSError):
        print(f"fvgen: {' '.join(sentence.splitlines())}", file=sys.stderr)
        sys.stderr.flush()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # nothing that is left there may change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(2)


def reopen_closed() -> None:
    """Where stdout or stderr was closed (`>&-`), the next file that is opened would take its place."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))


def renamed(complaint: str, names: Mapping[str, str]) -> str | None:
    """Of a parser's complaint about an option that had this name in earlier versions, the sentence; ``names``: {old
    name: what to write now}. None where it is about something else."""
    old = next((name for name in re.findall(r"--[\w-]+", complaint) if name in names), None)
    return old and f"{old} has another name now; write {names[old]}"


class Parser(argparse.ArgumentParser):
    """The parser of recipes and benchmarks: ``description`` keeps its lines, a mistake is a `UserError`. ``names``:
    as `renamed` takes them."""

    def __init__(self, description: str | None, names: Mapping[str, str] | None = None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.names = names or {}

    def error(self, message: str) -> NoReturn:
        raise UserError(renamed(message, self.names) or f"{message}; see --help")


def deepspeed_setting(file: str) -> list[str]:
    """A recipe's --deepspeed option as a setting."""
    return [f"deepspeed={file}"] if file else []


def stage_words(description: str | None) -> tuple[str, list[str]]:
    """A stage's recipe on its command line: the file of --config, and the settings that differ from it, --deepspeed
    among them."""
    parser = Parser(description)
    parser.add_argument("--config", required=True, help="YAML file of settings")
    parser.add_argument("--deepspeed", default="", help="JSON file of DeepSpeed settings; none trains in one process")
    parser.add_argument("--local_rank", type=int, default=0, help="the deepspeed launcher's own; RANK counts")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that differ from the file")
    args = parser.parse_intermixed_args()
    return args.config, deepspeed_setting(args.deepspeed) + args.settings


def positive(text: str) -> int:
    """An integer of at least 1, as a type for `argparse`."""
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{short(text)} is no number of at least 1")
    return int(text)
