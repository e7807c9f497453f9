"""Consistency functions on a grid of timesteps: f(x_t, t) is to be the end of the teacher's trajectory through x_t,
and x itself where the trajectory ends.

    f(x, t) = c_skip(t) x + c_out(t) x0(x, t)                Song et al. 2023, equation 5; Luo et al. 2023, equation 9

What a network predicts enters as clean latents x0; the grid and the solver's step are those of latent consistency
models (Luo et al. 2023, algorithm 1).
"""

from collections.abc import Callable

from torch import Tensor

from fvgen.diffusion.schedule import TIMESTEPS, NoiseSchedule
from fvgen.errors import UserError

SIGMA_DATA, SCALING = 0.5, 10.0  # of latent consistency models' code
Boundary = Callable[[Tensor], tuple[Tensor, Tensor]]


def lcm_boundary(t: Tensor, sigma_data: float = SIGMA_DATA, scaling: float = SCALING) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at timesteps t [B], float64, with s = ``scaling`` t: sd^2 / (s^2 + sd^2), s / sqrt(s^2 + sd^2).

    At t = 0 they are 1 and 0; from t = 19 on, 7e-6 at most and 1 to 4e-6.
    """
    s = scaling * t.double()
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2).sqrt()


def switch_boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """x itself at t = 0, the prediction everywhere else (phased consistency models' code)."""
    at_end = (t == 0).double()
    return at_end, 1 - at_end


BOUNDARIES: dict[str, Boundary] = {"lcm": lcm_boundary, "switch": switch_boundary}


def consistency(x_t: Tensor, x0: Tensor, t: Tensor, boundary: Boundary = lcm_boundary) -> Tensor:
    """f(x_t, t) [B, C, F, h, w] of predicted clean latents x0 at timesteps t [B]."""
    c_skip, c_out = (c.to(x0).view(-1, *[1] * (x0.ndim - 1)) for c in boundary(t))
    return c_skip * x_t + c_out * x0


def leap_grid(k: int, t_max: int) -> list[int]:
    """Timesteps k - 1, 2k - 1, ... up to t_max, both ends included where they fall on it: (t_max + 1) / k of them.

    With k = 20 they are latent consistency models' (19 ... 999), of which a leap needs those up to T' alone. Raises
    UserError for a grid without a timestep.
    """
    grid = list(range(k - 1, min(t_max, TIMESTEPS - 1) + 1, k))
    if not grid:
        raise UserError(f"k={k} leaves no timestep up to t_max={t_max}; give a smaller k")
    return grid


def ddim_step(schedule: NoiseSchedule, x_t: Tensor, x0: Tensor, t: Tensor, t_prev: Tensor) -> Tensor:
    """x at t_prev [B] on the straight way from x_t through the predicted x0: DDIM with eta = 0.

        eps = sqrt(1 - ab) x_t + sqrt(ab) v = (x_t - sqrt(ab) k x0) / sqrt(1 - ab)
        x_prev = sqrt(ab_prev) k_prev x0 + sqrt(1 - ab_prev) eps

    (A network's own output is v here, and not eps: the code of latent consistency models has a branch that mistakes
    the one for the other.)
    """
    return schedule.add_noise(x0, schedule.eps_from_x0(x_t, x0, t), t_prev)
