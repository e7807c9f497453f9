"""`method: camera`: from an image-to-video folder to a guided teacher, and from there through the other methods."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import refusal
from PIL import Image
from small_cameras import SETTINGS, cameras
from small_cogvideox import FRAMES, HEIGHT, WIDTH, rng, small_teacher, video
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fvgen import distill
from fvgen.clips.clip import Clip
from fvgen.clips.filters import LIMITS
from fvgen.clips.folder import save_clips
from fvgen.clips.latents import LatentBatch
from fvgen.distill.draws import Draws
from fvgen.distill.methods.camera import AC3D, Camera, CameraSettings, truncated_normal
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.conventions import from_opengl
from fvgen.models.condition import CAMERA_PATH, Condition
from fvgen.models.family import Size
from fvgen.pipelines.cameras import clip_path
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.planning.plan import profiles, teacher_blueprint
from fvgen.planning.simulate import simulate
from fvgen.shards.prepare import prepare
from fvgen.shards.reader import ShardSet

COMMON = {"iterations": 2, "batch_size": 2, "checkpoint_every": 1, "sample_every": 0, "track": False}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "i2v"
    save_model(small_teacher(image_condition="first"), folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    known = torch.tensor([True, *[False] * (FRAMES - 1)])
    folder = tmp_path_factory.mktemp("data") / "clips"
    truths = enumerate(video(3))
    save_clips(folder, [Clip(f"clip-{i}", x, x * 0.9, known, cameras(i)) for i, x in truths], {"kind": "test"})
    return folder


@pytest.fixture
def stage(base_folder, clip_folder, tmp_path) -> Callable[..., distill.StageConfig]:
    def make(name: str = "camera", **changes) -> distill.StageConfig:
        own = {"student_lr": 1e-2, **SETTINGS} if name == "camera" else {}
        sources = {"out": str(tmp_path / name), "teacher": str(base_folder), "data": str(clip_folder)}
        return distill.stage_config(name, COMMON | sources | own | changes)

    return make


@pytest.fixture(scope="module")
def guided_folder(base_folder, clip_folder, tmp_path_factory) -> Path:
    """What a run leaves."""
    out = tmp_path_factory.mktemp("runs") / "camera"
    words = COMMON | SETTINGS | {"out": str(out), "teacher": str(base_folder), "data": str(clip_folder)}
    own = {"student_lr": 1e-2, "ema_decay": 0.0, "camera_guidance": 2.0}
    found = distill.run(distill.stage_config("camera", words | own))
    assert found == out / "teacher"
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return load_pipeline(folder, TeacherPipeline).network.state_dict()


# --- Training ---


def test_a_run_leaves_a_guided_teacher_whose_base_has_not_moved(base_folder, guided_folder):
    before, after = weights(base_folder), weights(guided_folder)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    torch.manual_seed(0)
    start = small_teacher(image_condition="first").with_cameras(**SETTINGS).network.state_dict()
    still = [name for name in after.keys() - before.keys() if torch.equal(after[name], start[name])]
    # Two updates: the layers behind an encoder's last one, which was 0 at the second, are still to come.
    assert all("encoder" in name and ".last." not in name for name in still), still
    assert "cameras=path" in (guided_folder / "README.md").read_text()
    made = load_pipeline(guided_folder, TeacherPipeline)
    assert made.config.camera_guidance == 2.0
    kept, told = (CameraSettings(**words).student_of(made, made.network) for words in ({}, {"camera_guidance": 1.0}))
    assert (kept.config.camera_guidance, told.config.camera_guidance) == (2.0, 1.0)
    one, two = (load_pipeline(guided_folder, TeacherPipeline)(video(), cameras=cameras(seed)) for seed in (1, 2))
    assert not torch.equal(one, two)


def test_a_run_that_was_cut_ends_as_one_that_was_not(stage, tmp_path):
    whole, cut = stage(iterations=3), stage(out=str(tmp_path / "cut"), iterations=3)
    distill.run(distill.changed(cut, iterations=1))
    found = (distill.run(each) for each in (cut, whole))
    one, two = (weights(folder) for folder in found)
    assert distill.read_metrics(whole.run.out) == distill.read_metrics(cut.run.out)
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    exported = weights(distill.export_checkpoint(cut.run.out, tmp_path / "exported"))
    assert all(torch.equal(exported[name], tensor) for name, tensor in two.items())


def test_in_bfloat16_what_does_not_learn_is_left_as_exact_as_it_was(base_folder, stage):
    before = weights(base_folder)
    after = weights(distill.run(stage(precision="bfloat16", checkpoint_activations=True)))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("branch", ["lora", "control"])
def test_either_branch_alone_trains(stage, branch):
    idle = ("control_blocks",) if branch == "lora" else ("camera_lora_rank",)
    words = {name: value for name, value in stage().words().items() if name not in (*idle, "copy_blocks")}
    words = {key: value for key, value in words.items() if key != "branch_width" or branch == "control"}
    folder = distill.run(distill.stage_config("camera", words | {"branch": branch, "iterations": 1}))
    assert load_pipeline(folder, TeacherPipeline).network.config.branch == branch


def test_it_goes_on_from_a_guided_teacher_of_the_same_settings(guided_folder, stage, tmp_path):
    before = weights(guided_folder)
    after = weights(distill.run(stage(teacher=str(guided_folder), student_lr=1e-5, iterations=1)))
    assert before.keys() == after.keys()
    assert max((after[name] - tensor).abs().max().item() for name, tensor in before.items()) < 1e-4
    other = stage(teacher=str(guided_folder), control_blocks=2, out=str(tmp_path / "other"))
    assert "control_blocks=2, but the teacher is guided" in refusal(lambda: distill.run(other))


@pytest.mark.parametrize(
    ("name", "own"),
    [("gan", {"critic_updates": 1, "head_channels": 8}), ("leap", {"guidance": 1.0}), ("ode-pairs", {"guidance": 1.0})],
)
def test_the_other_methods_take_it_as_their_teacher(guided_folder, stage, name, own):
    folder = distill.run(stage(name, teacher=str(guided_folder), iterations=1, **own))
    student = load_pipeline(folder, StudentPipeline)
    one, two = (student(video(), cameras=cameras(seed)) for seed in (1, 2))
    assert student.wants_cameras and not torch.equal(one, two)


def test_clips_without_cameras_are_refused_and_nothing_is_left(stage, tmp_path):
    known = torch.ones(FRAMES, dtype=torch.bool)
    save_clips(tmp_path / "bare", [Clip("one", video()[0], video()[0], known)], {})
    assert "clip one has no cameras" in refusal(lambda: distill.run(stage(data=str(tmp_path / "bare"))))
    assert not (tmp_path / "camera").exists()


def test_teachers_of_another_family_are_refused(stage):
    assert "cannot be guided by cameras; give one of CogVideoX" in refusal(lambda: distill.run(stage(teacher="tiny")))
    family, blueprint = teacher_blueprint("tiny")
    assert family.name != "cogvideox" and "cannot be guided" in refusal(lambda: stage().method.blueprint_of(blueprint))


# --- Settings and timesteps ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"branch": "lora"}, "control_blocks has no effect where branch is lora"),
        ({"branch": "control"}, "camera_lora_rank has no effect where branch is control"),
        ({"branch_width": 16, "copy_blocks": True}, "copy_blocks has no effect where branch_width is given"),
        ({"init": "runs/a"}, "init=runs/a has no effect here; to go on, give teacher=RUN/teacher"),
        ({"share_backbone": True}, "share_backbone=true has no effect here"),
        ({"t_distribution": "truncated_normal"}, "no timestep below 600; set control_t_min=600"),
    ],
)
def test_settings_without_effect_are_refused(stage, changes, words):
    assert words in refusal(lambda: stage(**changes))


def test_the_truncated_normal_is_one():
    """Its quantiles against the density's own integral, and its ends."""
    mean, deviation, low, high = AC3D
    grid = torch.linspace(low, high, 200_001, dtype=torch.float64)
    density = torch.exp(-(((grid - mean) / deviation) ** 2) / 2)
    cumulative = torch.cumulative_trapezoid(density, grid)
    cumulative = cumulative / cumulative[-1]
    uniform = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    expected = grid[1:][torch.searchsorted(cumulative, uniform)]
    torch.testing.assert_close(truncated_normal(uniform, *AC3D), expected, atol=1e-5, rtol=0)
    ends = truncated_normal(torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64), *AC3D)
    assert low <= ends[0] < low + 1e-6 and high - 1e-6 < ends[1] <= high


