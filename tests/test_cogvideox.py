"""A second family through everything that a first one goes through: nothing outside its folder knows its name."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import hashes, refusal
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file
from small_cogvideox import (
    BLOCKS,
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
    small_vae,
    transformer,
    video,
)
from torch import Tensor

from fvgen.clips.clip import Clip
from fvgen.clips.folder import ClipFolder, save_clips
from fvgen.clips.latents import load_latents
from fvgen.distill import (
    StageConfig,
    Trainer,
    changed,
    export_checkpoint,
    read_metrics,
    read_stage_config,
    run,
    stage_config,
)
from fvgen.models.cogvideox.family import FAMILY, noise_schedule
from fvgen.models.cogvideox.pipelines import CogVideoXStudentPipeline, CogVideoXTeacherPipeline
from fvgen.models.cogvideox.transformer import centred, rotary_table
from fvgen.models.cogvideox.vae import decode, encode
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Denoiser
from fvgen.models.family import Size, family_of
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.planning.plan import teacher_blueprint
from fvgen.planning.simulate import simulate

CONFIG = Path(__file__).resolve().parents[1] / "recipes" / "configs" / "cogvideox.yaml"


@pytest.fixture(scope="module")
def teacher() -> CogVideoXTeacherPipeline:
    """Shared: never change it."""
    return small_teacher()


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    """With all that a published one may have: learned positions beside rotary ones."""
    folder = tmp_path_factory.mktemp("models") / "cogvideox"
    save_model(small_teacher("learned"), folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    known = torch.tensor([True, *[False] * (FRAMES - 2), True])
    clips = [Clip(f"clip-{i}", truth, truth * 0.9, known) for i, truth in enumerate(video(3))]
    folder = tmp_path_factory.mktemp("data") / "clips"
    save_clips(folder, clips, {"kind": "test"})
    return folder


@pytest.fixture
def stage(teacher_folder, clip_folder, tmp_path) -> Callable[..., StageConfig]:
    def make(name: str = "gan", **changes) -> StageConfig:
        settings = {
            "out": str(tmp_path / name),
            "teacher": str(teacher_folder),
            "data": str(clip_folder),
            "iterations": 2,
            "batch_size": 2,
            "critic_updates": 1,
            "head_channels": 8,
            "checkpoint_every": 1,
            "student_lr": 1e-3,
            "track": False,
        }
        return stage_config(name, settings | changes)

    return make


@pytest.fixture(scope="module")
def seen() -> tuple[Tensor, Tensor, Condition]:
    """x_t [2, 16, 3, 4, 6], timesteps [2] and a condition; the text is one row for both."""
    generator = torch.Generator().manual_seed(3)
    x_t, image = torch.randn(2, 2, *LATENTS, generator=generator)
    text = torch.randn(1, TOKENS, TEXT, generator=generator)
    return x_t, torch.tensor([999, 459]), Condition(image_latents=image, text_tokens=text)


# --- The network ---


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_call_is_the_transformers_own_forward(seen, positions):
    x_t, t, condition = seen
    network = transformer(positions)
    sample = torch.cat([x_t, condition["image_latents"]], dim=1).transpose(1, 2)
    text, rotary = condition["text_tokens"].expand(2, -1, -1), rotary_table(network, 3, 4, 6, x_t.device)
    assert (rotary is None) == (positions == "sinusoids")
    with torch.no_grad():
        expected = network(sample, text, t, image_rotary_emb=rotary).sample.transpose(1, 2)
        plain, tapped = (FAMILY.call(network, *seen, taps) for taps in ((), ("blocks.0", "blocks.1")))
    assert torch.equal(plain.output, expected) and torch.equal(tapped.output, expected)
    assert list(tapped.features) == ["blocks.0", "blocks.1"]
    assert all(features.shape == (2, 48, 3, 2, 3) for features in tapped.features.values())


def test_taps_are_what_hooks_see_and_nothing_runs_behind_the_last(seen):
    network, outputs = transformer(num_layers=3), []
    for block in network.transformer_blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    with torch.no_grad():
        whole = FAMILY.call(network, *seen, ("blocks.0", "blocks.1"))
        assert len(outputs) == 3
        for index in (0, 1):
            volume = outputs[index].unflatten(1, (3, 2, 3)).movedim(-1, 1)
            assert torch.equal(whole.features[f"blocks.{index}"], volume)
        outputs.clear()
        stopped = FAMILY.call(network, *seen, ("blocks.0", "blocks.1"), stop=True)
    assert len(outputs) == 2 and stopped.output is None
    assert all(torch.equal(stopped.features[tap], whole.features[tap]) for tap in whole.features)


def test_gradients_reach_the_clip_through_the_features_and_end_at_the_cut(seen):
    x_t, t, condition = seen
    network, x_t = transformer().requires_grad_(False), x_t.clone().requires_grad_(True)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            network.enable_gradient_checkpointing()
        velocity, features = FAMILY.call(network, x_t, t, condition, ("blocks.0",), cut=True)
        assert not velocity.requires_grad
        found += torch.autograd.grad(features["blocks.0"].square().mean(), x_t)
    assert (found[0] != 0).all() and torch.equal(*found)


def test_rotary_positions_stretch_the_grid_over_the_base():
    boxes = {(30, 45): ((0, 0), (30, 45)), (15, 22): ((0, 0), (30, 44)), (3, 4): ((0, 2), (30, 42))}
    assert all(centred(grid, (30, 45)) == box for grid, box in boxes.items())
    assert centred((30, 30), (30, 45)) == ((0, 8), (30, 38))
    network = transformer()
    own = rotary_table(network, 3, 4, 6, torch.device("cpu"))[0]
    network.rotary_base = (30, 45)
    assert own.shape == (3 * 2 * 3, 16)
    assert torch.equal(
        rotary_table(copy.deepcopy(network), 3, 4, 6, torch.device("cpu"))[0],
        rotary_table(transformer(sample_height=60, sample_width=90), 3, 4, 6, torch.device("cpu"))[0],
    )
    assert not torch.allclose(own, rotary_table(network, 3, 4, 6, torch.device("cpu"))[0])


def test_half_precision_weights_see_half_precision(seen):
    network = transformer().to(torch.bfloat16)
    assert FAMILY.call(network, *seen).output.dtype == torch.bfloat16
    assert Denoiser(network, small_teacher().schedule, FAMILY.call)(*seen).dtype == torch.float32


# --- The rest of a teacher ---


def test_the_noise_levels_are_the_schedulers(teacher):
    scheduler, schedule = teacher.scheduler, teacher.schedule
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod.float()) and schedule.alphas_cumprod[999] == 0
    x0, noise, t = *torch.randn(2, 3, *LATENTS, generator=rng()), torch.tensor([0, 459, 999])
    x_t, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t))
    torch.testing.assert_close(v, scheduler.get_velocity(x0, noise, t))
    torch.testing.assert_close(schedule.x0_from_v(x_t, v, t), scheduler.get_velocity(v, x_t, t))
    three = small_scheduler(snr_shift_scale=3.0)
    parts = {**teacher.components, "scheduler": three}
    assert torch.equal(CogVideoXTeacherPipeline(**parts).schedule.alphas_cumprod, three.alphas_cumprod.float())
    parts["scheduler"] = small_scheduler(prediction_type="epsilon")
    assert "prediction_type=epsilon" in refusal(CogVideoXTeacherPipeline(**parts).teacher)


def test_nine_frames_are_three_latents_and_nine_again(teacher):
    clips = video(2)
    latents = teacher.encode_frames(clips, rng())
    assert latents.shape == (2, *LATENTS) and latents.dtype == torch.float32
    assert torch.equal(latents, teacher.encode_frames(clips, rng()))
    still = teacher.encode_frames(clips, noise=torch.zeros(2, *LATENTS))
    mode = teacher.vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(still, 0.7 * mode, atol=1e-5, rtol=1e-5)
    assert torch.equal(still[:1], teacher.encode_frames(clips[:1], noise=torch.zeros(1, *LATENTS)))
    frames = teacher.decode_latents(latents)
    assert frames.shape == clips.shape and frames.min() >= 0 and frames.max() <= 1
    assert teacher.decode_latents(torch.randn(1, 16, 4, 4, 6)).shape[1] == 13  # the VAE's own surplus is gone


def test_channels_are_shifted_and_divided_where_the_vae_says_how(teacher):
    """Latents by hand, and the same frames out of them."""
    mean, std = [0.1 * c for c in range(16)], [0.5 + 0.1 * c for c in range(16)]
    spread = small_teacher(vae={"latents_mean": mean, "latents_std": std})
    assert spread.encoder_fingerprint() != teacher.encoder_fingerprint()
    center, width = (torch.tensor(x).view(-1, 1, 1, 1) for x in (mean, std))
    plain, latents = (each.encode_frames(video(2), rng()) for each in (teacher, spread))
    torch.testing.assert_close(latents, 0.7 * (plain / 0.7 - center) / width, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(spread.decode_latents(latents), teacher.decode_latents(plain), atol=1e-5, rtol=0)
    wrong = [
        {"latents_mean": mean},
        {"latents_mean": 0.1, "latents_std": 0.5},
        {"latents_mean": mean, "latents_std": "s" * 16},
    ]
    wrong += [{"latents_mean": [math.nan] * 16, "latents_std": std}, {"latents_mean": mean, "latents_std": [0.0] * 16}]
    for given in wrong:
        assert "do not fit its 16 channels" in refusal(lambda vae=given: small_teacher(vae=vae))


def test_statistics_of_channels_go_where_the_data_are():
    """Offload keeps the VAE's weights on the meta device between calls."""
    from accelerate import cpu_offload

    settings = {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    plain, away = small_vae(**settings), small_vae(**settings)
    cpu_offload(away, execution_device="cpu")
    mean, std = encode(away, video())
    assert away.device.type == "meta" and torch.equal(mean, encode(plain, video())[0])
    assert torch.equal(decode(away, mean), decode(plain, mean)) and std.device.type == "cpu"


@pytest.mark.parametrize("kind", ["renders", "first", "ends"])
@pytest.mark.parametrize("inverted", [False, True])
def test_image_conditions(kind, inverted):
    pipeline = small_teacher(vae={"invert_scale_latents": inverted}, image_condition=kind)
    clips, scale = video(2), 1 / 0.7 if inverted else 0.7
    condition = pipeline.condition(clips, rng())
    latents, text = condition["image_latents"], condition["text_tokens"]
    assert latents.shape == (2, *LATENTS) and torch.equal(text, pipeline.prompts.positive)
    if kind == "renders":
        torch.testing.assert_close(latents / scale, pipeline.encode_frames(clips, rng()) / 0.7)
        return
    generator = rng()  # draws for the first frame, then for the last
    for index in (0, -1) if kind == "ends" else (0,):
        alone = pipeline.encode_frames(clips[:, index, None], generator) / 0.7
        torch.testing.assert_close(latents[:, :, index, None], alone * scale)
    assert not latents[:, :, 1 : -1 if kind == "ends" else None].any()


def test_what_goes_into_latents_is_in_the_fingerprint(teacher):
    others = [small_teacher(vae={"scaling_factor": 1.1}), small_teacher(vae={"invert_scale_latents": True})]
    others += [small_teacher(image_condition="first"), small_teacher()]
    others[-1].prompts.positive[0, 0, 0] += 1
    prints = {pipeline.encoder_fingerprint() for pipeline in (teacher, *others)}
    assert len(prints) == 5 and small_teacher(steps=9).encoder_fingerprint() == teacher.encoder_fingerprint()


def test_the_teacher_samples_as_diffusers_own_pipeline():
    from diffusers import CogVideoXImageToVideoPipeline

    ours = small_teacher("learned", image_condition="first")
    parts = {name: ours.components[name] for name in ("vae", "transformer", "scheduler")}
    theirs = CogVideoXImageToVideoPipeline(tokenizer=None, text_encoder=None, **parts)
    theirs.set_progress_bar_config(disable=True)
    clip, noise = video(), torch.randn(1, *LATENTS, generator=rng(5))
    expected = theirs(
        image=clip[0, :1] * 2 - 1,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=4,
        guidance_scale=6.0,
        generator=rng(),
        latents=noise.transpose(1, 2),
        prompt_embeds=ours.prompts.positive,
        negative_prompt_embeds=ours.prompts.negative,
        output_type="latent",
    ).frames.transpose(1, 2)
    ours.set_progress_bar_config(disable=True)
    assert ours.teacher().nfe == 2
    got = ours(clip, rng(), num_inference_steps=4, latents=noise, output_type="latent").frames
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_folders(teacher, teacher_folder, tmp_path):
    folder = tmp_path / "model"
    save_model(small_teacher(rotary_base="30x45", image_condition="ends"), folder)
    loaded = load_pipeline(folder, CogVideoXTeacherPipeline)
    assert loaded.config.image_condition == "ends" and loaded.transformer.rotary_base == (30, 45)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "CogVideoXTransformer3DModel"]  # anybody's, not only ours
    assert family_of("CogVideoXTeacherPipeline") is family_of("CogVideoXStudentPipeline") is FAMILY
    student = FAMILY.student_of(loaded, transformer(), 2)
    assert student.config.steps == 2 and student.transformer.rotary_base == (30, 45)
    card = (folder / "README.md").read_text()
    assert "A cogvideox teacher" in card and "multiples of 16" in card
    from fvgen.pipelines import CogVideoXTeacherPipeline as named  # as the card says

    assert named is CogVideoXTeacherPipeline


