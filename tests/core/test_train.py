"""The training loop: known optima are reached, a restart changes nothing, and neither does the number of workers."""

import shutil
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import nn

from diffusion_core import checkpoint, manifest
from diffusion_core.bundle import DenoiserSpec
from diffusion_core.denoiser import Denoiser, Time
from diffusion_core.distill.consistency import Consistency, ConsistencyDistillation
from diffusion_core.distill.progressive import Progressive
from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch, Objective, Regression, drop_condition
from diffusion_core.order import Order
from diffusion_core.parallel import World
from diffusion_core.schedule import VP, Linear
from diffusion_core.spec import build
from diffusion_core.target import V
from diffusion_core.train import Plan, begin, fit
from diffusion_core.vae import KlVae, VaeLoss
from diffusion_core.weighting import Flat, LogitNormal, MinSnr, UniformTimes
from diffusion_core.weights import read_tensors, write_tensors
from tests.core.oracle import Gaussian

NET = {"kind": "dit", "channels": 1, "size": 8, "classes": 3, "width": 16, "depth": 1, "heads": 2}
DENOISER = {"net": NET, "schedule": {"kind": "linear"}, "target": {"kind": "v"}}
DENOISER |= {"scale": {"kind": "unit_variance"}, "label": {"kind": "quarter_log_noise"}}
PICTURES = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PLAN = Plan(images=64, batch=8, lr=1e-2, warm_up=16, ema=0.9, weight_decay=0.1, checkpoint_every=8, log_every=8, seed=4)


def dit(seed=0):
    torch.manual_seed(seed)
    made = build(DenoiserSpec, DENOISER, "denoiser").build()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.2)  # nothing is zero, so every weight has a gradient
    return made


OBJECTIVES = {
    "regression": lambda: Regression(dit(), LogitNormal(), MinSnr(), 0.2),
    "progressive": lambda: Progressive(dit(), dit(1), 4, Flat()),
    "consistency": lambda: ConsistencyDistillation(dit(), dit(1), Consistency(fewest=2, most=8), PLAN.steps),
    "vae": lambda: VaeLoss(vae(), 1e-2),
}


def vae():
    torch.manual_seed(0)
    return KlVae(1, 2, (8, 8))


def batches(plan, world=None, dtype=torch.float32):
    order, world = Order((len(PICTURES),), plan.seed), world or World()

    def batch(step):
        ids = world.rows(order.ids(step, plan.batch))
        return Batch(PICTURES[ids].to(dtype), {"label": ids % 3}, ids)

    return batch


