"""Moments against numpy in float64, the distance against closed forms and scipy, the judge against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from diffusion_core.errors import ConfigError, DataError, IntegrityError, RefusedError
from diffusion_core.metrics import judge, moments
from diffusion_core.metrics.extractor import Extractor, Shape, train_extractor
from diffusion_core.metrics.frechet import frechet
from diffusion_core.metrics.moments import Moments, Running, moments_of
from diffusion_core.metrics.passport import RULER, Passport
from diffusion_core.metrics.ruler import measure_unit
from diffusion_core.sampler import Sampling
from diffusion_core.spec import build, spec
from diffusion_core.weights import read_tensors, write_tensors


@pytest.fixture(autouse=True)
def one_thread():
    """Small layers on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(mean, covariance):
    """The exact moments of a Gaussian, as if of very many samples."""
    mean = torch.as_tensor(mean, dtype=torch.float64)
    return Moments(10**6, mean, torch.as_tensor(covariance, dtype=torch.float64) * (10**6 - 1))


def random_covariance(width, seed):
    factor = np.random.default_rng(seed).standard_normal((width, width))
    return factor @ factor.T / width + 0.01 * np.eye(width)


def by_singular_values(a, b):
    """The distance by another road: tr √(S₁S₂) is the nuclear norm of the cross Gram matrix, singular or not."""
    a, b = (x.double().numpy() for x in (a, b))
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * root