# --- What is refused ---


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((10, 32, 48), "clips of 10 frames do not fit this model, whose VAE takes 8k+1; give 9 frames"),
        ((13, 32, 48), "give 17 frames"),
        ((5, 32, 48), "give 9 frames"),
        ((1, 32, 48), "give 9 frames"),
        ((9, 32, 40), "frames of 32x40 do not fit this model; use multiples of 16"),
    ],
)
def test_sizes_that_do_not_fit(teacher, teacher_folder, size, sentence):
    assert sentence in refusal(lambda: teacher.check_clip(*size))
    _, blueprint = teacher_blueprint(str(teacher_folder))
    assert sentence in refusal(lambda: blueprint.example(Size(1, *size)))
    frames = torch.zeros(1, size[0], 3, *size[1:])
    assert sentence in refusal(lambda: teacher(frames))


def test_learned_positions_allow_one_size():
    pipeline = small_teacher("learned")
    pipeline.check_clip(FRAMES, HEIGHT, WIDTH)
    for size in ((17, 32, 48), (9, 32, 64)):
        assert "whose positions were learned; give 9 frames of 32x48" in refusal(lambda s=size: pipeline.check_clip(*s))


def test_models_that_do_not_fit(teacher):
    def told(network=None, vae=None) -> str:
        parts = teacher.components | ({"transformer": network} if network else {}) | ({"vae": vae} if vae else {})
        return refusal(lambda: CogVideoXTeacherPipeline(**parts).check_clip(FRAMES, HEIGHT, WIDTH))

    assert "takes 16 channels" in told(transformer(in_channels=16))
    assert "CogVideoX 1.5" in told(transformer(patch_size_t=2))
    assert "does not squeeze time 4 times" in told(vae=small_vae(temporal_compression_ratio=8))


