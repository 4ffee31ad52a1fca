"""Answers of nameservers: what is believed, what is handed on, and what hostile ones cost. dnspython writes and reads them."""

import time

import dns.edns
import dns.flags
import dns.message
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.engines import messages
from graft.engines.names import is_query, question_end


def query(name="www.example.org", kind="A", **options):
    return dns.message.make_query(name, kind, **options).to_wire()


def reply(asked, *sets, section="answer", code=0, flags=0):
    made = dns.message.make_response(dns.message.from_wire(asked), recursion_available=True)
    getattr(made, section).extend(dns.rrset.from_text(*each) for each in sets)
    made.set_rcode(code)
    made.flags |= flags
    return made.to_wire(max_size=65535)


def told(asked, answer):
    return dns.message.from_wire(messages.written(asked, messages.parse_answer(answer, asked)))


CHAIN = (
    ("www.example.org.", 300, "IN", "CNAME", "a.cdn.example."),
    ("a.cdn.example.", 60, "IN", "CNAME", "b.cdn.example."),
    ("b.cdn.example.", 5, "IN", "A", "192.0.2.1", "192.0.2.2"),
)


def test_a_chain_in_any_order():
    asked = query()
    for sets in (CHAIN, CHAIN[::-1]):
        answer = messages.parse_answer(reply(asked, *sets), asked)
        assert sorted(record.data for record in answer.records) == [bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))]
        assert [record.ttl for record in (*answer.chain, *answer.records)] == [300, 60, 5, 5]
    assert told(asked, reply(asked, *CHAIN)).answer == [dns.rrset.from_text(*each) for each in CHAIN]


def test_what_does_not_follow_from_the_question_is_left_out():
    asked = query()
    poison = [
        ("www.example.org.", 300, "IN", "A", "192.0.2.1"),
        ("bank.example.", 300, "IN", "A", "203.0.113.9"),
        ("other.example.", 300, "IN", "CNAME", "bank.example."),
        ("www.example.org.", 300, "IN", "TXT", "text"),
        ("www.example.org.", 300, "IN", "AAAA", "2001:db8::1"),
    ]
    made = told(asked, reply(asked, *poison))
    assert [str(each) for each in made.answer] == ["www.example.org. 300 IN A 192.0.2.1"]
    extra = reply(asked, ("bank.example.", 300, "IN", "A", "203.0.113.9"), section="additional")
    assert not told(asked, extra).additional


def test_ipv6_case_and_flags():
    asked = query("WwW.example.ORG", "AAAA")
    made = told(asked, reply(asked, ("www.example.org.", 7, "IN", "AAAA", "2001:db8::1"), flags=dns.flags.AD))
    assert str(made.answer[0]) == "WwW.example.ORG. 7 IN AAAA 2001:db8::1"
    assert made.question[0].name.to_text() == "WwW.example.ORG."
    assert made.flags & dns.flags.AD
    assert made.flags & dns.flags.RA


def test_negative_answers_keep_their_soa():
    asked = query()
    soa = ("example.org.", 60, "IN", "SOA", "ns.example.org. admin.example.org. 1 2 3 4 5")
    made = told(asked, reply(asked, soa, section="authority", code=3))
    assert made.rcode() == 3
    assert [str(each) for each in made.authority] == ["example.org. 60 IN SOA ns.example.org. admin.example.org. 1 2 3 4 5"]


def test_chains_without_an_end():
    asked = query()
    loop = [("www.example.org.", 1, "IN", "CNAME", "b."), ("b.", 1, "IN", "CNAME", "www.example.org.")]
    with pytest.raises(ValueError, match="without an end"):
        messages.parse_answer(reply(asked, *loop), asked)


def test_another_question():
    for other in (query("evil.example"), query(kind="AAAA")):
        with pytest.raises(ValueError, match="another question"):
            messages.parse_answer(reply(other), query())


def test_giant_answers_are_read_in_part_and_at_once():
    asked = query()
    many = reply(asked, ("www.example.org.", 1, "IN", "A", *(f"10.{n >> 8}.{n & 255}.1" for n in range(4000))))
    assert len(many) > 60000
    began = time.process_time()
    answer = messages.parse_answer(many, asked)
    assert len(answer.records) == messages.ADDRESSES_MAX
    assert time.process_time() - began < 0.5


