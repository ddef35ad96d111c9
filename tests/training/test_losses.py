import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample
from torchvision.ops import sigmoid_focal_loss

from sam_cache.errors import UsageError
from sam_cache.training.losses import LOSSES, LossWeights, loss_cells, part_names, sam_loss
from sam_cache.training.mask_losses import (
    balanced_bce_loss,
    bce_loss,
    dice_loss,
    draw_cells,
    focal_loss,
    iou_of,
    point_set,
    read_at_points,
    sampled_iou_of,
    soft_iou_loss,
    uncertain_point_set,
)

every_kind = pytest.mark.parametrize("kind", LOSSES)


def draw(prompts=5, masks=3, height=8, width=6, dtype=torch.float64, seed=0):
    """Random logits, IoU predictions and soft targets, on images whose last rows and columns are padding."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(prompts, masks, height, width, generator=generator, dtype=dtype)
    scores = torch.rand(prompts, masks, generator=generator, dtype=dtype)
    targets = torch.rand(prompts, height, width, generator=generator, dtype=dtype)
    valid = torch.ones(prompts, height, width, dtype=dtype)
    valid[:, -2] = 0.3  # the image ends within this row
    valid[:, -1] = 0
    valid[1:2, :, -1] = 0
    return logits, scores, targets * valid, valid


def draw_chance(prompts=5, seed=1):
    return torch.rand(prompts, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_blobs(side=64, prompts=3, dtype=torch.float64):
    """Smooth logits and targets: wide discs with soft rims, each in another place."""
    y, x = torch.meshgrid(*[(torch.arange(side, dtype=dtype) + 0.5) / side] * 2, indexing="ij")
    middle = torch.arange(prompts, dtype=dtype)[:, None, None] / (2 * prompts) + 0.25
    radius = ((x - middle).square() + (y - 0.4).square()).sqrt()
    logits, targets = 12 * (0.3 - radius), (8 * (0.28 - radius)).sigmoid()
    return logits[:, None], targets


def parts_of(kind, logits, targets, valid, chance):
    """A kind's two parts for each of M masks, from the public losses."""
    cells = logits, targets, valid
    if kind == "points":
        cells = pick(*cells, chance)
    if kind == "uncertain-points":
        each = [published(mask, targets, valid, chance) for mask in logits.unbind(1)]
        return tuple(torch.stack(parts, dim=1) for parts in zip(*each, strict=True))
    first, second = {
        "focal-dice": (focal_loss, dice_loss),
        "bce-iou": (bce_loss, soft_iou_loss),
        "balanced-bce-iou": (balanced_bce_loss, soft_iou_loss),
        "points": (bce_loss, dice_loss),
    }[kind]
    return first(*cells), second(*cells)


def pick(logits, targets, valid, chance, count=1024):
    """Cell after cell, those in which the prompt's points fall; as maps (P, M, S, 1)."""
    height, width = targets.shape[1:]
    found = []
    for p, points in enumerate(point_set(chance, count)):
        places = [(int(y * height), int(x * width)) for x, y in points.tolist()]
        found.append([torch.stack([m[p, ..., y, x] for y, x in places], dim=-1) for m in (logits, targets, valid)])
    return tuple(torch.stack(cells).unsqueeze(-1) for cells in zip(*found, strict=True))


def wanted_scores(kind, logits, targets, valid, chance):
    """The IoUs the head is to learn, and which of them are known."""
    if kind == "points":
        return sampled_iou_of(*pick(logits, targets, valid, chance))
    return iou_of(logits, targets, valid), torch.tensor(True)


