"""`graft install`; see graft/commands/engine.py."""

from graft.commands.engine import make

command = make(install=True)