class TestMoments:
    @pytest.mark.parametrize("offset", [0.0, 1e3])
    def test_agree_with_numpy_in_float64(self, offset):
        x = torch.randn(5003, 24, generator=torch.Generator().manual_seed(0)) @ torch.randn(24, 24) + offset
        x = x[x[:, 0].argsort()]  # the blocks then have very different means
        found, wanted = moments_of(x), np.cov(x.double().numpy(), rowvar=False)
        assert found.count == 5003
        np.testing.assert_allclose(found.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.covariance, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())

    def test_do_not_depend_on_the_batches(self):
        x = torch.randn(moments.BLOCK * 2 + 77, 5)
        running = Running(5)
        for start in range(0, len(x), 130):
            running.update(x[start : start + 130])
            running.moments()  # reading on the way must not disturb
        assert torch.equal(running.moments().scatter, moments_of(x).scatter)
        assert torch.equal(running.moments().mean, moments_of(x).mean)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**31))
    def test_of_parts_merge_to_those_of_the_whole(self, sizes, seed):
        x = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed)) * 7 - 2
        first, *rest = (moments_of(part) for part in x.split(sizes))
        before = first.scatter.clone()
        merged = sum(rest, first)
        assert merged.count == len(x)
        np.testing.assert_allclose(merged.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
        centred = (x.double() - x.double().mean(0)).numpy()
        np.testing.assert_allclose(merged.scatter, centred.T @ centred, rtol=1e-5, atol=1e-4)
        assert torch.equal(first.scatter, before)

    def test_survive_a_file(self, tmp_path):
        found = moments_of(torch.randn(50, 4))
        write_tensors(tmp_path / "m.safetensors", found.tensors("train"))
        read = Moments.read(read_tensors(tmp_path / "m.safetensors"), "train")
        assert (read.count, read.mean.dtype) == (50, torch.float64)
        assert torch.equal(read.mean, found.mean)
        assert torch.allclose(read.covariance, found.covariance, rtol=1e-15)

    def test_refuse_what_has_none(self):
        running = Running(3)
        with pytest.raises(DataError, match="no samples"):
            running.moments()
        with pytest.raises(DataError, match=r"\[2, 4\]; \[n, 3\]"):
            running.update(torch.zeros(2, 4))
        with pytest.raises(DataError, match="not finite"):
            running.update(torch.tensor([[0.0, float("nan"), 0.0]]))
        running.update(torch.zeros(1, 3))
        with pytest.raises(DataError, match="at least 2"):
            _ = running.moments().covariance


class TestFrechet:
    def test_of_known_gaussians(self):
        assert frechet(gaussian([0], [[1]]), gaussian([3], [[4]])) == pytest.approx(9 + (1 - 2) ** 2, abs=1e-12)
        diagonal = gaussian([1, 2, 3], np.diag([1, 4, 9])), gaussian([1, 0, 3], np.diag([4, 4, 0.25]))
        assert frechet(*diagonal) == pytest.approx(4 + 1 + 0 + 2.5**2, abs=1e-12)

    @pytest.mark.parametrize("width", [2, 17, 64])
    def test_agrees_with_the_matrix_square_root(self, width):
        one, other = random_covariance(width, 1), random_covariance(width, 2)
        means = np.random.default_rng(3).standard_normal((2, width))
        root = scipy.linalg.sqrtm(one @ other).real
        wanted = ((means[0] - means[1]) ** 2).sum() + np.trace(one + other - 2 * root)
        a, b = gaussian(means[0], one), gaussian(means[1], other)
        assert frechet(a, b) == pytest.approx(wanted, rel=1e-10)
        assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-12)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 20), st.integers(0, 2**31))
    def test_is_exact_and_never_negative_also_when_singular(self, n, m, width, seed):
        draws = torch.Generator().manual_seed(seed)
        a, b = torch.randn(n, width, generator=draws), torch.randn(m, width, generator=draws) + 0.5
        one, other = moments_of(a), moments_of(b)
        assert frechet(one, other) == pytest.approx(by_singular_values(a, b), rel=1e-5, abs=1e-5)
        assert frechet(one, other) == pytest.approx(frechet(other, one), rel=1e-6, abs=1e-6)
        assert 0 <= frechet(one, one) < 1e-6  # the rounding of float32 products
        assert frechet(gaussian([1], [[2]]), gaussian([1], [[2]])) < 1e-12

    def test_of_constant_features_is_their_shift(self):
        still = Moments(10, torch.tensor([1.0, 2.0]).double(), torch.zeros(2, 2).double())
        assert frechet(still, gaussian([1, 0], np.eye(2))) == pytest.approx(4 + 2)

    def test_bias_falls_with_the_number_of_samples(self):
        draws, exact = torch.Generator().manual_seed(0), gaussian(np.zeros(16), np.eye(16))
        few, many = (frechet(moments_of(torch.randn(n, 16, generator=draws)), exact) for n in (200, 3200))
        assert few > 8 * many

    def test_refuses_features_of_different_width(self):
        with pytest.raises(RefusedError, match="width 1 and 2"):
            frechet(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))


