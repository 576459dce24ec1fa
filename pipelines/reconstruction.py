"""What a codec loses and how its latents spread, measured over a split in bounded memory, with pages to look at.

Pictures are taken a few at a time, each time of one size, so that neither their number nor buckets of sizes matter.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_core.codec import Codec, Moments
from diffusion_core.errors import DataError
from diffusion_core.images import encode_png, grid, to_pixels
from diffusion_core.similarity import psnr, ssim
from diffusion_core.spread import Spread
from pipelines.data.reader import Pictures
from pipelines.stage import Stage

CHUNK = 2**18  # pixels encoded at once
PAIRS, SHEET = 40, 2**22  # pairs on a page, fewer where they would have more pixels than SHEET
COLUMNS = 10
WORST = 8


def chunks(pictures: Pictures, most: int | None = None) -> Iterator[Tensor]:
    """Row numbers, ascending, some at a time and of one size each time; of all rows, or of `most` chosen evenly."""
    used = min(len(pictures), most or len(pictures))
    ids = torch.arange(used) * len(pictures) // used
    start = 0
    for rows, (_, height, width) in zip(pictures.groups, pictures.shapes, strict=True):
        inside = ids[(ids >= start) & (ids < start + rows)]
        if len(inside):
            yield from inside.split(max(1, CHUNK // (height * width)))
        start += rows


def moments(
    encode: Callable[[Tensor], Moments], pictures: Pictures, device: torch.device, most: int
) -> Iterator[Moments]:
    """What `encode` says of at most so many pictures, a chunk at a time."""
    for ids in chunks(pictures, most):
        yield encode(pictures.tensor(ids).to(device))


def latent_std(codec: Codec, pictures: Pictures, device: torch.device, most: int) -> float:
    """The standard deviation of the latents drawn of at most so many pictures."""
    spread = Spread()
    for found in moments(codec.encode, pictures, device, most):
        spread.add(found)
    return spread.overall()


@torch.inference_mode()
def measure(
    codec: Codec, pictures: Pictures, distance: nn.Module | None, device: torch.device, stage: Stage
) -> dict[str, Any]:
    """PSNR (dB) and SSIM of pictures through the codec and their mean perceptual `distance`, told to the tracker.

    Raises DataError naming the first picture whose reconstruction is not finite.
    """
    squares, pixels, alike, apart = 0.0, 0, 0.0, 0.0
    errors = torch.empty(len(pictures))
    with stage.bar("held-out pictures", len(pictures)) as bar:
        for ids in chunks(pictures):
            x, again = _through(codec, pictures, ids, device)
            each = (again - x).square().flatten(1)
            errors[ids] = each.mean(1).cpu()
            squares, pixels = squares + each.double().sum().item(), pixels + x.numel()
            alike += ssim(again, x).sum().item()
            apart += 0.0 if distance is None else distance(again, x).sum().item()
            bar.step(len(ids))
    found = {"psnr": psnr(squares / pixels), "ssim": alike / len(pictures)}
    if distance is not None:
        found["perceptual"] = apart / len(pictures)
    stage.tracker.metrics(found)
    stage.say(f"reconstruction of held-out pictures: {', '.join(f'{name} {n:.4g}' for name, n in found.items())}")
    _pages(codec, pictures, errors, device, stage)
    return found


def _pages(codec: Codec, pictures: Pictures, errors: Tensor, device: torch.device, stage: Stage) -> None:
    """Pairs of pictures and reconstructions: some chosen evenly, and the worst, all of the commonest size."""
    rows = max(pictures.groups)
    group = pictures.groups.index(rows)
    start = sum(pictures.groups[:group])
    _, height, width = pictures.shapes[group]
    room = min(rows, PAIRS, max(COLUMNS // 2, SHEET // (2 * height * width)))
    worst = errors[start : start + rows].topk(min(rows, WORST)).indices
    for name, ids in (("reconstructions.png", torch.arange(room) * rows // room), ("worst.png", worst)):
        pairs = torch.stack(_through(codec, pictures, start + ids, device), 1).flatten(0, 1)
        page = stage.out / name
        page.write_bytes(encode_png(grid(to_pixels(pairs), COLUMNS)))
        stage.tracker.artifact(page, "samples")


def _through(codec: Codec, pictures: Pictures, ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures and their reconstructions, both in [-1, 1]."""
    x = pictures.tensor(ids).to(device)
    again = codec.decode(codec.encode(x).mean)
    finite = again.isfinite().flatten(1).all(1)
    if not finite.all():
        key = pictures.keys[int(ids[~finite.cpu()][0])]
        raise DataError(f"the reconstruction of picture {key} is not finite; such a codec is not published")
    return x, again.clamp(-1, 1)
