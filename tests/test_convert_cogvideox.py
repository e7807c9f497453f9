"""Published folders of CogVideoX and VideoScene's weights over them: every way in which they can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checks import refusal
from safetensors.torch import load_file, save_file
from small_cogvideox import HEIGHT, TEXT, TOKENS, WIDTH, rng, small_scheduler, small_vae, transformer, video
from typer.testing import CliRunner

from fvgen.cli import app
from fvgen.convert.cogvideox import convert_cogvideox, read_prompt
from fvgen.models.cogvideox.pipelines import CogVideoXTeacherPipeline
from fvgen.models.cogvideox.videoscene import VideoScenePipeline
from fvgen.pipelines.folders import load_pipeline


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A folder of diffusers' layout. Shared: never change it."""
    folder = tmp_path_factory.mktemp("theirs") / "interpolation"
    transformer("learned").save_pretrained(folder / "transformer", max_shard_size="100KB")
    small_vae().save_pretrained(folder / "vae")
    small_scheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "CogVideoXImageToVideoPipeline", "_diffusers_version": "0.31.0"}
    index |= {
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    index |= {"scheduler": ["diffusers", "CogVideoXDPMScheduler"], "tokenizer": ["transformers", "T5Tokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "T5EncoderModel"]}))
    return folder


@pytest.fixture(scope="module")
def prompt(theirs) -> Path:
    file = theirs.parent / "prompt_embeds.pt"
    torch.save(torch.randn(1, TOKENS, TEXT, generator=rng(4)), file)
    return file


def other_weights() -> dict[str, torch.Tensor]:
    """Of another network of the same settings."""
    return {name: x.float() + 1 for name, x in transformer("learned").state_dict().items()}


@pytest.fixture
def weights(tmp_path):
    """Writes a checkpoint that is ``other_weights`` where a name is ``wanted``, and changed; returns the file."""

    def write(wanted=lambda name: True, drop: str = "", **more: torch.Tensor) -> Path:
        state = {name: x for name, x in other_weights().items() if wanted(name) and name != drop} | more
        save_file(state, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


ONE = "transformer_blocks.1.attn1.to_q.weight"


def test_a_folder_becomes_a_teacher(theirs, prompt, tmp_path):
    said = CliRunner().invoke(
        app, ["convert", "--checkpoint", str(theirs), "--prompts", str(prompt), "--out", str(tmp_path / "teacher")]
    )
    assert said.exit_code == 0, said.output
    teacher = load_pipeline(tmp_path / "teacher", CogVideoXTeacherPipeline)
    assert (teacher.config.image_condition, teacher.config.rotary_base) == ("ends", "30x45")
    assert torch.equal(teacher.prompts.positive, torch.load(prompt)) and teacher.teacher().nfe == 1
    expected = transformer("learned").state_dict()
    assert all(torch.equal(x, expected[name].float()) for name, x in teacher.transformer.state_dict().items())
    frames = teacher(video(), rng(), num_inference_steps=1)
    assert frames.shape == (1, 9, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("alone", [False, True])
def test_videoscenes_weights_go_over_their_base(theirs, prompt, weights, tmp_path, alone):
    file = weights((lambda name: ".attn1." in name) if alone else (lambda name: True))
    made = convert_cogvideox(file, tmp_path / "videoscene", theirs, prompt, None if alone else "demo")
    pipeline = load_pipeline(made, VideoScenePipeline)
    assert (pipeline.config.t, pipeline.config.image_noise) == (549 if alone else 459, True)
    before, after = transformer("learned").state_dict(), other_weights()
    for name, x in pipeline.transformer.state_dict().items():
        assert torch.equal(x, after[name] if not alone or ".attn1." in name else before[name].float())
    frames = pipeline(video(), rng())
    assert frames.shape == (1, 9, 3, HEIGHT, WIDTH) and frames.isfinite().all()


def test_a_teacher_of_fvgens_is_a_base_with_its_own_prompts(theirs, prompt, weights, tmp_path):
    teacher = convert_cogvideox(theirs, tmp_path / "teacher", prompts=prompt)
    made = convert_cogvideox(weights(), tmp_path / "videoscene", teacher)
    pipeline = load_pipeline(made, VideoScenePipeline)
    assert torch.equal(pipeline.prompts.positive, torch.load(prompt)) and pipeline.config.rotary_base == "30x45"


def test_attention_layers_need_their_base(weights, tmp_path):
    file = weights(lambda name: ".attn1." in name)
    assert "holds attention layers only, no whole transformer; add --base" in refusal(
        lambda: convert_cogvideox(file, tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wanted", "change", "told"),
    [
        (".attn1.", {"drop": ONE}, f"lacks '{ONE}'"),
        ("", {"drop": "proj_out.weight"}, "lacks 'proj_out.weight'"),
        ("", {"drop": ONE}, f"lacks '{ONE}'"),
        ("attn1", {"proj_out.bias": torch.zeros(64)}, "lacks "),  # attention and one more
        (".attn1.", {ONE: torch.zeros(3, 3)}, "is [3, 3], the model's is [48, 48]"),
        ("", {"surplus": torch.zeros(1)}, "holds 'surplus', which the model does not have"),
        ("", {ONE: torch.full((48, 48), torch.nan)}, "holds NaN"),
    ],
)
def test_other_weights_are_refused_by_name(theirs, prompt, weights, tmp_path, wanted, change, told):
    drop = change.get("drop", "")
    more = {name: x for name, x in change.items() if name != "drop"}
    file = weights(lambda name: wanted in name, drop, **more)
    assert told in refusal(lambda: convert_cogvideox(file, tmp_path / "out", theirs, prompt))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "file", "change", "told"),
    [
        ("scheduler", "scheduler_config.json", {"prediction_type": "epsilon"}, "says prediction_type=epsilon"),
        ("scheduler", "scheduler_config.json", {"rescale_betas_zero_snr": False}, "rescale_betas_zero_snr=False"),
        ("scheduler", "scheduler_config.json", {"snr_shift_scale": None}, "lack snr_shift_scale"),
        ("transformer", "config.json", {"in_channels": 16}, "takes 16 channels"),
        ("transformer", "config.json", {"num_layers": 3}, "lacks 'transformer_blocks.2."),
        ("", "model_index.json", {"_class_name": "StableDiffusionPipeline"}, "holds a 'StableDiffusionPipeline'"),
    ],
)
def test_folders_of_other_kinds(theirs, prompt, tmp_path, part, file, change, told):
    folder = Path(shutil.copytree(theirs, tmp_path / "changed"))
    settings = json.loads((folder / part / file).read_text()) | change
    (folder / part / file).write_text(
        json.dumps({key: x for key, x in settings.items() if x is not None or key == "patch_size_t"})
    )
    assert told in refusal(lambda: convert_cogvideox(folder, tmp_path / "out", prompts=prompt))
    assert not (tmp_path / "out").exists()


def test_prompts(theirs, tmp_path):
    assert "add --prompts FILE" in refusal(lambda: convert_cogvideox(theirs, tmp_path / "out"))
    file = tmp_path / "prompt.pt"
    for content, told in (
        (torch.zeros(1, 3, TEXT), "holds a prompt of [3, 32], the model takes [8, 32]"),
        (torch.zeros(2, TOKENS, TEXT), "holds 2 prompts"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "holds no encoded prompt"),
        (torch.zeros(1, TOKENS, TEXT, dtype=torch.long), "holds no encoded prompt"),
        (Path, "cannot be read as a prompt"),  # code
    ):
        torch.save(content, file)
        assert told in refusal(lambda: convert_cogvideox(theirs, tmp_path / "out", prompts=file))
    torch.save({"prompt_embeds": torch.ones(TOKENS, TEXT)}, file)
    assert torch.equal(read_prompt(file), torch.ones(1, TOKENS, TEXT))


def test_options_of_the_other_kind(theirs, weights, tmp_path):
    assert "--base goes with a file of weights" in refusal(lambda: convert_cogvideox(theirs, tmp_path / "o", theirs))
    assert "there is no preset 're10'" in refusal(
        lambda: convert_cogvideox(weights(), tmp_path / "o", theirs, preset="re10")
    )
    words = ["convert", "--checkpoint", str(theirs), "--out", str(tmp_path / "o"), "--layout", "ends"]
    assert load_file(weights()) and CliRunner().invoke(app, words).exit_code == 2
