"""What the endpoint answers: good requests in OpenAI's form, bad ones with a sentence and never a 5xx."""

import base64
import io
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from services.schema import Generation

ROUTE = "/v1/images/generations"
NESTED = b'{"label":' + b"[" * 20_000 + b"]" * 20_000 + b"}"

BAD: list[tuple[bytes | dict[str, Any], str | None, str]] = [
    # body, the field at fault, a word of the sentence
    (b"", None, "JSON"),
    (b"{", None, "JSON"),
    (b"nonsense", None, "JSON"),
    (b'{"label": 3,}', None, "JSON"),
    (b'{"label": 3} {}', None, "JSON"),
    (b"\xff\xfe{\x00}\x00", None, "JSON"),
    (b'\xef\xbb\xbf{"label": 3}', None, "JSON"),
    (b'{"prompt": "\xc3"}', None, "JSON"),
    (b"[]", None, "object"),
    (b"null", None, "object"),
    (b'"7"', None, "object"),
    (b'{"label": NaN}', None, "NaN"),
    (b'{"label": 3, "guidance": NaN}', None, "NaN"),
    (b'{"label": 3, "guidance": Infinity}', None, "Infinity"),
    (b'{"label": 3, "guidance": -Infinity}', None, "Infinity"),
    (b'{"label": 3, "guidance": 1e400}', "guidance", "finite"),
    (b'{"label": 1e400}', "label", "integer"),
    (b'{"label": 3, "seed": 1e400}', "seed", "integer"),
    (b'{"label": 3, "seed": ' + b"9" * 400 + b"}", "seed", "less"),
    (b'{"label": 3, "seed": ' + b"9" * 5000 + b"}", None, "JSON"),
    (b'{"label": 3, "guidance": ' + b"9" * 400 + b"}", "guidance", "number"),
    (b'{"label": 3, "label": 4}', "label", "twice"),
    (NESTED, None, ""),
    (b'{"prompt": "\\ud800"}', "prompt", "surrogate"),
    (b'{"prompt": "7\\u0000"}', "prompt", "control"),
    (b'{"\\ud800": 1}', "\ud800", "unknown"),
    (b'{"label": 3, "model": "\\udfff"}', "model", "surrogate"),
    ({}, "prompt", "class"),
    ({"prompt": None, "label": None}, "prompt", "class"),
    ({"prompt": "3", "label": 3}, "prompt", "one"),
    ({"prompt": ""}, "prompt", "1 character"),
    ({"prompt": "x" * 300}, "prompt", "256"),
    ({"prompt": "seven"}, "prompt", "allowed"),
    ({"prompt": "10"}, "prompt", "allowed"),
    ({"prompt": 7}, "prompt", "string"),
    ({"prompt": ["7"]}, "prompt", "string"),
    ({"label": "3"}, "label", "integer"),
    ({"label": True}, "label", "integer"),
    ({"label": 3.0}, "label", "integer"),
    ({"label": 3.5}, "label", "integer"),
    ({"label": -1}, "label", "greater"),
    ({"label": 10}, "label", "0 to 9"),
    ({"label": 10**30}, "label", "0 to 9"),
    ({"label": 3, "n": 0}, "n", "greater"),
    ({"label": 3, "n": 17}, "n", "16"),
    ({"label": 3, "n": "2"}, "n", "integer"),
    ({"label": 3, "n": False}, "n", "integer"),
    ({"label": 3, "seed": -1}, "seed", "greater"),
    ({"label": 3, "seed": "5"}, "seed", "integer"),
    ({"label": 3, "seed": 5.5}, "seed", "integer"),
    ({"label": 3, "seed": 2**63}, "seed", "less"),
    ({"label": 3, "seed": 2**63 - 1, "n": 2}, "seed", "last"),
    ({"label": 3, "seed": {"a": 1}}, "seed", "integer"),
    ({"label": 3, "steps": 3}, "steps", "[1, 2, 4]"),
    ({"label": 3, "steps": 0}, "steps", "greater"),
    ({"label": 3, "steps": 10**6}, "steps", "less"),
    ({"label": 3, "steps": "4"}, "steps", "integer"),
    ({"label": 3, "steps": 4, "num_inference_steps": 4}, "num_inference_steps", "one"),
    ({"label": 3, "guidance": "2"}, "guidance", "number"),
    ({"label": 3, "guidance": True}, "guidance", "number"),
    ({"label": 3, "guidance": -0.1}, "guidance", "greater"),
    ({"label": 3, "guidance_scale": 20.1}, "guidance_scale", "20"),
    ({"label": 3, "size": "64x64"}, "size", "32x32"),
    ({"label": 3, "size": 32}, "size", "string"),
    ({"label": 3, "response_format": "url"}, "response_format", "b64_json"),
    ({"label": 3, "sed": 5}, "sed", "did you mean 'seed'"),
    ({"label": 3, "quality": "hd"}, "quality", "unknown"),
]


