"""The losses a top can be trained with, at the decoder's resolution.

Every loss is given per prompt; reducing over prompts, images and ranks is the training loop's
business. What each kind is made of, and why padding and soft targets count as they do, is in
`sam_cache.training.mask_losses`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sam_cache.errors import UsageError
from sam_cache.training.mask_losses import (
    POINTS,
    at_least_fp32,
    balanced_bce_loss,
    bce_loss,
    dice_loss,
    draw_cells,
    focal_and_dice,
    iou_of,
    read_at_points,
    read_cells,
    sampled_iou_of,
    soft_iou_loss,
    uncertain_point_set,
)

# What `mask` and `overlap` of a kind are, by the names they are logged under.
PARTS = {
    "focal-dice": ("focal", "dice"),
    "bce-iou": ("bce", "soft_iou"),
    "balanced-bce-iou": ("balanced_bce", "soft_iou"),
    "points": ("bce", "dice"),
    "uncertain-points": ("bce", "dice"),
}
LOSSES = tuple(PARTS)


def part_names(kind: str) -> tuple[str, str]:
    """The names of a kind's `mask` and `overlap` parts. Raises UsageError for an unknown kind."""
    if kind not in PARTS:
        raise UsageError(f"loss {kind!r} is unknown: use {', '.join(LOSSES[:-1])} or {LOSSES[-1]}")
    return PARTS[kind]


@dataclass(frozen=True)
class LossWeights:
    """How much each part counts. The default is SAM's: Kirillov et al. 2023, appendix A."""

    mask: float = 20.0
    overlap: float = 1.0
    iou: float = 1.0

    @classmethod
    def of(cls, kind: str) -> "LossWeights":
        """What a kind's own source uses: 20, 1, 1 for focal-dice, else 1, 1, 1.

        SAM-Adapter and HQ-SAM weigh their two parts alike and leave the IoU head alone. It counts
        here all the same: while the decoder moves on, a head left alone ranks masks it no longer
        knows. Weight 0 is the published recipe. Raises UsageError for an unknown kind.
        """
        part_names(kind)
        return cls() if kind == "focal-dice" else cls(mask=1.0)


@dataclass(frozen=True)
class SamLosses:
    """Per prompt: `total` is the weighted sum of the three parts and alone carries a gradient.

    `mask` and `overlap` are the two parts that `part_names` names; they belong to the mask `chosen`
    (an index into the M predicted masks). `iou` is the squared error of the IoU head, averaged over
    all M; a mask whose IoU is not known, because only some cells were looked at, counts as 0 in it.
    """

    total: Float[Tensor, "P"]
    mask: Float[Tensor, "P"]
    overlap: Float[Tensor, "P"]
    iou: Float[Tensor, "P"]
    chosen: Int[Tensor, "P"]


def loss_cells(chance: Float[Tensor, "P 2"], points: int | None, side: int) -> Int[Tensor, "P S"]:
    """The cells y * side + x of maps of side x side that the loss `points` looks at, by each prompt's own `chance`."""
    return draw_cells(at_least_fp32(chance), POINTS["points"] if points is None else points, side, side)


