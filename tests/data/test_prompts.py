import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import Transpose
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn.functional import interpolate

from sam_cache.data.decode import decode
from sam_cache.data.geometry import Geometry
from sam_cache.data.noise_masks import degrade_mask
from sam_cache.data.pixels import to_pixels
from sam_cache.data.points import deterministic_points
from sam_cache.data.prompts import KINDS, PromptChoice, parse_prompts, sample_prompts
from sam_cache.data.rle import mask_to_rle, measure_rle
from sam_cache.data.runs import ColumnRuns, column_runs
from sam_cache.data.streams import KeyedStreams, doubles_of, floats_of, keyed_generator
from sam_cache.data.targets import coverage
from sam_cache.errors import UsageError
from sam_cache.types import ImageRecord

INPUT = 256
CELLS = 64  # of the decoder's output
POINT_KINDS = ["centroid", "bbox-center", "interior", "point", "point+4"]
# EXIF orientation -> how a camera stores what is displayed upright
STORED = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_270,
}  # fmt: skip


def object_columns(masks, ids):
    rles = [mask_to_rle(mask) for mask in masks]
    points = [deterministic_points(rle, *mask.shape) for rle, mask in zip(rles, masks, strict=True)]
    boxes = [measure_rle(rle, *mask.shape)[0] for rle, mask in zip(rles, masks, strict=True)]
    names = ("centroid_xy_image", "bbox_center_xy_image", "interior_xy_image")
    return {
        "id": np.array(ids, np.int64),
        "box_xywh_image": np.array(boxes, np.float64).reshape(-1, 4),
        **{name: np.array([getattr(p, name) for p in points], np.float64).reshape(-1, 2) for name in names},
    }


def ask(text, masks, geometry=None, *, ids=None, image_id=1, seed=0, epoch=0, training=False):
    """Prompts for masks that are all of one image."""
    columns = object_columns(masks, ids or range(len(masks)))
    geometry = geometry or Geometry(*masks[0].shape, INPUT)
    return sample_prompts(
        parse_prompts(text), columns, [0] * len(masks), [image_id], [geometry],
        lambda p: runs_of(masks[p]), lambda p: cover(masks[p], geometry),
        seed=seed, epochs=[epoch], training=training,
    )  # fmt: skip


def runs_of(mask):
    return column_runs([mask_to_rle(mask)], *mask.shape)


def cover(mask, geometry):
    return coverage(mask_to_rle(mask), geometry, CELLS)


def blob(height, width, seed=0):
    """A bent, hollow, one-sided shape somewhere in the image, never empty."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    cy, cx = (random.uniform(0.2, 0.8) * side for side in (height, width))
    radius = np.hypot((y - cy) / height, (x - cx) / width)
    mask = (radius < 0.3) & (radius > 0.1) & ((x < cx) | (y < cy))
    mask[int(cy) // 2, int(cx)] = True
    return mask


def same(one, other):
    if (one.masks is None) != (other.masks is None) or (one.masks is not None and not one.masks.equal(other.masks)):
        return False
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one) if name != "masks")


@given(
    st.sampled_from(POINT_KINDS),
    st.integers(4, 255),
    st.integers(4, 255),
    st.sampled_from([32, 128, 512]),
    st.sampled_from(["longest", "squash"]),
    st.integers(1, 8),
    st.integers(0, 99),
)
def test_points_hit_their_own_pixel_in_the_input(kind, height, width, size, fit, orientation, seed):
    """From a file with an EXIF orientation to the encoder's pixels: each pixel says in its colour where it is."""
    mask = blob(height, width, seed)
    rows, columns = np.mgrid[:height, :width]
    shown = Image.fromarray(np.stack([columns, rows, 255 * mask], axis=2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    (shown.transpose(STORED[orientation]) if orientation > 1 else shown).save(file, "PNG", exif=exif)
    image = decode(file.getvalue(), ImageRecord(1, "turned.png", height, width)).image

    geometry = Geometry(*image.shape[:2], size, fit)
    pixels = to_pixels(image, geometry)
    inside = coverage(mask_to_rle(mask), geometry, size)
    prompts = ask(kind, [mask], geometry, seed=seed)
    assert prompts.labels.all()
    for x, y in prompts.points_xy_input.double().tolist():
        column, row = int(x + 1e-4), int(y + 1e-4)  # coordinates are float32: 3 may come as 2.9999998
        assert inside[row, column] > 1e-6
        back_x, back_y = geometry.points_to_image(np.array([x, y]))
        assert mask[round(back_y), round(back_x)]
        # Half an input pixel and half an image pixel between corners and centres, and the rounding of colours.
        assert abs(int(pixels[row, column, 0]) - back_x) <= 0.5 + 0.5 / geometry.scale_x + 0.51
        assert abs(int(pixels[row, column, 1]) - back_y) <= 0.5 + 0.5 / geometry.scale_y + 0.51


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["longest", "squash"]), st.integers(0, 99))
def test_boxes_enclose_their_object_tightly_in_the_input(height, width, fit, seed):
    mask, geometry = blob(height, width, seed), Geometry(height, width, INPUT, fit)
    prompts = ask("box", [mask], geometry, seed=seed)
    x0, y0, x1, y1 = prompts.boxes_xyxy_input[0].tolist()
    rows, columns = np.nonzero(coverage(mask_to_rle(mask), geometry, INPUT) > 1e-6)
    assert prompts.has_box.all()
    assert np.array([columns.min(), rows.min()]) == pytest.approx(np.floor(np.array([x0, y0]) + 1e-3))
    assert np.array([columns.max(), rows.max()]) + 1 == pytest.approx(np.ceil(np.array([x1, y1]) - 1e-3))


