from dataclasses import replace

import pytest
import torch
from segment_anything.modeling.mask_decoder import MaskDecoder
from torch import nn

from sam_cache.model import SIZES, freeze, load_top, top_from_bytes, top_to_bytes
from sam_cache.model import decoder as decoder_module
from sam_cache.model.decoder import _transpose_tokens

SIZE = SIZES["tiny"]
# Images in arbitrary order, one without prompts (1) and one with many (2); points, boxes, both and
# neither; the 9-point prompt has too many tokens for the absorbed projections, the others have not.
SPECS = [
    (2, 1, False),
    (0, 1, False),
    (2, 0, True),
    (2, 2, True),
    (0, 0, False),
    (3, 9, False),
    (2, 1, False),
    (3, 3, True),
    (2, 1, False),
]


@pytest.fixture
def neck():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, SIZE.neck_channels, SIZE.grid, SIZE.grid, generator=generator)


@pytest.fixture
def prompts(make_prompts):
    return make_prompts(SPECS, SIZE.input_size)


def weighted_sum(logits, scores):
    generator = torch.Generator().manual_seed(3)
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (logits, scores))


def gradients(top, neck, logits, scores):
    named = {**dict(top.named_parameters()), "neck": neck}
    grads = torch.autograd.grad(weighted_sum(logits, scores), named.values(), allow_unused=True)
    return dict(zip(named, grads, strict=True))


def assert_same_gradients(found, expected, bound, floor=0.0):
    """Within `bound` of each gradient's norm, or of `floor` times the largest gradient's."""
    assert {k for k, g in found.items() if g is None} == {k for k, g in expected.items() if g is None}
    largest = torch.stack([g.norm() for g in expected.values() if g is not None]).max()
    for key, grad in expected.items():
        if grad is None:
            assert "mask_downscaling" in key  # only a mask prompt would reach it
        elif key.endswith("k_proj.bias"):  # cancels in the softmax: its gradient is zero but for rounding
            assert max(grad.norm(), found[key].norm()) < 1e-6 * largest
        else:
            assert (found[key] - grad).norm() <= bound * max(grad.norm(), floor * largest), key


@pytest.mark.parametrize("multimask", [False, True])
def test_batch_equals_upstream_prompt_by_prompt(tiny_top, neck, prompts, multimask, decode_one_by_one, relative):
    neck.requires_grad_()
    expected = decode_one_by_one(tiny_top, neck, prompts, multimask)
    found = tiny_top({"neck": neck}, prompts, multimask)
    assert found.logits.shape == (len(SPECS), 3 if multimask else 1, SIZE.mask_size, SIZE.mask_size)
    assert relative(found.logits, expected[0]) < 1e-5
    assert relative(found.scores, expected[1]) < 1e-5
    # In fp32 the rounding of upstream's own gradients shows in those that nearly cancel.
    grads = gradients(tiny_top, neck, *found), gradients(tiny_top, neck, *expected)
    assert_same_gradients(*grads, bound=1e-5, floor=1e-4)


