"""The doctor tries what it reports."""

import sys

import pytest

from trl_multiturn.sandbox import doctor


def test_the_report_is_about_this_machine(capsys):
    code = doctor.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line[8:10] == "  "]
    found = {line[10:].split("  ")[0]: line[:8].strip() for line in lines}
    assert {"system", "IPython", "fork server"} <= set(found)
    # strict isolation runs exactly where nothing is missing
    assert code == (1 if "missing" in found.values() else 0)


@pytest.mark.skipif(sys.platform != "linux", reason="there is nothing to take away")
def test_a_missing_wall_is_named_with_its_remedy(capsys, monkeypatch):
    from trl_multiturn.sandbox import forkserver
    from trl_multiturn.sandbox.sandbox import SandboxConfig

    from .test_confinement import without

    # the same machine, as it looks where the kernel has no Landlock
    start = forkserver.ForkServer._command
    prefix = without("landlock_create_ruleset")
    monkeypatch.setattr(forkserver.ForkServer, "_command", lambda self, fd: [*prefix, *start(self, fd)])
    assert SandboxConfig().isolation == "strict"
    assert doctor.main([]) == 1
    output = capsys.readouterr().out
    assert "missing  landlock" in output and "Linux 5.13" in output and "best_effort" in output


def test_unknown_arguments_are_refused(capsys):
    assert doctor.main(["--fix"]) == 2
