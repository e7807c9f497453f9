"""One frozen network in several roles."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import LATENTS, small_teacher
from torch import Tensor

from fvgen.distill import Trainer, export_checkpoint, run
from fvgen.errors import UserError
from fvgen.models.viewcrafter.family import LORA_TARGETS
from fvgen.models.viewcrafter.pipelines import FVGenPipeline
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.folders import load_pipeline
from fvgen.system.packages import install

pytest.importorskip("peft")
from fvgen.models.lora import Role, SharedBackbone, merged_weights


@pytest.fixture
def backbone() -> SharedBackbone:
    torch.manual_seed(0)
    return SharedBackbone(small_teacher().unet, ["student", "fake_score"], 2, LORA_TARGETS)


def disturb(role: Role, seed: int) -> None:
    """Adapters start as nothing: give this one something to say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    frames = LATENTS[1]
    sample = torch.randn(2, 2 * LATENTS[0], *LATENTS[1:], generator=generator)
    return sample, torch.tensor([10, 700]), torch.randn(2, 5 + 16 * frames, 32, generator=generator)


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_only_its_role(backbone):
    plain = small_teacher().unet.requires_grad_(False).eval()
    roles = {name: Role(backbone, name) for name in ("student", "fake_score")}
    with torch.no_grad():
        expected = plain(*arguments()).sample
        for network in (backbone.network, *roles.values()):
            assert torch.equal(network(*arguments()).sample, expected)
        disturb(roles["student"], 1)
        assert torch.equal(backbone.network(*arguments()).sample, expected)
        assert torch.equal(roles["fake_score"](*arguments()).sample, expected)
        assert (roles["student"](*arguments()).sample - expected).abs().mean() > 1e-3
        features = roles["student"](*arguments(), taps=("middle",), only_taps=True).features["middle"]
    assert features.shape == plain.features(*arguments()).shape


def test_the_roles_own_nothing_of_each_other_nor_of_the_backbone(backbone):
    roles = [Role(backbone, name) for name in ("student", "fake_score")]
    owned = [{id(p) for p in role.parameters()} for role in roles]
    assert owned[0] and not owned[0] & owned[1]
    assert all(p.requires_grad for role in roles for p in role.parameters())
    others = {id(p) for p in backbone.network.parameters()} - owned[0] - owned[1]
    assert not any(p.requires_grad for p in backbone.network.parameters() if id(p) in others)
    count = sum(p.numel() for p in roles[0].parameters())
    assert count < 0.5 * sum(p.numel() for p in backbone.network.parameters() if id(p) in others)


def test_a_merged_adapter_is_the_role(backbone):
    role = Role(backbone, "student")
    disturb(role, 1)
    disturb(Role(backbone, "fake_score"), 2)
    merged = ViewCrafterUNet.from_config(backbone.network.config).eval()
    weights = {f"network.{name}": p.detach() for name, p in role.named_parameters()}
    merged.load_state_dict(merged_weights(backbone.network, weights))
    with torch.no_grad():
        torch.testing.assert_close(merged(*arguments()).sample, role(*arguments()).sample, rtol=1e-4, atol=1e-5)


def test_blocks_computed_again_play_the_role_they_had(backbone):
    roles = [Role(backbone, name) for name in ("student", "fake_score")]
    for seed, role in enumerate(roles):
        disturb(role, seed)

    def gradient() -> list[Tensor]:
        loss = roles[0](*arguments()).sample.square().mean()
        with torch.no_grad():
            roles[1](*arguments())  # others play before the backward pass
            backbone.network(*arguments())
        return list(torch.autograd.grad(loss, list(roles[0].parameters())))

    kept = gradient()
    backbone.network.enable_gradient_checkpointing(backbone.checkpointed)
    assert any(g.abs().max() > 0 for g in kept)
    for again, before in zip(gradient(), kept, strict=True):
        torch.testing.assert_close(again, before)