def everything(objective, state):
    """All that training changes, by name; dictionaries of tensors compare with `same`."""
    found = {}
    for name, module in {**objective.modules, **objective.carried}.items():
        found |= {f"{name}/{key}": value.clone() for key, value in module.state_dict().items()}
    for name, ema in state.emas.items():
        found |= {f"ema/{name}/{key}": value.clone() for key, value in ema.average.items()}
        found[f"updates/{name}"] = torch.tensor(ema.updates)
    for name, optimizer in state.optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            found |= {f"adam/{name}/{index}/{key}": value.clone() for key, value in moments.items()}
    return found | {"step": torch.tensor(state.step)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Affine(nn.Module):
    """The smallest network that can be right about Gaussian data: affine in x, smooth in time."""

    def __init__(self):
        super().__init__()
        layers = [layer for a, b in ((1, 32), (32, 32), (32, 2)) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.coefficients = nn.Sequential(*layers[:-1])

    def forward(self, x, c, cond=None):
        slope, shift = self.coefficients(c.float()[:, None]).T.reshape(2, -1, 1, 1, 1)
        return slope * x + shift


@pytest.mark.parametrize("schedule", [Linear(), VP()])
def test_regression_finds_the_posterior_mean_of_gaussian_data(schedule):
    """The optimum is E[x₀ | x] in closed form; a wrong target, weight or time would land elsewhere."""
    torch.manual_seed(0)
    denoiser = Denoiser(Affine(), schedule, V(), label=Time())
    data = 0.7 + 0.4 * torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    law = Gaussian(data.mean().item(), data.std().item())
    plan = Plan(images=512 * 600, batch=512, lr=1e-2, ema=0.98, seed=1)
    order = Order((len(data),), 1)

    def batch(step):
        ids = order.ids(step, plan.batch)
        return Batch(data[ids], {"label": torch.zeros_like(ids)}, ids)

    objective = Regression(denoiser, UniformTimes(), Flat(), 0.0)
    state = fit(objective, batch, plan)
    state.emas["denoiser"].copy_to(denoiser)
    for t in (0.1, 0.2, 0.35, 0.5, 0.8):
        level = schedule(torch.tensor(t, dtype=torch.float64))
        spread = torch.sqrt((level.a * law.std) ** 2 + level.b**2)
        x = (level.a * law.means[0] + spread * torch.linspace(-1, 1, 9, dtype=torch.float64)).reshape(-1, 1, 1, 1)
        found = denoiser(x.float(), torch.tensor(t)).x0.double()
        assert (found - law.pair(x, level).x0).square().mean().sqrt() < 0.05


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resuming_at_any_step_is_no_interruption(name, tmp_path):
    """Weights, averages, moments and counters after a restart at every step, bit for bit, by way of the disk."""
    whole = OBJECTIVES[name]()
    state = begin(whole, PLAN)
    fit(
        whole,
        batches(PLAN),
        PLAN,
        state=state,
        on_checkpoint=lambda state: checkpoint.save(tmp_path, whole, state, "me", keep=99),
    )
    places = sorted(tmp_path.glob("step-*"))
    assert [place.name for place in places] == [f"step-{step:08d}" for step in range(1, PLAN.steps)]
    for place in places:
        alone = tmp_path / "alone" / place.name
        shutil.copytree(place, alone / place.name)
        resumed = OBJECTIVES[name]()
        for module in resumed.modules.values():
            for parameter in module.parameters():
                nn.init.constant_(parameter, 7.0)  # whatever stood there is replaced
        resumed_state = begin(resumed, PLAN)
        assert checkpoint.restore(alone, resumed, resumed_state, "me")
        assert place.name == f"step-{resumed_state.step:08d}"
        fit(resumed, batches(PLAN), PLAN, state=resumed_state)
        assert same(everything(resumed, resumed_state), everything(whole, state))


class TestCheckpoints:
    @pytest.fixture
    def run(self, tmp_path):
        objective = OBJECTIVES["regression"]()
        state = begin(objective, PLAN)
        states = {}

        def keep(state):
            states[state.step] = everything(objective, state)
            checkpoint.save(tmp_path, objective, state, "me", keep=2)

        fit(objective, batches(PLAN), PLAN, state=state, on_checkpoint=keep)
        return tmp_path, states

    def restore(self, folder, identity="me"):
        objective, said = OBJECTIVES["regression"](), []
        state = begin(objective, PLAN)
        found = checkpoint.restore(folder, objective, state, identity, said.append)
        return found and everything(objective, state), said

    def test_the_last_two_are_kept_and_the_newest_is_taken(self, run):
        folder, states = run
        assert sorted(place.name for place in folder.iterdir()) == ["step-00000006", "step-00000007"]
        found, said = self.restore(folder)
        assert same(found, states[7]) and said == []

    @pytest.mark.parametrize("damage", ["cut", "flipped", "no manifest", "torn manifest", "no tensors"])
    def test_a_torn_one_is_passed_over_with_a_word(self, run, damage):
        folder, states = run
        tensors, sealed = folder / "step-00000007" / checkpoint.TENSORS, folder / "step-00000007" / manifest.NAME
        whole = tensors.read_bytes()
        {
            "cut": lambda: tensors.write_bytes(whole[:-100]),
            "flipped": lambda: tensors.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]),
            "no manifest": sealed.unlink,
            "torn manifest": lambda: sealed.write_text(sealed.read_text()[:50]),
            "no tensors": tensors.unlink,
        }[damage]()
        found, said = self.restore(folder)
        assert same(found, states[6])
        assert len(said) == 1 and "passing over" in said[0] and "step-00000007" in said[0]

    def test_one_of_another_run_is_passed_over(self, run):
        folder, _ = run
        found, said = self.restore(folder, "another")
        assert found is False
        assert len(said) == 2 and all("another configuration" in word for word in said)

    def test_a_new_run_outlives_the_later_checkpoints_of_an_old_one(self, run):
        folder, _ = run
        objective = OBJECTIVES["regression"]()
        state = begin(objective, PLAN)
        state.step = 1
        checkpoint.save(folder, objective, state, "another", keep=2)
        found, _ = self.restore(folder, "another")
        assert found and found["step"] == 1

    def test_a_draft_left_by_a_crash_harms_nobody(self, run):
        folder, states = run
        (folder / ".draft").mkdir()
        (folder / ".draft" / checkpoint.TENSORS).write_bytes(b"half")
        assert same(self.restore(folder)[0], states[7])
        objective = OBJECTIVES["regression"]()
        checkpoint.save(folder, objective, begin(objective, PLAN), "me")

    def test_an_empty_folder_is_no_error(self, tmp_path):
        assert self.restore(tmp_path / "none") == (False, [])


