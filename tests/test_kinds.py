"""DynamiCrafter and GenFusion beside ViewCrafter: which yaml is which, every key at published size, there and back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lvdm_files import CLIP, LAYOUTS, PUBLISHED, YAMLS, lvdm_settings, lvdm_state, write_yaml
from safetensors.torch import load_file
from torch import Tensor
from viewcrafter_reference import reference_folder

from fvgen.convert.command import convert, convert_back, expected_shapes
from fvgen.convert.components import COMPONENTS
from fvgen.convert.kinds import KINDS
from fvgen.convert.leftovers import LEFTOVERS
from fvgen.convert.lvdm_yaml import LvdmConfig, read_lvdm_config
from fvgen.errors import UserError
from fvgen.models.viewcrafter.encoders import PROMPT
from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline
from fvgen.pipelines.folders import save_model

OTHERS = [name for name in YAMLS if not name.startswith("ViewCrafter")]


def read(folder: Path, name: str, sizes: dict) -> LvdmConfig:
    return read_lvdm_config(write_yaml(folder / "it.yaml", lvdm_settings(name, sizes)), LAYOUTS.get(name))


# --- The published sizes ---


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Callable[[str], dict[str, tuple[int, ...]]]:
    """Name to shape of all that we expect in a published checkpoint; each model is built once, on the meta device."""
    known: dict[str, dict] = {}

    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        if name not in known:
            known[name] = expected_shapes(read(tmp_path_factory.mktemp("yaml"), name, PUBLISHED))
        return known[name]

    return shapes


def part_of(key: str) -> str:
    return next((name for name, row in COMPONENTS.items() if key.startswith(row.prefix)), "buffers")


@pytest.mark.parametrize("name", YAMLS)
def test_every_published_checkpoint_has_its_number_of_keys(published, name):
    shapes = published(name)
    older = name == "DynamiCrafter_256"  # 16 gates of the image branch, no scale_arr
    counts = {"unet": 1516, "vae": 248, "image_projector": 51, "image_encoder": 398, "text_encoder": 294, "buffers": 13}
    counts |= {"unet": 1532, "buffers": 12} if older else {}
    assert Counter(map(part_of, shapes)) == counts
    assert len(shapes) == (2535 if older else 2520)
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    # GenFusion's VAE has a fourth channel at both ends; the older model 16 scalars more and 1400 scales less.
    changes = {"GenFusion": 83_656_168 - 83_653_863, "DynamiCrafter_256": 16 - 1400}
    assert numbers == 2_609_129_005 + 13_400 + changes.get(name, 0)  # parameters, buffers


@pytest.mark.parametrize("name", YAMLS)
def test_names_and_shapes_are_viewcrafters_but_where_they_are_known_to_differ(published, shared, name):
    recorded = json.loads((reference_folder(shared) / "keys_inference_pvd_1024.json").read_text())
    expected = {key: tuple(shape) for key, (shape, _) in recorded.items()}
    shapes = published(name)
    if name == "DynamiCrafter_256":
        blocks = [f"input_blocks.{i}" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block"]
        blocks += [f"output_blocks.{i}" for i in range(3, 12)]
        gates = [f"model.diffusion_model.{block}.1.transformer_blocks.0.attn2.alpha" for block in blocks]
        expected = {key: shape for key, shape in expected.items() if key != "scale_arr"} | dict.fromkeys(gates, ())
    if name == "GenFusion":
        ours, theirs = ({k: s for k, s in one.items() if part_of(k) == "vae"} for one in (shapes, expected))
        assert len(ours.keys() & theirs.keys()) == 12  # both ends' convolutions and the two around the latents
        assert {key: ours[key] for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]} == {
            "first_stage_model.encoder.conv_in.weight": (128, 4, 3, 3),
            "first_stage_model.decoder.conv_out.weight": (4, 128, 3, 3),
            "first_stage_model.decoder.conv_out.bias": (4,),
        }
        assert ours["first_stage_model.decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
        shapes, expected = ({k: s for k, s in one.items() if part_of(k) != "vae"} for one in (shapes, expected))
    assert shapes == expected


# --- Which is which ---

# Name: layout, context, image_source, prompt; base_scale, zero_snr, prediction; default_fps; steps, spacing, guidance,
# guidance_rescale, keep_last_scale; channels of the VAE.
V, DC = ("renders", "text_image", "first_frame", PROMPT), ("first_frame", "text_image", "first_frame", "")
ENDS, GF = ("ends", "text_image", "first_frame", ""), ("renders_rgbd", "image", "reference", None)
SETTINGS = {
    "ViewCrafter_25": (V, (0.3, True, "v"), 10, (50, "trailing", 7.5, 0.7, False), 3),
    "ViewCrafter_25_512": (V, (0.7, True, "v"), 10, (50, "trailing", 7.5, 0.7, False), 3),
    "DynamiCrafter_512": (DC, (0.7, True, "v"), 24, (50, "trailing", 7.5, 0.7, True), 3),
    "DynamiCrafter_1024": (DC, (0.3, True, "v"), 10, (50, "trailing", 7.5, 0.7, True), 3),
    "DynamiCrafter_512_Interp": (ENDS, (0.7, True, "v"), 5, (50, "trailing", 7.5, 0.7, True), 3),
    "DynamiCrafter_512_Interp, training": (ENDS, (0.7, True, "v"), 5, (50, "trailing", 7.5, 0.7, True), 3),
    "DynamiCrafter_256": (DC, (None, False, "eps"), 3, (50, "uniform", 7.5, 0.0, True), 3),
    "GenFusion": (GF, (0.7, True, "v"), 30, (25, "uniform", 3.2, 0.7, True), 4),
}


@pytest.fixture(scope="module", params=OTHERS)
def converted(request, tmp_path_factory) -> tuple[str, dict[str, Tensor], Path]:
    """A small model of each kind: its name, its checkpoint's content, its folder."""
    name, place = request.param, tmp_path_factory.mktemp("kind")
    config = write_yaml(place / "inference.yaml", lvdm_settings(name))
    state = lvdm_state(config, layout=LAYOUTS.get(name))
    torch.save({"state_dict": state, "epoch": 59}, place / "model.ckpt")
    folder = convert(str(config), str(place / "model.ckpt"), place / "out", layout=LAYOUTS.get(name))
    return name, state, folder


