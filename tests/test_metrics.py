"""The metrics against closed forms and published figures, and their behaviour when weights are missing."""

import hashlib
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize, pad
from torchvision.transforms.functional import gaussian_blur

from fvgen import metrics
from fvgen.errors import UserError
from fvgen.metrics import frechet, image, weights


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch, tmp_path):
    """No weights folder, an empty torch hub cache, and no download allowed."""
    monkeypatch.delenv("FVGEN_WEIGHTS", raising=False)
    monkeypatch.delenv("FVGEN_DOWNLOAD", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def squeezenet(shared, monkeypatch):
    """The folder with SqueezeNet's real weights, named by FVGEN_WEIGHTS."""
    folder = shared / "data" / "weights"
    monkeypatch.setenv("FVGEN_WEIGHTS", str(folder))
    return folder


def fox(shared, number, height=256, width=256):
    """[1, 3, H, W] photograph of the fox scene, squeezed to a size."""
    photo = Image.open(shared / "data" / "scenes" / "fox" / "images" / f"{number}.jpg").convert("RGB")
    pixels = np.array(photo.resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def foxes(shared):
    return torch.cat([fox(shared, number, 48, 64) for number in ("0001", "0002", "0003", "0004", "0115")])


def random_images(n=2, height=48, width=64, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error_averages_images_not_errors():
    truth = torch.full((2, 3, 48, 64), 0.5)
    predicted = truth + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(metrics.psnr(predicted, truth), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    pooled = -10 * math.log10((0.1**2 + 0.01**2) / 2)
    score = metrics.score_images(predicted, truth)["psnr"]
    assert score == pytest.approx(30, abs=1e-3) and abs(score - pooled) > 5


def test_psnr_of_identical_images_stays_finite():
    images = random_images()
    assert metrics.psnr(images, images).tolist() == [100, 100]


@pytest.mark.parametrize("n", [1, 3])
def test_ssim_closed_forms(n):
    images = random_images(n)
    torch.testing.assert_close(metrics.ssim(images, images), torch.ones(n))
    a, b, c1 = 0.4, 0.7, 0.01**2  # flat images: only the luminance term is left
    flat = torch.full((n, 3, 48, 64), a), torch.full((n, 3, 48, 64), b)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    torch.testing.assert_close(metrics.ssim(*flat), torch.full((n,), expected), atol=1e-6, rtol=0)


def test_ssim_uses_the_gaussian_window_of_eleven():
    """Against the definition, window by window."""
    images = random_images(1, 16, 20).double(), random_images(1, 16, 20, seed=1).double()
    g = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2)).double()
    window = torch.outer(g, g) / g.sum() ** 2
    x, y = (pad(image, (5, 5, 5, 5), mode="reflect").unfold(2, 11, 1).unfold(3, 11, 1) for image in images)

    def mean(values):
        return (values * window).sum(dim=(-1, -2))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    expected = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    torch.testing.assert_close(metrics.ssim(*images), expected.mean().float()[None], atol=1e-6, rtol=0)


def test_images_too_small_for_a_metric_have_none(squeezenet):
    scores = metrics.score_images(random_images(2, 10, 10), random_images(2, 10, 10, seed=1))
    assert scores["psnr"] is not None
    for name, minimum in (("ssim", "11x11"), ("lpips", "32x32"), ("kid_squeeze", "32x32")):
        assert scores[name] is None and "10x10" in scores["why_null"][name] and minimum in scores["why_null"][name]


def test_values_outside_the_range_are_refused():
    with pytest.raises(AssertionError, match="clamp"):
        metrics.psnr(random_images() * 2 - 1, random_images())


def left_half(count: int = 2, height: int = 40, width: int = 48) -> torch.Tensor:
    shown = torch.zeros(count, height, width, dtype=torch.bool)
    shown[..., : width // 2] = True
    return shown


def test_what_is_hidden_counts_nowhere(shared, squeezenet):
    """Whatever was predicted there, NaN included, every score is the same; PSNR is that of the part that is shown."""
    truth, predicted, shown = random_images(2, 40, 48), random_images(2, 40, 48, seed=1), left_half()
    scores = metrics.score_images(predicted, truth, shown)
    for other in (0.0, 1.0, float("nan")):
        changed = torch.where(shown[:, None], predicted, other)
        assert metrics.score_images(changed, truth, shown) == scores
        assert metrics.score_images(predicted, torch.where(shown[:, None], truth, other), shown) == scores
    assert scores["psnr"] == pytest.approx(metrics.score_images(predicted[..., :24], truth[..., :24])["psnr"], rel=1e-5)
    assert scores["lpips"] is not None and scores["kid_squeeze"] is not None
    right = torch.where(shown[:, None], truth, predicted)
    assert metrics.score_images(right, truth, shown)["psnr"] == 100
    assert metrics.score_images(right, truth, shown)["ssim"] == pytest.approx(1)


def test_masks_that_hide_nothing_or_all():
    truth, predicted, shown = random_images(2, 40, 48), random_images(2, 40, 48, seed=1), left_half()
    plain, all_shown = (metrics.score_images(predicted, truth, s) for s in (None, torch.ones_like(shown)))
    for name in ("psnr", "ssim"):
        assert all_shown[name] == pytest.approx(plain[name], rel=1e-5)
    shown[0] = False
    alone = metrics.score_images(predicted[1:], truth[1:], shown[1:])
    assert metrics.score_images(predicted, truth, shown) == alone and alone["n"] == 1
    nothing = metrics.score_images(predicted, truth, torch.zeros_like(shown))
    assert nothing["n"] == 0 and nothing["psnr"] is None and "masks hide" in nothing["why_null"]["psnr"]


def test_ssim_is_averaged_over_shown_pixels():
    """Far from the border of what is hidden the windows see nothing of it: where only these are shown, SSIM is as it is
    without a mask, and elsewhere it does not count."""
    truth, predicted = random_images(1, 40, 64), random_images(1, 40, 64, seed=1)
    predicted[..., 32:] = truth[..., 32:]
    far = torch.zeros(1, 40, 64, dtype=torch.bool)
    far[..., 44:] = True
    assert metrics.ssim(predicted, truth, far) == pytest.approx(1, abs=1e-6) and metrics.ssim(predicted, truth) < 0.7


def test_lpips_squeeze_gives_the_recorded_distances(shared, squeezenet):
    """The recorded figures leave the resizing filter open, which is worth 0.004 here."""
    first, second, far = (fox(shared, number) for number in ("0001", "0002", "0115"))
    values, net = metrics.lpips(first.expand(3, -1, -1, -1), torch.cat([first, second, far]))
    assert net == "squeeze"
    torch.testing.assert_close(values, torch.tensor([0.0, 0.077, 0.552]), atol=0.005, rtol=0)
    assert abs(values[0]) < 1e-6


def test_lpips_and_kid_squeeze_grow_with_blur_on_small_images(shared, squeezenet):
    truth = foxes(shared)
    blurred = [gaussian_blur(truth, 11, sigma) for sigma in (0.6, 1.2, 2.4)]
    scores = [metrics.score_images(predicted, truth) for predicted in [truth, *blurred]]
    for name in ("lpips", "kid_squeeze"):
        values = [score[name] for score in scores]
        assert values[0] == pytest.approx(0, abs=1e-6) and values == sorted(values) and values[1] > 0.01


def test_kid_squeeze_compares_sets(shared, squeezenet):
    truth = foxes(shared)
    predicted = gaussian_blur(truth, 11, 1.2)
    value = metrics.kid_squeeze(predicted, truth)
    assert value == pytest.approx(metrics.kid_squeeze(predicted.flip(0), truth), abs=1e-5)
    features = frechet.squeeze_features(predicted)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(torch.cat([frechet.squeeze_features(p[None]) for p in predicted]), features)


def test_without_weights_there_is_no_number_and_no_download(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nobody asked for a download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    scores = metrics.score_images(random_images(), random_images(seed=1))
    assert scores["psnr"] is not None and scores["ssim"] is not None and scores["n"] == 2
    assert set(scores["why_null"]) == {"lpips", "fid", "kid", "kid_squeeze"}
    for name, reason in scores["why_null"].items():
        assert scores[name] is None and "FVGEN_WEIGHTS" in reason and "FVGEN_DOWNLOAD=1" in reason
    assert scores["lpips_net"] is None


def test_a_diverged_prediction_has_no_scores():
    predicted = random_images()
    predicted[0, 0, 0, 0] = torch.nan
    scores = metrics.score_images(predicted, random_images(seed=1))
    assert all(scores[name] is None and "NaN" in scores["why_null"][name] for name in metrics.METRICS)


def test_scoring_leaves_the_global_random_state_alone(squeezenet):
    before = torch.get_rng_state()
    first = metrics.score_images(random_images(), random_images(seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert metrics.score_images(random_images(), random_images(seed=1)) == first


def save_under_its_digest(state, folder, stem):
    """A .pth whose name carries its own SHA-256 digits, as publishers name theirs."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "state")
    digest = hashlib.sha256((folder / "state").read_bytes()).hexdigest()[:8]
    return (folder / "state").rename(folder / f"{stem}-{digest}.pth")


def test_a_download_happens_only_when_asked_for_and_is_checked(monkeypatch, tmp_path):
    source = save_under_its_digest({"weight": torch.ones(2)}, tmp_path / "publisher", "net")
    monkeypatch.setitem(weights.ADDRESSES, source.name, source.parent.as_uri() + "/")
    with pytest.raises(metrics.Unavailable, match="FVGEN_DOWNLOAD=1"):
        weights.locate([source.name])
    monkeypatch.setenv("FVGEN_DOWNLOAD", "1")
    found = weights.locate([source.name])
    assert found == tmp_path / "torch" / "hub" / "checkpoints" / source.name
    assert torch.equal(weights.load_weights(found)["weight"], torch.ones(2))

    monkeypatch.delenv("FVGEN_DOWNLOAD")
    assert weights.locate([source.name]) == found  # from now on it is in the cache

    found.unlink()
    source.write_bytes(b"something else")
    monkeypatch.setenv("FVGEN_DOWNLOAD", "1")
    with pytest.raises(metrics.Unavailable, match="failed"):
        weights.locate([source.name])
    assert not found.exists()


def test_a_weights_folder_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FVGEN_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        metrics.score_images(random_images(), random_images())


def test_a_weights_file_cut_short_is_named(squeezenet, monkeypatch, tmp_path):
    name = weights.SQUEEZENET[0]
    (tmp_path / name).write_bytes((squeezenet / name).read_bytes()[:100_000])
    monkeypatch.setenv("FVGEN_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=f"{name} cannot be used") as caught:
        metrics.score_images(random_images(), random_images())
    assert not isinstance(caught.value, metrics.Unavailable)


def test_a_file_of_another_network_is_refused(squeezenet, monkeypatch, tmp_path):
    shutil.copy(squeezenet / "lpips_squeeze_lin_v0.1.safetensors", tmp_path / weights.SQUEEZENET[0])
    monkeypatch.setenv("FVGEN_WEIGHTS", str(tmp_path))
    for compute in (metrics.lpips, metrics.kid_squeeze):
        with pytest.raises(UserError, match="cannot be used"):
            compute(random_images(), random_images())


def test_random_weights_under_a_known_name_are_refused(monkeypatch, tmp_path):
    torch.save({"features.0.weight": torch.randn(64, 3, 11, 11)}, tmp_path / weights.ALEXNET[0])
    monkeypatch.setenv("FVGEN_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="SHA-256"):
        metrics.lpips(random_images(), random_images())


def test_lpips_takes_its_backbone_from_torch_hubs_cache(monkeypatch, tmp_path):
    from torchvision.models import alexnet

    state = {"features." + key: value for key, value in alexnet().features.state_dict().items()}
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    file = save_under_its_digest(state, cache, "alexnet-owt")
    monkeypatch.setattr(image, "LPIPS_NETS", {"squeezenet1_1-b8a52dc0.pth": "squeeze", file.name: "alex"})
    network, net = image.lpips_network()
    assert net == "alex"
    assert torch.equal(network.net.slice2[1].weight, state["features.3.weight"])
    assert torch.equal(network.net.slice5[0].weight, state["features.10.weight"])
    values, _ = metrics.lpips(random_images(), random_images(seed=1))
    assert values.shape == (2,) and (values > 0).all()


def test_frechet_distance_closed_forms():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).double()
    x = x - x.mean(dim=0)
    shift = torch.arange(6).double()
    assert frechet.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet.frechet_distance(x + shift, x) == pytest.approx(shift.square().sum().item())
    assert frechet.frechet_distance(2 * x, x) == pytest.approx(torch.cov(x.T).trace().item())


def test_kernel_distance_is_the_unbiased_estimate():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 4, generator=generator), torch.randn(7, 4, generator=generator) + 1

    def kernel(a, b):
        return (a.double() @ b.double() / 4 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(a[i], a[j]) for a in (x, y) for i, j in pairs if i != j) / (7 * 6)
    between = sum(kernel(x[i], y[j]) for i, j in pairs) / 49
    assert frechet.kernel_distance(x, y) == pytest.approx((within - 2 * between).item())


def test_kernel_distance_on_subsets_is_repeatable(monkeypatch):
    monkeypatch.setattr(frechet, "KID_SUBSET", 20)
    x = normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.append(frechet.kernel_distance(x, x + 0.5))
    assert values[0] == values[1] != frechet.kernel_distance(x[:20], x[:20] + 0.5)


def test_a_distance_between_sets_needs_two_images():
    with pytest.raises(metrics.Unavailable, match="two images"):
        frechet.kernel_distance(torch.ones(1, 4), torch.ones(1, 4))


def test_inception_features_come_from_the_file_at_hand(monkeypatch, tmp_path):
    """With weights made here (the real ones are 91 MB), under another name than the known one."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch:
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
    file = save_under_its_digest(network.state_dict(), tmp_path / "folder", "made-up")
    monkeypatch.setattr(frechet, "INCEPTION", (file.name,))
    monkeypatch.setenv("FVGEN_WEIGHTS", str(file.parent))
    images = random_images(2)
    features = frechet.inception_features(images)
    torch.testing.assert_close(features, network((images * 255).round().byte()))
    assert features.shape == (2, 2048)


def test_fid_and_kid_share_the_features_of_one_pass(monkeypatch):
    calls = []

    def features(images):
        calls.append(images)
        return images[:, :, 0, 0]

    monkeypatch.setattr(metrics, "inception_features", features)
    predicted, truth = random_images(8), random_images(8, seed=1)
    scores = metrics.score_images(predicted, truth)
    x, y = predicted[:, :, 0, 0], truth[:, :, 0, 0]
    assert (scores["fid"], scores["kid"]) == (frechet.frechet_distance(x, y), frechet.kernel_distance(x, y))
    assert len(calls) == 2


def test_means_by_clip_are_of_its_images_alone():
    predicted, truth = random_images(5, 16, 16), random_images(5, 16, 16, seed=1)
    clip_of = torch.tensor([0, 2, 0, 2, 2])
    scores = metrics.score_images(predicted, truth, clip_of=clip_of)
    for name in ("psnr", "ssim"):
        first = metrics.score_images(predicted[[0, 2]], truth[[0, 2]])[name]
        last = metrics.score_images(predicted[[1, 3, 4]], truth[[1, 3, 4]])[name]
        assert scores["by_clip"][name] == [pytest.approx(first), None, pytest.approx(last)]
        assert scores[name] == pytest.approx((2 * first + 3 * last) / 5)
    assert "lpips" not in scores["by_clip"] and "by_clip" not in metrics.score_images(predicted, truth)
    shown = torch.ones(5, 16, 16, dtype=torch.bool)
    shown[0] = shown[2] = False  # all of the first clip
    assert metrics.score_images(predicted, truth, shown, clip_of)["by_clip"]["psnr"][0] is None
