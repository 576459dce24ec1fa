"""The latent cache: exactly what changed is encoded anew, and what is read is what encoding gives now."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_core import manifest
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.noise import Noise
from diffusion_core.vae import KlVae
from pipelines import cache_latents
from pipelines.data import encoding, index
from pipelines.data.index import INDEX, CaptionRow, LatentRow
from pipelines.data.latents import Latents, check_codec
from tests.pipelines.latent_inputs import (
    CODEC_FOLDER,
    OUT,
    TEXT,
    VALIDATION,
    cached,
    files,
    fresh_codec,
    hold_against_fresh,
    in_order,
    some,
    write_codec,
    write_data,
    write_inputs,
)


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KlVae:
    """Twenty pictures, a codec and a validation in a checkout of their own."""
    monkeypatch.chdir(tmp_path)
    return write_inputs()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every batch that a codec is given to encode."""
    given: list[torch.Tensor] = []
    real = KlVae.encode

    def encode(self: KlVae, x: torch.Tensor) -> object:
        given.append(x)
        return real(self, x)

    monkeypatch.setattr(KlVae, "encode", encode)
    return given


def test_fifty_random_edits_encode_exactly_what_they_touch(inputs: KlVae, seen: list[torch.Tensor]) -> None:
    """The model of the store is a set of tuples of all that an entry depends on; no key is asked what it holds."""
    drawn, codec, pictures = random.Random(4), inputs, some(10)
    params: dict[str, object] = {"dtype": "float32", "flip": False, "text": TEXT}
    known: set[tuple[object, ...]] = set()

    def pixel() -> None:
        number = drawn.randrange(len(pictures))
        pixels = pictures[number].pixels.copy()
        pixels[drawn.randrange(8), drawn.randrange(8), drawn.randrange(3)] ^= 1 << drawn.randrange(8)
        pictures[number] = pictures[number]._replace(pixels=pixels)

    def weight() -> None:
        with torch.no_grad():
            parameter = drawn.choice(list(codec.encoder.parameters())).view(-1)
            parameter[drawn.randrange(len(parameter))] += 0.25

    def transform() -> None:
        params["flip"] = not params["flip"]

    def dtype() -> None:
        params["dtype"] = "float16" if params["dtype"] == "float32" else "float32"

    def caption() -> None:
        number = drawn.randrange(len(pictures))
        pictures[number] = pictures[number]._replace(caption=drawn.choice([None, "", f"new text {drawn.random()}"]))

    def text_weights() -> None:
        params["text"] = TEXT.extended(seed=drawn.randrange(3))

    edits: list[Callable[[], None]] = [pixel, weight, transform, dtype, caption, text_weights]
    for turn in range(51):
        if turn:
            drawn.choice(edits)()
        write_data(pictures)
        write_codec(codec)
        weights = b"".join(value.numpy().tobytes() for value in codec.state_dict().values())
        ways = [False, True] if params["flip"] else [False]
        wanted = {(one.png(), way, weights, params["dtype"]) for one in pictures for way in ways}
        texts = {(one.caption, params["text"], params["dtype"]) for one in pictures if one.caption is not None}
        seen.clear()
        told = cached(OUT, batch=4, **params)
        new = wanted - known
        given = {x.numpy().tobytes() for batch in seen for x in batch}
        tensors = {one.png(): one.tensor() for one in pictures}
        assert given == {(tensors[key[0]].flip(2) if key[1] else tensors[key[0]]).numpy().tobytes() for key in new}
        assert told == {
            "encoded": len(new) + len(texts - known),
            "reused": len(wanted & known) + len(texts & known),
            "damaged": 0,
        }
        known |= wanted | texts
        hold_against_fresh(pictures, codec, str(params["dtype"]), bool(params["flip"]), True)


def test_two_clean_runs_and_a_grown_cache_give_the_same_bytes(tmp_path: Path) -> None:
    params = {"batch": 4, "flip": True, "text": TEXT}
    cached(OUT, **params)
    first = files(OUT)
    cached(OUT, store="other", **params)
    assert files(OUT) == first
    write_data(some(20)[3:11])
    cached(OUT, store="grown", **params)
    write_data(some(20))
    told = cached(OUT, store="grown", **params)
    assert told["reused"] and told["encoded"]
    assert files(OUT) == first


def test_one_per_cent_more_pictures_costs_one_per_cent(seen: list[torch.Tensor]) -> None:
    pictures = some(300)
    write_data(pictures)
    assert cached(OUT, batch=1) == {"encoded": 300, "reused": 0, "damaged": 0}
    write_data([*pictures, *some(3, seed=1)])
    seen.clear()
    assert cached(OUT, batch=1) == {"encoded": 3, "reused": 300, "damaged": 0}
    assert sum(map(len, seen)) == 3


def test_a_codec_is_always_given_whole_batches(seen: list[torch.Tensor]) -> None:
    """So that what a picture gives does not depend on how many others are encoded."""
    cached(OUT, batch=4)
    assert [len(x) for x in seen] == [4] * 6  # 15 pictures of train, 5 of val


