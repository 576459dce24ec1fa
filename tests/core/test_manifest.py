"""Manifests: a folder is whole, or it is refused by the name of what is wrong."""

import hashlib
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core import manifest
from diffusion_core.errors import IntegrityError

FILES = {"a.bin": b"first", "deep/b.bin": bytes(range(256)), "empty": b""}


def fill(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    folder = fill(tmp_path_factory.mktemp("sealed"))
    manifest.seal(folder, "data", {"classes": ["0"]}, parents={"p": "d"}, samples={"a.bin": 3})
    return folder


def test_says_what_sha256_of_the_standard_library_says(sealed):
    raw = json.loads((sealed / manifest.NAME).read_text())
    assert raw["files"] == {
        name: {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "samples": 3 if name == "a.bin" else None,
        }
        for name, content in FILES.items()
    }
    assert manifest.verify(sealed, "data").digest == hashlib.sha256((sealed / manifest.NAME).read_bytes()).hexdigest()


def test_equal_content_gives_equal_bytes_in_any_order(sealed, tmp_path):
    fill(tmp_path, dict(reversed(FILES.items())))
    manifest.seal(tmp_path, "data", {"classes": ["0"]}, parents={"p": "d"}, samples={"a.bin": 3})
    assert (tmp_path / manifest.NAME).read_bytes() == (sealed / manifest.NAME).read_bytes()


@given(name=st.sampled_from(["a.bin", "deep/b.bin"]), place=st.integers(0, 255), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_and_named(sealed, name, place, bit):
    content = bytearray(FILES[name])
    content[place % len(content)] ^= 1 << bit
    (sealed / name).write_bytes(content)
    try:
        with pytest.raises(IntegrityError, match=name):
            manifest.verify(sealed)
    finally:
        (sealed / name).write_bytes(FILES[name])
    manifest.verify(sealed)


@given(cut=st.integers(0, 10_000))
def test_a_torn_manifest_is_refused(sealed, cut):
    whole = (sealed / manifest.NAME).read_bytes()
    (sealed / manifest.NAME).write_bytes(whole[: cut % (len(whole) - 1)])
    try:
        with pytest.raises(IntegrityError, match=manifest.NAME):
            manifest.verify(sealed)
    finally:
        (sealed / manifest.NAME).write_bytes(whole)


@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_an_altered_manifest_is_refused_or_is_another(sealed, place, byte):
    """No byte of the manifest itself can change without an error or another digest, and nothing else is raised."""
    whole = (sealed / manifest.NAME).read_bytes()
    altered = bytearray(whole)
    altered[place % len(whole)] = byte
    (sealed / manifest.NAME).write_bytes(altered)
    digest = hashlib.sha256(whole).hexdigest()
    try:
        found = manifest.verify(sealed).digest
    except IntegrityError:
        found = None
    finally:
        (sealed / manifest.NAME).write_bytes(whole)
    same = json.loads(bytes(altered)) == json.loads(whole) if found == digest else False
    assert found != digest or same


@pytest.mark.parametrize(
    "raw", ["[]", "{}", "null", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "1"]
)
def test_json_that_is_no_manifest_is_refused(tmp_path, raw):
    (tmp_path / manifest.NAME).write_text(raw)
    with pytest.raises(IntegrityError, match=manifest.NAME):
        manifest.verify(tmp_path)


def test_a_missing_file_a_shorter_file_and_another_kind_are_named(sealed, tmp_path):
    folder = shutil.copytree(sealed, tmp_path / "copy")
    with pytest.raises(IntegrityError, match="holds 'data'.*allowed: codec"):
        manifest.verify(folder, "codec")
    (folder / "deep/b.bin").write_bytes(b"short")
    with pytest.raises(IntegrityError, match=r"deep/b\.bin has 5 bytes"):
        manifest.verify(folder)
    (folder / "deep/b.bin").unlink()
    with pytest.raises(IntegrityError, match=r"deep/b\.bin is missing"):
        manifest.verify(folder)


def test_a_folder_without_a_manifest_does_not_exist(tmp_path):
    old, draft = fill(tmp_path / "out"), fill(tmp_path / "draft")
    with pytest.raises(IntegrityError, match="never finished"):
        manifest.publish(draft, old)
    assert (old / "a.bin").read_bytes() == FILES["a.bin"]
    manifest.seal(draft, "data", {})
    manifest.publish(draft, old)
    assert not draft.exists()
    assert manifest.verify(old).kind == "data"
