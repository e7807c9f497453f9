"""FVGen's Table 3: adversarial start, distribution matching and softening, each left out.

    python benchmarks/table3_ablation.py [--config tiny] [--rows ROW ...] [--jobs 2] [--work DIR] [--dry-run]

What is measured and written: as benchmarks/table2_distillation.py, whose runs it shares. Why: the paper says that each
part helps; every row here has the same number of iterations, which the paper does not say of its own.
"""

from __future__ import annotations

from tables import Claim, Table, main

from fvgen.system.command import guarded

TABLE = Table(
    title="What each part of FVGen does (its Table 3)",
    script="table3_ablation.py",
    rows={
        "GAN start, DMD with head": "fvgen",
        "GAN start, DMD with head, softened": "fvgen-softened",
        "GAN start, DMD without head": "fvgen-no-gan-later",
        "GAN start, DMD with head, one pass": "fvgen dmd.same_noise=true dmd.one_pass=true",
        "GAN alone": "adversarial",
        "DMD with head": "dmd-gan",
        "DMD alone": "dmd",
    },
    claims=(
        Claim("GAN start, DMD with head, softened", "DMD with head"),
        Claim("GAN start, DMD with head, softened", "GAN alone"),
        Claim("GAN start, DMD with head, softened", "GAN start, DMD with head"),
        Claim("GAN start, DMD with head", "GAN alone"),
        Claim("GAN start, DMD with head", "DMD with head"),
        Claim("GAN start, DMD without head", "DMD alone"),
    ),
    paper=(
        {"GAN": "–", "DMD": "yes", "soften": "yes", "PSNR": 8.62, "SSIM": 0.154, "LPIPS": 0.880, "FID": 40.17},
        {"GAN": "yes", "DMD": "–", "soften": "–", "PSNR": 16.23, "SSIM": 0.369, "LPIPS": 0.375, "FID": 21.48},
        {"GAN": "yes", "DMD": "yes", "soften": "–", "PSNR": 16.85, "SSIM": 0.385, "LPIPS": 0.337, "FID": 21.05},
        {"GAN": "yes", "DMD": "yes", "soften": "yes", "PSNR": 17.50, "SSIM": 0.382, "LPIPS": 0.320, "FID": 20.54},
    ),
)

if __name__ == "__main__":
    guarded(lambda: main(TABLE, __doc__))
