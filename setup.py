"""Builds fusetune._C with CMake. Everything else is in pyproject.toml.

Environment:
    FUSETUNE_CUDA         auto (default: where nvcc is found), 0 or 1
    FUSETUNE_CUDA_ARCHS   CMake architectures, e.g. "80-real;90a-real" (default: those of CMakeLists.txt)
    FUSETUNE_CUDA_VERBOSE 1 prints the registers and spills of each CUDA kernel
    FUSETUNE_TEST_LEVELS  1 also builds the ISA level `emulated`, which the tests use
"""

import os
import shutil
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
        # One folder for editable installs and wheels, so that only what has changed is compiled again.
        build = ROOT / "build" / f"cmake-{self.plat_name}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # The folder outlives this build's environment and its ninja: each option is set or unset anew.
        options = [
            f"-D{name}={os.environ[name]}" if os.environ.get(name) else f"-U{name}"
            for name in ("FUSETUNE_CUDA", "FUSETUNE_CUDA_ARCHS", "FUSETUNE_CUDA_VERBOSE", "FUSETUNE_TEST_LEVELS")
        ]
        subprocess.check_call(
            [
                *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                *options,
            ]
        )
        subprocess.check_call(["cmake", "--build", str(build)])


setup(ext_modules=[Extension("fusetune._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
