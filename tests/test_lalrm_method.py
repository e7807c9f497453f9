"""`method: lalrm`: from a teacher's folder to a model that holds a LaLRM."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checks import refusal
from small_cameras import cameras
from small_cogvideox import FRAMES, HEIGHT, WIDTH, small_teacher, small_vae, video

from fvgen import distill
from fvgen.clips.clip import Clip, Others
from fvgen.clips.folder import ClipFolder, save_clips
from fvgen.clips.latents import LatentBatch, views_of
from fvgen.clips.rooms import synthetic_clip
from fvgen.distill.draws import Draws
from fvgen.distill.methods.lalrm import Lalrm, LalrmSettings, one_view
from fvgen.geometry.gaussians import render_gaussians
from fvgen.geometry.off_path import off_path
from fvgen.geometry.plucker import rays, unpacked
from fvgen.models.cogvideox.vae import encode
from fvgen.models.family import Size
from fvgen.models.lalrm import LaLRM
from fvgen.pipelines.folders import folder_blueprint, load_pipeline, save_model
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.planning.plan import Hardware, command, plan
from fvgen.planning.simulate import simulate
from fvgen.splats.raymap import gaussians_along

COMMON = {"iterations": 2, "batch_size": 2, "checkpoint_every": 1, "sample_every": 2, "track": False}
SMALL = {"width": 32, "layers": 1, "head_dim": 16, "perceptual_weight": 0.0}


def clip(index: int, others: int = 3) -> Clip:
    truth, walk = video(3)[index], cameras(index)
    known = torch.tensor([True, *[False] * (FRAMES - 1)])
    more = off_path(walk, others, torch.Generator().manual_seed(index))
    depth = torch.full((FRAMES + others, HEIGHT, WIDTH), 2.0)
    return Clip(f"clip-{index}", truth, truth, known, walk, others=Others(truth[:others], more, depth))


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "i2v"
    save_model(small_teacher(image_condition="first"), folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clips"
    save_clips(folder, [clip(i) for i in range(3)], {"kind": "test"})
    return folder


@pytest.fixture
def stage(teacher_folder, clip_folder, tmp_path):
    def make(name: str = "run", **changes) -> distill.StageConfig:
        sources = {"out": str(tmp_path / name), "teacher": str(teacher_folder), "data": str(clip_folder)}
        return distill.stage_config("lalrm", {**COMMON, **SMALL, **sources, **changes})

    return make


def test_other_views_come_back_from_a_folder(clip_folder):
    folder, made = ClipFolder(clip_folder), clip(1)
    read = folder[1].others
    torch.testing.assert_close(read.images, made.others.images, rtol=0, atol=0.5 / 255 + 1e-6)
    assert torch.equal(read.cameras.world_from_cam, made.others.cameras.world_from_cam)
    assert torch.equal(read.depth, made.others.depth)
    views = views_of(folder[1])
    assert views["images"].shape == (1, FRAMES + 3, 3, HEIGHT, WIDTH) and views["path"].shape == (1, FRAMES + 3, 21)
    first = views["path"][0, 0, :12].reshape(3, 4)
    assert torch.equal(first, torch.eye(4)[:3])
    far = views["path"][0, :FRAMES, :12].reshape(-1, 3, 4)[..., 3].norm(dim=-1).max()
    assert abs(far - 1) < 1e-6
    scale = 1 / (made.cameras.centers - made.cameras.centers[0]).norm(dim=-1).max()
    torch.testing.assert_close(views["depth"], torch.full_like(views["depth"], 2 * scale))


def test_a_stage_leaves_a_model_with_a_lalrm_and_goes_on_from_it(stage, tmp_path):
    out = distill.run(stage())
    assert out == tmp_path / "run" / "model"
    made = load_pipeline(out, TeacherPipeline)
    assert (made.lalrm.config.width, made.lalrm.config.time_squeeze, made.lalrm.config.space_squeeze) == (32, 4, 8)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(row["loss_lalrm"] > 0 and row["loss_lalrm_depth"] > 0 for row in rows)
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    second = distill.run(stage("second", teacher=str(out), iterations=1))
    before, after = (x.lalrm.state_dict() for x in (made, load_pipeline(second, TeacherPipeline)))
    assert before.keys() == after.keys()
    moved = max((before[name] - after[name]).abs().max() for name in before)
    assert 0 < moved < 1e-3  # one update of 4e-4, averaged
    assert "layers=2, but the teacher's LaLRM has layers=1" in refusal(
        lambda: distill.run(stage("third", teacher=str(out), layers=2))
    )


def test_a_killed_run_goes_on_bit_for_bit(stage, tmp_path):
    whole = distill.run(stage("whole"))
    distill.run(stage("cut", iterations=1))
    parts = distill.run(stage("cut"))
    one, other = (load_pipeline(folder, TeacherPipeline).lalrm.state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_path_without_cameras_or_views_is_refused(stage, clip_folder, tmp_path):
    plain = [Clip(f"c{i}", x, x, torch.ones(FRAMES, dtype=torch.bool)) for i, x in enumerate(video(2))]
    save_clips(tmp_path / "plain", plain, {"kind": "test"})
    assert "has no cameras, which its views need" in refusal(lambda: distill.run(stage(data=str(tmp_path / "plain"))))
    alone = [Clip(f"c{i}", x, x, torch.ones(FRAMES, dtype=torch.bool), cameras(i)) for i, x in enumerate(video(2))]
    save_clips(tmp_path / "alone", alone, {"kind": "test"})
    assert "have no views beside the clips' own frames" in refusal(
        lambda: distill.run(stage(data=str(tmp_path / "alone"), seen_views=0))
    )
    assert "leave nothing to learn from" in refusal(lambda: stage(seen_views=0, unseen_views=0))


def test_a_family_without_a_place_for_it_is_refused_before_training(stage, tmp_path):
    config = stage("viewcrafter", teacher="tiny", others=0, unseen_views=0, perceptual_weight=0.0)
    assert "viewcrafter hold no LaLRM; give one of CogVideoX" in refusal(lambda: distill.run(config))


def test_another_vaes_latents_are_refused(teacher_folder):
    teacher, sizes = load_pipeline(teacher_folder, TeacherPipeline), {"width": 32, "layers": 1, "head_dim": 16}
    assert teacher.with_lalrm(LaLRM(**sizes)).lalrm is not None
    sentence = refusal(lambda: teacher.with_lalrm(LaLRM(**sizes, space_squeeze=4)))
    assert (
        "16 channels, 4 frames and 4 pixels to a latent, and this VAE makes those of 16 channels, 4 frames and 8"
        in sentence
    )


@pytest.mark.parametrize("words", [{}, {"planes": 3, "checkpoint_activations": True}])
def test_it_can_be_planned(stage, clip_folder, teacher_folder, words):
    """The network alone learns, and the teacher's takes no room."""
    config = stage(**words)
    family, blueprint = folder_blueprint(teacher_folder)
    profile = simulate(config, family, blueprint, Size(2, FRAMES, HEIGHT, WIDTH))
    network = LaLRM(**config.method.of_network())
    assert profile.parameters["lalrm"] == sum(p.numel() for p in network.parameters())
    assert profile.parameters["teacher"] == 0 and profile.flops > 0
    found = plan(config, {("three models", False): profile}, Hardware(gpus=1))
    assert found and all(each.total > 0 for each in found)
    line = command(found[0].choice, Hardware(gpus=1), config, "x.yaml").split()
    assert any(word.endswith("recipes/lalrm.py") for word in line)


