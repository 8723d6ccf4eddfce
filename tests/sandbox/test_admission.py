"""Cells in turn: first come, first served, from threads and event loops; and cells that never leave their caller's
thread, whatever comes in between."""

import asyncio
import linecache
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from trl_multiturn.sandbox import _admission as _turns, forked, session
from trl_multiturn.sandbox._admission import Gate, Visit
from trl_multiturn.sandbox._loop import LoopThread
from trl_multiturn.sandbox.sandbox import Sandbox, SandboxConfig

from .cells import BEGIN, PATIENCE_SECONDS, WAIT, eventually, has_begun, let_go


linux = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is tested on Linux")


# ------------------------------------------------------------------------------------------------------------- gates


def test_visits_enter_in_the_order_in_which_they_came():
    gate = Gate(1)
    first, second, third = Visit(gate), Visit(gate), Visit(gate)
    assert gate.join(first)
    assert not gate.join(second) and not gate.join(third)
    first.leave()
    assert gate.holds(second) and not gate.holds(third)
    second.leave()
    assert gate.holds(third)


def test_trying_never_overtakes_and_never_queues():
    gate = Gate(2)
    inside, waiting, hasty = [Visit(gate), Visit(gate)], Visit(gate), Visit(gate)
    assert all(map(gate.join, inside)) and not gate.join(waiting)
    inside[0].leave()
    assert gate.holds(waiting) and not gate.try_enter(hasty)
    waiting.leave()
    assert gate.try_enter(hasty)


def test_leaving_twice_or_from_the_queue_or_without_a_visit_frees_no_place_of_others():
    gate = Gate(1)
    inside, waiting, stranger = Visit(gate), Visit(gate), Visit(gate)
    gate.join(inside)
    gate.join(waiting)
    for visit in (stranger, waiting, waiting):
        visit.leave()
    assert gate.holds(inside) and not gate.holds(waiting) and not gate.try_enter(stranger)
    inside.leave()
    assert gate.try_enter(stranger)


def test_coroutines_and_threads_queue_together():
    gate, order = Gate(1), []

    async def wait(name):
        visit = Visit(gate)
        try:
            await gate.enter(visit)
            order.append(name)
        finally:
            visit.leave()

    async def main():
        holder, queued = Visit(gate), Visit(gate)
        gate.join(holder)
        tasks = [asyncio.create_task(wait("first"))]
        await asyncio.sleep(0)
        gate.join(queued)
        tasks += [asyncio.create_task(wait(name)) for name in ("third", "gives up", "fourth")]
        await asyncio.sleep(0)
        tasks[2].cancel()
        threading.Thread(target=holder.leave).start()
        await tasks[0]
        assert gate.holds(queued)
        order.append("second")
        queued.leave()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert order == ["first", "second", "third", "fourth"] and gate.try_enter(Visit(gate))


def test_one_side_only_sees_a_visit_out():
    visit = Visit(Gate(1))
    assert visit.take_over() and not visit.take_over()


# ---------------------------------------------------------------------------------------------------------- sessions


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(timeout_seconds=10.0, preload=(), max_running_cells=2)) as sandbox:
        yield sandbox


def in_time(function, *args):
    """Calls a function on a thread of its own, and fails if it does not come back."""
    outcome = []

    def call():
        try:
            outcome.append(function(*args))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert outcome, "the call does not come back"
    return outcome[0]


def until_gone(pid):
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.001)
    return True


@pytest.fixture
def in_between():
    """Runs an action as a signal handler, in the main thread, as soon as a condition holds."""
    watchers = []

    def when(condition, action):
        def watch():
            if eventually(condition):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, lambda *_: action())
        watchers.append(threading.Thread(target=watch, daemon=True))
        watchers[-1].start()

    before = signal.getsignal(signal.SIGUSR1)
    yield when
    for watcher in watchers:
        watcher.join()
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def on_the_callers_thread(monkeypatch):
    """However busy the machine is, no cell takes so long that it is handed over."""
    monkeypatch.setattr(forked, "_WATCH_AFTER_SECONDS", 60.0)


