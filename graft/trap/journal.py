"""The listener of a seccomp filter (seccomp_unotify(2)), and the journal of calls that it has delivered.

Theory of operation

Goal: no trapped call is lost or answered wrongly, even if graftd is killed at any instruction.

Facts about the kernel: a notification is delivered once. If its receiver dies before it answers, the kernel does not
deliver it again. But whoever holds the listener and knows the notification's id can still answer.

Solution: notifications are received straight into the journal of their listener. The journal is a memfd of which the
descriptor store has a copy, so the next graftd finds there what the last one had not answered.

A descriptor is injected in two steps: SECCOMP_IOCTL_NOTIF_ADDFD, and then the answer with its number.
SECCOMP_ADDFD_FLAG_SEND would do it in one step, and would save about a quarter of a trapped socket(), but it cannot
be made safe. The kernel marks the call as answered when the request is queued (seccomp_notify_addfd() in
kernel/seccomp.c). If the sender is killed before the target has picked the descriptor up, the kernel withdraws the
request and the call returns 0: the program takes its standard input for a socket. With two steps the call stays
unanswered in between. The journal has the inode of the socket, so a successor sees whether the target got it, and
answers with its number.

What still fails: if all holders of the listener die, the kernel lets the target's trapped calls fail with ENOSYS.
"""

import mmap
import os
import struct
from collections.abc import Collection
from typing import NamedTuple

from graft.trap.listener import ADDFD, NOTIFICATION, RESPONSE, Notification, parse
from graft.trap.spent import SUP_SPENT

# csrc/sup.h: struct sup_shared, one for each listener
SHARED = struct.Struct("=IIIIQIIQQII32sI")
SHARED_SIZE = 128
SHARED_ABI = 2
FLAGS_OFFSET = 24
COUNTED = struct.Struct("=QQ")
COUNTED_OFFSET = 32
NUMBER_OFFSET = 48
SPENT = struct.Struct(f"={SUP_SPENT}I")
TOKEN_OFFSET = 56
SUP_FORWARD, SUP_IDLE, SUP_BIND = 1, 2, 4
SLOT = struct.Struct("=IiQ")  # state, the answer after an injection, inode of what is being injected
INJECTION = struct.Struct("=iQ")
INJECTION_OFFSET = 4
SLOT_FREE, SLOT_HELD, SLOT_FORWARDED = range(3)
ANSWER_NUMBER, ANSWER_PROCEED = -1, -2  # or an errno, 0 for success
SLOT_SIZE = 128
SLOTS = 64
SUP_BESIDE = 4  # listeners that a graft-sup keeps beside its own
EMPTY = bytes(NOTIFICATION.size)
assert NOTIFICATION.size == 80
assert RESPONSE.size == 24
assert ADDFD.size == 24


class Described(NamedTuple):
    """What the head of a journal says: its tenant, its listener's number, if root handed that over, and the token.

    `inode` is the journal's own, by which a second copy of it is recognised. `idle`: as Journal.idle.
    """

    tenant: int
    number: int
    trusted: bool
    token: bytes
    inode: int
    idle: bool


def described(fd: int) -> Described | None:
    """Read the head of a journal that a peer sent; None if @fd is not a journal of this version.

    The peer may be lying: the caller checks the token (Listeners.is_ours). Raises OSError.
    """
    status = os.fstat(fd)
    head = os.pread(fd, SHARED.size, 0)
    if status.st_size != SHARED_SIZE + SLOT_SIZE * SLOTS or len(head) != SHARED.size:
        return None
    fields = SHARED.unpack(head)
    if fields[0] != SHARED_ABI:
        return None
    return Described(fields[1], fields[9], bool(fields[10]), fields[11], status.st_ino, bool(fields[5] & SUP_IDLE))