@pytest.mark.parametrize("student", [False, True])
def test_a_stage_on_a_shared_backbone(stage, tmp_path, student):
    config = stage("dmd", share_backbone=True, student_lora=student, lora_rank=2, iterations=2, checkpoint_every=1)
    teacher = Trainer(config).base.unet.conv_out.weight.clone()
    folder = run(config)
    trained = load_pipeline(folder, FVGenPipeline).unet
    assert not any("lora" in name for name in trained.state_dict())
    assert not torch.equal(trained.init_attn.proj_in.weight, small_teacher().unet.init_attn.proj_in.weight)
    assert torch.equal(trained.conv_out.weight, teacher) == student  # no adapter there
    exported = export_checkpoint(config.run.out, tmp_path / "exported")
    same = load_pipeline(exported, FVGenPipeline).unet.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in trained.state_dict().items())


def test_an_adapter_goes_from_stage_to_stage(stage, tmp_path):
    lora = {"share_backbone": True, "student_lora": True, "lora_rank": 2, "iterations": 2}
    first = stage("gan", **lora)
    run(first)
    second = Trainer(stage("dmd", init=first.run.out, **lora))
    before = load_pipeline(Path(first.run.out) / "student", FVGenPipeline).unet.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            second.method.student.network(*arguments()).sample, before(*arguments()).sample, rtol=1e-4, atol=1e-5
        )
    file = Path(first.run.out) / "student_lora.safetensors"
    with pytest.raises(UserError, match="damaged or of another lora_rank"):
        Trainer(stage("dmd", init=first.run.out, **lora | {"lora_rank": 4}, out=str(tmp_path / "b")))
    file.unlink()
    with pytest.raises(UserError, match="its student was trained whole"):
        Trainer(stage("dmd", init=first.run.out, **lora, out=str(tmp_path / "c")))
    assert not (tmp_path / "c").exists()


def test_an_adapters_masters_go_on_where_the_earlier_stage_ended(stage):
    lora = {"share_backbone": True, "student_lora": True, "lora_rank": 2, "precision": "bfloat16"}
    first = stage("gan", iterations=1, **lora)
    run(first)
    saved = load_file(Path(first.run.out) / "student_lora.safetensors")
    student = Trainer(stage("dmd", init=first.run.out, **lora)).method.learners["student"]
    start = student.engine.gather(student.engine.masters)
    assert saved.keys() == start.keys() and all(torch.equal(start[name], saved[name]) for name in saved)
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values())


def test_peft_that_is_not_installed(monkeypatch):
    unet = small_teacher().unet
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=rf"needs the package peft .* `{re.escape(install('train'))}`"):
        SharedBackbone(unet, ["student"], 2, LORA_TARGETS)


def test_export_of_what_is_no_run(stage, tmp_path):
    with pytest.raises(UserError, match="is no run's folder"):
        export_checkpoint(tmp_path, tmp_path / "out")
    config = stage(iterations=2, checkpoint_every=1)
    run(config)
    with pytest.raises(UserError, match="keeps no checkpoint of iteration 7; it has 1, 2"):
        export_checkpoint(config.run.out, tmp_path / "out", 7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    shutil.copytree(config.run.teacher, tmp_path / "teacher")
    for taken in ("mine", "mine/notes.txt", "teacher"):
        with pytest.raises(UserError, match="is no earlier student and not empty"):
            export_checkpoint(config.run.out, tmp_path / taken)
    one = export_checkpoint(config.run.out, tmp_path / "one", 1)
    assert load_pipeline(one, FVGenPipeline).config.steps == 4
    file = Path(config.run.out) / "checkpoints" / "00000002" / "ema.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged or cut short"):
        export_checkpoint(config.run.out, tmp_path / "two")
    shutil.rmtree(Path(config.run.out) / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export_checkpoint(config.run.out, tmp_path / "two")
    assert not (tmp_path / "two").exists()
