"""scene.html: what it holds, and what a real browser shows of it."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import MISSING, Browser, browser
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.geometry.gaussians import LEAST_ALPHA, LOW_PASS, MOST_ALPHA, NEAR, Gaussians, project_gaussians
from fvgen.splats.viewer import SPLAT, pack, write_viewer

HEIGHT, WIDTH = 24, 32
UP = torch.tensor([0.0, -1.0, 0.0])


def cloud(count: int = 300, seed: int = 0) -> Gaussians:
    """Round the origin, some of them needles, some faint, quaternions of any length."""
    g = torch.Generator().manual_seed(seed)
    scales = (torch.randn(count, 3, generator=g) - 2.5).exp()
    opacities = torch.rand(count, generator=g) ** 2
    return Gaussians(
        torch.randn(count, 3, generator=g),
        scales,
        3 * torch.randn(count, 4, generator=g),
        opacities,
        torch.rand(count, 3, generator=g),
    )


def views(*positions: tuple[float, float, float], off: tuple[float, float] = (0.0, 0.0)) -> Cameras:
    """Cameras that face the origin; the principal point lies ``off`` pixels from the middle."""
    position = torch.tensor(positions)
    lens = pinhole(len(position), HEIGHT, WIDTH, 60)
    lens[:, 0, 2] += off[0]
    lens[:, 1, 2] += off[1]
    return Cameras(look_at(position, torch.zeros_like(position), UP), lens, HEIGHT, WIDTH)


def held(page: Path) -> tuple[dict, np.ndarray]:
    """Facts and splats that stand in a page."""
    facts, splats = re.findall(r'<script id="(?:facts|splats)" [^>]*>(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(facts), np.frombuffer(base64.b64decode(splats), SPLAT)


# --- The file ---


def test_a_page_holds_what_was_given(tmp_path):
    given = cloud(1000)
    given.scales[0], given.colors[1] = math.exp(8), torch.tensor([-1.0, 0.5, 2.0])
    cameras = views((0.0, 0, -5), (4.0, 1, 0), off=(3, -2))
    write_viewer(tmp_path / "scene.html", given, cameras)
    facts, splats = held(tmp_path / "scene.html")
    given = given[given.opacities >= LEAST_ALPHA]
    assert 500 < facts["count"] == len(splats) == len(given) < 1000
    assert (splats["mean"] == given.means.numpy()).all()
    shades = torch.cat([given.colors.clamp(0, 1), given.opacities[:, None]], dim=1)
    np.testing.assert_allclose(splats["color"] / 255, shades, atol=0.5 / 255 + 1e-6)
    turns = torch.nn.functional.normalize(given.rotations, dim=1)
    np.testing.assert_allclose(splats["rotation"] / 32767, turns, atol=0.5 / 32767 + 1e-6)
    inside = (given.scales.log().abs() <= 8).numpy()
    scales = np.exp(splats["log_scale"][:, :3].astype(np.float64))
    np.testing.assert_allclose(scales[inside], given.scales.numpy()[inside], rtol=2**-9 + 1e-5)
    assert (facts["height"], facts["width"]) == (HEIGHT, WIDTH)
    assert torch.equal(torch.tensor(facts["poses"]), cameras.world_from_cam[:, :3])
    assert torch.equal(torch.tensor(facts["lenses"]), cameras.intrinsics[:, [0, 1, 0, 1], [0, 1, 2, 2]])


def test_a_page_asks_for_nothing(tmp_path):
    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open, self.policy = [], ""

        def handle_starttag(self, tag, attrs):
            assert not {"src", "href"} & dict(attrs).keys()
            if tag == "meta":
                self.policy = self.policy or dict(attrs).get("content", "") * ("http-equiv" in dict(attrs))
            else:
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    write_viewer(tmp_path / "scene.html", cloud(), views((0.0, 0, -5)))
    page = Page()
    page.feed((tmp_path / "scene.html").read_text())
    assert page.open == [] and page.policy.startswith("default-src 'none';") and "http" not in page.policy


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="stands where a folder should be"):
        write_viewer(tmp_path / "file" / "scene.html", cloud(3), views((0.0, 0, -5)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- In a browser ---


@pytest.fixture(scope="module")
def window():
    if MISSING:
        pytest.skip(MISSING)
    with browser() as window:
        yield window


@pytest.fixture
def show(window: Browser, tmp_path):
    """Opens a page of the given things; its console must stay silent."""

    def call(splats: Gaussians, cameras: Cameras) -> Browser:
        write_viewer(tmp_path / "scene.html", splats, cameras)
        window.open(tmp_path / "scene.html")
        if window.run("return gl === null"):
            pytest.skip("this browser offers no WebGL 2")
        return window

    yield call
    assert window.complaints() == []


def picture(window: Browser, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """[3, H, W]: what the page draws on a canvas of this size."""
    window.run(f"canvas.style = 'flex: none; width: {width}px; height: {height}px'")
    data = window.run(
        "draw(); const pixels = new Uint8Array(4 * canvas.width * canvas.height);"
        "gl.readPixels(0, 0, canvas.width, canvas.height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);"
        "return gl.getError() || btoa(Array.from(pixels, (x) => String.fromCharCode(x)).join(''))"
    )
    assert isinstance(data, str), f"WebGL's error {data}"
    pixels = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8).view(height, width, 4)
    return pixels.flip(0)[..., :3].permute(2, 0, 1) / 255  # WebGL's first row is the lowest


def dense(splats: Gaussians, camera: Cameras) -> tuple[Tensor, Tensor]:
    """The picture [3, H, W] of what the page holds, every Gaussian at every pixel, float64; and how far eight bits may
    take it, [H, W].

    The page's colours are rounded after each layer: by 1/255 at most, of which a part shines through the layers in
    front; as much again for alphas that another arithmetic puts on the other side of 1/255.
    """
    mean, shade, turn, size = (torch.from_numpy(pack(splats)[name].astype(np.float64)) for name in SPLAT.names)
    held = Gaussians(mean, size[:, :3].exp(), turn, shade[:, 3] / 255, shade[:, :3] / 255)
    seen = project_gaussians(held, camera.to(dtype=torch.float64))
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    picture, layers = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.float64), torch.zeros(HEIGHT, WIDTH)
    for n in seen.depths.argsort(descending=True):
        if seen.depths[n] <= NEAR:
            continue
        (u, v), (xx, xy, yy) = seen.centers[n], seen.conics[n]
        power = 0.5 * (xx * (x - u) ** 2 + yy * (y - v) ** 2) + xy * (x - u) * (y - v)
        alpha = (held.opacities[n] * (-power).exp()).clamp(max=MOST_ALPHA)
        drawn = torch.where(alpha >= LEAST_ALPHA, alpha, 0)
        picture = (1 - drawn) * picture + drawn * held.colors[n][:, None, None]
        layers = (1 - drawn) * layers + (alpha >= 0.99 * LEAST_ALPHA)
    return picture, 2 / 255 * layers + 0.5 / 255


@pytest.mark.slow
def test_each_camera_shows_what_the_rasteriser_does(show):
    splats = cloud()
    cameras = views((0.0, 0, -5), (3.0, 1, 2), (0.0, -0.3, 0.5), off=(3, -2))  # the last amid them
    window = show(splats, cameras)
    for view in range(3):
        window.click(f"nav button:nth-child({view + 1})")
        expected, bound = dense(splats, cameras[[view]])
        small, large = picture(window), picture(window, 3 * HEIGHT, 3 * WIDTH)
        assert small.std() > 0.05
        assert ((small - expected).abs() <= bound).all()
        # Every third pixel of a picture three times as large has its centre where the small one's pixel has.
        assert ((large[:, 1::3, 1::3] - expected).abs() <= bound).all()
        # A window of another shape shows more beside the picture, and the picture as it was.
        wide = picture(window, HEIGHT, WIDTH + 20)
        assert ((wide[:, :, 10:-10] - expected).abs() <= bound).all() and wide[:, :, :10].max() > 0


@pytest.mark.slow
def test_one_gaussian_has_a_closed_form(show):
    camera = views((0.0, 0, -4), off=(0.5, 0.5))  # the centre falls on a pixel's
    turn, opacity = torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([0.8])
    white = Gaussians(torch.zeros(1, 3), torch.full((1, 3), 0.2), turn, opacity, torch.ones(1, 3))
    shown = picture(show(white, camera))
    variance = (camera.intrinsics[0, 0, 0].item() * 0.2 / 4) ** 2 + LOW_PASS
    y, x = torch.meshgrid(torch.arange(HEIGHT) - 12.0, torch.arange(WIDTH) - 16.0, indexing="ij")
    expected = 0.8 * (-(x**2 + y**2) / (2 * variance)).exp()
    # A scale off by 0.2 % changes the exponent by less than 0.4 % of itself, and t exp(-t) is below 0.37.
    torch.testing.assert_close(shown[0], expected * (expected >= LEAST_ALPHA), rtol=0, atol=1.01 / 255 + 0.0015)


def two_lamps() -> Gaussians:
    """Red before green, seen from -z; both nearly opaque."""
    means = torch.tensor([[0.0, 0, -1], [0, 0, 1]])
    shades = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    return Gaussians(means, torch.full((2, 3), 0.3), torch.tensor([[1.0, 0, 0, 0]] * 2), torch.full((2,), 0.99), shades)


def seen(window: Browser) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """axes [3, 3], centre [3] and target [3] of the page's camera, and up [3]."""
    return tuple(torch.tensor(x).double() for x in window.run("return [camera.axes, camera.center, target(), up]"))