@pytest.mark.parametrize(("body", "param", "word"), BAD, ids=range(len(BAD)))
def test_a_bad_body_is_a_400_with_a_sentence(client: TestClient, body: Any, param: str | None, word: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(ROUTE, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert word in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize("wanted", ["cats", "digits@nobody", "../etc", "digits/3"])
def test_an_unknown_model_is_a_404_that_names_the_one_there_is(client: TestClient, wanted: str) -> None:
    answer = client.post(ROUTE, json={"label": 3, "model": wanted})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    assert "digits" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"content-type": "text/plain"}, b'{"label": 3}', 415),
        ({"content-type": "multipart/form-data"}, b"", 415),
        ({"content-type": ""}, b'{"label": 3}', 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, b"\x1f\x8b", 415),
        ({"content-type": "application/json"}, b'{"label": 3, "pad": "' + b"x" * 70_000 + b'"}', 413),
        ({"content-type": "application/json; charset=utf-8"}, b'{"label": 3}', 200),
    ],
)
def test_kind_and_size_of_the_body(client: TestClient, headers: dict[str, str], content: bytes, status: int) -> None:
    answer = client.post(ROUTE, content=content, headers=headers)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert answer.json()["error"]["message"]


def test_unknown_paths_and_methods_have_the_same_form(client: TestClient) -> None:
    assert client.get("/v1/image").json()["error"]["code"] is None
    assert client.get("/v1/image").status_code == 404
    assert client.get(ROUTE).status_code == 405


def test_the_answer_has_openais_form(client: TestClient) -> None:
    answer = client.post(ROUTE, json={"prompt": "7", "n": 3, "seed": 11, "size": "auto", "response_format": "b64_json"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert isinstance(body["created"], int)
    assert [picture["seed"] for picture in body["data"]] == [11, 12, 13]
    assert body["label"] == 7
    assert body["size"] == "32x32"
    picture = Image.open(io.BytesIO(base64.b64decode(body["data"][1]["b64_json"])))
    assert (picture.format, picture.size, picture.mode) == ("PNG", (32, 32), "L")
    assert picture.text["seed"] == "12"
    assert picture.text["digest"] == body["model"]["digest"]


def test_null_means_the_default(client: TestClient) -> None:
    fields = set(Generation.model_fields) - {"label", "seed"}
    plain = client.post(ROUTE, json={"label": 3, "seed": 5}).json()
    nulls = client.post(ROUTE, json={"label": 3, "seed": 5} | dict.fromkeys(fields)).json()
    assert plain["data"] == nulls["data"]
    assert (plain["steps"], plain["guidance"]) == (2, 1.5)


def test_a_seed_is_drawn_when_none_is_given_and_draws_the_same_again(client: TestClient) -> None:
    first = client.post(ROUTE, json={"label": 3, "seed": None}).json()["data"][0]
    second = client.post(ROUTE, json={"label": 3}).json()["data"][0]
    again = client.post(ROUTE, json={"label": 3, "seed": first["seed"]}).json()["data"][0]
    assert first["seed"] != second["seed"]
    assert again == first


def test_every_parameter_reaches_the_picture(client: TestClient) -> None:
    base = {"label": 3, "seed": 5, "steps": 2, "guidance": 1.5}
    changes = [{}, {"label": 4}, {"seed": 6}, {"steps": 4}, {"guidance": 4}, {"guidance": 1}]
    drawn = [client.post(ROUTE, json=base | change).json()["data"][0]["b64_json"] for change in changes]
    pixels = {Image.open(io.BytesIO(base64.b64decode(png))).tobytes() for png in drawn}
    assert len(pixels) == len(changes)


def test_models_page_and_figures(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "digits"
    assert card["classes"] == list("0123456789")
    assert card["allowed_steps"] == [1, 2, 4]
    assert card["sampling"] == {"steps": 2, "guidance": 1.5}
    client.post(ROUTE, json={"label": 3})
    client.post(ROUTE, json={"label": 33})
    figures = client.get("/metrics").text
    assert f'inkwell_requests_total{{route="{ROUTE}",status="200"}}' in figures
    assert f'inkwell_requests_total{{route="{ROUTE}",status="400"}}' in figures
    assert card["digest"] in figures
    page = client.get("/").text
    assert "<form>" in page
    assert "http" not in page
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
