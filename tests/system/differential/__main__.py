"""Compare the sequences of some seeds; print how often each rule held, and what no rule explains, shrunk.

usage: python3 -m tests.system.differential FIRST COUNT
"""

import sys
import time
from collections import Counter

from tests.system.differential.compare import world
from tests.system.differential.rules import rule_of


def main() -> None:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    held: Counter[str] = Counter()
    with world() as one:
        began = time.monotonic()
        for found in one.look(range(first, first + count), rule_of):
            name = rule_of(found)
            held[name] += 1
            if not name:
                sys.stdout.write(f"{one.shrink(found, lambda f: not rule_of(f))}\n")
                sys.stdout.flush()
        told = ", ".join(f"{name or 'unexplained'} {times}" for name, times in held.most_common())
        sys.stderr.write(f"{count} sequences in {time.monotonic() - began:.1f} s: {told or 'no difference'}\n")


if __name__ == "__main__":
    main()
