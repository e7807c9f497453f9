"""An iteration without numbers: the real updates on tensors that have shapes only, its memory and its work counted.

Everything that `fvgen.distill.steps` allocates is followed, in order, on torch's fake tensors; the 1.4 billion weights
of the published model take seconds and no memory. What is counted is what tensors occupy: an allocator's rounding and
a kernel's scratch space are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from fvgen.clips.latents import LatentBatch
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.config import StageConfig
from fvgen.distill.draws import Draws
from fvgen.distill.players import assemble
from fvgen.distill.steps import Players, roll_out, update_critics, update_critics_and_look, update_student
from fvgen.models.critic import DiscriminatorHead
from fvgen.models.denoiser import Condition, Teacher
from fvgen.models.lora import RoleUNet
from fvgen.models.viewcrafter.unet import IMAGE_TOKENS_PER_FRAME, ViewCrafterUNet
from fvgen.system.work import Work


@dataclass(frozen=True)
class Size:
    """Latents [4, frames, height, width] of a clip, and the clips that one process passes at a time."""

    batch: int
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Profile:
    """What one iteration of one process takes. Bytes, and floating point operations.

    ``timeline`` holds the bytes of (activations, gradients) at every allocation. Weights and optimisers are not in it.
    """

    flops: float
    timeline: tuple[tuple[int, int], ...]
    parameters: dict[str, int]  # weights by network, or of its adapter where it is one; the teacher's do not learn

    def peak(self, gradient_share: float = 1.0) -> tuple[int, int]:
        """(activations, gradients) in bytes at the moment that needs most, if only a share of the gradients stays."""
        activations, gradients = max(self.timeline, key=lambda now: now[0] + gradient_share * now[1])
        return activations, round(gradient_share * gradients)


class Allocations(Work):
    """Follows the storages that operations make, until they are freed, and counts work."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (storage, bytes; negative when freed)
        self.alive: dict[int, tuple[int, weakref.ref]] = {}
        self.gradients: set[int] = set()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def number(self, tensor: Tensor) -> int | None:
        """The storage's own number, if it was made in here and is still alive."""
        found = self.alive.get(id(tensor.untyped_storage()))
        return None if found is None else found[0]

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.alive or storage.nbytes() == 0:
            return
        self.count += 1
        self.events.append((self.count, storage.nbytes()))
        gone = partial(self._freed, id(storage), self.count, storage.nbytes())
        self.alive[id(storage)] = (self.count, weakref.ref(storage, gone))

    def _freed(self, key: int, number: int, size: int, _: object) -> None:
        self.alive.pop(key, None)
        self.events.append((number, -size))

    def ignore(self, tensor: Tensor) -> None:
        """It was there before."""
        storage = tensor.untyped_storage()
        self.alive[id(storage)] = (0, weakref.ref(storage))

    def timeline(self) -> tuple[tuple[int, int], ...]:
        activations = gradients = 0
        rows = [(0, 0)]
        for number, size in self.events:
            if number in self.gradients:
                gradients += size
            else:
                activations += size
            rows.append((activations, gradients))
        return tuple(rows)


class CountingEngine:
    """Makes the gradients of an update, tells whose they are, and drops them; the optimiser's memory is known."""

    def __init__(self, module: nn.Module, allocations: Allocations) -> None:
        self.module, self.allocations = module, allocations

    def update(self, loss: Tensor) -> Tensor:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        loss.backward(inputs=parameters)
        numbers = {self.allocations.number(p.grad) for p in parameters if p.grad is not None}
        self.allocations.gradients |= {number for number in numbers if number}
        for parameter in parameters:
            parameter.grad = None
        return loss.detach()


class LastStep(Draws):
    """With simulated inputs the costliest draw: all of the student's steps."""

    def shared_integer(self, high: int) -> int:
        return high - 1


def simulate(config: StageConfig, unet_settings: dict[str, Any], size: Size) -> Profile:
    """One iteration of ``config``'s stage with the UNet of ``unet_settings``, in one process and without ZeRO."""
    with _undisturbed():
        with torch.device("meta"):
            unet = ViewCrafterUNet(**unet_settings)
            settings = unet.config
            head = DiscriminatorHead(settings.model_channels * settings.channel_mult[-1], config.head_channels)
        tokens = settings.text_tokens + IMAGE_TOKENS_PER_FRAME * size.frames
        guidance = 7.5 if config.guidance is None else config.guidance
        null = torch.zeros(1, tokens, settings.context_dim)
        teacher = Teacher(unet, NoiseSchedule.viewcrafter(base_scale=0.7), null, guidance)
        allocations = Allocations()
        players = assemble(config, teacher, head, None, lambda module, lr: CountingEngine(module, allocations))
    networks = {"teacher": teacher.unet, "student": players.student.unet, "head": head}
    if players.fake_score is not None:
        networks["fake_score"] = players.fake_score.unet
    with FakeTensorMode(allow_non_fake_inputs=True):
        modules = (teacher, players.student, head, players.fake_score, players.normalizer)
        _with_fake_weights([module for module in modules if module is not None], allocations)
        shape = (size.batch, settings.out_channels, size.frames, size.height, size.width)
        condition = Condition(torch.zeros(shape), torch.zeros(size.batch, tokens, settings.context_dim))
        batch = LatentBatch(torch.zeros(shape), condition)
        with allocations:
            _iterate(players, config, batch)
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}
    counts["teacher"] -= sum(counts[name] for name, net in networks.items() if isinstance(net, RoleUNet))
    return Profile(allocations.flops, allocations.timeline(), counts)


def _with_fake_weights(modules: list[nn.Module], allocations: Allocations) -> None:
    """Put fake tensors in the place of all weights, shared ones in the place of shared ones. They do not count as
    allocated: weights were there before."""
    fakes: dict[int, Tensor] = {}
    for module in (child for each in modules for child in each.modules()):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                    fakes[id(fake)] = fake
                    allocations.ignore(fake)
                table[key] = fakes[id(tensor)]


def _iterate(players: Players, config: StageConfig, batch: LatentBatch) -> None:
    """As `Trainer.iterate`, for one process."""
    draws = LastStep(torch.Generator())
    for turn in range(config.critic_updates):
        shared = turn == config.critic_updates - 1 and config.accumulation == 1
        with torch.set_grad_enabled(shared):
            rollout = roll_out(players, config, batch, draws)
        if shared and config.same_noise:
            _, seen = update_critics_and_look(players, config, rollout, draws)
        else:
            update_critics(players, config, rollout, draws)
            seen = None
    if not shared:
        rollout = roll_out(players, config, batch, draws)
    update_student(players, config, rollout, draws, seen)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Making networks draws random numbers."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
