"""The loop of a stage: what happens when. What happens inside an update is in `fvgen.distill.steps`.

Nothing random outlives an iteration: iteration n draws from a stream made of (seed, stage, n) alone. A run that was
killed and started again therefore continues exactly where an uninterrupted one would be.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from fvgen.clips.builtin import builtin_clips
from fvgen.clips.clip import ClipFolder
from fvgen.clips.latents import LatentBatch, LatentSet, load_latents
from fvgen.distill.checkpoint import load_checkpoint, save_checkpoint
from fvgen.distill.config import RunConfig, StageConfig
from fvgen.distill.draws import Draws
from fvgen.distill.engines import join_world
from fvgen.distill.export import write_head, write_student
from fvgen.distill.guards import SKIPPED, SkipGuard, finite_row, stop_on_sigterm
from fvgen.distill.monitor import Monitor, available_trackers, sample_clips
from fvgen.distill.players import ADAPTER, build_players, fingerprint
from fvgen.distill.run_folder import LOG, RunFolder, finished_stage
from fvgen.distill.steps import MONITOR, Metrics, roll_out, update_critics, update_critics_and_look, update_student
from fvgen.errors import Stopped, UserError, did_you_mean
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.shards.reader import ShardSet, holds_shards
from fvgen.system.files import append_line, atomic_path, no_leftovers


def run(config: RunConfig | StageConfig) -> Path:
    """Distil: one stage, or stage 1 (GAN initialisation) and then stage 2 (distribution matching).

    Returns the folder of the student, which `FVGenPipeline.from_pretrained` loads. The same call again resumes or, if
    everything is done, returns at once. Raises UserError for settings, data, folders or devices that cannot work.
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
        self.seconds, self._start = state["seconds"], time.perf_counter()


