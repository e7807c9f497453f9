"""What users of diffusers expect of a pipeline: inputs, outputs, callbacks, memory, precision, decoders, the Hub."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderTiny
from PIL import Image
from small_models import (
    CONTEXT,
    FRAMES,
    HEIGHT,
    LATENTS,
    TEXT_TOKENS,
    WIDTH,
    small_clips,
    small_tokenizer,
    student_of,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fvgen.errors import UserError
from fvgen.models.viewcrafter import pipelines
from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline
from fvgen.pipelines import hub
from fvgen.pipelines.folders import save_model
from fvgen.pipelines.frames import as_frames


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def render() -> Tensor:
    return torch.stack([clip.render for clip in small_clips(2)])


@pytest.fixture(scope="module")
def student(teacher) -> FVGenPipeline:
    student = student_of(teacher, steps=2)
    student.set_progress_bar_config(disable=True)
    return student


# --- Inputs and outputs ---


def test_output_types_hold_the_same_frames(student, render):
    plain = student(render, rng())
    pt = student(render, rng(), output_type="pt").frames
    array = student(render, rng(), output_type="np").frames
    images = student(render, rng(), output_type="pil").frames
    (in_tuple,) = student(render, rng(), return_dict=False)
    assert torch.equal(plain, pt) and torch.equal(plain, in_tuple)
    np.testing.assert_allclose(array, plain.movedim(2, -1).numpy(), atol=1e-6)
    assert len(images) == 2 and len(images[0]) == FRAMES and images[1][2].size == (WIDTH, HEIGHT)
    np.testing.assert_allclose(np.asarray(images[1][2]) / 255, array[1, 2], atol=0.5 / 255 + 1e-6)
    latents = student(render, rng(), output_type="latent").frames
    assert latents.shape == (2, *LATENTS) and torch.equal(student.decode_latents(latents), plain)


def test_renders_may_be_arrays_or_images(render):
    quantised = (render * 255).round() / 255
    array = (quantised * 255).round().byte().movedim(2, -1).numpy()
    images = [[Image.fromarray(frame) for frame in clip] for clip in array]
    for form in (quantised, array, images, quantised.movedim(2, -1).numpy()):
        torch.testing.assert_close(as_frames(form), quantised, rtol=0, atol=1e-6)
    for form in (array[0], images[0]):
        torch.testing.assert_close(as_frames(form), quantised[:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [None, "clip.mp4", [], [1, 2], [[Image.new("RGB", (4, 4))], []]])
def test_other_renders_are_refused(student, wrong):
    with pytest.raises(UserError, match=r"a render cannot be a|differ in size") as error:
        student(wrong)
    assert "\n" not in str(error.value)


def test_photographs_replace_frames(student, render):
    photograph = torch.rand(3, HEIGHT, WIDTH, generator=rng(1))
    image = Image.fromarray((photograph * 255).round().byte().movedim(0, -1).numpy())
    filled = render.clone()
    filled[:, 0] = as_frames([image])[0, 0]
    filled[:, -1] = photograph
    expected = student(filled, rng())
    assert torch.equal(student(render, rng(), photographs={0: image, -1: photograph}), expected)
    with pytest.raises(UserError, match="no frame 4 for a photograph; the render has 4 frames"):
        student(render, photographs={FRAMES: photograph})
    with pytest.raises(UserError, match=r"photograph of frame 0 has shape \(3, 8, 8\)"):
        student(render, photographs={0: photograph[:, :8, :8]})


BAD_CALLS = {
    "latents have shape (2, 4, 4, 4, 4), this render needs (2, 4, 4, 4, 6)": lambda p, x: p(
        x, latents=torch.zeros(2, *LATENTS)[..., :4]
    ),
    "give at least one clip of at least one frame": lambda p, x: p(x[:, :0]),
    "output_type 'mp4' is unknown": lambda p, x: p(x, output_type="mp4"),
    "3 generators cannot draw": lambda p, x: p(x, [rng(), rng(), rng()]),
    "names 'prompt_embeds'; choose among latents, x0": lambda p, x: p(
        x, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    ),
    "prompt 'a chair' cannot be encoded; load the model with text_encoder and tokenizer": lambda p, x: p(
        x, prompt="a chair"
    ),
}


@pytest.mark.parametrize("words", BAD_CALLS)
def test_wrong_calls_give_one_sentence(teacher, student, render, words):
    for pipeline in (teacher, student):
        with pytest.raises(UserError) as error:
            BAD_CALLS[words](pipeline, render)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_mixed_devices_and_types_give_one_sentence(teacher, render):
    mixed = copy.deepcopy(teacher)
    mixed.unet.half()
    with pytest.raises(UserError, match=r"different types \(unet float16, image_encoder float32"):
        mixed(render)
    mixed.unet.float().conv_out.half()
    with pytest.raises(UserError, match="unet float16 and float32"):
        mixed(render)
    mixed.unet.float()
    mixed.vae.to("meta")
    with pytest.raises(UserError, match=r"different devices \(vae on meta, unet on cpu"):
        mixed(render)


# --- Sampling ---


def test_one_generator_per_clip_makes_clips_independent(teacher, render):
    for pipeline in (teacher, student_of(teacher)):
        both = pipeline(render, [rng(1), rng(2)], num_inference_steps=2)
        second = pipeline(render[1:], rng(2), num_inference_steps=2)
        torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-4)


def test_given_noise_without_eta_leaves_nothing_to_chance(teacher, render):
    noise = torch.randn(1, *LATENTS, generator=rng(3))
    condition = teacher.condition(render[:1], rng())
    a, b = (teacher.sample(condition, rng(seed), 3, eta=0.0, latents=noise) for seed in (1, 2))
    assert torch.equal(a, b)
    assert not torch.allclose(a, teacher.sample(condition, rng(1), 3, eta=1.0, latents=noise))


def test_a_teacher_made_before_gives_the_same_clip(teacher, render):
    condition = teacher.condition(render[:1], rng())
    made = teacher.teacher(3.0)
    assert torch.equal(
        teacher.sample(condition, rng(), 2, teacher=made), teacher.sample(condition, rng(), 2, guidance_scale=3.0)
    )
    with pytest.raises(UserError, match="has its own guidance"):
        teacher.sample(condition, rng(), 2, guidance_scale=3.0, teacher=made)


def test_three_way_guidance_evaluates_three_times(teacher, render):
    sizes = []
    hook = teacher.unet.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    video = teacher(render[:1], rng(), 2, image_guidance_scale=2.0)
    hook.remove()
    assert sizes == [3, 3]
    assert not torch.allclose(video, teacher(render[:1], rng(), 2))


def test_frame_rate_and_rescale_matter(teacher, render):
    default = teacher(render[:1], rng(), 2)
    assert torch.equal(default, teacher(render[:1], rng(), 2, fps=teacher.unet.config.default_fps))
    assert not torch.allclose(default, teacher(render[:1], rng(), 2, fps=30))
    assert not torch.allclose(default, teacher(render[:1], rng(), 2, guidance_rescale=0.0))


def test_callbacks_see_and_change_every_step(teacher, render):
    for pipeline in (teacher, student_of(teacher)):
        seen = []

        def look(pipe, index, timestep, tensors, seen=seen):
            seen.append((pipe, index, timestep, {name: x.shape for name, x in tensors.items()}))
            return tensors

        inputs = ["latents", "x0"]
        video = pipeline(render[:1], rng(), 2, callback_on_step_end=look, callback_on_step_end_tensor_inputs=inputs)
        shapes = dict.fromkeys(inputs, (1, *LATENTS))
        assert seen == [(pipeline, 0, 999, shapes), (pipeline, 1, 499, shapes)]
        assert torch.equal(video, pipeline(render[:1], rng(), 2))

        zero = pipeline(render[:1], rng(), 2, callback_on_step_end=lambda p, i, t, x: {"latents": 0 * x["latents"]})
        assert torch.equal(zero, pipeline.decode_latents(torch.zeros(1, *LATENTS)))


def test_the_progress_bar_counts_steps(teacher, render, capfd):
    student_of(teacher)(render[:1], num_inference_steps=3)
    assert "3/3" in capfd.readouterr().err
    quiet = student_of(teacher)
    quiet.set_progress_bar_config(disable=True)
    quiet(render[:1], num_inference_steps=3)
    assert not capfd.readouterr().err


# --- Prompts ---


@pytest.fixture(scope="module")
def talking(teacher, tmp_path_factory) -> ViewCrafterPipeline:
    """The teacher with a text tower and a tokenizer."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=CONTEXT,
        intermediate_size=CONTEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=8,
        bos_token_id=53,
        eos_token_id=54,
    )
    tokenizer = small_tokenizer(tmp_path_factory.mktemp("text") / "tokenizer")
    encoder = CLIPTextModelWithProjection(config).eval()
    return ViewCrafterPipeline(**{**teacher.components, "text_encoder": encoder, "tokenizer": tokenizer}, steps=2)


