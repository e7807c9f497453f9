"""Leap flow distillation: in a Gaussian world, whose answers are known, and on small networks of both families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checks import hashes, refusal
from conftest import REPOSITORY
from small_cogvideox import FRAMES, rng, video
from small_cogvideox import small_teacher as small_cogvideox
from small_models import small_teacher
from torch import Tensor, nn

from fvgen import distill
from fvgen.clips.clip import Clip
from fvgen.clips.folder import ClipFolder, save_clips
from fvgen.clips.latents import LatentBatch, load_latents
from fvgen.diffusion.consistency import lcm_boundary, leap_grid
from fvgen.diffusion.samplers import leap
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.draws import Draws
from fvgen.distill.learners import make_learner
from fvgen.distill.methods import leap as module
from fvgen.distill.methods.leap import Leap
from fvgen.models.cogvideox.pipelines import CogVideoXTeacherPipeline
from fvgen.models.cogvideox.videoscene import VideoScenePipeline
from fvgen.models.condition import Condition
from fvgen.models.family import Size
from fvgen.models.viewcrafter.leap import FVGenLeapPipeline
from fvgen.objectives.consistency import pseudo_huber, squared
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.planning.plan import Choice, Hardware, command
from fvgen.planning.simulate import simulate
from fvgen.system.processes import ALONE

SCHEDULE = NoiseSchedule.cogvideox()
S, B = 0.6, 0.8  # standard deviations of data and of the render's error


# --- A world of Gaussian data ---
#
# Data x0 ~ N(0, S^2) and renders x0 + N(0, B^2), entry by entry. With sigma_t^2 = ab S^2 + 1 - ab everything is linear:
# the teacher predicts ab^.5 S^2 / sigma_t^2 x_t, and its trajectory through x_t ends at S / sigma_t x_t.


def tables() -> tuple[Tensor, Tensor, Tensor]:
    """a, s and sigma [1000], float64."""
    ab = SCHEDULE.alphas_cumprod.double()
    return ab.sqrt(), (1 - ab).sqrt(), (ab * S**2 + 1 - ab).sqrt()


def on_the_grid(k: int, t_max: int = 599) -> dict[int, float]:
    """The ends of DDIM's trajectories in steps of k, where the last step goes to t = 0: factor of x_t by t."""
    a, s, sigma = tables()
    found, before, end = {}, 0, 1.0
    for t in leap_grid(k, t_max):
        x0 = a[t] * S**2 / sigma[t] ** 2
        end *= (a[before] * x0 + s[before] * (1 - a[t] * x0) / s[t]).item()
        found[t], before = end, t
    return found


class Linear(nn.Module):
    """The denoiser (x_t, t) -> table[t] x_t."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.schedule = nn.Parameter(table.float()), SCHEDULE

    def forward(self, x_t: Tensor, t: Tensor, condition: object) -> Tensor:
        return self.table[t].view(-1, 1, 1, 1, 1) * x_t


def teacher() -> Linear:
    a, _, sigma = tables()
    return Linear(a * S**2 / sigma**2).requires_grad_(False)


def solution(k: int, boundary: str = "lcm") -> Tensor:
    """[1000]: what a network has to say so that its answer is the end of the trajectory."""
    table = torch.zeros(1000, dtype=torch.float64)
    for t, end in on_the_grid(k).items():
        table[t] = end
        if boundary == "lcm":
            c_skip, c_out = lcm_boundary(torch.tensor(t))
            table[t] = (end - c_skip) / c_out
    return table


def gaussian_batch(clips: int, seed: int = 0) -> LatentBatch:
    truth, error = torch.randn(2, clips, 4, 2, 4, 4, generator=rng(seed))
    return LatentBatch(S * truth, Condition(render_latents=S * truth + B * error))


def draws(seed: int = 0) -> Draws:
    return Draws(rng(seed))


def gaussian_leap(table: Tensor, tmp_path: Path, **changes) -> Leap:
    """The method with a linear teacher and student."""
    settings = {"out": str(tmp_path / "unused"), "student_lr": 1e-2, "k": 50} | changes
    config = distill.stage_config("leap", settings)
    student = make_learner(config, ALONE, "student", Linear(table), average=True)
    family = SimpleNamespace(start=lambda condition: condition["render_latents"])
    return Leap(config.method, teacher(), student, Linear(table), family)


@pytest.mark.parametrize("k", [10, 20, 50])
@pytest.mark.parametrize("boundary", ["lcm", "switch"])
@pytest.mark.parametrize("distance", ["pseudo_huber", "l2"])
@pytest.mark.parametrize("start", ["render", "truth", "mixed"])
def test_nothing_is_asked_of_who_knows_the_ends(tmp_path, k, boundary, distance, start):
    changes = {"k": k, "boundary": boundary, "distance": distance, "start": start}
    batch = gaussian_batch(64)
    right = gaussian_leap(solution(k, boundary), tmp_path, **changes)
    wrong = gaussian_leap(0.9 * solution(k, boundary), tmp_path, **changes)
    # Rounding of float32: 1e-7 of entries near 1, divided by c = .001 where pseudo-Huber is a parabola.
    assert right.loss(batch, draws()).item() < 1e-8
    assert wrong.loss(batch, draws()).item() > 1e-4  # where it meets the clean end: one grid point in 12 to 60


def test_small_steps_lead_to_the_exact_end():
    """In steps of k = 5 the leap's error at 459 is .537 where the formula says .5425: the rest is ab[0] = .99915."""
    _, _, sigma = tables()
    errors = {}
    for k in (5, 10, 20):
        ends = on_the_grid(k)
        errors[k] = max(abs(end - (S / sigma[t]).item()) for t, end in ends.items())
    assert errors[5] < errors[10] < errors[20] < 0.03
    end = on_the_grid(5)[459]
    assert mse(459, end) == pytest.approx(0.537, abs=1e-3)  # of the sheet, which drew samples
    assert mse(459) == pytest.approx(0.5425, abs=5e-5)


