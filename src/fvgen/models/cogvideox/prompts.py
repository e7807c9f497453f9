"""A prompt and a negative one, encoded beforehand: T5 XXL is as large as the teacher and has one text to read."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class EncodedPrompts(ModelMixin, ConfigMixin):
    """Both are [1, tokens, dim], as `CogVideoXImageToVideoPipeline.encode_prompt` gives them."""

    @register_to_config
    def __init__(self, tokens: int = 226, dim: int = 4096) -> None:
        super().__init__()
        self.register_buffer("positive", torch.zeros(1, tokens, dim))
        self.register_buffer("negative", torch.zeros(1, tokens, dim))

    @classmethod
    def of(cls, positive: Tensor, negative: Tensor) -> EncodedPrompts:
        """From encoded texts, each [1, tokens, dim]."""
        prompts = cls(*positive.shape[1:])
        prompts.positive.copy_(positive)
        prompts.negative.copy_(negative)
        return prompts
