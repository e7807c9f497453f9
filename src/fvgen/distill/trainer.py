"""The loop of a stage: what happens when. What happens inside an iteration is in `fvgen.distill.methods`.

Nothing random outlives an iteration: iteration n draws from a stream made of (seed, stage, n) alone. A run that was
killed and started again therefore continues exactly where an uninterrupted one would be.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.clips.builtin import FRAMES, HEIGHT, WIDTH, builtin_clips
from fvgen.clips.folder import ClipFolder
from fvgen.clips.latents import LatentSet, load_latents
from fvgen.clips.worlds import WORLDS
from fvgen.distill.checkpoint import Stateful, load_checkpoint, save_checkpoint
from fvgen.distill.config import RunConfig
from fvgen.distill.deal import Dealer
from fvgen.distill.engines import join_world, shard_frozen
from fvgen.distill.guards import SKIPPED, SkipGuard, finite_row, stop_on_sigterm
from fvgen.distill.learners import Learner, make_learner
from fvgen.distill.methods import METHODS
from fvgen.distill.methods.base import MONITOR, Method, Metrics, Setup
from fvgen.distill.monitor import Monitor, available_trackers, sample_clips
from fvgen.distill.progress import ProgressLines, brief, progress_bar
from fvgen.distill.run_folder import LOG, RunFolder, check_paths, finished_stage
from fvgen.distill.settings import StageConfig
from fvgen.errors import CannotWrite, Stopped, UserError, did_you_mean
from fvgen.models.family import Size, family_of
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.pipelines.folders import check_device, folder_blueprint, load_pipeline, model_kind
from fvgen.pipelines.presets import model_folder
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.shards.order import ClipLoader
from fvgen.shards.reader import ShardSet, holds_shards
from fvgen.system.doors import problem, there
from fvgen.system.files import append_line, no_leftovers, remove


def run(config: RunConfig | StageConfig) -> Path:
    """Distil: one stage, or stage 1 (GAN initialisation) and then stage 2 (distribution matching).

    Returns the folder of the student, which the student pipeline of its family loads. The same call again resumes or,
    if everything is done, returns at once. Raises UserError for settings, data, folders or devices that cannot work.
    """
    if isinstance(config, StageConfig):
        return Trainer(config).train()
    Trainer(config.gan).train()
    return Trainer(config.dmd).train()


class Clock:
    """Seconds of training, interruptions left out."""

    def __init__(self) -> None:
        self.seconds, self._start = 0.0, time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        now = time.perf_counter()
        self.seconds, self._start = self.seconds + now - self._start, now
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        seconds = float(state["seconds"])
        if not 0 <= seconds < math.inf:
            raise ValueError(f"the clock stands at {seconds}")
        self.seconds, self._start = seconds, time.perf_counter()


class Trainer:
    """One stage, in one process or several, of which the main one alone writes files. Building it judges settings,
    device, teacher, data and folders; `train` does the work."""

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        check_paths(config)
        self.folder = RunFolder(config)
        self.out = self.folder.root
        self.world = join_world(config)
        check_device(config.run.device)
        self.start_from = finished_stage(config.run.init) if config.run.init else None
        self.world.main_only(self.folder.judge)  # before gigabytes are read
        if self.start_from is not None:
            check_families(config.run.teacher, self.start_from)
        given = load_pipeline(config.run.teacher, TeacherPipeline)
        self.base = config.method.base_of(given, config.run.seed).to(config.run.device)
        data = self.world.main_first(lambda: stage_data(config, self.base))
        teacher = self.base.teacher(getattr(config.method, "guidance", None))
        learner = partial(make_learner, config, self.world)
        setup = Setup(config, self.base.family, teacher, learner, self.start_from, self.world, self.base)
        self.method = METHODS[config.name].method.build(setup)
        shard_frozen(teacher, config, self.world)
        self.made = not there(self.out)  # by this process, and so to be removed where it begins with a refusal
        with no_leftovers(*([self.out] if self.world.is_main else [])):
            self.world.main_only(self.folder.claim)
            self.latents: LatentSet = (
                data
                if isinstance(data, ShardSet)
                else self.world.main_first(lambda: load_latents(data, self.base, views="views" in self.method.needs))
            )
        for part in self.base.idle_parts():  # gigabytes; the main process exports them with the student
            part.to("cpu" if self.world.is_main else "meta")
        self.clock = Clock()
        self.facts = {"stage": config.name, "model": fingerprint(self.method)}
        self.loader = ClipLoader(
            self.latents,
            config.data.batch_size,
            config.run.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            parts=config.memory.accumulation,
            workers=config.data.workers,
        )
        self.waited = 0.0  # for clips, until the last row
        self.things = things(self.method) | {"clock": self.clock, "data": self.loader}

    def train(self) -> Path:
        """Run (or finish) the stage; returns the student's folder. Raises Stopped after SIGTERM, all saved."""
        if self.world.tell(self.folder.is_finished()):
            return self.out / self.config.method.result
        with ExitStack() as stack:
            self.world.main_only(lambda: stack.enter_context(self.folder.lock()))
            self.world.main_only(self.folder.mend)
            try:
                return self._train()
            except UserError as error:
                begun = problem(self.out / LOG) is None and (self.out / LOG).stat().st_size > 0
                if self.world.is_main and self.made and not begun and not isinstance(error, CannotWrite):
                    remove(self.out)
                raise

    def _train(self) -> Path:
        total = self.config.run.iterations
        with stop_on_sigterm() as stop:
            done = self.resume()
            rows = self.world.tell(self.folder.rows() if self.world.is_main else [])
            guard = SkipGuard(min(self.config.log.max_skips, total), rows)
            monitor = self._start_monitor()
            lines = ProgressLines(self.out, self.config.name, done, total)
            with progress_bar(self.world.is_main) as bar:
                critics = getattr(self.config.method, "critic_updates", 1)
                shown = {"total": total, "completed": done, "critics": done * critics, "losses": ""}
                task = bar.add_task(f"stage {self.config.name}", **shown)
                warm_up = getattr(self.config.method, "head_warmup", 0)
                for iteration in range(done + 1, total + 1):
                    first = iteration in (done + 1, warm_up + 1)  # ... of its kind: count its work
                    with monitor.counting(self.world.size) if monitor and first else nullcontext():
                        row = self.iterate(iteration)
                    self.log(iteration, row, monitor)
                    guard.judge(row, iteration)
                    losses = brief(row, guard.total)
                    bar.update(task, advance=1, critics=iteration * critics, losses=losses)
                    stopping = self.world.any(stop.requested, self.config.run.device)
                    if self.world.is_main:
                        lines.tell(iteration, losses, last=iteration == total or stopping)
                    if iteration % self.config.log.checkpoint_every == 0 or iteration == total or stopping:
                        self.save(iteration)
                    if stopping and iteration < total:
                        raise Stopped(f"stopped by SIGTERM after iteration {iteration}; the same command resumes")
        if monitor is not None:
            monitor.close()
        return self.export(max(done, total))

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One iteration of the method; returns its row of metrics."""
        for learner in self.method.learners.values():
            learner.begin(iteration, self.config.run.iterations)
        deal = Dealer(self.loader, self.config, self.world, iteration)
        return finite_row(self.reduce(self.method.iterate(iteration, deal)))

    def reduce(self, rows: list[Metrics]) -> dict[str, float]:
        """Means (or extremes, by name) over parts and processes, in one transfer from the device."""
        names = [name for name, value in rows[-1].items() if value is not None]
        values = torch.stack([_stack(row, names) for row in rows])
        if len(rows) == self.world.size == 1:
            return dict(zip(names, values[0].tolist(), strict=True))
        values = self.world.gather(values)
        # The last row: a gradient's norm comes with the last part, the same everywhere.
        table = torch.stack([values.amin(0), values.mean(0), values.amax(0), values[-1]]).tolist()
        return {name: table[_reduction(name)][i] for i, name in enumerate(names)}

    def log(self, iteration: int, row: dict[str, Any], monitor: Monitor | None) -> None:
        """A row of metrics.jsonl (bit-identical in equal runs), one of monitor.jsonl (not), and clips now and then.

        What only monitor.jsonl takes leaves ``row``.
        """
        watched = {key: row.pop(key) for key in list(row) if key.startswith(MONITOR)}
        watched[MONITOR + "data_seconds"] = self.loader.waited - self.waited
        self.waited = self.loader.waited
        every = self.config.log.sample_every
        clips = None
        if every and (iteration % every == 0 or iteration == self.config.run.iterations):
            clips, spread = sample_clips(self.method, self.latents, self.config)
            watched |= {} if spread is None else {MONITOR + "seed_spread": spread}

        def write() -> None:
            best_by = self.config.log.keep_best_by
            if best_by and "loss_student" in row and best_by not in {*row, *row.get(SKIPPED, ())}:
                raise UserError(f"keep_best_by={best_by!r} is no metric{did_you_mean(best_by, row)}")
            append_line(self.out / LOG, json.dumps({"iteration": iteration, **row}))
            monitor.row(iteration, row, watched)
            if clips is not None:
                truth = self.latents.batch([0], self.config.run.device).latents
                shown = clips if self.method.samples == "frames" else self._decode(clips)
                monitor.clips(shown, iteration, lambda: self._decode(truth))

        self.world.main_only(write)

    def _decode(self, clips: Tensor) -> Tensor:
        """Where the student ran: on the CPU a clip of the full size takes minutes, for which all processes wait."""
        self.base.decoder.to(clips.device)
        frames = self.base.decode_latents(clips)
        self.base.decoder.to("cpu")
        return frames

    def save(self, iteration: int) -> None:
        """A checkpoint after ``iteration``; older ones go."""
        save_checkpoint(self.folder.checkpoints.path(iteration), iteration, self.things, self.facts, self.world)
        if self.world.is_main:
            self.folder.checkpoints.prune(self.folder.scores())

    def resume(self) -> int:
        """Restore the newest checkpoint, drop metrics written after it; returns the number of finished iterations."""
        newest = self.world.tell(self.folder.checkpoints.newest())
        done = 0 if newest is None else load_checkpoint(newest, self.things, self.facts, self.world)
        self.world.main_only(lambda: self.folder.cut_log(done))
        if self.world.is_main:
            self.folder.reopen()
        return done

    def _start_monitor(self) -> Monitor | None:
        if not self.world.is_main:
            return None
        trackers = available_trackers(self.out, self.config.words()) if self.config.log.track else []
        return Monitor(self.out, self.config.data.batch_size, self.config.run.device, trackers)

    def export(self, iterations: int) -> Path:
        """Write what the method leaves, the averaged student as a pipeline folder first, and last the summary."""
        weights = {name: _result(self.method.learners[name]) for name in self.method.exported}
        seconds = self.clock.state_dict()["seconds"]

        def write() -> None:
            self.method.export(self.out, weights, self.base, self.config)
            self.folder.finish(iterations, seconds)

        self.world.main_only(write)
        return self.out / self.config.method.result


def _result(learner: Learner) -> dict[str, Tensor]:
    """Whole tensors by name (main process only): averaged where an average is kept. Every process must call this."""
    return learner.average.weights() if learner.average else learner.engine.gather(learner.engine.masters)


def things(method: Method) -> dict[str, Stateful]:
    """All of a method that has state, by name, as a checkpoint's files are called."""
    found: dict[str, Stateful] = {name: learner.engine for name, learner in method.learners.items()}
    for name, learner in method.learners.items():
        if learner.average is not None:
            found["ema" if name == "student" else f"{name}_ema"] = learner.average
    return found | method.states


