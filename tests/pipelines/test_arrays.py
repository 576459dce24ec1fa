"""Arrays in tars, against NumPy's own reader and `tarfile`; what is no plain array of numbers is refused."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from diffusion_core import manifest
from diffusion_core.errors import DataError, IntegrityError
from pipelines.data import reader
from pipelines.data.arrays import DTYPES, Arrays
from tests.pipelines.test_tar import made


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def latents(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4, 6, 5), np.float32)


def written(folder: Path, *tars: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.tar" for number in range(len(tars))]
    for path, files in zip(paths, tars, strict=True):
        path.write_bytes(made(files, form))
    return paths


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_rows_are_what_numpy_loads(tmp_path: Path, form: int) -> None:
    """Between members of other suffixes, which are passed over, and in shards of different lengths."""
    wanted = latents(50)
    files = [[(f"d/{n}.NPY", npy(wanted[n])), (f"d/{n}.cls", b"3"), (f"d/{n}.seg.npy", b"")] for n in range(50)]
    paths = written(tmp_path, sum(files[:17], []), [("x.cls", b"")], sum(files[17:], []), form=form)
    found = Arrays.open(paths)
    assert len(found) == 50
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 50, 64))
    assert torch.equal(found.tensor(ids), torch.from_numpy(wanted)[ids])
    assert torch.equal(Arrays.open(tmp_path).tensor(ids), found.tensor(ids))
    found.tensor(ids)[:] = 0  # a tensor of its own
    assert torch.equal(found.tensor(ids), torch.from_numpy(wanted)[ids])


PLAIN = st.sampled_from(sorted(DTYPES, key=str)).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, max_side=4))
)


@settings(deadline=None, max_examples=80)
@given(array=PLAIN, fortran=st.booleans())
def test_any_plain_type_and_shape(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, fortran: bool) -> None:
    stored = np.array(array, order="F" if fortran else "C")
    paths = written(tmp_path_factory.mktemp("tar"), [("a.npy", npy(stored)), ("b.npy", npy(stored))])
    batch = Arrays.open(paths).tensor(torch.tensor([1, 0]))
    assert batch.shape == (2, *array.shape) and batch.is_contiguous()
    np.testing.assert_array_equal(batch.numpy(), np.stack([array, array]))


def test_layouts_may_differ_between_batches_and_not_within_one(tmp_path: Path) -> None:
    small, large = latents(3), latents(2)[:, :, :2]
    files = [(f"{n}.npy", npy(array)) for n, array in enumerate([small[0], large[0], small[1], large[1], small[2]])]
    found = Arrays.open(written(tmp_path, files))
    assert torch.equal(found.tensor(torch.tensor([4, 0])), torch.from_numpy(small[[2, 0]]))
    assert torch.equal(found.tensor(torch.tensor([3, 1])), torch.from_numpy(large[[1, 0]]))
    with pytest.raises(DataError, match=r"float32 \(4, 6, 5\) and torch.float32 \(4, 2, 5\); one kind"):
        found.tensor(torch.tensor([0, 1]))


GOOD = npy(latents(1)[0])
REFUSED = {
    "objects": (npy(np.array([{"a": 1}], object), allow_pickle=True), r"array \|O"),
    "text": (npy(np.array(["ab"])), "array <U2"),
    "records": (npy(np.zeros(2, [("a", "f4")])), "float16, float32"),
    "other byte order": (npy(np.zeros(2, ">f4")), "array >f4"),
    "no numbers": (npy(np.zeros((0, 3), np.float32)), r"\(0, 3\)"),
    "not an array": (b"PK\x03\x04 and so on", "no array in NumPy's format"),
    "empty": (b"", "no array in NumPy's format"),
    "cut": (GOOD[:-1], r"608 bytes|607 bytes"),
    "longer": (GOOD + b"x", "its header makes them"),
    "header only": (GOOD[:40], "has a header of 128 bytes, and 40 in all"),
    "header of no Python": (GOOD.replace(b"{'descr'", b"(((((((("), "cannot be read"),
    "header with a call": (GOOD.replace(b"'<f4', ", b"exit(),"), "cannot be read"),
    "negative side": (GOOD.replace(b"(4, 6, 5), ", b"(-4, 6, 5),"), "sides of 1 or more"),
    "unknown version": (GOOD[:6] + b"\x09" + GOOD[7:], "no array in NumPy's format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_array_is_refused_by_name(tmp_path: Path, case: str) -> None:
    data, reason = REFUSED[case]
    paths = written(tmp_path, [("good.npy", GOOD), ("bad.npy", data)])
    with pytest.raises(DataError, match=f"00000.tar: bad.npy.*{reason}"):
        Arrays.open(paths)


def test_nothing_there_and_damage_are_named(tmp_path: Path) -> None:
    paths = written(tmp_path, [("a.cls", b"1")])
    with pytest.raises(DataError, match="no member of suffix 'npy' in 1 tars"):
        Arrays.open(paths)
    paths[0].write_bytes(made([("a.npy", GOOD)])[:1000])
    with pytest.raises(DataError, match="00000.tar is cut off"):
        Arrays.open(paths)


@pytest.mark.parametrize("sealed", [True, False], ids=["with a manifest", "without"])
def test_a_tar_that_is_replaced_is_seen(tmp_path: Path, sealed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LOOK_EVERY", -1.0)
    (path,) = written(tmp_path, [("a.npy", GOOD), ("b.npy", GOOD)])
    if sealed:
        manifest.seal(tmp_path, "arrays", {})
    found, ids = Arrays.open(tmp_path), torch.tensor([0])
    found.tensor(ids)
    path.write_bytes(path.read_bytes().replace(b"a.npy", b"c.npy"))
    with pytest.raises(IntegrityError, match="00000.tar has SHA-256" if sealed else "00000.tar was replaced"):
        found.tensor(ids)
    if sealed:
        with pytest.raises(IntegrityError, match=r"00000.tar has SHA-256"):
            Arrays.open(tmp_path)
