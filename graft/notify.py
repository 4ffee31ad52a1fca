"""The notification descriptor (seccomp_unotify(2)): receive, still valid, add a descriptor, answer.

A received notification is delivered once. If graftd dies before it answers, the kernel does not deliver
it again, but whoever holds the descriptor and knows the id can still answer. So notifications are received
straight into the journal of their listener, a memfd that the keeper holds: the next graftd finds them there.

A descriptor is injected in two steps, ADDFD and then the answer with its number. SECCOMP_ADDFD_FLAG_SEND would
do it in one and saves about a quarter of a trapped socket(), but it cannot be made safe: the kernel marks
the call as answered when the request is queued (kernel/seccomp.c, seccomp_notify_addfd), and if the sender is
killed before the target has picked the descriptor up, the request is withdrawn and the call returns 0. The
program then takes its standard input for a socket. In two steps the call stays unanswered; the journal has
the inode of the socket, by which a successor sees whether the target got it, and answers with its number.
"""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Collection
from typing import NamedTuple

from graft import linux

NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif with its seccomp_data
RESPONSE = struct.Struct("=QqiI")
ADDFD = struct.Struct("=QIIII")

# csrc/sup.h: struct sup_shared, one a listener
SHARED = struct.Struct("=IIIIQIIQQII32s")
SHARED_SIZE = 128
SHARED_ABI = 2
FLAGS_OFFSET = 24
COUNTED = struct.Struct("=QQ")
COUNTED_OFFSET = 32
NUMBER_OFFSET = 48
TOKEN_OFFSET = 56
SUP_FORWARD = 1
SLOT = struct.Struct("=IiQ")  # state, the answer after an injection, inode of what is being injected
INJECTION = struct.Struct("=iQ")
INJECTION_OFFSET = 4
SLOT_FREE, SLOT_HELD, SLOT_FORWARDED = range(3)
ANSWER_NUMBER, ANSWER_PROCEED = -1, -2  # else an errno, 0 for success
SLOT_SIZE = 128
SLOTS = 64
EMPTY = bytes(NOTIFICATION.size)
assert NOTIFICATION.size == 80
assert RESPONSE.size == 24
assert ADDFD.size == 24


class Notification(NamedTuple):
    """One trapped call. `pid` is the thread's, in the reader's pid namespace."""

    id: int
    pid: int
    nr: int
    arch: int
    args: tuple[int, ...]


def parse(raw: bytes | bytearray | memoryview) -> Notification:
    """struct seccomp_notif, 80 bytes."""
    fields = NOTIFICATION.unpack(raw)
    return Notification(fields[0], fields[1], fields[3], fields[4], fields[6:])


class Described(NamedTuple):
    """Whose a journal is: the head of its memory."""

    tenant: int
    number: int
    trusted: bool
    token: bytes
    inode: int


def described(fd: int) -> Described | None:
    """What a journal that somebody brings says of itself; None for anything that is none of this version's.

    Raises OSError.
    """
    status = os.fstat(fd)
    head = os.pread(fd, SHARED.size, 0)
    if status.st_size != SHARED_SIZE + SLOT_SIZE * SLOTS or len(head) != SHARED.size:
        return None
    fields = SHARED.unpack(head)
    if fields[0] != SHARED_ABI:
        return None
    return Described(fields[1], fields[9], bool(fields[10]), fields[11], status.st_ino)


