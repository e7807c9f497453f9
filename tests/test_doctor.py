"""`fvgen doctor`: what is missing, old or broken is told with its cure, and never breaks the doctor."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checks import refusal
from conftest import REPOSITORY
from typer.testing import CliRunner

from fvgen.doctor import machine, packages, parts
from fvgen.doctor.report import examine
from fvgen.system.packages import install

# --- Packages: real ones, each broken in a way of its own ---

SOURCES = {
    "fine": "print('noise on stdout')\nimport os; os.system('echo more of it')",
    "ancient": "",
    "raising": "raise RuntimeError('no\\nGPU')",
    "leaving": "raise SystemExit(3)",
    "aborting": "import os; os.abort()",
    "lacking": "import a_module_that_nobody_has",
    "last": "",
}
NO_METADATA = {"lonely": "__version__ = '7.1'"}
LINES = [f"{name}>=1.5" for name in SOURCES] + [
    "lonely>=1",
    "absent>=2; extra == 'photos'",
    "fine>=1; extra == 'photos'",
]


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of these packages with their metadata, before all others."""
    for name, source in (SOURCES | NO_METADATA).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
    for name in SOURCES:
        version = "1.0" if name == "ancient" else "1.6.1+cu130"
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_way_to_be_wrong_is_told_apart(site):
    found = {(one.purpose, one.name): one for one in packages.judge(LINES, ("", "photos"))}
    states = {name: one.state for (purpose, name), one in found.items() if purpose == "core"}
    assert states == {
        "fine": "ok", "last": "ok", "lonely": "ok", "ancient": "old",
        "raising": "broken", "leaving": "broken", "aborting": "broken", "lacking": "broken",
    }  # fmt: skip
    says = {name: one.says for (_, name), one in found.items()}
    assert says["ancient"] == "1.0 is installed, >=1.5 is needed" and "RuntimeError: no GPU" in says["raising"]
    assert "SystemExit: 3" in says["leaving"] and "ends Python (exit code -6)" in says["aborting"]
    cures = {name: one.cure for (_, name), one in found.items()}
    assert cures["ancient"] == "pip install 'ancient>=1.5'"
    assert cures["raising"] == "pip install --force-reinstall --no-deps 'raising>=1.5'"
    assert cures["lacking"] == "pip install --force-reinstall 'lacking>=1.5'"  # with what it lacks
    assert found["core", "lonely"].installed == "7.1" and found["core", "fine"].installed == "1.6.1+cu130"
    # What the core needs already is no lack of the extra.
    assert {name for purpose, name in found if purpose == "photos"} == {"absent", "fine"}
    absent = found["photos", "absent"]
    assert (absent.state, absent.installed, absent.cure) == ("missing", None, install("photos"))


def test_an_import_that_never_ends(site, monkeypatch):
    (site / "ancient" / "__init__.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(packages, "SECONDS", 3)
    answers = packages.imported(["fine", "ancient", "last"])
    assert answers["fine"]["error"] is answers["last"]["error"] is None
    assert answers["ancient"]["error"] == "its import does not end within 3 seconds"


def test_what_a_finder_hides_is_broken_and_not_missing(tmp_path, monkeypatch):
    """Its metadata is there: installing it once more would change nothing."""
    code = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'einops': raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (one,) = packages.judge(["einops>=0.8"], ("",))
    assert one.state == "broken" and one.cure == "pip install --force-reinstall 'einops>=0.8'"


def test_the_requirements_of_an_extra_are_its_own():
    lines = ["a>=1", "b; python_version < '3'", "c>=2; extra == 'x'", "d; (python_version >= '3') and extra == 'x'"]
    assert [one.name for one in packages.needed(lines, "")] == ["a"]
    assert [one.name for one in packages.needed(lines, "x")] == ["c", "d"]


def test_every_extra_has_a_purpose():
    named = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text().partition("optional-dep")[2], re.M)
    assert set(packages.PURPOSES) - {""} == set(named) - {"all", "dev", "select", "ignore", "testpaths", "markers"} - {
        "packages", "exclude", "filterwarnings"
    }  # fmt: skip


