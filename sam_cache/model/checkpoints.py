"""Weights files: read safely, checked strictly, told apart by digest."""

import hashlib
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sam_cache.errors import CheckpointError
from sam_cache.model.parts import is_of_hq_head, outline
from sam_cache.model.sizes import SIZES, ModelSize
from sam_cache.model.weights import fixed_weights

State = dict[str, Tensor]


def load_state(size: ModelSize, checkpoint: Path | None) -> State:
    """The whole state of `size`, in the official layout: from a file, or drawn where it has none.

    `size` is at its own input size. Raises CheckpointError.
    """
    if checkpoint is not None:
        return read_checkpoint(checkpoint, size)
    if size.checkpoint:
        raise CheckpointError(f"{size.name} needs a checkpoint file: get {size.origin}, and name it")
    if size.packaged:
        return read_checkpoint(Path(__file__).with_name(size.packaged), size)
    return fixed_weights(size)


def read_checkpoint(path: Path, size: ModelSize) -> State:
    """Read a `.pth` or `.safetensors` file whose keys and shapes are exactly those of `size`, or of its HQ-SAM.

    Tensors of a `.pth` may be mapped from the file: copy what you keep. Raises CheckpointError.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; get {size.origin}, and put it there")
    state = read_tensors(path)
    _check_shapes(path, _shapes(state), size)
    return state


def read_tensors(path: Path) -> State:
    """The tensors of a `.pth` or `.safetensors` file, by name; nothing in it is run. Raises CheckpointError."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            # Files of torch < 1.6 are no zip archives, and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise CheckpointError(
                f"{path}: refused, it holds pickled objects beside tensors, and loading those runs code; "
                "save its plain state dict as .safetensors"
            ) from None
        raise CheckpointError(_damaged(path)) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError):
        raise CheckpointError(_damaged(path)) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: not a plain state dict of tensors; save the model's state_dict()")
    return state


def _shapes(state: State) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


def _damaged(path: Path) -> str:
    return f"{path}: not a readable checkpoint ({path.stat().st_size} bytes; truncated?); download it again"


def _check_shapes(path: Path, found: dict[str, torch.Size], size: ModelSize) -> None:
    # A file that has a piece of the head is meant to have all of it.
    hq = any(is_of_hq_head(key) for key in found)
    expected = _shapes(outline(size, hq).state_dict())
    if found == expected:
        return
    for other in SIZES.values():
        if found == _shapes(outline(other, hq).state_dict()):
            what = f"HQ-SAM's {other.name}" if hq else other.name
            origin = size.hq_origin if hq else size.origin
            remedy = f"pass --model {other.name}, for train-top a --store of {other.name}, or get {origin}"
            raise CheckpointError(f"{path}: this looks like {what}, not {size.name}; {remedy}")
    problems = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "misshaped": [
            f"{key} {tuple(found[key])} instead of {tuple(expected[key])}"
            for key in expected
            if key in found and found[key] != expected[key]
        ],
    }
    told = [f"{len(keys)} {problem}, first {keys[0]}" for problem, keys in problems.items() if keys]
    raise CheckpointError(f"{path}: not a {size.name} checkpoint: {'; '.join(told)}; get {size.origin}")


def own_fp32(state: State) -> State:
    """Copies in fp32 that do not depend on the file they were read from."""
    return {key: tensor.to(torch.float32, copy=True) for key, tensor in state.items()}


def state_digest(state: State) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, by sorted name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
