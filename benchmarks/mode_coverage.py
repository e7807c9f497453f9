"""Which divergence keeps the teacher's modes? Every row of the table, on two small mixtures of Gaussians.

    python benchmarks/mode_coverage.py [--settings scratch oracle] [--rows reverse_kl forward_kl] [--seeds 8] [--draw 0]

Why: FVGen says that softening reverse KL prevents mode dropping. Its weight 1/(r+1) falls where r = p/q is
large, that is, where the student misses mass; so the claim has to be measured. Video hides a dropped mode;
eight blobs cannot.

What: the student is a one-step generator (MLP, 2-D normal noise -> 2-D point), the teacher's score is exact
(the mixture under noise). Fake score and discriminator are learned online on noised samples as in FVGen's
stage 2, and every loss and weight is fvgen.objectives'. The settings:

- scratch:        stage 2 from random weights, without the adversarial term (isolates the divergence)
- gan init:       the same after stage 1 (GAN initialisation, shared by all rows of a seed)
- gan init + gan: stage 2 keeps the adversarial term beside it, as FVGen's Alg. 1 does
- small student:  as scratch, with a student of width 8 that cannot draw eight separate modes
- pairs init, pairs init + pairs: as the two before, by pairs (a relativistic head: a real and a student's point under
                  one noise) instead of absolute logits
- data forcing, small student + data forcing: as scratch and small student; the real score is drawn halfway to that of a
                  real point under the same noise (`fvgen.distill.methods.data_forcing`)
- oracle:         as scratch; fake score and ratio are not learned but computed from 256 fresh student
                  samples, and DMD2's per-sample normalisation is left out: the divergence's own gradient, as
                  near as one gets

Runs of a seed share initial weights and random numbers, so that differences between rows are paired. All runs
of a setting advance together, as one batch of networks. Measured on 20,000 samples of each finished student:

- modes: those that hold at least a fifth of the samples which the target puts within 3 standard deviations of
  them
- precision: share of samples within 3 standard deviations of any mode (0.989 for the target itself)
- KL(p||q) in nats: 160 x 160 histograms on [-3, 3]^2, both sides smoothed by a normal kernel of std 0.1 and
  mixed with 0.1 % of uniform density, so that an empty mode costs much but not infinity (0.001 for the target
  itself)

Writes OUT/NAME.json (every run), .png, and the tables of .md (the text above its marker is left alone). The last
output line is JSON. About twelve minutes of one core with the defaults.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from fvgen.objectives import (
    DIVERGENCES,
    RatioNormalizer,
    denoising_loss,
    discriminator_loss,
    dmd_gradient,
    dmd_loss,
    generator_loss,
    log_ratio,
    score_difference,
    weight,
)

MODES, STD = 8, 0.1
TARGETS = {"equal weights": [1 / MODES] * MODES, "unequal weights": [0.21, 0.04] * (MODES // 2)}
ANGLE = torch.arange(MODES) * (2 * math.pi / MODES)
CENTRES = math.sqrt(2) * torch.stack([ANGLE.cos(), ANGLE.sin()], dim=1)  # [8,2]; unit variance per coordinate
BATCH, REFERENCE, CRITIC_WIDTH = 64, 256, 48
RATE, CLIP = 5e-3, 10.0  # Adam, cosine decay; CLIP is DMD2's
TIMESTEPS, BINS = 1000, 10
METRICS = {"modes": "modes covered (of 8)", "precision": "precision", "kl": "KL(p||q) [nats]"}
Values = dict[str, Tensor]  # metric -> [targets, rows, seeds]
MARKER = "<!-- below this line: written by benchmarks/mode_coverage.py -->"


@dataclass(frozen=True)
class Setting:
    gan_init: bool = False
    gan_weight: float = 0.0
    width: int = 48
    oracle: bool = False
    kind: str = "non_saturating"
    data_weight: float = 0.0


SETTINGS = {
    "scratch": Setting(),
    "gan init": Setting(gan_init=True),
    "gan init + gan": Setting(gan_init=True, gan_weight=0.1),
    "pairs init": Setting(gan_init=True, kind="relativistic"),
    "pairs init + pairs": Setting(gan_init=True, gan_weight=0.1, kind="relativistic"),
    "data forcing": Setting(data_weight=0.5),
    "small student": Setting(width=8),
    "small student + data forcing": Setting(width=8, data_weight=0.5),
    "oracle": Setting(oracle=True),
}


class Networks(nn.Module):
    """R independent MLPs side by side, each with its own weights: [R,B,in] -> [R,B,out]."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)

    def forward(self, x: Tensor) -> Tensor:
        for k, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(b, x.relu() if k else x, w)
        return x

    def copies(self, index: Tensor) -> "Networks":
        """Copies of the networks numbered index [R']."""
        return Networks(*([p.detach()[index] for p in group] for group in (self.weights, self.biases)))


