from math import prod, sqrt

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.feature_extraction import create_feature_extractor

from sam_cache.errors import CheckpointError, UsageError
from sam_cache.model import SIZES, load_encoder
from sam_cache.model.adapters import SpatialPrior, SpatialPriorKnobs, adapter_parameters, attach, merge
from sam_cache.model.encoder import normalise_pixels

SIZE = SIZES["tiny"]
KNOBS = SpatialPriorKnobs(rank=3, channels=16)
CONTENT = torch.tensor([[SIZE.input_size, 70], [33, SIZE.input_size]])


@pytest.fixture
def adapted(encoder):
    attach(encoder, KNOBS, seed=1)
    generator = torch.Generator().manual_seed(7)
    for layer in encoder.adapter.layers:
        for update in (layer.q_lora, layer.k_lora, layer.v_lora):
            update.up.weight.data = 0.5 * torch.randn(update.up.weight.shape, generator=generator)
    return encoder


def encode(encoder, pixels):
    return encoder(pixels, CONTENT)["neck"]


def plain_attention(attention, q, k, v):
    """Upstream's attention for one window of one image, with the matrix of scores written out."""
    side, C = q.shape[0], q.shape[-1]
    distance = torch.arange(side)[:, None] - torch.arange(side) + side - 1
    heads = []
    for q_head, k_head, v_head in zip(*(x.split(C // attention.num_heads, dim=-1) for x in (q, k, v)), strict=True):
        scores = torch.einsum("abc,efc->abef", q_head, k_head) * attention.scale
        scores = scores + torch.einsum("abc,aec->abe", q_head, attention.rel_pos_h[distance])[..., None]
        scores = scores + torch.einsum("abc,bfc->abf", q_head, attention.rel_pos_w[distance])[:, :, None]
        weights = scores.flatten(2).softmax(-1)
        heads.append(weights @ v_head.flatten(0, 1))
    return attention.proj(torch.cat(heads, dim=-1))


def plain_block(block, tokens, prior, layer):
    """One block for one image. Padding of a window is zero before the layer of q, k and v, which has a
    bias, and is added nothing; the adapter's own sum of tokens and prior is not padded at all."""
    normed = block.norm1(tokens)
    side = block.window_size or tokens.shape[0]
    places = normed + prior
    added = [
        places @ update.down.weight.T @ update.up.weight.T for update in (layer.q_lora, layer.k_lora, layer.v_lora)
    ]
    attended = torch.zeros_like(tokens)
    for top in range(0, tokens.shape[0], side):
        for left in range(0, tokens.shape[1], side):
            here = (slice(top, top + side), slice(left, left + side))
            h, w = normed[here].shape[:2]
            window = normed.new_zeros(side, side, normed.shape[-1])
            window[:h, :w] = normed[here]
            qkv = [part.clone() for part in block.attn.qkv(window).chunk(3, dim=-1)]
            for part, more in zip(qkv, added, strict=True):
                part[:h, :w] += more[here]
            attended[here] = plain_attention(block.attn, *qkv)[:h, :w]
    tokens = tokens + attended
    return tokens + block.mlp(block.norm2(tokens))


def plain_prior(adapter, inputs):
    """All levels of the pyramid on the grid of tokens, through the convolution one after another."""
    levels = adapter.pyramid(adapter.features(inputs)).values()
    grid = SIZE.grid
    total = 0
    for level, side in zip(levels, (4 * grid, 2 * grid, grid, grid // 2), strict=True):
        assert level.shape[-2:] == (side, side)
        if side >= grid:
            total = total + F.avg_pool2d(level, side // grid)
        else:
            total = total + F.interpolate(level, (grid, grid), mode="bilinear", align_corners=False)
    weight, bias = adapter.to_width.weight[:, :, 0, 0], adapter.to_width.bias
    return total.permute(0, 2, 3, 1) @ weight.T + bias


@torch.no_grad()
def test_nothing_changes_at_first(encoder, pixels):
    expected = encode(encoder, pixels)
    attach(encoder, SpatialPriorKnobs(), seed=1)
    assert torch.equal(encode(encoder, pixels), expected)


@torch.no_grad()
def test_encoder_equals_a_plain_restatement(adapted, pixels, relative):
    assert SIZE.grid % SIZE.window  # so that windows are padded
    vit, adapter = adapted.vit, adapted.adapter
    inputs = normalise_pixels(pixels, CONTENT, "sam")
    tokens = vit.patch_embed(inputs) + vit.pos_embed
    prior = plain_prior(adapter, inputs)
    for block, layer in zip(vit.blocks, adapter.layers, strict=True):
        tokens = torch.stack([plain_block(block, *image, layer) for image in zip(tokens, prior, strict=True)])
    expected = vit.neck(tokens.permute(0, 3, 1, 2))
    assert relative(encode(adapted, pixels), expected) < 1e-4
    adapted.adapter = None
    assert relative(encode(adapted, pixels), expected) > 0.05


def test_an_image_does_not_depend_on_its_batch(adapted, pixels, relative):
    together = encode(adapted.train(), pixels)
    alone = adapted(pixels[1:], CONTENT[1:])["neck"]
    assert relative(alone, together[1:]) < 1e-4


def test_gradients_reach_all_of_the_adapter_and_nothing_else(adapted, pixels):
    encode(adapted, pixels).square().sum().backward()
    added = adapter_parameters(adapted)
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == (name in added), name
        if name in added:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_checkpointing_changes_neither_outputs_nor_gradients(adapted, pixels):
    found = []
    for checkpointing in (False, True):
        adapted.checkpointing = checkpointing
        adapted.zero_grad()
        output = encode(adapted, pixels)
        output.square().sum().backward()
        found.append([output, *(parameter.grad for parameter in adapter_parameters(adapted).values())])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_autocast_to_bf16(adapted, pixels, relative):
    expected = encode(adapted, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        levels = adapted.adapter.features(torch.randn(1, 3, 64, 64))
        output = encode(adapted, pixels)
    assert {level.dtype for level in levels.values()} == {torch.bfloat16}
    assert relative(output.float(), expected) < 0.2
    output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter_parameters(adapted).values())


def test_bf16_parameters_compute_in_bf16(adapted, pixels, relative):
    expected = encode(adapted, pixels)
    found = encode(adapted.to(torch.bfloat16), pixels)
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), expected) < 0.2


def test_everything_in_it_is_a_parameter_and_counted(encoder):
    attach(encoder, KNOBS, seed=1)
    assert not list(encoder.adapter.buffers())
    own = {name for name, _ in encoder.named_parameters() if not name.startswith("vit.")}
    assert adapter_parameters(encoder).keys() == own
    width, channels, rank = SIZE.width, KNOBS.channels, KNOBS.rank
    pyramid = channels * (3840 + 36 * channels + 8)
    layers = SIZE.depth * 6 * rank * width
    expected = 23_508_032 + pyramid + (channels + 1) * width + layers
    assert sum(parameter.numel() for parameter in encoder.adapter.parameters()) == expected
    # torchvision's own count, without the classifier
    assert sum(parameter.numel() for parameter in resnet50().parameters()) - 2049 * 1000 == 23_508_032


def test_a_drawn_backbone_keeps_its_activations_moderate_to_the_last_stage():
    for seed in range(3):
        torch.manual_seed(seed)
        adapter = SpatialPrior(SIZE, KNOBS)
        inputs = torch.randn(1, 3, SIZE.input_size, SIZE.input_size)
        blank = torch.zeros(1, SIZE.grid, SIZE.grid, SIZE.width)
        with torch.no_grad():
            found = {**adapter.features(inputs), "prior": adapter.prepare(inputs, blank, blank)}
        for name, features in found.items():
            assert features.isfinite().all(), name
            assert 0.02 < features.std() < 2, name
            assert features.abs().max() < 20, name


@pytest.mark.parametrize("input_size", [80, 144])
def test_inputs_that_are_no_multiple_of_32(input_size):
    encoder = load_encoder("tiny", input_size=input_size)
    attach(encoder, KNOBS, seed=1)
    pixels = torch.randint(0, 256, (1, 3, input_size, input_size)).byte()
    neck = encoder(pixels, torch.tensor([[input_size, input_size]]))["neck"]
    assert neck.shape[1:] == encoder.levels["neck"]


def test_the_seed_alone_decides_what_is_drawn():
    def drawn(seed):
        encoder = load_encoder("tiny")
        attach(encoder, KNOBS, seed)
        return adapter_parameters(encoder)

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["adapter.backbone.conv1.weight"], other["adapter.backbone.conv1.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_a_backbone_from_a_file_computes_what_torchvision_does(tmp_path, suffix, relative):
    torch.manual_seed(2)
    oracle = resnet50().eval()
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    path = tmp_path / f"resnet50{suffix}"
    if suffix == ".pth":
        torch.save(oracle.state_dict(), path)
    else:  # as older files are: without the counters; and without the classifier
        state = oracle.state_dict()
        save_file({k: v for k, v in state.items() if "num_batches" not in k and "fc." not in k}, path)
    adapter = SpatialPrior(SIZE, SpatialPriorKnobs(3, 16, path))
    path.unlink()  # nothing keeps hanging on the file
    inputs = torch.randn(2, 3, 96, 96)
    expected = create_feature_extractor(oracle, ["layer1", "layer2", "layer3", "layer4"])(inputs)
    found = adapter.features(inputs)
    assert list(found) == list(expected)
    for name in expected:
        assert relative(found[name], expected[name]) < 1e-4, name
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_batch_norms_epsilon_is_folded_in(tmp_path):
    state = outline(resnet50)
    state["bn1.running_var"] = torch.zeros(64)
    state["bn1.weight"] = torch.ones(64)
    torch.save(state, tmp_path / "a.pth")
    adapter = SpatialPrior(SIZE, SpatialPriorKnobs(3, 16, tmp_path / "a.pth"))
    torch.testing.assert_close(adapter.backbone.bn1.weight.data, torch.full((64,), 1 / sqrt(1e-5)))


def outline(build):
    """A state dict in the right shapes, of one number each, so that its file is small."""
    with torch.device("meta"):
        state = build().state_dict()
    return {key: torch.ones(()).expand(tensor.shape) for key, tensor in state.items()}


def test_the_first_misfit_of_a_file_is_named(tmp_path):
    path = tmp_path / "a.pth"

    def refused(state):
        torch.save(state, path)
        with pytest.raises(CheckpointError) as caught:
            SpatialPrior(SIZE, SpatialPriorKnobs(3, 16, path))
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        return message

    whole = outline(resnet50)
    assert prod(whole["layer4.2.conv3.weight"].shape) == 2048 * 512
    lacking = {key: tensor for key, tensor in whole.items() if not key.startswith("layer3.0.bn2.")}
    assert "layer3.0.bn2.weight is missing" in refused(lacking)
    assert "hf.weight is unexpected" in refused({**whole, "hf.weight": torch.zeros(1)})
    misshaped = {**whole, "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}
    assert "layer1.0.conv1.weight is (64, 64, 3, 3) instead of (64, 64, 1, 1)" in refused(misshaped)
    assert "not a resnet50" in refused(outline(resnet18))
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        SpatialPrior(SIZE, SpatialPriorKnobs(3, 16, path))
    with pytest.raises(CheckpointError, match="missing.pth: no such file"):
        SpatialPrior(SIZE, SpatialPriorKnobs(3, 16, tmp_path / "missing.pth"))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (SpatialPriorKnobs(rank=0), "--spm-rank 0: tiny is 32 wide"),
        (SpatialPriorKnobs(rank=33), "--spm-rank 33"),
        (SpatialPriorKnobs(channels=0), "--spm-channels 0"),
    ],
)
def test_knobs_that_do_not_fit_are_refused(encoder, knobs, message):
    with pytest.raises(UsageError, match=message):
        attach(encoder, knobs, seed=1)
    assert encoder.adapter is None


def test_a_prior_of_the_image_cannot_be_merged(adapted):
    with pytest.raises(UsageError, match="SpatialPrior: depends on the image"):
        merge(adapted)
