"""A model that reads text in service: prompts as free text, the cache's own tokens, the same bytes in any company."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from diffusion_core import bundle
from services import registry, web
from services.config import Target
from services.generator import Generator, Order
from services.service import Service
from tests.services.conftest import TEXT, settings, write_text_bundle

ROUTE = "/v1/images/generations"
TOLD = {  # a prompt, and what a picture's metadata say of it
    "a red cat": "a red cat",
    "日本の猫": "日本の猫",
    "👩\u200d🚀 in the rain": r"👩\u200d🚀 in the rain",
    'quotes "and\\back"': r'quotes "and\\back"',
    "x" * 256: "x" * 256,
}
PROMPTS = list(TOLD)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text")
    return {"free": write_text_bundle(root / "free", ()), "both": write_text_bundle(root / "both", ("cat", "dog"))}


def serving(folder: Path) -> Iterator[TestClient]:
    service = Service(settings(folder))
    with TestClient(web.create(service), raise_server_exceptions=False) as client:
        assert client.portal is not None
        client.portal.call(service.load, Target(model=service.config.model))
        assert service.refusal is None
        yield client


@pytest.fixture(scope="module")
def free(folders: dict[str, Path]) -> Iterator[TestClient]:
    yield from serving(folders["free"])


@pytest.fixture(scope="module")
def both(folders: dict[str, Path]) -> Iterator[TestClient]:
    yield from serving(folders["both"])


def generator(folder: Path) -> Generator:
    return Generator(registry.load(f"folder://{folder}", "", folder.parent), 2)


def drawn(client: TestClient, **asked: Any) -> dict[str, Any]:
    answer = client.post(ROUTE, json=asked)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def pngs(told: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(one["b64_json"]) for one in told["data"]]


def refusal(client: TestClient, **asked: Any) -> tuple[str, str]:
    answer = client.post(ROUTE, json=asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_free_text_and_told_again(free: TestClient, prompt: str) -> None:
    told = drawn(free, prompt=prompt, seed=5)
    assert told["prompt"] == prompt and "label" not in told
    (first,), (again,) = pngs(told), pngs(drawn(free, prompt=prompt, seed=5))
    assert first == again
    with Image.open(io.BytesIO(first)) as picture:
        said = dict(picture.info)
    assert said["seed"] == "5" and "class" not in said
    assert said["prompt"] == TOLD[prompt]


def test_what_cannot_be_seen_is_written_out_in_the_picture(free: TestClient) -> None:
    (png,) = pngs(drawn(free, prompt="a\u202ecat\u200b, a\\b\u2028c, é 猫", seed=1))
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.info["prompt"] == r"a\u202ecat\u200b, a\\b\u2028c, é 猫"


def test_the_text_decides_the_picture(free: TestClient) -> None:
    seen = {pngs(drawn(free, prompt=prompt, seed=1))[0] for prompt in PROMPTS}
    assert len(seen) == len(PROMPTS)


def test_the_same_order_gives_the_same_bytes_in_any_company(folders: dict[str, Path]) -> None:
    made = generator(folders["both"])
    orders = [Order(seed, seed % 3 - 1, 2, 1.5, PROMPTS[seed % 5]) for seed in range(9)]
    orders[4] = Order(4, 1, 2, 1.5, None)
    together = made.draw(orders)
    assert [made.draw([order])[0] for order in orders] == together
    assert made.draw(orders[::-1]) == together[::-1]


def test_the_server_makes_the_tokens_that_the_cache_holds(folders: dict[str, Path], tmp_path: Path) -> None:
    """As cache_latents makes them: by the encoder saved alone, in batches."""
    bundle.save_text(TEXT.build(), TEXT, tmp_path)
    assert bundle.text_digest(tmp_path) == bundle.text_digest(folders["free"] / "text")
    cached = bundle.load_text(tmp_path).encode(PROMPTS)
    served = generator(folders["free"]).model.bundle
    assert type(served.text) is type(bundle.load_text(tmp_path))
    found = served.condition(torch.full((len(PROMPTS),), -1), PROMPTS)
    assert torch.equal(found["mask"], cached.mask)
    torch.testing.assert_close(found["text"], cached.text, rtol=0, atol=1e-6)


def test_a_class_is_allowed_where_there_are_any(both: TestClient, free: TestClient) -> None:
    asked = [{"prompt": "a cat"}, {"prompt": "a cat", "label": 0}, {"prompt": "a cat", "label": 1}, {"label": 1}]
    told = [drawn(both, seed=3, **one) for one in asked]
    assert len({pngs(one)[0] for one in told}) == 4
    assert [one.get("label") for one in told] == [None, 0, 1, 1]
    with Image.open(io.BytesIO(pngs(told[2])[0])) as picture:
        assert picture.info["class"] == "dog" and picture.info["prompt"] == "a cat"
    assert refusal(both, label=2) == ("label", "label is 2; a class from 0 to 1 is wanted")
    assert (
        refusal(free, label=0, prompt="a cat")[1] == "label is 0; a prompt, as this model knows no classes, is wanted"
    )


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({}, "say what to draw"),
        ({"prompt": ""}, "1 character"),
        ({"prompt": "x" * 257}, "256"),
        ({"prompt": 7}, "string"),
    ],
)
def test_prompts_out_of_bounds_are_refused(free: TestClient, asked: dict[str, Any], word: str) -> None:
    param, message = refusal(free, **asked)
    assert param == "prompt" and word in message


def test_the_list_of_models_says_that_it_reads(free: TestClient, client: TestClient) -> None:
    (card,) = free.get("/v1/models").json()["data"]
    assert card["text"] is True and card["classes"] == []
    (card,) = client.get("/v1/models").json()["data"]
    assert card["text"] is False


def test_a_model_of_classes_behaves_as_ever(client: TestClient) -> None:
    told = drawn(client, prompt="7", seed=1)
    assert told["label"] == 7 and "prompt" not in told
    assert told["data"] == drawn(client, label=7, seed=1)["data"]
    with Image.open(io.BytesIO(pngs(told)[0])) as picture:
        assert list(picture.info) == ["model", "digest", "class", "seed", "steps", "guidance"]
    assert refusal(client, prompt="7", label=7) == ("prompt", "'label' and 'prompt' say the same thing; give one")
    assert json.dumps(told).isascii()
