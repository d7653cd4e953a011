"""The rules of the source tree: who may import whom, where an op lies, and what no file contains."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

# The parts of fusetune, lowest first. A part imports from the rows below its own, and from itself.
LAYERS = (
    ("_C", "kernels"),
    ("_native", "_check", "_register", "_tune"),
    ("backend",),
    ("ops",),
    ("nn", "optim"),
    ("models",),
    ("patching",),
    ("train",),
    ("finetune", "info"),
    ("__init__", "__main__"),
)
RANK = {part: rank for rank, row in enumerate(LAYERS) for part in row}

# The words that name ops are those of the contracts; these headers and files are shared by several.
SHARED = {"bindings_tensors", "dtype", "philox", "dispatch", "device", "__init__"}
OPS = {path.stem for path in (ROOT / "csrc").glob("*.h")} - SHARED

PYTHON = sorted(path for folder in ("pyfront", "kernels") for path in (ROOT / folder).rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
SOURCES = [*PYTHON, *NATIVE, *(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]


def name_of(path):
    return str(path.relative_to(ROOT))


def part_of(path):
    """`pyfront/ops/lora.py` and `fusetune.ops.lora` are of the part `ops`."""
    first, *rest = path.relative_to(ROOT).parts
    return "kernels" if first == "kernels" else Path(rest[0]).stem


def imports(tree):
    """All imports of a file, within functions too: [(module, name or None)]."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def imports_at_once(tree):
    """The modules that importing a file imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        yield from imports_at_once(node)


def parts_imported(path):
    for module, name in imports(ast.parse(path.read_text())):
        package, *rest = module.split(".")
        if package == "fusetune":
            inner = rest[0] if rest else name  # `from fusetune import _native`; None for `import fusetune`
            if inner is not None and not inner.startswith("__version"):
                yield inner


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_layers(path):
    part = part_of(path)
    assert part in RANK, f"give {part} a row in LAYERS"
    for other in parts_imported(path):
        assert other in RANK, f"import from the module that defines it, not from the package: {other}"
        assert other == part or RANK[other] < RANK[part], f"{part} must not import {other}"


def test_one_importer_of_the_extension():
    assert {part_of(path) for path in PYTHON if "_C" in parts_imported(path)} == {"_native"}


def test_only_ops_import_the_kernels():
    assert {part_of(path) for path in PYTHON if "kernels" in parts_imported(path)} <= {"ops", "kernels"}


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_libraries(path):
    at_once = {module.split(".")[0] for module in imports_at_once(ast.parse(path.read_text()))}
    part = part_of(path)
    if part != "kernels":
        assert "triton" not in at_once
    if part not in ("nn", "models", "train"):
        assert not at_once & {"transformers", "peft", "accelerate", "datasets", "tokenizers"}
    if part in ("__init__", "__main__", "info", "kernels"):
        assert part == "kernels" or "torch" not in at_once


def test_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", NATIVE, ids=name_of)
def test_native_code_knows_neither_torch_nor_python(path):
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    assert not [header for header in included if re.match(r"(torch|ATen|c10|caffe2)/", header)]
    if not path.name.startswith("bindings"):
        assert not [header for header in included if header.startswith("pybind11/") or header == "Python.h"]
    if path.parent.name == "cpu":
        assert not [header for header in included if "cuda" in header]


def test_one_word_names_an_op():
    folders = {
        "csrc/cpu/*.cpp": OPS,
        "csrc/cuda/*.cu": OPS,
        "kernels/*.py": OPS,
        "pyfront/ops/*.py": OPS,
        "pyfront/nn/*.py": OPS,
        "pyfront/optim/*.py": OPS | {"_state", "_distributed"},
        "benchmarks/bench_*.py": OPS | {"finetune"},
    }
    for pattern, words in folders.items():
        for path in ROOT.glob(pattern):
            part = r"_(cuda|gpu|backends|table|bnb|t5|tile|bias|torch|sm\d+a?)$"
            word = re.sub(rf"^bench_|^_(?=\w+_(cuda|gpu|backends|table|sm\d+a?)$)|{part}", "", path.stem)
            assert word in words | SHARED, f"{name_of(path)}: an op's files have the name of its contract csrc/<op>.h"


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_is_whole(op):
    files = ("csrc/cpu/{}.cpp", "kernels/{}.py", "pyfront/ops/{}.py", "tests/test_{}.py", "benchmarks/bench_{}.py")
    missing = [file.format(op) for file in files if not (ROOT / file.format(op)).exists()]
    assert not missing
    assert re.search(rf"\bcsrc/{op}\.h\b", (ROOT / "pyfront" / "ops" / f"{op}.py").read_text())


def test_subpackages_are_installed():
    project = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(fusetune[.\w]*)",$', project, re.MULTILINE))
    found = {"fusetune", "fusetune.kernels"}
    found |= {f"fusetune.{path.parent.name}" for path in (ROOT / "pyfront").glob("*/__init__.py")}
    assert listed == found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 600


def test_no_path_of_a_machine():
    text = (".py", ".pyi", ".cpp", ".h", ".cu", ".sh", ".md", ".toml", ".txt", ".yaml", ".json", ".in", "")
    folders = ("csrc", "kernels", "pyfront", "tests", "benchmarks", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if not path.name.startswith(".git") or path.name == ".gitignore"]
    for path in files:
        if path.is_file() and path.suffix in text and "__pycache__" not in path.parts:
            found = re.search(r"(?<![\w.~$}])/(?:work|root|home|Users|tmp|mnt|opt)/\w+", path.read_text())
            assert not found, f"{name_of(path)}: {found[0]}"


def test_constraints_fit_the_stated_ranges():
    """Every direct requirement of pyproject.toml is pinned, within its range."""
    pins = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:requires|dependencies|train|triton|dev) = (\[.*?\])$", project, re.MULTILINE | re.DOTALL)
    requirements = [Requirement(text) for entry in lists for text in ast.literal_eval(entry)]
    assert {"torch", "transformers", "triton", "cmake"} <= {requirement.name for requirement in requirements}
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_tables_are_those_of_the_results():
    """README and benchmarks/results/*.md, as `python benchmarks/results.py write` makes them."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "results.py", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