def published(logits, targets, valid, chance, count=112 * 112):
    """HQ-SAM's two losses, (P,) each, in plain operations and one mask (h, w) after the other.

    `loss_masks` of its train/utils/loss_mask.py with detectron2's `get_uncertain_point_coords_with_randomness`,
    given our candidates and other points. Padding, which they do not know, comes last and weighs nothing.
    """
    found = []
    uncertain = int(0.75 * count)
    points = point_set(chance, 3 * count + count - uncertain)
    for mask, target, inside, places in zip(logits, targets, valid, points, strict=True):
        candidates, others = places[: 3 * count], places[3 * count :]
        logit, weight = read_plainly(mask.detach(), inside, candidates)
        uncertainty = (-logit.abs() - 1e9 * (weight == 0)).tolist()
        order = sorted(range(3 * count), key=uncertainty.__getitem__, reverse=True)
        chosen = torch.cat([candidates[order[:uncertain]], others])
        (logit, weight), (wanted, _) = (read_plainly(cells, inside, chosen) for cells in (mask, target))
        each = binary_cross_entropy_with_logits(logit, wanted, reduction="none")
        share = logit.sigmoid() * weight
        dice = 1 - (2 * (share * wanted).sum() + 1) / (share.sum() + (wanted * weight).sum() + 1)
        found.append(((each * weight).sum() / weight.sum(), dice))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def read_plainly(cells, valid, points):
    """One map at points (N, 2), from its valid cells, and how valid it is there."""
    grid = 2 * points[None, None].to(cells) - 1
    maps = torch.stack([cells * valid, valid])[None]
    read, inside = grid_sample(maps, grid, padding_mode="border", align_corners=False)[0, :, 0]
    return read / inside.clamp(min=1e-30), inside


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


def test_cross_entropies_and_soft_iou_equal_plain_loops():
    logits, _, targets, valid = draw()
    found = [loss(logits, targets, valid).numpy() for loss in (bce_loss, balanced_bce_loss, soft_iou_loss)]
    for prompt in range(5):
        wanted, area = targets[prompt].numpy(), valid[prompt].numpy()
        share = (wanted * area).sum() / area.sum()
        for mask in range(3):
            p = 1 / (1 + np.exp(-logits[prompt, mask].numpy()))
            on_object, on_background = -wanted * np.log(p), -(1 - wanted) * np.log(1 - p)
            expected = [
                (area * (on_object + on_background)).sum() / area.sum(),
                (area * ((1 - share) * on_object + share * on_background)).sum() / area.sum(),
            ]
            intersection = (area * p * wanted).sum()
            union = (area * p).sum() + (area * wanted).sum() - intersection
            expected.append(1 - (intersection + 1) / (union + 1))
            assert [each[prompt, mask] for each in found] == pytest.approx(expected)


def test_balanced_cross_entropy_is_that_of_sam_adapter():
    """Its weighting: the share of positives, times a cross entropy with pos_weight negatives / positives."""
    logits, _, targets, _ = draw(prompts=1, masks=1)
    positives, negatives = targets.sum(), (1 - targets).sum()
    each = torch.nn.BCEWithLogitsLoss(pos_weight=negatives / positives)(logits[:, 0], targets)
    expected = positives / (positives + negatives) * each
    assert balanced_bce_loss(logits, targets, torch.ones_like(targets)).item() == pytest.approx(expected.item())


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


@every_kind
def test_empty_target_pulls_the_mask_down(kind):
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    target, valid = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    losses = sam_loss(logits, torch.ones(1, 1), target, valid, kind=kind)
    losses.total.sum().backward()
    assert (logits.grad > 0).all()
    assert losses.iou.item() == 0  # logit 0 is outside the mask: empty, and rightly so
    empty = sam_loss(torch.full((1, 1, 4, 4), -100.0), torch.ones(1, 1), target, valid, kind=kind)
    assert empty.total.item() == pytest.approx(0, abs=1e-6)


@every_kind
def test_perfect_prediction_costs_nothing(kind):
    targets = torch.stack([torch.ones(8, 8), torch.zeros(8, 8), torch.zeros(8, 8)])
    if kind != "uncertain-points":  # those read a mask between cells too, where an edge is never perfect
        targets[2, 2:5, 1:7] = 1
    logits, scores, valid = 200 * (targets[:, None] - 0.5), torch.ones(3, 1), torch.ones(3, 8, 8)
    assert sam_loss(logits, scores, targets, valid, kind=kind).total.tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert (sam_loss(-logits, scores, targets, valid, kind=kind).total > 1).all()