def test_coordinates_are_what_sam_predictor_makes_of_them():
    mask = blob(333, 500)
    upstream, columns = ResizeLongestSide(INPUT), object_columns([mask], [0])
    for kind in ("centroid", "bbox-center", "interior"):
        point = columns[kind.replace("-", "_") + "_xy_image"]
        expected = torch.as_tensor(upstream.apply_coords(point, mask.shape), dtype=torch.float)
        assert torch.equal(ask(kind, [mask]).points_xy_input, expected)
    x, y, w, h = columns["box_xywh_image"][0]
    expected = torch.as_tensor(upstream.apply_boxes(np.array([x, y, x + w, y + h]), mask.shape), dtype=torch.float)
    assert torch.equal(ask("box", [mask]).boxes_xyxy_input, expected)


def test_a_batch_is_its_objects_one_by_one():
    """Chance belongs to the object: neither its place in the batch nor its company matters."""
    geometries, image_ids = [Geometry(60, 80, INPUT), Geometry(90, 40, INPUT)], [7, 2**63 - 1]
    image_index = [1, 0, 0, 1, 0, 1, 1, 0] * 4
    sizes = [(geometries[image].height, geometries[image].width) for image in image_index]
    masks = [blob(*size, seed) for seed, size in enumerate(sizes)]
    columns = object_columns(masks, range(len(masks)))
    runs = [runs_of(mask) for mask in masks]
    covered = [cover(mask, geometries[image]) for mask, image in zip(masks, image_index, strict=True)]
    kinds = ("box", "point", "interior", "none", "noise-mask")
    mixture = parse_prompts(",".join(("point+3-2", *kinds)))
    key, epochs = {"seed": 3, "training": True}, [5, 6 | 2 << 32]
    together = sample_prompts(
        mixture,
        columns,
        image_index,
        image_ids,
        geometries,
        runs.__getitem__,
        covered.__getitem__,
        epochs=epochs,
        **key,
    )
    assert set(together.kind.tolist()) == {KINDS.index(kind) for kind in kinds}
    assert torch.equal(together.has_mask, together.kind == KINDS.index("noise-mask"))
    assert not together.masks[~together.has_mask].any()
    for p, image in enumerate(image_index):
        row = {name: column[p : p + 1] for name, column in columns.items()}
        alone = sample_prompts(
            mixture, row, [0], [image_ids[image]], [geometries[image]],
            lambda _, p=p: runs[p], lambda _, p=p: covered[p], epochs=[epochs[image]], **key,
        )  # fmt: skip
        expected = together.select(torch.tensor([p]))
        if not expected.has_mask:
            expected = replace(expected, masks=None)
        assert expected.image_index.item() == image
        expected.image_index.zero_()
        assert same(alone, expected)


