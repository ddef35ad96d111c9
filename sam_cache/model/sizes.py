"""The SAM models this project knows: their shapes, and the files that hold their weights."""

from dataclasses import dataclass, replace

from sam_cache.errors import UsageError


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Everything that determines the shape of a SAM, encoder and top.

    `width`, `depth`, `heads`, `global_blocks` and `window` describe the encoder, the fields that
    begin with `decoder_` the two-way transformer and the heads behind it. Both meet at
    `neck_channels`. Defaults are those every released SAM shares (segment_anything/build_sam.py).
    `checkpoint` is the name of the official file, `packaged` that of one that comes with samcache.
    """

    name: str
    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int = 14
    input_size: int = 1024
    patch: int = 16
    neck_channels: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    decoder_score_width: int = 256
    checkpoint: str = ""
    packaged: str = ""

    @property
    def grid(self) -> int:
        """Rows (and columns) of encoder tokens."""
        return self.input_size // self.patch

    @property
    def mask_size(self) -> int:
        """Rows (and columns) of a predicted mask: the decoder upsamples the grid four times."""
        return 4 * self.grid

    @property
    def origin(self) -> str:
        """Where the weights come from, as words for an error message or a report."""
        if self.checkpoint:
            return f"{self.checkpoint} (README of facebookresearch/segment-anything, 'Model Checkpoints')"
        return f"{self.name} weights in the official layout (without a file, samcache has its own)"

    @property
    def hq_origin(self) -> str:
        """Where weights with HQ-SAM's head come from."""
        if self.checkpoint:
            return f"sam_hq_{self.name}.pth (README of SysCV/sam-hq, 'Model Checkpoints')"
        return f"{self.name} weights with its head, as `samcache export --format sam-hq` writes them"

    def at(self, input_size: int | None) -> "ModelSize":
        """The same model for another input size; None keeps the model's own."""
        if input_size is None:
            return self
        if input_size <= 0 or input_size % self.patch:
            raise UsageError(f"input size {input_size}: {self.name} needs a positive multiple of {self.patch}")
        return replace(self, input_size=input_size)


SIZES = {
    size.name: size
    for size in (
        ModelSize("vit_b", 768, 12, 12, (2, 5, 8, 11), checkpoint="sam_vit_b_01ec64.pth"),
        ModelSize("vit_l", 1024, 24, 16, (5, 11, 17, 23), checkpoint="sam_vit_l_0b3195.pth"),
        ModelSize("vit_h", 1280, 32, 16, (7, 15, 23, 31), checkpoint="sam_vit_h_4b8939.pth"),
        ModelSize("nano", 160, 4, 2, (3,), packaged="nano.safetensors"),
        # For tests: a window that does not divide the grid, and few enough heads that usual prompts
        # take the decoder's absorbed attention and long ones its plain attention, as at full size.
        ModelSize(
            "tiny",
            width=32,
            depth=2,
            heads=2,
            global_blocks=(1,),
            window=5,
            input_size=128,
            neck_channels=32,
            decoder_heads=2,
            decoder_mlp=64,
            decoder_score_width=32,
        ),
    )
}


def size_of(name: str) -> ModelSize:
    """Raises UsageError for a name that is not in `SIZES`."""
    if name not in SIZES:
        raise UsageError(f"unknown model {name!r}: choose one of {', '.join(SIZES)}")
    return SIZES[name]