def test_options_that_have_no_effect(teacher):
    clip = video()
    assert "no text encoder" in refusal(lambda: teacher(clip, prompt="a house"))
    assert "no frame rate" in refusal(lambda: teacher(clip, fps=8))
    assert "cannot be guided by image" in refusal(lambda: teacher(clip, image_guidance_scale=2.0))
    assert "did you mean 'renders'" in refusal(lambda: small_teacher(image_condition="render"))
    assert "write, for example, 30x45" in refusal(lambda: small_teacher(rotary_base="30"))


# --- Both stages ---


def test_both_stages_leave_students(stage, teacher_folder, clip_folder, tmp_path):
    gan, dmd = stage("gan"), stage("dmd", init=str(tmp_path / "gan"), sample_every=2)
    for config in (gan, dmd):
        assert run(config) == Path(config.run.out) / "student" and len(read_metrics(config.run.out)) == 2
    assert (tmp_path / "dmd" / "samples" / "00000002.png").is_file()
    student = CogVideoXStudentPipeline.from_pretrained(tmp_path / "dmd" / "student")
    student.set_progress_bar_config(disable=True)
    frames = student(video(2), rng())
    assert frames.shape == (2, FRAMES, 3, HEIGHT, WIDTH) and frames.min() >= 0 and frames.max() <= 1
    base = load_pipeline(teacher_folder, CogVideoXTeacherPipeline)
    ours, theirs = student.transformer.state_dict(), base.transformer.state_dict()
    assert torch.equal(ours["patch_embed.pos_embedding"], theirs["patch_embed.pos_embedding"])
    assert not torch.equal(ours["proj_out.weight"], theirs["proj_out.weight"])
    for name in ("vae", "prompts"):
        ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (student, base))
        assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())
    assert student.scheduler.config == base.scheduler.config

    # The same from the newest checkpoint.
    export_checkpoint(tmp_path / "dmd", tmp_path / "exported")
    assert hashes(tmp_path / "exported" / "transformer") == hashes(tmp_path / "dmd" / "student" / "transformer")


