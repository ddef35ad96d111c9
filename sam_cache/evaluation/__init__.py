"""Scores of masks: per object, summarised with intervals, and as average precision."""

from sam_cache.evaluation.average_precision import average_precision
from sam_cache.evaluation.masks import boundary_iou, dice, mask_iou
from sam_cache.evaluation.scores import ObjectScore, Scores, compare, summarise

__all__ = [
    "ObjectScore",
    "Scores",
    "average_precision",
    "boundary_iou",
    "compare",
    "dice",
    "mask_iou",
    "summarise",
]
