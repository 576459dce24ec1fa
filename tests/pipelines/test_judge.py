"""The ruler made from real shards, and bundles held against it whose pictures are known beforehand."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.svm import SVC
from torch import Tensor, nn

from diffusion_core import bundle as bundles
from diffusion_core import manifest
from diffusion_core.bundle import Bundle, DenoiserSpec
from diffusion_core.codec import Pixel
from diffusion_core.denoiser import Denoiser, QuarterLogNoise, UnitVariance
from diffusion_core.errors import ConfigError, DataError, RefusedError
from diffusion_core.images import decode, encode_png, to_tensor
from diffusion_core.metrics import judge
from diffusion_core.metrics.passport import Passport
from diffusion_core.metrics.ruler import Ruler, Scoring, load_ruler
from diffusion_core.multistep import Multistep
from diffusion_core.nets import NetSpec
from diffusion_core.sampler import Sampling, generate
from diffusion_core.schedule import Linear
from diffusion_core.solver import FirstOrder, Heun
from diffusion_core.spec import build
from diffusion_core.target import FLOW, X0
from diffusion_core.vae import CodecSpec
from pipelines import evaluate, prepare, train_judge
from pipelines.curves import candidates, measure
from pipelines.data.reader import Samples, read_samples
from pipelines.stage import Stage
from pipelines.tracking import Tracker

SIZE, CLASSES = 16, 10
SOLVERS = (FirstOrder(), Heun(FLOW()), Multistep(), Multistep(FLOW(), "t", 2))


class Real(NamedTuple):
    """A checkout's root with data and judge made, the digits in it and the loaded ruler."""

    root: Path
    train: Samples
    val: Samples
    ruler: Ruler


def run_stage(main: Any, config: Any, folder: str, kind: str) -> tuple[Path, Any]:
    """Run a stage's main in the current folder and seal what it made; also gives what its tracker was told."""
    out = Path(folder)
    out.mkdir(parents=True)
    tracker = create_autospec(Tracker, instance=True)
    stage = Stage(folder, out, Path("work"), tracker, Console(quiet=True))
    manifest.seal(out, kind, main(config, stage), parents=stage.parents, samples=stage.samples)
    return out, tracker


def pass_validation(data: Path) -> None:
    """The folder of a validation that the data passed."""
    folder = Path("artifacts/validation")
    folder.mkdir()
    manifest.seal(folder, "validation", {}, parents={"artifacts/data": manifest.read(data).digest})


JUDGE = {"images": 9000, "batch": 128, "lr": 4e-3, "seed": 0}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(judge, "WIDTHS", (2.0,))  # for speed
        source = {"source": {"kind": "digits"}, "channels": 1, "resolution": SIZE}
        data, _ = run_stage(prepare.main, build(prepare.Config, source, "prepare"), "artifacts/data", "data")
        pass_validation(data)
        folder, _ = run_stage(train_judge.main, build(train_judge.Config, JUDGE, "judge"), "artifacts/judge", "judge")
        yield Real(root, read_samples(data, "train"), read_samples(data, "val"), load_ruler(folder))


class Recall(nn.Module):
    """A net that answers every noise with one known picture a class, and counts how often it is asked."""

    def __init__(self, pictures: Tensor, labels: Tensor):
        super().__init__()
        self.pictures = nn.Parameter(torch.stack([pictures[labels == label][0] for label in range(CLASSES)]))
        self.calls = 0

    def forward(self, x: Tensor, c: Tensor, cond: Any = None) -> Tensor:
        self.calls += len(x)
        return self.pictures[cond["label"]]


def recalling(samples: Samples, **sampling: Any) -> Bundle:
    """A bundle that paints known real pictures."""
    net = Recall(to_tensor(list(samples.images)), torch.from_numpy(samples.labels))
    shape = (1, SIZE, SIZE)
    return Bundle(
        Pixel(),
        CodecSpec("pixel"),
        Denoiser(net, Linear(), X0()),
        create_autospec(DenoiserSpec, instance=True, channels=1),
        Sampling(**{"steps": 1} | sampling),
        tuple("0123456789"),
        shape,
    )


def passport(ruler: Ruler, sampling: Sampling, count: int) -> Passport:
    return Passport(ruler.name, "e", "none", "r", ruler.real.train.count, count, 0, sampling, "b", "none")