class Journal:
    """A listener's calls that were received and not yet answered, in memory that outlives graftd.

    graft-sup receives into the same memory where it runs (csrc/sup.h): then the slots are its to take.
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
        flags6: int,
        netns: int,
        forward: bool,
        number: int,
        trusted: bool,
        token: bytes,
    ) -> None:
        """What graft-sup has to know of the listener's tenant, and a graftd that finds nothing but graft-sup."""
        flags = SUP_FORWARD if forward else 0
        head = (SHARED_ABI, tenant, owner, flags6, netns, flags, 0, 0, 0, number, trusted, token)
        SHARED.pack_into(self.map, 0, *head)

    def renumber(self, number: int, token: bytes) -> None:
        """Another graftd has another number for the listener."""
        struct.pack_into("=I", self.map, NUMBER_OFFSET, number)
        struct.pack_into("=32s", self.map, TOKEN_OFFSET, token)

    def forward(self, every: bool) -> None:
        """Is graft-sup to leave every call to graftd?"""
        struct.pack_into("=I", self.map, FLAGS_OFFSET, SUP_FORWARD if every else 0)

    @property
    def counted(self) -> tuple[int, int]:
        """The calls that graft-sup has answered, and the nanoseconds that they took."""
        calls, ns = COUNTED.unpack_from(self.map, COUNTED_OFFSET)
        return calls, ns

    @staticmethod
    def _at(number: int) -> int:
        return SHARED_SIZE + number * SLOT_SIZE

    def raw(self, number: int) -> memoryview:
        """The notification part of a slot."""
        start = self._at(number) + SLOT.size
        return self.view[start : start + NOTIFICATION.size]

    def take(self) -> "Slot | None":
        """Reserve a slot, where no graft-sup takes any; None if all are in use."""
        for number in range(SLOTS):
            if self.map[self._at(number)] == SLOT_FREE:
                SLOT.pack_into(self.map, self._at(number), SLOT_FORWARDED, ANSWER_NUMBER, 0)
                return Slot(self, number)
        return None

    def release(self, number: int) -> None:
        """Forget an answered notification."""
        self.raw(number)[:] = EMPTY
        SLOT.pack_into(self.map, self._at(number), SLOT_FREE, ANSWER_NUMBER, 0)

    def injecting(self, number: int, inode: int, answer: int) -> None:
        """Note which socket the target is about to get, and what its call returns then."""
        INJECTION.pack_into(self.map, self._at(number) + INJECTION_OFFSET, answer, inode)

    def forwarded(self, number: int) -> bool:
        """Is there a call in this slot that graft-sup has left to graftd?"""
        return number < SLOTS and self.map[self._at(number)] == SLOT_FORWARDED

    def pending(self, *, held: bool, besides: Collection[int] = ()) -> list["Pending"]:
        """What was received and is graftd's to answer; with @held also what a graft-sup that is dead had.

        @besides: slots that somebody is busy with, and releases.
        """
        found = []
        for number in range(SLOTS):
            state, answer, inode = SLOT.unpack_from(self.map, self._at(number))
            if number in besides or state == SLOT_FREE or (state == SLOT_HELD and not held):
                continue
            if state == SLOT_HELD:
                answer = ANSWER_NUMBER
                SLOT.pack_into(self.map, self._at(number), SLOT_FORWARDED, answer, inode)
            call = parse(self.raw(number))
            if call.id:
                found.append(Pending(Slot(self, number), call, inode, answer))
            else:
                self.release(number)  # whoever had it died while it waited for a call, or was releasing it
        return found

    def close(self) -> None:
        """Let the memory go."""
        self.view.release()
        self.map.close()
        os.close(self.fd)


class Slot(NamedTuple):
    """Where a call is kept until it is answered."""

    journal: Journal
    number: int

    def call(self) -> Notification:
        """The call that was received into it."""
        return parse(self.journal.raw(self.number))

    def injecting(self, inode: int, answer: int = ANSWER_NUMBER) -> None:
        """See Journal."""
        self.journal.injecting(self.number, inode, answer)

    def release(self) -> None:
        """See Journal."""
        self.journal.release(self.number)


class Pending(NamedTuple):
    """A received and unanswered notification. `inode` of the socket under way, 0 if none was."""

    slot: Slot
    call: Notification
    inode: int
    answer: int


class Listener:
    """One notification descriptor. `number` names it in the descriptor store."""

    def __init__(self, fd: int, number: int) -> None:
        self.fd = fd
        self.number = number
        try:
            # 6.6 and later: wake the waiting side on this CPU; 40 to 56 of 110 us of a trapped socket()
            fcntl.ioctl(fd, linux.SECCOMP_IOCTL_NOTIF_SET_FLAGS, linux.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise

    def receive(self, buffer: memoryview) -> bool:
        """Receive into @buffer (80 zero bytes); False if the target is gone by now."""
        try:
            fcntl.ioctl(self.fd, linux.SECCOMP_IOCTL_NOTIF_RECV, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return False
            raise
        return True

    def valid(self, notification_id: int) -> bool:
        """Is the target still waiting for this answer?"""
        try:
            fcntl.ioctl(self.fd, linux.SECCOMP_IOCTL_NOTIF_ID_VALID, struct.pack("=Q", notification_id))
        except OSError:
            return False
        return True

    def answer(self, notification_id: int, value: int = 0, error: int = 0, flags: int = 0) -> bool:
        """Return @value, or fail with errno @error; False if the target is gone."""
        sent = self._send(linux.SECCOMP_IOCTL_NOTIF_SEND, RESPONSE.pack(notification_id, value, -error, flags))
        return sent is not None

    def proceed(self, notification_id: int) -> bool:
        """Let the call run in the target as it stands."""
        return self.answer(notification_id, flags=linux.SECCOMP_USER_NOTIF_FLAG_CONTINUE)

    def inject(self, notification_id: int, fd: int, newfd_flags: int, number: int | None = None) -> int | None:
        """Install @fd in the target; its number there, None if the target is gone. The call still waits.

        With @number it takes that place, of whatever is there. Raises OSError: EMFILE if the target's table
        is full, EBADF if @number is beyond its limit.
        """
        flags = 0 if number is None else linux.SECCOMP_ADDFD_FLAG_SETFD
        message = ADDFD.pack(notification_id, flags, fd, number or 0, newfd_flags)
        return self._send(linux.SECCOMP_IOCTL_NOTIF_ADDFD, message)

    def _send(self, request: int, message: bytes) -> int | None:
        while True:
            try:
                result: int = fcntl.ioctl(self.fd, request, bytearray(message))
                return result
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                if error.errno in (errno.ENOENT, errno.EINPROGRESS):
                    return None
                raise
