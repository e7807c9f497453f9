"""Wonderland's claims in small: cameras that are obeyed, and scenes straight from latents.

    python benchmarks/wonderland.py --teacher DIR --part camera|lalrm|end-to-end [--rows NAME ...] [--seeds 0 1 2]
        [--iterations 600] [--train 256] [--clips 16] [--device cuda] [--work DIR] [--name NAME]

The teacher is an image-to-video model of CogVideoX's kind that knows no camera
(`python recipes/train_cogvideox_world.py --image-condition first`). Scored are test clips of the built-in world.

--part camera: the base, and all of the paper's ablation, each trained for as many iterations. R_err and T_err of the
generated frames' cameras, found by matching them to the known scene (`fvgen.metrics.pose_matching`); T_err under both
of the paper's rules and (T_err_scene) in the scene's own scale, over the path's extent. Names in "_all" count frames
that could not be matched as frames that stayed at the first camera. camera_gain: dB of PSNR that the right path gives
over another clip's. --part lalrm: Gaussians from latents of true frames, at views off the path, against what needs no
training. --part end-to-end: from the first frame and the path alone, by a guided model and a LaLRM, which are trained
now or given (--guide and --lalrm, {seed} in their paths).

Every row and seed leaves WORK/PART/ROW/SEED.json; the same command goes on where it stopped. Differences are paired by
seed. Writes benchmarks/results/NAME-PART.json and .md; the last line is JSON.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import wonderland_models as models
import wonderland_rows as rows
from pages import page
from tables import Claim, cell, claim_row, claim_table, commit, write_results
from wonderland_paper import CLAIMS, METRICS, PAPER, ROWS

from fvgen.clips.builtin import DATA_SEED
from fvgen.clips.clip import Clip
from fvgen.clips.folder import ClipFolder
from fvgen.clips.rooms import drawn_scene, render_scene, synthetic_clip
from fvgen.clips.worlds import WORLDS
from fvgen.errors import UserError
from fvgen.metrics.pose_matching import Render
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json

Size = tuple[int, int, int]
"""Frames, height and width."""


# --- Clips whose scenes are known ---


def test_clips(args: Any, size: Size, split: str = "test", count: int = 0) -> list[Clip]:
    """With views off the path; only the first frame is given."""
    chosen = range(args.first, args.first + args.clips) if split == "test" else range(count)
    made = [synthetic_clip(split, DATA_SEED, i, *size, WORLDS[args.data], args.others) for i in chosen]
    known = torch.zeros(size[0], dtype=torch.bool)
    known[0] = True
    return [replace(clip, known=known) for clip in made]


def true_render(args: Any, size: Size, index: int) -> Render:
    """The scene of a test clip, ray-cast, without the objects that its path has no room for."""
    scene, _, _ = drawn_scene("test", DATA_SEED, index, *size, WORLDS[args.data])
    return partial(render_scene, scene)


# --- Rows ---


def camera_row(name: str, args: Any, seed: int) -> dict[str, Any]:
    """Train, make videos along the right paths and along others', and score them."""
    if name == "warped by true depth":
        return warped_row(args)
    words, folder = ROWS["camera"][name] or {}, args.teacher
    if words:
        trained = words.get("of", name)
        folder = models.train_camera(ROWS["camera"][trained], args, out_of(args, "camera", trained, seed), seed)
    weight = words.get("camera_guidance", 1.0)
    size = size_of(args)
    clips = test_clips(args, size)
    renders = [true_render(args, size, args.first + place) for place in range(args.clips)]
    asked = models.guided_videos(folder, clips, args, seed, weight)
    # A model that sees no camera makes the same of every path.
    other = models.guided_videos(folder, models.shuffled(clips), args, seed, weight) if words else asked
    return rows.score_guided(asked, other, clips, renders)


