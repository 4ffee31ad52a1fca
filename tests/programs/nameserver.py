"""An authoritative nameserver: nameserver.py ZONE ADDRESS...     UDP and TCP, port 53

ZONE is a JSON file that is read at each query, {NAME: {TYPE: [DATA, ...], "TTL": SECONDS, "CODE": RCODE, "SLOW": SECONDS}},
NAME without the final dot. "*.NAME" is for what has no entry of its own; "{n}" in its data is the name's first label. A CNAME is
followed in the zone. "POISON" has records of other names that are put beside, as [NAME, TYPE, DATA]. Each query is a line on
standard output: its name and type.
"""

import json
import socket
import sys
import threading
import time

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

zone_file, *addresses = sys.argv[1:]


def entry(zone, name):
    if name in zone:
        return zone[name]
    label, _, rest = name.partition(".")
    found = zone.get(f"*.{rest}")
    return found and {k: [d.format(n=label) if isinstance(d, str) else d for d in v] if isinstance(v, list) else v for k, v in found.items()}


def answer(data, room):
    asked = dns.message.from_wire(data)
    name, kind = asked.question[0].name.to_text().rstrip(".").lower(), dns.rdatatype.to_text(asked.question[0].rdtype)
    print(name, kind, flush=True)
    with open(zone_file) as file:
        zone = json.load(file)
    made = dns.message.make_response(asked, recursion_available=True)
    found = entry(zone, name)
    if found is None:
        made.set_rcode(dns.rcode.NXDOMAIN)
    for _ in range(20):
        if not found:
            break
        time.sleep(found.get("SLOW", 0))
        made.set_rcode(dns.rcode.Rcode(found.get("CODE", 0)))
        ttl = found.get("TTL", 60)
        for other, type_, data_ in found.get("POISON", ()):
            made.answer.append(dns.rrset.from_text(f"{other}.", ttl, "IN", type_, data_))
        if kind in found:
            made.answer.append(dns.rrset.from_text(f"{name}.", ttl, "IN", kind, *found[kind]))
            break
        if "CNAME" not in found:
            break
        made.answer.append(dns.rrset.from_text(f"{name}.", ttl, "IN", "CNAME", f"{found['CNAME'][0]}."))
        name = found["CNAME"][0]
        found = entry(zone, name)
    whole = made.to_wire(max_size=65535)
    if len(whole) > (room or max(512, asked.payload)):
        made.answer.clear()
        made.flags |= dns.flags.TC
        return made.to_wire()
    return whole


def datagrams(sock):
    while True:
        data, client = sock.recvfrom(65535)
        threading.Thread(target=lambda data=data, client=client: sock.sendto(answer(data, 0), client), daemon=True).start()


def converse(peer):
    with peer, peer.makefile("rb") as stream:
        while head := stream.read(2):
            reply = answer(stream.read(int.from_bytes(head, "big")), 65535)
            peer.sendall(len(reply).to_bytes(2, "big") + reply)


def streams(sock):
    while True:
        threading.Thread(target=converse, args=(sock.accept()[0],), daemon=True).start()


for address in addresses:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    udp, tcp = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for sock in (udp, tcp):
        sock.bind(socket.getaddrinfo(address, 53, type=socket.SOCK_DGRAM)[0][4])  # with the zone of a link-local one
    tcp.listen(64)
    threading.Thread(target=datagrams, args=(udp,), daemon=True).start()
    threading.Thread(target=streams, args=(tcp,), daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
