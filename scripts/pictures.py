"""Draw docs/pictures: `pictures.py --write`. Without the option: compare, exit with 1 if one differs.

Plain SVG, which GitHub, the site and any browser show, in both colour schemes. A picture is a list of boxes, words
and arrows on a page of 800 points; text that would not fit into its box is an error.
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

DIRECTORY = Path(__file__).parents[1] / "docs/pictures"
WIDTH = 800
CHARACTER = 7.0  # points of a character of 13 px in DejaVu Sans, which is wide
STYLE = """
    svg { --page: #ffffff; --ink: #1f2328; --soft: #57606a; --line: #6e7781; --box: #f6f8fa; --own: #ddf4ff;
      --kernel: #fff8c5; --no: #b42318; }
    @media (prefers-color-scheme: dark) {
      svg { --page: #0d1117; --ink: #e6edf3; --soft: #adbac7; --line: #8b949e; --box: #161b22; --own: #0c2d4a;
        --kernel: #3b2f06; --no: #ff9c92; }
    }
    text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink); }
    .head { font-weight: 600; }
    .note { font-size: 12px; fill: var(--soft); }
    .no { fill: var(--no); }
    .page { fill: var(--page); }
    .box rect { fill: var(--box); stroke: var(--line); }
    .own rect { fill: var(--own); stroke: var(--line); }
    .kernel rect { fill: var(--kernel); stroke: var(--line); }
    .frame rect { fill: none; stroke: var(--line); stroke-dasharray: 5 4; }
    path { fill: none; stroke: var(--line); stroke-width: 1.5; }
    path.refused { stroke: var(--no); stroke-dasharray: 4 3; }
    marker path { fill: var(--line); stroke: none; }
