"""Python sessions, the same properties for every backend: real processes, real containers."""
from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image
from tool_server import png, until

from hdpo.agent.images import decode_image
from hdpo.background import BackgroundLoop
from hdpo.toolserver.sessions import CellResult, SandboxError, SessionLostError

T = TypeVar("T")
STARVED = "the processors were taken by others"


class Box:
    """A sandbox driven from synchronous tests."""

    def __init__(self, backend: str, sandbox: Any = None) -> None:
        self.loop = BackgroundLoop()
        self.sandbox: Any = sandbox
        if sandbox is not None:
            pass
        elif backend == "docker":
            from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
            self.sandbox = DockerSandbox()
        else:
            from hdpo.toolserver.backends.process_sandbox import ProcessSandbox
            self.sandbox = ProcessSandbox()
        self.do(self.sandbox.start())
        self.opened = 0

    @property
    def controls(self) -> list[str]:
        """What the template says is in force."""
        shards = getattr(self.sandbox, "_shards", None)
        return shards[0].controls if shards else self.sandbox.controls

    @property
    def template_pid(self) -> int:
        shards = getattr(self.sandbox, "_shards", None)
        if not shards:
            return self.sandbox._process.pid
        shards[0].container.reload()
        return shards[0].container.attrs["State"]["Pid"]

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work, timeout=120)

    def session(self, *images: bytes) -> Session:
        self.opened += 1
        name = f"s{self.opened}"
        self.do(self.sandbox.open(name, list(images)))
        return Session(self, name)

    def close(self) -> None:
        self.do(self.sandbox.shutdown())
        self.loop.close()


class Session:
    def __init__(self, box: Box, name: str) -> None:
        self.box, self.name = box, name
        self.began = 0.0      # the last cell

    def run(self, code: str, timeout: float = 20.0) -> CellResult:
        """Again when other processes of the machine have left the cell no processor, which is not what its test is about."""
        while True:
            self.began = time.monotonic()
            try:
                return self.box.do(self.box.sandbox.run(self.name, code, timeout))
            except SandboxError as exc:
                if STARVED not in str(exc):
                    raise

    def close(self) -> None:
        self.box.do(self.box.sandbox.close(self.name))


@pytest.fixture(scope="module", params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    running = Box(request.param)
    yield running
    running.close()


@pytest.fixture
def session(box: Box) -> Iterator[Session]:
    one = box.session(png(size=(3001, 2003)), png("blue"))
    yield one
    one.close()


# -- what a cell shows -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("code, stdout", [
    ("print('a'); print('b')", "a\nb\n"),
    ("1 + 1", "2\n"),
    ("x = 3", ""),
    ("None", ""),
    ("'text'", "'text'\n"),
    ("    indented = 1\n    indented + 1", "2\n"),
    ("%matplotlib inline\nprint(1)", "1\n"),
    ("import sys; sys.stdout.buffer.write(b'raw'); None", "raw"),
    ("import subprocess; subprocess.run(['echo', 'child']); None", "child\n"),
    ("for i in range(2):\n    i", ""),
    ("display('shown'); display(None)", "'shown'\n"),
    ("raise SystemExit", ""),
    ("print(math.pi > 3, np.ones(2).sum(), Image.new('L', (2, 3)).size, len(base64.b64encode(b'x')), type(BytesIO()))",
     "True 2.0 (2, 3) 4 <class '_io.BytesIO'>\n"),
    ("print('\\ud800 é 日本')", "? é 日本\n"),
    ("plt.plot([1, 2])", ""),
    ("__name__", "'__main__'\n"),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nimport pickle\npickle.loads(pickle.dumps(P(3)))",
     "P(x=3)\n"),
])
def test_output_is_what_a_notebook_would_print(session: Session, code: str, stdout: str) -> None:
    result = session.run(code)
    assert (result.stdout, result.ok) == (stdout, True), result.stderr


def test_stderr_is_apart_from_stdout(session: Session) -> None:
    result = session.run("import sys; print('out'); print('err', file=sys.stderr)")
    assert (result.stdout, result.stderr) == ("out\n", "err\n")


