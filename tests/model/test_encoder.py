import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import get_rel_pos
from torch import Tensor, nn

from sam_cache.errors import UsageError
from sam_cache.model import (
    SIZES,
    Encoder,
    LoraKnobs,
    SamAdapterKnobs,
    SpatialPriorKnobs,
    attach,
    attention,
    bands,
    fixed_weights,
    load_encoder,
    products,
)
from sam_cache.model.attention import run_block
from sam_cache.model.encoder import normalise_pixels
from sam_cache.model.parts import build_image_encoder, build_mask_decoder, build_prompt_encoder, part_of

SIZE = SIZES["tiny"]
# tiny has a single block of global attention, its last: there the early level is also the neck's input.
DEEP = replace(SIZE, depth=4, global_blocks=(1, 3))


@pytest.fixture
def encoder(redraw):
    encoder = load_encoder("tiny")
    redraw(encoder, seed=5)
    return encoder


@pytest.fixture
def upstream(encoder):
    sam = Sam(build_image_encoder(SIZE), build_prompt_encoder(SIZE), build_mask_decoder(SIZE)).eval()
    sam.image_encoder.load_state_dict(encoder.vit.state_dict())
    return sam


CONTENT = torch.tensor([[SIZE.input_size, 70], [33, SIZE.input_size]])


@torch.no_grad()
def encode_upstream(sam, pixels):
    images = [image[:, :h, :w].float() for image, (h, w) in zip(pixels, CONTENT.tolist(), strict=True)]
    return torch.cat([sam.image_encoder(sam.preprocess(image)[None]) for image in images])


def test_batch_equals_upstream_image_by_image(encoder, upstream, pixels, relative):
    levels = encoder(pixels, CONTENT)
    assert {name: tuple(level.shape[1:]) for name, level in levels.items()} == encoder.levels
    assert relative(levels["neck"], encode_upstream(upstream, pixels)) < 1e-5


@torch.no_grad()
def test_early_level_is_what_leaves_the_first_global_block(encoder, upstream, pixels, relative):
    early = []
    block = upstream.image_encoder.blocks[SIZE.global_blocks[0]]
    block.register_forward_hook(lambda module, inputs, output: early.append(output.permute(0, 3, 1, 2)))
    encode_upstream(upstream, pixels)
    both = load_encoder("tiny", levels=("neck", "early"))
    both.vit.load_state_dict(encoder.vit.state_dict())
    levels = both(pixels, CONTENT)
    assert list(levels) == list(both.levels) == ["neck", "early"]
    assert {name: tuple(level.shape[1:]) for name, level in levels.items()} == both.levels
    assert relative(levels["early"], torch.cat(early)) < 1e-5
    assert torch.equal(levels["neck"], encoder(pixels, CONTENT)["neck"])


@pytest.fixture
def deep_encoder(redraw):
    encoder = Encoder(DEEP, part_of(fixed_weights(DEEP), "image_encoder"), levels=("neck", "early")).eval()
    redraw(encoder, seed=5)
    return encoder


@torch.no_grad()
def test_early_level_leaves_the_first_of_several_global_blocks(deep_encoder, pixels, relative):
    sam = Sam(build_image_encoder(DEEP), build_prompt_encoder(DEEP), build_mask_decoder(DEEP)).eval()
    sam.image_encoder.load_state_dict(deep_encoder.vit.state_dict())
    left = {number: [] for number in range(DEEP.depth)}
    for number, block in enumerate(sam.image_encoder.blocks):
        block.register_forward_hook(lambda module, inputs, output, found=left[number]: found.append(output))
    neck = encode_upstream(sam, pixels)
    levels = deep_encoder(pixels, CONTENT)
    distances = [relative(levels["early"], torch.cat(left[number]).permute(0, 3, 1, 2)) for number in left]
    assert distances[1] < 1e-5
    assert min(distances[number] for number in (0, 2, 3)) > 1e-2
    assert relative(levels["neck"], neck) < 1e-5


@pytest.mark.parametrize("variant", ["official", "between"])
@torch.no_grad()
def test_early_level_has_what_an_adapter_adds_up_to_there(deep_encoder, pixels, relative, variant):
    bare = deep_encoder(pixels, CONTENT)["early"]
    attach(deep_encoder, SamAdapterKnobs(variant, scale_factor=4, start="official"), seed=3)
    adapter, vit = deep_encoder.adapter, deep_encoder.vit
    adapter.up_projection.weight *= 20  # so that one missing addition is more than rounding
    inputs = normalise_pixels(pixels, CONTENT, "sam")
    patches = vit.patch_embed(inputs)
    tokens = patches + vit.pos_embed
    prior = adapter.prepare(inputs, patches, tokens)
    left = []
    for number, block in enumerate(vit.blocks):
        unadapted = block(adapter.before_block(number, tokens, prior))
        tokens = adapter.after_block(number, unadapted, prior)
        left.append((tokens.permute(0, 3, 1, 2), unadapted.permute(0, 3, 1, 2)))
    early = deep_encoder(pixels, CONTENT)["early"]
    assert relative(early, left[1][0]) < 1e-5
    assert relative(early, left[3][0]) > 1e-2
    assert relative(early, bare) > 1e-2
    if variant == "between":  # which adds after the block
        assert relative(early, left[1][1]) > 1e-2


