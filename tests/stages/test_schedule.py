"""How often images come up where they have several rows, and what there is no room for."""

from collections import namedtuple

import numpy as np
import pytest
import torch

from sam_cache.config import TrainTopConfig
from sam_cache.data import Views
from sam_cache.stages import embedding_store
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.schedule import choose_repeats, make_optimizer

EMBED = ("embed", "--dataset", "synthetic", "--scenes", 3, "--model", "tiny", "--shard-rows", 8)


def config(**changes):
    return TrainTopConfig(**{"store": "s", "out": "o", "sampling": "repeat-factor", "repeat_threshold": 0.05} | changes)


def test_the_fused_optimizer_is_the_plain_one():
    networks = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    fused, _ = make_optimizer(config(), networks[0], steps=3)
    group = fused.param_groups[0]
    plain = torch.optim.AdamW(networks[1].parameters(), group["lr"], weight_decay=group["weight_decay"], fused=False)
    assert group["fused"]
    for _ in range(3):
        for network, optimizer in zip(networks, (fused, plain), strict=True):
            optimizer.zero_grad()
            network(torch.arange(8.0).view(2, 4)).square().sum().backward()
            optimizer.step()
    for ours, theirs in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_share_of_images_counts_and_not_that_of_rows():
    """A category in a tenth of the images, in one of 16 tiles: a fiftieth of the rows or so."""
    alone = [np.array([1, 2])] * 20 + [np.array([1])] * 180
    names, tiled = [], []
    for number, found in enumerate(alone):
        names += [str(number)] * 17
        tiled += [found, found[1:]] + [np.array([1])] * 15
    plain = choose_repeats(config(), alone)
    assert plain.tolist() == [1.0] * 200
    assert choose_repeats(config(), tiled, names)[::17].tolist() == plain.tolist()
    assert choose_repeats(config(), tiled)[0] > 2  # as if every row were an image


@pytest.mark.parametrize("views", ["identity,hflip,tile:320:32", "identity,lsj:2"])
def test_repeat_factors_do_not_depend_on_the_views_stored(samcache, tmp_path, views):
    factors = {}
    for name, options in (("alone", ()), ("viewed", ("--views", views))):
        assert samcache(*EMBED, "--store", name, *options) == 0
        data = CachedData.open(tmp_path / name, annotations=None, partial=False, held_out=0, seed=0)
        found = choose_repeats(config(repeat_threshold=0.9), data.categories_of(data.train), data.names(data.train))
        identity = data.store.images.views[data.shows.entries(data.train)] == "identity"
        factors[name] = found[identity].tolist()
    assert factors["viewed"] == factors["alone"]
    assert max(factors["alone"]) > 1


Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(embedding_store.shutil, "disk_usage", lambda _: Usage(2**30, 0, 2**20))


def test_views_that_no_disk_holds_are_refused_before_they_are_listed(
    samcache, tmp_path, monkeypatch, capsys, full_disk
):
    monkeypatch.setattr(Views, "of", lambda *_: pytest.fail("listed"))
    assert samcache(*EMBED, "--store", "s", "--views", "tile:8:7") == 1
    said = capsys.readouterr().err
    assert "3 images in " in said
    assert "GiB but" in said
    assert "fewer --views" in said
    assert not (tmp_path / "s").exists()


def test_a_store_goes_on_where_the_disk_is_full_but_does_not_grow(samcache, capsys):
    assert samcache(*EMBED, "--store", "s") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_store.shutil, "disk_usage", lambda _: Usage(2**30, 2**30, 0))
        assert samcache(*EMBED, "--store", "s") == 0
        capsys.readouterr()
        assert samcache(*EMBED, "--store", "s", "--scenes", 4) == 1
    assert "GiB more but" in capsys.readouterr().err


def test_images_stored_twice_are_told(samcache, capsys):
    assert samcache(*EMBED, "--store", "a", "--views", "identity,tile:2048:64") == 0
    assert "3 images are no larger than a tile" in capsys.readouterr().err
    assert samcache(*EMBED, "--store", "b", "--views", "identity,tile:320:32") == 0
    assert "no larger than a tile" not in capsys.readouterr().err
