"""What `share_backbone` costs in quality: the demo's stages with whole networks and with LoRA roles, on unseen clips.

    python benchmarks/sharing.py [--work runs/sharing] [--seeds 0 1 2] [--ways "LoRA both"] [--name sharing]

What is measured: the tiny preset's two stages, stage 2 once with three whole networks, once with the fake score as a
LoRA adapter on the frozen teacher, once with the student as another one (then in stage 1, too); PSNR, SSIM, LPIPS and
the feature distance of the demo's test clips, and how many numbers learn. An adapter starts at zero and moves more
slowly than whole weights, so its learning rate is tried at 1 and ``--scale`` times the preset's. Why: sharing makes
large models fit, and nobody says what it takes away. Finished stages in ``--work`` are not trained again. Writes
results/NAME.json and NAME.md; the last line of the output is JSON.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fvgen.clips.builtin import builtin_clips
from fvgen.distill import read_yaml, run, stage_config
from fvgen.distill.settings import StageConfig
from fvgen.errors import UserError, did_you_mean
from fvgen.pipelines.folders import load_pipeline
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.reports.data import BUILTIN_CLIPS
from fvgen.reports.evaluate import evaluate, score, student_contestant
from fvgen.system.command import Parser, guarded
from fvgen.system.files import atomic_path, write_json

RESULTS = Path(__file__).parent / "results"
METRICS = ("psnr", "ssim", "lpips", "kid_squeeze")
SHARED: dict[str, Any] = {"share_backbone": True}
BOTH: dict[str, Any] = {"share_backbone": True, "student_lora": True}


def stages(way: str, runs: Path, seed: int, scale: float) -> tuple[StageConfig, StageConfig]:
    """Stage 1 and 2 of a way to share."""
    settings = read_yaml(str(files("fvgen") / "configs" / "tiny.yaml"))
    common = {key: value for key, value in settings.items() if not isinstance(value, dict)} | {"seed": seed}
    gan, dmd = common | settings["gan"], common | settings["dmd"]
    faster = scale if way.endswith("faster") else 1.0
    first = "gan"
    if way.startswith("LoRA fake score"):
        dmd |= SHARED | {"fake_score_lr": dmd["fake_score_lr"] * faster}
    elif way.startswith("LoRA both"):
        gan |= BOTH | {"student_lr": gan["student_lr"] * faster}
        rates = {key: dmd[key] * faster for key in ("student_lr", "fake_score_lr")}
        dmd, first = dmd | BOTH | rates, f"gan {way}"
    folder = runs / f"seed{seed}"
    init = str(folder / first)
    return (
        stage_config("gan", gan | {"out": init, "track": False}),
        stage_config("dmd", dmd | {"out": str(folder / f"dmd {way}"), "init": init, "track": False}),
    )


WAYS = ("three models", "LoRA fake score", "LoRA fake score, faster", "LoRA both", "LoRA both, faster")


def measure(way: str, runs: Path, seed: int, scale: float) -> dict[str, Any]:
    """Train and judge the student of one way."""
    gan, dmd = stages(way, runs, seed, scale)
    run(gan)
    folder = run(dmd)
    teacher = load_pipeline("tiny", TeacherPipeline)
    test = builtin_clips("test", BUILTIN_CLIPS)
    clips = [test[index] for index in range(len(test))]
    student = load_pipeline(folder, StudentPipeline)
    row = score(evaluate({"student": student_contestant(student)}, clips, teacher, seed)["student"], clips)
    seconds = json.loads((Path(dmd.out) / "summary.json").read_text())["seconds"]
    return {key: row[key] for key in METRICS} | {"stage2_seconds": seconds}


def table(rows: dict[str, dict[str, dict[str, Any]]], scale: float) -> str:
    """Means over the seeds. Seconds are not in it: the runs do not share a quiet minute."""
    lines = [
        f"# What sharing one backbone costs\n\nWritten by benchmarks/sharing.py; faster: learning rates x {scale:g}\n"
    ]
    lines += [f"| way | seeds | {' | '.join(METRICS)} |", "|---|---|" + "---|" * len(METRICS)]
    for way, seeds in rows.items():
        cells = []
        for key in METRICS:
            values = [row[key] for row in seeds.values()]
            cells.append("-" if None in values else f"{statistics.mean(values):.4f}")
        lines.append(f"| {way} | {', '.join(sorted(seeds))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chosen(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in WAYS:
            raise UserError(f"unknown way {name!r}{did_you_mean(name, WAYS)}")
    return names


def main() -> None:
    parser = Parser(__doc__, {"--runs": "--work"})
    parser.add_argument("--work", type=Path, default=Path("runs/sharing"), help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--scale", type=float, default=5.0, help="of the learning rates of faster adapters")
    parser.add_argument("--name", default="sharing")
    args = parser.parse_args()

    file = RESULTS / f"{args.name}.json"
    rows: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text())["rows"] if file.exists() else {}
    for seed in args.seeds:
        for way in chosen(args.ways):
            row = measure(way, args.work, seed, args.scale)
            print(f"{way:26s} seed {seed}: {row}", flush=True)
            rows.setdefault(way, {})[str(seed)] = row
            result = {"scale": args.scale, "rows": {name: rows[name] for name in WAYS if name in rows}}
            write_json(file, result)
            with atomic_path(file.with_suffix(".md")) as temporary:
                temporary.write_text(table(result["rows"], args.scale))
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
