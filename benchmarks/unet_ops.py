"""One UNet forward against a straightforward port of the original operations, with the same weights.

    python benchmarks/unet_ops.py [--repeats N] [--batch B] [--threads T] [--out FILE]

What is measured: the median time of one forward pass at the sizes of the tiny preset, ours and the port in turns, so
that both meet the same minutes of the same machine. Why: ours folds positions into one axis for temporal convolutions,
keeps keys and values per clip rather than per frame, and uses fused attention; that must never be slower than writing
the operations down as they are. The port below follows the description of ViewCrafter's modules (3-D temporal
convolutions, attention as two matrix products with a softmax between, text repeated for every frame). It loads
ViewCrafter's names, so that equal outputs also show that no weight went astray. The last line is JSON.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.convert.names import KEY_MAPS
from fvgen.models.viewcrafter.unet import IMAGE_TOKENS_PER_FRAME, ViewCrafterUNet
from fvgen.pipelines.presets import SHIPPED
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json

FRAMES, HEIGHT, WIDTH = 8, 12, 16  # of the tiny preset's latents


class Norm32(nn.GroupNorm):
    """Group norm in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class PortAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, context: int | None = None):
        super().__init__()
        inner = heads * head_dim
        self.heads, self.split = heads, context is not None
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context or width, inner, bias=False)
        self.to_v = nn.Linear(context or width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(0.0))
        if context:
            self.to_k_ip = nn.Linear(context, inner, bias=False)
            self.to_v_ip = nn.Linear(context, inner, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, context: Tensor | None = None, text_tokens: int = 77) -> Tensor:
        q = self.to_q(x)
        if not self.split:
            return self.to_out(self.attend(q, self.to_k(x), self.to_v(x)))
        text, image = context[:, :text_tokens], context[:, text_tokens:]
        out = self.attend(q, self.to_k(text), self.to_v(text))
        return self.to_out(out + self.attend(q, self.to_k_ip(image), self.to_v_ip(image)))


class GatedGelu(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class PortLayer(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, context: int | None = None):
        super().__init__()
        self.attn1 = PortAttention(width, heads, head_dim)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(GatedGelu(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))
        self.attn2 = PortAttention(width, heads, head_dim, context)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff.net(self.norm3(x)) + x


class PortSpatial(nn.Module):
    def __init__(self, width: int, head_dim: int, groups: int, context: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([PortLayer(width, width // head_dim, head_dim, context)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, frames: int) -> Tensor:
        height = x.shape[2]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2).contiguous())
        tokens = self.proj_out(self.transformer_blocks[0](tokens, context))
        return tokens.transpose(1, 2).unflatten(2, (height, -1)).contiguous() + x


class PortTemporal(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, groups: int, linear: bool = True):
        super().__init__()
        inner = heads * head_dim
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, inner) if linear else nn.Conv1d(width, inner, 1)
        self.transformer_blocks = nn.ModuleList([PortLayer(inner, heads, head_dim)])
        self.proj_out = nn.Linear(inner, width) if linear else nn.Conv1d(inner, width, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, frames: int) -> Tensor:
        clip = x.unflatten(0, (-1, frames)).transpose(1, 2)
        b, c, f, h, w = clip.shape
        tokens = self.norm(clip).permute(0, 3, 4, 1, 2).reshape(b * h * w, c, f).contiguous()
        if self.linear:
            tokens = self.proj_out(self.transformer_blocks[0](self.proj_in(tokens.transpose(1, 2).contiguous())))
            tokens = tokens.transpose(1, 2)
        else:
            tokens = self.transformer_blocks[0](self.proj_in(tokens).transpose(1, 2).contiguous())
            tokens = self.proj_out(tokens.transpose(1, 2).contiguous())
        tokens = tokens.reshape(b, h, w, c, f).permute(0, 3, 4, 1, 2).contiguous()
        return (tokens + clip).transpose(1, 2).flatten(0, 1)


class PortTemporalConv(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        for stage in range(1, 5):
            drop = [] if stage == 1 else [nn.Dropout(0.1)]
            conv = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
            self.add_module(f"conv{stage}", nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), *drop, conv))

    def forward(self, clip: Tensor) -> Tensor:
        return clip + self.conv4(self.conv3(self.conv2(self.conv1(clip))))


class PortResBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, emb: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            Norm32(groups, width_in), nn.SiLU(), nn.Conv2d(width_in, width_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, width_out))
        conv = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.out_layers = nn.Sequential(Norm32(groups, width_out), nn.SiLU(), nn.Dropout(0.1), conv)
        self.skip_connection = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)
        self.temopral_conv = PortTemporalConv(width_out, groups)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, frames: int) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        h = self.skip_connection(x) + self.out_layers(h)
        clip = h.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()
        return self.temopral_conv(clip).transpose(1, 2).flatten(0, 1).contiguous()


class PortConv(nn.Conv2d):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor, frames: int) -> Tensor:
        return super().forward(x)


class PortDown(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, frames: int) -> Tensor:
        return self.op(x)


