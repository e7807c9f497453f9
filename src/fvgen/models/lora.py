"""One frozen network in several roles: each is a LoRA adapter (Hu et al. 2021) on it, changing roles is changing them.

Needs the package peft (the extra ``train``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fvgen.errors import UserError, first_line
from fvgen.models.denoiser import Call, Prediction
from fvgen.system.packages import install


class SharedBackbone:
    """A frozen network and its roles; called outside of `playing` it is itself, the teacher.

    ``targets``: ends of the names of the layers that get an adapter, the family's own. Raises UserError where peft is
    missing.
    """

    def __init__(self, network: nn.Module, roles: Sequence[str], rank: int, targets: Sequence[str]) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            reason = first_line(error)
            raise UserError(f"share_backbone=true needs the package peft ({reason}); `{install('train')}`") from error
        self.network, self.role = network.requires_grad_(False), None
        dtype = next(network.parameters()).dtype
        for role in roles:  # alpha = rank: the adapter's product is added as it is
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several roles are the point
                inject_adapter_in_model(config, network, adapter_name=role)
        self.layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if ".lora_" in name:
                parameter.data = parameter.data.to(dtype)
        network.eval()
        self._switch(None)

    @contextmanager
    def playing(self, role: str | None) -> Iterator[None]:
        """Inside, the network is ``role``; None is the network without adapter."""
        before = self.role
        self._switch(role)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, role: str | None) -> None:
        # peft's own set_adapter also takes the other adapters' requires_grad away, and with it the gradients of graphs
        # that were made in another role.
        self.role = role
        for layer in self.layers:
            layer._disable_adapters = role is None
            if role is not None:
                layer._active_adapter = [role]

    def checkpointed(self, block: nn.Module, *args: Any) -> Any:
        """For `enable_gradient_checkpointing`: a block computed again in the backward pass plays the role it had."""
        role = self.role

        def run(*again: Any) -> Any:
            with self.playing(role):
                return block(*again)

        return checkpoint(run, *args, use_reentrant=False)


class Role(nn.Module):
    """The shared network in one role, to be used like that network; its only parameters are the adapter's."""

    def __init__(self, backbone: SharedBackbone, role: str) -> None:
        super().__init__()
        self._backbone, self._role = [backbone], role  # in a list: not a submodule, whose weights would count as ours
        pairs = ((n, p) for n, p in backbone.network.named_parameters() if ".lora_" in n and f".{role}." in n)
        self.adapter = nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in pairs})

    @property
    def config(self) -> Any:
        return self._backbone[0].network.config

    @contextmanager
    def playing(self) -> Iterator[nn.Module]:
        """Inside, the network itself, in this role."""
        with self._backbone[0].playing(self._role):
            yield self._backbone[0].network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.playing() as network:
            return network(*args, **kwargs)


def in_role(call: Call) -> Call:
    """The family's ``call`` for a network that is a `Role`."""

    def run(network: Role, *args: Any, **kwargs: Any) -> Prediction:
        with network.playing() as itself:
            return call(itself, *args, **kwargs)

    return run


@torch.no_grad()
def merged_weights(network: nn.Module, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own state dictionary with an adapter added in: a network like any other.

    ``adapter`` holds `Role`'s parameters by name (any prefix before ``adapter.``); ``network`` may carry adapters,
    which do not count.
    """
    own = {name.replace(".base_layer", ""): w for name, w in network.state_dict().items() if ".lora_" not in name}
    weights = {name: weight.detach().float().cpu() for name, weight in own.items()}
    parts = {name.rpartition("adapter.")[2].replace("/", "."): tensor.float().cpu() for name, tensor in adapter.items()}
    for name, down in parts.items():
        layer, found, rest = name.partition(".lora_A.")
        if found:
            up = parts[f"{layer}.lora_B.{rest}"]
            weight = weights[f"{layer}.weight"]
            weights[f"{layer}.weight"] = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return weights
