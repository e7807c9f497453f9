"""The README's picture: render, teacher, student and truth of clips that chose no setting, moving side by side.

    make demo && python benchmarks/picture.py [--student runs/demo/student] [--clips 16 17] [--out docs/walk.gif]

A row a clip: what the networks are given, the teacher's fifty guided steps, the student's four, and the true frames.
Seeds are the demo's. Frames are 48x64, shown twice as large, and only those that nobody was given. The last line is
JSON: PSNR of every column, dB.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fvgen.clips.builtin import DATA_SEED, FRAMES, HEIGHT, WIDTH
from fvgen.clips.clip import to_bytes
from fvgen.clips.rooms import synthetic_clip
from fvgen.metrics.image import psnr
from fvgen.pipelines.folders import load_pipeline
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.reports.evaluate import evaluate, student_contestant, teacher_contestant
from fvgen.system.command import Parser, guarded
from fvgen.system.files import atomic_path

SCALE, GAP, HEAD, MILLISECONDS = 2, 4, 14, 250


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--student", default="runs/demo/student", help="model folder")
    parser.add_argument("--clips", type=int, nargs="+", default=[16, 17], help="numbers of built-in held-out clips")
    parser.add_argument("--out", type=Path, default=Path("docs/walk.gif"))
    args = parser.parse_args()

    teacher, student = load_pipeline("tiny", TeacherPipeline), load_pipeline(args.student, StudentPipeline)
    clips = [synthetic_clip("test", DATA_SEED, number, FRAMES, HEIGHT, WIDTH) for number in args.clips]
    made = evaluate({"teacher": teacher_contestant(teacher), "student": student_contestant(student)}, clips, teacher, 0)
    evaluations = {name: result.contestant.nfe for name, result in made.items()}
    columns = {"render": [clip.render for clip in clips]}
    columns |= {f"{name}, {evaluations[name]} evaluations": result.videos for name, result in made.items()}
    columns["truth"] = [clip.truth for clip in clips]
    new = [torch.nonzero(~clip.known).flatten().tolist() for clip in clips]
    columns = {
        name: [video[chosen] for video, chosen in zip(videos, new, strict=True)] for name, videos in columns.items()
    }
    pictures = [
        drawn({name: [video[frame] for video in videos] for name, videos in columns.items()})
        for frame in range(min(map(len, new)))
    ]
    with atomic_path(args.out) as temporary:
        pictures[0].save(temporary, "GIF", save_all=True, append_images=pictures[1:], duration=MILLISECONDS, loop=0)
    *shown, truth = (torch.cat(videos) for videos in columns.values())
    print(json.dumps({name: round(psnr(x, truth).mean().item(), 2) for name, x in zip(columns, shown, strict=False)}))


def drawn(columns: dict[str, list[Tensor]]) -> Image.Image:
    """One picture of images [3, H, W] in [0, 1], a column a name, in 64 colours: a GIF grows with each."""
    height, width = SCALE * HEIGHT, SCALE * WIDTH
    rows = len(next(iter(columns.values())))
    page = Image.new("RGB", (len(columns) * (width + GAP) - GAP, HEAD + rows * (height + GAP) - GAP), "white")
    pen = ImageDraw.Draw(page)
    for x, (name, images) in enumerate(columns.items()):
        pen.text((x * (width + GAP), 0), name, fill="black", font_size=10)
        for y, image in enumerate(images):
            shown = Image.fromarray(to_bytes(image).permute(1, 2, 0).contiguous().numpy())
            page.paste(
                shown.resize((width, height), Image.Resampling.NEAREST), (x * (width + GAP), HEAD + y * (height + GAP))
            )
    return page.quantize(64, dither=Image.Dither.NONE)


if __name__ == "__main__":
    guarded(main)
