"""Students for one, two, four and eight steps, and one for all of them.

    python benchmarks/few_steps.py [--config tiny] [--rows ROW ...] [--jobs 2] [--work DIR] [--dry-run]

What is measured and written: as benchmarks/table2_distillation.py, whose runs it shares; every student against the best
untrained way in as many steps, and how much of the gap between that and the teacher's whole steps it closes. Why: the
gap is largest at one and two steps, and a student that can do all is what a user would rather have than four.
"""

from __future__ import annotations

from tables import ANY_STEP, Table, main

from fvgen.system.command import guarded

TABLE = Table(
    title="Students of few steps",
    script="few_steps.py",
    rows={
        "DMD, 1 step": "dmd student_steps=1",
        "DMD, 2 steps": "dmd student_steps=2",
        "DMD, 4 steps": "dmd",
        "DMD, 8 steps": "dmd student_steps=8",
        "DMD, any step,": f"dmd {ANY_STEP}",
        "DMD with head, 1 step": "dmd-gan student_steps=1",
        "DMD with head, 2 steps": "dmd-gan student_steps=2",
        "DMD with head, 4 steps": "dmd-gan",
        "DMD2, 1 step": "dmd2 student_steps=1",
        "DMD2, 2 steps": "dmd2 student_steps=2",
        "DMD2, 4 steps": "dmd2",
        "FVGen, 1 step": "fvgen student_steps=1",
        "FVGen, 2 steps": "fvgen student_steps=2",
        "FVGen, 4 steps": "fvgen",
        "FVGen, 8 steps": "fvgen student_steps=8",
        "FVGen, any step,": f"fvgen {ANY_STEP}",
    },
    claims=(),
    paper=(),
)

if __name__ == "__main__":
    guarded(lambda: main(TABLE, __doc__))