def fingerprint(method: Method) -> str:
    """Twelve hex digits that change with any name or shape of a learning network: whose checkpoint is it?"""
    digest = hashlib.sha256()
    for name, learner in method.learners.items():
        for key, shape in sorted(learner.engine.shapes.items()):
            digest.update(f"{name} {key} {tuple(shape)};".encode())
    return digest.hexdigest()[:12]


def check_families(teacher: str, start_from: Path) -> None:
    """Raises UserError where an earlier stage's student is of another family than ``teacher``; reads no weights."""
    ours, theirs = (family_of(model_kind(model_folder(folder))) for folder in (teacher, start_from / "student"))
    if ours and theirs and ours.name != theirs.name:
        raise UserError(
            f"init={start_from} holds a student of the family {theirs.name}, but teacher={teacher} is of {ours.name}; "
            "give the teacher that it was distilled from"
        )
    with torch.device("meta"):
        one, other = (
            {name: tuple(tensor.shape) for name, tensor in folder_blueprint(folder)[1].network().state_dict().items()}
            for folder in (model_folder(teacher), start_from / "student")
        )
    if different := sorted(key for key in {*one, *other} if one.get(key) != other.get(key)):
        raise UserError(
            f"init={start_from} holds a student of another size than teacher={teacher} ({different[0]} is "
            f"{other.get(different[0])} there and {one.get(different[0])} here); give the teacher that it was "
            "distilled from"
        )


