"""The commands that the documents name, read as a shell reads them and given to the parsers that they are meant for."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from fvgen import distill
from fvgen.cli import app
from fvgen.distill.config import known_words
from fvgen.distill.methods import METHODS

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"]
PAGES += sorted(str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "docs").glob("*.md"))

OURS = ("fvgen", "python", "make", "deepspeed")
OTHERS = {"python3", "pip", ".", "git", "docker", "export", "head"}  # not ours to judge
NUMBERS = {"N", "S", "K", "W", "M", "I"}  # letters that stand for one in a summary of a command
STANDS_FOR = {"HxW": "48x64", "X.yaml": "recipes/configs/tiny.yaml", "NAME.yaml": "fvgen.yaml"}


class Command(NamedTuple):
    page: str
    text: str
    whole: bool
    """Whether it is a line of a block, to be typed as it stands; else a name in a sentence, which may leave out what
    the command cannot do without."""


def blocks(page: str, languages: str = "sh") -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```(?:{languages})\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def lines(block: str) -> list[str]:
    """Commands of a block: a line goes on after a backslash, and where the next one begins with a bracket."""
    joined = re.sub(r"\n +(?=\[)", " ", re.sub(r" *\\\n *", " ", block))
    parts = (part for line in joined.splitlines() for part in re.sub(r"(^|\s)#.*", "", line).split("&&"))
    return [part.strip() for part in parts if part.strip()]


def commands(page: str) -> Iterator[Command]:
    """All that a page names of ours. Fails on a first word that nobody here knows."""
    for block in blocks(page):
        for line in lines(block):
            first = line.split()[0].removeprefix(".venv/bin/")
            assert first in (*OURS, *OTHERS), f"{page}: what is {line}?"
            if first in OURS:
                yield Command(page, line.removeprefix(".venv/bin/"), True)
    text = re.sub(
        r"^ *```.*?^ *```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for span in re.findall(r"`([^`]+)`", text):
        if span.split()[0].removeprefix(".venv/bin/") in OURS and " " in span and "=" not in span.split()[0]:
            yield Command(page, " ".join(span.split()), False)


def words(text: str) -> list[str]:
    """As a shell splits them; brackets round what may be left out are taken off, summaries' letters filled in."""
    found = [word for word in shlex.split(re.sub(r"(?<!\S)\[|\](?!\S)", " ", text)) if word != "..."]
    options = [number for number, word in enumerate(found) if word.startswith("--")]
    for number, word in enumerate(found):
        word = word.removesuffix("...")
        for letters, value in STANDS_FOR.items():
            word = word.replace(letters, value)
        found[number] = "4" if word in NUMBERS and number - 1 in options else word
    return found


# --- One parser for each kind of command ---


def parse(command: Command) -> None:
    """Raises, or fails, where the command line that is there does not take this one. Nothing of it is run."""
    first, *rest = words(command.text)
    if first == "deepspeed":
        parse_script(launched(rest))
    else:
        {"fvgen": parse_fvgen, "python": parse_script, "make": parse_make}[first](rest, command.whole)


def parse_fvgen(arguments: list[str], whole: bool = True) -> None:
    group = typer.main.get_command(app)
    with group.make_context("fvgen", [], resilient_parsing=True) as context:
        if arguments[0].startswith("--"):
            assert any(arguments[0] in [*option.opts, "--help"] for option in group.params)
            return
        name, subcommand, rest = group.resolve_command(context, arguments)
        if not whole:
            known = {option for part in subcommand.params for option in (*part.opts, *part.secondary_opts)}
            assert {word for word in rest if word.startswith("--")} <= known
        given = subcommand.make_context(name, rest, parent=context, resilient_parsing=not whole).params
    for word in given.get("settings") or []:  # `fvgen plan ... key=value`
        key = word.partition("=")[0]
        assert any(key in known_words(method) for method in METHODS), f"{word} is no setting"


def parse_make(arguments: list[str], whole: bool = True) -> None:
    text = (REPOSITORY / "Makefile").read_text()
    for word in arguments:
        name = word.partition("=")[0]
        assert re.search(rf"^{re.escape(name)} *\?=" if "=" in word else rf"^{re.escape(name)}:", text, re.M), word


class Parsed(BaseException):
    """The script has read its command line and would go to work; no `except` of its own stops this."""


def parse_script(arguments: list[str], whole: bool = True) -> None:
    """Run a script of ours up to where it has parsed its words, and a recipe has judged its settings."""
    if arguments[0] in ("-c", "-m"):
        if arguments[0] == "-c":
            compile(arguments[1], "-c", "exec")
        return
    script = REPOSITORY / arguments[0]
    assert script.is_file(), f"{arguments[0]} does not exist"
    if script.parent.name == "examples":  # they take any words
        return

    def judged(*settings: object) -> None:
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read_and_stop)
        patch.setattr(distill, "check_paths", judged)  # a recipe's next step, once all settings are judged
        patch.setattr(sys, "argv", [str(script), *arguments[1:]])
        patch.syspath_prepend(str(script.parent))
        patch.chdir(REPOSITORY)
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
        except SystemExit as error:
            if not whole and "arguments are required" in told.getvalue():
                return
            raise AssertionError(told.getvalue()) from error
    raise AssertionError(f"{script.name} reads no command line")


def read_and_stop(parser: argparse.ArgumentParser, args=None, namespace=None) -> None:
    """argparse's parse_args, and no further."""
    _, unknown = parser.parse_known_args(args, namespace)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    raise Parsed


def launched(arguments: list[str]) -> list[str]:
    """The script and its words, behind the options of DeepSpeed's launcher, which has to know them."""
    place = next((number for number, word in enumerate(arguments) if word.endswith(".py")), None)
    if place is None:
        place = len(arguments)
        arguments = [*arguments, "recipes/stage1_gan.py", "--config", "recipes/configs/tiny.yaml", "out=o"]
    from importlib.util import find_spec

    found = find_spec("deepspeed")  # not imported: that takes ten seconds
    if found is not None:
        source = (Path(found.origin).parent / "launcher" / "runner.py").read_text()
        for option in (word.partition("=")[0] for word in arguments[:place] if word.startswith("--")):
            assert f'"{option}"' in source or f"'{option}'" in source, option
    return arguments[place:]
