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

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a dataset, known before it is decoded.

    `path` is relative to the dataset's image root, with forward slashes. `height` and `width`
    are those the annotations were made for, in pixels; 0 when nothing says.
    """

    id: int
    path: str
    height: int = 0
    width: int = 0
    split: str = ""


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """One annotated object.

    `rle` is COCO's compressed run-length text at the image's size; `box_xywh_image` is tight
    around the mask, in pixels.
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
    foreground and 0 for background. `boxes_xyxy_input[p]` counts only where `has_box[p]`.
    A prompt with neither points nor box is the kind `none`. `image_index[p]` says which image
    of the batch it asks about, `kind[p]` indexes `sam_cache.data.prompts.KINDS`.
    """

    image_index: Int[Tensor, "P"]
    kind: Int[Tensor, "P"]
    points_xy_input: Float[Tensor, "T 2"]
    labels: Int[Tensor, "T"]
    offsets: Int[Tensor, "P+1"]
    boxes_xyxy_input: Float[Tensor, "P 4"]
    has_box: Bool[Tensor, "P"]

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def ambiguous(self) -> Bool[Tensor, "P"]:
        """True where one point and no box is all that is said, so several masks are right answers.

        SAM answers those with three masks, everything else with one (Kirillov et al. 2023, section 3).
        """
        return (self.offsets[1:] - self.offsets[:-1] == 1) & ~self.has_box

    def to(self, device: torch.device) -> "Prompts":
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

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
        )


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
    """I images as encoder levels, with P prompts and their targets.

    `levels` maps a level's name to its tensor (I, C, H, W); `neck` is always there. `rows` are store
    rows, `objects` indexes the store's object columns, one per prompt.
    """

    levels: dict[str, Float[Tensor, "I C H W"]]
    prompts: Prompts
    targets: Targets
    rows: np.ndarray
    objects: np.ndarray

    def select(self, index: Int[Tensor, "Q"]) -> "Batch":
        """The prompts named by `index` with only the images they ask about."""
        images, image_index = self.prompts.image_index[index].unique(return_inverse=True)
        return replace(
            self,
            levels={name: level[images] for name, level in self.levels.items()},
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
            prompts=self.prompts.to(device),
            targets=self.targets.to(device),
        )
