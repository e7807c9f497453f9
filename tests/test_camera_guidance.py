"""Wonderland's camera guidance: the network against its base, the pipelines, and the data that carry cameras."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from checks import refusal
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from small_cameras import BRANCHES, SETTINGS, cameras, guided, moved, paths, with_paths
from small_cogvideox import (
    FRAMES,
    HEIGHT,
    LATENTS,
    POSITIONS,
    TEXT,
    TOKENS,
    WIDTH,
    rng,
    small_scheduler,
    small_teacher,
    video,
)
from small_cogvideox import transformer as base_transformer
from torch import Tensor, nn

from fvgen.clips.clip import Clip
from fvgen.clips.folder import ClipFolder, save_clips
from fvgen.clips.latents import condition_of, load_latents
from fvgen.geometry.plucker import folded, plucker, unpacked
from fvgen.models.cogvideox.camera import CameraTransformer, ray_grid
from fvgen.models.cogvideox.family import FAMILY, noise_schedule
from fvgen.models.cogvideox.pipelines import CogVideoXStudentPipeline, CogVideoXTeacherPipeline
from fvgen.models.cogvideox.published import PUBLISHED
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Teacher
from fvgen.models.lora import SharedBackbone
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.walks.chain import chain
from fvgen.walks.render import Rendered

TAPS = ("blocks.0", "blocks.1")
READ = (
    2e-5  # of frames: weights that lie elsewhere in memory are summed in another order, some hundred roundings of 6e-8
)
WAYS = [
    *({"branch": branch} for branch in BRANCHES),
    {"branch": "dual", "camera_lora_rank": 0},
    {"branch": "control", "branch_width": 16},
    {"branch": "dual", "control_blocks": 2},
]


@pytest.fixture(scope="module")
def seen() -> tuple[Tensor, Tensor, Condition]:
    """x_t [2, 16, 3, 4, 6], timesteps [2] and a condition with camera paths; the text is one row for both."""
    generator = torch.Generator().manual_seed(3)
    x_t, image = torch.randn(2, 2, *LATENTS, generator=generator)
    text = torch.randn(1, TOKENS, TEXT, generator=generator)
    return x_t, torch.tensor([999, 459]), with_paths(Condition(image_latents=image, text_tokens=text))


def velocity(network: nn.Module, seen: tuple, taps: tuple[str, ...] = (), **how: bool) -> Tensor:
    return FAMILY.call(network, *seen, taps, **how).output


# --- What the network sees ---


def test_a_latent_pixel_holds_the_rays_of_its_pixels_in_its_frames():
    """Channel by channel: frame in the group, number of the ray, row and column inside the latent pixel."""
    path = paths(2)
    grid = ray_grid(path, 4, 6, 8)
    assert grid.shape == (2, 4 * 6 * 64, *LATENTS[1:])
    whole = plucker(unpacked(path[1], HEIGHT, WIDTH))  # [F, 6, H, W]
    for latent, frame_in_group, ray, row, column, y, x in ((0, 2, 0, 5, 1, 0, 0), (1, 0, 4, 7, 7, 3, 5)):
        frame = 0 if latent == 0 else 4 * (latent - 1) + 1 + frame_in_group
        channel = ((frame_in_group * 6 + ray) * 8 + row) * 8 + column
        assert grid[1, channel, latent, y, x] == whole[frame, ray, 8 * y + row, 8 * x + column]
    assert folded(whole).shape == (3, 24, HEIGHT, WIDTH)


# --- At the start ---


@pytest.mark.parametrize(
    ("way", "positions"), [*((way, "rotary") for way in WAYS), *(({}, each) for each in POSITIONS)], ids=str
)
def test_it_starts_as_its_base_bit_for_bit(seen, way, positions):
    network, base = guided(positions, **way), base_transformer(positions)
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        assert torch.equal(velocity(network, seen), velocity(base, seen))
        ours, theirs = (FAMILY.call(each, *seen, TAPS) for each in (network, base))
        assert torch.equal(ours.output, theirs.output)
        assert all(torch.equal(ours.features[tap], theirs.features[tap]) for tap in TAPS)


def test_it_starts_as_its_base_in_bfloat16_too(seen):
    network, base = (nn.Module.to(each, torch.bfloat16) for each in (guided(), base_transformer()))
    assert torch.equal(velocity(network, seen), velocity(base, seen))
    base = nn.Module.to(base_transformer(), torch.bfloat16)
    assert torch.equal(velocity(CameraTransformer.from_base(base, **SETTINGS), seen), velocity(base, seen))


def test_blocks_are_copied_unless_they_are_not(seen):
    base = base_transformer().transformer_blocks[0].state_dict()
    copied, fresh = (guided(copy_blocks=copy).camera_control.blocks[0].state_dict() for copy in (True, False))
    assert all(torch.equal(copied[name], tensor) for name, tensor in base.items())
    assert not torch.equal(fresh["ff.net.2.weight"], base["ff.net.2.weight"])


def learnt(network: CameraTransformer, seen: tuple, updates: int) -> dict[str, bool]:
    """Whether each new parameter has a gradient after so many updates."""
    network.requires_grad_(False)
    new = {name: p.requires_grad_(True) for name, p in network.named_parameters() if network.is_guide(name)}
    optimizer = torch.optim.AdamW(new.values(), lr=1e-2)
    for update in range(updates + 1):
        optimizer.zero_grad()
        (velocity(network, seen) - 1).square().mean().backward()
        if update < updates:
            optimizer.step()
    return {name: p.grad is not None and bool(p.grad.any()) for name, p in new.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_all_that_is_new_learns_within_two_updates(seen, way, checkpointing):
    network = guided(**way)
    if checkpointing:
        network.enable_gradient_checkpointing()
    found = learnt(network, seen, 2)
    assert all(found.values()), sorted(name for name, has in found.items() if not has)


def test_the_columns_of_the_fusion_must_keep_their_random_start(seen):
    """The control, which must fail: with those at zero the LoRA branch's camera path learns nothing, ever."""
    network = guided(branch="lora")
    with torch.no_grad():
        network.camera_fusion.weight[:, 48:] = 0
    found = learnt(network, seen, 5)
    blind = {name for name, has in found.items() if not has}
    assert blind and all("camera_encoder" in name for name in blind)
    assert not network.camera_fusion.weight[:, 48:].any()


