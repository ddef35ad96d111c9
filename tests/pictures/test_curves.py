import cv2
import numpy as np
import pytest

from sam_cache.pictures import draw_curves
from sam_cache.pictures.curves import _smooth


def metrics_of(steps):
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "loss": 2 / step,
            "focal": 0.05 / step,
            "dice": 1 / step,
            "iou": 0.0,
            "learning_rate": 1e-4,
        }
        yield line | ({"held_out/score": 0.5, "held_out/box": None} if step % 3 == 0 else {})


@pytest.mark.parametrize("steps", [0, 1, 2, 50])
def test_any_length_of_run(tmp_path, steps):
    draw_curves(list(metrics_of(steps)), tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.shape == (1125, 1200, 3)
    assert (picture < 128).any()


def test_curves_are_drawn(tmp_path):
    """Dropping one part changes the picture: each is really in it."""
    lines = list(metrics_of(30))

    def draw(missing):
        draw_curves([{k: v for k, v in line.items() if k != missing} for line in lines], tmp_path / "c.png")
        return cv2.imread(str(tmp_path / "c.png"))

    whole = draw(None)
    for name in ("loss", "focal", "dice", "learning_rate", "held_out/score"):
        assert not np.array_equal(draw(name), whole), name
    assert np.array_equal(draw("nothing"), whole)


def test_many_prompt_kinds_fit(tmp_path):
    """Seven kinds with long names and their boundary scores: the picture is still laid out, without a warning."""
    kinds = ("box", "point", "point+3-1", "centroid", "interior", "bbox-center", "none")
    scores = {f"held_out/{score}/{kind}": 0.5 for score in ("iou", "boundary_iou") for kind in kinds}
    draw_curves([line | scores for line in metrics_of(12)], tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")).shape == (1125, 1200, 3)


@pytest.mark.parametrize("name", ["bce", "balanced_bce", "soft_iou"])
def test_parts_of_other_losses_are_drawn(tmp_path, name):
    lines = list(metrics_of(30))
    draw_curves(lines, tmp_path / "without.png")
    draw_curves([line | {name: 0.3 / line["step"]} for line in lines], tmp_path / "with.png")
    assert not np.array_equal(cv2.imread(str(tmp_path / "with.png")), cv2.imread(str(tmp_path / "without.png")))


def test_smoothing_keeps_constants_and_does_not_lag():
    assert _smooth(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    line = np.arange(200.0)
    assert _smooth(line)[10:-10] == pytest.approx(line[10:-10])
