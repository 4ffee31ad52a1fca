"""Sequences of socket calls, each from a seed, and how they are written for a reader."""

import random
import socket
from dataclasses import dataclass, field
from typing import Any

Call = list[Any]
FIXED = (80, 2001, 2002, 2003)
ECHO, NOBODY = 7, 9  # ports outside
LENGTHS = (0, 1, 2, 3, 4, 4, 4, 5, 8, 16)
VARIANTS = ("plain", "ip", "published")
# Options by level that any program may set, with values: a number, or a text
OPTIONS: dict[int, dict[int, tuple[Any, ...]]] = {
    1: {2: (0, 1), 5: (0, 1), 6: (0, 1), 7: (4096,), 8: (4096,), 9: (0, 1), 10: (0, 1), 12: (0, 3), 13: (0,), 15: (0, 1), 16: (0, 1),
        18: (1,), 29: (0, 1), 35: (0, 1), 40: (0, 1), 42: (0,), 44: (0, 1), 46: (0,), 60: (0, 1), 74: (0, 1)},
    0: {1: (0, 16), 2: (0, 64), 5: (0, 1), 6: (0, 1), 8: (0, 1), 10: (0, 1, 2), 11: (0, 1), 12: (0, 1), 13: (0, 1), 18: (0, 1),
        20: (0, 1), 21: (0, 255), 23: (0, 1), 24: (0, 1), 25: (0, 1), 33: (0, 1), 34: (0, 1), 49: (0, 1)},
    41: {16: (-1, 64), 18: (1,), 19: (0, 1), 23: (0, 1, 2), 25: (0, 1), 26: (0, 1), 29: (0, 1), 33: (0, 1), 49: (0, 1), 51: (0, 1),
         53: (0, 1), 56: (0, 1), 58: (0, 1), 60: (0, 1), 62: (0, 1), 66: (0, 1), 67: (0, 32), 70: (0, 1), 72: (0, 2), 74: (0, 1)},
    6: {1: (0, 1), 2: (536, 1200), 3: (0, 1), 4: (60,), 5: (10,), 6: (5,), 7: (2,), 8: (0, 5), 10: (1024,), 12: (0, 1), 13: ("reno", "none such"),
        15: (0,), 18: (0, 3000), 23: (0, 5), 25: (1 << 20,), 30: (0, 1), 31: ("tls", "none")},
    17: {1: (0, 1), 101: (0, 1), 102: (0, 1), 103: (0, 1400), 104: (0, 1)},
}  # fmt: skip
# Answers that are of the moment, of the machine, or of the socket's namespace
VARIES = {(1, 7), (1, 8), (1, 16), (6, 2), (6, 11), (6, 13), (6, 24), (0, 14), (0, 2), (41, 24), (41, 16), (6, 10)}


@dataclass
class Slot:
    """What the generator knows of a socket."""

    family: str
    kind: str
    listens: bool = False
    has_port: bool = False


