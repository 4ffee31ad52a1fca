"""The sub-commands of `graft`: one module each, with a click command named `command`."""