class Trainer:
    """One stage, in one process or several, of which the main one alone writes files. Building it judges settings,
    device, teacher, data and folders; `train` does the work."""

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.folder = RunFolder(config)
        self.out = self.folder.root
        self.world = join_world(config)
        check_device(config.device)
        self.start_from = finished_stage(config.init) if config.init else None
        self.world.main_only(self.folder.judge)  # before gigabytes are read
        self.base = load_pipeline(config.teacher, ViewCrafterPipeline).to(config.device)
        data = self.world.main_first(lambda: stage_data(config, self.base))
        self.players, self.ema = build_players(config, self.base, self.start_from, self.world)
        with no_leftovers(*([self.out] if self.world.is_main else [])):
            self.world.main_only(self.folder.claim)
            self.latents: LatentSet = (
                data if isinstance(data, ShardSet) else self.world.main_first(lambda: load_latents(data, self.base))
            )
        for part in (self.base.vae, self.base.image_encoder, self.base.image_projector, self.base.prompts):
            # Gigabytes that training itself has no use for. The main process exports them with the student.
            part.to("cpu" if self.world.is_main else "meta")
        self.clock = Clock()
        self.facts = {"stage": config.stage, "model": fingerprint(self.players)}
        self.things = {
            "student": self.players.student_engine,
            "head": self.players.head_engine,
            "ema": self.ema,
            "clock": self.clock,
        }
        if self.players.fake_score is not None:
            self.things |= {"fake_score": self.players.fake_score_engine, "normalizer": self.players.normalizer}

    def train(self) -> Path:
        """Run (or finish) the stage; returns the student's folder. Raises Stopped after SIGTERM, all saved."""
        if self.world.tell(self.folder.is_finished()):
            return self.out / "student"
        with ExitStack() as stack:
            self.world.main_only(lambda: stack.enter_context(self.folder.lock()))
            self.world.main_only(self.folder.mend)
            return self._train()

    def _train(self) -> Path:
        total, per_iteration = self.config.iterations, self.config.critic_updates
        with stop_on_sigterm() as stop:
            done = self.resume()
            guard = SkipGuard(self.config.max_skips, self.world.tell(self.folder.rows() if self.world.is_main else []))
            monitor = self._start_monitor()
            with _progress(self.world.is_main) as bar:
                shown = {"total": total, "completed": done, "critics": done * per_iteration, "losses": ""}
                task = bar.add_task(f"stage {self.config.stage}", **shown)
                for iteration in range(done + 1, total + 1):
                    first = iteration in (done + 1, self.config.head_warmup + 1)  # ... of its kind: count its work
                    with monitor.counting(self.world.size) if monitor and first else nullcontext():
                        row = self.iterate(iteration)
                    self.log(iteration, row, monitor)
                    guard.judge(row, iteration)
                    bar.update(task, advance=1, critics=iteration * per_iteration, losses=_brief(row, guard.total))
                    stopping = self.world.any(stop.requested, self.config.device)
                    if iteration % self.config.checkpoint_every == 0 or iteration == total or stopping:
                        self.save(iteration)
                    if stopping and iteration < total:
                        raise Stopped(f"stopped by SIGTERM after iteration {iteration}; the same command resumes")
        if monitor is not None:
            monitor.close()
        return self.export(max(done, total))

    def iterate(self, iteration: int) -> dict[str, Any]:
        """The alternation: ``critic_updates`` updates of the critics, then one of the student, on the last rollout."""
        generator = iteration_generator(self.config.seed, self.config.stage, iteration)
        players, config = self.players, self.config
        student_learns = iteration > config.head_warmup
        for turn in range(config.critic_updates):
            parts = self.parts(generator)
            starts = [draws.copy() for _, draws in parts] if len(parts) > 1 else []
            shared = student_learns and turn == config.critic_updates - 1 and len(parts) == 1
            rows: list[Metrics] = []
            for batch, draws in parts:
                with torch.set_grad_enabled(shared):
                    rollout = roll_out(players, config, batch, draws)
                if shared and config.same_noise:
                    metrics, seen = update_critics_and_look(players, config, rollout, draws)
                else:
                    metrics, seen = update_critics(players, config, rollout, draws), None
                rows.append(metrics)
            if len(parts) > 1:
                generator.set_state(parts[-1][1].generator.get_state())
        if student_learns:
            for index, (batch, draws) in enumerate(parts):
                if not shared:  # the same rollout once more, with a graph: keeping all parts' graphs takes more memory
                    rollout = roll_out(players, config, batch, starts[index])
                rows[index] |= update_student(players, config, rollout, draws, seen)
            self.ema.update()
        return finite_row(self.reduce(rows))

    def parts(self, generator: torch.Generator) -> list[tuple[LatentBatch, Draws]]:
        """This process's clips of one global batch, in ``accumulation`` parts, and the random numbers of each.

        Process r of n has the r-th of n equal runs of rows, so that n processes make together the update of one.
        """
        total, count = self.config.batch_size, self.config.accumulation
        size = total // (self.world.size * count)
        first = self.world.rank * size * count
        rows = [slice(first + k * size, first + (k + 1) * size) for k in range(count)]
        indices = torch.randint(len(self.latents), (total,), generator=generator)
        batches = [self.latents.batch(indices[part], self.config.device) for part in rows]
        whole = Draws(generator, total)
        draws = [Draws(generator, total, rows[0])] if count == 1 else [whole.copy(part) for part in rows]
        return list(zip(batches, draws, strict=True))

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
        every = self.config.sample_every
        clips = None
        if every and iteration % every == 0:
            clips, watched[MONITOR + "seed_spread"] = sample_clips(self.players.student, self.latents, self.config)

        def write() -> None:
            best_by = self.config.keep_best_by
            if best_by and "loss_student" in row and best_by not in {*row, *row.get(SKIPPED, ())}:
                raise UserError(f"keep_best_by={best_by!r} is no metric{did_you_mean(best_by, row)}")
            append_line(self.out / LOG, json.dumps({"iteration": iteration, **row}))
            monitor.row(iteration, row, watched)
            if clips is not None:
                monitor.clips(self._decode(clips), iteration)

        self.world.main_only(write)

    def _decode(self, clips: Tensor) -> Tensor:
        """Where the student ran: on the CPU a clip of the full size takes minutes, for which all processes wait."""
        self.base.vae.to(clips.device)
        frames = self.base.decode_latents(clips)
        self.base.vae.to("cpu")
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
        trackers = available_trackers(self.out, self.config.model_dump()) if self.config.track else []
        return Monitor(self.out, self.config.batch_size, self.config.device, trackers)

    def export(self, iterations: int) -> Path:
        """Write the averaged student as a pipeline folder, the head beside it, and last the summary."""
        student, head = self.ema.weights(), self.players.head_engine.gather(self.players.head_engine.masters)
        seconds = self.clock.state_dict()["seconds"]

        def write() -> None:
            write_student(self.config, self.base, student, self.out / "student")
            if self.config.student_lora:
                with atomic_path(self.out / ADAPTER) as temporary:
                    save_file({name: tensor.contiguous() for name, tensor in student.items()}, temporary)
            write_head(self.players.head, head, self.out / "head")
            self.folder.finish(iterations, seconds)

        self.world.main_only(write)
        return self.out / "student"


def stage_data(config: StageConfig, base: ViewCrafterPipeline) -> ClipFolder | ShardSet:
    """The clips to train on; shards are encoded already. Raises UserError for a folder that holds none, clips that
    ``base`` cannot take, and shards that another teacher's encoders made."""
    if config.data == "builtin":
        clips: ClipFolder | ShardSet = builtin_clips("train", config.clips)
    elif holds_shards(config.data):
        clips = ShardSet(config.data)
        clips.check_encoder(base.encoder_fingerprint(), config.teacher)
    else:
        clips = ClipFolder(config.data)
    base.check_size(clips.height, clips.width)
    return clips


def iteration_generator(seed: int, stage: str, iteration: int) -> torch.Generator:
    """The random stream of one iteration."""
    digest = hashlib.sha256(f"fvgen distill {seed} {stage} {iteration}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


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


def _brief(row: dict[str, Any], skipped: int) -> str:
    names = {"loss_head": "D", "loss_student_gan": "G", "loss_student_dmd": "M", "loss_fake_score": "F"}
    losses = " ".join(f"{short} {row[key]:.2f}" for key, short in names.items() if key in row)
    return f"{losses} skipped {skipped}" if skipped else losses


def _progress(visible: bool) -> Progress:
    """Both time scales: the student's updates and, where there is room, the critics'; time so far and time left."""
    wide = get_console().width >= 100
    columns: Sequence = (
        TextColumn("{task.description}"),
        BarColumn(None if wide else 4),
        MofNCompleteColumn(),
        *([TextColumn("(critics {task.fields[critics]})")] if wide else []),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not visible)
