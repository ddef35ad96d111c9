import copy

import pytest
import torch
from torch import nn

from sam_cache.errors import UsageError
from sam_cache.model import SIZES, attention, load_encoder
from sam_cache.model.adapters import (
    LoraKnobs,
    LowRankLinear,
    adapter_parameters,
    attach,
    insert_low_rank,
    merge,
    merge_low_rank,
)
from sam_cache.model.parts import build_image_encoder

SIZE = SIZES["tiny"]
EVERYTHING = ("q", "k", "v", "proj", "mlp")
CONTENT = torch.tensor([[SIZE.input_size, 70], [33, SIZE.input_size]])


def perturb(encoder):
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapter_parameters(encoder).items():
        if "_up_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def encode(encoder, pixels):
    return encoder(pixels, CONTENT)["neck"]


def test_nothing_changes_at_first(encoder, pixels, monkeypatch):
    # Frozen layers run in bands, whose products are another library's: equal but for rounding.
    monkeypatch.setattr(attention, "fits_bands", lambda *_: False)
    expected = encode(encoder, pixels)
    attach(encoder, LoraKnobs(targets=EVERYTHING), seed=1)
    assert torch.equal(encode(encoder, pixels), expected)


def test_every_target_updates_its_own_outputs_by_a_scaled_product(encoder, pixels, relative):
    plain = copy.deepcopy(encoder)
    before = encode(encoder, pixels)
    attach(encoder, LoraKnobs(rank=3, alpha=6.0, targets=EVERYTHING), seed=1)
    perturb(encoder)
    found = adapter_parameters(encoder)
    C = SIZE.width
    for number, block in enumerate(plain.vit.blocks):
        updates = (
            ("attn.qkv", "q", block.attn.qkv.weight[:C]),
            ("attn.qkv", "k", block.attn.qkv.weight[C : 2 * C]),
            ("attn.qkv", "v", block.attn.qkv.weight[2 * C :]),
            ("attn.proj", "proj", block.attn.proj.weight),
            ("mlp.lin1", "mlp", block.mlp.lin1.weight),
            ("mlp.lin2", "mlp", block.mlp.lin2.weight),
        )
        for layer, target, weight in updates:
            name = f"vit.blocks.{number}.{layer}.low_rank_{{}}_{target}"
            weight.data += 2 * found.pop(name.format("up")) @ found.pop(name.format("down"))
    assert not found
    expected = encode(plain, pixels)
    assert relative(before, expected) > 0.1
    assert relative(encode(encoder, pixels), expected) < 1e-5


@pytest.mark.parametrize(("target", "third"), [("q", 0), ("k", 1), ("v", 2)])
def test_other_thirds_of_the_fused_layer_are_untouched(encoder, target, third):
    tokens = torch.randn(2, 5, 5, SIZE.width)
    expected = encoder.vit.blocks[0].attn.qkv(tokens).chunk(3, dim=-1)
    attach(encoder, LoraKnobs(targets=(target,)), seed=1)
    perturb(encoder)
    found = encoder.vit.blocks[0].attn.qkv(tokens).chunk(3, dim=-1)
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [i != third for i in range(3)]


def test_base_tensors_are_kept_under_their_names(encoder):
    before = dict(encoder.named_parameters())
    attach(encoder, LoraKnobs(targets=EVERYTHING), seed=1)
    after = dict(encoder.named_parameters())
    assert all(after[name] is parameter and not parameter.requires_grad for name, parameter in before.items())
    added = adapter_parameters(encoder)
    assert after.keys() == before.keys() | added.keys()
    assert all(parameter.requires_grad for parameter in added.values())


def test_only_named_layers_from_the_first_block_on_are_swapped(encoder):
    attach(encoder, LoraKnobs(targets=("proj", "v"), first_block=1), seed=1)
    swapped = {name for name, module in encoder.named_modules() if isinstance(module, LowRankLinear)}
    assert swapped == {"vit.blocks.1.attn.qkv", "vit.blocks.1.attn.proj"}
    assert "vit.blocks.1.attn.qkv.low_rank_down_v" in adapter_parameters(encoder)
    assert not any(name.endswith("_q") for name in adapter_parameters(encoder))


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
@pytest.mark.parametrize(
    "knobs",
    [
        LoraKnobs(),
        LoraKnobs(rank=7, targets=EVERYTHING, first_block=3),
        LoraKnobs(targets=("mlp",)),
        LoraKnobs(targets=("k", "proj")),
    ],
)
def test_the_number_of_parameters_is_that_of_the_formula(name, knobs):
    size = SIZES[name]
    with torch.device("meta"):
        vit = build_image_encoder(size)
    before = sum(parameter.numel() for parameter in vit.parameters())
    insert_low_rank(vit, knobs)
    added = sum(parameter.numel() for parameter in vit.parameters()) - before
    thin = len(set(knobs.targets) - {"mlp"})
    per_rank = size.width * (2 * thin + 10 * ("mlp" in knobs.targets))
    assert added == (size.depth - knobs.first_block) * knobs.rank * per_rank
    if (name, knobs) == ("vit_b", LoraKnobs()):
        assert added == 147_456  # 12 blocks, q and v, 4 * (768 + 768) each


