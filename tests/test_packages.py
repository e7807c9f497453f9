"""Wheel and sdist: what they hold, and that they work outside the repository as a user's `pip install` leaves them."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

from fvgen import __version__

pytest.importorskip("hatchling", reason="hatchling, which builds the package, is not installed")


def run(*words: object, cwd: Path, **changes: str) -> str:
    """What a command prints; nothing of this repository is on its path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FVGEN_WEIGHTS")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | changes,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def export(folder: Path) -> Path:
    """The files of this checkout as a clone would have them: those that git knows or would take."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    for name in filter(None, names):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, sdist), with what a working copy has besides: results of runs and of builds."""
    clone = export(tmp_path_factory.mktemp("clone"))
    for name in ("runs/demo", "build", ".venv/lib"):
        (clone / name).mkdir(parents=True)
        (clone / name / "left.py").touch()
    out = clone.with_name("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", out, "-t", "sdist", "-t", "wheel", cwd=clone)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def names_in(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    return {name.partition("/")[2] for name in tarfile.open(archive).getnames()}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = names_in(built[0])
    tracked = subprocess.run(["git", "ls-files", "src/fvgen"], cwd=REPOSITORY, capture_output=True, text=True).stdout
    package = {name.removeprefix("src/") for name in tracked.split() if (REPOSITORY / name).is_file()}
    assert package <= names
    assert {name.split("/")[0] for name in names} == {"fvgen", f"fvgen-{__version__}.dist-info"}
    for needed in ("weights/tiny/model_index.json", "weights/tiny/unet/diffusion_pytorch_model.safetensors"):
        assert f"fvgen/{needed}" in names
    for needed in (
        "configs/tiny.yaml",
        "reports/page.html.jinja",
        "reports/contact_sheet.html.jinja",
        "splats/viewer.html",
    ):
        assert f"fvgen/{needed}" in names
    assert built[0].stat().st_size < 20e6


def test_the_sdist_makes_the_same_wheel(built, tmp_path):
    wheel, sdist = built
    names = names_in(sdist)
    assert {"pyproject.toml", "README.md", "LICENSE", "src/fvgen/cli.py"} <= names
    assert not [name for name in names if name.startswith(("runs", ".venv", "build", "tests"))]
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)  # of our own making
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-d", tmp_path / "again", "-t", "wheel", cwd=source)
    assert names_in(next((tmp_path / "again").glob("*.whl"))) == names_in(wheel)


def test_the_wheel_says_what_it_is(built):
    archive = zipfile.ZipFile(built[0])
    facts = email.message_from_bytes(archive.read(f"fvgen-{__version__}.dist-info/METADATA"))
    assert facts["Version"] == __version__ and facts["Requires-Python"] == ">=3.10"
    assert set(facts.get_all("Provides-Extra")) == {"train", "photos", "ui", "eval", "scene", "all", "dev"}
    core = [line for line in facts.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in core if re.match("deepspeed|gradio|opencv|lpips|gsplat|peft|av|pycolmap", line)]
    every = {re.split("[>;]", line)[0] for line in facts.get_all("Requires-Dist") if "extra == 'all'" in line}
    assert {"deepspeed", "opencv-python-headless", "gradio", "lpips", "gsplat"} <= every and "pytest" not in every
    assert f"## {__version__}" in (REPOSITORY / "CHANGELOG.md").read_text().splitlines()


def test_make_and_docker_install_extras_that_there_are():
    extras = set(re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.M))
    docker = (REPOSITORY / "Dockerfile").read_text()
    (words,) = re.findall(r"'\.\[(.+?)\]'", docker)
    assert set(words.split(",")) <= extras
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", docker, re.M) for name in line.split()]
    assert copied and all((REPOSITORY / name).exists() for name in copied)
    words = subprocess.run(
        ["make", "-n", "env-train", "VENV=none"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout
    assert set(re.findall(r"'\.\[(.+?)\]'", words)[0].split(",")) == {"train", "photos", "eval"}


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(built, tmp_path):
    """In an environment of its own, whose other packages are those that are installed here."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python, fvgen = home / "bin" / "python", home / "bin" / "fvgen"
    (packages,) = (home / "lib").glob("python*/site-packages")
    # Plain paths: the .pth files in these folders, an editable install of fvgen among them, are not read.
    others = [path for path in [*site.getsitepackages(), *sys.path] if "site-packages" in path]
    (packages / "others.pth").write_text("\n".join(dict.fromkeys(others)) + "\n")
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", built[0], cwd=tmp_path)

    work = tmp_path / "work"
    work.mkdir()
    cache = {"FVGEN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "FVGEN_PROGRESS": "0"}
    assert run(fvgen, "--version", cwd=work) == f"fvgen {__version__}\n"
    report = json.loads(run(fvgen, "doctor", "--json", cwd=work, **cache))
    assert report["ok"] and report["fvgen"] == __version__ and report["folder"] == str(packages / "fvgen")
    assert report["self_tests"][0]["error"] is None and not list(work.iterdir())
    cures = [one["cure"] for one in report["advice"] if one["what"].startswith(("ui", "scene", "photos"))]
    assert all(cure.startswith("pip install 'fvgen[") or cure.startswith("pip install --force") for cure in cures)
    # Such a command asks no index for fvgen: the list of packages is that of the wheel.
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", "fvgen[ui]", cwd=work)

    make_clips = (
        "from fvgen.clips.folder import save_clips\n"
        "from fvgen.clips.rooms import synthetic_clip\n"
        "save_clips('clips', [synthetic_clip('test', 0, n, 8, 48, 64) for n in range(4)], {'kind': 'test'})\n"
    )
    run(python, "-c", make_clips, cwd=work)
    preset = packages / "fvgen" / "configs" / "tiny.yaml"
    text = re.sub(r"(iterations|batch_size): \d+", r"\1: 2", preset.read_text())
    preset.write_text(re.sub(r"head_warmup: \d+", "head_warmup: 1", text))
    run(fvgen, "demo", "--data", "clips", "--held-out", "clips", "--out", "demo", cwd=work, **cache)
    assert (work / "demo" / "report.html").is_file() and (work / "demo" / "student" / "model_index.json").is_file()
