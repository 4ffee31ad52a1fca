"""python -m graft."""

import sys

from graft.cli import main

sys.exit(main())
