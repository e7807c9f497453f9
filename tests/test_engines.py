"""Engines: what an update changes, what it skips, what it leaves alone, and what it never waits for."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from small_models import small_teacher
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fvgen.clips.folder import ClipFolder
from fvgen.clips.latents import load_latents
from fvgen.distill import Trainer, run, stage_config
from fvgen.distill.draws import Draws
from fvgen.distill.engines import Optimization, PlainEngine, join_world
from fvgen.distill.learners import Learner, make_learner
from fvgen.distill.methods.base import Part, Setup
from fvgen.distill.methods.dmd import Dmd
from fvgen.distill.settings import Optimizer
from fvgen.distill.zero_settings import zero_settings
from fvgen.errors import UserError
from fvgen.models.viewcrafter.pipelines import FVGenPipeline
from fvgen.pipelines.folders import load_pipeline
from fvgen.system.packages import install
from fvgen.system.processes import ALONE, World


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def engine_of(module: nn.Module, **changes) -> PlainEngine:
    settings = {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.0, "clip_norm": 1e9} | changes
    return PlainEngine(module, Optimization(**settings))


# --- Random numbers of a global batch ---


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_sees_its_rows_of_the_same_numbers(processes):
    whole, size = Draws(rng()), 6 // processes
    parts = [Draws(rng(), 6, slice(r * size, (r + 1) * size)) for r in range(processes)]
    like = torch.zeros(6, 4, 3)
    for name, arguments in (("normal", ()), ("integers", (0, 1000)), ("normal", ())):
        expected = getattr(whole, name)(*arguments, like)
        got = torch.cat([getattr(part, name)(*arguments, like[:size]) for part in parts])
        assert torch.equal(got, expected) and len(expected.unique()) > 3
    assert {part.shared_integer(1000) for part in parts} == {whole.shared_integer(1000)}


def test_a_copy_gives_the_same_numbers_again():
    draws = Draws(rng(), 4)
    again, other = draws.copy(), draws.copy(slice(2, 4))
    numbers = draws.normal(torch.zeros(4, 5))
    assert torch.equal(again.normal(torch.zeros(4, 5)), numbers)
    assert torch.equal(other.normal(torch.zeros(2, 5)), numbers[2:])


# --- Updates ---


def test_parts_add_up_to_the_whole():
    torch.manual_seed(0)
    x, whole = torch.randn(6, 3), nn.Linear(3, 2)
    parts = copy.deepcopy(whole)
    first, second = engine_of(whole), engine_of(parts, accumulation=3)
    norm = first.update(whole(x).square().mean())
    norms = [second.update(parts(x[i : i + 2]).square().mean()) for i in (0, 2, 4)]
    assert norms[:2] == [None, None]
    torch.testing.assert_close(norms[2], norm)
    torch.testing.assert_close(parts.weight, whole.weight)


def test_a_stage_in_parts_is_the_stage(stage, tmp_path):
    rows = {}
    for parts in (1, 2):
        trainer = Trainer(stage(batch_size=4, accumulation=parts, out=str(tmp_path / str(parts)), critic_updates=2))
        rows[parts] = [trainer.iterate(iteration) for iteration in (1, 2)]
    for one, two in zip(rows[1], rows[2], strict=True):
        assert one.keys() == two.keys()
        for key in set(one) - {"student_std"}:  # the mean of the parts' spreads
            assert two[key] == pytest.approx(one[key], rel=2e-4, abs=1e-6), key


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_update_that_is_not_finite_is_skipped(fused, bad):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    engine = engine_of(module, fused=fused)
    engine.update(module(torch.ones(3)).sum())
    before = copy.deepcopy(engine.state_dict())
    norm = engine.update((module(torch.ones(3)) * bad).sum())
    assert not norm.isfinite()
    after = engine.state_dict()
    assert after["step"] == before["step"] == 1
    for key in ("module", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(after[key][name], before[key][name]) for name in before[key])
    assert engine.update(module(torch.ones(3)).sum()).isfinite() and engine.state_dict()["step"] == 2


def test_one_bad_part_skips_the_whole_update():
    module = nn.Linear(3, 2)
    engine, before = engine_of(module, accumulation=2), module.weight.clone()
    engine.update(module(torch.full((3,), torch.nan)).sum())
    assert not engine.update(module(torch.ones(3)).sum()).isfinite() and torch.equal(module.weight, before)


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    torch.manual_seed(0)
    module = nn.Linear(8, 8).bfloat16()
    module.weight.data.fill_(1.0)  # whose neighbour below is 1 - 1/256
    engine = engine_of(module, lr=1e-3, betas=(0.0, 0.999))
    for step in range(1, 11):
        engine.update(module(torch.ones(1, 8, dtype=torch.bfloat16)).float().sum())
        torch.testing.assert_close(engine.masters[0], torch.full((8, 8), 1 - 1e-3 * step), rtol=1e-4, atol=0)
        assert torch.equal(module.weight, engine.masters[0].bfloat16())
    assert module.weight.max() < 1


def test_masters_go_on_where_the_earlier_stage_ended(stage):
    gan = stage("gan", precision="bfloat16", iterations=1)
    run(gan)
    trainer = Trainer(stage("dmd", precision="bfloat16", init=gan.run.out))
    name = "middle_block.0.conv1.weight"
    saved = load_pipeline(Path(gan.run.out) / "student", FVGenPipeline).unet.get_parameter(name)
    student = trainer.method.learners["student"]
    start = student.engine.gather(student.engine.masters)[f"network.{name}"]
    assert torch.equal(start, saved) and torch.equal(student.average.weights()[f"network.{name}"], saved)
    assert not torch.equal(saved, saved.bfloat16().float())
    assert torch.equal(trainer.method.student.network.get_parameter(name), saved.bfloat16())


def test_masters_start_at_the_teachers_exact_weights(stage):
    trainer = Trainer(stage("dmd", precision="bfloat16"))
    name, exact = "middle_block.0.conv1.weight", small_teacher().unet
    for learner in (trainer.method.learners["student"], trainer.method.learners["fake_score"]):
        start = learner.engine.gather(learner.engine.masters)[f"network.{name}"]
        assert torch.equal(start, exact.get_parameter(name)) and not torch.equal(start, start.bfloat16().float())
        assert torch.equal(learner.module.network.get_parameter(name), start.bfloat16())


def test_a_stage_in_bfloat16(stage):
    trainer = Trainer(stage("dmd", precision="bfloat16", iterations=2))
    folder = trainer.train()
    assert trainer.method.student.network.dtype == torch.bfloat16 and folder.is_dir()
    student = trainer.method.learners["student"]
    masters, average = student.engine.masters, student.average.weights()
    assert all(master.dtype == torch.float32 for master in masters)
    assert all(tensor.dtype == torch.float32 for tensor in average.values())


def test_parts_in_bfloat16_add_up_in_float32():
    """512 parts of equal gradients: in bfloat16, 256 + 1 is 256 again, and half of them would count for nothing."""
    module, parts = nn.Linear(4, 4, bias=False).bfloat16(), 512
    engine = engine_of(module, accumulation=parts)
    norms = [engine.update(parts * module(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum()) for _ in range(parts)]
    torch.testing.assert_close(norms[-1], torch.tensor(4.0 * parts))


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_goes_on_where_it_was(fused):
    torch.manual_seed(0)
    first, x = nn.Linear(3, 2), torch.randn(4, 3)
    one = engine_of(first, fused=fused)
    one.update(first(x).square().mean())
    second = nn.Linear(3, 2)
    two = engine_of(second, fused=fused)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for engine, module in ((one, first), (two, second)):
        engine.update(module(x).square().mean())
    assert torch.equal(first.weight, second.weight)
    for wrong, error in (
        ({"weight": torch.zeros(2, 3)}, KeyError),
        ({"weight": torch.zeros(3), "bias": torch.zeros(2)}, RuntimeError),
    ):
        with pytest.raises(error):
            two.scatter(wrong)


def test_frozen_lets_gradients_through_but_not_in():
    head, x = nn.Linear(3, 1), torch.ones(3, requires_grad=True)
    with Learner("head", head, engine_of(head), Optimizer()).frozen():
        loss = head(x).sum()
    loss.backward()
    assert torch.equal(x.grad, head.weight[0]) and head.weight.grad is None and head.weight.requires_grad


# --- The rate ---


def test_the_rate_rises_and_falls():
    """Linear up, then half a cosine's wave, which has 3/4 left after a third of the way and 1/2 in the middle."""
    plain, warm = Optimizer(lr=0.5), Optimizer(lr=0.5, lr_warmup=4)
    assert {plain.rate(i, 10) for i in (1, 5, 10)} == {0.5}
    assert [warm.rate(i, 10) for i in (1, 2, 4, 5, 10)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    both = Optimizer(lr=0.5, lr_warmup=4, lr_schedule="cosine")
    assert [both.rate(i, 10) for i in (1, 2, 4, 5)] == [0.125, 0.25, 0.5, 0.5]
    assert both.rate(7, 10) == pytest.approx(0.375) and both.rate(8, 10) == pytest.approx(0.25)
    assert 0 < both.rate(10, 10) < both.rate(9, 10)


def test_an_update_is_made_at_its_rate():
    """AdamW's first step is the rate itself, whatever the gradient."""
    weight = nn.Linear(1, 1, bias=False)
    engine = engine_of(weight, betas=(0.0, 0.0))
    learner = Learner("head", weight, engine, Optimizer(lr=1.0, lr_warmup=4, lr_schedule="cosine"))
    moved = []
    for iteration in (1, 2, 4, 5, 8):
        learner.begin(iteration, 12)
        before = weight.weight.item()
        learner.update(weight.weight.sum() * 3)
        moved.append(before - weight.weight.item())
    assert moved == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi * 3 / 8))], rel=1e-5)


