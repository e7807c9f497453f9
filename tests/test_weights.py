"""The one reader of weights files: every format, and no code that a file brings along."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from safetensors.torch import save_file

from fvgen.system.weights import DAMAGE, read_weights_file

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.int64)}


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("form", ["zip.pth", "legacy.pth", "it.safetensors"])
def test_every_format_is_read(tmp_path, form):
    file = tmp_path / form
    if form == "it.safetensors":
        save_file(STATE, file)
    else:
        torch.save(STATE, file, _use_new_zipfile_serialization=form == "zip.pth")
    found = read_weights_file(file)
    assert found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_only_named_classes_are_built(tmp_path):
    file = tmp_path / "args.pth"
    torch.save({"args": argparse.Namespace(lr=1)}, file)
    with pytest.raises(UnpicklingError):
        read_weights_file(file)
    assert read_weights_file(file, [argparse.Namespace])["args"].lr == 1
    with pytest.raises(UnpicklingError):  # permission ends with the call
        read_weights_file(file)


def test_nothing_is_ever_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), "bomb.pth")
    with pytest.raises(DAMAGE):
        read_weights_file(Path("bomb.pth"))
    assert not Path("exploded").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_files_cut_short_raise_what_callers_expect(tmp_path, suffix, share):
    file = tmp_path / f"it.{suffix}"
    save_file(STATE, file) if suffix == "safetensors" else torch.save(STATE, file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(DAMAGE):
        read_weights_file(file)
    with pytest.raises(DAMAGE):
        read_weights_file(tmp_path / f"nowhere.{suffix}")
