"""All findings as one document, and the document for eyes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fvgen
from fvgen.doctor import machine, packages
from fvgen.errors import UserError
from fvgen.system.packages import install


def examine(lines: list[str] | None = None, told: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """The document of `fvgen doctor --json` (docs/doctor.md). Nothing is written and nothing fetched; nothing that is
    broken is raised.

    lines: requirements in place of the installed package's own. told: is given what is being looked at.
    """
    known = packages.requirements() if lines is None else lines
    told("importing packages")
    found = packages.judge(known or [])
    advice = _packages(found)
    advice += [_advice(says, cure, False) for says, cure in [*_installation(known), *machine.misspelt()]]

    told("looking at the machine")
    torch_facts, error = _tried(machine.torch_facts)
    if torch_facts is None:
        advice.append(_advice(f"torch cannot be used ({error})", "pip install --force-reinstall torch", True))
    elif idle := machine.idle_gpu(torch_facts):
        advice.append(_advice(f"a GPU is not used: {idle[0]}", idle[1], False))
    hardware, disks = machine.hardware(), machine.disks()
    advice += _scarce(hardware, disks)

    told("looking for weights")
    parts, error = _tried(_parts)
    advice += [_advice(f"{one['name']}: {one['says']}", one["cure"], False) for one in parts or [] if one["cure"]]
    if parts is None:
        advice.append(_advice(f"weights could not be looked for ({error})", None, False))

    told("sampling a clip with the tiny model")
    tests = [
        _self_test(device["device"]) for device in (torch_facts or {"devices": [{"device": "cpu"}]})["devices"][:2]
    ]
    advice += [_advice(f"self-test on {one['device']}: {one['error']}", None, True) for one in tests if one["error"]]
    return {
        "fvgen": fvgen.__version__,
        "folder": str(Path(fvgen.__file__).parent),
        "ok": not any(one["fails"] for one in advice),
        "python": machine.python(),
        "torch": torch_facts,
        "hardware": hardware,
        "disks": disks,
        "network": machine.network(),
        "variables": machine.variables(),
        "packages": [asdict(one) for one in found],
        "parts": parts,
        "self_tests": tests,
        "advice": advice,
    }


def _advice(what: str, cure: str | None, fails: bool) -> dict[str, Any]:
    return {"what": what, "cure": cure, "fails": fails}


def _packages(found: list[packages.Package]) -> list[dict[str, Any]]:
    """One for each command and purpose, however many packages it brings."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in found:
        if one.cure:
            groups.setdefault((one.purpose, one.cure), []).append(f"{one.name} {one.says or one.state}")
    rows = [(f"{purpose}: {', '.join(says)}", cure, purpose == "core") for (purpose, cure), says in groups.items()]
    return [_advice(*row) for row in rows]


def _installation(lines: list[str] | None) -> list[tuple[str, str]]:
    """What is wrong with fvgen's own metadata, and the cure."""
    if lines is None:
        return [("fvgen runs from its sources and is not installed: which versions it needs is not known", install())]
    try:
        installed = metadata.version("fvgen")
    except metadata.PackageNotFoundError:
        return []
    if installed == fvgen.__version__:
        return []
    return [(f"fvgen's metadata is of version {installed}, its code of {fvgen.__version__}", install())]