# --- What never happens inside an update ---


class Waits(TorchDispatchMode):
    """Operations that make Python wait for a value of a tensor."""

    names = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = str(func).startswith("aten.index.Tensor") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masked or str(func).startswith(self.names):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_what_it_should():
    with Waits() as waits:
        x = torch.ones(2)
        _ = x.sum().item(), bool(x[0] > 0), x[x > 0], float(x[1])
    assert len(waits.found) == 4


@pytest.mark.parametrize("same_noise", [False, True])
@pytest.mark.parametrize("kind", ["non_saturating", "relativistic"])
def test_no_update_waits_for_a_tensor(stage, clip_folder, kind, same_noise):
    # fused=True is what a GPU gets. The other AdamW keeps its counters on the CPU and reads them there.
    config, base = stage("dmd", fused=True, r1_weight=0.1, gan_kind=kind, same_noise=same_noise), small_teacher()
    learner = partial(make_learner, config, ALONE)
    method = Dmd.build(Setup(config, base.family, base.teacher(), learner))
    batch = load_latents(ClipFolder(clip_folder), base).batch([0, 1])
    draws = Draws(rng())
    with Waits() as waits:
        for iteration in (1, 2):
            (metrics,) = method.iterate(iteration, lambda: [Part(batch, draws)])
    assert waits.found == []
    assert all(isinstance(value, Tensor) for value in metrics.values())


