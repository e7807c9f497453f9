"""One process of a run that reads shards: a line for each step, the sums of its clips' latents, and the state after it.

    python loader_worker.py SHARDS RANK WORLD_SIZE WORKERS OUT.jsonl [STATE as JSON]

It goes on until it is killed, a step each tenth of a second.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from fvgen.shards.order import ClipLoader
from fvgen.shards.reader import ShardSet

if __name__ == "__main__":
    shards, rank, world_size, workers, out, *state = sys.argv[1:]
    loader = ClipLoader(
        ShardSet(shards),
        4,
        seed=5,
        rank=int(rank),
        world_size=int(world_size),
        workers=int(workers),
        parts=2 // int(world_size),
    )
    if state:
        loader.load_state_dict(json.loads(state[0]))
    with Path(out).open("w") as file:
        while True:
            sums = [value for _ in range(loader.parts) for value in next(loader).latents.sum((1, 2, 3, 4)).tolist()]
            file.write(json.dumps({"sums": sums, "state": loader.state_dict()}) + "\n")
            file.flush()
            time.sleep(0.1)
