"""Depth Pro at toy size with random weights, and the alignment that brings its depth to the scale of the poses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_files import FOCAL, HEIGHT, WIDTH, document, write_colmap, write_nerfstudio

from fvgen.depth import depth_pro, sparse
from fvgen.depth.maps import point_maps
from fvgen.errors import UserError
from fvgen.geometry.alignment import FEW, align_inverse_depth
from fvgen.geometry.cameras import project
from fvgen.scenes.formats import read_scene


@given(st.floats(0.01, 100), st.floats(-0.05, 0.5), st.integers(40, 200), st.floats(0, 0.15), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_scale_and_shift_are_found_among_wrong_points(scale, shift, count, wrong, seed):
    generator = torch.Generator().manual_seed(seed)
    inverse = torch.rand(count, generator=generator, dtype=torch.float64) * 2 + 0.2
    truth = scale * (inverse + shift)
    depth = 1 / truth
    spoiled = int(wrong * count)
    depth[:spoiled] *= 1 + torch.rand(spoiled, generator=generator, dtype=torch.float64)
    a, b = align_inverse_depth(inverse, depth)
    assert ((a * inverse + b) / truth - 1).abs().median() < 2e-2


def test_few_points_give_a_scale_only():
    inverse = torch.linspace(0.5, 2, FEW - 1)
    assert align_inverse_depth(inverse, 1 / (3 * inverse)) == (pytest.approx(3), 0.0)
    # A network that is wrong all over, near where it should be far: no negative scale.
    inverse = torch.linspace(0.5, 2, 40)
    scale, shift = align_inverse_depth(inverse, inverse)
    assert scale > 0 and shift == 0.0


def test_points_found_by_colmap_are_depth_maps(tmp_path):
    """Each point's depth stands at its pixel, the nearest where two meet, 0 elsewhere."""
    scene = read_scene(write_colmap(tmp_path))
    depth = point_maps(scene, [1], HEIGHT, WIDTH, "colmap").depth[0]
    pixels, true = project(scene.points[scene.seen_by(1)], scene.cameras[[1]])
    inside = ((pixels[0] >= 0) & (pixels[0] < torch.tensor([WIDTH, HEIGHT]))).all(-1)
    expected = torch.zeros(HEIGHT, WIDTH)
    for (x, y), value in sorted(
        zip(pixels[0][inside].tolist(), true[0][inside].tolist(), strict=True), key=lambda p: -p[1]
    ):
        expected[int(y), int(x)] = value
    assert (expected > 0).sum() >= 5
    torch.testing.assert_close(depth, expected)
    with pytest.raises(UserError, match=r"'colmap' \(the scene has no COLMAP points\)"):
        point_maps(replace(scene, points=None, observations=None), [1], HEIGHT, WIDTH, "colmap")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Depth Pro of 16 channels and 32-pixel patches, saved as the published one is."""
    from transformers import DepthProConfig, DepthProForDepthEstimation, DepthProImageProcessor, Dinov2Config

    encoder = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, mlp_ratio=2
    ).to_dict()
    config = DepthProConfig(
        fusion_hidden_size=16,
        patch_size=32,
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1],
        scaled_images_overlap_ratios=[0.0, 0.5],
        scaled_images_feature_dims=[8, 8],
        merge_padding_value=1,
        use_fov_model=False,
        image_model_config=encoder,
        patch_model_config=encoder,
        fov_model_config=encoder,
    )
    torch.manual_seed(0)
    network = DepthProForDepthEstimation(config)
    with torch.no_grad():
        network.head.layers[-2].bias.fill_(0.5)  # a random head may say 0, infinitely far, everywhere
    folder = tmp_path_factory.mktemp("depth pro")
    network.save_pretrained(folder)
    DepthProImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_known_focal_length_makes_metres(weights):
    """The processor's own formula, 1 / (prediction * width / focal), resized as it resizes."""
    network, processor = depth_pro._network(weights)
    image = read_image()
    inverse = depth_pro.metric_inverse_depth(network, processor, image, 30.0)
    with torch.no_grad():
        output = network(**processor(images=image, return_tensors="pt"))
    angle = torch.rad2deg(2 * torch.atan(torch.tensor(0.5 * image.shape[1] / 30.0)))
    output.field_of_view = angle[None]
    expected = processor.post_process_depth_estimation(output, target_sizes=[image.shape[:2]])[0]["predicted_depth"]
    assert inverse.shape == image.shape[:2] and inverse.std() > 0
    torch.testing.assert_close(1 / inverse, expected, rtol=1e-4, atol=1e-6)


def read_image():
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_depth_has_the_scale_of_the_poses(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("FVGEN_DEPTH_PRO", str(weights))
    scene = read_scene(write_colmap(tmp_path))
    assert scene.cameras.intrinsics[0, 0, 0] == FOCAL[0]
    maps = point_maps(scene, [0, 2], HEIGHT, WIDTH, "depth_pro")
    assert maps.depth.shape == (2, HEIGHT, WIDTH)
    pixels, true = sparse.anchors(scene, 2)
    x, y = pixels.floor().long().unbind(-1)
    assert 0.8 < (maps.depth[1][y, x] / true).median() < 1.25
    pose = scene.cameras.world_from_cam.clone()
    pose[:, :3, 3] *= 10
    large = replace(scene, cameras=replace(scene.cameras, world_from_cam=pose), points=scene.points * 10)
    again = point_maps(large, [0, 2], HEIGHT, WIDTH, "depth_pro").depth
    torch.testing.assert_close(again, 10 * maps.depth, rtol=1e-3, atol=0)


def test_what_depth_pro_lacks(weights, tmp_path, monkeypatch):
    scene = read_scene(write_colmap(tmp_path / "scene"))
    for name in ("FVGEN_DEPTH_PRO", "FVGEN_DOWNLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(depth_pro, "REPOSITORY", "fvgen/not-on-this-machine")
    with pytest.raises(UserError, match=r"weights of .* are not here: name their folder in FVGEN_DEPTH_PRO or set"):
        point_maps(scene, [0], HEIGHT, WIDTH, "depth_pro")
    monkeypatch.setenv("FVGEN_DEPTH_PRO", str(tmp_path / "no where"))
    with pytest.raises(UserError, match="no where, which is not a folder; correct or unset"):
        point_maps(scene, [0], HEIGHT, WIDTH, "depth_pro")
    monkeypatch.setenv("FVGEN_DEPTH_PRO", str(tmp_path))
    with pytest.raises(UserError, match="holds no usable Depth Pro"):
        point_maps(scene, [0], HEIGHT, WIDTH, "depth_pro")
    monkeypatch.setenv("FVGEN_DEPTH_PRO", str(weights))
    empty = replace(scene, observations=scene.observations[:0])
    with pytest.raises(UserError, match=r"02\.png has 0 points of known depth, too few"):
        point_maps(empty, [2], HEIGHT, WIDTH, "depth_pro")
    single = read_scene(write_nerfstudio(tmp_path / "one", document() | {"frames": document()["frames"][:1]}))
    with pytest.raises(UserError, match="does not tell the scale"):
        point_maps(single, [0], HEIGHT, WIDTH, "depth_pro")
