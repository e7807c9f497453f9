"""Verdicts and the teacher's curve of benchmarks/tables.py; the tables themselves are slow."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from importlib import import_module

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
verdicts = import_module("verdicts")
tables = import_module("tables")
TABLE2, TABLE3, FEW = (import_module(name).TABLE for name in ("table2_distillation", "table3_ablation", "few_steps"))


@pytest.mark.parametrize(
    ("mean", "half", "metric", "expected"),
    [
        (-0.02, 0.01, "lpips", "reproduced"),
        (0.02, 0.01, "lpips", "not reproduced"),
        (-0.02, 0.03, "lpips", "undecided"),
        (0.3, 0.1, "psnr", "reproduced"),
        (-0.3, 0.1, "psnr", "not reproduced"),
        (-0.3, math.nan, "psnr", "undecided"),
    ],
)
def test_a_verdict_needs_an_interval_clear_of_zero(mean, half, metric, expected):
    assert verdicts.verdict({"mean": mean, "half_width": half}, metric) == expected


def test_the_teachers_curve_is_linear_between_its_points_and_ends_at_its_ends():
    curve = [(0.2, 23.0), (0.3, 24.0), (0.19, 22.0)]
    assert verdicts.psnr_at_equal_lpips(curve, 0.25) == pytest.approx(23.5)
    assert verdicts.psnr_at_equal_lpips(curve, 0.195) == pytest.approx(22.5)
    assert verdicts.psnr_at_equal_lpips(curve, 0.18) is None and verdicts.psnr_at_equal_lpips([], 0.2) is None


def test_every_row_has_its_file_and_equal_iterations(tmp_path):
    settings = tables.Settings.read("tiny")
    for table in (TABLE2, TABLE3, FEW):
        names = {*table.rows}
        assert all({claim.better, claim.worse} <= names for claim in table.claims)
        for file in table.rows.values():
            words = settings.words(file, 0, tmp_path)
            stages = tables.distill.read_stages(words[0], words[1:])
            assert sum(stage.run.iterations for stage in stages) == 60
    one = tables.distill.read_stages(*_split(settings.words(FEW.rows["FVGen, 1 step"], 0, tmp_path)))
    assert [stage.method.student_steps for stage in one] == [1, 1]
    every = tables.distill.read_stages(*_split(settings.words(FEW.rows["FVGen, any step,"], 0, tmp_path)))
    assert all(stage.method.any_step for stage in every)


def _split(words: list[str]) -> tuple[str, list[str]]:
    return words[0], words[1:]


def test_a_table_from_results(tmp_path):
    """Two rows and the untrained of three seeds, made up: means, the best way as baseline, verdicts."""
    settings = tables.Settings.read("tiny")

    def row(lpips: float, psnr: float, **more) -> dict:
        return {
            "nfe": 4,
            "steps": 4,
            "ssim": 0.6,
            "kid_squeeze": lpips,
            "fid": None,
            "lpips": lpips,
            "psnr": psnr,
        } | more

    for seed in settings.seeds:
        shift = 0.001 * seed
        untrained = [
            row(0.45 + shift, 14, way="render", steps=0),
            row(0.20 + shift, 22, steps=50),
            row(0.22 + shift, 23, way="renoise, plain"),
            row(0.21 + shift, 22.9, way="DDIM eta 0, plain"),
            row(0.30 + shift, 24, way="DDIM eta 0, plain", steps=1),
        ]
        done = {"iterations": 60}
        made = {
            "untrained": untrained,
            "fvgen": [row(0.195 + 2 * shift, 22.8, **done)],
            "dmd2": [row(0.205 + shift, 22.1, **done)],
            "dmd,any_step=true": [row(0.23 + shift, 23, **done, steps=1), row(0.2, 22, **done)],
        }
        for name, rows in made.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{seed}.json").write_text(json.dumps({"rows": rows}))
    facts = dict.fromkeys(("command", "commit", "hardware", "data", "clips", "seeds"), "?")
    result = tables.result_of(TABLE2, settings, tmp_path, facts)
    assert result["baseline"] == "teacher, 4 steps, DDIM eta 0, plain"
    assert result["rows"]["FVGen"]["lpips"] == pytest.approx(0.197)
    assert result["rows"]["FVGen"]["minus_baseline"]["lpips"]["mean"] == pytest.approx(-0.014)
    assert result["rows"]["DMD2"]["psnr_above_teachers_curve"] == pytest.approx(22.1 - 22.45)
    assert result["rows"]["FVGen"]["psnr_above_teachers_curve"] is None  # better than the teacher ever is
    found = {(claim["claim"], claim["metric"]): claim["found"] for claim in result["claims"]}
    assert found["FVGen beats DMD2", "lpips"] == "reproduced"
    assert found["FVGen beats CausVid", "lpips"] == "not run"
    assert result["rows"]["DMD2"]["gap_closed"] == pytest.approx(0.5)  # .205 between .21 and .20
    few = tables.result_of(FEW, settings, tmp_path, facts)["rows"]
    assert few["DMD, any step, in 1 steps"]["baseline"] == "teacher, 1 steps, DDIM eta 0, plain"
    assert few["DMD, any step, in 1 steps"]["gap_closed"] == pytest.approx(0.7)  # .23 between .30 and .20
    assert few["DMD, any step, in 4 steps"]["nfe"] == 4 and "DMD, 1 step" not in few
    page = tables.markdown(TABLE2, result)
    assert "| FVGen | 4 |" in page and "0.1970 (-0.0140 ± " in page


def test_a_page_keeps_the_rows_that_were_not_asked_for(tmp_path):
    facts = {"data": "builtin", "clips": "16 to 23", "seeds": [0]}
    row = {"steps": 4, "nfe": 4, "psnr": 22.0, "ssim": 0.6, "lpips": 0.2, "kid_squeeze": 0.8, "fid": None}
    earlier = {
        "FVGen": [row],
        "teacher, 4 steps, renoise, plain": [row | {"way": "renoise, plain"}],
        "DMD, any step, in 4 steps": [row],
    }
    page = tmp_path / "page.json"
    page.write_text(json.dumps(facts | {"by_seed": earlier}))
    kept = tables.kept_rows(page, facts, ["DMD2", "DMD, any step,"])
    assert list(kept) == ["FVGen", "teacher, 4 steps, renoise, plain"]
    assert tables.kept_rows(page, facts | {"clips": "0 to 7"}, []) == {}  # other clips, another table
    assert tables.kept_rows(tmp_path / "none.json", facts, []) == {}
    settings = replace(tables.Settings.read("tiny"), seeds=[0])
    (tmp_path / "dmd2").mkdir()
    (tmp_path / "dmd2" / "0.json").write_text(json.dumps({"rows": [row | {"lpips": 0.1, "iterations": 60}]}))
    result = tables.result_of(TABLE2, settings, tmp_path, facts, kept)
    assert list(result["by_seed"]) == ["teacher, 4 steps, renoise, plain", "FVGen", "DMD2"]


@pytest.mark.slow
def test_a_table_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """One iteration, one clip, one seed: the second call makes nothing again, and finds the same."""
    small = tables.Settings.read("tiny")
    train = {**small.train, "clips": 8, "batch_size": 2}
    small = replace(small, clips=1, seeds=[0], few_steps=[4], iterations={1: [2], 2: [2, 1]}, head_warmup=1)
    small = replace(small, train=train)
    work, rows = tmp_path / "work", ["adversarial alone"]
    tables.run_missing(TABLE2, small, rows, work, 1)
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*.json")}
    tables.run_missing(TABLE2, small, rows, work, 1)
    assert before == {file: file.stat().st_mtime_ns for file in work.rglob("*.json")}
    result = tables.result_of(TABLE2, small, work, {})
    assert result["rows"]["adversarial alone"]["iterations"] == 2 and result["baseline"]