def test_prompts_take_the_place_of_the_fixed_one(talking, render):
    fixed, one, two = (talking.condition(render, rng(), prompt) for prompt in (None, "a b", ["a b", "c"]))
    text = one["text_tokens"]
    assert text.shape == fixed["text_tokens"].shape and not torch.allclose(text, fixed["text_tokens"])
    assert torch.equal(one["image_tokens"], fixed["image_tokens"])
    torch.testing.assert_close(two["text_tokens"][0], text[0])
    assert not torch.allclose(two["text_tokens"][1], text[0])
    with pytest.raises(UserError, match="3 prompts do not fit 2 clips"):
        talking(render, prompt=["a", "b", "c"])
    assert not torch.equal(talking(render, prompt="a", negative_prompt="b"), talking(render, prompt="a"))


def test_all_but_the_network_may_leave_the_gpu_while_training(talking):
    idle = {id(part) for part in talking.idle_parts()}
    parts = {name: part for name, part in talking.components.items() if isinstance(part, torch.nn.Module)}
    assert {name for name, part in parts.items() if id(part) in idle} == parts.keys() - {"unet"}
    assert "text_encoder" in parts


def test_text_tower_and_tokenizer_survive_the_disk(talking, render, tmp_path):
    save_model(talking, tmp_path / "model")
    again = ViewCrafterPipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(render, rng(), prompt="a b"), talking(render, rng(), prompt="a b"))
    student = FVGenPipeline.from_teacher(again, again.unet, steps=2)
    assert student.text_encoder is again.text_encoder and student.config.image_resize == again.config.image_resize