def test_there_and_back_is_bit_identical(converted, tmp_path):
    name, state, folder = converted
    for given in (None, str(folder.parent / "inference.yaml")):
        back = load_file(convert_back(folder, tmp_path / f"{bool(given)}.safetensors", given))
        assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state), name


def test_the_folder_keeps_the_settings_of_its_kind(converted, tmp_path):
    name, state, folder = converted
    pipeline = ViewCrafterPipeline.from_pretrained(folder)
    found = pipeline.config
    sampling = (found.steps, found.spacing, found.guidance, found.guidance_rescale, found.keep_last_scale)
    assert (
        tuple(found.conditioning.values()),
        (found.base_scale, found.zero_snr, found.prediction),
        pipeline.unet.config.default_fps,
        sampling,
        pipeline.vae.config.in_channels,
    ) == SETTINGS[name]
    assert pipeline.vae.config.out_channels == pipeline.vae.config.in_channels
    assert torch.equal(pipeline.schedule.betas, state["betas"])
    assert pipeline.unet.config.image_cross_attention_scale_learnable == (name == "DynamiCrafter_256")
    save_model(FVGenPipeline.from_teacher(pipeline, pipeline.unet), tmp_path / "student")
    student = FVGenPipeline.from_pretrained(tmp_path / "student")
    assert student.conditioning == pipeline.conditioning and student.config.prediction == found.prediction
    vae = load_file(convert_back(tmp_path / "student", tmp_path / "vae.safetensors", only=["vae"]))
    assert vae.keys() == {key for key in state if key.startswith("first_stage_model.")}


@torch.no_grad()
def test_the_folder_makes_videos(converted):
    name, _, folder = converted
    pipeline = ViewCrafterPipeline.from_pretrained(folder)
    rules = pipeline.conditioning
    generator = torch.Generator().manual_seed(0)
    render = torch.rand(2, 3, rules.channels, 8, 12, generator=generator)
    options: dict[str, Any] = {"num_inference_steps": 2}
    if rules.image_source == "reference":
        options["reference"] = torch.rand(3, 10, 14, generator=generator)
    assert (pipeline.prompts is not None) == rules.has_text  # of other words: the small tower has not CLIP's vocabulary
    video = pipeline(render, **options)
    assert video.shape == render.shape and video.isfinite().all(), name
    unseen = render.clone()
    unseen[:, 1] = 0
    same = torch.equal(pipeline(unseen, **options), video)
    assert same == (rules.layout in ("first_frame", "ends"))


