"""What the application may be told: by Serve's `args` when it is built, by `user_config` while it runs."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion_core.errors import ConfigError, suggest


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def read(cls, given: dict[str, Any]) -> Self:
        """Settings from plain data; raises ConfigError naming the first field at fault."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            hint = f" ({suggest(field, cls.model_fields)})" if first["type"] == "extra_forbidden" else ""
            raise ConfigError(f"{cls.__name__.lower()}.{field}: {first['msg']}, got {first['input']!r}{hint}") from None


class Target(_Settings):
    """Which model to serve; any change of `revision` makes a running replica read the alias again."""

    model: Annotated[str, Field(min_length=1)]
    revision: str = ""


class Config(_Settings):
    """The application's settings: where models come from and how requests share the processor."""

    model: Annotated[str, Field(min_length=1, description="name@alias of the registry, or folder://path")]
    tracking_uri: Annotated[str, Field(description="the registry; unused for folder://")] = ""
    cache: Annotated[str, Field(min_length=1, description="folder of verified copies, kept between starts")]
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    threads: Annotated[int, Field(ge=1, le=256, description="processor threads of one replica")] = 1
    chunk: Annotated[int, Field(ge=1, le=256, description="pictures in one pass; another size, other last bits")] = 2
    cpus: Annotated[float, Field(ge=0, description="processors that Ray sets aside for one replica")] = 0.0
    max_batch: Annotated[int, Field(ge=1, le=256, description="pictures handed over at a time")] = 16
    window: Annotated[float, Field(ge=0, le=1, description="seconds a picture waits for company")] = 0.004
    max_ongoing: Annotated[int, Field(ge=1, le=4096, description="requests inside one replica")] = 64
    max_queued: Annotated[int, Field(ge=1, le=65536, description="requests waiting outside; more get 503")] = 256
