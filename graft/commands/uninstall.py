"""graft uninstall."""

from graft.commands.engine import make

command = make(install=False)
