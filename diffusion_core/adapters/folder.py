"""A model folder in Hugging Face's format: `config.json` beside its weights, by name or as diffusers calls them.

Nothing is downloaded and no pickle is read: the folder lies on this machine, its weights are one safetensors file.
An adapter reads the options as a frozen dataclass (`read_options`), one field an option, so that an option it does
not know, or a value it cannot express, is refused by name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffusion_core.errors import ConfigError, IntegrityError, suggest
from diffusion_core.manifest import hash_file
from diffusion_core.spec import build
from diffusion_core.weights import read_tensors

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
NAMED = 4  # tensors in one error

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def read_folder(
    folder: Path, class_name: str, sha256: str | None = None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The options and tensors of a model of class `class_name`, its weights checked against `sha256` (hex) if given.

    Names that begin with an underscore, which describe the file and not the model, are left out of the options; the
    attention weights of folders written before 2023 (`query`, `key`, `value`, `proj_attn`) get today's names.
    Raises ConfigError if a file is missing, `config.json` is no JSON object or names another class, and
    IntegrityError if the weights are torn or their digest differs.
    """
    config = read_config(folder)
    if (named := config.get("_class_name")) != class_name:
        raise ConfigError(f"{folder / CONFIG}: _class_name is {named!r}; {suggest(str(named), [class_name])}")
    tensors = read_weights(folder, WEIGHTS, sha256)
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return options, renamed(tensors, today)


def read_config(folder: Path) -> dict[str, object]:
    """The object that `config.json` holds; raises ConfigError if the file is missing or holds none."""
    path = present(folder, CONFIG)
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}; an object of options is wanted")
    return config


def read_weights(folder: Path, name: str, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file of weights, its bytes checked against `sha256` (hex) if given.

    Raises ConfigError if the file is missing, IntegrityError if it is torn or its digest differs.
    """
    weights = present(folder, name)
    if sha256 is not None and (digest := hash_file(weights)) != sha256.lower():
        raise IntegrityError(f"{weights} has SHA-256 {digest}; {sha256} is wanted")
    return read_tensors(weights)


def present(folder: Path, name: str) -> Path:
    """The path of a file; raises ConfigError, telling what the folder holds, if it is missing."""
    if not (folder / name).is_file():
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise ConfigError(f"{folder} lacks {name}; it holds {', '.join(found) or 'nothing'}")
    return folder / name


def class_of(folder: Path) -> str:
    """The class that `config.json` names, for an adapter of several; raises ConfigError as `read_folder` does."""
    return str(read_config(folder).get("_class_name"))


def read_options(wanted: type[T], options: Mapping[str, object], folder: Path) -> T:
    """The options as a frozen dataclass; a `Literal` field names the only values that can be expressed.

    Raises ConfigError naming the option that is unknown or has a value that cannot be expressed.
    """
    return build(wanted, options, f"{folder / CONFIG}")


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The same tensors, each whole dotted run of a name that `names` knows replaced by its new one, in their order."""

    def new(name: str) -> str:
        padded = f".{name}."
        for old, now in names.items():
            padded = padded.replace(f".{old}.", f".{now}.")
        return padded.strip(".")

    return {new(name): tensor for name, tensor in tensors.items()}


def joined(tensors: Mapping[str, Tensor], parts: tuple[str, ...], into: str) -> dict[str, Tensor]:
    """The same tensors, but those whose names differ in a dotted run of `parts` only become one, named with `into`.

    They are concatenated along their first axis in the order of `parts`: separate linear maps become one.
    """
    padded = {f".{name}.": tensor for name, tensor in tensors.items()}
    made: dict[str, Tensor] = {}
    for name, tensor in padded.items():
        found = [part for part in parts if f".{part}." in name]
        if not found:
            made[name] = tensor
        elif found == [parts[0]]:
            every = [padded[other] for part in parts if (other := name.replace(f".{parts[0]}.", f".{part}.")) in padded]
            made[name.replace(f".{parts[0]}.", f".{into}.")] = torch.cat(every)
    return {name.strip("."): tensor for name, tensor in made.items()}


def filled(module: M, tensors: Mapping[str, Tensor], folder: Path, weights: str = WEIGHTS) -> M:
    """The module with its weights taken from `tensors`, read from the file called `weights`.

    Raises IntegrityError if one is missing, extra or misshapen.
    """
    wanted = module.state_dict()
    faults = (
        ("lacks", [name for name in wanted if name not in tensors]),
        ("holds the unknown", [name for name in tensors if name not in wanted]),
        ("has a size mismatch for", [n for n in wanted if n in tensors and wanted[n].shape != tensors[n].shape]),
    )
    told = [f"{fault} {_some(names)}" for fault, names in faults if names]
    if told:
        raise IntegrityError(f"{folder / weights} does not fit its {CONFIG}: it {'; it '.join(told)}")
    module.load_state_dict(tensors)
    return module


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
