"""What the library rests on: three packages, no pickle, and no network."""

import ast
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RUNTIME = {"jax", "numpy", "optax"}
# What the library imports besides, in a function or for type checkers only; but for
# the one module that is a user's to import.
OPTIONAL = {"flax", "matplotlib", "rich", "safetensors", "scipy"}
FLAX = ROOT / "granet_jax" / "tost" / "linen.py"
LIBRARY = sorted((ROOT / "granet_jax").rglob("*.py"))
SOURCES = [*LIBRARY, *sorted((ROOT / "experiments").rglob("*.py"))]
# Modules that run what they read, and functions that do.
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
LOADS = {"eval", "exec", "compile"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Packages that this code imports, however deep in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and called(node) in (
            "import_module",
            "__import__",
            "_import",
        ):
            # By a name that can be read here, or else one handed on by `_import`.
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value).partition(".")[0]
            else:
                assert isinstance(node.args[0], ast.Name)


def called(node: ast.Call) -> str:
    function = node.func
    return getattr(function, "attr", getattr(function, "id", ""))


def at_import(tree: ast.Module) -> ast.Module:
    """What runs at import: no functions, and nothing for type checkers alone."""

    class Shallow(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            """Left out."""

        def visit_If(self, node: ast.If) -> ast.AST | None:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return None
            return self.generic_visit(node)

    return Shallow().visit(tree)


def required() -> dict[str, set[str]]:
    """Packages by the extra that needs them; "" for those always needed."""
    found: dict[str, set[str]] = {}
    for line in importlib.metadata.requires("granet_jax") or ():
        name = re.split(r"[^\w-]", line)[0].lower().replace("_", "-")
        extra = re.search(r"""extra == ["']([\w-]+)["']""", line)
        found.setdefault(extra[1] if extra else "", set()).add(name)
    return found


def test_three_packages_are_all_that_is_needed() -> None:
    setup = (ROOT / "setup.cfg").read_text()
    declared = re.search(r"^install_requires =\n((?: +.*\n)+)", setup, re.MULTILINE)
    assert declared is not None
    names = {re.split(r"[^\w-]", line.strip())[0] for line in declared[1].splitlines()}
    assert names == RUNTIME
    try:
        metadata = required()
    except importlib.metadata.PackageNotFoundError:
        return  # Run from a clone without an installation: the declaration counts.
    assert metadata[""] == RUNTIME


@pytest.mark.parametrize(
    "path", LIBRARY, ids=[str(p.relative_to(ROOT)) for p in LIBRARY]
)
def test_the_library_imports_these_alone(path: pathlib.Path) -> None:
    known = {*RUNTIME, *sys.stdlib_module_names, "granet_jax"}
    tree = ast.parse(path.read_text())
    everything = set(imported(tree))
    assert everything <= known | OPTIONAL
    needed = set(imported(at_import(ast.parse(path.read_text()))))
    assert needed <= known | ({"flax"} if path == FLAX else set())
    # Nothing that talks to a network, or starts another program.
    assert not everything & {"socket", "http", "urllib", "ftplib", "subprocess", "ssl"}


@pytest.mark.parametrize("folder", ["granet_jax", "experiments"])
def test_nothing_is_read_that_could_run(folder: str) -> None:
    for path in SOURCES:
        if folder not in path.parts:
            continue
        tree = ast.parse(path.read_text())
        assert not set(imported(tree)) & UNSAFE, path
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name):
                assert node.func.id not in LOADS, (path, node.lineno)
            # NumPy's own files may hold pickles; it refuses them unless told.
            pickles = [k for k in node.keywords if k.arg == "allow_pickle"]
            for keyword in pickles:
                assert ast.literal_eval(keyword.value) is False, (path, node.lineno)
            if called(node) == "load" and ast.unparse(node.func).startswith("np."):
                assert pickles, (path, node.lineno)


OFFLINE = """
import runpy, socket, sys

def refused(*args, **kwargs):
    raise AssertionError(f"a connection: {args[1:]}")

for name in ("connect", "connect_ex", "sendto", "bind", "listen"):
    setattr(socket.socket, name, refused)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refused)
try:
    socket.create_connection(("localhost", 1))
except AssertionError as error:
    print(error)
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


def test_a_first_training_needs_no_network(tmp_path: pathlib.Path) -> None:
    """All that is imported, the bundled data, checkpoints, the report."""
    command = [sys.executable, "-c", OFFLINE, "--model", "lenet-300-100"]
    command += ["--steps", "4", "--masks.interval", "1", "--seeds", "1"]
    command += ["--no-baseline", "--no-progress", "--out", str(tmp_path / "out")]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    # The refusal itself works.
    assert process.stdout.startswith("a connection: ")
    assert (tmp_path / "out" / "summary.json").exists()