@pytest.mark.parametrize(
    ("words", "low", "mean"),
    [
        ({}, 0, 499.5),
        ({"control_t_min": 600}, 600, 799.5),
        ({"control_t_min": 600, "t_distribution": "truncated_normal"}, 600, None),
    ],
)
def test_timesteps_are_drawn_where_something_is_to_be_learnt(words, low, mean):
    settings = distill.stage_config("camera", {"out": "a", **words}).method
    method, count = Camera.__new__(Camera), 20_000
    method.settings = settings
    t = method.timesteps(torch.zeros(count), Draws(rng()))
    assert t.dtype == torch.long and low <= t.min() and t.max() <= 999
    assert t.min() < low + 20 and t.max() > 990
    if mean is None:
        a, b = ((end - AC3D[0]) / AC3D[1] for end in AC3D[2:])
        phi, Phi = (lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)), (lambda x: math.erfc(-x / 2**0.5) / 2)
        mean = 1000 * (AC3D[0] + AC3D[1] * (phi(a) - phi(b)) / (Phi(b) - Phi(a))) - 0.5
    deviation = 300 / count**0.5
    assert t.double().mean().item() == pytest.approx(mean, abs=5 * deviation)


def test_the_loss_is_that_of_the_velocity(stage, guided_folder):
    """Against the schedule's own arithmetic, clip by clip, with the draws in their order."""
    trainer = distill.Trainer(stage(teacher=str(guided_folder)))
    batch, method = trainer.latents.batch([0, 2]), trainer.method
    found, noised = method.loss(batch, Draws(rng(4)))
    draws, schedule = Draws(rng(4)), trainer.base.schedule
    t = draws.integers(0, 1000, batch.latents)
    noise = draws.normal(batch.latents)
    x_t = schedule.add_noise(batch.latents, noise, t)
    v = trainer.base.family.call(method.student.network, x_t, t, batch.condition).output
    signal, level = (schedule.add_noise(*pair, t) for pair in ((torch.ones_like(noise), 0 * noise), (0 * noise, noise)))
    target = signal * noise - level / noise * batch.latents  # sqrt(ab) e - sqrt(1 - ab) z
    torch.testing.assert_close(found, (v - target).square().mean())
    others = batch.condition.replaced({"camera_path": batch.condition["camera_path"][[1, 0]]})
    other = trainer.base.family.call(method.student.network, x_t, t, others).output
    worse = (other - target).square().mean() / found - 1
    torch.testing.assert_close(method.heeded(batch, noised, found), worse, atol=1e-5, rtol=1e-4)


