"""Several views of an image: each has a row, a name and a transform."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sam_cache.errors import StoreError
from sam_cache.store import OK, EmbeddingStore, StoreSpec, verify
from sam_cache.types import ImageRecord

MIRROR = (-1.0, 0.0, 40.0, 0.0, 1.0, 0.0)
TILE = (1.0, 0.0, -7.5, 0.0, 1.0, -3.0)
VIEWS = "identity,mirror,tile"


def records_with_views(kit, images: int) -> list[ImageRecord]:
    """Three views of every image."""
    return [
        view
        for image in kit.records(images)
        for view in (
            image,
            replace(image, view="mirror", transform=MIRROR),
            replace(image, view="tile", transform=TILE, height=20, width=25),
        )
    ]


def open_with_views(path, kit, images: int, records: list[ImageRecord] | None = None, **changes) -> EmbeddingStore:
    records = records_with_views(kit, images) if records is None else records
    spec = kit.spec(**{"views": VIEWS} | changes)
    return EmbeddingStore.create_or_resume(path, spec, records, kit.prepare, b"", {}, {})


def test_views_and_transforms_come_back(tmp_path, kit):
    kit.fill(open_with_views(tmp_path / "s", kit, 2))
    store = kit.fill(open_with_views(tmp_path / "s", kit, 3))
    images = store.images
    assert store.spec.views == VIEWS
    assert images.views.tolist() == ["identity", "mirror", "tile"] * 3
    assert images.ids.tolist() == [100] * 3 + [101] * 3 + [102] * 3
    assert images.heights.tolist() == [30, 30, 20, 31, 31, 20, 32, 32, 20]
    assert images.rows.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert images.transforms.dtype == np.float64
    assert images.transforms.shape == (9, 2, 3)
    # The upper left corner of an image 40 pixels wide is the upper right one of its mirror image.
    corner = np.array([0, 0, 1])
    assert (images.transforms @ corner).tolist() == [[0, 0], [40, 0], [-7.5, -3]] * 3
    assert (store.row_states[images.rows] == OK).all()
    assert verify(store).ok


def test_records_without_views_are_the_images_themselves(tmp_path, kit):
    images = kit.open(tmp_path / "s", kit.spec(), 2).images
    assert images.views.tolist() == ["identity"] * 2
    assert images.transforms.tolist() == [[[1, 0, 0], [0, 1, 0]]] * 2
    assert kit.open(tmp_path / "none", kit.spec(), 0).images.transforms.shape == (0, 2, 3)


def test_other_views_are_refused_with_both_values(tmp_path, kit):
    open_with_views(tmp_path / "s", kit, 2)
    with pytest.raises(StoreError) as error:
        open_with_views(tmp_path / "s", kit, 2, kit.records(2), views="identity")
    for part in (
        f"views: '{VIEWS}' != 'identity'",
        "images[1] (id, path, height, width, view): (100, 'folder/ö 0.jpg', 30, 40, 'mirror') != "
        "(101, 'folder/ö 1.jpg', 31, 40, 'identity')",
        "choose another --store",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)

    renamed = records_with_views(kit, 2)
    renamed[4] = replace(renamed[4], view="flip")
    with pytest.raises(StoreError, match=r"images\[4\] .* 'mirror'\) != .* 'flip'\); choose"):
        open_with_views(tmp_path / "s", kit, 2, renamed)


def test_a_tile_that_lies_elsewhere_is_refused(tmp_path, kit):
    """All else about it may be the same, where the image has become larger."""
    open_with_views(tmp_path / "s", kit, 2)
    moved = records_with_views(kit, 3)
    open_with_views(tmp_path / "s", kit, 3, moved)
    moved[5] = replace(moved[5], transform=(1.0, 0.0, -7.5, 0.0, 1.0, -4.0))
    with pytest.raises(StoreError) as error:
        open_with_views(tmp_path / "s", kit, 3, moved)
    assert (
        "images[5] (transform of 'folder/ö 1.jpg', tile, by the image's size): "
        f"{TILE} != (1.0, 0.0, -7.5, 0.0, 1.0, -4.0); choose another --store" in str(error.value)
    )
    assert "\n" not in str(error.value)


def test_a_store_from_before_there_were_views_opens_and_grows(tmp_path, kit, monkeypatch):
    to_json = StoreSpec.to_json
    with monkeypatch.context() as patch:
        patch.setattr(StoreSpec, "to_json", lambda spec: {k: v for k, v in to_json(spec).items() if k != "views"})
        kit.fill(kit.open(tmp_path / "s", kit.spec(), 5))
    identity = json.loads((tmp_path / "s/zarr.json").read_bytes())["attributes"]["samcache"]["identity"]
    assert identity.keys() == to_json(kit.spec()).keys() - {"views"}
    assert verify(tmp_path / "s").ok
    store = EmbeddingStore.open(tmp_path / "s")
    assert (store.spec, store.spec.views) == (kit.spec(), "identity")
    assert store.images.views.tolist() == ["identity"] * 5
    with pytest.raises(StoreError, match=f"views: 'identity' != '{VIEWS}'"):
        kit.open(tmp_path / "s", kit.spec(views=VIEWS), 5)
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(), 7))
    assert len(store.images) == 7
    assert verify(store).ok
