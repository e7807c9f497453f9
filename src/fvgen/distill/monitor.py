"""Seeing a run: throughput, health, sample clips. Nothing in here changes a number of the training.

monitor.jsonl has a row per iteration with what differs between equal runs (seconds) or is watched rather than
optimised; metrics.jsonl stays bit-identical. TensorBoard and Weights & Biases get both where they are installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fvgen.clips.latents import LatentSet
from fvgen.distill.methods.base import MONITOR, Method
from fvgen.distill.settings import StageConfig
from fvgen.errors import first_line
from fvgen.system.doors import there
from fvgen.system.files import append_line, atomic_path, new_folder, open_log
from fvgen.system.work import Work

SEEDS = 2
SAMPLES = "samples"  # folder of a run: ITERATION.png, a strip of frames a seed
TRUTH = "truth.png"  # ... and, once, the clip that they are to look like, through encoder and decoder
MONITOR_LOG = "monitor.jsonl"


class Tracker(Protocol):
    """Somewhere that curves and clips go."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None: ...

    def video(self, name: str, frames: Tensor, iteration: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """An event file in out/tensorboard, written at once: torch's SummaryWriter writes in a thread of its own, whose
    errors (a full disk) nobody can catch."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        new_folder(folder)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter(open_log(folder / name))
        self._add(0, file_version="brain.Event:2")

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._add(iteration, summary=scalar(name, value))

    def video(self, name: str, frames: Tensor, iteration: int) -> None:
        """``frames`` [F, 3, H, W] in [0, 1], as one strip of pictures: a video would need moviepy."""
        from torch.utils.tensorboard.summary import image

        self._add(iteration, summary=image(name, torch.cat(list(frames), dim=-1), dataformats="CHW"))

    def _add(self, iteration: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.records.write(Event(wall_time=time.time(), step=iteration, **content).SerializeToString())

    def close(self) -> None:
        self.records.close()


class WeightsAndBiases:
    """A run of W&B, which its own settings (WANDB_MODE, WANDB_PROJECT, a login) direct."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        project = os.environ.get("WANDB_PROJECT", "fvgen")
        name = "-".join(folder.resolve().parts[-2:])
        self.run = wandb.init(
            project=project, id=name, name=name, dir=str(folder), config=dict(settings), resume="allow"
        )

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self.run.log(dict(values), step=iteration)

    def video(self, name: str, frames: Tensor, iteration: int) -> None:
        pixels = (frames * 255).round().to(torch.uint8).cpu().numpy()
        self.run.log({name: self.wandb.Video(pixels, fps=8, format="gif")}, step=iteration)

    def close(self) -> None:
        self.run.finish()


def available_trackers(folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """TensorBoard where it is installed, W&B where it is and its user has switched it on."""
    wanted: list[Callable[[], Tracker]] = []
    if importlib.util.find_spec("tensorboard"):
        wanted.append(lambda: TensorBoard(folder / "tensorboard"))
    asked = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or os.environ.get("WANDB_PROJECT")
    if asked and importlib.util.find_spec("wandb"):
        wanted.append(lambda: WeightsAndBiases(folder, settings))
    trackers: list[Tracker] = []
    for make in wanted:
        try:
            trackers.append(make())
        except Exception as error:  # no network, a wrong key, a broken installation: curves are not worth a run
            print(f"fvgen: goes on without these curves: {first_line(error)}", file=sys.stderr)
    return trackers


def peak_memory_gb(device: str) -> float:
    """Most memory so far, GB: allocated on the GPU, or resident in the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@torch.no_grad()
def sample_clips(method: Method, latents: LatentSet, config: StageConfig) -> tuple[Tensor, float | None]:
    """The method's latents [S, C, F, h, w] for the first clip from S seeds, and how much seeds matter: the standard
    deviation between them, over that of the clip's own latents. Near 0 all seeds give one clip: a collapsed student.
    A method that samples frames has no seeds: its frames [1, F, 3, H, W], and None.

    With ZeRO-3 every process must call this. The weights are the student's present ones, not their average.
    """
    if method.samples == "frames":
        return method.sample(latents.batch([0], config.run.device), config.run.seed), None
    batch = latents.batch([0] * SEEDS, config.run.device)
    clips = method.sample(batch, config.run.seed)
    return clips, (clips.std(dim=0).square().mean().sqrt() / batch.latents[0].std()).item()


def write_strips(path: Path, videos: Tensor) -> None:
    """``videos`` [S, F, 3, H, W] in [0, 1] as S strips below one another, in a PNG that also says how many ``strips``
    of how many ``frames`` it has: its size does not."""
    strips = torch.cat([torch.cat(list(frames), dim=-1) for frames in videos], dim=-2)
    facts = PngInfo()
    for key, count in zip(("strips", "frames"), videos.shape, strict=False):
        facts.add_text(key, str(count))
    pixels = (strips * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=facts)


class Monitor:
    """Rows of monitor.jsonl, and the same to the trackers. Only the main process has one."""

    def __init__(self, out: Path, clips_per_iteration: int, device: str, trackers: list[Tracker]) -> None:
        self.out, self.clips_per_iteration, self.device, self.trackers = out, clips_per_iteration, device, trackers
        self.flops: float | None = None  # of an iteration, over all processes
        self.since = time.perf_counter()

    @contextmanager
    def counting(self, processes: int) -> Iterator[None]:
        """Count the work of the iteration inside, a little slower and to the same bits; others are like it."""
        with Work() as work:
            yield
        self.flops = work.flops * processes

    def row(self, iteration: int, metrics: Mapping[str, Any], watched: Mapping[str, float]) -> dict[str, Any]:
        """Write what iteration took and looked like; returns it. ``watched``'s names carry the prefix `MONITOR`."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        row: dict[str, Any] = {"iteration": iteration, "seconds": round(seconds, 4)}
        row["clips_per_second"] = round(self.clips_per_iteration / seconds, 3)
        if self.flops:
            row["flops_per_second"] = round(self.flops / seconds)
        row["peak_memory_gb"] = round(peak_memory_gb(self.device), 3)
        row |= {name.removeprefix(MONITOR): round(value, 5) for name, value in watched.items()}
        append_line(self.out / MONITOR_LOG, json.dumps(row))
        numbers = {key: value for key, value in {**metrics, **row}.items() if isinstance(value, int | float)}
        numbers.pop("iteration")
        for tracker in self.trackers:
            with suppress(Exception):  # curves are not worth a run
                tracker.scalars(numbers, iteration)
        return row

    def clips(self, videos: Tensor, iteration: int, truth: Callable[[], Tensor]) -> None:
        """``videos`` [S, F, 3, H, W] in [0, 1], one seed each: S strips as one picture in out/samples; the trackers.
        The first time also the ``truth`` [1, F, 3, H, W] that they are to look like."""
        write_strips(self.out / SAMPLES / f"{iteration:08d}.png", videos)
        if not there(self.out / SAMPLES / TRUTH):
            write_strips(self.out / SAMPLES / TRUTH, truth())
        for tracker in self.trackers:
            with suppress(Exception):
                tracker.video("sample", videos[0], iteration)
        self.since = time.perf_counter()

    def close(self) -> None:
        for tracker in self.trackers:
            with suppress(Exception):
                tracker.close()
