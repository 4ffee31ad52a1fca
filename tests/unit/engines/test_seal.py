"""Metadata that graftd wrote is known again; anything else is not."""

import json

import pytest

from graft.engines.seal import is_sealed, seal
from graft.process.key import KEY_FILE
from graft.protocol import Metadata, decode_metadata
from graft.rules.request import Request


def test_there_and_back(tmp_path):
    text = seal(Metadata(name="web", request=Request(publish=("8080:80",)), container="c1"), tmp_path)
    assert is_sealed(text, tmp_path)
    assert decode_metadata(text).request.publish == ("8080:80",)
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert is_sealed(json.dumps(json.loads(text), indent=4), tmp_path)  # it is the content that counts


@pytest.mark.parametrize(
    "change",
    [
        {"publish": ["22:80"]},
        {"name": "other"},
        {"container": "c2"},
        {"egress_default": "host"},
        {"seal": ""},
        {"seal": "0" * 64},
        {"seal": "\N{GREEK SMALL LETTER ALPHA}"},
    ],
)
def test_a_change_is_seen(tmp_path, change):
    text = seal(Metadata(name="web", request=Request(publish=("8080:80",)), container="c1"), tmp_path)
    assert not is_sealed(json.dumps(json.loads(text) | change), tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "nonsense", "[]", '{"seal": 5}'])
def test_anything_else_is_not_sealed(tmp_path, text):
    assert not is_sealed(text, tmp_path)


def test_another_hosts_key(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    text = seal(Metadata(name="web"), tmp_path / "a")
    seal(Metadata(), tmp_path / "b")
    assert not is_sealed(text, tmp_path / "b")


def test_the_user_is_under_the_seal(tmp_path):
    text = seal(Metadata(name="web", container="c1@1000", uid=1000), tmp_path)
    assert is_sealed(text, tmp_path)
    for uid in (0, 1001):
        assert not is_sealed(json.dumps(json.loads(text) | {"uid": uid}), tmp_path)
    del (without := json.loads(text))["uid"]
    assert not is_sealed(json.dumps(without), tmp_path)
