"""Socket grafting: containers whose sockets live on the host's network stack."""

__version__ = "0.1.0"