@pytest.mark.parametrize(("name", "stored"), [("ViewCrafter_25", 2), ("DynamiCrafter_512", 1), ("GenFusion", 0)])
def test_the_models_own_texts_are_encoded_where_the_tower_knows_them(tmp_path, name, stored):
    """ViewCrafter has a sentence and the empty text, DynamiCrafter the empty text twice, GenFusion none."""
    content = lvdm_settings(name)
    clip = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "vocab_size": 49408}}
    for section in ("cond_stage_config", "img_cond_stage_config"):
        content["model"]["params"][section]["params"]["model_cfg"] = clip
    config = write_yaml(tmp_path / "inference.yaml", content)
    torch.save({"state_dict": lvdm_state(config)}, tmp_path / "model.ckpt")
    pipeline = ViewCrafterPipeline.from_pretrained(convert(str(config), str(tmp_path / "model.ckpt"), tmp_path / "out"))
    texts = {} if pipeline.prompts is None else pipeline.prompts.state_dict()
    assert len({tuple(text.flatten().tolist()) for text in texts.values()}) == stored


def test_the_table_claims_every_yaml_of_its_classes():
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    for target in {kind.target for kind in KINDS}:  # the last row of a class takes what no mark claims
        assert [kind.mark is None for kind in KINDS if kind.target == target][-1]


# --- Refusals ---


def model(**changes: Any) -> Callable[[dict], None]:
    return lambda content: content["params"].update(changes)


def without(*keys: str) -> Callable[[dict], None]:
    def drop(content: dict) -> None:
        for key in keys:
            del content["params"][key]

    return drop


MIXTURES = [
    ("DynamiCrafter_512", model(turning_step=200), "model has turning_step=200, DynamiCrafter's is 400"),
    ("DynamiCrafter_512", model(parameterization="eps"), "rescale_betas_zero_snr=True, DynamiCrafter_256's is False"),
    ("DynamiCrafter_512", without("parameterization"), "rescale_betas_zero_snr=True, DynamiCrafter_256's is False"),
    ("DynamiCrafter_512", without("use_ema"), "model has no use_ema, which means True, DynamiCrafter's is False"),
    ("DynamiCrafter_512", without("rescale_betas_zero_snr"), "no rescale_betas_zero_snr, which means False"),
    ("DynamiCrafter_512", model(uncond_type="zero_embed"), "uncond_type='zero_embed'"),
    ("DynamiCrafter_512", without("conditioning_key"), "no conditioning_key, which means 'crossattn'"),
    ("DynamiCrafter_512", model(first_stage_depth_key="depth"), "first_stage_depth_key='depth'"),
    ("DynamiCrafter_512", without("base_scale"), "it lacks 'base_scale'"),
    ("DynamiCrafter_256", model(use_dynamic_rescale=True, base_scale=0.7), "use_dynamic_rescale=True, .*_256"),
    ("DynamiCrafter_256", model(interp_mode=True), "no parameterization, which means 'eps', .*Interp's is 'v'"),
    ("GenFusion", model(interp_mode=False), "interp_mode=False, GenFusion's is True"),
    ("ViewCrafter_25", model(interp_mode=True), "interp_mode=True, ViewCrafter's is False"),
    ("ViewCrafter_25", model(first_stage_depth_key="gt_depth"), "depth_key='gt_depth', ViewCrafter's is None"),
    ("ViewCrafter_25", without("parameterization"), "no parameterization, which means 'eps', ViewCrafter's is 'v'"),
]  # fmt: skip


def refused(folder: Path, content: dict, words: str, layout: str | None = None) -> None:
    """The yaml gives one sentence, and nothing is written."""
    config, checkpoint = write_yaml(folder / "bad.yaml", content), folder / "model.ckpt"
    torch.save({"state_dict": {}}, checkpoint)
    with pytest.raises(UserError, match=words) as error:
        convert(str(config), str(checkpoint), folder / "out", layout=layout)
    assert "\n" not in str(error.value) and {path.name for path in folder.iterdir()} == {"bad.yaml", "model.ckpt"}


