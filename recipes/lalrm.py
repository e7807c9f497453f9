"""Latents to 3D Gaussians (Wonderland's LaLRM): a network beside a frozen VAE, learnt from views on and off the path.

    python recipes/lalrm.py --config recipes/configs/wonderland/lalrm-tiny.yaml out=runs/lalrm [key=value ...]
    deepspeed recipes/lalrm.py --config ... --deepspeed recipes/deepspeed/zero2.json [key=value ...]

Writes out/metrics.jsonl (a line per iteration), out/log.txt (how far it is), out/checkpoints, and at the end out/model:
the teacher's pipeline folder with a LaLRM in it. The same command again resumes; `teacher=out/model` with other data is
the next stage. Settings: `fvgen.distill.settings`, and the method's own in `fvgen.distill.methods.lalrm`;
docs/wonderland.md says what they are.
"""

from __future__ import annotations

from fvgen import distill
from fvgen.system.command import guarded, stage_words


def main() -> None:
    file, settings = stage_words(__doc__)
    config = distill.read_stage_config("lalrm", file, settings)
    distill.check_paths(config)  # before the imports that take seconds
    with distill.stopped_by_sigterm():
        trainer = distill.Trainer(config)  # judges teacher, data and folders before any work
        model = trainer.train()  # fvgen.distill.methods.lalrm.Lalrm.iterate
    if trainer.world.is_main:
        print(f"Model: {model}. Next: fvgen generate PHOTOGRAPH --model {model} --trajectory dolly --scene --out DIR")


if __name__ == "__main__":
    guarded(main)