def test_merged_layers_are_upstreams_and_compute_the_same(encoder, pixels, relative):
    keys = list(encoder.vit.state_dict())
    attach(encoder, LoraKnobs(rank=5, targets=EVERYTHING), seed=1)
    perturb(encoder)
    expected = encode(encoder, pixels)
    merge(encoder)
    assert relative(encode(encoder, pixels), expected) < 1e-5
    assert list(encoder.vit.state_dict()) == keys
    assert not adapter_parameters(encoder)
    for block in encoder.vit.blocks:
        assert {type(layer) for layer in (block.attn.qkv, block.attn.proj, block.mlp.lin1, block.mlp.lin2)} == {
            nn.Linear
        }
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    upstream = build_image_encoder(SIZE).eval()
    upstream.load_state_dict(encoder.vit.state_dict())
    tokens = torch.randn(1, 3, SIZE.input_size, SIZE.input_size)
    merge_low_rank(upstream)  # has none: still upstream's
    with torch.no_grad():
        torch.testing.assert_close(upstream(tokens), encoder.vit(tokens))


def test_merging_without_low_rank_layers_changes_nothing(encoder):
    before = dict(encoder.named_modules())
    merge(encoder)
    after = dict(encoder.named_modules())
    assert all(after[name] is module for name, module in before.items())


def test_merging_is_done_in_fp32(encoder):
    encoder.to(torch.bfloat16)
    attach(encoder, LoraKnobs(rank=2, targets=("proj",)), seed=1)
    layer = encoder.vit.blocks[0].attn.proj
    assert layer.low_rank_down_proj.dtype == torch.bfloat16
    layer.low_rank_up_proj.data = torch.randn(SIZE.width, 2, dtype=torch.bfloat16)
    update = 2.0 * layer.low_rank_up_proj.double() @ layer.low_rank_down_proj.double()
    exact = layer.weight.double() + update
    merge(encoder)
    merged = encoder.vit.blocks[0].attn.proj.weight
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8).all()  # a single rounding to bf16


def test_gradients_reach_all_of_the_adapter_and_nothing_else(encoder, pixels):
    attach(encoder, LoraKnobs(targets=EVERYTHING), seed=1)
    perturb(encoder)
    encode(encoder, pixels).square().sum().backward()
    added = adapter_parameters(encoder)
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == (name in added), name
        if name in added:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_checkpointing_changes_neither_outputs_nor_gradients(encoder, pixels):
    attach(encoder, LoraKnobs(targets=EVERYTHING), seed=1)
    perturb(encoder)
    found = []
    for checkpointing in (False, True):
        encoder.checkpointing = checkpointing
        encoder.zero_grad()
        output = encode(encoder, pixels)
        output.square().sum().backward()
        found.append([output, *(parameter.grad for parameter in adapter_parameters(encoder).values())])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_autocast_to_bf16(encoder, pixels, relative):
    attach(encoder, LoraKnobs(targets=EVERYTHING), seed=1)
    perturb(encoder)
    expected = encode(encoder, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.vit.blocks[0].attn.qkv(torch.randn(1, SIZE.width)).dtype == torch.bfloat16
        output = encode(encoder, pixels)
    assert relative(output.float(), expected) < 0.2
    output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter_parameters(encoder).values())


def test_the_seed_alone_decides_what_is_drawn():
    def drawn(seed, targets):
        encoder = load_encoder("tiny")
        attach(encoder, LoraKnobs(targets=targets), seed)
        return adapter_parameters(encoder)

    first, reordered, other = drawn(1, ("q", "v")), drawn(1, ("v", "q")), drawn(2, ("q", "v"))
    assert list(first) == list(reordered)
    assert all(torch.equal(first[name], reordered[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "_down_" in name)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (LoraKnobs(rank=0), "--lora-rank 0: .* from 1 to 32"),
        (LoraKnobs(rank=33), "--lora-rank 33: .* 32 wide"),
        (LoraKnobs(alpha=0.0), "--lora-alpha 0.0"),
        (LoraKnobs(alpha=float("nan")), "--lora-alpha nan"),
        (LoraKnobs(targets=("q", "prj")), "--lora-targets 'prj': .*mean proj"),
        (LoraKnobs(targets=()), "--lora-targets names no layer"),
        (LoraKnobs(first_block=2), "--lora-from-block 2: .* 2 blocks; choose from 0 to 1"),
        (LoraKnobs(first_block=-1), "--lora-from-block -1"),
    ],
)
def test_knobs_that_do_not_fit_are_refused_before_anything_changes(encoder, knobs, message):
    with pytest.raises(UsageError, match=message):
        attach(encoder, knobs, seed=1)
    assert not adapter_parameters(encoder)


def test_a_second_insertion_is_refused(encoder):
    attach(encoder, LoraKnobs(), seed=1)
    with pytest.raises(UsageError, match="already"):
        attach(encoder, LoraKnobs(targets=("proj",)), seed=1)
