"""The loop of a stage: what happens when. What happens inside an update is in `fvgen.distill.steps`.

Nothing random outlives an iteration: iteration n draws from a stream made of (seed, stage, n) alone. A run that was
killed and started again therefore continues exactly where an uninterrupted one would be.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fvgen.data.builtin import builtin_clips
from fvgen.data.clips import ClipFolder
from fvgen.data.latents import LatentSet, load_latents
from fvgen.data.shards import ShardSet, holds_shards
from fvgen.distill.checkpoint import load_checkpoint, save_checkpoint
from fvgen.distill.config import RunConfig, StageConfig, read_yaml
from fvgen.distill.ema import EMA
from fvgen.distill.engines import PlainEngine
from fvgen.distill.steps import Metrics, Players, roll_out, update_critics, update_student
from fvgen.errors import UserError
from fvgen.models.discriminator import DiscriminatorHead
from fvgen.models.teacher import Denoiser
from fvgen.objectives import divergences
from fvgen.objectives.ratio import RatioNormalizer
from fvgen.pipeline import FVGenPipeline, ViewCrafterPipeline
from fvgen.presets import check_device, load_head, load_pipeline, save_model
from fvgen.storage import TEMPORARY, append_line, atomic_path, no_leftovers, recover, writable_folder, write_json


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
    """One stage on one device. Building it judges device, teacher, data and folders; `train` does the work."""

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        check_device(config.device)
        self.start_from = _finished_stage(config.init) if config.init else None
        self.base = load_pipeline(config.teacher, ViewCrafterPipeline).to(config.device)
        data = stage_data(config, self.base)
        self.players, self.ema = build_players(config, self.base, self.start_from)
        with no_leftovers(self.out):
            self.claim_folder()
            self.latents: LatentSet = data if isinstance(data, ShardSet) else load_latents(data, self.base)
        self.clock = Clock()
        self.things = {
            "student": self.players.student_engine,
            "head": self.players.head_engine,
            "ema": self.ema,
            "clock": self.clock,
        }
        if self.players.fake_score is not None:
            self.things |= {"fake_score": self.players.fake_score_engine, "normalizer": self.players.normalizer}

    def train(self) -> Path:
        """Run (or finish) the stage; returns the student's folder."""
        if (self.out / "summary.json").exists() and self._summary()["iterations"] >= self.config.iterations:
            return self.out / "student"
        done = self.resume()
        with _progress() as bar:
            task = bar.add_task(f"stage {self.config.stage}", total=self.config.iterations, completed=done, losses="")
            for iteration in range(done + 1, self.config.iterations + 1):
                row = self.iterate(iteration)
                append_line(self.out / "metrics.jsonl", json.dumps({"iteration": iteration, **row}))
                bar.update(task, advance=1, losses=_brief(row))
                if iteration % self.config.checkpoint_every == 0 or iteration == self.config.iterations:
                    save_checkpoint(self.out / "checkpoint.pt", iteration, self.things)
        return self.export(max(done, self.config.iterations))

    def iterate(self, iteration: int) -> dict[str, float]:
        """The alternation: ``critic_updates`` updates of the critics, then one of the student, on the last rollout."""
        generator = iteration_generator(self.config.seed, self.config.stage, iteration)
        players, config = self.players, self.config
        metrics: Metrics = {}
        for turn in range(config.critic_updates):
            batch = self.latents.random_batch(config.batch_size, generator, config.device)
            student_learns = turn == config.critic_updates - 1 and iteration > config.head_warmup
            with torch.set_grad_enabled(student_learns):
                rollout = roll_out(players, config, batch, generator)
            metrics |= update_critics(players, config, rollout, generator)
        if iteration > config.head_warmup:
            metrics |= update_student(players, config, rollout, generator)
            self.ema.update(players.student)
        return _to_floats(metrics, iteration)

    def resume(self) -> int:
        """Restore the newest checkpoint, drop metrics written after it; returns the number of finished iterations."""
        file, log = self.out / "checkpoint.pt", self.out / "metrics.jsonl"
        done = load_checkpoint(file, self.things) if file.exists() else 0
        lines = log.read_bytes().decode(errors="replace").split("\n")[:done] if log.exists() else []
        if not _are_rows(lines, done):
            raise UserError(
                f"{log} lacks rows of the {done} iterations that the checkpoint stands at; "
                f"delete {self.out} to start this stage again, or choose another out=DIR"
            )
        with atomic_path(log) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines))
        return done

    def claim_folder(self) -> None:
        """Make the output folder ours, or recognise it as this very run; anything else in it is refused."""
        file = self.out / "config.yaml"
        mine = self.config.model_dump()
        if file.exists():
            theirs = read_yaml(file)
            for key, value in mine.items():
                if key not in ("iterations", "checkpoint_every", "out") and theirs.get(key) != value:
                    raise UserError(
                        f"output folder {self.out} holds another run ({key} is {theirs.get(key)!r} there and "
                        f"{value!r} here); choose another out=DIR or delete it"
                    )
        elif self.out.is_dir() and any(TEMPORARY not in path.name for path in self.out.iterdir()):
            raise UserError(f"output folder {self.out} is not empty and holds no run; choose another out=DIR")
        writable_folder(self.out)
        for name in ("student", "head"):
            recover(self.out / name)
        with atomic_path(file) as temporary:
            temporary.write_text(yaml.safe_dump(mine, sort_keys=False))

    def export(self, iterations: int) -> Path:
        """Write the averaged student as a pipeline folder, the head beside it, and last the summary."""
        student = FVGenPipeline.from_teacher(self.base, self.ema.module.unet, self.config.student_steps)
        save_model(student, self.out / "student")
        save_model(self.players.head, self.out / "head")
        seconds = self.clock.state_dict()["seconds"]
        summary = {"stage": self.config.stage, "iterations": iterations, "seconds": round(seconds, 1)}
        write_json(self.out / "summary.json", summary)
        return self.out / "student"

    def _summary(self) -> dict:
        return json.loads((self.out / "summary.json").read_text())