# --- After a training ---


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_it_looks_at_each_clips_own_path(seen, way):
    x_t, t, condition = seen
    network = moved(guided(**way))
    other = condition.replaced({"camera_path": torch.stack([condition["camera_path"][0], paths(1, seed=9)[0]])})
    with torch.no_grad():
        one, two = (velocity(network, (x_t, t, each)) for each in (condition, other))
    assert torch.equal(one[0], two[0])
    assert (one[1] - two[1]).abs().max() > 1e-3 * one[1].abs().max()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_taps_stop_and_cut_are_what_they_are_for_the_base(seen, way):
    network = moved(guided(**way))
    whole, stopped = FAMILY.call(network, *seen, TAPS), FAMILY.call(network, *seen, TAPS[:1], stop=True)
    assert torch.equal(whole.output, velocity(network, seen))
    assert stopped.output is None and torch.equal(stopped.features[TAPS[0]], whole.features[TAPS[0]])
    cut = FAMILY.call(network, *seen, TAPS[:1], cut=True)
    assert torch.equal(cut.output, whole.output)
    assert not cut.output.requires_grad and cut.features[TAPS[0]].requires_grad
    base = FAMILY.call(base_transformer(), *seen, TAPS)
    assert not torch.equal(base.features[TAPS[0]], whole.features[TAPS[0]])


def test_checkpointing_changes_no_gradient(seen):
    grads = []
    for checkpointing in (False, True):
        network = moved(guided(control_blocks=2))
        if checkpointing:
            network.enable_gradient_checkpointing()
        velocity(network, seen, TAPS).square().mean().backward()
        grads.append({name: p.grad for name, p in network.named_parameters()})
    plain, again = grads
    assert plain.keys() == again.keys() and "camera_control.blocks.1.attn1.to_q.weight" in plain
    assert all(torch.equal(grad, again[name]) for name, grad in plain.items() if grad is not None)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_below_its_timestep_the_network_is_the_base(seen, way):
    """Clip by clip: 999 and 459 in one batch."""
    network, base, always = moved(guided(control_t_min=600, **way)), base_transformer(), moved(guided(**way))
    with torch.no_grad():
        found, plain, heard = (velocity(each, seen) for each in (network, base, always))
    assert torch.equal(found[1], plain[1]) and torch.equal(found[0], heard[0])
    assert not torch.equal(found[0], plain[0]) and not torch.equal(heard[1], plain[1])