@pytest.mark.parametrize("multimask", [False, True])
def test_mask_prompts_equal_upstream(tiny_top, neck, prompts, multimask, decode_one_by_one, relative):
    """Each of these prompts sees an image of its own; none of them is lost, and the mask layers learn."""
    everyone = torch.ones(len(SPECS), dtype=torch.bool)
    prompts = replace(prompts, masks=3 * torch.randn(len(SPECS), SIZE.mask_size, SIZE.mask_size), has_mask=everyone)
    neck.requires_grad_()
    expected = decode_one_by_one(tiny_top, neck, prompts, multimask)
    found = tiny_top({"neck": neck}, prompts, multimask)
    assert relative(found.logits, expected[0]) < 1e-5
    assert (found.scores - expected[1]).abs().max() < 1e-6 * expected[1].abs().max()  # nearly equal, so no spread
    grads = gradients(tiny_top, neck, *found), gradients(tiny_top, neck, *expected)
    assert {key for key, grad in grads[0].items() if grad is None} == {"prompt_encoder.no_mask_embed.weight"}
    for key, grad in grads[1].items():
        if grad is not None and not key.endswith("k_proj.bias"):
            assert (grads[0][key] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, key


def test_prompts_with_and_without_masks_share_a_batch(tiny_top, neck, prompts, decode_one_by_one, relative):
    some = torch.arange(len(SPECS)) % 2 == 0
    masks = 3 * torch.randn(len(SPECS), SIZE.mask_size, SIZE.mask_size)
    masks[~some] = torch.nan  # what lies there must not matter
    prompts = replace(prompts, masks=masks, has_mask=some)
    expected = decode_one_by_one(tiny_top, neck, prompts, False)
    found = tiny_top({"neck": neck}, prompts, False)
    assert relative(found.logits, expected[0]) < 1e-5


def test_equals_upstream_to_double_precision(tiny_top, neck, prompts, decode_one_by_one, relative):
    tiny_top.mask_decoder.double()  # upstream's prompt encoder is fp32 by construction
    neck = neck.double().requires_grad_()
    expected = decode_one_by_one(tiny_top, neck, prompts, True)
    found = tiny_top({"neck": neck}, prompts, True)
    # Not less: that prompt encoder's sines differ in their last fp32 bit between one prompt and many,
    # on some processors and not on others.
    assert relative(found.logits, expected[0]) < 1e-7
    assert relative(found.scores, expected[1]) < 1e-7
    grads = gradients(tiny_top, neck, *found), gradients(tiny_top, neck, *expected)
    assert_same_gradients(*grads, bound=1e-6)


def test_full_size_decoder_equals_upstream(redraw, make_prompts, decode_one_by_one, relative):
    top = load_top("nano")  # as large as the top of every released SAM
    size = top.size
    redraw(top, seed=4)
    neck = torch.randn(2, size.neck_channels, size.grid, size.grid).requires_grad_()
    prompts = make_prompts([(1, 1, False), (0, 2, True)], size.input_size)
    expected = decode_one_by_one(top, neck, prompts, True)
    found = top({"neck": neck}, prompts, True)
    assert relative(found.logits, expected[0]) < 1e-5
    grads = gradients(top, neck, *found), gradients(top, neck, *expected)
    # Longer sums than in the tiny model: upstream's rounding shows in gradients a little larger.
    assert_same_gradients(*grads, bound=1e-5, floor=3e-4)


def test_absorbed_equals_plain_attention(tiny_top, neck, prompts, monkeypatch, relative):
    results = []
    for absorbs in (True, False):
        monkeypatch.setattr(decoder_module, "_absorbs", lambda tokens, projection, answer=absorbs: answer)
        results.append(tiny_top({"neck": neck}, prompts, True))
    assert relative(results[0].logits, results[1].logits) < 1e-5
    assert relative(results[0].scores, results[1].scores) < 1e-5


def test_prompts_of_the_test_take_both_attentions(tiny_top, neck, prompts, monkeypatch):
    answers = set()
    decide = decoder_module._absorbs
    monkeypatch.setattr(decoder_module, "_absorbs", lambda *a: answers.add(decide(*a)) or decide(*a))
    tiny_top({"neck": neck}, prompts, False)
    assert answers == {True, False}


def test_chunks_of_prompts_equal_the_whole(tiny_top, neck, prompts, relative):
    whole = tiny_top({"neck": neck}, prompts, True)
    for chunk in torch.arange(len(prompts)).split(4):
        part = tiny_top({"neck": neck}, prompts.select(chunk), True)
        assert relative(part.logits, whole.logits[chunk]) < 1e-5
        assert relative(part.scores, whole.scores[chunk]) < 1e-5


def test_no_prompts(tiny_top, neck, make_prompts):
    masks = tiny_top({"neck": neck}, make_prompts([], SIZE.input_size), True)
    assert masks.logits.shape == (0, 3, SIZE.mask_size, SIZE.mask_size)
    assert masks.scores.shape == (0, 3)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast_stays_near_fp32(tiny_top, neck, prompts, dtype, bound, relative):
    expected = tiny_top({"neck": neck}, prompts, True)
    with torch.autocast("cpu", dtype=dtype):
        found = tiny_top({"neck": neck.to(dtype)}, prompts, True)
    weighted_sum(*found).backward()
    assert relative(found.logits.float(), expected.logits) < bound
    assert tiny_top.prompt_encoder.point_embeddings[1].weight.grad.isfinite().all()


def test_transposed_convolution_of_tokens():
    conv = nn.ConvTranspose2d(6, 5, kernel_size=2, stride=2)
    image = torch.randn(2, 6, 3, 4)
    pixels = _transpose_tokens(conv, image.permute(0, 2, 3, 1))
    pixels = pixels.unflatten(3, (2, 2)).permute(0, 5, 1, 3, 2, 4).reshape(2, 5, 6, 8)
    torch.testing.assert_close(pixels, conv(image))


def test_names_are_upstreams(tiny_top, tiny_state):
    assert isinstance(tiny_top.mask_decoder, MaskDecoder)
    assert set(tiny_top.state_dict()) == {key for key in tiny_state if not key.startswith("image_encoder")}


def test_freeze(tiny_top):
    def trained():
        return {name.split(".")[0] for name, p in tiny_top.named_parameters() if p.requires_grad}

    freeze(tiny_top, {"decoder"})
    assert trained() == {"mask_decoder"}
    freeze(tiny_top, {"prompt", "decoder"})
    assert trained() == {"mask_decoder", "prompt_encoder"}
    assert not any(p.requires_grad for p in tiny_top.prompt_encoder.mask_downscaling.parameters())


def test_bytes_round_trip(tiny_top):
    blob = top_to_bytes(tiny_top)
    again = top_from_bytes(blob)
    assert again.size == tiny_top.size
    assert top_to_bytes(again) == blob
    for key, tensor in tiny_top.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