def mse(t: int, factor: float | None = None) -> float:
    """Of a leap through ``factor`` x_t, the exact consistency function's if not given: (c a - 1)^2 S^2 + c^2 (a^2 B^2
    + s^2)."""
    a, s, sigma = (table[t].item() for table in tables())
    c = S / sigma if factor is None else factor
    return (c * a - 1) ** 2 * S**2 + c**2 * (a**2 * B**2 + s**2)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_error_of_a_leap_is_the_formulas(which):
    """From B^2 at t = 0 to 2 S^2 at 999 through the student, to S^2 through the teacher: five standard errors."""
    a, _, sigma = tables()
    table = S / sigma if which == "student" else a * S**2 / sigma**2
    batch = gaussian_batch(4000, seed=1)
    start, truth = batch.condition["render_latents"], batch.latents
    denoiser = Linear(table)
    found = {}
    for t in (0, 59, 299, 459, 549, 999):
        noise = torch.randn(start.shape, generator=rng(t))
        steps = torch.full((len(start),), t)
        with torch.no_grad():
            x0 = leap(lambda x_t, t: denoiser(x_t, t, None), start, SCHEDULE, steps, noise)
        errors = (x0 - truth).square().double()
        expected = mse(t, table[t].item())
        assert abs(errors.mean() - expected) < 5 * errors.std() / errors.numel() ** 0.5
        found[t] = expected
    assert found[0] == pytest.approx(B**2, rel=1e-2)
    assert found[999] == pytest.approx(2 * S**2 if which == "student" else S**2, rel=1e-6)


