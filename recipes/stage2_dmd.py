"""Stage 2: softened-reverse-KL distribution matching with a dynamically updated fake score (FVGen, section 4.2).

    python recipes/stage2_dmd.py --config recipes/configs/tiny.yaml init=runs/gan out=runs/dmd [key=value ...]
    deepspeed recipes/stage2_dmd.py --config ... --deepspeed recipes/deepspeed/zero2.json [key=value ...]

``init`` is the folder of a finished stage 1, whose student and discriminator go on learning here. Without it the
student starts as the teacher, which is the ablation that the paper warns of. Writes the same files as stage 1, resumes
likewise.
"""

from __future__ import annotations

from fvgen import distill
from fvgen.system.command import Parser, deepspeed_setting, guarded


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, help="YAML file of settings")
    parser.add_argument("--deepspeed", default="", help="JSON file of DeepSpeed settings; none trains in one process")
    parser.add_argument("--local_rank", type=int, default=0, help="the deepspeed launcher's own; RANK counts")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that differ from the file")
    args = parser.parse_intermixed_args()

    config = distill.read_stage_config("dmd", args.config, deepspeed_setting(args.deepspeed) + args.settings)
    distill.check_paths(config)  # before the imports that take seconds
    with distill.stopped_by_sigterm():
        trainer = distill.Trainer(config)  # judges teacher, data, init and folders before any work
        student = trainer.train()  # critics and student in turn: fvgen.distill.methods.dmd.Dmd.iterate
    if trainer.world.is_main:
        print(f"Student after stage 2: {student}. It loads with from_pretrained.")


if __name__ == "__main__":
    guarded(main)
