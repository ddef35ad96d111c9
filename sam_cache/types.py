"""The types that cross rooms.

Axis legend, used in every shape of this project:

    I       images of a batch                P       prompts of a batch (each asks for one object)
    C H W   channels, rows, columns          K       points of one prompt; T points of a batch
    h w     the decoder's output resolution  M       masks predicted for one prompt

Coordinate frames, used as suffixes of names:

    _image  pixels of the decoded image as displayed, (0, 0) its top left corner; boxes are
            (x, y, x + w, y + h); points are what `SamPredictor` is given
    _input  pixels of the encoder's square input, after the resize and before the padding
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

IDENTITY_TRANSFORM = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a dataset, known before it is decoded; in a store, one view of it.

    `path` is relative to the dataset's image root, with forward slashes. `height` and `width`
    are those the annotations were made for, in pixels; 0 when nothing says. `split` names a part of
    the dataset, such as `val`, or a set within it, such as `val/DIS-VD`.

    A view is another picture of the same image, such as its mirror image or a tile: `height`, `width`
    and all objects are the view's then, and a place (x, y) of the image, counted from the upper left
    corner of its upper left pixel, lies in the view at (a x + b y + c, d x + e y + f), for `transform`
    (a, b, c, d, e, f). The view of that kind that is the image itself is called `identity`.
    """

    id: int
    path: str
    height: int = 0
    width: int = 0
    split: str = ""
    view: str = "identity"
    transform: tuple[float, float, float, float, float, float] = IDENTITY_TRANSFORM


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """One annotated object.

    `id` is unique within an image: parts in several tiles that share it are one object. `rle` is COCO's
    compressed run-length text at the image's size; `box_xywh_image` is tight around the mask, in pixels.
    """

    id: int
    category: int
    rle: bytes
    box_xywh_image: tuple[float, float, float, float]
    area: float
    iscrowd: bool = False


@dataclass(frozen=True)
class Prompts:
    """P prompts as one ragged list: prompt p owns points `offsets[p]:offsets[p + 1]`.

    Nothing is padded: a padded point would add a token and change the mask. `labels` are 1 for
    foreground and 0 for background. `boxes_xyxy_input[p]` counts only where `has_box[p]`, `masks[p]`,
    logits at the decoder's resolution, only where `has_mask[p]`; `masks` may be None where no prompt has one.
    A prompt with neither points nor box nor mask is the kind `none`. `image_index[p]` says which image
    of the batch it asks about, `kind[p]` indexes `sam_cache.data.prompts.KINDS`.

    `chance[p]` are two numbers in [0, 1) that belong to the object and the epoch: whoever
    needs chance later on, as for points or clicks, takes it from there, and not from a batch's place.
    """

    image_index: Int[Tensor, "P"]
    kind: Int[Tensor, "P"]
    points_xy_input: Float[Tensor, "T 2"]
    labels: Int[Tensor, "T"]
    offsets: Int[Tensor, "P+1"]
    boxes_xyxy_input: Float[Tensor, "P 4"]
    has_box: Bool[Tensor, "P"]
    has_mask: Bool[Tensor, "P"]
    chance: Float[Tensor, "P 2"]
    masks: Float[Tensor, "P h w"] | None = None

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def ambiguous(self) -> Bool[Tensor, "P"]:
        """True where one point is all that is said, so several masks are right answers.

        SAM answers those with three masks, everything else with one (Kirillov et al. 2023, section 3).
        """
        return (self.offsets.diff() == 1) & ~self.has_box & ~self.has_mask

    def to(self, device: torch.device) -> "Prompts":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})

    @staticmethod
    def join(parts: Sequence["Prompts"]) -> "Prompts":
        """Prompts about one image each, after one another; part i asks about image i."""
        counts = [part.offsets.diff() for part in parts]
        flat = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("kind", "points_xy_input", "labels", "boxes_xyxy_input", "has_box", "has_mask", "chance")
        }
        masks = None
        if given := [part.masks for part in parts if part.masks is not None]:
            none = given[0].new_zeros(1, *given[0].shape[1:])
            masks = torch.cat([none.expand(len(part), -1, -1) if part.masks is None else part.masks for part in parts])
        return Prompts(
            masks=masks,
            image_index=torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts])),
            offsets=torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(counts).cumsum(0)]),
            **flat,
        )

    def select(self, index: Int[Tensor, "Q"]) -> "Prompts":
        """The prompts named by `index`, in that order; image indices are kept."""
        counts = (self.offsets[1:] - self.offsets[:-1])[index]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(offsets[-1]), device=counts.device) - offsets[:-1].repeat_interleave(counts)
        points = self.offsets[:-1][index].repeat_interleave(counts) + within
        return Prompts(
            image_index=self.image_index[index],
            kind=self.kind[index],
            points_xy_input=self.points_xy_input[points],
            labels=self.labels[points],
            offsets=offsets,
            boxes_xyxy_input=self.boxes_xyxy_input[index],
            has_box=self.has_box[index],
            has_mask=self.has_mask[index],
            chance=self.chance[index],
            masks=None if self.masks is None else self.masks[index],
        )

    def corrected(
        self,
        points_xy_input: Float[Tensor, "P 2"],
        labels: Int[Tensor, "P"],
        has_point: Bool[Tensor, "P"],
        masks: Float[Tensor, "P h w"],
    ) -> "Prompts":
        """The same prompts with one point more at the end of each of `has_point`, and with masks for all."""
        counts = self.offsets.diff()
        offsets = torch.cat([counts.new_zeros(1), (counts + has_point).cumsum(0)])
        added = offsets[1:][has_point] - 1
        kept = torch.ones(int(offsets[-1]), dtype=torch.bool, device=counts.device)
        kept[added] = False
        points = points_xy_input.new_empty(len(kept), 2)
        points[kept], points[added] = self.points_xy_input, points_xy_input[has_point]
        all_labels = labels.new_empty(len(kept))
        all_labels[kept], all_labels[added] = self.labels, labels[has_point]
        everyone = torch.ones_like(self.has_mask)
        return replace(self, points_xy_input=points, labels=all_labels, offsets=offsets, masks=masks, has_mask=everyone)


