"""Guidance: one convention for the scale, checked against the scores of a mixture whose classes are known."""

import pytest
import torch

from diffusion_core.errors import ConfigError
from diffusion_core.guidance import CFG
from diffusion_core.schedule import VP, Linear
from tests.core.oracle import Mixture, perfect, time

LAW = Mixture()
X = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABEL = {"label": torch.tensor([0, 1, 1, -1])}
T = time(0.2, 0.5, 0.8, 0.5)


@pytest.fixture(params=["x0", "v", "velocity"])
def denoiser(request):
    return perfect(LAW, VP(), request.param)


def test_convention_one_is_conditional_and_zero_unconditional(denoiser):
    """Against the statement that w = 1 is "no guidance (unconditional)": here it is the plain conditional model."""
    for scale, cond in ((1.0, LABEL), (0.0, None)):
        for found, wanted in zip(CFG(denoiser, scale)(X, T, LABEL), denoiser(X, T, cond), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    conditional, free = denoiser(X, T, LABEL).eps, denoiser(X, T).eps
    assert not torch.allclose(conditional[:3], free[:3])


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_guided_score_is_the_formula(denoiser, scale):
    """s = s_u + w (s_c - s_u), from the mixture's own scores; the paper counts w - 1: (1 + w') ε_c - w' ε_u."""
    level = VP()(T)
    free, given = LAW.score(X, level), LAW.score(X, level, LABEL["label"])
    found = CFG(denoiser, scale)(X, T, LABEL)
    wanted = -level.b.reshape(-1, 1, 1, 1) * (free + scale * (given - free))
    torch.testing.assert_close(found.eps, wanted, rtol=1e-6, atol=1e-6)
    paper = scale - 1
    eps_c, eps_u = denoiser(X, T, LABEL).eps, denoiser(X, T).eps
    torch.testing.assert_close(found.eps, (1 + paper) * eps_c - paper * eps_u, rtol=1e-9, atol=1e-9)


def test_the_sum_of_guidance_is_towards_the_class():
    """The guided score differs from the free one by w ∇log p(class | x), here by autograd on the responsibilities."""
    x = X.clone().requires_grad_()
    level = VP()(T)
    LAW.responsibilities(x, level)[..., 1].log().sum().backward()
    guided = CFG(perfect(LAW, VP(), "v"), 3.0)(X, T, {"label": torch.ones(4, dtype=torch.int64)})
    wanted = LAW.score(X, level) + 3.0 * x.grad
    torch.testing.assert_close(-guided.eps / level.b.reshape(-1, 1, 1, 1), wanted, rtol=1e-6, atol=1e-6)


def test_guides_inside_its_interval_only(denoiser):
    found = CFG(denoiser, 4.0, (0.4, 0.6))(X, T, LABEL).x0
    plain, guided = denoiser(X, T, LABEL).x0, CFG(denoiser, 4.0)(X, T, LABEL).x0
    torch.testing.assert_close(found[[0, 2]], plain[[0, 2]], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[[1, 3]], guided[[1, 3]], rtol=0, atol=0)
    assert not torch.allclose(found[1], plain[1])


def test_a_scalar_time_and_refusals():
    denoiser = perfect(LAW, Linear(), "v")
    together = CFG(denoiser, 2.0)(X, time(0.5), LABEL).x0
    assert torch.equal(together, CFG(denoiser, 2.0)(X, time(0.5, 0.5, 0.5, 0.5), LABEL).x0)
    with pytest.raises(ConfigError, match="without a condition"):
        CFG(denoiser, 2.0)(X, T)
    with pytest.raises(ConfigError, match="scale -1"):
        CFG(denoiser, -1)
