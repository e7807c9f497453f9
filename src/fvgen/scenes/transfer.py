"""Films of high dynamic range, as phones record them, to the usual 8 bits.

Source: ITU-R BT.2100 (HLG and PQ curves), BT.2408 (ordinary white: 75 % of HLG, 203 nits of PQ),
BT.2087 (BT.2020 to BT.709). Numbers of the curves are those of H.273, "transfer characteristics".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Curve = Callable[[np.ndarray], np.ndarray]

TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)


def from_hlg(coded: np.ndarray) -> np.ndarray:
    """Scene light, ordinary white is 1, of HLG values in [0, 1]."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073

    def light(x: np.ndarray) -> np.ndarray:
        return np.where(x <= 0.5, x * x / 3, (np.exp((x - c) / a) + b) / 12)

    return light(coded) / light(np.float32(0.75))


def from_pq(coded: np.ndarray) -> np.ndarray:
    """Light, ordinary white (203 nits) is 1, of PQ values in [0, 1]."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = np.clip(coded, 0, 1) ** (1 / m2)
    return 10000 / 203 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


FROM_LIGHT: dict[int, Curve] = {16: from_pq, 18: from_hlg}


def standard_range(coded: np.ndarray, light: Curve) -> np.ndarray:
    """uint8 [H, W, 3] of BT.2020 values [H, W, 3] in [0, 1]; brighter than ordinary white is white."""
    linear = np.clip(light(coded) @ TO_709.T, 0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (curved * 255).round().astype(np.uint8)
