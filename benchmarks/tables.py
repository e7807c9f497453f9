"""Tables of trained students, three seeds a row, that a kill does not start again: table2_distillation.py,
table3_ablation.py and few_steps.py say which rows.

Every row and seed is a training (`recipes/distill.py` with a file of recipes/configs/rivals) and a scoring
(`benchmarks/quality.py`), each in a process of its own, and leaves WORK/ROW/SEED.json. The same command goes on where
it stopped; both tables share what both need. docs/evaluation.md is the protocol.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from verdicts import psnr_at_equal_lpips, verdict

from fvgen import distill
from fvgen.errors import UserError
from fvgen.metrics.intervals import paired
from fvgen.system.command import Parser, positive
from fvgen.system.files import atomic_path, write_json, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
RIVALS = REPOSITORY / "recipes" / "configs" / "rivals"
METRICS = ("psnr", "ssim", "lpips", "kid_squeeze", "fid")
UNTRAINED = "untrained"
ANY_STEP = "any_step=true"


@dataclass(frozen=True)
class Claim:
    """The paper says that ``better`` beats ``worse`` in LPIPS, or (``metric``) in something else."""

    better: str
    worse: str
    metric: str = "lpips"


@dataclass(frozen=True)
class Table:
    """``rows``: name on the page -> file of recipes/configs/rivals without its ending, and settings that differ from it
    (with `ANY_STEP` among them the student is scored in all of the few steps); ``paper``: its own rows."""

    title: str
    script: str
    rows: Mapping[str, str]
    claims: Sequence[Claim]
    paper: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Settings:
    """A file of benchmarks/configs."""

    name: str
    teacher: str
    data: str
    first_clip: int
    clips: int
    seeds: Sequence[int]
    few_steps: Sequence[int]
    train: Mapping[str, Any]
    iterations: Mapping[int, Sequence[int]]
    head_warmup: int

    @classmethod
    def read(cls, name: str) -> Settings:
        file = Path(__file__).parent / "configs" / f"{name}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(found.stem for found in file.parent.glob("*.yaml")))
            raise UserError(f"there are no settings {name!r} in {file.parent}; take one of {known}")
        return cls(name=name, **yaml.safe_load(file.read_text()))

    def words(self, method: str, seed: int, out: Path) -> list[str]:
        """The words after `recipes/distill.py`: equal iterations for every row, however many stages it has."""
        file, *changes = method.split()
        path = RIVALS / f"{file}.yaml"
        stages = yaml.safe_load(path.read_text())
        words = [str(path), f"out={out}", f"seed={seed}", f"teacher={self.teacher}", f"data={self.data}"]
        words += [f"{key}={json.dumps(value)}" for key, value in self.train.items()]
        for stage, count in zip(stages["stages"], self.iterations[len(stages["stages"])], strict=True):
            words.append(f"{stage}.iterations={count}")
            if "head_warmup" in stages[stage]:
                words.append(f"{stage}.head_warmup={self.head_warmup}")
        return words + changes


# --- Runs ---


def call(script: str, words: Sequence[str], log: Path) -> dict[str, Any]:
    """A script of the repository with one thread; its last line, which is JSON. Raises UserError where it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("wb") as errors:
        command = [sys.executable, str(REPOSITORY / script), *words]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise UserError(f"{script} {words[0]} ended with exit code {done.returncode}; {log} says why")
    return json.loads(lines[-1])


def scored(words: Sequence[str], settings: Settings, seed: int, log: Path) -> list[dict[str, Any]]:
    """Rows of quality.py."""
    common = ["--data", settings.data, "--first", str(settings.first_clip), "--clips", str(settings.clips)]
    common += ["--seed", str(seed)]
    found = call("benchmarks/quality.py", [*words, *common], log)
    return [{"way": "render", **found["render"]}, *found["models"]]


def run_untrained(settings: Settings, seed: int, work: Path) -> dict[str, Any]:
    """The teacher in all its steps and, in every way, in few; the render."""
    few = ["--few-steps", *map(str, settings.few_steps)]
    return {"rows": scored(["--model", settings.teacher, *few], settings, seed, work / f"{seed}.log")}