def stage_data(config: StageConfig, base: TeacherPipeline) -> ClipFolder | ShardSet:
    """The clips to train on, see `open_clips`."""
    views = getattr(config.method, "others", 0) if "views" in METHODS[config.name].method.needs else None
    return open_clips(config.data.data, config.data.clips, base, config.run.teacher, views)


def open_clips(
    data: str, count: int, base: NovelViewPipeline, teacher: str, views: int | None = None
) -> ClipFolder | ShardSet:
    """Clips by the setting ``data``, ``count`` of the built-in ones; shards are encoded already. Raises UserError for a
    folder that holds none, clips that ``base`` cannot take, and shards that other encoders made than ``teacher``'s.

    views: None, or clips come with their views, built-in ones with so many off the path."""
    if data in WORLDS:
        frames = builtin_frames(base)
        made = partial(builtin_clips, "train", count, world=WORLDS[data], frames=frames)
        clips: ClipFolder | ShardSet = made(others=views or 0)
    elif holds_shards(data):
        clips = ShardSet(data, base.wants_cameras, views is not None)
        clips.check_encoder(base.encoder_fingerprint(), teacher)
        base.check_clip(clips.frames, clips.height, clips.width)
        check_kind(clips, teacher)
    else:
        clips = ClipFolder(data)
    base.check_clip(clips.frames, clips.height, clips.width)
    return clips


