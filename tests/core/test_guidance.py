"""Guidance: one convention for the scale, checked against the scores of a mixture whose classes are known."""

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import nn

from diffusion_core.denoiser import Denoiser, Reader
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.guidance import APG, CFG, Autoguidance, from_paper, saying, to_paper
from diffusion_core.schedule import VP, Linear
from diffusion_core.target import X0, Target
from diffusion_core.two_conditions import TwoConditions
from tests.core.oracle import Mixture, one_of_each, perfect, time

LAW, WORSE = Mixture(), Mixture(std=0.9)
X = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABEL = {"label": torch.tensor([0, 1, 1, -1])}
T = time(0.2, 0.5, 0.8, 0.5)
GUIDES = {
    "cfg": lambda reader: CFG(reader, 3.0, (0.3, 0.7)),
    "rescaled": lambda reader: CFG(reader, 3.0, (0.3, 0.7), 0.7),
    "negative": lambda reader: CFG(reader, 3.0, (0.3, 0.7), negative={"label": torch.tensor([0])}),
    "apg": lambda reader: APG(reader, 3.0, (0.3, 0.7), eta=0.2, threshold=0.5),
    "autoguidance": lambda reader: Autoguidance(reader, perfect(WORSE, VP(), "x0"), 3.0, (0.3, 0.7)),
    "two": lambda reader: TwoConditions(reader, 1.0, 3.0, (0.3, 0.7), first_names=(), second_names=("label",)),
}


class Counted(Reader):
    """A reader that notes how many samples it is asked about in each call."""

    def __init__(self, reader):
        super().__init__()
        self.schedule, self.target, self.first = reader.schedule, reader.target, reader.first
        self.reader, self.asked = reader, []

    def read(self, x, t, cond):
        self.asked.append(len(x))
        return self.reader.read(x, t, cond)


@pytest.fixture(params=["x0", "v", "velocity"])
def denoiser(request):
    return perfect(LAW, VP(), request.param)


def assert_same(found, wanted, within=1e-12):
    for one, other in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=within)


def test_convention_one_is_conditional_and_zero_unconditional(denoiser):
    """Against the statement that w = 1 is "no guidance (unconditional)": here it is the plain conditional model."""
    for scale, cond in ((1.0, LABEL), (0.0, None)):
        for t in (T, 0.5):
            assert_same(CFG(denoiser, scale)(X, t, LABEL), denoiser(X, t, cond))
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
    paper = to_paper(scale)
    eps_c, eps_u = denoiser(X, T, LABEL).eps, denoiser(X, T).eps
    torch.testing.assert_close(found.eps, (1 + paper) * eps_c - paper * eps_u, rtol=1e-9, atol=1e-9)
    assert from_paper(paper) == scale and from_paper(0) == 1


