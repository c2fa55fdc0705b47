"""Imports point one way, `kernels/` stands alone, and every file says what it is."""

import ast
import importlib.util
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "retro_engine"
# A module may import from its own row and from the rows above it.
ORDER = [
    ["errors", "jit", "threads", "version"],
    ["config", "progress"],
    ["data"],
    ["retrieval"],
    ["library"],
    ["model"],
    ["memory"],
    ["evaluate"],
    ["train"],
    ["generate"],
    ["interop"],
    ["readers"],
    ["serve"],
    ["api"],
    ["__init__"],
    ["report"],
    ["demo", "bench"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Every module that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("retro_kernels", *parts[1:]) if parts[0] == "kernels" else parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The top-level room of a module of this package; __init__ for names of the package itself."""
    name = module.split(".")[1]
    return name if name in LEVEL else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert here in LEVEL, f"{here} has no place in ORDER"
    for module in imports(path):
        if module.startswith("retro_engine."):
            assert LEVEL[room(module)] <= LEVEL[here], f"{path.name} imports {module}: a later room"
        if module.startswith("retro_kernels") and path.name != "describe.py" and here not in ("cli", "bench"):
            assert path == PACKAGE / "model" / "ops.py", f"{path}: only model/ops.py imports the kernels"


def test_modules_import_in_no_circle() -> None:
    """Kernels, too. `from package import name` is an import of the module `package.name`, or else of `package`."""
    paths = [*FILES, *(ROOT / "kernels").glob("*.py")]
    modules = {module_of(path): path for path in paths}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = (next((m for m in (name, name.rpartition(".")[0]) if m in modules), None) for name in imports(path))
        graph[module] = {name for name in found if name is not None}
    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_only_the_chooser_is_imported_outside_ops() -> None:
    for path in (PACKAGE / "train" / "describe.py", PACKAGE / "cli" / "doctor.py"):
        kernels = [module for module in imports(path) if module.startswith("retro_kernels")]
        assert kernels == ["retro_kernels.backend.backend"], kernels


def test_kernels_stand_alone() -> None:
    """No `__init__.py` (it would shadow the PyPI package `kernels`), and nothing of retro_engine inside."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").rglob("*.py"):
        roots = {module.partition(".")[0] for module in imports(path)}
        assert roots <= {"retro_kernels", "torch", "triton", "numpy", "flash_attn", *sys.stdlib_module_names}, path


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "kernels").glob("*.py")), ROOT / "setup.py"], ids=str)
def test_every_file_opens_with_its_purpose(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no header docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    text = path.read_text()
    for banned in ("import pickle\n", "import joblib", "allow_pickle=True", "yaml.load(", " eval("):
        assert banned not in text, f"{path}: {banned}"
    loads = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert not loads or path == PACKAGE / "interop" / "archives.py", f"{path}: torch.load"
    for node in loads:  # scanned before, and limited to tensors
        limits = [ast.unparse(word.value) for word in node.keywords if word.arg == "weights_only"]
        assert limits == ["True"], ast.unparse(node)


def test_a_module_mirrors_each_test_file() -> None:
    for test in (ROOT / "tests").rglob("test_*.py"):
        folder = test.parent.relative_to(ROOT / "tests")
        if folder.parts and folder.parts[0] not in ("gates", "gpu", "reliability"):
            name = test.name.removeprefix("test_")
            base = ROOT / "kernels" if folder.parts[0] == "kernels" else PACKAGE / folder
            is_mirror = (base / name).exists() or (base / name.removesuffix(".py")).is_dir()
            assert is_mirror, f"{test} mirrors no module"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_what_there_is(path: Path) -> None:
    """They do not run with the tests: a name that has moved would be found by nobody."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("retro_engine", "retro_kernels")):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                is_module = (
                    importlib.util.find_spec(f"{node.module}.{alias.name}") is not None
                    if hasattr(module, "__path__")
                    else False
                )
                assert is_module or hasattr(module, alias.name), f"{path.name}: {node.module} has no {alias.name}"
