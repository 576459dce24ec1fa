"""The latent cache under faults: damaged stores, inputs that change, killed runs, and workers in any number."""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffusion_core.errors import DataError, IntegrityError
from diffusion_core.vae import KlVae
from pipelines.data import encoding
from tests.pipelines.latent_inputs import (
    OUT,
    TEXT,
    cached,
    files,
    fresh_codec,
    hold_against_fresh,
    some,
    write_codec,
    write_data,
    write_inputs,
)

ROOT = Path(__file__).parents[2]
SEGMENTS = Path(".inkwell/latents/segments")


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KlVae:
    """Twenty pictures, a codec and a validation in a checkout of their own."""
    monkeypatch.chdir(tmp_path)
    return write_inputs()


def segments() -> list[Path]:
    return sorted(SEGMENTS.iterdir())


@pytest.mark.parametrize("place", [0.0, 0.002, 0.01, 0.5, 0.999])
def test_a_flipped_bit_in_the_store_is_found_and_encoded_again(inputs: KlVae, place: float) -> None:
    cached(OUT, batch=4)
    (first, second) = segments()
    data = bytearray((first / "entries.safetensors").read_bytes())
    data[int(place * len(data))] ^= 4
    (first / "entries.safetensors").write_bytes(data)
    told = cached(OUT, batch=4)
    assert (told["damaged"], told["encoded"] + told["reused"]) == (1, 20)
    assert told["encoded"] in (5, 15)  # the pictures of one split
    hold_against_fresh(some(20), inputs, "float16", False, False)
    assert cached(OUT, batch=4) == {"encoded": 0, "reused": 20, "damaged": 0}


def test_a_changed_manifest_or_a_missing_file_of_a_segment_is_found(inputs: KlVae) -> None:
    cached(OUT, batch=4)
    first, second = segments()
    (first / "entries.safetensors").unlink()
    path = second / "manifest.json"
    path.write_text(path.read_text().replace('"entries": ', '"entries": 1'))
    assert cached(OUT, batch=4) == {"encoded": 20, "reused": 0, "damaged": 2}
    hold_against_fresh(some(20), inputs, "float16", False, False)


def test_inputs_that_change_while_they_are_encoded_leave_no_wrong_entry(
    inputs: KlVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codec is replaced after the plan was made and before a worker loads it."""
    real = encoding.encode

    def encode(task: encoding.Task) -> int:
        write_codec(fresh_codec(seed=1))
        return real(task)

    monkeypatch.setattr(encoding, "encode", encode)
    with pytest.raises(IntegrityError, match="codec changed while it was being read"):
        cached(OUT, batch=4)
    assert not segments()


def test_two_ray_workers_write_the_bytes_that_none_do(monkeypatch: pytest.MonkeyPatch) -> None:
    alone_told, alone = cached(OUT, batch=3, flip=True, text=TEXT), files(OUT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the folder is not the checkout
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads its token once a process, so it is one for all tests
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    told = cached(OUT, batch=3, flip=True, text=TEXT, workers=2, store="theirs")
    assert told == alone_told
    assert files(OUT) == alone


def test_a_killed_run_loses_at_most_what_it_was_writing() -> None:
    write_data(some(40))
    words = """
import time
from pathlib import Path
from diffusion_core.vae import KlVae
from pipelines.data import encoding
from tests.pipelines.latent_inputs import cached
encoding.SEGMENT_BYTES = 1
encode = KlVae.encode
KlVae.encode = lambda *given: time.sleep(0.05) or encode(*given)
cached(Path("latents"), batch=2)
"""
    running = subprocess.Popen([sys.executable, "-c", words], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        limit = time.monotonic() + 60
        while not (SEGMENTS.is_dir() and len(segments()) >= 4):
            assert running.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
    finally:
        running.kill()
        running.wait()
    done = len(segments())
    assert cached(OUT, batch=2) == {"encoded": 40 - 2 * done, "reused": 2 * done, "damaged": 0}
    found = files(OUT)
    cached(OUT, batch=2, store="clean")
    assert files(OUT) == found


def test_a_latent_that_is_not_finite_is_refused_by_its_picture(inputs: KlVae) -> None:
    with torch.no_grad():
        inputs.scale.mul_(1e5)  # beyond float16
    write_codec(inputs)
    with pytest.raises(DataError, match="picture [0-9a-f]{16} is not finite as float16"):
        cached(OUT, batch=4)
    assert cached(OUT, batch=4, dtype="float32")["encoded"] == 20
