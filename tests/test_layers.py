"""Who may import whom, read from the source: function-level imports count too."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("diffusion_core", "pipelines", "services")
MAY_NOT = {
    "diffusion_core": {"pipelines", "services", "tests", "infra"},
    "pipelines": {"services", "tests", "infra"},
    "services": {"pipelines", "tests", "infra"},
}
ONLY_IN = {  # a third party and the places that may know it
    "ray": ("pipelines/launch.py", "services/"),
    "mlflow": ("pipelines/tracking/", "services/registry.py"),
    "webdataset": ("pipelines/data/",),
    "pyarrow": ("pipelines/data/",),
    "great_expectations": ("pipelines/data/",),
    "safetensors": ("diffusion_core/weights.py",),
    "PIL": ("diffusion_core/images.py",),
    "tokenizers": ("diffusion_core/adapters/tokenizer.py",),
    "dvc": (),
}
CORE_KNOWS = sys.stdlib_module_names | {"diffusion_core", "torch", "numpy", "safetensors", "PIL", "tokenizers"}
FILES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import in a file; the name is empty for `import module`."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the layer"
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"__import__", "importlib.import_module"}:
            assert not isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: import it by a statement"


def module_of(path: Path) -> str:
    """`diffusion_core/nets/dit.py` -> `diffusion_core.nets.dit`; a package goes by its folder."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_there_is_something_to_check() -> None:
    assert {path.parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_layer_may_know(path: Path) -> None:
    package, wrong = path.parts[0], []
    for line, module, _ in imports(path):
        top = module.partition(".")[0]
        places = ONLY_IN.get(top)
        if top in MAY_NOT[package]:
            wrong.append(f"line {line}: {package} may not import {module}")
        elif places is not None and not path.as_posix().startswith(places):
            wrong.append(f"line {line}: {top} belongs to {', '.join(places) or 'no package'}")
        elif package == "diffusion_core" and top not in CORE_KNOWS:
            wrong.append(f"line {line}: the core knows no {top}")
    assert not wrong, f"{path}: {'; '.join(wrong)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_only_upward_in_the_reading_order(package: str) -> None:
    """There is an order of the files in which each imports only from those before it: no cycle, however deferred."""
    modules = {module_of(path): path for path in FILES if path.parts[0] == package}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        seen = [(source, f"{source}.{name}") for _, source, name in imports(path)]
        graph[module] = {inner if inner in modules else outer for outer, inner in seen if outer in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")
