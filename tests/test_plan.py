"""Predictions: fake tensors take what real ones take, and the arithmetic around them is the one of the papers."""

from __future__ import annotations

import shlex
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from rich.console import Console
from small_models import small_teacher
from typer.testing import CliRunner

from fvgen.cli import app
from fvgen.distill import StageConfig, changed, read_stage_config, stage_config
from fvgen.models.family import Size
from fvgen.models.viewcrafter.family import FAMILY
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.planning import cache
from fvgen.planning import plan as planning
from fvgen.planning import simulate as simulation
from fvgen.planning.plan import (
    BUCKET,
    SHARES,
    Choice,
    Hardware,
    choices,
    clip_size,
    estimate,
    plan,
    print_plan,
    teacher_blueprint,
)
from fvgen.planning.simulate import Allocations, Profile, outline, simulate

GB = 1e9
SMALL = {k: v for k, v in small_teacher().unet.config.items() if not k.startswith("_")}
SMALL |= {"num_res_blocks": 1, "channel_mult": (1, 2)}  # following every allocation takes its time
MODEL = FAMILY, FAMILY.blueprint({"unet": SMALL, "vae": {"block_out_channels": (8, 8, 16)}})
SIZE = Size(2, 4, 16, 24)


def config(**changes) -> StageConfig:
    name = changes.pop("method", "dmd")
    settings = {"out": "unused", "batch_size": 2, "critic_updates": 1, "head_channels": 8}
    return stage_config(name, settings | changes)


def test_allocations_are_followed_until_they_are_freed():
    with Allocations() as allocations:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        del a
        c = torch.zeros(10)
        del b
    assert view.shape == (10,) and c.shape == (10,)
    totals = [activations for activations, _ in allocations.timeline()]
    assert totals == [0, 4000, 8000, 4000, 4040]


def test_work_is_torchs_own_count():
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = torch.nn.Conv2d(3, 5, 3), torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    with Allocations() as allocations:
        layer(x).sum().backward()
    assert allocations.flops == counter.get_total_flops() > 0


@pytest.fixture(scope="module")
def profile() -> Profile:
    return simulate(config(), *MODEL, SIZE)


def test_fake_tensors_take_what_real_ones_take(profile, monkeypatch):
    class NoFakes:
        def __init__(self, **_: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(simulation, "FakeTensorMode", NoFakes)
    real = simulate(config(), *MODEL, SIZE)
    assert real.flops == profile.flops > 0 and real.parameters == profile.parameters
    assert sum(real.peak()) == pytest.approx(sum(profile.peak()), rel=0.01)


def test_parameters_are_counted(profile):
    unet = sum(p.numel() for p in ViewCrafterUNet(**SMALL).parameters())
    assert profile.parameters["teacher"] == profile.parameters["student"] == profile.parameters["fake_score"] == unet
    shared = simulate(config(share_backbone=True, student_lora=True, lora_rank=2), *MODEL, SIZE)
    assert shared.parameters["teacher"] == unet and shared.parameters["student"] < unet / 2
    assert "fake_score" not in simulate(config(method="gan"), *MODEL, SIZE).parameters


def test_further_critic_updates_take_what_the_first_one_takes():
    one, two, three = (simulate(config(method="gan", critic_updates=count), *MODEL, SIZE) for count in (1, 2, 3))
    assert three.flops - two.flops == two.flops - one.flops > 0  # the third update was not followed
    assert three.timeline == two.timeline


@pytest.mark.parametrize("share", [0.01, 0.125, 1.0])
def test_the_outline_has_the_peak(share):
    generator = torch.Generator().manual_seed(0)
    timeline = tuple(map(tuple, torch.randint(0, 1000, (500, 2), generator=generator).tolist()))
    small = outline(timeline)
    assert len(small) < 50
    assert Profile(0.0, small, {}).peak(share) == Profile(0.0, timeline, {}).peak(share)


def test_profiles_are_followed_once(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path))
    followed = []
    monkeypatch.setattr(cache, "simulate", lambda *which: followed.append(which) or profile)
    settings = config(checkpoint_activations=True)
    assert cache.remembered(settings, *MODEL, SIZE) == profile
    for same in (settings, changed(settings, student_lr=1e-6, out="elsewhere", deepspeed="zero1.json", iterations=7)):
        assert cache.remembered(same, *MODEL, SIZE) == profile and len(followed) == 1
    others = [config(), changed(settings, guidance=3.0), changed(settings, accumulation=2), config(method="gan")]
    for count, other in enumerate(others, 2):
        cache.remembered(other, *MODEL, SIZE)
        assert len(followed) == count
    cache.remembered(settings, *MODEL, Size(1, 4, 16, 24))
    assert len(followed) == count + 1 == len(list((tmp_path / "profiles").iterdir()))
    for file in (tmp_path / "profiles").iterdir():
        file.write_text(file.read_text()[:-9])  # damaged
    assert cache.remembered(settings, *MODEL, SIZE) == profile and len(followed) == count + 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FVGEN_CACHE", str(blocked))
    assert cache.remembered(settings, *MODEL, SIZE) == profile