@pytest.mark.parametrize("name", ["gan", "dmd"])
def test_a_stopped_run_goes_on_to_the_same_bytes(stage, tmp_path, name):
    whole, parts = stage(name, out=str(tmp_path / "whole")), stage(name, out=str(tmp_path / "parts"))
    run(whole)
    run(changed(parts, iterations=1))
    run(parts)
    files = ["metrics.jsonl", "student/transformer/diffusion_pytorch_model.safetensors"]
    files += ["head/diffusion_pytorch_model.safetensors"]
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "parts" / f).read_bytes() for f in files)


def test_adapters_on_one_backbone(stage, tmp_path):
    config = stage("dmd", share_backbone=True, student_lora=True, lora_rank=2, iterations=1)
    config = changed(config, checkpoint_activations=True, precision="bfloat16")
    trainer = Trainer(config)
    learning = sum(p.numel() for p in trainer.method.student.parameters())
    # For width 48 and rank 2: four layers 48 -> 48, two of the feed-forward net 48 <-> 192, in each block.
    assert learning == BLOCKS * 2 * (4 * (48 + 48) + 2 * (48 + 192))
    student = load_pipeline(trainer.train(), CogVideoXStudentPipeline)
    assert (tmp_path / "dmd" / "student_lora.safetensors").is_file()
    assert not [name for name in student.transformer.state_dict() if "lora" in name or "base_layer" in name]