def test_the_worth_of_the_camera_is_logged_and_nothing_at_first(stage, monkeypatch):
    """Every second iteration here; before the first update the network is the base, which sees no camera."""
    monkeypatch.setattr("fvgen.distill.methods.camera.LOOK", 2)
    config = stage(iterations=5)
    distill.run(config)
    found = [row.get("camera_heeded") for row in distill.read_metrics(config.run.out)]
    assert [x is None for x in found] == [True, False, True, False, True] and found[3] != 0
    trainer = distill.Trainer(stage(out=f"{config.run.out}-2"))
    batch = trainer.latents.batch([0, 2])
    loss, noised = trainer.method.loss(batch, Draws(rng(4)))
    assert trainer.method.heeded(batch, noised, loss).abs() < 1e-6


# --- Planning ---


def test_a_stage_is_planned_from_the_base_it_will_be_trained_on(base_folder, guided_folder, stage):
    family, blueprint = teacher_blueprint(str(base_folder))
    size = Size(1, FRAMES, HEIGHT, WIDTH)
    counted = simulate(stage(), family, blueprint, size).parameters
    network = load_pipeline(guided_folder, TeacherPipeline).network
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    assert counted["student"] == sum(size for name, size in sizes.items() if network.is_guide(name))
    assert counted["teacher"] == sum(size for name, size in sizes.items() if not network.is_guide(name))
    assert counted["followers"] == 0
    family, blueprint = teacher_blueprint(str(guided_folder))
    assert simulate(stage(teacher=str(guided_folder)), family, blueprint, size).parameters == counted


