"""Learned uncertainty against the closed form of its optimum."""

import torch

from diffusion_core.uncertainty import Uncertainty


def test_it_says_nothing_at_first():
    u = Uncertainty(16)(torch.linspace(-3, 3, 9))
    assert u.shape == (9,) and not u.any()


def test_at_the_optimum_it_is_the_log_of_the_mean_loss():
    """Losses m(c)·χ²₁, of mean m(c) = 0.1 + c² over two decades: u tends to ln m, and L/exp(u) to mean 1 everywhere."""
    torch.manual_seed(0)
    uncertainty = Uncertainty()
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=2e-2)
    steps = 1500
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def law(c):
        return 0.1 + c**2

    for _ in range(steps):
        c = 4 * torch.rand(512) - 2
        loss = law(c) * torch.randn(512) ** 2
        u = uncertainty(c)
        optimizer.zero_grad()
        (loss / u.exp() + u).mean().backward()
        optimizer.step()
        fall.step()
    c = torch.linspace(-1.9, 1.9, 39)
    with torch.no_grad():
        miss = uncertainty(c) - law(c).log()
        assert miss.abs().max() < 0.25 and miss.square().mean().sqrt() < 0.08
        many = 4 * torch.rand(200_000) - 2
        assert abs((law(many) * torch.randn(200_000) ** 2 / uncertainty(many).exp()).mean() - 1) < 0.03
