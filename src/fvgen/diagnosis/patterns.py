"""The patterns that `fvgen diagnose` knows: a row each, and the function that looks for it.

Most serious first. Limits are arithmetic where there is any; the others lie between what healthy and what collapsed
runs of the tiny preset showed (docs/diagnose.md has both). Where a number scatters from batch to batch, a pattern is
named only if it stays beyond the limit with what that scatter leaves open, so that a short run is told less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fvgen.diagnosis import critics, pictures, progress
from fvgen.diagnosis.evidence import Evidence
from fvgen.diagnosis.series import Series

Level = Literal["lost", "harm", "watch"]
LEVELS: tuple[Level, ...] = ("lost", "harm", "watch")  # no result worth having; a worse one; a cost, or a risk


@dataclass(frozen=True)
class Pattern:
    """One row.

    of: the number without which a run has no such thing (a head, a fake score), '' where all have it. needs: numbers
    (or "samples") without which it cannot be told. limit: where it begins, and why there.
    """

    name: str
    level: Level
    look: Callable[[Series], Evidence | None]
    of: str
    needs: tuple[str, ...]
    limit: str
    cause: str
    cure: str


PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        "diverged", "lost", progress.diverged, "", (),
        "max_skips iterations in a row at the end of an unfinished run: there it stops",
        "an update made weights or activations that float cannot hold; nothing mends them",
        "lower the learning rate of the network that is named (halve student_lr, head_lr or fake_score_lr), then start "
        "again from a checkpoint before it or in a new folder",
    ),
    Pattern(
        "learning rate beyond: student", "lost", progress.student_beyond, "loss_student", (),
        "student_std three times what it was at first, or a third (its answers, like the latents of real clips, have "
        "one scale); without it, a loss ten times that of the run's first quarter",
        "student_lr is too high for these weights: the updates throw its answers off the scale of latents",
        "student_lr a tenth of it; the teacher's own fine-tuning rate is the place to begin",
    ),
    Pattern(
        "learning rate beyond: head", "harm", critics.head_beyond, "loss_head", (),
        "loss_head twice that of guessing: it errs, and is sure of it",
        "head_lr is too high: each batch undoes what the one before has taught",
        "head_lr a tenth of it, or beta1=0.5, or r1_weight=0.1",
    ),
    Pattern(
        "learning rate beyond: fake score", "harm", critics.fake_beyond, "loss_fake_score", (),
        "loss_fake_score above 1 (above student_std squared where that is more): a network that always answers nothing "
        "has as much, for velocities vary as the latents do",
        "fake_score_lr is too high: what it says of the student's clips is noise, and the student follows it",
        "fake_score_lr a third of it; it may lie above student_lr, not anywhere above",
    ),
    Pattern(
        "one colour", "lost", pictures.one_colour, "", ("samples",),
        "contrast within the frames of a sample a tenth of the true clip's; two grey levels where none is known",
        "the student has collapsed to a flat answer",
        "lower student_lr; gan_weight lower, or regression_weight above 0; begin again from a healthy checkpoint",
    ),
    Pattern(
        "static video", "lost", pictures.static, "", ("samples",),
        "change from frame to frame a tenth of the true clip's; one grey level where none is known",
        "one picture satisfies the critics, which judge frames alone or see no movement in the clips",
        "look whether the data move (fvgen inspect: motion); taps that see time; regression_weight above 0",
    ),
    Pattern(
        "seeds agree", "harm", pictures.seeds_agree, "", ("seed_spread",),
        "seed_spread below 0.01 (seeds differ by less than 1 % of the clip's own contrast), or a tenth of the run's "
        "first",
        "mode collapse: the student ignores its noise",
        "lower gan_weight; divergence=jensen_shannon or forward_kl; regression_weight above 0 at first",
    ),
    Pattern(
        "head has won", "harm", critics.won, "loss_head", ("loss_student_gan",),
        "loss_head below a tenth of guessing's while the student learns: right everywhere, at 93 % certainty and more",
        "real and generated clips are told apart without effort; the student gets the same push wherever it is",
        "lower head_lr, r1_weight=0.1, a higher t_min (more noise), gan_kind=relativistic",
    ),
    Pattern(
        "head prefers the student's clips", "harm", critics.prefers_student, "head_pair_accuracy", (),
        "fewer than half of the pairs ordered rightly (95 % interval): a head that learns at all turns round; a frozen "
        "one had 21 %",
        "the head does not learn, or far too slowly, and the student runs to where it happens to say yes",
        "raise head_lr (above student_lr), critic_updates, or head_warmup",
    ),
    Pattern(
        "head learns nothing", "harm", critics.learns_nothing, "loss_head", (),
        "loss_head within 1 % of guessing's in every later iteration: nowhere surer than 56 to 44",
        "the head does not learn: rate too low, noise that hides the difference, or features without it",
        "raise head_lr or critic_updates, head_warmup=100; lower t_max; other taps",
    ),
    Pattern(
        "student does not heed the head", "harm", critics.unheeded, "head_pair_accuracy", ("loss_student_gan",),
        "more than 75 % of the pairs ordered rightly while the student learns (95 % interval): heeded heads have 60 to "
        "64 %, one whose student walked at random 89 %",
        "the adversarial gradient does not reach the student, or others drown it",
        "raise gan_weight or student_lr; compare gradient_gan with gradient_dmd in monitor.jsonl",
    ),
    Pattern(
        "density ratio saturated", "harm", critics.saturated, "log_ratio_max", ("weight_h",),
        "log_ratio_max above 5 in the median: h(r) is within 1 % of its limits, a switch and no weight",
        "the head judges content rather than density, or has won: few clips carry the update",
        "divergence=reverse_kl (needs no ratio); r1_weight=0.1; ratio_decay=0.999",
    ),
    Pattern(
        "fake score behind", "harm", critics.fake_behind, "loss_fake_score", ("error_fake", "error_teacher"),
        "its mean square error on the student's clips half again the teacher's, at the same noise: a third of it is "
        "its own",
        "the fake score does not follow the student: the difference of scores is its error, and no direction",
        "raise critic_updates; fake_score_lr lower where its loss jumps, higher where it only creeps",
    ),
    Pattern(
        "matching says nothing", "harm", critics.matching_silent, "loss_fake_score", ("gradient_dmd",),
        "gradient_dmd below 0.1: real and fake score are less than a tenth of the teacher-student gap apart",
        "the fake score still is the teacher, so that their difference is nothing",
        "raise fake_score_lr (far above student_lr in short runs) or critic_updates",
    ),
    Pattern(
        "matching is thrown about", "harm", critics.matching_wild, "loss_fake_score", ("gradient_dmd",),
        "gradient_dmd above 3: real and fake score are three times as far apart as teacher and student",
        "the fake score is off by more than the student is",
        "lower fake_score_lr or student_lr; guidance nearer 1",
    ),
    Pattern(
        "matching is drowned", "watch", critics.matching_drowned, "loss_fake_score", ("gradient_dmd", "gradient_gan"),
        "gradient_gan ten times gradient_dmd, both as weighted",
        "a live head's gradient is 10 to 50 times that of distribution matching",
        "gan_weight so that they are equals (0.02 in the tiny preset), or balance=true",
    ),
    Pattern(
        "brightness drift", "harm", pictures.brightness, "", ("samples",),
        "mean brightness of the samples a tenth of the range from the true clip's, or from the first samples'",
        "the student drifts along what no critic weighs: a constant",
        "lower student_lr; guidance nearer 1; regression_weight above 0",
    ),
    Pattern(
        "contrast drift", "harm", progress.contrast, "student_std", (),
        "student_std half again what it was in the first quarter, or two thirds, and three standard errors beyond",
        "saturation (guidance, or too large steps) or fading (an average of what could be there)",
        "guidance nearer 1 where it grows; lower student_lr, or gan_weight higher, where it fades",
    ),
    Pattern(
        "average lags", "harm", progress.average_lags, "loss_student", (),
        "ema_decay ^ updates above one half: the exported student is more than half the network it started from",
        "the average forgets too slowly for a run of this length",
        "lower ema_decay (0.96 for 50 updates), or more iterations",
    ),
    Pattern(
        "updates skipped", "watch", progress.skipped, "", (),
        "any: one now and then is harmless, a tenth of all is not",
        "values that are no numbers: too high a rate, half precision, a damaged clip",
        "lower the learning rate of the network that is named; precision=float32; fvgen inspect the data",
    ),
    Pattern(
        "resume gap", "harm", progress.gap, "", (),
        "any iteration missing in metrics.jsonl",
        "rows were lost: a full disk, a file that was edited, or folders that were put together",
        "start the stage again in a new folder: this one is not the run that its seed gives",
    ),
    Pattern(
        "work done twice", "watch", progress.repeated, "", (),
        "a tenth of the iterations",
        "the run was killed, and went on from a checkpoint that lay far behind",
        "lower checkpoint_every; stop with SIGTERM, which saves",
    ),
    Pattern(
        "waits for clips", "watch", progress.waits, "", ("data_seconds",),
        "half of the run's seconds",
        "reading is slower than training",
        "workers=4 or more; shards on a nearer disk",
    ),
)  # fmt: skip
