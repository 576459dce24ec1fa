"""Tensors <-> one safetensors file: the only weight format on disk, and the only door to it."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_core.errors import IntegrityError, suggest

FORMAT_NAMES = {  # in the order in which the format's own writer lays tensors out; wide types first aligns them all
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors; the same tensors give the same bytes."""
    save_file({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, path)
    path.chmod(0o644)  # the library writes 0600, which a server running as another user cannot read


def create_tensors(path: Path, wanted: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, Tensor]:
    """Create a file of zeros for tensors of these names, shapes and types; what is put into them goes to the file.

    Filled with the same numbers, its bytes are those of `write_tensors`. Raises OSError if the disk has no room.
    """
    ranks = list(FORMAT_NAMES)
    order = sorted(wanted, key=lambda name: (ranks.index(wanted[name][1]), name))
    header: dict[str, object] = {}
    starts, end = [], 0
    for name in order:
        shape, dtype = wanted[name]
        starts.append(end)
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [starts[-1], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        with suppress(AttributeError):  # macOS has no such call
            # Room is taken beforehand: a full disk would otherwise end the process at some later write to the map.
            os.posix_fallocate(file.fileno(), 0, begin + end)
        file.truncate(begin + end)
    path.chmod(0o644)
    raw = torch.from_file(str(path), shared=True, size=begin + end, dtype=torch.uint8)
    return {name: _view(raw[begin + start :], *wanted[name]) for name, start in zip(order, starts, strict=True)}


def _view(raw: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return raw[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(tuple(shape))


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read named tensors, mapped from disk where the system can; raises IntegrityError if the file is torn."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, FileNotFoundError) as error:
        raise IntegrityError(f"{path} cannot be read as safetensors ({error})") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a file; raises IntegrityError naming the first tensor that is missing, extra or misshapen."""
    found, wanted = read_tensors(path), module.state_dict()
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise IntegrityError(f"{path} lacks '{name}' of {type(module).__name__}; {suggest(name, found)}")
        if name not in wanted:
            raise IntegrityError(f"{path} holds '{name}', unknown to {type(module).__name__}")
        if found[name].shape != wanted[name].shape:
            shapes = f"{list(found[name].shape)}; {list(wanted[name].shape)}"
            raise IntegrityError(f"{path}: '{name}' has shape {shapes} is wanted")
    module.load_state_dict(found)