@dataclass
class Maker:
    """Makes one sequence."""

    rng: random.Random
    variant: str
    slots: dict[int, Slot] = field(default_factory=dict)
    said: int = 0
    last: int = 0
    visited: bool = False

    def text(self) -> str:
        self.said += 1
        return f"d{self.said}"

    def pick(self, **weights: float) -> str:
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def new(self) -> int:
        self.last += 1
        return self.last

    def slot(self) -> int:
        return self.rng.choice(list(self.slots))

    def address(self, slot: Slot, bind: bool) -> tuple[str, str]:
        """Family and address."""
        r = self.rng
        own = self.variant == "ip" or (self.variant == "published" and not bind)
        v4 = ["127.0.0.1"] * 8 + ["0.0.0.0"] * 4 + ["127.0.0.2"] * 2 + ["127.1.2.3"]
        v6 = ["::1"] * 8 + ["::"] * 4
        if own:
            v4 += ["own4"] * 4
            v6 += ["own6"] * 4
        if not bind:
            v4 += ["out4"] * 5
            v6 += ["out6"] * 5
        elif self.chance(0.02):
            v4, v6 = ["out4"], ["out6"]
        if self.chance(0.02):  # of another family than the socket
            return r.choice((("INET", r.choice(v4)), ("INET6", r.choice(v6)), ("UNSPEC", r.choice(v4))))
        if slot.family == "INET":
            return ("UNSPEC" if bind and self.chance(0.03) else "INET"), r.choice(v4)
        if self.chance(0.35):
            return "INET6", f"::ffff:{r.choice(v4)}"
        if slot.kind == "DGRAM" and not bind and self.chance(0.05):
            return "INET", r.choice(v4)
        return "INET6", r.choice(v6)

    def where(self, slot: Slot, bind: bool = False) -> list[Any]:
        r = self.rng
        family, address = self.address(slot, bind)
        out = address.removeprefix("::ffff:").startswith("out")
        if bind:
            port: Any = self.rng.choice((0, 0, 0, *FIXED, 2001, 2001))
        elif out:
            port = ECHO if self.chance(0.8) else NOBODY
        else:
            serves = slot.kind == "STREAM" and self.chance(0.8)
            known = [number for number, one in self.slots.items() if (one.listens if serves else one.has_port) or self.chance(0.05)]
            port = f"={r.choice(known)}" if known and self.chance(0.6) else r.choice((0, *FIXED, *FIXED, 2001, 2001, 2001))
        where = [family, address, port]
        if self.chance(0.02):
            where.append(self.rng.choice((0, 2, 8, 15, 16, 24, 27, 28, 32)))
        return where

    def option(self, slot: Slot) -> tuple[int, int, Any]:
        r = self.rng
        levels = [1, 1, 1, 6 if slot.kind == "STREAM" else 17, 0 if slot.family == "INET" else 41]
        level = r.choice(levels) if self.chance(0.9) else r.choice((0, 1, 6, 17, 41, 132, 255))
        if level in OPTIONS and self.chance(0.85):
            name = r.choice(list(OPTIONS[level]))
            return level, name, r.choice(OPTIONS[level][name])
        return level, r.choice((r.randrange(48), r.randrange(200), 1000)), r.choice((0, 0, 1, -1))

    def make(self) -> list[Call]:
        calls: list[Call] = []
        for _ in range(self.rng.randint(5, 14)):
            calls += self.step()
        return calls

    def socket(self) -> list[Call]:
        new = self.new()
        slot = self.slots[new] = Slot(self.pick(INET=5, INET6=5), self.pick(STREAM=5, DGRAM=5))
        calls: list[Call] = [["socket", new, slot.family, slot.kind]]
        if slot.family == "INET6" and self.chance(0.15):
            calls.append(["set", new, 41, socket.IPV6_V6ONLY, 1, 4])
        if self.chance(0.15):
            calls.append(["set", new, 1, self.rng.choice((socket.SO_REUSEADDR, socket.SO_REUSEPORT)), 1, 4])
        if self.chance(0.6):
            calls.append(["bind", new, self.where(slot, bind=True)])
            slot.has_port = True
            if self.chance(0.5):
                calls.append(["name", new])
            if slot.kind == "STREAM" and self.chance(0.7):
                calls.append(["listen", new, 8])
                slot.listens = True
        return calls

    def step(self) -> list[Call]:
        if not self.slots or (len(self.slots) < 5 and self.chance(0.3)):
            return self.socket()
        number = self.slot()
        slot = self.slots[number]
        what = self.pick(
            connect=14, send=10, sendto=8 if slot.kind == "DGRAM" else 1, recv=8, name=5, peer=4, bind=4, listen=3, accept=4, set=4, get=3,
            shutdown=2, unconnect=4, close=1, dup=1, hand=1, fork=1, visit=3,
        )  # fmt: skip
        return getattr(self, what)(number, slot)  # type: ignore[no-any-return]

    def names(self, number: int) -> list[Call]:
        return [[what, number] for what in ("name", "peer") if self.chance(0.5)]

    def connect(self, number: int, slot: Slot) -> list[Call]:
        if slot.listens and self.chance(0.8):
            return self.accept(number, slot)
        where = self.where(slot)
        calls: list[Call] = [["begin" if self.chance(0.2) else "connect", number, where], *self.names(number)]
        target = self.slots.get(int(where[2][1:])) if isinstance(where[2], str) else None
        if target and target.listens and self.chance(0.7):
            calls += self.accept(int(where[2][1:]), target)
        if self.chance(0.5):
            calls.append(["send", number, self.text()])
            if target and target.kind == "DGRAM":
                calls += self.recv(int(where[2][1:]), target)
            elif not isinstance(where[2], str):
                calls += self.recv(number, slot)
        return calls

    def unconnect(self, number: int, slot: Slot) -> list[Call]:
        length = 16 if slot.family == "INET" or self.chance(0.5) else 28
        return [["connect", number, ["UNSPEC", "0.0.0.0", 0, length]], *self.names(number)]

    def send(self, number: int, slot: Slot) -> list[Call]:
        return [["send", number, self.text()]]

    def sendto(self, number: int, slot: Slot) -> list[Call]:
        where = self.where(slot)
        slot.has_port = slot.has_port or slot.kind == "DGRAM"
        calls: list[Call] = [["send", number, self.text(), where]]
        if isinstance(where[2], str) and self.chance(0.8):
            calls += self.recv(int(where[2][1:]), slot)
        elif where[2] == ECHO:
            calls += self.recv(number, slot)
        if self.chance(0.3):
            calls.append(["name", number])
        return calls

    def recv(self, number: int, slot: Slot) -> list[Call]:
        if slot.listens and self.chance(0.9):
            return self.accept(number, slot)
        return [["recv", number, self.chance(0.7)]]

    def name(self, number: int, slot: Slot) -> list[Call]:
        return [["name", number]]

    def peer(self, number: int, slot: Slot) -> list[Call]:
        return [["peer", number]]

    def bind(self, number: int, slot: Slot) -> list[Call]:
        slot.has_port = True
        return [["bind", number, self.where(slot, bind=True)], ["name", number]]

    def listen(self, number: int, slot: Slot) -> list[Call]:
        slot.listens = slot.listens or slot.kind == "STREAM"
        slot.has_port = slot.has_port or slot.listens
        return [["listen", number, self.rng.choice((8, 8, 1))], *self.names(number)]

    def accept(self, number: int, slot: Slot) -> list[Call]:
        new = self.new()
        self.slots[new] = Slot(slot.family, slot.kind)
        return [["accept", number, new], *self.names(new)]

    def set(self, number: int, slot: Slot) -> list[Call]:
        level, name, value = self.option(slot)
        length = self.rng.choice(LENGTHS)
        calls: list[Call] = [["set", number, level, name, value, length]]
        if self.chance(0.5) and (level, name) not in VARIES:
            calls.append(["get", number, level, name, 4])
        return calls

    def get(self, number: int, slot: Slot) -> list[Call]:
        level, name, _ = self.option(slot)
        return [["get", number, level, name, self.rng.choice(LENGTHS)]] if (level, name) not in VARIES and name in OPTIONS.get(level, ()) else []

    def shutdown(self, number: int, slot: Slot) -> list[Call]:
        return [["shutdown", number, self.rng.randrange(3)]]

    def close(self, number: int, slot: Slot) -> list[Call]:
        if len(self.slots) > 1:
            del self.slots[number]
        return [["close", number]]

    def dup(self, number: int, slot: Slot) -> list[Call]:
        new = self.new()
        self.slots[new] = slot
        return [["dup", number, new]]

    def hand(self, number: int, slot: Slot) -> list[Call]:
        new = self.new()
        self.slots[new] = slot
        return [["hand", number, new]]

    def fork(self, number: int, slot: Slot) -> list[Call]:
        return [["fork", self.step()]]

    def visit(self, number: int, slot: Slot) -> list[Call]:
        if self.variant == "plain":
            return []
        ports = [port for port in FIXED if port != 80]
        calls: list[Call] = [["visit", slot.kind, [slot.family, "own4" if self.chance(0.5) else "own6", self.rng.choice(ports)], self.text()]]
        if slot.listens:
            calls += self.accept(number, slot)
        elif slot.kind == "DGRAM":
            calls += self.recv(number, slot)
        if self.chance(0.3):
            calls.append(["hear"])
        return calls


def variant(seed: int) -> str:
    """The variant of a seed."""
    return VARIANTS[seed % len(VARIANTS)]


def sequence(seed: int) -> list[Call]:
    """The calls of a seed."""
    return Maker(random.Random(seed), variant(seed)).make()


def _where(where: list[Any]) -> str:
    family, address, port, *length = where
    text = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    return text + (" of AF_UNSPEC" if family == "UNSPEC" else "") + (f", {length[0]} bytes" if length else "")


def shown(call: Call) -> str:
    """A call as a line of a program."""
    what, *arguments = call
    if what == "fork":
        return f"fork: {'; '.join(map(shown, arguments[0]))}"
    if what == "socket":
        return f"s{arguments[0]} = socket({', '.join(arguments[1:])})"
    if what == "visit":
        return f"visit {arguments[0]} {_where(arguments[1])} '{arguments[2]}'"
    if what in ("accept", "dup", "hand"):
        return f"s{arguments[1]} = {what}(s{arguments[0]})"
    words = [_where(a) if isinstance(a, list) else str(a) for a in arguments[1:]]
    return f"{what}({', '.join([f's{a}' for a in arguments[:1]] + words)})"
