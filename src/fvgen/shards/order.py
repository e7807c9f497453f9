"""The order in which training sees clips: shuffled, reproducible, resumable, for any number of ranks and workers.

The order is one endless sequence that (seed, number of clips) decides alone. A step takes the next ``batch_size`` clips
of it, whoever has which: so what all processes together see does not depend on how many they are, nor does the place at
which a run goes on.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fvgen.clips.latents import LatentBatch, LatentSet
from fvgen.errors import UserError

AHEAD = 2  # batches that are read before they are wanted, by the thread or by each worker


def epoch_order(shard_of: Sequence[int], seed: int, epoch: int, window: int | None = None) -> Tensor:
    """[N] a permutation of the clips.

    ``shard_of`` tells the shard of each. window None: all orders are equally likely. Otherwise shards are shuffled and
    clips only among ``window`` shards that follow each other, so that a slow place is read nearly in sequence.
    """
    digest = hashlib.sha256(f"fvgen order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    clips = torch.randperm(len(shard_of), generator=generator)
    if window is None:
        return clips
    shards = torch.tensor(shard_of)
    place = torch.randperm(int(shards.max()) + 1, generator=generator)  # of each shard among the shuffled ones
    group = place[shards[clips]] // window
    return clips[group.argsort(stable=True)]


class ClipLoader:
    """Endless batches of clips, in memory or in shards: this process's share of every step, a `LatentBatch` on the CPU.

    A step takes the next ``batch_size`` clips of the sequence; process r of n has the r-th of n equal runs of them,
    which ``next`` gives in ``parts`` equal batches, one after the other. Batches are read ahead, by a thread or by
    ``workers`` processes: reading, fetching and the verification of checksums happen while networks compute.

    ``state_dict`` says how many clips all processes have been given; what was read ahead does not count. Between steps
    it may be loaded into a loader of other processes, batches, parts or workers: the sequence goes on where it was.

    Args:
        clips: a `LatentSet`, or a `ShardSet`.
        batch_size: of all processes together; UserError where it does not divide among them and their parts.
        window: for shards in slow places, see `epoch_order`.
    """

    def __init__(
        self,
        clips: LatentSet,
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
        workers: int = 0,
        window: int | None = None,
    ) -> None:
        assert 0 <= rank < world_size and parts >= 1, (rank, world_size, parts)
        if batch_size < 1 or batch_size % (world_size * parts):
            raise UserError(
                f"batch_size={batch_size} does not divide into {world_size} processes with {parts} parts each; give a "
                f"multiple of {world_size * parts}"
            )
        self.clips, self.batch_size, self.seed, self.window = clips, batch_size, seed, window
        self.rank, self.world_size, self.parts, self.workers = rank, world_size, parts, workers
        self.consumed, self._given = 0, 0
        self.waited = 0.0  # seconds in all that `next` took: what reading ahead did not hide
        self._shard_of = getattr(clips, "shard_of", [0] * len(clips))
        self._ahead: Iterator[LatentBatch] | None = None

    def __iter__(self) -> ClipLoader:
        return self

    def __next__(self) -> LatentBatch:
        start = time.perf_counter()
        if self._ahead is None:
            indices = self._indices(self.consumed)
            self._ahead = self._by_workers(indices) if self.workers else _by_a_thread(self.clips, indices)
        batch = next(self._ahead)
        self.waited += time.perf_counter() - start
        self._given += 1
        self.consumed += self.batch_size // self.parts
        return batch

    def state_dict(self) -> dict[str, int]:
        """Between steps only: a step's parts belong together."""
        assert self._given % self.parts == 0, f"{self._given} parts given, {self.parts} to a step"
        return {"consumed": self.consumed, "seed": self.seed, "clips": len(self.clips)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for the state of another sequence."""
        for key, mine in (("seed", self.seed), ("clips", len(self.clips))):
            if state[key] != mine:
                raise ValueError(f"the loader's state has {key}={state[key]}, this one {mine}; it goes on elsewhere")
        self.consumed, self._given, self._ahead = int(state["consumed"]), 0, None

    def _indices(self, start: int) -> Iterator[list[int]]:
        """The clips of each of this process's batches, from position ``start`` of the sequence on."""
        size = self.batch_size // (self.world_size * self.parts)
        epoch, order, count = -1, torch.empty(0), len(self.clips)
        while True:
            for part in range(self.parts):
                batch = []
                first = start + (self.rank * self.parts + part) * size
                for position in range(first, first + size):
                    turn, place = divmod(position, count)
                    if turn != epoch:
                        epoch, order = turn, epoch_order(self._shard_of, self.seed, turn, self.window)
                    batch.append(int(order[place]))
                yield batch
            start += self.batch_size

    def _by_workers(self, indices: Iterator[list[int]]) -> Iterator[LatentBatch]:
        found = DataLoader(
            _Batches(self.clips),
            sampler=indices,
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context=clean_context("fvgen.shards.order"),
            prefetch_factor=AHEAD,
        )
        for batch in found:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _by_a_thread(clips: LatentSet, indices: Iterator[list[int]]) -> Iterator[LatentBatch]:
    """``AHEAD`` batches are asked for before they are wanted. The thread has open files of its own."""
    own, pool = copy(clips), ThreadPoolExecutor(1, "fvgen-read-ahead")
    try:
        waiting = deque(pool.submit(own.batch, rows) for rows in islice(indices, AHEAD))
        while True:
            batch = waiting.popleft().result()
            waiting.append(pool.submit(own.batch, next(indices)))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def clean_context(module: str) -> multiprocessing.context.BaseContext:
    """For processes that inherit nothing of this one, no threads, locks or open files; what ``module`` imports is
    imported once for all of them, where the system allows that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


class _Batches(torch.utils.data.Dataset):
    """What a worker does: a list of clips to a batch, or to the error that a DataLoader would wrap in a traceback."""

    def __init__(self, clips: LatentSet) -> None:
        self.clips = clips

    def __getitem__(self, indices: list[int]) -> LatentBatch | UserError:
        try:
            return self.clips.batch(indices)
        except UserError as error:
            return error
