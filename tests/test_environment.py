"""What surrounds a command: no home, an output full or closed, a narrow terminal, names that are no text, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scene_files import document, write_depth, write_nerfstudio

REPOSITORY = Path(__file__).resolve().parents[1]


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY / "src")} | changes


def fvgen(*words: object, folder: Path, stdout: object = subprocess.PIPE, **options) -> subprocess.CompletedProcess:
    """The command in a Python of its own."""
    command = [sys.executable, "-m", "fvgen.cli", *[os.fspath(w) if isinstance(w, Path) else w for w in words]]
    options = {"env": environment()} | options
    return subprocess.run(command, cwd=folder, stdout=stdout, stderr=subprocess.PIPE, timeout=600, **options)


def sentence(done: subprocess.CompletedProcess, code: int = 2) -> str:
    said = done.stderr.decode()
    assert done.returncode == code and said.startswith("fvgen: ") and said.count("\n") == 1, (done.returncode, said)
    return said


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scene"
    folder.mkdir()
    write_depth(folder)
    write_nerfstudio(folder, document(depth=True))
    return folder


MISTAKES = {
    "demo": ["--data", "none", "--out", "o"],
    "inspect": ["none", "--out", "x.html"],
    "prepare": ["none", "--out", "o"],
    "generate": ["none.jpg", "--out", "o"],
    "evaluate": ["none", "none"],
    "reconstruct": ["none"],
    "plan": ["--config", "none"],
    "convert": ["--config", "none", "--checkpoint", "none", "--out", "x"],
    "export": ["none", "--out", "x"],
    "diagnose": ["none"],
    "report": ["none", "--out", "x.html"],
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_path_that_is_not_there_is_told_without_the_imports_that_take_seconds(tmp_path, command):
    """Whatever the machine does besides: counted are modules."""
    code = (
        "import sys, fvgen.cli\n"
        "try: fvgen.cli.main()\n"
        "finally: print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, command, *MISTAKES[command]]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, timeout=600, check=False)
    assert "does not exist" in sentence(done) and done.stdout == b"[]\n"
    assert not list(tmp_path.iterdir())


def test_importing_fvgen_and_its_help_import_nothing_that_takes_seconds(tmp_path):
    """Counted are modules: seconds would be the machine's. Measured: 0.02 s for the import, 0.3 s for the help."""
    heavy = {"torch", "torchvision", "numpy", "scipy", "PIL", "yaml", "pydantic", "jinja2", "diffusers", "transformers"}
    heavy |= {"accelerate", "huggingface_hub", "safetensors", "torchmetrics", "deepspeed", "peft", "cv2", "psutil"}
    code = (
        "import sys, fvgen\n"
        "small = {name for name in sys.modules if name.startswith('fvgen')} | {'typer', 'rich'} & set(sys.modules)\n"
        "import fvgen.cli\n"
        "try: fvgen.cli.main()\n"
        "finally: print(sorted(small), sorted(sys.modules))"
    )
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, timeout=600, check=True)
    small, loaded = re.findall(r"\[[^\]]*\]", done.stdout.decode().splitlines()[-1])
    assert small == "['fvgen']"
    assert "'typer'" in loaded and not [name for name in sorted(heavy) if f"'{name}'" in loaded]


def test_the_version_is_told_whatever_follows(tmp_path):
    from fvgen import __version__

    for words in (["--version"], ["--version", "demo"]):
        done = fvgen(*words, folder=tmp_path)
        assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"fvgen {__version__}\n", b"")


def test_a_terminal_of_twenty_columns(tmp_path):
    said = sentence(
        fvgen("demo", "--data", "none", "--out", "o", folder=tmp_path, env=environment(COLUMNS="20", TERM="dumb"))
    )
    assert "data folder none does not exist" in said
    assert fvgen("demo", "--help", folder=tmp_path, env=environment(COLUMNS="20")).returncode == 0


def test_names_that_are_no_text(tmp_path):
    said = sentence(fvgen("inspect", b"\xff\xfe-scene", "--out", b"\xff.html", folder=tmp_path))
    assert "does not exist" in said and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_output_that_takes_nothing(scene, tmp_path):
    """A page is written whole; that nobody can be told is a sentence of its own, and no traceback."""
    with open("/dev/full", "wb") as full:
        done = fvgen("inspect", scene, "--out", tmp_path / "page.html", folder=tmp_path, stdout=full)
    assert "No space left on device" in sentence(done)
    assert (tmp_path / "page.html").read_text().rstrip().endswith("</html>")
    reader, writer = os.pipe()
    os.close(reader)
    done = fvgen("inspect", scene, "--out", tmp_path / "page.html", folder=tmp_path, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
def test_an_output_that_is_closed(scene, tmp_path):
    words = [sys.executable, "-m", "fvgen.cli", "inspect", scene, "--out", tmp_path / "page.html"]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *map(str, words)]
    done = subprocess.run(closed, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, timeout=600, check=False)
    assert b"Traceback" not in done.stderr and (tmp_path / "page.html").is_file()


@pytest.mark.slow
def test_a_user_without_a_home(tmp_path):
    """As a container has them: an id that no file names. Only built-in clips need a place of their own."""
    code = (
        "import pwd, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = unknown\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [REPOSITORY / "recipes" / "stage1_gan.py", "--config", REPOSITORY / "recipes" / "configs" / "tiny.yaml"]
    lone = {k: v for k, v in environment().items() if k not in ("HOME", "XDG_CACHE_HOME", "FVGEN_CACHE")}
    command = [sys.executable, "-c", code, *map(str, words), "clips=2", f"out={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=tmp_path, env=lone, capture_output=True, timeout=600, check=False)
    assert "there is no home folder for fvgen's cache; name a folder for it in FVGEN_CACHE" in sentence(done)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.05, 0.3, 1.0, 3.0])
def test_ctrl_c_before_anything_happened(tmp_path, moment):
    """In the middle of imports: the exit code says that it was interrupted, and nothing is there."""
    words = [sys.executable, "-m", "fvgen.cli", "demo", "--out", str(tmp_path / "demo")]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    # Before ours is up, Python itself ends the process by the signal, or, while it imports its site module, with 1.
    assert process.returncode in (130, -signal.SIGINT) or (process.returncode == 1 and b"site" in said)
    if process.returncode == 130:
        assert said.decode().startswith("fvgen: interrupted") and said.count(b"\n") == 1
    assert not (tmp_path / "demo").exists()
