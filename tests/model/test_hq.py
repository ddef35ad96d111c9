"""HQ-SAM's head against the package segment_anything_hq, on the same weights."""

from dataclasses import replace

import pytest
import torch

from sam_cache.errors import CheckpointError
from sam_cache.model import (
    SIZES,
    add_head,
    fixed_weights,
    freeze,
    load_encoder,
    load_sam,
    load_top,
    state_digest,
    top_from_bytes,
    top_to_bytes,
)
from sam_cache.model import export as exports
from sam_cache.model.checkpoints import read_checkpoint
from sam_cache.model.export import compare_with_upstream, load_upstream, official_state, write_state
from sam_cache.model.parts import HQ_HEAD, is_of_hq_head, outline
from sam_cache.model.weights import fresh_head

SIZE = SIZES["tiny"]
# Several images with several prompts each, one image without; among them prompts of too many tokens for
# the absorbed projections.
SPECS = [(2, 1, False), (0, 1, False), (2, 0, True), (2, 2, True), (0, 0, False), (3, 9, False), (2, 1, False)]


@pytest.fixture
def top(redraw):
    """Redrawn, and so large that every layer counts."""
    top = add_head(load_top("tiny"), "hq", seed=0)
    redraw(top, seed=1)
    for parameter in top.parameters():
        parameter.data *= 3
    return top


@pytest.fixture
def levels():
    """Of four images."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"neck": SIZE.neck_channels, "early": SIZE.width}
    return {name: torch.randn(4, C, SIZE.grid, SIZE.grid, generator=generator) for name, C in shapes.items()}


@pytest.fixture
def prompts(make_prompts):
    return make_prompts(SPECS, SIZE.input_size)


@pytest.fixture
def ask_upstream(top):
    """The package's own decoder on the same weights: one image per call, with as many prompts as have equal tokens."""
    package = exports.import_upstream(hq=True)
    decoder = exports._build_upstream(package, SIZE, hq=True).mask_decoder
    decoder.load_state_dict(top.mask_decoder.state_dict())

    def ask(levels, prompts, multimask):
        logits, scores = [], []
        for p in range(len(prompts)):
            prompt = prompts.select(torch.tensor([p]))
            sparse, dense = top.prompt_encoder(
                points=(prompt.points_xy_input[None], prompt.labels[None]) if len(prompt.labels) else None,
                boxes=prompt.boxes_xyxy_input if prompt.has_box[0] else None,
                masks=prompt.masks[:, None] if prompt.has_mask[0] else None,
            )
            masks, iou = decoder(
                image_embeddings=levels["neck"][prompt.image_index],
                image_pe=top.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
                hq_token_only=top.hq == "hq",
                interm_embeddings=levels["early"][prompt.image_index].permute(0, 2, 3, 1).unsqueeze(0),
            )
            logits.append(masks)
            scores.append(iou)
        return torch.cat(logits), torch.cat(scores)

    ask.decoder = decoder
    return ask


@pytest.mark.parametrize(("name", "count"), [("vit_b", 1_071_104), ("vit_l", 1_333_248), ("vit_h", 1_595_392)])
def test_the_head_has_the_published_size(name, count):
    keys = outline(SIZES[name], hq=True).state_dict()
    assert sum(tensor.numel() for key, tensor in keys.items() if is_of_hq_head(key)) == count


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_keys_and_shapes_are_those_of_an_official_checkpoint(name):
    package = exports.import_upstream(hq=True)
    with torch.device("meta"):
        official = package.sam_model_registry[name]().state_dict()
    # The package keeps the pixel statistics out of its files, as SAM does.
    ours = outline(SIZES[name], hq=True).state_dict()
    assert {key: tensor.shape for key, tensor in official.items()} == {key: t.shape for key, t in ours.items()}


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_several_prompts_on_several_images_equal_upstreams_one_by_one(
    top, levels, prompts, ask_upstream, mode, multimask, relative
):
    top.hq = mode
    expected = ask_upstream(levels, prompts, multimask)
    found = top(top.prepare(levels), prompts, multimask)
    assert found.logits.shape == (len(SPECS), 1, SIZE.mask_size, SIZE.mask_size)
    assert relative(found.logits, expected[0]) < 1e-5
    assert relative(found.scores, expected[1]) < 1e-5


