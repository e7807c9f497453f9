"""Teacher and student as pipelines: what they see, how often they run, what they save; and the cache of latents."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from small_models import FRAMES, HEIGHT, LATENTS, STEPS, WIDTH, small_clips, small_teacher, student_of
from torch import Tensor

from fvgen.clips.folder import ClipFolder, save_clips
from fvgen.clips.latents import load_latents
from fvgen.errors import UserError
from fvgen.models.viewcrafter.encoders import CLIP_MEAN, CLIP_STD, FixedPrompts, clip_pixels
from fvgen.models.viewcrafter.pipelines import FVGenPipeline, NovelViewPipeline, ViewCrafterPipeline
from fvgen.pipelines.folders import check_device, load_head, load_pipeline, save_model
from fvgen.pipelines.presets import model_folder


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def render() -> Tensor:
    return torch.stack([clip.render for clip in small_clips(2)])


def count_calls(pipeline: NovelViewPipeline, call) -> list[int]:
    """The batch sizes of all UNet evaluations during ``call``."""
    sizes = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    try:
        call()
    finally:
        hook.remove()
    return sizes


# --- Sampling ---


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_student_takes_as_many_evaluations_as_steps(teacher, render, steps):
    student = student_of(teacher)
    videos = []
    sizes = count_calls(student, lambda: videos.append(student(render, rng(), num_inference_steps=steps)))
    assert sizes == [2] * steps
    assert videos[0].shape == render.shape and videos[0].min() >= 0 and videos[0].max() <= 1
    assert videos[0].std() > 0.01


def test_teacher_evaluates_twice_a_step_in_one_batch(teacher, render):
    assert count_calls(teacher, lambda: teacher(render, num_inference_steps=3)) == [4] * 3
    assert count_calls(teacher, lambda: teacher(render, num_inference_steps=3, guidance_scale=1.0)) == [2] * 3


def test_steps_and_guidance_default_to_the_models_own(teacher, render):
    assert len(count_calls(teacher, lambda: teacher(render[:1]))) == STEPS
    student = student_of(teacher, steps=2)
    assert len(count_calls(student, lambda: student(render[:1]))) == 2
    own = teacher(render[:1], rng(), num_inference_steps=2)
    assert torch.equal(own, teacher(render[:1], rng(), num_inference_steps=2, guidance_scale=teacher.config.guidance))
    assert not torch.allclose(own, teacher(render[:1], rng(), num_inference_steps=2, guidance_scale=1.0))


def test_one_seed_one_video(teacher, render):
    student = student_of(teacher)
    video = student(render, rng(5))
    assert torch.equal(video, student(render, rng(5)))
    assert not torch.allclose(video, student(render, rng(6)))
    assert torch.equal(student(render), student(render, rng(0)))


def test_every_step_is_told(teacher, render):
    told = []
    student_of(teacher)(render[:1], rng(), on_step=lambda step: told.append((step.index, step.count, step.timestep)))
    assert told == [(0, 4, 999), (1, 4, 749), (2, 4, 499), (3, 4, 249)]


BAD_RENDERS = {
    "render has shape (4, 3, 16, 24)": lambda x: x[0],
    "render has shape (2, 4, 1, 16, 24)": lambda x: x[:, :, :1],
    "frames of 15x24 do not fit this model; use multiples of 8": lambda x: x[..., :15, :],
    "frames of 16x20 do not fit": lambda x: x[..., :20],
    "NaN or infinity": lambda x: torch.where(x == x.max(), torch.nan, x),
    "lie in 0..255; scale them to 0..1": lambda x: (x / x.max() * 255).byte(),
    "lie in -": lambda x: x * 2 - 1,
}


@pytest.mark.parametrize("words", BAD_RENDERS)
def test_wrong_renders_give_one_sentence(teacher, render, words):
    wrong = BAD_RENDERS[words](render)
    for pipeline in (teacher, student_of(teacher)):
        with pytest.raises(UserError) as error:
            pipeline(wrong)
        assert words in str(error.value)


def test_no_steps_are_refused(teacher, render):
    for pipeline in (teacher, student_of(teacher)):
        with pytest.raises(UserError, match="ask for 1 to 1000 steps"):
            pipeline(render, num_inference_steps=0)


def test_sampling_leaves_the_network_as_trainable_as_it_was(render):
    pipeline = small_teacher()
    stays_frozen = next(pipeline.unet.parameters()).requires_grad_(False)

    def stopped(_: object) -> None:
        assert not any(parameter.requires_grad for parameter in pipeline.unet.parameters())
        raise KeyboardInterrupt

    pipeline(render, rng(), 1)
    with pytest.raises(KeyboardInterrupt):
        pipeline(render, rng(), 1, on_step=stopped)
    (still_frozen,) = (p for p in pipeline.unet.parameters() if not p.requires_grad)
    assert still_frozen is stays_frozen


# --- Encoding, decoding, conditions ---


def test_latents_are_scaled_samples_of_the_posterior(teacher, render):
    latents = teacher.encode_frames(render, rng(1))
    assert latents.shape == (2, *LATENTS) and latents.is_contiguous()
    with torch.no_grad():
        posterior = teacher.vae.encode(render.flatten(0, 1) * 2 - 1).latent_dist
    expected = posterior.sample(rng(1)) * teacher.vae.config.scaling_factor
    torch.testing.assert_close(latents.transpose(1, 2).flatten(0, 1), expected)
    assert not torch.allclose(latents, teacher.encode_frames(render, rng(2)))


def test_decoding_undoes_the_scale_and_clamps(teacher):
    latents = 3 * torch.randn(2, *LATENTS, generator=rng())
    frames = teacher.decode_latents(latents)
    assert frames.shape == (2, FRAMES, 3, HEIGHT, WIDTH) and frames.min() >= 0 and frames.max() <= 1
    with torch.no_grad():
        one = teacher.vae.decode(latents[1, :, 2][None] / teacher.vae.config.scaling_factor).sample[0]
    torch.testing.assert_close(frames[1, 2], (one / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_context_is_the_prompt_then_the_first_frame(teacher, render):
    condition = teacher.condition(render, rng())
    assert condition["image_tokens"].shape == (2, 16 * FRAMES, teacher.unet.config.context_dim)
    assert torch.equal(condition["text_tokens"], teacher.prompts.positive)
    assert torch.equal(condition["render_latents"], teacher.encode_frames(render, rng()))
    others = render.clone()
    others[:, 1:] = 1 - others[:, 1:]
    assert torch.equal(teacher.condition(others, rng())["image_tokens"], condition["image_tokens"])
    first = render.clone()
    first[:, 0] = 1 - first[:, 0]
    assert (teacher.condition(first, rng())["image_tokens"] - condition["image_tokens"]).abs().max() > 1e-3


def test_the_null_condition_is_the_empty_prompt_and_a_grey_image(teacher, render):
    null, text_alone = teacher.nulls()
    assert torch.equal(null["text_tokens"], teacher.prompts.negative)
    assert text_alone.keys() == {"text_tokens"} and torch.equal(text_alone["text_tokens"], null["text_tokens"])
    grey = teacher.condition(torch.full_like(render[:1], 0.5), rng())["image_tokens"]
    torch.testing.assert_close(null["image_tokens"], grey)
    assert not torch.equal(teacher.prompts.negative, teacher.prompts.positive)


def test_clip_sees_its_own_statistics():
    size = 16
    for colour in (0.0, 0.3, 1.0):
        pixels = clip_pixels(torch.full((1, 3, 12, 20), colour * 2 - 1), size)
        expected = (colour - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        torch.testing.assert_close(pixels, expected[None, :, None, None].expand(1, 3, size, size))


def test_prompts_come_from_their_generator():
    first, again, other = (FixedPrompts.random(3, 8, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.positive, again.positive) and not torch.equal(first.positive, other.positive)
    assert not torch.equal(first.positive, first.negative) and first.positive.shape == (1, 3, 8)


@pytest.mark.parametrize("part", ["vae", "image_encoder", "image_projector", "prompts", "unet"])
def test_fingerprint_is_that_of_the_encoders(teacher, part):
    changed = copy.deepcopy(teacher)
    assert changed.encoder_fingerprint() == teacher.encoder_fingerprint()
    next(iter(getattr(changed, part).state_dict().values())).view(-1)[0] += 1e-3
    assert (changed.encoder_fingerprint() != teacher.encoder_fingerprint()) == (part != "unet")


# --- Folders ---


def settings(pipeline: NovelViewPipeline) -> dict:
    """All that was given to the constructor and is no network."""
    return {key: value for key, value in pipeline.config.items() if key[0] != "_" and key not in pipeline.components}


@pytest.mark.parametrize("kind", [ViewCrafterPipeline, FVGenPipeline])
def test_a_pipeline_survives_the_disk(teacher, render, tmp_path, kind):
    pipeline = teacher if kind is ViewCrafterPipeline else student_of(teacher, steps=2)
    save_model(pipeline, tmp_path / "model")
    for again in (kind.from_pretrained(tmp_path / "model"), load_pipeline(tmp_path / "model", kind)):
        assert settings(again) == settings(pipeline)
        assert not any(part.training for part in again.components.values() if isinstance(part, torch.nn.Module))
        for unet in (pipeline.unet, again.unet):
            unet.requires_grad_(False)  # for weights that need gradients torch has linear layers with other rounding
        assert torch.equal(again(render, rng()), pipeline(render, rng()))


def test_half_precision_on_disk_becomes_full_precision(tmp_path):
    half = small_teacher()
    for part in half.components.values():
        if isinstance(part, torch.nn.Module):
            part.half()
    save_model(half, tmp_path / "model")
    loaded = load_pipeline(tmp_path / "model", ViewCrafterPipeline)
    values = [value for part in loaded.components.values() for value in getattr(part, "state_dict", dict)().values()]
    assert len(values) > 100 and all(value.dtype == torch.float32 for value in values if value.is_floating_point())
    assert torch.equal(loaded.vae.encoder.conv_in.weight, half.vae.encoder.conv_in.weight.float())


def test_reading_and_writing_say_nothing(teacher, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        save_model(teacher, tmp_path / "model")
        load_pipeline(tmp_path / "model", ViewCrafterPipeline)
    assert capfd.readouterr() == ("", "")
    # ... and the libraries' own settings are as the user left them
    assert diffusers.utils.logging.is_progress_bar_enabled() and transformers.utils.logging.is_progress_bar_enabled()


def test_folders_that_are_no_model(teacher_folder, tmp_path):
    with pytest.raises(UserError, match="is no model folder"):
        model_folder(tmp_path)
    with pytest.raises(UserError, match="holds a ViewCrafterPipeline, but a FVGenPipeline is needed"):
        load_pipeline(teacher_folder, FVGenPipeline)
    for text in ("{", "[]", "{}"):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(UserError, match=r"model_index\.json is damaged"):
            load_pipeline(tmp_path, FVGenPipeline)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "unet/diffusion_pytorch_model.safetensors": (cut, Path.unlink),
    "vae/config.json": (cut, Path.unlink),
    "image_encoder/model.safetensors": (cut, Path.unlink),
    "prompts/diffusion_pytorch_model.safetensors": (lambda path: path.write_bytes(b""), Path.unlink),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_give_one_sentence(teacher_folder, tmp_path, name):
    for damage in DAMAGE[name]:
        shutil.copytree(teacher_folder, tmp_path / "model", dirs_exist_ok=True)
        damage(tmp_path / "model" / name)
        with pytest.raises(UserError, match="is damaged or incomplete") as error:
            load_pipeline(tmp_path / "model", ViewCrafterPipeline)
        assert "\n" not in str(error.value)


def test_a_damaged_head_gives_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is damaged or incomplete"):
        load_head(tmp_path)


def test_devices_that_are_not_there():
    check_device("cpu")
    for name in ("cuda:99", "gpu", "meta"):
        with pytest.raises(UserError, match=f"device '{name}' cannot be used here") as error:
            check_device(name)
        assert "\n" not in str(error.value)


# --- Latents of clips ---


@pytest.fixture
def clips(tmp_path) -> ClipFolder:
    return save_clips(tmp_path / "clips", small_clips(3), {})


def caches(clips: ClipFolder) -> list[Path]:
    return sorted(clips.path.glob("encoded-*"))


def test_latents_are_encoded_once(teacher, clips):
    first = load_latents(clips, teacher)
    (file,) = caches(clips)
    written = file.stat().st_mtime_ns
    encoded = []
    hook = teacher.vae.encoder.register_forward_hook(lambda *_: encoded.append(1))
    again = load_latents(clips, teacher)
    hook.remove()
    assert not encoded and file.stat().st_mtime_ns == written
    assert all(torch.equal(first.tensors[key], again.tensors[key]) for key in first.tensors)
    assert len(again) == 3 and again.names == clips.names


def test_latents_are_those_of_the_pipeline(teacher, clips):
    generator = rng(7)
    expected = []
    for index in range(3):
        truth = teacher.encode_frames(clips[index].truth[None], generator)
        expected.append((truth, teacher.condition(clips[index].render[None], generator)))
    latents = load_latents(clips, teacher, seed=7)
    batch = latents.batch([2, 0])
    assert torch.equal(batch.latents, torch.cat([expected[2][0], expected[0][0]]))
    assert torch.equal(batch.condition["render_latents"][1:], expected[0][1]["render_latents"])
    assert torch.equal(batch.condition["image_tokens"][:1], expected[2][1]["image_tokens"])


def test_another_seed_or_teacher_has_a_cache_of_its_own(teacher, clips):
    load_latents(clips, teacher)
    load_latents(clips, teacher, seed=1)
    other = copy.deepcopy(teacher)
    other.vae.encoder.conv_in.bias.data += 0.1
    load_latents(clips, other)
    student = student_of(teacher)  # the same encoders, and hence the same latents
    load_latents(clips, student)
    assert len(caches(clips)) == 3


def test_random_batches_follow_the_generator(teacher, clips):
    latents = load_latents(clips, teacher)
    first, again, other = (latents.random_batch(8, rng(seed)).latents for seed in (0, 0, 1))
    assert first.shape == (8, *LATENTS) and torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"")])
def test_a_damaged_cache_gives_one_sentence(teacher, clips, damage):
    load_latents(clips, teacher)
    damage(caches(clips)[0])
    with pytest.raises(UserError, match=r"the latent cache .* is damaged .*; delete it and run again") as error:
        load_latents(clips, teacher)
    assert "\n" not in str(error.value)


def test_a_cache_of_other_clips_gives_one_sentence(teacher, clips, tmp_path):
    load_latents(clips, teacher)
    fewer = save_clips(tmp_path / "fewer", small_clips(2), {})
    shutil.copy(caches(clips)[0], fewer.path)
    with pytest.raises(UserError, match="does not fit its clips; delete it and run again"):
        load_latents(fewer, teacher)


# --- The teacher that ships ---


def test_the_shipped_teacher_is_small_and_loads(shipped):
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) <= 20_000_000
    pipeline = load_pipeline("tiny", ViewCrafterPipeline)
    clip = torch.rand(1, 8, 3, 48, 64, generator=rng())
    assert pipeline(clip, num_inference_steps=1).shape == clip.shape


def test_the_shipped_teacher_is_loaded_by_its_name(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.snapshot_download", None)  # nobody asks the Hub
    monkeypatch.chdir(tmp_path)
    named, loaded = ViewCrafterPipeline.from_pretrained("tiny"), load_pipeline("tiny", ViewCrafterPipeline)
    for name, part in loaded.components.items():
        for key, tensor in getattr(part, "state_dict", dict)().items():
            found = named.components[name].state_dict()[key]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    half = ViewCrafterPipeline.from_pretrained("tiny", torch_dtype=torch.float16)
    assert {part.dtype for part in (half.unet, half.vae, half.image_encoder)} == {torch.float16}
    save_model(small_teacher(), tmp_path / "tiny")
    assert ViewCrafterPipeline.from_pretrained("tiny").frames == FRAMES  # a folder at hand comes first, as elsewhere


@pytest.mark.slow
def test_the_shipped_teacher_beats_the_render_by_three_decibels(shipped):
    from fvgen.clips.builtin import builtin_clips
    from fvgen.reports.evaluate import evaluate, score, score_renders, teacher_contestant

    folder = builtin_clips("test", 16)
    clips = [folder[index] for index in range(6)]
    pipeline = load_pipeline("tiny", ViewCrafterPipeline)
    results = evaluate({"teacher": teacher_contestant(pipeline)}, clips, pipeline, seed=0)
    assert score(results["teacher"], clips)["psnr"] > score_renders(clips)["psnr"] + 3