def test_checkpointing_trades_memory_for_work(profile):
    again = simulate(config(checkpoint_activations=True), *MODEL, SIZE)
    assert again.peak()[0] < 0.6 * profile.peak()[0]
    assert 1.1 * profile.flops < again.flops < 1.5 * profile.flops


def test_more_clips_take_more(profile):
    double = simulate(config(), *MODEL, Size(4, 4, 16, 24))
    assert double.flops == pytest.approx(2 * profile.flops, rel=0.05)
    assert double.peak()[0] == pytest.approx(2 * profile.peak()[0], rel=0.1)


# --- Arithmetic, with 1 GB of parameters each in teacher and student and no activations ---

BIG = Profile(1e15, ((0, 0), (0, 4 * 10**9)), {"teacher": 10**9, "student": 10**9})
MACHINES = Hardware(gpus=8, memory_gb=80, runtime_gb=0.0)


def parts(choice: Choice, **changes) -> tuple[float, ...]:
    e = estimate(config(method="gan", **changes), BIG, choice, MACHINES)
    return e.weights, e.gradients, e.optimizer, e.activations, e.buffers


def test_the_plain_engine_keeps_16_bytes_a_parameter_and_the_average():
    assert parts(Choice(0, False, "three models")) == (8, 4, 8 + 4, 0, 0)


def test_zero_divides_states_then_gradients_then_weights():
    bucket = 2 * BUCKET * 4 / GB
    one, two, three = (parts(Choice(zero, False, "three models")) for zero in (1, 2, 3))
    assert one[:3] == (8, 4, (4 + 8) / 8 + 4 / 8) and two[:3] == (8, 0.5, 2.0) and three[:3] == (1, 0.5, 2.0)
    assert one[4] == pytest.approx(bucket + 0.5)  # the step's float32 gradient of the own partition
    assert two[4] == pytest.approx(bucket + 0.5) and three[4] == pytest.approx(bucket + 0.5 + 2)


def test_offloading_empties_the_gpu():
    assert parts(Choice(2, False, "three models", offload_optimizer=True))[2] == 0.5  # the average stays
    assert parts(Choice(2, False, "three models", offload_teacher=True))[0] == 4


def test_bfloat16_halves_weights_and_adds_masters():
    weights, _, optimizer, _, _ = parts(Choice(0, False, "three models"), precision="bfloat16")
    assert weights == 4 and optimizer == 12 + 4


def test_the_head_stays_float32_under_every_engine():
    head = Profile(0.0, ((0, 0),), {"teacher": 0, "student": 0, "head": 10**9})
    for zero in (0, 1, 2):
        choice = Choice(zero, False, "three models")
        assert estimate(config(method="gan", precision="bfloat16"), head, choice, MACHINES).weights == 4


def test_time_follows_the_work():
    choice = Choice(0, False, "three models")
    slow, fast = (estimate(config(method="gan"), BIG, choice, Hardware(8, 80, tflops)) for tflops in (100, 200))
    assert slow.seconds == pytest.approx(1e15 / (100e12 * 0.35)) and fast.seconds == slow.seconds / 2


def test_what_fits_comes_first_and_whole_models_before_adapters():
    small = Profile(1e15, ((10**9, 0),), {"teacher": 10**9, "student": 10**7, "fake_score": 10**7})
    found = {(share, again): BIG if share == "three models" else small for share in SHARES for again in (False, True)}
    roomy = plan(config(), found, Hardware(8, 80, runtime_gb=0.0))
    assert roomy[0].choice.share == "three models" and roomy[0].total < 76
    assert {e.choice for e in roomy} == set(choices(Hardware(8)))
    narrow = plan(config(), found, Hardware(1, 6, runtime_gb=0.0))
    assert narrow[0].choice.share != "three models" and narrow[0].total < 5.7
    none = plan(config(), found, Hardware(8, 1, runtime_gb=0.0))
    assert none[0].total == min(e.total for e in none)


def test_one_gpu_is_offered_the_plain_engine():
    assert {choice.zero for choice in choices(Hardware(gpus=1))} == {0, 2}


