"""graft install."""

from graft.commands.engine import make

command = make(install=True)
