"""Ask networks for the objects of rows and score their masks at the images' own resolution."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from sam_cache.batches import Annotator, Sampling, read_rows
from sam_cache.data import Geometry, PromptMixture
from sam_cache.evaluation import ObjectScore, boundary_iou, dice, mask_iou
from sam_cache.model import masks_to_image
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.decoding import predict
from sam_cache.types import Batch, Prompts

MASK_PIXELS = 2**25  # of masks upsampled at once: 128 MiB in fp32


@dataclass(frozen=True)
class Answer:
    """What the networks said to one prompt: by network name a boolean mask (H, W) and its score.

    `object` indexes the store's object columns; `prompt` is the single prompt, in the input frame.
    """

    row: int
    object: int
    geometry: Geometry
    prompt: Prompts
    truth: np.ndarray
    masks: dict[str, np.ndarray]
    scores: dict[str, ObjectScore]


def ask(
    networks: dict[str, nn.Module],
    data: CachedData,
    rows: Sequence[int],
    kind: PromptMixture,
    seed: int,
    mask_budget: int,
    device: torch.device,
) -> Iterator[list[Answer]]:
    """The answers for all objects of one row after the other, every network on the same prompts."""
    size = next(iter(networks.values())).size
    annotator = data.annotator(size.mask_size, Sampling(kind, seed, training=False))
    for batch in read_rows(data.store, annotator, rows):
        found: list[Answer] = []
        for chunk in batch.chunks(mask_budget):
            found += _answer(networks, annotator, chunk, str(kind), device)
        yield found


def _answer(
    networks: dict[str, nn.Module], annotator: Annotator, batch: Batch, kind: str, device: torch.device
) -> list[Answer]:
    row = int(batch.rows[0])
    geometry = annotator.geometry(row)
    truths = [annotator.mask(index) for index in batch.objects.tolist()]
    masks: dict[str, list[np.ndarray]] = {}
    predicted: dict[str, Tensor] = {}
    for name, network in networks.items():
        logits, predicted[name] = predict(network, batch.to(device))
        masks[name] = []
        for part in logits.split(max(1, MASK_PIXELS // (geometry.height * geometry.width))):
            shown = masks_to_image(
                part,
                geometry.input_size,
                (geometry.content_height, geometry.content_width),
                (geometry.height, geometry.width),
            )
            masks[name] += list((shown > 0).cpu().numpy())
    found = []
    for place, (index, truth) in enumerate(zip(batch.objects.tolist(), truths, strict=True)):
        scores = {
            name: ObjectScore(
                kind=kind,
                image=annotator.image_id(row),
                object=index,
                area=float(truth.sum()),
                iou=mask_iou(mask[place], truth),
                dice=dice(mask[place], truth),
                boundary_iou=boundary_iou(mask[place], truth),
                predicted_iou=float(predicted[name][place]),
            )
            for name, mask in masks.items()
        }
        prompt = batch.prompts.select(torch.tensor([place]))
        found.append(
            Answer(
                row,
                index,
                geometry,
                prompt,
                truth,
                {name: mask[place] for name, mask in masks.items()},
                scores,
            )
        )
    return found


def mean_scores(
    network: nn.Module,
    data: CachedData,
    rows: Sequence[int],
    mixture: PromptMixture,
    seed: int,
    mask_budget: int,
    device: torch.device,
) -> dict[str, float]:
    """Mean IoU over objects for each kind of the mixture, and their mean as `score`; {} without objects."""
    training = network.training
    network.eval()
    means: dict[str, float] = {}
    for kind in mixture.kinds:
        found = chain.from_iterable(ask({"now": network}, data, rows, kind, seed, mask_budget, device))
        ious = [answer.scores["now"].iou for answer in found]
        if ious:
            means[f"iou/{kind}"] = float(np.mean(ious))
    network.train(training)
    return means | ({"score": float(np.mean(list(means.values())))} if means else {})
