"""Nothing outlives its owner, nothing leaks, nothing is shared: processes, descriptors, folders, random numbers."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from trl_multiturn.sandbox._admission import Visit
from trl_multiturn.sandbox.backend import Reply
from trl_multiturn.sandbox.config import SandboxConfig
from trl_multiturn.sandbox.result import ToolFailure
from trl_multiturn.sandbox.sandbox import Sandbox

from .cells import BEGIN, PATIENCE_SECONDS, WAIT, eventually, has_begun, let_go


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is tested on Linux")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def processes_and_folders(sandbox: Sandbox, *sessions) -> tuple[list[int], list[str]]:
    interpreters = [session._interpreter for session in sessions]
    pids = [sandbox._backend.pid, *(interpreter.pid for interpreter in interpreters)]
    return pids, [sandbox._backend.root, *(interpreter.folder for interpreter in interpreters)]


@pytest.fixture
def sandbox():
    with Sandbox(SandboxConfig(timeout_seconds=10.0, preload=())) as sandbox:
        yield sandbox


def test_closing_leaves_neither_processes_nor_folders(sandbox):
    sessions = [sandbox.open() for _ in range(3)]
    for session in sessions:
        session.run("open('file', 'w').write('x')")
    pids, folders = processes_and_folders(sandbox, *sessions)
    assert all(map(alive, pids)) and all(map(os.path.isdir, folders))
    sessions[0].close()
    assert not alive(pids[1]) and not os.path.exists(folders[1])
    sandbox.close()
    assert not any(map(alive, pids)) and not any(map(os.path.exists, folders))


def test_a_forgotten_sandbox_ends(sandbox):
    forgotten = Sandbox(SandboxConfig(preload=()))
    session = forgotten.open()
    pids, folders = processes_and_folders(forgotten, session)
    del session, forgotten
    gc.collect()
    assert eventually(lambda: not any(map(alive, pids)) and not any(map(os.path.exists, folders)))


def test_a_forgotten_session_ends_before_its_sandbox(sandbox):
    session = sandbox.open()
    pid = session._interpreter.pid
    del session
    gc.collect()
    assert eventually(lambda: not alive(pid))
    assert sandbox.open().run("1").output == "1"


@pytest.mark.parametrize("cell", ["1", "while True: pass"], ids=["idle", "spinning"])
def test_killing_the_trainer_ends_everything(cell):
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                f"""
                import os, threading, time
                from trl_multiturn.sandbox.sandbox import Sandbox, SandboxConfig
                sandbox = Sandbox(SandboxConfig(timeout_seconds=600.0, preload=()))
                session = sandbox.open()
                threading.Thread(target=session.run, args=({BEGIN + cell!r},), daemon=True).start()
                while not os.path.exists(os.path.join(session._interpreter.folder, "begun")):
                    time.sleep(0.002)
                print(sandbox._backend.pid, session._interpreter.pid, sandbox._backend.root, flush=True)
                time.sleep(600)
                """
            ),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    zygote, pid, root = trainer.stdout.readline().split()
    assert alive(int(zygote)) and alive(int(pid))
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert eventually(lambda: not alive(int(zygote)) and not alive(int(pid)) and not os.path.exists(root))


def test_killing_the_warm_interpreter_costs_nothing_but_time(sandbox):
    session = sandbox.open()
    session.run("x = 6")
    (zygote, pid), (root, _) = processes_and_folders(sandbox, session)
    os.kill(zygote, signal.SIGKILL)
    assert eventually(lambda: not alive(pid))
    result = session.run("x * 7")
    assert (result.output, result.status) == ("42", "ok")
    assert sandbox._backend.pid != zygote and eventually(lambda: not os.path.exists(root))


def test_killing_the_warm_interpreter_under_a_cell_runs_the_cell_again(sandbox):
    session = sandbox.open()
    session.run("x = 6")
    zygote, first = sandbox._backend.pid, session._interpreter

    def kill():
        if eventually(lambda: has_begun(session)):
            os.kill(zygote, signal.SIGKILL)
            if eventually(lambda: session._interpreter is not first and has_begun(session)):
                let_go(session)

    killer = threading.Thread(target=kill)
    killer.start()
    result = session.run(f"{BEGIN}{WAIT}x * 7")
    killer.join()
    assert (result.output, result.status) == ("42", "ok") and sandbox._backend.pid != zygote


def test_closing_while_a_cell_runs(sandbox):
    session = sandbox.open()
    pid = session._interpreter.pid
    thread = threading.Thread(target=session.run, args=(f"{BEGIN}while True: pass",))
    thread.start()
    assert eventually(lambda: has_begun(session))
    session.close()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive() and not alive(pid)
    with pytest.raises(RuntimeError, match="closed"):
        session.run("1")


def test_sessions_leak_nothing(sandbox):
    def descriptors(pid):
        return len(os.listdir(f"/proc/{pid}/fd"))

    def resident(pid):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cycle(count):
        for i in range(count):
            session = sandbox.open()
            session.run(f"x = {i}; open('f', 'w').write('x')")
            if i % 5 == 0:
                session.run("import os; os._exit(1)")
            session.close()

    gc.collect()  # what other tests have left behind would go in between
    cycle(20)
    zygote, root = sandbox._backend.pid, sandbox._backend.root

    def held():
        return [descriptors("self"), descriptors(zygote), sorted(os.listdir(root))]

    before = held()
    memory = [resident("self"), resident(zygote)]
    cycle(100)
    assert eventually(lambda: held() == before), (held(), before)
    assert resident("self") - memory[0] < 8 << 20 and resident(zygote) - memory[1] < 8 << 20
    assert not sandbox._backend._exits and not sandbox._backend._spawned and not sandbox._backend._open


def test_a_forked_worker_neither_holds_nor_uses_the_sessions(sandbox):
    session = sandbox.open()
    pids, _ = processes_and_folders(sandbox, session)
    told, tell = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            session.run("1")
        except RuntimeError as error:
            os.write(tell, str(error).encode())
        time.sleep(60)
        os._exit(0)
    try:
        assert b"another process" in os.read(told, 1000)
        sandbox.close()
        assert not any(map(alive, pids))
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(told)
        os.close(tell)


def test_sessions_see_nothing_of_the_trainers_environment(sandbox, monkeypatch):
    monkeypatch.setenv("MY_SECRET_TOKEN", "hunter2")
    with Sandbox(SandboxConfig(environment={"MY_SETTING": "7"}, preload=())) as other, other.open() as session:
        output = session.run("import os; dict(os.environ)").output
        assert "hunter2" not in output and "'MY_SETTING': '7'" in output and "'CUDA_VISIBLE_DEVICES': ''" in output


def test_seeds_make_sessions_repeat_and_without_one_they_differ(sandbox):
    code = "import random, numpy\n(random.random(), numpy.random.rand(), list({'a', 'b', 'c', 'd'}), hash('x'))"
    with Sandbox(SandboxConfig(seed=3, preload=("numpy",))) as seeded, seeded.open() as one, seeded.open() as two:
        same = one.run(code).output
        assert two.run(code).output == same
    with Sandbox(SandboxConfig(seed=3, preload=("numpy",))) as again, again.open() as three:
        assert three.run(code).output == same
    with sandbox.open() as one, sandbox.open() as two:
        for draw in ("import random; random.random()", "import numpy; numpy.random.rand()"):
            assert one.run(draw).output != two.run(draw).output
        assert one.run("hash('x')").output == two.run("hash('x')").output


def test_cells_beyond_the_cores_wait_without_losing_time():
    config = SandboxConfig(timeout_seconds=1.5, max_running_cells=1, preload=())
    with Sandbox(config) as sandbox:
        sessions = [sandbox.open() for _ in range(3)]
        results = [None] * len(sessions)

        def run(i):
            results[i] = sessions[i].run("6 * 7")

        running = Visit(sandbox.admission)  # a cell that fills the machine for longer than the limit of each
        assert sandbox.admission.try_enter(running)
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(sessions))]
        for thread in threads:
            thread.start()
        assert eventually(lambda: len(sandbox.admission._queue) == len(sessions))
        time.sleep(1.6)
        assert results == [None] * len(sessions)
        running.leave()
        for thread in threads:
            thread.join()
        # a clock that had started before admission would have expired
        assert [(result.output, result.status) for result in results] == [("42", "ok")] * len(sessions)


def test_an_interpreter_that_cannot_start_is_the_machines_failure():
    with Sandbox(SandboxConfig(python="/bin/false")) as sandbox, pytest.raises(ToolFailure, match="does not start"):
        sandbox.open()


def test_a_session_holds_its_own_socket_and_nothing_else(sandbox):
    with sandbox.open() as one, sandbox.open() as two:
        for session in (one, two):
            links = [os.readlink(link) for link in Path(f"/proc/{session._interpreter.pid}/fd").iterdir()]
            assert sorted(link.split(":")[0] for link in links) == ["/dev/null"] * 3 + ["socket"]


def test_a_fork_that_fails_is_the_machines_failure_and_spares_the_others(sandbox):
    with sandbox.open() as session:
        session.run("x = 5")
        root = sandbox._backend.root
        os.mkdir(os.path.join(root, str(sandbox._backend._numbers + 1)))  # the next session's folder cannot be made
        with pytest.raises(ToolFailure, match="cannot be forked"):
            sandbox.open()
        assert session.run("x").output == "5"
        with sandbox.open() as other:
            assert other.run("1").output == "1"


def test_another_executor_plugs_in():
    class Echo:
        async def start(self):
            self.closed = 0

        async def spawn(self):
            return self

        async def execute(self, code, timeout):
            if code == "die":
                return Reply("", "crashed", alive=False)
            return Reply(code.upper(), "ok")

        async def close(self):
            self.closed += 1

        async def stop(self):
            self.stopped = True

    echo = Echo()
    with Sandbox(backend=echo) as sandbox, sandbox.open() as session:
        assert session.run("abc").output == "ABC"
        assert session.run("die").status == "crashed"
        assert session.run("next").output == "NEXT"
    assert echo.closed == 2 and echo.stopped
