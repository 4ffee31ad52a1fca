"""What an ordinary user is told of ids."""

import os
import pwd

from graft.commands import user_namespace


def test_ids_that_nobody_has(tmp_path, monkeypatch):
    """To give two users the same ids would make their containers one another's."""
    files = {kind: tmp_path / f"sub{kind}" for kind in ("uid", "gid")}
    monkeypatch.setattr(user_namespace, "SUBORDINATE", {kind: str(path) for kind, path in files.items()})
    name = pwd.getpwuid(os.getuid()).pw_name
    for uids, gids, first in (
        ("", "", 100000),
        ("a:100000:65536\n", "a:100000:65536\n", 165536),
        ("b:165536:65536\na:100000:65536\n", "", 231072),
        ("a:100000:65536\n", "c:165600:10\n", 165610),
        ("a:1000:10\nb:200000:65536\n", "", 100000),
    ):
        files["uid"].write_text(uids)
        files["gid"].write_text(gids)
        span = f"{first}-{first + 65535}"
        assert user_namespace.how_to_delegate() == f"usermod --add-subuids {span} --add-subgids {span} {name}"