def alpha_bar(t: Tensor) -> Tensor:
    """Cosine schedule, cumulative, with an axis for the coordinates: integers 0..999 [R,B] -> [R,B,1]."""
    return (0.5 * math.pi * (t + 0.5) / TIMESTEPS).cos().square()[..., None]


def noised(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    return alpha_bar(t).sqrt() * x0 + (1 - alpha_bar(t)).sqrt() * noise


def seen(x_t: Tensor, t: Tensor) -> Tensor:
    """What fake score and discriminator are shown, [R,B,5]: the point and three views of its noise level."""
    ab = alpha_bar(t)
    return torch.cat([x_t, ab.sqrt(), (1 - ab).sqrt(), (ab / (1 - ab)).log() / 4], dim=-1)


def mixture(x_t: Tensor, t: Tensor, centres: Tensor, shares: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Exact clean estimate [R,B,2] and log density [R,B] of a noised mixture: centres [R,M,2], shares
    [R,M]."""
    ab = alpha_bar(t)
    variance = ab * std**2 + 1 - ab
    scaled = x_t / ab.sqrt()
    logits = shares.log()[:, None] - 0.5 * ab / variance * torch.cdist(scaled, centres).square()
    nearest = torch.bmm(logits.softmax(-1), centres)
    x0 = nearest + ab * std**2 / variance * (scaled - nearest)
    return x0, logits.logsumexp(-1) - (2 * math.pi * variance[..., 0]).log()


class Trial:
    """The runs of one setting, one axis R over targets, rows and seeds in this order; draws are the same for
    all rows."""

    def __init__(self, seeds: int, rows: list[str], draw: int) -> None:
        self.rows, self.seeds, self.shape = rows, seeds, (len(TARGETS), len(rows), seeds)
        self.generator = torch.Generator().manual_seed(draw)
        self.shares = torch.tensor(list(TARGETS.values())).repeat_interleave(seeds, dim=0)
        distinct = torch.arange(len(self.shares)).reshape(len(TARGETS), 1, seeds)
        self.spread = distinct.expand(self.shape).flatten()  # [R]: number of each run's (target, seed)
        self.runs = len(self.spread)

    def networks(self, *sizes: int) -> Networks:
        pairs = list(pairwise(sizes))
        distinct = len(self.shares)
        weights = [torch.randn(distinct, i, o, generator=self.generator) * math.sqrt(1.5 / i) for i, o in pairs]
        return Networks(weights, [torch.zeros(distinct, 1, o) for _, o in pairs]).copies(self.spread)

    def normal(self, count: int = BATCH) -> Tensor:
        return torch.randn(len(self.shares), count, 2, generator=self.generator)[self.spread]

    def timesteps(self) -> Tensor:
        return torch.randint(20, 981, (len(self.shares), BATCH), generator=self.generator)[self.spread]

    def real(self) -> Tensor:
        mode = torch.multinomial(self.shares, BATCH, replacement=True, generator=self.generator)
        return CENTRES[mode[self.spread]] + STD * self.normal()


class Distillation:
    """Student, critics and their optimisers for all runs of a trial; `update` is one step of stage 1 or 2."""

    def __init__(self, trial: Trial, student: Networks, setting: Setting) -> None:
        self.trial, self.student, self.setting = trial, student, setting
        hidden = [CRITIC_WIDTH] * 3
        self.discriminator, self.fake = trial.networks(5, *hidden, 1), trial.networks(5, *hidden, 2)
        # Every run has bins of its own: its timesteps are shifted into its own range.
        self.normalizer = RatioNormalizer(bins=BINS * trial.runs, timesteps=TIMESTEPS * trial.runs)
        self.shift = TIMESTEPS * torch.arange(trial.runs)[:, None]
        self.optimizers = {
            network: torch.optim.Adam(network.parameters(), betas=(0.5, 0.99), fused=True)
            for network in (student, self.discriminator, self.fake)
        }

    def update(self, stage: int, rate: float, only_critics: bool = False) -> None:
        """The student's step, then the critics' on the same samples under other noise."""
        trial, t, kind = self.trial, self.trial.timesteps(), self.setting.kind
        x0 = self.student(trial.normal())
        if not only_critics:
            noise = trial.normal()
            x_t = noised(x0, t, noise)
            paired = kind == "relativistic" or self.setting.data_weight
            real_t = noised(trial.real(), t, noise) if paired else None
            loss = torch.zeros(trial.runs * BATCH)
            if factor := 1.0 if stage == 1 else self.setting.gan_weight:
                real = self.logits(real_t, t) if kind == "relativistic" else None
                loss = loss + factor * generator_loss(self.logits(x_t, t), real, kind)
            if stage == 2:
                loss = loss + dmd_loss(x0.flatten(0, 1), self.gradient(x0, x_t, t, real_t))
            self.descend(self.student, loss, rate)
        if self.setting.oracle:
            return
        x0, t, noise = x0.detach(), trial.timesteps(), trial.normal()
        x_t, real_t = noised(x0, t, noise), noised(trial.real(), t, noise)
        self.descend(self.discriminator, discriminator_loss(self.logits(real_t, t), self.logits(x_t, t), kind), rate)
        if stage == 2:
            error_in_v = 1 / (1 - alpha_bar(t)).flatten()
            estimate = self.x0_fake(x_t, t).flatten(0, 1)
            self.descend(self.fake, denoising_loss(estimate, x0.flatten(0, 1), error_in_v), rate)

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        """One per sample of every run, [R*B]."""
        return self.discriminator(seen(x_t, t)).flatten()

    def x0_fake(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network predicts v; x0 = sqrt(ab) x_t - sqrt(1 - ab) v."""
        return alpha_bar(t).sqrt() * x_t - (1 - alpha_bar(t)).sqrt() * self.fake(seen(x_t, t))

    @torch.no_grad()
    def gradient(self, x0: Tensor, x_t: Tensor, t: Tensor, real_t: Tensor | None = None) -> Tensor:
        """The DMD gradient on x0 under each run's divergence, [R*B,2]; ``real_t`` is real points' x_t under the same
        noise, which data forcing needs."""
        trial = self.trial
        target = (CENTRES.expand(trial.runs, -1, -1), trial.shares[trial.spread], STD)
        x0_real, log_p = mixture(x_t, t, *target)
        if self.setting.data_weight:
            x0_real = torch.lerp(x0_real, mixture(real_t, t, *target)[0], self.setting.data_weight)
        if self.setting.oracle:  # the student's law: its fresh samples, each blurred by half a mode's width
            samples = self.student(trial.normal(REFERENCE))
            equal = torch.full(samples.shape[:2], 1 / REFERENCE)
            x0_fake, log_q = mixture(x_t, t, samples, equal, STD / 2)
            log_r = log_p - log_q
        else:
            x0_fake, log_r = self.x0_fake(x_t, t), log_ratio(self.logits(x_t, t))
        log_r = log_r.reshape(*trial.shape, BATCH)
        h = torch.stack([weight(name, log_r[:, k]) for k, name in enumerate(trial.rows)], dim=1)
        h = self.normalizer.normalize(h.flatten(), (t + self.shift).flatten())
        x0, x0_real, x0_fake = (x.flatten(0, 1) for x in (x0, x0_real, x0_fake))
        if not self.setting.oracle:
            return dmd_gradient(x0, x0_real, x0_fake, h)
        ab = alpha_bar(t).flatten()
        level = (1 - ab).sqrt()  # any factor of t alone is allowed; with this one all noise levels pull alike
        return -(h * level)[:, None] * score_difference(x0_real, x0_fake, ab)

    def descend(self, network: Networks, loss: Tensor, rate: float) -> None:
        """One Adam step on loss [R*B], after clipping the gradient of every run by itself."""
        optimizer, parameters = self.optimizers[network], list(network.parameters())
        gradients = torch.autograd.grad(loss.sum() / BATCH, parameters)
        norm = sum(g.square().sum(dim=(1, 2)) for g in gradients).sqrt()
        factor = (CLIP / norm.clamp(min=CLIP))[:, None, None]
        for parameter, g in zip(parameters, gradients, strict=True):
            parameter.grad = g * factor
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def train(trial: Trial, student: Networks, setting: Setting, stage: int, iterations: int) -> Networks:
    game = Distillation(trial, student, setting)
    if stage == 2 and not setting.oracle:
        for _ in range(iterations // 10):  # the critics meet the student before it moves
            game.update(stage, RATE, only_critics=True)
    for step in range(iterations):
        game.update(stage, RATE * (0.5 + 0.5 * math.cos(math.pi * step / iterations)))
    return student


def run(setting: Setting, rows: list[str], seeds: int, draw: int, iterations: int) -> Values:
    """All rows, targets and seeds of one setting."""
    trial = Trial(seeds, rows, draw)
    hidden = [setting.width] * 3
    student = trial.networks(2, *hidden, 2)
    if setting.gan_init:
        alone = Trial(seeds, rows[:1], draw)  # stage 1 knows no divergence: one run per target and seed
        student = train(alone, alone.networks(2, *hidden, 2), setting, 1, iterations).copies(trial.spread)
    return measure(trial, train(trial, student, setting, 2, iterations))


@torch.no_grad()
def measure(trial: Trial, student: Networks) -> Values:
    z = torch.randn(1, 20_000, 2, generator=torch.Generator().manual_seed(12345))
    found = []
    for k, shares in enumerate(trial.shares[trial.spread]):
        x = student.copies(torch.tensor([k]))(z)[0]
        distance, mode = torch.cdist(x, CENTRES).min(dim=1)
        inside = distance < 3 * STD
        held = torch.bincount(mode[inside], minlength=MODES) / len(x)
        modes = (held >= 0.2 * shares * (1 - math.exp(-4.5))).sum().item()
        found.append([modes, inside.float().mean().item(), forward_kl(x, shares)])
    values = torch.tensor(found).reshape(*trial.shape, len(METRICS))
    return {name: values[..., k] for k, name in enumerate(METRICS)}


def forward_kl(x: Tensor, shares: Tensor, cells: int = 160, half: float = 3.0, kernel: float = STD) -> float:
    """KL(p||q) as the module's docstring says, from samples x [N,2] of q and the mixture's shares [8]."""
    side = 2 * half / cells
    centre = (torch.arange(cells, dtype=torch.float64) + 0.5) * side - half

    def bell(distance: Tensor, std: float) -> Tensor:
        return (-0.5 * (distance / std) ** 2).exp()

    across, up = ((x.clamp(-half, half - 1e-4) + half) / side).long().unbind(1)
    count = torch.bincount(up * cells + across, minlength=cells**2).reshape(cells, cells).double()
    blur = bell(centre[:, None] - centre, kernel)
    on_x, on_y = (bell(centre[:, None] - CENTRES[:, k], math.hypot(STD, kernel)) for k in (0, 1))
    p, q = (on_y * shares) @ on_x.T, blur @ count @ blur
    p, q = (0.999 * d / d.sum() + 0.001 / cells**2 for d in (p, q))
    return (p * (p / q).log()).sum().item()


def table(title: str, first: str, cells: dict[str, list[str]]) -> str:
    """Markdown: a column `first` with the keys of cells, then a column per metric."""
    head = " | ".join(label.replace("|", "\\|") for label in METRICS.values())
    lines = [f"\n**{title}**\n", f"| {first} | {head} |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(texts)} |" for name, texts in cells.items())]) + "\n"


def tables(results: dict[str, Values], rows: list[str]) -> str:
    """The paired answers first, then mean and standard deviation over seeds of every row, setting and target."""

    def against_reverse_kl(some: list[Tensor], name: str) -> str:
        """some: values of one metric, each [rows, seeds] or [targets, rows, seeds]."""
        row, base = rows.index(name), rows.index("reverse_kl")
        return interval(torch.cat([(v.select(-2, row) - v.select(-2, base)).flatten() for v in some]))

    text = ""
    if {"reverse_kl", "softened_reverse_kl"} <= set(rows):
        softened = {
            f"{setting}, {target}": [against_reverse_kl([v[metric][k]], "softened_reverse_kl") for metric in METRICS]
            for setting, v in results.items()
            for k, target in enumerate(TARGETS)
        }
        text += table("Softened minus reverse KL: mean [95 % interval] over seeds", "setting", softened)
    if "reverse_kl" in rows and "scratch" in results and len(results) > 1:
        k = rows.index("reverse_kl")
        ways = {
            f"{setting}, {target}": [interval(v[metric][j, k] - results["scratch"][metric][j, k]) for metric in METRICS]
            for setting, v in results.items()
            if setting != "scratch"
            for j, target in enumerate(TARGETS)
        }
        text += table("Reverse KL: setting minus scratch, mean [95 % interval] over seeds", "setting", ways)
    if "reverse_kl" in rows:
        pooled = {
            name: [against_reverse_kl([v[metric] for v in results.values()], name) for metric in METRICS]
            for name in rows
            if name != "reverse_kl"
        }
        text += table("Row minus reverse KL: mean [95 % interval] over settings, targets and seeds", "row", pooled)
    for setting, values in results.items():
        for k, target in enumerate(TARGETS):
            cells = {
                name: [f"{v[k, j].mean():.2f} ± {v[k, j].std():.2f}" for v in values.values()]
                for j, name in enumerate(rows)
            }
            text += table(f"{setting}, {target}: mean ± standard deviation over seeds", "row", cells)
    return text


def interval(pairs: Tensor) -> str:
    """Mean and Student's 95 % interval of paired differences [n]."""
    from scipy.stats import t as student_t

    half = student_t.ppf(0.975, len(pairs) - 1) * pairs.std() / math.sqrt(len(pairs))
    return f"{pairs.mean():+.2f} [{pairs.mean() - half:+.2f}, {pairs.mean() + half:+.2f}]"


def draw(results: dict[str, Values], rows: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(len(TARGETS), len(METRICS), sharex=True)
    for column, (metric, label) in enumerate(METRICS.items()):
        for line, target in enumerate(TARGETS):
            ax = axes[line, column]
            for k, (setting, values) in enumerate(results.items()):
                v, at = values[metric][line], torch.arange(len(rows)) + 0.15 * (k - (len(results) - 1) / 2)
                ax.errorbar(at, v.mean(1), v.std(1), fmt="o", ms=4, capsize=2, lw=1, label=setting)
            ax.set_title(f"{label}, {target}", fontsize=10)
            ax.set_xticks(range(len(rows)), [name.replace("_", "\n") for name in rows], fontsize=7)
            ax.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(results))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Mode coverage of every divergence on two mixtures of Gaussians.")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rows", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--draw", type=int, default=0, help="another number, other seeds")
    parser.add_argument("--iterations", type=int, default=1000, help="of each stage")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="mode_coverage", help="of the files written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results, wall, cpu = {}, time.perf_counter(), time.process_time()
    for name in args.settings:
        results[name] = run(SETTINGS[name], args.rows, args.seeds, args.draw, args.iterations)
        print(f"{name}: done after {time.perf_counter() - wall:.0f} s", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "command": shlex.join(["python", "benchmarks/mode_coverage.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip() if commit.returncode == 0 else "unknown",
        "hardware": f"{os.cpu_count()}-core CPU, one thread",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - wall),
        "cpu_seconds": round(time.process_time() - cpu),
    }
    write(results, args.rows, about, args.out / args.name)
    means = {
        setting: {m: dict(zip(args.rows, v.mean((0, 2)).tolist(), strict=True)) for m, v in values.items()}
        for setting, values in results.items()
    }
    print(json.dumps({**about, "mean_over_targets_and_seeds": means}))


def write(results: dict[str, Values], rows: list[str], about: dict[str, str | int], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    raw = {s: {m: v.double().mul(1e4).round().div(1e4).tolist() for m, v in d.items()} for s, d in results.items()}
    axes = {"axes": ["target", "row", "seed"], "targets": list(TARGETS), "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps({**about, **axes, "results": raw}) + "\n")
    draw(results, rows, stem.with_suffix(".png"))
    note = stem.with_suffix(".md")
    above = note.read_text().split(MARKER)[0] if note.exists() else "# Mode coverage\n\n"
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    note.write_text(f"{above}{MARKER}\n\n{facts}\n{tables(results, rows)}")


if __name__ == "__main__":
    main()