@pytest.mark.slow
def test_dragging_turns_about_the_scene_and_keeps_the_horizon(show):
    cameras = views((0.0, 0, -5), (0.5, 0, -5))
    window = show(two_lamps(), cameras)
    center = (slice(None), HEIGHT // 2, WIDTH // 2)
    assert picture(window)[center][0] > 0.9
    window.run("canvas.style = ''; camera.distance = 5")
    window.drag((100, 200), (round(math.pi / window.run("return TURN")), 0))
    axes, position, target, up = seen(window)
    torch.testing.assert_close(target, torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(position, torch.tensor([0.0, 0, 5]).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(axes @ axes.T, torch.eye(3).double())
    assert abs(axes[0] @ up) < 1e-6 and window.run("return document.querySelector('[aria-pressed=true]') === null")
    assert picture(window)[center][1] > 0.9  # green is in front now

    window.run("canvas.style = ''")
    for pixels in (300, 300, -500, -500):  # down: the camera rises, but not over the top
        window.drag((100, 10 if pixels > 0 else 510), (0, pixels))
        axes, _, _, up = seen(window)
        assert axes[1] @ up < 0 and abs(axes[2] @ up) <= math.sin(1.5) + 1e-6
        assert (axes[2] @ up).sign() == -math.copysign(1, pixels)

    window.click("nav button:nth-child(2)")
    axes, position, _, _ = seen(window)
    torch.testing.assert_close(axes, cameras.world_from_cam[1, :3, :3].T.double())
    torch.testing.assert_close(position, cameras.centers[1].double())
    assert window.run("return document.querySelector('[aria-pressed=true]').textContent") == "2"


@pytest.mark.slow
def test_the_wheel_comes_nearer_and_shift_moves_what_is_under_the_mouse(show):
    window = show(two_lamps(), views((0.0, 0, -5)))
    _, before, target, _ = seen(window)
    window.wheel((300, 200), -120)
    _, after, kept, _ = seen(window)
    torch.testing.assert_close(kept, target)
    torch.testing.assert_close(after - target, (before - target) * math.exp(-0.12))

    place = "const [fx, fy, cx, cy] = shown(canvas.clientWidth, canvas.clientHeight);"
    place += "const arm = away(arguments[0], camera.center), [x, y, z] = camera.axes.map((axis) => dot(axis, arm));"
    place += "return [fx * x / z + cx, fy * y / z + cy]"
    start = window.run(place, target.tolist())
    window.drag((300, 200), (40, -25), shift=True)
    assert window.run(place, target.tolist()) == pytest.approx([start[0] + 40, start[1] - 25])


@pytest.mark.slow
def test_a_page_draws_by_itself_survives_the_loss_of_its_context_and_loads_nothing(show):
    window = show(cloud(), views((0.0, 0, -5)))
    before = picture(window)
    lost = "const extension = gl.getExtension('WEBGL_lose_context'), done = arguments[0];"
    lost += "canvas.addEventListener('webglcontextrestored', () => requestAnimationFrame(() => done(true)));"
    lost += "canvas.addEventListener('webglcontextlost', () => setTimeout(() => extension.restoreContext(), 0));"
    assert window.later(lost + "extension.loseContext()") is True
    assert [line for line in window.complaints() if "CONTEXT_LOST" not in line] == []
    assert picture(window).equal(before)
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    fetch = "const done = arguments[0]; fetch('data:,x').then(() => done('loaded'), () => done('refused'))"
    assert window.later(fetch) == "refused"
    assert all("Content Security Policy" in line or "data:,x" in line for line in window.complaints())


@pytest.mark.slow
def test_many_gaussians_and_none(show):
    assert picture(show(cloud(1)[:0], views((0.0, 0, -5)))).max() == 0
    many = cloud(20_000)
    window = show(replace(many, scales=many.scales / 20), views((0.0, 0, -5)))
    depths = "return Array.from(order, (k) => depths[k])"
    assert picture(window).std() > 0.05
    found = torch.tensor(window.run(depths))
    assert len(found) > 15_000 and (found.diff() <= 0).all()
    assert sorted(window.run("return Array.from(order)")) == list(range(len(found)))
