"""The documents: what they tell one to type is what can be typed, their worked examples run as they stand, what they
quote is what is said, and their pages make a site."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from doc_commands import PAGES, REPOSITORY, Command, blocks, commands, lines, parse, words

from fvgen.distill import read_metrics

# --- Worked examples ---


def examples(document: str) -> list[tuple[str, str]]:
    """(first line's name, code) of every Python block."""
    blocks = re.findall(r"```python\n# (.+?)\n(.*?)```", (REPOSITORY / "docs" / document).read_text(), re.DOTALL)
    assert blocks
    return blocks


@pytest.mark.parametrize(
    ("number", "run", "loss"), [(0, "moving", "loss_student_motion"), (1, "own", "loss_student_dmd")]
)
def test_an_objective_and_a_teacher_of_ones_own(clip_folder, teacher_folder, tmp_path, number, run, loss):
    (name, module), (kind, use) = examples("extending.md")[2 * number : 2 * number + 2]
    assert name.endswith(".py") and kind == "use it" and module.count("\n") < 100
    (tmp_path / name).write_text(module)
    common = {"data": str(clip_folder), "batch_size": 2, "critic_updates": 1, "head_channels": 8, "sample_every": 0}
    if number == 0:
        common["teacher"] = str(teacher_folder)
    (tmp_path / "use.py").write_text(f"common = {common!r}\n{use}\nprint(student)\n")
    outcome = subprocess.run(
        [sys.executable, "use.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY / "src"), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    rows = read_metrics(tmp_path / "runs" / run)
    assert len(rows) == 2 and all(row[loss] > 0 for row in rows)


# --- Commands ---


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_that_its_parser_takes(page):
    for command in commands(page):
        try:
            parse(command)
        except Exception as error:
            pytest.fail(f"{page}: {command.text}: {error!r}")


def test_there_are_commands_to_parse():
    """So that a change of the pages' form does not leave nothing to test."""
    found = [command for page in PAGES for command in commands(page)]
    assert sum(command.whole for command in found) > 60 and len(found) > 140


@pytest.mark.parametrize(
    "wrong",
    [
        "fvgen generat a.jpg --out o",
        "fvgen generate a.jpg",
        "fvgen generate a.jpg --out o --step 4",
        "fvgen plan --config X.yaml --height 480",
        "fvgen plan --config X.yaml teecher=tiny",
        "python benchmarks/quality.py --mdl M --data D",
        "python recipes/stage1_gan.py --config X.yaml out=o iteration=4",
        "python recipes/stage2_dmd.py --config X.yaml out=o divergence=kl",
        "python recipes/none.py",
        "make tests",
        "deepspeed recipes/stage1_gan.py --config X.yaml --zero 2 out=o",
    ],
)
def test_a_command_that_is_wrong_is_found(wrong):
    with pytest.raises(Exception):  # noqa: B017 each parser has its own
        parse(Command("a page", wrong, True))


def test_a_name_in_a_sentence_may_leave_out_what_is_needed_but_not_invent_options():
    parse(Command("a page", "fvgen generate --holdout K", False))
    with pytest.raises(AssertionError):
        parse(Command("a page", "fvgen generate --hold K", False))


def test_words_are_those_of_a_shell():
    assert lines("a b \\\n  c   # why\n\nd [--e F]\n   [--g]\nh && i") == ["a b c", "d [--e F] [--g]", "h", "i"]
    assert words("fvgen x PHOTO... --n N [--size HxW] -e '.[ui]'") == [
        "fvgen", "x", "PHOTO", "--n", "4", "--size", "48x64", "-e", ".[ui]",
    ]  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_what_python_blocks_import_is_there(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fvgen":
                module = import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")


# --- The first page, run ---


@pytest.mark.slow
def test_the_first_page_runs_as_it_stands(tmp_path):
    """Every command of docs/start.md but those that install, `make demo`, and those that need data or weights."""
    pytest.importorskip("cv2")
    pytest.importorskip("av")
    typed = [line for block in blocks("docs/start.md") for line in lines(block)]
    for name in ("examples", "recipes"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "bin").mkdir()
    for name, module in (("python", ""), ("fvgen", " -c 'from fvgen.cli import main; main()'")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PYTHONPATH": str(REPOSITORY / "src"), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path), "FVGEN_PROGRESS": "0",
    }  # fmt: skip
    needs = ("pip ", "make ", "python3 ", ". ", "path/to", "shards", "viewcrafter")
    runs = [line for line in typed if not line.startswith(needs[:4]) and not any(word in line for word in needs[4:])]
    assert len(runs) == 7
    for line in runs:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
    for walk in ("runs/examples/walk", "walk", "mine"):
        assert (tmp_path / walk / "run.html").is_file() and (tmp_path / walk / "video.mp4").is_file()


# --- What is quoted ---


@cache
def sentences() -> str:
    """All texts of the package, a line each, values as an ellipsis."""
    found = []
    for file in sorted((REPOSITORY / "src" / "fvgen").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
    return "\n".join(" ".join(text.split()) for text in found)


def quoted() -> list[str]:
    return [line.strip() for block in blocks("docs/troubleshooting.md", "text") for line in block.splitlines()]


@pytest.mark.parametrize("message", quoted())
def test_a_message_that_troubleshooting_quotes_is_one_that_is_said(message):
    """In one text of the source, values being ellipses in both."""
    told = " ".join(message.removeprefix("fvgen: ").split())
    assert told in sentences()


def test_troubleshooting_has_for_each_symptom_cause_proof_and_cure():
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    entries = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert [entry.split(".")[0] for entry in entries] == [str(n + 1) for n in range(len(entries))]
    for entry in entries:
        places = [entry.index(f"* **{word}**:") for word in ("Cause", "Verify", "Fix")]
        assert places == sorted(places), entry.splitlines()[0]
    assert len(quoted()) > len(entries)


# --- The site ---


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("docs_build", REPOSITORY / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_index_and_in_the_navigation():
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")}
    index = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    navigation = (REPOSITORY / "zensical.toml").read_text(encoding="utf-8")
    assert pages - {"index.md"} == {name for name in re.findall(r"\]\((\w+\.md)\)", index)}
    assert pages == set(re.findall(r'"docs/(\w+\.md)"', navigation))


def test_links_lead_to_files_and_to_headings_that_are_there(builder):
    headings = {}
    for file in builder.linked_files():  # ends the process where a file is missing
        if file.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            headings[file] = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for file in headings:
        for target in builder.LINK.findall(builder.FENCED.sub("", file.read_text(encoding="utf-8"))):
            path, _, name = target.partition("#")
            if name and "://" not in target:
                assert name in headings[(file.parent / path).resolve() if path else file], f"{file.name}: {target}"


def test_a_link_that_leads_nowhere_is_found(builder, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "SITE", tmp_path)
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#y"><a href="#x"><a href="https://example.org/none">')
    (tmp_path / "b.html").write_text('<a href="c.html"><h1 id="y"><a href="a.html#z">')
    assert sorted(builder.broken()) == ["b.html: a.html#z", "b.html: c.html"]


def test_the_reference_has_every_public_name_with_its_docstring(builder):
    """What `fvgen` and each room's __all__ export, asked of the modules themselves; each text as Markdown."""
    pages = builder.reference()
    import fvgen

    assert all(callable(getattr(fvgen, name)) for name in builder.TOP)
    for room in builder.ROOMS:
        module, page = import_module(f"fvgen.{room}"), pages[f"fvgen.{room}.md"]
        for name in getattr(module, "__all__", []):
            exported = getattr(module, name)
            if isinstance(exported, type) or callable(exported):
                assert f"\n## {name}\n" in page, f"fvgen.{room}.{name}"
                first = (exported.__doc__ or "").strip().splitlines()[0]
                assert builder.text_of(first) in page, f"fvgen.{room}.{name}"
