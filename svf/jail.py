"""The helper of `svf.sandbox`: a process that shuts one program after another into namespaces of its own.

    trainer ── helper: unprivileged, sees an almost empty file system
                 └── program: process 1 of its user, pid, network, ipc and mount namespaces, so that whatever it
                     started dies with it; forked and never executed anew, so that it starts in milliseconds

What holds a program: the namespaces (no process but its own, no network, no file but the standard library's to read),
a user without any capability, a seccomp filter (no socket, no other program, no further namespace), limits that the
kernel enforces for each process, and the helper's watch over the time and memory of all processes together.

Started by `python -S -P jail.py LIMITS`; reads programs and writes results as lines of JSON. Imports only the
standard library, and nothing of this project.
"""

import ctypes
import errno
import gc
import json
import os
import platform
import random
import resource
import select
import signal
import struct
import sys
import time
import types
from contextlib import suppress
from importlib import import_module
from math import ceil

SYSCALLS = {"x86_64": 0, "aarch64": 1}
"""Column of the numbers below."""
CLONE, CLONE3, PIVOT_ROOT, MOUNT_SETATTR = (56, 220), (435, 435), (155, 41), (442, 442)
FORBIDDEN = {  # what needs a capability is refused anyway
    "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198), "unshare": (272, 97), "setns": (308, 268),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
"""Ways out, ways to the kernel that no program of a reward needs, and memory that no limit counts."""

AUDIT_ARCH = (0xC000003E, 0xC00000B7)
NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
NEW_ANY = 0x7E020080  # also time, cgroup and uts
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH, AT_RECURSIVE = 2, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

FILES = 64
"""File handles of a process."""
LOOK = 0.02
"""Seconds between two looks at what a program uses."""
OUT_OF_MEMORY, OUT_OF_PROCESSES = 201, 202
"""Exit codes for exceptions that name the limit."""
COMMON = """array bisect bz2 calendar cmath collections copy csv dataclasses datetime decimal enum fractions functools
    hashlib heapq inspect io itertools json lzma math numbers operator pprint queue random re statistics string struct
    textwrap threading time traceback types typing unicodedata zlib"""
"""Imported once for all programs, also because the libraries behind some are out of their sight later."""

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps Python's lock, so that it is held after a raw clone too
column = SYSCALLS.get(platform.machine(), 0)


def call(name: str, *arguments: int | bytes | None) -> int:
    """A function of libc; OSError with its name if it fails."""
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if (value := getattr(libc, name)(*words)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return value


def map_ids(inside: int, uid: int, gid: int) -> None:
    """In a new user namespace: be `inside` there, and none but `uid` and `gid` outside."""
    for file, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        with open(f"self/{file}", "w") as handle:
            handle.write(text)


def highest_id(kind: str) -> int:
    """The last user or group that there is here: nobody's, if any is."""
    with open(f"self/{kind}_map") as file:
        return max(int(row.split()[0]) + int(row.split()[2]) - 1 for row in file)


def show(root: str, path: str) -> None:
    """Shows a file or folder at its own place under another root."""
    target = root + path
    os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
    if not os.path.exists(target):
        os.close(os.open(target, os.O_CREAT))
    call("mount", path.encode(), target.encode(), None, MS_BIND | MS_REC, None)


def enter() -> None:
    """Leaves the machine's file system and privileges behind, but for /proc as the working folder, which programs
    have no way back to."""
    if platform.machine() not in SYSCALLS:
        raise OSError(f"the system calls of {platform.machine()} are not known")
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    proc, uid, gid = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY), os.geteuid(), os.getegid()
    os.fchdir(proc)
    nobody = highest_id("uid"), highest_id("gid")
    if uid == 0:
        call("unshare", NEW_NS)
    else:
        call("unshare", NEW_NS | NEW_USER)
        map_ids(0, uid, gid)

    root = "/proc"  # where the new root is put together: it exists everywhere, and nothing shown lies under it
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NODEV | MS_NOEXEC, b"size=1m,mode=755")
    for path in filter(os.path.exists, sys.path):  # -S -P: the standard library and nothing else
        show(root, path)
    show(root, "/dev/null")
    os.mkdir(f"{root}/work")
    os.chdir(root)
    call("syscall", PIVOT_ROOT[column], b".", b".")
    call("umount2", b".", MNT_DETACH)
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, MS_PRIVATE, 0)
    call("syscall", MOUNT_SETATTR[column], 0, b"/", AT_RECURSIVE, attributes, len(attributes))
    os.fchdir(proc)
    os.close(proc)

    if uid == 0:  # limits on processes do not bind root, so that its programs are another user's
        with suppress(PermissionError):  # root of a user namespace may be bound to keep them
            os.setgroups([])
        os.setresgid(*[nobody[1]] * 3)
        os.setresuid(*[nobody[0]] * 3)
        call("prctl", PR_SET_DUMPABLE, 1)  # or its own files in /proc would be root's