@pytest.mark.parametrize("branch", ["lora", "dual"])
def test_below_its_timestep_a_shared_backbone_is_the_base(seen, branch):
    """Adapters of peft's take the place of the layers that are to be silent."""
    pytest.importorskip("peft")
    one, network = (moved(guided(control_t_min=600, branch=branch)) for _ in range(2))
    SharedBackbone(network, ["student"], 2, FAMILY.lora_targets)
    with torch.no_grad():
        alone, shared, plain = (velocity(each, seen) for each in (one, network, base_transformer()))
    assert torch.equal(shared, alone) and torch.equal(shared[1], plain[1]) and not torch.equal(shared[0], plain[0])


def test_checkpointing_a_rollout_remembers_who_looked(seen):
    """Two steps before one backward pass: what is computed again for the first must not be gated as the second was."""
    x_t, t, condition = seen
    grads = []
    for checkpointing in (False, True):
        network = moved(guided(control_t_min=600))
        if checkpointing:
            network.enable_gradient_checkpointing()
        first = velocity(network, (x_t, torch.full_like(t, 999), condition))
        velocity(network, (x_t + first, torch.full_like(t, 400), condition)).square().mean().backward()
        grads.append({name: p.grad for name, p in network.named_parameters()})
    plain, again = grads
    assert plain["transformer_blocks.0.attn1.to_q.camera_up.weight"].abs().max() > 0
    assert all(torch.equal(grad, again[name]) for name, grad in plain.items() if grad is not None)


def test_the_camera_is_learnt_where_clips_depend_on_it():
    """Latents that are a fixed function of the path: after some updates the right path explains them better than
    another clip's, and before it did not."""
    torch.manual_seed(0)
    count = 6
    path = paths(count)
    mixing = torch.randn(16, 24, generator=rng(1)) / 24**0.5
    coarse = ray_grid(path, 4, 6, 1)  # [N, 24, F', h, w]: one ray a latent pixel
    latents = torch.einsum("dc,ncfhw->ndfhw", mixing, coarse)
    text = torch.zeros(1, TOKENS, TEXT)
    image = torch.zeros_like(latents)
    network = guided(branch="dual").train()
    network.requires_grad_(False)
    new = [p.requires_grad_(True) for name, p in network.named_parameters() if network.is_guide(name)]
    optimizer = torch.optim.AdamW(new, lr=1e-2)
    t = torch.full((count,), 999)

    def loss(shown: Tensor) -> Tensor:
        noise = torch.randn(latents.shape, generator=rng(2))
        condition = Condition(image_latents=image, text_tokens=text, camera_path=shown)
        return (velocity(network, (noise, t, condition)) + latents).square().mean()  # v = -z at 999

    assert loss(path).item() == loss(path.roll(1, 0)).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(path).backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = loss(path).item(), loss(path.roll(1, 0)).item()
    assert right < 0.8 * wrong, (right, wrong)


# --- The camera's weight in the sampler ---


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_without_a_path_it_is_its_base(seen, way):
    """And what came before does not show afterwards."""
    network, base = moved(guided(**way)), base_transformer()
    blind = (*seen[:2], seen[2].without("camera_path"))
    with torch.no_grad():
        first = velocity(network, seen)
        assert torch.equal(velocity(network, blind), velocity(base, blind))
        assert torch.equal(velocity(network, seen), first) and not torch.equal(first, velocity(base, blind))


