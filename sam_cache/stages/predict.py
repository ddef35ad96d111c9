"""Segment a folder of images with a run: one COCO file for all, one PNG of masks for each.

predictions.json   COCO: images, annotations, categories; the annotations, with their `score`, are a list of
                   COCO results too; `info` names the run and what was left out
masks/             for each image the number of the object a pixel belongs to, 1 for the image's first
                   annotation, and 0 for none; without prompts 255 and 0
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from shutil import rmtree

import numpy as np
import torch
from PIL import Image

from sam_cache import durable
from sam_cache.batches import Preprocessing
from sam_cache.batches.ahead import run_ahead
from sam_cache.config import PredictConfig
from sam_cache.data import KINDS, Dataset, Geometry, decode, mask_to_rle, measure_rle, open_images, to_pixels
from sam_cache.errors import DatasetError, ImageError, UsageError
from sam_cache.model import Sam
from sam_cache.ranks import Ranks
from sam_cache.stages.device import pick_device, pick_mask_budget
from sam_cache.stages.progress import Bar, say, say_some
from sam_cache.stages.questions import Question, Questions, ask_without_prompts, read_boxes
from sam_cache.stages.scoring import predict_in_image
from sam_cache.stages.tuned_sam import open_whole, preprocessing_of
from sam_cache.training import RunFolder
from sam_cache.types import Batch, Prompts, Targets

FILE, MASKS = "predictions.json", "masks"
MASK_BYTES = 2**29  # of masks held at once: one byte a pixel
THREADS = 2  # that read images ahead of the network


@dataclass(frozen=True)
class Photo:
    """An image that could be read, as `pixels` (S, S, 3) uint8 for the network, with what is asked about it.

    `boxes_xyxy_image` lie within the image; None asks without any prompt.
    """

    question: Question
    geometry: Geometry
    pixels: np.ndarray
    boxes_xyxy_image: np.ndarray | None
    problems: list[str]


def predict(cfg: PredictConfig) -> int:
    """Answer, write and report; returns 0. What an earlier prediction left in `--out` is replaced at the end.

    Raises DatasetError where not a single image can be used.
    """
    check_prompts(cfg)
    device = pick_device(cfg.device, Ranks.from_env())
    run = RunFolder.open(cfg.run)
    check_out(cfg.out)
    dataset = open_folder(cfg.images, cfg.out / MASKS)
    questions = read_boxes(cfg.boxes, dataset, cfg.images) if cfg.boxes else ask_without_prompts(dataset)
    if unasked := len(dataset.images) - len(questions.images):
        say(f"{cfg.boxes}: says nothing of {unasked} images in {cfg.images}; they are left alone")
    names = name_masks([record.path for record in dataset.images])
    network = open_whole(run, cfg.which, cfg.checkpoint).to(device).eval()
    mask_budget = pick_mask_budget(cfg.mask_budget, device)

    images, annotations, problems = [], [], list(questions.problems)
    cfg.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=cfg.out) as aside:
        with Bar("predicting", len(questions.images), "images") as bar:
            for photo in read_photos(dataset, questions, preprocessing_of(run)):
                bar.advance()
                if isinstance(photo, str):
                    problems.append(photo)
                    continue
                problems += photo.problems
                record, geometry, mask_file = photo.question.record, photo.geometry, names[photo.question.record.path]
                found, numbers = answer(network, photo, mask_budget, device)
                annotations += found
                write_mask(Path(aside, mask_file), numbers)
                images.append(
                    {"id": record.id, "file_name": record.path, "height": geometry.height, "width": geometry.width,
                     "mask_file": mask_file}
                )  # fmt: skip
        if not images:
            raise DatasetError(f"{cfg.images}: none of {len(questions.images)} images can be used, first {problems[0]}")
        info = {"run": str(cfg.run), "which": cfg.which, "prompts": cfg.prompts, "problems": problems}
        content = {"info": info, "images": images, "annotations": annotations, "categories": questions.categories}
        publish(cfg.out, json.dumps(content), Path(aside, MASKS))
    say_some("left out", problems)
    say(f"{cfg.out / FILE}: {len(annotations)} masks of {len(images)} images, drawn in {cfg.out / MASKS}")
    return 0


def check_prompts(cfg: PredictConfig) -> None:
    """Raises UsageError unless boxes are given exactly where they are asked for."""
    if cfg.prompts == "boxes" and cfg.boxes is None:
        raise UsageError("--prompts boxes: give --boxes FILE, or --prompts none for one mask an image")
    if cfg.prompts == "none" and cfg.boxes is not None:
        raise UsageError(f"--boxes {cfg.boxes}: --prompts none takes no boxes; leave one of the two")


def check_out(out: Path) -> None:
    """Raises UsageError where masks would be replaced that are no prediction, such as a dataset's own."""
    if (out / MASKS).exists() and not (out / FILE).exists():
        raise UsageError(f"--out {out}: has masks that are not of a prediction; choose another folder")


def open_folder(folder: Path, written: Path) -> Dataset:
    """The images of `folder`; what an earlier prediction wrote there is none of them."""
    dataset = open_images(folder)
    root, written = folder.resolve(), written.resolve()
    if not written.is_relative_to(root):
        return dataset
    own = written.relative_to(root)
    return replace(dataset, images=[found for found in dataset.images if own not in PurePosixPath(found.path).parents])