@pytest.mark.parametrize(("name", "block", "width"), [("vit_b", 2, 768), ("vit_l", 5, 1024), ("vit_h", 7, 1280)])
def test_early_levels_of_the_released_models(name, block, width):
    assert (SIZES[name].global_blocks[0], SIZES[name].width) == (block, width)


def test_an_unknown_level_is_refused():
    with pytest.raises(UsageError, match="--levels neck,late: unknown level 'late'; use neck or early"):
        load_encoder("tiny", levels=("neck", "late"))


def test_swapped_relative_positions_are_seen(encoder, upstream, pixels, relative):
    expected = encode_upstream(upstream, pixels)
    for block in encoder.vit.blocks:
        attention = block.attn
        attention.rel_pos_h, attention.rel_pos_w = attention.rel_pos_w, attention.rel_pos_h
    assert relative(encoder(pixels, CONTENT)["neck"], expected) > 1e-4


def way_of(way: str, block: nn.Module, tokens: Tensor, monkeypatch) -> Tensor:
    """The block's output by one of the ways that compute it."""
    monkeypatch.setattr(products, "BY_ONEDNN", products.BY_ONEDNN and way != "bands without oneDNN")
    if way == "channels":  # what a gradient goes through
        return run_block(block, tokens.requires_grad_()).detach()
    with torch.no_grad():
        return run_block(block, tokens)


@pytest.mark.parametrize("way", ["bands", "bands without oneDNN", "channels"])
@pytest.mark.parametrize(("index", "name"), [(0, "windowed with padding"), (1, "global")])
@pytest.mark.parametrize("scale", [1, 10])  # large weights make attention sharp, and errors visible
def test_fused_block_is_as_exact_as_upstreams(encoder, index, name, way, scale, monkeypatch):
    for parameter in encoder.parameters():
        parameter.data *= scale
    block = encoder.vit.blocks[index]
    tokens = torch.randn(2, SIZE.grid, SIZE.grid, SIZE.width)
    with torch.no_grad():
        exact = deepcopy(block).double()(tokens.double()) - tokens
        theirs = (block(tokens) - tokens - exact).abs().max()
    ours = (way_of(way, block, tokens, monkeypatch) - tokens - exact).abs().max()
    assert ours < max(4 * theirs, 1e-5 * exact.std())


@pytest.mark.parametrize("index", [0, 3])  # windowed, global
@torch.no_grad()
def test_bands_of_a_full_size_grid_equal_upstream(index, relative):
    block = load_encoder("nano").vit.blocks[index]
    tokens = torch.randn(2, 64, 64, SIZES["nano"].width)
    expected = block(tokens) - tokens
    assert relative(run_block(block, tokens) - tokens, expected) < 2e-5


def test_frozen_blocks_run_in_bands_and_trained_ones_do_not(deep_encoder, pixels, relative, monkeypatch):
    """As in training the last blocks alone; what is frozen before them needs no gradient."""
    ran = []
    monkeypatch.setattr(
        attention, "run_in_bands", lambda block, *rest: ran.append(block) or bands.run_in_bands(block, *rest)
    )
    frozen, trained = deep_encoder.vit.blocks[:2], deep_encoder.vit.blocks[2:]
    for block in frozen:
        block.requires_grad_(False)
    deep_encoder.vit.patch_embed.requires_grad_(False)
    deep_encoder.vit.pos_embed.requires_grad_(False)
    deep_encoder(pixels, CONTENT)["neck"].square().sum().backward()
    assert ran == list(frozen)
    found = [parameter.grad for parameter in trained.parameters()]
    deep_encoder.zero_grad()
    monkeypatch.setattr(attention, "fits_bands", lambda *_: False)
    deep_encoder(pixels, CONTENT)["neck"].square().sum().backward()
    for parameter, gradient in zip(trained.parameters(), found, strict=True):
        assert relative(gradient, parameter.grad) < 1e-3