@pytest.mark.parametrize("text_guidance", [1.0, 2.5])
def test_the_camera_has_a_weight_of_its_own(seen, text_guidance):
    """Velocities of passes of networks without any guidance, put together by hand; at 459 the path is not looked at and
    the weight changes nothing. Networks in float64: what they give is rounded once."""
    x_t, t, condition = seen
    network, base = (nn.Module.double(each) for each in (moved(guided(control_t_min=600)), base_transformer()))
    null = {"text_tokens": torch.randn(1, TOKENS, TEXT, generator=rng(4))}
    schedule = noise_schedule(small_scheduler().config)
    teacher = Teacher(network, schedule, FAMILY.call, [null], text_guidance, 0.0, camera_guidance=3.0)
    assert teacher.nfe == 2 + (text_guidance != 1)
    with torch.no_grad():
        cond, empty = (velocity(network, (x_t, t, each)).float() for each in (condition, condition.replaced(null)))
        blind = velocity(base, (x_t, t, condition.without("camera_path"))).float()
        expected = empty + text_guidance * (cond - empty) + 2 * (cond - blind)
        found = teacher.velocity(*seen)
        close = {"atol": 1e-5, "rtol": 1e-5}  # some ten roundings of 6e-8 of numbers about 10
        torch.testing.assert_close(found, expected, **close)
        torch.testing.assert_close(found[1], (empty + text_guidance * (cond - empty))[1], **close)
        assert (found - cond)[0].abs().max() > 0.1
        x0, _ = teacher.judge(*seen, ())
        torch.testing.assert_close(x0, schedule.x0_from_v(x_t, expected, t), **close)


def test_where_nobody_looks_the_weight_costs_no_pass(seen):
    x_t, t, condition = seen
    passes = []

    def counting(network, x_t, t, *rest, **more):
        passes.append(int(t[0]))
        return FAMILY.call(network, x_t, t, *rest, **more)

    network = moved(guided(control_t_min=600))
    teacher = Teacher(network, noise_schedule(small_scheduler().config), counting, (), 1.0, 0.0, camera_guidance=2.0)
    with torch.no_grad():
        for step in (999, 600, 599, 0):
            teacher.velocity(x_t, torch.full_like(t, step), condition)
    assert passes == [999, 999, 600, 600, 599, 0]


# --- Full size ---


def counts(**settings) -> dict[str, int]:
    """Of CogVideoX-5B-I2V with the paper's settings, by part, in millions."""
    with torch.device("meta"):
        network = CameraTransformer(**PUBLISHED["cogvideox-5b-i2v"]["transformer"], **settings)
        assert isinstance(network, CogVideoXTransformer3DModel)
    control = network.camera_control
    parts = {"blocks": control.blocks, "outs": control.outs, "fusion": network.camera_fusion}
    found = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}
    found["lora"] = sum(p.numel() for n, p in network.named_parameters() if ".camera_" in n and "attn1" in n) / 1e6
    found["all"] = sum(p.numel() for n, p in network.named_parameters() if network.is_guide(n)) / 1e6
    return found


def test_the_papers_size():
    """Counted by hand from D = 3072: copies 132.2 M each, zero layers D^2 + D, fusion 2 D^2 + D, LoRA 8 D r a block."""
    found = counts()
    assert found["blocks"] == pytest.approx(2776, abs=2)
    assert found["outs"] == pytest.approx(21 * (3072**2 + 3072) / 1e6)
    assert found["fusion"] == pytest.approx((2 * 3072**2 + 3072) / 1e6)
    assert found["lora"] == pytest.approx(42 * 8 * 3072 * 256 / 1e6)
    encoder = 1536 * 256 + 256 + 27 * 256**2 + 256 + 1024 * 3072 + 3072 + 3072**2 + 3072
    assert found["all"] == pytest.approx(
        sum(found[n] for n in ("blocks", "outs", "fusion", "lora")) + 2 * encoder / 1e6
    )


# --- Pipelines ---


@pytest.fixture(scope="module")
def teacher() -> CogVideoXTeacherPipeline:
    """Guided, as after a training. Shared: never change it."""
    torch.manual_seed(5)
    found = small_teacher(image_condition="first").with_cameras(**SETTINGS)
    moved(found.transformer)
    return found


def test_the_untrained_pipeline_is_the_base_and_cameras_are_its_argument():
    base = small_teacher()
    fresh = base.with_cameras(**SETTINGS)
    assert torch.equal(fresh(video(), cameras=cameras()), base(video()))
    assert base.transformer.__class__ is CogVideoXTransformer3DModel and not base.wants_cameras
    assert fresh.with_cameras(**SETTINGS) is fresh
    assert "control_blocks=2, but the teacher" in refusal(lambda: fresh.with_cameras(control_blocks=2))


