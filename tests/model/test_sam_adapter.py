from math import sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sam_cache.errors import UsageError
from sam_cache.model import SIZES, load_encoder
from sam_cache.model.adapters import SamAdapter, SamAdapterKnobs, adapter_parameters, attach
from sam_cache.model.adapters.sam_adapter import high_frequencies
from sam_cache.model.encoder import normalise_pixels

VARIANTS = ("official", "between")
# tiny's 32 channels over the usual 32 would leave a single one.
NARROW = {"scale_factor": 4, "tune_width": None, "bottleneck": 6}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def make_encoder(redraw):
    """An encoder with every weight redrawn, and a new adapter."""

    def make_encoder(variant, name="tiny", seed=3, input_size=None, **knobs):
        encoder = load_encoder(name, input_size=input_size)
        redraw(encoder, seed=5)
        if variant is not None:
            attach(encoder, SamAdapterKnobs(variant, **NARROW | knobs), seed)
        return encoder

    return make_encoder


@pytest.fixture
def strengthen():
    """Make every adapter weight and bias large enough that no part of the adapter can be missed."""

    def strengthen(encoder):
        generator = torch.Generator().manual_seed(8)
        for parameter in adapter_parameters(encoder).values():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)

    return strengthen


def make_images(side, count=2):
    """Pixels and their content: the first image has padding right, the second below."""
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(6)).byte()
    return pixels, torch.tensor([[side, 70], [33, side]])[:count]


def transform_slowly(values, sign):
    """The discrete Fourier transform along both axes from its definition, without any scale."""
    for axis, length in enumerate(values.shape):
        places = np.arange(length)
        waves = np.exp(sign * 2j * np.pi * np.outer(places, places) / length)
        values = np.moveaxis(np.tensordot(waves, values, (1, axis)), 0, axis)
    return values