@linux
def test_an_ordinary_cell_stays_on_its_callers_thread(sandbox, monkeypatch):
    def refuse(thread, coroutine):
        coroutine.close()
        raise RuntimeError("on the loop")

    with sandbox.open() as session:
        with monkeypatch.context() as patch:
            patch.setattr(LoopThread, "run", refuse)
            with pytest.MonkeyPatch.context() as patient:
                patient.setattr(forked, "_WATCH_AFTER_SECONDS", 60.0)  # a busy machine may need more than 20 ms
                assert session.run("x = 20").status == "ok"
                assert session.run("print(x); x + 1").output == "20\n21"
                assert session.run("1 / 0").status == "error"
            with pytest.raises(RuntimeError, match="on the loop"):
                session.run("import time; time.sleep(60)")
        assert in_time(session.run, "x").output == "20"


@linux
def test_a_longer_cell_is_handed_over_and_its_time_counts_from_its_start(sandbox):
    with sandbox.open() as session:
        result = session.run("import time; time.sleep(0.15); print('x' * 3000); 'done'")
        assert result.output.endswith("'done'") and result.output.startswith("xxx")
        assert result.seconds >= 0.15
        with Sandbox(SandboxConfig(timeout_seconds=0.2, preload=())) as hurried, hurried.open() as other:
            result = other.run("while True: pass")
            assert result.status == "timeout" and result.seconds >= 0.2


@linux
def test_threads_on_one_session_take_turns(sandbox):
    with sandbox.open() as session:
        session.run("x = 0")
        answers = []

        def count():
            for i in range(25):
                answers.append(session.run("x += 1; x" if i % 5 else "import time; time.sleep(0.021); x += 1; x"))

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert sorted(int(answer.output) for answer in answers) == list(range(1, 101))
        assert len(session._history) == 101 and session._cells == 101


@linux
def test_a_call_never_overtakes_an_earlier_one_of_an_event_loop(sandbox):
    async def main(session):
        task = asyncio.create_task(session.arun("import time; time.sleep(0.03); log = ['earlier']"))
        await asyncio.sleep(0)
        later = session.run("log + ['later']")
        await task
        return later.output

    for _ in range(5):
        with sandbox.open() as session:
            assert asyncio.run(main(session)) == "['earlier', 'later']"


@linux
def test_a_cancelled_call_leaves_the_queue(sandbox):
    async def main(session):
        running = asyncio.create_task(session.arun(f"{BEGIN}{WAIT}'ran'"))
        assert await asyncio.to_thread(eventually, lambda: has_begun(session))
        queued = [asyncio.create_task(session.arun("y = 1")) for _ in range(3)]
        await asyncio.sleep(0)
        for task in queued:
            task.cancel()
        await asyncio.gather(*queued, return_exceptions=True)
        let_go(session)
        return (await running).output, (await session.arun("y")).output

    with sandbox.open() as session:
        assert asyncio.run(main(session)) == ("'ran'", "NameError: name 'y' is not defined")


@linux
def test_a_process_that_died_between_two_cells_is_replaced(sandbox):
    with sandbox.open() as session:
        session.run("x = 6")
        pid = session._interpreter.pid
        os.kill(pid, signal.SIGKILL)
        assert in_time(until_gone, pid)
        result = in_time(session.run, "x * 7")
        assert (result.output, result.status) == ("42", "ok")


@linux
def test_a_cell_that_kills_its_process_at_once_is_judged_as_ever(sandbox):
    with sandbox.open() as session:
        session.run("x = 6")
        result = session.run("import os; os._exit(3)")
        assert (result.output, result.status) == ("RuntimeError: the interpreter died (exit code 3)", "crashed")
        forged = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'x' * 99)\n    except OSError: pass"
        assert "garbage" in session.run(forged).output
        assert session.run("x").output == "6"


@linux
@pytest.mark.parametrize("patience", [60.0, 0.0], ids=["on the caller's thread", "on the loop"])
def test_ctrl_c_ends_the_cell_and_the_session_goes_on(sandbox, in_between, monkeypatch, patience):
    monkeypatch.setattr(forked, "_WATCH_AFTER_SECONDS", patience)
    with sandbox.open() as session:
        session.run("x = 6")
        pid = session._interpreter.pid

        def there():
            mine = {visit.caller is not None for visit in tuple(session._turn._inside)}
            return has_begun(session) and mine == {patience > 0}

        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            in_between(there, interrupt)
            session.run(f"{BEGIN}x = 7\nimport time; time.sleep(60)")
        assert in_time(session.run, "x").output == "6"
        assert session._interpreter.pid != pid and not Path(f"/proc/{pid}").exists()