# --- The loss ---


class Plain:
    """A learner without an engine."""

    def __init__(self, module) -> None:
        self.module, self.average = module, None


def method(latent_channels: int = 4, **changes) -> Lalrm:
    settings = LalrmSettings(**SMALL | changes)
    torch.manual_seed(0)
    network = LaLRM(latent_channels=latent_channels, space_squeeze=4, **settings.of_network())
    return Lalrm(settings, Plain(network), render_gaussians, None)


def batch(clips: int = 1) -> LatentBatch:
    views = [views_of(clip(i)) for i in range(clips)]
    joined = type(views[0])(**{name: torch.cat([v[name] for v in views]) for name in views[0]})
    latents = torch.randn(clips, 4, 3, HEIGHT // 4, WIDTH // 4, generator=torch.Generator().manual_seed(1))
    return LatentBatch(latents, joined, joined)


def test_the_surrogate_has_the_losss_gradient():
    """Against one graph through network, Gaussians and all views."""
    ours, data = method(), batch(2)
    (surrogate, metrics), network = ours.loss(data, Draws(torch.Generator().manual_seed(3))), ours.network
    found = torch.autograd.grad(surrogate, list(network.parameters()))

    numbers, frames = ours.numbers(data)
    chosen = ours.chosen(data.views, frames, Draws(torch.Generator().manual_seed(3)))
    losses = []
    for index in range(2):
        walk = unpacked(data.views["path"][index, :frames], HEIGHT, WIDTH)
        made = gaussians_along(numbers[index], walk, network.config)
        shown = [one_view(data.views, index, view) for view in chosen[:, index].split(1)]
        losses += [sum(ours.view_terms(made, view).values()) for view in shown]
    whole = torch.stack(losses).mean()
    torch.testing.assert_close(metrics["loss_lalrm"], whole.detach(), rtol=1e-5, atol=0)
    for one, other in zip(found, torch.autograd.grad(whole, list(network.parameters())), strict=True):
        # sums of some thousand terms in another order
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * other.abs().max().item())


