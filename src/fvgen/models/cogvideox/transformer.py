"""diffusers' CogVideoX transformer as it stands, and what its class leaves to callers: positions, taps, an early end.

Letters: B clips, F' latent frames, C channels, h w latent size, p patch size, N text tokens, D width. Its own layout is
[B, F', C, h, w]; a clip is F' h/p w/p tokens, frame after frame, row after row.

Facts: diffusers 0.38 to 0.42, `CogVideoXTransformer3DModel` and `CogVideoXImageToVideoPipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]
Block = Callable[..., tuple[Tensor, Tensor]]
"""(video, text, time embedding, positions) to (video, text): a module, or what runs one."""
TAP = "blocks."


def taps_of(network: nn.Module) -> tuple[str, ...]:
    """One behind each block."""
    return tuple(f"{TAP}{index}" for index in range(len(network.transformer_blocks)))


def width_of(network: nn.Module) -> int:
    """D, the same behind all blocks."""
    return network.config.num_attention_heads * network.config.attention_head_dim


def centred(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left), (bottom, right) of the largest box of ``grid``'s shape in the middle of ``base``, rounded."""
    (rows, columns), (height, width) = grid, base
    if rows * width > height * columns:
        box = height, round(height / rows * columns)
    else:
        box = round(width / columns * rows), width
    top, left = round((height - box[0]) / 2), round((width - box[1]) / 2)
    return (top, left), (top + box[0], left + box[1])


def rotary_table(network: nn.Module, frames: int, height: int, width: int, device: torch.device) -> Rotary | None:
    """(cos, sin), each [F' h/p w/p, head width] float32, for latents of a size; None for a network without rotary
    positions. (One that has them does not complain where it gets none.)

    Positions in space are those of the grid that the network was trained on, over which other grids are stretched: the
    attribute ``rotary_base`` (rows, columns of patches) where a pipeline has set one, else the size in its settings.
    """
    config, p = network.config, network.config.patch_size
    if not config.use_rotary_positional_embeddings:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed  # takes seconds to import

    grid = height // p, width // p
    base = getattr(network, "rotary_base", None) or (config.sample_height // p, config.sample_width // p)
    return get_3d_rotary_pos_embed(config.attention_head_dim, centred(grid, base), grid, frames, device=device)


def velocity_and_taps(
    network: nn.Module,
    sample: Tensor,
    text: Tensor,
    t: Tensor,
    taps: Sequence[str],
    stop: bool = False,
    cut: bool = False,
    **guide: Tensor | None,
) -> tuple[Tensor | None, Mapping[str, Tensor]]:
    """(velocity [B, F', C, h, w], features [B, D, F', h/p, w/p] by tap) of ``sample`` [B, F', 2C, h, w], ``text``
    [B, N, text width] and timesteps ``t`` [B].

    stop: nothing behind the last tap is computed, the velocity is None. cut: nothing there keeps a graph. guide: what
    else the network looks at, by the names of its own `forward`: the camera path, of a `CameraTransformer`.
    """
    rotary = rotary_table(network, sample.shape[1], *sample.shape[3:], sample.device)
    if not taps:
        # The class's own way, which hooks (of accelerate's offloading, say) know of.
        return network(sample, text, t, image_rotary_emb=rotary, **guide).sample, {}
    return block_by_block(network, sample, text, t, rotary, taps, stop, cut, **guide)


def block_by_block(
    network: nn.Module,
    sample: Tensor,
    text: Tensor,
    t: Tensor,
    rotary: Rotary | None,
    taps: Sequence[str] = (),
    stop: bool = False,
    cut: bool = False,
    **guide: Tensor | None,
) -> tuple[Tensor | None, Mapping[str, Tensor]]:
    """What the class's own `forward` computes, with a look behind each block; arguments of `velocity_and_taps`.

    A network with a guide has a method ``guided``, which changes the video tokens before the first block and gives what
    is added to them behind each of the first blocks, and the blocks.
    """
    p = network.config.patch_size
    grid = sample.shape[1], sample.shape[3] // p, sample.shape[4] // p
    embedding = network.time_embedding(network.time_proj(t).to(sample.dtype), None)
    tokens = network.embedding_dropout(network.patch_embed(text, sample))
    text, video = tokens.split([text.shape[1], tokens.shape[1] - text.shape[1]], dim=1)
    additions: Iterator[Tensor] = iter(())
    blocks: Sequence[Block] = network.transformer_blocks
    if guide:
        video, additions, blocks = network.guided(video, text, embedding, rotary, grid, t, **guide)
    wanted, features, with_graph = set(taps), {}, torch.is_grad_enabled()
    for tap, block in zip(taps_of(network), blocks, strict=True):
        with torch.set_grad_enabled(with_graph):
            video, text = through(network, block, video, text, embedding, rotary)
            if (addition := next(additions, None)) is not None:
                video = video + addition
        if tap in wanted:
            features[tap] = video.transpose(1, 2).unflatten(2, grid)
            if len(features) == len(wanted):
                if stop:
                    return None, features
                with_graph = with_graph and not cut
    with torch.set_grad_enabled(with_graph):
        patches = network.proj_out(network.norm_out(network.norm_final(video), temb=embedding))
        return _unpatched(patches.unflatten(1, grid), p), features


def through(
    network: nn.Module, block: Block, video: Tensor, text: Tensor, embedding: Tensor, rotary: Rotary | None
) -> tuple[Tensor, Tensor]:
    """(video, text) tokens behind a block, computed again in the backward pass where the network is set to that."""
    if network.gradient_checkpointing and torch.is_grad_enabled():
        return network._gradient_checkpointing_func(block, video, text, embedding, rotary, None)
    return block(video, text, embedding, rotary)


def _unpatched(patches: Tensor, p: int) -> Tensor:
    """[B, F', h/p, w/p, C p p] -> [B, F', C, h, w]."""
    patches = patches.unflatten(-1, (-1, p, p))  # b f y x c j i
    return patches.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
