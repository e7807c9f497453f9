"""`fvgen convert`: all forms of the checkpoint, there and back bit for bit, and everything that is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lvdm_files import CLIP, lvdm_settings, lvdm_state, write_yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import small_tokenizer, student_of
from torch import Tensor
from viewcrafter_reference import recording, reference_weights, settings, tiny_clip_weights

from fvgen.cli import main
from fvgen.convert.command import LEFTOVERS, convert, convert_back, newer_name
from fvgen.convert.components import COMPONENTS
from fvgen.convert.names import KEY_MAPS
from fvgen.convert.weights_file import CheckpointFile
from fvgen.errors import UserError
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.folders import save_model


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_yaml(tmp_path_factory.mktemp("lvdm") / "inference.yaml")


@pytest.fixture(scope="module")
def state(config) -> dict[str, Tensor]:
    return lvdm_state(config)


@pytest.fixture(scope="module")
def checkpoint(state, config) -> Path:
    torch.save({"state_dict": state, "epoch": 3, "global_step": 10}, config.parent / "model.ckpt")
    return config.parent / "model.ckpt"


@pytest.fixture(scope="module")
def folder(config, checkpoint) -> Path:
    return convert(str(config), str(checkpoint), config.parent / "converted")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def read(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


# --- There and back ---


def test_the_folder_is_a_pipeline(folder, state):
    pipeline = ViewCrafterPipeline.from_pretrained(folder)
    assert pipeline.config.base_scale == 0.3 and pipeline.config.image_resize == "viewcrafter"
    assert pipeline.vae.config.scaling_factor == 0.2 and pipeline.prompts is not None
    assert torch.equal(pipeline.unet.conv_out.weight, state["model.diffusion_model.out.2.weight"])
    assert (folder / "README.md").is_file() and not list(folder.rglob("*.bin"))


@torch.no_grad()
def test_the_folder_makes_videos(folder, tmp_path):
    pipeline = ViewCrafterPipeline.from_pretrained(folder, tokenizer=small_tokenizer(tmp_path / "tokenizer"))
    render = torch.rand(1, 2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    assert pipeline(render, num_inference_steps=1).isfinite().all()  # its own prompt, in the words that there are
    pipeline.prompts = None
    with pytest.raises(UserError, match="the model has no encoded prompt; give a prompt"):
        pipeline(render, num_inference_steps=1)
    a, b = (pipeline(render, num_inference_steps=2, prompt=p, negative_prompt="a") for p in ("b c", "d"))
    assert a.shape == render.shape and not torch.allclose(a, b)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_there_and_back_is_bit_identical(folder, state, config, tmp_path, suffix):
    out = convert_back(folder, tmp_path / f"back.{suffix}", str(config))
    assert equal(read(out) if suffix == "ckpt" else load_file(out), state)


@pytest.mark.parametrize("same_text", [True, False])
def test_half_precision_and_a_text_half_of_its_own(config, tmp_path, same_text):
    state = {key: value.half() if "." in key else value for key, value in lvdm_state(config, same_text).items()}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    folder = convert(str(config), str(tmp_path / "model.ckpt"), tmp_path / "out")
    assert equal(read(convert_back(folder, tmp_path / "back")), state)
    embedding = COMPONENTS["image_encoder"].prefix + "token_embedding.weight"
    assert (embedding in load_file(folder / LEFTOVERS)) != same_text


FORMS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "deepspeed.pth": lambda state, path: torch.save(
        {"module": {f"_forward_module.{k}": v for k, v in state.items()}}, path
    ),
    "plain.pt": lambda state, path: torch.save(state, path),
    "legacy.ckpt": lambda state, path: torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False),
    "whole.safetensors": lambda state, path: save_file(state, path),
    "older.ckpt": lambda state, path: torch.save(
        {"state_dict": {key.replace("fps_embedding", "framestride_embed"): x for key, x in state.items()}}, path
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_a_checkpoint_are_read(state, tmp_path, form):
    FORMS[form](state, tmp_path / form)
    file = CheckpointFile(tmp_path / form, newer_name)
    assert equal(file.tensors(), state)
    assert file.shapes == {key: tuple(value.shape) for key, value in state.items()}
    assert equal(file.tensors(lambda name: name == "betas"), {"betas": state["betas"]})


def test_only_some_components(config, state, tmp_path):
    unet = {key: value for key, value in state.items() if key.startswith(COMPONENTS["unet"].prefix)}
    torch.save({"state_dict": unet}, tmp_path / "unet.ckpt")
    out = convert(str(config), str(tmp_path / "unet.ckpt"), tmp_path / "out", ["unet"])
    assert {path.name for path in out.iterdir()} == {"unet", "model_index.json", LEFTOVERS}
    assert json.loads((out / "model_index.json").read_text())["vae"] == [None, None]
    assert ViewCrafterUNet.from_pretrained(out, subfolder="unet").config.model_channels == 32
    assert equal(read(convert_back(out, tmp_path / "back.ckpt", only=["unet"])), unet)


@pytest.mark.parametrize("part", ["image_encoder", "text_encoder", "vae", "image_projector"])
def test_one_component_back(folder, state, tmp_path, part):
    expected = {key: value for key, value in state.items() if key.startswith(COMPONENTS[part].prefix)}
    assert equal(read(convert_back(folder, tmp_path / "back.ckpt", only=[part])), expected)


def test_a_students_unet_goes_back(teacher, tmp_path):
    save_model(student_of(teacher), tmp_path / "student")
    back = read(convert_back(tmp_path / "student", tmp_path / "back.ckpt", only=["unet"]))
    unet = KEY_MAPS["unet"].to_ours({key.removeprefix(COMPONENTS["unet"].prefix): value for key, value in back.items()})
    assert equal(unet, teacher.unet.state_dict())


def test_recorded_weights_convert_as_they_are(shared, tmp_path):
    """The names are those that the original modules gave themselves."""
    content = lvdm_settings()
    params = content["model"]["params"]
    params["unet_config"]["params"] = settings(shared, "unet_tiny_config")["params"]
    params["first_stage_config"]["params"] = settings(shared, "vae_tiny_config")["params"]
    params["image_proj_stage_config"]["params"] = settings(shared, "resampler_tiny_config")["params"]
    clip = settings(shared, "clip_tiny_config")
    params["cond_stage_config"]["params"] = {"model_cfg": clip, "layer": "penultimate"}
    params["img_cond_stage_config"]["params"] = {"model_cfg": clip}
    config = write_yaml(tmp_path / "tiny.yaml", content)
    parts = {
        "unet": reference_weights(shared, "tiny"),
        "vae": recording(shared, "vae_tiny_weights"),
        "image_projector": recording(shared, "resampler_tiny_weights"),
        "image_encoder": tiny_clip_weights(shared, "image"),
        "text_encoder": tiny_clip_weights(shared, "text"),
    }
    state = {COMPONENTS[part].prefix + key: value for part, weights in parts.items() for key, value in weights.items()}
    schedule = recording(shared, "schedule")
    buffers = {key.removeprefix("buffer."): value for key, value in schedule.items() if key.startswith("buffer.")}
    state |= {**buffers, "scale_arr": schedule["scale_arr_1024"]}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "tiny.safetensors")
    folder = convert(str(config), str(tmp_path / "tiny.safetensors"), tmp_path / "out")
    assert equal(read(convert_back(folder, tmp_path / "back.ckpt")), state)


# --- Refusals ---


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploded",)


def broken(change: Callable[[dict], Any]) -> Callable[[dict, Path], None]:
    def write(state: dict, path: Path) -> None:
        state = dict(state)
        change(state)
        torch.save({"state_dict": state}, path)

    return write


def cut(state: dict, path: Path) -> None:
    torch.save({"state_dict": state}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_CHECKPOINTS = {
    r"is damaged or cut short \(it is cut short\)": cut,
    r"holds more than weights \(\w+.system\), and code in it is never run": lambda s, p: torch.save(
        {"state_dict": s, "bomb": Bomb()}, p
    ),
    r"more than weights \(posix.system\)": lambda s, p: p.write_bytes(pickle.dumps(Bomb(), protocol=2)),
    "is damaged or cut short": lambda s, p: p.write_bytes(b"nothing that torch wrote"),
    "cut short.*copy or download it again": lambda s, p: p.write_bytes(b""),
    "holds no state_dict of tensors": lambda s, p: torch.save([1, 2], p),
    "1 missing: scale_arr": broken(lambda s: s.pop("scale_arr")),
    r"1 missing: first_stage_model\.quant_conv\.bias": broken(lambda s: s.pop("first_stage_model.quant_conv.bias")),
    r"2 unexpected: model_ema\.decay, cond_stage_model\.x": broken(
        lambda s: s.update({"model_ema.decay": torch.ones(1), "cond_stage_model.x": torch.ones(1)})
    ),
    r"of another shape: cond_stage_model\.model\.logit_scale \[2\] instead of \[\]": broken(
        lambda s: s.update({"cond_stage_model.model.logit_scale": torch.ones(2)})
    ),
    "another noise schedule than its yaml says": broken(lambda s: s.update(betas=s["betas"].flip(0))),
}


@pytest.mark.parametrize("words", BAD_CHECKPOINTS)
def test_bad_checkpoints_give_one_sentence_and_no_folder(config, state, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bad.ckpt"
    BAD_CHECKPOINTS[words](state, file)
    with pytest.raises(UserError, match=words) as error:
        convert(str(config), str(file), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.ckpt"]


def test_a_safetensors_cut_short(config, state, tmp_path):
    file = tmp_path / "bad.safetensors"
    save_file(state, file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged or cut short"):
        convert(str(config), str(file), tmp_path / "out")


BAD_YAMLS = {
    r"its model is ldm.LatentDiffusion, not VIPLatentDiffusion": lambda m: m.update(target="ldm.LatentDiffusion"),
    r"its unet_config is a.UNet2D, not UNetModel": lambda m: m["params"]["unet_config"].update(target="a.UNet2D"),
    "use_causal_attention=True, ViewCrafter's is False": lambda m: m["params"]["unet_config"]["params"].update(
        use_causal_attention=True
    ),
    "model has parameterization='eps'": lambda m: m["params"].update(parameterization="eps"),
    "it lacks 'base_scale'": lambda m: m["params"].pop("base_scale"),
    "names the open_clip model ViT-g-14": lambda m: m["params"]["img_cond_stage_config"].update(
        params={"arch": "ViT-g-14"}
    ),
    "channel_mult .* must start at 1": lambda m: m["params"]["unet_config"]["params"].update(channel_mult=[2, 4]),
}


@pytest.mark.parametrize("words", BAD_YAMLS)
def test_yamls_of_other_models_give_one_sentence(checkpoint, tmp_path, words):
    content = lvdm_settings()
    BAD_YAMLS[words](content["model"])
    with pytest.raises(UserError, match=words) as error:
        convert(str(write_yaml(tmp_path / "bad.yaml", content)), str(checkpoint), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["model: [", "- 1", "", "!!python/object/apply:os.system ['touch exploded']", "\x00"])
def test_damaged_yamls_give_one_sentence(checkpoint, tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"the yaml .* is damaged") as error:
        convert(str(tmp_path / "bad.yaml"), str(checkpoint), tmp_path / "out")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_nothing_is_overwritten(config, checkpoint, folder, tmp_path):
    with pytest.raises(UserError, match="exists and is no empty folder"):
        convert(str(config), str(checkpoint), folder)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(UserError, match=r"model\.ckpt exists"):
        convert_back(folder, tmp_path)


def test_folders_that_cannot_go_back(folder, teacher_folder, tmp_path):
    with pytest.raises(UserError, match=r"cond_stage_config|image_encoder|does not fit|holds no"):
        convert_back(teacher_folder, tmp_path / "back.ckpt")
    assert not list(tmp_path.iterdir())
    content = lvdm_settings()
    content["model"]["params"]["unet_config"]["params"]["context_dim"] = 24
    with pytest.raises(UserError, match="unet does not fit its configuration"):
        convert_back(folder, tmp_path / "back.ckpt", str(write_yaml(tmp_path / "other.yaml", content)))


def test_what_is_missing_beside_the_networks_is_missing_in_the_checkpoint(folder, tmp_path):
    """Leftovers that lost a tensor, and leftovers that are gone: a checkpoint without those keys would load nowhere."""
    for lost in ("betas", next(key for key in load_file(folder / LEFTOVERS) if "." in key)):
        copy = tmp_path / lost
        shutil.copytree(folder, copy)
        kept = {key: value for key, value in load_file(copy / LEFTOVERS).items() if key != lost}
        with safe_open(folder / LEFTOVERS, framework="pt") as file:
            save_file(kept, copy / LEFTOVERS, metadata=file.metadata())
        with pytest.raises(UserError) as error:
            convert_back(copy, tmp_path / "back.ckpt")
        assert "\n" not in str(error.value) and LEFTOVERS in str(error.value), str(error.value)
        assert not (tmp_path / "back.ckpt").exists()


def test_unknown_components_are_refused(config, checkpoint, tmp_path):
    with pytest.raises(UserError, match="no component 'unets'; did you mean 'unet'"):
        convert(str(config), str(checkpoint), tmp_path / "out", ["unets"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.ckpt", "there is no file nowhere.ckpt"),
        ("https://example.org/model.ckpt", "set FVGEN_DOWNLOAD=1"),
        ("https://huggingface.co/nobody/nothing/resolve/main/model.ckpt", "set FVGEN_DOWNLOAD=1"),
        ("hf:nobody/nothing/model.ckpt", "set FVGEN_DOWNLOAD=1"),
        ("nobody/nothing/model.ckpt", "https://huggingface.co/nobody/nothing/model.ckpt is not on this machine"),
        ("https://huggingface.co/nobody/nothing", "no address of a file on the Hub"),
    ],
)
def test_nothing_is_downloaded_unasked(config, tmp_path, monkeypatch, name, words):
    monkeypatch.delenv("FVGEN_DOWNLOAD", raising=False)
    with pytest.raises(UserError, match=words):
        convert(str(config), name, tmp_path / "out")


def test_addresses_are_fetched_and_announced(config, checkpoint, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FVGEN_DOWNLOAD", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=checkpoint.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = server.stdout.readline().split(" port ")[1].split()[0]
        address = f"http://127.0.0.1:{port}/model.ckpt"
        out = convert(str(config), address, tmp_path / "out")
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert f"fvgen: downloading {address}\n" in capfd.readouterr().err
    assert (out / "unet" / "config.json").read_bytes() == (folder / "unet" / "config.json").read_bytes()


# --- The command ---


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fvgen", "convert", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_the_command_converts_there_and_back(config, checkpoint, state, tmp_path, monkeypatch, capsys):
    there = ["--config", str(config), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert run(monkeypatch, *there, "--only", "vae, unet") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    back = ["--checkpoint", str(tmp_path / "out"), "--out", str(tmp_path / "back.ckpt"), "--to-lvdm", "--only", "vae"]
    assert run(monkeypatch, *back) == 0
    expected = {key: value for key, value in state.items() if key.startswith(COMPONENTS["vae"].prefix)}
    assert equal(read(tmp_path / "back.ckpt"), expected)


def test_the_command_reports_mistakes(checkpoint, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err == "fvgen: converting a checkpoint needs its yaml; add --config\n"


# --- Memory ---

MEASURE = """
import resource, sys
from fvgen.convert import command as convert_checkpoint
from fvgen.models.viewcrafter import encoders
convert_checkpoint.read_lvdm_config(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint.convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_converting_needs_little_more_than_the_largest_component(tmp_path):
    content = lvdm_settings()
    content["model"]["params"]["unet_config"]["params"]["model_channels"] = 192
    content["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["ch"] = 256
    big = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "vocab_size": 2_000_000}}
    for name in ("cond_stage_config", "img_cond_stage_config"):
        content["model"]["params"][name]["params"]["model_cfg"] = big
    config = write_yaml(tmp_path / "big.yaml", content)
    state = lvdm_state(config, same_text=False)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    sizes = {
        part: sum(x.nbytes for k, x in state.items() if k.startswith(p.prefix)) / 2**20
        for part, p in COMPONENTS.items()
    }
    del state
    command = [sys.executable, "-c", MEASURE, str(config), str(tmp_path / "model.ckpt"), str(tmp_path / "out")]
    needed = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
    assert sum(sizes.values()) > 2 * max(sizes.values()) + 50
    assert needed < 2 * max(sizes.values()) + 50, (needed, sizes)
