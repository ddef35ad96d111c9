"""Ask networks for the objects of rows and score their masks at the images' own resolution."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import fsum

import numpy as np
import torch
from torch import Tensor

from sam_cache.data import Geometry, PromptMixture, rle_to_mask
from sam_cache.evaluation import ObjectScore, boundary_iou, dice, mask_iou
from sam_cache.model import Top, masks_to_image
from sam_cache.ranks import Ranks
from sam_cache.stages.decoding import predict
from sam_cache.stages.exam import Data, Exam
from sam_cache.stages.tiles import Reply, join_tiles
from sam_cache.training import gather
from sam_cache.types import Batch, Prompts

SCORES = ("iou", "boundary_iou")  # of an evaluation while training, each by prompt kind
MASK_PIXELS = 2**25  # of masks upsampled at once: 128 MiB in fp32


@dataclass(frozen=True)
class Answer:
    """What the networks said to one prompt: by network name a boolean mask (H, W) and its score.

    `prompt` is the single prompt, in the input frame; of an answer that was joined from tiles, one per tile.
    """

    row: int
    category: int
    geometry: Geometry
    prompt: Prompts
    truth: np.ndarray
    masks: dict[str, np.ndarray]
    scores: dict[str, ObjectScore]


@torch.no_grad()
def ask(
    networks: dict[str, Top],
    data: Data,
    rows: Sequence[int],
    kinds: Sequence[PromptMixture],
    seed: int,
    mask_budget: int,
    device: torch.device,
) -> Iterator[dict[str, list[Answer]]]:
    """For one row after the other the answers for all its objects, by kind; all networks get the same prompts.

    Every network encodes an image once for all kinds. Answers to the tiles of an image are joined.
    """
    resolution = next(iter(networks.values())).size.mask_size
    found = data.exams(rows, kinds, seed, resolution)
    for _, of_image in groupby(found, key=lambda exams: exams[0].row):
        by_kind: dict[str, list[tuple[Exam, list[Reply]]]] = {}
        for exams in of_image:
            image = exams[0].batch.to(device)
            levels = {name: network.encode(image) for name, network in networks.items()}
            for exam in exams:
                replies = _reply(networks, levels, exam, mask_budget, device)
                by_kind.setdefault(str(exam.kind), []).append((exam, replies))
        yield {kind: _score(parts) for kind, parts in by_kind.items()}


def _reply(
    networks: dict[str, Top], levels: dict[str, dict], exam: Exam, mask_budget: int, device: torch.device
) -> list[Reply]:
    geometry, batch = exam.geometry, exam.batch
    truths = [rle_to_mask(rle, geometry.height, geometry.width).astype(bool) for rle in exam.rles]
    masks: dict[str, list[np.ndarray]] = {}
    predicted: dict[str, list[float]] = {}
    questions = replace(batch, levels={}, pixels=None).to(device)  # the image is there already, as levels
    for name, network in networks.items():
        asked = replace(questions, levels=levels[name])
        found = [predict_in_image(network, chunk, geometry) for chunk in asked.chunks(mask_budget)]
        masks[name] = [mask for shown, _ in found for mask in shown]
        predicted[name] = [score for _, scores in found for score in scores.tolist()]
    return [
        Reply(
            object,
            exam.ids[place] if exam.ids else object,
            exam.categories[place],
            geometry,
            batch.prompts.select(torch.tensor([place])),
            truth,
            {name: found[place] for name, found in masks.items()},
            {name: found[place] for name, found in predicted.items()},
        )
        for place, (object, truth) in enumerate(zip(batch.objects.tolist(), truths, strict=True))
    ]


def _score(parts: list[tuple[Exam, list[Reply]]]) -> list[Answer]:
    """The answers about one image, given the replies to it or to each of its tiles."""
    exam, replies = parts[0]
    if exam.tile is not None:
        replies = join_tiles([(part.tile, found) for part, found in parts])
    answers = []
    for reply in replies:
        truth = reply.truth
        scores = {
            name: ObjectScore(
                kind=str(exam.kind),
                image=exam.image_id,
                object=reply.object,
                area=float(truth.sum()),
                iou=mask_iou(mask, truth),
                dice=dice(mask, truth),
                boundary_iou=boundary_iou(mask, truth),
                predicted_iou=reply.predicted[name],
            )
            for name, mask in reply.masks.items()
        }
        answers.append(Answer(exam.row, reply.category, reply.geometry, reply.prompt, truth, reply.masks, scores))
    return answers


def predict_in_image(network: Top, batch: Batch, geometry: Geometry) -> tuple[list[np.ndarray], Tensor]:
    """The best mask of every prompt about one image: boolean (H, W) at its own size, and predicted IoUs (P,)."""
    logits, scores = predict(network, batch)
    masks: list[np.ndarray] = []
    for part in logits.split(max(1, MASK_PIXELS // (geometry.height * geometry.width))):
        shown = masks_to_image(
            part,
            geometry.input_size,
            (geometry.content_height, geometry.content_width),
            (geometry.height, geometry.width),
        )
        masks += list((shown > 0).cpu().numpy())
    return masks, scores


@dataclass(frozen=True)
class Evaluation:
    """Scores a network on `rows` of `data`, always on the same prompts; all ranks share the rows.

    `show(row, answers)` is given the first `pictures` rows, with the answers to the first kind.
    """

    network: Top
    data: Data
    rows: np.ndarray
    mixture: PromptMixture
    seed: int
    mask_budget: int
    device: torch.device
    ranks: Ranks = Ranks()
    pictures: int = 0
    show: Callable[[int, list[Answer]], None] = lambda row, answers: None

    def __call__(self) -> dict[str, float]:
        """Mean IoU and boundary IoU over objects by kind, and the mean IoU of the kinds as `score`; {} without any."""
        kinds = self.mixture.kinds
        training = self.network.training
        self.network.eval()
        ious: dict[str, list[float]] = {}
        shown = 0
        rows = list(self.ranks.share(self.rows.tolist()))
        for answers in ask({"tuned": self.network}, self.data, rows, kinds, self.seed, self.mask_budget, self.device):
            for kind, found in answers.items():
                for score in SCORES:
                    values = [getattr(answer.scores["tuned"], score) for answer in found]
                    ious.setdefault(f"{score}/{kind}", []).extend(values)
            if shown < self.pictures and self.ranks.rank == 0:
                first = answers[str(kinds[0])]
                self.show(first[0].row, first)
                shown += 1
        self.network.train(training)
        shares = gather(ious)
        names = dict.fromkeys(name for share in shares for name in share)
        means = {}
        for name in names:
            values = [iou for share in shares for iou in share.get(name, [])]
            means[name] = fsum(values) / len(values)  # exact, and so the same in whatever order ranks bring them
        scores = [value for name, value in means.items() if name.startswith("iou/")]
        return means | ({"score": float(np.mean(scores))} if scores else {})