def test_one_look_serves_head_and_student(stage):
    passes = {}
    for same in (False, True):
        trainer = Trainer(stage("dmd", same_noise=same, guidance=1.0, out=str(stage().run.out) + str(same)))
        calls: list[bool] = []
        handle = trainer.method.teacher.network.register_forward_hook(lambda *_, calls=calls: calls.append(True))
        row = trainer.iterate(1)
        handle.remove()
        passes[same] = len(calls)
        assert row["loss_student_dmd"] >= 0
    assert passes == {False: 3, True: 2}


def test_one_pass_of_the_fake_score_teaches_it_and_judges_the_student(stage):
    """One pass fewer; and the student is judged by what the fake score said before it learnt, at the head's place."""
    passes, seen = {}, []
    for one in (False, True):
        config = stage("dmd", same_noise=True, one_pass=one, guidance=1.0, out=f"{stage().run.out}{one}")
        method = (trainer := Trainer(config)).method
        before = {name: weight.clone() for name, weight in method.fake_score.state_dict().items()}
        calls, inputs = [], []

        def note(module, arguments, output, calls=calls):
            calls.append(True)

        handle = method.fake_score.network.register_forward_hook(note)
        judge = method.matching_loss
        method.matching_loss = lambda *a, judge=judge, inputs=inputs: (inputs.append(a), judge(*a))[1]
        row = trainer.iterate(1)
        handle.remove()
        passes[one] = len(calls)
        assert row["loss_fake_score"] > 0 and row["loss_student_dmd"] >= 0
        (rollout, view, _), after = inputs[0], method.fake_score.state_dict()
        seen.append(view.x0_fake)
    assert passes == {False: 2, True: 1} and seen[0] is None
    assert any(not torch.equal(after[name], before[name]) for name in before)  # it has learnt meanwhile
    method.fake_score.load_state_dict(before)
    with torch.no_grad():
        expected = method.fake_score(view.x_tau, view.tau, rollout.batch.condition)
    torch.testing.assert_close(seen[1], expected, rtol=1e-4, atol=1e-5)
    velocity = method.schedule.velocity(rollout.x0.detach(), view.noise, view.tau)
    found = method.schedule.v_from_x0(view.x_tau.detach(), expected, view.tau)
    assert row["loss_fake_score"] == pytest.approx((found - velocity).square().mean().item(), rel=1e-3)