def warped_row(args: Any) -> dict[str, Any]:
    """The first frame, carried along the right paths and along others' by its true depth: what needs no training, and
    knows what no photograph tells."""
    size = size_of(args)
    clips = test_clips(args, size)

    def along(paths: Sequence[Clip]) -> list[torch.Tensor]:
        return [
            rows.warped(clip.truth[0], clip.others.depth[0], clip.cameras[[0]], path.cameras)
            for clip, path in zip(clips, paths, strict=True)
        ]

    renders = [true_render(args, size, args.first + place) for place in range(args.clips)]
    return rows.score_guided(along(clips), along(models.shuffled(clips)), clips, renders)


def lalrm_row(name: str, args: Any, seed: int) -> dict[str, Any]:
    """Views off the paths of clips whose frames are true."""
    clips = test_clips(args, size_of(args))
    if (row := untrained(name, args, seed)) is not None:
        return rows.by_clip(row, clips)
    pipeline = load_pipeline(trained_lalrm(name, args, seed), TeacherPipeline).to(args.device)

    def row(clip: Clip) -> torch.Tensor:
        made = models.gaussians_of(pipeline, models.true_latents(pipeline, clip, seed), clip)
        return rows.shown(made, clip.others.cameras)

    return rows.by_clip(row, clips)


def end_to_end_row(name: str, args: Any, seed: int) -> dict[str, Any]:
    """Views off the path from the first frame and the path."""
    clips = test_clips(args, size_of(args))
    if name == "warped by true depth":
        return rows.by_clip(untrained(name, args, seed), clips)
    pipeline = load_pipeline(trained_guide(args, seed), TeacherPipeline).to(args.device)
    if name == "nearest generated frame":

        def row(clip: Clip) -> torch.Tensor:
            video = pipeline.decode_latents(models.guided_latents(pipeline, clip, args, seed, GUIDE_WEIGHT))[0].cpu()
            return rows.nearest(video, clip.cameras, clip.others.cameras)
    else:
        source = name.removeprefix("camera model, ")
        lalrm = load_pipeline(trained_lalrm(source, args, seed), TeacherPipeline).to(args.device)

        def row(clip: Clip) -> torch.Tensor:
            made = models.gaussians_of(lalrm, models.guided_latents(pipeline, clip, args, seed, GUIDE_WEIGHT), clip)
            return rows.shown(made, clip.others.cameras)

    return rows.by_clip(row, clips)


def untrained(name: str, args: Any, seed: int) -> Any:
    """A row that needs no training, or None."""

    def fitted(clip: Clip, known: bool = False) -> torch.Tensor:
        depth = clip.others.depth[: len(clip.truth)] if known else None
        made, _ = rows.fitted(clip.truth, clip.cameras, args.fit_seconds, depth, seed)
        return rows.shown(made, clip.others.cameras)

    return {
        "warped by true depth": lambda c: rows.warped(c.truth[0], c.others.depth[0], c.cameras[[0]], c.others.cameras),
        "nearest frame": lambda c: rows.nearest(c.truth, c.cameras, c.others.cameras),
        "cross-fade": lambda c: rows.cross_fade(c.truth, c.cameras, c.others.cameras),
        "fit to the frames": fitted,
        "fit from true depth": partial(fitted, known=True),
    }.get(name)


def trained_lalrm(name: str, args: Any, seed: int) -> Path:
    """The folder of a row of --part lalrm, trained now if need be; stage 2 needs a guided model."""
    if name == "LaLRM" and args.lalrm:
        return Path(args.lalrm.format(seed=seed))
    out = out_of(args, "lalrm", name, seed)
    if name != "LaLRM, stage 2":
        return models.train_lalrm(ROWS["lalrm"][name], args, out, seed)
    start = trained_lalrm("LaLRM", args, seed)
    sources = test_clips(args, size_of(args), "train", args.generated)
    guide = trained_guide(args, seed)
    generated = models.generated_clips(guide, sources, args, seed, out.parent / f"generated-{seed}", GUIDE_WEIGHT)
    return models.train_lalrm_further(start, ROWS["lalrm"]["LaLRM"], generated, args, out, seed)


