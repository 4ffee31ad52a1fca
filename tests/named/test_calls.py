"""Telephony and relays: a call has a UDP port for its signs and others for its voice; a relay has a port for each peer."""

import pytest

from graft.bench.lab import CLIENT4, HOST4

pytestmark = pytest.mark.tree
VOICE = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
for n in range(20): s.sendto(b'voice %d' % n, (sys.argv[1], 6000)); assert s.recv(99) == b'voice %d' % n
print('heard')
"""


def test_sipp_is_called(stage):
    """SIP over UDP and TCP, RTP beside it: what it is sent comes back."""
    stage.need("sipp", "python3")

    def play(place):
        seen = []
        for transport, kind in (("u1", "/udp"), ("t1", "")):
            listens = ("-sn", "uas", "-i", place.address4, "-mi", place.address4, "-mp", "6000", "-rtp_echo", "-t", transport, "-nostdin")
            answers = place.start("sipp", *listens, publish=(f"5060{kind}", "6000/udp"))
            calls = ("sipp", "-sn", "uac", "-m", "5", "-r", "20", "-d", "100", "-timeout", "20", "-t", transport, "-nostdin")
            for who, me in ((place.client, CLIENT4), (place.beside, HOST4)):
                told = who(*calls, "-i", me, "-p", "5070", f"{place.address4}:5060")
                seen.append([line.split()[-1] for line in told.splitlines() if "Successful call" in line][-1])
                seen.append(who("python3", "-c", VOICE, place.address4))
            place.end(answers)
        return seen

    assert stage.same(play) == ["5", "heard\n"] * 4


@pytest.mark.parametrize("transport", ["u1", "t1"])
def test_sipp_calls(stage, transport):
    """From a port that it has bound, which it tells in Via and Contact."""
    stage.need("sipp")

    def play(place):
        far = ("sipp", "-sn", "uas", "-i", CLIENT4, "-p", "5060", "-t", transport, "-nostdin")
        place.serve_far(*far, port=5060, udp=transport == "u1")
        calls = ("sipp", "-sn", "uac", "-m", "5", "-r", "20", "-d", "100", "-timeout", "20", "-t", transport, "-nostdin")
        told = place.alone(*calls, "-i", place.address4, "-p", "5070", f"{CLIENT4}:5060")
        return [line.split()[-1] for line in told.splitlines() if "Successful call" in line][-1]

    assert stage.same(play) == "5"


TURN = """
listening-port=3478
listening-ip=0.0.0.0
relay-ip={address}
min-port=49160
max-port=49179
user=user:word
realm=graft.test
lt-cred-mech
no-tls
no-dtls
no-cli
allow-loopback-peers
log-file=stdout
pidfile={work}/pid
userdb={work}/db
"""


@pytest.mark.parametrize("transport", [(), ("-t",)])
def test_coturn(stage, transport):
    """Each of two clients has a relay; what one sends goes from relay to relay, and nothing is lost."""
    stage.need("turnserver", "turnutils_uclient")

    def play(place):
        (place.work / "conf").write_text(TURN.format(work=place.work, address=place.address4))
        place.start("turnserver", "-c", place.work / "conf", publish=("3478", "3478/udp", "49160-49179/udp"))
        seen = []
        for who in (place.client, place.beside):
            told = who("turnutils_uclient", *transport, "-u", "user", "-w", "word", "-y", "-c", "-n", "10", "-m", "2", place.address4)
            lost = [line.rpartition("Total lost packets ")[2].split()[0] for line in told.splitlines() if "Total lost packets" in line]
            seen.append(lost[-1] if lost else told)
        return seen

    assert stage.same(play) == ["0", "0"]
