"""What one training iteration costs: counted work, peak memory, seconds, on the fair step benchmark's network.

    python benchmarks/training.py [--iterations 20] [--loops LOOP ...] [--out FILE.json]

One iteration is a student update and a critic update (fake score and discriminator) of stage "dmd" at guidance 5, with
softened reverse KL, four-step timesteps, float32 and AdamW: the work for which FastGen's f-distillation was counted at
39.55 GFLOP, 5,811 tensor operations and 1.23 GB of peak resident memory. ``fvgen`` runs fvgen's own updates, engines
and objectives with ``same_noise=true`` (one look at the student per iteration, as in FVGen's algorithm 1),
``fvgen-one-pass`` with ``one_pass=true`` as well (the fake score's pass for its own loss also judges the student),
``fvgen-two-views`` with the default, and ``bare`` the same work as one writes it down in plain torch, sharing only the
teacher's pass: it reproduces the 39.55 GFLOP, which shows that networks and work are equal. Wall-clock times swing with
the machine; gate on the counters. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from step_network import CONTEXT, LATENTS, TAPS, StepHead, StepNetwork, call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.config import stage_config
from fvgen.distill.draws import Draws
from fvgen.distill.learners import make_learner
from fvgen.distill.methods.base import Part
from fvgen.distill.methods.dmd import Dmd
from fvgen.distill.settings import StageConfig
from fvgen.models.condition import Condition
from fvgen.models.critic import Critic
from fvgen.models.denoiser import Denoiser, Teacher
from fvgen.objectives import RatioNormalizer, divergences, dmd, gan
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json
from fvgen.system.processes import ALONE
from fvgen.system.work import Work

FASTGEN = {"gflop": 39.55, "operations": 5811, "peak_resident_gb": 1.23}
SYNCHRONISING = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")


class Batch(NamedTuple):
    """As `fvgen.clips.latents.LatentBatch`, whose module would import the libraries of the whole package."""

    latents: Tensor
    condition: Condition


class Operations(TorchDispatchMode):
    """Counts tensor operations, and those that make Python wait for a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        name = str(func)
        if name.startswith(SYNCHRONISING):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def settings(**changes: bool) -> StageConfig:
    """Of all loops."""
    common = {"out": "unused", "batch_size": LATENTS[0], "critic_updates": 1, "guidance": 5.0}
    return stage_config("dmd", common | {"fused": True, "same_noise": True} | changes)


def method_of(config: StageConfig) -> Dmd:
    """Teacher, student and fake score of equal size, and the head."""
    torch.manual_seed(0)
    schedule = NoiseSchedule.viewcrafter(base_scale=0.7)
    nulls = [{"context": torch.randn(1, *CONTEXT[1:])}]
    networks = {"student": StepNetwork(), "fake_score": StepNetwork()}
    student, fake_score = (Denoiser(networks[name], schedule, call) for name in networks)
    head = StepHead()
    teacher = Teacher(StepNetwork(), schedule, call, nulls, guidance=config.method.guidance, rescale=0.0)
    learner = partial(make_learner, config, ALONE)
    return Dmd(
        config.method,
        teacher,
        learner("student", student, average=True),
        Critic(teacher, TAPS, head),
        learner("head", head),
        learner("fake_score", fake_score),
        RatioNormalizer(divergences.weight(config.method.divergence, torch.zeros(1)).item()),
    )


def batch() -> Batch:
    """Random clips; the network takes no render latents."""
    return Batch(torch.randn(LATENTS), Condition(context=torch.randn(CONTEXT)))


def fvgen_loop(config: StageConfig) -> Callable[[int], None]:
    """An iteration of `fvgen.distill.Trainer`, without files."""
    method, clips = method_of(config), batch()

    def iterate(iteration: int) -> None:
        method.iterate(iteration + 1, lambda: [Part(clips, Draws(torch.Generator().manual_seed(iteration)))])

    return iterate


def bare_loop(config: StageConfig) -> Callable[[int], None]:
    """The same losses with a forward pass wherever one is needed: every update has its own rollout and features."""
    method, clips = method_of(config), batch()
    teacher, student, fake_score, head = method.teacher, method.student, method.fake_score, method.critic.head
    optimizers = [torch.optim.AdamW(net.parameters(), lr=5e-5) for net in (student, fake_score, head)]
    real, condition, schedule = clips.latents, clips.condition, teacher.schedule

    def noised(x0: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.randint(20, 980, (len(x0),))
        return schedule.add_noise(x0, torch.randn_like(x0), t), t

    def step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        for each in optimizers:
            each.zero_grad()
        loss.mean().backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()

    def iterate(iteration: int) -> None:
        with torch.no_grad():
            generated = student(*noised(real), condition)
        x_t, t = noised(generated)
        prediction = fake_score.velocity(x_t, t, condition)
        step(dmd.denoising_loss(prediction, generated), optimizers[1])
        with torch.no_grad():
            features = [teacher.features(*noised(x), condition, TAPS)[0] for x in (real, generated)]
        step(gan.discriminator_loss(head(features[0]), head(features[1])), optimizers[2])

        generated = student(*noised(real), condition)
        x_t, t = noised(generated)
        x0_real, (features,) = teacher.judge(x_t, t, condition, TAPS)
        logits = head(features)
        with torch.no_grad():
            x0_fake = fake_score(x_t, t, condition)
        gradient = dmd.dmd_gradient(generated, x0_real, x0_fake)
        step(gan.generator_loss(logits) + dmd.dmd_loss(generated, gradient), optimizers[0])

    return iterate


LOOPS: dict[str, Callable[[], Callable[[int], None]]] = {
    "fvgen": lambda: fvgen_loop(settings()),
    "fvgen-one-pass": lambda: fvgen_loop(settings(one_pass=True)),
    "fvgen-two-views": lambda: fvgen_loop(settings(same_noise=False)),
    "bare": lambda: bare_loop(settings()),
}


def measure(loop: str, iterations: int) -> dict[str, object]:
    """One loop, in this process, whose peak memory counts."""
    iterate = LOOPS[loop]()
    seconds = []
    for iteration in range(iterations):
        start = time.perf_counter()
        iterate(iteration)
        seconds.append(time.perf_counter() - start)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    with Work() as work:
        iterate(iterations)
    with Operations() as operations:
        iterate(iterations + 1)
    return {
        "loop": loop,
        "gflop": round(work.flops / 1e9, 2),
        "gflop_over_fastgen": round(work.flops / 1e9 / FASTGEN["gflop"], 3),
        "operations": operations.total,
        "synchronisations": len(operations.waits),
        "peak_resident_gb": round(resident, 3),
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_min": round(min(seconds), 3),
    }


def floor() -> float:
    """GB resident in a process that has imported torch and made one optimiser, and done nothing else."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--iterations", type=positive, default=10)
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")  # a process each: peaks do not go down again
    with context.Pool(1) as pool:
        empty = pool.apply(floor)
    for loop in args.loops:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (loop, args.iterations)))
        print(rows[-1], flush=True)
    result = {"rows": rows, "torch_alone_gb": round(empty, 3), "fastgen": FASTGEN}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
