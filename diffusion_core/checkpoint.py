"""Checkpoints of a training run: raw weights, averages, optimizer moments and the step, as safetensors and JSON.

A checkpoint is a folder sealed by its manifest, which is written last; one that is torn or altered is
passed over for the one before it. There is no generator state to save: randomness is by counting.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffusion_core import manifest
from diffusion_core.errors import IntegrityError
from diffusion_core.objective import Objective
from diffusion_core.train import TrainState
from diffusion_core.weights import read_tensors, write_tensors

KIND = "checkpoint"
TENSORS = "state.safetensors"


def save(folder: Path, objective: Objective, state: TrainState, identity: str, keep: int = 2) -> Path:
    """Write one checkpoint under `folder` and keep it and the last before it, `keep` in all; `identity` names the run.

    Later ones go: had they been whole and of this run, it would have resumed from them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft, place = folder / ".draft", folder / f"step-{state.step:08d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    write_tensors(draft / TENSORS, _tensors(objective, state))
    about = {
        "identity": identity,
        "step": state.step,
        "ema_updates": {name: ema.updates for name, ema in state.emas.items()},
    }
    manifest.seal(draft, KIND, about)
    manifest.publish(draft, place)
    for other in set(_places(folder)) - set([one for one in _places(folder) if one <= place][-keep:]):
        shutil.rmtree(other)
    return place


def restore(
    folder: Path, objective: Objective, state: TrainState, identity: str, say: Callable[[str], None] = print
) -> bool:
    """Fill objective and state from the newest whole checkpoint of this run; False if there is none.

    Checkpoints that do not match their manifest, or are of a run with another identity, are passed over with a word.
    """
    for place in reversed(_places(folder)):
        try:
            about = manifest.verify(place, KIND).about
        except IntegrityError as error:
            say(f"passing over a checkpoint: {error}")
            continue
        if about["identity"] != identity:
            say(f"passing over {place}: it is of another configuration or other inputs")
            continue
        _fill(objective, state, read_tensors(place / TENSORS))
        for name, ema in state.emas.items():
            ema.updates = about["ema_updates"][name]
        state.step = about["step"]
        return True
    return False


def _places(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _tensors(objective: Objective, state: TrainState) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, module in {**objective.modules, **objective.carried}.items():
        named |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
    for name, ema in state.emas.items():
        named |= {f"ema/{name}/{key}": value for key, value in ema.average.items()}
    for name, optimizer in state.optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            named |= {f"optimizer/{name}/{index}/{key}": value for key, value in moments.items()}
    return named


def _fill(objective: Objective, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    for name, module in {**objective.modules, **objective.carried}.items():
        module.load_state_dict(_below(tensors, f"module/{name}/"))
    for name, ema in state.emas.items():
        ema.restore(_below(tensors, f"ema/{name}/"), 0)
    for name, optimizer in state.optimizers.items():
        moments: dict[int, dict[str, Tensor]] = {}
        for path, value in _below(tensors, f"optimizer/{name}/").items():
            index, key = path.split("/")
            moments.setdefault(int(index), {})[key] = torch.clone(value)
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
