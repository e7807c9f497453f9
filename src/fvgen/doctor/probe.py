"""Import modules one after the other and tell of each whether it could be: run as a script, in a process of its own.

    python probe.py MODULE...

A package that is broken may do anything when it is imported: raise, print, wait, end the process. What asks is spared
that (`fvgen.doctor.packages`). Nothing of fvgen is imported here. A line of JSON for each module, on what was stdout:
``{"module": ..., "version": ... or null, "error": ... or null}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main(modules: list[str]) -> None:
    sys.path.pop(0)  # this file's folder, whose names are not those of packages
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for name in modules:
        version = error = None
        try:
            found = getattr(importlib.import_module(name), "__version__", None)
            version = found if isinstance(found, str) else None
        except BaseException as raised:  # SystemExit, too
            error = " ".join(f"{type(raised).__name__}: {raised}".split())[:300]
        print(json.dumps({"module": name, "version": version, "error": error}), file=answers, flush=True)
    os._exit(0)  # what packages do when Python ends is nobody's business here


if __name__ == "__main__":
    main(sys.argv[1:])