def syscall_filter() -> ctypes.Array:
    """The seccomp program (classic BPF) that forbids `FORBIDDEN` to a process and to all that come of it."""
    kill, deny, absent, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x7FFF0000
    number, architecture, flags = 0, 4, 16  # places in struct seccomp_data
    equal, at_least, any_bit = 0x15, 0x35, 0x45

    def load(place: int) -> bytes:
        return struct.pack("HBBI", 0x20, 0, 0, place)

    def give(verdict: int) -> bytes:
        return struct.pack("HBBI", 0x06, 0, 0, verdict)

    def when(test: int, value: int, verdict: int) -> bytes:
        return struct.pack("HBBI", test, 0, 1, value) + give(verdict)

    def unless(test: int, value: int, verdict: int) -> bytes:
        return struct.pack("HBBI", test, 1, 0, value) + give(verdict)

    code = load(architecture) + unless(equal, AUDIT_ARCH[column], kill)
    code += load(number) + when(at_least, 0x40000000, kill)  # x86-64's second table of the same calls
    code += b"".join(when(equal, numbers[column], deny) for numbers in FORBIDDEN.values())
    code += when(equal, CLONE3[column], absent)  # its flags are out of sight; libraries fall back on clone
    code += unless(equal, CLONE[column], allow) + load(flags) + when(any_bit, NEW_ANY, deny) + give(allow)
    return ctypes.create_string_buffer(code, len(code))


FILTER = syscall_filter()


def shut_in(ids: tuple[int, int], limits: types.SimpleNamespace) -> None:
    """Process 1 of new namespaces gives up all it does not need. `ids`: who it is outside."""
    os.setsid()  # a process group is the one thing that would reach out of a pid namespace
    map_ids(1000, *ids)
    size = f"size={limits.files_mb}m,nr_inodes=1000,mode=700"
    call("mount", b"tmpfs", b"/work", b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size.encode())
    os.chdir("/work")
    for kind, limit in (
        (resource.RLIMIT_CPU, ceil(limits.seconds) + 1),
        (resource.RLIMIT_AS, limits.memory_mb << 20),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_FSIZE, limits.files_mb << 20),
        (resource.RLIMIT_SIGPENDING, FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(FILTER) // 8, ctypes.addressof(FILTER)))


def play(program: str, output: int) -> int:
    """This process is the program from here on. Returns its exit code."""
    null = os.open("/dev/null", os.O_RDWR)
    for handle, place in ((null, 0), (output, 1), (null, 2)):
        os.dup2(handle, place)
    os.closerange(3, FILES)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["program.py"]
    code = 0
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), main.__dict__)
    except SystemExit as stop:
        code = stop.code & 0xFF if isinstance(stop.code, int) else int(stop.code is not None)
    except MemoryError:
        code = OUT_OF_MEMORY
    except BlockingIOError:
        code = OUT_OF_PROCESSES
    except BaseException:
        code = 1
    for stream in (sys.stdout, sys.__stdout__):
        with suppress(BaseException):
            stream.flush()
    return code


def used(process: int) -> tuple[float, int]:
    """CPU seconds and bytes of memory of a process and all that came of it."""
    seconds, memory = 0.0, 0
    with suppress(OSError):  # it may end at any moment
        with open(f"{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # from the third on, proc(5)
        seconds = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        memory = int(fields[21]) * resource.getpagesize()
        with suppress(OSError), open(f"{process}/smaps_rollup") as file:  # pages of several are shared out
            memory = next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
        for thread in os.listdir(f"{process}/task"):
            with open(f"{process}/task/{thread}/children") as file:
                for more_seconds, more_memory in map(used, map(int, file.read().split())):
                    seconds, memory = seconds + more_seconds, memory + more_memory
    return seconds, memory


def run(program: str, limits: types.SimpleNamespace) -> dict:
    """Runs a program and says what became of it, as the fields of `svf.sandbox.Result`."""
    source, sink = os.pipe()
    faults, fault = os.pipe()
    ids, started = (os.geteuid(), os.getegid()), time.monotonic()
    flags = NEW_USER | NEW_PID | NEW_NET | NEW_IPC | NEW_NS
    process = call("syscall", CLONE[column], flags | signal.SIGCHLD, 0, 0, 0, 0)
    if process == 0:
        try:
            try:
                shut_in(ids, limits)
            except BaseException as error:
                os.write(fault, str(error).encode())
            else:
                os._exit(play(program, sink))
        finally:
            os._exit(1)
    os.close(sink)
    os.close(fault)
    ended = os.pidfd_open(process)
    events = select.poll()
    events.register(ended, select.POLLIN)
    events.register(source, select.POLLIN)
    output, most, reason, look = bytearray(), limits.output_kb << 10, "", started + LOOK
    while not reason:
        ready = [handle for handle, _ in events.poll(LOOK * 1000)]
        if source in ready:
            output += (chunk := os.read(source, 1 << 16))
            if not chunk:
                events.unregister(source)
            if len(output) > most:
                reason = "output"
        elif ended in ready:
            break
        if (now := time.monotonic()) >= look:
            look = now + LOOK
            seconds, memory = used(process)
            if seconds > limits.seconds or now - started > limits.wall_seconds:
                reason = "time"
            elif memory > limits.memory_mb << 20:
                reason = "memory"
    if reason:
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])  # with it, all of the namespace are gone
    os.close(ended)
    os.close(source)
    if broken := os.read(faults, 1 << 10):
        raise OSError(broken.decode())
    os.close(faults)
    if not reason and code:
        reason = {OUT_OF_MEMORY: "memory", OUT_OF_PROCESSES: "processes"}.get(code, "error")
    return {"ok": not reason, "output": output[:most].decode(errors="replace"), "reason": reason}


def main() -> None:
    limits = types.SimpleNamespace(**json.loads(sys.argv[1]))
    os.environ.clear()
    for name in COMMON.split():
        with suppress(ImportError):  # some Pythons are built without some of them
            import_module(name)
    random.seed(0)  # programs draw the same numbers on every run
    try:
        enter()
        gc.freeze()
        print("{}", flush=True)
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line), limits)), flush=True)
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
