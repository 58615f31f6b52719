"""Programs that try everything, and what becomes of them and of the trainer.

They run in a process of their own with limits on it, and are mild: none starts more than 256 processes, takes more
than 2 GiB or lasts longer than a minute, so that a sandbox that held nothing would cost a failed test only.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from svf import sandbox as module
from svf.sandbox import Result, Sandbox

SPACES = {"user", "pid", "net", "ipc", "mnt"}
LIMITS = {"seconds": 0.7, "wall_seconds": 2.5, "memory_mb": 128, "processes": 12, "files_mb": 4, "output_kb": 32}

BEFORE = '''
import ctypes, os, signal, socket, sys, time
end, libc = time.time() + 20, ctypes.CDLL(None)
def tries(action, *what):
    """Prints what it worked with."""
    worked = []
    for x in what:
        try:
            action(x)
            worked.append(x)
        except (OSError, ValueError):
            pass
    print(worked)
'''

# Each: "### name: what stops it: what it puts out", both empty for a good end without output, "?" for anything.
PROGRAMS = r"""
### right program: : 2
assert sorted([2, 1]) == [1, 2]
print(2)
### modules, also some that are not loaded yet: : 2 __main__
import calendar, math, shelve, urllib.parse
print(math.gcd(4, 6), __name__)
### classes: : 3
import dataclasses, pickle
@dataclasses.dataclass
class A:
    x: int
print(pickle.loads(pickle.dumps(A(3))).x)
### early exit: : 1
print(1)
sys.exit()
### threads: : [0, 1, 2]
import threading
seen = []
threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
print(sorted(seen))
### a child: : 2 3
if (child := os.fork()) == 0:
    sys.exit(3)