def test_a_call_depends_on_the_path_and_not_on_the_worlds_place_and_unit(teacher):
    path = cameras(1)
    world = torch.eye(4)
    world[:3, :3], world[:3, 3] = cameras(4).world_from_cam[-1, :3, :3], torch.tensor([3.0, -2.0, 1.0])
    poses = path.world_from_cam.clone()
    poses[:, :3, 3] *= 4
    elsewhere = replace(path, world_from_cam=world @ poses)
    found, same, other = (teacher(video(), cameras=each) for each in (path, elsewhere, cameras(2)))
    torch.testing.assert_close(found, same, atol=1e-4, rtol=0)
    assert (found - other).abs().max() > 10 * (found - same).abs().max() and (found - other).abs().max() > 1e-3


def test_clips_of_a_batch_have_paths_of_their_own_or_one(teacher):
    both = teacher.condition(video(2), rng(), cameras=[cameras(1), cameras(2)])
    one = teacher.condition(video(2), rng(), cameras=cameras(2))
    assert both["camera_path"].shape == (2, FRAMES, 21) and one["camera_path"].shape == (1, FRAMES, 21)
    assert torch.equal(both["camera_path"][1:], one["camera_path"])
    assert torch.equal(both.expanded(2)["image_latents"], one.expanded(2)["image_latents"])


def test_what_is_wrong_with_cameras_is_told(teacher):
    base, still = small_teacher(), cameras()
    still = still[[0] * FRAMES]
    assert "guided by cameras; give cameras=" in refusal(lambda: teacher(video()))
    assert "not guided by them; leave cameras out" in refusal(lambda: base(video(), cameras=cameras()))
    assert "not guided by them" in refusal(lambda: base.condition(video(), cameras=cameras()))
    assert "no motion" in refusal(lambda: teacher(video(), cameras=still))
    assert "5 cameras of 32x48 were given for 9 frames" in refusal(lambda: teacher(video(), cameras=cameras(frames=5)))
    assert "9 cameras of 32x64" in refusal(lambda: teacher(video(), cameras=cameras(width=64)))
    assert "3 camera paths were given for 2 clips" in refusal(lambda: teacher(video(2), cameras=[cameras()] * 3))
    assert "13 frames do not fit" in refusal(lambda: teacher(video(frames=13), cameras=cameras(frames=13)))


def test_the_weight_is_the_models_own_or_the_calls(teacher, tmp_path):
    render, path = video(1), cameras(1)
    strong = teacher.with_parts(camera_guidance=4.0)
    save_model(strong, tmp_path / "strong")
    again = load_pipeline(tmp_path / "strong", TeacherPipeline)
    assert again.config.camera_guidance == 4.0 and again.teacher().camera_guidance == 4.0
    words = {"cameras": path, "num_inference_steps": 2, "output_type": "latent", "return_dict": False}
    plain, own, told, none = (
        pipeline(render, rng(), **words, **more)[0]
        for pipeline, more in ((teacher, {}), (strong, {}), (teacher, {"camera_guidance_scale": 4.0}),
                               (strong, {"camera_guidance_scale": 1.0}))
    )  # fmt: skip
    assert torch.equal(own, told) and torch.equal(plain, none) and not torch.equal(own, plain)
    assert "camera guidance 4" in (tmp_path / "strong" / "README.md").read_text()
    assert "camera_guidance=2 has no effect: this model is not guided" in refusal(
        lambda: small_teacher().teacher(camera_guidance=2.0)
    )


def test_settings_that_do_not_fit_are_told():
    assert "control_blocks=3: the base has 2" in refusal(lambda: guided(control_blocks=3))
    assert "no multiple of a head's 16" in refusal(lambda: guided(branch_width=24))
    assert "did you mean 'dual'" in refusal(lambda: guided(branch="dula"))


def test_a_folder_is_read_as_it_was_written_and_strictly(teacher, tmp_path):
    folder = tmp_path / "guided"
    save_model(teacher, folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["fvgen.models.cogvideox.camera", "CameraTransformer"]
    again = load_pipeline(folder, TeacherPipeline)
    assert type(again) is CogVideoXTeacherPipeline and again.wants_cameras
    found, expected = (each(video(), cameras=cameras()) for each in (again, teacher))
    torch.testing.assert_close(found, expected, atol=READ, rtol=0)
    assert again.encoder_fingerprint() == teacher.encoder_fingerprint()
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: x for name, x in weights.items() if name != "camera_fusion.weight"}, file, {"format": "pt"})
    assert "camera_fusion.weight" in refusal(lambda: load_pipeline(folder, TeacherPipeline))
    save_file(weights, file, {"format": "pt"})
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"branch": "both"}))
    assert "not one of lora, control, dual" in refusal(lambda: load_pipeline(folder, TeacherPipeline))