def test_the_sum_of_guidance_is_towards_the_class():
    """The guided score differs from the free one by w ∇log p(class | x), here by autograd on the responsibilities."""
    x = X.clone().requires_grad_()
    level = VP()(T)
    LAW.responsibilities(x, level)[..., 1].log().sum().backward()
    guided = CFG(perfect(LAW, VP(), "v"), 3.0)(X, T, {"label": torch.ones(4, dtype=torch.int64)})
    wanted = LAW.score(X, level) + 3.0 * x.grad
    torch.testing.assert_close(-guided.eps / level.b.reshape(-1, 1, 1, 1), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_inside_its_interval_only(denoiser, guide):
    """Samples at other times are as if unguided, in one batch with the guided; a number and a tensor are one time."""
    guide = GUIDES[guide](denoiser)
    found, plain = guide(X, T, LABEL), denoiser(X, T, LABEL)
    torch.testing.assert_close(found.x0[[0, 2]], plain.x0[[0, 2]], rtol=0, atol=1e-12)
    assert not torch.allclose(found.x0[1], plain.x0[1])
    for t in T:
        assert_same(guide(X, t.item(), LABEL), guide(X, t, LABEL))
        row = t == T
        torch.testing.assert_close(guide(X, t.item(), LABEL).x0[row], found.x0[row], rtol=0, atol=1e-12)


def test_both_ends_belong_to_the_interval(denoiser):
    always = CFG(denoiser, 4.0)
    for interval in ((0.5, 0.8), (0.2, 0.5), (0.5, 0.5)):
        guide = CFG(denoiser, 4.0, interval)
        for t in (0.5, time(0.5)):
            assert_same(guide(X, t, LABEL), always(X, t, LABEL))


@pytest.mark.parametrize("guide", ["cfg", "rescaled", "negative", "apg", "two"])
def test_only_what_counts_is_asked_and_together_where_small(denoiser, guide):
    counted = Counted(denoiser)
    guide = GUIDES[guide](counted)
    together = [guide(X, t, LABEL) for t in (0.5, 0.9, T)]
    assert counted.asked == [8, 4, 8]
    counted.asked.clear()
    guide.together = X.numel() - 1
    for t, wanted in zip((0.5, 0.9, T), together, strict=True):
        assert_same(guide(X, t, LABEL), wanted)
    assert counted.asked == [4, 4, 4, 4, 4]


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_one_branch_is_one_call(denoiser, scale):
    counted = Counted(denoiser)
    for guide in (CFG(counted, scale), TwoConditions(counted, scale, scale, first_names=(), second_names=("label",))):
        guide(X, 0.5, LABEL)
    assert counted.asked == [4, 4]


def test_texts_of_different_lengths_take_a_call_each():
    class Net(nn.Module):
        def forward(self, x, c, cond):
            return x + cond["text"].sum((1, 2)).reshape(-1, 1, 1, 1)

    counted = Counted(Denoiser(Net(), VP(), X0()))
    cond = {"text": torch.ones(4, 3, 2).double(), "mask": torch.ones(4, 3, dtype=torch.bool)}
    negative = {"text": torch.ones(1, 5, 2).double(), "mask": torch.ones(1, 5, dtype=torch.bool)}
    found = CFG(counted, 2.0, negative=negative)(X, 0.5, cond)
    torch.testing.assert_close(found.x0, Denoiser(Net(), VP(), X0())(X, 0.5, cond).x0 + 6 - 10, rtol=0, atol=1e-12)
    assert counted.asked == [4, 4]


def test_a_negative_condition_takes_the_place_of_nothing(denoiser):
    for negative, labels in ((torch.tensor([0]), torch.zeros(4)), (torch.tensor([1, 0, 0, 1]), [1, 0, 0, 1])):
        found = CFG(denoiser, 4.0, negative={"label": negative})(X, T, LABEL)
        away = denoiser(X, T, {"label": torch.as_tensor(labels).long()})
        given = denoiser(X, T, LABEL)
        assert_same(found, (4 * given.x0 - 3 * away.x0, 4 * given.eps - 3 * away.eps))


def test_the_conditional_spread_is_passed_on():
    class Net(nn.Module):
        def forward(self, x, c, cond):
            said = torch.full_like(x, 0.1) * cond["label"].reshape(-1, 1, 1, 1)
            return torch.cat((x, said), 1)

    denoiser = Denoiser(Net(), VP(), X0(), variance="learned")
    wanted = denoiser(X, 0.5, LABEL).spread
    for guide in GUIDES:
        assert torch.equal(GUIDES[guide](denoiser)(X, 0.5, LABEL).spread, wanted)


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescale_is_the_peers(denoiser, phi):
    found = CFG(denoiser, 5.0, rescale=phi)(X, T, LABEL)
    plain, given = CFG(denoiser, 5.0)(X, T, LABEL).x0, denoiser(X, T, LABEL).x0
    torch.testing.assert_close(found.x0, rescale_noise_cfg(plain, given, phi), rtol=0, atol=1e-10)
    if phi == 1:
        torch.testing.assert_close(found.x0.flatten(1).std(1), given.flatten(1).std(1), rtol=0, atol=1e-10)
    assert not torch.allclose(found.x0[:3], plain[:3])


def test_a_picture_of_one_colour_is_not_rescaled():
    class Net(nn.Module):
        def forward(self, x, c, cond):
            return torch.ones_like(x) * (cond["label"].reshape(-1, 1, 1, 1) + 2)

    found = CFG(Denoiser(Net(), VP(), X0()), 3.0, rescale=0.7)(X, 0.5, LABEL).x0
    assert found[:, 0, 0, 0].tolist() == [4.0, 7.0, 7.0, 1.0]


@pytest.mark.parametrize(("eta", "threshold"), [(1.0, 0.0), (0.0, 0.0), (0.4, 0.5), (1.0, 0.1)])
def test_projected_guidance_is_the_peers(denoiser, eta, threshold):
    """The peer writes "no threshold" as 0; eta = 1 without one is plain guidance."""
    found = APG(denoiser, 4.0, eta=eta, threshold=threshold or float("inf"))(X, T, LABEL).x0
    given, free = denoiser(X, T, LABEL).x0, denoiser(X, T).x0
    peers = normalized_guidance(given, free, 3.0, None, eta, threshold, use_original_formulation=True)
    torch.testing.assert_close(found, peers, rtol=0, atol=1e-10)
    plain = CFG(denoiser, 4.0)(X, T, LABEL).x0
    assert torch.allclose(found, plain, atol=1e-10) == (eta == 1 and not threshold)


def test_autoguidance_goes_away_from_a_worse_model(denoiser):
    """(1 - w)·worse + w·better in score, from the scores of the two laws; the worse model says another reading."""
    level = VP()(T)
    better, worse = (law.score(X, level, LABEL["label"]) for law in (LAW, WORSE))
    for target in ("x0", "eps", "karras"):
        found = Autoguidance(denoiser, perfect(WORSE, VP(), target), 2.5)(X, T, LABEL)
        wanted = -level.b.reshape(-1, 1, 1, 1) * (worse + 2.5 * (better - worse))
        torch.testing.assert_close(found.eps, wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(RefusedError, match=r"on VP.* by one on Linear\(\).*must be on one schedule"):
        Autoguidance(denoiser, perfect(WORSE, Linear(), "x0"), 2.0)
    assert Autoguidance(denoiser, perfect(WORSE, VP(), "x0", first=0.9), 2.0).first == 0.9


class Edited(nn.Module):
    """A network that depends on a picture and a class in no simple way."""

    def forward(self, x, c, cond):
        return torch.sin(x + cond["image"]) + (cond["label"] + 1).reshape(-1, 1, 1, 1) * torch.cos(x - cond["image"])


@pytest.mark.parametrize("scales", [(1, 1), (0, 0), (1, 0), (1.5, 7.5), (2, 2), (0, 3)])
def test_two_conditions_is_the_formula(scales):
    denoiser = Denoiser(Edited(), VP(), one_of_each(Target)["v"])
    both = {"image": X.flip(0), "label": torch.tensor([0, 1, 2, 0])}
    first = both | {"label": torch.full((4,), -1)}
    free = {"image": torch.zeros_like(X), "label": torch.full((4,), -1)}
    guide = TwoConditions(denoiser, *scales, second_names=("label",))
    for t in (T, 0.3):
        eps = [denoiser(X, t, cond).eps for cond in (free, first, both)]
        wanted = eps[0] + scales[0] * (eps[1] - eps[0]) + scales[1] * (eps[2] - eps[1])
        torch.testing.assert_close(guide(X, t, both).eps, wanted, rtol=1e-10, atol=1e-10)
    if scales in ((1, 1), (0, 0), (1, 0)):
        plain = {(1, 1): both, (0, 0): free, (1, 0): first}[scales]
        assert torch.equal(guide(X, 0.3, both).x0, denoiser(X, 0.3, plain).x0)


@pytest.mark.parametrize("target", Target.kinds())
def test_any_reader_can_say_any_reading(denoiser, target):
    told = saying(denoiser, one_of_each(Target)[target])
    assert told.target == one_of_each(Target)[target]
    for t in (T, 0.5):
        assert_same(told(X, t, LABEL), denoiser(X, t, LABEL), 1e-9)


def test_what_cannot_be_is_refused():
    denoiser = perfect(LAW, Linear(), "v")
    with pytest.raises(ConfigError, match="without a condition"):
        CFG(denoiser, 2.0)(X, T)
    for scale in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"scale {scale}"):
            CFG(denoiser, scale)
    for interval in ((0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ConfigError, match="interval"):
            CFG(denoiser, 2.0, interval)
    with pytest.raises(ConfigError, match="rescale 1.5"):
        CFG(denoiser, 2.0, rescale=1.5)
    with pytest.raises(ConfigError, match="rescale 0.5 at guidance scale 0"):
        CFG(denoiser, 0.0, rescale=0.5)
    with pytest.raises(ConfigError, match="'text' of none asked for; allowed: label"):
        CFG(denoiser, 2.0, negative={"text": X})(X, T, LABEL)
    with pytest.raises(ConfigError, match="of 3 samples; 1 or 4"):
        CFG(denoiser, 2.0, negative={"label": torch.zeros(3)})(X, T, LABEL)
    with pytest.raises(ConfigError, match="scale 0.5.*scale >= 1"):
        APG(denoiser, 0.5)
    with pytest.raises(ConfigError, match="threshold -1"):
        APG(denoiser, 2.0, threshold=-1)
    with pytest.raises(ConfigError, match="scales 1 and -2"):
        TwoConditions(denoiser, 1, -2)
    with pytest.raises(ConfigError, match="'text' is not there to be dropped; allowed: label"):
        TwoConditions(denoiser, 1, 2)(X, T, LABEL)
