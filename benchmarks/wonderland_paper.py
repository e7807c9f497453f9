"""benchmarks/wonderland.py as data: rows, claims, metrics, and the paper's own numbers (Liang et al. 2025)."""

from __future__ import annotations

from typing import Any

BRANCHES = ("dual, early steps", "control, early steps", "LoRA, early steps")
WEIGHTS = (3, 5)  # of the camera in the sampler
EARLY = {"control_t_min": 600, "t_distribution": "truncated_normal"}  # AC3D's

ROWS: dict[str, dict[str, dict[str, Any] | None]] = {
    # None: nothing is trained
    "camera": {
        "warped by true depth": None,
        "base, no camera": None,
        "dual": {"branch": "dual"},
        "control": {"branch": "control"},
        "LoRA": {"branch": "lora"},
        "dual, no LoRA module": {"branch": "dual", "camera_lora_rank": 0},
        "control, no weight copy": {"branch": "control", "copy_blocks": False},
        "control, 1 block": {"branch": "control", "control_share": 0.0},
        "control, a quarter": {"branch": "control", "control_share": 0.25},
        "control, all blocks": {"branch": "control", "control_share": 1.0},
        "dual, early steps": {"branch": "dual"} | EARLY,
        "control, early steps": {"branch": "control"} | EARLY,
        "LoRA, early steps": {"branch": "lora"} | EARLY,
        **{
            f"{row}, weight {weight}": {"of": row, "camera_guidance": float(weight)}
            for row in BRANCHES
            for weight in WEIGHTS
        },
    },
    "lalrm": {
        "warped by true depth": None,
        "nearest frame": None,
        "cross-fade": None,
        "fit to the frames": None,
        "fit from true depth": None,
        "LaLRM": {},
        "LaLRM, no own pixels": {"own_weight": 0.0, "own_iterations": 0},
        "LaLRM, seen views only": {"unseen_views": 0},
        "LaLRM, no sweep": {"planes": 0},
        "LaLRM, no rays": {"cameras": False, "planes": 0},
        "LaLRM, stage 2": {},
    },
    "end-to-end": {
        "warped by true depth": None,
        "nearest generated frame": {},
        "camera model, LaLRM": {},
        "camera model, LaLRM, stage 2": {},
    },
}
"""Part -> row -> what its training is told beyond the rest; "control" copies half of the blocks, as the paper's 21 of
42. "of": the row whose models are taken, sampled at another weight of the camera. All that is drawn in an update of
LaLRM is twice `--views`."""

CLAIMS: dict[str, list[tuple[str, str, str]]] = {  # better, worse, metric
    "camera": [
        (better, worse, metric)
        for better, worse in (
            ("dual", "control"),
            ("control", "LoRA"),
            ("dual", "dual, no LoRA module"),
            ("control", "control, no weight copy"),
            ("control", "control, a quarter"),
            ("control, a quarter", "control, 1 block"),
            ("dual", "base, no camera"),
            ("dual, early steps", "control, early steps"),
            ("control, early steps", "LoRA, early steps"),
            *((f"{row}, weight 3", row) for row in BRANCHES),
            *((f"{row}, weight 3", "base, no camera") for row in BRANCHES),
        )
        for metric in ("R_err_all", "T_err_scene_all")
    ]
    + [
        (row, "base, no camera", metric)
        for row in ("dual", *BRANCHES, *(f"{row}, weight {weight}" for row in BRANCHES for weight in WEIGHTS))
        for metric in ("psnr", "camera_gain")
    ]
    + [(f"{row}, weight 3", row, metric) for row in BRANCHES for metric in ("psnr", "lpips", "camera_gain")]
    + [
        ("dual, early steps", "control, early steps", "camera_gain"),
        ("control, early steps", "LoRA, early steps", "camera_gain"),
        ("control, early steps", "control", "camera_gain"),
    ],
    "lalrm": [
        ("LaLRM", worse, metric)
        for worse in (
            "warped by true depth",
            "nearest frame",
            "cross-fade",
            "fit to the frames",
            "LaLRM, no own pixels",
            "LaLRM, seen views only",
            "LaLRM, no sweep",
            "LaLRM, no rays",
        )
        for metric in ("psnr", "lpips")
    ],
    "end-to-end": [
        (better, worse, metric)
        for better, worse in (
            ("camera model, LaLRM", "warped by true depth"),
            ("camera model, LaLRM", "nearest generated frame"),
            ("camera model, LaLRM, stage 2", "camera model, LaLRM"),
        )
        for metric in ("psnr", "lpips")
    ],
}

