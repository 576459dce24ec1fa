"""Stage: make the ruler. Train the extractor, fit the independent judge, measure real pictures and the unit U."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_core.errors import ConfigError, DataError
from diffusion_core.images import to_tensor
from diffusion_core.metrics import judge
from diffusion_core.metrics.extractor import Shape, train_extractor
from diffusion_core.metrics.moments import moments_of
from diffusion_core.metrics.ruler import Real, measure_unit, save_ruler
from pipelines.data.index import NO_LABEL
from pipelines.data.reader import read_samples
from pipelines.stage import Stage, run


@dataclass(frozen=True)
class Config:
    """How long (in images) and how fast to train the extractor; U is a mean over `splits` splits of real pictures."""

    images: int
    batch: int
    lr: float
    seed: int
    splits: int = 10

    def __post_init__(self) -> None:
        if self.batch < 1 or self.images < self.batch:
            raise ConfigError(f"images {self.images}, batch {self.batch}: batch >= 1 and images >= batch are wanted")
        if self.lr <= 0 or self.splits < 1:
            raise ConfigError(f"lr {self.lr}, splits {self.splits}: lr > 0 and splits >= 1 are wanted")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, so that equal pictures give equal bytes whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def main(config: Config, stage: Stage) -> Mapping[str, Any]:
    """Write extractor, judge, reference moments and judge.json; tells how well both classify the held-out pictures.

    Raises DataError for pictures without a class.
    """
    folder, data = stage.validated_data()
    (images, labels), (val_images, val_labels) = _tensors(folder, "train"), _tensors(folder, "val")
    if unknown := int((torch.cat((labels, val_labels)) == NO_LABEL).sum()):
        raise DataError(
            f"{unknown:,} of {len(labels) + len(val_labels):,} pictures have no class, and the judge is a classifier; "
            "name the classes, or end with `dvc repro train`"
        )
    shape = Shape(images.shape[1], images.shape[2], len(data.about["classes"]))
    with stage.bar("extractor", config.images) as bar:

        def on_batch(seen: int, loss: float) -> None:
            bar.to(seen, f"loss {loss:.3f}")

        extractor = train_extractor(
            shape,
            images,
            labels,
            samples=config.images,
            batch=config.batch,
            lr=config.lr,
            seed=config.seed,
            on_batch=on_batch,
        )
    classifier = judge.fit(images, labels)
    features, val_features = (_in_batches(extractor.features, x, config.batch) for x in (images, val_images))
    unit = measure_unit(features, config.splits, config.seed)
    real = Real(moments_of(features), moments_of(val_features), labels)
    accuracy = {
        "extractor": _share(_in_batches(extractor.logits, val_images, config.batch).argmax(1), val_labels),
        "judge": _share(classifier.predict(val_images), val_labels),
    }
    described = save_ruler(stage.out, data.about["source"]["name"], extractor, classifier, real, unit, accuracy)
    shares = {f"accuracy/{who}": share for who, share in accuracy.items()}
    stage.tracker.metrics({"unit": unit.mean, "unit_std": unit.std, **shares}, config.images)
    stage.say(
        f"{described['name']}: U = {unit.mean:.4f} (std {unit.std:.4f}); held-out accuracy "
        f"{accuracy['extractor']:.4f} extractor, {accuracy['judge']:.4f} judge"
    )
    return described


def _tensors(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    samples = read_samples(folder, split)
    return to_tensor(list(samples.images)), torch.from_numpy(samples.labels)


def _in_batches(function: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    return torch.cat([function(images[start : start + batch]) for start in range(0, len(images), batch)])


def _share(found: Tensor, wanted: Tensor) -> float:
    return (found == wanted).double().mean().item()


if __name__ == "__main__":
    run("train_judge", Config, main, out="artifacts/judge", kind="judge")