def test_the_published_model_needs_no_weights():
    family, blueprint = teacher_blueprint("viewcrafter")
    latents, condition = blueprint.example(Size(1, 16, 320, 512))
    assert family.name == "viewcrafter" and latents.shape == (1, 4, 16, 40, 64)
    assert condition["text_tokens"].shape == (1, 77, 1024) and condition["image_tokens"].shape == (1, 256, 1024)
    _, blueprint = teacher_blueprint("tiny")
    assert blueprint.example(Size(2, 8, 48, 64))[0].shape == (2, 4, 8, 12, 16) and blueprint.guidance == 7.5
    assert clip_size("builtin", None, None)[1:] == (48, 64) and clip_size("builtin", 9, (16, 24)) == (9, 16, 24)


@pytest.fixture
def settings_file(tmp_path, teacher_folder, clip_folder):
    file = tmp_path / "settings.yaml"
    file.write_text(f"teacher: {teacher_folder}\ndata: {clip_folder}\nbatch_size: 2\nhead_channels: 8\n")
    return file


def printed_line(output: str) -> tuple[list[str], list[str]]:
    """The words of the command that was recommended: those before its settings, and these. Its files exist."""
    line = shlex.split(output.partition("Recommended")[2].splitlines()[1])
    files = [word for word in line if word.endswith((".py", ".yaml", ".json"))]
    assert len(files) >= 2 and all(Path(file).is_file() for file in files)
    return [word for word in line if "=" not in word], [word for word in line if "=" in word]


def test_the_command_prints_a_table_and_the_line_that_trains(settings_file, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "remembered", lambda *_: profile)
    words = ["plan", "--config", str(settings_file), "--gpus", "2", "seed=3", "share_backbone=true", "deepspeed=x.json"]
    for folder in (REPOSITORY, tmp_path):
        monkeypatch.chdir(folder)
        outcome = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
        assert outcome.exit_code == 0, outcome.output
        line, settings = printed_line(outcome.output)
        assert line[:3] == ["deepspeed", "--num_gpus", "2"] and line[3].endswith("recipes/stage2_dmd.py")
        assert set(settings) == {"seed=3", "share_backbone=false", "device=cuda", "init=STAGE_1", "out=OUT"}
        read_stage_config("dmd", line[5], [*settings, f"deepspeed={line[7]}"])
    outcome = CliRunner().invoke(app, [*words, "--gpus", "1", "--stage", "gan", "batch_size=1", "out=runs/a b"])
    line, settings = printed_line(outcome.output)
    assert line[0] == "python" and line[1].endswith("recipes/stage1_gan.py") and len(line) == 4
    assert "deepspeed=" in settings and "out=runs/a b" in settings
    assert read_stage_config("gan", line[3], settings).memory.share_backbone is False


@pytest.mark.slow
def test_a_second_plan_is_there_at_once(settings_file, tmp_path, monkeypatch):
    words = ["plan", "--config", str(settings_file), "--gpus", "2"]
    first, second = (
        CliRunner().invoke(app, words, env={"COLUMNS": "80", "FVGEN_CACHE": str(tmp_path / "cache")}) for _ in range(2)
    )
    # Above the table runs a bar that shows the time.
    tables = [outcome.output.partition("ZeRO")[2] for outcome in (first, second)]
    assert first.exit_code == 0 and "Recommended: " in tables[0] and tables[0] == tables[1]
    assert len(list((tmp_path / "cache" / "profiles").iterdir())) == 6


def test_the_table_has_a_line_for_each_choice_in_80_columns():
    hardware, text = Hardware(8), StringIO()
    found = {(share, again): BIG for share in SHARES for again in (False, True)}
    estimates = plan(config(precision="bfloat16"), found, hardware)
    print_plan(estimates, hardware, Console(file=text, width=80), lambda choice: choice.describe())
    lines = text.getvalue().splitlines()
    rows = [line.split() for line in lines if line.split()[-1:] in (["yes"], ["no"])]
    assert len(rows) == len(choices(hardware)) and all(len(row) >= 12 for row in rows)
    for row, e in zip(rows, estimates, strict=True):
        assert row[0] == str(e.choice.zero) and float(row[-3]) == pytest.approx(e.total, abs=0.05)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "3"], "does not divide among 3 GPUs; give a multiple of 3"),
        (["--gpus", "2", "--size", "20x24"], "frames of 20x24 do not fit this model; use multiples of 8"),
        (["--gpus", "2", "--stage", "x"], "there are gan and dmd"),
        (["--gpus", "2", "teacher=nowhere"], "nowhere is no model folder"),
        (["--gpus", "2", "batch=3"], "unknown setting 'batch'"),
    ],
)
def test_what_cannot_be_planned(settings_file, words, sentence):
    outcome = CliRunner().invoke(app, ["plan", "--config", str(settings_file), *words])
    assert outcome.exit_code == 2 and sentence in outcome.output and "Traceback" not in outcome.output
