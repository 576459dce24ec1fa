"""The public names: exactly those of `__all__`, each with a docstring, and so each public method of theirs."""

import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import diffusion_core


def test_the_package_binds_what_it_promises_and_nothing_else():
    asked = "import diffusion_core as d; print(*(n for n, v in vars(d).items() if not n.startswith('_')))"
    bound = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    modules = {name for name in bound if isinstance(getattr(diffusion_core, name), types.ModuleType)}
    shadowed = {name for name in diffusion_core.__all__ if inspect.ismodule(getattr(diffusion_core, name))}
    assert set(bound) - modules == set(diffusion_core.__all__)
    assert not shadowed, "a module of the same name hides a public name"
    assert len(diffusion_core.__all__) == len(set(diffusion_core.__all__))


@pytest.mark.parametrize("name", diffusion_core.__all__)
def test_a_public_name_says_what_it_is(name):
    public = getattr(diffusion_core, name)
    if not callable(public):  # a constant of a documented kind
        return
    assert inspect.getdoc(public), f"{name} has no docstring"
    if inspect.isclass(public):
        for method, function in inspect.getmembers(public, inspect.isfunction):
            own = function.__module__.startswith("diffusion_core") and not method.startswith("_")
            assert not own or inspect.getdoc(getattr(public, method)), f"{name}.{method} has no docstring"


def test_the_example_of_the_guide_runs():
    guide = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text()
    example = guide.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(compile(example, "docs/mathematics.md", "exec"), names)
    assert names["pictures"].shape == (8, 3, 32, 32) and names["pictures"].isfinite().all()


def test_the_guide_names_only_what_there_is():
    guide = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text()
    called = set(re.findall(r"`([A-Z]\w+|[a-z]\w+(?=\())", guide))
    builtins = {"True", "False"} | {name for name in called if name in {"mix", "unmix", "order_on"}}
    missing = called - set(diffusion_core.__all__) - builtins
    assert not missing, f"docs/mathematics.md speaks of {sorted(missing)}"
