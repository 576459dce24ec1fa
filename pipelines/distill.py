"""Stage distill: teacher -> a few-step student, `python -m pipelines.distill progressive` or `... consistency`."""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_core import bundle
from diffusion_core.bundle import DenoiserSpec
from diffusion_core.denoiser import Denoiser
from diffusion_core.distill.consistency import Consistency, ConsistencyDistillation
from diffusion_core.distill.progressive import Progressive
from diffusion_core.errors import ConfigError
from diffusion_core.objective import Objective
from diffusion_core.renoise import Full
from diffusion_core.sampler import Sampling
from diffusion_core.train import Plan
from diffusion_core.weighting import Weight
from pipelines import launch
from pipelines.data.latents import Latents
from pipelines.fitting import Place, publish_weights, resume_and_fit
from pipelines.launch import Cluster
from pipelines.models import BUNDLES
from pipelines.previews import preview
from pipelines.stage import Stage, choice, run


@dataclass(frozen=True)
class Round:
    """One leg of a distillation: a student with these sampling defaults, under this name."""

    name: str
    sampling: Sampling


@dataclass(frozen=True)
class ProgressiveConfig:
    """Halve a sampler of `start` steps until `stop` are left; every halving is trained by `plan`."""

    start: int
    stop: int
    weight: Weight
    plan: Plan
    cluster: Cluster
    drop_cond: float = 0.1

    def __post_init__(self) -> None:
        halvings = (self.start // max(self.stop, 1)).bit_length() - 1
        if self.stop < 1 or halvings < 1 or self.stop * 2**halvings != self.start:
            raise ConfigError(f"start {self.start}, stop {self.stop}: start = stop times 2, 4, 8, ... is wanted")

    @property
    def rounds(self) -> list[Round]:
        """One a halving, most steps first."""
        steps = [self.start // 2**i for i in range(1, (self.start // self.stop).bit_length())]
        return [Round(f"steps-{n}", Sampling(n, allowed_steps=(n,))) for n in steps]

    def objective(self, student: Denoiser, teacher: Denoiser, leg: Round) -> Objective:
        """The objective of one halving."""
        return Progressive(student, teacher, leg.sampling.steps, self.weight, self.drop_cond)


@dataclass(frozen=True)
class ConsistencyConfig:
    """One round by `plan`; the student may take any of `steps` steps, the first by default."""

    steps: tuple[int, ...]
    method: Consistency
    plan: Plan
    cluster: Cluster
    drop_cond: float = 0.1

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1:
            raise ConfigError(f"steps {list(self.steps)}: at least one number of 1 or more is wanted")

    @property
    def rounds(self) -> list[Round]:
        """The only one."""
        return [Round("final", Sampling(self.steps[0], renoise=Full(), allowed_steps=tuple(sorted(self.steps))))]

    def objective(self, student: Denoiser, teacher: Denoiser, leg: Round) -> Objective:
        """The objective of the whole run."""
        return ConsistencyDistillation(student, teacher, self.method, self.plan.steps, self.drop_cond)


Config = ProgressiveConfig | ConsistencyConfig


@dataclass(frozen=True)
class Job:
    """What a worker is sent; all paths are absolute, on storage that every worker sees."""

    config: Config
    denoiser: DenoiserSpec
    teacher: Path
    latents: Path
    place: Place
    weights: Path


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Distil on the cluster; the last round is the student, the weights of earlier ones are kept beside it."""
    teacher_folder, _ = stage.input("artifacts/teacher", "bundle")
    latents, _ = stage.input("artifacts/latents", "latents")
    teacher = bundle.load(teacher_folder, verify=False)
    place = Place(stage.work.resolve(), stage.tracker.journal, stage.identity(config))
    weights = (teacher_folder / "denoiser.safetensors").resolve()
    job = Job(config, teacher.denoiser_spec, weights, latents.resolve(), place, stage.out.resolve() / "rounds")
    job.weights.mkdir()
    with stage.following("images seen", config.plan.images * len(config.rounds)):
        launch.train(loop, job, config.cluster)
    data = Latents.open(latents, "train")
    for leg in config.rounds:
        weights = job.weights / f"{leg.name}.safetensors"
        student = replace(teacher, denoiser=bundle.load_denoiser(teacher.denoiser_spec, weights), sampling=leg.sampling)
        for steps in leg.sampling.allowed_steps or ():
            preview(student, leg.sampling.changed(steps=steps), stage, f"samples-{steps}.png", data)
    weights.unlink()  # the last round is the bundle itself
    student.about = {"name": stage.name.split(".")[-1], "images": config.plan.images, "ema": config.plan.ema}
    bundle.save(student, stage.out)
    return student.about


def loop(job: Job, device: str) -> None:
    """One worker's share of all rounds; each round's student is the next one's teacher."""
    teacher = bundle.load_denoiser(job.denoiser, job.teacher).to(device)
    data = Latents.open(job.latents, "train")
    for number, leg in enumerate(job.config.rounds):
        student = deepcopy(teacher).train().requires_grad_(True)
        objective = job.config.objective(student, teacher, leg)
        done = number * job.config.plan.images
        averages = resume_and_fit(objective, data, job.config.plan, job.place.below(leg.name), device, after=done)
        publish_weights(averages["student"], job.weights / f"{leg.name}.safetensors")
        teacher = deepcopy(student).eval().requires_grad_(False)
        teacher.load_state_dict(averages["student"])


if __name__ == "__main__":
    configs = {"progressive": ProgressiveConfig, "consistency": ConsistencyConfig}
    word = choice(configs)
    run(f"distill.{word}", configs[word], main, out=BUNDLES[word], kind="bundle")
