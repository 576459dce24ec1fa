"""The store of encoded entries, against a dictionary: whole segments or nothing, and never a wrong number."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core import manifest
from diffusion_core.errors import UnreachableError
from pipelines.data.latent_store import Keys, Store, key_of, keys_of


def named(*names: str) -> Keys:
    return keys_of([key_of(b"", name.encode()) for name in names])


def value_of(name: str) -> torch.Tensor:
    return torch.tensor([float(len(name)), float(sum(name.encode()))])


def put(store: Store, *names: str) -> None:
    store.put(named(*names), {"moments": torch.stack([value_of(name) for name in names])})


names = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=8)


@given(batches=st.lists(names, max_size=5), wanted=names)
def test_what_was_put_is_found_wherever_and_however_often_it_lies(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]], wanted: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    for batch in batches:
        put(Store(folder), *batch)
    found = Store(folder).find(named(*wanted))
    known = {name for batch in batches for name in batch}
    firsts = [number for number, name in enumerate(wanted) if name not in known and name not in wanted[:number]]
    assert found.missing.tolist() == firsts
    assert found.entries == len(set(wanted))
    places = np.array([number for number, name in enumerate(wanted) if name in known], np.int64)
    if len(places):
        out = torch.empty(len(places), 2)
        found.copy("moments", places, out)
        assert torch.equal(out, torch.stack([value_of(wanted[place]) for place in places]))
        assert torch.equal(found.entry("moments", places), value_of(wanted[places[0]]))


def test_keys_that_end_in_zeros_are_keys(tmp_path: Path) -> None:
    keys = np.zeros((3, 32), np.uint8)
    keys[1, 30], keys[2, 0] = 1, 1
    store = Store(tmp_path)
    store.put(keys, {"moments": torch.arange(3.0)})
    found, out = store.find(keys[::-1].copy()), torch.empty(3)
    found.copy("moments", slice(0, 3), out)
    assert out.tolist() == [2, 1, 0]


def test_the_recipe_and_the_content_both_decide_the_key() -> None:
    recipes = [bytes(32), bytes(31) + b"\1"]
    assert len({key_of(recipe, content) for recipe in recipes for content in (b"", b"\1", b"\1\1")}) == 6


def test_the_same_segment_twice_is_one(tmp_path: Path) -> None:
    put(Store(tmp_path), "a", "b")
    put(Store(tmp_path), "a", "b")
    assert len(list((tmp_path / "segments").iterdir())) == 1
    assert not list((tmp_path / "drafts").iterdir())


def test_a_draft_is_never_found(tmp_path: Path) -> None:
    """What a killed writer leaves: everything but the rename."""
    put(Store(tmp_path), "a")
    (segment,) = (tmp_path / "segments").iterdir()
    segment.rename(tmp_path / "drafts" / "killed")
    assert Store(tmp_path).find(named("a")).missing.tolist() == [0]


def test_a_segment_under_another_name_is_thrown_away(tmp_path: Path) -> None:
    """A whole and sealed segment, but not the one that its name says."""
    put(Store(tmp_path), "a")
    put(Store(tmp_path), "b")
    first, second = sorted((tmp_path / "segments").iterdir())
    digest = manifest.read(first).digest
    assert first.name == digest
    second.rename(second.with_name("f" * 64))
    found = Store(tmp_path).find(named("a", "b"))
    assert (len(found.missing), found.damaged) == (1, 1)


def test_a_segment_is_hashed_once_a_process_and_only_if_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(Store(tmp_path), "a")
    put(Store(tmp_path), "b")
    hashed: list[Path] = []
    real = manifest.hash_file
    monkeypatch.setattr(manifest, "hash_file", lambda path: hashed.append(path) or real(path))
    store = Store(tmp_path)
    for _ in range(3):
        store.find(named("a"))
    assert len(hashed) == 1


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    paths = {}
    for number, name in enumerate("abcd"):
        before = set((tmp_path / "segments").iterdir())
        put(store, name)
        (paths[name],) = set((tmp_path / "segments").iterdir()) - before
        os.utime(paths[name] / manifest.NAME, ns=(number, number))
    store.find(named("a"))  # now the latest
    size = sum(file.stat().st_size for file in paths["a"].iterdir())
    assert store.trim(10 * size) == 0
    assert store.trim(2 * size + size // 2) == 2
    assert sorted(name for name, path in paths.items() if path.exists()) == ["a", "d"]
    assert store.find(named("a", "b", "c", "d")).missing.tolist() == [1, 2]
    assert store.trim(0) == 2


def test_abandoned_drafts_are_swept_and_fresh_ones_are_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("old", "new"):
        (tmp_path / "drafts" / name).mkdir()
    os.utime(tmp_path / "drafts" / "old", (0, 0))
    store.trim(10**9)
    assert [path.name for path in (tmp_path / "drafts").iterdir()] == ["new"]


def test_entries_survive_for_who_has_found_them(tmp_path: Path) -> None:
    """Another project trims the shared store between finding and copying."""
    put(Store(tmp_path), "a", "b")
    found = Store(tmp_path).find(named("a", "b"))
    assert Store(tmp_path).trim(0) == 1
    out = torch.empty(2, 2)
    found.copy("moments", slice(0, 2), out)
    assert torch.equal(out, torch.stack([value_of("a"), value_of("b")]))


def test_writers_and_sweepers_at_once_disturb_nobody(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def work(own: int) -> None:
        try:
            for number in range(15):
                store = Store(tmp_path)
                put(store, "shared", f"{number}")
                put(store, f"{own} {number}")
                found = store.find(named("shared", f"{own} {number}", "none"))
                held = np.flatnonzero(found.segment >= 0)
                if len(held):
                    out = torch.empty(len(held), 2)
                    found.copy("moments", held, out)
                    texts = ["shared", f"{own} {number}"]
                    assert torch.equal(out, torch.stack([value_of(texts[place]) for place in held]))
                if number % 5 == 4:
                    store.trim(2000)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_cannot_be_opened_just_now_is_not_thrown_away(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "a")
    (tmp_path / "segments" / "notes.txt").write_text("not ours")
    before = sorted((tmp_path / "segments").iterdir())
    (entries,) = (tmp_path / "segments").glob("*/entries.safetensors")
    aside = entries.rename(tmp_path / "aside")
    entries.symlink_to(entries.name)  # a link to itself, which the system refuses to follow
    with pytest.raises(UnreachableError, match="cannot be opened"):
        Store(tmp_path).find(named("a"))
    assert sorted((tmp_path / "segments").iterdir()) == before
    aside.replace(entries)
    assert not len(Store(tmp_path).find(named("a")).missing)
