"""The reader of cached latents: what it draws, which way a picture is turned, and that no other file is read."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from diffusion_core import manifest
from diffusion_core.errors import DataError, IntegrityError
from diffusion_core.noise import Noise, Stream
from diffusion_core.weights import write_tensors
from pipelines.data import latents as module
from pipelines.data.latents import Latents, file_of

ABOUT = {"classes": ["a", "b", "c"], "counts": {"train": 5, "val": 0}, "text": None}


def moments(count: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> torch.Tensor:
    """(count, 2*4, h, w) float16, each number of its own."""
    drawn = torch.rand(count, 8, *size, generator=torch.Generator().manual_seed(seed)) + 0.5
    return drawn.half()


def sealed(folder: Path, files: dict[str, dict[str, torch.Tensor]], **about: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        write_tensors(folder / name, tensors)
    manifest.seal(folder, "latents", ABOUT | about)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {"moments": moments(5), "label": torch.tensor([2, 0, 1, -1, 1])}
    return sealed(tmp_path / "latents", {"train.safetensors": tensors})


def test_a_batch_is_drawn_from_the_moments_of_its_rows(folder: Path) -> None:
    latents = Latents.open(folder, "train")
    assert (len(latents), latents.shape, latents.classes, latents.groups) == (5, (4, 8, 8), ("a", "b", "c"), (5,))
    assert latents.text_shape is None
    ids = torch.tensor([3, 0] * 400)
    batch = latents.batch(ids, Noise(torch.arange(800), ids))
    assert batch.x.dtype == torch.float32
    assert batch.ids is ids
    assert batch.cond.keys() == {"label"}
    assert batch.cond["label"][:2].tolist() == [-1, 2]
    for row in (3, 0):
        mean, std = moments(5)[row].double().chunk(2)
        unit = (batch.x[ids == row].double() - mean) / std
        assert stats.kstest(unit.flatten().numpy(), "norm").pvalue > 1e-3
    assert not torch.equal(batch.x[0], batch.x[2])


def test_a_batch_is_a_function_of_seed_step_and_ids_alone(folder: Path) -> None:
    ids = torch.tensor([4, 1, 2])
    whole = Latents.open(folder, "train").batch(ids, Noise(7, ids, 3))
    for number, one in enumerate(ids):
        alone = Latents.open(folder, "train").batch(one[None], Noise(7, one[None], 3))
        assert torch.equal(alone.x[0], whole.x[number])
    assert not torch.equal(Latents.open(folder, "train").batch(ids, Noise(7, ids, 4)).x, whole.x)


def test_half_of_the_pictures_are_mirrored_and_the_choice_is_the_steps(tmp_path: Path) -> None:
    still = torch.cat((torch.zeros(5, 4, 8, 8), torch.full((5, 4, 8, 8), 1e-4)), 1).half()
    turned = still.clone()
    turned[:, :4] = 1
    tensors = {"moments": still, "mirrored": turned, "label": torch.zeros(5, dtype=torch.int64)}
    latents = Latents.open(sealed(tmp_path / "latents", {"train.safetensors": tensors}), "train")
    ids = torch.arange(5).repeat(400)
    first = latents.batch(ids, Noise(torch.arange(2000), ids, 1)).x.mean((1, 2, 3)).round()
    assert set(first.tolist()) == {0, 1}
    assert torch.equal(first == 1, Noise(torch.arange(2000), ids, 1).uniform((), Stream.AUGMENT) < 0.5)
    assert stats.binomtest(int(first.sum()), len(ids)).pvalue > 1e-3
    assert torch.equal(latents.batch(ids, Noise(torch.arange(2000), ids, 1)).x.mean((1, 2, 3)).round(), first)
    assert not torch.equal(latents.batch(ids, Noise(torch.arange(2000), ids, 2)).x.mean((1, 2, 3)).round(), first)
    assert set(load_file(tmp_path / "latents" / "train.safetensors")["moments"][0, :4].flatten().tolist()) == {0}


def test_groups_follow_the_sizes_as_numbers(tmp_path: Path) -> None:
    sizes = [(8, 16), (16, 8), (16, 104), (104, 8)]
    files = {
        file_of("train", size): {
            "moments": moments(number + 1, (size[0] // 2, size[1] // 2), number),
            "label": torch.full((number + 1,), number),
        }
        for number, size in reversed(list(enumerate(sizes)))
    }
    files["trainer-8x8.safetensors"] = files["val.safetensors"] = files[file_of("train", sizes[0])]
    latents = Latents.open(sealed(tmp_path / "latents", files), "train")
    assert latents.groups == (1, 2, 3, 4)
    assert latents.shapes == tuple((4, height // 2, width // 2) for height, width in sizes)
    assert latents.labels.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    ids = torch.tensor([5, 3])
    batch = latents.batch(ids, Noise(0, ids))
    mean, std = moments(3, (8, 52), 2)[[2, 0]].float().chunk(2, 1)
    assert torch.equal(batch.x, mean + std * Noise(0, ids).normal((4, 8, 52), 4))
    with pytest.raises(DataError, match=r"several sizes, groups \[1, 2\]"):
        latents.batch(torch.tensor([2, 3]), Noise(0, torch.tensor([2, 3])))


def test_captions_are_gathered_by_the_pictures_row(tmp_path: Path) -> None:
    text = torch.arange(4 * 3 * 2, dtype=torch.float16).reshape(4, 3, 2)
    text[0] = 0
    mask = torch.arange(3) < torch.tensor([1, 3, 2, 1])[:, None]
    tensors = {"moments": moments(5), "label": torch.zeros(5, dtype=torch.int64)}
    tensors["caption"] = torch.tensor([3, 0, 1, 1, 2])
    files = {"train.safetensors": tensors, "captions.safetensors": {"text": text, "mask": mask}}
    latents = Latents.open(sealed(tmp_path / "latents", files, text="0" * 64), "train")
    assert latents.text_shape == (3, 2)
    ids = torch.tensor([4, 1, 3, 0])
    cond = latents.batch(ids, Noise(0, ids)).cond
    assert cond.keys() == {"label", "text", "mask"}
    assert torch.equal(cond["text"], text[[2, 0, 1, 3]].float())
    assert cond["mask"].tolist() == mask[[2, 0, 1, 3]].tolist()
    assert cond["text"].dtype == torch.float32


def test_reading_maps_the_file_and_does_not_hold_it(tmp_path: Path) -> None:
    tensors = {"moments": moments(2000, (32, 32)), "label": torch.zeros(2000, dtype=torch.int64)}  # 33 MB
    latents = Latents.open(sealed(tmp_path / "latents", {"train.safetensors": tensors}), "train")
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    assert str(tmp_path / "latents" / "train.safetensors") in mapped
    ids = torch.tensor([1999, 0])
    assert torch.equal(latents.parts[0]["moments"].index_select(0, ids), tensors["moments"][ids])


@pytest.mark.parametrize("place", [3, 200, -1])
def test_a_flipped_bit_is_refused_when_opened(folder: Path, place: int) -> None:
    data = bytearray((folder / "train.safetensors").read_bytes())
    data[place] ^= 1
    (folder / "train.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="train.safetensors has SHA-256"):
        Latents.open(folder, "train")


def test_a_missing_or_shorter_file_is_refused(folder: Path) -> None:
    data = (folder / "train.safetensors").read_bytes()
    (folder / "train.safetensors").write_bytes(data[:-7])
    with pytest.raises(IntegrityError, match=f"train.safetensors has {len(data) - 7} bytes"):
        Latents.open(folder, "train")
    (folder / "train.safetensors").unlink()
    with pytest.raises(IntegrityError, match="train.safetensors is gone"):
        Latents.open(folder, "train")


@pytest.mark.parametrize("by", ["rename", "rewriting", "removal"])
def test_a_file_replaced_under_the_reader_stops_the_next_batch(
    folder: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, path = Latents.open(folder, "train"), folder / "train.safetensors"
    clock = [latents.looked]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    ids = torch.tensor([0, 1])
    before = latents.batch(ids, Noise(0, ids)).x
    if by == "rewriting":
        changed = path.stat().st_mtime_ns + 1
        os.utime(path, ns=(changed, changed))
    else:
        other = folder / "other"
        other.write_bytes(path.read_bytes())
        os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
        other.replace(path)
        if by == "removal":
            path.unlink()
    clock[0] += 0.5
    assert torch.equal(latents.batch(ids, Noise(0, ids)).x, before)  # looked at most once a second
    clock[0] += 1
    with pytest.raises(IntegrityError, match=r"train\.safetensors (was replaced|is gone)"):
        latents.batch(ids, Noise(0, ids))


def test_a_file_replaced_while_it_is_opened_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the reading of its digest and the mapping."""
    real = module.read_tensors

    def read(path: Path) -> dict[str, torch.Tensor]:
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        other.replace(path)
        return real(path)

    monkeypatch.setattr(module, "read_tensors", read)
    with pytest.raises(IntegrityError, match=r"train\.safetensors was replaced"):
        Latents.open(folder, "train")


def test_an_unknown_split_and_another_kind_of_folder_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="'trian'.*did you mean 'train'"):
        Latents.open(folder, "trian")
    manifest.seal(folder, "data", {})
    with pytest.raises(IntegrityError, match="holds 'data'"):
        Latents.open(folder, "train")
