import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from sam_cache.training.losses import LossWeights, dice_loss, focal_loss, iou_of, sam_loss


def draw(prompts=5, masks=3, height=8, width=6, dtype=torch.float64, seed=0):
    """Random logits, IoU predictions and soft targets, on images whose last rows and columns are padding."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(prompts, masks, height, width, generator=generator, dtype=dtype)
    scores = torch.rand(prompts, masks, generator=generator, dtype=dtype)
    targets = torch.rand(prompts, height, width, generator=generator, dtype=dtype)
    valid = torch.ones(prompts, height, width, dtype=dtype)
    valid[:, -2] = 0.3  # the image ends within this row
    valid[:, -1] = 0
    valid[1, :, -1] = 0
    return logits, scores, targets * valid, valid


def assert_same(losses, expected):
    torch.testing.assert_close(vars(losses), vars(expected), rtol=0, atol=0)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 3.0)])
def test_focal_equals_torchvision(alpha, gamma):
    logits, _, targets, valid = draw()
    each = sigmoid_focal_loss(logits, targets[:, None].expand_as(logits), alpha, gamma)
    expected = (each * valid[:, None]).sum((2, 3)) / valid.sum((1, 2))[:, None]
    torch.testing.assert_close(focal_loss(logits, targets, valid, alpha, gamma), expected)


def test_focal_and_dice_by_hand():
    """Two cells at p = 1/2 and one at p = 1/5; targets 1, 0 and 1/2; the last is half image."""
    logits = torch.tensor([0.0, 0.0, -math.log(4)], dtype=torch.float64).reshape(1, 1, 1, 3)
    targets = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64).reshape(1, 1, 3)
    valid = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64).reshape(1, 1, 3)

    first = 0.25 * 0.5**2 * math.log(2)
    second = 0.75 * 0.5**2 * math.log(2)
    third = 0.5 * 0.5**2 * -(math.log(1 / 5) + math.log(4 / 5)) / 2
    assert focal_loss(logits, targets, valid).item() == pytest.approx((first + second + third / 2) / 2.5)

    intersection = 0.5 + 0.5 * 0.2 * 0.5
    predicted, wanted = 0.5 + 0.5 + 0.5 * 0.2, 1 + 0.5 * 0.5
    expected = 1 - (2 * intersection + 1) / (predicted + wanted + 1)
    assert dice_loss(logits, targets, valid).item() == pytest.approx(expected)


def test_iou_by_hand():
    logits = torch.tensor([[2.0, 0.1, -1.0, -3.0, 5.0], [-1.0] * 5]).reshape(1, 2, 1, 5)
    targets = torch.tensor([1.0, 0.4, 0.5, 0.0, 1.0]).reshape(1, 1, 5)
    valid = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.4]).reshape(1, 1, 5)
    assert iou_of(logits, targets, valid).tolist() == [[pytest.approx(1 / 3), 0.0]]


def test_iou_of_empty_masks():
    nothing = torch.full((3, 1, 4, 4), -1.0)
    nothing[2] = 1
    targets = torch.zeros(3, 4, 4)
    targets[1, 2, 2] = 0.3  # there is an object, too thin to fill half a cell
    assert iou_of(nothing, targets, torch.ones(3, 4, 4)).flatten().tolist() == [1, 0, 0]


def test_all_empty_target_pulls_the_mask_down():
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    losses = sam_loss(logits, torch.ones(1, 1), torch.zeros(1, 4, 4), torch.ones(1, 4, 4))
    losses.total.sum().backward()
    assert (logits.grad > 0).all()
    assert losses.iou.item() == 0  # logit 0 is outside the mask: empty, and rightly so
    empty = torch.full((1, 1, 4, 4), -100.0)
    assert dice_loss(empty, torch.zeros(1, 4, 4), torch.ones(1, 4, 4)).item() == pytest.approx(0, abs=1e-6)


def test_total_is_the_weighted_sum():
    logits, scores, targets, valid = draw(masks=1)
    weights = LossWeights(focal=7.0, dice=3.0, iou=2.0)
    losses = sam_loss(logits, scores, targets, valid, weights=weights)
    focal, dice = focal_loss(logits, targets, valid)[:, 0], dice_loss(logits, targets, valid)[:, 0]
    error = (scores - iou_of(logits, targets, valid))[:, 0] ** 2
    torch.testing.assert_close(losses.total, 7 * focal + 3 * dice + 2 * error)
    torch.testing.assert_close((losses.focal, losses.dice, losses.iou), (focal, dice, error))
    assert not losses.chosen.any()


def test_gradient_goes_through_the_chosen_mask_only():
    logits, scores, targets, valid = draw()
    logits.requires_grad_()
    scores.requires_grad_()
    losses = sam_loss(logits, scores, targets, valid)
    losses.total.sum().backward()

    each = 20 * focal_loss(logits, targets, valid) + dice_loss(logits, targets, valid)
    assert losses.chosen.tolist() == each.argmin(1).tolist()
    assert len(losses.chosen.unique()) > 1, "the draw should not always choose the same mask"
    touched = logits.grad.flatten(2).any(-1)
    assert touched.tolist() == torch.nn.functional.one_hot(losses.chosen, 3).bool().tolist()

    (expected,) = torch.autograd.grad(each.min(1).values.sum(), logits)
    torch.testing.assert_close(logits.grad, expected)
    # The IoU head hears of all three.
    torch.testing.assert_close(scores.grad, 2 * (scores - iou_of(logits, targets, valid)).detach() / 3)


@pytest.mark.parametrize("masks", [1, 3])
def test_gradient_by_finite_differences(masks):
    logits, scores, targets, valid = draw(prompts=2, masks=masks, height=4, width=3)

    def total(logits, scores):
        return sam_loss(logits, scores, targets, valid).total

    assert torch.autograd.gradcheck(total, (logits.requires_grad_(), scores.requires_grad_()))


def test_padding_has_no_effect():
    logits, scores, targets, valid = draw()
    changed = torch.where(valid[:, None] == 0, 50.0, logits).requires_grad_()
    painted = torch.where(valid == 0, 1.0, targets)
    losses = sam_loss(changed, scores, painted, valid)
    assert_same(losses, sam_loss(logits, scores, targets, valid))
    losses.total.sum().backward()
    assert not (changed.grad * (valid == 0)[:, None]).any()


def test_valid_per_image():
    logits, scores, targets, _ = draw()
    per_image = torch.rand(2, 8, 6, dtype=torch.float64)
    image_index = torch.tensor([0, 1, 1, 0, 1])
    given = sam_loss(logits, scores, targets, per_image, image_index)
    assert_same(given, sam_loss(logits, scores, targets, per_image[image_index]))


def test_prompts_are_independent():
    logits, scores, targets, valid = draw()
    together = sam_loss(logits, scores, targets, valid)
    for p in range(len(logits)):
        alone = sam_loss(logits[p : p + 1], scores[p : p + 1], targets[p : p + 1], valid[p : p + 1])
        torch.testing.assert_close(alone.total[0], together.total[p])


@pytest.mark.parametrize("extreme", [-100.0, 100.0])
def test_finite_at_extreme_logits(extreme):
    logits = torch.full((2, 2, 4, 4), extreme, requires_grad=True)
    targets = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    losses = sam_loss(logits, torch.ones(2, 2), targets, torch.ones(2, 4, 4))
    losses.total.sum().backward()
    assert losses.total.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    logits, scores, targets, valid = (tensor.to(dtype) for tensor in draw(height=32, width=32))
    expected = sam_loss(logits.float(), scores.float(), targets.float(), valid.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = sam_loss(logits, scores, targets, valid)
    assert losses.total.dtype == torch.float32
    assert_same(losses, expected)
