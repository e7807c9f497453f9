"""Leap flow distillation (VideoScene): a student of one evaluation that starts from a noised render.

    python recipes/leap.py --config recipes/configs/videoscene/tiny.yaml out=runs/leap [key=value ...]
    deepspeed recipes/leap.py --config ... --deepspeed recipes/deepspeed/zero2.json [key=value ...]

Writes out/metrics.jsonl (a line per iteration), out/log.txt (how far it is), out/checkpoints, and at the end
out/student (a pipeline folder). The same command again resumes; `fvgen policy` then learns where to land. Settings:
`fvgen.distill.settings`, and the method's own in `fvgen.distill.methods.leap`; docs/videoscene.md says what they are.
"""

from __future__ import annotations

from fvgen import distill
from fvgen.system.command import guarded, stage_words


def main() -> None:
    file, settings = stage_words(__doc__)
    config = distill.read_stage_config("leap", file, settings)
    distill.check_paths(config)  # before the imports that take seconds
    with distill.stopped_by_sigterm():
        trainer = distill.Trainer(config)  # judges teacher, data and folders before any work
        student = trainer.train()  # fvgen.distill.methods.leap.Leap.iterate
    if trainer.world.is_main:
        print(f"Student: {student}. Next: fvgen policy {config.run.out} --data {config.data.data}")


if __name__ == "__main__":
    guarded(main)
