"""What regression finds is the posterior mean, whatever the target and weight; what it needs, and what it refuses."""

import pytest
import torch
from scipy import stats
from torch import nn

from diffusion_core.denoiser import Denoiser, Time, UnitVariance
from diffusion_core.errors import DataError
from diffusion_core.noise import Noise, Stream
from diffusion_core.objective import Batch, Regression, check_batch, drop_condition
from diffusion_core.order import Order
from diffusion_core.schedule import VP, Linear
from diffusion_core.target import EPS, X0, Target
from diffusion_core.train import Plan, fit
from diffusion_core.uncertainty import Uncertainty
from diffusion_core.weighting import Flat, LogitNormal, MinSnr, UniformTimes, Weight
from tests.core.oracle import BLIND, Gaussian, Mixture, Oracle, one_of_each, perfect, time

LAW = Mixture()
WRONG = Mixture(means=(-0.6, 1.0))
COUNT, BATCHES = 400, 16


class Bent(nn.Module):
    """A network with five small ways to be different, all zero: weights of functions of the sample and the time."""

    def __init__(self, net):
        super().__init__()
        self.net, self.ways = net, nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x, c, cond=None):
        c = c.reshape(-1, 1, 1, 1).expand_as(x)
        return self.net(x, c[:, 0, 0, 0], cond) + torch.stack((x**0, x, (2 * x).sin(), c, c * x), -1) @ self.ways


def slopes(law, schedule, target, weight):
    """The gradient along each way at the perfect denoiser of a law, on batches of another: (BATCHES, 5)."""
    first = 0.97 if target in BLIND else 1.0
    inner = perfect(law, schedule, target, first=first)
    denoiser = Denoiser(Bent(inner.net), schedule, inner.target, label=Time(), first=first)
    objective, generator = Regression(denoiser, LogitNormal(0.0, 0.7), weight, 0.0), torch.Generator().manual_seed(0)
    found = []
    for step in range(BATCHES):
        part = torch.rand(COUNT, 1, 1, 1, generator=generator) < LAW.weights[0]
        x = torch.where(part, *LAW.means) + LAW.std * torch.randn(COUNT, 1, 1, 1, generator=generator)
        ids = torch.arange(COUNT)
        batch = Batch(x.double(), {"label": torch.full_like(ids, -1)}, ids)
        ((_, loss),) = objective.losses(batch, step, Noise(0, ids, step))
        found.append(torch.autograd.grad(loss, denoiser.net.ways)[0])
    return torch.stack(found)


@pytest.mark.parametrize("weight", one_of_each(Weight))
@pytest.mark.parametrize("target", Target.kinds())
def test_the_optimum_of_every_loss_is_the_posterior_mean(target, weight):
    """Denoising score matching (Vincent 2011): the perfect denoiser gains by no way of being different.

    The mean gradient over batches is zero within its standard error, far from it for a denoiser of another law.
    """
    weight = one_of_each(Weight)[weight]
    for schedule in (VP(), Linear()):
        right, wrong = (slopes(law, schedule, target, weight) for law in (LAW, WRONG))
        error = right.std(0) / BATCHES**0.5
        assert (right.mean(0).abs() < 5 * error).all()
        assert (wrong.mean(0).abs() > 6 * wrong.std(0) / BATCHES**0.5).any()


