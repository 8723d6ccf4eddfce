"""What a run says when it ends or is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trl_multiturn.journal.run_folder import RunFolder
from trl_multiturn.online import endings
from trl_multiturn.online.report import IterationReport


def test_the_line_to_copy_names_the_program_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endings.shutil, "which", lambda name: "/bin/trl-multiturn")
    assert endings.view_command(tmp_path / "out put") == "trl-multiturn view 'out put'"
    monkeypatch.setattr(endings.shutil, "which", lambda name: None)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "trl-multiturn").touch()
    monkeypatch.setattr(endings.sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert endings.view_command("outputs/run") == ".venv/bin/trl-multiturn view outputs/run"
    monkeypatch.setattr(endings.sys, "executable", "/elsewhere/python")
    assert endings.view_command("/data/run") == "/elsewhere/python -m trl_multiturn.cli view /data/run"


def test_a_stopped_run_says_where_it_was(tmp_path):
    run = RunFolder(tmp_path / "rollouts")
    assert "Stopped before the first iteration. Nothing that finished is lost." in endings.stopped(run)
    IterationReport(0, ready=False).save(run.iteration(0).path)
    assert "Stopped in iteration 1, while it rolled out." in endings.stopped(run)
    IterationReport(0, trained_rows=5).save(run.iteration(0).path)
    assert "Stopped in iteration 1, while it trained on its 5 rows." in endings.stopped(run)
    IterationReport(0, last_step=3).save(run.iteration(0).path)
    assert "Stopped after iteration 1." in endings.stopped(run)


SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell started the tests behind itself
from tests.test_callbacks import make_run, solve
from trl_multiturn import PythonTool
from trl_multiturn.scripts.online import run_script

def script(prompt_text, sampling, session):
    if session == "1/current/2/0":
        os.kill(os.getpid(), signal.SIGINT)
    return solve(prompt_text, sampling, session)

def main(folder):
    with PythonTool() as tool:
        make_run(folder, tool, script)[0].train()

run_script(main, sys.argv[1])
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_script_with_how_it_goes_on_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[2], env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr and "KeyboardInterrupt" not in done.stderr
    stopped, look = done.stdout.strip().splitlines()[-2:]
    assert stopped.startswith("Stopped in iteration 2, while it rolled out.") and "with the same command" in stopped
    assert look == f"Look at it: {endings.view_command(tmp_path)}"
