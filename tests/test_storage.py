"""Whole or absent, whatever happens: exceptions, a killed process, a disk that takes no more."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fvgen.errors import UserError, did_you_mean
from fvgen.system.files import (
    append_line,
    atomic_path,
    no_leftovers,
    recover,
    writable_folder,
    write_json,
    write_tensors,
)


def write_file(path: Path, text: str) -> None:
    path.write_text(text)


def write_folder(path: Path, text: str) -> None:
    (path / "deep").mkdir(parents=True)
    (path / "deep" / "file").write_text(text)


def content(path: Path) -> str:
    return (path / "deep" / "file" if path.is_dir() else path).read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


KINDS = pytest.mark.parametrize("write", [write_file, write_folder])


# --- Success and failure ---


@KINDS
def test_a_new_thing_appears_when_it_is_whole(tmp_path, write):
    target = tmp_path / "new" / "parents" / "thing"
    with atomic_path(target) as temporary:
        write(temporary, "first")
        assert not target.exists()
    assert content(target) == "first" and names(target.parent) == ["thing"]


@KINDS
@pytest.mark.parametrize("old", [write_file, write_folder])
def test_an_old_thing_is_replaced(tmp_path, write, old):
    target = tmp_path / "thing"
    old(target, "old")
    if old is write_folder and write is write_file:  # a folder never falls to a file of the same name
        with pytest.raises(UserError, match="Is a directory"), atomic_path(target) as temporary:
            write(temporary, "new")
        assert content(target) == "old"
    else:
        with atomic_path(target) as temporary:
            write(temporary, "new")
            assert content(target) == "old"
        assert content(target) == "new"
    assert names(tmp_path) == ["thing"]


@KINDS
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), UserError("a sentence")])
def test_a_failure_leaves_the_old_thing_and_passes_through(tmp_path, write, error):
    target = tmp_path / "thing"
    write(target, "old")
    with pytest.raises(type(error)) as caught, atomic_path(target) as temporary:
        write(temporary, "half")
        raise error
    assert caught.value is error
    assert content(target) == "old" and names(tmp_path) == ["thing"]


@KINDS
def test_a_failure_leaves_nothing_where_nothing_was(tmp_path, write):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "thing") as temporary:
        write(temporary, "half")
        _ = 1 / 0
    assert names(tmp_path) == []


def test_a_body_that_writes_nothing_is_no_success(tmp_path):
    write_file(tmp_path / "thing", "old")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "thing"):
        pass
    assert content(tmp_path / "thing") == "old"


def test_a_users_own_backup_beside_it_is_left_alone(tmp_path):
    write_folder(tmp_path / "thing", "old")
    write_folder(tmp_path / "thing.old", "a backup")
    with atomic_path(tmp_path / "thing") as temporary:
        write_folder(temporary, "new")
    recover(tmp_path / "thing")
    assert content(tmp_path / "thing.old") == "a backup" and content(tmp_path / "thing") == "new"


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    write_folder(tmp_path / "elsewhere", "target")
    (tmp_path / "thing").symlink_to(tmp_path / "elsewhere")
    with atomic_path(tmp_path / "thing") as temporary:
        write_folder(temporary, "new")
    assert content(tmp_path / "elsewhere") == "target" and content(tmp_path / "thing") == "new"
    assert names(tmp_path) == ["elsewhere", "thing"]


# --- A killed process ---

KILLED = """
import os, signal, sys
from pathlib import Path
from fvgen.system.files import atomic_path

target, after = Path(sys.argv[1]), int(sys.argv[2])
replace, calls = os.replace, []


def replace_then_die(*paths):
    replace(*paths)
    calls.append(paths)
    if len(calls) == after:
        os.kill(os.getpid(), signal.SIGKILL)


os.replace = replace_then_die
with atomic_path(target) as temporary:
    (temporary / "deep").mkdir(parents=True)
    (temporary / "deep" / "file").write_text("new")
    if after == 0:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("renames", "survivor"), [(0, "old"), (1, "old"), (2, "new")])
def test_kill_at_any_point(tmp_path, renames, survivor):
    """SIGKILL in the body, between the two renames, and before the old folder is deleted."""
    target = tmp_path / "thing"
    write_folder(target, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(renames)], check=False)
    assert done.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2  # the thing and a leftover
    recover(target)
    assert content(target) == survivor and names(tmp_path) == ["thing"]


def test_the_next_write_recovers_by_itself(tmp_path):
    target = tmp_path / "thing"
    write_folder(target, "old")
    subprocess.run([sys.executable, "-c", KILLED, str(target), "1"], check=False)
    with pytest.raises(ValueError, match="mine"), atomic_path(target) as temporary:
        write_folder(temporary, "half")
        raise ValueError("mine")
    assert content(target) == "old" and names(tmp_path) == ["thing"]


def test_recover_of_nothing_is_nothing(tmp_path):
    recover(tmp_path / "thing")
    write_file(tmp_path / "thing", "old")
    recover(tmp_path / "thing")
    assert content(tmp_path / "thing") == "old"


# --- A disk that takes no more ---