print(child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
### asyncio: : 5
import asyncio
async def f():
    await asyncio.sleep(0)
    return 5
print(asyncio.run(f()))
### its folder: : ['a'] 1000
open("a", "w").write("x" * 1000)
print(os.listdir(), os.path.getsize("a"))
### closed standard output: : seen
print("seen", flush=True)
sys.stdout.close()
os.close(1)

### no environment: : {} ['program.py'] /work []
print(dict(os.environ), sys.argv, os.getcwd(), os.listdir())
### no handle and no input: : [0, 1, 2] ''
tries(os.fstat, *range(1000))
print(repr(sys.stdin.read()))
### nobody: : (1000, 1000, 1000) 1 0
print(os.getresuid(), os.getpid(), os.getppid())
### no folder of the machine: : []
print(sorted(set(os.listdir("/")) & {"etc", "proc", "sys", "tmp", "home", "var", "run"}))

### wrong: error:
assert sorted([2, 1]) == [2, 1]
### exit 3: error:
sys.exit(3)
### exit with a text: error:
sys.exit("no")
### syntax: error:
def
### no input: error:
input()
### crash: error:
ctypes.string_at(0)
### abort: error:
os.abort()
### recursion: error:
def f():
    return f()
f()
### recursion in C: ?:
sys.setrecursionlimit(10**9)
class A:
    def __getattr__(self, name):
        return getattr(self, name + "x")
A().x
### nested source: ?:
eval("(" * 100_000)

### endless loop: time:
while time.time() < end: pass
### sleep: time: z
print("z", flush=True)
time.sleep(60)
### burning children: time:
for _ in range(3):
    if os.fork() == 0:
        while time.time() < end: pass
[os.wait() for _ in range(3)]
### deaf to signals: time:
for n in set(range(1, 32)) - {9, 19}:
    signal.signal(n, signal.SIG_IGN)
while time.time() < end: pass
### loop in C: time:
9 ** 9 ** 8

### memory: memory:
bytearray(1 << 30)
### memory, little by little: memory:
x = []
while len(x) < 2000:
    x.append(bytearray(1 << 20))
### memory of many: memory:
for _ in range(6):
    if os.fork() == 0:
        x = bytearray(os.urandom(1) * (40 << 20))
        time.sleep(60)
[os.wait() for _ in range(6)]
### memory that is not a process's: : -1 -1
print(libc.shmget(0, 1 << 20, 0o1600), libc.memfd_create(b"x", 0))
### raised limits: : []
import resource
tries(lambda n: resource.setrlimit(n, (10**12, 10**12)), resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC,
      resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)

### fork bomb: processes:
for _ in range(100): os.fork()
time.sleep(60)
### fork bomb that goes on: time:
for _ in range(8):
    try:
        os.fork()
    except OSError:
        pass
while time.time() < end: pass
### threads without end: error:
import threading
for _ in range(64):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
### daemon: : left
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(15, signal.SIG_IGN)
        time.sleep(60)
    os._exit(0)
os.wait()
print("left")
### zombies: processes:
for _ in range(40):
    if os.fork() == 0: os._exit(0)

### reading: : []
tries(lambda path: open(path, "rb").read(1), "/etc/shadow", "/etc/passwd", SECRET, "/proc/1/environ",
      "/proc/self/environ", "/dev/mem", "/dev/vda", "/dev/sda", "/dev/tty", "../../etc/passwd", "/work/../etc/passwd")
### writing: : []
tries(lambda path: open(path, "w"), "/file", "/tmp/file", "/dev/shm/file", SECRET, "/dev/file", "../file", os.__file__,
      os.path.dirname(os.__file__) + "/new.py")
### ways round: : [] [] []
os.symlink("/etc", "etc")
tries(os.listdir, "etc"); tries(os.chroot, "/"); tries(lambda path: os.mknod(path, 0o20666, 259), "device")
### huge file: error:
with open("a", "wb") as f:
    for _ in range(200): f.write(bytes(1 << 20))
### many files: error:
for n in range(100): open(str(n), "wb").write(bytes(1 << 20))
### empty files: error:
for n in range(5000): open(str(n), "w").close()
### left behind: : ['left']
open("/work/left", "w").write("x")
print(os.listdir("/work"))
### found: : []
print(os.listdir("/work"))

### signals: : []
tries(lambda process: os.kill(process, 9), TRAINER, 2, 3, 100)
### signal to all: ?: ?
os.kill(-1, 9)
### signal to its group: ?: ?
os.kill(0, 9)
### signal to the group above: ?: ?
os.killpg(0, 15)
### sockets: : []
import itertools
tries(lambda what: socket.socket(*what), *itertools.product((1, 2, 10, 16, 17, 38, 40), (1, 2, 3, 5)))
### other programs: : []
open("x", "w").write("#!/bin/sh\n")
os.chmod("x", 0o700)
tries(lambda path: os.execv(path, [path]), "./x", "/bin/sh", "/usr/bin/python3", sys.executable)
### namespaces: : [-1, -1, -1, -1, -1]
print([libc.unshare(0x10000000), libc.unshare(0x20000), libc.unshare(0x40000000), libc.setns(0, 0),
       libc.syscall(56 if os.uname().machine == "x86_64" else 220, 0x10000011, 0, 0, 0, 0)])
### kernel: : [-1, -1, -1, -1]
print([libc.syscall(435, 0, 0), libc.syscall(425, 1, 0), libc.ptrace(0, 0, 0, 0),
       libc.mount(b"x", b"/work", b"tmpfs", 0, None)])
### becoming root: : [] [] [] [] []
tries(os.setuid, 0); tries(os.setgid, 0); tries(os.setgroups, (0,)); tries(os.nice, -1); tries(socket.sethostname, "x")

### output flood: output: ?
for _ in range(10**6): print("x" * 99)
### flood of a child: output: ?
if os.fork() == 0:
    for _ in range(10**6): print("y" * 99)
os.wait()
### no text: : �A
os.write(1, bytes([255, 65]))
"""
CASES = {
    name.strip(): (program, reason.strip(), output.strip())
    for name, reason, output, program in re.findall(r"### (.*?):(.*?):(.*?)\n(.*?)(?=\n###|\Z)", PROGRAMS, re.S)
}

TRAINER = """
import importlib.util, json, os, sys, time
from pathlib import Path

file, secret, limits, programs = json.load(sys.stdin)
spec = importlib.util.spec_from_file_location("sandbox", file)
sandbox = sys.modules["sandbox"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
os.environ["PASSWORD"] = "x"
try:
    box = sandbox.Sandbox(**limits, jobs=2)
except RuntimeError as error:
    sys.exit(str(error))
names = f"SECRET, TRAINER = {secret!r}, {os.getpid()}\\n"
mark = str(limits["wall_seconds"]).encode()
running = lambda: sorted(str(path) for path in Path("/proc").glob("[0-9]*/cmdline") if mark in path.read_bytes())
seen = [running()]
results = box.run([names + program for program in programs])
seen.append(running())
box.close()
seen.append(running())
print(json.dumps({"results": [(r.ok, r.output, r.reason) for r in results], "running": seen}))
"""


def python_for_all() -> str | None:
    """An interpreter that any user may run."""
    for path in filter(None, (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin"))):
        test = [path, "-c", "import sys; print(sys.version_info >= (3, 11))"]
        with suppress(OSError):
            if subprocess.run(test, capture_output=True, user=54321, check=False).stdout == b"True\n":
                return path
    return None


def skip_if_refused(words: str) -> None:
    """Where the kernel does not let anything be shut in; not where something it let in is not held."""
    if module.NOT_HERE in words and "in a trial run" not in words:
        pytest.skip(words)


def sandbox(**limits) -> Sandbox:
    try:
        return Sandbox(**limits)
    except RuntimeError as error:
        skip_if_refused(str(error))
        raise


def within_limits() -> None:
    resource.setrlimit(resource.RLIMIT_NPROC, (2000, 2000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))


@pytest.fixture(scope="module", params=["this user", "another user"])
def outcome(request):
    """What became of all programs, run by root or an ordinary user, and how many processes were left."""
    python, who = sys.executable, {}
    if request.param == "another user":
        if os.geteuid() != 0:
            pytest.skip("only root can start a process as another user")
        if not (python := python_for_all()):
            pytest.skip("no Python here that another user may run")
        who = {"user": 54321, "group": 54321, "extra_groups": []}
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to other users
    folder.chmod(0o755)
    request.addfinalizer(lambda: shutil.rmtree(folder))
    files = [Path(shutil.copy(path, folder)) for path in (module.__file__, module.JAIL)]
    secret = folder / "secret"
    secret.write_text("the trainer's")
    for path in (*files, secret):
        path.chmod(0o644)
    limits = LIMITS | {"wall_seconds": LIMITS["wall_seconds"] + os.getpid() * 1e-9}  # a mark of this run
    programs = [BEFORE + program for program, _, _ in CASES.values()]
    with subprocess.Popen(
        [python, "-c", TRAINER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        preexec_fn=within_limits,
        start_new_session=True,
        **who,
    ) as trainer:
        try:
            out, err = trainer.communicate(json.dumps([str(files[0]), str(secret), limits, programs]), timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(trainer.pid, signal.SIGKILL)
    skip_if_refused(err)
    assert trainer.returncode == 0, err
    assert secret.read_text() == "the trainer's"
    found = json.loads(out)
    return dict(zip(CASES, (Result(*result) for result in found["results"]), strict=True)), found["running"]


@pytest.mark.parametrize("name", CASES)
def test_outcome(outcome, name):
    result, (_, reason, output) = outcome[0][name], CASES[name]
    assert result.ok == (result.reason == "")
    if reason != "?":
        assert result.reason == reason, result
    if output != "?":
        assert result.output.split() == output.split()
    assert len(result.output) <= LIMITS["output_kb"] << 10


def test_nothing_is_left(outcome):
    before, after, closed = outcome[1]
    assert len(before) == 2 and after == before  # the same two helpers and nothing else
    assert closed == []


@pytest.fixture(scope="module")
def box():
    with sandbox(wall_seconds=20.0, jobs=1) as box:
        yield box


def test_equal_programs_run_once_and_results_keep_the_order(box):
    random = "import os; print(os.urandom(8).hex())"
    one, two, three, four = box.run([random, "print(1)", random, random + " "])
    assert one is three and two.output == "1\n" and one.output != four.output
    assert box.run([]) == []
    assert box.run([random])[0].output != one.output


def test_a_program_is_as_repeatable_as_it_can_be(box):
    draws = "import random; print(random.random(), hash('x'), list({'a', 'b', 'c', 'd'}))"
    with sandbox(jobs=1) as other:
        assert box.run([draws])[0].output == other.run([draws])[0].output


def test_an_early_exit_counts_as_good(box):
    """Said in the docstring of Result: a checker that appends tests has to see that they were reached."""
    assert box.run(["import os; os._exit(0); assert False"])[0] == Result(True, "", "")


def test_seen_from_outside(box):
    helper = box._idle.get()
    box._idle.put(helper)
    thread = threading.Thread(target=box.run, args=(["import time; time.sleep(60)"],))
    thread.start()
    children = Path(f"/proc/{helper.process.pid}/task/{helper.process.pid}/children")
    status = {}
    while status.get("Seccomp") != "2":  # the last thing to be taken from it
        time.sleep(0.01)
        if child := children.read_text().split():
            status = dict(line.split(":\t") for line in Path(f"/proc/{child[0]}/status").read_text().splitlines())
    spaces = {name: [os.readlink(f"/proc/{p}/ns/{name}") for p in (child[0], "self")] for name in SPACES}
    os.kill(int(child[0]), signal.SIGKILL)
    thread.join()
    assert {name for name, (theirs, ours) in spaces.items() if theirs != ours} == SPACES
    assert "0" not in status["Uid"].split() + status["Gid"].split()
    assert {status[f"Cap{kind}"] for kind in ("Prm", "Eff", "Inh", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


def test_time_is_that_of_all_processes():
    """Three children burn a second each, which no limit on one process forbids; the clock has thirty."""
    program = """if True:
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                while time.process_time() < 1: pass
                os._exit(0)
        for _ in range(3): os.wait()
    """
    with sandbox(seconds=0.3, wall_seconds=30.0, jobs=1) as box:
        assert box.run([program]) == [Result(False, "", "time")]


def test_a_helper_that_was_killed_is_replaced(box):
    helper = box._idle.get()
    box._idle.put(helper)
    helper.process.kill()
    helper.process.wait()
    assert box.run(["print(1)"]) == [Result(False, "", "error")]
    assert box.run(["print(1) "]) == [Result(True, "1\n", "")]


def test_not_after_a_fork_nor_closed(box):
    if (child := os.fork()) == 0:
        try:
            box.run(["print(1)"])
        except RuntimeError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with sandbox(jobs=1) as closed:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        closed.run(["print(1)"])


@pytest.mark.parametrize("name", ["seconds", "memory_mb", "processes", "jobs"])
def test_limits_are_above_zero(name):
    with pytest.raises(ValueError, match="above zero"):
        Sandbox(**{name: 0})


ALONE = f"import os, sys; sys.path.insert(0, {str(Path(module.__file__).parent)!r}); from sandbox import Sandbox"
"""Without the package around it, which takes seconds to import."""


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user cannot leave a group")
def test_groups_of_root_are_left(box):
    program = f"{ALONE}; print(os.getgroups(), Sandbox(jobs=1).run(['import os; print(os.getgroups())'])[0].output)"
    ran = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, extra_groups=[4], check=True
    )
    assert ran.stdout.split() == ["[4]", "[]"]


def test_helpers_end_with_their_trainer(box):
    kill = "print(box._idle.get().process.pid, flush=True); os.kill(os.getpid(), 9)"
    program = f"{ALONE}; box = Sandbox(wall_seconds=60.0, jobs=1); {kill}"
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    helper = Path("/proc") / ended.stdout.strip()
    for _ in range(1000):
        if not helper.exists():
            return
        time.sleep(0.01)
    raise AssertionError("the helper is still there")


@pytest.mark.parametrize(
    ("jail", "words"),
    [
        ('print(\'{"error": "unshare: Operation not permitted"}\')', "unshare: Operation not permitted"),
        (
            "print('{}', flush=True)\nfor line in sys.stdin: print(answer(json.loads(line)), flush=True)",
            "alone",
        ),
        ("pass", "helper is gone"),
    ],
)
def test_refuses_to_start_where_nothing_holds(tmp_path, monkeypatch, jail, words):
    """Where the kernel says no, and where a program runs but is not held."""
    head = """if True:
        import json, subprocess, sys
        def answer(program):
            ran = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd="/")
            return json.dumps({"ok": ran.returncode == 0, "output": ran.stdout, "reason": "error"})
    """
    monkeypatch.setattr(module, "JAIL", tmp_path / "jail.py")
    module.JAIL.write_text(f"{head}\n{jail}\n")
    with pytest.raises(RuntimeError) as error:
        Sandbox(jobs=1)
    message = str(error.value)
    assert words in message and "Linux 5.14" in message and "\n" not in message


def test_elsewhere_than_on_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="on Linux only"):
        Sandbox()


@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare(1)")
def test_refuses_where_the_kernel_does(box):
    """Without user namespaces; and for root who is root in a namespace too, whom no limit on processes binds."""
    start = f"{ALONE}; Sandbox(jobs=1)"

    def last_words(before: str) -> str:
        command = ["unshare", "-Ur", "sh", "-c", f'{before} exec "$0" -c "$1"', sys.executable, start]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip().split("\n")[-1]

    assert "user namespaces allowed" in last_words("echo 0 > /proc/sys/user/max_user_namespaces;")
    words = last_words("")
    if os.geteuid() == 0:
        assert "a program could start more processes" in words
    else:
        assert words == ""
