"""Losses of one mask: how far P x M logit maps are from the P targets they were asked for.

Every loss is (P, M), per prompt and predicted mask, from logits (P, M, h, w), targets (P, h, w) and
valid (P, h, w). Targets are soft: the share of a cell's area that the object covers. Padding is left
out by `valid`, the share of a cell that lies on the image. Nothing depends on the other prompts of a
batch, so that a loss is the same however prompts are batched. Half precision is computed in fp32.

Cells that are sampled from a map are a map themselves, (P, M, S, 1), to every loss here.
"""

from functools import lru_cache, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample, logsigmoid

# Points per mask of the losses that read points: 32 x 32, which is one cell in 64 of SAM's 256 x 256, and HQ-SAM's
# 112 x 112.
POINTS = {"points": 1024, "uncertain-points": 112 * 112}

# HQ-SAM's: of so many candidates a point, and this share of the points is chosen from them.
OVERSAMPLING, UNCERTAIN_SHARE = 3, 0.75


def focal_loss(
    logits: Float[Tensor, "P M h w"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"],
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, "P M"]:
    """Focal loss (Lin et al. 2017), averaged over the valid cells of each mask.

    With p the predicted and t the true share of a cell: alpha_t * (1 - p_t)^gamma * cross entropy,
    where p_t = p t + (1 - p)(1 - t) and alpha_t = alpha t + (1 - alpha)(1 - t), which is
    torchvision's `sigmoid_focal_loss` for soft targets. alpha and gamma are RetinaNet's.
    """
    logits, targets, valid = map(at_least_fp32, (logits, targets, valid))
    return _focal(logits, logits.sigmoid(), targets, valid, alpha, gamma)


def dice_loss(
    logits: Float[Tensor, "P M h w"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"],
) -> Float[Tensor, "P M"]:
    """Soft Dice loss over the valid cells: 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1).

    After Milletari et al. 2016 in the form of DETR, MaskFormer and SAM 2: plain sums in the
    denominator, smoothed by one cell, so that an empty target is best met by an empty mask.
    """
    logits, targets, valid = map(at_least_fp32, (logits, targets, valid))
    return _dice(logits.sigmoid(), targets, valid)


def focal_and_dice(
    logits: Float[Tensor, "P M h w"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"],
) -> tuple[Float[Tensor, "P M"], Float[Tensor, "P M"]]:
    """`focal_loss` and `dice_loss` from one sigmoid, which autograd then keeps once."""
    logits, targets, valid = map(at_least_fp32, (logits, targets, valid))
    probabilities = logits.sigmoid()
    return _focal(logits, probabilities, targets, valid), _dice(probabilities, targets, valid)


def bce_loss(
    logits: Float[Tensor, "P M h w"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"],
) -> Float[Tensor, "P M"]:
    """Binary cross entropy, averaged over the valid cells of each mask; 0 where no cell is valid."""
    logits, targets, valid = map(at_least_fp32, (logits, targets, valid))
    wanted = targets.unsqueeze(1).expand_as(logits)
    return _mean(binary_cross_entropy_with_logits(logits, wanted, reduction="none"), valid)


def balanced_bce_loss(
    logits: Float[Tensor, "P M h w"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"],
) -> Float[Tensor, "P M"]:
    """Binary cross entropy in which object and background count the same, however small the object is.

    With s the share of the valid area that the object covers, the mean over the valid cells of
    -(1 - s) t log(p) - s (1 - t) log(1 - p). This is `BBCEWithLogitLoss` of SAM-Adapter
    (tianrun-chen/SAM-Adapter-PyTorch, models/sam.py), but s is each prompt's own and not its batch's.
    For an empty target it is 0 whatever is predicted: pair it with a loss that is not.
    """
    logits, targets, valid = map(at_least_fp32, (logits, targets, valid))
    share = _mean(targets.unsqueeze(1), valid).unsqueeze(2).unsqueeze(3)
    wanted = targets.unsqueeze(1)
    object_weight, background_weight = (1 - share) * wanted, share * (1 - wanted)
    return _mean(-(object_weight * logsigmoid(logits) + background_weight * logsigmoid(-logits)), valid)


def soft_iou_loss(
    logits: Float[Tensor, "P M h w"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"],
) -> Float[Tensor, "P M"]:
    """1 - (I + 1) / (U + 1) over the valid cells, with I = sum(p t) and U = sum(p) + sum(t) - I.

    The soft Jaccard loss of SAM-Adapter (`_iou_loss` in its models/sam.py), which smooths by
    nothing and so is 0 / 0 where both masks are empty. Here it is smoothed by one cell like
    `dice_loss`, so that an empty target is best met by an empty mask.
    """
    logits, targets, valid = map(at_least_fp32, (logits, targets, valid))
    intersection, both = _areas(logits.sigmoid(), targets, valid)
    return 1 - (intersection + 1) / (both - intersection + 1)


@torch.no_grad()
def iou_of(
    logits: Float[Tensor, "P M h w"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"],
) -> Float[Tensor, "P M"]:
    """IoU of the masks (logit > 0) with the targets (coverage >= 0.5), on cells at least half valid.

    An empty mask for an empty target scores 1. For an object that is merely too thin to fill half
    of any cell it scores 0: the IoU head must not learn that predicting nothing is perfect.
    """
    intersection, union = _overlap(logits, targets, valid)
    nothing_there = ((targets * valid).amax(dim=(1, 2)) == 0).unsqueeze(1)
    iou = intersection / union.clamp(min=1)
    return torch.where((union == 0) & nothing_there, 1.0, iou).to(logits.dtype)


@torch.no_grad()
def sampled_iou_of(
    logits: Float[Tensor, "P M S 1"],
    targets: Float[Tensor, "P S 1"],
    valid: Float[Tensor, "P S 1"],
) -> tuple[Float[Tensor, "P M"], Bool[Tensor, "P M"]]:
    """An estimate of `iou_of` from S sampled cells, and where there is one.

    It is the share of the sampled cells in the union that lie in the intersection; there is none where no
    sampled cell lies in the union. For cells drawn uniformly and independently it is unbiased, given that
    there is one: each cell of the union that is met lies in the intersection with probability IoU. The cells
    of `draw_cells` shun one another. That halves the scatter and more where they meet the union often, but
    correlates the two counts: of shifted discs whose union is met twice on average the IoU came out .07 too
    high, of those met 7 times .02, of those met 27 times .001.
    """
    intersection, union = _overlap(logits, targets, valid)
    return (intersection / union.clamp(min=1)).to(logits.dtype), union > 0


def point_set(chance: Float[Tensor, "P 2"], count: int) -> Float[Tensor, "P N 2"]:
    """For each prompt, `count` points (x, y) spread evenly over the unit square [0, 1) x [0, 1).

    They are the first points of the R2 sequence (Roberts 2018, "The unreasonable effectiveness of
    quasirandom sequences"): (1/2 + n / g, 1/2 + n / g^2) mod 1, where g^3 = g + 1. The whole set is
    shifted by the prompt's own `chance`, two numbers in [0, 1), and wrapped around (a Cranley and
    Patterson rotation): the points differ from step to step, and still belong to the prompt alone.
    """
    return (_r2_sequence(count, chance.dtype, chance.device) + chance.unsqueeze(1)) % 1


def draw_cells(chance: Float[Tensor, "P 2"], count: int, height: int, width: int) -> Int[Tensor, "P S"]:
    """The cells of a map, y * width + x, in which the points of a `point_set` fall; two may fall in one."""
    x, y = point_set(chance, count).unbind(2)
    return (y * height).long().clamp(max=height - 1) * width + (x * width).long().clamp(max=width - 1)


def read_cells(
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "V h w"],
    image_index: Int[Tensor, "P"],
    cells: Int[Tensor, "P S"],
) -> tuple[Float[Tensor, "P S 1"], Float[Tensor, "P S 1"]]:
    """Targets and valid at each prompt's own cells, as maps that every loss here takes."""
    found = targets.flatten(1).gather(1, cells), valid.flatten(1)[image_index.unsqueeze(1), cells]
    return found[0].unsqueeze(2), found[1].unsqueeze(2)


@torch.no_grad()
def uncertain_point_set(
    logits: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"],
    chance: Float[Tensor, "P 2"],
    count: int,
) -> Float[Tensor, "P N 2"]:
    """For each prompt, `count` points (x, y) of the unit square: most where its mask is least sure, others anywhere.

    As PointRend (Kirillov et al. 2020) and HQ-SAM (SysCV/sam-hq, train/utils/loss_mask.py) choose them:
    of 3 `count` candidates those three quarters of `count` whose logits are nearest 0, and a quarter that
    nothing chooses. Where they draw independent points, candidates and others are here the beginning and
    the end of one `point_set`, so that they belong to the prompt and not to its batch. Candidates on
    padding, which they do not know, come last.
    """
    uncertain = int(UNCERTAIN_SHARE * count)
    points = point_set(chance, OVERSAMPLING * count + count - uncertain)
    candidates, others = points.split([OVERSAMPLING * count, count - uncertain], dim=1)
    read_logits, read_valid = _read(logits.unsqueeze(1), valid, candidates)
    certainty = read_logits[:, 0, :, 0].abs().where(read_valid[:, 0, :, 0] > 0, torch.inf)
    chosen = certainty.topk(uncertain, dim=1, largest=False).indices.unsqueeze(2).expand(-1, -1, 2)
    return torch.cat([candidates.gather(1, chosen), others], dim=1)


def read_at_points(
    logits: Float[Tensor, "P M h w"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"],
    points: Float[Tensor, "P N 2"],
) -> tuple[Float[Tensor, "P M N 1"], Float[Tensor, "P N 1"], Float[Tensor, "P N 1"]]:
    """Logits, targets and valid at each prompt's own points, as maps that every loss here takes.

    A point (x, y) of the unit square, which spans the whole map, is read bilinearly between cell
    centres (`grid_sample`, align_corners=False). Cells count by how valid they are, so that next
    to the padding only what lies on the image is read.
    """
    read_logits, read_valid = _read(logits, valid, points)
    read_targets, _ = _read(targets.unsqueeze(1), valid, points)
    return read_logits, read_targets.squeeze(1), read_valid.squeeze(1)


def at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _read(maps: Tensor, valid: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (P, M, h, w) at points (P, N, 2), as (P, M, N, 1), and how valid each point is, (P, 1, N, 1)."""
    maps, cell_weight = at_least_fp32(maps), at_least_fp32(valid).unsqueeze(1)
    grid = (2 * points - 1).unsqueeze(2).to(maps.dtype)
    read = partial(grid_sample, grid=grid, padding_mode="border", align_corners=False)
    read_valid = read(cell_weight)
    return read(maps * cell_weight) / read_valid.clamp(min=torch.finfo(maps.dtype).tiny), read_valid


def _focal(
    logits: Tensor,
    probabilities: Tensor,
    targets: Tensor,
    valid: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    # What does not depend on the logits comes first, so that autograd keeps nothing of it.
    cell_weight = (valid * ((2 * alpha - 1) * targets + (1 - alpha))).unsqueeze(1)
    targets = targets.unsqueeze(1).expand_as(logits)
    cross_entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = torch.lerp(probabilities, 1 - probabilities, targets)  # 1 - p_t
    return (cell_weight * cross_entropy * miss**gamma).sum(dim=(2, 3)) / valid.sum(dim=(1, 2)).unsqueeze(1)


def _overlap(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cells in the intersection and in the union of the hard masks with the targets, (P, M)."""
    inside = (valid >= 0.5).unsqueeze(1)
    predicted = (logits > 0) & inside
    wanted = (targets >= 0.5).unsqueeze(1) & inside
    return (predicted & wanted).sum(dim=(2, 3)), (predicted | wanted).sum(dim=(2, 3))


def _dice(probabilities: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    intersection, both = _areas(probabilities, targets, valid)
    return 1 - (2 * intersection + 1) / (both + 1)


def _areas(probabilities: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Of the soft masks: sum(p t), and sum(p) + sum(t), over the valid cells."""
    wanted = (targets * valid).unsqueeze(1)
    intersection = (probabilities * wanted).sum(dim=(2, 3))
    predicted = (probabilities * valid.unsqueeze(1)).sum(dim=(2, 3))
    return intersection, predicted + wanted.sum(dim=(2, 3))


def _mean(cells: Tensor, valid: Tensor) -> Tensor:
    # No cell may be valid: all points of a very thin image can miss it. Its sum is 0 then, and so its mean.
    area = valid.sum(dim=(1, 2)).clamp(min=torch.finfo(valid.dtype).tiny)
    return (cells * valid.unsqueeze(1)).sum(dim=(2, 3)) / area.unsqueeze(1)


@lru_cache(maxsize=4)
def _r2_sequence(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Made in float64 on the CPU, so that every device reads the same points.
    plastic = 1.3247179572447460  # the real root of g^3 = g + 1
    steps = torch.tensor([1 / plastic, 1 / plastic**2], dtype=torch.float64)
    return ((0.5 + torch.arange(1, count + 1, dtype=torch.float64).unsqueeze(1) * steps) % 1).to(device, dtype)
