"""A job in a process of its own, which can be ended at any moment, whatever library it is in."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from fvgen.errors import Stopped, UserError

Message = tuple[Any, ...]
Send = Callable[..., None]
TICK = 1.0  # seconds between signs of life of a job that has nothing to say
WAY = "forkserver" if sys.platform == "linux" else "spawn"  # both start from a process that has no threads


def prepare(*modules: str) -> None:
    """Import what jobs need once, in the process that theirs are copies of, while nobody waits yet."""
    if WAY == "forkserver":
        from multiprocessing import forkserver

        multiprocessing.get_context(WAY).set_forkserver_preload(list(modules))
        forkserver.ensure_running()


class Running:
    """``call(send, *arguments)`` in a new process. What it sends comes out of `messages`, then ("done",), or
    ("refused", sentence) for a `UserError`, or ("failed", line) for what should not happen, whose traceback is on the
    server's stderr."""

    def __init__(self, call: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context(WAY)
        self._inbox, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(theirs, call, arguments), daemon=True)
        self._lock = threading.Lock()
        self._stopped = False
        self._process.start()
        theirs.close()

    def messages(self, seconds: float) -> Iterator[Message | None]:
        """Until the job ends; None now and then, so that whoever listens can go. After ``seconds`` it is ended. The
        last message is ("stopped",) where `stop` did that."""
        until, last = time.monotonic() + seconds, None
        while True:
            try:
                last = self._inbox.recv() if self._inbox.poll(TICK) else None
            except (EOFError, OSError):
                break
            yield last
            if last is not None and last[0] in ("done", "refused", "failed"):
                self.stop()
                return
            if time.monotonic() > until:
                self.stop()
                yield "refused", f"this took more than {seconds / 60:.0f} minutes and was ended; ask for less"
                return
        ended = ("stopped",) if self._stopped else ("failed", "the process ended, perhaps for want of memory")
        self.stop()
        yield ended

    def stop(self) -> None:
        """End it with all that it started; returns when it has ended."""
        with self._lock:
            self._stopped = True
            if self._process.is_alive():
                with contextlib.suppress(AttributeError, OSError):  # no such thing, or it leads no group of its own yet
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()
            self._process.join()


def _work(outbox: Connection, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if hasattr(os, "setsid"):
        os.setsid()

    def send(*message: Any) -> None:
        outbox.send(message)

    try:
        call(send, *arguments)
        send("done")
    except (UserError, Stopped) as error:
        send("refused", str(error))
    except (BrokenPipeError, KeyboardInterrupt):  # nobody listens any more
        pass
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()  # before anybody hears of it
        send("failed", f"{type(error).__name__}; the terminal of fvgen ui says more")
