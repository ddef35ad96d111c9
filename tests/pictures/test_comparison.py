import cv2
import numpy as np

from sam_cache.pictures import comparison, draw_overlay, save_png


def test_panels_are_the_overlays():
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    masks = [np.zeros((60, 80), bool) for _ in range(3)]
    for number, mask in enumerate(masks):
        mask[10:40, 10 : 30 + 10 * number] = True
    truth, untouched, tuned = masks
    points = np.array([(20, 20)])
    answers = {"untouched": [untouched], "tuned": [tuned]}
    page = comparison(image, [truth], answers, points, ious={"untouched": 0.5, "tuned": 0.75}, size=160)
    panels = [draw_overlay(image, (), points, size=160)]
    panels += [draw_overlay(image, [mask], size=160) for mask in masks]

    found = []
    for panel in panels:
        difference = cv2.matchTemplate(page, panel, cv2.TM_SQDIFF)
        y, x = np.unravel_index(difference.argmin(), difference.shape)
        assert np.array_equal(page[y : y + 120, x : x + 160], panel)
        found.append((int(x), int(y)))
    assert found == sorted(found)
    assert len({y for _, y in found}) == 1


def test_captions_fit_beside_a_tall_image():
    image = np.zeros((300, 10, 3), np.uint8)
    answers = {"untouched": [], "tuned": []}
    page = comparison(image, [], answers, title="a rather long title, longer than the four panels")
    titled = comparison(image, [], answers)
    assert page.shape[0] > titled.shape[0]
    assert (page[:, -5:] == 255).all()
    assert (page[:, :5] == 255).all()


def test_saved_picture_reads_back(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    path = tmp_path / "new" / "picture.png"
    for expected in (image, 255 - image):
        save_png(path, expected)
        assert np.array_equal(cv2.imread(str(path))[..., ::-1], expected)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
