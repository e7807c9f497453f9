"""The point renderer against its closed form, against invariances, and against PyTorch3D's recorded renders."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch3d_recordings import SCENES, recorded_cameras, recording
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.geometry.pointcloud import RENDERERS, _backend, pytorch3d_has_cuda, render_points, unproject

HEIGHT, WIDTH = 12, 16
RADIUS = 0.4  # 2.4 pixels: the short side of 12 pixels spans 2


def camera(views: int = 1) -> Cameras:
    """At the origin along z with focal length 1 pixel: the point (x z, y z, z) falls on pixel coordinates (x, y)."""
    return Cameras(torch.eye(4).repeat(views, 1, 1), torch.eye(3).repeat(views, 1, 1), HEIGHT, WIDTH)


def at(x: float, y: float, depth: float = 1.0) -> Tensor:
    return torch.tensor([[x * depth, y * depth, depth]])


def falloff(x: float, y: float, radius: float) -> Tensor:
    """[H, W]: 1 - d^2 / r^2 with the distance d from (x, y) to each pixel's centre; negative outside the disk."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    return 1 - ((columns - x) ** 2 + (rows - y) ** 2) / radius**2


def opacity(x: float, y: float) -> Tensor:
    """[H, W]: what a point at (x, y) hides of what is behind it."""
    return falloff(x, y, RADIUS * HEIGHT / 2).clamp(min=0)


