"""Builds the native library when the package is installed, where there is a compiler for it; all else stands in pyproject.toml.

Without a compiler the package installs as well, and the torch backend serves: start-up, /version and `moa-serve check` say so.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NAME = "moa_serve.native._moa_native"


def _compile_module() -> ModuleType:
    """moa_serve/native/compile.py, which imports nothing that is not installed yet."""
    spec = importlib.util.spec_from_file_location("moa_native_compile", Path(__file__).parent / "moa_serve/native/compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_ext):  # type: ignore[misc]  # setuptools has no types
    """A plain shared library loaded by ctypes, not a module of Python: its name carries no version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiling = _compile_module()
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            compiling.compile_library(output)
        except compiling.CannotCompile as error:
            raise CompileError(str(error)) from error  # the extension is optional: this is a warning


class AnyPython3Wheel(bdist_wheel):  # type: ignore[misc]
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(NAME, sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython3Wheel},
)
