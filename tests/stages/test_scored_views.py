"""What is scored of a store of views: whole images where they can be, and images that are as they were embedded."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from sam_cache.config import EmbedConfig
from sam_cache.data import Geometry, MaskCrop, mask_to_rle, measure_rle, parse_prompts, parse_views
from sam_cache.data.synthetic import open_synthetic
from sam_cache.evaluation import ObjectScore, average_precision
from sam_cache.model import top_from_bytes
from sam_cache.stages import report
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.embed import embed
from sam_cache.stages.report import draw_answers, to_detection
from sam_cache.stages.scoring import Answer, ask
from sam_cache.store import EmbeddingStore
from sam_cache.types import ObjectRecord, Prompts

SCENES = 4
TINY = ("--dataset", "synthetic", "--model", "tiny", "--shard-rows", 4)
TRAIN = ("--prompts", "box", "--batch-size", 2, "--max-objects", 3, "--steps", 1, "--held-out", 0.3)
BOX = parse_prompts("box").kinds


@pytest.fixture(scope="module")
def stored(invoke, tmp_path_factory):
    """The same scenes as images and in tiles, and in tiles alone."""
    folder = tmp_path_factory.mktemp("stored")
    for name, views in (("both", "identity,tile:320:32"), ("tiles", "tile:320:32")):
        assert invoke("embed", *TINY, "--scenes", SCENES, "--store", folder / name, "--views", views) == 0
    return folder


def opened(path, **changes):
    return CachedData.open(path, **{"annotations": None, "partial": False, "held_out": 0.3, "seed": 0} | changes)


def ask_for_boxes(data):
    network = top_from_bytes(data.store.base).eval()
    for found in ask({"untouched": network}, data, data.rows.tolist(), BOX, 0, 16, torch.device("cpu")):
        yield from found["box"]


def true_detections(data):
    """What a network would answer that is always right."""
    answers = (replace(answer, masks={"untouched": answer.truth}) for answer in ask_for_boxes(data))
    return [to_detection(answer, "untouched") for answer in answers]


def copy(source, path, failing=(), leaving=()):
    """The same store of synthetic scenes, but with these rows failed and the shards of those not committed."""
    views = parse_views(source.spec.views)
    records = [view.record(record) for record in open_synthetic(SCENES).images for view in views.of(record)]
    store = EmbeddingStore.create_or_resume(
        path, source.spec, records, lambda records: source.objects(), source.base, {}, source.object_attributes()
    )
    reader, neck = source.reader(), torch.zeros(1, *source.spec.levels["neck"].shape, dtype=torch.float16)
    for shard in store.uncommitted():
        if set(shard.rows) & set(leaving):
            continue
        with store.writing(shard) as writer:
            for row in shard.rows:
                if row in failing:
                    writer.fail(row, "out of memory")
                else:
                    reader.read([row], {"neck": neck})
                    writer.append(row, {"neck": neck[0].numpy()}, source.content_hashes[row].decode())
    return path


@pytest.mark.parametrize("how", ["failing", "leaving"])
def test_an_image_with_a_tile_that_is_not_there_is_not_scored(stored, tmp_path, samcache, capsys, how):
    source = EmbeddingStore.open(stored / "tiles")
    row = int(np.flatnonzero(source.images.ids == 2)[1])
    path = copy(source, tmp_path / "s.zarr", **{how: [row]})
    (shard,) = [shard for shard in source.shards() if row in shard.rows]
    gone = [row] if how == "failing" else list(shard.rows)
    lacking = {int(source.images.ids[source.images.rows == each][0]) for each in gone}
    assert 2 in lacking
    assert len(lacking) < SCENES

    whole, data = opened(stored / "tiles"), opened(path, partial=how == "leaving")
    assert data.incomplete == len(lacking)
    assert {int(name.split()[0]) for name in data.names(data.rows)} == set(range(SCENES)) - lacking
    assert set(data.held_out.tolist()) == set(whole.held_out.tolist()) & set(data.rows.tolist())
    truth = {(entry["image_id"], entry["category_id"], entry["segmentation"]["counts"])
             for entry in data.ground_truth(data.rows)["annotations"]}  # fmt: skip
    assert truth == {(answer.scores["untouched"].image, answer.category, mask_to_rle(answer.whole(answer.truth)))
                     for answer in ask_for_boxes(data)}  # fmt: skip
    # What there is of the others is trained on.
    trained = set(data.names(data.trainable))
    assert trained == set(whole.names(whole.trainable)) - {
        name for name in whole.names(whole.trainable) if how == "leaving" and set(tiles_of(whole, name)) <= set(gone)
    }

    assert samcache("eval", "--store", path, "--rows", "all", "--prompts", "box", "--out", "e", "--overlays", 0,
                    *(["--partial"] if how == "leaving" else [])) == 0  # fmt: skip
    said = capsys.readouterr().err
    assert f"{path}: {len(lacking)} images are not scored, since a tile of each failed or is not embedded yet" in said
    found = json.loads((tmp_path / "e" / "report.json").read_text())
    assert found["rows"]["count"] == SCENES - len(lacking)
    assert found["view"] == "tile"
    if how == "failing":
        assert samcache("train-top", "--store", path, "--out", "run", *TRAIN) == 0
        assert "1 images are not scored" in capsys.readouterr().err


def tiles_of(data, name):
    images = data.store.images
    return images.rows[images.ids == int(name.split()[0])].tolist()


def test_a_store_without_whole_images_says_so(samcache, tmp_path, capsys):
    assert samcache("embed", *TINY, "--scenes", SCENES, "--store", "s.zarr", "--views", "lsj:2") == 0
    capsys.readouterr()
    warning = "s.zarr holds lsj:2 only: images are scored on their first view, lsj/0; embed identity too"
    assert samcache("train-top", "--store", "s.zarr", "--out", "run", *TRAIN) == 0
    assert warning in capsys.readouterr().err
    assert samcache("eval", "--store", "s.zarr", "--run", "run", "--prompts", "box", "--out", "e") == 0
    assert warning in capsys.readouterr().err
    for file in ("run/record.json", "e/report.json"):
        assert json.loads((tmp_path / file).read_text())["view"] == "lsj/0"
    assert samcache("train-top", "--store", "s.zarr", "--out", "all", *TRAIN[:-1], 0) == 0
    assert warning not in capsys.readouterr().err  # nothing is scored


def test_evaluations_of_a_training_look_at_the_view_they_are_told(stored, scenes, samcache, tmp_path, capsys):
    def recorded_view(out, *options):
        assert samcache("train-top", "--out", out, *TRAIN, *options) == 0
        return json.loads((tmp_path / out / "record.json").read_text())["view"]

    assert recorded_view("default", "--store", stored / "both") == "identity"
    assert recorded_view("told", "--store", stored / "both", "--view", "tile") == "tile"
    assert recorded_view("other", "--store", scenes, "--eval-store", stored / "both", "--view", "tile") == "tile"
    assert recorded_view("alone", "--store", scenes, "--eval-store", stored / "tiles") == "tile"
    assert "not scored" not in capsys.readouterr().err
    assert samcache("train-top", "--store", scenes, "--out", "refused", *TRAIN, "--view", "tile") == 1
    scores = [json.loads((tmp_path / out / "summary.json").read_text())["best"] for out in ("default", "told")]
    assert scores[0] != scores[1]


def test_right_answers_to_tiles_have_full_average_precision(stored):
    tiles, images = (opened(stored / "both", view=view) for view in ("tile", "identity"))
    detections = true_detections(tiles)
    for data in (tiles, images):
        found = average_precision(data.ground_truth(data.rows), detections)
        assert found["AP"] == pytest.approx(1)
        assert found["AR100"] == pytest.approx(1)
        half = average_precision(data.ground_truth(data.rows), detections[::2])
        assert half["AR100"] < 0.9


def test_a_crowd_that_tiles_cut_is_one_region_to_ignore(tmp_path):
    scenes = open_synthetic(2)
    plain, crowds = scenes.convert, []
    for record in scenes.images:
        mask = np.zeros((record.height, record.width), bool)
        mask[100:450, 50 : record.width - 50] = True
        crowds.append(mask)

    def convert(number):
        rle = mask_to_rle(crowds[number])
        box, area = measure_rle(rle, *crowds[number].shape)
        return [*plain(number)[0], ObjectRecord(number << 8 | 255, 1, rle, box, area, True)], []

    store = tmp_path / "s.zarr"
    assert embed(EmbedConfig(store=store, model="tiny", views="tile:320:32"), replace(scenes, convert=convert)) == 0
    data = opened(store)
    truth = data.ground_truth(data.rows)
    found = [entry for entry in truth["annotations"] if entry["iscrowd"]]
    assert [(entry["image_id"], entry["segmentation"]["counts"], entry["area"]) for entry in found] == [
        (number, mask_to_rle(mask), mask.sum()) for number, mask in enumerate(crowds)
    ]
    detections = true_detections(data)
    assert len(detections) == sum(len(plain(number)[0]) for number in range(2))  # crowds are not asked for
    noise = np.zeros_like(crowds[0])
    noise[200:400, 60:200] = True
    wrong = {"image_id": 0, "category_id": 1, "score": 2.0,
             "segmentation": {"size": list(noise.shape), "counts": mask_to_rle(noise)}}  # fmt: skip
    assert average_precision(truth, [*detections, wrong])["AP"] == pytest.approx(1)
    truth["annotations"] = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
    assert average_precision(truth, [*detections, wrong])["AP"] < 1


def test_an_image_that_has_grown_is_no_longer_that_of_its_tiles(samcache, tmp_path, capsys):
    """Its tiles have the same names and sizes, but the last of them lie elsewhere."""

    def write(name, heights):
        (tmp_path / "images").mkdir(exist_ok=True)
        images, objects = [], []
        for number, height in enumerate(heights):
            picture = np.random.default_rng(number).integers(0, 256, (height, 80, 3), np.uint8)
            cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), picture)
            images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": 80})
            objects.append({"id": number, "image_id": number, "category_id": 1, "iscrowd": 0,
                            "segmentation": [[5, 5, 50, 5, 50, 50, 5, 50]]})  # fmt: skip
        file = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
        (tmp_path / name).write_text(json.dumps(file))
        return ("embed", "--dataset", "coco", "--images", "images", "--annotations", name, "--model", "tiny",
                "--store", "s.zarr", "--views", "tile:32:8")  # fmt: skip

    assert samcache(*write("a.json", [60, 60])) == 0
    capsys.readouterr()
    assert samcache(*write("b.json", [60, 68])) == 1
    said = capsys.readouterr().err
    assert (
        "images[15] (transform of '1.png', tile/6, by the image's size): (1.0, 0.0, 0.0, 0.0, 1.0, -28.0) != " in said
    )
    assert "0.0, 1.0, -36.0) and 2 more; choose another --store" in said
    data = opened(tmp_path / "s.zarr", annotations=tmp_path / "b.json")
    assert "skipped: " in (said := capsys.readouterr().err)
    assert "1.png has another size than in" in said
    assert data.names(data.rows) == ["0 0.png"]
    assert len(opened(tmp_path / "s.zarr", annotations=tmp_path / "a.json").rows) == 2


def test_boxes_are_drawn_where_there_are_any(monkeypatch):
    """The parts of one answer may be asked for differently: a mask that cannot be drawn falls back to a box."""
    drawn = []
    monkeypatch.setattr(report, "draw_overlay", lambda *_, boxes_xyxy_image, **__: drawn.append(boxes_xyxy_image))
    boxes = torch.tensor([[0.0, 0, 0, 0], [1, 2, 5, 6]])

    def answer(has_box):
        prompts = Prompts(
            image_index=torch.arange(2),
            kind=torch.zeros(2, dtype=torch.long),
            points_xy_input=torch.zeros(0, 2),
            labels=torch.zeros(0, dtype=torch.long),
            offsets=torch.zeros(3, dtype=torch.long),
            boxes_xyxy_input=boxes,
            has_box=torch.tensor(has_box),
            has_mask=torch.zeros(2, dtype=torch.bool),
            chance=torch.zeros(2, 2),
        )
        mask = MaskCrop.of(np.eye(8, dtype=bool))
        score = ObjectScore("noise-mask", 0, 0, 8.0, 1.0, 1.0, 1.0, 1.0)
        return Answer(0, 1, Geometry(8, 8, 8), prompts, mask, {"untouched": mask}, {"untouched": score})

    image = np.zeros((8, 8, 3), np.uint8)
    draw_answers(image, [answer([False, True]), answer([False, False])])
    draw_answers(image, [answer([False, False])])
    assert drawn[0].tolist() == [[1, 2, 5, 6]]
    assert drawn[1] is None