def builtin_frames(base: NovelViewPipeline) -> int:
    """Of the built-in clips: their usual number, or the model's own where it cannot take that. Raises UserError for a
    model that takes no clips of their size."""
    try:
        base.check_clip(FRAMES, HEIGHT, WIDTH)
        return FRAMES
    except UserError:
        base.check_clip(base.frames, HEIGHT, WIDTH)
        return base.frames


def check_kind(clips: ShardSet, teacher: str) -> None:
    """Raises UserError for shards whose first clip has other latents or widths of tokens than the teacher's network
    takes: a checksum says who wrote them, not whether they are right."""
    clip, size = clips[0], Size(1, clips.frames, clips.height, clips.width)
    latents, condition = folder_blueprint(model_folder(teacher))[1].example(size)
    pairs = [("latents", clip.latents, latents[0])]
    pairs += [(name, clip.condition[name], tensor[0]) for name, tensor in condition.items() if name in clip.condition]
    for name, found, expected in pairs:
        whole = found.ndim > 2  # tokens have a number of their own, and one width
        same = found.shape == expected.shape if whole else found.shape[-1:] == expected.shape[-1:]
        if found.ndim != expected.ndim or not same:
            raise UserError(
                f"the shards in {clips.place} have {name} of {list(found.shape)}, teacher {teacher} takes "
                f"{list(expected.shape)}; prepare them again"
            )
    if missing := sorted(set(condition.keys()) - set(clip.condition)):
        raise UserError(f"the shards in {clips.place} lack {missing[0]}; prepare them again")


def _stack(row: Metrics, names: Sequence[str]) -> Tensor:
    """[len(names)] float32; what a part that is not the last has no value of is NaN."""
    like = next(value for value in row.values() if value is not None)
    missing = torch.full((), torch.nan, device=like.device)
    return torch.stack([missing if row.get(n) is None else row[n].detach().float() for n in names])


def _reduction(name: str) -> int:
    """Row of `Trainer.reduce`'s table."""
    if name.startswith("grad_norm"):
        return 3
    return {"min": 0, "max": 2}.get(name[-3:], 1)