def test_mask_prompts_and_others_in_one_batch_equal_upstream(top, levels, prompts, ask_upstream, relative):
    some = torch.arange(len(SPECS)) % 3 == 0
    prompts = replace(prompts, masks=3 * torch.randn(len(SPECS), SIZE.mask_size, SIZE.mask_size), has_mask=some)
    expected = ask_upstream(levels, prompts, False)
    assert relative(top(top.prepare(levels), prompts, False).logits, expected[0]) < 1e-5


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_cells_are_those_of_the_map(top, levels, prompts, mode, multimask):
    top.hq = mode
    cells = torch.randint(0, SIZE.mask_size**2, (len(SPECS), 20))
    expected, found = (top(top.prepare(levels), prompts, multimask, at) for at in (None, cells))
    assert torch.equal(found.logits, expected.logits.flatten(2).take_along_dim(cells[:, None], dim=2))
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_no_prompts(top, levels, make_prompts, mode, multimask):
    top.hq = mode
    found = top(top.prepare(levels), make_prompts([], SIZE.input_size), multimask)
    assert found.logits.shape == (0, 1, SIZE.mask_size, SIZE.mask_size)
    assert found.scores.shape == (0, 1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_autocast_stays_near_fp32(top, levels, prompts, mode, dtype, bound, relative):
    top.hq = mode
    some = torch.arange(len(SPECS)) % 3 == 0
    prompts = replace(prompts, masks=3 * torch.randn(len(SPECS), SIZE.mask_size, SIZE.mask_size), has_mask=some)
    expected = top(top.prepare(levels), prompts, False)
    with torch.autocast("cpu", dtype=dtype):
        found = top(top.prepare({name: level.to(dtype) for name, level in levels.items()}), prompts, False)
    assert found.logits.dtype == dtype
    assert relative(found.logits.float(), expected.logits) < bound
    found.logits.float().pow(2).mean().backward()
    for layer in (top.mask_decoder.compress_vit_feat, top.mask_decoder.embedding_encoder):
        for name, parameter in layer.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_gradients_equal_upstreams(top, levels, prompts, ask_upstream, mode):
    top.hq = mode
    weight = torch.randn(len(SPECS), 1, SIZE.mask_size, SIZE.mask_size)
    (top(top.prepare(levels), prompts, False).logits * weight).sum().backward()
    (ask_upstream(levels, prompts, False)[0] * weight).sum().backward()
    theirs = {name: parameter.grad for name, parameter in ask_upstream.decoder.named_parameters()}
    largest = max(grad.norm() for grad in theirs.values() if grad is not None)
    compared = 0
    for name, parameter in top.mask_decoder.named_parameters():
        if parameter.grad is None or name.endswith("k_proj.bias"):
            continue
        # Where gradients nearly cancel, the rounding of upstream's own shows.
        assert (parameter.grad - theirs[name]).norm() <= 1e-4 * max(theirs[name].norm(), 1e-2 * largest), name
        compared += is_of_hq_head(f"mask_decoder.{name}")
    assert compared == len(list(filter(is_of_hq_head, top.state_dict())))


def test_the_head_alone_is_free_to_move(top):
    freeze(top, {"head"})
    trained = {name for name, parameter in top.named_parameters() if parameter.requires_grad}
    assert trained == set(filter(is_of_hq_head, top.state_dict()))
    freeze(top, {"head", "decoder"})  # the layers of masks that are not asked for could get no gradient
    free = {name for name, parameter in top.named_parameters() if parameter.requires_grad}
    assert not any("output_hypernetworks" in name for name in free)
    top.hq = "sum"
    freeze(top, {"decoder"})
    free = {name for name, parameter in top.named_parameters() if parameter.requires_grad}
    assert any("output_hypernetworks" in name for name in free)
    assert not any(map(is_of_hq_head, free))


def test_a_head_is_added_to_a_top_and_survives_as_bytes(tiny_top):
    top = add_head(tiny_top, "sum", seed=3)
    assert top.levels == ("neck", "early")
    for key, tensor in tiny_top.state_dict().items():
        assert torch.equal(top.state_dict()[key], tensor)
    again = top_from_bytes(top_to_bytes(top))
    assert again.hq == "sum"
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in top.state_dict().items())
    other = add_head(tiny_top, "sum", seed=4)
    assert not torch.equal(other.mask_decoder.hf_token.weight, top.mask_decoder.hf_token.weight)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_weights_come_out_for_the_package_and_go_in_again(tmp_path, mode, suffix):
    sam = load_sam("tiny", hq=mode)
    for parameter in sam.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path / f"sam_hq{suffix}"
    write_state(path, official_state(sam))
    found = compare_with_upstream(sam.eval(), path)
    assert found.holds
    assert found.difference < 1e-4 * found.deviation
    again = load_top("tiny", path, hq=mode)
    assert all(torch.equal(again.state_dict()[key], sam.state_dict()[key]) for key in again.state_dict())
    plain = load_top("tiny", path)  # SAM's part of it
    assert not any(map(is_of_hq_head, plain.state_dict()))
    assert load_encoder("tiny", path).digest == state_digest(sam.image_encoder.vit.state_dict())


@pytest.mark.parametrize("name", HQ_HEAD)
def test_a_single_wrong_layer_is_seen(tmp_path, name):
    sam = load_sam("tiny", hq="hq").eval()
    for parameter in sam.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    state = official_state(sam)
    key = next(key for key in state if key.startswith(f"mask_decoder.{name}.") and key.endswith("weight"))
    write_state(tmp_path / "a.pth", state | {key: state[key].flatten().roll(1).view_as(state[key])})
    assert not compare_with_upstream(sam, tmp_path / "a.pth").holds


def test_a_file_without_the_head_does_not_load_in_the_package(tmp_path):
    write_state(tmp_path / "a.pth", official_state(load_sam("tiny")))
    with pytest.raises(CheckpointError, match="segment_anything_hq does not load it"):
        load_upstream(SIZE, tmp_path / "a.pth", hq=True)


def test_the_head_of_another_size_is_recognised(tmp_path):
    nano = SIZES["nano"]
    write_state(tmp_path / "a.pth", fixed_weights(nano) | fresh_head(nano))
    with pytest.raises(CheckpointError, match=r"this looks like HQ-SAM's nano, not tiny; pass --model nano") as caught:
        read_checkpoint(tmp_path / "a.pth", SIZE)
    assert "--store of nano" in str(caught.value)
