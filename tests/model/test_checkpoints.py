import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sam_cache.errors import CheckpointError
from sam_cache.model import SIZES, fixed_weights, load_encoder, load_top, top_from_bytes
from sam_cache.model.checkpoints import read_checkpoint, state_digest
from sam_cache.model.parts import part_of

SIZE = SIZES["tiny"]


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, SIZE)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def save(state, path: Path, **options) -> Path:
    torch.save(state, path, **options)
    return path


def test_every_format_gives_the_same_model(tiny_state, tmp_path):
    save_file(tiny_state, tmp_path / "a.safetensors")
    paths = [
        save(tiny_state, tmp_path / "a.pth"),
        save(tiny_state, tmp_path / "old.pth", _use_new_zipfile_serialization=False),
        tmp_path / "a.safetensors",
    ]
    for path in paths:
        encoder, top = load_encoder("tiny", path), load_top("tiny", path)
        path.unlink()  # nothing keeps hanging on the file
        for key, tensor in encoder.vit.state_dict().items():
            assert torch.equal(tensor, tiny_state[f"image_encoder.{key}"])
        for key, tensor in top.state_dict().items():
            assert torch.equal(tensor, tiny_state[key])
        assert encoder.digest == load_encoder("tiny").digest


def test_keys_and_shapes_must_fit(tiny_state, tmp_path):
    path = tmp_path / "a.pth"
    extra = refused(save({**tiny_state, "mask_decoder.other.weight": torch.zeros(1, 32)}, path))
    assert "1 unexpected, first mask_decoder.other.weight" in extra
    piece = refused(save({**tiny_state, "mask_decoder.hf_token.weight": torch.zeros(1, 32)}, path))
    assert "missing, first mask_decoder.hf_mlp.layers.0.weight" in piece
    lacking = {key: tensor for key, tensor in tiny_state.items() if "neck" not in key}
    assert "6 missing, first image_encoder.neck.0.weight" in refused(save(lacking, path))
    misshaped = {**tiny_state, "image_encoder.pos_embed": torch.zeros(1, 7, 7, 32)}
    assert "image_encoder.pos_embed (1, 7, 7, 32) instead of (1, 8, 8, 32)" in refused(save(misshaped, path))


def test_another_model_is_recognised(tmp_path):
    message = refused(save(fixed_weights(SIZES["nano"]), tmp_path / "a.pth"))
    assert "this looks like nano, not tiny" in message


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files(tiny_state, tmp_path, name):
    path = tmp_path / name
    save_file(tiny_state, path) if path.suffix == ".safetensors" else save(tiny_state, path)
    whole = path.read_bytes()
    for content in (b"", b"<!DOCTYPE html>", whole[: len(whole) // 2], whole[:-1], bytes(1000)):
        path.write_bytes(content)
        assert "not a readable checkpoint" in refused(path)


def test_truncated_file_of_the_old_format(tiny_state, tmp_path):
    path = save(tiny_state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "not a readable checkpoint" in refused(path)


class Payload:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_never_run(tmp_path, zipped):
    path = tmp_path / "a.pth"
    save({"a": Payload(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    assert "loading those runs code" in refused(path)
    assert not (tmp_path / "ran").exists()


def test_not_a_state_dict(tiny_state, tmp_path):
    assert "plain state dict" in refused(save({"model": tiny_state}, tmp_path / "a.pth"))


def test_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file.*sam_vit_b_01ec64\.pth.*segment-anything"):
        load_encoder("vit_b", tmp_path / "sam_vit_b_01ec64.pth")
    with pytest.raises(CheckpointError, match=r"vit_h needs a checkpoint file.*sam_vit_h_4b8939\.pth"):
        load_top("vit_h")


def test_digest_tells_weights_apart(tiny_state):
    digest = state_digest(tiny_state)
    assert state_digest(dict(reversed(tiny_state.items()))) == digest
    for change in (
        {"image_encoder.pos_embed": tiny_state["image_encoder.pos_embed"] + 1e-6},
        {"image_encoder.pos_embed": tiny_state["image_encoder.pos_embed"].flatten(1)},
        {"image_encoder.pos_embed": tiny_state["image_encoder.pos_embed"].view(torch.int32)},
        {"another": torch.zeros(1)},
    ):
        assert state_digest({**tiny_state, **change}) != digest


def test_fixed_weights_are_the_same_everywhere():
    # A store made with these weights names them. The same with ATEN_CPU_CAPABILITY=default, avx2, avx512.
    digests = {name: state_digest(part_of(fixed_weights(SIZES[name]), "image_encoder")) for name in DIGESTS}
    assert digests == DIGESTS
    assert state_digest(fixed_weights(SIZE, seed=1)) != state_digest(fixed_weights(SIZE))
    for key, tensor in fixed_weights(SIZE).items():
        assert tensor.std() > 0, key


DIGESTS = {
    "nano": "6a6b3f2b8c6fb4e61f15dfda9974e350fac4ba78a59cae33ac85bf79d6d96558",
    "tiny": "1687dc3173b9008822e0434e64bc02f1df3feebcddc0bd52e3ee162e43f65421",
}


def test_nano_is_small():
    parameters = sum(p.numel() for p in load_encoder("nano").parameters())
    assert 2e6 < parameters < 3e6
    assert round(sum(p.numel() for p in load_top("nano").parameters()) / 1e6, 2) == 4.06


def test_bytes_that_are_no_top():
    for blob in (b"", b"12345678", bytes(100)):
        with pytest.raises(CheckpointError, match="no SAM top"):
            top_from_bytes(blob)
