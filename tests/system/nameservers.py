"""Programs that are nameservers, and that ask one."""

# A nameserver at each of these addresses: what it answers is its word, and TXT records as long as asked.
SERVERS = """
import socket, struct, sys, threading
def answer(word, query):
    end = 12
    while query[end]: end += 1 + query[end]
    size = int(query[13:13 + query[12]].decode().strip('abcdefghijklmnopqrstuvwxyz') or 4)
    if word in ('refuses', 'fails'): return query[:2] + bytes((0x81, 0x85 if word == 'refuses' else 0x82)) + query[4:6] + bytes(6) + query[12:end + 5]
    if word == 'bare': return query[:2] + b'\\x81\\x85' + bytes(8)
    text = word.encode() * (size // len(word) + 1)
    data = b''.join(bytes([len(text[n:n + 200])]) + text[n:n + 200] for n in range(0, size, 200))
    return query[:2] + b'\\x81\\x80' + query[4:6] + b'\\0\\1' + bytes(4) + query[12:end + 5] + struct.pack('>HHHIH', 0xc00c, 16, 1, 5, len(data)) + data
def exact(c, size):
    data = b''
    while len(data) < size:
        more = c.recv(size - len(data))
        if not more: raise EOFError
        data += more
    return data
def stream(c, word):
    try:
        while True:
            reply = answer(word, exact(c, int.from_bytes(exact(c, 2), 'big')))
            c.sendall(len(reply).to_bytes(2, 'big') + reply)
    except EOFError: c.close()
def serve(word, address):
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    u = socket.socket(family, socket.SOCK_DGRAM); u.bind((address, 53))
    t = socket.socket(family); t.setsockopt(1, 2, 1); t.bind((address, 53)); t.listen()
    def datagrams():
        while True:
            query, client = u.recvfrom(999)
            if word != 'silent': u.sendto(answer(word, query)[:512], client)
    def streams():
        while True:
            c = t.accept()[0]
            if word == 'silent': held.append(c)
            else: threading.Thread(target=stream, args=(c, word), daemon=True).start()
    for each in (datagrams, streams): threading.Thread(target=each, daemon=True).start()
held = []
for each in sys.argv[1:]: serve(*each.split('@'))
print('ready', flush=True)
sys.stdin.read()
"""
ASK = """
import socket, struct, sys
def query(number, name): return struct.pack('>HHHHHH', number, 0x100, 1, 0, 0, 0) + bytes([len(name)]) + name.encode() + b'\\0' + struct.pack('>HH', 16, 1)
def told(reply): return (reply[3] & 15, reply[-4:].decode() if reply[7] else '', len(reply) > 5000)
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(10); u.connect((sys.argv[1], 53))
u.send(query(7, 'short')); print('udp', *told(u.recv(4096)))
t = socket.socket(); t.settimeout(20); t.connect((sys.argv[1], 53))
both = [query(1, 'short'), query(2, 'long6000')]
t.sendall(b''.join(len(q).to_bytes(2, 'big') + q for q in both))
f = t.makefile('rb')
for _ in both:
    reply = f.read(int.from_bytes(f.read(2), 'big')); print('tcp', reply[1], *told(reply))
if sys.argv[2] == 'more':
    for n in range(3):
        try: t.sendall(len(both[0]).to_bytes(2, 'big') + both[0]); length = f.read(2)
        except OSError: length = b''
        print(len(length)); f.read(int.from_bytes(length, 'big'))
"""