_IMAGES = {"psnr": 2, "ssim": 3, "lpips": 4, "kid_squeeze": 3}
_PATHS = {"R_err": 4, "T_err_least_squares": 4, "T_err_farthest": 4, "T_err_scene": 4}
_SCENES = _IMAGES | {"seconds_per_scene": 2}
METRICS: dict[str, dict[str, int]] = {
    "camera": _PATHS
    | {"R_err_all": 4, "T_err_scene_all": 4, "failures": 0, "frames": 0, "residual": 3, "camera_gain": 2}
    | _IMAGES,
    "lalrm": _SCENES,
    "end-to-end": _SCENES,
}
"""Part -> metric -> digits."""

_TABLE1 = [
    {"data": data, "row": row}
    | dict(zip(("FID", "FVD", "R_err", "T_err", "LPIPS", "PSNR", "SSIM"), numbers, strict=True))
    for data, row, *numbers in (
        ("RealEstate10K", "MotionCtrl", 22.58, 229.34, 0.231, 0.794, 0.296, 14.68, 0.402),
        ("RealEstate10K", "VD3D", 21.40, 187.55, 0.053, 0.126, 0.227, 17.26, 0.514),
        ("RealEstate10K", "ViewCrafter", 20.89, 203.71, 0.054, 0.152, 0.212, 18.91, 0.501),
        ("RealEstate10K", "Wonderland", 16.16, 153.48, 0.046, 0.093, 0.206, 19.71, 0.557),
        ("DL3DV", "MotionCtrl", 25.58, 248.77, 0.467, 1.114, 0.309, 14.35, 0.385),
        ("DL3DV", "VD3D", 22.70, 232.97, 0.094, 0.237, 0.259, 16.28, 0.487),
        ("DL3DV", "ViewCrafter", 20.55, 210.62, 0.092, 0.243, 0.237, 17.10, 0.519),
        ("DL3DV", "Wonderland", 17.74, 169.34, 0.061, 0.130, 0.218, 17.56, 0.543),
        ("Tanks and Temples", "MotionCtrl", 30.17, 289.62, 0.834, 1.501, 0.312, 14.58, 0.386),
        ("Tanks and Temples", "VD3D", 24.33, 244.18, 0.117, 0.292, 0.284, 15.35, 0.467),
        ("Tanks and Temples", "ViewCrafter", 22.41, 230.56, 0.125, 0.306, 0.245, 16.20, 0.506),
        ("Tanks and Temples", "Wonderland", 19.46, 189.32, 0.094, 0.172, 0.221, 16.87, 0.529),
    )
]
_ABLATION = [
    {"row": row, "FID": fid, "FVD": fvd, "R_err": turn, "T_err": shift}
    for row, fid, fvd, turn, shift in (
        ("LoRA branch", 19.02, 212.74, 0.102, 0.157),
        ("control branch", 18.75, 205.45, 0.058, 0.104),
        ("dual", 17.22, 183.54, 0.052, 0.095),
        ("dual, no LoRA module", 17.84, 195.07, 0.062, 0.101),
        ("control, no weight copy", 18.92, 206.75, 0.065, 0.108),
        ("control, 1 block", 19.90, 214.66, 0.114, 0.162),
        ("control, 10 blocks", 19.15, 210.74, 0.075, 0.126),
        ("control, 30 blocks", 20.15, 221.61, 0.056, 0.105),
    )
]
_TABLE_A3 = [
    {"data": data, "row": row, "LPIPS": lpips, "PSNR": psnr, "SSIM": ssim}
    for data, row, lpips, psnr, ssim in (
        ("RealEstate10K", "LaLRM", 0.292, 17.15, 0.550),
        ("RealEstate10K", "without in-the-wild data", 0.295, 17.06, 0.538),
        ("DL3DV", "LaLRM", 0.325, 16.64, 0.574),
        ("DL3DV", "without in-the-wild data", 0.343, 16.62, 0.570),
        ("Tanks and Temples", "LaLRM", 0.344, 15.90, 0.510),
        ("Tanks and Temples", "without in-the-wild data", 0.359, 15.85, 0.502),
    )
]
PAPER: dict[str, dict[str, list[dict[str, Any]]]] = {
    "camera": {
        "its own numbers, at full size (table 1)": _TABLE1,
        "its own ablation, RealEstate10K (tables 1 and A2)": _ABLATION,
    },
    "lalrm": {"its own numbers, from one image (table A3)": _TABLE_A3},
    "end-to-end": {"its own numbers, from one image (table A3)": _TABLE_A3},
}
"""Part -> tables for the page."""
