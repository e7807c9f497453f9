"""VAE and CLIP towers against ViewCrafter's recordings, and every key of the published checkpoint."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_tokenizer
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from viewcrafter_reference import recording, reference_folder, reference_unet, tiny_clip_weights
from viewcrafter_reference import settings as reference_settings

from fvgen.convert.components import COMPONENTS
from fvgen.convert.names import KEY_MAPS, rename, vae_key_map
from fvgen.convert.sizes import VIT_H_14, image_config, text_config, vae_config
from fvgen.errors import UserError
from fvgen.models.condition import Condition
from fvgen.models.viewcrafter.encoders import (
    EMPTY_IDS,
    PROMPT,
    PROMPT_IDS,
    clip_pixels,
    encode_tokens,
    padded_ids,
    resize_viewcrafter,
    token_ids,
)
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.models.viewcrafter.projector import ImageProjector
from fvgen.models.viewcrafter.unet import ViewCrafterUNet

TINY_VAE = vae_key_map(2)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def without_prefix(keys: dict, part: str) -> dict:
    prefix = COMPONENTS[part].prefix
    return {key.removeprefix(prefix): value for key, value in keys.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def keys(shared) -> dict[str, list[int]]:
    """Name to shape of all that is in the published checkpoint."""
    found = json.loads((reference_folder(shared) / "keys_inference_pvd_1024.json").read_text())
    return {key: shape for key, (shape, _) in found.items()}


@pytest.fixture(scope="module")
def vae(shared) -> AutoencoderKL:
    """The recorded VAE."""
    config = reference_settings(shared, "vae_tiny_config")
    vae = AutoencoderKL(**vae_config(config["params"], config["scale_factor"]))
    vae.load_state_dict(TINY_VAE.to_ours(recording(shared, "vae_tiny_weights")))
    return vae.eval()


# --- The published checkpoint ---

PUBLISHED = {
    "unet": (1_438_854_980, lambda: KEY_MAPS["unet"].to_theirs(ViewCrafterUNet().state_dict())),
    "image_projector": (48_787_456, lambda: KEY_MAPS["image_projector"].to_theirs(ImageProjector().state_dict())),
    "vae": (83_653_863, lambda: vae_key_map(4).to_theirs(AutoencoderKL(**PUBLISHED_VAE).state_dict())),
    "text_encoder": (354_032_641, lambda: KEY_MAPS["text_encoder"].to_theirs(published_text().state_dict())),
    "image_encoder": (683_800_065, lambda: KEY_MAPS["image_encoder"].to_theirs(published_image().state_dict())),
}
PUBLISHED_VAE = vae_config(
    {
        "ddconfig": {
            "ch": 128,
            "ch_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "in_channels": 3,
            "out_ch": 3,
            "z_channels": 4,
            "resolution": 256,
        }
    }
)


def published_text() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(**text_config(VIT_H_14)))


def published_image() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**image_config(VIT_H_14)))


@pytest.mark.parametrize("part", PUBLISHED)
def test_every_key_and_shape_of_the_published_checkpoint(keys, part):
    parameters, build = PUBLISHED[part]
    theirs = without_prefix(keys, part)
    with torch.device("meta"):
        ours = {key: list(value.shape) for key, value in build().items()}
    left = {key: shape for key, shape in theirs.items() if key not in ours}
    assert {key: theirs[key] for key in ours} == ours  # nothing of ours is missing or of another shape there
    only_text = {
        "positional_embedding",
        "text_projection",
        "token_embedding.weight",
        "ln_final.weight",
        "ln_final.bias",
    }
    expected = {"text_encoder": {"logit_scale"}, "image_encoder": {"logit_scale", *only_text}}
    assert set(left) == expected.get(part, set())
    assert sum(torch.Size(shape).numel() for shape in theirs.values()) == parameters


def test_all_2520_keys_belong_somewhere(keys):
    buffers = [key for key in keys if "." not in key]
    assert len(keys) == 2520 and len(buffers) == 13
    assert sum(len(without_prefix(keys, part)) for part in COMPONENTS) == 2520 - 13
    assert len(without_prefix(keys, "text_encoder")) == 294 and len(without_prefix(keys, "image_encoder")) == 398


# --- VAE ---


@torch.no_grad()
def test_vae_equals_the_recording(shared, vae):
    io = recording(shared, "vae_tiny_io")
    assert_near(vae.encoder(io["x"]), io["encoder_out"])
    posterior = vae.encode(io["x"]).latent_dist
    assert_near(posterior.mean, io["mean"])
    assert_near(posterior.logvar, io["logvar"])
    sample = posterior.mean + posterior.std * io["noise"]
    assert_near(sample, io["z_sample"])
    assert_near(sample * vae.config.scaling_factor, io["z_scaled"])
    assert_near(vae.decode(io["z_scaled"] / vae.config.scaling_factor).sample, io["decoded"])


def test_vae_weights_survive_the_way_there_and_back(shared, vae):
    theirs = recording(shared, "vae_tiny_weights")
    back = TINY_VAE.to_theirs(TINY_VAE.to_ours(theirs))
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)


# --- CLIP ---


@torch.no_grad()
def test_text_tower_equals_the_recording(shared):
    io, model = recording(shared, "clip_tiny_io"), reference_settings(shared, "clip_tiny_config")
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**text_config(model))).eval()
    encoder.load_state_dict(KEY_MAPS["text_encoder"].to_ours(tiny_clip_weights(shared, "text")))
    assert_near(encode_tokens(encoder, io["tokens"]), io["text_out"], 1e-5)
    last = encoder(io["tokens"]).last_hidden_state
    assert (last - io["text_out"]).abs().max() > 0.01  # not the last layer but the one before


@torch.no_grad()
def test_image_tower_equals_the_recording(shared):
    io, model = recording(shared, "clip_tiny_io"), reference_settings(shared, "clip_tiny_config")
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**image_config(model))).eval()
    encoder.load_state_dict(KEY_MAPS["image_encoder"].to_ours(tiny_clip_weights(shared, "image")))
    assert_near(encoder(clip_pixels(io["image"], 224)).last_hidden_state, io["image_tokens"])
    grey = clip_pixels(torch.zeros(1, 3, 224, 224), 224)
    assert_near(encoder(grey).last_hidden_state, io["zero_image_tokens"], 1e-5)


@pytest.mark.parametrize("part", ["text", "image"])
def test_clip_weights_survive_the_way_there_and_back(shared, part):
    theirs = tiny_clip_weights(shared, part)
    names = KEY_MAPS[f"{part}_encoder"]
    returned = names.to_theirs(names.to_ours(theirs))
    expected = {key: x for key, x in theirs.items() if key != "logit_scale" and (part == "text" or "visual." in key)}
    assert returned.keys() == expected.keys() and all(torch.equal(returned[key], expected[key]) for key in expected)


@pytest.mark.parametrize("index", [0, 1])
def test_preprocessing_equals_the_recording(shared, index):
    record = recording(shared, f"clip_preprocess{index}")
    assert_near(clip_pixels(record[f"in{index}"].float(), 224), record[f"out{index}"], 1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 60), st.integers(4, 60), st.integers(4, 24), st.floats(-1, 1))
def test_resizing_keeps_constant_images(height, width, size, value):
    image = torch.full((1, 2, height, width), value)
    torch.testing.assert_close(resize_viewcrafter(image, size), torch.full((1, 2, size, size), value))


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 40), st.integers(6, 40), st.integers(6, 24))
def test_resizing_commutes_with_mirroring(height, width, size):
    image = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(height * 41 + width))
    assert_near(resize_viewcrafter(image.flip(3), size), resize_viewcrafter(image, size).flip(3))


def test_an_unknown_resize_is_refused():
    with pytest.raises(UserError, match="image_resize 'nearest' is unknown; choose one of viewcrafter, antialias"):
        clip_pixels(torch.zeros(1, 3, 8, 8), 4, "nearest")


def test_fixed_prompts_have_the_recorded_ids(shared):
    ids = recording(shared, "clip_tiny_io")["real_prompt_tokens"]
    assert PROMPT == "Rotating view of a scene"
    assert torch.equal(padded_ids([PROMPT_IDS, EMPTY_IDS]), ids[:2].long())


def test_texts_are_cut_and_padded_with_zero(tmp_path):
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    start, end = 53, 54
    assert token_ids(tokenizer, ["a b", "", "a b c d e"], 5).tolist() == [
        [start, 1, 2, end, 0],
        [start, end, 0, 0, 0],
        [start, 1, 2, 3, end],
    ]


# --- Names ---


def test_the_older_name_of_the_frame_rate_is_understood():
    state = {"framestride_embed.0.weight": torch.ones(2), "fps_embedding.2.bias": torch.zeros(1)}
    assert set(KEY_MAPS["unet"].to_ours(state)) == {"fps_embedding.linear_1.weight", "fps_embedding.linear_2.bias"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["op", "a", "0", "00", "opa", "xa"]), min_size=1, max_size=5).map(".".join))
def test_rules_replace_whole_segments_only(key):
    renamed = rename(key, [("op", "down"), ("a.0", "b")])
    assert re.sub(r"(^|\.)a\.0(?=\.|$)", r"\1b", re.sub(r"(^|\.)op(?=\.|$)", r"\1down", key)) == renamed


# --- The whole pipeline ---


@torch.no_grad()
def test_whole_pipeline_equals_the_recorded_run(shared, vae):
    """Photographs to latents, tokens to context, sampling and decoding, all with the recorded weights."""
    inputs, run = recording(shared, "ddim_tiny_inputs"), recording(shared, "ddim_tiny_runA")
    params = reference_settings(shared, "resampler_tiny_config")["params"]
    projector = ImageProjector(**params).eval()
    projector.load_state_dict(KEY_MAPS["image_projector"].to_ours(recording(shared, "resampler_tiny_weights")))
    unet = reference_unet(shared, "tiny")
    pipeline = ViewCrafterPipeline(vae, unet, None, projector, base_scale=0.3)
    frames = inputs["video"].transpose(1, 2) / 2 + 0.5
    latents = pipeline.encode_frames(frames, noise=inputs["posterior_noise"])
    assert_near(latents, inputs["c_concat"])
    context = torch.cat([inputs["text"], projector(inputs["clip_tokens"])], dim=1)
    assert_near(context, inputs["context"])
    null = torch.cat([inputs["uncond_text"], projector(inputs["uncond_clip_tokens"])], dim=1)
    assert_near(null, inputs["uncond_context"])

    names = ("text_tokens", "image_tokens")
    tokens, empty = (
        dict(zip(names, x.tensor_split([unet.config.text_tokens], dim=1), strict=True)) for x in (context, null)
    )
    pipeline.nulls = lambda prompt: [empty]
    condition = Condition(render_latents=latents, fps=inputs["fs"], **tokens)
    steps = []
    sample = pipeline.sample(condition, None, 6, eta=0.0, latents=inputs["x_T"], on_step=lambda s: steps.append(s.x))
    for x, expected in zip(steps, run["x"][1:], strict=True):
        assert_near(x, expected, 1e-3)
    decoded = pipeline.decode_latents(sample) * 2 - 1
    assert_near(decoded.transpose(1, 2), run["decoded"].clamp(-1, 1), 1e-3)
