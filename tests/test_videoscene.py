"""VideoScene's released class, schedules and camera path, recorded with tiny random weights; and published sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checks import refusal
from conftest import REPOSITORY
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.video_processor import VideoProcessor
from safetensors.torch import load_file
from torch import Tensor

from fvgen.diffusion.consistency import BOUNDARIES, consistency, lcm_boundary, leap_grid
from fvgen.diffusion.samplers import few_step
from fvgen.diffusion.schedule import NoiseSchedule, trailing_timesteps
from fvgen.geometry import trajectories
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.focus_point import focus_point_poses
from fvgen.models.cogvideox import pipelines
from fvgen.models.cogvideox.family import noise_schedule
from fvgen.models.cogvideox.prompts import EncodedPrompts
from fvgen.models.cogvideox.published import PUBLISHED
from fvgen.models.cogvideox.videoscene import VideoScenePipeline
from fvgen.models.family import Size
from fvgen.planning.plan import teacher_blueprint

SHARED = REPOSITORY.parent / "shared" / "reference" / "videoscene"
LEAPS = sorted(file.name.removesuffix("_config.json") for file in SHARED.glob("*_config.json"))


@pytest.fixture(params=["with the tests", "beside the checkout"])
def recording(request, recorded) -> Path:
    """The folder of `schedule` and `camera_interpolation`: those that ship, and those beside the checkout."""
    folder = recorded / "videoscene" if request.param == "with the tests" else SHARED
    if not folder.is_dir():
        pytest.skip("the recordings are not beside this checkout")
    return folder


# --- Schedules ---


def test_the_schedule_is_the_published_one(recording):
    tables = load_file(recording / "schedule.safetensors")
    schedule = NoiseSchedule.cogvideox()
    torch.testing.assert_close(
        schedule.alphas_cumprod.double(), tables["cogvideox.alphas_cumprod_f64"], rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(schedule.alphas_cumprod, tables["lcm.alphas_cumprod_f32"], rtol=1e-4, atol=1e-6)
    assert schedule.alphas_cumprod[999] == 0 and schedule.signal[999] == 0 and schedule.sigma[999] == 1
    for steps in (1, 2, 4, 8, 50):
        told = tables[f"lcm.timesteps.{steps}"]
        assert set(told.tolist()) <= set(leap_grid(20, 999)), "LCM's own grid"
        if steps in (1, 2, 4, 50):
            assert told.tolist()[0] == trailing_timesteps(steps)[-1]


# Of the sheet, computed from the formula at two shifts.
ONE = {0: 0.99915, 19: 0.9810105, 99: 0.8880859, 249: 0.6541890, 459: 0.2989935, 499: 0.2423592, 549: 0.1802110}
ONE |= {749: 0.0331715, 979: 8.579e-5, 998: 1.968e-7, 999: 0.0}
THREE = {459: 0.1244309, 499: 0.0959696, 549: 0.0676622}


@pytest.mark.parametrize(("shift", "values"), [(1.0, ONE), (3.0, THREE)])
def test_the_table_has_the_known_values(shift, values):
    found = NoiseSchedule.cogvideox(snr_shift=shift).alphas_cumprod
    for t, value in values.items():
        assert found[t].item() == pytest.approx(value, rel=3e-4 if value < 1e-4 else 1e-6)
    theirs = CogVideoXDPMScheduler(**json.loads(SCHEDULER) | {"snr_shift_scale": shift}).alphas_cumprod
    torch.testing.assert_close(found, theirs.float(), rtol=1e-6, atol=1e-12)


def test_without_a_shift_it_is_viewcrafters():
    torch.testing.assert_close(
        NoiseSchedule.cogvideox().alphas_cumprod, NoiseSchedule.lvdm(None).alphas_cumprod, rtol=1e-6, atol=1e-12
    )


SCHEDULER = json.dumps(
    {
        **{"snr_shift_scale": 1.0, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        **{"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": True},
        **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    }
)


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "epsilon"},
        {"rescale_betas_zero_snr": False},
        {"beta_schedule": "linear"},
        {"timestep_spacing": "leading"},
        {"clip_sample": True},
        {"set_alpha_to_one": False},
        {"num_train_timesteps": 500},
    ],
)
def test_a_scheduler_of_other_settings_is_refused(change):
    settings = json.loads(SCHEDULER)
    noise_schedule(settings)
    (name, value), *_ = change.items()
    assert f"the teacher's scheduler says {name}={value}; give a teacher of CogVideoX's" in refusal(
        lambda: noise_schedule(settings | change)
    )


@pytest.mark.parametrize("name", ["snr_shift_scale", "prediction_type", "beta_start", "clip_sample"])
def test_no_setting_is_filled_in(name):
    settings = json.loads(SCHEDULER)
    del settings[name]
    assert f"the scheduler's settings lack {name}" in refusal(lambda: noise_schedule(settings))


def test_a_leap_and_back(recording):
    tables = load_file(recording / "schedule.safetensors")
    schedule, t = NoiseSchedule.cogvideox(), tables["leap.t"]
    given = {name: tables[f"leap.{name}"] for name in ("x0", "noise", "v")}
    x_t = schedule.add_noise(given["x0"], given["noise"], t)
    x0 = schedule.x0_from_v(x_t, given["v"], t)
    for theirs in ("cogvideox", "lcm"):
        # float32 ab of LCM's scheduler near 999 is 1e-7 off, whose root is 3e-4: x_t there is theirs to that.
        bound = 1e-5 if theirs == "cogvideox" else 1e-3
        torch.testing.assert_close(x_t, tables[f"leap.{theirs}.x_t"], rtol=0, atol=bound)
        torch.testing.assert_close(x0, tables[f"leap.{theirs}.x0_from_v"], rtol=0, atol=bound)
        target = schedule.velocity(given["x0"], given["noise"], t)
        torch.testing.assert_close(target, tables[f"leap.{theirs}.v_target"], rtol=0, atol=bound)


def test_consistency_models_boundary(recording):
    tables = load_file(recording / "schedule.safetensors")
    t = tables["leap.t"]
    c_skip, c_out = lcm_boundary(t)
    torch.testing.assert_close(c_skip, tables["lcm.c_skip"], rtol=1e-9, atol=0)
    torch.testing.assert_close(c_out, tables["lcm.c_out"], rtol=1e-9, atol=0)
    denoised = consistency(tables["leap.lcm.x_t"], tables["leap.lcm.x0_from_v"], t)
    torch.testing.assert_close(denoised, tables["leap.lcm.denoised"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BOUNDARIES)
def test_at_the_clean_end_the_answer_is_the_point(name):
    x, x0, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0, 19])
    found = consistency(x, x0, t, BOUNDARIES[name])
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[1], x0[1], rtol=0, atol=1e-4)


def test_four_steps_of_consistency_models(recording):
    tables = load_file(recording / "schedule.safetensors")
    schedule, steps, seen = NoiseSchedule.cogvideox(), tables["lcm4.timesteps"].tolist(), []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        v = tables["lcm4.v"][len(seen) - 1][None]
        return consistency(x_t, schedule.x0_from_v(x_t, v, t), t)

    noises = [noise[None] for noise in tables["lcm4.noise"]]
    end = few_step(denoise, tables["lcm4.x"][:1], schedule, steps[::-1], noises)
    torch.testing.assert_close(torch.cat([*seen, end]), tables["lcm4.x"], rtol=0, atol=1e-5)


def test_the_grid_has_what_the_release_lands_on():
    assert leap_grid(20, 599) == list(range(19, 600, 20)) and len(leap_grid(50, 599)) == 12
    assert 459 in leap_grid(20, 599) and 549 not in leap_grid(20, 599) and 549 in leap_grid(10, 599)
    assert "leaves no timestep up to t_max=30" in refusal(lambda: leap_grid(50, 30))


# --- Cameras ---


def test_the_focus_point_path(recording):
    tables = load_file(recording / "camera_interpolation.safetensors")
    for a, b, expected in zip(tables["a"], tables["b"], tables["c2w"], strict=True):
        found = focus_point_poses(a, b, tables["t"])
        torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5)
    for a, b, expected in zip(tables["Ka"], tables["Kb"], tables["K"], strict=True):
        found = torch.lerp(a, b, tables["t"].view(-1, 1, 1))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_focus_point_path_by_name(recorded):
    tables = load_file(recorded / "videoscene" / "camera_interpolation.safetensors")
    path_of = trajectories.PRESETS["focus_point"]
    intrinsics = torch.stack([tables["Ka"][0], tables["Kb"][0]]).double()
    intrinsics[:, [0, 1], [0, 1]] = torch.tensor([[20.0, 21.0], [30.0, 31.0]], dtype=torch.float64)
    pair = Cameras(torch.stack([tables["a"][0], tables["b"][0]]).double(), intrinsics, 32, 48)
    even, eased = path_of(pair, 9), path_of(pair, 9, eased=True)
    for path in (even, eased):
        assert torch.equal(path.world_from_cam[[0, -1]], pair.world_from_cam) and len(path) == 9
        torch.testing.assert_close(path.intrinsics[4, 0, 0], torch.tensor(25.0, dtype=torch.float64))
        torch.testing.assert_close(path.world_from_cam[4], even.world_from_cam[4])
    step = [path.centers.diff(dim=0).norm(dim=1) for path in (even, eased)]
    assert step[1][0] < 0.5 * step[0][0] and step[1][3] > 1.2 * step[0][3]  # slow at the ends
    assert "runs between two views, not 1" in refusal(lambda: path_of(pair[[0]], 9))


# --- The released pipeline ---


@pytest.fixture(scope="module", params=LEAPS or [pytest.param("", marks=pytest.mark.skip("no recordings here"))])
def released(request) -> tuple[VideoScenePipeline, dict[str, Tensor], int]:
    """(the pipeline of a recording's weights, its tensors, its t)."""
    name = request.param
    settings = json.loads((SHARED / f"{name}_config.json").read_text())
    network = CogVideoXTransformer3DModel(**settings["transformer"]).eval()
    network.load_state_dict(load_file(SHARED / f"{name}_transformer.safetensors"))
    vae = AutoencoderKLCogVideoX(**settings["vae"]).eval()
    vae.load_state_dict(load_file(SHARED / f"{name}_vae.safetensors"))
    scheduler = CogVideoXDPMScheduler(**{k: v for k, v in settings["scheduler"].items() if k != "class"})
    io = load_file(SHARED / f"{name}_io.safetensors")
    prompts = EncodedPrompts.of(io["prompt_embeds"], io["prompt_embeds"])
    pipeline = VideoScenePipeline(
        vae, network, scheduler, prompts, rotary_base="30x45", image_noise=True, t=settings["timestep"]
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, io, settings["timestep"]


@pytest.fixture
def their_numbers(released, monkeypatch) -> Iterator[None]:
    """What the pipeline draws is what was recorded; all of it must be used."""
    _, io, _ = released
    names = ["sigma_log", "noise_first_pixels", "posterior_noise_first", "noise_last_pixels", "posterior_noise_last"]
    names += ["posterior_noise_video", "noise_leap"]
    waiting = [io[f"draw.{name}"] for name in names]
    waiting[0] = ((waiting[0] + 3) / 0.5).view(1, 1, 1, 1, 1)
    for place in (1, 3, 6):  # there frames come before channels where they do not here, and the other way round
        waiting[place] = waiting[place].transpose(1, 2)

    def draw(shape, generator=None, dtype=torch.float32) -> Tensor:
        assert waiting[0].shape == tuple(shape)
        return waiting.pop(0)

    monkeypatch.setattr(pipelines, "normal", draw)
    monkeypatch.setattr("fvgen.pipelines.base.normal", draw)
    yield
    assert not waiting


def photographs(io: dict[str, Tensor]) -> Tensor:
    """[2, 3, H, W] in [0, 1]: stretched to the render's size by the release's own way."""
    size = io["render_u8"].shape[-2:]
    return VideoProcessor(vae_scale_factor=8).preprocess(io["images"].movedim(-1, 1), *size) / 2 + 0.5


def test_every_tensor_of_a_leap(released, their_numbers):
    pipeline, io, t = released
    render = io["render_u8"][None].float() / 255
    condition = pipeline.condition(render, reference=photographs(io))
    near = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(condition["image_latents"], io["cond"].transpose(1, 2), **near)
    expected = (io["enc.video.mean"] + io["enc.video.std"] * io["draw.posterior_noise_video"]) * 0.7
    torch.testing.assert_close(condition["render_latents"], expected, **near)

    calls, outputs = [], []
    before = pipeline.transformer.register_forward_pre_hook(
        lambda m, args, kw: calls.append((args, kw)), with_kwargs=True
    )
    after = pipeline.transformer.register_forward_hook(lambda module, args, output: outputs.append(output.sample))
    x0 = pipeline.sample(condition, torch.Generator(), t=t)
    before.remove(), after.remove()
    (((sample, _, timestep), options),) = calls
    torch.testing.assert_close(sample, io["model_input"], **near)
    torch.testing.assert_close(sample[:, :, : sample.shape[2] // 2], io["x_t"], **near)
    assert timestep.tolist() == io["timestep"].tolist() == [t]
    cosine, sine = options["image_rotary_emb"]
    torch.testing.assert_close(cosine.float(), io["rope_cos"], **near)
    torch.testing.assert_close(sine.float(), io["rope_sin"], **near)
    torch.testing.assert_close(outputs[0], io["model_output"], **near)
    torch.testing.assert_close(x0, io["x0"].transpose(1, 2), **near)
    torch.testing.assert_close(x0 / 0.7, io["dec.latent"], **near)
    # Their decoder gives three frames more where the latent frames are an even number; ours are those of the clip.
    frames = pipeline.decode_latents(x0)
    theirs = (io["dec.sample"][:, :, -frames.shape[1] :].clamp(-1, 1) / 2 + 0.5).transpose(1, 2)
    assert frames.shape[1] == render.shape[1]
    torch.testing.assert_close(frames, theirs, **near)


def test_a_call_is_all_of_it(released, request):
    pipeline, io, _ = released
    render = io["render_u8"][None].float() / 255
    if render.shape[1] % 8 != 1:  # the release decodes 16 frames of 13 and takes what it needs; here they are refused
        assert "give 17 frames" in refusal(lambda: pipeline(render))
        return
    request.getfixturevalue("their_numbers")
    frames = pipeline(render, reference=photographs(io))
    theirs = (io["dec.sample"].clamp(-1, 1) / 2 + 0.5).transpose(1, 2)
    torch.testing.assert_close(frames, theirs, rtol=0, atol=1e-5)


# --- The published model's size ---


def test_the_published_network_has_its_keys_and_parameters():
    family, blueprint = teacher_blueprint("cogvideox-interpolation")
    files = PUBLISHED["cogvideox-interpolation"]
    with torch.device("meta"):
        network = blueprint.network()
        vae = AutoencoderKLCogVideoX(
            **{key: value for key, value in files["vae"].items()},
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        )
        latents, condition = blueprint.example(Size(1, 49, 480, 720))
    attention = [p.numel() for name, p in network.named_parameters() if ".attn1." in name]
    assert sum(p.numel() for p in network.parameters()) == 5_570_479_680 and len(network.state_dict()) == 1025
    assert sum(attention) == 1_585_973_760 and sum(p.numel() for p in vae.parameters()) == 215_583_907
    assert network.patch_embed.pos_embedding.shape == (1, 17_776, 3072)
    assert vae.config.scaling_factor == 0.7 and blueprint.guidance == 1.0
    assert latents.shape == condition["render_latents"].shape == family.start(condition).shape == (1, 16, 13, 60, 90)
