"""The command `graft`, as `python3 -m graft`."""

import sys

from graft.commands.main import main

sys.exit(main())