def _share(rank, size, folder):
    """One of `size` processes that train together; each writes what it ended with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    for name in ("regression", "consistency"):
        _train(OBJECTIVES[name](), World.current(), folder / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


def _train(objective, world, path):
    for module in (
        *objective.modules.values(),
        *objective.carried.values(),
        getattr(objective, "teacher", nn.Module()),
    ):
        module.double()
    state, told = begin(objective, PLAN), {}

    def tell(metrics, images):
        told.update({f"{images}/{key}": torch.tensor(value) for key, value in metrics.items() if "/" in key})

    fit(objective, batches(PLAN, world, torch.float64), PLAN, state=state, world=world, on_metrics=tell)
    write_tensors(path, everything(objective, state) | told)


def test_two_workers_are_one(tmp_path):
    """Real processes over gloo, float64: weights, averages, moments and reported losses agree to 1e-9."""
    torch.multiprocessing.spawn(_share, (2, tmp_path), nprocs=2)
    for name in ("regression", "consistency"):
        _train(OBJECTIVES[name](), World(), tmp_path / f"{name}-alone.safetensors")
        alone, first, second = (read_tensors(tmp_path / f"{name}-{one}.safetensors") for one in ("alone", 0, 1))
        assert same(first, second)
        assert alone.keys() == first.keys() and "64/loss/" in "".join(alone)
        for key, value in alone.items():
            torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-9, msg=key)


class Quadratic(Objective):
    """Two modules, each pulled to a number of its own; counts how it is called."""

    def __init__(self):
        self.modules = {"one": nn.Linear(1, 1, bias=False), "two": nn.Linear(1, 1, bias=False)}
        self.after = []

    def losses(self, batch, step, noise):
        yield "one", (self.modules["one"].weight - 3).square().sum() * 1e6
        yield "two", (self.modules["two"].weight - self.modules["one"].weight.detach()).square().sum()

    def after_step(self, step):
        self.after.append(step)


def test_modules_are_stepped_in_order_and_gradients_are_clipped():
    plan = Plan(images=400, batch=1, lr=0.05, warm_up=0, decay="constant", log_every=1, clip=1.0)
    objective, told = Quadratic(), []
    fit(
        objective,
        lambda step: Batch(torch.zeros(1), {}, torch.tensor([0])),
        plan,
        on_metrics=lambda metrics, images: told.append(metrics),
    )
    assert objective.modules["one"].weight.item() == pytest.approx(3, abs=0.1)
    assert objective.modules["two"].weight.item() == pytest.approx(3, abs=0.2)
    assert objective.after == list(range(400))
    assert set(told[0]) == {"loss/one", "loss/two", "gradient_norm/one", "gradient_norm/two", "lr", "images_per_second"}
    assert told[0]["gradient_norm/one"] > 1e6  # before clipping


def test_the_learning_rate_warms_up_and_falls():
    plan = Plan(images=1000, batch=10, lr=2.0, warm_up=100)
    rates = [plan.lr_at(step) for step in range(plan.steps)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0, rel=0.01)
    assert rates[50] == pytest.approx(1.0) and rates[-1] < 0.001 and max(rates) < 2.0
    flat = Plan(images=1000, batch=10, lr=2.0, warm_up=0, decay="constant")
    assert {flat.lr_at(step) for step in range(100)} == {2.0}


def test_checkpointing_and_logging_change_nothing():
    quiet, noisy = OBJECTIVES["regression"](), OBJECTIVES["regression"]()
    rare = Plan(**{**PLAN.__dict__, "checkpoint_every": 10**9, "log_every": 10**9})
    first, second = fit(quiet, batches(PLAN), rare), fit(noisy, batches(PLAN), PLAN)
    assert same(everything(quiet, first), everything(noisy, second))


def test_about_the_share_of_labels_is_dropped():
    """Guidance needs an unconditional branch: 10 % of the labels become "no class", drawn anew each step."""
    labels = torch.arange(20_000) % 10
    counts = []
    for step in range(2):
        dropped = drop_condition({"label": labels}, Noise(1, torch.arange(20_000), step), 0.1)["label"]
        assert ((dropped == labels) | (dropped == -1)).all()
        assert stats.binomtest(int((dropped == -1).sum()), 20_000, 0.1).pvalue > 1e-3
        counts.append(dropped)
    assert not torch.equal(*counts)
    assert torch.equal(drop_condition({"label": labels}, Noise(1, torch.arange(20_000)), 0.0)["label"], labels)


def test_only_the_students_weights_have_gradients():
    objective = OBJECTIVES["progressive"]()
    before = deepcopy(objective.teacher.state_dict())
    fit(objective, batches(PLAN), PLAN)
    assert same(before, objective.teacher.state_dict())
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


@pytest.mark.parametrize(
    "refused",
    [
        lambda: Plan(images=1, batch=2),
        lambda: Plan(images=1, batch=0),
        lambda: Plan(images=1, batch=1, lr=0.0),
        lambda: Plan(images=1, batch=1, ema=1.0),
        lambda: Plan(images=1, batch=1, clip=0.0),
        lambda: Regression(dit(), UniformTimes(), Flat(), 1.0),
    ],
)
def test_impossible_numbers_are_refused(refused):
    with pytest.raises(ConfigError, match="wanted"):
        refused()
