"""What training and evaluation share: a batch through the network, with the masks each prompt calls for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sam_cache.errors import UsageError
from sam_cache.model import Masks
from sam_cache.training import POINTS, LossWeights, loss_cells, part_names, sam_loss
from sam_cache.types import Batch, Prompts, Targets

GOLDEN = 0.6180339887498949  # steps of it fill [0, 1) evenly: each round's click gets a chance of its own


def decode_batch(
    network: nn.Module, batch: Batch, cells: Tensor | None = None
) -> Iterator[tuple[Tensor, Batch, Masks]]:
    """(which prompts, their part of the batch, masks): ambiguous prompts get three masks, others one.

    With `cells` (P, S) of the maps only the logits of each prompt's own.
    """
    for multimask in (False, True):
        index = (batch.prompts.ambiguous == multimask).nonzero()[:, 0]
        if len(index) == len(batch.prompts):
            part = batch
        elif len(index):
            part = batch.select(index)
        else:
            continue
        places = () if cells is None else (cells[index],)
        yield index, part, network(part.levels, part.prompts, multimask, *places)


@dataclass(frozen=True)
class SamObjective:
    """What is minimised: sums over a batch's prompts, each with its weight, of a loss and its parts.

    After the first round come `corrections` more, as SAM was trained (Kirillov et al. 2023, appendix A):
    each gives the mask of the highest predicted IoU back as a mask prompt, with one click more in its
    error region. The last of several rounds brings no click, and of more than three another one, drawn
    by chance. A step's loss is the mean over rounds. `points` are those of a loss that reads points, its
    own number where None. Raises UsageError when they are given to another loss.

    Of the loss `points` only its cells are decoded; in a round that another follows the whole masks are,
    because the next one is told them.
    """

    weights: LossWeights
    kind: str = "focal-dice"
    corrections: int = 0
    points: int | None = None

    def __post_init__(self) -> None:
        if self.points is not None and self.kind not in POINTS:
            raise UsageError(
                f"--loss-points {self.points}: {self.kind} reads whole masks; use --loss {' or '.join(POINTS)} with it"
            )

    def __call__(self, network: nn.Module, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """One dictionary a round, to be back-propagated before the next is asked for: `loss`, its parts, `iou`."""
        side = batch.targets.masks.shape[2]
        cells = loss_cells(batch.prompts.chance, self.points, side) if self.kind == "points" else None
        for turn in range(self.corrections + 1):
            last = turn == self.corrections
            sums: dict[str, Tensor] = {}
            answers = []
            for index, part, masks in decode_batch(network, batch, cells if last else None):
                self._add(sums, part, masks, cells[index] if last and cells is not None else None)
                if not last:
                    answers.append((index, best_masks(masks)[0].detach()))
            yield {name: value / (self.corrections + 1) for name, value in sums.items()}
            if not last:
                order = torch.cat([index for index, _ in answers]).argsort()
                logits = torch.cat([found for _, found in answers])[order]
                pixels_per_cell = network.size.input_size / side
                prompts = correct(batch.prompts, logits, batch.targets, pixels_per_cell, turn + 1, self.corrections)
                batch = replace(batch, prompts=prompts)

    def _add(self, sums: dict[str, Tensor], part: Batch, masks: Masks, cells: Tensor | None) -> None:
        losses = sam_loss(
            masks.logits,
            masks.scores,
            part.targets.masks,
            part.targets.valid,
            part.prompts.image_index,
            self.weights,
            self.kind,
            part.prompts.chance,
            self.points,
            cells,
        )
        names = ("loss", *part_names(self.kind), "iou")
        for name, value in zip(names, (losses.total, losses.mask, losses.overlap, losses.iou), strict=True):
            sums[name] = sums.get(name, 0.0) + (value * part.targets.weights).sum()


def best_masks(masks: Masks) -> tuple[Tensor, Tensor]:
    """Of each prompt's masks the one of the highest predicted IoU: logits (P, h, w) and scores (P,), both fp32."""
    scores, best = masks.scores.float().max(dim=1)
    return masks.logits.float()[torch.arange(len(best), device=best.device), best], scores


@torch.no_grad()
def correct(
    prompts: Prompts, logits: Tensor, targets: Targets, pixels_per_cell: float, turn: int, turns: int
) -> Prompts:
    """The prompts of round `turn` of `turns`: `logits` (P, h, w) as mask prompts, with a click where they err.

    The click is drawn uniformly from the cells that are wrongly in or out, by the prompt's own chance;
    where nothing is wrong, from the object.
    """
    wanted = targets.masks >= 0.5
    on_image = targets.valid[prompts.image_index] >= 0.5
    wrong = ((logits > 0) != wanted) & on_image
    flat = torch.where(wrong.any(dim=(1, 2), keepdim=True), wrong, wanted & on_image).flatten(1)
    counts = flat.sum(dim=1)
    chance = (prompts.chance[:, 0] + turn * GOLDEN) % 1
    # The place of the n-th cell that may be clicked is where their running count first exceeds n.
    number = (chance * counts).long().clamp(max=counts - 1)
    place = (flat.cumsum(dim=1) <= number[:, None]).sum(dim=1).clamp(max=flat.shape[1] - 1)
    labels = wanted.flatten(1).gather(1, place[:, None])[:, 0].long()

    clicked = counts > 0
    if turns > 1 and turn == turns:
        clicked = torch.zeros_like(clicked)
    if turns > 3:
        clicked &= turn != 1 + (prompts.chance[:, 1] * (turns - 1)).long()
    cells = torch.stack([place % logits.shape[2], place // logits.shape[2]], dim=1)
    points = (cells + 0.5) * pixels_per_cell - 0.5  # the centre of a cell, as `SamPredictor` counts pixels
    return prompts.corrected(points.to(prompts.points_xy_input.dtype), labels, clicked, masks=logits)


@torch.no_grad()
def predict(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The best mask of every prompt by predicted IoU: logits (P, h, w) and scores (P,), both fp32."""
    answers = [(index, *best_masks(masks)) for index, _, masks in decode_batch(network, batch)]
    order = torch.cat([index for index, *_ in answers]).argsort()
    logits, scores = (torch.cat(parts)[order] for parts in list(zip(*answers, strict=True))[1:])
    return logits, scores