def _scarce(hardware: dict[str, Any], disks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Memory and disks that will not do for long."""
    found = []
    if hardware["memory_gb"] * machine.GB < machine.LEAST_MEMORY:
        found.append(_advice(f"{hardware['memory_gb']} GB of memory are little even for the tiny model", None, False))
    for one in disks:
        cure = "export FVGEN_CACHE=FOLDER" if one["what"] == "fvgen's cache" else None
        if not one["writable"]:
            found.append(_advice(f"{one['what']} {one['path']} cannot be written", cure, False))
        elif one["free_gb"] * machine.GB < machine.LEAST_DISK:
            found.append(_advice(f"{one['what']} {one['path']} has {one['free_gb']} GB left", cure, False))
    return found


def _tried(call: Callable[[], Any]) -> tuple[Any, str]:
    """What ``call`` returns, or None and why not: parts of the core may be broken in any way."""
    try:
        return call(), ""
    except Exception as error:
        return None, machine.reason(error)


def _parts() -> list[dict[str, Any]]:
    from fvgen.doctor.parts import parts

    return [asdict(one) for one in parts()]


def _self_test(device: str) -> dict[str, Any]:
    """`self_test`'s facts with ``error``: None, or what went wrong."""
    try:
        from fvgen.doctor.selftest import self_test

        return {**self_test(device), "error": None}
    except UserError as error:
        says = str(error)
    except Exception as error:  # whatever a broken package raises
        says = machine.reason(error)
    return {"device": device, "shape": None, "psnr": None, "render_psnr": None, "seconds": None, "error": says}


# --- For eyes ---


def print_report(report: dict[str, Any], console: Console) -> None:
    """Facts, what there is for which purpose, and what to do about the rest."""
    say = lambda *words: console.print(*words, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    hardware, facts = report["hardware"], report["torch"]
    say(f"fvgen {report['fvgen']} in {report['folder']}")
    say(f"Python {report['python']['version']} ({report['python']['program']}), {report['python']['system']}")
    say(f"{hardware['cores']} cores, {hardware['memory_gb']} GB memory, {hardware['memory_free_gb']} GB of it free")
    if facts:
        built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built for CPUs"
        threads = f"{facts['threads']} threads" if facts["threads"] > 1 else "one thread"
        say(f"torch {facts['version']}, {built}, {threads}")
        for one in facts["devices"][1:]:
            sizes = f"{one['memory_gb']} GB, {one['memory_free_gb']} GB of it free"
            say(f"  {one['device']}: {one['name']}, {sizes}, compute capability {one['capability']}")
        if len(facts["devices"]) == 1:
            say("  no GPU: everything runs on the CPU")
    for one in report["disks"]:
        say(f"{one['free_gb']:6.0f} GB free: {one['what']} {one['path']}")
    network = report["network"]
    say(f"downloads: {'allowed (FVGEN_DOWNLOAD=1)' if network['downloads'] else 'only with FVGEN_DOWNLOAD=1'}")
    console.print(_table(report))
    for one in report["self_tests"]:
        if one["error"]:
            say(f"Self-test on {one['device']} FAILED: {one['error']}")
        else:
            gain = f"{one['psnr']} dB PSNR from a render of {one['render_psnr']} dB"
            say(f"Self-test on {one['device']} passed in {one['seconds']} s: the tiny model makes {gain}.")
    console.print()
    if not report["advice"]:
        say("Nothing is missing.")
    else:
        say("What is not here or not right, and the command that mends it:")
    for one in sorted(report["advice"], key=lambda one: not one["fails"]):
        say(f"{'FAILS: ' if one['fails'] else ''}{one['what']}")
        if one["cure"]:
            say(f"    {one['cure']}")


def _table(report: dict[str, Any]) -> Table:
    """A row for each purpose, and each part that is found beside packages."""
    table = Table("for", "state", "what it brings, or why not", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for purpose, brings in packages.PURPOSES.items():
        rows = [one for one in report["packages"] if one["purpose"] == (purpose or "core")]
        bad = [one for one in rows if one["state"] != "ok"]
        reasons = ", ".join(f"{one['name']} {one['state']}" for one in bad)
        state = (
            "ok" if rows and not bad else "unknown" if not rows else "incomplete" if len(bad) < len(rows) else "missing"
        )
        table.add_row(purpose or "core", _coloured(state), escape(f"{brings}{': ' if bad else ''}{reasons}"))
    for one in report["parts"] or []:
        table.add_row(f"{one['kind']} {one['name']}", _coloured(one["state"]), escape(one["says"]))
    return table


def _coloured(state: str) -> str:
    colour = {"ok": "green", "missing": "yellow", "incomplete": "yellow", "unknown": "yellow"}.get(state, "red")
    return f"[{colour}]{state}[/]"
