"""What the library depends on: three packages, no pickle, and no network."""

import ast
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
REQUIRED = {"jax", "numpy", "optax"}
# The library imports these only inside functions or for type checkers.
OPTIONAL = {"flax", "matplotlib", "rich", "safetensors", "scipy"}
# Flax users import this module themselves.
FLAX_MODULE = ROOT / "granet_jax" / "tost" / "linen.py"
# Modules and functions that can run code from the files they read.
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNSAFE_FUNCTIONS = {"eval", "exec", "compile"}
# Functions that import a module by name.
IMPORTERS = {"import_module", "__import__", "_import"}
# Modules that reach a network or start programs.
OUTSIDE = {"socket", "http", "urllib", "ftplib", "subprocess", "ssl"}


def sources(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields the packages that the code imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and called(node) in IMPORTERS:
            # A name that is not a constant is an argument of a function called above.
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value).partition(".")[0]
            else:
                assert isinstance(node.args[0], ast.Name)


def called(node: ast.Call) -> str:
    function = node.func
    return getattr(function, "attr", getattr(function, "id", ""))


def at_import(tree: ast.Module) -> ast.Module:
    """Leaves out the bodies of functions, and imports for type checkers."""

    class Shallow(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            """Remove the function."""

        def visit_If(self, node: ast.If) -> ast.AST | None:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return None
            return self.generic_visit(node)

    return Shallow().visit(tree)


def test_three_packages_are_required() -> None:
    setup = (ROOT / "setup.cfg").read_text()
    declared = re.search(r"^install_requires =\n((?: +.*\n)+)", setup, re.MULTILINE)
    assert declared is not None
    lines = declared[1].splitlines()
    assert {re.split(r"[^\w-]", line.strip())[0] for line in lines} == REQUIRED
    try:
        metadata = importlib.metadata.requires("granet_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return  # This clone is not installed, so it has only the declaration.
    always = [line for line in metadata if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in always} == REQUIRED


def test_the_library_imports_nothing_else() -> None:
    known = {*REQUIRED, *sys.stdlib_module_names, "granet_jax"}
    for path in sources("granet_jax"):
        tree = ast.parse(path.read_text())
        everything = set(imported(tree))
        assert everything <= known | OPTIONAL, path
        assert not everything & OUTSIDE, path
        flax = {"flax"} if path == FLAX_MODULE else set()
        assert set(imported(at_import(tree))) <= known | flax, path


def test_reading_a_file_runs_no_code() -> None:
    for path in sources("granet_jax") + sources("experiments"):
        tree = ast.parse(path.read_text())
        assert not set(imported(tree)) & UNSAFE, path
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name):
                assert node.func.id not in UNSAFE_FUNCTIONS, (path, node.lineno)
            # NumPy's files may contain pickles, which `allow_pickle=False` refuses.
            flags = [k for k in node.keywords if k.arg == "allow_pickle"]
            for flag in flags:
                assert ast.literal_eval(flag.value) is False, (path, node.lineno)
            if called(node) == "load" and ast.unparse(node.func).startswith("np."):
                assert flags, (path, node.lineno)


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
    """Imports, the bundled data, checkpoints and the report work without a network."""
    command = [sys.executable, "-c", OFFLINE, "--model", "lenet-300-100"]
    command += ["--steps", "4", "--masks.interval", "1", "--seeds", "1"]
    command += ["--no-baseline", "--no-progress", "--out", str(tmp_path / "out")]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "True"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    # The replaced functions do refuse connections.
    assert process.stdout.startswith("a connection: ")
    assert (tmp_path / "out" / "summary.json").exists()