def cloud(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points all over the image and beyond its border, at distinct depths, with random colours."""
    generator = torch.Generator().manual_seed(seed)
    pixel = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH + 6.0, HEIGHT + 6.0]) - 3
    depth = 1 + torch.randperm(count, generator=generator) / count
    points = torch.cat([pixel * depth[:, None], depth[:, None]], dim=-1)
    return points, torch.rand(count, 3, generator=generator)


# --- Unprojection ---


def test_unproject_of_a_plane():
    """A camera 3 above the floor and looking straight down sees the floor at depth 3, that is at z = 0."""
    pose = look_at(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0.0, 1.0, 0.0]))
    cameras = Cameras(pose, pinhole(1, HEIGHT, WIDTH, 90), HEIGHT, WIDTH)
    points, _ = unproject(torch.full((1, HEIGHT, WIDTH), 3.0), torch.zeros(1, 3, HEIGHT, WIDTH), cameras)
    torch.testing.assert_close(points[:, 2], torch.zeros(HEIGHT * WIDTH), rtol=0, atol=1e-6)
    # 90 degrees at distance 3 span 6 units; the outermost pixel centres are half a pixel inside.
    torch.testing.assert_close(points[:, 0].max() - points[:, 0].min(), torch.tensor(6 * (1 - 1 / WIDTH)))


def test_unproject_leaves_out_unknown_depth_and_keeps_colours_with_their_points():
    depth = torch.ones(2, HEIGHT, WIDTH)
    depth[0, 0, 0], depth[0, 0, 1], depth[1, 2, 3], depth[1, 4, 5] = 0, -1, torch.nan, torch.inf
    images = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    points, colors = unproject(depth, images, camera(2))
    assert points.shape == colors.shape == (2 * HEIGHT * WIDTH - 4, 3)
    column, row = (points[:, :2] - 0.5).round().long().unbind(1)
    first = HEIGHT * WIDTH - 2
    assert torch.equal(colors[:first], images[0, :, row[:first], column[:first]].T)
    assert torch.equal(colors[first:], images[1, :, row[first:], column[first:]].T)


def test_a_view_rendered_from_its_own_depth_is_itself():
    """Points fall on pixel centres: with a radius below one pixel each covers its own pixel, fully."""
    generator = torch.Generator().manual_seed(2)
    images, depth = torch.rand(2, 3, 9, 9, generator=generator), 1 + torch.rand(2, 9, 9, generator=generator)
    position = torch.tensor([[2.0, 0.5, 1.0], [-1.0, 2.0, 0.3]])
    poses = look_at(position, torch.zeros(2, 3), torch.tensor([0.0, 0.0, 1.0]))
    cameras = Cameras(poses, pinhole(2, 9, 9, 60), 9, 9)
    for view in ([0], [1]):
        image, visible, found = render_points(*unproject(depth[view], images[view], cameras[view]), cameras[view], 0.2)
        torch.testing.assert_close(image, images[view].permute(0, 2, 3, 1), rtol=0, atol=1e-4)
        torch.testing.assert_close(visible, torch.ones_like(visible), rtol=0, atol=1e-4)
        torch.testing.assert_close(found, depth[view], rtol=0, atol=1e-5)


# --- Rendering: the closed form ---


@settings(max_examples=25, deadline=None)
@given(x=st.floats(-4, WIDTH + 4), y=st.floats(-4, HEIGHT + 4), radius=st.floats(0.02, 1.5))
def test_one_point_is_a_disk(x, y, radius):
    image, visible, depth = render_points(at(x, y, 2), torch.tensor([[0.5, 1.0, 0.25]]), camera(), radius)
    inside = falloff(x, y, radius * HEIGHT / 2)
    expected = inside.clamp(min=0)
    torch.testing.assert_close(visible[0], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(image[0], expected[..., None] * torch.tensor([0.5, 1.0, 0.25]), rtol=0, atol=1e-4)
    assert depth[0][inside > 1e-3].eq(2).all() and depth[0][inside < -1e-3].eq(0).all()  # the very rim may round


def test_the_rim_is_outside():
    """A pixel centre at exactly the radius is not covered: it has neither opacity nor depth."""
    square = Cameras(torch.eye(4)[None], torch.eye(3)[None], 16, 16)  # of a power of two, so that all is exact
    _, visible, depth = render_points(at(5.5, 5.5), torch.ones(1, 3), square, radius=0.25)  # two pixels
    assert torch.equal(depth > 0, visible > 0)
    assert visible[0, 5].nonzero()[:, 0].tolist() == [4, 5, 6]
    assert visible[0, 5, 5] == 1 and visible[0, 5, 4] == pytest.approx(0.75, abs=1e-6)


def test_the_nearer_point_is_laid_over_the_farther_one():
    near, far = opacity(7.2, 6.0), opacity(8.6, 6.9)
    points, colors = torch.cat([at(8.6, 6.9, 3), at(7.2, 6.0, 2)]), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    image, visible, depth = render_points(points, colors, camera(), RADIUS)
    torch.testing.assert_close(image[0, ..., 0], near, rtol=0, atol=1e-5)
    torch.testing.assert_close(image[0, ..., 1], far * (1 - near), rtol=0, atol=1e-5)
    torch.testing.assert_close(visible[0], 1 - (1 - near) * (1 - far), rtol=0, atol=1e-5)
    assert torch.equal(depth[0], torch.where(near > 0, 2.0, torch.where(far > 0, 3.0, 0.0)))


def test_only_the_nearest_k_points_count():
    points = torch.cat([at(7.5, 5.8, depth) for depth in (4, 1, 3, 2)])
    colors = torch.eye(4)
    alpha = opacity(7.5, 5.8)
    for kept in (1, 2, 3, 4, 9):
        image, visible, _ = render_points(points, colors, camera(), RADIUS, kept)
        order = (1, 3, 2, 0)[:kept]  # nearest first
        for rank, index in enumerate(order):
            torch.testing.assert_close(image[0, ..., index], alpha * (1 - alpha) ** rank, rtol=0, atol=1e-5)
        assert image[0][..., [i for i in range(4) if i not in order]].eq(0).all()
        torch.testing.assert_close(visible[0], 1 - (1 - alpha) ** min(kept, 4), rtol=0, atol=1e-5)


def test_points_that_are_not_in_front_are_not_drawn():
    points = torch.cat(
        [at(8, 6, -1), torch.zeros(1, 3), torch.full((1, 3), torch.nan), torch.tensor([[9.0, 9.0, 0.0]])]
    )
    image, visible, depth = render_points(points, torch.ones(4, 3), camera(), RADIUS)
    assert not image.any() and not visible.any() and not depth.any()


def test_a_point_just_before_the_lens_is_harmless():
    """Its pixel coordinates are beyond any integer; it must neither crash nor wrap around into the image."""
    points = torch.tensor([[1.0, 1.0, 1e-30], [-1.0, 5.0, 1e-12], [1e30, -1e30, 1.0]])
    assert not render_points(points, torch.ones(3, 3), camera(), RADIUS)[1].any()


def test_the_empty_cloud_is_black():
    image, visible, depth = render_points(torch.empty(0, 3), torch.empty(0, 3), camera(2), RADIUS)
    assert image.shape == (2, HEIGHT, WIDTH, 3) and visible.shape == depth.shape == (2, HEIGHT, WIDTH)
    assert not image.any() and not visible.any() and not depth.any()


# --- Rendering: invariances ---


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_points_does_not_matter(seed):
    points, colors = cloud(150, seed)
    shuffled = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
    expected = render_points(points, colors, camera(), RADIUS, 3)
    for a, b in zip(expected, render_points(points[shuffled], colors[shuffled], camera(), RADIUS, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), channels=st.integers(1, 5))
def test_what_is_seen_does_not_depend_on_the_colours(seed, channels):
    """White points over black give the visibility itself, in every channel, between 0 and 1."""
    points, _ = cloud(150, seed)
    image, visible, _ = render_points(points, torch.ones(150, channels), camera(), RADIUS)
    torch.testing.assert_close(image, visible[..., None].expand_as(image), rtol=0, atol=1e-5)
    assert visible.min() >= 0 and visible.max() <= 1 + 1e-6


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_moving_world_and_camera_together_changes_nothing(seed):
    points, colors = cloud(100, seed)
    generator = torch.Generator().manual_seed(seed)
    pose = torch.eye(4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    pose[:3, :3] = rotation * torch.linalg.det(rotation)
    pose[:3, 3] = torch.randn(3, generator=generator, dtype=torch.float64)
    moved = points.double() @ pose[:3, :3].T + pose[:3, 3]
    fixed = Cameras(torch.eye(4).double()[None], torch.eye(3).double()[None], HEIGHT, WIDTH)
    a = render_points(points.double(), colors, fixed, RADIUS)
    b = render_points(moved, colors, Cameras(pose[None], fixed.intrinsics, HEIGHT, WIDTH), RADIUS)
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_the_gradient_of_a_colour_is_its_weight_in_the_image():
    points = torch.cat([at(8.6, 6.9, 3), at(7.2, 6.0, 2)])
    colors = torch.zeros(2, 1, requires_grad=True)
    image, _, _ = render_points(points, colors, camera(), RADIUS)
    upstream = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    (image * upstream).sum().backward()
    near, far = opacity(7.2, 6.0), opacity(8.6, 6.9)
    expected = torch.stack([(far * (1 - near) * upstream[0, ..., 0]).sum(), (near * upstream[0, ..., 0]).sum()])
    torch.testing.assert_close(colors.grad[:, 0], expected)


class LargestResult(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made, the final stacking of views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func is not torch.ops.aten.stack.default:
            self.elements = max(self.elements, out.numel())
        return out


def test_working_memory_does_not_grow_with_the_number_of_views():
    points, colors = cloud(150)
    sizes = []
    for views in (1, 6):
        with LargestResult() as largest:
            image, _, _ = render_points(points, colors, camera(views), RADIUS)
        sizes.append(largest.elements)
        assert torch.equal(image, image[:1].expand_as(image))  # the same camera sees the same
    assert sizes[0] == sizes[1] > 150


# --- Recordings of PyTorch3D ---


@pytest.mark.parametrize("name", SCENES)
def test_pytorch3d_renders_the_same(request, name):
    """From cameras: on the machine of the recording it is all the same bits, elsewhere where it is `stable`.

    `stable` leaves out pixels where the rounding of a projection (1e-6 of a coordinate) may exchange two points.
    """
    recorded = recording(name, request)
    radius, kept = recorded["radius"].item(), recorded["points_per_pixel"].item()
    image, visible, depth = render_points(
        recorded["points"], recorded["features"], recorded_cameras(recorded), radius, kept
    )
    torch.testing.assert_close(image, recorded["image_alpha"], rtol=0, atol=2e-4)
    torch.testing.assert_close(visible, recorded["mask_alpha"], rtol=0, atol=2e-4)
    stable = recorded["stable"]
    nearest = recorded["zbuf"][..., 0].clamp(min=0)  # theirs is -1 where there is no point
    torch.testing.assert_close(depth[stable], nearest[stable], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["random_r0.08", "behind_outside"])
def test_the_background_shows_only_where_there_is_no_point(request, name):
    recorded = recording(name, request)
    settings_of = (recorded_cameras(recorded), recorded["radius"].item(), recorded["points_per_pixel"].item())
    image, _, _ = render_points(recorded["points"], recorded["features"], *settings_of, recorded["background"])
    torch.testing.assert_close(image, recorded["image_alpha_bg"], rtol=0, atol=2e-4)


# --- Backends and options ---


def test_unknown_and_missing_backends_are_one_sentence():
    arguments = (*cloud(5), camera(), RADIUS, 10, None)
    with pytest.raises(UserError, match="unknown renderer 'pytroch3d'; did you mean 'pytorch3d'"):
        render_points(*arguments, "pytroch3d")
    if find_spec("pytorch3d") is None:
        with pytest.raises(UserError, match="install PyTorch3D or choose the renderer 'torch'"):
            render_points(*arguments, "pytorch3d")


@pytest.mark.parametrize(
    ("package", "name"),
    [
        (SimpleNamespace(_C=SimpleNamespace(rasterize_points=None, knn_check_version=None)), "pytorch3d"),
        (SimpleNamespace(_C=SimpleNamespace(rasterize_points=None)), "torch"),
        (None, "torch"),
    ],
    ids=["with CUDA", "without CUDA", "not installed"],
)
def test_auto_takes_a_pytorch3d_that_can_draw_on_a_gpu(monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, "pytorch3d", package)
    assert _backend("auto", torch.device("cuda")) is RENDERERS[name]
    assert _backend("auto", torch.device("cpu")) is RENDERERS["torch"]


@pytest.fixture(scope="module")
def pytorch3d() -> None:
    pytest.importorskip("pytorch3d", reason="PyTorch3D is not installed")


def check_same_bits(points: Tensor, colors: Tensor, cameras: Cameras, *options) -> None:
    """Image, visibility, depth and the colours' gradient, of both renderers."""
    results = []
    for backend in ("torch", "pytorch3d"):
        leaf = colors.clone().requires_grad_()
        image, visible, depth = render_points(points, leaf, cameras, *options, backend)
        weight = torch.linspace(-1, 1, image.numel()).reshape(image.shape)
        loss = (image * weight).sum() + leaf.sum()  # an image without any point has no gradient
        results.append((image.detach(), visible, depth, *torch.autograd.grad(loss, leaf)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.usefixtures("pytorch3d")
@pytest.mark.parametrize("name", SCENES)
def test_both_backends_draw_the_same_bits(request, name):
    """The recordings' scenes; and PyTorch3D as it is installed still gives what was recorded."""
    recorded = recording(name, request)
    size, radius = tuple(recorded["image_size"].tolist()), recorded["radius"].item()
    kept, count = recorded["points_per_pixel"].item(), len(recorded["points"])
    for view, ndc in enumerate(recorded["points_ndc"]):
        point, depth, distance = (layer.movedim(0, -1) for layer in RENDERERS["pytorch3d"](ndc, size, radius, kept))
        assert torch.equal(torch.where(point >= 0, point + view * count, -1), recorded["idx"][view])
        assert torch.equal(depth, recorded["zbuf"][view]) and torch.equal(distance, recorded["dists"][view])
    scene = (recorded["points"], recorded["features"], recorded_cameras(recorded), radius, kept)
    check_same_bits(*scene, None)
    check_same_bits(*scene, recorded["background"])


@pytest.mark.usefixtures("pytorch3d")
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.sampled_from([0, 1, 150]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    radius=st.sampled_from([0.01, 0.25, 1, 3.0]),  # an int is a number, too
    kept=st.sampled_from([1, 4, 200]),
    exact=st.booleans(),
)
def test_both_backends_draw_the_same_bits_of_any_cloud(seed, count, size, radius, kept, exact):
    """Any aspect, empty clouds, more points in a pixel than are kept and fewer; `exact`: many ties of depth."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 3, generator=generator)
    if exact:
        points = (points * 4).round() / 4
    poses = look_at(torch.randn(2, 3, generator=generator), torch.zeros(2, 3), torch.tensor([0.0, 0.0, 1.0]))
    cameras = Cameras(poses, pinhole(2, *size, 60), *size)
    check_same_bits(points, torch.rand(count, 3, generator=generator), cameras, radius, kept, torch.ones(3))


@pytest.mark.usefixtures("pytorch3d")
def test_pytorch3d_compiled_without_cuda_is_one_sentence_on_a_gpu():
    if pytorch3d_has_cuda():
        pytest.skip("PyTorch3D was compiled with CUDA here")
    with FakeTensorMode(), pytest.raises(UserError, match="compiled without CUDA here"):
        points = torch.ones(5, 3, device="cuda")
        render_points(points, points, camera().to("cuda"), backend="pytorch3d")


@pytest.mark.usefixtures("pytorch3d")
def test_pytorch3d_draws_float64_in_float32():
    points, colors = cloud(500)
    cameras = Cameras(torch.eye(4).double()[None], torch.eye(3).double()[None], HEIGHT, WIDTH)
    arguments = (points.double(), colors.double(), cameras, RADIUS, 4, torch.ones(3))
    for ours, theirs in zip(render_points(*arguments), render_points(*arguments, "pytorch3d"), strict=True):
        assert ours.dtype == theirs.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"radius": 0.0}, "radius must be a positive number"),
        ({"radius": float("nan")}, "radius must be a positive number"),
        ({"points_per_pixel": 0}, "points_per_pixel must be at least 1"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        render_points(*cloud(5), camera(), **changes)


def test_the_half_pixel_shift_moves_the_image_left_and_up():
    """ViewCrafter's: each point lies on the corner of four pixels, which share it evenly."""
    images = torch.zeros(1, 3, HEIGHT, WIDTH)
    images[0, :, 6, 8] = 1
    view = Cameras(torch.eye(4)[None], pinhole(1, HEIGHT, WIDTH, 60), HEIGHT, WIDTH)
    radius = 0.9 / (HEIGHT / 2)  # of 0.9 pixels: a corner is at distance 0.71 from the four pixel centres
    plain, _, _ = render_points(*unproject(torch.ones(1, HEIGHT, WIDTH), images, view), view, radius)
    shifted, _, _ = render_points(*unproject(torch.ones(1, HEIGHT, WIDTH), images, view, True), view, radius)
    assert plain[0, ..., 0].gt(1e-3).nonzero().tolist() == [[6, 8]]
    assert shifted[0, ..., 0].gt(1e-3).nonzero().tolist() == [[5, 7], [5, 8], [6, 7], [6, 8]]