def test_the_ruler_knows_real_pictures(real: Real) -> None:
    about = manifest.verify(real.root / "artifacts/judge", "judge").about
    extractor = manifest.hash_file(real.root / "artifacts/judge/extractor.safetensors")
    assert real.ruler.name == about["name"] == f"FD (digits-cnn, {extractor[:8]})"
    assert real.ruler.real.train.count == len(real.train.labels) == len(real.ruler.real.labels)
    assert real.ruler.real.val.count == len(real.val.labels)
    assert about["unit"] > 10 * about["unit_std"] / np.sqrt(10) > 0
    assert min(about["accuracy"].values()) >= 0.97
    scoring = Scoring(real.ruler)
    for start in range(0, len(real.train.labels), 100):
        part = slice(start, start + 100)
        scoring.add(to_tensor(list(real.train.images[part])), torch.from_numpy(real.train.labels[part]))
    score = scoring.score()
    assert score.distance_u < 1e-6
    assert 0.2 < score.distance_val_u < 3
    assert score.accuracy > 0.99


def test_the_judge_agrees_with_another_classifier_on_what_is_no_digit(real: Real) -> None:
    halves = (to_tensor(list(real.val.images[:-1])) + to_tensor(list(real.val.images[1:]))) / 2
    peer = SVC().fit(real.train.images.reshape(len(real.train.labels), -1), real.train.labels)
    said = peer.predict((halves.flatten(1).numpy() + 1) * 127.5)
    assert (real.ruler.judge.predict(halves).numpy() == said).mean() > 0.7


