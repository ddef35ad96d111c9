import os

import pytest

from sam_cache.data.paths import read_inside
from sam_cache.errors import ImageError


@pytest.fixture
def root(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "inner" / "a.png").write_bytes(b"image")
    return root


@pytest.mark.parametrize("name", ["inner/a.png", "inner/../inner/a.png", "./inner//a.png"])
def test_reads_what_is_inside(root, name):
    assert read_inside(root, name) == b"image"


def test_follows_links_that_stay_inside(root):
    (root / "link.png").symlink_to(root / "inner" / "a.png")
    assert read_inside(root, "link.png") == b"image"


def test_the_root_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    assert read_inside(tmp_path / "alias", "inner/a.png") == b"image"


@pytest.mark.parametrize(
    "name", ["../secret.png", "inner/../../secret.png", "{outside}", "link.png", "folder/secret.png"]
)
def test_never_leaves_the_root(root, tmp_path, name):
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    with pytest.raises(ImageError, match="leads outside"):
        read_inside(root, name.format(outside=tmp_path / "secret.png"))


@pytest.mark.parametrize("name", ["missing.png", "inner", "", "a\0b.png", "x" * 5000, "circle"])
def test_what_is_no_file(root, name):
    (root / "circle").symlink_to(root / "circle")
    with pytest.raises(ImageError) as error:
        read_inside(root, name)
    assert "\n" not in str(error.value)


def test_a_pipe_is_not_waited_for(root):
    os.mkfifo(root / "pipe.png")
    with pytest.raises(ImageError, match="no such file"):
        read_inside(root, "pipe.png")
