"""Low-rank adaptation: a frozen linear map learns only a product of two thin ones (Hu et al. 2021, arXiv 2106.09685).

W = W₀ + (α/r)·BA with B (d, r) zero and A (r, k) random at init (eq. 3 and section 4.1), so that nothing changes at
first and r(d + k) numbers are learned. The adapter is a parametrization of the weight: the network's code does not know
of it, merging is taking the parametrization off with its value left, removing is taking it off without.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffusion_core.errors import ConfigError, IntegrityError, suggest


class LowRank(nn.Module):
    """W₀ (d, k) -> W₀ + scale·up·down with `down` (rank, k) and `up` (d, rank), which is zero at init."""

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        out, width = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, width).normal_(std=width**-0.5))
        self.up = nn.Parameter(weight.new_zeros(out, rank))
        self.register_buffer("scale", weight.new_tensor(alpha / rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight (d, k)."""
        return weight + self.scale * (self.up @ self.down)


def add_lora(net: nn.Module, patterns: Sequence[str], rank: int, alpha: float) -> tuple[str, ...]:
    """Freeze the network and put an adapter on every linear map whose dotted name matches a pattern; their names.

    A pattern is matched as a file name is: "blocks.*.mix" is that map of every block. Outputs stay equal bit by bit;
    adapters that were there already are kept and still learn. Raises ConfigError for a rank below 1, an alpha not above
    0, a pattern that matches nothing, naming the nearest, or a map that has an adapter.
    """
    if rank < 1 or not alpha > 0:
        raise ConfigError(f"rank {rank}, alpha {alpha}: a rank from 1 and an alpha above 0 are wanted")
    linears = _linears(net)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigError(f"pattern {pattern!r} matches no linear map; {suggest(pattern, _shapes(linears))}")
    chosen = [name for name in linears if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return _put(net, linears, {name: LowRank(linears[name].weight, rank, alpha) for name in chosen})


def merge_lora(net: nn.Module) -> dict[str, Tensor]:
    """Write the adapters into the weights and take them off; the weights so replaced, by their names in the state.

    `net.load_state_dict(replaced, strict=False)` undoes it bit by bit. Everything stays frozen.
    Raises ConfigError if there is no adapter.
    """
    replaced = {}
    for name in _adapters(net):
        # another name for the same memory, which merging leaves as it is: the merged weight gets memory of its own
        replaced[f"{name}.weight"] = net.get_parameter(f"{name}.parametrizations.weight.original").detach()
        parametrize.remove_parametrizations(net.get_submodule(name), "weight", leave_parametrized=True)
    return replaced


def remove_lora(net: nn.Module) -> None:
    """Take the adapters off: every weight is again, bit by bit, what it was before them. Everything stays frozen.

    Raises ConfigError if there is no adapter.
    """
    for name in _adapters(net):
        parametrize.remove_parametrizations(net.get_submodule(name), "weight", leave_parametrized=False)


def lora_state(net: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, "<linear map>.down", ".up" and ".scale", as `write_tensors` and `load_lora` take them.

    Raises ConfigError if there is no adapter.
    """
    return {f"{n}.{part}": tensor for n, one in _adapters(net).items() for part, tensor in one.state_dict().items()}


def load_lora(net: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Freeze the network and put on its linear maps the adapters of a `lora_state`; the names of the maps.

    Raises IntegrityError for a tensor that is missing, unknown, misshapen or of no linear map of this network, and
    ConfigError for a map that has an adapter.
    """
    linears = _linears(net)
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for full, tensor in state.items():
        name, _, part = full.rpartition(".")
        parts[name][part] = tensor
    made = {}
    for name, given in parts.items():
        if name not in linears:
            raise IntegrityError(f"an adapter for '{name}', no linear map here; {suggest(name, _shapes(linears))}")
        rank = given["down"].numel() // linears[name].in_features if "down" in given else 1
        made[name] = LowRank(linears[name].weight, max(rank, 1), alpha=1.0)
        try:
            made[name].load_state_dict(given)
        except RuntimeError as error:
            raise IntegrityError(f"the adapter for '{name}' does not fit: {error}") from error
    return _put(net, linears, made)


def _put(net: nn.Module, linears: Mapping[str, nn.Linear], made: Mapping[str, LowRank]) -> tuple[str, ...]:
    for name in made:
        if parametrize.is_parametrized(linears[name], "weight"):
            raise ConfigError(f"'{name}' has an adapter; merge or remove it first")
    learning = [one for one in net.modules() if isinstance(one, LowRank)]
    net.requires_grad_(False)
    for one in learning:
        one.requires_grad_(True)
    for name, adapter in made.items():
        parametrize.register_parametrization(linears[name], "weight", adapter)
    return tuple(made)


def _linears(net: nn.Module) -> dict[str, nn.Linear]:
    return {name: one for name, one in net.named_modules() if isinstance(one, nn.Linear)}


def _adapters(net: nn.Module) -> dict[str, LowRank]:
    tail = ".parametrizations.weight.0"
    found = {name.removesuffix(tail): one for name, one in net.named_modules() if isinstance(one, LowRank)}
    if not found:
        raise ConfigError(f"{type(net).__name__} has no adapter; `add_lora` and `load_lora` put them on")
    return found


def _shapes(names: Iterable[str]) -> set[str]:
    """The names with every number a star: one for the same map of all blocks, and each a pattern that matches."""
    return {re.sub(r"\b\d+\b", "*", name) for name in names}