@every_kind
def test_total_is_the_weighted_sum(kind):
    logits, scores, targets, valid = draw(masks=1)
    weights, chance = LossWeights(mask=7.0, overlap=3.0, iou=2.0), draw_chance()
    losses = sam_loss(logits, scores, targets, valid, weights=weights, kind=kind, chance=chance)
    mask, overlap = (part[:, 0] for part in parts_of(kind, logits, targets, valid, chance))
    iou, known = wanted_scores(kind, logits, targets, valid, chance)
    error = ((scores - iou) ** 2 * known)[:, 0]
    torch.testing.assert_close(losses.total, 7 * mask + 3 * overlap + 2 * error)
    torch.testing.assert_close((losses.mask, losses.overlap, losses.iou), (mask, overlap, error))
    assert not losses.chosen.any()


@every_kind
def test_gradient_goes_through_the_chosen_mask_only(kind):
    logits, scores, targets, valid = draw()
    logits.requires_grad_()
    scores.requires_grad_()
    weights, chance = LossWeights.of(kind), draw_chance()
    losses = sam_loss(logits, scores, targets, valid, weights=weights, kind=kind, chance=chance)
    losses.total.sum().backward()

    mask, overlap = parts_of(kind, logits, targets, valid, chance)
    each = weights.mask * mask + weights.overlap * overlap
    assert losses.chosen.tolist() == each.argmin(1).tolist()
    assert len(losses.chosen.unique()) > 1, "the draw should not always choose the same mask"
    touched = logits.grad.flatten(2).any(-1)
    assert touched.tolist() == torch.nn.functional.one_hot(losses.chosen, 3).bool().tolist()

    (expected,) = torch.autograd.grad(each.min(1).values.sum(), logits)
    torch.testing.assert_close(logits.grad, expected)
    # The IoU head hears of all three.
    iou, known = wanted_scores(kind, logits, targets, valid, chance)
    torch.testing.assert_close(scores.grad, 2 * ((scores - iou) * known).detach() / 3)


@every_kind
@pytest.mark.parametrize("masks", [1, 3])
def test_gradient_by_finite_differences(kind, masks):
    logits, scores, targets, valid = draw(prompts=2, masks=masks, height=4, width=3)

    def total(logits, scores):
        return sam_loss(logits, scores, targets, valid, kind=kind, chance=draw_chance(2)).total

    assert torch.autograd.gradcheck(total, (logits.requires_grad_(), scores.requires_grad_()))


@every_kind
def test_padding_has_no_effect(kind):
    logits, scores, targets, valid = draw()
    changed = torch.where(valid[:, None] == 0, 50.0, logits).requires_grad_()
    painted = torch.where(valid == 0, 1.0, targets)
    losses = sam_loss(changed, scores, painted, valid, kind=kind, chance=draw_chance())
    assert_same(losses, sam_loss(logits, scores, targets, valid, kind=kind, chance=draw_chance()))
    losses.total.sum().backward()
    assert not (changed.grad * (valid == 0)[:, None]).any()


def test_valid_per_image():
    logits, scores, targets, _ = draw()
    per_image = torch.rand(2, 8, 6, dtype=torch.float64)
    image_index = torch.tensor([0, 1, 1, 0, 1])
    given = sam_loss(logits, scores, targets, per_image, image_index)
    assert_same(given, sam_loss(logits, scores, targets, per_image[image_index]))


@every_kind
def test_prompts_are_independent(kind):
    cells = (*draw(), draw_chance())
    together = sam_loss(*cells[:4], kind=kind, chance=cells[4])
    for p in range(5):
        *alone, chance = (tensor[p : p + 1] for tensor in cells)
        torch.testing.assert_close(sam_loss(*alone, kind=kind, chance=chance).total[0], together.total[p])