def high_frequencies_slowly(channel, mask_ratio):
    """SAM-Adapter's high-frequency components of one channel, frequency by frequency."""
    side = len(channel)
    spectrum = transform_slowly(channel.astype(np.float64), -1) / side**2
    half = int(sqrt(side**2 * mask_ratio) // 2)
    for row in range(side):
        for column in range(side):
            # After fftshift, frequency 0 stands at row and column side // 2.
            frequencies = ((place + side // 2) % side - side // 2 for place in (row, column))
            if all(-half <= frequency < half for frequency in frequencies):
                spectrum[row, column] = 0
    return np.abs(transform_slowly(spectrum, 1).real)


def restate(encoder, pixels, content_hw):
    """Both public implementations in a few lines, on upstream's own blocks."""
    vit, adapter = encoder.vit, encoder.adapter
    inputs = normalise_pixels(pixels, content_hw, encoder.normalise)
    ratio, patch = adapter.knobs.mask_ratio, encoder.size.patch
    high = np.array([[high_frequencies_slowly(channel, ratio) for channel in image] for image in inputs.numpy()])
    high = torch.from_numpy(high).float()
    weight, bias = adapter.frequency_tune.weight, adapter.frequency_tune.bias
    patches = vit.patch_embed(inputs)
    tokens = patches + vit.pos_embed

    if adapter.knobs.variant == "official":
        information = F.conv2d(high, weight, bias, stride=patch).permute(0, 2, 3, 1) + adapter.embedding_tune(patches)
        for block, tune in zip(vit.blocks, adapter.place_tunes, strict=True):
            tokens = block(adapter.up_projection(F.gelu(tune(information))) + tokens)
    else:
        unfolded = high.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3)
        information = F.linear(unfolded, weight.flatten(1), bias) + adapter.embedding_tune(tokens)
        added = [adapter.up_projection(F.gelu(tune(information))) for tune in adapter.place_tunes]
        tokens = tokens + added[0]
        for number, block in enumerate(vit.blocks):
            tokens = block(tokens) + added[number + 1]
    return vit.neck(tokens.permute(0, 3, 1, 2))


def backward(encoder, images):
    """Run forward and backward; the encoder's output and the gradients of the adapter."""
    encoder.zero_grad()
    neck = encoder(*images)["neck"]
    (neck * torch.randn(neck.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
    return neck, {name: parameter.grad for name, parameter in adapter_parameters(encoder).items()}


@pytest.mark.parametrize(
    ("name", "official", "between"),
    [("vit_b", 63_312, 400_928), ("vit_l", 116_544, 532_640), ("vit_h", 186_960, 639_648)],
)
def test_published_numbers_of_parameters(name, official, between):
    for variant, expected in (("official", official), ("between", between)):
        with torch.device("meta"):
            adapter = SamAdapter(SIZES[name], SamAdapterKnobs(variant))
        assert sum(parameter.numel() for parameter in adapter.parameters()) == expected


def test_widths_follow_the_knobs():
    def shapes(**knobs):
        adapter = SamAdapter(SIZES["tiny"], SamAdapterKnobs(**knobs))
        assert adapter.embedding_tune.out_features == adapter.frequency_tune.out_channels
        return [(tune.in_features, tune.out_features) for tune in adapter.place_tunes]

    assert shapes(variant="official", scale_factor=8) == 2 * [(4, 4)]
    assert shapes(variant="official", scale_factor=8, tune_width=3, bottleneck=9) == 2 * [(3, 3)]
    assert shapes(variant="between", scale_factor=8) == 3 * [(192, 32)]
    assert shapes(variant="between", tune_width=5, bottleneck=9) == 3 * [(5, 9)]


@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.6, 0.999])
@pytest.mark.parametrize("side", [16, 9, 10])
def test_high_frequencies_equal_the_definition(side, mask_ratio):
    inputs = torch.randn(2, 3, side, side)
    expected = [[high_frequencies_slowly(channel, mask_ratio) for channel in image] for image in inputs.numpy()]
    torch.testing.assert_close(
        high_frequencies(inputs, mask_ratio), torch.tensor(np.array(expected)).float(), rtol=1e-5, atol=1e-5
    )


def test_high_frequencies_of_a_flat_image_are_zero_and_fp32_under_autocast():
    assert high_frequencies(torch.full((1, 3, 32, 32), 1.7), 0.25).abs().max() < 1e-6
    inputs = torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert high_frequencies(inputs.bfloat16(), 0.25).dtype == torch.float32
        under_autocast = high_frequencies(inputs, 0.25)
    assert torch.equal(under_autocast, high_frequencies(inputs, 0.25))


@pytest.mark.parametrize(("name", "input_size"), [("tiny", None), ("nano", 256)])
def test_equals_the_public_implementation(make_encoder, strengthen, relative, variant, name, input_size):
    encoder = make_encoder(variant, name, input_size=input_size)
    strengthen(encoder)
    images = make_images(encoder.size.input_size)
    with torch.no_grad():
        assert relative(encoder(*images)["neck"], restate(encoder, *images)) < 1e-4


@torch.no_grad()
def test_identity_start_leaves_the_output_bit_for_bit(make_encoder, variant):
    images = make_images(SIZES["tiny"].input_size)
    bare = make_encoder(None)(*images)["neck"]
    assert torch.equal(make_encoder(variant, start="identity")(*images)["neck"], bare)
    assert not torch.equal(make_encoder(variant, start="official")(*images)["neck"], bare)


def test_official_start_has_the_official_scales(variant):
    torch.manual_seed(7)
    adapter = SamAdapter(SIZES["vit_b"], SamAdapterKnobs(variant))
    assert all((p == 0).all() for name, p in adapter.named_parameters() if name.endswith("bias"))
    # The convolution is official's only; in `between` the same layer is a linear one.
    fan_out = sqrt(2 / (16 * 16 * 24))
    expected = {"frequency_tune": fan_out if variant == "official" else 0.02}
    for name in ("frequency_tune", "embedding_tune", "up_projection"):
        found = adapter.get_submodule(name).weight.std().item()
        assert found == pytest.approx(expected.get(name, 0.02), rel=0.02)


def test_every_parameter_learns_and_the_frozen_encoder_does_not(make_encoder, variant):
    encoder = make_encoder(variant)
    _, gradients = backward(encoder, make_images(SIZES["tiny"].input_size))
    assert len(gradients) == 6 + 2 * (2 if variant == "official" else 3)
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []
    assert all(parameter.grad is None for parameter in encoder.vit.parameters())


def test_identity_start_learns_in_two_steps(make_encoder, variant):
    encoder = make_encoder(variant, start="identity")
    images = make_images(SIZES["tiny"].input_size)
    _, gradients = backward(encoder, images)
    learning = {name for name, gradient in gradients.items() if gradient.any()}
    assert learning == {"adapter.up_projection.weight", "adapter.up_projection.bias"}
    torch.optim.SGD(adapter_parameters(encoder).values(), lr=0.01).step()
    _, gradients = backward(encoder, images)
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


def test_checkpointing_changes_neither_output_nor_gradients(make_encoder, variant):
    encoder = make_encoder(variant)
    images = make_images(SIZES["tiny"].input_size)
    neck, gradients = backward(encoder, images)
    encoder.checkpointing = True
    found, found_gradients = backward(encoder, images)
    assert torch.equal(found, neck)
    assert all(torch.equal(found_gradients[name], gradient) for name, gradient in gradients.items())


@torch.no_grad()
def test_bf16_is_near_fp32(make_encoder, strengthen, relative, variant):
    encoder = make_encoder(variant)
    strengthen(encoder)
    images = make_images(SIZES["tiny"].input_size)
    expected = encoder(*images)["neck"]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(encoder(*images)["neck"].float(), expected) < 0.1
    found = encoder.to(torch.bfloat16)(*images)["neck"]
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), expected) < 0.15


def test_the_seed_decides_the_weights(make_encoder, variant):
    first, same, other = (adapter_parameters(make_encoder(variant, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"scale_factor": 0}, "--sa-scale-factor 0"),
        ({"tune_width": 0}, "--sa-tune-width 0"),
        ({"bottleneck": -1}, "--sa-bottleneck -1"),
        ({"mask_ratio": 1.0}, "--sa-mask-ratio 1.0"),
        ({"mask_ratio": -0.1}, "--sa-mask-ratio -0.1"),
        ({"mask_ratio": float("nan")}, "--sa-mask-ratio nan"),
    ],
)
def test_a_knob_out_of_range_is_refused_by_its_flag(knobs, message):
    with pytest.raises(UsageError, match=message):
        SamAdapterKnobs(**knobs)


def test_a_scale_factor_that_leaves_no_channel_is_refused():
    with pytest.raises(UsageError, match="--sa-scale-factor 33: .* 32 of tiny; use at most 32, or set --sa-tune-width"):
        SamAdapter(SIZES["tiny"], SamAdapterKnobs(scale_factor=33))
    SamAdapter(SIZES["tiny"], SamAdapterKnobs(scale_factor=33, tune_width=2))
    SamAdapter(SIZES["tiny"], SamAdapterKnobs("between", scale_factor=33))
