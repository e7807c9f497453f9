"""Windows of the order of capture, what replaces them, and the figures that clips are judged by."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from fvgen.clips.clip import Clip
from fvgen.clips.filters import LIMITS, measure, sharpness, verdict
from fvgen.clips.views import capture_order, clip_windows
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.scenes.scene import Scene

FRAMES = 4


def arc(views: int, step: float = 0.03, order: list[int] | None = None) -> Scene:
    """Cameras on an arc around the origin, ``step`` radians apart; file i is the order[i]-th of them."""
    angle = step * torch.arange(views, dtype=torch.float64)
    position = torch.stack([4 * angle.sin(), torch.zeros_like(angle), -4 * angle.cos()], dim=-1)
    poses = look_at(position, torch.zeros_like(position), position.new_tensor([0.0, -1.0, 0.0])).float()
    poses = poses if order is None else poses[order]
    paths = tuple(Path(f"{i}.png") for i in range(views))
    return Scene("arc", paths, Cameras(poses, pinhole(views, 8, 12, 60.0), 8, 12))


def windows(scene: Scene, count: int, max_stride: int = 4, seed: int = 0):
    return clip_windows(scene, count, FRAMES, max_stride, torch.Generator().manual_seed(seed))


def test_every_window_is_evenly_strided_and_different():
    found = windows(arc(30), 60)
    assert len({tuple(window.views) for window in found} | {tuple(w.views[::-1]) for w in found}) == 120
    for window in found:
        steps = torch.tensor(window.views).diff()
        assert (steps == steps[0]).all() and abs(int(steps[0])) == window.stride in (1, 2, 3, 4)
        # turn and parallax of an arc: the angle, and the chord over the cameras' extent, which is a chord, too
        angle = 0.03 * window.stride
        parallax = math.sin(angle / 2) / math.sin(29 * 0.03 / 2)
        assert window.motion == pytest.approx(3 * (angle + parallax), rel=1e-3)
    assert {window.views[0] < window.views[-1] for window in found} == {True, False}


def test_strides_are_drawn_evenly():
    counts = Counter(windows(arc(40), 1, seed=seed)[0].stride for seed in range(400))
    expected = 100
    assert (
        set(counts) == {1, 2, 3, 4} and sum((n - expected) ** 2 / expected for n in counts.values()) < 16.3
    )  # p = 1e-3


def test_the_seed_decides():
    assert windows(arc(20), 5, seed=3) == windows(arc(20), 5, seed=3) != windows(arc(20), 5, seed=4)


def test_no_more_windows_than_there_are():
    found = windows(arc(6), 50)
    assert Counter(window.stride for window in found) == {1: 3}  # strides from two on need seven views


def test_photographs_in_no_order_are_chosen_by_pose():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    found = windows(arc(16, 0.25, order), 3, max_stride=1)
    assert len(found) == 3
    for window in found:
        along = torch.tensor([order[view] for view in window.views]).diff()
        assert window.stride is None and ((along > 0).all() or (along < 0).all())


def test_too_few_photographs_are_refused():
    with pytest.raises(UserError, match="has 3 views but a clip needs 4"):
        windows(arc(3), 1)


def test_files_are_ordered_by_the_numbers_in_their_names():
    scene = arc(4)
    names = ("images/f10.png", "images/f9.png", "images/e11.png", "images/f009b.png")
    scene = Scene("x", tuple(map(Path, names)), scene.cameras)
    assert [names[i] for i in capture_order(scene)] == [names[2], names[1], names[3], names[0]]


# --- Quality ---


def stripes(blur: int) -> torch.Tensor:
    """[3, 24, 36] noise, averaged over ``blur`` pixels along each row."""
    noise = torch.rand(1, 3, 24, 36, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool2d(noise, (1, blur), 1, (0, blur // 2))[0]


def clip_of(frames: list[torch.Tensor]) -> Clip:
    truth = torch.stack(frames)
    known = torch.zeros(len(truth), dtype=torch.bool)
    known[[0, -1]] = True
    return Clip("x", truth, truth, known)


def test_sharpness_falls_with_blur_but_not_with_contrast_or_brightness():
    sharp = sharpness(torch.stack([stripes(1), stripes(3), stripes(7), stripes(1) * 0.3, stripes(1) * 0.3 + 0.5]))
    assert sharp[0] > 1.2 * sharp[1] > 1.2 * sharp[2]
    assert torch.allclose(sharp[[3, 4]], sharp[[0, 0]], rtol=1e-3)


def test_laplacian_of_a_wave_is_known():
    """For sin(k x): the Laplacian is -(2 - 2 cos k) sin(k x), so the ratio of variances is its square."""
    wave = torch.sin(2 * math.pi / 8 * torch.arange(82)).expand(1, 3, 10, 82) / 4 + 0.5
    assert sharpness(wave).item() == pytest.approx((2 - 2 * math.cos(math.pi / 4)) ** 2, rel=0.05)


def test_each_fault_is_told_by_its_name():
    frames = [stripes(1)] * FRAMES
    seen = torch.ones(FRAMES, 24, 36, dtype=torch.bool)
    good = measure(clip_of(frames), 864, seen, 0.5)
    assert good == {"points": 1.0, "overlap": 1.0, "sharpness": 1.0, "motion": 0.5} and verdict(good, LIMITS) is None
    assert verdict(measure(clip_of(frames), 8, seen, 0.5), LIMITS) == "too few points"
    hidden = seen.clone()
    hidden[[0, -1]] = False  # known frames need not be seen
    assert verdict(measure(clip_of(frames), 864, hidden, 0.5), LIMITS) is None
    hidden[1, 4:] = False
    assert verdict(figures := measure(clip_of(frames), 864, hidden, 0.5), LIMITS) == "too little overlap"
    assert figures["overlap"] == round(4 / 24, 4)
    blurred = clip_of([*frames[:2], torch.nn.functional.avg_pool2d(stripes(1), 7, 1, 3), frames[0]])
    assert verdict(measure(blurred, 864, seen, 0.5), LIMITS) == "motion blur"
    assert verdict(measure(clip_of(frames), 864, seen, 0.001), LIMITS) == "static clip"
    assert verdict(good | {"motion": math.nan}, LIMITS) == "static clip"
