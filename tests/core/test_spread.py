"""The spread of latents in one pass against numpy's two passes over all of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.codec import Moments
from diffusion_core.errors import DataError
from diffusion_core.spread import Spread


def moments(seed, shapes, offset):
    generator = np.random.default_rng(seed)
    slopes = np.array([1.0, 0.01, 30.0])[:, None, None]
    means = [(generator.normal(size=(n, 3, h, w)) * slopes + offset).astype(np.float32) for n, h, w in shapes]
    stds = [generator.uniform(0, 2, size=mean.shape).astype(np.float32) for mean in means]
    return means, stds


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    st.sampled_from([0.0, -3.0, 500.0]),
)
def test_one_pass_gives_the_numbers_of_two(seed, shapes, offset):
    means, stds = moments(seed, shapes, offset)
    spread = Spread()
    for mean, std in zip(means, stds, strict=True):
        spread.add(Moments(torch.from_numpy(mean), torch.from_numpy(std)))
    mean, std = (np.concatenate([np.moveaxis(p, 1, 0).reshape(3, -1) for p in parts], 1) for parts in (means, stds))
    mean, std = mean.astype(np.float64), std.astype(np.float64)
    found = spread.channels()
    np.testing.assert_allclose(found[0].numpy(), mean.mean(1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found[1].numpy(), np.sqrt(mean.var(1) + (std**2).mean(1)), rtol=1e-6)
    assert spread.overall() == pytest.approx(np.sqrt(mean.var() + (std**2).mean()), rel=1e-6)


def test_nothing_and_what_is_not_finite_have_no_spread():
    with pytest.raises(DataError, match="none was added"):
        Spread().overall()
    spread = Spread()
    spread.add(Moments(torch.full((1, 2, 1, 1), torch.inf), torch.ones(1, 2, 1, 1)))
    with pytest.raises(DataError, match="not finite"):
        spread.channels()