@dataclass(frozen=True)
class Targets:
    """What P prompts should produce, at the decoder's resolution.

    `masks` holds area coverage in [0, 1], so thin objects never vanish. `valid` is 1 on the
    image and 0 on the padding, as coverage too, once per image. `weights` is 1, or n / kept
    where only some of an image's n objects were sampled.
    """

    masks: Float[Tensor, "P h w"]
    valid: Float[Tensor, "I h w"]
    weights: Float[Tensor, "P"]

    def to(self, device: torch.device) -> "Targets":
        return Targets(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class Batch:
    """I images, with P prompts and their targets.

    From a store the images are `levels`: a level's name to its tensor (I, C, H, W), `neck` always among
    them; one that is stored as int8 comes with its scale and offset, to be undone by
    `sam_cache.quantisation.dequantise`. Read live they are `pixels`, padded to the right and below beyond
    `content_hw`, and `levels` stays empty until an encoder fills it. `rows` are store rows, or numbers of a
    dataset's images; `objects` are places in the columns of objects, one per prompt.
    """

    levels: dict[str, Shaped[Tensor, "I _ _ _"]]
    prompts: Prompts
    targets: Targets
    rows: np.ndarray
    objects: np.ndarray
    pixels: UInt8[Tensor, "I 3 S S"] | None = None
    content_hw: Int[Tensor, "I 2"] | None = None

    def select(self, index: Int[Tensor, "Q"]) -> "Batch":
        """The prompts named by `index` with only the images they ask about."""
        images, image_index = self.prompts.image_index[index].unique(return_inverse=True)
        return replace(
            self,
            levels={name: level[images] for name, level in self.levels.items()},
            pixels=None if self.pixels is None else self.pixels[images],
            content_hw=None if self.content_hw is None else self.content_hw[images],
            prompts=replace(self.prompts.select(index), image_index=image_index),
            targets=Targets(self.targets.masks[index], self.targets.valid[images], self.targets.weights[index]),
            rows=self.rows[images.cpu().numpy()],
            objects=self.objects[index.cpu().numpy()],
        )

    def chunks(self, budget: int) -> Iterator["Batch"]:
        """Split into batches of at most `budget` prompts, neighbours staying together."""
        if len(self.prompts) <= budget:
            yield self
            return
        for index in torch.arange(len(self.prompts), device=self.prompts.kind.device).split(budget):
            yield self.select(index)

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            levels={name: level.to(device, non_blocking=True) for name, level in self.levels.items()},
            pixels=None if self.pixels is None else self.pixels.to(device, non_blocking=True),
            content_hw=None if self.content_hw is None else self.content_hw.to(device),
            prompts=self.prompts.to(device),
            targets=self.targets.to(device),
        )