def build_players(config: StageConfig, base: ViewCrafterPipeline, start_from: Path | None) -> tuple[Players, EMA]:
    """Student, teacher, head and (stage "dmd") fake score; the student starts as the teacher or as ``start_from``'s.

    All networks stay in evaluation mode: the teacher's dropout would add noise to every target.
    """
    schedule = base.schedule
    teacher = base.teacher(config.guidance)
    torch.manual_seed(config.seed)  # the head's initial weights
    width = teacher.unet.config.model_channels * teacher.unet.config.channel_mult[-1]
    head = DiscriminatorHead(width, config.head_channels)
    student_unet = copy.deepcopy(teacher.unet)
    if start_from is not None:
        student_unet = load_pipeline(start_from / "student", FVGenPipeline).unet
        expected, head = head.config, load_head(start_from / "head")
        for key in ("in_channels", "channels"):
            if head.config[key] != expected[key]:
                raise UserError(
                    f"the head in init={start_from} has {key}={head.config[key]}, this stage needs {expected[key]}; "
                    "set teacher and head_channels as they were there"
                )

    def engine(module: torch.nn.Module, lr: float) -> PlainEngine:
        module.requires_grad_(True).eval().to(config.device)
        return PlainEngine(module, lr, (config.beta1, config.beta2), config.weight_decay, config.clip_norm)

    student = Denoiser(student_unet, schedule)
    matching = config.stage == "dmd"
    fake_score = Denoiser(copy.deepcopy(teacher.unet), schedule) if matching else None
    at_equality = divergences.weight(config.divergence, torch.zeros(1)).item()
    normalizer = RatioNormalizer(at_equality, config.ratio_bins, config.ratio_decay).to(config.device)
    players = Players(
        teacher=teacher,
        student=student,
        head=head,
        fake_score=fake_score,
        normalizer=normalizer if matching else None,
        student_engine=engine(student, config.student_lr),
        head_engine=engine(head, config.head_lr),
        fake_score_engine=engine(fake_score, config.fake_score_lr) if matching else None,
    )
    return players, EMA(student, config.ema_decay)


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


def read_metrics(stage_folder: str | Path) -> list[dict[str, float]]:
    """The rows of a stage's metrics.jsonl."""
    return [json.loads(line) for line in (Path(stage_folder) / "metrics.jsonl").read_text().splitlines()]


def _are_rows(lines: Sequence[str], count: int) -> bool:
    """Whether these are the whole rows of iterations 1 to ``count``."""
    try:
        return [json.loads(line)["iteration"] for line in lines] == list(range(1, count + 1))
    except (ValueError, KeyError, TypeError):
        return False


def _finished_stage(folder: str) -> Path:
    path = Path(folder)
    if not (path / "summary.json").exists():
        state = "is not finished; run it again first" if path.is_dir() else "does not exist"
        raise UserError(f"init={folder} {state}, or give the folder of another finished stage")
    return path


def _to_floats(metrics: Metrics, iteration: int) -> dict[str, float]:
    """All metrics in one transfer from the device."""
    values = torch.stack([value.detach().float() for value in metrics.values()]).tolist()
    row = dict(zip(metrics, values, strict=True))
    bad = [key for key, value in row.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"training diverged: {', '.join(bad)} is not finite at iteration {iteration}; lower the learning rates"
        )
    return row


def _brief(row: dict[str, float]) -> str:
    names = {"loss_head": "D", "loss_student_gan": "G", "loss_student_dmd": "DMD", "loss_fake_score": "fake"}
    return " ".join(f"{short} {row[key]:.3f}" for key, short in names.items() if key in row)


def _progress() -> Progress:
    columns: Sequence = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns)