def test_latents_are_kept_with_their_condition(teacher, clip_folder):
    batch = load_latents(ClipFolder(clip_folder), teacher).batch([0, 2])
    assert batch.latents.shape == batch.condition["image_latents"].shape == (2, *LATENTS)
    assert batch.condition["text_tokens"].shape == (1, TOKENS, TEXT)  # one row for all clips


def test_families_do_not_mix(stage, tmp_path):
    """Known from the two small JSON files: there are no weights here to be read."""
    first, teacher = tmp_path / "first", tmp_path / "teacher"
    for folder, kind in ((first / "student", "FVGenPipeline"), (teacher, "CogVideoXTeacherPipeline")):
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (first / "summary.json").write_text(json.dumps({"stage": "gan", "iterations": 1, "seconds": 1.0}))
    config = stage("dmd", init=str(first), teacher=str(teacher))
    sentence = refusal(lambda: Trainer(config))
    assert sentence.startswith(f"init={first} holds a student of the family viewcrafter, but teacher={teacher} is of")
    assert not Path(config.run.out).exists()


# --- Planning ---


@pytest.mark.parametrize(("name", "shared"), [("gan", False), ("dmd", True)])
def test_a_stage_can_be_planned(stage, teacher_folder, name, shared):
    family, blueprint = teacher_blueprint(str(teacher_folder))
    assert family is FAMILY and blueprint.guidance == 6.0
    assert torch.equal(blueprint.schedule().alphas_cumprod, small_scheduler().alphas_cumprod.float())
    config = stage(name, share_backbone=shared, student_lora=shared)
    profile = simulate(config, family, blueprint, Size(1, FRAMES, HEIGHT, WIDTH))
    whole = sum(p.numel() for p in transformer("learned").parameters())
    assert profile.parameters["teacher"] == whole and profile.flops > 0 and profile.peak()[0] > 0
    assert (profile.parameters["student"] == whole) != shared


