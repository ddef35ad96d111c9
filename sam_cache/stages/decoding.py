"""What training and evaluation share: a batch through the network, with the masks each prompt calls for."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sam_cache.model import Masks
from sam_cache.training import LossWeights, sam_loss
from sam_cache.types import Batch


def decode_batch(network: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Batch, Masks]]:
    """(which prompts, their part of the batch, masks): ambiguous prompts get three masks, others one."""
    for multimask in (False, True):
        index = (batch.prompts.ambiguous == multimask).nonzero()[:, 0]
        if len(index) == len(batch.prompts):
            yield index, batch, network(batch.levels, batch.prompts, multimask)
        elif len(index):
            part = batch.select(index)
            yield index, part, network(part.levels, part.prompts, multimask)


@dataclass(frozen=True)
class SamObjective:
    """Sums over a batch's prompts, each with its weight: `loss`, which is minimised, and its parts."""

    weights: LossWeights

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for _, part, masks in decode_batch(network, batch):
            losses = sam_loss(
                masks.logits,
                masks.scores,
                part.targets.masks,
                part.targets.valid,
                part.prompts.image_index,
                self.weights,
            )
            named = {"loss": losses.total, "focal": losses.focal, "dice": losses.dice, "iou": losses.iou}
            for name, value in named.items():
                sums[name] = sums.get(name, 0.0) + (value * part.targets.weights).sum()
        return sums


@torch.no_grad()
def predict(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The best mask of every prompt by predicted IoU: logits (P, h, w) and scores (P,), both fp32."""
    logits: Tensor | None = None
    for index, _, masks in decode_batch(network, batch):
        best_scores, best = masks.scores.float().max(dim=1)
        best_logits = masks.logits.float()[torch.arange(len(index), device=index.device), best]
        if logits is None:
            logits = best_logits.new_empty(len(batch.prompts), *best_logits.shape[1:])
            scores = best_scores.new_empty(len(batch.prompts))
        logits[index], scores[index] = best_logits, best_scores
    return logits, scores
