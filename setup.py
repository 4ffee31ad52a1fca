"""The one thing that pyproject.toml cannot say: what is in C is compiled when a wheel is built, by make."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HERE = Path(__file__).parent


class BuildWithC(build_py):
    """Compile the BPF object, graft-sup and the preload library, unless make has just done so."""

    def run(self) -> None:
        subprocess.run(("make", "-s", "-C", HERE, "compiled"), check=True)
        super().run()


class LinuxOnly(Distribution):
    """A wheel that carries compiled objects is not for every platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithC}, distclass=LinuxOnly)
