"""The Serve application, `services.app:build`: one deployment that holds the model, the batcher and the routes.

Serve builds the application in a process that only reads this file; what needs torch is imported by the replica.
"""

from typing import TYPE_CHECKING, Any

from ray import serve

from services.config import Config, Target

if TYPE_CHECKING:
    from fastapi import FastAPI


@serve.ingress()
class Images:
    """A replica. Serve calls `reconfigure` before its first request, and again whenever `user_config` changes."""

    def __init__(self, config: Config) -> None:
        from services.service import Service

        self.service = Service(config)

    def __serve_build_asgi_app__(self) -> "FastAPI":
        from services import web

        return web.create(self.service)

    async def reconfigure(self, target: dict[str, Any]) -> None:
        """Load the target beside the model in service, and swap when it is verified and warm."""
        await self.service.load(Target.read(target))


def build(args: dict[str, Any]) -> serve.Application:
    """The application for Serve's config file; raises ConfigError for an argument it does not know."""
    config = Config.read(args)
    deployment = serve.deployment(
        Images,
        name="Images",
        num_replicas=config.replicas,
        max_ongoing_requests=config.max_ongoing,
        max_queued_requests=config.max_queued,
        user_config={"model": config.model},
        ray_actor_options={"num_cpus": config.cpus},
        graceful_shutdown_timeout_s=5,
    )
    return deployment.bind(config)