"""


class Picture:
    """One picture: what is drawn, in order."""

    def __init__(self, title: str, height: int) -> None:
        self.title = title
        self.height = height
        self.parts: list[str] = []
        self.texts: list[str] = []

    def words(self, x: int, y: int, text: str, kind: str = "") -> None:
        """A line of text that begins at (x, y)."""
        if x + len(text) * CHARACTER > WIDTH:
            raise ValueError(f"'{text}' leaves the page of {self.title}")
        self.texts.append(text)
        self.parts.append(f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>')

    def box(self, kind: str, x: int, y: int, width: int, height: int, *lines: str) -> None:
        """A box of a kind: box, own (graft's), kernel, frame. The first of its @lines is its name."""
        for line in lines:
            if len(line) * CHARACTER > width - 16:
                raise ValueError(f"'{line}' does not fit into its box in {self.title}")
        if len(lines) * 18 + 8 > height:
            raise ValueError(f"{len(lines)} lines do not fit into '{lines[0]}' in {self.title}")
        self.parts.append(f'<g class="{kind}"><rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/></g>')
        for number, line in enumerate(lines):
            name = "note" if kind == "frame" else "head" if not number else ""
            self.words(x + 10, y + 20 + 18 * number, line, name)

    def arrow(self, *points: tuple[int, int], text: str = "", refused: bool = False) -> None:
        """An arrow along @points, with a note above its beginning."""
        way = " L".join(f"{x} {y}" for x, y in points)
        kind = ' class="refused"' if refused else ""
        self.parts.append(f'<path d="M{way}"{kind} marker-end="url(#head)"/>')
        if text:
            (x1, y1), (x2, y2) = points[0], points[1]
            at = (min(x1, x2) + 8, y1 - 6) if y1 == y2 else (x1 + 6, (y1 + y2) // 2 + 4)
            self.words(*at, text, "note no" if refused else "note")

    def svg(self) -> str:
        """The file."""
        parts = "\n  ".join(self.parts)
        return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">
  <title>{escape(self.title)}</title>
  <style>{STYLE}  </style>
  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
    <path d="M0 0 L8 4 L0 8 z"/></marker></defs>
  <rect class="page" width="{WIDTH}" height="{self.height}"/>
  {parts}
</svg>
"""


def _stacks() -> Picture:
    p = Picture("Three ways to give a container a network", 300)
    p.box("frame", 10, 10, 250, 200, "a bridge")
    p.box("box", 30, 44, 210, 32, "program, its own stack")
    p.box("box", 30, 96, 210, 32, "veth, bridge, NAT")
    p.box("kernel", 30, 148, 210, 44, "the host's stack", "")
    p.arrow((135, 76), (135, 96))
    p.arrow((135, 128), (135, 148))
    p.words(14, 234, "paid for twice; the server sees")
    p.words(14, 252, "an address of the bridge, or NAT's")
    p.box("frame", 276, 10, 250, 200, "--net=host")
    p.box("box", 296, 44, 210, 32, "program")
    p.box("kernel", 296, 148, 210, 44, "the host's stack", "")
    p.arrow((401, 76), (401, 148))
    p.words(280, 234, "paid for once; and every port, address")
    p.words(280, 252, "and device of the host is given away")
    p.box("frame", 542, 10, 250, 200, "graft")
    p.box("box", 562, 44, 210, 32, "program, a netns with lo")
    p.box("own", 562, 96, 210, 32, "endpoints and policy")
    p.box("kernel", 562, 148, 210, 44, "the host's stack", "")
    p.arrow((667, 76), (667, 96))
    p.arrow((667, 128), (667, 148))
    p.words(546, 234, "paid for once; only the socket")
    p.words(546, 252, "is on the host, under a policy")
    p.words(14, 286, "Nothing is copied, queued or translated: a grafted socket is a socket of the host.", "note")
    return p


def _socket() -> Picture:
    p = Picture("How a socket gets to the host's stack", 260)
    p.box("frame", 10, 10, 250, 190, "a netns that leads nowhere")
    p.box("box", 30, 50, 210, 80, "the program", "socket(AF_INET, STREAM)", "...", "7")
    p.box("frame", 420, 10, 370, 190, "the host's netns")
    p.box(
        "own", 440, 50, 330, 62, "graft-sup", "makes the socket here, stamps it", "with the container it belongs to"
    )
    p.box("kernel", 440, 140, 330, 44, "the host's TCP socket", "the program's descriptor 7")
    p.arrow((240, 72), (440, 72))
    p.words(266, 66, "1  seccomp traps it", "note")
    p.arrow((600, 112), (600, 140))
    p.arrow((440, 104), (240, 104))
    p.words(266, 98, "2  added as number 7", "note")
    p.words(
        14,
        226,
        "From here on setsockopt, epoll, dup, fork, accept, send and recv are the kernel's own, at the host's speed.",
    )
    p.words(14, 246, "The socket is final from the start: nothing is swapped later.", "note")
    return p


def _publish() -> Picture:
    p = Picture("A published port: graft run -p 8080:80 nginx", 250)
    p.box("box", 10, 30, 190, 62, "nginx", "bind(0.0.0.0:80)", "asks: 0.0.0.0:80")
    p.box(
        "kernel",
        300,
        30,
        240,
        80,
        "kernel, hook of bind()",
        "stamp: whose socket is it?",
        "rule: 80 is 8080 of the host",
        "no rule: private port",
    )
    p.box("kernel", 640, 30, 150, 62, "host's stack", "listens at", "0.0.0.0:8080")
    p.arrow((200, 60), (300, 60), text="bind")
    p.arrow((540, 60), (640, 60))
    p.box("box", 560, 160, 230, 44, "a client, 203.0.113.9", "connects to HOST:8080")
    p.arrow((715, 160), (715, 92))
    p.arrow((560, 182), (105, 182), (105, 92), text="the server sees 203.0.113.9")
    p.words(14, 234, "No forwarder, no NAT: the client's connection is accepted by the program itself.", "note")
    return p


def _decide() -> Picture:
    p = Picture("Who decides what", 270)
    p.box(
        "box",
        10,
        40,
        170,
        150,
        "the program",
        "socket(), listen()",
        "",
        "bind(), connect(),",
        "send, setsockopt",
        "",
        "read, write, accept",
    )
    p.box(
        "own",
        330,
        20,
        300,
        62,
        "graft-sup, graftd",
        "arguments in registers: nobody can",
        "change them after the check",
    )
    p.box(
        "kernel",
        330,
        100,
        300,
        62,
        "BPF, inside the very call",
        "addresses in memory: other threads",
        "may change them, so no check before",
    )
    p.box("kernel", 330, 180, 300, 44, "the kernel alone", "no trap, no hook")
    p.arrow((180, 68), (330, 50), text="")
    p.arrow((180, 120), (330, 130))
    p.arrow((180, 170), (330, 200))
    p.words(646, 46, "two wake-ups", "note")
    p.words(646, 126, "about a microsecond", "note")
    p.words(646, 206, "nothing", "note")
    p.words(14, 252, "Nothing is checked first and used later.", "note")
    return p


def _loopback() -> Picture:
    p = Picture("Loopback is private", 290)
    for n, (x, name, slot) in enumerate(
        (
            (10, "container a", "its slice of 127.64"),
            (276, "container b", "its slice of 127.64"),
            (542, "the host", "127.0.0.1"),
        )
    ):
        p.box("frame", x, 10, 248, 130, name)
        p.box("box", x + 20, 44, 208, 80, "server", "bind(127.0.0.1:5000)", "client", "connect(127.0.0.1:5000)")
        p.box("kernel", x + 20, 180, 208, 44, "the host's stack", slot)
        p.arrow((x + 124, 124), (x + 124, 180), text="becomes" if n < 2 else "is")
    p.words(
        14,
        252,
        "A hook puts each container's 127.0.0.1 and ::1 into a slice of its own; inside it is 127.0.0.1.",
    )
    p.words(
        14, 274, "Who is in another slice, or on the host, is refused, as by a port where nobody listens.", "note"
    )
    return p


def _egress() -> Picture:
    p = Picture("A connection out", 250)
    p.box("box", 10, 60, 170, 62, "the program", "connect(", "  198.51.100.7:443)")
    p.box(
        "kernel",
        290,
        30,
        240,
        116,
        "kernel, hook of connect()",
        "the container's own loopback?",
        "another container's port?",
        "an egress rule? its endpoint",
        "  is the source address",
        "else as the host, or refused",
    )
    p.box("kernel", 640, 40, 150, 44, "the host's stack", "and its routes")
    p.arrow((180, 90), (290, 90))
    p.arrow((530, 62), (640, 62), text="allowed")
    p.box("own", 560, 160, 230, 44, "graft log, graft inspect", "who, where to, why not")
    p.arrow((530, 130), (600, 130), (600, 160), text="refused", refused=True)
    p.words(14, 190, "The program gets ENETUNREACH at once,")
    p.words(14, 208, "and the refusal is counted and kept.")
    p.words(14, 236, "Rules change while it runs, and hold from the next bind or connect.", "note")
    return p


def _own() -> Picture:
    p = Picture("Addresses of their own: --ip", 270)
    for x, address in ((10, "10.88.0.5"), (276, "10.88.0.6")):
        p.box("frame", x, 10, 248, 110, f"graft run --ip {address}")
        p.box("box", x + 20, 40, 208, 62, "server", "bind(0.0.0.0:80)", f"eth0 has {address}")
        p.arrow((x + 124, 102), (x + 124, 160), text=f"{address}:80")
    p.box("kernel", 10, 160, 514, 44, "the host's stack", "both addresses are on lo; two servers at port 80")
    p.box("box", 590, 160, 200, 44, "a client", "http://10.88.0.5/")
    p.arrow((590, 182), (524, 182))
    p.words(546, 40, "eth0 leads nowhere: it is there")
    p.words(546, 58, "for programs that look at devices")
    p.words(14, 232, "What arrives at the address goes to the container's server and to nobody else.")
    p.words(14, 254, "One that is routed elsewhere, or at which somebody answers, is refused.", "note")
    return p


def _names() -> Picture:
    p = Picture("A list of names: --allow pypi.org:443", 290)
    p.box("box", 10, 40, 170, 150, "pip", "pypi.org?", "", "", "", "connect(that, 443)", "connect(other)")
    p.box("own", 290, 24, 220, 62, "graft's resolver", "on the list: asks the host's", "not on it: refused, kept")
    p.box("box", 620, 30, 170, 44, "a nameserver", "of the host's choice")
    p.box("kernel", 290, 140, 220, 62, "kernel", "this address, port 443,", "for its TTL and two minutes")
    p.arrow((180, 56), (290, 56), text="port 53")
    p.arrow((510, 52), (620, 52))
    p.arrow((400, 86), (400, 140), text="pins the answer's addresses")
    p.arrow((180, 154), (290, 154))
    p.box("kernel", 640, 150, 150, 32, "out")
    p.arrow((510, 166), (640, 166), text="allowed")
    p.arrow((95, 190), (95, 226), (280, 226), refused=True)
    p.words(290, 230, "refused: graft inspect names it", "no")
    p.words(
        14, 274, "graft run --learn lets everything through, and prints the list that the program needed.", "note"
    )
    return p


def _modes() -> Picture:
    p = Picture("Two modes", 290)
    p.box("frame", 10, 10, 380, 220, "graft run")
    p.box("frame", 30, 38, 340, 64, "the container's netns")
    p.box("box", 180, 50, 170, 44, "the program", "unix, netlink sockets")
    p.box("frame", 30, 140, 340, 76)
    p.words(126, 160, "host's netns, graftd's cgroup: policy", "note")
    p.box("own", 50, 168, 130, 32, "graft-sup")
    p.box("kernel", 220, 168, 130, 32, "its TCP, UDP")
    p.arrow((240, 94), (240, 120), (110, 120), (110, 168))
    p.words(248, 122, "socket() is trapped", "note")
    p.box("frame", 410, 10, 380, 220, "graft run --direct")
    p.box("frame", 430, 38, 340, 64, "the container's netns")
    p.box("own", 450, 60, 110, 32, "graft-sup")
    p.box("box", 580, 60, 180, 32, "unix, netlink sockets")
    p.box("frame", 430, 140, 340, 76)
    p.words(526, 160, "host's netns, its own cgroup: policy", "note")
    p.box("box", 450, 168, 130, 32, "the program")
    p.box("kernel", 620, 168, 130, 32, "its TCP, UDP")
    p.arrow((580, 184), (620, 184))
    p.arrow((515, 168), (515, 90))
    p.words(522, 130, "socket(UNIX) is trapped", "note")
    p.words(14, 256, "What programs make often is native on the right, what they make seldom is trapped.")
    p.words(14, 278, "The policy is the same; what differs is where the program lives.", "note")
    return p


def _survives() -> Picture:
    p = Picture("What survives what", 300)
    p.box("box", 10, 40, 170, 62, "the program", "goes on: its sockets", "are the kernel's")
    p.box("own", 250, 20, 230, 44, "graft-sup, one a container", "goes on making sockets")
    p.box("own", 250, 96, 230, 44, "graftd", "killed: started again")
    p.box(
        "own", 560, 96, 230, 62, "graft-keeper, or systemd", "keeps listeners, namespaces,", "journals: descriptors"
    )
    p.box("own", 560, 190, 230, 44, "graft-guard", "starts a keeper again")
    p.box(
        "kernel",
        10,
        190,
        470,
        62,
        "the kernel",
        "policy, rules, counters: pinned maps and programs",
        "hold while nothing of graft's runs",
    )
    p.arrow((180, 50), (250, 42), text="")
    p.arrow((365, 64), (365, 96))
    p.arrow((560, 118), (480, 118))
    p.arrow((675, 190), (675, 158))
    p.arrow((95, 102), (95, 190))
    p.arrow((365, 140), (365, 190), text="compiles rules")
    p.words(
        14,
        284,
        "graftd --replace and systemctl restart graftd upgrade it so: no call is lost, no connection is touched.",
        "note",
    )
    return p


PICTURES = {
    "1-three-ways": _stacks,
    "2-socket": _socket,
    "3-publish": _publish,
    "4-who-decides": _decide,
    "5-loopback": _loopback,
    "6-connect": _egress,
    "7-own-address": _own,
    "8-names": _names,
    "9-two-modes": _modes,
    "10-survival": _survives,
}


def main() -> int:
    """Draw or compare; returns the exit status."""
    write = sys.argv[1:] == ["--write"]
    status = 0
    for name, draw in PICTURES.items():
        path, text = DIRECTORY / f"{name}.svg", draw().svg()
        if write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path} is not as scripts/pictures.py draws it: run it with --write")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