def test_a_traceback_shows_the_cells_own_frames_and_lines_only(session: Session) -> None:
    session.run("import json\ndef load(text):\n    return json.loads(text)")
    result = session.run("value = load('{')\nprint('not reached')")
    assert not result.ok and result.stdout == ""
    assert 'File "<cell 2>", line 1, in <module>\n    value = load(\'{\')' in result.stderr
    assert 'File "<cell 1>", line 3, in load\n    return json.loads(text)' in result.stderr
    assert result.stderr.count("File ") == 2 and result.stderr.rstrip().endswith("column 2 (char 1)")


@pytest.mark.parametrize("code, last", [
    ("1/0", "ZeroDivisionError: division by zero"),
    ("def f(:\n  pass", "SyntaxError: invalid syntax"),
    ("class E(Exception):\n  def __str__(self): raise ValueError\nraise E", "E"),
    ("raise SystemExit(3)", "SystemExit: 3"),
    ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    ("try:\n  1/0\nexcept ZeroDivisionError as e:\n  raise KeyError('k') from e", "KeyError: 'k'"),
])
def test_every_error_is_reported_and_the_session_goes_on(session: Session, code: str, last: str) -> None:
    session.run("kept = 1")
    result = session.run(code)
    assert not result.ok and last in result.stderr.rstrip().splitlines()[-1]
    assert session.run("kept").stdout == "1\n"


@pytest.mark.parametrize("code", [
    "x = (", "def f(:\n  pass", "print('a'\nprint('b')", "```python\n1\n```", "x = 1\n  y = 2", "0777"])
def test_a_syntax_error_is_shown_once_with_its_line_alone(session: Session, code: str) -> None:
    stderr = session.run(code).stderr
    assert stderr.count("Error") == 1 and "During handling" not in stderr and "Traceback" not in stderr
    assert stderr.startswith('  File "<cell 1>", line ')


@pytest.mark.parametrize(("code", "stdout", "said", "ok"), [
    ("!pip install x", "", "!pip install x was not run: ", False),
    ("print(1)\n!apt-get install -y 'tess\nprint(2)", "1\n2\n", "!apt-get install -y 'tess was not run: ", False),
    ("for i in range(2):\n    !ls\n    print(i)", "0\n1\n", "!ls was not run: ", False),
    ("%%bash\nls", "", "%%bash was not run: ", False),
    ("%matplotlib inline\n%load_ext x\nprint(1)", "1\n", "%load_ext x was ignored: ", True),
    ("%%time\nprint(1)", "1\n", "", True),
    ("s = '''\n%d!\n!x\n''' % 5\n!ls\nprint(s)", "\n5!\n!x\n\n", "!ls was not run: ", False),
    ("!ls\nx = = 2", "", 'File "<cell 1>", line 2', False),
])
def test_a_notebooks_commands_are_said_not_to_have_run_and_the_rest_runs(
        session: Session, code: str, stdout: str, said: str, ok: bool) -> None:
    result = session.run(code)
    assert (result.stdout, result.ok) == (stdout, ok) and said in result.stderr


def test_a_crop_without_pixels_says_so(session: Session) -> None:
    for code, size in (("image_1.crop((5, 5, 5, 9))", "0 x 4"), ("Image.new('RGB', (7, 0)).show()", "7 x 0")):
        result = session.run(code)
        assert not result.ok and not result.images and result.stderr.count("\n") <= 5
        assert f"this image is empty ({size} pixels)" in result.stderr


def test_a_deep_grey_that_the_code_draws_keeps_its_levels(session: Session) -> None:
    (shown,) = session.run("Image.fromarray((np.arange(256, dtype=np.uint16) * 257)[None].repeat(3, 0))").images
    assert [Image.open(io.BytesIO(shown)).getpixel((x, 1))[0] for x in (0, 100, 255)] == [0, 100, 255]


def sizes(result: CellResult) -> list[tuple[int, int]]:
    return [Image.open(io.BytesIO(data)).size for data in result.images]