# --- Memory and precision ---


def test_frames_in_groups_give_the_same_video(student, render, monkeypatch):
    video = student(render, rng())
    monkeypatch.setattr(pipelines, "PIXELS_AT_ONCE", HEIGHT * WIDTH)
    sizes = []
    hook = student.vae.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    torch.testing.assert_close(student(render, rng()), video, rtol=0, atol=1e-4)
    hook.remove()
    assert sizes == [1] * (2 * FRAMES)


def test_vae_slicing_and_tiling(teacher, render):
    student = student_of(copy.deepcopy(teacher), steps=1)
    video = student(render, rng())
    student.enable_vae_slicing()
    torch.testing.assert_close(student(render, rng()), video, rtol=0, atol=1e-4)
    student.disable_vae_slicing()
    student.enable_vae_tiling()
    student.vae.tile_sample_min_size, student.vae.tile_latent_min_size = 16, 4
    tiled = student(render, rng())
    assert tiled.shape == video.shape and not torch.equal(tiled, video)
    student.disable_vae_tiling()
    assert torch.equal(student(render, rng()), video)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(teacher, render, dtype):
    full = teacher(render[:1], rng(), 2)
    half = copy.deepcopy(teacher).to(dtype)
    video = half(render[:1], rng(), 2)
    assert video.dtype == torch.float32 and (video - full).abs().mean() < 0.05
    half.vae.float()  # the VAE may stay in float32
    assert half(render[:1], rng(), 2).isfinite().all()