def ask_plainly(mixture, column, mask, geometry, key, training):
    """One prompt, drawn step by step from a generator of its own: kind, points, labels, box, mask, chance."""
    random = keyed_generator(*key)
    weights = np.cumsum([choice.weight for choice in mixture.choices])
    choice = mixture.choices[int((random.random() * weights[-1] >= weights).sum())]
    kind, points, labels, box, noisy = choice.kind, np.zeros((0, 2)), [], np.zeros(4), None
    if kind == "noise-mask" and (noisy := degrade_mask(cover(mask, geometry), random)) is None:
        kind = "box"
    if kind == "box":
        x, y, w, h = column["box_xywh_image"]
        box = geometry.boxes_to_input(np.array([x, y, x + w, y + h]))
        if training:
            sides = np.tile(box[2:] - box[:2], 2)
            size = (geometry.content_width, geometry.content_height)
            box = (box + random.uniform(-1, 1, 4) * np.minimum(0.1 * sides, 20)).clip(0, size + size)
    elif kind == "point":
        y, x = np.nonzero(mask)
        chosen = random.choice(np.arange(len(y)), min(choice.foreground, len(y)), replace=False)
        points, labels = np.stack([x, y], axis=1)[chosen], [1] * len(chosen)
        if choice.background:
            box_x, box_y, w, h = column["box_xywh_image"].astype(int)
            near = np.zeros_like(mask)
            across, down = max(1, int(0.1 * w)), max(1, int(0.1 * h))
            near[max(0, box_y - down) : box_y + h + down, max(0, box_x - across) : box_x + w + across] = True
            y, x = np.nonzero(near & ~mask)
            if len(y) < choice.background:
                y, x = np.nonzero(~mask)
            chosen = random.choice(np.arange(len(y)), min(choice.background, len(y)), replace=False)
            points = np.concatenate([points, np.stack([x, y], axis=1)[chosen]])
            labels += [0] * len(chosen)
        points = geometry.points_to_input(points)
    elif kind != "none" and kind != "noise-mask":
        points, labels = geometry.points_to_input(column[kind.replace("-", "_") + "_xy_image"])[None], [1]
    return kind, points.astype(np.float32), labels, box.astype(np.float32), noisy, random.random(2, np.float32)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("text", ["box", "point,box", "point+5-3:2,noise-mask,none,centroid,bbox-center,interior,box"])
def test_prompts_drawn_together_are_those_drawn_step_by_step_bit_for_bit(text, training):
    """The plain way to draw a prompt is what it has been since the first version; runs go on with the same prompts."""
    mixture, geometry = parse_prompts(text), Geometry(90, 70, INPUT)
    masks = [blob(90, 70, seed) for seed in range(60)]
    masks[7] = np.arange(90 * 70).reshape(90, 70) == 3000  # fewer pixels than points
    masks[11] = ~masks[7]  # nearly nothing outside
    ids, columns = [5 * place - 7 for place in range(60)], object_columns(masks, range(60))
    found = ask(text, masks, geometry, ids=ids, image_id=-3, seed=2**63, epoch=9 | 1 << 32, training=training)
    for p, mask in enumerate(masks):
        column = {name: values[p] for name, values in columns.items()}
        key = (2**63, 9 | 1 << 32, -3, ids[p])
        kind, points, labels, box, noisy, chance = ask_plainly(mixture, column, mask, geometry, key, training)
        of_prompt = slice(*found.offsets[p : p + 2].tolist())
        assert KINDS[found.kind[p]] == kind
        assert np.array_equal(found.points_xy_input[of_prompt].numpy(), points)
        assert found.labels[of_prompt].tolist() == labels
        assert np.array_equal(found.boxes_xyxy_input[p].numpy(), box)
        assert found.has_mask[p] == (noisy is not None)
        assert noisy is None or np.array_equal(found.masks[p].numpy(), noisy)
        assert np.array_equal(found.chance[p].numpy(), chance)


