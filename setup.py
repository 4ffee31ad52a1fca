"""Compile the C parts by make when a wheel is built, which pyproject.toml cannot express."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HERE = Path(__file__).parent


class BuildWithC(build_py):
    """Compile the BPF object, the C programs and the preload library, if make finds them out of date."""

    def run(self) -> None:
        subprocess.run(("make", "-s", "-C", HERE, "compiled"), check=True)
        super().run()


class LinuxOnly(Distribution):
    """Mark the wheel as platform-specific, because it contains compiled objects."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithC}, distclass=LinuxOnly)
