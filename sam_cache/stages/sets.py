"""Scores by set, where a dataset is made of several; and their mean over sets, as HQ-SAM publishes it."""

from collections.abc import Mapping

import numpy as np

from sam_cache.evaluation import Scores, compare, summarise

KEPT = ("objects", "images", "iou", "boundary_iou")


def summarise_sets(columns: Mapping[str, Scores], set_of: Mapping[int, str], seed: int) -> dict:
    """`sets` and `mean_over_sets` of a report; {} where no image is in a set.

        {"sets": {set: {"untouched" | "tuned" | "gain":
                     {kind: {"objects": n, "images": n, "iou" | "boundary_iou": {"mean": x, "low": x, "high": x}}}}},
         "mean_over_sets": {"untouched" | "tuned" | "gain": {kind: {"iou" | "boundary_iou": x}}}}

    `columns` are the scores of `untouched` and, where there is one, of `tuned`; `set_of` names the set of each
    image id, an empty string where it has none. Every set counts once in the mean, however many images it has
    (Ke et al. 2023, table 1: the mean of four sets). As in `summarise`, a set's mean is over its objects.
    """
    names = [name for name in dict.fromkeys(set_of.values()) if name]
    if not names:
        return {}
    of = {network: np.array([set_of[image] for image in scores.image.tolist()]) for network, scores in columns.items()}
    sets = {}
    for name in names:
        ours = {network: scores.select(of[network] == name) for network, scores in columns.items()}
        found = {network: summarise(scores, seed) for network, scores in ours.items()}
        if "tuned" in ours:
            found["gain"] = compare(ours["tuned"], ours["untouched"], seed)
        sets[name] = {
            what: {kind: {key: sizes["all"][key] for key in KEPT} for kind, sizes in by_kind.items()}
            for what, by_kind in found.items()
        }
    return {"sets": sets, "mean_over_sets": _mean_over(list(sets.values()))}


def _mean_over(sets: list[dict]) -> dict:
    def mean(what: str, kind: str, key: str) -> float:
        return float(np.mean([found[what][kind][key]["mean"] for found in sets]))

    return {
        what: {kind: {key: mean(what, kind, key) for key in ("iou", "boundary_iou")} for kind in by_kind}
        for what, by_kind in sets[0].items()  # all objects are asked for by all kinds
    }