def test_pointers_cost_no_time():
    """Each of a thousand records' names is a chain of pointers through all that came before."""
    asked = query("a")
    head = reply(asked)[:12]
    record, chain = b"", [12]
    end = question_end(asked)
    at = end
    for _ in range(1000):
        pointer = (0xC000 | chain[-1]).to_bytes(2, "big")
        chain.append(at)
        record += pointer + b"\0\1\0\1\0\0\0\1\0\4\1\2\3\4"
        at = end + len(record)
    message = head[:6] + (1000).to_bytes(2, "big") + head[8:] + asked[12:end] + record
    began = time.process_time()
    with pytest.raises(ValueError, match="malformed name"):  # of more than HOPS_MAX pointers
        messages.parse_answer(message, asked)
    assert time.process_time() - began < 0.5


def test_upstream_is_asked_the_question_alone():
    asked = query("SeCrEt.example.org", use_edns=True, payload=4096, options=[dns.edns.GenericOption(dns.edns.OptionType.make(65001), b"secret")], want_dnssec=True)
    made = dns.message.from_wire(messages.upstream_query(asked))
    assert made.question[0].name.to_text() == "secret.example.org."
    assert (made.edns, made.options, made.payload, made.flags & dns.flags.RD) == (0, (), 1232, dns.flags.RD)
    assert made.ednsflags & dns.flags.DO
    assert dns.message.from_wire(messages.upstream_query(query())).edns == -1
    assert is_query(messages.upstream_query(asked))


def test_datagrams_are_cut_to_what_the_client_takes():
    sets = ("www.example.org.", 1, "IN", "A", *(f"192.0.2.{n}" for n in range(60)))
    for options, whole in (({}, False), ({"use_edns": True, "payload": 600}, False), ({"use_edns": True, "payload": 1232}, True)):
        asked = query(**options)
        made = messages.written(asked, messages.parse_answer(reply(asked, sets), asked))
        cut = dns.message.from_wire(messages.cut(asked, made))
        assert (bool(cut.flags & dns.flags.TC), len(cut.answer)) == ((False, 1) if whole else (True, 0))


def test_refusals_say_why():
    made = dns.message.from_wire(messages.refusal(query(use_edns=True), "not on the list"))
    assert made.rcode() == 3
    (option,) = made.options
    assert (int(option.code), option.text) == (15, "not on the list")
    assert dns.message.from_wire(messages.refusal(query(), "not on the list")).edns == -1


@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes(tail, at):
    asked = query()
    whole = bytearray(reply(asked, *CHAIN))
    whole[12 + at :] = tail
    try:
        answer = messages.parse_answer(bytes(whole), asked)
    except ValueError:
        return
    assert messages.parse_answer(messages.written(asked, answer), asked).records == answer.records


def test_all_addresses_of_an_answer_are_found():
    """Wherever they stand, under whatever name, and as hints."""
    asked = query()
    for section in ("answer", "authority", "additional"):
        made = reply(asked, ("x.example.", 5, "IN", "A", "192.0.2.1"), ("y.example.", 5, "IN", "AAAA", "2001:db8::1"), section=section)
        assert [len(address) for address in messages.addresses_told(made)] == [4, 16]
    hinted = reply(query(kind="HTTPS"), ("www.example.org.", 5, "IN", "HTTPS", "1 . alpn=h2 ipv4hint=192.0.2.1,192.0.2.2 ipv6hint=2001:db8::1"))
    assert messages.addresses_told(hinted) == [bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2)), bytes.fromhex("20010db8" + "00" * 11 + "01")]
    assert sorted(messages.addresses_told(reply(asked, *CHAIN))) == [bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))]


@given(st.binary(max_size=300), st.integers(0, 300))
def test_no_message_stops_the_search(data, end):
    messages.addresses_told(data)
    messages.addresses_told(reply(query(), *CHAIN)[:end] + data)
