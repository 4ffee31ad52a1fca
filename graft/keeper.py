"""The name by which graftd and the guard of graft 0.1.0 become a keeper after an upgrade of their tree."""

from graft.process.keeper import main

__all__ = ["main"]