WRONG = {
    "the noise's sign": lambda schedule, x_t, x0, t, t_prev: schedule.add_noise(
        x0, -schedule.eps_from_x0(x_t, x0, t), t_prev
    ),
    "the network's output for the noise": lambda schedule, x_t, x0, t, t_prev: schedule.add_noise(
        x0, schedule.v_from_x0(x_t, x0, t), t_prev
    ),
    "the grid": lambda schedule, x_t, x0, t, t_prev: schedule.add_noise(
        x0, schedule.eps_from_x0(x_t, x0, t), (t_prev - 10).clamp(min=0)
    ),
    "no step": lambda schedule, x_t, x0, t, t_prev: x_t,
    "an Euler step": lambda schedule, x_t, x0, t, t_prev: x_t + schedule.v_from_x0(x_t, x0, t) * 0.05,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_seen(tmp_path, monkeypatch, name):
    method = gaussian_leap(solution(50), tmp_path, distance="l2")
    assert method.loss(gaussian_batch(64), draws()).item() < 1e-10
    monkeypatch.setattr(module, "ddim_step", WRONG[name])
    assert method.loss(gaussian_batch(64), draws()).item() > 1e-5


def test_a_student_of_nothing_learns_the_ends(tmp_path):
    """From the teacher's own predictions; information travels one k an update, through the target."""
    method = gaussian_leap(tables()[0] * 0 + 0.5, tmp_path, student_lr=2e-2, weight_decay=0.0, ema_decay=0.8, k=100)
    for iteration in range(1, 400):
        method.iterate(iteration, lambda i=iteration: [(gaussian_batch(16, seed=i), draws(i))])
    expected, learnt = on_the_grid(100), method.learners["student"].average.weights()["table"]
    for t, end in expected.items():
        assert learnt[t].item() == pytest.approx(end, abs=0.02)
    assert abs(learnt[499].item() - teacher().table[499].item()) > 0.2  # what it would have said undistilled


def test_the_target_is_the_average(tmp_path):
    method = gaussian_leap(solution(50) + 0.1, tmp_path, ema_decay=0.75)
    before = method.student.table.detach().clone()
    for iteration in (1, 2):
        method.iterate(iteration, lambda: [(gaussian_batch(8), draws())])
        if iteration == 1:
            first = method.student.table.detach().clone()
            assert torch.equal(method.target.table, before)  # it follows at the start
    torch.testing.assert_close(method.target.table, torch.lerp(before, first, 0.25))
    assert not method.target.table.requires_grad


def test_mixed_starts_are_half_renders(tmp_path):
    method, batch = gaussian_leap(solution(50), tmp_path, start="mixed"), gaussian_batch(400)
    start = method.start_of(batch, draws())
    renders = [torch.equal(x, y) for x, y in zip(start, batch.condition["render_latents"], strict=True)]
    truths = [torch.equal(x, y) for x, y in zip(start, batch.latents, strict=True)]
    assert sum(renders) + sum(truths) == 400 and abs(sum(renders) - 200) < 50  # five standard deviations


def test_distances():
    a, b = torch.tensor([[3.0, 0.0], [1e-6, 0.0]]), torch.zeros(2, 2)
    torch.testing.assert_close(squared(a, b), torch.tensor([4.5, 5e-13]))
    found = pseudo_huber(a, b, 0.001)
    assert found[0].item() == pytest.approx((3 - 0.001) / 2, rel=1e-4)  # |r| - c
    small = pseudo_huber(a.double(), b.double(), 0.001)[1].item()
    assert small == pytest.approx(1e-12 / (2 * 0.001) / 2, rel=1e-3)  # r^2 / 2c


def test_more_steps_noise_again_on_the_way():
    seen = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(t.tolist())
        return torch.zeros_like(x_t)

    start, noises = torch.ones(2, 4, 2, 3, 3), torch.randn(3, 2, 4, 2, 3, 3, generator=rng())
    leap(denoise, start, SCHEDULE, torch.tensor([459, 599]), noises[0], 4, noises=[*noises, noises[0]])
    assert seen == [[459, 599], [344, 449], [229, 299], [114, 149]]


# --- Real networks ---


@pytest.fixture
def stage(teacher_folder, clip_folder, tmp_path) -> Callable[..., distill.StageConfig]:
    def make(**changes) -> distill.StageConfig:
        common = {"teacher": str(teacher_folder), "data": str(clip_folder), "out": str(tmp_path / "leap")}
        common |= {"iterations": 3, "batch_size": 2, "student_lr": 1e-3, "track": False, "checkpoint_every": 1}
        return distill.stage_config("leap", common | changes)

    return make


@pytest.fixture(scope="module")
def cogvideox_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "interpolation"
    save_model(small_cogvideox("learned", image_condition="ends", image_noise=True), folder)
    return folder


@pytest.fixture(scope="module")
def cogvideox_clips(tmp_path_factory) -> Path:
    known = torch.tensor([True, *[False] * (FRAMES - 2), True])
    clips = [Clip(f"clip-{i}", truth, truth * 0.9, known) for i, truth in enumerate(video(3))]
    folder = tmp_path_factory.mktemp("data") / "clips"
    save_clips(folder, clips, {"kind": "test"})
    return folder


def test_the_defaults_are_the_sheets(stage):
    config = distill.stage_config("leap", {"out": "x"})
    method, adamw = config.method, config.optim["student"]
    assert (adamw.lr, adamw.weight_decay, adamw.clip_norm, adamw.beta1) == (3e-5, 1e-2, 1.0, 0.9)
    assert (method.k, method.t_max, method.t, method.ema_decay) == (20, 599, 459, 0.95)
    assert (method.start, method.distance, method.huber_c, method.trained) == ("render", "pseudo_huber", 0.001, "attn1")
    assert (method.boundary, method.timestep_scaling, method.sigma_data, method.guidance) == ("lcm", 10.0, 0.5, 1.0)
    assert distill.stage_config("leap", {"out": "x", "weight_decay": 0.0}).optim["student"].weight_decay == 0


@pytest.mark.parametrize(
    "changes", [{}, {"trained": "", "start": "mixed"}, {"share_backbone": True, "student_lora": True}]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(stage, tmp_path, changes):
    whole, cut = stage(**changes, sample_every=2), stage(**changes, sample_every=2, out=str(tmp_path / "cut"))
    made = distill.run(whole)
    distill.run(distill.changed(cut, iterations=1))
    distill.run(cut)
    assert distill.read_metrics(whole.run.out) == distill.read_metrics(cut.run.out)
    assert hashes(made / "unet") == hashes(Path(cut.run.out) / "student" / "unet")
    assert (Path(whole.run.out) / "samples" / "00000002.png").is_file()
    student, before = load_pipeline(made, FVGenLeapPipeline), small_teacher().network.state_dict()
    assert (student.config.t, student.config.t_max, student.config.steps) == (459, 599, 1)
    moved = {name for name, x in student.network.state_dict().items() if not torch.equal(x, before[name])}
    attention = {name for name in before if "attn1" in name}
    assert moved and (moved <= attention or changes.get("trained") == "")
    if changes.get("trained") == "":
        assert moved - attention

    exported = distill.export_checkpoint(whole.run.out, tmp_path / "exported")
    assert hashes(exported / "unet") == hashes(made / "unet")


def test_what_does_not_learn_is_the_teachers_own(stage):
    trainer = distill.Trainer(stage())
    teacher = dict(trainer.method.teacher.network.named_parameters())
    for network in (trainer.method.student.network, trainer.method.target.network):
        for name, parameter in network.named_parameters():
            assert (parameter is teacher[name]) == ("attn1" not in name)
    assert all(not p.requires_grad for p in teacher.values())
    learning = trainer.method.learners["student"].engine.shapes
    assert learning and all("attn1" in name for name in learning)


def test_videoscene_is_trained_and_walks(cogvideox_folder, cogvideox_clips, stage, tmp_path):
    files = {"teacher": str(cogvideox_folder), "data": str(cogvideox_clips)}
    config = stage(**files, precision="bfloat16", checkpoint_activations=True, t=399, t_max=499, sample_every=2)
    made = distill.run(config)
    rows = distill.read_metrics(config.run.out)
    assert len(rows) == 3 and all(row["loss_student"] > 0 and row["grad_norm_student"] > 0 for row in rows)
    student = load_pipeline(made, VideoScenePipeline)
    index = json.loads((made / "model_index.json").read_text())
    assert (index["t"], index["t_max"], index["image_noise"]) == (399, 499, False)  # trained with, sampled without
    before = small_cogvideox("learned").transformer.state_dict()
    for name, x in student.transformer.state_dict().items():
        assert ".attn1." in name or torch.equal(x, before[name].float()), name
    student.set_progress_bar_config(disable=True)
    clip = video(2)
    frames = student(clip, rng())
    assert frames.shape == clip.shape and torch.equal(frames, student(clip, rng(), t=399))
    assert not torch.equal(frames, student(clip, rng(), t=199))
    photographs = video(1, frames=2, seed=5)
    assert not torch.equal(frames, student(clip, rng(), reference=photographs))
    for t in (500, -1):
        sentence = refusal(lambda t=t: student(clip, t=t))
        assert sentence == f"t={t} is outside the timesteps that the student was trained on; give 0 to 499"
    assert "reference has shape (3, 32, 48)" in refusal(lambda: student(clip, reference=photographs[0, 0]))


def test_the_render_leaps_and_nothing_else_does(cogvideox_folder, cogvideox_clips):
    teacher = small_cogvideox("learned", image_condition="ends")
    batch = load_latents(ClipFolder(cogvideox_clips), teacher).batch([0, 1])
    start = teacher.family.start(batch.condition)
    assert start.shape == batch.latents.shape and not torch.equal(start, batch.condition["image_latents"])
    assert batch.condition["image_latents"][:, :, 1:-1].abs().max() == 0 < start[:, :, 1:-1].abs().min()
    seen = small_cogvideox()  # sees the render: it starts from what it sees
    condition = seen.condition(video(), rng())
    assert seen.family.start(condition) is condition["image_latents"] and "render_latents" not in condition


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"t": 700}, "t=700 is outside the timesteps that the student learns; give at most 599"),
        ({"k": 700}, "k=700 leaves no timestep up to t_max=599"),
        ({"distance": "l2", "huber_c": 0.1}, "huber_c has no effect where distance is l2"),
        ({"share_backbone": True}, "set student_lora=true as well"),
        ({"student_steps": 4}, "student_steps is a setting of method gan, not of leap"),
        ({"start": "noise"}, "start='noise'"),
    ],
)
def test_settings_that_do_not_go_together(stage, changes, told):
    assert told in refusal(lambda: stage(**changes))