class PortUp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, frames: int) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class PortUNet(nn.Module):
    """The original operations; arguments are those of a `ViewCrafterUNet`'s configuration."""

    def __init__(self, config: dict):
        super().__init__()
        width, groups, head = config["model_channels"], config["norm_num_groups"], config["num_head_channels"]
        emb, blocks, mults = 4 * width, config["num_res_blocks"], config["channel_mult"]
        self.width, self.text_tokens = width, config["text_tokens"]

        def transformers(w: int) -> list[nn.Module]:
            return [PortSpatial(w, head, groups, config["context_dim"]), PortTemporal(w, w // head, head, groups)]

        def level(w_in: int, w_out: int, factor: int) -> list[nn.Module]:
            extra = transformers(w_out) if factor in config["attention_resolutions"] else []
            return [PortResBlock(w_in, w_out, emb, groups), *extra]

        def embedding() -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        self.time_embed, self.fps_embedding = embedding(), embedding()
        self.init_attn = nn.Sequential(PortTemporal(width, config["init_attn_heads"], head, groups, linear=False))
        stages, skips, w = [nn.ModuleList([PortConv(config["in_channels"], width, 3, padding=1)])], [width], width
        for i, mult in enumerate(mults):
            for _ in range(blocks):
                stages.append(nn.ModuleList(level(w, mult * width, 2**i)))
                w = mult * width
                skips.append(w)
            if i < len(mults) - 1:
                stages.append(nn.ModuleList([PortDown(w)]))
                skips.append(w)
        self.input_blocks = nn.ModuleList(stages)
        ends = [PortResBlock(w, w, emb, groups) for _ in range(2)]
        self.middle_block = nn.ModuleList([ends[0], *transformers(w), ends[1]])
        stages = []
        for i, mult in reversed(list(enumerate(mults))):
            for j in range(blocks + 1):
                layers = level(w + skips.pop(), mult * width, 2**i)
                w = mult * width
                stages.append(nn.ModuleList([*layers, *([PortUp(w)] if i and j == blocks else [])]))
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(
            Norm32(groups, width), nn.SiLU(), nn.Conv2d(width, config["out_channels"], 3, padding=1)
        )

    def sinusoid(self, t: Tensor) -> Tensor:
        half = self.width // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, sample: Tensor, t: Tensor, context: Tensor, fps: Tensor) -> Tensor:
        frames = sample.shape[2]
        text, image = context[:, : self.text_tokens], context[:, self.text_tokens :]
        text = text.repeat_interleave(frames, dim=0)
        if image.shape[1] == IMAGE_TOKENS_PER_FRAME * frames:
            image = image.unflatten(1, (frames, IMAGE_TOKENS_PER_FRAME)).flatten(0, 1)
        else:
            image = image.repeat_interleave(frames, dim=0)
        context = torch.cat([text, image], dim=1)
        emb = self.time_embed(self.sinusoid(t)) + self.fps_embedding(self.sinusoid(fps))
        emb = emb.repeat_interleave(frames, dim=0)
        x, skips = sample.transpose(1, 2).flatten(0, 1), []

        def run(layers: nn.ModuleList | nn.Sequential, x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x, emb, context, frames)
            return x

        for index, stage in enumerate(self.input_blocks):
            x = run(stage, x)
            if index == 0:
                x = run(self.init_attn, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for stage in self.output_blocks:
            x = run(stage, torch.cat([x, skips.pop()], dim=1))
        return self.out(x).unflatten(0, (-1, frames)).transpose(1, 2)


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def compare(batch: int, repeats: int, shared_tokens: bool) -> dict:
    """Medians of both networks in milliseconds, their ratio, and the largest difference of their outputs."""
    ours = ViewCrafterUNet.from_pretrained(SHIPPED / "tiny", subfolder="unet").float().eval()
    port = PortUNet(dict(ours.config)).eval()
    port.load_state_dict(KEY_MAPS["unet"].to_theirs(ours.state_dict()))
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 8, FRAMES, HEIGHT, WIDTH, generator=generator)
    tokens = ours.config.text_tokens + IMAGE_TOKENS_PER_FRAME * (FRAMES + shared_tokens)
    context = torch.randn(batch, tokens, ours.config.context_dim, generator=generator)
    t, fps = torch.randint(0, 1000, (batch,), generator=generator), torch.full((batch,), 10)
    difference = (ours(sample, t, context, fps).sample - port(sample, t, context, fps)).abs().max().item()
    assert difference < 1e-4, difference
    times: dict[str, list[float]] = {"ours": [], "port": []}
    for _ in range(repeats):
        times["ours"].append(seconds(lambda: ours(sample, t, context, fps)))
        times["port"].append(seconds(lambda: port(sample, t, context, fps)))
    medians = {name: round(1000 * statistics.median(values), 2) for name, values in times.items()}
    ratio = statistics.median(p / o for o, p in zip(times["ours"], times["port"], strict=True))
    return {
        "batch": batch,
        "tokens": "shared" if shared_tokens else "per frame",
        "ours_ms": medians["ours"],
        "port_ms": medians["port"],
        "port_over_ours": round(ratio, 3),
        "largest_difference": difference,
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=positive, default=30)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--out", help="file for the results, such as benchmarks/results/unet_ops.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [compare(batch, args.repeats, shared) for batch in args.batch for shared in (False, True)]
    for row in rows:
        print(row)
    result = {"torch": torch.__version__, "threads": args.threads, "repeats": args.repeats, "rows": rows}
    if args.out:
        write_json(Path(args.out), result)
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