@given(st.tuples(*[st.integers(-(2**63), 2**64 - 1)] * 4))
def test_a_stream_is_that_of_a_generator_of_its_own(key):
    seed, epoch, image, each = key
    streams = KeyedStreams(seed)
    streams.at(1, 2, 3).random(5, np.float32)  # leaves half a word behind
    words = streams.words(image, epoch, each, 4)
    plain = keyed_generator(*key)
    assert doubles_of(words[:2]).tolist() == plain.random(2).tolist()
    assert np.array_equal(floats_of(words[2:]).ravel(), plain.random(4, np.float32))
    again = streams.at(image, epoch, each)
    assert (
        again.choice(1000, 7, replace=False).tolist() == keyed_generator(*key).choice(1000, 7, replace=False).tolist()
    )


@pytest.mark.parametrize("kind", ["point+3", "noise-mask"])
@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"image_id": 2}, {"ids": [1]}])
def test_every_part_of_the_key_counts(kind, change):
    mask = blob(60, 80)
    asked, changed = ask(kind, [mask]), ask(kind, [mask], **change)
    assert same(asked, ask(kind, [mask]))
    assert not same(asked, replace(changed, chance=asked.chance))


def test_keys_of_any_sign_and_size_are_different_streams():
    keys = [(0, 0, 0, 0), (-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, 0, -1), (2**64 - 2, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({keyed_generator(*key).random() for key in keys}) == len(keys)


def test_kinds_are_drawn_by_weight():
    prompts = ask("box:3,centroid", [np.ones((4, 4), bool)] * 1000)
    assert (prompts.kind == KINDS.index("box")).float().mean().item() == pytest.approx(0.75, abs=0.04)


def test_points_are_uniform_in_the_mask():
    mask = np.zeros((5, 9), bool)
    mask[1:3, 2:7] = True
    prompts = ask("point", [mask] * 1000, Geometry(5, 9, 9))
    pixels, counts = prompts.points_xy_input.int().unique(dim=0, return_counts=True)
    assert {(x, y) for x, y in pixels.tolist()} == {(x, y) for y in (1, 2) for x in range(2, 7)}
    assert counts.min() > 65
    assert counts.max() < 135


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
def test_foreground_and_background_points_are_different_pixels_of_the_right_side(foreground, background, seed):
    mask = blob(12, 10, seed)
    geometry = Geometry(12, 10, 12)
    prompts = ask(f"point+{foreground}-{background}", [mask], geometry, seed=seed)
    x, y = prompts.points_xy_input.int().T.numpy()
    labels = prompts.labels.numpy()
    assert np.array_equal(mask[y, x], labels == 1)
    assert len(set(zip(x, y, strict=True))) == len(labels)
    assert np.sum(labels == 1) == min(foreground, mask.sum())
    assert np.sum(labels == 0) == background


def test_background_points_are_near_the_object():
    mask = np.zeros((100, 100), bool)
    mask[40:60, 30:60] = True
    points = ask("point+1-20", [mask] * 5, Geometry(100, 100, 100)).points_xy_input
    assert (points >= torch.tensor([27, 38])).all()
    assert (points < torch.tensor([63, 62])).all()


def test_background_points_come_from_anywhere_when_there_are_few_nearby():
    mask = np.zeros((40, 40), bool)
    mask[:, :20] = True  # enlarged by 10%, 80 pixels beside it
    prompts = ask("point+1-100", [mask], Geometry(40, 40, 40))
    assert (prompts.labels == 0).sum() == 100
    assert prompts.points_xy_input[1:, 0].max() >= 22


def test_a_mask_that_fills_the_image_has_no_background_and_a_small_one_few_points():
    assert ask("point+9-3", [np.ones((2, 3), bool)]).labels.tolist() == [1] * 6


def test_an_object_of_few_pixels_gets_as_many_points_and_no_other_object_fewer():
    """HQ-SAM's 10 points: there, one object of fewer pixels takes the kind from its whole batch."""
    sizes = [400, 3, 10, 1, 9, 25]
    masks = [np.arange(400).reshape(20, 20) < size for size in sizes]
    prompts = ask("point+10", masks, training=True)
    assert prompts.offsets.diff().tolist() == [10, 3, 10, 1, 9, 10]
    assert prompts.labels.all()
    assert (prompts.kind == KINDS.index("point")).all()
    for p in (1, 3, 4):
        alone = ask("point+10", masks[p : p + 1], ids=[p], training=True)
        assert same(replace(prompts.select(torch.tensor([p])), image_index=alone.image_index), alone)
        assert len(alone.points_xy_input.unique(dim=0)) == sizes[p]


@pytest.mark.parametrize("training", [False, True])
def test_noise_masks_are_those_of_hq_sam_as_logits(training):
    masks, geometry = [blob(200, 300, seed) for seed in range(3)], Geometry(200, 300, INPUT)
    prompts = ask("noise-mask", masks, geometry, seed=4, epoch=2, image_id=7, training=training)
    assert prompts.has_mask.all()
    assert not prompts.has_box.any()
    assert not prompts.ambiguous.any()
    assert len(prompts.labels) == 0
    for p, mask in enumerate(masks):
        label = torch.from_numpy(cover(mask, geometry))[None, None]
        random = keyed_generator(4, 2, 7, p)
        random.random()  # the kind
        noise = torch.from_numpy(random.standard_normal((CELLS, CELLS), np.float32))
        small = interpolate(label, (CELLS // 8, CELLS // 8), mode="bilinear")
        residue = (label - interpolate(small, (CELLS, CELLS), mode="bilinear")).abs() >= 0.01
        degraded = (label + noise * residue.float() > 0.5).float()
        assert torch.equal(prompts.masks[p], degraded[0, 0] * 20 - 10)
        assert prompts.chance[p].tolist() == random.random(2, np.float32).tolist()


def test_a_noise_mask_is_wrong_near_the_outline_only():
    mask, geometry = np.zeros((256, 256), bool), Geometry(256, 256, INPUT)
    mask[64:192, 64:192] = True
    wrong = np.mean(
        [(ask("noise-mask", [mask], geometry, epoch=epoch).masks[0] > 0).numpy() != (cover(mask, geometry) > 0.5)
         for epoch in range(200)], axis=0,
    )  # fmt: skip
    near = np.zeros((CELLS, CELLS), bool)
    near[8:56, 8:56] = True
    near[24:40, 24:40] = False
    assert not wrong[~near].any()
    # Half a standard deviation from 0.5: P(N > 0.5) = 0.309 on either side of the outline.
    assert wrong[near][wrong[near] > 0].mean() == pytest.approx(0.309, abs=0.01)


def test_an_object_too_small_for_a_noise_mask_is_asked_for_by_its_box_alone():
    large, small = blob(2048, 2048), np.zeros((2048, 2048), bool)
    small[1000, 700] = True  # seven pixels: less than a hundredth of a cell, which is no outline
    small[1003:1005, 700:703] = True
    masks, geometry = [large, small, large], Geometry(2048, 2048, 1024)
    prompts = ask("noise-mask", masks, geometry)
    assert [KINDS[kind] for kind in prompts.kind] == ["noise-mask", "box", "noise-mask"]
    assert prompts.has_mask.tolist() == [True, False, True]
    assert prompts.has_box.tolist() == [False, True, False]
    assert prompts.boxes_xyxy_input[1].tolist() == [350, 500, 351.5, 502.5]
    noisy = ask("noise-mask", masks, geometry, training=True)
    assert torch.equal(noisy.masks, prompts.masks)
    moved = (noisy.boxes_xyxy_input[1] - prompts.boxes_xyxy_input[1]).abs()
    assert moved.gt(0).all()
    assert moved.le(0.1 * torch.tensor([1.5, 2.5, 1.5, 2.5]) + 1e-4).all()
    alone = ask("noise-mask", [small], geometry, ids=[1])
    assert alone.masks is None
    assert torch.equal(alone.boxes_xyxy_input[0], prompts.boxes_xyxy_input[1])


def test_box_noise_is_small_inside_the_image_and_only_in_training():
    masks = [blob(600, 800, seed) for seed in range(20)]
    geometry = Geometry(600, 800, 1024)
    tight, noisy = (ask("box", masks, geometry, training=training).boxes_xyxy_input for training in (False, True))
    sides = (tight[:, 2:] - tight[:, :2]).repeat(1, 2)
    moved = (noisy - tight).abs()
    assert (moved <= (0.1 * sides).clamp(max=20) + 1e-3).all()
    assert moved.max() > 15
    first, second = (ask("box", masks, geometry, epoch=epoch) for epoch in (0, 1))
    assert torch.equal(first.boxes_xyxy_input, second.boxes_xyxy_input)
    assert not torch.equal(first.chance, second.chance)  # what comes later than the prompt does vary


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(["longest", "squash"]), st.integers(0, 9))
def test_noisy_boxes_stay_boxes_within_the_image(height, width, fit, seed):
    corner, whole = np.zeros((height, width), bool), np.ones((height, width), bool)
    corner[-1, -1] = True
    geometry = Geometry(height, width, INPUT, fit)
    boxes = ask("box", [corner, whole], geometry, seed=seed, training=True).boxes_xyxy_input
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.min() >= 0
    assert (boxes <= torch.tensor([geometry.content_width, geometry.content_height]).repeat(2)).all()


def test_none_says_nothing_and_only_points_and_masks_look_at_the_mask():
    def no_runs(p: int) -> ColumnRuns:
        raise AssertionError("the mask is not needed")

    def no_coverage(p: int) -> np.ndarray:
        raise AssertionError("its coverage is not needed")

    mask, geometry = blob(40, 50), Geometry(40, 50, INPUT)
    for kind in KINDS:
        asked_of = runs_of if kind == "point" else no_runs
        coverage_of = (lambda _: cover(mask, geometry)) if kind == "noise-mask" else no_coverage
        prompts = sample_prompts(
            parse_prompts(kind), object_columns([mask], [0]), [0], [1], [geometry],
            lambda _, asked_of=asked_of: asked_of(mask), coverage_of, seed=0, epochs=[0], training=True,
        )  # fmt: skip
        assert prompts.kind.tolist() == [KINDS.index(kind)]
        assert len(prompts.labels) == (kind not in ("box", "none", "noise-mask"))
        assert prompts.has_box.tolist() == [kind == "box"]
        assert prompts.has_mask.tolist() == [kind == "noise-mask"]
        assert (prompts.masks is not None) == (kind == "noise-mask")


def test_no_objects_are_no_prompts():
    prompts = sample_prompts(
        parse_prompts("box,point"), object_columns([], []), [], [], [], None, None, seed=0, epochs=[], training=True
    )
    assert len(prompts) == 0
    assert prompts.offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("box", [PromptChoice("box")]),
        ("box:2,centroid", [PromptChoice("box", 2), PromptChoice("centroid")]),
        ("point+3-1:.5, bbox-center", [PromptChoice("point", 0.5, 3, 1), PromptChoice("bbox-center")]),
        ("noise-mask,box:3", [PromptChoice("noise-mask"), PromptChoice("box", 3)]),
        ("point-2,none,interior", [PromptChoice("point", 1, 1, 2), PromptChoice("none"), PromptChoice("interior")]),
    ],
)
def test_parsing(text, choices):
    mixture = parse_prompts(text)
    assert list(mixture.choices) == choices
    assert parse_prompts(str(mixture)) == mixture
    assert [kind.choices[0].weight for kind in mixture.kinds] == [1] * len(choices)
    assert [str(kind) for kind in mixture.kinds] == [part.strip().split(":")[0] for part in text.split(",")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("boxes", "did you mean box[?]"),
        ("bbox_center", "did you mean bbox-center[?]"),
        ("box,Centroid", "prompt 'Centroid': .*did you mean centroid[?]"),
        ("", "unknown kind"),
        ("box,,point", "prompt '': unknown kind"),
        ("points+3", "did you mean point[?]"),
        ("box:heavy", "write KIND or KIND:WEIGHT"),
        ("point(3)", "did you mean point[?]"),
        ("point+", "write KIND or KIND:WEIGHT"),
        ("box+2", "write box"),
        ("box:0", "above 0"),
        ("noise_mask", "did you mean noise-mask[?]"),
        ("noise-mask-1", "write noise-mask"),
        ("point+0-1", "above 0"),
    ],
)
def test_what_is_not_a_prompt_is_a_usage_error_of_one_line(text, says):
    with pytest.raises(UsageError, match=says) as error:
        parse_prompts(text)
    assert "\n" not in str(error.value)