FULL = """
import json, resource, shutil, signal, sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from fvgen.errors import UserError
from fvgen.system.files import append_line, atomic_path

folder = Path(sys.argv[1])
large = {"weight": torch.zeros(100_000)}
(folder / "source").mkdir()
save_file(large, folder / "source" / "file")
writers = {
    "plain": lambda path: path.write_bytes(bytes(400_000)),
    "torch": lambda path: torch.save(large, path),
    "safetensors": lambda path: save_file(large, path),
    "copytree": lambda path: shutil.copytree(folder / "source", path),
}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write beyond the limit fails instead of killing
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
said = {}
for name, write in writers.items():
    (folder / name).write_text("old")
    try:
        with atomic_path(folder / name) as temporary:
            write(temporary)
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
line = "x" * 9_999  # with what follows, the limit falls into the fifth
try:
    for _ in range(9):
        append_line(folder / "lines", line + "y" * 2_000)
except Exception as error:
    said["lines"] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


def test_writes_that_fail_for_want_of_space(tmp_path):
    """Real failing writes, by a limit on the size of files: whoever writes, the user reads the same sentence."""
    script = [sys.executable, "-c", FULL, str(tmp_path)]
    said = json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    assert sorted(said) == ["copytree", "lines", "plain", "safetensors", "torch"]
    lines = (tmp_path / "lines").read_text()
    assert lines == ("x" * 9_999 + "y" * 2_000 + "\n") * 4  # whole lines only
    (tmp_path / "lines").write_text("old")
    for name, (kind, sentence) in said.items():
        assert kind == "CannotWrite", (name, sentence)
        assert sentence == (
            f"cannot write {tmp_path / name}: the disk is full; free some space and run the same command again"
        )
        assert content(tmp_path / name) == "old"
    assert names(tmp_path) == ["copytree", "lines", "plain", "safetensors", "source", "torch"]


def test_no_space_left_at_all(tmp_path):
    """The kernel's own ENOSPC, from the device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match="the disk is full") as caught, atomic_path(tmp_path / "thing") as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x")
    assert caught.value.__cause__.errno == errno.ENOSPC and names(tmp_path) == []


# --- Places where nothing can be written ---


@pytest.mark.parametrize("below", ["file/thing", "file/deeper/thing"])
def test_a_path_below_a_file(tmp_path, below):
    write_file(tmp_path / "file", "old")
    target = tmp_path / below
    reason = "a file stands where a folder should be"
    with pytest.raises(UserError) as caught, atomic_path(target):
        pytest.fail("there is no place to write to")
    assert str(caught.value) == f"cannot write {target}: {reason}; choose another output folder"
    with pytest.raises(UserError) as caught:
        writable_folder(target)
    assert str(caught.value) == f"output folder {target} cannot be written ({reason}); choose another one"
    with pytest.raises(UserError, match="cannot write"):
        write_json(target, {})
    assert names(tmp_path) == ["file"] and content(tmp_path / "file") == "old"


def test_a_file_is_no_output_folder(tmp_path):
    write_file(tmp_path / "file", "old")
    with pytest.raises(UserError, match="cannot be written"):
        writable_folder(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied; choose another"), atomic_path(tmp_path / "a") as temporary:
        write_file(temporary, "new")
    with pytest.raises(UserError, match="Permission denied"):
        writable_folder(tmp_path / "b")


def test_errors_about_something_else_are_not_blamed_on_the_disk(tmp_path):
    """A file cut short raises in torch.load; that is no reason to ask for more space."""
    torch.save({"a": torch.zeros(100)}, tmp_path / "short")
    (tmp_path / "short").write_bytes((tmp_path / "short").read_bytes()[:500])
    with pytest.raises(RuntimeError) as caught, atomic_path(tmp_path / "thing"):
        torch.load(tmp_path / "short", weights_only=True)
    assert not isinstance(caught.value, UserError)
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "thing"):
        (tmp_path / "missing").read_text()


# --- The rest ---


def test_writable_folder_makes_it_and_leaves_no_probe(tmp_path):
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path / "a" / "b") == []
    assert writable_folder(str(tmp_path / "a")) == tmp_path / "a"


def test_write_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == value
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == value and names(tmp_path) == ["x.json"]


def test_append_line(tmp_path):
    for line in ("a", "", "ü"):
        append_line(tmp_path / "lines", line)
    assert (tmp_path / "lines").read_bytes() == "a\n\nü\n".encode()
    with pytest.raises(UserError, match="cannot write"):
        append_line(tmp_path / "lines" / "below", "x")


def test_no_leftovers_removes_only_what_is_new(tmp_path):
    write_folder(tmp_path / "there", "old")
    with no_leftovers(tmp_path / "there", tmp_path / "made"):
        write_folder(tmp_path / "made", "kept on success")
    assert names(tmp_path) == ["made", "there"]
    with (
        pytest.raises(ValueError, match="mine"),
        no_leftovers(tmp_path / "there", tmp_path / "new", tmp_path / "never"),
    ):
        write_folder(tmp_path / "new", "x")
        raise ValueError("mine")
    assert names(tmp_path) == ["made", "there"] and content(tmp_path / "there") == "old"


def test_did_you_mean():
    assert did_you_mean("sede", ["seed", "steps"]) == "; did you mean 'seed'?"
    assert did_you_mean("zzz", {"b": 1, "a": 2}) == "; known are a, b"
    assert issubclass(UserError, ValueError)


def test_ctrl_c_leaves_no_new_folder(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    with pytest.raises(KeyboardInterrupt), no_leftovers(new, old):
        new.mkdir()
        raise KeyboardInterrupt
    assert old.exists() and not new.exists()


def test_what_a_kill_leaves_of_weights_is_known_by_our_name(tmp_path, monkeypatch):
    """safetensors writes under a name of its own beside the file; that stays within a folder of ours."""

    def killed(tensors, file, metadata=None):
        (Path(file).parent / ".tmpQ7w3Kd").write_bytes(b"half")
        raise SystemExit

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    monkeypatch.setattr("fvgen.system.files.remove", lambda path: None)  # the process is gone
    with pytest.raises(SystemExit):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("x.safetensors.partial-")
    recover(tmp_path / "x.safetensors")  # this process is alive: it may be at work
    assert left.exists()
    dead = left.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", "-4194305-")))  # above any Linux has
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    assert not dead.exists() and [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
