"""A whole stage: the same seed gives the same files, and so does a run that was killed again and again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import processes
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_models import CONTEXT, FRAMES, LATENTS, TEXT_TOKENS, random_latents, small_clips, small_teacher
from viewcrafter_reference import small_unet

from fvgen.clips.folder import save_clips
from fvgen.distill import RunConfig, StageConfig, Trainer, changed, export_checkpoint, read_metrics, run
from fvgen.errors import UserError
from fvgen.models.head import DiscriminatorHead
from fvgen.models.viewcrafter.pipelines import FVGenPipeline
from fvgen.pipelines.folders import load_pipeline, save_model


def same_files(first: Path, second: Path) -> bool:
    """Whether metrics, student and head of two runs are equal byte by byte."""
    names = [
        "metrics.jsonl",
        *(str(p.relative_to(first)) for part in ("student", "head") for p in files_of(first / part)),
    ]
    assert len(names) > 10
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refused(config: StageConfig) -> str:
    """The sentence with which a run is refused."""
    with pytest.raises(UserError) as error:
        run(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def finished(teacher_folder, clip_folder, tmp_path_factory) -> Callable[..., tuple[StageConfig, Path]]:
    """A finished stage "gan" of three iterations, to be copied before it is changed."""
    from fvgen.distill import stage_config

    out = tmp_path_factory.mktemp("finished") / "gan"
    settings = {"iterations": 3, "batch_size": 2, "head_channels": 8, "critic_updates": 1, "checkpoint_every": 1}
    folders = {"out": str(out), "teacher": str(teacher_folder), "data": str(clip_folder)}
    config = stage_config("gan", settings | folders)
    run(config)

    def copy_to(folder: Path, **changes) -> tuple[StageConfig, Path]:
        shutil.copytree(out, folder / "gan")
        return changed(config, out=str(folder / "gan"), **changes), folder / "gan"

    return copy_to


# --- What a run leaves ---


@pytest.mark.parametrize("name", ["gan", "dmd"])
def test_the_same_seed_gives_the_same_bytes(stage, tmp_path, name):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        assert run(stage(name, out=str(folder), seed=seed)) == folder / "student"
    assert same_files(folders[0], folders[1])
    assert not same_files(folders[0], folders[2])

    rows = read_metrics(folders[0])
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    losses = {"loss_head", "loss_student_gan", "loss_student"}
    losses |= {"loss_fake_score", "loss_student_dmd"} if name == "dmd" else set()
    for row in rows:
        assert {key for key in row if "loss" in key} == losses
        assert all(math.isfinite(value) for value in row.values())
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert (summary["stage"], summary["iterations"]) == (name, 3) and summary["seconds"] > 0
    assert not list(folders[0].rglob("*.partial*"))


def test_the_student_is_the_average_and_the_head_goes_with_it(stage):
    trainer = Trainer(stage(ema_decay=0.5))
    folder = trainer.train()
    student = load_pipeline(folder, FVGenPipeline)
    averaged, last, first = (
        trainer.method.learners["student"].average.weights(),
        trainer.method.student.network,
        trainer.base.unet,
    )
    name = "middle_block.0.conv1.weight"
    saved = student.unet.get_parameter(name)
    assert torch.equal(saved, averaged[f"network.{name}"])
    assert not torch.equal(saved, last.get_parameter(name)) and not torch.equal(saved, first.get_parameter(name))
    for part in ("vae", "image_encoder", "image_projector", "prompts"):
        theirs = getattr(trainer.base, part).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(student, part).state_dict().items())
    assert student.config.steps == 4 and student.config.base_scale == trainer.base.config.base_scale
    assert not (student.unet.conv_out.weight.isnan()).any()
    head = DiscriminatorHead.from_pretrained(folder.parent / "head")
    assert all(
        torch.equal(value, head.state_dict()[key]) for key, value in trainer.method.critic.head.state_dict().items()
    )
    assert not (folder / "latents").exists() and random_latents(1).shape[1:] == LATENTS


def test_both_stages_follow_each_other(stage, tmp_path):
    gan = stage("gan", iterations=2)
    dmd = stage("dmd", iterations=2, init=gan.run.out)
    student = run(RunConfig(gan=gan, dmd=dmd))
    assert (
        student == Path(dmd.run.out) / "student"
        and len(read_metrics(gan.run.out)) == len(read_metrics(dmd.run.out)) == 2
    )
    kept = [path for path in files_of(Path(gan.run.out)) if path.name not in ("config.yaml", ".lock")]
    # (filelock 4.1, the newest for Python 3.10, cuts the empty lock to nothing and so dates it anew.)
    untouched = {path: path.stat().st_mtime_ns for path in kept}
    assert run(RunConfig(gan=gan, dmd=dmd)) == student  # done: nothing is trained or written again
    assert untouched == {path: path.stat().st_mtime_ns for path in untouched}


def test_stage_two_starts_where_stage_one_ended(stage, finished, tmp_path):
    _, first = finished(tmp_path)
    trainer = Trainer(stage("dmd", init=str(first)))
    student = load_pipeline(first / "student", FVGenPipeline)
    assert all(
        torch.equal(v, trainer.method.student.network.state_dict()[k]) for k, v in student.unet.state_dict().items()
    )
    head = DiscriminatorHead.from_pretrained(first / "head")
    assert all(torch.equal(v, trainer.method.critic.head.state_dict()[k]) for k, v in head.state_dict().items())
    fake = trainer.method.fake_score.network.state_dict()  # ... and the fake score with the teacher
    assert all(torch.equal(v, fake[k]) for k, v in trainer.base.unet.state_dict().items())
    assert all(parameter.requires_grad for parameter in trainer.method.student.parameters())


def test_critics_alone_at_first(stage):
    trainer = Trainer(stage(head_warmup=2))
    before = {key: value.clone() for key, value in trainer.method.student.state_dict().items()}
    rows = [trainer.iterate(iteration) for iteration in (1, 2)]
    assert all("loss_head" in row and "loss_student" not in row for row in rows)
    assert all(torch.equal(value, before[key]) for key, value in trainer.method.student.state_dict().items())
    assert "loss_student" in trainer.iterate(3)


def test_critics_learn_several_times_per_iteration(stage):
    trainer = Trainer(stage("dmd", critic_updates=3, iterations=1))
    trainer.train()
    engines = [trainer.method.learners[name].engine for name in ("head", "fake_score", "student")]
    updates = [next(iter(engine.optimizer.state.values()))["step"].item() for engine in engines]
    assert updates == [3, 3, 1]


# --- Interruptions ---


def test_more_iterations_are_what_one_long_run_gives(stage, tmp_path):
    long, short = str(tmp_path / "long"), str(tmp_path / "short")
    run(stage(out=long, iterations=5))
    run(stage(out=short, iterations=2))
    run(stage(out=short, iterations=5, checkpoint_every=1))
    assert same_files(Path(long), Path(short))


def test_fewer_iterations_than_are_done_change_nothing(finished, tmp_path):
    config, out = finished(tmp_path, iterations=2)
    metrics = (out / "metrics.jsonl").read_bytes()
    assert run(config) == out / "student"
    (out / "summary.json").unlink()  # as if the export had been interrupted
    run(config)
    assert json.loads((out / "summary.json").read_text())["iterations"] == 3
    assert (out / "metrics.jsonl").read_bytes() == metrics


def test_a_finished_run_that_goes_on_is_not_finished(finished, tmp_path):
    config, out = finished(tmp_path, iterations=5)
    assert Trainer(config).resume() == 3
    assert not (out / "summary.json").exists()  # what a job script and init= look at


def test_rows_behind_the_checkpoint_are_dropped(stage, tmp_path):
    config, whole = stage(iterations=4, checkpoint_every=2), stage(iterations=4, out=str(tmp_path / "whole"))
    run(whole)
    trainer = Trainer(config)
    trainer.config = changed(config, iterations=2)
    trainer.train()
    (Path(config.run.out) / "summary.json").unlink()
    with (Path(config.run.out) / "metrics.jsonl").open("a") as log:
        log.write('{"iteration": 3, "loss_head": 0.5}\n{"iteration": 4, "lo')
    run(config)
    assert same_files(Path(whole.run.out), Path(config.run.out))


class Victim:
    """A stage in a process of its own, to be killed."""

    def __init__(self, config: StageConfig, folder: Path) -> None:
        settings = folder / "settings.yaml"
        settings.write_text(yaml.safe_dump(config.words()))
        script = {"gan": "recipes/stage1_gan.py", "dmd": "recipes/stage2_dmd.py"}[config.name]
        self.command = processes.Command([script, "--config", settings], folder)

    def kill_when(self, moment: Callable[[], bool]) -> bool:
        """SIGKILL as soon as ``moment`` has come; False if the process ended before."""
        while self.command.running():
            if moment():
                self.command.kill()
                return self.command.process.exitcode == -signal.SIGKILL
            time.sleep(0.0005)
        return False


def moments(out: Path, generator: random.Random) -> Iterator[Callable[[], bool]]:
    """Moments in the life of a run: a number of rows and a little later, and while each kind of file is written."""
    for kill in count():
        if kill % 2:
            names = [
                "checkpoints/*",
                "checkpoints/*",
                "student",
                "head",
                "summary.json",
                "metrics.jsonl",
                "config.yaml",
            ]
            name = generator.choice(names)
            yield lambda name=name: any(out.glob(f"{name}.partial-*"))
        else:
            rows, delay = generator.randrange(4), generator.uniform(0, 0.3)
            yield after_rows(out / "metrics.jsonl", rows, delay)


def after_rows(log: Path, rows: int, delay: float) -> Callable[[], bool]:
    since = []

    def moment() -> bool:
        if not since and log.exists() and log.read_bytes().count(b"\n") >= rows:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] > delay

    return moment


def killed_run(config: StageConfig, folder: Path, kills: int, seed: int) -> int:
    """Start a stage, kill it, start it again ..., and let the last one finish; returns how many kills struck."""
    chosen, struck = moments(Path(config.run.out), random.Random(seed)), 0
    for _ in range(kills):
        struck += Victim(config, folder).kill_when(next(chosen))
    outcome = Victim(config, folder).command.finish()
    assert (outcome.code, outcome.err) == (0, "")
    return struck


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in the order in which the killed processes take them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_at_random_moments_and_while_saving(stage, tmp_path, one_thread):
    whole = stage(iterations=4, checkpoint_every=1, out=str(tmp_path / "whole"))
    run(whole)
    config = stage(iterations=4, checkpoint_every=1, out=str(tmp_path / "killed"))
    assert killed_run(config, tmp_path, kills=4, seed=1) >= 2
    assert same_files(Path(whole.run.out), Path(config.run.out))
    assert not list(Path(config.run.out).rglob("*.partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_many_times_in_both_stages(stage, tmp_path, one_thread, seed):
    whole = stage(iterations=5, checkpoint_every=2, out=str(tmp_path / "whole"))
    config = stage(iterations=5, checkpoint_every=2, out=str(tmp_path / "killed"))
    run(whole)
    assert killed_run(config, tmp_path, kills=10, seed=seed) >= 3
    assert same_files(Path(whole.run.out), Path(config.run.out))
    whole_dmd = stage("dmd", iterations=5, checkpoint_every=2, init=whole.run.out, out=str(tmp_path / "whole-dmd"))
    config_dmd = stage("dmd", iterations=5, checkpoint_every=2, init=config.run.out, out=str(tmp_path / "killed-dmd"))
    run(whole_dmd)
    assert killed_run(config_dmd, tmp_path, kills=10, seed=100 + seed) >= 3
    assert same_files(Path(whole_dmd.run.out), Path(config_dmd.run.out))


@pytest.mark.parametrize("leftover", [".write-test.partial", "config.yaml.partial"])
def test_a_kill_before_the_first_file_does_not_lock_the_folder(stage, leftover):
    config = stage(iterations=1)
    os.makedirs(config.run.out)
    (Path(config.run.out) / leftover).touch()
    assert run(config).is_dir()


# --- What is refused ---


def test_the_folder_of_another_run(finished, tmp_path):
    config, out = finished(tmp_path)
    before = {path: path.read_bytes() for path in files_of(out)}
    assert "holds another run (seed is 0 there and 1 here)" in refused(changed(config, seed=1))
    assert "holds another run (head_lr is" in refused(changed(config, head_lr=0.5))
    assert before == {path: path.read_bytes() for path in files_of(out)}


def test_the_folder_of_an_older_version(finished, tmp_path):
    config, out = finished(tmp_path)
    words = {key: value for key, value in config.words().items() if key != "method"}
    (out / "config.yaml").write_text(yaml.safe_dump({"stage": "gan", **words}))
    before = {path: path.read_bytes() for path in files_of(out)}
    assert "was written by fvgen 0.1, whose settings" in refused(config)
    with pytest.raises(UserError, match="was written by fvgen"):
        export_checkpoint(out, tmp_path / "student")
    assert before == {path: path.read_bytes() for path in files_of(out)}


def test_the_folder_is_judged_before_anything_is_read(finished, tmp_path):
    config, _ = finished(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text("damaged")
    assert "holds another run (teacher is" in refused(changed(config, teacher=str(tmp_path / "other")))


# --- Where things are ---


@pytest.fixture
def project(stage, teacher_folder, clip_folder, tmp_path, monkeypatch) -> tuple[Path, Callable[..., StageConfig]]:
    """A folder with teacher, data and the run of a first stage; settings of a second one. All paths are relative."""
    root = tmp_path / "here"
    shutil.copytree(teacher_folder, root / "models" / "teacher")
    shutil.copytree(clip_folder, root / "clips")
    monkeypatch.chdir(root)
    places = {"teacher": "models/teacher", "data": "clips", "iterations": 2}
    run(stage("gan", **places, out="runs/gan"))
    return root, partial(stage, "dmd", **places, init="runs/gan", out="runs/dmd")


def test_a_run_goes_on_from_another_folder(project, monkeypatch):
    root, make = project
    run(make())
    monkeypatch.chdir(root / "runs")
    places = {"teacher": "../models/teacher", "data": str(root / "clips"), "init": "gan", "out": "dmd"}
    run(make(**places, iterations=3))
    assert len(read_metrics("dmd")) == 3
    shutil.copytree(root / "clips", root / "more")
    (root / "more" / "index.json").write_text((root / "more" / "index.json").read_text() + "\n")
    sentence = refused(make(**places | {"data": "../more"}))
    assert f"holds another run (data is {str(root / 'clips')!r} there and {str(root / 'more')!r} here)" in sentence


def test_a_run_goes_on_where_all_was_moved(project, monkeypatch, tmp_path):
    root, make = project
    run(make(checkpoint_every=1))
    there = tmp_path / "there"
    monkeypatch.chdir(tmp_path)
    root.rename(there)
    assert export_checkpoint(there / "runs" / "dmd", tmp_path / "exported", 1).is_dir()  # finds the teacher again
    monkeypatch.chdir(there)
    run(make(iterations=3))
    assert len(read_metrics("runs/dmd")) == 3 and str(there) in Path("runs/dmd/config.yaml").read_text()
    weights = there / "models" / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    monkeypatch.chdir(tmp_path)
    there.rename(root)
    weights = root / weights.relative_to(there)
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    monkeypatch.chdir(root)
    assert "holds another run (teacher is" in refused(make(iterations=4))


def test_a_moved_run_without_its_sources_says_where_it_looked(project, monkeypatch, tmp_path):
    root, make = project
    run(make(checkpoint_every=1))
    there = tmp_path / "there"
    (root / "runs").rename(there)
    monkeypatch.chdir(there)
    sentence = refused(make(init="gan", out="dmd", data="clips", teacher=str(root / "models" / "teacher")))
    assert sentence == (
        f"data folder clips does not exist (looked for {there / 'clips'}), and this run began with {root / 'clips'}; "
        "give the place where it is now"
    )
    shutil.rmtree(root)
    sentence = refused(make(init="gan", out="dmd", teacher="teacher"))
    assert (
        f"teacher=teacher does not exist (looked for {there / 'teacher'}), and this run began with {root}" in sentence
    )
    with pytest.raises(
        UserError, match=f"began with teacher={root / 'models' / 'teacher'}, which is not there any more"
    ):
        export_checkpoint("dmd", "exported", 1)


@pytest.mark.parametrize("key", ["teacher", "data", "init", "deepspeed"])
def test_a_wrong_path_is_told_before_the_imports_that_take_seconds(tmp_path, key):
    code = (
        "import sys; from fvgen.distill import check_paths, stage_config\n"
        f"try: check_paths(stage_config('dmd', {{'out': 'out', '{key}': 'nowhere'}}))\n"
        "except ValueError as error: print(error)\n"
        "print({'diffusers', 'transformers', 'deepspeed'} & sys.modules.keys())"
    )
    words = [sys.executable, "-c", code]
    outcome = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    sentence, loaded = outcome.stdout.splitlines()
    assert "nowhere" in sentence and loaded == "set()"


def test_the_folder_of_a_run_at_work(stage, tmp_path):
    config = stage(iterations=2)
    trainer = Trainer(config)  # claims the folder; `train` would hold the lock, and be done before a Python starts
    with trainer.folder.lock():
        second = Victim(config, tmp_path).command.finish()
    assert second.code == 2 and second.err.startswith(f"fvgen: another run is at work in {config.run.out}; wait")
    trainer.train()
    assert [row["iteration"] for row in read_metrics(config.run.out)] == [1, 2]


def test_a_metric_to_keep_by_that_is_once_not_finite(stage):
    trainer = Trainer(stage(keep_best_by="loss_head", track=False))
    monitor = trainer._start_monitor()
    trainer.log(1, {"loss_student": 1.0, "not_finite": ["loss_head"]}, monitor)
    with pytest.raises(UserError, match="keep_best_by='loss_head' is no metric"):
        trainer.log(2, {"loss_student": 1.0, "loss_heat": 2.0}, monitor)


@pytest.mark.parametrize("name", ["notes.txt", "student/model.bin", "student.old/model.bin"])
def test_a_folder_with_something_else(stage, name):
    config = stage()
    file = Path(config.run.out) / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    assert "is not empty and holds no run; choose another output folder" in refused(config)
    assert files_of(Path(config.run.out)) == [file] and file.read_text() == "precious"


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text", ""])
def test_a_folder_with_a_foreign_config(stage, text):
    config = stage()
    os.makedirs(config.run.out)
    (Path(config.run.out) / "config.yaml").write_text(text)
    assert "config.yaml" in refused(config)


def test_an_init_that_is_not_finished(stage, finished, tmp_path):
    out = tmp_path / "second"
    _, first = finished(tmp_path)
    (first / "summary.json").unlink()
    assert "is not finished; run it again first" in refused(stage("dmd", init=str(first), out=str(out)))
    assert "does not exist" in refused(stage("dmd", init=str(tmp_path / "none"), out=str(out)))
    assert not out.exists()


def test_an_init_that_is_damaged_or_does_not_fit(stage, finished, tmp_path):
    out = tmp_path / "second"
    _, first = finished(tmp_path)
    sentence = refused(stage("dmd", init=str(first), out=str(out), head_channels=16))
    assert "has channels=8, this stage needs 16" in sentence
    for name in ("head", "student/unet"):
        file = first / name / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        assert "is damaged or incomplete" in refused(stage("dmd", init=str(first), out=str(out)))
    assert not out.exists()


@pytest.mark.parametrize("name", ["student.pt", "ema.pt", "clock.pt", "checkpoint.json"])
def test_a_checkpoint_that_is_cut_short(finished, tmp_path, name):
    config, out = finished(tmp_path, iterations=4)
    folder = out / "checkpoints" / "00000003"
    file = folder / name
    whole = file.read_bytes()
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    for damaged in (b"", whole[:10], whole[: len(whole) // 2], whole[:-100], flipped):
        file.write_bytes(damaged)
        sentence = refused(config)
        assert f"checkpoint {folder} is damaged" in sentence and f"delete {folder}" in sentence
    file.unlink()
    assert "is damaged" in refused(config)
    file.write_bytes(whole)
    run(config)
    assert len(read_metrics(out)) == 4


def test_without_its_newest_checkpoint_a_run_goes_on_from_the_one_before(finished, tmp_path):
    config, out = finished(tmp_path, iterations=4)
    whole, _ = finished(tmp_path / "whole", iterations=4)
    run(whole)
    shutil.rmtree(out / "checkpoints" / "00000003")
    (out / "summary.json").unlink()
    run(config)
    assert same_files(Path(whole.run.out), out)


def rewrite(folder: Path, name: str, content: object) -> None:
    """Replace a file of a checkpoint, checksum included, as no accident can."""
    torch.save(content, folder / name)
    index = json.loads((folder / "checkpoint.json").read_text())
    index["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(index))


@pytest.mark.parametrize("content", [{"iteration": 3}, [1, 2], torch.zeros(3), {"step": "x", "module": {}}, {}])
def test_a_checkpoint_of_something_else(finished, tmp_path, content):
    config, out = finished(tmp_path, iterations=4)
    rewrite(out / "checkpoints" / "00000003", "student.pt", content)
    assert "does not fit this run's networks; delete" in refused(config)


def test_a_checkpoint_of_other_networks_or_of_another_stage(stage, finished, tmp_path):
    config, out = finished(tmp_path, iterations=4)
    for other, what in (
        (stage(head_channels=16, iterations=1, out=str(tmp_path / "other")), "model"),
        (stage("dmd", iterations=1), "stage"),
    ):
        run(other)
        shutil.rmtree(out / "checkpoints")
        shutil.copytree(Path(other.run.out) / "checkpoints", out / "checkpoints")
        assert f"is of another {what} (" in refused(config)


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"format": 2}', '{"format": 1, "iteration": 3, "facts": {}, "sha256": []}']
)
def test_a_checkpoint_without_a_proper_index(finished, tmp_path, index):
    config, out = finished(tmp_path, iterations=4)
    (out / "checkpoints" / "00000003" / "checkpoint.json").write_text(index)
    sentence = refused(config)
    assert "checkpoint" in sentence and "delete" in sentence


def test_a_checkpoint_with_code_in_it(finished, tmp_path):
    config, out = finished(tmp_path, iterations=4)
    rewrite(out / "checkpoints" / "00000003", "student.pt", {"module": Path})
    assert "is damaged or cut short" in refused(config)


def test_the_newest_checkpoints_stay_and_the_best(stage):
    config = stage(iterations=6, checkpoint_every=1, keep_checkpoints=2, keep_best_by="loss_student")
    run(config)
    rows = read_metrics(config.run.out)
    best = min(rows, key=lambda row: row["loss_student"])["iteration"]
    kept = sorted(int(path.name) for path in (Path(config.run.out) / "checkpoints").iterdir())
    assert kept == sorted({best, 5, 6})


def test_a_metric_that_is_none(stage, tmp_path):
    assert "keep_best_by='loss_studnt' is no metric; did you mean 'loss_student'?" in refused(
        stage(keep_best_by="loss_studnt")
    )
    assert not list(tmp_path.iterdir())


def test_a_first_stage_of_another_size(stage, tmp_path):
    run(stage("gan"))
    wider, sizes = small_teacher(), {"context_dim": CONTEXT, "text_tokens": TEXT_TOKENS, "temporal_length": FRAMES}
    wider.register_modules(unet=small_unet(model_channels=32, **sizes))
    save_model(wider, tmp_path / "wider")
    sentence = refused(stage("dmd", init=str(tmp_path / "gan"), teacher=str(tmp_path / "wider")))
    assert "holds a student of another size than teacher=" in sentence and not (tmp_path / "dmd").exists()


def test_a_teacher_that_was_replaced_before_an_export(stage, teacher_folder, tmp_path):
    """The adapters, or the parts that no stage trains, would be another model's."""
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    run(stage("gan", teacher=str(tmp_path / "teacher")))
    weights = next((tmp_path / "teacher" / "unet").glob("*.safetensors"))
    save_file({key: value + 1e-3 for key, value in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match=r"is not the one that the run in .* began with"):
        export_checkpoint(tmp_path / "gan", tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_metrics_that_are_cut_short(finished, tmp_path):
    config, out = finished(tmp_path, iterations=4)
    log = out / "metrics.jsonl"
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    for damaged in (whole[:-10], b"".join(lines[:2]), b"".join(lines[::-1]), b"\xff" * len(whole), b""):
        log.write_bytes(damaged)
        assert "lacks rows of the 3 iterations that the checkpoint stands at" in refused(config)
    log.unlink()
    assert "lacks rows" in refused(config)
    log.write_bytes(whole)
    run(config)
    assert log.read_bytes().startswith(whole) and len(read_metrics(out)) == 4


def test_training_that_diverges(stage):
    config = stage(student_lr=1e30, iterations=8)
    sentence = refused(config)
    assert "training diverged" in sentence and "is not finite at iteration 4, the last of 3 in a row" in sentence
    assert "lower the learning rates" in sentence
    assert not (Path(config.run.out) / "student").exists()
    assert [("not_finite" in row) for row in read_metrics(config.run.out)] == [False, True, True, True]


def test_a_device_that_is_not_there(stage):
    config = stage(device="cuda:99")
    assert "device 'cuda:99' cannot be used here" in refused(config)
    assert not Path(config.run.out).exists()


def test_clips_that_do_not_fit_the_teacher(stage, tmp_path):
    save_clips(tmp_path / "odd", small_clips(1, height=20), {})
    config = stage(data=str(tmp_path / "odd"))
    assert "frames of 20x24 do not fit this model; use multiples of 8" in refused(config)
    assert not Path(config.run.out).exists()
