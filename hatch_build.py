"""Compile the C parts by make when a wheel is built, and say what the wheel is for (hatchling's build hook)."""

import subprocess
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileHook(BuildHookInterface[Any]):
    """Compiles the BPF objects, the C programs and the preload library, if make finds them out of date.

    They are no modules of Python's, so the wheel is for any Python of this platform.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        subprocess.run(("make", "-s", "-C", self.root, "compiled"), check=True)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
