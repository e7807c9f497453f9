"""Closed renders: what a leap starts from must have no holes, for at the timesteps where it lands they survive.

A feed-forward 3D reconstruction gives surfaces; a cloud of points gives dots on black. The stand-in here draws all
points with twice the radius, takes out the black that shines through between them, and fills what is still empty with
the colour of the nearest pixel that is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

RADIUS = 2.0  # times `fvgen.geometry.pointcloud.point_radius`


def closed(images: Tensor, visibility: Tensor) -> Tensor:
    """Renders over black [V, 3, H, W] in [0, 1] without holes; ``visibility`` [V, H, W] is their opacity.

    A view without a single point stays black.
    """
    from scipy.ndimage import distance_transform_edt  # takes half a second to import

    solid = (images / visibility.clamp(min=1e-3)[:, None]).clamp(0, 1)
    for view, seen in enumerate(visibility > 0):
        if seen.any() and not seen.all():
            _, (y, x) = distance_transform_edt(~seen.cpu().numpy(), return_indices=True)
            solid[view] = solid[view][:, torch.from_numpy(y).long(), torch.from_numpy(x).long()]
        elif not seen.any():
            solid[view] = 0
    return solid
