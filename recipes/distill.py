"""All stages of a method, one after the other: `recipes/configs/rivals` has a file for each.

    python recipes/distill.py recipes/configs/rivals/fvgen.yaml out=runs/fvgen [key=value ...] [STAGE.key=value ...]

A file names its stages (`stages: [gan, dmd]`), settings for all on top and those of a stage in a section of its name.
Two methods differ by what `diff` shows of their files. Stage k writes out/stage<k>_<name>; the same command again
resumes, finished stages are passed over. The last line is JSON: the folder of the final student, and of every stage.
"""

from __future__ import annotations

import json

from fvgen import distill
from fvgen.system.command import Parser, guarded


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", help="YAML file of the method")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that differ from the file")
    args = parser.parse_intermixed_args()

    stages = distill.read_stages(args.file, args.settings)  # all are judged before the first begins
    distill.check_paths(stages[0])
    with distill.stopped_by_sigterm():
        students = [distill.run(stage) for stage in stages]
    print(json.dumps({"student": str(students[-1]), "stages": [stage.run.out for stage in stages]}))


if __name__ == "__main__":
    guarded(main)
