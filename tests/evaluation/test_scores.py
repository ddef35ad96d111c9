import json

import numpy as np
import pytest

from sam_cache.errors import SamcacheError
from sam_cache.evaluation import ObjectScore, Scores, compare, summarise


def draw(count=300, images=20, seed=0, shift=0.0):
    """Scores that vary much between images and little within: where clusters matter."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, images, count)
    iou = np.clip(0.5 + shift + 0.3 * np.sin(image) + 0.05 * generator.normal(size=count), 0, 1)
    rows = (
        ObjectScore(
            kind=("box", "point")[n % 2],
            image=int(image[n]),
            object=n,
            area=float(10 ** generator.uniform(1, 5)),
            iou=iou[n],
            dice=2 * iou[n] / (1 + iou[n]),
            boundary_iou=iou[n] ** 2,
            predicted_iou=0.6,
        )
        for n in range(count)
    )
    return Scores.of(rows)


def naive_intervals(values, images, resamples, seed=0):
    """The cluster bootstrap as a text-book writes it: draw images, pool their objects, take the mean."""
    generator = np.random.default_rng(seed)
    groups = [values[images == image] for image in np.unique(images)]
    means = [
        np.concatenate([groups[g] for g in generator.integers(len(groups), size=len(groups))]).mean()
        for _ in range(resamples)
    ]
    return np.percentile(means, [2.5, 97.5])


def test_means_and_counts():
    scores = draw()
    summary = summarise(scores, resamples=10)
    assert list(summary) == ["box", "point"]
    for kind, sizes in summary.items():
        mine = scores.kind == kind
        assert list(sizes) == ["all", "small", "medium", "large"]
        assert sizes["all"]["objects"] == 150
        assert sum(sizes[size]["objects"] for size in ("small", "medium", "large")) == 150
        small = mine & (scores.area < 1024)
        assert sizes["small"]["images"] == len(np.unique(scores.image[small]))
        assert sizes["small"]["dice"]["mean"] == pytest.approx(scores.dice[small].mean())
        error = np.abs(0.6 - scores.iou[mine]).mean()
        assert sizes["all"]["predicted_iou_error"]["mean"] == pytest.approx(error)


def test_intervals_equal_the_naive_bootstrap():
    scores = draw()
    box = scores.kind == "box"
    low, high = naive_intervals(scores.iou[box], scores.image[box], 1000)
    # The same seed draws the same images, so the two agree exactly, not only on average.
    got = summarise(scores)["box"]["all"]["iou"]
    assert (got["low"], got["high"]) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))

    as_if_independent = 2 * 1.96 * scores.iou[box].std() / np.sqrt(box.sum())
    assert high - low > 1.5 * as_if_independent


def test_seed_decides():
    scores = draw()
    assert summarise(scores, seed=1) == summarise(scores, seed=1)
    assert summarise(scores, seed=1) != summarise(scores, seed=2)


def test_paired_difference_is_narrow():
    """A constant gain has no spread, though the scores themselves have; the order of rows is free."""
    untouched = draw(count=200)
    order = np.random.default_rng(1).permutation(200)
    shifted = vars(untouched) | {"iou": untouched.iou + 0.1}
    tuned = Scores(**{name: column[order] for name, column in shifted.items()})
    gain = compare(tuned, untouched)["point"]["all"]
    for value in gain["iou"].values():
        assert value == pytest.approx(0.1)
    assert gain["dice"] == {"mean": 0, "low": 0, "high": 0}


def test_unpaired_scores_are_refused():
    with pytest.raises(SamcacheError, match=r"tuned \(200 scores\) and untouched \(300 scores\)"):
        compare(draw(count=200), draw())


def test_result_is_json_and_empty_sizes_are_left_out():
    one = Scores.of([ObjectScore("box", 7, 1, 50.0, 0.5, 0.6, 0.4, 0.9)])
    summary = summarise(one)
    assert json.loads(json.dumps(summary)) == summary
    assert list(summary["box"]) == ["all", "small"]
    assert summary["box"]["all"]["iou"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert summarise(Scores.of([])) == {}


def test_size_limits():
    areas = [1023.9, 1024, 9215, 9216]
    scores = Scores.of(ObjectScore("box", n, n, area, 1, 1, 1, 1) for n, area in enumerate(areas))
    sizes = summarise(scores, resamples=2)["box"]
    assert [sizes[size]["objects"] for size in ("small", "medium", "large")] == [1, 2, 1]


def test_selected_scores_are_those_rows_of_every_column():
    scores = draw(count=30)
    chosen = scores.image < 7
    some = scores.select(chosen)
    assert len(some) == chosen.sum() > 0
    assert some.object.tolist() == scores.object[chosen].tolist()
    assert summarise(some, resamples=10)["box"]["all"]["iou"]["mean"] == pytest.approx(
        scores.iou[chosen & (scores.kind == "box")].mean()
    )