def trained_guide(args: Any, seed: int) -> Path:
    """The folder of the guided model of --part end-to-end and of stage 2, trained now if need be."""
    if args.guide:
        return Path(args.guide.format(seed=seed))
    return models.train_camera(ROWS["camera"][GUIDE], args, out_of(args, "camera", GUIDE, seed), seed)


def size_of(args: Any) -> Size:
    pipeline = load_pipeline(args.teacher, TeacherPipeline)
    return pipeline.frames, *pipeline.frame_size


def out_of(args: Any, part: str, name: str, seed: int) -> Path:
    return args.work / part / name.replace(" ", "-").replace("/", "-") / f"run-{seed}"


GUIDE, GUIDE_WEIGHT = "dual, early steps", 3.0
OF_A_CALL = ("part", "rows", "seeds", "device", "work", "name", "out")  # a row is the same whatever these are
SEEDLESS = ("warped by true depth", "nearest frame", "cross-fade")
MAKERS = {"camera": camera_row, "lalrm": lalrm_row, "end-to-end": end_to_end_row}


def results_of(args: Any, name: str, seed: int) -> Path:
    return out_of(args, args.part, name, seed).parent / f"{seed}.json"


def judge_work(args: Any) -> None:
    """Raises UserError where --work holds rows of this part that were asked for otherwise: they are not compared."""
    asked = {name: str(value) for name, value in sorted(vars(args).items()) if name not in OF_A_CALL}
    file = args.work / args.part / "asked.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asked)
    for name, found in json.loads(file.read_text()).items():
        if found != asked.get(name):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{args.work} holds rows of {option} {found}, not {asked.get(name)}; give another --work")


def run_missing(args: Any) -> None:
    """All chosen rows that have no results yet."""
    for seed in args.seeds:
        for name in args.rows:
            file = results_of(args, name, seed)
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                same = results_of(args, name, args.seeds[0])  # of what draws nothing
                known = name in SEEDLESS and same.is_file()
                write_json(file, json.loads(same.read_text()) if known else MAKERS[args.part](name, args, seed))
                print(time.strftime("%H:%M:%S"), args.part, name, f"seed {seed}", flush=True)


# --- The page ---


def collected(args: Any) -> dict[str, list[dict[str, Any]]]:
    """Rows that have all their seeds, a dictionary a seed."""
    found = {}
    for name in ROWS[args.part]:
        files = [results_of(args, name, seed) for seed in args.seeds]
        if all(file.is_file() for file in files):
            found[name] = [json.loads(file.read_text()) for file in files]
    return found


