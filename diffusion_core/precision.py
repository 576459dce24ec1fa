"""In which numbers and in which order of them a training step is quicker: bfloat16 and channels last, above a size.

Under autocast every weight is cast in every step and every operator is dispatched twice; a small network loses more
by that than its products gain. The choice depends on shapes and processor alone, never on a clock, so a resumed run
makes it again.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

FORMATS = ("avx512_bf16", "amx_bf16")  # what a processor needs to multiply bfloat16 at speed
WORTH_BF16 = 8e9  # operations of a forward pass: below it fp32 was quicker, above it bf16 (docs/benchmarks.md)
WORTH_LAST = 1e11  # the same for channels last, which only convolutions feel


class Pace(NamedTuple):
    """How a training step is done."""

    bf16: bool = False
    channels_last: bool = False


def quickest(device: torch.device, forward: Callable[[], object]) -> Pace:
    """The quickest way for a step whose forward pass is `forward`, by its multiplications and additions."""
    if device.type == "cuda":
        fit = torch.cuda.is_bf16_supported()
    else:
        can = torch.cpu.get_capabilities()
        fit = device.type == "cpu" and any(can.get(name, False) for name in FORMATS)
    if not fit:
        return Pace()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    operations = counter.get_total_flops()
    return Pace(operations > WORTH_BF16, operations > WORTH_LAST)


@torch.no_grad()
def in_channels_last(modules: Iterable[nn.Module]) -> None:
    """Lay the weights of convolutions out with channels last, values unchanged."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.contiguous(memory_format=torch.channels_last)
