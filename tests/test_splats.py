"""Fitting Gaussians to views: closed forms, files, the command, and a fit of a built-in room."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fvgen.cli import app
from fvgen.clips.rooms import drawn_scene, render_scene
from fvgen.errors import UserError
from fvgen.geometry.conventions import to_opengl
from fvgen.geometry.gaussians import Gaussians, render_gaussians
from fvgen.geometry.pointcloud import unproject
from fvgen.scenes.formats import read_scene
from fvgen.splats import FitSettings, fit, read_splat, reconstruct, write_splat
from fvgen.splats.fitting import DEAD, Model, halved, seeds
from fvgen.splats.ply import NAMES
from fvgen.splats.reconstruct import scores
from fvgen.walks.dataset import save_png, write_ply


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(count: int = 50, seed: int = 0) -> Gaussians:
    g = rng(seed)
    turns = torch.nn.functional.normalize(torch.randn(count, 4, generator=g), dim=1)
    scales = torch.rand(count, 3, generator=g) + 0.01
    shades, opacities = torch.rand(count, 3, generator=g), torch.rand(count, generator=g) * 0.9 + 0.05
    return Gaussians(torch.randn(count, 3, generator=g), scales, turns, opacities, shades)


def room(views: int = 12):
    """(images, depth, cameras) of a built-in room."""
    scene, cameras, _ = drawn_scene("test", 0, 3, views, 48, 64)
    images, depth = render_scene(scene, cameras)
    return images, depth, cameras


# --- Parts ---


def test_two_halves_let_through_what_one_did():
    opacity = torch.tensor([0.01, 0.3, 0.9])
    half, shrunk = halved(opacity)
    torch.testing.assert_close((1 - half) ** 2, 1 - opacity)
    # What both draw along a line through them (Kheradmand et al., equation 8): the integral of
    # o1 g + o2 g (1 - o1 g) over the line, for Gaussians of the new width, is that of o g of the old.
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    for o, h, s in zip(opacity.double(), half.double(), shrunk.double(), strict=True):
        narrow = h * (-(x**2) / (2 * s**2)).exp()
        drawn = (narrow + narrow * (1 - narrow)).sum() / (o * (-(x**2) / 2).exp()).sum()
        assert drawn.item() == pytest.approx(1, abs=1e-5)


def test_seeds_are_as_large_as_the_way_to_their_neighbours():
    grid = torch.stack(torch.meshgrid(*[torch.arange(5.0)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    made = seeds(grid, torch.rand(125, 3, generator=rng()), 1000, rng())
    torch.testing.assert_close(made.scales, torch.ones(125, 3))
    assert len(seeds(grid, grid, 20, rng())) == 20
    assert len(seeds(grid[:1], grid[:1], 20, rng())) == 1


def test_the_dead_move_to_the_living_and_their_moments_go():
    start = cloud(20)
    start.opacities[:5] = DEAD / 2
    model = Model(start, FitSettings(growth=0.1, most=22))
    before = render_gaussians(model.gaussians(), room(1)[2])[0].detach()
    sum(x.square().sum() for x in model.values.values()).backward()
    for group in model.optimizer.param_groups:
        group["lr"] = 0.0
    model.optimizer.step()
    model.move(FitSettings(growth=0.1, most=22), rng())
    made = model.gaussians()
    assert len(made) == 22 and (made.opacities > DEAD).all()
    assert all(model.optimizer.state[x]["exp_avg"].shape == x.shape for x in model.values.values())
    alive = {tuple(row) for row in start.means[5:].tolist()}
    assert {tuple(row) for row in made.means.tolist()} <= alive
    after = render_gaussians(made, room(1)[2])[0]
    assert (after - before).abs().mean() < 0.05


# --- Files ---


def test_a_splat_is_read_back(tmp_path):
    written = cloud()
    write_splat(tmp_path / "scene.ply", written)
    found = read_splat(tmp_path / "scene.ply")
    for name in written.__dataclass_fields__:
        torch.testing.assert_close(getattr(found, name), getattr(written, name), rtol=1e-4, atol=1e-5)


def test_other_programs_read_it(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    written = cloud()
    write_splat(tmp_path / "scene.ply", written)
    vertex = plyfile.PlyData.read(tmp_path / "scene.ply")["vertex"]
    assert [p.name for p in vertex.properties] == list(NAMES)
    assert torch.allclose(torch.from_numpy(vertex["opacity"].copy()).sigmoid(), written.opacities, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no PLY file"),
        (b"ply\nformat ascii 1.0\nend_header\n", "not binary little-endian"),
        (
            b"ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\nend_header\n",
            "has no y; give",
        ),
        (b"ply\nformat binary_little_endian 1.0\nelement face 3\nend_header\n", "no vertices first"),
        (
            b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty list uchar int x\nend_header\n",
            "no plain",
        ),
    ],
)
def test_what_is_no_splat_is_told(tmp_path, content, told):
    (tmp_path / "x.ply").write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_splat(tmp_path / "x.ply")


def test_a_cut_splat_and_one_with_nan_are_told(tmp_path):
    write_splat(tmp_path / "scene.ply", cloud())
    data = (tmp_path / "scene.ply").read_bytes()
    (tmp_path / "cut.ply").write_bytes(data[:-1])
    (tmp_path / "nan.ply").write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    for name, told in (("cut", "cut short"), ("nan", "NaN"), ("none", "No such file")):
        with pytest.raises(UserError, match=told):
            read_splat(tmp_path / f"{name}.ply")


# --- The whole ---


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A room as a scene with depth-made points, one of its views said to be generated."""
    images, depth, cameras = room(6)
    folder = tmp_path_factory.mktemp("room")
    (folder / "images").mkdir()
    frames = []
    for view, pose in enumerate(to_opengl(cameras.world_from_cam.double()).tolist()):
        save_png(folder / "images" / f"{view}.png", images[view])
        frames.append({"file_path": f"images/{view}.png", "transform_matrix": pose, "generated": view == 2})
    points, colors = unproject(depth[::3], images[::3], cameras[::3])
    write_ply(folder / "points.ply", points[::4], colors[::4])
    lens = cameras.intrinsics[0].double()
    document = {"w": 64, "h": 48, "fl_x": lens[0, 0].item(), "fl_y": lens[1, 1].item(), "cx": 32.0, "cy": 24.0}
    document |= {"ply_file_path": "points.ply", "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(document))
    return folder


def test_the_command_leaves_scene_page_and_cameras(dataset, tmp_path):
    words = ["reconstruct", str(dataset), "--out", str(tmp_path / "out"), "--iterations", "30", "--gaussians", "500"]
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0, outcome.output
    facts = json.loads((tmp_path / "out" / "scene.json").read_text())
    assert [view["generated"] for view in facts["views"]] == [False, False, True, False, False, False]
    made = read_splat(tmp_path / "out" / "scene.ply")
    assert len(made) == facts["gaussians"] <= 500
    cameras = read_scene(dataset).cameras
    torch.testing.assert_close(torch.tensor(facts["views"][4]["world_from_cam"]), cameras.world_from_cam[4])
    page = (tmp_path / "out" / "scene.html").read_text()
    assert not re.findall(r"""(?:src|href)=|https?://|import\s""", page)
    again = CliRunner().invoke(app, words)  # its own files may be replaced
    assert again.exit_code == 0 and read_splat(tmp_path / "out" / "scene.ply").means.equal(made.means)


def test_what_cannot_be_reconstructed_is_one_sentence(dataset, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "scene.ply").write_text("mine")
    bare = tmp_path / "bare"
    shutil.copytree(dataset, bare)
    (bare / "points.ply").unlink()
    document = json.loads((bare / "transforms.json").read_text())
    del document["ply_file_path"]
    (bare / "transforms.json").write_text(json.dumps(document))
    for source, out, told in (
        (dataset, tmp_path / "theirs", "did not write"),
        (dataset, dataset / "inner", "inside the data set"),
        (dataset, dataset / "transforms.json", "is a file"),
        (bare, tmp_path / "x", "no points"),
    ):
        with pytest.raises(UserError, match=told):
            reconstruct(source, out, FitSettings(iterations=1))
    assert not (tmp_path / "x").exists() and (tmp_path / "theirs" / "scene.ply").read_text() == "mine"
    for wrong in ({"iterations": 0}, {"most": 0}, {"generated_weight": 0.0}):
        with pytest.raises(UserError, match="not possible"):
            FitSettings(**wrong)


def test_what_masks_hide_is_not_learnt():
    """Whatever the photographs show there, the Gaussians are the same; and they change where it is shown."""
    images, depth, cameras = room(3)
    points, colors = unproject(depth[:1], images[:1], cameras[[0]])
    masks = torch.ones(3, 48, 64, dtype=torch.bool)
    masks[1, 10:30, 20:50] = False
    other = torch.where(masks[:, None], images, 1 - images)
    settings, start = FitSettings(iterations=20, most=300), seeds(points, colors, 300, rng())
    one, two = (fit(shown, cameras, start, settings, masks=masks) for shown in (images, other))
    torch.testing.assert_close(one.colors, two.colors, rtol=0, atol=0)
    assert (fit(other, cameras, start, settings).colors - one.colors).abs().max() > 1e-3
    same = fit(images, cameras, start, settings, masks=torch.ones_like(masks))
    torch.testing.assert_close(same.colors, fit(images, cameras, start, settings).colors, rtol=0, atol=0)
    far = dataclasses.replace(one, colors=1 - one.colors)
    assert scores(far, images, cameras, torch.zeros_like(masks)) == pytest.approx([100] * 3)


def test_one_seed_is_one_scene(monkeypatch):
    monkeypatch.setattr("fvgen.splats.fitting.EVERY", 10)
    images, depth, cameras = room(3)
    points, colors = unproject(depth[:1], images[:1], cameras[:1])
    start = seeds(points, colors, 300, rng())
    one, other = (fit(images, cameras, start, FitSettings(iterations=20, most=330), seed=4) for _ in range(2))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    assert len(one) > 300  # it grew once


@pytest.mark.slow
def test_a_room_is_reconstructed_beyond_30_db_at_held_out_views():
    images, depth, cameras = room(24)
    held = torch.arange(2, 24, 6)
    kept = torch.tensor([view for view in range(24) if view not in held])
    points, colors = unproject(depth[kept[::4]], images[kept[::4]], cameras[kept[::4].tolist()])
    made = fit(images[kept], cameras[kept.tolist()], seeds(points, colors, 2000, rng()), FitSettings(iterations=500))
    with torch.no_grad():
        shown = render_gaussians(made, cameras[held.tolist()])[0].clamp(0, 1)
    psnr = -10 * (shown - images[held]).square().flatten(1).mean(dim=1).log10()
    assert psnr.mean() > 30
