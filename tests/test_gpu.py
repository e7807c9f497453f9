"""What only a GPU can show: the same numbers as on the CPU, nothing left behind there, and nobody waiting.

``FVGEN_TEST_DEVICE=cpu`` rehearses all of it without one, as far as that goes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from conftest import REPOSITORY
from small_models import small_clips, small_teacher, student_of

from fvgen.distill import changed, read_metrics, run
from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.geometry.pointcloud import render_points
from fvgen.metrics import score_images

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("FVGEN_TEST_DEVICE", "cuda")
ON_GPU = DEVICE.startswith("cuda")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Convolutions without TF32, whose ten bits would hide mistakes (matrix products have none by default)."""
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch can use")
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def render() -> torch.Tensor:
    return torch.stack([clip.render for clip in small_clips(2)])


def test_one_seed_is_one_clip_on_every_device(render):
    teacher = small_teacher()
    for pipeline in (teacher, student_of(teacher)):
        expected = pipeline(render, rng())
        found = pipeline.to(DEVICE)(render, rng())
        assert found.device.type == torch.device(DEVICE).type
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-3)
        pipeline.to("cpu")


def test_half_precision_and_offload_give_nearly_the_same(render):
    teacher = small_teacher()
    expected = teacher(render[:1], rng(), 2)
    half = teacher.to(DEVICE, torch.bfloat16)(render[:1], rng(), 2)
    assert (half.cpu().float() - expected).abs().mean() < 0.05
    if not ON_GPU:
        pytest.skip("nothing can be offloaded to where it is")
    offloaded = small_teacher()
    offloaded.enable_model_cpu_offload()
    torch.testing.assert_close(offloaded(render[:1], rng(), 2).cpu(), expected, rtol=0, atol=2e-3)
    assert offloaded.unet.device.type == "cpu"


@pytest.mark.skipif(not ON_GPU, reason="nobody waits for a CPU")
def test_sampling_waits_for_the_gpu_only_at_its_ends(render):
    teacher = small_teacher().to(DEVICE)
    waits = []
    for steps in (2, 6):
        condition = teacher.condition(render[:1], rng())
        made = teacher.teacher()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning) as told:
                teacher.sample(condition, rng(), steps, teacher=made)
                torch.cuda.current_stream().synchronize()
                torch.zeros(1, device=DEVICE).item()  # one for the counter
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(len([warning for warning in told if "synchroniz" in str(warning.message)]))
    assert waits[0] == waits[1] > 0


@pytest.mark.parametrize("shared", [False, True])
def test_training_is_the_same_and_resumes(stage, tmp_path, shared):
    if shared and not find_spec("peft"):
        pytest.skip("peft is not installed")
    settings = {"share_backbone": True, "student_lora": True, "lora_rank": 2} if shared else {}
    settings |= {"checkpoint_activations": True, "student_lr": 1e-5, "head_lr": 1e-5, "fake_score_lr": 1e-5}
    rows = {}
    for device in ("cpu", DEVICE):
        config = stage("dmd", device=device, out=str(tmp_path / f"{device}-{shared}"), **settings)
        run(changed(config, iterations=1))
        run(config)  # goes on
        rows[device] = read_metrics(config.run.out)
    assert len(rows[DEVICE]) == 3
    for expected, found in zip(rows["cpu"], rows[DEVICE], strict=True):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=5e-3, abs=5e-4), key


def test_bfloat16_trains(stage):
    config = stage("dmd", device=DEVICE, precision="bfloat16")
    run(config)
    assert all(math.isfinite(value) for row in read_metrics(config.run.out) for value in row.values())


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.skipif(not ON_GPU, reason="tests/test_zero.py is for CPUs")
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_zero_makes_the_plain_engines_updates(stage, tmp_path, zero):
    small = {"student_lr": 1e-5, "head_lr": 1e-5, "fake_score_lr": 1e-5, "device": DEVICE}
    plain = stage("dmd", out=str(tmp_path / "plain"), **small)
    sharded = stage("dmd", out=str(tmp_path / zero), **small)
    sharded = changed(sharded, deepspeed=str(REPOSITORY / "recipes" / "deepspeed" / f"{zero}.json"))
    for config in (plain, sharded):
        run(config)
    for expected, found in zip(read_metrics(plain.run.out), read_metrics(sharded.run.out), strict=True):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=5e-3, abs=5e-4), key


def test_points_land_on_the_same_pixels():
    position = torch.tensor([[0.5, 0.2, -3.0], [-1.0, 0.0, -2.5]])
    poses = look_at(position, torch.zeros_like(position), torch.tensor([0.0, -1.0, 0.0]))
    cameras = Cameras(poses, pinhole(2, 24, 32, 60.0), 24, 32)
    points = torch.randn(500, 3, generator=rng()) * 0.5
    colors = torch.rand(500, 3, generator=rng(1))
    expected = render_points(points, colors, cameras, radius=0.05)
    found = render_points(points.to(DEVICE), colors.to(DEVICE), cameras.to(DEVICE), radius=0.05)
    for one, other in zip(expected, found, strict=True):
        differing = ((one - other.cpu()).abs() > 1e-3).float().mean()
        assert differing < 0.005  # a point on a pixel's edge may fall to either side


def test_metrics_are_the_same():
    a, b = torch.rand(2, 2, 3, 24, 32, generator=rng())
    expected, found = score_images(a, b), score_images(a.to(DEVICE), b.to(DEVICE))
    assert found["psnr"] == pytest.approx(expected["psnr"], abs=1e-3)
    assert found["ssim"] == pytest.approx(expected["ssim"], abs=1e-4)
