"""The seam to a user's own DUSt3R: weights, pairs, sizes, hand-over; and DUSt3R itself where FVGEN_DUST3R names it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scene_files import HEIGHT, WIDTH, write_images, write_nerfstudio
from torch import Tensor, nn

from fvgen.depth import dust3r, dust3r_model
from fvgen.depth.dust3r_model import Dust3r, parse_arguments, read_weights
from fvgen.depth.maps import point_maps
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.pointcloud import unproject
from fvgen.posing import sources
from fvgen.posing.reconstruct import pose_photographs
from fvgen.posing.sources import open_source
from fvgen.scenes.formats import read_scene
from fvgen.scenes.readers.photographs import read_photographs

PUBLISHED = (
    "AsymmetricCroCo3DStereo(pos_embed='RoPE100', patch_embed_cls='ManyAR_PatchEmbed', img_size=(512, 512), "
    "head_type='dpt', output_mode='pts3d', depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), "
    "enc_embed_dim=1024, enc_depth=24, enc_num_heads=16, dec_embed_dim=768, dec_depth=12, dec_num_heads=12)"
)
THREE_VIEWS = "align_viewcrafter_pco_3views_linear"


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    for name in ("FVGEN_DUST3R", "FVGEN_DUST3R_WEIGHTS", "FVGEN_DOWNLOAD"):
        monkeypatch.delenv(name, raising=False)


def recording(shared: Path, name: str) -> dict[str, Tensor]:
    with np.load(shared / "reference" / "dust3r" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


# --- Weights ---


def test_arguments_of_the_published_model(shared):
    parsed = parse_arguments(PUBLISHED)
    name = "statedict_DUSt3R_ViTLarge_BaseDecoder_512_dpt.json"
    recorded = json.loads((shared / "reference" / "dust3r" / name).read_text())["kwargs"]
    assert parsed == {key: dust3r_model._plain(value) for key, value in recorded.items()}
    assert parsed["depth_mode"] == ("exp", -float("inf"), float("inf"))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "AsymmetricCroCo3DStereo(img_size=__import__('os').getcwd())",
        "AsymmetricCroCo3DStereo(*[1])",
        "AsymmetricCroCo3DStereo(enc_depth=open)",
        "print",
        "AsymmetricCroCo3DStereo(",
    ],
)
def test_text_in_a_checkpoint_is_never_run(tmp_path, text):
    file = tmp_path / "dust3r.pth"
    torch.save({"args": argparse.Namespace(model=text), "model": {}}, file)
    with pytest.raises(UserError, match=r"dust3r\.pth holds no weights of DUSt3R .*; download them again"):
        read_weights(file)


def test_published_layouts(tmp_path):
    """The pickle that torch >= 2.6 refuses, and the Hub's folder, hold the same."""
    weight = torch.arange(6.0).reshape(2, 3)
    file = tmp_path / "model.pth"
    torch.save({"args": argparse.Namespace(model=PUBLISHED, lr=1e-4), "model": {"mask_token": weight}}, file)
    settings, state = read_weights(file)
    assert torch.equal(state["mask_token"], weight) and settings["img_size"] == (512, 512)
    written = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    written["depth_mode"], written["conf_mode"] = "('exp', -inf, inf)", ["exp", 1, float("inf")]
    (tmp_path / "config.json").write_text(json.dumps(written))
    save_file({"mask_token": weight}, tmp_path / "model.safetensors")
    assert read_weights(tmp_path)[0] == settings


