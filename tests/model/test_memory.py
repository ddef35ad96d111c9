"""The estimate beside what PyTorch really keeps for a backward."""

import pytest
import torch

from sam_cache.model import LoraKnobs, attach, estimate_memory, freeze, load_sam
from sam_cache.model.memory import count_decoder, count_encoder, first_trained_block
from sam_cache.training import sam_loss


def bytes_kept(function) -> int:
    """Of the distinct tensors that autograd saves while `function` runs."""
    kept, sizes = [], {}

    def pack(tensor):
        kept.append(tensor)
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes.values())


@pytest.fixture(scope="module")
def sam():
    sam = load_sam("nano", input_size=512)
    freeze(sam, {"encoder", "neck", "prompt", "decoder"})
    return sam


def encode(sam):
    pixels = torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8)
    return sam.image_encoder(pixels, torch.full((2, 2), 512))


def test_encoder(sam):
    weights = sum(parameter.numel() * 4 for parameter in sam.image_encoder.parameters())
    measured = bytes_kept(lambda: encode(sam)) - weights
    assert 0.7 < count_encoder(sam, 2, 4, checkpointing=False) / measured < 1.4


def test_decoder(sam, make_prompts):
    prompts = make_prompts([(0, 1, False)] * 4 + [(1, 1, False)] * 4, 512)
    levels = {"neck": torch.randn(2, 256, 32, 32)}

    def step():
        masks = sam(levels, prompts, True)
        return sam_loss(
            masks.logits, masks.scores, torch.rand(8, 128, 128), torch.ones(2, 128, 128), prompts.image_index
        )

    weights = sum(parameter.numel() * 4 for parameter in sam.mask_decoder.parameters())
    assert 0.7 < count_decoder(sam, 8, 4) / (bytes_kept(step) - weights) < 1.4


def test_checkpointing_and_frozen_encoders_take_less():
    sam = load_sam("nano")
    freeze(sam, {"decoder"})
    frozen = estimate_memory(sam, 2, 16, "fp32", False)
    attach(sam.image_encoder, LoraKnobs(first_block=2), 0)
    freeze(sam, {"decoder", "adapter"})
    assert first_trained_block(sam) == 2
    adapted = estimate_memory(sam, 2, 16, "fp32", False)
    assert frozen < estimate_memory(sam, 2, 16, "fp32", True) < adapted
    assert estimate_memory(sam, 2, 16, "bf16", False) < adapted
    assert estimate_memory(sam, 4, 16, "fp32", False) > adapted