@pytest.mark.parametrize(("name", "change", "words"), MIXTURES)
def test_mixtures_of_two_models_are_refused(tmp_path, name, change, words):
    content = lvdm_settings(name)
    change(content["model"])
    refused(tmp_path, content, words)


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("use_linear", False),
        ("temporal_conv", False),
        ("use_relative_position", True),
        ("addition_attention", False),
        ("image_cross_attention", False),
        ("fs_condition", False),
    ],
)
def test_an_absent_switch_of_the_unet_means_its_classs_default(tmp_path, key, default):
    content = lvdm_settings("GenFusion")
    del content["model"]["params"]["unet_config"]["params"][key]
    refused(tmp_path, content, f"unet_config has no {key}, which means {default}, GenFusion's is {not default}")


def test_absent_sizes_have_their_classs_defaults_or_are_missed(tmp_path):
    content = lvdm_settings("DynamiCrafter_512")
    unet = content["model"]["params"]["unet_config"]["params"]
    del unet["default_fs"], unet["dropout"]
    built = read_lvdm_config(write_yaml(tmp_path / "it.yaml", content)).build_empty("unet")
    assert built.config.default_fps == 4 and built.config.dropout == 0.0
    del unet["channel_mult"]
    refused_in = tmp_path / "refused"
    refused_in.mkdir()
    refused(refused_in, content, "it lacks 'channel_mult'")


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        ("ViewCrafter_25", "ends", "is of ViewCrafter, whose layout is renders and not ends; leave --layout out"),
        ("GenFusion", "ends", "is of GenFusion, whose layout is renders_rgbd"),
        ("DynamiCrafter_512_Interp, training", "first_frame", "is of DynamiCrafter_512_Interp, whose layout is ends"),
        ("DynamiCrafter_512", "renders", "is of DynamiCrafter, whose layout is first_frame and not renders"),
        ("DynamiCrafter_512", "end", "is of DynamiCrafter, whose layout is first_frame and not end"),
        ("DynamiCrafter_256", "ends", "no parameterization, which means 'eps', DynamiCrafter_512_Interp's is 'v'"),
    ],
)
def test_layouts_that_a_model_does_not_have_are_refused(tmp_path, name, layout, words):
    refused(tmp_path, lvdm_settings(name), words, layout)


@pytest.mark.parametrize(
    ("checkpoint", "config", "words"),
    [
        ("DynamiCrafter_256", "DynamiCrafter_512", r"DynamiCrafter's \(1 missing: scale_arr; \d+ unexpected: .*alpha"),
        (
            "DynamiCrafter_512",
            "DynamiCrafter_256",
            r"DynamiCrafter_256's \(\d+ missing: .*alpha.*unexpected: scale_arr",
        ),
        ("GenFusion", "DynamiCrafter_512", r"DynamiCrafter's \(\d+ missing: first_stage_model.*of another shape"),
        ("DynamiCrafter_512", "GenFusion", r"GenFusion's \(\d+ missing: first_stage_model.*of another shape"),
        ("DynamiCrafter_1024", "DynamiCrafter_512", r"another noise schedule than its yaml says \(scale_arr differs\)"),
        ("ViewCrafter_25", "DynamiCrafter_512", r"another noise schedule than its yaml says \(scale_arr differs\)"),
    ],
)
def test_a_checkpoint_of_another_kind_gives_one_sentence_and_no_folder(tmp_path, checkpoint, config, words):
    state = lvdm_state(write_yaml(tmp_path / "other.yaml", lvdm_settings(checkpoint)))
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    yaml = write_yaml(tmp_path / "this.yaml", lvdm_settings(config))
    with pytest.raises(UserError, match=words) as error:
        convert(str(yaml), str(tmp_path / "model.ckpt"), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt", "other.yaml", "this.yaml"}


def test_a_model_index_that_names_an_unknown_layout_is_refused(tmp_path, converted):
    folder = tmp_path / "changed"
    folder.mkdir()
    index = json.loads((converted[2] / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"conditioning": {"layout": "render"}}))
    (folder / LEFTOVERS).touch()
    with pytest.raises(UserError, match="there is no layout 'render' in conditioning; did you mean 'renders'"):
        convert_back(folder, tmp_path / "back.ckpt")