def test_a_student_of_it_is_guided_too(teacher, tmp_path):
    student = FAMILY.student_of(teacher, teacher.transformer, 2)
    assert isinstance(student, CogVideoXStudentPipeline) and student.wants_cameras
    save_model(student, tmp_path / "student")
    again = load_pipeline(tmp_path / "student", CogVideoXStudentPipeline)
    one, two = (again(video(), cameras=cameras(seed)) for seed in (1, 2))
    torch.testing.assert_close(one, student(video(), cameras=cameras(1)), atol=READ, rtol=0)
    assert (one - two).abs().max() > 0.01


# --- Data ---


def clips(count: int = 3, posed: bool = True) -> list[Clip]:
    known = torch.tensor([True, *[False] * (FRAMES - 1)])
    return [
        Clip(f"clip-{i}", truth, truth * 0.9, known, cameras(i) if posed else None)
        for i, truth in enumerate(video(count))
    ]


def test_a_clip_folder_keeps_cameras_and_one_without_is_still_read(teacher, tmp_path):
    made = clips()
    folder = save_clips(tmp_path / "posed", made, {})
    for clip, expected in zip(ClipFolder(folder.path), made, strict=False):
        assert torch.equal(clip.cameras.world_from_cam, expected.cameras.world_from_cam)
        assert torch.equal(clip.cameras.intrinsics, expected.cameras.intrinsics)
        assert (clip.cameras.height, clip.cameras.width) == (HEIGHT, WIDTH)
    bare = save_clips(tmp_path / "bare", clips(posed=False), {})
    assert bare[0].cameras is None
    load_latents(bare, small_teacher())  # whoever wants no cameras misses none
    assert "clip clip-0 has no cameras" in refusal(lambda: load_latents(bare, teacher))
    file = folder.path / "clips.safetensors"
    tensors = load_file(file)
    save_file({name: x for name, x in tensors.items() if name != "intrinsics"}, file)
    assert "does not fit its index.json" in refusal(lambda: ClipFolder(folder.path))


def test_encoded_clips_have_their_paths_and_are_encoded_once_for_base_and_guided(teacher, tmp_path):
    folder, base = save_clips(tmp_path / "posed", clips(), {}), small_teacher(image_condition="first")
    assert teacher.encoder_fingerprint() == base.encoder_fingerprint()
    plain, seen = load_latents(folder, base), load_latents(folder, teacher)
    again = load_latents(folder, teacher)
    assert "camera_path" not in plain.tensors
    assert torch.equal(seen.tensors["camera_path"], paths(3)) and torch.equal(
        again.batch([1]).condition["camera_path"][0], paths(3)[1]
    )
    assert len(list(folder.path.glob("encoded-*"))) == 1
    assert torch.equal(seen.tensors["latents"], plain.tensors["latents"])
    assert condition_of(folder[0], teacher, rng())["camera_path"].shape == (1, FRAMES, 21)


def test_a_walk_gives_each_of_its_clips_the_cameras_of_its_frames(teacher):
    """Two clips of a walk of 13 frames, against calls by hand."""
    frames, path = torch.cat([video(), video(seed=1)[:, :4]], dim=1)[0], cameras(3, frames=13)
    known = torch.zeros(13, dtype=torch.bool)
    walk = Rendered(frames, known, torch.ones(13), torch.ones(13, HEIGHT, WIDTH), path)
    made = chain(teacher, walk, FRAMES, seams="own_noise", seed=7)
    first = teacher(frames[None, :FRAMES], rng(7), cameras=path[:FRAMES])[0]
    again = torch.cat([first[4:5], frames[5:]])
    second = teacher(again[None], rng(8), cameras=path[4:])[0]
    torch.testing.assert_close(made, torch.cat([first, second[5:]]), atol=READ, rtol=0)