@pytest.mark.parametrize("code, expected", [
    ("image_1.crop((10, 20, 110, 70))", [(100, 50)]),
    ("image_1.crop((0, 0, 9, 8)).show()\nimage_2.show()", [(9, 8), (64, 48)]),
    ("display(image_2, image_2.resize((5, 6)))", [(64, 48), (5, 6)]),
    ("Image.new('RGBA', (4, 5))", [(4, 5)]),
    ("Image.new('F', (4, 5))", [(4, 5)]),
    ("Image.new('CMYK', (4, 5))", [(4, 5)]),
    ("Image.new('1', (4, 5))", [(4, 5)]),
    ("[Image.new('L', (4, 5))]", []),
    ("fig, ax = plt.subplots(); None; plt.close(fig)", []),
])
def test_images_come_back_as_images(session: Session, code: str, expected: list[tuple[int, int]]) -> None:
    result = session.run(code)
    assert sizes(result) == expected and result.ok, result.stderr


@pytest.mark.parametrize("code, count", [
    ("plt.plot([1, 2]); plt.show()", 1),
    ("plt.plot([1, 2])", 1),                                         # drawn but never shown: as a notebook does
    ("plt.figure(); plt.plot([1]); plt.show(); plt.figure(); plt.plot([2]); plt.show()", 2),
    ("fig, ax = plt.subplots(); ax.imshow(np.zeros((4, 4))); fig", 1),
    ("plt.imshow(image_2); plt.savefig('x.png'); plt.close()", 0),
    ("plt.plot([1]); 1/0", 0),
])
def test_figures_are_captured_once(session: Session, code: str, count: int) -> None:
    assert len(session.run(code).images) == count
    assert len(session.run("plt.get_fignums()").images) == 0


def test_too_many_images_are_cut_and_said(session: Session) -> None:
    result = session.run("for i in range(30): display(image_2)")
    assert len(result.images) == 8 and "first 8 images" in result.stdout


def test_the_rows_images_are_rgb_upright_and_at_their_own_resolution(box: Box) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6     # rotated by 90 degrees
    rotated = png(size=(40, 20), kind="JPEG", exif=exif)
    see_through = png(color=(0, 0, 0, 0), mode="RGBA")
    one = box.session(png(size=(3001, 2003)), rotated, see_through, png(color=7, mode="P"), png(color=9, mode="L"))
    result = one.run("[(i.mode, i.size) for i in (image_1, image_2, image_3, image_4, image_5)], image_3.getpixel((0, 0))")
    one.close()
    assert result.stdout == ("([('RGB', (3001, 2003)), ('RGB', (20, 40)), ('RGB', (64, 48)), ('RGB', (64, 48)), "
                             "('RGB', (64, 48))], (255, 255, 255))\n")


def test_a_session_sees_the_pixels_that_the_model_is_shown(box: Box) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    ramp = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(3, 0)
    deep = io.BytesIO()
    Image.fromarray(ramp).save(deep, "PNG")
    files = [png("blue", (40, 20), kind="JPEG", exif=exif), png("red", (40, 20), kind="TIFF", exif=exif), deep.getvalue(),
             png((9, 9, 9), transparency=(9, 9, 9)), png(9, mode="L", transparency=9), png((5, 90), mode="LA"),
             png((1, 2, 3, 4), mode="CMYK", kind="TIFF"), png(0.25, mode="F", kind="TIFF")]
    one = box.session(*files)
    found = one.run("import hashlib\nfor i in (" + ", ".join(f"image_{n + 1}" for n in range(len(files))) + "):\n"
                    "    print(i.mode, i.size, hashlib.md5(i.convert('RGBA').tobytes()).hexdigest())")
    one.close()
    seen = [decode_image(data, "row") for data in files]
    assert found.stdout.splitlines() == [
        f"{i.mode} {i.size} {hashlib.md5(i.convert('RGBA').tobytes()).hexdigest()}" for i in seen], found.stderr


# -- state, time, loss -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [
    "import time; time.sleep(60)", "while True: pass", "while True: print('x' * 1000)",
    "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')", "import threading; threading.Event().wait()",
    "import subprocess; subprocess.run(['sleep', '60'])"])