def summary(part: str, by_row: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Means over seeds, and the claims."""
    means: dict[str, dict[str, Any]] = {}
    for name, seeds in by_row.items():
        columns = {metric: [seed.get(metric) for seed in seeds] for metric in METRICS[part]}
        means[name] = {metric: None if None in x else statistics.mean(x) for metric, x in columns.items()}
    return {"rows": means, "claims": [claim_row(Claim(*claim), by_row) for claim in CLAIMS[part]]}


def markdown(part: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    table = [
        {"": name} | {metric: cell(row[metric], digits) for metric, digits in METRICS[part].items()}
        for name, row in found["rows"].items()
    ]
    parts = {"rows": table, "what the paper says": claim_table(found["claims"])} | PAPER[part]
    remarks = ["Means over seeds. A claim's difference is paired by seed, with its 95 % interval."]
    return page(f"Wonderland in small: {part}", "wonderland.py", remarks, {"settings": settings, "parts": parts})


def parser() -> Parser:
    words = Parser(__doc__)
    words.add_argument("--teacher", type=Path, required=True, help="folder of an image-to-video teacher")
    words.add_argument("--part", choices=list(ROWS), required=True)
    words.add_argument("--rows", nargs="+", metavar="ROW", help="all of the part's if not given")
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--data", default="builtin-closed", choices=list(WORLDS))
    words.add_argument("--train", type=positive, default=256, help="built-in clips to learn from")
    words.add_argument("--folder", type=Path, help="of clips with cameras and other views, to learn from instead")
    words.add_argument("--clips", type=positive, default=16, help="clips to score")
    words.add_argument("--first", type=int, default=16, help="the first of them: earlier ones chose settings")
    words.add_argument("--others", type=positive, default=8, help="views off each clip's path")
    words.add_argument("--steps", type=positive, default=20, help="of the teacher's sampler")
    words.add_argument("--batch", type=positive, default=4)
    words.add_argument("--iterations", type=positive, default=600, help="of camera guidance")
    words.add_argument("--rate", type=float, default=1e-3, help="of camera guidance")
    words.add_argument("--lora-rank", type=positive, default=8)
    words.add_argument("--encoder-width", type=positive, default=64)
    words.add_argument("--lalrm-iterations", type=positive, default=2000)
    words.add_argument("--own-iterations", type=int, default=700, help="first ones of LaLRM, in which none is drawn")
    words.add_argument("--stage2-iterations", type=positive, default=300)
    words.add_argument("--generated", type=positive, default=50, help="clips of stage 2")
    words.add_argument("--lalrm-rate", type=float, default=6e-4)
    words.add_argument("--width", type=positive, default=192, help="of LaLRM")
    words.add_argument("--layers", type=positive, default=6, help="of LaLRM")
    words.add_argument("--lalrm-batch", type=positive, default=1)
    words.add_argument("--planes", type=int, default=24, help="of LaLRM's sweep")
    words.add_argument("--views", type=positive, default=2, help="of each kind, seen and unseen, in LaLRM's updates")
    words.add_argument("--perceptual", type=float, default=0.0, help="weight of LPIPS in LaLRM's loss")
    words.add_argument("--fit-seconds", type=float, default=1.0, help="a scene, of the fits")
    words.add_argument("--guide", help="guided models for --part end-to-end, {seed} in their paths; else trained now")
    words.add_argument("--lalrm", help="LaLRMs for the same, where their data are not the guided model's")
    words.add_argument("--device", default="cpu")
    words.add_argument("--work", type=Path, default=Path("runs/wonderland"))
    words.add_argument("--name", default="wonderland-tiny")
    words.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return words


def main() -> None:
    words = parser()
    args = words.parse_args()
    args.rows = args.rows or list(ROWS[args.part])
    if unknown := [name for name in args.rows if name not in ROWS[args.part]]:
        words.error(f"--rows {unknown[0]!r} is none of --part {args.part}; choose among {', '.join(ROWS[args.part])}")
    check_device(args.device)
    judge_work(args)
    run_missing(args)
    by_row = collected(args)
    found = summary(args.part, by_row)
    learnt = len(ClipFolder(args.folder)) if args.folder else args.train
    settings = {
        "commit": commit(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {args.device}",
        "teacher": args.teacher.name,
        "data": f"{args.data}, test clips {args.first} to {args.first + args.clips - 1}, {learnt} to learn from",
        "seeds": args.seeds,
    }
    if args.part != "lalrm":
        settings["camera guidance"] = f"{args.iterations} iterations of {args.batch} clips, rate {args.rate:g}"
    if args.part != "camera":
        drawn = args.lalrm_iterations - args.own_iterations
        settings["LaLRM"] = (
            f"{args.own_iterations} iterations undrawn, {drawn} drawn, of {args.lalrm_batch} clips, {2 * args.views} "
            f"views; rate {args.lalrm_rate:g}, width {args.width}, layers {args.layers}, planes {args.planes}, weight "
            f"of LPIPS {args.perceptual:g}"
        )
    result = {**settings, **found, "paper": PAPER[args.part], "by_seed": by_row}
    write_results(args.out, f"{args.name}-{args.part}", result, markdown(args.part, found, settings))
    print(json.dumps(found))


if __name__ == "__main__":
    guarded(main)
