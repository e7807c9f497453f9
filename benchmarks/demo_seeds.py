"""The demo's table over several seeds: means, and what distillation gains with its uncertainty.

    python benchmarks/demo_seeds.py runs/seed0 runs/seed1 runs/seed2 [--out benchmarks/results/demo_seeds.json]

What is measured: nothing new; the folders are finished runs of `fvgen demo --seed N --out runs/seedN`. Why: one seed
proves little. A gain is the student's score (or stage 1's) minus another row's, paired within each seed; its 95 %
interval comes from Student's t over the seeds, so it says how far another seed may be off, not how far other scenes
may. The last line is JSON; --out keeps it, with every seed's rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from fvgen.errors import UserError
from fvgen.metrics.intervals import paired
from fvgen.system.command import guarded
from fvgen.system.files import write_json

METRICS = ("psnr", "ssim", "lpips", "kid_squeeze")


def gain(reports: list[dict], metric: str, row: str, of: str = "student") -> dict[str, float] | None:
    """Row ``of`` minus ``row``: mean, half width of the 95 % interval, and the mean relative to the row's."""
    ours, others = ([report["rows"][name][metric] for report in reports] for name in (of, row))
    return paired(ours, others)


def read_reports(folders: list[Path]) -> list[dict]:
    """The reports of finished demo runs on the same data, one seed each."""
    if len(folders) < 2:
        raise UserError(f"{len(folders)} runs given; give 2 or more finished demo folders")
    for folder in folders:
        if not (folder / "report.json").is_file():
            raise UserError(f"{folder} holds no report.json; run fvgen demo --out {folder} to its end first")
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    if len({(report["data"], *report["scenes"]) for report in reports}) > 1:
        raise UserError("the runs are on different scenes; compare runs of one --data")
    if len({report["seed"] for report in reports}) < len(reports):
        raise UserError("two of the runs have the same seed; run fvgen demo with different --seed")
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    reports = read_reports(args.runs)
    names = reports[0]["rows"]
    rows = {
        name: {
            metric: statistics.mean(values)
            for metric in ("nfe", "seconds_per_clip", *METRICS)
            if None not in (values := [report["rows"][name][metric] for report in reports])
        }
        for name in names
    }
    gains = {row: {metric: gain(reports, metric, row) for metric in METRICS} for row in names if row != "student"}
    first = {metric: gain(reports, metric, "teacher_few", "gan_init") for metric in METRICS}
    for name, row in rows.items():
        print(f"{name:12}", "  ".join(f"{metric} {value:.4g}" for metric, value in row.items()))
    told = {f"student minus {row}": by_metric for row, by_metric in gains.items()}
    for name, by_metric in {**told, "gan_init minus teacher_few": first}.items():
        cells = [f"{metric} {g['mean']:+.4f} ± {g['half_width']:.4f}" for metric, g in by_metric.items() if g]
        print(f"{name:26}", "  ".join(cells))
    result = {
        "seeds": [report["seed"] for report in reports],
        "data": reports[0]["data"],
        "speedup": [report["speedup"] for report in reports],
        "mean": rows,
        "student_minus": gains,
        "gan_init_minus_teacher_few": first,
        "by_seed": [report["rows"] for report in reports],
    }
    if args.out:
        write_json(args.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "by_seed"}))


if __name__ == "__main__":
    guarded(main)
