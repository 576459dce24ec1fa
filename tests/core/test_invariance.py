"""A picture depends on its seed and condition only: the same alone, in any batch, at any place, beside any others."""

import pytest
import torch
from torch import nn

from diffusion_core.codec import Pixel
from diffusion_core.denoiser import Denoiser
from diffusion_core.nets.dit import DiT
from diffusion_core.renoise import Ancestral
from diffusion_core.sampler import Sampling, generate
from diffusion_core.schedule import Cosine
from diffusion_core.solver import FirstOrder
from diffusion_core.target import V

SHAPE = (2, 8, 8)
SEEDS = torch.arange(64) * 0x1234_5678_9ABC + 5  # more than 32 bits
LABELS = torch.arange(64) % 4 - 1  # each class and "no class"
SAMPLINGS = {
    "first_order": Sampling(4, FirstOrder()),
    "ancestral": Sampling(4, FirstOrder(), renoise=Ancestral(1.0)),
    "guidance": Sampling(4, FirstOrder(), guidance=3.0),
}


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    net = DiT(channels=2, size=8, classes=3, width=32, depth=2, heads=2)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.1)
    return Denoiser(net, Cosine(), V())


@pytest.fixture(scope="module", params=SAMPLINGS)
def drawn(request, denoiser):
    """Pictures of chosen rows of SEEDS and LABELS drawn together, and all 64 of them drawn alone."""

    def draw(rows, labels=LABELS):
        return generate(denoiser, Pixel(), SAMPLINGS[request.param], SHAPE, SEEDS[rows], {"label": labels[rows]})

    return draw, torch.cat([draw(torch.tensor([row])) for row in range(64)])


def test_seed_and_label_matter(drawn):
    """Otherwise the comparisons below would say nothing."""
    draw, alone = drawn
    distances = torch.cdist(alone.flatten(1), alone.flatten(1))
    assert alone.std() > 0.1 and distances[~torch.eye(64, dtype=torch.bool)].min() > 0.1
    relabelled = draw(torch.arange(64), LABELS.roll(1))
    assert (relabelled - alone).flatten(1).abs().amax(1).min() > 0.01


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16, 33, 64])
def test_a_picture_does_not_know_its_batch(drawn, size):
    """Close to the one drawn alone in every place; the same bits in every place of a batch of the same size."""
    draw, alone = drawn
    order = torch.randperm(64, generator=torch.Generator().manual_seed(size))
    first, second = order[:size], order.roll(size // 2)[:size]  # they share half their rows, at other places
    pictures = {name: draw(rows) for name, rows in {"first": first, "second": second}.items()}
    torch.testing.assert_close(pictures["first"], alone[first], rtol=0, atol=1e-5)
    torch.testing.assert_close(pictures["second"], alone[second], rtol=0, atol=1e-5)
    shared = size - size // 2
    assert torch.equal(first[:shared], second[size // 2 :])
    assert torch.equal(pictures["first"][:shared], pictures["second"][size // 2 :])
