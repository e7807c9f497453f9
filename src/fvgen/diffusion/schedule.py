"""Noise levels: those of ViewCrafter's relatives or of any scheduler, and conversions between velocity, noise, score
and clean latents.

Symbols: t timestep 0..999, ab_t cumulative alpha ("alpha_bar"), k_t dynamic rescale, z0 clean latents.

    x_t = sqrt(ab_t) k_t z0 + sqrt(1 - ab_t) eps          what the network sees
    v   = sqrt(ab_t) eps - sqrt(1 - ab_t) k_t z0          what it predicts (Salimans and Ho 2022, appendix D)

At t = 999 ab_t is exactly 0 (zero terminal SNR, Lin et al. 2024), x_t is pure noise and v = -k_t z0; every function
here stays finite there. This is why there is no conversion from predicted noise to clean latents: at t = 999 the noise
says nothing about them. "Clean" always means z0 itself, with k_t undone.

One relative, DynamiCrafter's 256-pixel model, predicts noise, has no k_t (it is 1) and ends at sqrt(ab) = 0.068. Its
schedule is built with `zero_snr` off, and `as_velocity` turns its prediction into the v that all others speak.

Tensors are latents [B, C, F, h, w] (any trailing shape works), t is [B] integers or one int. Results have the type
that float32 tables and the latents promote to, so half-precision latents give float32 results.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fvgen.errors import UserError

TIMESTEPS = 1000
RESCALE_RAMP = 400  # ViewCrafter lowers the latents' scale linearly over the first 400 timesteps


def scaled_linear_betas(start: float = 0.00085, end: float = 0.012, steps: int = TIMESTEPS) -> Tensor:
    """Squares of a linear ramp from sqrt(start) to sqrt(end), [steps] float64 (latent diffusion's "linear")."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(ab) so that its last value is 0 and its first stays (Lin et al. 2024, algorithm 1)."""
    root = (1.0 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    cumulative = root**2
    alphas = torch.cat([cumulative[:1], cumulative[1:] / cumulative[:-1]])
    return 1.0 - alphas


def trailing_timesteps(steps: int) -> list[int]:
    """Evenly spaced timesteps that end at 999, ascending; 4 gives 249 499 749 999 (Lin et al. 2024, table 2).

    ViewCrafter's own float arithmetic adds a stray step at -1 for some numbers of steps (61 is the first): not here.
    """
    _check_steps(steps, TIMESTEPS, "trailing")
    descending = np.round(np.arange(TIMESTEPS, 0, -TIMESTEPS / steps))[:steps] - 1
    return descending[::-1].astype(int).tolist()


def uniform_timesteps(steps: int) -> list[int]:
    """Every (1000 // steps)-th timestep from 1, ascending; more than `steps` of them if 1000 is no multiple of it."""
    _check_steps(steps, TIMESTEPS // 2, "uniform")
    return list(range(1, TIMESTEPS + 1, TIMESTEPS // steps))


SPACINGS: dict[str, Callable[[int], list[int]]] = {"trailing": trailing_timesteps, "uniform": uniform_timesteps}


def timesteps(spacing: str, steps: int) -> list[int]:
    """Ascending timesteps by the name of their spacing. Raises UserError for one that is not in `SPACINGS`."""
    if spacing not in SPACINGS:
        raise UserError(f"there is no spacing {spacing!r} of timesteps; choose one of {', '.join(SPACINGS)}")
    return SPACINGS[spacing](steps)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Tables over the timesteps, all [1000] float32, and the conversions that use them."""

    betas: Tensor
    alphas_cumprod: Tensor  # ab_t
    signal: Tensor  # sqrt(ab_t)
    sigma: Tensor  # sqrt(1 - ab_t)
    scale_arr: Tensor  # k_t
    prediction: str = "v"  # what the network's output is: "v" or "eps", see `as_velocity`

    @classmethod
    def viewcrafter(cls, base_scale: float) -> "NoiseSchedule":
        """The schedule of all published models but one; `base_scale` is 0.3 at 576x1024 and 0.7 at 320x512."""
        return cls.lvdm(base_scale)

    @classmethod
    def lvdm(cls, base_scale: float | None, zero_snr: bool = True, prediction: str = "v") -> "NoiseSchedule":
        """From the settings of a model of ViewCrafter's family.

        Args:
            base_scale: k_t falls linearly from 1 to this over the first 400 timesteps and stays there; None: k_t is 1.
            zero_snr: the last timestep is pure noise.
            prediction: "v" or, only without `zero_snr`, "eps".

        Raises:
            UserError: any other prediction, or one of noise with `zero_snr`.
        """
        if prediction not in ("v", "eps") or (prediction == "eps" and zero_snr):
            raise UserError(f"prediction {prediction!r} cannot be with zero_snr={zero_snr}; use 'v', or 'eps' without")
        betas = rescale_zero_terminal_snr(scaled_linear_betas()) if zero_snr else scaled_linear_betas()
        alphas_cumprod = (1.0 - betas).cumprod(0)
        last = 1.0 if base_scale is None else base_scale
        scale_arr = torch.full((TIMESTEPS,), last, dtype=torch.float64)
        scale_arr[:RESCALE_RAMP] = torch.linspace(1.0, last, RESCALE_RAMP, dtype=torch.float64)
        tables = (betas, alphas_cumprod, alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt(), scale_arr)
        return cls(*(table.float() for table in tables), prediction)

    @classmethod
    def cogvideox(cls, beta_start: float = 0.00085, beta_end: float = 0.012, snr_shift: float = 1.0) -> "NoiseSchedule":
        """CogVideoX's, without a rescale: the usual betas, their SNR divided by ``snr_shift`` (1 in the 5B models, 3 in
        2B), and then sqrt(ab) stretched so that it ends at 0 and begins where it did.

            ab <- ab / (s + (1 - s) ab),   r = sqrt(ab),   r <- (r - r_999) r_0 / (r_0 - r_999),   ab <- r^2

        For ``snr_shift`` 1 this is `lvdm` without k_t.
        """
        ab = (1.0 - scaled_linear_betas(beta_start, beta_end)).cumprod(0)
        root = (ab / (snr_shift + (1 - snr_shift) * ab)).sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return cls.from_alphas(root**2)

    @classmethod
    def from_alphas(cls, alphas_cumprod: Tensor) -> "NoiseSchedule":
        """Of any other teacher, from its scheduler's ab_t [1000], without a rescale (k_t = 1).

        Raises UserError for another number of timesteps: samplers and settings count to 1000.
        """
        if alphas_cumprod.shape != (TIMESTEPS,):
            raise UserError(f"the scheduler has {len(alphas_cumprod)} timesteps; give a teacher with {TIMESTEPS}")
        ab = alphas_cumprod.detach().cpu().double()
        betas = 1 - ab / torch.cat([torch.ones_like(ab[:1]), ab[:-1]])
        tables = (betas, ab, ab.sqrt(), (1 - ab).sqrt(), torch.ones_like(ab))
        return cls(*(table.float() for table in tables))

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule with its tables on `device` (itself if they are there already)."""
        if self.betas.device == torch.device(device):
            return self
        tables = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tables)

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t from clean latents."""
        return _at(self.signal, t, z0) * self.rescale(z0, t) + _at(self.sigma, t, z0) * noise

    def velocity(self, z0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """The network's target, from clean latents."""
        return _at(self.signal, t, z0) * noise - _at(self.sigma, t, z0) * self.rescale(z0, t)

    def rescale(self, z0: Tensor, t: Tensor | int) -> Tensor:
        """k_t z0: clean latents in the scale that they have at t."""
        return _at(self.scale_arr, t, z0) * z0

    def as_velocity(self, x_t: Tensor, output: Tensor, t: Tensor | int) -> Tensor:
        """What the network predicts as a velocity: itself, or (eps - sqrt(1 - ab) x_t) / sqrt(ab).

        The map is affine, and guidance a combination whose weights sum to 1: it gives the same before and after.
        """
        if self.prediction == "v":
            return output
        return (output - _at(self.sigma, t, x_t) * x_t) / _at(self.signal, t, x_t)

    def x0_from_v(self, x_t: Tensor, v: Tensor, t: Tensor | int) -> Tensor:
        """Clean latents (sqrt(ab) x_t - sqrt(1 - ab) v) / k_t."""
        return (_at(self.signal, t, x_t) * x_t - _at(self.sigma, t, x_t) * v) / _at(self.scale_arr, t, x_t)

    def eps_from_v(self, x_t: Tensor, v: Tensor, t: Tensor | int) -> Tensor:
        """Noise sqrt(ab) v + sqrt(1 - ab) x_t."""
        return _at(self.signal, t, x_t) * v + _at(self.sigma, t, x_t) * x_t

    def v_from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor | int) -> Tensor:
        """Velocity (sqrt(ab) x_t - k_t x0) / sqrt(1 - ab) that belongs to clean latents; inverse of `x0_from_v`."""
        return (_at(self.signal, t, x_t) * x_t - self.rescale(x0, t)) / _at(self.sigma, t, x_t)

    def eps_from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor | int) -> Tensor:
        """Noise (x_t - sqrt(ab) k_t x0) / sqrt(1 - ab) that belongs to clean latents."""
        return (x_t - _at(self.signal, t, x_t) * self.rescale(x0, t)) / _at(self.sigma, t, x_t)

    def score_from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor | int) -> Tensor:
        """Score (sqrt(ab) k_t x0 - x_t) / (1 - ab) of the noisy latents, given the mean x0 of the clean ones.

        FVGen equation 4 and DMD (Yin et al. 2024) equation 4; the same as -eps / sqrt(1 - ab).
        """
        return -self.eps_from_x0(x_t, x0, t) / _at(self.sigma, t, x_t)


def _at(table: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
    """The table's entries at t, shaped to multiply `like`: [B, 1, ...], or [1, 1, ...] for one int: a scalar would
    leave half-precision latents as they are."""
    return table[t].reshape(-1, *[1] * (like.ndim - 1))


def _check_steps(steps: int, most: int, spacing: str) -> None:
    if not 1 <= steps <= most:
        raise UserError(f"Sampling with {steps} steps and {spacing} spacing is impossible: ask for 1 to {most} steps.")
