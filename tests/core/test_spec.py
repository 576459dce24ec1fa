"""Values as their own configuration: what is written is what is read, and nothing else is accepted."""

import dataclasses
import types
import typing

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from diffusion_core.bundle import DenoiserSpec
from diffusion_core.denoiser import Label, Scale
from diffusion_core.distill.consistency import Consistency
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.grid import Grid
from diffusion_core.multistep import Multistep
from diffusion_core.nets import NetSpec
from diffusion_core.renoise import Renoise
from diffusion_core.sampler import Sampling
from diffusion_core.schedule import Cosine, Schedule, Shifted
from diffusion_core.solver import Solver
from diffusion_core.spec import Blueprint, Kind, build, flatten, spec
from diffusion_core.target import X0, Target
from diffusion_core.train import Plan
from diffusion_core.vae import CodecSpec
from diffusion_core.weighting import Times, Weight

FAMILIES = (Schedule, Target, Scale, Label, Solver, Grid, Renoise, Times, Weight)
BLUEPRINTS = {
    NetSpec: {"kind": "dit", "channels": 4, "size": 8, "classes": 10, "patch": 2},
    CodecSpec: {"kind": "kl_vae", "channels": 1, "widths": [8, 16]},
}


def plain(wanted):
    """Plain data for a type, as a file would hold it, from the annotations alone."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted in BLUEPRINTS:
        return st.just(BLUEPRINTS[wanted])
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(st.none() if one is type(None) else plain(one) for one in inner))
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return st.lists(plain(inner[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*(plain(one) for one in inner)).map(list)
    if isinstance(wanted, type) and issubclass(wanted, Kind) and not dataclasses.is_dataclass(wanted):
        named = (
            st.deferred(lambda made=made: plain(made)).map(lambda raw, n=n: raw | {"kind": n})
            for n, made in wanted.kinds().items()
        )
        return st.one_of(*named)
    if dataclasses.is_dataclass(wanted):
        hints = typing.get_type_hints(wanted)
        required = {f.name: plain(hints[f.name]) for f in dataclasses.fields(wanted) if _required(f)}
        optional = {f.name: plain(hints[f.name]) for f in dataclasses.fields(wanted) if not _required(f)}
        return st.fixed_dictionaries(required, optional=optional)
    return {int: st.integers(1, 4), float: st.floats(0.01, 0.99), bool: st.booleans(), str: st.text()}[wanted]


def _required(field):
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def members():
    for family in FAMILIES:
        for name, made in family.kinds().items():
            yield pytest.param(family, made, id=f"{family.__name__}-{name}")


@pytest.mark.parametrize(("family", "made"), members())
@settings(max_examples=30, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_what_is_written_is_read_back(family, made, data):
    raw = data.draw(plain(made)) | {"kind": next(name for name, one in family.kinds().items() if one is made)}
    try:
        value = build(family, raw, "here")
    except (ConfigError, RefusedError):
        assume(False)
    assert type(value) is made
    assert build(family, spec(value), "there") == value
    assert hash(value) == hash(build(family, spec(value), "there"))
    assert set(flatten(spec(value))) >= set(flatten(raw))


@pytest.mark.parametrize("wanted", [Plan, Sampling, Consistency, DenoiserSpec])
@settings(max_examples=30)
@given(data=st.data())
def test_plain_records_too(wanted, data):
    try:
        value = build(wanted, data.draw(plain(wanted)), "here")
    except (ConfigError, RefusedError):
        assume(False)
    assert build(wanted, spec(value), "there") == value


@pytest.mark.parametrize("blueprint", BLUEPRINTS)
def test_blueprints_too(blueprint):
    value = blueprint.read(BLUEPRINTS[blueprint], "here")
    assert isinstance(value, Blueprint)
    assert spec(value) == BLUEPRINTS[blueprint]
    assert blueprint.read(spec(value), "there") == value


def test_defaults_are_those_of_the_constructor():
    assert build(Schedule, {"kind": "cosine"}, "s") == Cosine()
    assert build(Solver, {"kind": "multistep", "frame": {"kind": "x0"}}, "s") == Multistep(frame=X0())
    assert build(Schedule, {"kind": "shifted", "inner": {"kind": "cosine"}}, "s") == Shifted(Cosine())


REFUSED = {
    "unknown key": (Plan, {"images": 9, "batch": 3, "bach": 1}, ["p.bach", "unknown", "did you mean 'batch'"]),
    "unknown key, deep": (
        DenoiserSpec,
        {"schedule": {"kind": "shifted", "inner": {"kind": "cosine", "shfit": 0.1}}},
        ["p.schedule.inner.shfit", "did you mean 'shift'"],
    ),
    "unknown kind": (Schedule, {"kind": "cosin"}, ["p.kind", "'cosin'", "did you mean 'cosine'"]),
    "kind missing": (Schedule, {"shift": 0.1}, ["p.kind", "None"]),
    "unknown net keyword": (NetSpec, {"kind": "dit", "widht": 8}, ["p.widht", "did you mean 'width'"]),
    "bool is not int": (Plan, {"images": True, "batch": 1}, ["p.images", "True", "int"]),
    "bool is not float": (Schedule, {"kind": "cosine", "shift": False}, ["p.shift", "False", "float"]),
    "text is not a number": (Plan, {"images": "9", "batch": 1}, ["p.images", "'9'", "int"]),
    "a float is not an int": (Plan, {"images": 9.0, "batch": 1}, ["p.images", "9.0"]),
    "NaN": (Schedule, {"kind": "cosine", "shift": float("nan")}, ["p.shift", "nan", "finite"]),
    "infinity": (Plan, {"images": 9, "batch": 1, "lr": float("inf")}, ["p.lr", "inf", "finite"]),
    "an integer beyond floats": (Plan, {"images": 9, "batch": 1, "lr": 10**400}, ["p.lr"]),
    "not a choice": (Plan, {"images": 9, "batch": 1, "decay": "cosin"}, ["p.decay", "did you mean 'cosine'"]),
    "missing": (Plan, {"images": 9}, ["p lacks batch"]),
    "out of range": (Schedule, {"kind": "cosine", "shift": 2.0}, ["p: ", "shift 2.0"]),
    "out of range, deep": (
        Solver,
        {"kind": "multistep", "order": 9},
        ["p: ", "order 9"],
    ),
    "list element": (Sampling, {"steps": 2, "allowed_steps": [2, "4"]}, ["p.allowed_steps[1]", "'4'"]),
    "not a list": (Sampling, {"steps": 2, "allowed_steps": 2}, ["p.allowed_steps", "a list is wanted"]),
    "not a mapping": (Plan, [1, 2], ["p is", "mapping"]),
    "null": (Plan, {"images": None, "batch": 1}, ["p.images", "None"]),
}


@pytest.mark.parametrize(("wanted", "raw", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_place_and_the_nearest_name(wanted, raw, words):
    with pytest.raises(ConfigError) as caught:
        wanted.read(raw, "p") if wanted in BLUEPRINTS else build(wanted, raw, "p")
    for word in words:
        assert word in str(caught.value)
