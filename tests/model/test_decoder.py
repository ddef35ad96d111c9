from dataclasses import replace

import pytest
import torch
from segment_anything.modeling.mask_decoder import MaskDecoder
from torch import nn

from sam_cache.model import SIZES, decoder, freeze, image_attention, load_top, top_from_bytes, top_to_bytes
from sam_cache.model.upscaling import _transpose_tokens, lay_out, read_maps, upscale

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
        monkeypatch.setattr(image_attention, "_absorbs", lambda tokens, projection, answer=absorbs: answer)
        results.append(tiny_top({"neck": neck}, prompts, True))
    assert relative(results[0].logits, results[1].logits) < 1e-5
    assert relative(results[0].scores, results[1].scores) < 1e-5


def test_prompts_of_the_test_take_both_attentions(tiny_top, neck, prompts, monkeypatch):
    answers = set()
    decide = image_attention._absorbs
    monkeypatch.setattr(image_attention, "_absorbs", lambda *a: answers.add(decide(*a)) or decide(*a))
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


def draw_cells(prompts=len(SPECS), count=40, seed=5):
    """Some cells of each prompt twice, and one prompt's all in one token."""
    cells = torch.randint(0, SIZE.mask_size**2, (prompts, count), generator=torch.Generator().manual_seed(seed))
    cells[:, -3:] = cells[:, :1]
    cells[0] = torch.arange(count) % 4 + SIZE.mask_size * (torch.arange(count) // 4 % 4)
    return cells


def within_1e_6(found, expected):
    """Of the largest logit."""
    return bool((found - expected).abs().max() < 1e-6 * expected.abs().max())


def at_cells(masks, cells):
    return masks._replace(logits=masks.logits.flatten(2).take_along_dim(cells.unsqueeze(1), dim=2))


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("multimask", [False, True])
def test_cells_are_those_of_the_map(tiny_top, neck, prompts, multimask, with_masks):
    if with_masks:
        some = torch.arange(len(SPECS)) % 2 == 0
        prompts = replace(prompts, masks=3 * torch.randn(len(SPECS), SIZE.mask_size, SIZE.mask_size), has_mask=some)
    neck.requires_grad_()
    cells = draw_cells()
    expected = at_cells(tiny_top({"neck": neck}, prompts, multimask), cells)
    found = tiny_top({"neck": neck}, prompts, multimask, cells)
    assert found.logits.shape == (len(SPECS), 3 if multimask else 1, cells.shape[1])
    assert within_1e_6(found.logits, expected.logits)
    assert torch.equal(found.scores, expected.scores)
    grads = gradients(tiny_top, neck, *found), gradients(tiny_top, neck, *expected)
    keys = {key for key, grad in grads[1].items() if grad is None}
    assert keys == {key for key, grad in grads[0].items() if grad is None}
    largest = max(grad.norm() for grad in grads[1].values() if grad is not None)
    for key in grads[1].keys() - keys:
        assert (grads[0][key] - grads[1][key]).norm() <= 1e-5 * max(grads[1][key].norm(), 1e-3 * largest), key


def test_all_cells_are_the_map(tiny_top, neck, prompts):
    every = torch.arange(SIZE.mask_size**2).expand(len(SPECS), -1)
    found = tiny_top({"neck": neck}, prompts, True, every).logits
    assert within_1e_6(found.unflatten(2, (SIZE.mask_size, -1)), tiny_top({"neck": neck}, prompts, True).logits)


def test_cells_of_the_full_size_decoder(redraw, make_prompts):
    top = load_top("nano")
    size = top.size
    redraw(top, seed=4)
    neck = torch.randn(2, size.neck_channels, size.grid, size.grid).requires_grad_()
    prompts = make_prompts([(1, 1, False), (0, 2, True)], size.input_size)
    cells = torch.randint(0, size.mask_size**2, (2, 1024))
    expected, found = at_cells(top({"neck": neck}, prompts, True), cells), top({"neck": neck}, prompts, True, cells)
    assert within_1e_6(found.logits, expected.logits)
    grads = gradients(top, neck, *found), gradients(top, neck, *expected)
    assert_same_gradients(*grads, bound=1e-5, floor=3e-4)


def test_no_map_is_made_for_cells(tiny_top, neck, prompts, monkeypatch):
    monkeypatch.delattr(decoder, "read_maps")
    tiny_top({"neck": neck}, prompts, True, draw_cells())
    with pytest.raises(NameError):
        tiny_top({"neck": neck}, prompts, True)


@pytest.mark.parametrize("multimask", [False, True])
def test_no_prompts_have_no_cells(tiny_top, neck, make_prompts, multimask):
    masks = tiny_top({"neck": neck}, make_prompts([], SIZE.input_size), multimask, torch.zeros(0, 7, dtype=torch.long))
    assert masks.logits.shape == (0, 3 if multimask else 1, 7)
    assert masks.scores.shape == masks.logits.shape[:2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cells_under_autocast(tiny_top, neck, prompts, dtype, relative):
    cells = draw_cells()
    with torch.autocast("cpu", dtype=dtype):
        expected = at_cells(tiny_top({"neck": neck.to(dtype)}, prompts, True), cells)
        found = tiny_top({"neck": neck.to(dtype)}, prompts, True, cells)
    assert found.logits.dtype == expected.logits.dtype == dtype
    assert relative(found.logits.float(), expected.logits.float()) < 8 * torch.finfo(dtype).eps
    weighted_sum(*found).backward()
    assert tiny_top.mask_decoder.output_upscaling[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("count", [1, 3])
def test_maps_that_are_made_again_are_those_that_are_kept(tiny_top, count):
    """The same numbers and gradients as from plain operations that keep all they need."""
    upscaling = tiny_top.mask_decoder.output_upscaling.double()
    image = torch.randn(4, SIZE.grid**2, SIZE.neck_channels, dtype=torch.float64, requires_grad=True)
    hypers = torch.randn(4, count, SIZE.neck_channels // 8, dtype=torch.float64, requires_grad=True)
    kept = lay_out(upscale(upscaling, image) @ hypers.mT)
    again = read_maps(upscaling, image, hypers)
    torch.testing.assert_close(again, kept, rtol=1e-12, atol=1e-14)
    inputs, weight = (image, hypers, *upscaling.parameters()), torch.randn_like(kept)
    grads = [torch.autograd.grad((maps * weight).sum(), inputs) for maps in (again, kept)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


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
