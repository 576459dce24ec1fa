"""The one weight format: what is missing, extra, misshapen or torn is named; the same tensors give the same bytes."""

import errno
import os
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from diffusion_core.errors import IntegrityError
from diffusion_core.weights import create_tensors, load_weights, read_tensors, write_tensors

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "count": torch.tensor(7),
}


def test_round_trip_and_equal_bytes(tmp_path):
    write_tensors(tmp_path / "a", TENSORS)
    write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = read_tensors(tmp_path / "a")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in found)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o044 == 0o044  # another user, such as a server, can read


def test_views_are_written_whole(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "a", {"turned": whole.T, "part": whole[1:, :2]})
    found = read_tensors(tmp_path / "a")
    assert torch.equal(found["turned"], whole.T) and torch.equal(found["part"], whole[1:, :2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("bias"), ["lacks 'bias' of Linear", "allowed: weight"]),
        (lambda tensors: tensors.update(biased=tensors.pop("bias")), ["did you mean 'biased'"]),
        (lambda tensors: tensors.update(wait=torch.zeros(1)), ["holds 'wait'", "unknown to Linear"]),
        (lambda tensors: tensors.update(weight=torch.zeros(3, 2)), ["'weight' has shape [3, 2]; [2, 3] is wanted"]),
    ],
)
def test_the_first_wrong_tensor_is_named(tmp_path, change, words):
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    tensors = dict(nn.Linear(3, 2).state_dict())
    change(tensors)
    write_tensors(tmp_path / "w", tensors)
    with pytest.raises(IntegrityError) as caught:
        load_weights(module, tmp_path / "w")
    assert all(word in str(caught.value) for word in [str(tmp_path / "w"), *words])
    assert torch.equal(module.weight, before)  # refused whole, not half loaded


def test_loading_fills_the_module(tmp_path):
    source, module = nn.Linear(3, 2), nn.Linear(3, 2)
    write_tensors(tmp_path / "w", source.state_dict())
    load_weights(module, tmp_path / "w")
    assert torch.equal(source.weight, module.weight)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w"
    write_tensors(path, TENSORS)
    return path, path.read_bytes()


@given(cut=st.integers(0, 10_000))
def test_a_truncated_file_is_refused(written, cut):
    path, whole = written
    torn = path.with_name("torn")
    torn.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(IntegrityError, match="torn cannot be read as safetensors"):
        read_tensors(torn)


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95pickle", b"PK\x03\x04zip", b"\xff" * 64])
def test_no_other_format_is_read(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(IntegrityError, match="cannot be read as safetensors"):
        read_tensors(tmp_path / "w")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(IntegrityError, match="none.safetensors"):
        read_tensors(tmp_path / "none.safetensors")


TYPES = (
    torch.int64,
    torch.float64,
    torch.float32,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.bool,
)


@given(
    wanted=st.dictionaries(
        st.text("abcz-éあ", min_size=1, max_size=5),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(TYPES)),
        min_size=1,
        max_size=5,
    )
)
def test_a_file_filled_through_its_map_has_the_bytes_of_the_formats_own_writer(written, wanted):
    path, _ = written
    mapped = create_tensors(path.with_name("mapped"), wanted)
    values = {}
    for number, (name, (shape, dtype)) in enumerate(wanted.items()):
        assert mapped[name].count_nonzero() == 0
        values[name] = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        mapped[name].copy_(values[name])
    assert path.with_name("mapped").read_bytes() == save(values)


def test_a_disk_without_room_is_told_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room"):
        create_tensors(tmp_path / "w", {"x": ([4], torch.float32)})
