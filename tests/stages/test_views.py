"""Several views of each image, from embed to evaluation, with the tiny model."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from sam_cache.batches import Order, read_rows
from sam_cache.batches.annotations import Sampling
from sam_cache.config import EmbedConfig
from sam_cache.data import decode, parse_prompts, parse_views, rle_to_mask
from sam_cache.data.synthetic import open_synthetic
from sam_cache.errors import StoreError
from sam_cache.evaluation import boundary_iou, mask_iou
from sam_cache.model import top_from_bytes
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.embed import embed
from sam_cache.stages.scoring import ask, predict_in_image
from sam_cache.store import FAILED, OK, EmbeddingStore
from sam_cache.training import RunFolder
from sam_cache.types import ImageRecord

SCENES = 5
TINY = ("--dataset", "synthetic", "--model", "tiny", "--shard-rows", 8)
VIEWS = "identity,hflip,lsj:2,tile:320:32"
TRAIN = ("--prompts", "box", "--batch-size", 2, "--max-objects", 3, "--warmup", 4, "--schedule", "step")


@pytest.fixture(scope="module")
def viewed(invoke, tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "viewed.zarr"
    assert invoke("embed", *TINY, "--scenes", SCENES, "--store", path, "--views", VIEWS) == 0
    return path


@pytest.fixture(scope="module")
def tiled(invoke, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiles") / "tiled.zarr"
    assert invoke("embed", *TINY, "--scenes", SCENES, "--store", path, "--views", "tile:320:32") == 0
    return path


def opened(path, **changes):
    return CachedData.open(path, **{"annotations": None, "partial": False, "held_out": 0.3, "seed": 0} | changes)


def neck(store, rows):
    reader = store.reader()
    out = {"neck": torch.zeros(len(rows), *store.spec.levels["neck"].shape, dtype=torch.float16)}
    reader.read(rows, out)
    return out["neck"]


def rows_of(store, kind):
    return [row for row, view in zip(store.images.rows.tolist(), store.images.views, strict=True)
            if view.partition("/")[0] == kind]  # fmt: skip


def by_entry(store):
    """The objects with the entries of their rows, and all their columns: growth leaves rows free."""
    entry_of = {row: entry for entry, row in enumerate(store.images.rows.tolist())}
    objects = store.objects()
    others = [[np.array(value).tolist() for value in objects[name]] for name in sorted(objects) if name != "row"]
    return list(zip([entry_of[row] for row in objects["row"].tolist()], *others, strict=True))


def in_dataset(images, number):
    return int(images.ids[np.flatnonzero(images.rows == number)[0]])


def test_rows_are_the_views_of_one_image_after_those_of_another(viewed):
    store = EmbeddingStore.open(viewed)
    assert store.spec.views == VIEWS
    records = [
        view.record(record) for record in open_synthetic(SCENES).images for view in parse_views(VIEWS).of(record)
    ]
    images = store.images
    assert images.views.tolist() == [record.view for record in records]
    assert images.ids.tolist() == [record.id for record in records]
    assert images.heights.tolist() == [record.height for record in records]
    assert images.transforms.reshape(-1, 6).tolist() == [list(record.transform) for record in records]
    assert (store.row_states[images.rows] == OK).all()


def test_the_image_itself_is_stored_as_if_it_were_alone(viewed, invoke, tmp_path):
    for name, arguments in (("default", ()), ("named", ("--views", "identity"))):
        assert invoke("embed", *TINY, "--scenes", SCENES, "--store", tmp_path / name, *arguments) == 0
    files = {
        name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*")
               if path.is_file()}
        for name in ("default", "named")
    }  # fmt: skip
    assert files["default"] == files["named"]
    assert len(files["default"]) > 30

    alone, store = EmbeddingStore.open(tmp_path / "default"), EmbeddingStore.open(viewed)
    rows = rows_of(store, "identity")
    assert torch.equal(neck(store, rows), neck(alone, list(range(SCENES))))
    objects, plain = store.objects(), alone.objects()
    ours = np.isin(objects["row"], rows)
    for name in plain.keys() - {"row"}:
        column = [objects[name][index] for index in np.flatnonzero(ours)]
        assert np.array_equal(np.array(column), np.array(list(plain[name])))
    assert "views" in store.object_attributes()
    assert "views" not in alone.object_attributes()


@pytest.mark.parametrize("kind", ["hflip", "lsj", "tile"])
def test_a_view_is_embedded_as_if_it_were_a_file_of_its_own(viewed, tmp_path, kind):
    store, scenes = EmbeddingStore.open(viewed), open_synthetic(SCENES)
    record = scenes.images[1]
    image = decode(scenes.read(record), record).image
    views = [view for view in parse_views(VIEWS).of(record) if view.kind == kind]
    shown = {number: np.ascontiguousarray(view.show(image)) for number, view in enumerate(views)}
    if kind == "hflip":
        assert np.array_equal(shown[0], image[:, ::-1])
    files = replace(
        scenes,
        images=[ImageRecord(number, f"{number}.png") for number in shown],
        read=lambda record: cv2.imencode(".png", shown[record.id][:, :, ::-1])[1].tobytes(),
        convert=lambda number: ([], []),
    )
    assert embed(EmbedConfig(store=tmp_path / "s.zarr", model="tiny"), files) == 0
    rows = [row for row in rows_of(store, kind) if in_dataset(store.images, row) == record.id]
    assert torch.equal(neck(store, rows), neck(EmbeddingStore.open(tmp_path / "s.zarr"), list(shown)))


def test_limit_growth_and_resuming_end_in_the_same_rows(viewed, samcache, tmp_path):
    command = ("embed", *TINY, "--store", "s.zarr", "--views", VIEWS)
    assert samcache(*command, "--scenes", 2) == 0
    assert samcache(*command, "--scenes", SCENES) == 0
    assert samcache(*command, "--scenes", SCENES, "--limit", 3) == 0
    grown, whole = EmbeddingStore.open(tmp_path / "s.zarr"), EmbeddingStore.open(viewed)
    assert grown.images.views.tolist() == whole.images.views.tolist()
    assert torch.equal(neck(grown, grown.images.rows.tolist()), neck(whole, whole.images.rows.tolist()))
    assert grown.object_attributes()["views"] == whole.object_attributes()["views"]
    assert by_entry(grown) == by_entry(whole)
    assert samcache("verify", "--store", "s.zarr") == 0
    assert samcache(*command[:-1], "identity,hflip", "--scenes", SCENES) == 1  # another identity


def test_embed_says_what_became_of_objects(samcache, capsys):
    assert samcache("embed", *TINY, "--scenes", 2, "--store", "s.zarr", "--views", "hflip,tile:320:32") == 0
    said = capsys.readouterr().err
    counts = EmbeddingStore.open("s.zarr").object_attributes()["views"]
    assert counts["tile"]["clipped"] > 0
    assert counts["hflip"]["dropped"] == counts["hflip"]["clipped"] == 0
    assert f"hflip: 2 rows with {counts['hflip']['objects']} objects, 0 of them cut off" in said
    assert f"{counts['tile']['clipped']} of them cut off at the border; {counts['tile']['dropped']} not in" in said
    assert "2 images in " in said
    assert samcache("embed", *TINY, "--scenes", 2, "--store", "t.zarr", "--views", "hflip,lsj:0") == 2


def test_all_views_of_a_bad_image_fail(samcache, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    images = [{"id": 5 - number, "file_name": name, "height": 60, "width": 80}
              for number, name in enumerate(("gone.png", "a.png"))]  # fmt: skip
    file = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "a.json").write_text(json.dumps(file))
    assert samcache("embed", "--dataset", "coco", "--images", "images", "--annotations", "a.json", "--model", "tiny",
                    "--store", "s.zarr", "--views", "tile:32:8,hflip,lsj:1", "--batch-size", 2) == 0  # fmt: skip
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    states = store.row_states[store.images.rows]
    assert len(states) == 2 * (1 + 1 + 3 * 3)
    assert (states[store.images.ids == 5] == FAILED).all()
    assert (states[store.images.ids == 4] == OK).all()
    assert len({message for _, message in store.failures()}) == 1


def test_an_epoch_looks_at_each_image_once(viewed):
    data = opened(viewed, held_out=0)
    views, ids = data.store.images.views, data.store.images.ids
    order = Order(data.train, 0, looks=data.looks(data.train))
    kinds = set()
    for epoch in range(30):
        rows = [visit.row for visit in order.epoch(epoch)]
        for image in range(SCENES):
            seen = sorted(row for row in rows if ids[row] == image)
            if len(seen) == 1:
                kinds.add(views[seen[0]])
            else:  # all of its tiles that hold an object
                assert seen == [row for row in data.train if ids[row] == image and views[row].startswith("tile/")]
                kinds.add("tile")
    assert kinds == {"identity", "hflip", "lsj/0", "lsj/1", "tile"}


def test_where_views_are_not_mixed_the_order_is_the_plain_one(viewed, tiled, scenes):
    for data in (opened(scenes), opened(tiled), opened(viewed, views="identity"), opened(viewed, views="tile:320:32")):
        assert data.looks(data.train) is None
    plain, chosen = opened(scenes, held_out=0), opened(viewed, held_out=0, views="identity")
    assert chosen.names(chosen.train) == plain.names(plain.train)[:SCENES]


def test_training_takes_the_views_it_is_told(viewed):
    views = EmbeddingStore.open(viewed).images.views
    for asked in ("lsj:1", "hflip,lsj:2", "identity,tile:320:32"):
        data = opened(viewed, views=asked)
        assert {views[row].partition("/")[0] for row in data.train} == {
            part.partition(":")[0] for part in asked.split(",")
        }
        assert {views[row] for row in data.held_out} == {"identity"}
    assert "lsj/1" not in {views[row] for row in opened(viewed, views="lsj:1").train}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("lsj:4", "not lsj:4; embed with --views identity,hflip,lsj:4,tile:320:32 into another store"),
        ("tile:64:8", "not tile:64:8; embed with --views identity,hflip,lsj:2,tile:64:8 into another store"),
    ],
)
def test_views_that_a_store_does_not_hold_are_refused(viewed, asked, named):
    with pytest.raises(StoreError, match=f"--views {asked}: .* holds {VIEWS}, {named}"):
        opened(viewed, views=asked)


def test_a_view_that_a_store_does_not_hold_cannot_be_evaluated(scenes, tiled):
    with pytest.raises(
        StoreError, match="--view tile: .* holds identity; leave it, or embed with --views identity,tile:"
    ):
        opened(scenes, view="tile")
    with pytest.raises(
        StoreError, match="--view identity: .* holds tile:320:32; leave it, .* identity,tile:320:32 into"
    ):
        opened(tiled, view="identity")


@pytest.mark.parametrize("view", ["identity", "tile"])
@pytest.mark.parametrize("seed", range(4))
def test_all_views_of_an_image_are_on_one_side(viewed, scenes, seed, view):
    """Also where so few images are held out that the nearest one is taken; the same as without other views."""
    for share in (0.01, 0.3):
        data = opened(viewed, seed=seed, held_out=share, view=view)
        trained, held = set(data.names(data.train)), data.names(data.held_out)
        assert held
        assert not trained & set(held)
        assert len(held) == len(set(held))
        assert trained | set(held) == set(data.names(data.rows))
        again = opened(viewed, seed=seed + 1, held_out=share, view=view).holding_out(sorted(trained), held)
        assert np.array_equal(again.train, data.train)
        assert np.array_equal(again.held_out, data.held_out)
        assert held == opened(viewed, seed=seed, held_out=share, views="hflip").names(data.held_out)


def test_two_steps_resumed_to_six_are_six(viewed, samcache, tmp_path):
    command = ("train-top", "--store", viewed, *TRAIN)
    assert samcache(*command, "--out", "straight", "--steps", 6) == 0
    assert samcache(*command, "--out", "parts", "--steps", 2) == 0
    assert samcache(*command, "--out", "parts", "--steps", 6, "--resume") == 0
    straight, parts = (RunFolder.open(tmp_path / name).load_weights("last") for name in ("straight", "parts"))
    assert straight.keys() == parts.keys()
    assert all(torch.equal(straight[name], parts[name]) for name in straight)
    assert samcache(*command, "--out", "parts", "--steps", 7, "--resume", "--views", "hflip") == 2


def test_annotations_of_another_file_are_carried_into_every_view(viewed, tmp_path):
    scenes = open_synthetic(SCENES)
    annotations = [
        {"id": found.id, "image_id": number, "category_id": found.category, "iscrowd": 0,
         "segmentation": {"size": [record.height, record.width], "counts": found.rle.decode()}}
        for number, record in enumerate(scenes.images) for found in scenes.objects(number)
    ]  # fmt: skip
    images = [{"id": record.id, "file_name": record.path, "height": record.height, "width": record.width}
              for record in scenes.images]  # fmt: skip
    images[2]["height"] += 1
    file = {"images": images, "annotations": annotations, "categories": scenes.list_categories()}
    (tmp_path / "a.json").write_text(json.dumps(file))
    data, stored = opened(viewed, annotations=tmp_path / "a.json"), opened(viewed)
    kept = [index for index, row in enumerate(stored.objects["row"].tolist()) if data.store.images.ids[row] != 2]
    assert len(data.objects["rle"]) == len(kept)
    for name in stored.objects:
        found = [stored.objects[name][index] for index in kept]
        assert np.array_equal(np.array(list(data.objects[name])), np.array(found)), name


def test_tiles_hold_whole_objects_between_them(viewed):
    data = opened(viewed, view="tile", held_out=0)
    scenes = open_synthetic(SCENES)
    truth = data.ground_truth(data.rows)
    assert [image["id"] for image in truth["images"]] == [record.id for record in scenes.images]
    assert [(image["height"], image["width"]) for image in truth["images"]] == [
        (record.height, record.width) for record in scenes.images
    ]
    found = {(entry["image_id"], entry["category_id"], entry["segmentation"]["counts"], *entry["bbox"], entry["area"])
             for entry in truth["annotations"]}  # fmt: skip
    assert found == {
        (number, thing.category, thing.rle, *thing.box_xywh_image, thing.area)
        for number in range(SCENES) for thing in scenes.objects(number)
    }  # fmt: skip
    assert len({entry["id"] for entry in truth["annotations"]}) == len(truth["annotations"])


def owners(starts, side, length):
    """Of each pixel of an axis the start of the tile whose border, where it is not the image's, is farther."""
    places = np.arange(length) + 0.5
    depths = []
    for start in starts:
        before = places - start if start else np.full(length, np.inf)
        after = start + side - places if start + side < length else np.full(length, np.inf)
        shown = (places > start) & (places < start + side)
        depths.append(np.where(shown, np.minimum(before, after), -1))
    last_of_the_best = len(starts) - 1 - np.argmax(np.array(depths)[::-1], axis=0)
    return np.array(starts)[last_of_the_best]


