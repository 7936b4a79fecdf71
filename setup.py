"""Builds csrc/ into moe_engine._C, the C++ kernels for CPU; everything else about the package is in pyproject.toml.

The extension is optional: without a C++ compiler, or without torch in the build environment (pip's isolated builds),
the package installs without it, says so in one line, and its ops run their plain torch definition. One build serves
every processor of its architecture: csrc/simd.h and csrc/machine.h choose instruction sets at run time.

    pip install --no-build-isolation -e .       python setup.py build_ext --inplace
"""

import sys
from pathlib import Path

from setuptools import setup

FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden"]
FLAGS += ["-Wno-psabi"]  # wide vectors are passed to inlined functions only: there is no ABI to warn of


def skip(reason: str) -> None:
    print(f"moe_engine: built without the C++ kernels ({reason}); the slower torch kernels are used", file=sys.stderr)


def extension() -> dict:
    """The setup() arguments that build the extension; none if torch cannot be imported here."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        skip(f"torch is not importable: {error}")
        return {}

    class OptionalBuild(BuildExtension):
        """A build that fails without failing the installation."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # no compiler, an old one, no headers: the package works without
                skip(" ".join(str(error).split()) or type(error).__name__)
                self.extensions = []

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

    sources = sorted(path.as_posix() for path in Path("csrc").glob("*.cpp"))
    headers = sorted(path.as_posix() for path in Path("csrc").glob("*.h"))
    library = CppExtension(
        "moe_engine._C", sources, extra_compile_args=FLAGS, extra_link_args=["-fopenmp"], depends=headers
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension())
