"""Models on the same clips and the same noise: the teacher in more and fewer steps against the render it was given."""

import json
import math
from pathlib import Path

from fvgen.clips.builtin import builtin_clips
from fvgen.pipelines.folders import load_pipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.reports.evaluate import evaluate, score, score_renders, score_videos, teacher_contestant

OUT = Path("runs/examples/scores.json")
METRICS = ("psnr", "ssim", "lpips", "kid_squeeze")

teacher = load_pipeline("tiny", TeacherPipeline)  # or a model folder, a student among them
clips = list(builtin_clips("test", 3))  # or fvgen.reports.data.open_clips: shards, folders, scenes
contestants = {f"teacher, {steps} steps": teacher_contestant(teacher, steps) for steps in (2, 8)}

results = evaluate(contestants, clips, teacher, seed=0)
rows = {"render": score_renders(clips)} | {name: score(result, clips) for name, result in results.items()}
for name, row in rows.items():
    values = ", ".join(f"{metric} {row[metric]:.3f}" for metric in METRICS if row[metric] is not None)
    print(f"{name}: {values}; {row['nfe']} evaluations, {row['n']} new views")
for metric, reason in rows["render"]["why_null"].items():  # never zero, never guessed
    print(f"{metric} has no value: {reason}")

# Two models on the same clips differ by pairs: the mean of the differences, and what three clips leave open about it.
two, eight = (
    [score_videos([video], [clip])["psnr"] for video, clip in zip(result.videos, clips, strict=True)]
    for result in results.values()
)
gains = [more - fewer for more, fewer in zip(eight, two, strict=True)]
mean = sum(gains) / len(gains)
error = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))
print(f"eight steps over two: {mean:+.2f} dB PSNR, standard error {error:.2f}")

OUT.parent.mkdir(parents=True, exist_ok=True)
OUT.write_text(json.dumps(rows, indent=1))