def run_trained(method: str, settings: Settings, seed: int, work: Path) -> dict[str, Any]:
    """A student's rows, one for each number of steps, and how it was made."""
    made = call("recipes/distill.py", settings.words(method, seed, work / str(seed)), work / f"{seed}.train.log")
    seconds = sum(json.loads((Path(stage) / "summary.json").read_text())["seconds"] for stage in made["stages"])
    steps = [["--steps", str(count)] for count in settings.few_steps] if ANY_STEP in method else [[]]
    log = work / f"{seed}.log"
    rows = [scored(["--model", made["student"], *each], settings, seed, log)[-1] for each in steps]
    metrics = [distill.read_metrics(stage) for stage in made["stages"]]
    pairs = [x["head_pair_accuracy"] for rows in metrics for x in rows if "head_pair_accuracy" in x]
    facts = {"iterations": sum(len(rows) for rows in metrics), "train_seconds": round(seconds)}
    facts["head_pair_accuracy"] = statistics.mean(pairs) if pairs else None
    return {"rows": [row | facts for row in rows]}


def runs(table: Table, settings: Settings, chosen: Sequence[str], work: Path) -> Iterator[tuple[str, int, Path]]:
    """(method or `UNTRAINED`, seed, results), the untrained first, row by row."""
    for method in dict.fromkeys([UNTRAINED, *(table.rows[name] for name in chosen)]):
        for seed in settings.seeds:
            yield method, seed, results_of(method, seed, work)


def results_of(method: str, seed: int, work: Path) -> Path:
    return work / method.replace(" ", ",") / f"{seed}.json"