# --- The machine ---


def test_variables_that_nothing_reads(monkeypatch):
    monkeypatch.setenv("FVGEN_WEIGTHS", "/w")
    assert ("nothing reads FVGEN_WEIGTHS; did you mean 'FVGEN_WEIGHTS'?", "unset FVGEN_WEIGTHS") in machine.misspelt()


def test_every_variable_that_is_read_is_known():
    read = set()
    for file in (REPOSITORY / "src").rglob("*.py"):
        read |= set(re.findall(r"(?:environ(?:\.get\(|\[)|getenv\()\"(FVGEN_\w+)\"", file.read_text()))
    assert read == set(machine.VARIABLES)


@pytest.mark.parametrize(("text", "limit"), [("2000000000\n", 2.0), ("max\n", None)])
def test_a_containers_memory_counts(monkeypatch, text, limit):
    monkeypatch.setattr(machine, "read_text", lambda path: text)
    found = machine.hardware()
    assert found["memory_gb"] == limit if limit else found["memory_gb"] > 1
    assert found["memory_free_gb"] <= found["memory_gb"] and found["cores"] >= 1


def test_a_gpu_that_torch_does_not_see(tmp_path, monkeypatch):
    cpu = [{"device": "cpu"}]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.idle_gpu({"cuda": None, "devices": cpu}) is None  # no driver, no GPU
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.idle_gpu({"cuda": "13.2", "devices": [*cpu, {"device": "cuda:0"}]}) is None
    assert "built for CPUs alone" in machine.idle_gpu({"cuda": None, "devices": cpu})[0]
    assert "the driver does not serve" in machine.idle_gpu({"cuda": "13.2", "devices": cpu})[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.idle_gpu({"cuda": "13.2", "devices": cpu})[1] == "unset CUDA_VISIBLE_DEVICES"


def test_disks_are_judged_where_their_folders_will_be(tmp_path, monkeypatch):
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "not" / "yet"))
    (cache,) = [one for one in machine.disks() if one["what"] == "fvgen's cache"]
    assert cache["path"] == str(tmp_path / "not" / "yet") and cache["writable"] and cache["free_gb"] > 0
    assert not (tmp_path / "not").exists()


# --- Weights ---


@pytest.fixture
def no_weights(tmp_path, monkeypatch) -> Path:
    for name in ("FVGEN_WEIGHTS", "FVGEN_DOWNLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return tmp_path


def test_metrics_without_weights_with_damaged_and_with_whole_ones(no_weights, monkeypatch):
    pytest.importorskip("lpips")
    states = lambda: {one.name: (one.state, one.says) for one in parts.metrics()}  # noqa: E731
    found = states()
    assert {name: state for name, (state, _) in found.items()} == {
        "psnr, ssim": "ok", "lpips": "missing", "fid, kid": "missing", "kid_squeeze": "missing"
    }  # fmt: skip
    assert all(one.cure.startswith("export FVGEN_WEIGHTS=") for one in parts.metrics() if one.state == "missing")
    monkeypatch.setenv("FVGEN_WEIGHTS", str(no_weights))
    file = no_weights / "squeezenet1_1-b8a52dc0.pth"
    file.write_bytes(b"x" * 100)
    assert states()["lpips"][0] == "broken" and str(file) in states()["kid_squeeze"][1]
    from safetensors.torch import save_file

    file.unlink()
    save_file({"a": torch.zeros(1)}, no_weights / "squeezenet1_1_fp16.safetensors")
    assert states()["lpips"][0] == "ok"
    monkeypatch.setenv("FVGEN_WEIGHTS", str(no_weights / "none"))
    assert states()["lpips"] == ("broken", refusal(lambda: parts_found()))


def parts_found() -> None:
    from fvgen.metrics.weights import SQUEEZENET, found

    found(SQUEEZENET)


def test_nothing_is_downloaded_even_where_it_is_allowed(no_weights, monkeypatch):
    monkeypatch.setenv("FVGEN_DOWNLOAD", "1")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("it downloads"))
    assert {one.state for one in parts.metrics()} == {"ok", "missing"}


