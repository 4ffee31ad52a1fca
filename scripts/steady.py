"""Run pytest with the given arguments, and what fails once more by itself.

The tests keep a machine busy, and on a busy machine a test may ask before what it asks for is there. So one or two
that fail are run again with nothing beside them. Those that pass then are named as unsteady, with what they said the
first time above: they are to be mended. No second time is given to what is about the fence or the kernel, where a
thing that goes wrong once is wrong, nor if more fail.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

UNSTEADY_MAX = 2
ONCE = ("tests/attack/", "tests/kernel/", "tests/unit/", "attacks.py", "peers.py")
FAILED = 1  # pytest's status: all tests were run, and some failed


def has_one_chance(test: str) -> bool:
    """Is the test with this node id about the fence, the kernel, or without any other process?"""
    path = test.partition("::")[0]
    return path.startswith(ONCE) or path.endswith(ONCE)


def _pytest(arguments: list[str], cache: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={cache}", *arguments]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Returns pytest's status, 0 if all that failed passes by itself."""
    with tempfile.TemporaryDirectory() as cache:
        status = _pytest(sys.argv[1:], cache)
        noted = Path(cache, "v/cache/lastfailed")
        if status != FAILED or not noted.exists():
            return status
        failed = sorted(json.loads(noted.read_text()))
        if len(failed) > UNSTEADY_MAX or any(map(has_one_chance, failed)):
            return status
        print(f"steady: again, by itself: {', '.join(failed)}", flush=True)
        again = _pytest(failed, cache)
    if not again:
        for test in failed:
            print(f"UNSTEADY: {test} failed beside others and passes by itself; what it said is above, mend it")
    return again


if __name__ == "__main__":
    sys.exit(main())
