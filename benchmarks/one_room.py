"""Whether camera guidance can learn a camera at all: clips of one room that all begin at one frame.

    python benchmarks/one_room.py --teacher DIR [--iterations 1500] [--paths 64] [--seeds 0] [--work DIR]

What is measured: `method: camera` (dual, uniform timesteps) on many short paths from one camera of one built-in room,
scored on eight other paths there: PSNR along the right path, along another clip's, the difference (camera_gain), and
what the first frame has when it is held still. Three samplings each. Why: where every room has one path, its first
frame tells a network which clip it is, and the path need not be looked at; here nothing but the path tells clips apart.
A gain of nothing here is a fault of the guidance, not of the data.

Writes benchmarks/results/one_room.json and .md; interrupted, the same command goes on. The last line is JSON.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pages import page
from tables import cell, commit, write_results
from wonderland_models import guided_videos, shuffled

from fvgen import distill
from fvgen.clips.builtin import DATA_SEED
from fvgen.clips.clip import Clip
from fvgen.clips.folder import save_clips
from fvgen.clips.rooms import clear_the_way, make_path, make_scene, render_scene, scene_generator
from fvgen.clips.worlds import WORLDS
from fvgen.geometry.trajectories import pan
from fvgen.metrics import psnr
from fvgen.pipelines.folders import load_pipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.system.command import Parser, guarded, positive

WORLD = WORLDS["builtin-coarse"]
TEST, SAMPLINGS = 8, 3
YAW, SHIFT = 50.0, 0.25  # at most: degrees to either side, and scene units along each axis
METRICS = {"right_path": 2, "another_path": 2, "camera_gain": 2, "held_still": 2, "heeded": 3}


def paths_of_a_room(count: int, seed: int, size: tuple[int, int, int]) -> list[Clip]:
    """Clips of ``size`` (frames, height, width) from the first camera of the world's first room, each turning and
    moving by random amounts."""
    split = f"{WORLD.name}-train"
    generator = scene_generator(split, DATA_SEED, 0)
    scene = make_scene(generator, split, WORLD)
    path = make_path(generator, scene, *size, WORLD)
    scene, rng = clear_the_way(scene, path), torch.Generator().manual_seed(seed)
    known = torch.arange(size[0]) == 0
    clips = []
    for number in range(count):
        yaw = (YAW * (2 * torch.rand(2, generator=rng) - 1)[0]).item()
        turned = pan(path[:1], size[0], yaw=yaw)
        pose = turned.world_from_cam.clone()
        shift = (torch.rand(3, generator=rng) * 2 - 1) * SHIFT
        pose[:, :3, 3] += torch.linspace(0, 1, size[0])[:, None] * shift
        cameras = replace(turned, world_from_cam=pose.float(), intrinsics=turned.intrinsics.float())
        frames = render_scene(scene, cameras)[0].clamp(0, 1)
        clips.append(Clip(f"p{number}", frames, frames, known, cameras))
    return clips


def measured(args: Any, seed: int) -> dict[str, float]:
    """Train, or take what is there, and score."""
    base = load_pipeline(args.teacher, TeacherPipeline)
    size = base.frames, *base.frame_size
    data, out = args.work / "clips", args.work / f"run-{seed}"
    if not (data / "index.json").is_file():
        save_clips(data, paths_of_a_room(args.paths, 0, size), {"kind": "one room"})
    words = {"out": str(out), "teacher": str(args.teacher), "data": str(data), "clips": args.paths, "seed": seed}
    words |= {"branch": "dual", "control_blocks": 3, "camera_lora_rank": 8, "encoder_width": 64, "student_lr": 1e-3}
    words |= {
        "batch_size": 4,
        "checkpoint_every": 100,
        "iterations": args.iterations,
        "ema_decay": 0.95,
        "sample_every": 0,
        "track": False,
        "device": args.device,
    }
    model = distill.run(distill.stage_config("camera", words))
    clips = paths_of_a_room(TEST, 1, size)
    found: dict[str, list[float]] = {"right_path": [], "another_path": []}
    for sampling in range(SAMPLINGS):
        for name, asked in (("right_path", clips), ("another_path", shuffled(clips))):
            videos = guided_videos(model, asked, args, sampling)
            found[name].append(score([video[1:] for video in videos], clips))
    scores = {name: mean(values) for name, values in found.items()}
    heeded = [row["camera_heeded"] for row in distill.read_metrics(out) if "camera_heeded" in row]
    return scores | {
        "camera_gain": scores["right_path"] - scores["another_path"],
        "held_still": score([clip.truth[:1].expand(len(clip.truth) - 1, -1, -1, -1) for clip in clips], clips),
        "heeded": mean(heeded[-10:]),
    }


def score(videos: list[torch.Tensor], clips: list[Clip]) -> float:
    """PSNR of all frames behind the first."""
    return mean(psnr(video, clip.truth[1:]).mean().item() for video, clip in zip(videos, clips, strict=True))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of an image-to-video teacher")
    parser.add_argument("--iterations", type=positive, default=1500)
    parser.add_argument("--paths", type=positive, default=64, help="to learn from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=positive, default=20, help="of the sampler")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/one-room"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    by_seed = {seed: measured(args, seed) for seed in args.seeds}
    rows = [
        {"seed": seed} | {name: cell(found[name], n) for name, n in METRICS.items()} for seed, found in by_seed.items()
    ]
    settings = {"commit": commit(), "teacher": args.teacher.name, "paths": args.paths, "iterations": args.iterations}
    remarks = ["PSNR in dB of eight unseen paths; heeded: `camera_heeded`, the mean of its last ten values."]
    text = page("Camera guidance in one room", "one_room.py", remarks, {"settings": settings, "parts": {"rows": rows}})
    write_results(args.out, "one_room", settings | {"by_seed": by_seed}, text)
    print(json.dumps(by_seed))


if __name__ == "__main__":
    guarded(main)