def sam_loss(
    logits: Float[Tensor, "P M *cells"],
    scores: Float[Tensor, "P M"],
    targets: Float[Tensor, "P h w"],
    valid: Float[Tensor, "V h w"],
    image_index: Int[Tensor, "P"] | None = None,
    weights: LossWeights = LossWeights(),
    kind: str = "focal-dice",
    chance: Float[Tensor, "P 2"] | None = None,
    points: int | None = None,
    cells: Int[Tensor, "P S"] | None = None,
) -> SamLosses:
    """A mask loss of the given kind plus the squared error of the IoU head.

        focal-dice        focal and Dice loss: SAM's own (Kirillov et al. 2023, appendix A)
        bce-iou           cross entropy and soft IoU: SAM-Adapter's `iou` (Chen et al. 2023)
        balanced-bce-iou  the same with the balanced cross entropy of SAM-Adapter's `bbce`, which
                          that code uses alone: overlap weight 0 is its recipe, but learns nothing
                          from an empty target
        points            cross entropy and Dice on 1,024 cells of the map, spread evenly, so that
                          small objects meet few of them; no other cell has to be decoded
        uncertain-points  the same on 12,544 points, of which 75% seek out where the mask is unsure:
                          HQ-SAM's (Ke et al. 2023), after PointRend (Kirillov et al. 2020). There a
                          point's target is read from the label at the input's resolution, here from
                          its coverage of the decoder's cells

    Of M > 1 masks only the one with the lowest weighted mask + overlap is back-propagated
    (Kirillov et al. 2023, section 3 "Resolving ambiguity"). The IoU head however is supervised on
    all M, as SAM 2 does (facebookresearch/sam2, `supervise_all_iou`): at inference it has to
    rank masks, so it must have seen the bad ones too. With `points` all of this is judged by the same
    cells: the IoU is `sampled_iou_of` them, and a mask of which they do not meet the union with its
    target counts for nothing in the IoU loss. That estimate scatters about the IoU, so the squared error
    stays above 0 by its variance; its gradient still leads to the right score, on average.

    `scores` are the IoU head's predictions. `valid` has one map per prompt, or one per image when
    `image_index` says which image each prompt belongs to. `chance`, two numbers in [0, 1) per
    prompt, shifts the points of the last two kinds (None: not at all), and `points` is how many they
    read of each mask (None: as above); neither means anything to the other kinds. Logits are maps
    (P, M, h, w), or for the kind `points` (P, M, S) at the `cells` that they are given with, those of
    `loss_cells`. Half-precision input is computed in fp32. Raises UsageError for an unknown kind.
    """
    part_names(kind)
    points = POINTS.get(kind, 0) if points is None else points
    logits, scores, targets, valid = map(at_least_fp32, (logits, scores, targets, valid))
    chance = logits.new_zeros(len(logits), 2) if chance is None else at_least_fp32(chance)
    if kind == "points":
        if cells is None:
            cells = draw_cells(chance, points, *targets.shape[1:])
            logits = logits.flatten(2).take_along_dim(cells.unsqueeze(1), dim=2)
        places = torch.arange(len(logits), device=logits.device) if image_index is None else image_index
        targets, valid = read_cells(targets, valid, places, cells)
        logits = logits.unsqueeze(3)
        iou, known = sampled_iou_of(logits, targets, valid)
        squared_error = ((scores - iou).square() * known).mean(dim=1)
    else:
        valid = valid if image_index is None else valid[image_index]
        squared_error = (scores - iou_of(logits, targets, valid)).square().mean(dim=1)

    # Selecting first and computing again keeps the graph, and so the memory, to one mask per prompt.
    chosen = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    if logits.shape[1] > 1:
        with torch.no_grad():
            mask, overlap = _mask_and_overlap(kind, logits, targets, valid, chance, points)
            chosen = (weights.mask * mask + weights.overlap * overlap).argmin(dim=1)
        logits = logits[torch.arange(len(logits), device=logits.device), chosen].unsqueeze(1)

    mask, overlap = (part.squeeze(1) for part in _mask_and_overlap(kind, logits, targets, valid, chance, points))
    total = weights.mask * mask + weights.overlap * overlap + weights.iou * squared_error
    return SamLosses(total, mask.detach(), overlap.detach(), squared_error.detach(), chosen)


def _mask_and_overlap(
    kind: str, logits: Tensor, targets: Tensor, valid: Tensor, chance: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    cells = logits, targets, valid
    match kind:
        case "focal-dice":
            return focal_and_dice(*cells)
        case "bce-iou":
            return bce_loss(*cells), soft_iou_loss(*cells)
        case "balanced-bce-iou":
            return balanced_bce_loss(*cells), soft_iou_loss(*cells)
        case "points":
            return bce_loss(*cells), dice_loss(*cells)
    mask_parts, overlap_parts = [], []
    for mask in logits.split(1, dim=1):  # each mask is unsure elsewhere, so each has points of its own
        at_points = read_at_points(mask, targets, valid, uncertain_point_set(mask.squeeze(1), valid, chance, points))
        mask_parts.append(bce_loss(*at_points))
        overlap_parts.append(dice_loss(*at_points))
    return torch.cat(mask_parts, dim=1), torch.cat(overlap_parts, dim=1)
