"""What turns a loss into an update. The loop knows only this interface; DeepSpeed will be a second one behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PlainEngine:
    """One module and its AdamW on one device."""

    def __init__(
        self, module: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, clip_norm: float
    ) -> None:
        self.module = module
        self.clip_norm = clip_norm
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=betas, weight_decay=weight_decay)

    def update(self, loss: Tensor) -> Tensor:
        """One step down the scalar ``loss``; returns the gradient's norm before clipping. Other modules' gradients
        that the backward pass could leave behind are not touched: their parameters must not require gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