def test_a_teacher_that_sees_no_render(stage, tmp_path):
    save_model(small_teacher(conditioning={"layout": "ends"}), tmp_path / "ends")
    sentence = refusal(lambda: distill.Trainer(stage(teacher=str(tmp_path / "ends"))))
    assert "sees one or both ends of a clip and not its render" in sentence and not (tmp_path / "leap").exists()


def test_words_that_no_weight_has(stage):
    for changes in ({"trained": "attention"}, {"trained": "norm", "share_backbone": True, "student_lora": True}):
        sentence = refusal(lambda c=changes: distill.Trainer(stage(**c)))
        assert "no weight that the settings let learn" in sentence or "may learn; change trained=" in sentence


@pytest.mark.parametrize("lora", [False, True])
def test_it_can_be_planned(stage, teacher, lora):
    from fvgen.models.viewcrafter.family import FAMILY

    blueprint = FAMILY.blueprint({"unet": dict(teacher.unet.config), "vae": {"block_out_channels": (8, 8, 16)}})
    config = stage(share_backbone=lora, student_lora=lora, lora_rank=2)
    counts = simulate(config, FAMILY, blueprint, Size(2, 4, 16, 24)).parameters
    network = small_teacher().network
    whole = sum(p.numel() for p in network.parameters())
    attention = sum(p.numel() for name, p in network.named_parameters() if "attn1" in name)
    assert counts["teacher"] == whole and counts["followers"] == counts["student"]
    assert counts["student"] < attention if lora else counts["student"] == attention


