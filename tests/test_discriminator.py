"""The discriminator's head: what it sees, what it says, and that the teacher is cut where it is tapped."""

from __future__ import annotations

import pytest
import torch
from small_models import LATENTS, random_latents
from torch import nn

from fvgen.models.condition import Condition
from fvgen.models.critic import Critic
from fvgen.models.head import DiscriminatorHead
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.objectives.gan import discriminator_loss


def head_of(width: int = 32) -> DiscriminatorHead:
    torch.manual_seed(0)
    return DiscriminatorHead(width, channels=8)


def features(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, C, F, h', w']"""
    return torch.randn(2, 32, 9, 9, 10, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_one_logit_per_place_and_time():
    assert head_of()(features()).shape == (2, 9, 9, 10)


def test_how_features_lie_in_memory_makes_no_difference():
    """Channels last, as those of token sequences do: there torch 2.6 itself crashes."""
    last = features().contiguous(memory_format=torch.channels_last_3d)
    gradients = []
    for tapped in (features(), last):
        head = head_of()
        head(tapped).square().mean().backward()
        gradients.append(head.layers[0].weight.grad)
    assert torch.equal(*gradients)


@torch.no_grad()
def test_half_precision_features_are_judged_in_full_precision():
    logits = head_of()(features(dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head_of()(features()), rtol=0, atol=0.1)


def test_without_norms_a_logit_sees_three_cells_around_it():
    head = head_of()
    for name, layer in head.layers.named_children():
        if isinstance(layer, nn.GroupNorm):
            head.layers[int(name)] = nn.Identity()
    x = features().requires_grad_()
    head(x)[0, 4, 4, 5].backward()
    seen = x.grad[0].abs().sum(dim=0) > 0
    expected = torch.zeros(9, 9, 10, dtype=torch.bool)
    expected[1:8, 1:8, 2:9] = True
    assert torch.equal(seen, expected) and not x.grad[1].any()


def test_it_learns_to_call_real_positive():
    head, real, fake = head_of(), features(1), features(2).tanh()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        discriminator_loss(head(real), head(fake)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert (head(real) > 0).float().mean() > 0.9 and (head(fake) < 0).float().mean() > 0.9


def test_it_survives_the_disk(tmp_path):
    head = head_of()
    head.save_pretrained(tmp_path)
    again = DiscriminatorHead.from_pretrained(tmp_path)
    assert again.config.channels == 8 and torch.equal(again(features()), head(features()))


def test_group_norm_must_fit():
    with pytest.raises(ValueError, match="divisible"):
        DiscriminatorHead(32, channels=12, norm_num_groups=8)


def test_teacher_stops_at_its_middle_and_sees_the_timestep(teacher: ViewCrafterPipeline):
    frozen, head = teacher.teacher(), head_of(teacher.unet.config.model_channels * 2)
    critic, ran = Critic(frozen, ("middle",), head), []
    hooks = [block.register_forward_hook(lambda *_: ran.append(1)) for block in teacher.unet.output_blocks]
    condition = Condition(render_latents=random_latents(2, seed=1), **teacher.nulls()[0])
    try:
        with torch.no_grad():
            early = critic.logits(random_latents(2), torch.tensor([100, 900]), condition)
            late = critic.logits(random_latents(2), torch.tensor([100, 300]), condition)
    finally:
        for hook in hooks:
            hook.remove()
    assert early.shape == (2, LATENTS[1], LATENTS[2] // 2, LATENTS[3] // 2) and not ran
    torch.testing.assert_close(early[0], late[0])
    assert (early[1] - late[1]).abs().max() > 1e-3
