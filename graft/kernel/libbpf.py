"""The system's libbpf, by ctypes: the functions that graft calls, and what libbpf complains of."""

import ctypes
import hashlib
import os
from collections import deque
from pathlib import Path

from graft.errors import Failure
from graft.kernel.linux import libc

OBJECT = Path(__file__).parents[1] / "graft.bpf.o"
TUNNELS_OBJECT = OBJECT.with_name("graft-tunnels.bpf.o")  # what not every kernel loads
ENTRANCE_OBJECT = OBJECT.with_name("graft-entrance.bpf.o")  # what each container's netns has a copy of


def libbpf_functions() -> ctypes.CDLL:
    """libbpf with the signatures of what graft calls of it (libbpf.h). Raises Failure if it is not installed."""
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise Failure("libbpf.so.1 is not installed", hint="apt-get install libbpf1") from None
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("bpf_object__open_file", pointer, (text, pointer)),
        ("bpf_object__load", ctypes.c_int, (pointer,)),
        ("bpf_object__close", None, (pointer,)),
        ("bpf_object__find_map_by_name", pointer, (pointer, text)),
        ("bpf_object__next_program", pointer, (pointer, pointer)),
        ("bpf_map__set_pin_path", ctypes.c_int, (pointer, text)),
        ("bpf_map__value_size", ctypes.c_uint32, (pointer,)),
        ("bpf_map__reuse_fd", ctypes.c_int, (pointer, ctypes.c_int)),
        ("bpf_map__fd", ctypes.c_int, (pointer,)),
        ("bpf_program__name", text, (pointer,)),
        ("bpf_program__insns", pointer, (pointer,)),
        ("bpf_program__insn_cnt", ctypes.c_size_t, (pointer,)),
        ("bpf_program__attach", pointer, (pointer,)),
        ("bpf_program__attach_cgroup", pointer, (pointer, ctypes.c_int)),
        ("bpf_program__attach_netns", pointer, (pointer, ctypes.c_int)),
        ("bpf_program__pin", ctypes.c_int, (pointer, text)),
        ("bpf_link__pin", ctypes.c_int, (pointer, text)),
        ("bpf_link__destroy", ctypes.c_int, (pointer,)),
        ("libbpf_set_print", pointer, (pointer,)),
        ("ring_buffer__new", pointer, (ctypes.c_int, pointer, pointer, pointer)),
        ("ring_buffer__epoll_fd", ctypes.c_int, (pointer,)),
        ("ring_buffer__consume", ctypes.c_int, (pointer,)),
        ("ring_buffer__free", None, (pointer,)),
    ):
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib


PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
complaints: deque[str] = deque(maxlen=100)


def _collect(level: int, text: bytes, arguments: int) -> int:
    if level == 0:  # LIBBPF_WARN; the verifier's log comes with this level
        line = ctypes.create_string_buffer(65536)
        libc.vsnprintf(line, ctypes.c_size_t(len(line)), text, ctypes.c_void_p(arguments))
        complaints.extend(line.value.decode(errors="replace").splitlines())
    return 0


print_callback = PRINT(_collect)


def verdict() -> str:
    """What the verifier said last of a program that it refused; "" if it has refused none."""
    lines = list(complaints)
    ends = [at for at, line in enumerate(lines) if at and line.startswith("processed ")]
    return lines[ends[-1] - 1] if ends else ""


def object_hash() -> str:
    """The first 16 hex digits of the SHA-256 of the compiled objects. Raises Failure if one is not built."""
    sum_ = hashlib.sha256()
    for part in (OBJECT, TUNNELS_OBJECT, ENTRANCE_OBJECT):
        if not part.exists():
            raise Failure(f"{part} is not built", hint="run 'make build'")
        sum_.update(part.read_bytes())
    return sum_.hexdigest()[:16]


def open_object(lib: ctypes.CDLL, path: Path) -> int:
    """The handle of the BPF object at @path, for bpf_object__load() and _close(). Raises Failure."""
    handle: int | None = lib.bpf_object__open_file(os.fsencode(path), None)
    if not handle:
        raise Failure(f"{path} is not a BPF object", hint="run 'make clean build'")
    return handle


def try_load(path: Path = OBJECT) -> int:
    """Load the programs of an object, attach and pin nothing, and return how many there are.

    Raises Failure or OSError.
    """
    lib = libbpf_functions()
    lib.libbpf_set_print(print_callback)
    handle = open_object(lib, path)
    try:
        result = lib.bpf_object__load(handle)
        if result:
            raise OSError(-result, f"the kernel refuses the BPF programs: {os.strerror(-result)}")
        count, program = 0, None
        while program := lib.bpf_object__next_program(handle, program):
            count += 1
        return count
    finally:
        lib.bpf_object__close(handle)
