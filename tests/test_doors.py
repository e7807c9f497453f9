"""Who may open files: the doors, and nobody else. Held by the syntax of the whole package."""

from __future__ import annotations

import ast
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checks import refusal

import fvgen
from fvgen.errors import LONGEST, UserError, short
from fvgen.system import doors

PACKAGE = Path(fvgen.__file__).parent
DOORS = {"system/doors.py", "system/files.py"}
WORDS = {
    *("open", "load", "loads", "load_file", "safe_open", "save_file", "save_pretrained", "from_pretrained"),
    *("read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "makedirs", "touch", "safe_load", "copytree"),
    *("copyfile", "copy2", "rename", "replace", "unlink", "rmtree", "fromfile", "genfromtxt", "loadtxt"),
}
OWNERS = {  # names of `WORDS` that mean a file only after these
    "open": {None, "os", "av", "Image", "Path", "file", "path", "*"},
    "load": {"json", "torch", "np", "numpy", "pickle", "yaml"},
    "loads": {"json", "pickle"},
    "replace": {"os"},
    "rename": {"os", "path", "file"},
    "copy2": {"shutil"},
}
EXCEPTIONS = {
    ("system/command.py", "open"): "os.devnull, in place of a standard output that is closed",
    ("doctor/probe.py", "open"): "os.devnull, in place of what a package prints when it is imported",
    ("pipelines/strict.py", "from_pretrained"): "the door for model folders",
    ("pipelines/folders.py", "from_pretrained"): "leads to FolderOnHub's, which judges",
    ("pipelines/folders.py", "save_pretrained"): "below a temporary path",
    ("pipelines/hub.py", "from_pretrained"): "after strict.judge_folder",
    ("pipelines/hub.py", "save_pretrained"): "the user's own call, to a place of theirs",
    ("convert/command.py", "save_pretrained"): "below a temporary path",
    ("convert/cogvideox.py", "save_pretrained"): "below a temporary path",
    ("depth/depth_pro.py", "from_pretrained"): "after strict.judge_json; transformers' own classes, use_safetensors",
    ("walks/film.py", "open"): "PyAV writes below a temporary path",
    ("posing/reconstruct.py", "open"): "pycolmap's data base below a temporary path",
    ("posing/together.py", "open"): "pycolmap's data base in a temporary folder",
    ("scenes/readers/photographs.py", "copyfile"): "from a photograph that was opened to below a temporary path",
    ("reports/demo.py", "copytree"): "the student of this very run, to below a temporary path",
    ("posing/reconstruct.py", "rmtree"): "below a temporary path",
    ("posing/reconstruct.py", "unlink"): "below a temporary path",
    ("shards/prepare.py", "unlink"): "shards without clips that this call wrote",
}


def calls(file: Path) -> Iterator[tuple[str, str | None, int]]:
    """Names that are called in a module: (name, what stands before its last dot, line)."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id, None, node.lineno
            elif isinstance(node.func, ast.Attribute):
                owner = node.func.value
                yield node.func.attr, owner.id if isinstance(owner, ast.Name) else "*", node.lineno


def opens(name: str, owner: str | None, own: set[str]) -> bool:
    """Whether a call opens, writes or moves a file, and no function of a door is meant."""
    if name not in WORDS or (owner is None and name in own):
        return False
    return owner in OWNERS[name] if name in OWNERS else True


def imported(file: Path) -> set[str]:
    """Names that a module has from the doors."""
    found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {
        alias.name
        for node in found
        if node.module in ("fvgen.system.doors", "fvgen.system.files")
        for alias in node.names
    }


def test_nobody_but_the_doors_opens_files():
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name_of_file, own = str(file.relative_to(PACKAGE)), imported(file) | {"read_json"}
        if name_of_file not in DOORS:
            found |= {(name_of_file, name): line for name, owner, line in calls(file) if opens(name, owner, own)}
    foreign = {key: line for key, line in found.items() if key not in EXCEPTIONS}
    assert not foreign, f"open these through fvgen.system.doors or fvgen.system.files: {foreign}"


def test_the_doors_catch_what_they_should(tmp_path):
    """The watch itself: a module with every way to open a file."""
    lines = [
        "open(p)",
        "json.loads(t)",
        "torch.load(p)",
        "load_file(p)",
        "p.read_text()",
        "p.mkdir()",
        "C.from_pretrained(p)",
    ]
    (tmp_path / "bad.py").write_text("\n".join(lines))
    assert [line for name, owner, line in calls(tmp_path / "bad.py") if opens(name, owner, set())] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]


# --- What they refuse ---

BAD_JSON = {
    "empty": b"",
    "cut": b'{"a": 1',
    "deep": b"[" * 100_000,
    "a long number": b"[" + b"9" * 5000 + b"]",
    "no text": b"\xff\xfe\x00",
    "nul": b"\0" * 10,
    "lone surrogates cut": b'"\\ud8',
}
BAD_YAML = {
    "cut": b"a: [1",
    "deep": b"[" * 5000,
    "a date that is none": b"a: 2024-13-45",
    "a tag": b"a: !!python/object/apply:os.system [ls]",
    "aliases": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c]\n" % (c, c, *[c - 1] * 6) for c in range(98, 118)),
    "itself": b"a: &a [*a]",
    "long number": b"a: " + b"9" * 5000,
    "no text": b"\xff\xfe\xff",
    "an unhashable key": b"? [a]\n: 1\n? {b: 1}\n: 2",
    "control characters": b"a: \x01",
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_is_none(tmp_path, case):
    file = tmp_path / "file.json"
    file.write_bytes(BAD_JSON[case])
    said = refusal(lambda: doors.read_json(file))
    assert str(file) in said and len(said) < 400


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml_that_is_none(tmp_path, case):
    file = tmp_path / "file.yaml"
    file.write_bytes(BAD_YAML[case])
    said = refusal(lambda: doors.read_yaml(file))
    assert str(file) in said and len(said) < 400


def test_yaml_with_honest_aliases_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {lr: 1}\nb: *a\nc: {<<: *a, d: 2}\n")
    assert doors.read_yaml(tmp_path / "a.yaml") == {"a": {"lr": 1}, "b": {"lr": 1}, "c": {"lr": 1, "d": 2}}


READERS = ("read_bytes", "read_text", "read_json", "read_yaml", "open_tensors", "load_tensors", "read_state", "stream")


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_never_opened(tmp_path, reader):
    """Pipes would wait for a writer, devices never end, and names may be impossible."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = [tmp_path / name for name in ("pipe", "folder", "loop", "none", "x" * 300, "a\0b")]
    for path in (*names, Path("/dev/zero"), Path("/dev/stdin")):
        if not stat.S_ISREG(os.stat("/dev/stdin").st_mode) or str(path) != "/dev/stdin":
            assert len(refusal(lambda path=path: getattr(doors, reader)(path))) < 700


TENSORS = {
    "a number for a name": {7: torch.zeros(1)},
    "integers": {"a": torch.zeros(1, dtype=torch.int64)},
    "truth values": {"a": torch.zeros(1, dtype=torch.bool)},
    "sparse": {"a": torch.zeros(2, 2).to_sparse()},
    "quantised": {"a": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)},
    "eight bits": {"a": torch.zeros(2).to(torch.float8_e4m3fn)},
    "without values": {"a": torch.zeros(2, device="meta")},
    "no tensor": {"a": [1.0]},
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_no_weights(case):
    assert doors.plain_tensors(TENSORS[case])


def test_finiteness_is_exact():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        good = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
        assert doors.not_finite([("a", good), ("none", torch.zeros(0)), ("ids", torch.ones(2).long())]) is None
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = good.clone()
            bad[1, 2] = value
            assert doors.not_finite([("a", good), ("b", bad)]) == "b"


def test_sentences_have_an_end():
    """... and travel between processes."""
    assert len(str(UserError("x" * 10**6))) < LONGEST + 10
    assert short("y" * 10**6 + "\n") and len(short(10**4000)) < 200 and "\n" not in short("a\nb")
    error = doors.Unreadable("file", "reason")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