def test_encoders_alone_are_enough_to_prepare(cogvideox_folder):
    """As `fvgen prepare` has them: no network is there."""
    from fvgen.shards.encoders import load_encoders, placed

    clip, whole = video(), load_pipeline(cogvideox_folder, CogVideoXTeacherPipeline)
    encoders = placed(load_encoders(cogvideox_folder), "cpu")
    assert encoders.transformer is None
    found, expected = (pipeline.condition(clip, rng()) for pipeline in (encoders, whole))
    assert found.keys() == expected.keys() == {"image_latents", "text_tokens", "render_latents"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_noise_on_images_has_the_stated_strength():
    """exp(N(-3, 0.5)) in units of [-1, 1], one draw for both images of a clip; nothing else is noised."""
    pipeline, clips = small_cogvideox(image_condition="ends", image_noise=True), torch.full((8, FRAMES, 3, 32, 48), 0.5)
    seen: list[Tensor] = []
    pipeline._sample = lambda frames, generator, noise=None: seen.append(frames) or torch.zeros(8, 16, 1, 4, 6)
    logs = []
    for seed in range(40):
        seen.clear()
        pipeline.condition(clips, rng(seed))
        first, last, whole = seen
        assert first.shape == last.shape == (8, 1, 3, 32, 48) and torch.equal(whole, clips)
        strengths = [2 * (image - 0.5).flatten(1).std(1) for image in (first, last)]
        torch.testing.assert_close(*strengths, rtol=0.08, atol=0)  # 4608 pixels: 1 % standard error each
        logs.append(strengths[0].log())
    logs = torch.cat(logs)
    assert (
        abs(logs.mean() + 3) < 5 * 0.5 / len(logs) ** 0.5 and abs(logs.std() - 0.5) < 5 * 0.5 / (2 * len(logs)) ** 0.5
    )


@pytest.mark.parametrize(("zero", "start"), [(0, ["python"]), (2, ["deepspeed", "--num_gpus", "8"])])
def test_the_planned_command_is_the_recipes(zero, start):
    file = "recipes/configs/videoscene/8x80gb.yaml"
    config = distill.read_stage_config("leap", REPOSITORY / file, ["out=unused"])
    line = command(Choice(zero, True, "three models"), Hardware(gpus=8), config, file).split()
    assert line[: len(start)] == start and any(word.endswith("recipes/leap.py") for word in line)
    assert "out=OUT" in line and not any(word.startswith("init=") for word in line)


def test_a_stage_goes_on_from_an_earlier_one(stage, tmp_path):
    """What does not learn stays as the earlier student had it, not as the teacher has it."""
    first = stage(trained="", out=str(tmp_path / "first"), iterations=1, sample_every=0)
    before = load_pipeline(distill.run(first), FVGenLeapPipeline).network.state_dict()
    second = stage(init=first.run.out, iterations=1, sample_every=0)
    after = load_pipeline(distill.run(second), FVGenLeapPipeline).network.state_dict()
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert moved and all("attn1" in name for name in moved)
