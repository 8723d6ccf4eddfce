import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.verify import misbehaving_worker
from tests.verify.misbehaving_worker import GROWS, SPINS
from trl_multiturn.verify import MathVerifier, math_reward, math_verify_reward, mathematics, paper_reward
from trl_multiturn.verify.mathematics import _SCRIPT as SCRIPT
from trl_multiturn.verify.workers import Worker, WorkerDied, WorkerPool


MISBEHAVING = Path(misbehaving_worker.__file__)


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(timeout_seconds=20.0, num_workers=1)
    yield verifier
    verifier.close()


def box(text):
    return [{"role": "assistant", "content": rf"The answer is \boxed{{{text}}}."}]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def worker_pids(verifier):
    return [worker.pid for worker in verifier._pool._idle]


def test_reward_by_kinds_of_gold():
    rewards = math_reward(
        prompts=[None] * 8,
        completions=[
            box("18"),
            box("18"),
            box("17"),
            box("18.0"),
            box(r"\frac12"),
            box("(x-1)(x+1)"),
            box("2x"),
            box("B"),
        ],
        answer=[18, "reasoning <<9*2=18>>\n#### 18", "18", "18", "0.5", r"so $\boxed{x^2-1}$", "x^2", "B"],
        completion_ids=[[1]] * 8,
        trainer_state=None,
    )
    assert rewards == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]


def test_no_answer_is_wrong_and_no_gold_is_undecided():
    turns = [{"role": "assistant", "content": r"\boxed{1}"}, {"role": "tool", "content": "1"}]
    unanswered = [*turns, {"role": "assistant", "content": "I give up."}]
    malformed = box(r"\frac{}{}")
    assert math_reward([None] * 4, [unanswered, malformed, box("1"), []], answer=["1", "1", None, "1"]) == [
        0.0,
        0.0,
        None,
        0.0,
    ]


def test_a_missing_column_is_the_users_mistake():
    with pytest.raises(ValueError, match="column `answer`.*solution"):
        math_reward([None], [box("1")], solution=["1"])


def test_plain_numbers_never_start_a_process():
    verifier = MathVerifier(num_workers=1)
    texts = [str(i) for i in range(3000)]
    assert verifier.verify(texts, [f"{i}.0" if i % 2 else str(i + 1) for i in range(3000)]) == [
        i % 2 == 1 for i in range(3000)
    ]
    assert verifier.verify([r"\int_0^1 x dx"], [r" \int_0^1 x dx"]) == [True]  # the same text
    assert worker_pids(verifier) == []


@pytest.mark.parametrize(
    ("gold", "answer", "exact", "math_verify", "paper"),
    [
        ("35", r"35\%", None, True, True),
        ("0.5", "0.50000001", False, True, True),
        ("18", "18.001", False, False, True),
        ("12 cm", "12 m", False, True, True),
        ("2 hours 30 minutes", "150 minutes", True, False, False),
        ("x^2-1", "(x-1)(x+1)", True, True, True),
    ],
)
def test_other_rules_can_be_chosen(gold, answer, exact, math_verify, paper):
    for reward, verdict in ((math_reward, exact), (math_verify_reward, math_verify), (paper_reward, paper)):
        assert reward([None], [box(answer)], answer=[gold]) == [verdict], reward.__name__


def test_rules_have_names():
    with pytest.raises(ValueError, match="`rules='loose'` is unknown.*exact, math_verify, paper"):
        MathVerifier(rules="loose")
    assert len({reward.version for reward in (math_reward, math_verify_reward, paper_reward)}) == 3


def test_the_question_decides_whether_the_percent_sign_may_be_missing():
    asked = [{"role": "user", "content": "It has 3 parts. What percent is the first?"}]
    other = [{"role": "user", "content": "It fell by 20%. How much is left?"}]
    assert math_reward([asked, other], [box(r"25\%")] * 2, answer=["25", "25"]) == [1.0, None]


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (r"e^{i\pi}", "-1", True),
        (r"(1+i)^2", "2i", True),
        ("x < 2 or x > 5", r"(-\infty, 2) \cup (5, \infty)", True),
        ("2x+1", "x+1+x", True),
        ("4t", "4", False),  # math-verify takes t for a unit
        (r"\frac{1}{20!}", r"\frac{1}{21!}", False),  # equal in six decimals
        (r"\infty", r"+\infty", True),
        (r"\frac{}{}+", "3x", None),  # a gold answer that nobody can read
        ("3x", r"\frac{}{}+", None),
        ("3", r"\frac{}{}+", False),  # what equals a number can be read
    ],
)
def test_expressions(verifier, gold, answer, equal):
    assert verifier.verify([gold], [answer]) == [equal]


