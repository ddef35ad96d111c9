"""Losses of mask decoding, at the decoder's resolution.

Every loss is given per prompt; reducing over prompts, images and ranks is the training loop's
business. Targets are soft: the share of a cell's area that the object covers. Padding is left out
by `valid`, the share of a cell that lies on the image.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


@dataclass(frozen=True)
class LossWeights:
    """How much each part counts. The default is SAM's: Kirillov et al. 2023, appendix A."""

    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0


@dataclass(frozen=True)
class SamLosses:
    """Per prompt: `total` is the weighted sum of the three parts and alone carries a gradient.

    `focal` and `dice` belong to the mask `chosen` (an index into the M predicted masks); `iou` is
    the squared error of the IoU head, averaged over all M.
    """

    total: Float[Tensor, "P"]
    focal: Float[Tensor, "P"]
    dice: Float[Tensor, "P"]
    iou: Float[Tensor, "P"]
    chosen: Int[Tensor, "P"]


def sam_loss(
    logits: Float[Tensor, "P M h w"],
    scores: Float[Tensor, "P M"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "V h w"],
    image_index: Int[Tensor, "P"] | None = None,
    weights: LossWeights = LossWeights(),
) -> SamLosses:
    """SAM's training loss: 20 focal + 1 dice + 1 squared error of the IoU head.

    Of M > 1 masks only the one with the lowest weighted focal + dice is back-propagated
    (Kirillov et al. 2023, section 3 "Resolving ambiguity"). The IoU head however is supervised on
    all M, as SAM 2 does (facebookresearch/sam2, `supervise_all_iou`): at inference it has to
    rank masks, so it must have seen the bad ones too.

    `scores` are the IoU head's predictions. `valid` has one map per prompt, or one per image when
    `image_index` says which image each prompt belongs to. Half-precision input is computed in fp32.
    """
    logits, scores, targets, valid = map(_at_least_fp32, (logits, scores, targets, valid))
    if image_index is not None:
        valid = valid[image_index]

    squared_error = (scores - iou_of(logits, targets, valid)).square().mean(dim=1)

    # Selecting first and computing again keeps the graph, and so the memory, to one mask per prompt.
    chosen = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    if logits.shape[1] > 1:
        with torch.no_grad():
            focal, dice = _focal_and_dice(logits, targets, valid)
            chosen = (weights.focal * focal + weights.dice * dice).argmin(dim=1)
        logits = logits[torch.arange(len(logits), device=logits.device), chosen].unsqueeze(1)

    focal, dice = (part.squeeze(1) for part in _focal_and_dice(logits, targets, valid))
    total = weights.focal * focal + weights.dice * dice + weights.iou * squared_error
    return SamLosses(total, focal.detach(), dice.detach(), squared_error.detach(), chosen)


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
    logits, targets, valid = map(_at_least_fp32, (logits, targets, valid))
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
    logits, targets, valid = map(_at_least_fp32, (logits, targets, valid))
    return _dice(logits.sigmoid(), targets, valid)


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
    inside = (valid >= 0.5).unsqueeze(1)
    predicted = (logits > 0) & inside
    wanted = (targets >= 0.5).unsqueeze(1) & inside
    intersection = (predicted & wanted).sum(dim=(2, 3))
    union = (predicted | wanted).sum(dim=(2, 3))
    nothing_there = ((targets * valid).amax(dim=(1, 2)) == 0).unsqueeze(1)
    iou = intersection / union.clamp(min=1)
    return torch.where((union == 0) & nothing_there, 1.0, iou).to(logits.dtype)


def _focal_and_dice(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = logits.sigmoid()
    return _focal(logits, probabilities, targets, valid), _dice(probabilities, targets, valid)


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


def _dice(probabilities: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    wanted = (targets * valid).unsqueeze(1)
    intersection = (probabilities * wanted).sum(dim=(2, 3))
    predicted = (probabilities * valid.unsqueeze(1)).sum(dim=(2, 3))
    return 1 - (2 * intersection + 1) / (predicted + wanted.sum(dim=(2, 3)) + 1)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
