"""The UNet against ViewCrafter's recorded outputs, intermediates and gradients, and what we added to it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from viewcrafter_reference import recording, reference_folder, reference_unet, reference_weights, small_unet

from fvgen.convert.names import KEY_MAPS
from fvgen.errors import UserError
from fvgen.models.viewcrafter.unet import ViewCrafterUNet


def small_inputs(batch: int = 2, frames: int = 3, image_tokens: int = 7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 8, frames, 4, 6, generator=generator)
    context = torch.randn(batch, 5 + image_tokens, 6, generator=generator)
    return sample, torch.tensor([999, 321])[:batch], context, torch.tensor([10, 3])[:batch]


@pytest.fixture(scope="module", params=["tiny", "deep"])
def reference(request, shared):
    return reference_unet(shared, request.param), recording(shared, f"unet_{request.param}_io")


@torch.no_grad()
def test_outputs_equal_the_recording(reference):
    unet, io = reference
    x, t, fps = io["x"], io["timesteps"], io["fs"]
    outputs = {
        "out_perframe": unet(x, t, io["context_perframe"], fps),
        "out_shared": unet(x, t, io["context_shared"], fps),
        "out_shared_fs_default": unet(x, t, io["context_shared"]),
        "out_shared_single_frame": unet(x[:, :, :1], t, io["context_shared"], fps),
    }
    for name, output in outputs.items():
        torch.testing.assert_close(output.sample, io[name], rtol=0, atol=1e-4)


@torch.no_grad()
def test_every_stage_equals_the_recording(shared):
    unet, io = reference_unet(shared, "tiny"), recording(shared, "unet_tiny_io")
    theirs = recording(shared, "unet_tiny_intermediates")
    taps = unet(io["x"], io["timesteps"], io["context_perframe"], io["fs"], taps=unet.tap_names).features
    names = {"input": "input_blocks", "output": "output_blocks", "middle": "middle_block", "init_attn": "init_attn"}
    assert len(taps) == 10
    for tap, features in taps.items():
        part, dot, index = tap.partition(".")
        expected = theirs[names[part] + dot + index]
        torch.testing.assert_close(features.transpose(1, 2).flatten(0, 1), expected, rtol=0, atol=1e-4)


def test_gradients_equal_the_recording(shared):
    unet, io = reference_unet(shared, "tiny"), recording(shared, "unet_tiny_io")
    theirs = recording(shared, "unet_tiny_grads")
    x = io["x"].requires_grad_()
    output = unet(x, io["timesteps"], io["context_shared"], io["fs"]).sample
    (output * theirs["grad_out"]).sum().backward()
    ours = KEY_MAPS["unet"].to_theirs({name: parameter.grad for name, parameter in unet.named_parameters()})
    pairs = [(x.grad, theirs["grad_x"])]
    pairs += [(ours[k.removeprefix("param_grad.")], v) for k, v in theirs.items() if k.startswith("param_grad.")]
    assert len(pairs) == 8
    for gradient, expected in pairs:  # sums over thousands of positions, up to 70: relative to the largest
        scale = expected.abs().max().clamp(min=1.0)
        torch.testing.assert_close(gradient / scale, expected / scale, rtol=0, atol=3e-5)


def test_published_architecture_has_every_key_and_shape_of_the_checkpoint(shared):
    keys = json.loads((reference_folder(shared) / "keys_inference_pvd_1024.json").read_text())
    prefix = "model.diffusion_model."
    theirs = {key.removeprefix(prefix): shape for key, (shape, _) in keys.items() if key.startswith(prefix)}
    with torch.device("meta"):
        unet = ViewCrafterUNet()
    ours = {key: list(value.shape) for key, value in KEY_MAPS["unet"].to_theirs(unet.state_dict()).items()}
    assert ours == theirs
    assert sum(parameter.numel() for parameter in unet.parameters()) == 1_438_854_980


def test_weights_survive_the_way_there_and_back(shared):
    theirs = reference_weights(shared, "deep")
    back = KEY_MAPS["unet"].to_theirs(KEY_MAPS["unet"].to_ours(theirs))
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)


def test_learnable_image_scale_has_its_key_and_its_effect():
    unet, inputs = small_unet(image_cross_attention_scale_learnable=True), small_inputs()
    gates = [name for name in KEY_MAPS["unet"].to_theirs(unet.state_dict()) if name.endswith("attn2.alpha")]
    assert len(gates) == 4  # one down, one in the middle, two up
    with torch.no_grad():
        before = unet(*inputs).sample
        unet.middle_block[1].layer.attn2.image_gate += 1.0
        assert not torch.allclose(unet(*inputs).sample, before)


def test_sinusoids_equal_the_recording(recorded):
    record = load_file(recorded / "schedule.safetensors")
    unet = small_unet(model_channels=32, num_head_channels=32)
    t = record["timestep_embedding.t"]
    sinusoid = unet._sinusoid(t, torch.zeros(len(t), 8, 1, 4, 4))
    torch.testing.assert_close(sinusoid, record["timestep_embedding.32"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_image_tokens_are_split_by_frame_only_at_the_right_number():
    unet = small_unet()
    for image_tokens, split in ((16 * 3, True), (16 * 3 - 1, False)):
        sample, t, context, fps = small_inputs(image_tokens=image_tokens)
        changed = context.clone()
        changed[:, -1] += 1.0  # belongs to the last frame, if frames have tokens of their own
        conditions, others = (unet._conditions(sample, t, c, fps) for c in (context, changed))
        attention = unet.middle_block[1].layer.attn2
        tokens = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(2))
        before, after = (attention(tokens, c.text, c.image) for c in (conditions, others))
        differs = (before - after).abs().amax(dim=(1, 2)) > 1e-6
        assert differs.tolist() == ([False, False, True] * 2 if split else [True] * 6)


@torch.no_grad()
def test_batches_are_independent_and_scalar_timesteps_are_shared():
    unet = small_unet()
    sample, t, context, fps = small_inputs()
    both = unet(sample, t, context, fps).sample
    torch.testing.assert_close(unet(sample[1:], t[1:], context[1:], fps[1:]).sample, both[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(unet(sample[:1], 999, context[:1], fps[:1]).sample, both[:1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_runs_without_image_tokens():
    sample, t, context, fps = small_inputs(image_tokens=0)
    assert small_unet()(sample, t, context, fps).sample.isfinite().all()


def test_features_stop_at_the_tap():
    unet, (sample, t, context, fps) = small_unet(), small_inputs()
    ran = []
    for block in (*unet.output_blocks, unet.conv_out):
        block.register_forward_hook(lambda *_: ran.append(1))
    middle = unet.features(sample.requires_grad_(), t, context, fps)
    assert not ran and middle.shape == (2, 16, 3, 2, 3)
    middle.square().sum().backward()
    assert sample.grad.abs().sum() > 0
    assert unet.output_blocks[0][0].conv1.weight.grad is None

    output = unet(sample, t, context, fps, taps=("middle", "output.0"))
    assert ran and output.sample.shape == (2, 4, 3, 4, 6)
    torch.testing.assert_close(output.features["middle"], middle)
    assert list(output.features) == ["middle", "output.0"]


@torch.no_grad()
def test_return_as_tuple():
    unet, inputs = small_unet(), small_inputs()
    (sample,) = unet(*inputs, return_dict=False)
    both = unet(*inputs, taps=("init_attn",), return_dict=False)
    assert torch.equal(sample, both[0]) and both[1]["init_attn"].shape == (2, 8, 3, 4, 6)


def test_gradient_checkpointing_changes_nothing_but_memory():
    unet, inputs = small_unet(), small_inputs()

    def gradients() -> list[torch.Tensor]:
        unet.zero_grad()
        unet(*inputs).sample.square().sum().backward()
        return [parameter.grad.clone() for parameter in unet.parameters()]

    calls = []
    handle = unet.middle_block.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients()
    assert len(calls) == 1
    unet.enable_gradient_checkpointing()
    saved = gradients()
    assert len(calls) == 3  # once forward, once more in the backward pass
    handle.remove()
    for expected, gradient in zip(plain, saved, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "image_tokens"), [("eager", 48), ("inductor", 7)])
@torch.no_grad()
def test_compiles_into_one_graph(backend, image_tokens):
    torch.compiler.reset()
    unet, inputs = small_unet(), small_inputs(image_tokens=image_tokens)
    compiled = torch.compile(unet, fullgraph=True, backend=backend)  # an error at the first graph break
    torch.testing.assert_close(compiled(*inputs, return_dict=False)[0], unet(*inputs).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_all_attention_is_fused():
    unet, calls = small_unet(), []

    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(getattr(function, "__name__", ""))
            return function(*args, **kwargs or {})

    with Record():
        unet(*small_inputs())
    # init_attn and four temporal transformers of two attentions; four spatial ones of two, the second with two branches
    assert calls.count("scaled_dot_product_attention") == 5 * 2 + 4 * 3
    assert "softmax" not in calls


def test_a_new_network_starts_at_zero_with_identity_branches():
    torch.manual_seed(0)
    unet = ViewCrafterUNet(**{k: v for k, v in small_unet().config.items() if not k.startswith("_")})
    sample, t, context, fps = small_inputs()
    output = unet(sample, t, context, fps, taps=("input.0", "init_attn"))
    assert not output.sample.any()
    assert torch.equal(output.features["init_attn"], output.features["input.0"])


@torch.no_grad()
def test_saves_and_loads(tmp_path):
    unet, inputs = small_unet(), small_inputs()
    unet.save_pretrained(tmp_path)
    assert torch.equal(ViewCrafterUNet.from_pretrained(tmp_path)(*inputs).sample, unet(*inputs).sample)


def test_mistakes_are_explained():
    unet, (sample, t, context, fps) = small_unet(), small_inputs()
    with pytest.raises(UserError, match="no stage 'center' to tap"):
        unet.features(sample, t, context, fps, tap="center")
    with pytest.raises(UserError, match=r"4x5 cannot go through .* divisible by 2"):
        unet(sample[..., :5], t, context, fps)
    with pytest.raises(UserError, match="no multiple of norm_num_groups 3"):
        small_unet(norm_num_groups=3)
    with pytest.raises(UserError, match="multiples of num_head_channels 5"):
        small_unet(num_head_channels=5)
    with pytest.raises(UserError, match="it must start at 1"):
        small_unet(channel_mult=(2, 4))
