"""Plain arithmetic: what counts as it, when a session is answered from memory, and that nobody can tell."""

import asyncio
import sys

import pytest

from trl_multiturn.sandbox import arithmetic, forkserver
from trl_multiturn.sandbox.arithmetic import names_after
from trl_multiturn.sandbox.backend import Reply
from trl_multiturn.sandbox.config import SandboxConfig
from trl_multiturn.sandbox.sandbox import Sandbox


linux = pytest.mark.skipif(sys.platform != "linux", reason="the fork server needs Linux")


@pytest.fixture
def sandbox():
    with Sandbox(SandboxConfig(preload=())) as sandbox:
        yield sandbox


@pytest.fixture
def forks(monkeypatch):
    """Numbers of the processes that were forked for sessions."""
    spawn, forked = forkserver.ForkServer.spawn, []

    async def counted(server, *args):
        forked.append(len(forked))
        return await spawn(server, *args)

    monkeypatch.setattr(forkserver.ForkServer, "spawn", counted)
    return forked


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("x = 36\n# first eats 2\nx -= 2\nx", {"x"}),
        ("total = (3 + 4.5) * 2 // 3 % 5\nprint(total, round(total / 3, 2))", {"total"}),
        ("", set()),
        ("x = 1\ny = x == 1", {"x", "y"}),
        ("max = 3\nmax", {"max"}),
        ("-3 + abs(-4)", set()),
        ("   x = 1", {"x"}),
        ("x = (1 +  # and\n2)\nprint(x,\nx)", {"x"}),
    ],
)
def test_cells_of_numbers_are_plain_arithmetic(code, names):
    assert names_after(code, frozenset()) == names


@pytest.mark.parametrize(
    "code",
    [
        "x",  # unknown, or a command of the shell
        "pwd",
        "x += 1",
        "import random",
        "random.random()",
        "'text'",
        "id(3)",
        "input()",
        "Out",
        "In",
        "_",
        "x = 2 ** 9",
        "x = 5; x",
        "%time 3",
        "x = %time 3",
        "x = 3\n%time 3",
        "!ls",
        "x = !ls",
        "print?",
        "/print 3",
        ", print 3",
        "exec = 3",
        "[1, 2]",
        "for i in range(3): print(i)",
        "(lambda: 3)()",
        "x = 1\r\nx",
        "x = 1\u00a0+ 1",
        "x = 1\\\n+ 1",
        "# caf\u00e9",
        "1e400",
        "0x10",
        "(3).real",
        "print(3, file=1)",
        "x = 1\n" * 200,
        "(max) = min",
        "x = max = min",
        "x = 1\n(x,\nmax) = 1, min",
        "round(2.5,\nndigits = 0)\nndigits",  # known to no variable of the session
        "x = (1 +\nx)",
        "x = (1",
        "1 > 2 > 3(4)",
        "1 > 2 > (3)(4)",
    ],
)
def test_other_cells_are_not(code):
    assert names_after(code, frozenset()) is None


def test_a_name_of_an_earlier_cell_is_known():
    assert names_after("x *= 2\nx", {"x"}) == {"x"}


@linux
def test_equal_arithmetic_runs_in_one_process(sandbox, forks):
    for _ in range(3):
        with sandbox.open(on_first_use=True) as session:
            results = [session.run("x = 12"), session.run("print(x)\nx + 1")]
        assert [(result.output, result.status) for result in results] == [("", "ok"), ("12\n13", "ok")]
    assert len(forks) == 1


@linux
@pytest.mark.parametrize("code", ["import math\nmath.floor(x / 2)", "x = 0\n1 / x", "x; _ih[1:-1]"])
def test_the_first_cell_of_another_kind_finds_what_came_before(sandbox, forks, code):
    answers = []
    for _ in range(2):
        with sandbox.open(on_first_use=True) as session:
            session.run("x = 41")
            answers.append(session.run(code))
    assert len(forks) == 1 + 2 and answers[0].output == answers[1].output and answers[0].status == answers[1].status


@linux
def test_chance_is_never_repeated(sandbox, forks):
    outputs = set()
    for _ in range(2):
        with sandbox.open(on_first_use=True) as session:
            outputs.add(session.run("import secrets\nsecrets.token_hex()").output)
    assert len(outputs) == len(forks) == 2


@linux
def test_an_error_is_not_repeated(sandbox, forks):
    for _ in range(2):
        with sandbox.open(on_first_use=True) as session:
            assert session.run("1 / 0").output == "ZeroDivisionError: division by zero"
            assert session.run("x = 3\nx").output == "3"
    assert len(forks) == 1 + 2


@linux
def test_equal_cells_that_run_at_the_same_time_share_a_process(sandbox, forks):
    async def session():
        async with await sandbox.aopen(on_first_use=True) as session:
            return (await session.arun("x = 7\nx * 6")).output

    async def all_of_them():
        return await asyncio.gather(*(session() for _ in range(5)))

    assert asyncio.run(all_of_them()) == ["42"] * 5 and len(forks) == 1


