"""libseccomp(3) by ctypes, as runc and crun use it, and the classic BPF that it makes, executed."""

import ctypes
import os
import struct
import tempfile
from typing import Any

from graft.kernel.architecture import HERE

ARCHITECTURES = {
    "SCMP_ARCH_X86_64": 0xC000003E,
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_X32": 0x4000003E,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
    "SCMP_ARCH_ARM": 0x40000028,
}
OPERATORS = ("", "NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")
ACTIONS = {
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_NOTIFY": 0x7FC00000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_KILL": 0,
}
NAMES = {value >> 16: name.removeprefix("SCMP_ACT_") for name, value in ACTIONS.items()}

Program = list[tuple[int, int, int, int]]


class _Compare(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def _library() -> Any:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def _action(name: str, error: int | None) -> int:
    return ACTIONS[name] | ((1 if error is None else error) if name == "SCMP_ACT_ERRNO" else 0)


def build(profile: dict[str, Any]) -> Program:
    """The program that runc's libseccomp makes of an OCI profile. Raises OSError where runc fails."""
    library = _library()
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    try:
        for name in profile.get("architectures") or ():
            library.seccomp_arch_add(context, ctypes.c_uint32(ARCHITECTURES[name]))
        for rule in profile["syscalls"]:
            action = _action(rule["action"], rule.get("errnoRet"))
            if action == default:
                continue
            for name in rule["names"]:
                number = library.seccomp_syscall_resolve_name(name.encode())
                for group in _groups(rule.get("args") or []):
                    compare = (_Compare * max(1, len(group)))(*map(_compare, group))
                    args = (context, ctypes.c_uint32(action), number, len(group), compare)
                    error = library.seccomp_rule_add_array(*args)
                    if error:
                        raise OSError(-error, f"{name} {group}: {os.strerror(-error)}")
        with tempfile.TemporaryFile() as file:
            assert library.seccomp_export_bpf(context, file.fileno()) == 0
            file.seek(0)
            return list(struct.iter_unpack("=HBBI", file.read()))
    finally:
        library.seccomp_release(context)


def _groups(args: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    indexes = [a["index"] for a in args]
    return [[a] for a in args] if len(set(indexes)) < len(indexes) else [args]


def _compare(arg: dict[str, Any]) -> _Compare:
    operator = OPERATORS.index(arg["op"].removeprefix("SCMP_CMP_"))
    return _Compare(arg["index"], operator, arg["value"], arg.get("valueTwo", 0))


def verdict(program: Program, number: int, *args: int, arch: int = HERE.audit) -> str:
    """What the kernel would do with a call: ALLOW, NOTIFY, ERRNO 13, ..."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *(*args, 0, 0, 0, 0, 0, 0)[:6])
    at = accumulator = 0
    scratch = [0] * 16
    while True:
        code, true, false, k = program[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x06:
            name = NAMES.get(k >> 16, hex(k))
            return f"{name} {k & 0xFFFF}" if name == "ERRNO" else name
        elif code == 0x05:
            at += k
        elif code in (0x15, 0x25, 0x35, 0x45):
            taken = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: accumulator & k}
            at += true if taken[code] else false
        elif code == 0x54:
            accumulator &= k
        elif code == 0x02:
            scratch[k] = accumulator
        elif code == 0x60:
            accumulator = scratch[k]
        else:
            raise AssertionError(f"instruction {code:#x}")
