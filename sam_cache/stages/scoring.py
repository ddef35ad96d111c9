"""Ask networks for the objects of rows and score their masks at the images' own resolution."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import fsum

import numpy as np
import torch
from torch import Tensor

from sam_cache.data import Geometry, MaskCrop, PromptMixture, crop_rle
from sam_cache.evaluation import ObjectScore, boundary_iou, dice, mask_iou
from sam_cache.model import Top, masks_to_image
from sam_cache.ranks import Ranks
from sam_cache.stages.decoding import predict
from sam_cache.stages.exam import Data, Exam
from sam_cache.stages.tiles import Reply, Tile, join_tiles
from sam_cache.training import gather
from sam_cache.types import Batch, Prompts

SCORES = ("iou", "boundary_iou")  # of an evaluation while training, each by prompt kind
MASK_PIXELS = 2**25  # of masks upsampled at once: 128 MiB in fp32


@dataclass(frozen=True)
class Answer:
    """What the networks said to one prompt: by network name a mask and its score.

    `prompt` is the single prompt without its mask, in the input frame; of an answer that was joined from tiles,
    one per tile. Masks are cut to their boxes, so that those of many objects of a large image fit into memory.
    """

    row: int
    category: int
    geometry: Geometry
    prompt: Prompts
    truth: MaskCrop
    masks: dict[str, MaskCrop]
    scores: dict[str, ObjectScore]

    def whole(self, mask: MaskCrop) -> np.ndarray:
        """One of these masks, boolean (H, W), at the image's size."""
        return mask.whole(self.geometry.height, self.geometry.width)


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
    for row, of_image in groupby(found, key=lambda exams: exams[0].row):
        parts: dict[str, list[tuple[Tile | None, list[Reply]]]] = {}  # by kind
        for exams in of_image:
            image_id, image = exams[0].image_id, exams[0].batch.to(device)
            levels = {name: network.encode(image) for name, network in networks.items()}
            for exam in exams:
                replies = _reply(networks, levels, exam, mask_budget, device)
                parts.setdefault(str(exam.kind), []).append((exam.tile, replies))
        yield {
            kind: [_score(row, image_id, kind, reply) for reply in join_tiles(found)] for kind, found in parts.items()
        }


def _reply(
    networks: dict[str, Top], levels: dict[str, dict], exam: Exam, mask_budget: int, device: torch.device
) -> list[Reply]:
    geometry, batch = exam.geometry, exam.batch
    truths = [crop_rle(rle, geometry.height, geometry.width) for rle in exam.rles]
    prompts = replace(batch.prompts, has_mask=torch.zeros_like(batch.prompts.has_mask), masks=None)
    masks: dict[str, list[MaskCrop]] = {}
    predicted: dict[str, list[float]] = {}
    questions = replace(batch, levels={}, pixels=None).to(device)  # the image is there already, as levels
    for name, network in networks.items():
        asked = replace(questions, levels=levels[name])
        masks[name], predicted[name] = [], []
        for chunk in asked.chunks(mask_budget):
            shown, scores = predict_in_image(network, chunk, geometry)
            masks[name] += map(MaskCrop.of, shown)
            predicted[name] += scores.tolist()
    return [
        Reply(
            object,
            exam.ids[place] if exam.ids else object,
            exam.categories[place],
            geometry,
            prompts.select(torch.tensor([place])),
            truth,
            {name: found[place] for name, found in masks.items()},
            {name: found[place] for name, found in predicted.items()},
        )
        for place, (object, truth) in enumerate(zip(batch.objects.tolist(), truths, strict=True))
    ]


def _score(row: int, image_id: int, kind: str, reply: Reply) -> Answer:
    size = reply.geometry.height, reply.geometry.width
    truth, scores = reply.truth.whole(*size), {}
    for name, crop in reply.masks.items():
        mask = crop.whole(*size)
        scores[name] = ObjectScore(
            kind=kind,
            image=image_id,
            object=reply.object,
            area=float(truth.sum()),
            iou=mask_iou(mask, truth),
            dice=dice(mask, truth),
            boundary_iou=boundary_iou(mask, truth),
            predicted_iou=reply.predicted[name],
        )
    return Answer(row, reply.category, reply.geometry, reply.prompt, reply.truth, reply.masks, scores)


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