def test_a_cell_over_its_time_is_interrupted_and_the_variables_are_kept(session: Session, code: str) -> None:
    session.run("kept = 5")
    started = time.monotonic()
    result = session.run(code, timeout=1.0)
    assert result.timed_out and not result.restarted and not result.ok
    assert time.monotonic() - started < 3.0
    assert session.run("kept").stdout == "5\n"


@pytest.mark.parametrize("code", [
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
    "while True:\n  try:\n    x = 0\n    while True: x += 1\n  except BaseException: pass",
    "sum(range(10 ** 13))"])
def test_a_cell_that_ignores_the_interrupt_is_killed_and_the_session_starts_afresh(session: Session, code: str) -> None:
    session.run("lost = 5")
    started = time.monotonic()
    result = session.run(code, timeout=1.0)
    assert result.timed_out and result.restarted and not result.ok
    assert time.monotonic() - started < 3.0
    after = session.run("print('lost' in globals(), image_1.size)")
    assert after.stdout == "False (3001, 2003)\n" and not after.restarted


@pytest.mark.parametrize("code", ["import os; os._exit(1)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
                                  "import ctypes; ctypes.string_at(0)"])
def test_a_session_that_dies_with_its_cell_says_so_and_the_cell_is_not_replayed(session: Session, code: str) -> None:
    result = session.run(code)
    if result.ok:   # an init process can't kill itself by signal inside its own PID namespace
        assert "SIGKILL" in code
        return
    assert result.restarted and not result.timed_out
    assert session.run("1").stdout == "1\n"


def test_a_session_that_dies_between_cells_is_told_with_the_next_cell(session: Session) -> None:
    session.run("import os, threading; threading.Timer(0.1, lambda: os._exit(0)).start()")
    link = session.box.sandbox._sessions[session.name].link
    assert until(lambda: not link.alive)
    result = session.run("print('os' in globals())")
    assert result.restarted and result.ok


def test_a_forked_child_that_runs_off_the_end_of_its_cell_does_not_speak_for_the_session(session: Session) -> None:
    result = session.run("import os\npid = os.fork()\nprint('child' if pid == 0 else 'parent')")
    assert "parent" in result.stdout
    assert session.run("2 + 2").stdout == "4\n"


def test_closing_a_session_while_its_cell_runs_answers_at_once(box: Box) -> None:
    one = box.session()
    running = box.loop.submit(box.sandbox.run(one.name, "import time; time.sleep(60)", 60))
    box.do(_soon())
    started = time.monotonic()
    one.close()
    assert running.result(10).restarted and time.monotonic() - started < 5


def test_a_cell_nobody_waits_for_any_more_ends_with_its_session_and_answers_no_later_one(box: Box) -> None:
    one = box.session(png())
    running = box.loop.submit(box.sandbox.run(one.name, "import time; time.sleep(1); print('late')", 60))
    box.do(_soon())
    running.cancel()
    with pytest.raises(SessionLostError):     # its variables are gone, and not by its own doing
        one.run("time")
    result = one.run("import time; time.sleep(1.5); print('time' in globals(), image_1.size)")
    assert result.stdout == "True (64, 48)\n"
    assert one.run("1").stdout == "1\n"
    one.close()


async def _soon() -> None:
    import asyncio
    await asyncio.sleep(0.2)


def test_output_is_cut_at_its_limit_and_the_cut_is_said(session: Session) -> None:
    result = session.run("print('a' * 50_000_000)")
    assert result.ok and len(result.stdout) < 70_000 and "truncated: 50000001 bytes" in result.stdout


def test_sessions_do_not_share_random_numbers(box: Box) -> None:
    one, two = box.session(), box.session()
    draws = [s.run("import random; (np.random.rand(), random.random())").stdout for s in (one, two)]
    one.close()
    two.close()
    assert draws[0] != draws[1]


def test_the_working_folder_starts_empty_and_is_gone_afterwards(box: Box) -> None:
    one = box.session()
    where = one.run("import os; print(os.getcwd(), os.listdir('.')); open('mine', 'w').write('x')").stdout.split()[0]
    one.close()
    two = box.session()
    assert two.run("import os; os.listdir('.')").stdout == "[]\n"
    two.close()
    assert not os.path.exists(os.path.join(where, "mine"))