class Table(nn.Module):
    """A network that says one number for each class and one for no class."""

    def __init__(self):
        super().__init__()
        self.said = nn.Embedding(3, 1)
        nn.init.constant_(self.said.weight, 5.0)

    def forward(self, x, c, cond):
        return self.said(cond["label"] % 3).reshape(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_guidance_needs_a_share_of_dropped_conditions(share):
    """Classifier-free guidance is not free of training: without dropout the unconditional branch is never taught."""
    labels = torch.tensor([0, 0, 0, 1]).repeat(64)
    data = torch.tensor([-1.0, 2.0])[labels].reshape(-1, 1, 1, 1)
    order, denoiser = Order((256,), 0), Denoiser(Table(), Linear(), X0())
    plan = Plan(images=300 * 256, batch=256, lr=0.1, warm_up=0)

    def batch(step):
        ids = order.ids(step, plan.batch)
        return Batch(data[ids], {"label": labels[ids]}, ids)

    fit(Regression(denoiser, UniformTimes(), Flat(), share), batch, plan)
    first, second, nothing = denoiser.net.said.weight.flatten().tolist()
    assert (first, second) == pytest.approx((-1, 2), abs=0.02)
    if share:
        assert nothing == pytest.approx(-0.25, abs=0.1)  # the mean of all data
    else:
        assert nothing == 5.0


IDS = torch.arange(20_000)


def test_every_class_loses_the_same_share_of_its_labels():
    labels = IDS % 10
    dropped = drop_condition({"label": labels}, Noise(7, IDS, 3), 0.1)["label"] == -1
    counts = torch.stack([labels[dropped].bincount(minlength=10), labels[~dropped].bincount(minlength=10)])
    expected = torch.tensor([[200.0], [1800.0]]).expand(2, 10)
    assert stats.chisquare(counts.flatten().numpy(), expected.flatten().numpy(), ddof=9).pvalue > 1e-3


def test_all_parts_of_a_condition_are_dropped_together():
    cond = {"label": IDS % 10, "text": torch.randn(len(IDS), 2, 3), "mask": torch.ones(len(IDS), 2, dtype=torch.bool)}
    found = drop_condition(cond, Noise(7, IDS, 3), 0.3)
    gone = found["label"] == -1
    assert 0.28 < gone.double().mean() < 0.32
    assert (found["text"][gone] == 0).all() and found["mask"][gone].sum(1).eq(1).all()
    assert all(torch.equal(found[name][~gone], value[~gone]) for name, value in cond.items())
    assert drop_condition({}, Noise(7, IDS, 3), 0.3) == {}


def test_a_batch_that_is_not_finite_is_refused_by_the_names_of_its_samples():
    ids, x = torch.arange(100, 108), torch.zeros(8, 1, 2, 2)
    x[3, 0, 1, 1], x[6, 0, 0, 0] = torch.nan, torch.inf
    objective = Regression(Denoiser(Table(), Linear(), X0()), UniformTimes(), Flat(), 0.0)
    with pytest.raises(DataError, match=r"^x of samples \[103, 106\] holds numbers that are not finite"):
        next(objective.losses(Batch(x, {"label": ids % 2}, ids), 0, Noise(0, ids)))
    text = torch.zeros(8, 2, 3)
    text[0, 1, 2] = -torch.inf
    with pytest.raises(DataError, match=r"^text of samples \[100\]"):
        check_batch(Batch(torch.zeros(8, 1, 2, 2), {"label": ids, "text": text}, ids))
    with pytest.raises(DataError, match=r"\[0, 1, 2, 3, 4, 5, 6, 7\] and 12 more"):
        check_batch(Batch(torch.full((20, 1), torch.nan), {}, torch.arange(20)))
    check_batch(Batch(torch.full((8, 1, 2, 2), 3e38), {"label": ids}, ids))  # large is finite, even if the sum is not


def test_the_two_losses_of_learned_uncertainty_have_the_gradients_of_the_one():
    """L/exp(u) + u (Karras et al. 2024, eq. 21), by autograd of the whole on one sample."""
    torch.manual_seed(0)
    denoiser, uncertainty = perfect(LAW, VP(), "v"), Uncertainty(8).double()
    nn.init.normal_(uncertainty.read.weight)
    denoiser.net.weight.data += 0.3
    batch, noise = Batch(torch.ones(1, 1, 2, 2).double(), {"label": torch.tensor([-1])}, IDS[:1]), Noise(0, IDS[:1])
    ((_, plain),) = Regression(denoiser, LogitNormal(), MinSnr(), 0.0).losses(batch, 0, noise)
    u = uncertainty(2 * LogitNormal()(noise.uniform((), Stream.TIME), VP()) - 1)
    parameters = {"denoiser": (denoiser.net.weight,), "uncertainty": (uncertainty.read.weight, uncertainty.read.bias)}
    joint = (plain / u.exp() + u).sum()
    taught = Regression(denoiser, LogitNormal(), MinSnr(), 0.0, uncertainty)
    assert set(taught.modules) == set(parameters)
    for name, loss in taught.losses(batch, 0, noise):
        for found, wanted in zip(
            torch.autograd.grad(loss, parameters[name], retain_graph=True),
            torch.autograd.grad(joint, parameters[name], retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_uncertainty_learns_the_logarithm_of_the_loss():
    """Its optimum u(t) = ln E[L(t)] is closed here: ε of Gaussian data is known up to α²s²/(α²s² + σ²)."""
    law, schedule = Gaussian(), VP()
    denoiser = Denoiser(Oracle(law, schedule, "eps", UnitVariance()), schedule, EPS(), label=Time())
    uncertainty = Uncertainty(32).double()
    x = law.means[0] + law.std * torch.randn(4096, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    order, plan = Order((4096,), 0), Plan(images=512 * 600, batch=512, lr=0.02, warm_up=0)

    def batch(step):
        ids = order.ids(step, plan.batch)
        return Batch(x[ids], {"label": torch.full_like(ids, -1)}, ids)

    fit(Regression(denoiser, UniformTimes(), Flat(), 0.0, uncertainty), batch, plan)
    t = time(0.05, 0.2, 0.4, 0.6, 0.8)
    a, b = schedule(t)
    wanted = ((a * law.std) ** 2 / ((a * law.std) ** 2 + b**2)).log()
    torch.testing.assert_close(uncertainty(2 * t - 1).detach(), wanted, rtol=0, atol=0.2)