# --- What is refused, in one sentence, before any long work ---


@pytest.fixture
def refusal(stage, tmp_path) -> Callable[..., str]:
    def call(content: object, processes: int = 2, **changes) -> str:
        file = tmp_path / "zero.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        config = stage("dmd", deepspeed=str(file), **changes)
        with pytest.raises(UserError) as error:
            zero_settings(config, World(size=processes))
        assert "\n" not in str(error.value)
        return str(error.value)

    return call


ZERO = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "changes", "words"),
    [
        ("{", {}, "cannot be read"),
        ([1], {}, "stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, {}, "stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, {}, "stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2.0}}, {}, "stage must be 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            {},
            'offload_optimizer must read {"device": "cpu"}',
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "offload_param must read"),
        (ZERO | {"amp": {"enabled": True}}, {}, "amp is not for these networks"),
        (
            ZERO | {"train_batch_size": 8},
            {},
            "train_batch_size follows from fvgen's own settings; remove it and set batch",
        ),
        (ZERO | {"optimizer": {"type": "Adam"}}, {}, "optimizer follows"),
        (ZERO | {"fp16": {"enabled": True}}, {}, "set precision=bfloat16"),
        (ZERO | {"bf16": {"enabled": True}}, {}, "bf16 is True but precision=float32"),
        (ZERO | {"bf16": {"enabled": False}}, {"precision": "bfloat16"}, "bf16 is False but precision=bfloat16"),
        ({"zero_optimization": {"stage": 3}}, {"share_backbone": True}, "take ZeRO-1 or 2"),
        ({"zero_optimization": {"stage": 2, "offload_param": {}}}, {}, "offload_param works with ZeRO-3 only"),
        (
            ZERO,
            {"batch_size": 3},
            "batch_size=3 does not divide among 2 processes x accumulation=1; give a multiple of 2",
        ),
        (ZERO, {"batch_size": 6, "accumulation": 2}, "give a multiple of 4"),
    ],
)
def test_settings_of_deepspeed_that_cannot_work(refusal, content, changes, words):
    assert words in refusal(content, **changes)


def test_settings_of_deepspeed_are_completed(stage, tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(ZERO))
    config = stage(deepspeed=str(file), batch_size=8, accumulation=2, clip_norm=0.5, precision="bfloat16")
    settings = zero_settings(config, World(size=2), config.optim["head"].clip_norm)
    assert settings["train_micro_batch_size_per_gpu"] == 2 and settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5 and settings["bf16"]["enabled"] is True
    assert settings["zero_optimization"] == {"stage": 2}
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": None}}))
    assert zero_settings(config, World(size=2))["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("wrong", [{"ofload_optimizer": {}}, {"reduce_bucket_size": "big"}, {"reduce_bucket_size": -1}])
def test_names_and_values_that_deepspeed_refuses(stage, tmp_path, monkeypatch, wrong):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install -e '.[train]'")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2} | wrong}))
    with pytest.raises(UserError, match=f"DeepSpeed refuses zero_optimization.{next(iter(wrong))} "):
        join_world(stage(deepspeed=str(file)))


def test_processes_without_deepspeed(stage, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started without --deepspeed FILE"):
        join_world(stage())


def test_deepspeed_that_is_not_installed(stage, tmp_path, monkeypatch):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(ZERO))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=rf"needs the package deepspeed .* `{re.escape(install('train'))}`"):
        join_world(stage(deepspeed=str(file)))


def test_parts_that_do_not_divide(stage):
    config = stage(batch_size=3, accumulation=2)
    with pytest.raises(UserError, match="batch_size=3 does not divide among 1 processes x accumulation=2"):
        Trainer(config)
    assert not Path(config.run.out).exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student_lora": True}, "needs share_backbone=true"),
        ({"offload_teacher": True}, "needs deepspeed=FILE"),
        (
            {"offload_teacher": True, "share_backbone": True, "deepspeed": "zero2.json"},
            "offload_teacher=true does not go with share_backbone=true",
        ),
        ({"same_noise": True, "accumulation": 2}, "same_noise=true needs accumulation=1"),
        ({"one_pass": True}, "one_pass"),
    ],
)
def test_settings_that_contradict_each_other(stage, changes, words):
    with pytest.raises(UserError, match=words):
        stage(**changes)


def test_settings_are_of_the_stage() -> None:
    assert stage_config("gan", {"out": "x"}).memory.precision == "float32"
