"""Every hostile cell is contained: the host is unharmed, the verdict is one of ours, and the next cell works."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from .attacks import ATTACKS, REFUSED
from .portable import PortablePython


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server confines on Linux only")

_HERE = Path(__file__).parent
_NOBODY = 65534
_LATE_SECONDS = 120.0  # far beyond timeout and grace: a verdict that needs this long is a client that was blocked
_SOME_ENDLESS = ("loop", "loop_in_c", "signals_ignored", "sleep", "endless_str")
# a cell that stumbles over its own mistake attacks nothing
_NEVER_RAN = ("SyntaxError", "NameError", "AttributeError", "TypeError", "ImportError", "ModuleNotFoundError")


class Arena:
    """The process in which the cells are let loose."""

    def __init__(self, user: int, copy: PortablePython | None = None) -> None:
        python, folder = (copy.python, copy.checkout / "tests" / "sandbox") if copy else (sys.executable, _HERE)
        found = copy.environment if copy else {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            [str(python), str(folder / "arena.py"), str(user)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **found},
            cwd=folder,
            start_new_session=True,
        )
        self.user = user
        try:
            self.hello = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict:
        ready, _, _ = select.select([self.process.stdout], [], [], _LATE_SECONDS)
        assert ready, "the arena does not answer: its client is blocked"
        line = self.process.stdout.readline()
        assert line, "the arena died"
        return json.loads(line)

    def attack(self, name: str) -> dict:
        self.process.stdin.write(json.dumps({"name": name}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="session")
def portable_python():
    try:
        copy = PortablePython(("ipython", "numpy", "sympy"))
    except OSError as error:
        pytest.skip(f"no Python for an unprivileged user: {error}")
    yield copy
    copy.remove()


@pytest.fixture(scope="module", params=["as_this_user", pytest.param("as_nobody", marks=pytest.mark.slow)])
def arena(request):
    if request.param == "as_this_user":
        arena = Arena(os.geteuid())
    elif os.geteuid() != 0:
        pytest.skip("only root can become another user, and this user is unprivileged already")
    else:
        arena = Arena(_NOBODY, request.getfixturevalue("portable_python"))
    yield arena
    arena.close()


def test_the_arena_has_every_wall(arena):
    assert arena.hello["user"] == arena.user
    assert arena.hello["layers"]["landlock"] != "off" and arena.hello["layers"]["seccomp"] != "off"


def _by_pace(attack):
    # each of these lasts as long as the limit on time; a few of them are enough for a quick run
    endless = attack.statuses == ("timeout",) and attack.name not in _SOME_ENDLESS
    return pytest.param(attack, id=attack.name, marks=[pytest.mark.slow] if endless else [])


@pytest.mark.parametrize("attack", [_by_pace(attack) for attack in ATTACKS])
def test_attack_is_contained(arena, attack):
    report = arena.attack(attack.name)
    assert report["problems"] == []
    assert report["status"] in attack.statuses, report
    assert report["next"] == ["ok", "42"], report
    if attack.statuses == REFUSED:
        assert not report["output"].startswith(_NEVER_RAN), "the attack did not run"
