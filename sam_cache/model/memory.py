"""How much memory a training step takes, before it is tried."""

from sam_cache.model.sam import Sam

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def estimate_memory(sam: Sam, images: int, prompts: int, precision: str, checkpointing: bool) -> int:
    """Bytes for weights, gradients, AdamW's two moments and what the backward keeps.

    `images` are encoded at once and `prompts` decoded at once, on one device. Counted are tensors whose
    size grows with tokens; a spatial prior's backbone and the allocator's waste are not.
    """
    # Autocast keeps a copy of the weights in its own precision until the step is over.
    each = 4 if precision == "fp32" else 4 + BYTES[precision]
    held = sum(parameter.numel() * each for parameter in sam.parameters())
    trained = sum(parameter.numel() * 4 for parameter in sam.parameters() if parameter.requires_grad)
    encoder = count_encoder(sam, images, BYTES[precision], checkpointing)
    return held + 3 * trained + encoder + count_decoder(sam, prompts, BYTES[precision])


def count_encoder(sam: Sam, images: int, width: int, checkpointing: bool) -> int:
    """Bytes the encoder keeps for its backward; one block's worth of them where it has none.

    Of a block, in units of tokens x channels: its input and the sum after attention in fp32, both
    again normalised, q, k and v as they are and with their positions appended, the attended values, and
    the two sides of the MLP's activation, four times as wide.
    """
    size = sam.size
    tokens = images * size.grid**2
    padded = images * (-(-size.grid // size.window) * size.window) ** 2
    head = size.width // size.heads
    full, windowed = (2 * side * size.heads for side in (size.grid, size.window))
    kept = []
    for number in range(size.depth):
        many, places = (tokens, full) if number in size.global_blocks else (padded, windowed)
        attention = many * width * (5 * size.width + 3 * (size.heads * head + places) + places)
        kept.append(tokens * (8 * size.width + width * 10 * size.width) + attention)
    first = first_trained_block(sam)
    if first is None:
        return max(kept)
    if checkpointing:
        return (size.depth - first) * tokens * 4 * size.width + max(kept)
    return sum(kept[first:])


def first_trained_block(sam: Sam) -> int | None:
    """The first block a gradient has to go through; None where it never enters the blocks."""
    encoder = sam.image_encoder
    if any(parameter.requires_grad for parameter in encoder.adapter.parameters()) if encoder.adapter else False:
        return 0
    before = [encoder.vit.pos_embed, *encoder.vit.patch_embed.parameters()]
    if any(parameter.requires_grad for parameter in before):
        return 0
    for number, block in enumerate(encoder.vit.blocks):
        if any(parameter.requires_grad for parameter in block.parameters()):
            return number
    return None


def count_decoder(sam: Sam, prompts: int, width: int) -> int:
    """Bytes the decoder and the loss keep for their backward.

    Of a prompt: about two copies of its image tokens in each layer, these once more with the first upscaling,
    and eight maps of the masks in fp32; what comes between those is made again. A loss that looks at few
    cells keeps less.
    """
    size = sam.size
    copies = 2 * size.decoder_depth + 1
    return prompts * (copies * size.grid**2 * size.neck_channels * width + 8 * 4 * size.mask_size**2)