@linux
def test_ctrl_c_between_any_two_lines_leaves_nothing_occupied(sandbox):
    own = {module.__file__ for module in (session, forked, _turns)}

    def interrupt_at(count):
        left = [count]

        def trace(frame, event, argument):
            file, line = frame.f_code.co_filename, frame.f_lineno
            if file not in own:
                return None
            # Python takes no signal between the last line under a lock of C and its release, but traces that moment
            left[0] -= event == "line" and not linecache.getline(file, line).lstrip().startswith("with self._")
            if left[0] == 0:
                raise KeyboardInterrupt(f"{file}:{line}")
            return trace

        return trace

    with sandbox.open() as victim:
        victim.run("x = 6")
        interrupted = 0
        for count in range(1, 1000):
            before, tracer = sys.gettrace(), interrupt_at(count)
            try:
                sys.settrace(tracer)
                victim.run("y = x")
            except KeyboardInterrupt as error:
                where, interrupted = str(error), interrupted + 1
            else:
                break
            finally:
                sys.settrace(before)
            assert in_time(victim.run, "x").output == "6", where
        assert interrupted > 50
        assert not any(gate._inside or gate._queue for gate in (victim._turn, sandbox.admission))


@linux
def test_a_signal_handler_may_close_the_session_of_the_cell_it_interrupts(sandbox, in_between):
    session = sandbox.open()
    pid = session._interpreter.pid
    in_between(lambda: has_begun(session), session.close)
    assert session.run(f"{BEGIN}import time; time.sleep(60)").status == "crashed"
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(RuntimeError, match="closed"):
        session.run("1")


@linux
def test_a_signal_handler_is_told_that_its_cell_would_wait_for_ever(sandbox, in_between, on_the_callers_thread):
    answers = []

    def handler():
        answers.append(other.run("'another session'").output)
        with pytest.raises(RuntimeError, match="in the middle of another cell"):
            session.run("1")
        answers.append("refused")
        let_go(session)

    with sandbox.open() as session, sandbox.open() as other:
        in_between(lambda: has_begun(session), handler)
        assert session.run(f"{BEGIN}{WAIT}'undisturbed'").output == "'undisturbed'"
        assert answers == ["'another session'", "refused"]
        assert session.run("1").output == "1"


@linux
def test_closing_under_quick_cells_disturbs_nobody_else(sandbox):
    def keep_running(session, outcomes):
        try:
            while True:
                outcomes.append(session.run("1 + 1"))
        except RuntimeError as error:
            outcomes.append(error)

    with sandbox.open() as sibling:
        sibling.run("x = 6")
        for i in range(20):
            session, outcomes = sandbox.open(), []
            thread = threading.Thread(target=keep_running, args=(session, outcomes), daemon=True)
            thread.start()
            time.sleep(0.002 * (i % 5))
            session.close()
            assert sibling.run("x * 7").output == "42"
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive() and "closed" in str(outcomes.pop())
            assert {outcome.status for outcome in outcomes} <= {"ok", "crashed"}
            assert session._interpreter is None


@linux
def test_closing_the_sandbox_under_quick_cells_lets_every_caller_go():
    for i in range(3):
        sandbox = Sandbox(SandboxConfig(preload=()))
        sessions = [sandbox.open() for _ in range(3)]
        ended = []

        def keep_running(session, ended=ended):
            try:
                while session.run("1 + 1").status in ("ok", "crashed"):
                    pass
            except BaseException as error:
                ended.append(error)

        threads = [threading.Thread(target=keep_running, args=(session,), daemon=True) for session in sessions]
        for thread in threads:
            thread.start()
        time.sleep(0.01 * i)
        sandbox.close()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert len(ended) == len(threads) and not any(thread.is_alive() for thread in threads)
