"""Runs Python programs that nobody has read, for code rewards: each alone, shut in, and with little of everything.

`svf/jail.py` is what holds them; here is the trainer's side.
"""

import json
import os
import queue
import select
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

JAIL = Path(__file__).with_name("jail.py")


@dataclass(frozen=True)
class Result:
    """What became of a program."""

    ok: bool
    """It ended with exit status 0, within all limits; be it early, by `os._exit(0)`."""
    output: str
    """Its standard output, cut off at the limit."""
    reason: str
    """Empty if `ok`, else what stopped it: time, memory, output, processes, or error for any other failure. A program
    has a say in this word."""


@dataclass(frozen=True)
class Limits:
    """What a program gets."""

    seconds: float = 2.0
    """CPU time of all its processes together."""
    wall_seconds: float = 6.0
    """Time on the clock."""
    memory_mb: int = 256
    """Address space of each process, the interpreter's own 30 MB included, and resident memory of all together."""
    processes: int = 16
    """Processes and threads at once."""
    files_mb: int = 16
    """Size of its working folder, which is empty, in memory, and gone with it."""
    output_kb: int = 64
    """Its standard output."""


class Sandbox:
    """Runs programs, `jobs` at a time.

        with Sandbox(seconds=1.0) as sandbox:
            good, bad = sandbox.run(["assert sum([1, 2]) == 3", "while True: pass"])

    A program finds Python's standard library and nothing installed beside it, no input, no environment. It may be run
    from any thread, but not after a fork. Raises RuntimeError where the system cannot shut programs in: that takes
    Linux 5.14 on x86-64 or arm64 with user namespaces, as root or as anybody.
    """

    def __init__(
        self,
        seconds: float = Limits.seconds,
        memory_mb: int = Limits.memory_mb,
        wall_seconds: float = Limits.wall_seconds,
        processes: int = Limits.processes,
        files_mb: int = Limits.files_mb,
        output_kb: int = Limits.output_kb,
        jobs: int | None = None,
    ):
        """Of `Limits`; and `jobs`: programs side by side, as many as there are cores if None."""
        self.limits = Limits(seconds, wall_seconds, memory_mb, processes, files_mb, output_kb)
        if min(asdict(self.limits).values()) <= 0 or (jobs is not None and jobs < 1):
            raise ValueError(f"limits and jobs have to be above zero: {self.limits}, jobs={jobs}")
        if sys.platform != "linux":
            raise RuntimeError(f"untrusted programs can be shut in on Linux only, not on {sys.platform}")
        jobs = jobs or len(os.sched_getaffinity(0))
        self._owner, self._idle, self._threads = os.getpid(), queue.SimpleQueue(), ThreadPoolExecutor(jobs)
        helpers = [Helper(self.limits) for _ in range(jobs)]
        self.close = weakref.finalize(self, end, self._threads, helpers)
        """Ends the helpers. Also done when the sandbox is forgotten, and at exit."""
        try:
            for helper in helpers:
                helper.hear()
                self._idle.put(helper)
            for _ in range(3):  # a busy machine may be too slow for short limits
                trial = self.run([TRIAL.format(**asdict(self.limits))])[0]
                if trial.reason != "time":
                    break
            if not trial.ok:
                raise RuntimeError(f"{NOT_HERE} (in a trial run {trial.output.strip() or trial.reason})")
        except RuntimeError:
            self.close()
            raise

    def run(self, programs: Sequence[str]) -> list[Result]:
        """Results in the order of `programs`, of which equal ones are run once. Raises RuntimeError if the system
        has come to refuse a new process or namespace, which no program can bring about."""
        if os.getpid() != self._owner or not self.close.alive:
            raise RuntimeError("this sandbox is closed, or belongs to the process that was forked")
        unlike = list(dict.fromkeys(programs))
        results = dict(zip(unlike, self._threads.map(self._run, unlike), strict=True))
        return [results[program] for program in programs]

    def _run(self, program: str) -> Result:
        helper = self._idle.get()
        try:
            return helper.run(program)
        finally:
            self._idle.put(helper)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Gone(RuntimeError):
    """A helper does not answer."""


class Helper:
    """A process that runs one program after another, and is replaced should anything have killed it."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.start()

    def start(self) -> None:
        # An environment with nothing to find in it; libraries of some Pythons are found by this one variable.
        environment = {"PYTHONHASHSEED": "0"} | {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-P", str(JAIL), json.dumps(asdict(self.limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env=environment,
            start_new_session=True,  # Ctrl-C is the trainer's
        )

    def hear(self) -> dict:
        """The next answer. Raises Gone if none comes, RuntimeError if programs cannot be shut in."""
        ready = select.poll()
        ready.register(self.process.stdout, select.POLLIN)
        line = self.process.stdout.readline() if ready.poll((self.limits.wall_seconds + 60) * 1000) else ""
        if not line:
            raise Gone(f"{NOT_HERE} (the helper is gone)")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{NOT_HERE} ({answer['error']})")
        return answer

    def run(self, program: str) -> Result:
        try:
            self.process.stdin.write(json.dumps(program) + "\n")
            self.process.stdin.flush()
            return Result(**self.hear())
        except (Gone, OSError):  # killed for want of memory, say: then the program was the reason
            self.stop()
            self.start()
            self.hear()
            return Result(False, "", "error")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def end(threads: ThreadPoolExecutor, helpers: list[Helper]) -> None:
    threads.shutdown()
    for helper in helpers:
        helper.stop()


NOT_HERE = (
    "programs cannot be shut in here, which takes Linux 5.14 or newer on x86-64 or arm64 with user namespaces allowed: "
    "in a container by its seccomp profile, on Debian and Ubuntu by sysctl kernel.unprivileged_userns_clone=1 and "
    "kernel.apparmor_restrict_unprivileged_userns=0"
)

TRIAL = """
import os, socket, time

def refused(name, action, *arguments):
    try:
        action(*arguments)
    except (OSError, MemoryError):
        return
    print("a program could", name)
    raise SystemExit(1)

if os.getpid() != 1 or os.getuid() == 0 or os.environ or os.listdir() or os.path.exists("/etc"):
    print("a program was not alone")
    raise SystemExit(1)
refused("use its capabilities", os.chroot, "/")
refused("open a socket", socket.socket)
refused("write outside of its folder", open, "/file", "w")
refused("take more memory", bytearray, {memory_mb} << 20)

def crowd():
    for _ in range({processes}):
        if os.fork() == 0:
            time.sleep(60)

refused("start more processes", crowd)
"""
"""Run by every new sandbox, so that one that holds nothing is never used."""
