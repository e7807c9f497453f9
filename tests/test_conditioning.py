"""The image projector against ViewCrafter's recorded one."""

import json

import torch
from safetensors.torch import load_file
from viewcrafter_reference import reference_folder

from fvgen.convert.names import KEY_MAPS
from fvgen.models.viewcrafter.projector import ImageProjector

TINY = dict(
    dim=32, depth=2, dim_head=8, heads=3, num_queries=16, video_length=3, embedding_dim=40, output_dim=32, ff_mult=4
)


def recorded_projector(recorded) -> tuple[ImageProjector, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The projector, its weights in ViewCrafter's names, and its recorded input and output."""
    record = load_file(recorded / "image_projector.safetensors")
    weights = {k.removeprefix("weights."): v.float() for k, v in record.items() if k.startswith("weights.")}
    projector = ImageProjector(**TINY)
    projector.load_state_dict(KEY_MAPS["image_projector"].to_ours(weights))
    return projector, weights, record


@torch.no_grad()
def test_output_equals_the_recording(recorded):
    projector, _, record = recorded_projector(recorded)
    torch.testing.assert_close(projector(record["x"]), record["out"], rtol=0, atol=1e-5)


def test_weights_survive_the_way_there_and_back(recorded):
    projector, weights, _ = recorded_projector(recorded)
    back = KEY_MAPS["image_projector"].to_theirs(projector.state_dict())
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)


def test_published_architecture_has_every_key_and_shape_of_the_checkpoint(shared):
    keys = json.loads((reference_folder(shared) / "keys_inference_pvd_1024.json").read_text())
    prefix = "image_proj_model."
    theirs = {key.removeprefix(prefix): shape for key, (shape, _) in keys.items() if key.startswith(prefix)}
    with torch.device("meta"):
        projector = ImageProjector()
    assert {
        key: list(value.shape) for key, value in KEY_MAPS["image_projector"].to_theirs(projector.state_dict()).items()
    } == theirs
    assert sum(parameter.numel() for parameter in projector.parameters()) == 48_787_456


@torch.no_grad()
def test_any_number_of_tokens_gives_the_same_number_of_image_tokens(tmp_path):
    torch.manual_seed(0)
    projector = ImageProjector(**TINY)
    for tokens in (1, 257):
        assert projector(torch.randn(2, tokens, 40)).shape == (2, 48, 32)
    projector.save_pretrained(tmp_path)
    x = torch.randn(1, 5, 40)
    assert torch.equal(ImageProjector.from_pretrained(tmp_path)(x), projector(x))
