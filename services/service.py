"""The model in service: how it is loaded, swapped and asked, and the figures kept about it."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from diffusion_core.errors import InkwellError
from services import registry
from services.batcher import Batcher
from services.config import Config, Target
from services.generator import Generator, Order
from services.schema import NotReadyError

LATENCIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10, 30)


class Meter:
    """What Prometheus reads: one registry a replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("inkwell_requests", "Requests", ["route", "status"], registry=self.registry)
        self.latency = Histogram(
            "inkwell_request_seconds", "Seconds to an answer", ["route"], buckets=LATENCIES, registry=self.registry
        )
        self.batch = Histogram(
            "inkwell_batch_pictures",
            "Pictures drawn together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.pictures = Counter("inkwell_pictures", "Pictures drawn", registry=self.registry)
        self.model = Gauge(
            "inkwell_model_info", "The model in service", ["name", "version", "digest"], registry=self.registry
        )
        self.refused = Counter("inkwell_models_refused", "Models that were not put in service", registry=self.registry)


@dataclass(frozen=True)
class InService:
    """A warm generator and the batcher that feeds it; an answer never mixes two of these."""

    generator: Generator
    batcher: Batcher


class Service:
    """One replica's state: no model, or one that was verified and warmed up before its first request."""

    def __init__(self, config: Config) -> None:
        self.config, self.meter = config, Meter()
        self.current: InService | None = None
        self.refusal: str | None = "no model has been loaded yet"
        self.revision = ""
        self.loading = asyncio.Lock()
        self.drawing = self._pool("draw")

    async def load(self, target: Target) -> None:
        """Put a model in service; if it is refused, the one before it stays and `refusal` says why.

        `revision` is that of the last target that was taken or refused.
        """
        reference = target.model
        async with self.loading:
            pool = self._pool("load")
            try:
                generator = await asyncio.get_running_loop().run_in_executor(pool, self._prepare, reference)
            except InkwellError as error:
                self._refuse(str(error))
            except Exception as error:
                self._refuse(f"{reference} could not be loaded: {type(error).__name__}: {error}")
            else:
                self._enter(generator)
            finally:
                pool.shutdown(wait=False)
            self.revision = target.revision

    def ready(self) -> InService:
        """What is in service; raises NotReadyError with the reason if nothing is."""
        if self.current is None:
            raise self.not_ready()
        return self.current

    def not_ready(self) -> NotReadyError:
        """Why nothing is in service."""
        return NotReadyError(self.refusal or "no model is in service", code="not_ready")

    def _prepare(self, reference: str) -> Generator:
        model = registry.load(reference, self.config.tracking_uri, Path(self.config.cache))
        generator = Generator(model, self.config.chunk)
        generator.warm_up()
        return generator

    def _enter(self, generator: Generator) -> None:
        model = generator.model
        batcher = Batcher(partial(self._draw, generator), self.config.max_batch, self.config.window)
        self.current, self.refusal = InService(generator, batcher), None
        self.meter.model.clear()
        self.meter.model.labels(model.name, model.version, model.digest).set(1)

    def _refuse(self, sentence: str) -> None:
        self.refusal = sentence
        self.meter.refused.inc()

    async def _draw(self, generator: Generator, orders: Sequence[Order]) -> list[bytes]:
        self.meter.batch.observe(len(orders))
        drawn = await asyncio.get_running_loop().run_in_executor(self.drawing, generator.draw, orders)
        self.meter.pictures.inc(len(drawn))
        return drawn

    def _pool(self, purpose: str) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, purpose, initializer=partial(torch.set_num_threads, self.config.threads))
