"""How the packages are had that only some purposes need: the one place that an error's cure comes from.

Which they are, and from which version on, pyproject.toml says; `fvgen doctor` reads that from the installed package.
"""

from __future__ import annotations

import shlex
from pathlib import Path

CLONE = Path(__file__).resolve().parents[3]


def install(extra: str = "") -> str:
    """The command that installs what an extra of pyproject.toml names, or, without one, what fvgen itself needs.

    Where fvgen runs from a clone it is the clone that is named. Elsewhere its name will do, though no index may know
    it: pip takes the list from the package that is there.
    """
    chosen = f"[{extra}]" if extra else ""
    if not ((CLONE / "pyproject.toml").is_file() and (CLONE / "src" / "fvgen").is_dir()):
        return f"pip install {shlex.quote(f'fvgen{chosen}')}"
    try:
        here = "." if Path.cwd() == CLONE else str(CLONE)
    except OSError:  # the folder that we are in was deleted
        here = str(CLONE)
    return f"pip install -e {shlex.quote(f'{here}{chosen}')}"
