"""FVGen's Table 2: ways to distil one teacher, all with the same number of iterations.

    python benchmarks/table2_distillation.py [--config tiny] [--rows ROW ...] [--jobs 2] [--work DIR] [--dry-run]

What is measured: students of every method on clips that none has seen, three seeds each, against the untrained teacher
in as few steps (the best of its ways), its whole steps, and two controls that must gain nothing. Why: the paper
compares with DMD2 and CausVid on its own scenes, at full size and without code. Columns: docs/evaluation.md. Writes
benchmarks/results/table2_distillation-CONFIG.json and .md; interrupted, the same command goes on. The last line is
JSON.
"""

from __future__ import annotations

from tables import Claim, Table, main

from fvgen.system.command import guarded

TABLE = Table(
    title="Ways to distil one teacher (FVGen, Table 2)",
    script="table2_distillation.py",
    rows={
        "FVGen": "fvgen",
        "adversarial alone": "adversarial",
        "control: random gradient": "control-random-gradient",
        "control: frozen head": "control-frozen-head",
        "DMD": "dmd",
        "CausVid": "causvid",
        "Data-Forcing": "data-forcing",
        "FVGen, Eq. 8 as printed": "fvgen-printed-eq8",
        "consistency": "consistency",
        "DMD2": "dmd2",
        "f-distill": "f-distill",
    },
    claims=(
        Claim("FVGen", "DMD2"),
        Claim("FVGen", "CausVid"),
        Claim("CausVid", "DMD2"),
        Claim("FVGen", "DMD2", "kid_squeeze"),
        Claim("FVGen", "CausVid", "kid_squeeze"),
    ),
    paper=(
        {"": "VC + DMD2, mip-360", "PSNR": 9.29, "SSIM": 0.184, "LPIPS": 0.836, "FID": 35.59},
        {"": "VC + CausVid, mip-360", "PSNR": 15.77, "SSIM": 0.336, "LPIPS": 0.441, "FID": 19.27},
        {"": "FVGen, mip-360", "PSNR": 16.28, "SSIM": 0.352, "LPIPS": 0.429, "FID": 17.44},
        {"": "VC + DMD2, TNT", "PSNR": 10.27, "SSIM": 0.209, "LPIPS": 0.731, "FID": 37.67},
        {"": "VC + CausVid, TNT", "PSNR": 17.33, "SSIM": 0.405, "LPIPS": 0.232, "FID": 24.92},
        {"": "FVGen, TNT", "PSNR": 18.72, "SSIM": 0.411, "LPIPS": 0.210, "FID": 23.64},
    ),
)

if __name__ == "__main__":
    guarded(lambda: main(TABLE, __doc__))
