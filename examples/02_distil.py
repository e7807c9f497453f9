"""A teacher to a student of four steps, by both stages, in a handful of iterations: how, and not how well.

`fvgen demo` does the same for eight minutes, and its student then is as good as the teacher's fifty steps.
"""

from importlib.resources import files

import torch

from fvgen import distill
from fvgen.clips.builtin import builtin_clips
from fvgen.pipelines import FVGenPipeline

OUT = "runs/examples/distil"

settings = distill.read_yaml(str(files("fvgen") / "configs" / "tiny.yaml"))  # the tiny preset, explained line by line
settings |= {"clips": 8, "batch_size": 2, "checkpoint_every": 2}
settings["gan"] |= {"iterations": 4, "head_warmup": 2}  # stage 1: the student against the teacher's own features
settings["dmd"] |= {"iterations": 4}  # stage 2: distribution matching, with a fake score that learns along

config = distill.run_config(settings, out=OUT)  # judged now, whole: an unknown or idle setting is refused by name
folder = distill.run(config)  # the same call again resumes, or finds all done

for row in distill.read_metrics(config.dmd.run.out):
    print({name: round(value, 4) for name, value in row.items() if name.startswith("loss_")})

student = FVGenPipeline.from_pretrained(folder)  # a diffusers pipeline: save it, push it, load it elsewhere
clip = builtin_clips("test", 1)[0]
video = student(clip.render[None], generator=torch.Generator().manual_seed(0))  # [1, F, 3, H, W] in [0, 1]
print(f"{folder}: {student.config.steps} steps make a video of {list(video.shape)}")
