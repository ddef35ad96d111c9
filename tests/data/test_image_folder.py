import os

import numpy as np
import pytest
from PIL import Image

from sam_cache.data import decode, open_dataset, open_images
from sam_cache.errors import DatasetError, ImageError


def write_image(file, colour=(200, 100, 50)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), colour).save(file)


def paths_of(dataset):
    return [record.path for record in dataset.images]


def test_every_image_in_the_order_of_names(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/er/c.tif", "deep/a.webp", "Z.bmp"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "data.json").write_text("{}")
    dataset = open_images(tmp_path)
    assert paths_of(dataset) == ["Z.bmp", "a.jpg", "b.PNG", "deep/a.webp", "deep/er/c.tif"]
    assert len({record.id for record in dataset.images}) == 5
    assert (dataset.categories, dataset.notes, dataset.problems) == ({}, [], [])
    for number, record in enumerate(dataset.images):
        assert dataset.objects(number) == []
        assert decode(dataset.read(record), record).image.shape == (20, 30, 3)
    assert dataset.problems == []


def test_what_is_hidden_is_left_out(tmp_path):
    root = tmp_path / ".cache" / "pictures"  # that the folder itself is hidden does not matter
    for name in ("a.png", "._a.png", ".hidden.png", ".ipynb_checkpoints/a.png", "b/.thumbnails/deep/a.png"):
        write_image(root / name)
    assert paths_of(open_images(root)) == ["a.png"]


def test_ids_are_those_of_a_mask_folder_and_stay_when_files_are_added(tmp_path):
    write_image(tmp_path / "images/b/a.png")
    (tmp_path / "masks/b").mkdir(parents=True)
    Image.fromarray(np.eye(20, 30, dtype=np.uint8)).save(tmp_path / "masks/b/a.png")
    expected = open_dataset("masks", root=tmp_path).images[0].id
    assert [record.id for record in open_images(tmp_path / "images").images] == [expected]
    write_image(tmp_path / "images/a.png")
    assert open_images(tmp_path / "images").images[1].id == expected


def test_images_are_seen_as_they_are_displayed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 20), (9, 99, 199)).save(tmp_path / "a.jpg", exif=exif)
    dataset = open_images(tmp_path)
    assert decode(dataset.read(dataset.images[0]), dataset.images[0]).image.shape == (30, 20, 3)


def test_a_bad_image_fails_alone(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "c.png")
    dataset = open_images(tmp_path)
    assert paths_of(dataset) == ["a.png", "b.png", "c.png"]
    first, second, third = dataset.images
    assert decode(dataset.read(first), first).image.any()
    with pytest.raises(ImageError, match=r"b\.png: not an image"):
        decode(dataset.read(second), second)
    with pytest.raises(ImageError, match=r"c\.png: no such file"):
        dataset.read(third)


def test_the_folder_is_never_left(tmp_path):
    write_image(tmp_path / "outside/secret.png")
    root = tmp_path / "root"
    write_image(root / "a.png")
    (root / "b.png").symlink_to(tmp_path / "outside/secret.png")
    (root / "c.png").symlink_to(root / "a.png")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "round").symlink_to(root)
    dataset = open_images(root)
    assert paths_of(dataset) == ["a.png", "b.png", "c.png"]
    with pytest.raises(ImageError, match=r"'b\.png': leads outside"):
        dataset.read(dataset.images[1])
    assert dataset.read(dataset.images[2]) == (root / "a.png").read_bytes()


def test_a_folder_reached_by_a_link_is_read(tmp_path):
    write_image(tmp_path / "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    dataset = open_images(tmp_path / "link")
    assert dataset.read(dataset.images[0]) == (tmp_path / "real/a.png").read_bytes()


def test_no_folder_or_no_image(tmp_path):
    with pytest.raises(DatasetError, match="missing: no such folder; correct the path"):
        open_images(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DatasetError, match=r"notes\.txt: no such folder"):
        open_images(tmp_path / "notes.txt")
    with pytest.raises(DatasetError, match="no image in it.*give the folder"):
        open_images(tmp_path)


def test_real_cracks(real_data):
    root = real_data / "crackforest"
    plain = open_images(root / "image")
    masked = open_dataset("masks", images=root / "image", masks=root / "derived/masks_png")
    named = {record.path: record.id for record in plain.images}
    assert all(named[record.path] == record.id for record in masked.images)
    assert decode(plain.read(plain.images[0]), plain.images[0]).image.shape == (320, 480, 3)
