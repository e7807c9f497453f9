"""Camera guidance (Wonderland): an image-to-video teacher learns to follow a camera path, and stays a teacher.

    python recipes/camera.py --config recipes/configs/wonderland/camera-tiny.yaml out=runs/camera [key=value ...]
    deepspeed recipes/camera.py --config ... --deepspeed recipes/deepspeed/zero2.json [key=value ...]

Writes out/metrics.jsonl (a line per iteration), out/log.txt (how far it is), out/checkpoints, and at the end
out/teacher (a pipeline folder), which the other recipes take as `teacher=`. The same command again resumes. Settings:
`fvgen.distill.settings`, and the method's own in `fvgen.distill.methods.camera`; docs/wonderland.md says what they are.
"""

from __future__ import annotations

from fvgen import distill
from fvgen.system.command import guarded, stage_words


def main() -> None:
    file, settings = stage_words(__doc__)
    config = distill.read_stage_config("camera", file, settings)
    distill.check_paths(config)  # before the imports that take seconds
    with distill.stopped_by_sigterm():
        trainer = distill.Trainer(config)  # judges teacher, data and folders before any work
        teacher = trainer.train()  # fvgen.distill.methods.camera.Camera.iterate
    if trainer.world.is_main:
        print(f"Teacher: {teacher}. Next: python recipes/stage1_gan.py --config FILE teacher={teacher} out=DIR")


if __name__ == "__main__":
    guarded(main)