# --- The self-test ---


def test_the_shipped_model_passes():
    from fvgen.doctor.selftest import self_test

    found = self_test()
    assert found["shape"] == [8, 3, 48, 64] and found["psnr"] > found["render_psnr"] + 3


def test_a_model_that_has_forgotten_everything(shipped, tmp_path):
    """Whole and finite, and yet of no use."""
    from safetensors.torch import load_file, save_file

    from fvgen.doctor.selftest import self_test

    folder = tmp_path / "forgetful"
    shutil.copytree(shipped, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(0)
    shuffled = {name: x.flatten()[torch.randperm(x.numel())].reshape(x.shape) for name, x in load_file(file).items()}
    save_file(shuffled, file)
    assert "no better than what needs no model" in refusal(lambda: self_test(model=folder))


def test_videos_that_are_wrong():
    from fvgen.clips.rooms import synthetic_clip
    from fvgen.doctor.selftest import judged

    clip = synthetic_clip("test", 0, 1, 4, 32, 48)
    assert judged(clip.truth, clip)["psnr"] == 100
    wrong = {"shape": clip.truth[:3], "NaN": clip.truth / 0, "range": clip.truth + 1, "render": clip.render}
    wrong["one colour"] = clip.truth.mean(dim=(2, 3), keepdim=True).expand_as(clip.truth)
    for word, video in wrong.items():
        assert word in refusal(lambda video=video: judged(video, clip))


# --- The whole ---

KINDS = {
    "fvgen": str, "folder": str, "ok": bool, "python": dict, "torch": dict, "hardware": dict, "disks": list,
    "network": dict, "variables": dict, "packages": list, "parts": list, "self_tests": list, "advice": list,
}  # fmt: skip


def doctor(monkeypatch, lines: list[str], *words: str):
    """The command, asked about few packages: the others take seconds to import."""
    monkeypatch.setattr(packages, "requirements", lambda: lines)
    from fvgen.cli import app

    return CliRunner().invoke(app, ["doctor", *words], env={"COLUMNS": "100"})


def test_the_document_is_what_the_docs_say(monkeypatch, no_weights):
    outcome = doctor(monkeypatch, ["einops>=0.8", "nobody-has-this>=2; extra == 'ui'"], "--json")
    report = json.loads(outcome.stdout)
    assert outcome.exit_code == 0 and report["ok"] is True
    assert {key: type(value) for key, value in report.items()} == KINDS
    rows = re.findall(r"^\| (`.+?) \|", (REPOSITORY / "docs" / "doctor.md").read_text(), re.M)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(KINDS)
    assert {"what": "ui: nobody-has-this not installed", "cure": install("ui"), "fails": False} in report["advice"]
    assert report["self_tests"][0]["error"] is None and report["torch"]["devices"][0]["device"] == "cpu"


def test_a_core_that_lacks_a_package(monkeypatch):
    outcome = doctor(monkeypatch, ["nobody-has-this>=2"])
    assert outcome.exit_code == 1
    assert (
        "FAILS: core: nobody-has-this not installed" in outcome.stdout and "Self-test on cpu passed" in outcome.stdout
    )


def test_a_self_test_that_fails(monkeypatch):
    from fvgen.doctor import selftest

    monkeypatch.setattr(selftest, "synthetic_clip", lambda *_: 1 / 0)
    outcome = doctor(monkeypatch, ["einops>=0.8"])
    assert outcome.exit_code == 1 and "Self-test on cpu FAILED: ZeroDivisionError: division by zero" in outcome.stdout


def test_a_torch_that_cannot_be_imported(monkeypatch):
    for name in ("fvgen.doctor.parts", "fvgen.doctor.selftest", "fvgen.metrics.weights"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    report = examine([])
    assert report["ok"] is False and report["torch"] is None and report["parts"] is None
    assert report["self_tests"][0]["error"].startswith("ModuleNotFoundError")
    assert any("torch cannot be used" in one["what"] and one["fails"] for one in report["advice"])