class _Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_damaged_and_hostile_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": _Trap(), "model": {}}, "hostile.pth")
    with pytest.raises(UserError, match=r"hostile\.pth is damaged or not DUSt3R's"):
        read_weights(Path("hostile.pth"))
    assert not Path("trapped").exists()
    whole = Path("hostile.pth").read_bytes()
    for name, content in {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello"}.items():
        Path(f"{name}.pth").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.pth"):
            read_weights(Path(f"{name}.pth"))
    with pytest.raises(UserError, match="holds no weights"):
        read_weights(tmp_path)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    scene = read_scene(write_nerfstudio(tmp_path / "scene with spaces"))
    with pytest.raises(UserError, match="FVGEN_DUST3R names no checkout of naver/dust3r, and mini-dust3r is not"):
        point_maps(scene, [0, 1], 8, 8, "dust3r")
    monkeypatch.setenv("FVGEN_DUST3R", str(tmp_path))
    with pytest.raises(UserError, match="FVGEN_DUST3R_WEIGHTS names no weights"):
        point_maps(scene, [0, 1], 8, 8, "dust3r")
    monkeypatch.setenv("FVGEN_DUST3R_WEIGHTS", "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt")
    with pytest.raises(UserError, match="no checkout of naver/dust3r; correct the variable"):
        point_maps(scene, [0, 1], 8, 8, "dust3r")
    with pytest.raises(UserError, match="set FVGEN_DOWNLOAD=1 to allow its download"):
        dust3r_model._located("naver/no_such_weights_anywhere")
    with pytest.raises(UserError, match="names weights, which does not exist"):
        dust3r_model._located("weights")


# --- Pairs and sizes ---


def test_pairs_of_few_views_are_dust3rs_complete_graph(shared):
    assert dust3r.choose_pairs(2) == [(1, 0), (0, 1)]
    assert dust3r.choose_pairs(3) == [tuple(edge) for edge in recording(shared, THREE_VIEWS)["edges"].tolist()]


@pytest.mark.parametrize("views", [9, 30, 200])
def test_pairs_of_many_views_grow_in_step(views):
    pairs = dust3r.choose_pairs(views)
    assert len(set(pairs)) == len(pairs) <= 6 * views
    assert {(j, i) for i, j in pairs} == set(pairs) and all(i != j for i, j in pairs)
    reached = {0}
    for _ in range(views):
        reached |= {j for i, j in pairs if i in reached}
    assert reached == set(range(views))  # one world, not two


def test_sizes_are_dust3rs_where_it_cuts_nothing_off(shared):
    """Its loader cuts to whole patches; ours pads instead, so that a pixel's depth is never missing."""
    table = json.loads((shared / "reference" / "dust3r" / "load_images_sizes.json").read_text())["table"]
    for given, sizes in table.items():
        width, height = map(int, given.split("x"))
        ours = dust3r.working_size(height, width, 512)
        assert [side // 16 * 16 for side in reversed(ours)] == sizes["size512_square_ok"], given


def test_padding_repeats_the_border():
    images = torch.rand(1, 3, 21, 40, generator=torch.Generator().manual_seed(0))
    whole, (left, top) = dust3r.padded(images)
    assert whole.shape[-2:] == (32, 48) and (left, top) == (4, 5)
    assert torch.equal(whole[..., top : top + 21, left : left + 40], images)
    assert torch.equal(whole[..., 0, left : left + 40], images[..., 0, :])


# --- Hand-over, from recorded results ---


def played_back(recorded: dict[str, Tensor]) -> Dust3r:
    """DUSt3R's answers as they were recorded, whatever it is asked."""
    result = SimpleNamespace(
        im_conf=list(recorded["im_conf"]),
        compute_global_alignment=lambda **settings: None,
        get_depthmaps=lambda: list(recorded["depthmaps"]),
        get_pts3d=lambda: list(recorded["pts3d"]),
        get_im_poses=lambda: recorded["c2w"],
        get_intrinsics=lambda: recorded["intrinsics"],
    )
    return Dust3r(nn.Linear(1, 1), lambda *args, **settings: {}, lambda *args, **settings: result, "optimizer", 64)


def test_alignment_is_cleaned(shared):
    recorded = recording(shared, THREE_VIEWS)
    aligned = dust3r.align(played_back(recorded), recorded["images"].permute(0, 3, 1, 2))
    kept = aligned.depth > 0
    assert (kept != recorded["mask_cleaned_thr_log3"]).sum() <= 2
    assert torch.equal(aligned.depth[kept], recorded["depthmaps"][kept])


def test_photographs_become_a_scene_with_depth(shared, tmp_path, monkeypatch):
    """What is read back has DUSt3R's cameras, and its points to a 65,535th of the largest depth."""
    recorded = recording(shared, THREE_VIEWS)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(recorded["images"]):
        Image.fromarray((image * 255).round().byte().numpy()).save(tmp_path / "photos" / f"view {i}.png")
    monkeypatch.setattr(dust3r, "load_dust3r", lambda: played_back(recorded))
    scene, backend = pose_photographs(read_photographs(tmp_path / "photos"), tmp_path / "out", "dust3r")
    assert backend == "dust3r" and len(scene) == 3
    torch.testing.assert_close(scene.cameras.world_from_cam, recorded["c2w"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scene.cameras.intrinsics, recorded["intrinsics"], atol=1e-4, rtol=1e-6)
    maps = point_maps(scene, [0, 1, 2], 48, 64)
    assert maps.backend == "depth"
    kept = maps.depth > 0
    points, _ = unproject(maps.depth, torch.zeros(3, 3, 48, 64), scene.cameras, half_pixel_shift=True)
    torch.testing.assert_close(points, recorded["pts3d"][kept], atol=2e-4, rtol=1e-4)
    with pytest.raises(UserError, match="already there"):
        dust3r.reconstruct(read_photographs(tmp_path / "photos"), tmp_path / "out")


def test_photographs_as_a_source(shared, tmp_path, monkeypatch):
    """Asked for, DUSt3R poses them and its depth stays with the scene; the next time nothing is run."""
    recorded = recording(shared, THREE_VIEWS)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(recorded["images"]):
        Image.fromarray((image * 255).round().byte().numpy()).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dust3r, "load_dust3r", lambda: played_back(recorded))
    scene, found, left_out = open_source(tmp_path / "photos", "dust3r")
    assert not left_out
    assert found == "photographs/dust3r" and scene.name == "photos"
    torch.testing.assert_close(scene.cameras.world_from_cam, recorded["c2w"], atol=1e-6, rtol=1e-6)
    assert point_maps(scene, [1], 48, 64).backend == "depth"
    monkeypatch.setattr(dust3r, "load_dust3r", lambda: pytest.fail("posed a second time"))
    sources._posed.cache_clear()  # as another process would find it
    again = open_source(tmp_path / "photos", "dust3r").scene
    assert torch.equal(again.cameras.world_from_cam, scene.cameras.world_from_cam)


def test_one_photograph_is_its_own_neighbour(shared, tmp_path, monkeypatch):
    recorded = recording(shared, "align_viewcrafter_pco_2views_linear")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (128, 96)).save(tmp_path / "photos" / "one.png")
    monkeypatch.setattr(dust3r, "load_dust3r", lambda: played_back(recorded)._replace(side=128))  # the recording's size
    scene = dust3r.reconstruct(read_photographs(tmp_path / "photos"), tmp_path / "out")
    assert len(scene) == 1 and (scene.depth(0) > 0).all()  # two views or one: nothing is cleaned away


def test_ways_to_pose(tmp_path):
    write_images(tmp_path)
    photographs = read_photographs(tmp_path)
    assert (photographs.height, photographs.width) == (HEIGHT, WIDTH)
    with pytest.raises(UserError, match="did you mean 'colmap'"):
        pose_photographs(photographs, tmp_path / "out", "colmab")
    with pytest.raises(UserError, match=r"DUSt3R cannot run \(FVGEN_DUST3R names no checkout"):
        pose_photographs(photographs, tmp_path / "out", "dust3r")


# --- DUSt3R itself ---

CHECKOUT = os.environ.get("FVGEN_DUST3R", "")
real = pytest.mark.skipif(not CHECKOUT, reason="FVGEN_DUST3R names no checkout of naver/dust3r")


@pytest.fixture
def tiny(shared, tmp_path, monkeypatch):
    """The recorded toy network in the published file's layout, loaded by the user's DUSt3R."""
    folder = shared / "reference" / "dust3r"
    settings = json.loads((folder / "tiny_linear_config.json").read_text())["model_kwargs"]
    settings.pop("landscape_only")
    modes = {key: settings.pop(key) for key in ("depth_mode", "conf_mode")}
    settings |= {"img_size": tuple(settings["img_size"]), "patch_embed_cls": "ManyAR_PatchEmbed"}
    words = [f"{key}={value!r}" for key, value in settings.items()] + [f"{key}={value}" for key, value in modes.items()]
    text = f"AsymmetricCroCo3DStereo({', '.join(words)})"
    file = tmp_path / "tiny.pth"
    state = load_file(folder / "tiny_linear_weights.safetensors")
    torch.save({"args": argparse.Namespace(model=text), "model": state}, file)
    monkeypatch.setenv("FVGEN_DUST3R", CHECKOUT)
    monkeypatch.setenv("FVGEN_DUST3R_WEIGHTS", str(file))
    return dust3r_model.load_dust3r()


@real
@pytest.mark.slow
def test_the_network_says_what_was_recorded(shared, tiny):
    recorded = recording(shared, "tiny_linear_io")
    views = [
        {"img": recorded[f"img{k}"], "true_shape": np.int32([[48, 64]]), "idx": k, "instance": str(k)} for k in (0, 1)
    ]
    pairs = [(views[i], views[j]) for i, j in recorded["edges"].tolist()]
    output = tiny.inference(pairs, tiny.network, "cpu", batch_size=1, verbose=False)
    torch.testing.assert_close(output["pred1"]["pts3d"], recorded["pred1_pts3d"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output["pred2"]["conf"], recorded["pred2_conf"], rtol=1e-5, atol=1e-6)


@real
@pytest.mark.slow
def test_alignment_of_recorded_predictions(shared, tiny):
    """Its own optimiser through our call: with the true cameras given, depth is in their units."""
    recorded = recording(shared, THREE_VIEWS)
    edges = [tuple(edge) for edge in recorded["edges"].tolist()]

    def predictions(pairs, network, device, **settings):
        chosen = [(one["idx"], other["idx"]) for one, other in pairs]
        rows = [edges.index(pair) for pair in chosen]
        one, other = zip(*chosen, strict=True)
        return {
            "view1": {"idx": list(one), "img": torch.cat([pair[0]["img"] for pair in pairs])},
            "view2": {"idx": list(other), "img": torch.cat([pair[1]["img"] for pair in pairs])},
            "pred1": {"pts3d": recorded["pred1_pts3d"][rows], "conf": recorded["pred1_conf"][rows]},
            "pred2": {
                "pts3d_in_other_view": recorded["pred2_pts3d_in_other_view"][rows],
                "conf": recorded["pred2_conf"][rows],
            },
        }

    player = tiny._replace(inference=predictions)
    images = recorded["images"].permute(0, 3, 1, 2)
    free = dust3r.align(player, images)
    focal = recorded["gt_focal"].item()
    assert (free.cameras.intrinsics[:, 0, 0] / focal - 1).abs().max() < 0.01
    matrix = torch.tensor([[focal, 0, 32.5], [0, focal, 24.5], [0, 0, 1]]).expand(3, 3, 3)
    given = Cameras(recorded["gt_c2w"].float(), matrix, 48, 64)
    depth = dust3r.align(player, images, given).depth
    known = depth > 0
    assert known.float().mean() > 0.7
    assert (depth / recorded["gt_depth"] - 1).abs()[known].median() < 2e-3


@real
@pytest.mark.slow
def test_posed_and_unposed_photographs_go_through_dust3r(tiny, tmp_path):
    """A toy network knows nothing of depth: shapes, signs, and that its nonsense on one photograph is refused."""
    scene = read_scene(write_nerfstudio(tmp_path / "scene"))
    maps = point_maps(scene, [0, 3], 30, 50)
    assert maps.backend == "dust3r" and maps.depth.shape == (2, 30, 50) and (maps.depth > 0).all()
    assert point_maps(scene, [2], 30, 50, "dust3r").depth.shape == (1, 30, 50)
    (tmp_path / "one" / "images").mkdir(parents=True)
    (tmp_path / "scene" / "images" / "00.png").rename(tmp_path / "one" / "images" / "00.png")
    with pytest.raises(UserError, match="could not align the 2 photographs"):
        dust3r.reconstruct(read_photographs(tmp_path / "one"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
