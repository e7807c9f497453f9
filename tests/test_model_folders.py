"""Model folders that lie: other people's classes and code, weights that are missing or no numbers, absurd settings."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import refusal
from safetensors.torch import load_file, save_file
from small_models import student_of

from fvgen.distill import run as distill
from fvgen.distill.trainer import Trainer
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.pipelines.strict import RANGES
from fvgen.shards.encoders import load_encoders

Damage = Callable[[Path], object]


def edit(name: str, **values: Any) -> Damage:
    """Change settings in a JSON file of a folder; None removes one."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))

    return change


def weights(part: str, change: Callable[[dict], object]) -> Damage:
    """Change a component's tensors."""

    def apply(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return apply


def pickled(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def pipe(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    os.mkfifo(file)


def first(tensors: dict) -> str:
    return next(key for key, tensor in tensors.items() if tensor.ndim)


def other_shape(tensors: dict) -> None:
    key = first(tensors)
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def poison(value: float) -> Callable[[dict], object]:
    return lambda tensors: tensors[first(tensors)].view(-1)[:1].fill_(value)


PARTS = ("unet", "vae", "image_encoder", "image_projector", "prompts")
CASES: dict[str, tuple[Damage, str]] = {
    "another module": (edit("model_index.json", unet=["code_of_mine", "Network"]), "code_of_mine.Network"),
    "another library's class": (edit("model_index.json", vae=["diffusers", "AutoencoderTiny"]), "may be loaded"),
    "a module of diffusers' pipelines": (edit("model_index.json", unet=["stable_diffusion", "X"]), "may be loaded"),
    "a class for a file": (edit("model_index.json", unet="unet.py"), "not a library and a class"),
    "a component more": (edit("model_index.json", scheduler=["os", "system"]), "has no 'scheduler'"),
    "a class that is a list": (edit("model_index.json", _class_name=["pipe.py", "P"]), "is damaged"),
    "custom pipelines": (edit("model_index.json", _x={"custom_pipelines": {"a": 1}}), "custom_pipelines"),
    "auto_map": (edit("unet/config.json", auto_map={"AutoModel": "code.Network"}), "auto_map"),
    "auto_map of CLIP": (edit("image_encoder/config.json", auto_map={"AutoModel": "me/repo--m.N"}), "auto_map"),
    "quantised": (edit("vae/config.json", quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
    "a kernel": (edit("image_encoder/config.json", _attn_implementation="someone/kernel"), "_attn_implementation"),
    "another class in a config": (edit("unet/config.json", _class_name="UNet2DModel"), "is of class 'UNet2DModel'"),
    "pickled weights": (pickled, "diffusion_pytorch_model.bin"),
    "a pipe": (pipe, "it is a pipe"),
    "a billion blocks": (edit("unet/config.json", num_res_blocks=10**9), "num_res_blocks is 1000000000"),
    "more digits than a float has": (edit("unet/config.json", num_res_blocks=10**400), "num_res_blocks is"),
    "a width as text": (edit("unet/config.json", context_dim="32"), "context_dim is '32', no number"),
    "an unknown setting": (edit("unet/config.json", num_res_block=1), "did you mean 'num_res_blocks'?"),
    "no channels": (edit("vae/config.json", block_out_channels=[]), "block_out_channels is [], empty"),
    "zero heads": (edit("image_encoder/config.json", num_attention_heads=0), "num_attention_heads is 0"),
    "a scale of zero": (edit("vae/config.json", scaling_factor=0), "scaling_factor is 0"),
    "a scale that is NaN": (edit("vae/config.json", scaling_factor=float("nan")), "no finite number"),
    "a base scale that is NaN": (edit("model_index.json", base_scale=float("nan")), "base_scale is nan"),
    "a base scale of null steps": (edit("model_index.json", steps=0), "steps is 0"),
    "an unknown spacing": (edit("model_index.json", spacing="leading"), "spacing is 'leading'"),
    "an object for guidance": (edit("model_index.json", guidance={}), "guidance is {}"),
    **{
        f"{part}: {name}": (weights(part, change), words)
        for part in PARTS
        for name, change, words in (
            ("a weight less", lambda tensors: tensors.pop(first(tensors)), "1 missing"),
            ("a weight more", lambda tensors: tensors.update(more=torch.zeros(1)), "unexpected"),
            ("NaN", poison(float("nan")), "holds NaN or infinite weights"),
            ("an infinity", poison(float("inf")), "holds NaN or infinite weights"),
            ("integers", lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].char()}), "type I8"),
            ("another shape", other_shape, "damaged"),
        )
    },
}  # fmt: skip


@pytest.fixture
def folder(teacher_folder, tmp_path, monkeypatch) -> Path:
    """A copy of the small teacher, in a folder from which modules could be imported, one among them."""
    (tmp_path / "code_of_mine.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(teacher_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("case", CASES)
def test_what_a_model_folder_must_not_say(folder, case):
    """... neither to `load_pipeline` nor to diffusers' own door, and nothing that it names is run."""
    damage, words = CASES[case]
    damage(folder)
    said = refusal(lambda: load_pipeline(folder, ViewCrafterPipeline))
    assert words in said and len(said) < 700, said
    if case != "a class that is a list":
        with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
            ViewCrafterPipeline.from_pretrained(folder)
        said = str(caught.value)
        assert words == "damaged" or words in said, said
    assert not Path("ran").exists()


def test_the_encoders_alone_are_as_strict(folder):
    """The network on the meta device is left out; a part without weights is not."""
    assert load_encoders(folder).unet.device.type == "meta"
    CASES["vae: a weight less"][0](folder)
    assert "1 missing" in refusal(lambda: load_encoders(folder))


def test_ranges_hold_the_published_models():
    """The table refuses nothing that is in use: what the libraries and ours take by default lies within it."""
    from fvgen.pipelines.strict import arguments_of, component_classes, judge_settings

    for kinds in component_classes(ViewCrafterPipeline).values():
        for kind in kinds.values():
            defaults, optional = arguments_of(kind)
            judge_settings(
                {key: value for key, value in defaults.items() if value is not None}, defaults, kind, optional
            )
    assert all(low < high for low, high in RANGES.values())


SETTINGS = {
    "vae/config.json": {"scaling_factor": 0.1, "norm_num_groups": 2, "shift_factor": 0.5},
    "image_encoder/config.json": {"num_attention_heads": 2, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "image_projector/config.json": {"heads": 8, "dim_head": 4},
}


def test_the_fingerprint_covers_settings_that_show_in_no_weight(teacher_folder, tmp_path):
    """All load, all make other latents or tokens of the same clips, so no cache may serve two of them."""
    cases = [{}, *({name: {key: value}} for name, values in SETTINGS.items() for key, value in values.items())]
    both = {"image_projector/config.json": SETTINGS["image_projector/config.json"]}  # one alone changes shapes
    cases = [case for case in cases if "image_projector/config.json" not in case] + [both]
    prints = set()
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(teacher_folder, folder)
        for name, values in case.items():
            edit(name, **values)(folder)
        prints.add(load_pipeline(folder, ViewCrafterPipeline).encoder_fingerprint())
    assert len(prints) == len(cases)


def test_a_student_that_is_no_number_is_never_written(teacher, tmp_path):
    student = student_of(teacher)
    with torch.no_grad():
        student.unet = copy.deepcopy(student.unet)
        next(student.unet.parameters()).fill_(float("nan"))
    assert "holds NaN" in refusal(lambda: save_model(student, tmp_path / "student"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("iterations", (1, 2))
def test_a_run_shorter_than_its_patience_does_not_end_in_a_student(stage, monkeypatch, iterations):
    """Every update was skipped: the student would be the teacher under another name."""
    config = stage(iterations=iterations, max_skips=10)
    monkeypatch.setattr(Trainer, "reduce", lambda self, rows: {"loss_student": math.nan})
    assert "training diverged" in refusal(lambda: distill(config))
    assert not (Path(config.run.out) / "student").exists() and not (Path(config.run.out) / "summary.json").exists()
