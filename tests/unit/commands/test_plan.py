"""What graftd plans for graft-front: by the grammar of `graft run`, and only what takes no other step."""

import json

import pytest

from graft.commands.plan import APART, HEAD, MODE_ACCEL, MODE_DIRECT, plan
from graft.errors import GraftError, Refused, UsageError
from graft.rules.request import Request
from graft.trap import filter


def planned(*words, default="", configured=False, traps=False):
    text = b"\0".join(word if isinstance(word, bytes) else word.encode() for word in words)
    whole = plan(text, default, configured, lambda _ingress, _egress: traps)
    skip, size, modes = HEAD.unpack_from(whole)
    program, message = whole[HEAD.size : HEAD.size + size], whole[HEAD.size + size :]
    assert message.endswith(b"\n")
    return int(skip), program, json.loads(message), modes


def made(*words, **options):
    """Without the modes."""
    return planned(*words, **options)[:3]


def test_a_plan():
    skip, program, message = made("--name", "web", "-p8080:80", "nginx", "-g", "daemon off;", "")
    assert (skip, program) == (3, filter.program())
    assert (message["op"], message["name"], message["argv"]) == ("run", "web", ["nginx", "-g", "daemon off;", ""])
    assert list(Request(*message["request"]).publish) == ["8080:80"]
    assert "joins" not in message


@pytest.mark.parametrize(
    ("words", "skip"),
    [(("true",), 0), (("--", "true"), 1), (("--egress=none", "true", "--help"), 1), (("--allow", "a.org:1", "--", "true", "--"), 3)],
)
def test_where_the_command_begins(words, skip):
    assert made(*words)[0] == skip


def test_words_that_are_no_text():
    _, _, message = made("true", b"\xff\xfe", "ü")
    assert message["argv"] == ["true", "\ufffd\ufffd", "ü"]


@pytest.mark.parametrize(
    "words",
    [
        ("--netns", "blue", "true"), ("-u", "nobody", "true"), ("--policy", "/etc/passwd", "true"),
        ("--ip", "10.9.0.1", "true"), ("--force-ip", "true"),
        ("--sysctl", "net.core.somaxconn=5", "true"), ("--learn", "true"),
        ("--help",), ("-h", "true"), ("--nonsense", "true"), ("--name",), ("--",),
    ],
)  # fmt: skip
def test_what_the_program_in_python_does(words, capsys):
    with pytest.raises(Refused):
        made(*words)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("traps", [False, True])
def test_rules_with_endpoints(traps):
    _, program, message = made("-i", "0.0.0.0:80=web", "-e", "0.0.0.0/0=out", "true", traps=traps)
    assert (program, message["swap"]) == (filter.program(swap=traps), traps)


@pytest.mark.parametrize("words", [("-p", "70000:80", "true"), ("--allow", ":", "true"), ("--name", "a", "")])
def test_what_is_wrong(words):
    with pytest.raises(GraftError):
        made(*words)


@pytest.mark.parametrize(("default", "configured", "direct"), [("on", False, True), ("off", True, False), ("", True, True), ("", False, False)])
def test_the_mode(default, configured, direct):
    """As the option, GRAFT_DIRECT and graft.toml have it, in that order; --accel is of the other mode."""
    mode = {"default": default, "configured": configured}
    assert planned("true", **mode)[1] == filter.program(direct=direct)
    assert Request(*planned("true", **mode)[2]["request"]).direct == ("on" if direct else None)
    assert planned("true", **mode)[3] == (MODE_DIRECT if direct else 0)
    assert planned("--direct", "true", **mode)[3] == MODE_DIRECT
    assert planned("--no-direct", "true", **mode)[3] == 0
    assert planned("--accel", "true", **mode)[3] == MODE_ACCEL
    assert planned("--accel", "true", **mode)[1] == filter.program()


@pytest.mark.parametrize("words", [("--direct", "--no-direct", "true"), ("--direct", "--accel", "true")])
def test_modes_that_exclude_each_other(words):
    with pytest.raises(UsageError):
        made(*words)


def test_a_mode_that_is_unknown():
    with pytest.raises(Refused):
        made("true", default="x")


def test_a_run_directory_that_json_writes_otherwise(monkeypatch):
    """csrc/front.c reads no escapes in graftd's answer."""
    monkeypatch.setenv("GRAFT_RUN_DIR", "/run/gräft")
    assert made("true")
    with pytest.raises(Refused):
        made("--direct", "true")


def test_every_option_is_known():
    """An option that comes new is looked at here: does it take a step in the caller's process?"""
    from graft.commands.run import command

    known = {"name", "publish", "ingress", "egress", "egress_default", "limits", "resolver", "interface", "allow", "names", "no_direct", "direct", "accel", "command"}
    assert {parameter.name for parameter in command.params} == known | set(APART)
