"""Stage: hold a bundle's pictures against the ruler, at its default sampling and at each number of network calls.

Picture i has seed `seed` + i and the label of training picture i, and of a model that reads text its caption:
generated and real pictures have the same law of classes and captions, and every point of the curve starts from the
same noise.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_core import bundle as bundles
from diffusion_core.bundle import Bundle
from diffusion_core.errors import ConfigError, IntegrityError, RefusedError
from diffusion_core.images import encode_png, grid, to_pixels
from diffusion_core.metrics.passport import Passport
from diffusion_core.metrics.ruler import RESIZE, Ruler, load_ruler
from diffusion_core.sampler import generate
from diffusion_core.solver import Solver
from diffusion_core.spec import spec
from pipelines.curves import Captions, Point, candidates, measure, solver_name
from pipelines.data.reader import Pictures
from pipelines.models import BUNDLES
from pipelines.stage import Stage, choice, run

COLUMNS, ROWS, MAGNIFIED = 10, 6, 2


@dataclass(frozen=True)
class Config:
    """How many pictures a point has (none: as many as there are training pictures), and which points are measured.

    At each number of `calls` that is the bundle's own solver, and up to `compare_up_to` calls each of `solvers` too.
    """

    calls: tuple[int, ...]
    batch: int
    seed: int = 0
    count: int | None = None
    solvers: tuple[Solver, ...] = ()
    compare_up_to: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.seed < 0 or min(self.calls, default=1) < 1:
            raise ConfigError(
                f"batch {self.batch}, seed {self.seed}, calls {list(self.calls)}: at least 1, 0 and 1 are wanted"
            )
        if self.count is not None and self.count < 2:
            raise ConfigError(f"count {self.count}: at least 2 are wanted, as one picture has no covariance")


def main(model: str, config: Config, stage: Stage) -> Mapping[str, Any]:
    """Write metrics.json, passport.json, curve.json and grid.png of one model."""
    judge_folder, _ = stage.input("artifacts/judge", "judge")
    bundle_folder, sealed = stage.input(BUNDLES[model], "bundle")
    ruler, bundle = load_ruler(judge_folder), bundles.load(bundle_folder, verify=False)
    check_fits(bundle, ruler)
    captions = None if bundle.text is None else training_captions(stage, len(ruler.real.labels))
    by_calls = {
        calls: candidates(bundle.sampling, calls, config.solvers if calls <= config.compare_up_to else ())
        for calls in config.calls
    }
    samplings = dict.fromkeys([bundle.sampling, *(sampling for some in by_calls.values() for sampling in some)])
    default = Passport(
        metric=ruler.name,
        extractor=ruler.extractor_digest,
        resize=RESIZE,
        reference=ruler.reference_digest,
        reference_count=ruler.real.train.count,
        count=config.count or len(ruler.real.labels),
        first_seed=config.seed,
        sampling=bundle.sampling,
        bundle=sealed.digest,
        ema=str(bundle.about.get("ema", "none")),
    )
    with stage.bar("network calls", default.count * sum(sampling.calls for sampling in samplings)) as bar:
        points = {
            sampling: measure(bundle, ruler, replace(default, sampling=sampling), config.batch, bar.step, captions)
            for sampling in samplings
        }
    best = {
        calls: min((points[sampling] for sampling in some), key=lambda point: point.score.distance_u)
        for calls, some in by_calls.items()
    }
    metrics = report(model, ruler, points[bundle.sampling], best)
    _write_json(stage.out / "metrics.json", metrics)
    _write_json(stage.out / "passport.json", spec(default))
    _write_json(stage.out / "curve.json", curve(model, points.values()))
    (stage.out / "grid.png").write_bytes(encode_png(sheet(bundle, config.seed, ruler.real.labels, captions)))
    _track(stage, points[bundle.sampling], best)
    told = ", ".join(f"{point.score.distance_u:.3f} U at {calls}" for calls, point in best.items())
    stage.say(f"{ruler.name}: {told} calls; accuracy {metrics['accuracy']:.4f}")
    return {"model": model, "metric": ruler.name, "bundle": sealed.digest, "passport": default.digest}


def check_fits(bundle: Bundle, ruler: Ruler) -> None:
    """Raise RefusedError if a bundle's pictures are not of the size and classes of the ruler's, or of no class."""
    if not bundle.classes:
        raise RefusedError(
            "the bundle knows no classes, and the judge tells pictures by theirs; give the pictures labels and run "
            "again from prepare"
        )
    shape = ruler.extractor.shape
    made = (*bundle.image_shape, len(bundle.classes))
    wanted = (shape.channels, shape.size, shape.size, shape.classes)
    if made != wanted:
        raise RefusedError(f"the bundle's channels, height, width, classes are {made}; the judge was made for {wanted}")


def report(model: str, ruler: Ruler, default: Point, best: Mapping[int, Point]) -> dict[str, Any]:
    """The content of metrics.json: the default sampling at the top, the best point of each number of calls below."""
    passport = default.passport
    return {
        "name": model,
        "metric": ruler.name,
        "unit": ruler.unit,
        **default.numbers(),
        "calls": default.calls,
        "seed": passport.first_seed,
        "count": passport.count,
        "by_calls": {str(calls): point.numbers() for calls, point in best.items()},
    }


def curve(model: str, points: Iterable[Point]) -> list[dict[str, Any]]:
    """The content of curve.json: one row a point, for the plot of quality against network calls."""
    return [
        {
            "model": model,
            "solver": solver_name(point.passport.sampling.solver),
            "calls": point.calls,
            "distance_u": point.score.distance_u,
            "accuracy": point.score.accuracy,
            "passport": point.passport.digest,
        }
        for point in sorted(points, key=lambda point: point.calls)
    ]


def sheet(bundle: Bundle, seed: int, labels: Tensor, captions: Captions | None) -> NDArray[np.uint8]:
    """Pictures at the default sampling, magnified: a column for each of the first classes, a row for each seed.

    With captions, picture i is asked for the label and the caption of training picture i.
    """
    columns = min(len(bundle.classes), COLUMNS) if captions is None else COLUMNS
    ids = torch.arange(columns * ROWS)
    if captions is None:
        seeds, asked = seed + ids // columns, bundle.condition(ids % columns)
    else:
        rows = ids % len(labels)
        seeds, asked = seed + ids, bundle.condition(labels[rows], captions(rows))
    images = generate(bundle.denoiser, bundle.codec, bundle.sampling, bundle.latent_shape, seeds, asked)
    pixels = to_pixels(images).repeat(MAGNIFIED, axis=1).repeat(MAGNIFIED, axis=2)
    return grid(pixels, columns, gap=2 * MAGNIFIED)


def training_captions(stage: Stage, count: int) -> Captions:
    """The training captions by row; raises IntegrityError if the judge was made on other pictures."""
    folder, _ = stage.input("artifacts/data", "data")
    pictures = Pictures.open(folder, "train")
    if len(pictures) != count:
        raise IntegrityError(f"{folder} has {len(pictures)} training pictures, the judge saw {count}: run train_judge")
    return pictures.captions


def _track(stage: Stage, default: Point, best: Mapping[int, Point]) -> None:
    stage.tracker.metrics({**default.numbers(), "calls": default.calls}, default.calls)
    for calls, point in best.items():
        stage.tracker.metrics({f"by_calls/{name}": value for name, value in point.numbers().items()}, calls)
    for name in ("metrics.json", "passport.json", "grid.png"):
        stage.tracker.artifact(stage.out / name)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    word = choice(BUNDLES)
    run(f"evaluate.{word}", Config, partial(main, word), out=f"artifacts/evaluation/{word}", kind="evaluation")
