"""Cells of the kind that models write: beside a real Jupyter kernel, and what lasts from one to the next."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from trl_multiturn.sandbox.config import SandboxConfig
from trl_multiturn.sandbox.sandbox import Sandbox

from .notebook_cells import DIFFERENCES, NOTEBOOKS, table


DOCS = Path(__file__).parents[2] / "docs" / "sandbox.md"
_IMPORTS = re.compile(r"^(?:import|from) (numpy|sympy|pandas|matplotlib)\b")
_TIME = re.compile(r"\d[\d.]*(?:e\+\d+)? (?:ns|μs|µs|us|ms|s)\b")  # 999.9 µs are printed as `1e+03 µs`


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(seed=0)) as sandbox:
        yield sandbox


@pytest.fixture
def session(sandbox):
    with sandbox.open() as session:
        yield session


def answers(sandbox, cells):
    with sandbox.open() as session:
        return [session.run(cell).output for cell in cells]


# ------------------------------------------------------------------------------------------------ beside a kernel


@pytest.fixture(scope="module")
def kernels():
    with Sandbox(SandboxConfig(seed=0, backend="jupyter", isolation="none")) as sandbox:
        yield sandbox


@pytest.mark.slow  # a kernel takes seconds to start and to import what it needs
@pytest.mark.parametrize("subject", NOTEBOOKS)
def test_a_session_answers_as_a_kernel_does_but_for_the_differences_listed(sandbox, kernels, subject):
    cells = NOTEBOOKS[subject]
    needed = _IMPORTS.match(cells[0])
    if needed and importlib.util.find_spec(needed[1]) is None:
        pytest.skip(f"{needed[1]} is not installed")
    here, kernel = (
        [_TIME.sub("…", text) if "%time" in cell else text for cell, text in zip(cells, outputs, strict=True)]
        for outputs in (answers(sandbox, cells), answers(kernels, cells))
    )
    differing = {cell: (k.strip(), h) for cell, k, h in zip(cells, kernel, here, strict=True) if k != h}
    listed = {cell: (DIFFERENCES[cell].kernel, DIFFERENCES[cell].here) for cell in cells if cell in DIFFERENCES}
    assert differing == listed


def test_the_documentation_lists_the_differences():
    assert table() in DOCS.read_text()


def test_every_difference_is_that_of_a_cell():
    assert set(DIFFERENCES) <= {cell for cells in NOTEBOOKS.values() for cell in cells}


# ------------------------------------------------------------------------------------------------- standard output


@pytest.mark.parametrize(
    ("keeper", "use"),
    [
        ("import pprint; p = pprint.PrettyPrinter()", "p.pprint('kept')"),
        ("def say(out=sys.stdout): print(repr('kept'), file=out)", "say()"),
        ("import functools; say = functools.partial(print, file=sys.stdout)", "say(repr('kept'))"),
        ("import logging; h = logging.StreamHandler(sys.stdout); log = logging.Logger('l'); log.addHandler(h)",
         "log.error(repr('kept'))"),
        ("import csv; w = csv.writer(sys.stdout)", "w.writerow([repr('kept')]);"),
        ("old = sys.stdout.buffer", "old.write(b\"'kept'\");"),
        ("from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(1); pool.submit(int).result();",
         "pool.submit(print, repr('kept')).result()"),
        ("import asyncio, threading; loop = asyncio.new_event_loop()\n"
         "async def say(): print(repr('kept'))\n"
         "threading.Thread(target=loop.run_forever, daemon=True).start()",
         "asyncio.run_coroutine_threadsafe(say(), loop).result()"),
    ],
)  # fmt: skip
def test_what_an_earlier_cell_made_of_standard_output_still_prints(session, keeper, use):
    session.run("import sys")
    assert session.run(keeper).output == ""
    result = session.run(use)
    assert (result.output.strip(), result.status) == ("'kept'", "ok")


def test_a_thread_that_an_earlier_cell_left_at_work_prints_into_the_void(session):
    session.run(
        "import sys, threading, time\n"
        "def chatter(out):\n    while True: print('NOISE', file=out); time.sleep(0.001)\n"
        "def ticks(event):\n    while not event.wait(0.001): print('NOISE')\n"
        "for target, argument in ((chatter, sys.stdout), (ticks, threading.Event())):\n"
        "    threading.Thread(target=target, args=[argument], daemon=True).start()"
    )
    assert session.run("time.sleep(0.05); print('mine')").output == "mine"


def test_what_a_cell_does_to_standard_output_ends_with_the_cell(session):
    session.run("import sys; sys.stdout.write = sys.stdout.buffer = None; sys.stdout.extra = 1; sys.stdout.close()")
    assert session.run(
        "print('a', flush=True); sys.stdout.buffer.write(b'b'); hasattr(sys.stdout, 'extra')"
    ).output == ("a\nb\nFalse")


def test_a_script_that_exits_has_printed(session):
    assert session.run("x = 1\nprint('answer'); exit()\nprint('never')").output == "answer"
    assert session.run("import sys\nprint(x); sys.exit(0)").status == "ok"
    failed = session.run("print('lost'); sys.exit('it failed')")
    assert (failed.output, failed.status) == ("SystemExit: it failed", "error")
    assert session.run("x").output == "1"


# ----------------------------------------------------------------------------------------------------------- errors


def test_an_error_keeps_its_name_whatever_its_message_looks_like(session):
    result = session.run("assert False, 'expected:\\n\\n[1, 2]'")
    assert (result.output, result.status) == ("AssertionError: expected:\n\n[1, 2]", "error")


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.system('true')",
        "import os; os.popen('true')",
        "import subprocess; subprocess.run(['true'])",
        "!pip install numpy",
        "%pip install numpy",
        "files = !ls",
        "%%bash\nls",
        "import os; os.execv('/bin/true', ['true'])",
    ],
)
def test_no_program_can_be_started_and_the_error_says_so(session, code):
    assert session.run(code).output == "PermissionError: no program can be started here"


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import multiprocessing; multiprocessing.Pool(2)",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "from concurrent.futures import ProcessPoolExecutor as Pool\nwith Pool(1) as pool: pool.submit(print)",
    ],
)
def test_no_process_can_be_started_and_the_error_says_so(session, code):
    assert session.run(code).output == (
        "PermissionError: no other process can be started here: use ThreadPoolExecutor, or a plain loop"
    )


def test_without_isolation_programs_start():
    with Sandbox(SandboxConfig(isolation="none", preload=())) as sandbox, sandbox.open() as session:
        assert session.run("import os; os.system('exit 3') >> 8").output == "3"


# ------------------------------------------------------------------------------------------------------------ files


def test_a_written_module_can_be_imported_as_it_is_now(session):
    session.run("try:\n    import helper\nexcept ImportError:\n    pass")
    session.run("%%writefile helper.py\nVALUE = 1")
    assert session.run("import helper; helper.VALUE").output == "1"
    session.run("open('helper.py', 'w').write('VALUE = 2\\n')")  # within the same second, and of the same size
    assert session.run("import importlib; importlib.reload(helper).VALUE").output == "2"
    assert session.run("import os; os.listdir()").output == "['helper.py']"


# ------------------------------------------------------------------------------------------------------------ tasks


TASK = (
    "import asyncio\nasync def job(x):\n    print('begun'); await asyncio.sleep(0.001); print('done'); return 2 * x\n"
)


def test_a_task_needs_no_await(session):
    session.run("import asyncio\ngate = asyncio.Event()")
    session.run("async def job():\n    print('begun'); await gate.wait(); print('done'); return 4")
    assert session.run("task = asyncio.create_task(job())").output == "begun"
    assert session.run("gate.set(); await task").output == "done\n4"


def test_a_task_gets_on_after_each_cell_as_far_as_it_gets(session):
    assert session.run(f"{TASK}import time\ntask = asyncio.create_task(job(2))").output in ("begun", "begun\ndone")
    assert session.run("time.sleep(0.01)").output in ("done", "")  # what it prints between two cells is for nobody
    assert session.run("task.done(), task.result()").output == "(True, 4)"


@pytest.mark.parametrize(
    "code",
    [
        "asyncio.run(job(2))",
        "asyncio.get_event_loop().run_until_complete(job(2))",
        "asyncio.new_event_loop().run_until_complete(job(2))",
        "with asyncio.Runner() as runner: print(runner.run(job(2)))",
        "await job(2)",
        "await asyncio.gather(job(2))\n4",
        "(await asyncio.gather(*[asyncio.create_task(job(2))]))[0]",
    ],
)
def test_every_way_to_run_a_coroutine_works(session, code):
    session.run(TASK)
    assert session.run(code).output == "begun\ndone\n4"


def test_a_coroutine_cannot_run_another_loop_as_anywhere(session):
    session.run("import asyncio\nasync def inner(): pass\nasync def outer(): asyncio.run(inner())")
    assert session.run("await outer()").output.startswith("RuntimeError: asyncio.run() cannot be called")


def test_a_cell_whose_time_is_over_does_not_go_on_under_the_next():
    with Sandbox(SandboxConfig(timeout_seconds=0.3, preload=())) as sandbox, sandbox.open() as session:
        assert session.run("import asyncio, time\nx = 0\nawait asyncio.sleep(60)\nx = 1").status == "timeout"
        assert session.run("await asyncio.sleep(0.01); x").output == "0"


def test_a_closed_loop_is_replaced(session):
    session.run(f"{TASK}asyncio.get_running_loop().close()")
    assert session.run("await job(2)").output == "begun\ndone\n4"


# -------------------------------------------------------------------------------------------------------- addresses


def test_addresses_repeat_with_a_seed(sandbox):
    cells = ["class A: pass", "a = A(); a", "[a, A()]", "print(a)", "lambda: 0"]
    first, second = answers(sandbox, cells), answers(sandbox, cells)
    assert first == second
    assert first[1] == "<__main__.A at 0x7f0000000010>"
    assert first[2] == "[<__main__.A at 0x7f0000000010>, <__main__.A at 0x7f0000000020>]"