def test_the_cameras_weight_is_planned_as_the_pass_that_it_costs(guided_folder, stage):
    """The teacher is asked once an iteration, and without its path it is the base."""
    family, blueprint = teacher_blueprint(str(guided_folder))
    assert blueprint.camera_guidance == 2.0
    size, config = Size(1, FRAMES, HEIGHT, WIDTH), stage("dmd", teacher=str(guided_folder), critic_updates=1)
    weighed, plain = (
        simulate(config, family, each, size).flops for each in (blueprint, replace(blueprint, camera_guidance=1.0))
    )
    network = load_pipeline(guided_folder, TeacherPipeline).network
    latents, condition = blueprint.example(size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family.call(network, latents, torch.tensor([900]), condition.without(CAMERA_PATH))
    assert weighed - plain == counter.get_total_flops() > 0


@pytest.mark.slow
def test_a_stage_of_a_guided_teacher_is_planned_in_every_way_to_share(guided_folder, stage):
    family, blueprint = teacher_blueprint(str(guided_folder))
    config = stage("dmd", teacher=str(guided_folder), critic_updates=1, head_channels=8)
    found = profiles(config, family, blueprint, Size(1, FRAMES, HEIGHT, WIDTH))
    assert len(found) == 6 and all(profile.flops > 0 for profile in found.values())


# --- Shards ---


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """Nine photographs of noise with their depths, along a walk."""
    folder, path = tmp_path_factory.mktemp("scenes") / "walk", cameras(3)
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True)
    frames, poses = [], from_opengl(path.world_from_cam.double()).tolist()
    for i in range(FRAMES):
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i:02d}.png")
        Image.fromarray(np.full((HEIGHT, WIDTH), 4000, dtype=np.uint16)).save(folder / f"depth/{i:02d}.png")
        files = {"file_path": f"images/{i:02d}.png", "depth_file_path": f"depth/{i:02d}.png"}
        frames.append(files | {"transform_matrix": poses[i]})
    lens = path.intrinsics[0]
    document = {"camera_model": "PINHOLE", "w": WIDTH, "h": HEIGHT, "k1": 0.0, "frames": frames}
    document |= {"fl_x": lens[0, 0].item(), "fl_y": lens[1, 1].item(), "cx": lens[0, 2].item(), "cy": lens[1, 2].item()}
    (folder / "transforms.json").write_text(json.dumps(document))
    return folder


def test_shards_of_the_base_are_those_of_its_guided_teacher(scene, base_folder, guided_folder, stage, tmp_path):
    """Whoever made them: they hold poses, and paths are made of these."""
    options = {"clips_per_scene": 1, "clips_per_shard": 1, "workers": 1, "limits": dict.fromkeys(LIMITS, 0.0)}
    for name, folder in (("plain", base_folder), ("own", guided_folder)):
        prepare([scene], tmp_path / name, FRAMES, (HEIGHT, WIDTH), teacher=str(folder), **options)
    plain, own = (ShardSet(tmp_path / name, camera_paths=True) for name in ("plain", "own"))
    for name, tensor in plain[0].condition.items():
        assert torch.equal(own[0].condition[name], tensor)
    for shards in ("plain", "own"):
        assert "camera_path" not in ShardSet(tmp_path / shards)[0].condition
    batch: LatentBatch = plain.batch([0])
    assert isinstance(batch.condition, Condition) and batch.condition["camera_path"].shape == (1, FRAMES, 21)
    for data in ("plain", "own"):
        run = stage(data=str(tmp_path / data), out=str(tmp_path / f"run-{data}"), batch_size=1, iterations=1)
        distill.run(run)
    rows = [distill.read_metrics(tmp_path / f"run-{data}") for data in ("plain", "own")]
    assert rows[0] == rows[1]
    distill.run(stage("ode-pairs", data=str(tmp_path / "own"), batch_size=1))  # the base, on what its guided model made
    clip = plain[0]
    expected = clip_path(Cameras(clip.world_from_cam, clip.intrinsics, HEIGHT, WIDTH))
    assert torch.equal(clip.condition["camera_path"], expected)
