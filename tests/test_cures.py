"""What a missing package's sentence tells to do: one command, right for a clone and for what pip has put elsewhere."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import torch
from conftest import REPOSITORY

from fvgen import metrics
from fvgen.system import packages


def test_in_a_clone_the_clone_is_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert packages.install("train") == "pip install -e '.[train]'" and packages.install() == "pip install -e ."
    monkeypatch.chdir(tmp_path)
    assert shlex.split(packages.install("photos")) == ["pip", "install", "-e", f"{REPOSITORY}[photos]"]


def test_elsewhere_the_package_that_is_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "CLONE", tmp_path)
    assert shlex.split(packages.install("ui")) == ["pip", "install", "fvgen[ui]"]
    assert packages.install() == "pip install fvgen"


def test_the_command_reaches_the_shell_whole(tmp_path, monkeypatch):
    clone = tmp_path / "a folder's name"
    (clone / "src" / "fvgen").mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(packages, "CLONE", clone)
    done = subprocess.run(["sh", "-c", f"printf '%s\n' {packages.install('eval')}"], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["pip", "install", "-e", f"{clone}[eval]"]


@pytest.mark.parametrize(("package", "scores"), [("lpips", {"lpips"}), ("torch_fidelity", {"fid", "kid"})])
def test_scores_without_their_package(package, scores, monkeypatch, tmp_path):
    """The weights may be there or not: the others have their values, these the command that brings them."""
    monkeypatch.setattr("fvgen.metrics.weights.find_spec", lambda name: None if name == package else object())
    monkeypatch.delenv("FVGEN_DOWNLOAD", raising=False)
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    result = metrics.score_images(images, images.flip(0))
    for name in scores:
        assert (
            result[name] is None
            and f"needs the package {package}; `{packages.install('eval')}`" in (result["why_null"][name])
        )
    assert result["psnr"] is not None and result["ssim"] is not None


def test_nothing_else_tells_how_to_install():
    """No index has fvgen: neither a document nor a sentence may say otherwise, and cures come from one place."""
    said = re.compile(r"pip install (-U )?['\"]?fvgen")
    files = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
    files += [
        file for folder in ("src", "benchmarks", "recipes", "examples") for file in (REPOSITORY / folder).rglob("*.py")
    ]
    told = [file for file in files if said.search(file.read_text())]
    assert not told


def test_what_the_extras_bring_is_not_in_the_core():
    """By the metadata of what is installed here, followed to its end."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    found, left = set(), [Requirement(line) for line in core_requirements()]
    while left:
        needed = left.pop()
        if needed.name.lower() in found:
            continue
        found.add(needed.name.lower())
        try:
            lines = requires(needed.name) or []
        except PackageNotFoundError:
            continue
        every = [Requirement(line) for line in lines]
        left += [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {"torch", "diffusers", "numpy", "huggingface-hub"} <= found
    assert not [name for name in found if re.search("deepspeed|gradio|opencv|gsplat|lpips|fidelity|tensorboard", name)]


def core_requirements() -> list[str]:
    block = (REPOSITORY / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    return re.findall(r'"(.+?)"', block)