def test_the_ruler_is_fixed_by_its_seed(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(real.root)
    monkeypatch.setattr(judge, "ANCHORS", 200)  # for speed
    config = partial(build, train_judge.Config, path="judge")
    short = JUDGE | {"images": 512, "splits": 2}
    folders = [
        run_stage(train_judge.main, config(short | {"seed": seed}), f"again/{i}", "judge")[0]
        for i, seed in enumerate((3, 3, 4))
    ]
    one, same, other = (manifest.read(folder, "judge").digest for folder in folders)
    assert one == same != other


def test_pictures_without_a_class_make_no_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flat").mkdir()
    for n in range(20):
        noise = np.random.default_rng(n).integers(0, 256, (8, 8, 1), np.uint8)
        Path(f"flat/{n}.png").write_bytes(encode_png(noise))
    source = {"source": {"kind": "image_folder", "path": "flat"}, "channels": 1, "resolution": 8}
    data, _ = run_stage(prepare.main, build(prepare.Config, source, "prepare"), "artifacts/data", "data")
    pass_validation(data)
    with pytest.raises(DataError, match="20 of 20 pictures have no class"):
        run_stage(train_judge.main, build(train_judge.Config, JUDGE, "judge"), "artifacts/judge", "judge")


def test_candidates_make_exactly_the_calls_asked_for(real: Real) -> None:
    bundle = recalling(real.train)
    net = bundle.denoiser.net
    assert isinstance(net, Recall)
    for guidance, asked in ((1.0, (1, 2, 3, 4, 7)), (3.0, (2, 4, 6))):
        for calls in asked:
            for sampling in candidates(Sampling(50, guidance=guidance), calls, SOLVERS):
                net.calls = 0
                asked = bundle.condition(torch.tensor([1, 2, 3]))
                generate(bundle.denoiser, bundle.codec, sampling, (1, SIZE, SIZE), [0, 1, 2], asked)
                assert net.calls == 3 * calls
    solvers = {calls: [s.solver for s in candidates(Sampling(50), calls, SOLVERS)] for calls in (1, 2, 3)}
    assert solvers[1] == [FirstOrder()]
    assert solvers[3] == [*SOLVERS]
    assert Heun(FLOW()) not in solvers[2]
    with pytest.raises(ConfigError, match="calls 3: no solver"):
        candidates(Sampling(50, guidance=2.0), 3, (FirstOrder(),))
    with pytest.raises(ConfigError, match=r"steps are \[2, 4\]"):
        candidates(Sampling(4, allowed_steps=(2, 4)), 3, ())


def test_a_model_that_paints_real_digits_is_right_and_one_that_confuses_them_is_not(real: Real) -> None:
    true = recalling(real.train)
    asked = passport(real.ruler, true.sampling, 300)
    point = measure(true, real.ruler, asked, batch=128)
    assert (point.score.accuracy, point.score.count) == (1.0, 300)
    net = true.denoiser.net
    assert isinstance(net, Recall)
    net.pictures.data = net.pictures.data.roll(1, 0)
    assert measure(true, real.ruler, asked, batch=128).score.accuracy == 0
    net.pictures.data[4, 0, 2, 3] = float("nan")
    with pytest.raises(DataError, match="first_order in 1 steps, seeds from 0: .* not finite"):
        measure(true, real.ruler, asked, batch=128)


def test_pictures_have_the_class_law_of_the_training_pictures(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Scoring, "add", lambda self, images, labels: asked.append(labels))
    monkeypatch.setattr(Scoring, "score", lambda self: create_autospec(object, count=sum(map(len, asked))))
    count = len(real.train.labels) + 5
    measure(recalling(real.train), real.ruler, passport(real.ruler, Sampling(1), count), batch=64)
    assert torch.cat(asked).tolist() == [*real.train.labels, *real.train.labels[:5]]
    with pytest.raises(DataError, match="asked for"):  # two runs into one tally: twice as many as wanted
        measure(recalling(real.train), real.ruler, passport(real.ruler, Sampling(1), count), batch=64)


@pytest.fixture
def teacher(real: Real, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle on disk with random weights that are not all zero."""
    monkeypatch.chdir(real.root)
    folder = real.root / "artifacts/teacher"
    if not folder.exists():
        net = {"kind": "dit", "channels": 4, "size": SIZE // 2, "classes": CLASSES, "width": 16, "depth": 1}
        made = DenoiserSpec(NetSpec.read(net, "net"), Linear(), FLOW(), UnitVariance(), QuarterLogNoise())
        torch.manual_seed(0)
        denoiser = made.build()
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.1)
        codec = CodecSpec.read({"kind": "kl_vae", "channels": 1, "widths": [8, 8]}, "codec")
        names, shape = tuple("0123456789"), (1, SIZE, SIZE)
        bundles.save(Bundle(codec.build(), codec, denoiser, made, Sampling(4), names, shape, {"ema": 0.99}), folder)
        manifest.seal(folder, "bundle", {})
    return folder


def test_evaluate_says_the_same_twice_and_what_it_depends_on(real: Real, teacher: Path) -> None:
    params = {
        "calls": [1, 3, 4],
        "batch": 50,
        "count": 80,
        "solvers": [{"kind": "heun", "frame": {"kind": "flow"}}, {"kind": "multistep"}],
        "compare_up_to": 3,
    }
    config = build(evaluate.Config, params, "evaluate.teacher")
    (folder, tracker), (again, _) = (
        run_stage(partial(evaluate.main, "teacher"), config, f"evaluation/{i}", "evaluation") for i in range(2)
    )
    first, second = (json.loads((path / "metrics.json").read_text()) for path in (folder, again))
    for metrics in (first, second):
        for row in (metrics, *metrics["by_calls"].values()):
            assert row.pop("seconds_per_image") > 0
    assert first == second
    assert first.keys() == {
        *("name", "metric", "distance_u", "distance_val_u", "unit", "accuracy", "calls", "seed", "count"),
        "by_calls",
    }
    assert (first["name"], first["metric"], first["count"], first["calls"]) == ("teacher", real.ruler.name, 80, 4)
    about = manifest.read(folder).about
    default = build(Passport, json.loads((folder / "passport.json").read_text()), "passport")
    assert default.bundle == about["bundle"] == manifest.read(teacher).digest
    assert default.digest == about["passport"]
    assert default.sampling == Sampling(4)
    assert (default.ema, default.first_seed) == ("0.99", 0)
    assert first["by_calls"]["4"]["distance_u"] == first["distance_u"]
    curve = json.loads((folder / "curve.json").read_text())
    assert (folder / "curve.json").read_bytes() == (again / "curve.json").read_bytes()
    assert [row["calls"] for row in curve] == [1, 3, 3, 3, 4]
    assert len({row["passport"] for row in curve}) == 5
    for calls, row in first["by_calls"].items():
        assert row["distance_u"] == min(p["distance_u"] for p in curve if p["calls"] == int(calls))
    sheet = decode((folder / "grid.png").read_bytes(), 1)
    assert sheet.shape == (6 * (2 * SIZE + 4) + 4, 10 * (2 * SIZE + 4) + 4, 1)
    assert {call.args[1] for call in tracker.metrics.call_args_list} == {1, 3, 4}
    assert [call.args[0].name for call in tracker.artifact.call_args_list] == [
        "metrics.json",
        "passport.json",
        "grid.png",
    ]


def test_evaluate_refuses_a_bundle_of_other_pictures(real: Real) -> None:
    other = recalling(real.train)
    other.image_shape = (3, SIZE, SIZE)
    with pytest.raises(RefusedError, match=r"\(3, 16, 16, 10\); the judge was made for \(1, 16, 16, 10\)"):
        evaluate.check_fits(other, real.ruler)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"calls": [0], "batch": 8}, "calls"),
        ({"calls": [1], "batch": 8, "count": 1}, "count 1"),
        ({"calls": [1], "batch": 8, "solvers": [{"kind": "huen"}]}, "did you mean 'heun'"),
        ({"calls": [1], "bacth": 8}, "did you mean 'batch'"),
    ],
)
def test_evaluate_refuses_bad_settings(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build(evaluate.Config, params, "params.yaml: evaluate.teacher")
