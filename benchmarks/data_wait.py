"""What share of its time a training waits for clips: a short stage 2 of the tiny preset on shards.

    python benchmarks/data_wait.py --data SHARDS [--iterations 40] [--workers 0 2] [--out FILE.json]

What is measured: ``data_seconds`` of monitor.jsonl against ``seconds``, without the first five iterations, which start
readers and count work. Every shard's checksum is verified when it is first read, which falls into the measured time.
Why: read-ahead must hide reading, fetching and verifying behind the networks. The last line is JSON.
"""

from __future__ import annotations

import json
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from fvgen.calls import existing
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json

FIRST = 5


def measure(data: str, iterations: int, workers: int) -> dict[str, Any]:
    """One run's row."""
    from fvgen import distill

    settings = distill.read_yaml(str(files("fvgen") / "configs" / "tiny.yaml"))
    shared = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    given = shared | settings["dmd"] | {"data": data, "iterations": iterations + FIRST, "workers": workers}
    given |= {"sample_every": 0, "track": False, "checkpoint_every": iterations + FIRST, "init": ""}
    with tempfile.TemporaryDirectory() as folder:
        distill.Trainer(distill.stage_config("dmd", given | {"out": folder + "/run"})).train()
        lines = (Path(folder) / "run" / "monitor.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][FIRST:]
    seconds, waited = (sum(row[name] for row in rows) for name in ("seconds", "data_seconds"))
    return {
        "workers": workers,
        "iterations": len(rows),
        "seconds": round(seconds, 3),
        "data_seconds": round(waited, 4),
        "share": round(waited / seconds, 5),
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of prepared shards")
    parser.add_argument("--iterations", type=positive, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    existing(args.data)
    rows = [measure(args.data, args.iterations, workers) for workers in args.workers]
    if args.out:
        write_json(args.out, {"rows": rows})
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    guarded(main)
