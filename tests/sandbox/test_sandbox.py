"""The sandbox's face, on every backend: cells of one notebook, verdicts as data, nothing left behind."""

import asyncio
import pickle

import pytest

from trl_multiturn.sandbox.forkserver import IsolationError
from trl_multiturn.sandbox.result import ToolFailure
from trl_multiturn.sandbox.sandbox import Sandbox, SandboxConfig
from trl_multiturn.tools.python_tool import PythonTool


def config_for(backend, **settings):
    # a plain kernel cannot be confined, and says so
    return SandboxConfig(backend=backend, isolation="strict" if backend == "forkserver" else "none", **settings)


@pytest.fixture(scope="module", params=["forkserver", pytest.param("jupyter", marks=pytest.mark.slow)])
def sandbox(request):
    with Sandbox(config_for(request.param)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def shared(sandbox):
    with sandbox.open() as session:
        yield session


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2"),
        ("print('a'); 7", "a\n7"),
        ("x = 1", ""),
        ("x = 1;\nx;", ""),
        ("None", ""),
        ("'a;b'", "'a;b'"),
        ("'a;b';", ""),
        ("import asyncio\nawait asyncio.sleep(0, 'awaited')", "'awaited'"),
        ("async def numbers():\n    yield 3\n[n async for n in numbers()]", "[3]"),
        ("class Shown:\n    def _ipython_display_(self): print('shown')\nShown()", "shown"),
        (
            "class Plain:\n    def __repr__(self): return 'plain'\n[Plain(), {1: (2.5, True)}]",
            "[plain, {1: (2.5, True)}]",
        ),
        ("'two\\nlines'", "'two\\nlines'"),
        ("print(r'\\frac{1}{2}')", "\\frac{1}{2}"),
        ("import sys; print('noise', file=sys.stderr); print('kept')", "kept"),
        ("from fractions import Fraction\nFraction(1, 3) + Fraction(1, 6)", "Fraction(1, 2)"),
        ("from sympy import symbols\nsymbols('q') ** 2", "q**2"),
        ("print('\\x1b[31mred\\x1b[0m')", "red"),
    ],
)
def test_a_cell_answers_like_a_notebook(shared, code, output):
    result = shared.run(code)
    assert (result.output, result.status) == (output, "ok")


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print('lost'); undefined_name", "NameError: name 'undefined_name' is not defined"),
        ("raise ValueError", "ValueError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def f(:", "SyntaxError: invalid syntax (<cell>, line 1)"),
    ],
)
def test_an_error_is_its_last_line(shared, code, line):
    result = shared.run(code)
    assert (result.output, result.status) == (line, "error")


def test_state_persists_within_a_session_and_never_across(sandbox):
    with sandbox.open() as one, sandbox.open() as two:
        one.run("secret = 41")
        assert one.run("secret + 1").output == "42"
        assert two.run("secret").output == "NameError: name 'secret' is not defined"


def test_the_last_value_and_printers_of_the_notebook_are_there(sandbox):
    with sandbox.open() as session:
        session.run("[1, 2]")
        assert session.run("_ + [3]").output == "[1, 2, 3]"
        session.run("formatter = get_ipython().display_formatter.formatters['text/plain']")
        session.run("formatter.for_type(int, lambda value, printer, cycle: printer.text(f'<{value}>'));")
        assert session.run("7").output == "<7>"


def test_a_timeout_keeps_what_earlier_cells_made(sandbox):
    hurried = config_for(sandbox.config.backend, timeout_seconds=2.0, preload=())
    with Sandbox(hurried) as sandbox, sandbox.open() as session:
        session.run("x = 5")
        result = session.run("while True: pass")
        assert result.status == "timeout" and result.output.startswith("TimeoutError")
        assert session.run("x").output == "5"


def test_a_crash_is_data_and_the_next_cell_finds_the_earlier_ones_replayed(sandbox):
    with sandbox.open() as session:
        session.run("x = 5")
        session.run("1 / 0")
        assert session.run("import os; os._exit(3)").status == "crashed"
        assert session.run("x * 2").output == "10"


