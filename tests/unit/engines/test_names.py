"""What graftd's resolver takes for a query."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.engines.names import docker_names, is_query, question_end
from tests.messages import query


@pytest.mark.parametrize("name", ["web", "a.b.c.example.com", "x" * 63])
def test_queries(name):
    assert is_query(query(name))
    assert question_end(query(name)) == len(query(name))
    opt = b"\0" + struct.pack(">2HIH", 41, 1232, 0, 0)
    assert is_query(query(name)[:10] + b"\0\1" + query(name)[12:] + opt)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        query("web")[:-1],
        query("web")[:2] + b"\x80\0" + query("web")[4:],
        query("web")[:4] + b"\0\0" + query("web")[6:],
        query("web")[:4] + b"\0\1\0\1" + query("web")[8:],
        query("web")[:12] + b"\xc0\x0c\0\1\0\1",
        query(".".join(["x" * 63] * 5)),
        query("web") + bytes(600),
    ],
)
def test_what_is_none(data):
    assert not is_query(data)


@given(st.binary(max_size=600))
def test_anything(data):
    assert is_query(data) in (True, False)
    assert 0 <= question_end(data) <= len(data)


def test_docker_names():
    known = {
        "Name": "/web",
        "Config": {"Hostname": "h"},
        "NetworkSettings": {"Networks": {"a": {"Aliases": ["x", "y"]}, "b": {"Aliases": None}, "c": None}},
    }
    assert docker_names(known) == ["web", "h", "x", "y"]
    assert docker_names({}) == ["", ""]