@pytest.mark.parametrize("prompts", ["box", "point+2-1"])
def test_answers_to_tiles_are_joined_as_by_hand(viewed, prompts):
    data = opened(viewed, view="tile", held_out=0)
    network, device = top_from_bytes(data.store.base).eval(), torch.device("cpu")
    (kind,) = parse_prompts(prompts).kinds
    scenes, images, objects = open_synthetic(SCENES), data.store.images, data.objects
    answered = list(ask({"untouched": network}, data, data.rows.tolist(), [kind], 3, 16, device))
    assert [answers[str(kind)][0].row for answers in answered] == data.rows.tolist()

    annotator = data.annotator(network.size.mask_size, Sampling(kind, 3, training=False))
    joined = 0
    for number, answers in enumerate(answered):
        size = scenes.images[number].height, scenes.images[number].width
        rows = [row for row in rows_of(data.store, "tile") if images.ids[row] == number]
        corners = {row: (-int(images.transforms[row, 1, 2]), -int(images.transforms[row, 0, 2])) for row in rows}
        owner = [
            owners(sorted({corner[axis] for corner in corners.values()}), 320, length)
            for axis, length in enumerate(size)
        ]
        masks = {thing.id: np.zeros(size, bool) for thing in scenes.objects(number)}
        predicted = {id: [] for id in masks}
        for batch in read_rows(data.store, annotator, rows):
            row = int(batch.rows[0])
            (down, right), geometry = corners[row], annotator.geometry(row)
            with torch.no_grad():
                shown, scores = predict_in_image(network, replace(batch, levels=network.encode(batch)), geometry)
            own = np.outer(owner[0] == down, owner[1] == right)
            for index, mask, score in zip(batch.objects.tolist(), shown, scores.tolist(), strict=True):
                id, whole = int(objects["id"][index]), np.zeros(size, bool)
                whole[down : down + geometry.height, right : right + geometry.width] = mask
                masks[id] |= whole & own
                truth = np.zeros(size, bool)
                truth[down : down + geometry.height, right : right + geometry.width] = rle_to_mask(
                    objects["rle"][index], geometry.height, geometry.width
                )
                predicted[id].append((score, (truth & own).sum()))
        found = {int(objects["id"][answer.scores["untouched"].object]): answer for answer in answers[str(kind)]}
        assert found.keys() == masks.keys()
        for thing in scenes.objects(number):
            answer, truth = found[thing.id], rle_to_mask(thing.rle, *size).astype(bool)
            score = answer.scores["untouched"]
            assert np.array_equal(answer.whole(answer.masks["untouched"]), masks[thing.id])
            assert np.array_equal(answer.whole(answer.truth), truth)
            assert (score.image, score.area, answer.category) == (number, thing.area, thing.category)
            assert score.iou == mask_iou(masks[thing.id], truth)
            assert score.boundary_iou == boundary_iou(masks[thing.id], truth)
            values, areas = np.array(predicted[thing.id]).T
            assert score.predicted_iou == pytest.approx((values * areas).sum() / areas.sum())
            assert len(answer.prompt) == len(predicted[thing.id])
            inside = answer.geometry.points_to_image(answer.prompt.points_xy_input.numpy())[answer.prompt.labels == 1]
            assert all(truth[y, x] for x, y in inside.round().astype(int))
            joined += len(predicted[thing.id]) > 1
    assert joined > 5


def test_train_and_evaluate_on_tiles_alone(tiled, samcache, tmp_path):
    command = ("train-top", "--store", tiled, "--out", "run", "--steps", 2, "--held-out", 0.3, *TRAIN)
    assert samcache(*command) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert len(record["trained"]) + len(record["held_out"]) == SCENES
    assert samcache("eval", "--store", tiled, "--run", "run", "--prompts", "box", "--json", "r.json", "--out", "e",
                    "--overlays", 1) == 0  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rows"]["images"] == record["held_out"]
    scenes = open_synthetic(SCENES)
    held = [int(name.split()[0]) for name in record["held_out"]]
    assert report["untouched"]["box"]["all"]["objects"] == sum(len(scenes.objects(number)) for number in held)
    assert list((tmp_path / "e" / "overlays").glob("*.png"))
    data = opened(tiled)
    assert len(data.held_out)
    for row in data.held_out:  # drawn on whole images
        record = scenes.images[in_dataset(data.store.images, row)]
        assert np.array_equal(data.picture(row), decode(scenes.read(record), record).image)
    assert samcache("train-top", "--store", tiled, "--out", "other", "--steps", 1, "--eval-store", tiled, *TRAIN) == 0
