"""The codec's loss term by term, each against its own formula, and training with a critic: balance, start, restart."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from diffusion_core import checkpoint
from diffusion_core.critic import Patch
from diffusion_core.errors import DataError
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch
from diffusion_core.order import Order
from diffusion_core.parallel import World
from diffusion_core.perceptual import MsSsim
from diffusion_core.train import Plan, begin, fit
from diffusion_core.vae import KlVae, LdmVae, VaeLoss
from diffusion_core.weights import read_tensors, write_tensors

PICTURES = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
BATCH = Batch(PICTURES, {}, torch.arange(24))
PLAN = Plan(images=48, batch=8, lr=1e-2, warm_up=16, ema=0.9, checkpoint_every=8, log_every=8, seed=4)
PATCH = Patch(weight=0.7, start_images=24, width=8, layers=1)
SIMILAR = MsSsim(weight=0.4, scales=2, window=5)


def objective(seed=0, **terms):
    torch.manual_seed(seed)
    return VaeLoss(KlVae(1, 2, (8, 8)), 1e-2, batch=PLAN.batch, **terms)


def reconstructed(made, batch=BATCH, step=3):
    """What the objective draws and decodes."""
    mean, log_var = made.vae.posterior(batch.x)
    noise = Noise(1, batch.ids, step).normal(mean.shape[1:], 4)  # Stream.LATENT
    return made.vae.reconstruct(mean + (log_var / 2).exp() * noise).detach()


def losses(made, step=3, batch=BATCH):
    return dict(made.losses(batch, step, Noise(1, batch.ids, step)))


def test_each_term_adds_its_own():
    plain = objective()
    again = reconstructed(plain)
    base = losses(plain)["vae"].item()
    error = (again - PICTURES).numpy()
    l1 = losses(objective(reconstruction="l1"))["vae"].item()
    assert l1 - base == pytest.approx(np.abs(error).mean() - (error**2).mean(), rel=1e-5)
    similar = losses(objective(perceptual=SIMILAR))["vae"].item()
    assert similar - base == pytest.approx(0.4 * SIMILAR.build()(again, PICTURES).mean().item(), rel=1e-4)
    assert set(plain.modules) == {"vae"} and set(objective(adversarial=PATCH).modules) == {"vae", "critic"}


def test_the_critic_starts_after_its_images():
    late, plain = objective(adversarial=PATCH), objective()
    for step in (0, 2):
        found = losses(late, step)
        assert set(found) == {"vae"} and torch.equal(found["vae"], losses(plain, step)["vae"])
    assert list(losses(late, 3)) == ["vae", "critic"]


@pytest.mark.parametrize("kind", ["kl_vae", "ldm_vae"])
def test_the_critic_pulls_the_last_layer_with_a_fixed_share_of_the_force(kind):
    """|∇L - ∇(L without critic)| = weight · |∇L_rec| in the last layer, whatever the critic says (eq. 7)."""
    made, plain = objective(adversarial=PATCH, perceptual=SIMILAR), objective(perceptual=SIMILAR)
    plain.vae = made.vae
    if kind == "ldm_vae":
        plain.vae = made.vae = LdmVae(1, 2, (8, 8), depth=1, groups=4, checkpointing=True)
    layer = made.vae.last_layer
    assert layer.shape[0] == 1 and layer is list(made.vae.decoder.parameters())[-2]
    gradients = []
    for loss in (losses(made)["vae"], losses(plain)["vae"]):
        (gradient,) = torch.autograd.grad(loss, layer)
        gradients.append(gradient)
    pull = (gradients[0] - gradients[1]).norm().item()
    assert pull == pytest.approx(0.7 * gradients[1].norm().item(), rel=1e-3)  # the divergence has no part in this layer
    assert all(weight.grad is None for weight in made.critic.parameters())


def test_the_critic_learns_on_the_reconstructions_of_the_same_step():
    made = objective(adversarial=PATCH)
    again, said = reconstructed(made), made.critic
    wanted = (1 - said(PICTURES)).relu().mean() + (1 + said(again)).relu().mean()
    found, weights = losses(made)["critic"], list(made.vae.parameters())
    torch.testing.assert_close(found, wanted)
    assert set(torch.autograd.grad(found, weights, allow_unused=True)) == {None}


def test_a_critic_tells_grey_from_stripes():
    """Trained against a codec that can say only grey, its loss falls well under the 2 of a critic that says nothing."""
    torch.manual_seed(0)
    made = VaeLoss(KlVae(1, 1, (8,)), 100.0, adversarial=Patch(weight=0.0, width=8, layers=1), batch=8)
    stripes = (torch.arange(16) % 4 < 2).float().mul(2).sub(1).expand(8, 1, 16, 16)
    told = []
    plan = Plan(images=8 * 60, batch=8, lr=1e-2, warm_up=0, log_every=8)
    fit(made, lambda _: Batch(stripes, {}, torch.arange(8)), plan, on_metrics=lambda m, _: told.append(m))
    assert told[-1]["loss/critic"] < 0.8 < 1.5 < told[0]["loss/critic"]


def batches(world=None, dtype=torch.float32):
    order, world = Order((24,), PLAN.seed), world or World()

    def batch(step):
        ids = world.rows(order.ids(step, PLAN.batch))
        return Batch(PICTURES[ids].to(dtype), {}, ids)

    return batch


def everything(made, state):
    """All that training changes, by name."""
    found = {"step": torch.tensor(state.step)}
    for name, module in made.modules.items():
        found |= {f"{name}/{key}": value.clone() for key, value in module.state_dict().items()}
        found |= {f"ema/{name}/{key}": value.clone() for key, value in state.emas[name].average.items()}
        for index, moments in state.optimizers[name].state_dict()["state"].items():
            found |= {f"adam/{name}/{index}/{key}": value.clone() for key, value in moments.items()}
    return found


def test_resuming_at_any_step_is_no_interruption(tmp_path):
    """Before the critic starts and after, bit for bit, by way of the disk."""
    terms = {"adversarial": PATCH, "perceptual": SIMILAR}
    whole = objective(**terms)
    state = begin(whole, PLAN)
    fit(whole, batches(), PLAN, state=state, on_checkpoint=lambda s: checkpoint.save(tmp_path, whole, s, "me", keep=99))
    wanted = everything(whole, state)
    assert any(name.startswith("adam/critic/") for name in wanted)
    places = sorted(tmp_path.glob("step-*"))
    assert len(places) == PLAN.steps - 1
    for place in places:
        alone = tmp_path / "alone" / place.name
        alone.mkdir(parents=True)
        place.rename(alone / place.name)
        again = objective(seed=5, **terms)
        state = begin(again, PLAN)
        assert checkpoint.restore(alone, again, state, "me")
        fit(again, batches(), PLAN, state=state)
        found = everything(again, state)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), place.name


def _share(rank, size, folder):
    """One of `size` processes that train together; each writes what it ended with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    _train(World.current(), folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def _train(world, path):
    made = objective(adversarial=PATCH, perceptual=SIMILAR)
    for module in made.modules.values():
        module.double()
    state = begin(made, PLAN)
    fit(made, batches(world, torch.float64), PLAN, state=state, world=world)
    write_tensors(path, everything(made, state))


def test_two_workers_are_one(tmp_path):
    """Also the balance of the gradients is that of the global batch, not of a worker's share."""
    torch.multiprocessing.spawn(_share, (2, tmp_path), nprocs=2)
    _train(World(), tmp_path / "alone.safetensors")
    alone, first, second = (read_tensors(tmp_path / f"{one}.safetensors") for one in ("alone", 0, 1))
    assert alone.keys() == first.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-8, atol=1e-8, msg=key)


def test_a_codec_of_broken_pictures_is_not_normalized():
    codec = KlVae(1, 2, (8, 8)).requires_grad_(False)
    with pytest.raises(DataError, match="cannot be measured: they are not finite"):
        codec.normalize([codec.raw(PICTURES * float("nan"))])
