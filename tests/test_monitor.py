"""What is seen of a run beside its metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from small_models import FRAMES, HEIGHT, WIDTH

from fvgen.diagnosis.series import read_series
from fvgen.distill import Trainer, read_metrics, run
from fvgen.distill.monitor import SEEDS, sample_clips, write_strips
from fvgen.models.family import Size
from fvgen.planning.plan import teacher_blueprint
from fvgen.planning.simulate import simulate


def monitored(out: str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "monitor.jsonl").read_text().splitlines()]


def test_what_differs_between_equal_runs_stands_apart(stage):
    config = stage(iterations=3)
    run(config)
    rows = monitored(config.run.out)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    for row, metrics in zip(rows, read_metrics(config.run.out), strict=True):
        assert row["seconds"] > 0 and row["peak_memory_gb"] > 0.1 and row["logit_abs"] > 0
        assert row["clips_per_second"] == pytest.approx(config.data.batch_size / row["seconds"], rel=0.05)
        assert 0 < row["data_seconds"] < row["seconds"]
        assert not row.keys() & metrics.keys() - {"iteration"} and not any("/" in key for key in metrics)


def test_the_reached_rate_is_counted_work_per_second(stage, teacher_folder):
    config = stage("dmd", iterations=3, head_warmup=1, critic_updates=1)
    run(config)
    family, blueprint = teacher_blueprint(str(teacher_folder))
    rows = monitored(config.run.out)
    work = [row["flops_per_second"] * row["seconds"] for row in rows]
    expected = simulate(config, family, blueprint, Size(config.data.batch_size, FRAMES, HEIGHT, WIDTH)).flops
    assert work[1] == pytest.approx(expected, rel=0.01) and work[2] == pytest.approx(expected, rel=0.01)
    assert work[0] < 0.7 * expected  # critics alone


def test_curves_that_cannot_be_drawn_are_not_worth_a_run(stage, capsys):
    pytest.importorskip("tensorboard")
    config = stage(iterations=1)
    Path(config.run.out).mkdir()
    (Path(config.run.out) / "config.yaml").write_text(yaml.safe_dump(config.words()))
    (Path(config.run.out) / "tensorboard").write_text("in the way")
    assert run(config).is_dir()
    assert "fvgen: goes on without these curves" in capsys.readouterr().err


def test_sample_clips_change_no_number(stage, tmp_path):
    silent = stage(iterations=5, sample_every=0)
    seen = stage(iterations=5, sample_every=2, out=str(tmp_path / "seen"))
    run(silent)
    run(seen)
    assert (Path(silent.run.out) / "metrics.jsonl").read_bytes() == (Path(seen.run.out) / "metrics.jsonl").read_bytes()
    assert not (Path(silent.run.out) / "samples").exists()
    pictures = sorted(path.name for path in (Path(seen.run.out) / "samples").iterdir())
    assert pictures == ["00000002.png", "00000004.png", "00000005.png", "truth.png"]  # the last iteration as well
    for name, strips in zip(pictures, (SEEDS, SEEDS, SEEDS, 1), strict=True):
        with Image.open(Path(seen.run.out) / "samples" / name) as picture:
            assert picture.size == (FRAMES * WIDTH, strips * HEIGHT)
            assert picture.text == {"strips": str(strips), "frames": str(FRAMES)}
    spreads = [row.get("seed_spread") for row in monitored(seen.run.out)]
    assert spreads[0] is spreads[2] is None and all(spreads[place] > 0 for place in (1, 3, 4))


def test_strips_of_clips_are_read_as_they_were_written(tmp_path):
    videos = torch.rand(2, 3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    write_strips(tmp_path / "samples" / "00000001.png", videos)
    read = read_series(tmp_path).last.clips
    assert read.shape == (2, 3, 5, 7, 3)
    assert abs(torch.from_numpy(read.copy()).permute(0, 1, 4, 2, 3) - videos).max() <= 0.5 / 255 + 1e-6


def test_the_fake_scores_error_stands_beside_the_teachers_at_the_same_noise(stage):
    """Before it has learnt the fake score is the teacher, and so is its error, where nothing guides the real score."""
    config = stage("dmd", iterations=3, fake_score_lr=1e-12, guidance=1.0)
    run(config)
    for row in monitored(config.run.out):
        assert row["error_fake"] == pytest.approx(row["error_teacher"], rel=1e-3) and row["error_fake"] > 0


def test_a_student_that_ignores_its_noise_has_no_spread(stage):
    trainer = Trainer(stage())
    clips, spread = sample_clips(trainer.method, trainer.latents, trainer.config)
    assert clips.shape[0] == SEEDS and spread > 0.01

    class Constant:
        samples = "latents"

        def sample(self, batch, seed):
            return torch.ones_like(batch.latents)

    assert sample_clips(Constant(), trainer.latents, trainer.config)[1] == 0


def test_curves_for_tensorboard_where_it_is_installed(stage):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = stage(iterations=2, sample_every=2)
    run(config)
    events = EventAccumulator(str(Path(config.run.out) / "tensorboard"))
    events.Reload()
    scalars = [event.value for event in events.Scalars("loss_head")]
    assert scalars == pytest.approx([row["loss_head"] for row in read_metrics(config.run.out)])
    assert "clips_per_second" in events.Tags()["scalars"] and events.Tags()["images"] == ["sample"]
    run(stage(iterations=2, track=False, out=config.run.out + "-untracked"))
    assert not (Path(config.run.out + "-untracked") / "tensorboard").exists()