class Journal:
    """The calls of one listener that were received and not yet answered, in memory that outlives graftd.

    The memory is divided into SLOTS slots of one call each. While a graft-sup runs for the listener, it receives into
    the same memory (csrc/sup.h): then graft-sup alone takes slots. Otherwise the loop's thread of graftd alone does.
    Any thread may release a slot, under the lock of graft/trap/dispatch.py. The states of a slot, who may change
    them, and what a killed owner leaves behind are described at the enum in csrc/sup.h.
    """

    def __init__(self, fd: int | None = None) -> None:
        size = SHARED_SIZE + SLOT_SIZE * SLOTS
        if fd is None:
            fd = os.memfd_create("graft-journal", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
        self.fd = fd
        self.map = mmap.mmap(fd, size)
        self.view = memoryview(self.map)

    def describe(
        self,
        *,
        tenant: int,
        owner: int,
        netns: int,
        home: int,
        forward: bool,
        number: int,
        trusted: bool,
        token: bytes,
        idle: bool = False,
        binds: bool = False,
        maker: tuple[int, int] = (0, 0),
    ) -> None:
        """Write the head: what graft-sup needs to know of the tenant, and by what a later graftd recognises it.

        @owner: the uid of the tenant's sockets. @netns: the inode of the container's netns. @home: of the one
        in which the programs of a direct container live, which has its unix sockets from graft-sup; 0: it is not
        direct. @forward: graft-sup answers no other socket() itself. @token: 32 bytes, see graft/process/key.py.
        @idle: no graft-sup is to run before the first call. @binds: graft-sup prepares the binds of a direct
        container. @maker: the uid and gid as which a firewall of the host shall see the sockets made; 0: as @owner.
        """
        flags = (SUP_FORWARD if forward else 0) | (SUP_IDLE if idle else 0) | (SUP_BIND if binds else 0)
        head = (SHARED_ABI, tenant, owner, home, netns, flags, maker[0], 0, 0, number, trusted, token, maker[1])
        SHARED.pack_into(self.map, 0, *head)

    def renumber(self, number: int, token: bytes) -> None:
        """Write the number that another graftd has given the listener, and the token for that number."""
        struct.pack_into("=I", self.map, NUMBER_OFFSET, number)
        struct.pack_into("=32s", self.map, TOKEN_OFFSET, token)

    def forward(self, every: bool) -> None:
        """Tell graft-sup whether to leave every socket() to graftd (@every), or to answer it itself."""
        self._flag(SUP_FORWARD, every)

    def prepare_binds(self, own: bool) -> None:
        """Tell graft-sup whether to prepare a direct container's binds (@own), or to leave them to graftd."""
        self._flag(SUP_BIND, own)

    def woken(self) -> None:
        """Note that a graft-sup is wanted from now on, because a first call has come."""
        self._flag(SUP_IDLE, False)

    @property
    def idle(self) -> bool:
        """Has no call come yet from a container that is not expected to make one?"""
        return bool(self._flags() & SUP_IDLE)

    def _flags(self) -> int:
        flags: int = struct.unpack_from("=I", self.map, FLAGS_OFFSET)[0]
        return flags

    def _flag(self, flag: int, on: bool) -> None:
        flags = self._flags()
        struct.pack_into("=I", self.map, FLAGS_OFFSET, flags | flag if on else flags & ~flag)

    @property
    def counted(self) -> tuple[int, int]:
        """How many calls graft-sup has answered, and how many nanoseconds they took in all."""
        calls, ns = COUNTED.unpack_from(self.map, COUNTED_OFFSET)
        return calls, ns

    @property
    def spent(self) -> tuple[int, ...]:
        """How many of these took how long: the counts of graft/trap/spent.py."""
        return SPENT.unpack_from(self.map, SHARED.size)

    @staticmethod
    def _at(number: int) -> int:
        return SHARED_SIZE + number * SLOT_SIZE

    def raw(self, number: int) -> memoryview:
        """The 80 bytes of a slot's struct seccomp_notif, writable. The kernel wants them zero before it receives."""
        start = self._at(number) + SLOT.size
        return self.view[start : start + NOTIFICATION.size]

    def take(self) -> "Slot | None":
        """Reserve a slot; None if all are in use. Only the loop's thread calls it, and only without a graft-sup."""
        for number in range(SLOTS):
            if self.map[self._at(number)] == SLOT_FREE:
                SLOT.pack_into(self.map, self._at(number), SLOT_FORWARDED, ANSWER_NUMBER, 0)
                return Slot(self, number)
        return None

    def release(self, number: int) -> None:
        """Free a slot whose call has been answered, and zero its notification."""
        self.raw(number)[:] = EMPTY
        self.injecting(number, 0, ANSWER_NUMBER)
        self._set_state(number, SLOT_FREE)

    def _set_state(self, number: int, state: int) -> None:
        """One byte, written last: a graft-sup takes the slot at once, and a successor believes what is beside it."""
        self.map[self._at(number)] = state

    def injecting(self, number: int, inode: int, answer: int) -> None:
        """Note the inode of the socket that the target is about to get, and what its call returns after that.

        @answer: ANSWER_NUMBER, ANSWER_PROCEED, or an errno.
        """
        INJECTION.pack_into(self.map, self._at(number) + INJECTION_OFFSET, answer, inode)

    def forwarded(self, number: int) -> bool:
        """Does this slot hold a call that graft-sup has left to graftd?"""
        return number < SLOTS and self.map[self._at(number)] == SLOT_FORWARDED

    def pending(self, *, held: bool, besides: Collection[int] = ()) -> list["Pending"]:
        """The received calls that graftd has to answer.

        @held: the graft-sup is dead, so include the calls that it was answering itself. @besides: the numbers of
        slots to skip, because a thread is busy with them and will release them.
        """
        found = []
        for number in range(SLOTS):
            state, answer, inode = SLOT.unpack_from(self.map, self._at(number))
            if number in besides or state == SLOT_FREE or (state == SLOT_HELD and not held):
                continue
            if state == SLOT_HELD:
                answer = ANSWER_NUMBER
                self.injecting(number, inode, answer)
                self._set_state(number, SLOT_FORWARDED)
            call = parse(self.raw(number))
            if call.id:
                found.append(Pending(Slot(self, number), call, inode, answer))
            else:
                self.release(number)  # its holder died while it waited for a call, or while it released the slot
        return found

    def close(self) -> None:
        """Unmap the memory and close its descriptor."""
        self.view.release()
        self.map.close()
        os.close(self.fd)


class Slot(NamedTuple):
    """The place in a journal where one call is kept until it is answered."""

    journal: Journal
    number: int

    def call(self) -> Notification:
        """The call that was received into this slot."""
        return parse(self.journal.raw(self.number))

    def injecting(self, inode: int, answer: int = ANSWER_NUMBER) -> None:
        """Note the socket that the target is about to get (Journal.injecting)."""
        self.journal.injecting(self.number, inode, answer)

    def release(self) -> None:
        """Free this slot (Journal.release)."""
        self.journal.release(self.number)


class Pending(NamedTuple):
    """A received, unanswered call. `inode` is that of the socket being injected, 0 if none; `answer` what follows."""

    slot: Slot
    call: Notification
    inode: int
    answer: int