def test_a_hanging_comparison_is_killed_and_its_worker_replaced(monkeypatch):
    monkeypatch.setattr(mathematics, "_SCRIPT", MISBEHAVING)
    verifier = MathVerifier(timeout_seconds=2.0, num_workers=1)
    assert verifier.verify(["2x"], ["x+x"]) == [True]
    (first,) = worker_pids(verifier)
    assert verifier.verify([SPINS, "3x"], ["x+1", "x+x+x"]) == [None, True]
    (second,) = worker_pids(verifier)
    assert first != second and not alive(first) and alive(second)
    verifier.close()
    assert not alive(second)
    assert verifier.verify(["4x"], ["2x+2x"]) == [True]  # still usable
    verifier.close()


def test_undecided_in_the_reward_is_none(monkeypatch):
    monkeypatch.setattr(mathematics, "_SCRIPT", MISBEHAVING)
    verifier = MathVerifier(timeout_seconds=1.0, num_workers=1)
    assert verifier.reward([None] * 2, [box("x+1"), box("7")], answer=[SPINS, "7"]) == [None, 1.0]
    verifier.close()


def test_a_gold_answer_that_cannot_be_compared_is_undecided(verifier):
    assert verifier.verify([""], ["x"]) == [None]


def test_a_comparison_that_needs_too_much_memory_is_undecided():
    with pytest.raises(WorkerDied, match="memory limit passed"):
        Worker(MISBEHAVING, memory_limit_mb=300).ask({"gold": GROWS, "answer": "x+1", "seconds": 120.0}, 120.0)


def test_the_first_answer_pays_for_no_import():
    def read(worker):
        with open(f"/proc/{worker.pid}/io") as file:
            return int(file.readline().removeprefix("rchar: "))

    worker = Worker(SCRIPT, memory_limit_mb=2048)
    before = read(worker)
    assert worker.ask({"gold": "3y", "answer": "y+y+y", "seconds": 20.0}, 20.0) == {"equal": True}
    assert read(worker) - before < 4096  # the request
    worker.kill()


def test_threads_share_the_workers(verifier):
    results = {}

    def compare(i):
        results[i] = verifier.verify([f"{i}x+y"], [f"y+{i}x" if i % 2 else f"y-{i}x"])

    threads = [threading.Thread(target=compare, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [i % 2 == 1] for i in range(1, 9)}
    assert len(worker_pids(verifier)) == 1


def test_a_forked_child_does_not_read_the_parents_replies(verifier):
    assert verifier.verify(["5x"], ["2x+3x"]) == [True]
    parents = worker_pids(verifier)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # the child starts a worker of its own
        outcome = [verifier.verify(["6x"], ["2x+4x"]), worker_pids(verifier)]
        verifier.close()
        os.write(write, json.dumps(outcome).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        verdicts, childs = json.load(pipe)
    assert verdicts == [True] and not set(childs) & set(parents)
    assert worker_pids(verifier) == parents and verifier.verify(["7x"], ["2x+5x"]) == [True]


PROGRAM = """
import os, sys, time
print("imported", flush=True)
from pathlib import Path
from trl_multiturn.verify import MathVerifier, mathematics
mathematics._SCRIPT = Path({script!r})
verifier = MathVerifier(timeout_seconds={timeout}, num_workers=1)
verifier.verify(["2x"], ["x+x"])
print(verifier._pool._idle[0].pid, flush=True)
{rest}
"""


def run_program(tmp_path, rest, timeout=30.0):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(rest=rest, timeout=timeout, script=str(MISBEHAVING)))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)


def wait_until_gone(pid, seconds=30):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_the_worker_is_lean_and_ends_with_the_program(tmp_path):
    rest = "print(open(f'/proc/{verifier._pool._idle[0].pid}/maps').read().count('libtorch'), flush=True)"
    process = run_program(tmp_path, rest)
    lines = process.communicate(timeout=120)[0].split()
    assert process.returncode == 0
    # the program's own first line appears once: the worker did not run the user's `__main__`; nor did it load torch
    assert lines.count("imported") == 1 and lines[2] == "0"
    assert wait_until_gone(int(lines[1]))


def test_a_hung_worker_does_not_outlive_a_killed_program(tmp_path):
    process = run_program(tmp_path, f"verifier.verify([{SPINS!r}], ['x+1'])", timeout=2.0)
    process.stdout.readline()
    pid = int(process.stdout.readline())
    time.sleep(0.3)  # the worker is computing
    process.kill()
    process.communicate()
    assert wait_until_gone(pid)  # its own alarm ends it


def test_a_worker_that_cannot_load_says_what_to_install(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import json, sys\nsys.stdin.readline()\n"
        "print(json.dumps({'ready': False, 'error': 'ModuleNotFoundError: math_verify'}), flush=True)\n"
    )
    with pytest.raises(ImportError, match="pip install math-verify"):
        WorkerPool(script, 1, 512).ask({}, 1.0)
    script.write_text("raise SystemExit(3)")
    pool = WorkerPool(script, 1, 512)
    for _ in range(2):  # the failed start gives its place back
        with pytest.raises(RuntimeError, match="did not start"):
            pool.ask({}, 1.0)


def test_a_limit_without_time_is_refused():
    with pytest.raises(ValueError, match="timeout_seconds"):
        MathVerifier(timeout_seconds=0)
