"""`fvgen policy`: where should a finished student land? A table of what each timestep earns, and a DDPNet learnt of it.

VideoScene (Wang et al. 2025, section 3.3) trains its policy beside the student, on rewards of a network that still
moves. Here the student is finished: it is evaluated once at every arm of every clip, with one noise for all arms of a
clip, and whatever is learnt afterwards costs seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fvgen.clips.latents import LatentSet, load_latents
from fvgen.clips.worlds import WORLDS
from fvgen.diffusion.samplers import leap
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.run_folder import finished_stage, read_run_config
from fvgen.distill.trainer import open_clips
from fvgen.errors import UserError
from fvgen.metrics.image import lpips
from fvgen.models.policy import ARMS, DDPNet
from fvgen.objectives.policy import full_information, reinforce
from fvgen.pipelines.folders import check_device, load_pipeline, save_model
from fvgen.pipelines.leap import LeapPipeline
from fvgen.shards.encoders import load_encoders, placed
from fvgen.shards.reader import ShardSet
from fvgen.system.doors import problem
from fvgen.system.files import busy, judge_output, write_json

REPORT = "policy.json"
HELD_OUT = 5  # every fifth clip, or room, is not learnt from
Denoise = Callable[[Tensor, Tensor], Tensor]
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FitSettings:
    """All that decides about the policy beside the table.

    method: "full" information, or "reinforce": the policy draws an arm and sees its reward alone. entropy: weight of
    the policy's entropy, rewards being in units of their spread. iterations, batch, lr: of Adam.
    """

    method: Literal["full", "reinforce"] = "full"
    iterations: int = 1000
    batch: int = 32
    lr: float = 1e-3
    entropy: float = 0.01
    seed: int = 0


# --- The table ---


@torch.no_grad()
def rewards_of(
    denoiser: Denoise,
    schedule: NoiseSchedule,
    start: Tensor,
    truth: Tensor,
    noise: Tensor,
    arms: Sequence[int],
    decode: Decode | None = None,
    lpips_weight: float = 0.0,
) -> Tensor:
    """[B, K]: -(MSE + w LPIPS) of leaps from ``start`` [B, C, F, h, w], noised with one ``noise``, at each of the arms.

    MSE is that of latents; LPIPS, where w > 0, that of the frames [B, F, 3, H, W] that ``decode`` makes of both.
    """
    true_frames = decode(truth) if lpips_weight and decode is not None else None
    rows = []
    for arm in arms:
        t = torch.full((len(start),), arm, dtype=torch.long, device=start.device)
        x0 = leap(denoiser, start, schedule, t, noise)
        reward = -(x0 - truth).square().flatten(1).mean(1)
        if true_frames is not None and decode is not None:
            distance, _ = lpips(decode(x0).flatten(0, 1), true_frames.flatten(0, 1))
            reward = reward - lpips_weight * distance.view(len(start), -1).mean(1).to(reward)
        rows.append(reward)
    return torch.stack(rows, dim=1)


def table_of(
    pipeline: LeapPipeline,
    data: LatentSet,
    arms: Sequence[int],
    count: int,
    seed: int = 0,
    lpips_weight: float = 0.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """(starts [N, C, F, h, w], rewards [N, K]) of the first ``count`` clips, on the CPU; each clip has a noise of its
    own."""
    starts, rewards = [], []
    for index in range(count):
        batch = data.batch([index], pipeline.device)
        start = pipeline.family.start(batch.condition).float()
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
        denoiser = pipeline.denoiser()
        rewards.append(
            rewards_of(
                lambda x_t, t, denoiser=denoiser, batch=batch: denoiser(x_t, t, batch.condition),
                pipeline.schedule,
                start,
                batch.latents,
                noise.to(start),
                arms,
                pipeline.decode_latents,
                lpips_weight,
            ).cpu()
        )
        starts.append(start.cpu())
        on_progress(index + 1, count)
    return torch.cat(starts), torch.cat(rewards)


# --- The policy ---


def fit_policy(starts: Tensor, rewards: Tensor, arms: Sequence[int], settings: FitSettings) -> DDPNet:
    """A DDPNet for starts [N, C, F, h, w] whose arms earn ``rewards`` [N, K]."""
    torch.manual_seed(settings.seed)
    policy, generator = DDPNet(starts.shape[1], list(arms)), torch.Generator().manual_seed(settings.seed)
    advantage = rewards - rewards.mean(1, keepdim=True)
    rewards = advantage / advantage.std().clamp(min=1e-12)
    adam, baseline = torch.optim.Adam(policy.parameters(), settings.lr), 0.0
    for _ in range(settings.iterations):
        chosen = torch.randint(len(starts), (settings.batch,), generator=generator)
        logits, earned = policy(starts[chosen]), rewards[chosen]
        if settings.method == "full":
            loss = full_information(logits, earned, settings.entropy)
        else:
            arm = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)
            reward = earned.gather(1, arm)[:, 0]
            loss = reinforce(logits, arm[:, 0], reward, baseline, settings.entropy)
            baseline += 0.1 * (reward.mean().item() - baseline)
        adam.zero_grad()
        loss.mean().backward()
        adam.step()
    return policy.eval()


def report_of(policy: DDPNet, starts: Tensor, rewards: Tensor, learnt: Tensor) -> dict[str, Any]:
    """What the arms, the best constant one (of the clips that were ``learnt`` [N] from), the policy and the best arm of
    each clip earn, and how often the policy takes which."""
    arms = list(policy.config.arms)
    with torch.no_grad():
        taken = torch.cat([policy(part).argmax(1) for part in starts.split(64)])
    constant = int(rewards[learnt].mean(0).argmax())
    found: dict[str, Any] = {"arms": arms, "best_constant": arms[constant]}
    for name, part in (("learnt", learnt), ("held_out", ~learnt)):
        if part.any():
            own, table = taken[part], rewards[part]
            found[name] = {
                "clips": len(table),
                "reward_by_arm": [round(value, 6) for value in table.mean(0).tolist()],
                "best_constant": table[:, constant].mean().item(),
                "policy": table.gather(1, own[:, None]).mean().item(),
                "oracle": table.amax(1).mean().item(),
                "histogram": {str(arms[arm]): count for arm, count in sorted(Counter(own.tolist()).items())},
            }
    return found


# --- The command ---


def refit(
    run: str | Path,
    data: str | None = None,
    out: str | Path | None = None,
    settings: FitSettings = FitSettings(),
    clips: int = 256,
    lpips_weight: float = 0.0,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, dict[str, Any]]:
    """The student of a finished stage (or in a model folder) with a policy, as the model folder ``out``, RUN/policy if
    not given; returns the folder and the report, which stands in its policy.json, too.

    Args:
        data: as the stage's setting; the run's own if not given.
        clips: how many are in the table at most; every fifth is only scored.

    Raises UserError for a run without a student that leaps, and data that do not fit it.
    """
    run = Path(run)
    check_device(device)
    if problem(run / "config.yaml") is None:
        config = read_run_config(finished_stage(str(run)))
        folder, teacher, data = run / "student", config.run.teacher, data or config.data.data
    else:
        folder, teacher = run, str(run)
        if data is None or out is None:
            what = "what to learn from with --data" if data is None else "where to write with --out"
            raise UserError(f"{run} is no run's folder; say {what}")
    out = judge_output(out or run / "policy", inputs=[folder])
    pipeline = load_pipeline(folder, LeapPipeline)
    arms = [arm for arm in ARMS if arm <= pipeline.config.t_max]
    if len(arms) < 2:
        raise UserError(
            f"the student in {run} learned t up to {pipeline.config.t_max}: there is nothing to choose among"
        )
    encoders = load_encoders(teacher)
    opened = open_clips(data, clips, encoders, teacher)
    latents = opened if isinstance(opened, ShardSet) else load_latents(opened, placed(encoders, device))
    count = min(clips, len(latents))
    together = WORLDS[data].paths if data in WORLDS else 1  # clips of one room are learnt from or held out together
    learnt = torch.arange(count) // together % HELD_OUT != HELD_OUT - 1
    if count < HELD_OUT * together:
        raise UserError(f"{data} holds {count} clips; a policy needs at least {HELD_OUT * together}")
    with busy(out):
        starts, rewards = table_of(pipeline.to(device), latents, arms, count, settings.seed, lpips_weight, on_progress)
        policy = fit_policy(starts[learnt], rewards[learnt], arms, settings)
        report = report_of(policy, starts, rewards, learnt)
        report |= {"lpips_weight": lpips_weight, "data": data, **asdict(settings)}
        pipeline.register_modules(policy=policy)
        save_model(pipeline.to("cpu"), out)
        write_json(out / REPORT, report)
    return out, report
