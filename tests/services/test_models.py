"""Which bytes go into service, and that a picture is the same in any company."""

import asyncio
import random
import shutil
import socket
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from diffusion_core import manifest
from diffusion_core.errors import ConfigError, IntegrityError, UnreachableError
from services import registry, web
from services.batcher import Batcher
from services.config import Config, Target
from services.generator import Generator, Order
from services.service import Service
from tests.services.conftest import settings, write_bundle


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator(registry.load(f"folder://{folder}", "", folder.parent / "cache"), chunk=2)


def test_a_picture_is_the_same_alone_and_in_any_company(generator: Generator) -> None:
    dice = random.Random(0)
    order = Order(5, 3, 2, 1.5)
    (alone,) = generator.draw([order])
    for count in (1, 2, 3, 4, 7, 15):
        company = [Order(dice.randrange(2**60), dice.randrange(10), dice.choice((1, 2, 4)), 1.5) for _ in range(count)]
        place = dice.randrange(count + 1)
        company.insert(place, order)
        assert generator.draw(company)[place] == alone


def test_batches_are_collected_and_bounded_and_cancelled_orders_are_not_drawn() -> None:
    batches: list[list[int]] = []

    async def draw(orders: list[Order]) -> list[bytes]:
        batches.append([order.seed for order in orders])
        await asyncio.sleep(0.05)
        if any(order.seed == 13 for order in orders):
            raise ConfigError("no")
        return [str(order.seed).encode() for order in orders]

    async def main() -> None:
        batcher = Batcher(draw, limit=4, window=0.01)
        several = [asyncio.create_task(batcher.submit([Order(seed, 0, 1, 1.0)])) for seed in range(6)]
        await asyncio.sleep(0.02)
        several[5].cancel()
        drawn = await asyncio.gather(*several, return_exceptions=True)
        assert drawn[:5] == [[str(seed).encode()] for seed in range(5)]
        assert isinstance(drawn[5], asyncio.CancelledError)
        with pytest.raises(ConfigError):
            await batcher.submit([Order(13, 0, 1, 1.0), Order(14, 0, 1, 1.0)])
        assert await batcher.submit([Order(1, 0, 1, 1.0)]) == [b"1"]

    asyncio.run(main())
    assert batches == [[0, 1, 2, 3], [4], [13, 14], [1]]


@pytest.mark.parametrize("name", ["denoiser.safetensors", "codec.safetensors", "bundle.json", "manifest.json"])
def test_altered_bytes_never_go_into_service(folder: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(folder, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    service = Service(settings(copy))
    with TestClient(web.create(service), raise_server_exceptions=False) as client:
        assert client.portal is not None
        client.portal.call(service.load, Target(model=service.config.model, revision="first"))
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert str(copy) in answer.json()["error"]["message"]
        assert client.post("/v1/images/generations", json={"label": 3}).status_code == 503
        assert client.get("/v1/models").json()["data"] == []
        assert client.get("/healthz").status_code == 200


def test_a_refused_model_leaves_the_one_before_it_in_service(folder: Path, tmp_path: Path) -> None:
    service = Service(settings(folder))
    with TestClient(web.create(service)) as client:
        assert client.portal is not None
        assert client.get("/readyz").status_code == 503
        client.portal.call(service.load, Target(model=service.config.model, revision="first"))
        before = client.get("/readyz").json()
        client.portal.call(service.load, Target(model=f"folder://{tmp_path / 'nothing'}", revision="second"))
        after = client.get("/readyz").json()
        assert after["model"] == before["model"]
        assert "nothing" in after["refused"]
        assert (before["revision"], after["revision"]) == ("first", "second")
        other = write_bundle(tmp_path / "other", seed=1)
        client.portal.call(service.load, Target(model=f"folder://{other}", revision="third"))
        assert client.get("/readyz").json()["model"]["digest"] == manifest.read(other).digest


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"model": "a@b"}, "cache"),
        ({"model": "a@b", "cache": "c", "windw": 0.1}, "did you mean 'window'"),
        ({"model": "a@b", "cache": "c", "replicas": "2"}, "replicas"),
        ({"model": "", "cache": "c"}, "model"),
    ],
)
def test_settings_are_strict(given: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Config.read(given)


class TestRegistry:
    """With a real MLflow on SQLite."""

    @pytest.fixture(scope="class")
    def uri(self, tmp_path_factory: pytest.TempPathFactory, folder: Path) -> str:
        from mlflow import MlflowClient

        home = tmp_path_factory.mktemp("registry")
        uri = f"sqlite:///{home / 'mlflow.db'}"
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = client.create_experiment("x", artifact_location=(home / "artifacts").as_uri())
        client.create_registered_model("digits")
        digest = manifest.read(folder).digest
        tagged = {"good": {"bundle.digest": digest}, "untagged": {}, "swapped": {"bundle.digest": "0" * 64}}
        for version, (alias, tags) in enumerate(tagged.items(), 1):
            run = client.create_run(experiment).info.run_id
            client.log_artifacts(run, str(folder), "bundle")
            client.create_model_version("digits", f"{client.get_run(run).info.artifact_uri}/bundle", tags=tags)
            client.set_registered_model_alias("digits", alias, version)
        return uri

    def test_an_alias_becomes_a_verified_model_and_a_broken_copy_is_fetched_again(
        self, uri: str, tmp_path: Path, folder: Path
    ) -> None:
        model = registry.load("digits@good", uri, tmp_path)
        assert (model.name, model.version, model.digest) == ("digits", "1", manifest.read(folder).digest)
        (copy,) = tmp_path.glob("digits-1-*")
        (copy / "codec.safetensors").write_bytes(b"broken")
        registry.load("digits@good", uri, tmp_path)
        manifest.verify(copy)

    def test_without_the_registry_the_last_verified_copy_serves(self, uri: str, tmp_path: Path) -> None:
        gone = f"sqlite:///{tmp_path}/gone.db"
        with pytest.raises(UnreachableError, match="no such file"):
            registry.load("digits@good", gone, tmp_path / "cache")
        assert not (tmp_path / "gone.db").exists()
        before = registry.load("digits@good", uri, tmp_path / "cache")
        assert registry.load("digits@good", gone, tmp_path / "cache").digest == before.digest
        (copy,) = (tmp_path / "cache").glob("digits-1-*")
        (copy / "codec.safetensors").write_bytes(b"broken")
        with pytest.raises(IntegrityError, match="codec"):
            registry.load("digits@good", gone, tmp_path / "cache")

    @pytest.mark.parametrize(
        ("reference", "kind", "word"),
        [
            ("digits@untagged", IntegrityError, "no tag"),
            ("digits@swapped", IntegrityError, "registered"),
            ("digits@nobody", ConfigError, "nobody"),
            ("cats@good", ConfigError, "cats"),
            ("digits", ConfigError, "name@alias"),
        ],
    )
    def test_what_nothing_vouches_for_is_refused(
        self, uri: str, tmp_path: Path, reference: str, kind: type[Exception], word: str
    ) -> None:
        with pytest.raises(kind, match=word):
            registry.load(reference, uri, tmp_path)
        assert not list(tmp_path.glob("digits-*"))

    def test_a_silent_server_is_given_up_within_fifteen_seconds(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            begun = time.monotonic()
            with pytest.raises(UnreachableError, match="does not answer"):
                registry.load("digits@good", f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
            assert time.monotonic() - begun < 15
