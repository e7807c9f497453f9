"""What turns a loss into an update: plain PyTorch for one process, DeepSpeed's ZeRO for any number behind one face.

The loop knows only `Engine`. This is the one module that imports deepspeed, and only when a run asks for it.

Both keep float32 "master" weights as a list of tensors, the own shards of all weights: whole tensors in one process,
slices of one flat vector under ZeRO. `gather` and `scatter` lead from such a list to named whole tensors and back, so a
checkpoint is the same file whatever wrote it, and can be read at another number of processes or without DeepSpeed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fvgen.distill.settings import Optimizer
from fvgen.distill.zero_settings import clips_at_a_time, zero_settings
from fvgen.errors import UserError, first_line
from fvgen.system.environment import number
from fvgen.system.packages import install
from fvgen.system.processes import World

if TYPE_CHECKING:
    from fvgen.distill.settings import StageConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Optimization:
    """AdamW's settings and those of an update."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    accumulation: int = 1
    fused: bool = False

    def adamw(self, parameters: Sequence[Tensor]) -> torch.optim.AdamW:
        """The optimiser. ``fused`` (one kernel, on the device throughout) rounds differently from the default."""
        settings = {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}
        return torch.optim.AdamW(parameters, **settings, **({"fused": True} if self.fused else {}))