def test_gaussians_that_are_right_have_no_error_of_their_own():
    """A plane at depth 2 of one colour: numbers that say so, by the activations' own inverses."""
    learner = method(pitch=2, near=0.5, far=8.0, typical=2.0, own_weight=1.0, depth_weight=0.5)
    views = batch().views
    path = unpacked(views["path"][0, :FRAMES], HEIGHT, WIDTH)
    grid = (FRAMES, HEIGHT // 2, WIDTH // 2)
    color = torch.tensor([51.0, 102.0, 204.0])
    away = 2.0 / (rays(path, *grid[1:])[1] * path.world_from_cam[:, None, None, :3, 2]).sum(-1)  # along each ray
    share = (away - 0.5) / 7.5
    numbers = torch.zeros(12, *grid)
    numbers[:3] = torch.logit(color / 255)[:, None, None, None]
    numbers[11] = torch.logit(share) - math.log((1.5 / 7.5) / (6 / 7.5))
    images = color.to(torch.uint8)[None, None, :, None, None].expand(1, FRAMES, 3, HEIGHT, WIDTH)
    full = {"images": images, "shown": torch.ones(1, FRAMES, HEIGHT, WIDTH, dtype=torch.bool)}
    known = views.replaced(full | {"depth": torch.full((1, FRAMES, HEIGHT, WIDTH), 2.0)})
    made = learner.made(numbers, path)
    assert learner.own_loss(made, path, grid[1], known) < 1e-5  # eps of float32 by some twenty operations
    twice = known.replaced({"depth": 2 * known["depth"]})
    assert learner.own_loss(made, path, grid[1], twice).item() == pytest.approx(0.5 * math.log(2), abs=1e-5)
    nowhere = known.replaced({"depth": 0 * known["depth"]})
    assert learner.own_loss(made, path, grid[1], nowhere) < 1e-5
    darker = known.replaced({"images": images - 51})
    assert learner.own_loss(made, path, grid[1], darker).item() == pytest.approx(0.04, abs=1e-5)
    hidden = {"images": torch.where(torch.arange(WIDTH) < WIDTH // 2, images, 0), "shown": full["shown"].clone()}
    hidden["shown"][..., WIDTH // 2 :] = False
    assert learner.own_loss(made, path, grid[1], known.replaced(hidden)) < 1e-5


def test_first_iterations_draw_nothing(stage):
    config = stage(iterations=3, own_weight=1.0, own_iterations=2)
    distill.run(config)
    rows = [json.loads(line) for line in (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()]
    assert ["loss_lalrm_square" in row for row in rows] == [False, False, True]
    assert all(row["loss_lalrm_own"] > 0 for row in rows)
    assert "leave no iteration to draw views in" in refusal(
        lambda: stage(iterations=2, own_weight=1.0, own_iterations=2)
    )
    assert "set own_weight" in refusal(lambda: stage(own_iterations=1))


def test_memory_does_not_grow_with_the_number_of_views():
    def kept(views: int) -> int:
        ours, alive, most = method(seen_views=views, unseen_views=0), {"now": 0}, [0]

        class Held:
            def __init__(self, tensor) -> None:
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                alive["now"] += self.size
                most[0] = max(most[0], alive["now"])

            def __del__(self) -> None:
                alive["now"] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            surrogate, _ = ours.loss(batch(), Draws(torch.Generator().manual_seed(0)))
            surrogate.backward()
        return most[0]

    assert kept(12) < 1.1 * kept(3)


def test_what_a_mask_hides_does_not_count():
    ours, data = method(), batch()
    hidden = one_view(data.views, 0, torch.tensor([4]))
    hidden["shown"] = hidden["shown"].clone()
    hidden["shown"][:, :, WIDTH // 2 :] = False
    numbers, frames = ours.numbers(data)
    made = gaussians_along(numbers[0], unpacked(data.views["path"][0, :frames], HEIGHT, WIDTH), ours.network.config)
    other = {**hidden, "images": hidden["images"].clone()}
    other["images"][..., WIDTH // 2 :] = 255 - other["images"][..., WIDTH // 2 :]
    one, two = (ours.view_terms(made, view)["loss_lalrm_square"] for view in (hidden, other))
    assert torch.equal(one, two)
    everything = {**other, "shown": torch.ones_like(other["shown"])}
    assert ours.view_terms(made, everything)["loss_lalrm_square"] > two


def test_small_images_have_no_lpips():
    ours, data = method(), batch()
    ours.perceptual = torch.nn.Identity()
    small = type(data.views)(**{**dict(data.views), "images": data.views["images"][..., :16, :24]})
    assert "images of 16x24 are too small; set 0" in refusal(
        lambda: ours.loss(LatentBatch(data.latents, data.condition, small), Draws(torch.Generator()))
    )


def test_the_order_of_views_does_not_matter():
    ours, data = method(), batch()
    frames = ours.numbers(data)[1]
    picked = ours.chosen(data.views, frames, Draws(torch.Generator().manual_seed(0)))
    losses = []
    for order in (picked, picked.flip(0)):
        ours.chosen = lambda *given, order=order: order
        losses.append(ours.loss(data, Draws(torch.Generator()))[1]["loss_lalrm"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_it_can_learn_one_scene():
    """Fifty seconds of a free thread. 32 dB is 1/40 of the colours' range: far beyond a blur, which has 20 here."""
    room = synthetic_clip("train", 0, 0, 9, 24, 32, others=1)
    blocks = {f"{way.lower()}_block_types": (f"CogVideoX{way}Block3D",) * 3 for way in ("Down", "Up")}
    with torch.no_grad():  # of 4 x 4 pixels
        latents, _ = encode(small_vae(block_out_channels=(4, 4, 4), **blocks), room.truth[None])
    ours = method(latent_channels=16, width=64, layers=2, pitch=1, seen_views=2, unseen_views=0)
    views = views_of(room)
    data = LatentBatch((latents - latents.mean()) / latents.std(), views, views)
    draws = Draws(torch.Generator().manual_seed(0))
    parameters, updates = list(ours.network.parameters()), 250
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates, pct_start=0.05)

    def psnr() -> torch.Tensor:
        return -10 * (ours.sample(data, 0)[0] - room.truth).square().flatten(1).mean(1).log10()

    assert psnr().max() < 15
    for _ in range(updates):
        surrogate, _ = ours.loss(data, draws)
        optimizer.zero_grad()
        surrogate.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        falling.step()
    assert psnr().mean() > 32, psnr()