def test_every_row_is_named_with_the_key_it_was_found_by(tmp_path: Path) -> None:
    cached(OUT, batch=4, text=TEXT)
    rows = index.rows(index.read(OUT / INDEX, LatentRow), LatentRow)
    wanted = [hashlib.sha256(one.png()).hexdigest() for one in in_order(some(20))]
    assert [row.sha256 for row in rows] == wanted
    assert [row.row for row in rows] == [*range(15), *range(5)]
    assert {(row.split, row.file) for row in rows} == {("train", "train.safetensors"), ("val", "val.safetensors")}
    assert len({row.cache_key for row in rows}) == 20
    texts = index.rows(index.read(OUT / "captions.parquet", CaptionRow), CaptionRow)
    assert [text.row for text in texts] == list(range(1, len(texts) + 1))
    said = [one.caption for one in in_order(some(20)) if one.caption is not None]
    assert [text.caption for text in texts] == list(dict.fromkeys(said))  # in the order of the index, each once
    stored = load_file(OUT / "captions.safetensors")
    assert not stored["text"][0].any()
    assert stored["mask"][0].tolist() == [True] + [False] * 11
    assert manifest.read(OUT).files["captions.safetensors"].samples == len(texts) + 1


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"batch": 0}, "batch 0"),
        ({"workers": -1}, "workers -1"),
        ({"store_gb": 0.0}, "store_gb 0"),
        ({"store": ""}, "store ''"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(params: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cache_latents.Config(**params)


def test_text_without_a_caption_is_refused() -> None:
    write_data([one._replace(caption=None) for one in some(8)])
    with pytest.raises(ConfigError, match="no picture of .*data has a caption"):
        cached(OUT, text=TEXT)


def test_latents_of_another_codec_are_refused(inputs: KlVae) -> None:
    cached(OUT, batch=4)
    check_codec(manifest.read(OUT), CODEC_FOLDER)
    (CODEC_FOLDER / "page.html").write_text("a new page makes no latent stale")
    check_codec(manifest.read(OUT), CODEC_FOLDER)
    write_codec(fresh_codec(seed=1))
    with pytest.raises(IntegrityError, match="run cache_latents again"):
        check_codec(manifest.read(OUT), CODEC_FOLDER)


def test_pictures_of_several_sizes_lie_in_a_file_each_and_are_read_in_the_order_of_the_index(inputs: KlVae) -> None:
    pictures = [*some(6, size=(8, 16)), *some(5, seed=1, size=(16, 8)), *some(4, seed=2)]
    write_data(pictures)
    cached(OUT, batch=4, dtype="float32", flip=True, text=TEXT)
    for split in ("train", "val"):
        wanted = [one for one in in_order(pictures) if one.split == split]
        sizes = [one.pixels.shape[:2] for one in wanted]
        latents = Latents.open(OUT, split)
        assert latents.groups == tuple(sizes.count(size) for size in dict.fromkeys(sizes))
        assert latents.shapes == tuple((2, height // 2, width // 2) for height, width in dict.fromkeys(sizes))
        stored = [load_file(OUT / f"{split}-{height}x{width}.safetensors") for height, width in dict.fromkeys(sizes)]
        moments = [one for part in stored for one in zip(part["moments"], part["mirrored"], strict=True)]
        for row, (one, both) in enumerate(zip(wanted, moments, strict=True)):
            for x, found in zip((one.tensor(), one.tensor().flip(2)), both, strict=True):
                with torch.no_grad():
                    torch.testing.assert_close(found, torch.cat(inputs.encode(x[None]), 1)[0], rtol=1e-5, atol=1e-5)
            batch = latents.batch(torch.tensor([row]), Noise(0, torch.tensor([row])))
            assert batch.x.shape[1:] == (2, *both[0].shape[1:])
            assert batch.cond["label"].tolist() == [one.label]
            assert bool(batch.cond["text"].any()) == (one.caption is not None)
    told = manifest.read(OUT)
    assert told.about["image_shape"] == [3, 8, 8]
    assert told.about["latent_shape"] == [2, 4, 4]
    assert {name: file.samples for name, file in told.files.items() if name.startswith("val")} == {
        "val-8x8.safetensors": 1,
        "val-8x16.safetensors": 1,
        "val-16x8.safetensors": 1,
    }


def test_projects_share_a_store_and_its_limit_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = str(tmp_path / "shared")
    first = cached(OUT, batch=4, store=shared)
    before = files(OUT)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    write_inputs()
    assert (first["encoded"], cached(OUT, batch=4, store=shared)["reused"]) == (20, 20)
    assert files(OUT) == before
    assert cached(OUT, batch=4, store=shared, store_gb=1e-9)["reused"] == 20  # kept until they were copied
    assert files(OUT) == before
    assert not list((tmp_path / "shared" / "segments").iterdir())


def test_a_change_of_the_encoders_code_is_another_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = KlVae(1, widths=(8, 8))
    before = encoding.code_of(codec)
    hashed = manifest.hash_file
    counts = {"vae.py": True, "autoencoder.py": True, "codec.py": True, "images.py": True, "dit.py": False}
    for name, matters in counts.items():
        monkeypatch.setattr(manifest, "hash_file", lambda path, name=name: hashed(path) + "!" * (path.name == name))
        assert (encoding.code_of(codec) != before) == matters, name


def test_a_validation_of_other_pictures_opens_no_gate() -> None:
    passed = (VALIDATION / manifest.NAME).read_bytes()
    write_data(some(21))
    (VALIDATION / manifest.NAME).write_bytes(passed)
    with pytest.raises(IntegrityError, match="artifacts/validation is of another artifacts/data"):
        cached(OUT)