def name_masks(paths: list[str]) -> dict[str, str]:
    """The mask file of every image, by its path: its name with .png, or .png after it where it would not be alone."""
    stem_of = {path: PurePosixPath(path).with_suffix("").as_posix() for path in paths}
    shared = Counter(stem_of.values()) + Counter(paths)
    return {path: f"{MASKS}/{stem if shared[stem] == 1 else path}.png" for path, stem in stem_of.items()}


def read_photos(dataset: Dataset, questions: Questions, how: Preprocessing) -> Iterator[Photo | str]:
    """A `Photo` for every question, in order, or the text that says why there is none."""

    def read(question: Question) -> Photo | str:
        record = question.record
        try:
            image = decode(dataset.read(record), record, how.intensity).image
        except (ImageError, OSError) as error:
            return str(error)
        geometry = Geometry(*image.shape[:2], how.input_size, how.fit)
        question, boxes, problems = clip_boxes(question, geometry)
        return Photo(question, geometry, to_pixels(image, geometry, how.resize), boxes, problems)

    return run_ahead(read, questions.images, THREADS, ahead=2 * THREADS)


def clip_boxes(question: Question, geometry: Geometry) -> tuple[Question, np.ndarray | None, list[str]]:
    """The question without boxes that hold nothing of the image; the others, cut to it; what was left out."""
    if question.boxes_xywh_image is None:
        return question, None, []
    xywh = question.boxes_xywh_image
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    corners = corners.clip(0, (geometry.width, geometry.height) * 2)
    good = (corners[:, 2:] > corners[:, :2]).all(axis=1)
    problems = [
        f"{question.record.path}: box {question.ids[place]} {xywh[place].tolist()} holds nothing of the image, "
        f"which is {geometry.width}x{geometry.height}"
        for place in np.flatnonzero(~good)
    ]
    kept = np.flatnonzero(good).tolist()
    ids, categories = ([values[place] for place in kept] for values in (question.ids, question.categories))
    return replace(question, ids=ids, categories=categories), corners[good], problems


@torch.no_grad()
def answer(network: Sam, photo: Photo, mask_budget: int, device: torch.device) -> tuple[list[dict], np.ndarray]:
    """The annotations of one image, and whose pixel is whose: (H, W), later objects on top."""
    question, geometry = photo.question, photo.geometry
    size, count = (geometry.height, geometry.width), len(question.ids)
    numbers = np.zeros(size, np.uint16 if count > 255 else np.uint8)
    annotations: list[dict] = []
    if not count:
        return annotations, numbers
    batch = make_batch(photo).to(device)
    batch = replace(batch, levels=network.encode(batch), pixels=None)
    for chunk in batch.chunks(max(1, min(mask_budget, MASK_BYTES // numbers.size))):
        for mask, score in zip(*predict_in_image(network, chunk, geometry), strict=True):
            place = len(annotations)
            numbers[mask] = 255 if photo.boxes_xyxy_image is None else place + 1
            rle = mask_to_rle(mask)
            box, area = measure_rle(rle, *size)
            annotations.append(
                {
                    "id": question.ids[place],
                    "image_id": question.record.id,
                    "category_id": question.categories[place],
                    "bbox": list(box),
                    "area": area,
                    "iscrowd": 0,
                    "segmentation": {"size": list(size), "counts": rle.decode()},
                    "score": score.item(),
                }
            )
    return annotations, numbers


def make_batch(photo: Photo) -> Batch:
    """One image with its boxes as prompts, or with one prompt that says nothing."""
    geometry, boxes, count = photo.geometry, photo.boxes_xyxy_image, len(photo.question.ids)
    prompted = boxes is not None
    boxes_input = geometry.boxes_to_input(boxes) if prompted else np.zeros((count, 4))
    prompts = Prompts(
        image_index=torch.zeros(count, dtype=torch.long),
        kind=torch.full((count,), KINDS.index("box" if prompted else "none")),
        points_xy_input=torch.zeros(0, 2),
        labels=torch.zeros(0, dtype=torch.long),
        offsets=torch.zeros(count + 1, dtype=torch.long),
        boxes_xyxy_input=torch.from_numpy(boxes_input).float(),
        has_box=torch.full((count,), prompted),
        has_mask=torch.zeros(count, dtype=torch.bool),
        chance=torch.zeros(count, 2),
    )
    # There is nothing to compare with, but a batch has targets.
    targets = Targets(torch.zeros(count, 1, 1), torch.zeros(1, 1, 1), torch.ones(count))
    pixels = torch.from_numpy(photo.pixels).permute(2, 0, 1)[None]
    content_hw = torch.tensor([[geometry.content_height, geometry.content_width]])
    return Batch({}, prompts, targets, np.zeros(1, np.int64), np.arange(count), pixels, content_hw)


def write_mask(path: Path, numbers: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbers).save(path)


def publish(out: Path, content: str, masks: Path) -> None:
    """Put what is finished in the place of what was there."""
    durable.replace(out / FILE, content.encode())
    if (out / MASKS).exists():
        rmtree(out / MASKS)
    masks.rename(out / MASKS)