@every_kind
@pytest.mark.parametrize("extreme", [-100.0, 100.0])
def test_finite_at_extreme_logits(kind, extreme):
    logits = torch.full((2, 2, 4, 4), extreme, requires_grad=True)
    targets = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    losses = sam_loss(logits, torch.ones(2, 2), targets, torch.ones(2, 4, 4), kind=kind)
    losses.total.sum().backward()
    assert losses.total.isfinite().all()
    assert logits.grad.isfinite().all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(kind, dtype):
    half = [tensor.to(dtype) for tensor in (*draw(height=32, width=32), draw_chance())]
    full = [tensor.float() for tensor in half]
    expected = sam_loss(*full[:4], kind=kind, chance=full[4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = sam_loss(*half[:4], kind=kind, chance=half[4])
    assert losses.total.dtype == torch.float32
    assert_same(losses, expected)


def test_points_belong_to_the_prompt_alone():
    chance = draw_chance()
    assert torch.equal(point_set(chance, 64)[3], point_set(chance[3:4], 64)[0])
    assert len({tuple(points[0].tolist()) for points in point_set(chance, 64)}) == 5
    shifted = point_set(torch.tensor([[0.25, 0.5]]), 64)[0]
    torch.testing.assert_close(shifted, (point_set(torch.zeros(1, 2), 64)[0] + torch.tensor([0.25, 0.5])) % 1)


@given(st.floats(0, 1, exclude_max=True, width=32), st.floats(0, 1, exclude_max=True, width=32))
def test_points_are_spread_evenly_wherever_they_are_shifted(x, y):
    """Every one of 16 x 16 squares holds 4 points give or take; independent ones leave several squares empty."""
    points = point_set(torch.tensor([[x, y]]), 1024)[0]
    assert points.shape == (1024, 2)
    assert ((points >= 0) & (points < 1)).all()
    counts = np.histogramdd(points.numpy(), bins=(16, 16), range=((0, 1), (0, 1)))[0]
    assert counts.min() >= 1
    assert counts.max() <= 8


def test_points_at_cell_centres_read_the_cells():
    logits, _, targets, valid = draw()
    y, x = torch.meshgrid((torch.arange(8) + 0.5) / 8, (torch.arange(6) + 0.5) / 6, indexing="ij")
    points = torch.stack([x, y], -1).reshape(1, 48, 2).expand(5, -1, -1).double()
    at_points = read_at_points(logits, targets, valid, points)
    for loss in (bce_loss, dice_loss, focal_loss, balanced_bce_loss, soft_iou_loss):
        torch.testing.assert_close(loss(*at_points), loss(logits, targets, valid), rtol=1e-5, atol=1e-6)


def test_cells_are_those_that_the_points_fall_in():
    chance = draw_chance()
    cells = draw_cells(chance, 50, 8, 6)
    assert cells.dtype == torch.long
    places = (point_set(chance, 50) * torch.tensor([6, 8])).long()
    assert torch.equal(cells, places[..., 1] * 6 + places[..., 0])
    assert torch.equal(loss_cells(chance, None, 256), draw_cells(chance, 1024, 256, 256))
    assert torch.equal(loss_cells(chance[3:4], 7, 16)[0], draw_cells(chance, 7, 16, 16)[3])
    almost = torch.full((1, 2), 1 - 2**-24)  # rounded up, it would be a cell beyond the last
    assert int(draw_cells(almost, 2000, 255, 255).max()) < 255 * 255


@pytest.mark.parametrize("masks", [1, 3])
def test_logits_at_the_cells_are_as_good_as_whole_maps(masks):
    logits, scores, targets, valid = draw(masks=masks, height=16, width=16)
    logits, scores = logits.requires_grad_(), scores.requires_grad_()
    chance = draw_chance()
    cells = loss_cells(chance, 60, 16)
    found = []
    for read, places in ((logits, None), (logits.flatten(2).take_along_dim(cells[:, None], dim=2), cells)):
        losses = sam_loss(read, scores, targets, valid, None, LossWeights(), "points", chance, 60, places)
        found.append((vars(losses), torch.autograd.grad(losses.total.sum(), (logits, scores))))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("masks", [1, 3])
def test_at_all_cells_the_loss_of_cells_is_that_of_the_map(masks):
    """With the IoU head's part, where every union has a cell."""
    logits, scores, targets, valid = draw(masks=masks)
    cells = torch.stack([torch.randperm(48) for _ in range(5)])
    weights = LossWeights(mask=2.0, overlap=3.0, iou=4.0)
    at_cells = logits.flatten(2).take_along_dim(cells[:, None], dim=2)
    found = sam_loss(at_cells, scores, targets, valid, None, weights, "points", cells=cells)
    mask, overlap = bce_loss(logits, targets, valid), dice_loss(logits, targets, valid)
    best = (2 * mask + 3 * overlap).argmin(1)
    error = (scores - iou_of(logits, targets, valid)).square().mean(1)
    assert found.chosen.tolist() == best.tolist()
    mask, overlap = mask[torch.arange(5), best], overlap[torch.arange(5), best]
    torch.testing.assert_close((found.mask, found.overlap, found.iou), (mask, overlap, error))
    torch.testing.assert_close(found.total, 2 * mask + 3 * overlap + 4 * error)


def discs(radius, side=64):
    """Two discs that overlap, as logits (1, 1, h, w) and targets (1, h, w)."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    logits, targets = ((x - left).square() + (y - 25).square() < radius**2 for left in (30, 30 + 0.6 * radius))
    return logits[None, None].float() - 0.5, targets[None].float()


def estimates(logits, targets, cells):
    """The IoU from each row of `cells`, where there is one."""
    read = [maps.flatten()[cells] for maps in (logits, targets, torch.ones_like(targets))]
    iou, known = sampled_iou_of(read[0][:, None, :, None], *(cells[..., None] for cells in read[1:]))
    return iou[known].double(), known.double().mean().item()


@pytest.mark.parametrize("radius", [1.5, 4, 12])
def test_the_sampled_iou_is_unbiased(radius):
    """Of independent cells, down to an object that most draws of 64 cells miss."""
    logits, targets = discs(radius)
    iou, known = estimates(logits, targets, torch.randint(0, 64 * 64, (40_000, 64)))
    assert abs(iou.mean() - iou_of(logits, targets, torch.ones_like(targets)).item()) < 4 * iou.std() / len(iou) ** 0.5
    union = ((logits[0] > 0) | (targets > 0)).double().mean().item()
    assert known == pytest.approx(1 - (1 - union) ** 64, abs=0.01)


@pytest.mark.parametrize(("radius", "bound"), [(1.5, 0.08), (4, 0.08), (12, 0.01)])
def test_the_iou_of_evenly_spread_cells_errs_little_and_scatters_less_on_large_objects(radius, bound):
    logits, targets = discs(radius)
    spread, _ = estimates(logits, targets, draw_cells(torch.rand(20_000, 2), 64, 64, 64))
    alone, _ = estimates(logits, targets, torch.randint(0, 64 * 64, (20_000, 64)))
    assert abs(spread.mean() - iou_of(logits, targets, torch.ones_like(targets)).item()) < bound
    assert radius < 12 or spread.std() < 0.7 * alone.std()


def test_a_mask_whose_union_no_cell_meets_does_not_teach_the_iou_head():
    targets = torch.zeros(2, 8, 8)
    targets[:, 0, :2] = 1
    logits = 2 * targets[:, None].repeat(1, 2, 1, 1) - 1
    logits[1, 1, 7] = 1  # wrong, and met
    cells = torch.tensor([[9, 20, 30], [9, 20, 60]])
    scores = torch.full((2, 2), 0.25, requires_grad=True)
    at_cells, valid = logits.flatten(2).take_along_dim(cells[:, None], dim=2), torch.ones(2, 8, 8)
    losses = sam_loss(at_cells, scores, targets, valid, None, LossWeights(0.0, 0.0, 1.0), "points", cells=cells)
    losses.total.sum().backward()
    assert losses.iou.tolist() == [0, 0.25**2 / 2]
    assert scores.grad.tolist() == [[0, 0], [0, 0.25]]


def test_points_between_cells_are_read_bilinearly_from_the_image_alone():
    logits = torch.tensor([1.0, 3.0, 50.0]).reshape(1, 1, 1, 3)
    targets, valid = torch.tensor([[[0.0, 1.0, 1.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]])
    points = torch.tensor([[[1 / 3, 0.5], [0.25, 0.1], [2 / 3, 0.5], [0.0, 0.0]]])
    read_logits, read_targets, read_valid = read_at_points(logits, targets, valid, points)
    assert read_logits.flatten().tolist() == pytest.approx([2.0, 1.5, 3.0, 1.0])
    assert read_targets.flatten().tolist() == pytest.approx([0.5, 0.25, 1.0, 0.0], abs=1e-6)
    assert read_valid.flatten().tolist() == pytest.approx([1.0, 1.0, 0.5, 1.0])


def test_many_cells_cost_what_the_whole_map_costs():
    logits, targets = draw_blobs()
    valid = torch.ones_like(targets)
    valid[:, 50:] = 0
    weights = LossWeights(mask=1.0, overlap=1.0, iou=0.0)
    whole = bce_loss(logits, targets, valid) + dice_loss(logits, targets, valid)
    errors = []
    for count in (1024, 16384):
        found = sam_loss(logits, torch.ones(3, 1), targets, valid, None, weights, "points", draw_chance(3), count)
        errors.append(float((found.total / whole[:, 0] - 1).abs().max()))
    assert errors[0] < 0.03
    assert errors[1] < 0.003


def test_many_points_cost_what_the_whole_map_costs():
    logits, targets = draw_blobs()
    valid = torch.ones_like(targets)
    valid[:, 50:] = 0
    whole = bce_loss(logits, targets, valid), dice_loss(logits, targets, valid)
    errors = []
    for count in (1024, 16384):
        at_points = read_at_points(logits, targets, valid, point_set(draw_chance(3), count))
        found = bce_loss(*at_points), dice_loss(*at_points)
        errors.append(max(float((a / b - 1).abs().max()) for a, b in zip(found, whole, strict=True)))
    assert errors[0] < 0.03
    assert errors[1] < 0.003


def test_points_that_all_miss_a_thin_image_cost_nothing():
    logits = torch.ones(1, 2, 4, 4, requires_grad=True)
    valid = torch.zeros(1, 4, 4)
    valid[0, 0] = 1e-3
    points = torch.full((1, 5, 2), 0.9)
    at_points = read_at_points(logits, torch.ones(1, 4, 4), valid, points)
    for loss in (bce_loss, balanced_bce_loss, soft_iou_loss, dice_loss):
        cost = loss(*at_points)
        assert cost.tolist() == [[0, 0]]
        cost.sum().backward(retain_graph=True)
    assert not logits.grad.any()


@pytest.mark.parametrize("count", [None, 13, 500])
@pytest.mark.parametrize("padded", [False, True])
def test_uncertain_points_are_those_of_hq_sam(count, padded):
    logits, targets = draw_blobs(side=32)
    logits = logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).double()
    valid = torch.ones_like(targets)
    if padded:
        valid[:, 20] = 0.4
        valid[:, 21:] = 0
    logits.requires_grad_()
    chance, without_iou = draw_chance(3), LossWeights(mask=1.0, overlap=1.0, iou=0.0)
    losses = sam_loss(logits, torch.ones(3, 1), targets, valid, None, without_iou, "uncertain-points", chance, count)
    mask, overlap = published(logits[:, 0], targets, valid, chance, 12544 if count is None else count)
    torch.testing.assert_close((losses.mask, losses.overlap), (mask.detach(), overlap.detach()))
    found, expected = (torch.autograd.grad(total.sum(), logits)[0] for total in (losses.total, mask + overlap))
    torch.testing.assert_close(found, expected)
    assert found.any()


@pytest.mark.parametrize("kind", ["points", "uncertain-points"])
def test_as_many_points_are_read_as_asked_for(kind):
    logits, scores, targets, valid = draw()
    costs = [
        sam_loss(logits, scores, targets, valid, kind=kind, chance=draw_chance(), points=points).total.tolist()
        for points in (None, {"points": 1024, "uncertain-points": 12544}[kind], 10, 100)
    ]
    assert costs[0] == costs[1]
    assert len({tuple(cost) for cost in costs}) == 3


def test_three_points_of_four_are_chosen_and_the_last_ones_are_anywhere():
    logits, _, _, valid = draw(masks=1)
    for count, uncertain in ((12544, 9408), (10, 7), (1, 0)):
        points = uncertain_point_set(logits[:, 0], valid, draw_chance(), count)
        every = point_set(draw_chance(), 4 * count - uncertain)
        assert points.shape == (5, count, 2)
        assert torch.equal(points[:, uncertain:], every[:, 3 * count :])
        for chosen, candidates in zip(points[:, :uncertain].tolist(), every[:, : 3 * count].tolist(), strict=True):
            assert len(set(map(tuple, chosen))) == uncertain
            assert set(map(tuple, chosen)) <= set(map(tuple, candidates))


def test_uncertain_points_lie_at_the_outline_of_a_mask_that_is_sure_elsewhere():
    """A disc whose rim of 10 cells holds about 31% of the candidates, more than the 25% that are chosen."""
    middle = torch.arange(64) + 0.5 - 32
    logits = (2 * (20 - (middle[:, None].square() + middle.square()).sqrt())).clamp(-10, 10)
    points = uncertain_point_set(logits[None], torch.ones(1, 64, 64), draw_chance(1).float(), 400)[0]
    off = ((64 * points - 32).square().sum(1).sqrt() - 20).abs()
    assert off[:300].max() < 5
    assert (off[300:] < 5).float().mean() < 0.5
    assert off[300:].max() > 10


def test_uncertain_points_are_never_on_padding():
    """Where the mask is nowhere less sure than on the padding."""
    logits, valid = torch.full((2, 16, 16), 5.0), torch.ones(2, 16, 16)
    valid[0, 8:] = valid[1, :, 10:] = 0
    logits[valid == 0] = 0
    points = uncertain_point_set(logits, valid, draw_chance(2).float(), 200)[:, :150]
    assert points[0, :, 1].max() < 8.5 / 16
    assert points[1, :, 0].max() < 10.5 / 16
    assert (read_at_points(logits[:, None], logits, valid, points)[2] > 0).all()


def test_points_are_chosen_without_a_gradient():
    logits = torch.randn(2, 8, 8, requires_grad=True)
    assert not uncertain_point_set(logits, torch.ones(2, 8, 8), torch.rand(2, 2), 20).requires_grad


def test_default_weights_and_names_of_each_kind():
    assert {kind: astuple(LossWeights.of(kind)) for kind in LOSSES} == {
        "focal-dice": (20, 1, 1),
        "bce-iou": (1, 1, 1),
        "balanced-bce-iou": (1, 1, 1),
        "points": (1, 1, 1),
        "uncertain-points": (1, 1, 1),
    }
    assert [part_names(kind) for kind in LOSSES] == [
        ("focal", "dice"),
        ("bce", "soft_iou"),
        ("balanced_bce", "soft_iou"),
        ("bce", "dice"),
        ("bce", "dice"),
    ]


def test_unknown_kind():
    logits, scores, targets, valid = draw()
    message = "loss 'hinge' is unknown: use focal-dice, bce-iou, balanced-bce-iou, points or uncertain-points"
    for call in (LossWeights.of, lambda kind: sam_loss(logits, scores, targets, valid, kind=kind)):
        with pytest.raises(UsageError, match=message):
            call("hinge")