@pytest.mark.parametrize(("name", "parameters"), [("cogvideox-5b-i2v", 5_570_479_680), ("cogvideox-2b", None)])
def test_published_models_need_no_weights(name, parameters):
    family, blueprint = teacher_blueprint(name)
    with torch.device("meta"):
        network = blueprint.network()
        latents, condition = blueprint.example(Size(1, 49, 480, 720))
    assert family is FAMILY and latents.shape == condition["image_latents"].shape == (1, 16, 13, 60, 90)
    assert parameters in (None, sum(p.numel() for p in network.parameters()))
    assert blueprint.schedule().alphas_cumprod[999] == 0
    assert FAMILY.default_tap(network) == ("blocks.20" if parameters else "blocks.14")


# --- What others have written down ---


def test_the_settings_file_fits_the_family():
    for name in ("gan", "dmd"):
        config = read_stage_config(name, CONFIG, ["out=unused"])
        assert config.name == name and config.memory.checkpoint_activations
    lines = [line.strip() for line in CONFIG.read_text().splitlines() if line.strip()]
    assert len([line for line in lines if line.startswith("#")]) > 20


@pytest.mark.parametrize(("name", "t"), [("leap_t459", 459), ("leap_t549", 549)])
def test_videoscenes_recorded_calls(shared, name, t):
    """Their pipeline refers all rotary positions to 30x45 patches, whatever the transformer's own size is."""
    folder = shared / "reference" / "videoscene"
    settings = json.loads((folder / f"{name}_config.json").read_text())
    network = CogVideoXTransformer3DModel(**settings["transformer"]).eval()
    network.load_state_dict(load_file(folder / f"{name}_transformer.safetensors"))
    io = load_file(folder / f"{name}_io.safetensors")
    network.rotary_base = (30, 45)
    latents = {key: io[key].transpose(1, 2) for key in ("x_t", "cond", "x0")}
    condition = Condition(image_latents=latents["cond"], text_tokens=io["prompt_embeds"])
    denoiser = Denoiser(network, noise_schedule(settings["scheduler"]), FAMILY.call)
    with torch.no_grad():
        x0 = denoiser(latents["x_t"], torch.tensor([t]), condition)
    torch.testing.assert_close(x0, latents["x0"], atol=1e-5, rtol=1e-5)
