"""The order of training: one sequence, whoever reads it, from memory or from shards, through any kill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checks import flip, refusal

from fvgen.clips.latents import LatentSet
from fvgen.shards.order import ClipLoader, epoch_order
from fvgen.shards.reader import ShardSet


@pytest.fixture(params=["memory", "shards"])
def clips(request, shards) -> LatentSet:
    """Six clips, in either place."""
    on_disk = ShardSet(shards)
    if request.param == "shards":
        return on_disk
    return InMemory([on_disk.batch([index]) for index in range(len(on_disk))], on_disk.names)


class InMemory(LatentSet):
    """Whatever names a condition has."""

    def __init__(self, batches: list, names: list[str]) -> None:
        super().__init__({"latents": torch.cat([batch.latents for batch in batches])}, names)
        self.batches = batches

    def batch(self, indices, device="cpu"):
        whole = self.batches[0]
        return type(whole)(self.tensors["latents"][list(map(int, indices))], whole.condition)


@pytest.mark.parametrize("window", [None, 1, 2])
def test_an_epoch_is_every_clip_once(window):
    shard_of = [n // 5 for n in range(23)]
    orders = [epoch_order(shard_of, seed, epoch, window).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == epoch_order(shard_of, 0, 0, window).tolist()
    if window:  # never more than so many shards at a time
        shards = [shard_of[clip] for clip in orders[0]]
        for first in range(0, 23, 1):
            left = {shard for shard in shards[:first] if shard in shards[first:]}
            assert len(left) <= window


def drawn(clips: LatentSet, batches: int, **options) -> list[list[str]]:
    """The clips of each batch, told by their latents."""
    names = {clips.batch([i]).latents.sum().item(): name for i, name in enumerate(clips.names)}
    loader = ClipLoader(clips, **options)
    return [[names[latents.sum().item()] for latents in next(loader).latents] for _ in range(batches)]


@pytest.mark.parametrize(
    ("world", "batch", "parts"), [(1, 1, 1), (2, 4, 1), (3, 3, 1), (4, 12, 1), (2, 12, 3), (1, 8, 2)]
)
def test_all_processes_together_see_one_sequence(clips, world, batch, parts):
    line = [name for step in drawn(clips, 24, batch_size=1, seed=5) for name in step]
    steps, options = 24 // batch, {"batch_size": batch, "seed": 5, "world_size": world, "parts": parts}
    ranks = [drawn(clips, steps * parts, rank=rank, **options) for rank in range(world)]
    size = batch // (world * parts)
    assert all(len(names) == size for rank in ranks for names in rank)
    # A step's clips: process after process, each with its parts in a row, as the trainer draws its noise.
    joined = [n for step in range(steps) for rank in ranks for part in rank[step * parts :][:parts] for n in part]
    assert joined == line
    assert sorted(line[:6]) == sorted(line[6:12]) == clips.names and line[:6] != line[6:12]


def test_memory_and_shards_have_one_order(shards):
    on_disk = ShardSet(shards)
    memory = InMemory([on_disk.batch([index]) for index in range(6)], on_disk.names)
    assert drawn(memory, 12, batch_size=1, seed=3) == drawn(on_disk, 12, batch_size=1, seed=3)


def test_a_loader_goes_on_with_other_processes_batches_and_workers(shards):
    clips = ShardSet(shards)
    line = [name for step in drawn(clips, 20, batch_size=1, seed=2) for name in step]
    first = ClipLoader(clips, 4, seed=2, world_size=2)
    for _ in range(2):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["consumed"] == 8  # not what was read ahead
    for options in ({"workers": 1}, {"parts": 3}, {}):
        later = ClipLoader(clips, 3, seed=2, **options)
        next(later)  # a state that is loaded late counts all the same
        later.load_state_dict(state)
        parts = [next(later) for _ in range(later.parts)]
        expected = clips.batch([clips.names.index(name) for name in line[8:11]])
        assert torch.equal(torch.cat([part.latents for part in parts]), expected.latents)
        assert later.state_dict()["consumed"] == 11
    with pytest.raises(ValueError, match="seed"):
        ClipLoader(clips, 1, seed=3).load_state_dict(state)
    assert "does not divide into 2 processes with 2 parts each" in refusal(
        lambda: ClipLoader(clips, 6, world_size=2, parts=2)
    )


def test_the_next_batches_are_read_and_verified_while_this_one_is_used(shards, monkeypatch):
    """Nobody asks for them; and no checksum is ever computed by the thread that trains."""
    from fvgen.shards import reader

    by, sha256_of = {}, reader.sha256_of

    def told(path):
        by.setdefault(path.name, threading.current_thread().name)
        return sha256_of(path)

    monkeypatch.setattr(reader, "sha256_of", told)
    clips = ShardSet(shards)
    loader = ClipLoader(clips, 1, seed=0)
    next(loader)
    due = {clips.shards[clips.shard_of[int(place)]].file for place in epoch_order(clips.shard_of, 0, 0)[:3]}
    until = time.monotonic() + 20
    while not due <= by.keys() and time.monotonic() < until:
        time.sleep(0.01)
    assert due <= by.keys() and len(due) > 1
    for _ in range(12):
        next(loader)
    assert len(by) == len(clips.shards) and all(name.startswith("fvgen-read-ahead") for name in by.values())


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_shard_is_named_when_its_clips_are_due(shards, tmp_path, workers):
    out = tmp_path / "out"
    shutil.copytree(shards, out)
    shard = sorted(out.glob("shard*"))[1]
    flip(shard, -1)
    loader = ClipLoader(ShardSet(out), 6, workers=workers)
    assert shard.name in refusal(lambda: next(loader))


@pytest.mark.slow
def test_two_processes_with_two_workers_killed_and_resumed_as_one_without(shards, tmp_path):
    """SIGKILL in the middle; the sequence from the last common state on is the one of an undisturbed run."""
    script = Path(__file__).parent / "loader_worker.py"

    def begin(rank: int, world: int, workers: int, *state: str) -> tuple[subprocess.Popen, Path]:
        out = tmp_path / f"{rank}-of-{world}-{workers}.jsonl"
        words = [sys.executable, script, shards, rank, world, workers, out, *state]
        return subprocess.Popen(list(map(str, words))), out

    def rows(out: Path) -> list[dict]:
        lines = out.read_text().splitlines(keepends=True) if out.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def killed(runs: list[tuple[subprocess.Popen, Path]], steps: int) -> list[list[dict]]:
        until = time.monotonic() + 240
        while min(len(rows(out)) for _, out in runs) < steps and time.monotonic() < until:
            time.sleep(0.05)
        for process, _ in runs:
            process.kill()
            process.wait()
        return [rows(out) for _, out in runs]

    two = killed([begin(rank, 2, 2) for rank in range(2)], 4)
    common = min(len(rank) for rank in two)
    assert common >= 4
    state = two[0][common - 1]["state"]
    assert state["consumed"] == 4 * common
    (one,) = killed([begin(0, 1, 0, json.dumps(state))], 4)
    (straight,) = killed([begin(0, 1, 0)], common + 4)
    line = [value for row in straight for value in row["sums"]]
    seen = [value for step in range(common) for rank in two for value in rank[step]["sums"]]
    after = [value for row in one for value in row["sums"]]
    assert seen == line[: 4 * common] and after[:16] == line[4 * common :][:16]
