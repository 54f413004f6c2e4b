"""Adversarial cells. After each one nothing has got out, and a neighbour's state, files and speed are untouched.

An attack prints ESCAPED when it succeeds. The same table runs against both backends.
"""
from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest
from test_sandbox import Box, Session, sizes
from tool_server import until

LIBC = "import ctypes, os, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def syscall(number: int, *args: str) -> str:
    """Code that makes one x86_64 system call and reports ESCAPED unless it is refused."""
    return LIBC + (f"result = libc.syscall({', '.join([str(number), *args])})\n"
                   "print('ESCAPED' if result != -1 else os.strerror(ctypes.get_errno()))")


def attempt(*statements: str) -> str:
    """Code that tries each statement and reports those that went through."""
    return f"""
import os, sys, socket, subprocess, ctypes, urllib.request
for statement in {list(statements)!r}:
    try:
        exec(statement, globals())
        print('ESCAPED', statement)
    except (OSError, ValueError, MemoryError) as exc:
        print('refused:', type(exc).__name__, exc)
"""


@dataclass(frozen=True)
class Attack:
    name: str
    code: str
    timeout: float = 10.0
    says: str = ""             # must appear in the output
    machine: str = ""          # only on this architecture


TCP = "socket.create_connection(({host!r}, {port}), timeout=2)"
ATTACKS = [
    # time
    Attack("infinite_loop", "while True: pass", 1),
    Attack("sleep", "import time; time.sleep(1000)", 1),
    Attack("loop_that_swallows_interrupts",
           "while True:\n  try:\n    x = 0\n    while True: x += 1\n  except BaseException: pass", 1),
    Attack("every_signal_blocked", "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
           "while True: pass", 1),
    Attack("catastrophic_regex", "import re; re.match(r'(a|a)*$', 'a' * 60 + 'b')", 1),
    Attack("loop_in_c", "sum(range(10 ** 13))", 1),
    Attack("stop_itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nos.kill(0, signal.SIGSTOP)", 1),
    Attack("alarm", "import signal; signal.alarm(1)\nwhile True: pass", 2),
    # memory, processes, disk, output
    Attack("fork_bomb", "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", 2),
    Attack("thread_bomb", "import threading, time\ntry:\n  while True: threading.Thread(target=time.sleep, args=(100,), "
           "daemon=True).start()\nexcept RuntimeError as e: print('refused', e)", 5),
    Attack("memory_bomb", "x = [bytearray(1 << 28) for _ in range(64)]", 40, says="MemoryError"),
    Attack("memory_bomb_in_numpy", "np.ones((1 << 20, 1 << 14))", says="MemoryError"),
    Attack("raised_limits", attempt("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
                                    "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))")),
    Attack("full_disk", "f = open('big', 'wb')\ntry:\n  while True: f.write(bytes(1 << 22))\nexcept OSError as e: print(e)"),
    Attack("sparse_file", attempt("os.truncate(os.open('s', os.O_CREAT | os.O_RDWR), 1 << 40)")),
    Attack("a_million_files", "import os\ntry:\n  for i in range(10**6): open(f'f{i}', 'w').close()\n"
           "except OSError as e: print('refused', e)", 20, says="refused"),
    Attack("full_shared_memory", "import os\ntry:\n  with open('/dev/shm/x', 'wb') as f:\n"
           "    for _ in range(1000): f.write(bytes(1 << 20))\n  print('ESCAPED')\nexcept OSError as e: print(e)"),
    Attack("all_descriptors", "import os\ntry:\n  while True: os.dup(0)\n"
           "except OSError as e: print('refused', e)", says="refused"),
    Attack("a_gigabyte_printed", "for _ in range(1000): print('x' * (1 << 20))", 20),
    Attack("a_gigabyte_from_a_child", "import subprocess; subprocess.run('yes | head -c 1000000000', shell=True); None", 20),
    Attack("a_gigabyte_to_the_descriptor", "import os\ntry:\n  while True: os.write(1, bytes(1 << 20))\n"
           "except OSError: pass", 20),
    Attack("huge_image", "Image.new('L', (12000, 12000))", 20),
    Attack("huge_repr", "'x' * 500_000_000"),
    Attack("many_images", "for _ in range(1000): display(Image.new('L', (10, 10)))", 20),
    Attack("deep_recursion", "import sys; sys.setrecursionlimit(10**8)\ndef f(): f()\nf()", 3),
    # other processes
    Attack("kill_the_parent", "import os; os.kill(os.getppid(), 9)"),
    Attack("kill_everything", "import os\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: print('nobody')"),
    Attack("kill_by_number", "import os\nfor pid in range(2, 65536):\n  try: os.kill(pid, 9); print('ESCAPED', pid)\n"
           "  except ProcessLookupError: pass\n  except PermissionError: print('ESCAPED: visible', pid)", 20),
    Attack("ptrace", syscall(101, "16", "1", "0", "0"), machine="x86_64"),
    Attack("ptrace_traceme", syscall(101, "0", "0", "0", "0"), machine="x86_64"),
    Attack("read_foreign_memory", syscall(310, "1", "0", "0", "0", "0", "0"), machine="x86_64"),
    Attack("daemon_that_should_outlive", "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
           "    time.sleep(100000)\n  os._exit(0)\nprint('left one behind')"),
    Attack("list_processes", "import os\npids = [p for p in os.listdir('/proc') if p.isdigit()]\n"
           "print('ESCAPED' if len(pids) > 3 else pids)"),
    # files
    Attack("write_outside", attempt(*(f"open('{folder}/x', 'w')" for folder in (
        "", "/etc", "/usr/bin", "/var/tmp", "/opt", "/opt/sandbox", "/run", "/dev", "/home", "/root", "/run/hdpo")))),
    Attack("write_into_the_interpreter", attempt("open(os.__file__, 'a')", "open(np.__file__, 'a')")),
    Attack("symlink_to_a_system_file", attempt("os.symlink('/etc/hostname', 'l'); open('l', 'w')")),
    Attack("leave_by_dotdot", attempt("open('../../../../etc/x', 'w')", "open('../x', 'w')")),
    Attack("find_the_neighbours_file", "import os, glob\nfor base, _, files in os.walk('/'):\n"
           "  if base.startswith(('/sys', '/usr')): continue\n"
           "  if 'neighbours-secret' in files: print('ESCAPED', base)", 30),
    Attack("proc_root_of_others", attempt("os.listdir('/proc/2/root')", "open('/proc/2/environ').read()")),
    Attack("server_secrets", "import os, glob\nseen = str(dict(os.environ))\nfor p in glob.glob('/proc/*/environ'):\n"
           "  try: seen += open(p).read()\n  except OSError: pass\nprint('ESCAPED' if 'topsecret' in seen else 'clean')"),
    # privileges
    Attack("setuid", attempt("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", "os.setresuid(0, 0, 0)")),
    Attack("setuid_program", "import os, shutil, subprocess\nshutil.copy('/bin/sh', 'sh'); os.chmod('sh', 0o4755)\n"
           "out = subprocess.run(['./sh', '-p', '-c', 'id -u'], capture_output=True, text=True).stdout.strip()\n"
           "print('ESCAPED' if out == '0' and os.getuid() != 0 else out)"),
    Attack("capabilities", "caps = [l.split()[1] for l in open('/proc/self/status') if l.startswith('Cap')] "
           "if __import__('os').path.exists('/proc/self/status') else []\n"
           "print('ESCAPED' if any(int(c, 16) for c in caps) else 'none')"),
    Attack("no_new_privileges", LIBC + "print('ESCAPED' if libc.prctl(39, 0, 0, 0, 0) != 1 else 'set')"),
    Attack("mount", LIBC + "print('ESCAPED' if libc.mount(b'none', b'.', b'tmpfs', 0, None) == 0 else 'refused')"),
    Attack("remount_writable", LIBC +
           "print('ESCAPED' if libc.mount(b'none', b'/', None, 32 | 4096, None) == 0 else 'refused')"),
    Attack("umount", LIBC + "print('ESCAPED' if libc.umount2(b'/proc', 2) == 0 else 'refused')"),
    Attack("unshare_user", LIBC + "print('ESCAPED' if libc.unshare(0x10000000) == 0 else 'refused')"),
    Attack("unshare_program", "import subprocess\nr = subprocess.run(['unshare', '-Urm', 'echo', 'ESC' + 'APED'], "
           "capture_output=True, text=True)\nprint(r.stdout)"),
    Attack("clone_new_user", syscall(56, "0x10000000 | 17", "0", "0", "0", "0"), machine="x86_64"),
    Attack("clone3", syscall(435, "0", "0"), machine="x86_64", says="not implemented"),
    Attack("setns", attempt("fd = os.open('/proc/self/ns/user', 0)\n"
                            "if ctypes.CDLL(None).setns(fd, 0): raise OSError('refused')")),
    Attack("chroot", attempt("os.chroot('.')")),
    Attack("pivot_root", syscall(155, "b'.'", "b'.'"), machine="x86_64"),
    Attack("mknod", attempt("import stat; os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(8, 0))")),
    Attack("bpf", syscall(321, "0", "0", "0"), machine="x86_64", says="not permitted"),
    Attack("keyring", syscall(250, "0", "-3", "1"), machine="x86_64", says="not permitted"),
    Attack("io_uring", syscall(425, "8", "0"), machine="x86_64", says="not permitted"),
    Attack("userfaultfd", syscall(323, "1"), machine="x86_64", says="not permitted"),
    Attack("perf_events", syscall(298, "0", "0", "-1", "-1", "0"), machine="x86_64", says="not permitted"),
    Attack("kernel_module", syscall(175, "0", "0", "b''"), machine="x86_64", says="not permitted"),
    Attack("reboot", syscall(169, "0xfee1dead", "672274793", "0x89abcdef", "0"), machine="x86_64", says="not permitted"),
    Attack("x32_door", syscall(0x40000000 + 41, "2", "1", "0"), machine="x86_64"),
    Attack("kernel_settings", attempt(
        "open('/proc/sys/kernel/core_pattern', 'w').write('|/x')", "open('/proc/sysrq-trigger', 'w').write('c')",
        "open('/sys/kernel/mm/transparent_hugepage/enabled', 'w').write('never')",
        "open('/proc/self/oom_score_adj', 'w').write('-1000')",
        "open('/sys/fs/cgroup/memory/memory.limit_in_bytes', 'w').write('-1')", "open('/proc/kcore', 'rb')",
        "open('/dev/mem', 'rb')")),
    # network
    Attack("tcp", attempt(TCP.format(host="1.1.1.1", port=80), TCP.format(host="127.0.0.1", port=22))),
    Attack("udp", attempt("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))")),
    Attack("ipv6", attempt("socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect(('::1', 80))")),
    Attack("dns", attempt("socket.getaddrinfo('example.com', 80)")),
    Attack("http", attempt("urllib.request.urlopen('http://example.com', timeout=2)")),
    Attack("metadata_service", attempt("urllib.request.urlopen('http://169.254.169.254/', timeout=2)")),
    Attack("unix_sockets", attempt(*(f"socket.socket(socket.AF_UNIX).connect({path!r})" for path in (
        "/var/run/docker.sock", "/run/hdpo/socket", "\0abstract", "/run/dbus/system_bus_socket")))),
    Attack("netlink", attempt("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)")),
    Attack("raw_packets", attempt("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
                                  "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)")),
    # meeting another session: by name, by what happens to shared files
    Attack("abstract_datagrams", attempt(
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.bind('\\0meet')",
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', '\\0meet')",
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', '/dev/log')")),
    Attack("named_stream_pairs", attempt(
        *(f"a, b = socket.socketpair(socket.AF_UNIX, socket.{kind})\na.{act}" for kind in ("SOCK_STREAM", "SOCK_SEQPACKET")
          for act in ("bind('\\0meet')", "connect('\\0meet')", "listen()", "connect('/run/hdpo/socket')")))),
    Attack("inotify", LIBC + "fd = libc.inotify_init1(0)\nprint('ESCAPED' if fd >= 0 else os.strerror(ctypes.get_errno()))",
           says="not permitted"),
    Attack("dnotify_and_leases", attempt("import fcntl; fcntl.fcntl(os.open('/usr', 0), fcntl.F_NOTIFY, 1)",
                                         "import fcntl; fcntl.fcntl(os.open(os.__file__, 0), fcntl.F_SETLEASE, 0)")),
    # memory or quotas that belong to no process
    Attack("memfds", attempt("os.memfd_create('x')")),
    Attack("system_v_memory", LIBC + "print('ESCAPED' if libc.shmget(0, 1 << 20, 0o1600) != -1 else 'refused')", says="refused"),
    Attack("system_v_queues", LIBC + "print('ESCAPED' if libc.msgget(0, 0o1600) != -1 or libc.semget(0, 100, 0o1600) != -1 "
           "else 'refused')", says="refused"),
    Attack("posix_queues", syscall(240, "b'q'", "0o102", "0o600", "0"), machine="x86_64", says="not permitted"),
    Attack("asynchronous_io", syscall(206, "1000", "ctypes.byref(ctypes.c_ulong())"), machine="x86_64", says="not permitted"),
    Attack("locks_on_what_all_read", "import fcntl, struct\nlock = struct.pack('hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0)\n" + attempt(
        "fcntl.flock(os.open(os.__file__, 0), fcntl.LOCK_EX)", "fcntl.fcntl(os.open(os.__file__, 0), fcntl.F_GETLK, lock)",
        "fcntl.fcntl(os.open(os.__file__, 0), 36, lock)", "fcntl.lockf(os.open(os.__file__, 0), fcntl.LOCK_EX)")),
    Attack("large_pipes", attempt("import fcntl; fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)")),
    Attack("not_to_be_looked_at", LIBC + "print('ESCAPED' if libc.prctl(4, 0, 0, 0, 0) == 0 else 'refused')", says="refused"),
    Attack("vsock", attempt("socket.socket(40, socket.SOCK_STREAM).connect((2, 1024))")),
    # the protocol and the interpreter around the cell
    Attack("garbage_on_every_descriptor", "import os\nfor fd in range(3, 256):\n  try: os.write(fd, b'\\xff' * 64)\n"
           "  except OSError: pass"),
    Attack("oversized_frame", "import os, struct\nfor fd in range(3, 256):\n"
           "  try: os.write(fd, struct.pack('>II', 100, 2**32 - 1))\n"
           "  except OSError: pass"),
    Attack("json_bomb_frame", "import os, struct\nbomb = b'[' * 1_000_000\nfor fd in range(3, 256):\n"
           "  try: os.write(fd, struct.pack('>II', len(bomb), 0) + bomb)\n  except OSError: pass"),
    Attack("forged_images", "import os, struct\n"
           "t = struct.pack('>BIIIII', 1, 0, 7, 2, 2**32 - 1, 2)\nfor fd in range(3, 256):\n"
           "  try: os.write(fd, struct.pack('>II', len(t), 1) + t + b'x')\n  except OSError: pass"),
    Attack("answer_of_nothing", "import os, struct\nfor fd in range(3, 256):\n"
           "  try: os.write(fd, struct.pack('>II', 0, 0))\n  except OSError: pass"),
    Attack("every_descriptor_closed", "import os; os.closerange(0, 256)"),
    Attack("modules_emptied", "import sys; sys.modules.clear()"),
    Attack("builtins_broken",
           "import builtins\nfor name in ('print', 'len', 'open', 'isinstance'): delattr(builtins, name)"),
    Attack("json_replaced", "import json; json.dumps = lambda *a, **k: 'x' * 10_000_000"),
    Attack("stdout_replaced", "import sys; sys.stdout = sys.stderr = None"),
    Attack("segfault", "import ctypes; ctypes.string_at(0)"),
    Attack("exit_hooks", "import atexit, os; atexit.register(lambda: None); os._exit(0)"),
]


@pytest.fixture(scope="module", params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    os.environ["HDPO_TEST_SECRET"] = "topsecret"
    running = Box(request.param)
    del os.environ["HDPO_TEST_SECRET"]
    if not {"user", "namespaces", "seccomp"} <= set(running.controls):
        running.close()
        pytest.skip(f"this kernel grants {running.controls} only")
    yield running
    running.close()


@pytest.fixture(scope="module")
def neighbour(box: Box) -> Session:
    session = box.session()
    session.run("state = 'intact'\nopen('neighbours-secret', 'w').write('mine')\nimport os; None")
    return session


def processes_of(box: Box) -> int:
    """Processes below the template, seen from outside."""
    return len(psutil.Process(box.template_pid).children(recursive=True))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_contained(box: Box, neighbour: Session, attack: Attack) -> None:
    if attack.machine and attack.machine != os.uname().machine:
        pytest.skip(f"system call numbers of {attack.machine}")
    attacker = box.session()
    before = processes_of(box)
    result = attacker.run(attack.code, attack.timeout)
    output = result.stdout + result.stderr
    assert "ESCAPED" not in output, output[:500]
    assert attack.says in output, output[-500:]
    assert time.monotonic() - attacker.began < attack.timeout + 15      # a starved machine is slow, a hung session never ends
    assert len(output) < 150_000 and all(w * h <= 4096 * 4096 for w, h in sizes(result))
    # the neighbour has noticed nothing
    told = neighbour.run("print(state, open('neighbours-secret').read(), sorted(os.listdir('.')))")
    assert told.stdout == "intact mine ['neighbours-secret']\n" and not told.restarted
    # the attacker's trajectory goes on, in its old session or a new one
    assert attacker.run("print(6 * 7)").stdout == "42\n" or attacker.run("print(6 * 7)").stdout == "42\n"
    attacker.close()
    assert until(lambda: processes_of(box) == before - 2)      # supervisor and session, and whatever they started


def test_a_neighbour_answers_quickly_while_a_fork_bomb_runs(box: Box, neighbour: Session) -> None:
    attacker = box.session()
    bomb = box.loop.submit(box.sandbox.run(attacker.name, ATTACKS[8].code, 2.0))
    waits = []
    while not bomb.done():
        started = time.monotonic()
        assert neighbour.run("state").stdout == "'intact'\n"
        waits.append(time.monotonic() - started)
    attacker.close()
    assert statistics.median(waits) < 0.5      # the worst one is also a matter of what else this machine does


def test_sessions_that_nobody_ever_speaks_to_do_not_keep_others_from_working(box: Box, neighbour: Session) -> None:
    template = box.do(box.sandbox._template_for(neighbour.name))
    idle = []
    for _ in range(20):
        (control, their_control), (talk, theirs) = socket.socketpair(), socket.socketpair()
        with their_control, theirs:
            box.do(template.fork(their_control, theirs))
        idle += [control, talk]
    idle[1].sendall(b"\0\0\0")                       # part of a header
    idle[3].sendall(b"\xff" * 8)                     # an impossible header
    idle[5].sendall(b"\0\0\0\x02\0\0\0\0no")         # no JSON
    session = box.session()
    assert session.run("1").stdout == "1\n" and neighbour.run("state").stdout == "'intact'\n"
    session.close()
    for connection in idle:
        connection.close()


def test_many_lives_leave_nothing_behind(box: Box) -> None:
    before = processes_of(box)
    for life in range(60):
        session = box.session()
        session.run("import subprocess; subprocess.Popen(['sleep', '1000'])" if life % 3 == 0 else "x = 1")
        session.close()
    assert until(lambda: processes_of(box) <= before)   # fewer: one that was still leaving when the count began


def test_a_session_locks_files_of_its_own(box: Box) -> None:
    session = box.session()
    code = ("import sqlite3\nfor _ in range(2):\n  with sqlite3.connect('own.db') as db:\n"
            "    db.execute('create table if not exists t(x)'); db.execute('insert into t values (1)')\n"
            "    print(db.execute('select count(*) from t').fetchone())\n  db.close()")
    assert session.run(code).stdout == "(1,)\n(2,)\n"
    session.close()
