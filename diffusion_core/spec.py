"""Values as their own configuration: `build` reads a value from plain data, `spec` writes it back.

A frozen dataclass is read field by field. A member of a *family* (a subclass of `Kind`) is chosen by its
`kind`, the snake-case name of its class: `{"kind": "cosine", "shift": 0.008}` is `Cosine(shift=0.008)`.
A module is the one thing that is not its own configuration; a `Blueprint` keeps its constructor keywords.
Both are checked against the same constructor signature, strictly, and every error names the full path.
"""

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from diffusion_core.errors import ConfigError, InkwellError, suggest

T = TypeVar("T")


class Kind:
    """Root of a family whose members are chosen by name."""

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """Every dataclass below this one, by its snake-case name."""
        found: dict[str, type[Self]] = {}
        for sub in cls.__subclasses__():
            if dataclasses.is_dataclass(sub):
                found[snake(sub.__name__)] = sub
            found |= sub.kinds()
        return found


def snake(name: str) -> str:
    """`LogitNormal` -> `logit_normal`; runs of capitals stay together: `DiT` -> `dit`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()


@dataclass(frozen=True)
class Blueprint:
    """A module not yet built: its kind and constructor keywords. Subclasses list the kinds they know."""

    kind: str
    keywords: tuple[tuple[str, object], ...] = ()
    known: ClassVar[Mapping[str, type]] = {}

    @classmethod
    def read(cls, value: object, path: str) -> Self:
        """Check `{"kind": ..., keyword: ...}` against the constructor; keywords may still be missing."""
        kind, rest = _split(value, path, cls.known)
        made = _arguments(cls.known[kind], rest, path)
        return cls(kind, tuple(sorted(made.items())))

    def extended(self, **more: object) -> Self:
        """The same blueprint with further keywords, such as shapes that only the data know."""
        return type(self)(self.kind, tuple(sorted((dict(self.keywords) | more).items())))

    def build(self) -> Any:
        """Construct the module; raises ConfigError for a missing keyword or a refused value."""
        return _call(self.known[self.kind], dict(self.keywords), self.kind)

    def spec(self) -> dict[str, object]:
        """Plain data that `read` turns back into this blueprint."""
        return {"kind": self.kind} | {name: spec(value) for name, value in self.keywords}


def build(wanted: type[T], value: object, path: str) -> T:
    """Read a value of type `wanted` from plain data; `path` names the place in every error.

    Raises ConfigError for an unknown key, a wrong type, a missing field or a value its class refuses.
    """
    return typing.cast(T, _build(wanted, value, path))


def spec(value: object) -> Any:
    """Plain data (dict, list, numbers, text) that `build` turns back into `value`."""
    if isinstance(value, Blueprint):
        return value.spec()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        head = {"kind": snake(type(value).__name__)} if isinstance(value, Kind) else {}
        return head | {f.name: spec(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, tuple | list):
        return [spec(item) for item in value]
    if isinstance(value, Mapping):
        return {key: spec(item) for key, item in value.items()}
    return value


def flatten(value: Any, prefix: str = "") -> dict[str, object]:
    """Nested plain data as one level of dotted names, for a tracker."""
    if isinstance(value, Mapping):
        pairs = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
        return {name: leaf for key, item in pairs for name, leaf in flatten(item, key).items()}
    return {prefix: value}


def _build(wanted: Any, value: object, path: str) -> object:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return _optional(inner, value, path)
    if origin is typing.Literal:
        if value not in inner or isinstance(value, bool) != any(isinstance(i, bool) for i in inner):
            raise ConfigError(f"{path} is {value!r}; {suggest(str(value), map(str, inner))}")
        return value
    if origin is tuple:
        return _tuple(inner, value, path)
    if origin is dict:
        return {key: _build(inner[1], item, f"{path}.{key}") for key, item in _mapping(value, path).items()}
    if wanted in (int, float, str, bool):
        return _scalar(wanted, value, path)
    if isinstance(wanted, type) and issubclass(wanted, Blueprint):
        return wanted.read(value, path)
    if isinstance(wanted, type) and issubclass(wanted, Kind):
        kind, rest = _split(value, path, wanted.kinds())
        return _call(wanted.kinds()[kind], _arguments(wanted.kinds()[kind], rest, path), path)
    if dataclasses.is_dataclass(wanted):
        return _call(wanted, _arguments(wanted, _mapping(value, path), path), path)
    raise TypeError(f"{path}: a field of type {wanted!r} cannot be read from a file")


def _optional(members: tuple[Any, ...], value: object, path: str) -> object:
    if value is None and type(None) in members:
        return None
    (wanted,) = [member for member in members if member is not type(None)]
    return _build(wanted, value, path)


def _tuple(members: tuple[Any, ...], value: object, path: str) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path} is {value!r}; a list is wanted")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise ConfigError(f"{path} has {len(value)} entries; {len(members)} are wanted")
    return tuple(_build(m, v, f"{path}[{i}]") for i, (m, v) in enumerate(zip(members, value, strict=True)))


def _scalar(wanted: type, value: object, path: str) -> object:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond all floats is refused below
            value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{path} is {value!r} ({type(value).__name__}); a value of type {wanted.__name__} is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value!r}; a finite number is wanted")
    return value


def _mapping(value: object, path: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path} is {value!r}; a mapping of names to values is wanted")
    return value


def _split(value: object, path: str, known: Mapping[str, type]) -> tuple[str, dict[str, object]]:
    rest = dict(_mapping(value, path))
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"{path}.kind is {kind!r}; {suggest(str(kind), known)}")
    return kind, rest


def _arguments(made: Any, given: Mapping[str, object], path: str) -> dict[str, object]:
    """Each given keyword, read as the constructor's annotation says."""
    hints = typing.get_type_hints(made.__init__)
    names = list(_parameters(made))
    for name in given:
        if name not in names:
            raise ConfigError(f"{path}.{name} is unknown; {suggest(name, names)}")
    return {name: _build(hints[name], value, f"{path}.{name}") for name, value in given.items()}


def _parameters(made: Any) -> dict[str, inspect.Parameter]:
    """The constructor's named parameters; a module without one of its own has none."""
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: one for name, one in inspect.signature(made).parameters.items() if one.kind not in open_ended}


def _call(made: Any, arguments: Mapping[str, object], path: str) -> object:
    required = [name for name, one in _parameters(made).items() if one.default is inspect.Parameter.empty]
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}")
    try:
        return made(**arguments)
    except InkwellError as error:
        raise type(error)(f"{path}: {error}") from error
