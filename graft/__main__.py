"""The command `graft`, as `python3 -m graft`."""

import sys

from graft.cli import main

sys.exit(main())
