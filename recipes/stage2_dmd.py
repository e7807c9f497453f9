"""Stage 2: softened-reverse-KL distribution matching with a dynamically updated fake score (FVGen, section 4.2).

    python recipes/stage2_dmd.py --config recipes/configs/tiny.yaml init=runs/gan out=runs/dmd [key=value ...]
    deepspeed recipes/stage2_dmd.py --config ... --deepspeed recipes/deepspeed/zero2.json [key=value ...]

``init`` is the folder of a finished stage 1, whose student and discriminator go on learning here. Without it the
student starts as the teacher, which is the ablation that the paper warns of. Writes the same files as stage 1, resumes
likewise.
"""

from __future__ import annotations

from fvgen import distill
from fvgen.system.command import guarded, stage_words


def main() -> None:
    file, settings = stage_words(__doc__)
    config = distill.read_stage_config("dmd", file, settings)
    distill.check_paths(config)  # before the imports that take seconds
    with distill.stopped_by_sigterm():
        trainer = distill.Trainer(config)  # judges teacher, data, init and folders before any work
        student = trainer.train()  # critics and student in turn: fvgen.distill.methods.dmd.Dmd.iterate
    if trainer.world.is_main:
        print(f"Student after stage 2: {student}. It loads with from_pretrained.")


if __name__ == "__main__":
    guarded(main)
