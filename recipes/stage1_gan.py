"""Stage 1: GAN initialisation of a few-step student against its frozen teacher (FVGen, section 4.1).

    python recipes/stage1_gan.py --config recipes/configs/tiny.yaml out=runs/gan iterations=200 [key=value ...]
    deepspeed recipes/stage1_gan.py --config ... --deepspeed recipes/deepspeed/zero2.json [key=value ...]

Writes out/metrics.jsonl (a line per iteration), out/log.txt (how far it is), out/checkpoints, and at the end
out/student (a pipeline folder) and out/head (the discriminator). The same command again resumes. Settings:
`fvgen.distill.settings`, and the method's own in `fvgen.distill.methods.dmd_settings`.
"""

from __future__ import annotations

from fvgen import distill
from fvgen.system.command import guarded, stage_words


def main() -> None:
    file, settings = stage_words(__doc__)
    config = distill.read_stage_config("gan", file, settings)
    distill.check_paths(config)  # before the imports that take seconds
    with distill.stopped_by_sigterm():
        trainer = distill.Trainer(config)  # judges teacher, data and folders before any work
        student = trainer.train()  # critics and student in turn: fvgen.distill.methods.dmd.Dmd.iterate
    if trainer.world.is_main:
        print(f"Student after stage 1: {student}. Next: python recipes/stage2_dmd.py ... init={config.run.out} out=DIR")


if __name__ == "__main__":
    guarded(main)
