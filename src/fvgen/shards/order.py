"""The order in which training sees clips: shuffled, reproducible, resumable, for any number of ranks and workers.

The order is one endless sequence that (seed, number of clips) decides alone. A step takes the next ``world_size x
batch_size`` clips of it, rank r those at r, r + world_size, ...: so what all ranks together see does not depend on how
many they are, nor does the place at which a run goes on.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fvgen.clips.latents import LatentBatch, LatentSet


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


class ShardLoader:
    """Endless batches of a `ShardSet`, each a `LatentBatch` on the CPU: this rank's share of every step.

    state_dict says how many clips all ranks have been given; what workers have fetched ahead does not count. It may be
    loaded into a loader of another world or batch size, or with other workers: the sequence goes on where it was.
    """

    def __init__(
        self,
        clips: LatentSet,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        window: int | None = None,
    ) -> None:
        assert 0 <= rank < world_size and batch_size >= 1, (rank, world_size, batch_size)
        self.clips, self.batch_size, self.seed, self.window = clips, batch_size, seed, window
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.consumed = 0
        self._shard_of = getattr(clips, "shard_of", [0] * len(clips))

    def __iter__(self) -> Iterator[LatentBatch]:
        loader = DataLoader(
            _Batches(self.clips),
            sampler=self._indices(self.consumed),
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context=clean_context("fvgen.shards.order") if self.workers else None,
        )
        for batch in loader:
            self.consumed += self.batch_size * self.world_size
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed, "seed": self.seed, "clips": len(self.clips)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for the state of another sequence."""
        for key, mine in (("seed", self.seed), ("clips", len(self.clips))):
            if state[key] != mine:
                raise ValueError(f"the loader's state has {key}={state[key]}, this one {mine}; it goes on elsewhere")
        self.consumed = int(state["consumed"])

    def _indices(self, start: int) -> Iterator[list[int]]:
        """This rank's clips of each step, from position ``start`` of the sequence on."""
        epoch, order, count = -1, torch.empty(0), len(self.clips)
        while True:
            batch = []
            for k in range(self.batch_size):
                turn, place = divmod(start + k * self.world_size + self.rank, count)
                if turn != epoch:
                    epoch, order = turn, epoch_order(self._shard_of, self.seed, turn, self.window)
                batch.append(int(order[place]))
            yield batch
            start += self.batch_size * self.world_size


def clean_context(module: str) -> multiprocessing.context.BaseContext:
    """For processes that inherit nothing of this one, no threads, locks or open files; what ``module`` imports is
    imported once for all of them, where the system allows that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


class _Batches(torch.utils.data.Dataset):
    """What a worker does: a list of clips to a batch."""

    def __init__(self, clips: LatentSet) -> None:
        self.clips = clips

    def __getitem__(self, indices: list[int]) -> LatentBatch:
        return self.clips.batch(indices)
