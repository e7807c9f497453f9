"""Packages by purpose: which are needed, from which version on, and whether those that are here can be imported.

The lists and floors are pyproject.toml's, as the installed package's metadata has them.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from fvgen.system.doors import parse_json
from fvgen.system.packages import install

PURPOSES = {  # extras of pyproject.toml, "" for what is always needed
    "": "generate, prepare, distil, inspect",
    "train": "several GPUs (DeepSpeed), LoRA roles, TensorBoard",
    "photos": "photographs and videos without poses, stereo, video.mp4",
    "ui": "the page of `fvgen ui`",
    "eval": "LPIPS, FID and KID",
    "scene": "Gaussians drawn by gsplat on a GPU",
}
MODULES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}  # others: the name, with _ for -
SECONDS = 300  # for all imports together; a slow disk takes one


@dataclass(frozen=True)
class Package:
    """One package for one purpose.

    purpose: an extra, "core" without one. needs: the versions that will do, such as ">=2.6"; "" for any. installed: the
    version that is here, None without. state: "ok", "missing", "old", or "broken" where it cannot be imported. says:
    why it is not ok, one clause; else "". cure: the command that mends it, None where all is well.
    """

    purpose: str
    name: str
    needs: str
    installed: str | None
    state: str
    says: str
    cure: str | None


def requirements() -> list[str] | None:
    """What fvgen's metadata lists, a requirement a line; None where fvgen is not installed but run from its sources."""
    try:
        return metadata.requires("fvgen") or []
    except metadata.PackageNotFoundError:
        return None


def judge(lines: Iterable[str], purposes: Sequence[str] = tuple(PURPOSES)) -> list[Package]:
    """All packages of ``lines`` that a purpose needs on this Python, judged. Takes as long as their imports."""
    wanted = [(purpose, one) for purpose in purposes for one in needed(lines, purpose)]
    answers = imported(dict.fromkeys(module_of(one.name) for _, one in wanted))
    return [_judged(purpose, one, answers[module_of(one.name)]) for purpose, one in wanted]


def needed(lines: Iterable[str], purpose: str) -> list[Requirement]:
    """The requirements of an extra alone, or of the core, as far as their markers hold here."""
    found = [Requirement(line) for line in lines]
    always = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not purpose:
        return always
    return [one for one in found if one not in always and one.marker.evaluate({"extra": purpose})]


def module_of(name: str) -> str:
    """What a distribution is imported as."""
    return MODULES.get(name.lower(), re.sub(r"[-.]", "_", name))


def imported(modules: Iterable[str]) -> dict[str, dict]:
    """Each module's answer of `fvgen.doctor.probe`. One that ends or hangs its process is blamed, and the others asked
    again."""
    left, answers = list(modules), {}
    while left:
        given, reason = _ask(left)
        answers |= given
        left = [name for name in left if name not in given]
        if left:
            culprit, *left = left
            answers[culprit] = {"version": None, "error": reason}
    return answers


def _ask(modules: list[str]) -> tuple[dict[str, dict], str]:
    """Answers up to the first module that gave none, and why it did not."""
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), *modules]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=SECONDS)
        out, reason = done.stdout, f"its import ends Python (exit code {done.returncode})"
    except subprocess.TimeoutExpired as expired:
        out, reason = expired.stdout or b"", f"its import does not end within {SECONDS} seconds"
    rows = [parse_json(line, "probe.py") for line in out.decode().splitlines() if line.endswith("}")]
    return {row["module"]: row for row in rows}, reason


def _judged(purpose: str, one: Requirement, answer: dict) -> Package:
    purpose, where, error = purpose or "core", purpose, answer["error"]
    version, exact = _version(one.name), shlex.quote(f"{one.name}{one.specifier}")
    found = Package(purpose, one.name, str(one.specifier), version or answer["version"], "ok", "", None)
    if error is None:
        if _enough(one, version):  # without a version it is another distribution of the module, as opencv-python is
            return found
        says = f"{version} is installed, {one.specifier} is needed"
        return replace(found, state="old", says=says, cure=f"pip install {exact}")
    if version is None and error.startswith("ModuleNotFoundError") and error.endswith(f"'{module_of(one.name)}'"):
        return replace(found, state="missing", says="not installed", cure=install(where))
    alone = "" if error.startswith("ModuleNotFoundError") else "--no-deps "
    cure = f"pip install --force-reinstall {alone}{exact}"
    return replace(found, state="broken", says=f"cannot be imported ({error})", cure=cure)


def _version(name: str) -> str | None:
    """Of a distribution; None where there is none, or none that can be read."""
    try:
        return metadata.version(name)
    except Exception:  # damaged metadata raises whatever it likes; the import tells whether the package works
        return None


def _enough(one: Requirement, version: str | None) -> bool:
    try:
        return version is None or one.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return True