def test_offloading_runs_every_part_through_its_hook(talking, render):
    pipeline = copy.deepcopy(talking)
    expected = pipeline(render, rng(), prompt="a")
    pipeline.enable_model_cpu_offload(device="cpu")  # the same hooks as for an accelerator
    hooked = [name for name, part in pipeline.components.items() if hasattr(part, "_hf_hook")]
    assert set(hooked) == {"vae", "unet", "image_encoder", "image_projector", "text_encoder"}
    torch.testing.assert_close(pipeline(render, rng(), prompt="a"), expected)


# --- Fast decoding ---


def tiny_decoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    channels, blocks = (8, 8, 8), (1, 1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        latent_channels=4,
    )


def test_a_fast_decoder_learns_to_replace_the_vae(teacher, render, tmp_path):
    """Trained for a moment on what the VAE decodes, it comes closer to it than at the start, by half at least."""
    student = student_of(teacher, steps=1)
    decoder = tiny_decoder()
    latents = torch.randn(2, *LATENTS, generator=rng())
    target = student.decode_latents(latents)
    flat, goal = latents.transpose(1, 2).flatten(0, 1), target.flatten(0, 1) * 2 - 1
    optimiser = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(decoder.decode(flat).sample, goal)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    decoder.save_pretrained(tmp_path / "decoder")

    student.enable_fast_decoder(tmp_path / "decoder")
    fast = student.decode_latents(latents)
    assert F.mse_loss(fast, target).item() * 4 == pytest.approx(losses[-1], rel=0.2)
    save_model(student, tmp_path / "model")
    again = FVGenPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(again.decode_latents(latents), fast)
    student.disable_fast_decoder()
    assert torch.equal(student.decode_latents(latents), target)


def test_fast_decoders_that_do_not_fit_are_refused(teacher, tmp_path, monkeypatch):
    student = student_of(teacher)
    with pytest.raises(UserError, match="takes 4 channels and enlarges 8 times, the model's latents need 4 and 4"):
        student.enable_fast_decoder(AutoencoderTiny())
    with pytest.raises(UserError, match="is no folder; give the folder of an AutoencoderTiny, or one of taesd"):
        student.enable_fast_decoder("fastest")
    with pytest.raises(UserError, match="holds no usable AutoencoderTiny"):
        student.enable_fast_decoder(tmp_path)
    monkeypatch.delenv("FVGEN_DOWNLOAD", raising=False)
    with pytest.raises(
        UserError, match=r"huggingface\.co/madebyollin/taesd is not on this machine; set FVGEN_DOWNLOAD=1"
    ):
        student.enable_fast_decoder("taesd")


# --- The Hub ---


def test_pushing_uploads_the_whole_model_with_its_card(student, tmp_path, monkeypatch):
    sent = {}

    def upload(repo_id, folder_path, **options):
        sent.update({str(p.relative_to(folder_path)): p.stat().st_size for p in Path(folder_path).rglob("*")})
        return f"https://huggingface.co/{repo_id}/commit/0"

    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **options: type("Url", (), {"repo_id": f"me/{repo_id}"}))
    monkeypatch.setattr(hub, "upload_folder", upload)
    assert student.push_to_hub("student") == "https://huggingface.co/me/student/commit/0"
    assert {"README.md", "model_index.json", "unet", "vae", "prompts"} <= set(sent)
    assert sent["README.md"] > 1000
    student.save_pretrained(tmp_path / "student", push_to_hub=True)
    assert (tmp_path / "student" / "README.md").is_file()


def test_model_cards_say_what_is_known(teacher, student, tmp_path):
    for pipeline, words in ((teacher, "6 DDIM steps, guidance 7.5"), (student, "2 steps, one network evaluation each")):
        folder = tmp_path / type(pipeline).__name__
        save_model(pipeline, folder)
        text = (folder / "README.md").read_text()
        header = yaml.safe_load(text.split("---")[1])
        assert header["library_name"] == "diffusers" and ("distillation" in header["tags"]) == (pipeline is student)
        assert words in text and "multiples of 8" in text and type(pipeline).__name__ in text
        assert "{" not in text
    (folder / "README.md").write_text("mine")
    student.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_shipped_tiny_teacher_keeps_its_own_resize(shipped):
    """It was trained with another resize than ViewCrafter's."""
    assert ViewCrafterPipeline.load_config(shipped)["image_resize"] == "antialias"
