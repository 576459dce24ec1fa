"""Classifier guidance: with the mixture's own class posterior it is Bayes' rule, on every schedule and target."""

import pytest
import torch

from diffusion_core.classifier import ClassifierGuided
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.guidance import CFG
from diffusion_core.schedule import VP, Cosine, Linear, Schedule
from tests.core.oracle import Mixture, one_of_each, perfect, time

LAW = Mixture()
X = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABEL = {"label": torch.tensor([0, 1, 1, 0])}
T = time(0.2, 0.5, 0.8, 0.96)
SCHEDULES = one_of_each(Schedule)


def posterior(schedule):
    """log p(class | x) of every pixel, as a classifier of noisy samples would say it."""

    def log_prob(x, t, cond):
        found = LAW.responsibilities(x, schedule(t)).log()  # (B, C, H, W, class)
        label = cond["label"].reshape(-1, 1, 1, 1, 1).expand(*found.shape[:-1], 1)
        return found.gather(-1, label).flatten(1).sum(1)

    return log_prob


@pytest.mark.parametrize("target", ["x0", "eps", "flow", "v", "karras", "score"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_posterior_makes_a_free_model_conditional(schedule, target):
    """ε - σ·∇log p(y | x) is the conditional ε; w times that is w times the step, from the law's own scores."""
    schedule = SCHEDULES[schedule]
    free = CFG(perfect(LAW, schedule, target, first=0.97), 0.0)
    level = schedule(T)
    scores = [LAW.score(X, level, labels) for labels in (None, LABEL["label"])]
    for scale in (1.0, 3.0):
        guide = ClassifierGuided(free, posterior(schedule), scale)
        score = scores[0] + scale * (scores[1] - scores[0])
        found = guide(X, T, LABEL)
        wanted = -level.b.reshape(-1, 1, 1, 1) * score
        torch.testing.assert_close(found.eps, wanted, rtol=1e-6, atol=1e-6)
        for row, t in enumerate(T):
            torch.testing.assert_close(guide(X, t.item(), LABEL).eps[row], found.eps[row], rtol=1e-9, atol=1e-9)
        if scale == 1:
            torch.testing.assert_close(found.x0, LAW.pair(X, level, LABEL["label"]).x0, rtol=1e-6, atol=1e-6)


def test_works_where_no_gradients_are_kept():
    guide = ClassifierGuided(CFG(perfect(LAW, VP(), "v"), 0.0), posterior(VP()))
    wanted = guide(X, T, LABEL).x0
    with torch.no_grad():
        assert torch.equal(guide(X, T, LABEL).x0, wanted)
    with torch.inference_mode():
        x, cond = X * 1, {"label": LABEL["label"] * 1}  # inference tensors, as in generation
        assert torch.equal(guide(x, T * 1, cond).x0, wanted)
        torch.testing.assert_close(guide(x, 0.5, cond).x0[1], wanted[1], rtol=0, atol=1e-12)


def test_guides_inside_its_interval_only():
    plain = CFG(perfect(LAW, Linear(), "v"), 0.0)
    guide = ClassifierGuided(plain, posterior(Linear()), 2.0, (0.3, 0.7))
    t = time(0.2, 0.5, 0.8, 1.0)
    found, free = guide(X, t, LABEL), plain(X, t, LABEL)
    assert torch.equal(found.x0[[0, 2, 3]], free.x0[[0, 2, 3]])
    assert not torch.allclose(found.x0[1], free.x0[1])
    asked = []
    unasked = (
        ClassifierGuided(plain, asked.append, 2.0, (0.3, 0.7)),
        ClassifierGuided(plain, asked.append, 0.0, (0, 0.9)),
    )
    for guide in unasked:
        assert torch.equal(guide(X, 0.8, LABEL).x0, plain(X, 0.8, LABEL).x0)
    assert not asked


def test_pure_noise_cannot_be_steered():
    pure = [schedule for schedule in SCHEDULES.values() if schedule(time(1.0)).a < 1e-3]
    assert Cosine() in pure and Linear() in pure and VP() not in pure
    for schedule in pure:
        with pytest.raises(RefusedError, match="t = 1 .*tells nothing of the picture in pure noise"):
            ClassifierGuided(perfect(LAW, schedule, "v"), posterior(schedule))
        ClassifierGuided(perfect(LAW, schedule, "v"), posterior(schedule), interval=(0.0, 0.97))
        ClassifierGuided(perfect(LAW, schedule, "v", first=0.97), posterior(schedule))
    with pytest.raises(ConfigError, match="scale -1"):
        ClassifierGuided(perfect(LAW, Cosine(), "v", first=0.9), posterior(Cosine()), -1)
