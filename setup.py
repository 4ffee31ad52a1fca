"""The one thing that pyproject.toml cannot say: the BPF object is compiled when a wheel is built."""

import subprocess
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HERE = Path(__file__).parent


class BuildWithBpf(build_py):
    """Compile csrc/graft.bpf.c with clang, unless make has just done so."""

    def run(self) -> None:
        target = HERE / "graft" / "graft.bpf.o"
        sources = [*HERE.glob("csrc/*.c"), *HERE.glob("csrc/*.h")]
        if not target.exists() or any(s.stat().st_mtime > target.stat().st_mtime for s in sources):
            include = f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}"
            flags = ("-O2", "-g", "-target", "bpf", "-Wall", "-Wextra", "-Werror", "-I", include)
            source = HERE / "csrc" / "graft.bpf.c"
            subprocess.run(("clang", *flags, "-c", source, "-o", target), check=True)
        super().run()


class LinuxOnly(Distribution):
    """A wheel that carries a compiled object is not for every platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithBpf}, distclass=LinuxOnly)
