"""An iteration without numbers: the real updates on tensors that have shapes only, its memory and its work counted.

Everything that a method's iteration allocates is followed, in order, on torch's fake tensors; the 1.4 billion weights
of the published model take seconds and no memory. What is counted is what tensors occupy: an allocator's rounding and
a kernel's scratch space are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from fvgen.clips.latents import LatentBatch
from fvgen.distill.config import changed
from fvgen.distill.draws import Draws
from fvgen.distill.learners import Learner
from fvgen.distill.methods import METHODS
from fvgen.distill.methods.base import Part, Setup
from fvgen.distill.settings import StageConfig
from fvgen.geometry.plucker import PACKED
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Teacher
from fvgen.models.family import Blueprint, Family, Size
from fvgen.models.lora import Role
from fvgen.system.work import Work

STILL = ("teacher", "followers")
"""Weights that do not learn: the teacher's, and of other networks what is nobody else's."""


@dataclass(frozen=True)
class Profile:
    """What one iteration of one process takes. Bytes, and floating point operations.

    ``timeline`` holds the bytes of (activations, gradients) at every moment that may be the peak, in order. Weights and
    optimisers are not in it.
    """

    flops: float
    timeline: tuple[tuple[int, int], ...]
    parameters: dict[str, int]  # that learn, by network or its adapter; those of `STILL` do not

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


class AlwaysLooking(Teacher):
    """At the camera, where it has a weight of its own: timesteps have no values here."""

    def nobody_looks(self, t: Tensor) -> bool:
        return False


class LastStep(Draws):
    """With simulated inputs the costliest draw: all of the student's steps."""

    def shared_integer(self, high: int) -> int:
        return high - 1

    def copy(self, rows: slice | None = None) -> LastStep:
        return LastStep(self.generator)


def outline(timeline: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The moments at which no other has more of both, in order: one of them is the peak at any share of gradients."""
    kept, most = set(), -1
    for activations, gradients in sorted(set(timeline), reverse=True):
        if gradients > most:
            kept.add((activations, gradients))
            most = gradients
    return tuple(dict.fromkeys(moment for moment in timeline if moment in kept))


def simulate(config: StageConfig, family: Family, blueprint: Blueprint, size: Size) -> Profile:
    """One iteration of ``config``'s method on the blueprint's network, in one process and without ZeRO. ``size.batch``
    clips pass at a time, in one part."""
    allocations, dealt = Allocations(), []
    # Two updates of the critics behave as any number of them: the further ones take what the first one takes.
    critics = getattr(config.method, "critic_updates", 1)
    if critics > 2:
        config = changed(config, critic_updates=2)

    def learner(
        name: str, module: nn.Module, average: bool = False, start_at: Mapping[str, Tensor] | None = None
    ) -> Learner:
        return Learner(name, module, CountingEngine(module, allocations), config.optim[name])

    with _undisturbed():
        blueprint = config.method.blueprint_of(blueprint)
        with torch.device("meta"):
            network = blueprint.network()
        latents, condition = blueprint.example(size)
        guidance = getattr(config.method, "guidance", None)
        guidance = blueprint.guidance if guidance is None else guidance
        # Its unconditional pass costs what the conditional one does: nothing need be replaced.
        weights = {"guidance": guidance, "camera_guidance": blueprint.camera_guidance}
        teacher = AlwaysLooking(network, blueprint.schedule(), family.call, [{}], **weights)
        method = METHODS[config.name].method.build(Setup(config, family, teacher, learner, base=blueprint))
        networks = {name: each.module for name, each in method.learners.items()}
        with FakeTensorMode(allow_non_fake_inputs=True):
            followers = [*method.followers, *(x for x in method.states.values() if isinstance(x, nn.Module))]
            _with_fake_weights([teacher, *networks.values(), *followers], allocations)
            shapes = {key: torch.zeros(x.shape) for key, x in condition.items()}
            views = _views(size, config.method.others) if "views" in method.needs else None
            batch = LatentBatch(torch.zeros(latents.shape), Condition(**shapes), views)
            # Two parts behave as any number of them: the second one's work is counted out again.
            parts = [Part(batch, LastStep(torch.Generator())) for _ in range(min(config.memory.accumulation, 2))]

            def deal() -> list[Part]:
                dealt.append(allocations.flops)
                return parts

            with allocations:
                method.iterate(config.run.iterations, deal)
    flops = allocations.flops + (critics - 2) * (dealt[1] - dealt[0]) if critics > 2 else allocations.flops
    counts = {name: sum(p.numel() for p in each.parameters() if p.requires_grad) for name, each in networks.items()}
    adapters = [network for network in (*networks.values(), *followers) if isinstance(_inner(network), Role)]
    learning = nn.ParameterList(p for each in networks.values() for p in each.parameters() if p.requires_grad)
    frozen = [teacher.network] if method.runs_teacher else []
    counts["teacher"] = _numel(frozen, beside=[*adapters, learning])
    counts["followers"] = _numel(followers, beside=[teacher.network, *networks.values()])
    counts["followers"] += _numel([x for x in followers if isinstance(_inner(x), Role)])
    return Profile(flops / len(parts), outline(allocations.timeline()), counts)


def _views(size: Size, others: int) -> Condition:
    count = size.frames + others
    images = torch.zeros(size.batch, count, 3, size.height, size.width, dtype=torch.uint8)
    shown = torch.ones(size.batch, count, size.height, size.width, dtype=torch.bool)
    return Condition(images=images, path=torch.zeros(size.batch, count, PACKED), shown=shown)


def _numel(modules: Sequence[nn.Module], beside: Sequence[nn.Module] = ()) -> int:
    """Of all weights, each counted once, without those that are also ``beside``."""
    others = {id(p) for module in beside for p in module.parameters()}
    return sum({id(p): p.numel() for m in modules for p in m.parameters() if id(p) not in others}.values())


def _inner(module: nn.Module) -> nn.Module | None:
    return getattr(module, "network", None)


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


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Making networks draws random numbers."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
