"""graftd: its sockets, its services and its loop."""


def main() -> None:
    """Become graftd. A keeper of graft 0.1.0 starts the tree that it finds in its own one's place by this name."""
    from graft.daemon.main import main as run

    run()
