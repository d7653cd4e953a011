"""Builds fusetune._C with CMake. Everything else is in pyproject.toml.

Environment:
    FUSETUNE_CUDA         auto (default: where nvcc is found), 0 or 1
    FUSETUNE_CUDA_ARCHS   CMake architectures, e.g. "80-real;90a-real"
    FUSETUNE_TEST_LEVELS  1 also builds the ISA level `emulated`, which the tests use
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        options = [f"-D{name}={os.environ[name]}" for name in os.environ if name.startswith("FUSETUNE_CUDA")]
        options.append(f"-DFUSETUNE_TEST_LEVELS={os.environ.get('FUSETUNE_TEST_LEVELS', '0')}")
        subprocess.check_call(
            [
                *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                *options,
            ]
        )
        subprocess.check_call(["cmake", "--build", str(build)])


setup(ext_modules=[Extension("fusetune._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