@linux
def test_sessions_share_a_process_and_see_nothing_of_each_other(sandbox, forks):
    with sandbox.open(on_first_use=True) as one, sandbox.open(on_first_use=True) as other:
        assert [one.run("x = 1\nx").output, other.run("x = 2\nx").output] == ["1", "2"]
        assert [one.run("x + 10").output, other.run("x + 20").output] == ["11", "22"]
        assert len(forks) == 1
        assert other.run("y").output == "NameError: name 'y' is not defined"
    with sandbox.open(on_first_use=True) as third:
        assert third.run("x").output == "NameError: name 'x' is not defined"


@linux
def test_a_function_that_one_session_redefines_is_the_same_for_others(sandbox, forks):
    with sandbox.open(on_first_use=True) as one, sandbox.open(on_first_use=True) as other:
        assert one.run("max = min\nmax(1, 2)").output == "1"
        assert other.run("max(1, 2)").output == "2"
        assert one.run("max(3, 4)").output == "3"
    assert len(forks) == 2  # the first one's own, and the shared one


@linux
def test_a_keyword_on_a_line_of_its_own_reads_nothing_that_others_assigned(sandbox):
    with sandbox.open(on_first_use=True) as one, sandbox.open(on_first_use=True) as other:
        one.run("ndigits = 7")
        assert other.run("round(2.5,\nndigits = 0)\nndigits").output == "NameError: name 'ndigits' is not defined"


@linux
def test_a_shared_process_that_dies_costs_no_session_anything(sandbox, forks):
    with sandbox.open(on_first_use=True) as session:
        session.run("x = 4")
        sandbox.loop_thread().run(sandbox.calculator.close())
        assert session.run("x + 1").output == "5"


@linux
def test_a_shared_process_is_replaced_before_its_shell_speaks_of_what_it_keeps(sandbox, forks, monkeypatch):
    monkeypatch.setattr(arithmetic, "_MOST_SHARED_CELLS", 2)
    for number in range(5):
        with sandbox.open(on_first_use=True) as session:
            assert session.run(f"{number} + 1").output == str(number + 1)
    assert len(forks) == 3


@linux
def test_what_takes_longer_than_others_may_wait_runs_in_a_process_of_its_own(sandbox, forks, monkeypatch):
    shared = []

    async def slow(calculator, cells):
        shared.append(cells)
        return Reply("", "timeout")

    monkeypatch.setattr(arithmetic.Calculator, "_run", slow)
    for number in range(5):
        with sandbox.open(on_first_use=True) as session:
            assert session.run(f"{number} + 3").output == str(number + 3)
    assert len(forks) == 5 and len(shared) == 3  # then nobody waits for it any more


@linux
def test_answers_from_memory_count_as_cells(forks):
    with Sandbox(SandboxConfig(preload=(), max_cells=1)) as sandbox:
        for _ in range(2):
            with sandbox.open(on_first_use=True) as session:
                assert session.run("x = 1\nx").output == "1"
                assert session.run("x").output == "RuntimeError: the limit of 1 cells is reached"
    assert len(forks) == 1


@linux
def test_a_closed_session_answers_nothing_from_memory(sandbox):
    for _ in range(2):
        session = sandbox.open(on_first_use=True)
        session.run("x = 1")
        session.close()
        with pytest.raises(RuntimeError, match="closed"):
            session.run("x = 1")


@linux
def test_every_cell_runs_where_the_config_says_so(forks):
    with Sandbox(SandboxConfig(preload=(), repeats_arithmetic=False)) as sandbox:
        for _ in range(2):
            with sandbox.open(on_first_use=True) as session:
                assert session.run("1 + 1").output == "2"
    assert len(forks) == 2


@linux
def test_a_session_without_a_process_opens_and_closes_on_its_callers_thread(sandbox, monkeypatch):
    thread, known = sandbox.loop_thread(), sandbox.open(on_first_use=True)  # the first one starts the backend
    known.run("x = 3")
    handed_over = []
    submit = thread.submit
    monkeypatch.setattr(thread, "submit", lambda coroutine: handed_over.append(coroutine) or submit(coroutine))
    session = sandbox.open(on_first_use=True)
    assert session.run("x = 3").status == "ok"
    session.close()
    known.close()
    assert not handed_over
    with pytest.raises(RuntimeError, match="closed"):
        session.run("x + 1")


@linux
def test_a_session_whose_cell_runs_is_closed_behind_it(sandbox):
    async def close_beside_a_cell():
        session = await sandbox.aopen(on_first_use=True)
        cell = asyncio.create_task(session.arun("import time\ntime.sleep(0.3)\n'done'"))
        while session._interpreter is None:  # its process is starting
            await asyncio.sleep(0.01)
        await session.aclose()
        await asyncio.gather(cell, return_exceptions=True)
        return session

    session = asyncio.run(close_beside_a_cell())
    assert session._interpreter is None and session not in sandbox._sessions
    with pytest.raises(RuntimeError, match="closed"):
        session.run("1")


@linux
def test_a_sandbox_that_is_closed_closes_sessions_without_a_process(sandbox):
    session = sandbox.open(on_first_use=True)
    later = sandbox.open(on_first_use=True)
    sandbox.close()
    for each in (session, later):
        with pytest.raises(RuntimeError, match="closed"):
            each.run("1")