def run_missing(table: Table, settings: Settings, chosen: Sequence[str], work: Path, jobs: int) -> None:
    """All that has no results yet."""

    def one(method: str, seed: int, results: Path) -> None:
        if method == UNTRAINED:
            found = run_untrained(settings, seed, results.parent)
        else:
            found = run_trained(method, settings, seed, results.parent)
        write_json(results, found)
        print(f"{time.strftime('%H:%M:%S')} {method} seed {seed}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        missing = [run for run in runs(table, settings, chosen, work) if not run[2].is_file()]
        for future in [pool.submit(one, *run) for run in missing]:
            future.result()


# --- The page ---


def collected(table: Table, settings: Settings, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by name, a dictionary a seed: those of the table that have all their seeds, and the untrained."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        file = work / UNTRAINED / f"{seed}.json"
        for row in json.loads(file.read_text())["rows"] if file.is_file() else []:
            rows.setdefault(untrained_name(row), []).append(row)
    for name, method in table.rows.items():
        files = [results_of(method, seed, work) for seed in settings.seeds]
        if not all(file.is_file() for file in files):
            continue
        for each in zip(*(json.loads(file.read_text())["rows"] for file in files), strict=True):
            rows[f"{name} in {each[0]['steps']} steps" if ANY_STEP in method else name] = list(each)
    return rows


def kept_rows(page: Path, facts: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What an earlier ``page`` of the same clips and seeds has of rows that are not ``chosen`` now."""
    earlier = json.loads(page.read_text()) if page.is_file() else {}
    if any(earlier.get(name) != facts[name] for name in ("data", "clips", "seeds")):
        return {}
    return {name: each for name, each in earlier["by_seed"].items() if row_of(name) not in chosen}


def row_of(name: str) -> str:
    """The row of a table that made what stands under ``name``: an any-step student has a name for each number of
    steps."""
    return name.partition(", in ")[0] + "," if ", in " in name else name


def in_order(table: Table, rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The untrained first, then as the table has them."""
    places = {name: place for place, name in enumerate(table.rows)}
    return dict(sorted(rows.items(), key=lambda row: places.get(row_of(row[0]), -1)))


def untrained_name(row: Mapping[str, Any]) -> str:
    way = row.get("way", "")
    return "render" if way == "render" else f"teacher, {row['steps']} steps{', ' + way if way else ''}"


def mean(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    values = [row.get(metric) for row in rows]
    return None if not values or None in values else statistics.mean(values)


def best_few(rows: Mapping[str, list[dict[str, Any]]], steps: int) -> str | None:
    """The untrained way with the lowest mean LPIPS (else the highest PSNR) in so many steps: what has to be beaten."""
    names = [name for name, each in rows.items() if name.startswith(f"teacher, {steps} steps, ")]
    if not names:
        return None
    if all(mean(rows[name], "lpips") is not None for name in names):
        return min(names, key=lambda name: mean(rows[name], "lpips"))
    return max(names, key=lambda name: mean(rows[name], "psnr"))


def result_of(
    table: Table,
    settings: Settings,
    work: Path,
    facts: Mapping[str, Any],
    kept: Mapping[str, list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """All that the JSON file holds; ``kept`` rows where ``work`` has none."""
    rows = in_order(table, {**(kept or {}), **collected(table, settings, work)})
    best = {steps: best_few(rows, steps) for steps in settings.few_steps}
    ways, trained = list(best.values()), {name for name, each in rows.items() if "iterations" in each[0]}
    whole = [name for name, each in rows.items() if name.startswith("teacher") and "way" not in each[0]]
    curve = [
        (mean(rows[name], "lpips"), mean(rows[name], "psnr"))
        for name in [*filter(None, ways), *whole]
        if mean(rows[name], "lpips") is not None
    ]
    found: dict[str, Any] = {}
    for name, each in rows.items():
        if name not in (*trained, "render", *whole, *ways):
            continue  # the other untrained ways stay in by_seed
        row: dict[str, Any] = {"nfe": each[0].get("nfe"), "seeds": len(each)}
        for metric in (*METRICS, "head_pair_accuracy", "iterations", "train_seconds"):
            row[metric] = mean(each, metric)
            values = [one.get(metric) for one in each]
            if metric in METRICS and row[metric] is not None and len(values) > 1:
                row[f"{metric}_std"] = statistics.stdev(values)
        baseline = best.get(each[0]["steps"])
        if baseline and name in trained:
            row["baseline"] = baseline
            row["minus_baseline"] = {
                metric: paired([one[metric] for one in each], [one[metric] for one in rows[baseline]])
                for metric in METRICS
            }
            on_curve = None if row["lpips"] is None else psnr_at_equal_lpips(curve, row["lpips"])
            row["psnr_above_teachers_curve"] = None if on_curve is None else row["psnr"] - on_curve
            if whole and row["lpips"] is not None:
                gap = mean(rows[baseline], "lpips") - mean(rows[whole[0]], "lpips")
                row["gap_closed"] = (mean(rows[baseline], "lpips") - row["lpips"]) / gap
        found[name] = row
    claims = [claim_row(claim, rows) for claim in table.claims]
    return {**facts, "baseline": best.get(4), "rows": found, "claims": claims, "curve": curve, "by_seed": rows}


def claim_row(claim: Claim, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What came of a claim, ``rows`` being results by row, one a seed, whose differences are paired."""
    difference, said = None, "not run"
    if claim.better in rows and claim.worse in rows:
        one, other = ([row.get(claim.metric) for row in rows[name]] for name in (claim.better, claim.worse))
        difference = paired(one, other)
        said = verdict(difference, claim.metric) if difference else "not measured"
    return {"claim": f"{claim.better} beats {claim.worse}", "metric": claim.metric, "found": said, "by": difference}


def claim_table(claims: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`claim_row`s as a page shows them (`pages.page`)."""
    return [
        {"claim": c["claim"], "metric": c["metric"], "found here": c["found"]}
        | {"difference": bracket(c["by"], 4).strip(" ()")}
        for c in claims
    ]


def markdown(table: Table, result: Mapping[str, Any]) -> str:
    lines = [f"# {table.title}", "", f"Written by benchmarks/{table.script}; docs/evaluation.md is the protocol.", ""]
    shown = ("command", "commit", "hardware", "data", "clips", "seeds")
    lines += [f"- {key}: {result[key]}" for key in shown]
    lines += [
        "",
        "Means over seeds; in brackets the difference to the best untrained way in as many steps, paired by seed, with",
        "its 95 % interval. LPIPS gap closed: 0 is that way, 1 the teacher's whole steps.",
        "",
    ]
    head = ["", "NFE", "PSNR", "SSIM", "LPIPS (squeeze)", "kid_squeeze", "FID", "PSNR above the teacher's curve"]
    head += ["LPIPS gap closed", "pairs ordered rightly", "iterations", "s to train"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in result["rows"].items():
        cells = [name, cell(row["nfe"], 0)]
        for metric, digits in (("psnr", 2), ("ssim", 3), ("lpips", 4), ("kid_squeeze", 3), ("fid", 1)):
            cells.append(cell(row[metric], digits) + bracket((row.get("minus_baseline") or {}).get(metric), digits))
        cells += [cell(row.get("psnr_above_teachers_curve"), 2), cell(row.get("gap_closed"), 2)]
        cells += [cell(row["head_pair_accuracy"], 2), cell(row["iterations"], 0), cell(row["train_seconds"], 0)]
        lines.append(f"| {' | '.join(cells)} |")
    if not table.claims:
        return "\n".join(lines) + "\n"
    lines += ["", "## What the paper says", "", "| claim | metric | found here | difference |", "|---|---|---|---|"]
    for claim in result["claims"]:
        by = bracket(claim["by"], 4).strip(" ()")
        lines.append(f"| {claim['claim']} | {claim['metric']} | {claim['found']} | {by} |")
    columns = list(dict.fromkeys(key for row in table.paper for key in row))
    lines += ["", "Its own numbers, at full size on its own scenes:", "", f"| {' | '.join(columns)} |"]
    lines += ["|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(str(row.get(key, '')) for key in columns)} |" for row in table.paper]
    return "\n".join(lines) + "\n"


def cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def bracket(difference: Mapping[str, float] | None, digits: int) -> str:
    if difference is None:
        return ""
    return f" ({difference['mean']:+.{digits}f} ± {difference['half_width']:.{digits}f})"


def commit() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write_results(out: Path, stem: str, result: Mapping[str, Any], text: str) -> None:
    """OUT/STEM.json and its page."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{stem}.json", result)
    with atomic_path(out / f"{stem}.md") as temporary:
        write_text(temporary, text)


def main(table: Table, doc: str | None) -> None:
    """The command of a table."""
    parser = Parser(doc)
    parser.add_argument("--config", default="tiny", help="a file of benchmarks/configs, without its ending")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(table.rows),
        default=list(table.rows),
        metavar="ROW",
        help="the page keeps others that it has",
    )
    parser.add_argument("--jobs", type=positive, default=2, help="runs at a time, a thread each")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "tables", help="where runs are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the table goes")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing and stop")
    args = parser.parse_args()
    settings = Settings.read(args.config)
    work = args.work / settings.name
    if args.dry_run:
        for file, seed, results in runs(table, settings, args.rows, work):
            print(f"{'done' if results.is_file() else 'missing':8s} {file} seed {seed}")
        return
    run_missing(table, settings, args.rows, work, args.jobs)
    facts = {
        "command": f"python benchmarks/{table.script} --config {settings.name}",
        "commit": commit(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, one thread a run",
        "data": settings.data,
        "clips": f"{settings.first_clip} to {settings.first_clip + settings.clips - 1}",
        "seeds": list(settings.seeds),
    }
    stem = f"{Path(table.script).stem}-{settings.name}"
    kept = kept_rows(args.out / f"{stem}.json", facts, args.rows)
    result = result_of(table, settings, work, facts, kept)
    write_results(args.out, stem, result, markdown(table, result))
    print(json.dumps({"rows": result["rows"], "claims": result["claims"]}))