def digits():
    """All scans as (N, 1, 8, 8) in [-1, 1] and their labels; the last fifth is held out."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return torch.from_numpy(found.images[order]).float()[:, None] / 8 - 1, torch.from_numpy(found.target[order])


class TestJudge:
    def test_is_right_about_held_out_digits(self, tmp_path):
        images, labels = digits()
        fitted = judge.fit(images[:1437], labels[:1437])
        assert (fitted.predict(images[1437:]) == labels[1437:]).double().mean() >= 0.97
        fitted.save(tmp_path)
        assert torch.equal(judge.load_classifier(tmp_path).predict(images[1437:]), fitted.predict(images[1437:]))
        with pytest.raises(DataError, match="16, 16"):
            fitted.predict(torch.zeros(1, 1, 16, 16))
        (tmp_path / judge.FILE).write_bytes(b"torn")
        with pytest.raises(IntegrityError):
            judge.load_classifier(tmp_path)

    def test_is_the_kernel_ridge_regression_with_least_leave_one_out_error(self):
        images, labels = (part[:60] for part in digits())
        fitted = judge.fit(images, labels)
        points, wanted = images.flatten(1).double().numpy(), np.eye(10)[labels]

        def error(width, ridge):
            model = KernelRidge(alpha=ridge, kernel="rbf", gamma=width)
            return ((cross_val_predict(model, points, wanted, cv=LeaveOneOut()) - wanted) ** 2).mean()

        scale = 1 / np.median(((points[:, None] - points) ** 2).sum(2))
        errors = {(w, r): error(w * scale, r) for w in judge.WIDTHS for r in judge.RIDGES}
        width, ridge = min(errors, key=errors.get)
        assert fitted.ridge.item() == ridge
        assert fitted.width.item() == pytest.approx(width * scale, rel=0.01)  # numpy's median of an even number differs
        peer = KernelRidge(alpha=fitted.ridge.item(), kernel="rbf", gamma=fitted.width.item()).fit(points, wanted)
        np.testing.assert_allclose(fitted.weights, peer.dual_coef_, atol=1e-6)

    def test_keeps_evenly_many_of_a_large_set(self, monkeypatch):
        monkeypatch.setattr(judge, "ANCHORS", 100)
        images, labels = digits()
        assert len(judge.fit(images, labels).anchors) == 100


class TestExtractor:
    def test_learns_digits_and_is_fixed_by_its_seed(self):
        images, labels = digits()
        images = torch.nn.functional.interpolate(images, size=16, mode="bicubic").clamp(-1, 1)
        told = []
        before = torch.get_rng_state()

        def trained(samples, seed=0):
            return train_extractor(
                Shape(1, 16, 10, width=8),
                images[:1437],
                labels[:1437],
                samples=samples,
                batch=128,
                lr=5e-3,
                seed=seed,
                on_batch=lambda seen, loss: told.append(seen),
            )

        extractor = trained(15_000)
        assert told[-1] == 15_000 // 128 * 128
        assert (extractor.logits(images[1437:]).argmax(1) == labels[1437:]).double().mean() > 0.95
        features = extractor.features(images[:7])
        assert features.shape == (7, Extractor.features_width)
        assert torch.allclose(features[3:4], extractor.features(images[3:4]), atol=1e-5)
        one, same, other = (trained(300, seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["head.weight"], other["head.weight"])
        assert torch.equal(torch.get_rng_state(), before)

    def test_refuses_a_size_it_cannot_halve(self):
        with pytest.raises(ConfigError, match="size 20: a multiple of 8"):
            Shape(1, 20, 10)


def test_unit_is_the_distance_of_halves():
    features = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    unit = measure_unit(features, splits=10, seed=0)
    assert unit == measure_unit(features, splits=10, seed=0)
    # Mean of d²/n + d²/n for shifts of mean, plus as much again in order for the covariances.
    assert 3 * 2 / 200 < unit.mean < 6 * 2 / 200 * 2
    assert measure_unit(torch.cat([features[:1]] * 10), 2, 0).mean == 0


class TestPassport:
    ours = Passport("FD (digits-cnn, 01234567)", "01234567", "none", "ab", 1437, 1437, 0, Sampling(4), "cd", "0.999")

    def test_digest_depends_on_every_field_and_survives_json(self):
        changed = [replace(self.ours, sampling=Sampling(4, guidance=2.0))] + [
            replace(self.ours, **{name: value + type(value)(1)})
            for name, value in vars(self.ours).items()
            if name != "sampling"
        ]
        digests = {passport.digest for passport in (self.ours, *changed)}
        assert len(digests) == len(vars(self.ours)) + 1
        assert build(Passport, spec(self.ours), "passport") == self.ours

    @pytest.mark.parametrize("name", RULER)
    def test_refuses_numbers_of_another_ruler(self, name):
        value = getattr(self.ours, name)
        other = replace(self.ours, **{name: value + type(value)(1)})
        with pytest.raises(RefusedError, match=rf"differ in {name} \("):
            self.ours.comparable(other)

    def test_compares_models_and_samplers(self):
        self.ours.comparable(replace(self.ours, sampling=Sampling(1), bundle="ef", ema="none", first_seed=9))
