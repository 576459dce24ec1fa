"""Tensors <-> one safetensors file: the only weight format on disk, and the only door to it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_core.errors import IntegrityError, suggest


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors; the same tensors give the same bytes."""
    save_file({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, path)
    path.chmod(0o644)  # the library writes 0600, which a server running as another user cannot read


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
