"""The dataset formats by name."""

from collections.abc import Collection, Sequence
from pathlib import Path

from sam_cache.data.coco import open_coco
from sam_cache.data.dataset import Dataset
from sam_cache.data.lvis import open_lvis
from sam_cache.data.mask_folder import open_masks
from sam_cache.data.pairs import Pair, open_pairs
from sam_cache.data.synthetic import open_synthetic
from sam_cache.errors import DatasetError

DATASETS = ("coco", "lvis", "masks", "pairs", "synthetic")


def open_dataset(
    kind: str,
    *,
    root: Path | None = None,
    split: str | None = None,
    images: Path | None = None,
    annotations: Path | None = None,
    masks: Path | None = None,
    mask_pattern: str = "{stem}.*",
    objects_per: str = "class",
    ignore_values: Collection[int] | None = None,
    classes: Collection[int] | None = None,
    pairs: Sequence[Pair] = (),
    mask_maximum: int = 255,
    limit: int | None = None,
    count: int = 200,
    seed: int = 0,
    size: int = 560,
) -> Dataset:
    """Open a dataset of one of `DATASETS`; `open_coco` and its siblings say what the arguments mean.

    For masks, `images` and `masks` are `root/images` and `root/masks` unless given. Raises
    DatasetError where the dataset cannot be used at all.
    """
    match kind:
        case "coco":
            return open_coco(root, split, images, annotations, limit)
        case "lvis":
            return open_lvis(root, split, images, annotations, limit)
        case "masks":
            if root is None and (images is None or masks is None):
                raise DatasetError("no images or masks given: --images DIR with --masks DIR, or --root DIR")
            images, masks = images or root / "images", masks or root / "masks"
            return open_masks(images, masks, mask_pattern, objects_per, ignore_values, limit, classes)
        case "pairs":
            return open_pairs(pairs, limit, mask_maximum, mask_pattern)
        case "synthetic":
            return open_synthetic(count if limit is None else min(count, limit), seed, size)
    raise DatasetError(f"unknown dataset format {kind!r}; choose one of {', '.join(DATASETS)}")