class Engine(Protocol):
    """One network and its optimiser."""

    module: nn.Module
    masters: list[Tensor]
    shapes: dict[str, torch.Size]

    def update(self, loss: Tensor) -> Tensor | None:
        """Add the gradient of the scalar ``loss``; with the last part of an update make the step and return the norm of
        the whole gradient before clipping. A norm that is not finite means that the step was skipped, everywhere."""

    def set_rate(self, lr: float) -> None:
        """Of the updates from now on."""

    def gather(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Shards shaped as `masters` to whole float32 tensors on the CPU by parameter name (main process only; others
        get an empty mapping). Every process must call it."""

    def scatter(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """The inverse: own shards of named whole tensors. Raises KeyError or RuntimeError for tensors of others."""

    def start_at(self, whole: Mapping[str, Tensor]) -> None:
        """Take these named whole float32 tensors for the master weights."""

    def spread(self, shards: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Copy shards shaped as `masters` into the parameters of another network, in the order of the own ones, whole
        in every process, each of which must call this. Not for ZeRO-3."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _Optimized:
    """What both engines share: a checkpoint of master weights and AdamW's moments as named whole tensors."""

    optimizer: torch.optim.Optimizer
    masters: list[Tensor]

    def set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        states = [self.optimizer.state.get(master, {}) for master in self.masters]
        pairs = list(zip(states, self.masters, strict=True))
        moments = {key: self.gather([s.get(key, torch.zeros_like(m)) for s, m in pairs]) for key in MOMENTS}
        steps = states[0]["step"].item() if states[0] else 0.0
        return {"module": self.gather([m.detach() for m in self.masters]), "step": steps, **moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        moments = {key: self.scatter(state[key]) for key in MOMENTS}
        self._copy(state["module"])
        for index, master in enumerate(self.masters):
            if state["step"] == 0:
                self.optimizer.state.pop(master, None)
                continue
            step_at = master.device if getattr(self, "fused", False) else "cpu"
            own = {key: moments[key][index].to(master.device) for key in MOMENTS}
            self.optimizer.state[master] = {"step": torch.tensor(float(state["step"]), device=step_at), **own}
        self._publish()

    @torch.no_grad()
    def start_at(self, whole: Mapping[str, Tensor]) -> None:
        self._copy(whole)
        self._publish()

    def _copy(self, whole: Mapping[str, Tensor]) -> None:
        torch._foreach_copy_([m.data for m in self.masters], self.scatter(whole))


class PlainEngine(_Optimized):
    """One module and its AdamW on one device. Weights narrower than float32 get float32 masters."""

    def __init__(self, module: nn.Module, settings: Optimization) -> None:
        self.module, self.settings, self.fused = module, settings, settings.fused
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.shapes = {name: p.shape for name, p in named}
        self.narrow = any(p.dtype != torch.float32 for p in self.parameters)
        self.masters: list[Tensor] = (
            [p.detach().float().clone() for p in self.parameters] if self.narrow else list(self.parameters)
        )
        self.optimizer = settings.adamw(self.masters)
        self.parts = 0
        self.losses_finite: Tensor | None = None

    def update(self, loss: Tensor) -> Tensor | None:
        """Other modules' parameters get no gradient."""
        finite = loss.detach().isfinite()
        self.losses_finite = finite if self.parts == 0 else self.losses_finite & finite
        self.parts += 1
        many = self.settings.accumulation > 1
        (loss / self.settings.accumulation if many else loss).backward(inputs=self.parameters)
        if self.narrow:
            self._widen()
        if self.parts < self.settings.accumulation:
            return None
        self.parts = 0
        return self._step()

    def _widen(self) -> None:
        """Add this part's gradients to those of the masters: a sum in bfloat16 would lose what is 256 times smaller."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            part, parameter.grad = parameter.grad.float(), None
            master.grad = part if master.grad is None else master.grad.add_(part)

    def _step(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.settings.clip_norm)
        norm = torch.where(self.losses_finite, norm, torch.inf)
        if self.fused:  # the kernel itself skips: nothing waits for the device
            self.optimizer.found_inf = (~norm.isfinite()).float()
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # now, not later: no two networks' gradients are ever in memory
        self._publish()
        return norm

    @torch.no_grad()
    def _publish(self) -> None:
        if self.narrow:
            torch._foreach_copy_(self.parameters, self.masters)

    @torch.no_grad()
    def spread(self, shards: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        torch._foreach_copy_([parameter.data for parameter in parameters], list(shards))

    def gather(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: shard.detach().cpu() for name, shard in zip(self.names, shards, strict=True)}

    def scatter(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        if whole.keys() != set(self.names):
            raise KeyError("other parameter names")
        shards = [whole[name].to(m.device, copy=True) for name, m in zip(self.names, self.masters, strict=True)]
        if any(shard.shape != master.shape for shard, master in zip(shards, self.masters, strict=True)):
            raise RuntimeError("other parameter shapes")
        return shards


class _Held(nn.Module):
    """Lets DeepSpeed own ``module`` while the updates call it directly, several times each; what goes through
    DeepSpeed's `forward` is the loss, once per backward pass, as it expects."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class DeepSpeedEngine(_Optimized):
    """One module under ZeRO-1, 2 or 3. DeepSpeed averages the gradients of all processes, clips by the global norm, and
    skips a step whose norm is not finite."""

    def __init__(self, module: nn.Module, settings: Optimization, json_settings: dict[str, Any]) -> None:
        deepspeed = import_deepspeed()
        # The module keeps its type: DeepSpeed would make a float32 head bfloat16 for its neighbours' sake.
        narrow = any(p.dtype == torch.bfloat16 for p in module.parameters())
        json_settings = json_settings | {"bf16": {"enabled": narrow, "check_grad_overflow": narrow}}
        self.module = module
        self.named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.shapes = {name: p.shape for name, p in self.named}  # ZeRO-3 empties the parameters
        offload = json_settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        parameters = [p for _, p in self.named]
        if offload and torch.cuda.is_available():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            adamw = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
            optimizer = DeepSpeedCPUAdam(parameters, adamw_mode=True, **adamw)
        else:
            optimizer = settings.adamw(parameters)
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=_Held(module), optimizer=optimizer, config=json_settings, dist_init_required=False
        )
        self.optimizer, self.fused = self.zero.optimizer, settings.fused
        self.partitioned = json_settings["zero_optimization"]["stage"] == 3
        self.masters = list(
            self.zero.fp32_partitioned_groups_flat if self.partitioned else self.zero.single_partition_of_fp32_groups
        )

    def update(self, loss: Tensor) -> Tensor | None:
        loss = self.engine(loss)
        last = self.engine.is_gradient_accumulation_boundary()
        self.engine.backward(loss)
        self.engine.step()
        if not last:
            return None
        norm = torch.inf if self.zero.overflow else self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=loss.device)

    @torch.no_grad()
    def gather(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """DeepSpeed can gather its master weights: the shards take their place for the time of it."""
        from deepspeed.utils import safe_get_full_fp32_param

        before = [master.detach().clone() for master in self.masters]
        whole = {}
        try:
            self._fill(shards)
            for name, parameter in self.named:
                tensor = safe_get_full_fp32_param(parameter)
                if torch.distributed.get_rank() == 0:
                    whole[name] = tensor.reshape(self.shapes[name]).cpu()
        finally:
            self._fill(before)
        return whole

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if whole.keys() != self.shapes.keys():
            raise KeyError("other parameter names")
        if any(whole[name].shape != shape for name, shape in self.shapes.items()):
            raise RuntimeError("other parameter shapes")
        before = [master.detach().clone() for master in self.masters]
        try:
            for name, parameter in self.named:
                value = whole[name].to(self.masters[0].device)
                if self.partitioned:
                    safe_set_local_fp32_param(parameter, self._own_part(value, parameter.partition_numel()))
                else:
                    safe_set_full_fp32_param(parameter, value)
            return [master.detach().clone() for master in self.masters]
        finally:
            self._fill(before)

    @torch.no_grad()
    def spread(self, shards: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """The module's weights take the shards' values, are copied, and come back."""
        assert not self.partitioned, "under ZeRO-3 no process has a whole weight"
        before = [master.detach().clone() for master in self.masters]
        try:
            self._fill(shards)
            self._publish()
            torch._foreach_copy_([p.data for p in parameters], [own.data for _, own in self.named])
        finally:
            self._fill(before)
            self._publish()

    @staticmethod
    def _own_part(value: Tensor, size: int) -> Tensor:
        """This process's part under ZeRO-3: equal parts, the last one padded with zeros."""
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
        return padded[rank * size : (rank + 1) * size]

    def _fill(self, values: Sequence[Tensor]) -> None:
        for master, value in zip(self.masters, values, strict=True):
            master.data.copy_(value)

    @torch.no_grad()
    def _publish(self) -> None:
        """Make the module's weights follow the masters."""
        if not self.partitioned:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for group in range(len(self.masters)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero._post_step(set())


def import_deepspeed() -> ModuleType:
    """The package; raises UserError where it is not installed."""
    try:
        import deepspeed
    except ImportError as error:
        reason = first_line(error)
        raise UserError(
            f"--deepspeed needs the package deepspeed ({reason}); `{install('train')}`, or leave --deepspeed out"
        ) from error
    return deepspeed


def _judge_zero(file: str, settings: dict[str, Any]) -> None:
    """Raises UserError for names and values that DeepSpeed does not take."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**settings)
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": first_line(error)}
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise UserError(f"{file}: DeepSpeed refuses {name} ({first['msg']}); correct or remove it") from None


def join_world(config: StageConfig) -> World:
    """This process among those that the launcher started. Raises UserError for settings that cannot work there.

    The launcher (`deepspeed`, `torchrun`, or `srun` with these set by hand) tells through RANK, WORLD_SIZE and
    LOCAL_RANK.
    """
    size, rank = max(1, number("WORLD_SIZE", 1)), number("RANK", 0)
    if not config.memory.deepspeed:
        if size > 1:
            raise UserError(f"{size} processes were started without --deepspeed FILE; give one, or start one process")
        clips_at_a_time(config, 1)
        return World()
    settings = zero_settings(config, World(size=size))  # wrong settings first: connecting takes a while
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if config.run.device == "cpu" else "cuda")
    deepspeed = import_deepspeed()
    deepspeed.utils.logger.setLevel("WARNING")
    _judge_zero(config.memory.deepspeed, settings["zero_optimization"])
    local_rank = number("LOCAL_RANK", 0)
    if config.run.device.startswith("cuda"):
        if config.run.device != "cuda":
            device = config.run.device
            raise UserError(f"device={device}: under --deepspeed every process takes its own; give device=cuda")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU ({torch.cuda.device_count()} found); "
                "start fewer with --num_gpus, or give device=cpu"
            )
        torch.cuda.set_device(local_rank)
    if not torch.distributed.is_initialized():
        for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(key, value)
        port = os.environ.setdefault("MASTER_PORT", "29500")
        try:
            deepspeed.init_distributed("gloo" if config.run.device == "cpu" else "nccl", auto_mpi_discovery=False)
        except (RuntimeError, OSError) as error:  # torch's DistNetworkError is a RuntimeError
            reason = first_line(error)
            if "EADDRINUSE" in str(error) or "in use" in str(error):
                raise UserError(f"port {port} is in use by another run; give deepspeed --master_port=OTHER") from error
            raise UserError(f"the {size} processes cannot connect ({reason}); check hosts and ports") from error
    return World(rank, size, local_rank)


def make_engine(module: nn.Module, optimizer: Optimizer, config: StageConfig, world: World) -> Engine:
    """The engine that ``config`` asks for; ``module`` is on its device already."""
    memory = config.memory
    fused = config.run.device.startswith("cuda") if memory.fused is None else memory.fused
    betas, decay = (optimizer.beta1, optimizer.beta2), optimizer.weight_decay
    settings = Optimization(optimizer.lr, betas, decay, optimizer.clip_norm, memory.accumulation, fused)
    if memory.deepspeed:
        return DeepSpeedEngine(module, settings, zero_settings(config, world, optimizer.clip_norm))
    return PlainEngine(module, settings)


def shard_frozen(module: nn.Module, config: StageConfig, world: World) -> None:
    """Let DeepSpeed spread a frozen network over all processes (ZeRO-3), or keep it in the CPU's memory
    (``offload_teacher``). It is used as before; gradients still flow through it."""
    if not config.memory.deepspeed:
        return
    settings = zero_settings(config, world)
    if settings["zero_optimization"]["stage"] < 3 and not config.memory.offload_teacher:
        return
    zero = {key: value for key, value in settings["zero_optimization"].items() if key != "offload_optimizer"}
    zero["stage"] = 3
    if config.memory.offload_teacher:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    import_deepspeed().initialize(model=module, config=settings | {"zero_optimization": zero}, dist_init_required=False)
