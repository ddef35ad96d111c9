import copy

import pytest
import torch

from sam_cache.errors import CheckpointError, UsageError
from sam_cache.model import (
    SIZES,
    LoraKnobs,
    SamAdapterKnobs,
    SpatialPriorKnobs,
    adapter_parameters,
    attach,
    compare_with_upstream,
    fit_trained,
    fixed_weights,
    load_sam,
    official_state,
    write_state,
)
from sam_cache.model.encoder import fit_positions
from sam_cache.model.export import draw_image, load_upstream
from sam_cache.model.parts import outline, part_of

SIZE = SIZES["tiny"]


@pytest.fixture
def sam():
    """A network that is not the fixed one, and whose logits depend on every layer."""
    sam = load_sam("tiny")
    for parameter in sam.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return sam.eval()


@pytest.fixture
def with_lora(sam):
    attach(sam.image_encoder, LoraKnobs(rank=2, targets=("q", "v", "mlp")), seed=0)
    for name, parameter in adapter_parameters(sam.image_encoder).items():
        if "_up_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return sam


def test_untouched_weights_come_out_as_they_went_in():
    state = official_state(load_sam("tiny"))
    expected = fixed_weights(SIZE)
    assert list(state) == list(outline(SIZE).state_dict())
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_merging_leaves_the_network_alone(with_lora):
    before = copy.deepcopy(with_lora.state_dict())
    state = official_state(with_lora)
    after = with_lora.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(state[f"image_encoder.{key}"], after[f"image_encoder.vit.{key}"])
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in outline(SIZE).state_dict().items()
    }


@pytest.mark.parametrize("knobs", [SamAdapterKnobs(), SpatialPriorKnobs(channels=8)], ids=["sa", "spm"])
def test_an_adapter_that_looks_at_the_image_is_refused(sam, knobs):
    attach(sam.image_encoder, knobs, seed=0)
    with pytest.raises(UsageError, match="depends on the image"):
        official_state(sam)


@pytest.mark.parametrize("name", ["sam.pth", "sam.safetensors"])
def test_upstream_answers_from_the_file_as_the_unmerged_network_does(with_lora, tmp_path, name):
    write_state(tmp_path / name, official_state(with_lora))
    found = compare_with_upstream(with_lora, tmp_path / name)
    assert found.holds
    assert found.difference < 1e-4 * found.deviation


@pytest.mark.parametrize(
    "key",
    ["image_encoder.neck.0.weight", "prompt_encoder.point_embeddings.1.weight", "prompt_encoder.no_mask_embed.weight",
     "prompt_encoder.point_embeddings.2.weight", "mask_decoder.iou_prediction_head.layers.0.weight"],
)  # fmt: skip
def test_a_single_wrong_tensor_is_seen(sam, tmp_path, key):
    state = official_state(sam)
    write_state(tmp_path / "sam.pth", state | {key: state[key].flatten().roll(1).view_as(state[key])})
    assert not compare_with_upstream(sam, tmp_path / "sam.pth").holds


def test_large_scores_may_round_by_as_much_more(sam, tmp_path):
    sam.mask_decoder.iou_prediction_head.layers[-1].weight.data *= 1e6
    write_state(tmp_path / "sam.pth", official_state(sam))
    assert compare_with_upstream(sam, tmp_path / "sam.pth").holds


def test_an_update_that_was_not_merged_is_seen(with_lora, tmp_path):
    plain = {key.replace(".vit.", "."): value for key, value in with_lora.state_dict().items() if "low_rank" not in key}
    write_state(tmp_path / "sam.pth", plain)
    assert not compare_with_upstream(with_lora, tmp_path / "sam.pth").holds


def test_what_is_not_a_number_does_not_hold(sam, tmp_path):
    state = official_state(sam)
    write_state(tmp_path / "sam.pth", {key: torch.full_like(value, torch.nan) for key, value in state.items()})
    assert not compare_with_upstream(sam, tmp_path / "sam.pth").holds


def test_a_file_that_upstream_cannot_load_is_an_error(sam, tmp_path):
    state = official_state(sam)
    del state["mask_decoder.iou_token.weight"]
    write_state(tmp_path / "sam.pth", state)
    with pytest.raises(CheckpointError, match="iou_token"):
        load_upstream(SIZE, tmp_path / "sam.pth")


def test_the_file_holds_nothing_but_fp32_tensors_and_anyone_may_read_it(sam, tmp_path):
    state = official_state(sam.half())
    (tmp_path / "usual").touch()
    for name in ("sam.pth", "sam.safetensors"):
        write_state(tmp_path / name, state)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "usual").stat().st_mode
    loaded = torch.load(tmp_path / "sam.pth", weights_only=True)
    assert type(loaded) is dict
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert (tmp_path / "sam.pth").stat().st_size < 1.5 * sum(value.nbytes for value in loaded.values())


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\*\.pth or \*\.safetensors"):
        write_state(tmp_path / "sam.onnx", {})


def test_trained_tables_go_back_to_the_grid_they_came_from():
    """A table of 8 x 8 was trained at 4 x 4: it comes back smooth, and everything else as it was."""
    small = SIZE.at(64)
    expected = fixed_weights(SIZE)
    encoder = part_of(expected, "image_encoder")
    trained = {f"image_encoder.vit.{key}": value for key, value in fit_positions(encoder, small).items()}
    trained["mask_decoder.iou_token.weight"] = expected["mask_decoder.iou_token.weight"]
    fitted = fit_trained(trained, SIZE)
    shapes = {key: value.shape for key, value in encoder.items()}
    assert {key: value.shape for key, value in part_of(fitted, "image_encoder.vit").items()} == shapes
    changed = {key for key in fitted if fitted[key] is not trained[key]}
    assert changed == {f"image_encoder.vit.{key}" for key in
                       ("pos_embed", "blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w")}  # fmt: skip
    there = fit_positions(part_of(fitted, "image_encoder.vit"), small)["pos_embed"]
    assert torch.corrcoef(torch.stack([there.flatten(), trained["image_encoder.vit.pos_embed"].flatten()]))[0, 1] > 0.9


def test_nothing_is_stretched_where_no_table_was_trained_or_the_size_is_the_same():
    for weights in ({"image_encoder.vit.neck.0.weight": torch.zeros(1)}, {}):
        assert fit_trained(weights, SIZE) == weights
    state = {f"image_encoder.vit.{key}": value for key, value in part_of(fixed_weights(SIZE), "image_encoder").items()}
    assert all(value is state[key] for key, value in fit_trained(state, SIZE).items())


def test_the_image_fills_the_longest_side():
    image = draw_image(128)
    assert image.shape == (96, 128, 3)
    assert image.std() > 20