def test_memory_is_limited(sandbox):
    with sandbox.open() as session:
        assert session.run("b = bytearray(8 << 30)").status == "memory"
        assert session.run("1 + 1").output == "2"


def test_long_output_keeps_head_and_tail(sandbox):
    with sandbox.open() as session:
        result = session.run("print('h' * 100_000 + 't' * 100_000)")
        limit = sandbox.config.output_limit_chars
        assert result.status == "ok" and len(result.output) < limit + 60
        assert result.output.startswith("h" * (limit // 2)) and result.output.endswith("t" * (limit // 2 - 1))
        assert f"{200_000 - limit} characters cut" in result.output


def test_input_is_an_error(sandbox):
    with sandbox.open() as session:
        assert session.run("input('name?')").status == "error"


def test_a_shell_command_is_refused_in_words():
    with Sandbox() as sandbox, sandbox.open() as session:
        result = session.run("!ls")
        assert (result.output, result.status) == ("PermissionError: no program can be started here", "error")
        assert session.run("1 + 1").output == "2"


def test_asynchronous_face_runs_sessions_side_by_side(sandbox):
    async def trajectory(i):
        session = await sandbox.aopen()
        async with session:
            await session.arun(f"x = {i}")
            return (await session.arun("x * x")).output

    async def main():
        return await asyncio.gather(*(trajectory(i) for i in range(4)))

    assert asyncio.run(main()) == ["0", "1", "4", "9"]


def test_a_cancelled_cell_does_not_spoil_the_session(sandbox):
    async def main():
        session = await sandbox.aopen()
        async with session:
            await session.arun("x = 3")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(session.arun("while True: pass"), 0.2)
            return (await session.arun("x")).output

    assert asyncio.run(main()) == "3"


def test_the_tool_starts_nothing_until_opened_and_pickles():
    tool = pickle.loads(pickle.dumps(PythonTool(SandboxConfig(timeout_seconds=3.0))))
    assert tool.config.timeout_seconds == 3.0 and tool.sandbox._thread is None
    assert tool.schema["function"]["parameters"]["required"] == ["code"]
    tool.close()


def test_a_shared_sandbox_outlives_the_tool(sandbox):
    with PythonTool(sandbox=sandbox) as tool, tool.open() as session:
        assert session.run("2 + 2").output == "4"
    with sandbox.open() as session:
        assert session.run("2 + 2").output == "4"


def test_users_mistakes_raise_at_once():
    with pytest.raises(ValueError, match="backend='docker'"):
        SandboxConfig(backend="docker")
    with pytest.raises(ValueError, match="timeout_seconds=0"):
        SandboxConfig(timeout_seconds=0)
    with pytest.raises(ValueError, match="one string"):
        SandboxConfig(preload="numpy")
    with pytest.raises(ValueError, match="Give one"):
        PythonTool(SandboxConfig(), sandbox=Sandbox())


def test_a_missing_kernel_is_the_machines_failure():
    with Sandbox(config_for("jupyter", kernel_name="no-such-kernel")) as sandbox:
        with pytest.raises(ToolFailure, match="no-such-kernel"):
            sandbox.open()


def test_limits_on_cells_and_code_are_answered_as_text():
    with Sandbox(SandboxConfig(max_cells=1, code_limit_chars=20, preload=())) as sandbox, sandbox.open() as session:
        assert "more than the limit of 20" in session.run("x = " + "1" * 100).output
        assert session.run(5).output == "TypeError: `code` must be a string, not int"
        assert session.run("1").status == "ok"
        assert "limit of 1 cells" in session.run("1").output


def test_a_plain_kernel_refuses_to_pass_for_confined(caplog):
    with Sandbox(SandboxConfig(backend="jupyter")) as sandbox, pytest.raises(IsolationError, match="ordinary process"):
        sandbox.open()
