"""What is installed: by a wheel in an environment without torch, and by the editable installation of this checkout."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fusetune
from fusetune import _native

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def python(code, *, executable=sys.executable, cwd, **environment):
    """Runs code in a fresh process, outside of the checkout unless cwd says otherwise; what it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FUSETUNE_", "PYTHON"))}
    done = subprocess.run(
        [executable, "-c", code], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel that FUSETUNE_WHEEL names, or one that is built here, without CUDA and without optimisation."""
    if path := os.environ.get("FUSETUNE_WHEEL"):
        return ROOT / path
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build", "*.egg-info")
    for name in ("csrc", "kernels", "pyfront"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    tools = str(Path(sys.executable).parent)
    environment = os.environ | {
        "FUSETUNE_CUDA": "0",
        "FUSETUNE_TEST_LEVELS": "0",
        "CMAKE_BUILD_TYPE": "None",
        "PATH": tools + os.pathsep + os.environ["PATH"],
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(source),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def bare(wheel, tmp_path_factory):
    """The Python of an environment in which nothing but the wheel is installed."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    executable = str(folder / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", executable, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    return executable


# The wheel.


def test_wheel_has_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    version = fusetune.__version__
    assert {name.split("/")[0] for name in names} == {"fusetune", f"fusetune-{version}.dist-info"}
    assert {"fusetune/py.typed", "fusetune/_C.pyi", f"fusetune-{version}.dist-info/licenses/LICENSE"} <= set(names)
    expected = {f"fusetune/{path.relative_to(ROOT / 'pyfront')}" for path in (ROOT / "pyfront").rglob("*.py")}
    expected |= {f"fusetune/kernels/{name}.py" for name in KERNELS}
    assert {name for name in names if name.endswith(".py")} == expected
    assert sum(name.endswith(".so") for name in names) == 1


def test_extension_needs_neither_torch_nor_cuda(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        path = archive.extract(name, tmp_path)
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert "libgomp.so.1" in needed
    system = {"libgomp.so.1", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    system |= {"libdl.so.2", "libpthread.so.0", "librt.so.1"}  # apart from libc in older systems
    assert {name for name in needed if not name.startswith("ld-linux")} <= system
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_wheel_has_every_isa_level(bare, tmp_path):
    built = json.loads(
        python("import json, fusetune._C as _C; print(json.dumps(_C.isa_built()))", executable=bare, cwd=tmp_path)
    )
    x86 = os.uname().machine == "x86_64"
    assert built == (["generic", "avx2", "avx512", "avx512_bf16"] if x86 else ["generic"])


def test_import_without_torch(bare, tmp_path):
    assert python("import fusetune; print(fusetune.__version__)", executable=bare, cwd=tmp_path) == fusetune.__version__


def test_info_without_torch(bare, tmp_path):
    command = str(Path(bare).with_name("fusetune"))
    text = subprocess.run([command, "info"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "problem: torch is not installed; `pip install 'torch>=2.9'`" in text
    assert text == subprocess.run([bare, "-m", "fusetune", "info"], cwd=tmp_path, capture_output=True, text=True).stdout
    report = json.loads(
        subprocess.run([command, "info", "--json"], cwd=tmp_path, capture_output=True, text=True).stdout
    )
    assert report["packages"]["torch"] is None


# The wheel and the editable installation.


def _find(name):
    """Code that prints where the import system finds a module."""
    return f"""
from importlib.util import find_spec
spec = find_spec({name!r})
print(spec and (spec.origin or list(spec.submodule_search_locations)))
"""


def test_wheel_exposes_no_kernels_at_the_top(bare, tmp_path):
    assert python(_find("kernels"), executable=bare, cwd=tmp_path) == "None"


def test_editable_exposes_no_kernels_at_the_top(tmp_path):
    assert Path(fusetune.__file__).parent == ROOT / "pyfront", "install this checkout: pip install -e ."
    assert str(ROOT) not in python(_find("kernels"), cwd=tmp_path)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_in_the_package(name, bare, tmp_path):
    inside = Path(python("import fusetune; print(fusetune.__path__[0])", executable=bare, cwd=tmp_path))
    found = python(_find(f"fusetune.kernels.{name}"), executable=bare, cwd=tmp_path)
    assert Path(found) == inside / "kernels" / f"{name}.py"
    assert Path(python(_find(f"fusetune.kernels.{name}"), cwd=tmp_path)) == ROOT / "kernels" / f"{name}.py"


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_import(name, tmp_path):
    assert importlib.util.find_spec("triton"), "the tests need triton: pip install -e '.[triton]'"
    assert python(f"import fusetune.kernels.{name} as k; print(k.__name__)", cwd=tmp_path) == f"fusetune.kernels.{name}"


# The public names.


def test_import_is_light(tmp_path):
    loaded = python("import sys, fusetune; print(*sys.modules)", cwd=tmp_path).split()
    assert not {"torch", "numpy", "transformers", "peft", "triton", "typing"} & set(loaded)


def test_optimizer_and_ops_import_no_model_library(tmp_path):
    loaded = python("import sys, fusetune; fusetune.AdamW, fusetune.ops; print(*sys.modules)", cwd=tmp_path).split()
    assert "torch" in loaded
    assert not {"transformers", "peft", "triton", "datasets"} & set(loaded)


# A submodule of a public name would replace it when it is imported: hence with and without all of them.
EVERYTHING = """
import importlib, pkgutil, fusetune
for module in pkgutil.walk_packages(fusetune.__path__, "fusetune."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("first", ["import fusetune", EVERYTHING], ids=["lazily", "after-all-modules"])
def test_public_names(first, tmp_path):
    code = f"{first}\nprint(*(type(getattr(fusetune, name)).__name__ for name in fusetune.__all__))"
    types = dict(zip(fusetune.__all__, python(code, cwd=tmp_path, HF_HUB_OFFLINE="1").split(), strict=True))
    functions, modules = ("apply_peft", "patch", "patched", "unpatch"), ("finetune", "ops")
    for name, kind in types.items():
        assert kind == ("function" if name in functions else "module" if name in modules else "type"), name
    assert set(fusetune.__all__) <= set(dir(fusetune))


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'fusetune' has no attribute 'path'"):
        fusetune.path  # noqa: B018


# The stub of the extension.


def _signature(function):
    """Argument names and types of a function definition; pybind11 has typing.SupportsInt where int is taken."""
    kinds = ("bool", "float", "int", "str", "flashattention", "list", "object")
    return [
        (argument.arg, next(kind for kind in kinds if kind in ast.unparse(argument.annotation).lower()))
        for argument in function.args.args
    ]


def test_stub_is_that_of_the_extension():
    extension = _native.extension()
    stub = ast.parse((ROOT / "pyfront" / "_C.pyi").read_text()).body
    functions = {node.name: _signature(node) for node in stub if isinstance(node, ast.FunctionDef)}
    classes = {node.name for node in stub if isinstance(node, ast.ClassDef)}
    constants = {node.target.id for node in stub if isinstance(node, ast.AnnAssign)}
    if not extension.with_cuda:
        functions = {name: value for name, value in functions.items() if not name.startswith("cuda_")}
    built = {}
    for name in dir(extension):
        if callable(member := getattr(extension, name)) and not name.startswith("__") and name not in classes:
            (definition,) = ast.parse(f"def {member.__doc__.splitlines()[0]}: ...").body
            built[name] = _signature(definition)
    assert functions == built
    assert constants == {name for name in dir(extension) if not name.startswith("__")} - set(built) - classes


# Hugging Face's `kernels`.


def _names_from_kernels():
    """What transformers imports from the package `kernels`, by module, found in its source."""
    spec = importlib.util.find_spec("transformers")
    names = {}
    for path in ("integrations/hub_kernels.py", "utils/kernel_config.py", "modeling_utils.py"):
        source = Path(spec.submodule_search_locations[0]) / path
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "kernels":
                names.setdefault(node.module, set()).update(alias.name for alias in node.names)
    assert "use_kernel_forward_from_hub" in names["kernels"]
    return names


def _install_stand_in(site):
    """A regular package `kernels` with metadata; its names are decorators that change nothing."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    names = _names_from_kernels()
    for module, members in names.items():
        folder = site.joinpath(*module.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"def {name}(*arguments, **options): return lambda thing: thing" for name in sorted(members)]
        (folder / "__init__.py").write_text("\n".join(lines) + "\n")
        for parent in folder.relative_to(site).parents:
            if parent != Path():
                (site / parent / "__init__.py").touch()
    metadata = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")


def test_transformers_finds_its_kernels_from_the_root_of_a_checkout(tmp_path):
    _install_stand_in(tmp_path)
    code = """
import sys
assert sys.path[0] == ""
from transformers.utils import is_kernels_available
assert is_kernels_available()
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
LlamaForCausalLM(LlamaConfig(**sizes))(torch.zeros(1, 2, dtype=torch.int64))
import fusetune.kernels, kernels
print(kernels.__file__, fusetune.kernels.__path__[0])
"""
    found = python(code, cwd=ROOT, PYTHONPATH=str(tmp_path), HF_HUB_OFFLINE="1").split()
    assert found == [str(tmp_path / "kernels" / "__init__.py"), str(ROOT / "kernels")]
