"""The house rules that a machine can check: file sizes, what is never called, what the tracked files may say."""

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from dvc.repo import Repo
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from diffusion_core.spec import build, flatten
from pipelines import stage as stages

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for name in ("diffusion_core", "pipelines", "services") for path in sorted((ROOT / name).rglob("*.py"))]
LONGEST = 300
STAGES = {
    *("prepare", "validate", "train_vae", "cache_latents", "train_judge", "train", "register", "deploy"),
    *("distill@progressive", "distill@consistency"),
    *("evaluate@teacher", "evaluate@progressive", "evaluate@consistency"),
}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "os.system", "os.popen", "torch.load", "torch.hub.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
}
FORBIDDEN_KEYWORDS = {"shell", "allow_pickle"}  # set to anything but False
FLAG_PARSERS = {"argparse", "optparse", "getopt", "click", "typer"}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
AT_TOP_LEVEL = (ast.Import, ast.ImportFrom, *DEFINITIONS, ast.Assign, ast.AnnAssign)
PLACES = re.compile(r"(?<![\w.*~-])/(?:work|root|home)/|find[-]links|index[-]url|file:[/]{3,}")


class Ran(NamedTuple):
    """What a stage's module hands to `stage.run`."""

    section: str
    config: type
    out: str


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(path: Path) -> set[str]:
    """The first names of all modules a file imports."""
    nodes = list(ast.walk(tree(path)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.fixture(scope="module")
def dag() -> dict[str, Any]:
    """The stages of dvc.yaml as DVC itself reads them, by their full name."""
    with Repo(str(ROOT)) as repo:
        return {stage.addressing: stage for stage in repo.index.stages}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_is_short_and_says_what_it_is(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{relative(path)} has {lines} lines; {LONGEST} are allowed"
    assert ast.get_docstring(tree(path)), f"{relative(path)} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_runs_code_out_of_data(path: Path) -> None:
    assert not imported(path) & UNPICKLERS
    for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
        where = f"{relative(path)}:{call.lineno}"
        assert ast.unparse(call.func) not in FORBIDDEN_CALLS, f"{where}: {ast.unparse(call.func)}"
        for keyword in call.keywords:
            harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            assert keyword.arg not in FORBIDDEN_KEYWORDS or harmless, f"{where}: {keyword.arg}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_module_only_defines(path: Path) -> None:
    """No work at import and no global that is filled later."""
    for node in tree(path).body:
        where = f"{relative(path)}:{node.lineno}"
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in {"__name__ == '__main__'", "TYPE_CHECKING"}, f"{where}: work at import"
            continue
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, AT_TOP_LEVEL), f"{where}: work at import"
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            assert ast.unparse(node.value) not in {"[]", "{}", "set()", "dict()", "list()"}, f"{where}: mutable global"
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree(path))), f"{relative(path)}: global"


def test_the_core_imports_without_a_cluster_or_a_tracker() -> None:
    core = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if "diffusion_core" in path.parts]
    heavy = ("ray", "mlflow", "pyarrow", "great_expectations", "webdataset", "pipelines", "services", "dvc")
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, *core], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    assert not set(heavy) & set(ran.stdout.split())


def test_stages_have_no_flags(dag: dict[str, Any]) -> None:
    for path in {ROOT / f"{stage.cmd.split()[2].replace('.', '/')}.py" for stage in dag.values()}:
        assert not imported(path) & FLAG_PARSERS, relative(path)
        assert "sys.argv" not in path.read_text(), f"{relative(path)}: settings are read from params.yaml"


def test_dvc_knows_every_stage(dag: dict[str, Any]) -> None:
    assert set(dag) == STAGES


def test_params_are_what_the_stages_read(dag: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage's section builds its Config, DVC watches that section, and no parameter is read by nobody."""
    monkeypatch.chdir(ROOT)
    read = set()
    for name, stage in dag.items():
        ran = handed_over(stage.cmd, monkeypatch)
        build(ran.config, stages.section(ran.section), f"params.yaml: {ran.section}")
        watched = {param for dep in stage.deps for param in getattr(dep, "params", ())}
        assert any(ran.section == param or ran.section.startswith(f"{param}.") for param in watched), name
        assert ran.out in {str(out.fs_path).removeprefix(f"{ROOT}/") for out in stage.outs}, name
        read |= watched
    for leaf in flatten(yaml.safe_load(Path("params.yaml").read_text())):
        assert any(leaf == param or leaf.startswith(f"{param}.") for param in read), f"params.yaml: nobody reads {leaf}"


def handed_over(command: str, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Execute a stage's module as its command would, with `stage.run` replaced by a recorder."""
    python, dash, module, *words = command.split()
    assert (python.rpartition("/")[2], dash) == ("python", "-m"), command
    recorded: list[Ran] = []
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.setattr(stages, "run", lambda name, config, main, *, out, kind: recorded.append(Ran(name, config, out)))
    known = dict(sys.modules)
    sys.modules.pop(module, None)
    try:
        runpy.run_module(module, run_name="__main__")
    finally:
        sys.modules.update(known)
    (ran,) = recorded
    return ran


def tracked() -> Iterator[Path]:
    """Every text file that git tracks or would track."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    yield from (ROOT / name for name in names if name and (ROOT / name).is_file())


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    found = []
    for path in tracked():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{relative(path)}:{number}: {line[:80]}" for number, line in enumerate(lines, 1) if PLACES.search(line)
        ]
    assert not found, "\n".join(found)


def test_the_lock_holds_every_dependency_with_its_hashes_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|^\s*-[^-]|^--", lock, re.MULTILINE)
    digest = r" +--hash=sha256:[0-9a-f]{64}"
    entry = rf"^([A-Za-z0-9][^ \n]*)(?: ;[^\\\n]*)? \\\n(?:{digest} \\\n)*{digest}$"
    pins = [pin.partition("==") for pin in re.findall(entry, lock, re.MULTILINE)]
    assert len(pins) == len(re.findall(r"^[A-Za-z0-9]", lock, re.MULTILINE)), "an entry without hashes"
    versions = {canonicalize_name(name): version for name, _, version in pins}
    assert not [name for name in versions if name.startswith(("torch", "nvidia", "cuda", "triton"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"] + project["optional-dependencies"]["test"]):
        if wanted.name != "torch":
            assert versions[canonicalize_name(wanted.name)] in wanted.specifier, f"the lock does not hold {wanted}"
