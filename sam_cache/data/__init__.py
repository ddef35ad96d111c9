"""Datasets, images, masks, geometry, prompts and targets."""

from sam_cache.data.augmentation import Augmentation, augment, parse_augmentation
from sam_cache.data.coco import open_annotations
from sam_cache.data.crops import MaskCrop, crop_rle
from sam_cache.data.dataset import Dataset
from sam_cache.data.decode import Decoded, decode
from sam_cache.data.formats import open_dataset
from sam_cache.data.geometry import Geometry
from sam_cache.data.image_folder import open_images
from sam_cache.data.pairs import Pair, parse_pair
from sam_cache.data.pixels import to_pixels
from sam_cache.data.points import DeterministicPoints, deterministic_points
from sam_cache.data.prompts import (
    KINDS,
    POINT_COLUMNS,
    PromptMixture,
    parse_prompts,
    sample_prompts,
)
from sam_cache.data.rle import mask_to_rle, measure_rle, rle_to_mask
from sam_cache.data.runs import ColumnRuns, column_runs
from sam_cache.data.streams import keyed_generator
from sam_cache.data.targets import Patch, cover, coverage, valid_coverage
from sam_cache.data.views import WHOLE, View, Views, parse_views

__all__ = [
    "KINDS",
    "Augmentation",
    "ColumnRuns",
    "POINT_COLUMNS",
    "Dataset",
    "Decoded",
    "DeterministicPoints",
    "Geometry",
    "MaskCrop",
    "Pair",
    "Patch",
    "PromptMixture",
    "View",
    "Views",
    "WHOLE",
    "augment",
    "column_runs",
    "cover",
    "coverage",
    "crop_rle",
    "decode",
    "deterministic_points",
    "keyed_generator",
    "mask_to_rle",
    "measure_rle",
    "open_annotations",
    "open_dataset",
    "open_images",
    "parse_augmentation",
    "parse_pair",
    "parse_prompts",
    "parse_views",
    "rle_to_mask",
    "sample_prompts",
    "to_pixels",
    "valid_coverage",
]
