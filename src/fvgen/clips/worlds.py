"""The kinds of built-in clips, by the word that names them as data. (Nothing here imports torch: words are told apart
before anything heavy is.)"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class World:
    """What a built-in clip is drawn from. Pairs are the ends of a range."""

    name: str
    keep: tuple[float, float]  # share of the cloud's points that survive, log-uniform
    depth_noise: tuple[float, float]  # relative standard deviation of a smooth error of the cloud's depth
    sweep: tuple[float, float]  # of the camera about the room's middle, or about itself where paths > 1, radians
    first_alone: float  # share of the clips whose cloud is made from the first frame alone, instead of from both ends
    sharp: bool  # repetitive patterns of strong contrast and hard edges, instead of all kinds
    radius: float  # of the points in normalised device units: 0.06 is 1.44 pixels at 48 rows
    close: bool = False  # leave no holes, see `fvgen.geometry.closing`
    paths: int = 1  # clips that share a room; more than one: they begin at one frame and part from there


WORLDS = {
    # Renders range from the scattered dots of a structure-from-motion cloud to the nearly closed surface of a dense
    # one.
    "builtin": World("", (0.1, 0.6), (0.0, 0.015), (0.35, 1.1), 0.0, False, 0.06),
    # The proving ground: so little is given that one evaluation of a network cannot say what is missing.
    "builtin-sparse": World("sparse", (0.03, 0.15), (0.0, 0.015), (0.5, 1.6), 0.5, True, 0.06),
    # Full coverage by a wrong cloud: what a feed-forward reconstruction gives, for methods that start from a 3D prior.
    "builtin-closed": World("closed", (1.0, 1.0), (0.05, 0.05), (0.35, 1.1), 0.0, True, 0.12),
    # The same from few points, whose gaps are closed with the nearest colour: a coarse prior, wrong in detail too.
    "builtin-coarse": World("coarse", (0.03, 0.1), (0.02, 0.05), (0.35, 1.1), 0.0, False, 0.12, True),
    # Hardly any points and depth that is 5 to 10 % wrong: a prior that a teacher of this size can be better than.
    "builtin-rough": World("rough", (0.005, 0.01), (0.05, 0.1), (0.35, 1.1), 0.0, False, 0.12, True),
    # Four ways on from every first frame: nothing but the path tells these clips apart, so a model must look at it.
    "builtin-paths": World("paths", (0.03, 0.1), (0.02, 0.05), (0.0, 0.6), 1.0, False, 0.12, True, 4),
}


def is_builtin(data: str | Path) -> bool:
    """Whether a word for data means clips that fvgen makes itself."""
    return str(data) in WORLDS
