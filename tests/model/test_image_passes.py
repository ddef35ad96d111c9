"""Passes over image tokens with gradients made by hand, beside plain operations with those of autograd."""

import pytest
import torch
import torch.nn.functional as F

from sam_cache.model.image_passes import ReadImage, UpdateImage
from sam_cache.model.linear import apply_trained

PROMPTS, HEADS, TOKENS, CELLS, CHANNELS = 3, 2, 3, 16, 5
INDEX = torch.tensor([1, 0, 1])


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def arguments_of_read(dtype=torch.float64):
    t = HEADS * TOKENS
    shapes = (PROMPTS, t, CELLS), (PROMPTS, t, CHANNELS), (PROMPTS, CELLS, CHANNELS)
    return [draw(*shape, dtype=dtype) for shape in shapes]


def read_plainly(added, queries, image, rows):
    context = (added + queries @ image.mT).softmax(dim=-1) @ image
    return context, None if rows is None else image.flatten(0, 1)[rows]


def arguments_of_update(shared, dtype=torch.float64):
    t = HEADS * TOKENS
    added, keys, told = (draw(PROMPTS, t, width, dtype=dtype) for width in (CELLS, CHANNELS, CHANNELS))
    image = draw(4 if shared else PROMPTS, CELLS, CHANNELS, dtype=dtype)  # two images that nobody asks about
    scale, shift = draw(CHANNELS, dtype=dtype), draw(CHANNELS, dtype=dtype)
    return [added, None if shared else keys, image, INDEX if shared else None, told, scale, shift, 1e-5, HEADS]


def update_plainly(added, keys, image, index, told, scale, shift, eps, heads):
    image = image if index is None else image[index]
    scores = added if keys is None else added + keys @ image.mT
    weights = scores.unflatten(1, (heads, -1)).softmax(dim=2).flatten(1, 2)
    return F.layer_norm(image + weights.mT @ told, scale.shape, scale, shift, eps)


def differentiable(arguments):
    return [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 47, 3, 20])])
def test_reading_an_image(rows):
    arguments = [*arguments_of_read(), rows]
    found, expected = ReadImage.apply(*arguments), read_plainly(*arguments)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda *given: ReadImage.apply(*given)[: 1 if rows is None else 2], arguments)


@pytest.mark.parametrize("shared", [False, True])
def test_updating_an_image(shared):
    arguments = arguments_of_update(shared)
    torch.testing.assert_close(UpdateImage.apply(*arguments), update_plainly(*arguments))
    assert torch.autograd.gradcheck(UpdateImage.apply, arguments)


@pytest.mark.parametrize("together", [1, PROMPTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prompt_by_prompt_and_all_at_once_are_the_same(monkeypatch, together, dtype):
    """As on a CPU, in fp32 by another library, and as on a GPU."""

    def blocks(image, prompts):
        return [slice(start, start + together) for start in range(0, prompts, together)]

    monkeypatch.setattr("sam_cache.model.image_passes._blocks", blocks)
    cases = [(ReadImage, read_plainly, [*arguments_of_read(dtype), torch.tensor([3, 47, 3])])]
    cases += [(UpdateImage, update_plainly, arguments_of_update(shared, dtype)) for shared in (False, True)]
    for function, plain, arguments in cases:
        results = []
        for compute in (function.apply, plain):
            made = compute(*arguments)
            made = torch.cat([part.flatten() for part in made]) if isinstance(made, tuple) else made.flatten()
            weight = torch.linspace(-1, 1, len(made), dtype=dtype)
            results.append((made, torch.autograd.grad(made @ weight, differentiable(arguments))))
        torch.testing.assert_close(*results)


def test_only_what_cannot_be_made_again_is_kept():
    image = draw(2, 4096, 64, dtype=torch.float32)
    added, keys, told = draw(2, 8, 4096), draw(2, 8, 64), draw(2, 8, 64)
    scale, shift, kept = draw(64), draw(64), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    given = [x.detach().float().requires_grad_() for x in (added, keys, told, scale, shift)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        UpdateImage.apply(given[0], given[1], image, None, *given[2:], 1e-5, 2)
    # The image, the weights, and a mean and a deviation for each of its tokens; not the sum before the norm.
    assert sum(kept.values()) < image.numel() + added.numel() + 2 * 2 * 4096 + 4000


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
def test_a_trained_linear_layer(shape):
    rows, weight, bias = (
        draw(*shape, dtype=torch.float32),
        draw(4, 6, dtype=torch.float32),
        draw(4, dtype=torch.float32),
    )
    arguments, factor = (rows, weight, bias), torch.randn(*shape[:-1], 4)
    results = []
    for compute in (apply_trained, F.linear):
        made = compute(*arguments)
        results.append((made, torch.autograd.grad((made * factor).sum(), arguments)))
    torch.testing.assert_close(*results)


def test_a_trained_linear_layer_obeys_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        made = apply_trained(torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5))
    assert made.dtype == torch.bfloat16