@torch.no_grad()
def test_low_rank_layers_and_added_qkv_run_in_bands_too(encoder, pixels, relative, monkeypatch):
    attach(encoder, LoraKnobs(rank=2, targets=("q", "v", "proj", "mlp")), seed=3)
    for name, parameter in encoder.named_parameters():
        if "low_rank_up" in name:
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    attach(encoder, SpatialPriorKnobs(rank=2, channels=8), seed=3)
    for layer in encoder.adapter.layers:
        for low_rank in layer.children():
            low_rank.up.weight.copy_(torch.randn(low_rank.up.weight.shape) * 0.1)
    found = encoder(pixels, CONTENT)["neck"]
    monkeypatch.setattr(attention, "fits_bands", lambda *_: False)
    assert relative(found, encoder(pixels, CONTENT)["neck"]) < 1e-5


@torch.no_grad()
def test_autocast_is_not_passed_by(encoder, pixels, relative, monkeypatch):
    exact = encoder(pixels, CONTENT)["neck"]
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(pixels, CONTENT)["neck"]
        monkeypatch.setattr(attention, "fits_bands", lambda *_: False)
        assert torch.equal(found, encoder(pixels, CONTENT)["neck"])
    assert relative(found, exact) > 1e-4


@pytest.mark.parametrize("gelu", [False, True])
@torch.no_grad()
def test_products_equal_linear_layers(gelu, relative):
    rows, weight, bias = torch.randn(3, 50, 40), torch.randn(24, 80)[:, ::2], torch.randn(24)
    for operand, added in ((rows, bias), (rows[:, ::2], None), (rows[0].T.contiguous().T, bias)):
        expected = F.linear(operand, weight, added)
        found = products.multiply(operand, weight, added, gelu)
        assert relative(found, F.gelu(expected) if gelu else expected) < 1e-5


COMPILE = """
import torch
from dataclasses import replace
from torch._dynamo.testing import CompileCounterWithBackend
from sam_cache.model import SIZES, Encoder, fixed_weights
from sam_cache.model.parts import part_of

size = replace(SIZES["tiny"], depth=5, global_blocks=(1, 3))
encoder = Encoder(size, part_of(fixed_weights(size), "image_encoder")).eval().requires_grad_(False)
pixels, content_hw = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), torch.tensor([[128, 70], [33, 128]])
with torch.inference_mode():
    expected = encoder(pixels, content_hw)["neck"]
    for places in ("kernel", "channels"):
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        encoder.compile_blocks(places, backend=backend, fullgraph=True)
        for _ in range(2):
            found = encoder(pixels, content_hw)["neck"]
        assert (found - expected).abs().max() < 1e-5 * expected.std(), f"{places}: another result"
        assert backend.frame_count == 2, f"{places}: compiled {backend.frame_count} times"
"""


@pytest.mark.slow
def test_blocks_compile_whole_and_once_for_all_of_a_kind():
    """In a process of its own: the types that tests check at every call are nothing for a compiler."""
    ended = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_padding_is_zero_after_normalisation(pixels):
    for normalise in ("sam", "imagenet", "minmax"):
        values = normalise_pixels(pixels, CONTENT, normalise)
        assert (values[0, :, :, 70:] == 0).all()
        assert (values[1, :, 33:] == 0).all()
    assert values[0, :, :, :70].aminmax() == (0.0, 1.0)


def test_pixels_beyond_the_content_do_not_matter(encoder, pixels):
    expected = encoder(pixels, CONTENT)["neck"]
    pixels[0, :, :, 70:] = 255
    assert torch.equal(encoder(pixels, CONTENT)["neck"], expected)


def test_bf16_parameters_compute_in_bf16(encoder, pixels, relative):
    expected = encoder(pixels, CONTENT)["neck"]
    found = encoder.to(torch.bfloat16)(pixels, CONTENT)["neck"]
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), expected) < 0.1


def test_another_input_size_stretches_positions():
    encoder = load_encoder("tiny", input_size=192)
    own = load_encoder("tiny")
    assert encoder.levels == {"neck": (SIZE.neck_channels, 12, 12)}
    assert encoder.digest == own.digest
    for axis in "hw":
        key = f"blocks.1.attn.rel_pos_{axis}"
        stretched = get_rel_pos(12, 12, own.vit.state_dict()[key])
        torch.testing.assert_close(get_rel_pos(12, 12, encoder.vit.state_dict()[key]), stretched)
    pixels = torch.zeros(1, 3, 192, 192, dtype=torch.uint8)
    assert encoder(pixels, torch.tensor([[192, 192]]))["neck"].isfinite().all()
    with pytest.raises(UsageError, match="multiple of 16"):
        load_encoder("tiny", input_size=100)
    with pytest.raises(UsageError, match="vit_b"):
        load_encoder("vit_x")


def test_encoder_is_frozen():
    encoder = load_encoder("tiny")
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
