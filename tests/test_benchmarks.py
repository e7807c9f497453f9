"""Benchmarks, as far as seconds allow: the port gives our outputs, the tiny preset runs, pages match their figures."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import pytest
from conftest import REPOSITORY


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


@pytest.mark.parametrize("shared_tokens", [False, True])
def test_the_port_of_the_original_operations_gives_our_outputs(shipped, shared_tokens):
    row = import_module("unet_ops").compare(batch=1, repeats=1, shared_tokens=shared_tokens)
    assert row["largest_difference"] < 1e-4 and row["ours_ms"] > 0


def test_full_size_runs_at_tiny_size(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["full_size.py", "--preset", "tiny", "--out", str(out)])
    import_module("full_size").main()
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["what"] for row in result["rows"]][1:] == ["forward", "forward and backward, activation checkpointing"]
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0 for row in result["rows"])
    assert f"{result['parameters']:,} parameters" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["prepare", "points"])
def test_pages_say_what_was_measured(name):
    """Nobody has edited one without the other, and the pages of past runs can still be written."""
    results = REPOSITORY / "benchmarks" / "results" / name
    page = import_module(name).note(json.loads(results.with_suffix(".json").read_text()))
    assert page == results.with_suffix(".md").read_text()
