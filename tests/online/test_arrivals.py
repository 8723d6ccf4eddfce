"""After rollouts over several processes all trajectories must show: late ones are waited for, missing ones told."""

from __future__ import annotations

import pytest

from tests.journal.test_journal import trajectory
from trl_multiturn.errors import JournalError
from trl_multiturn.journal.journal import Journal, Places
from trl_multiturn.online import arrivals


PLACES = Places(range(4), {"0/current": [range(2), range(4, 5)], "0/previous": [range(2, 4)]})


def write(journal, prompts):
    for prompt in prompts:
        for scope, spans in PLACES.samples.items():
            for span in spans:
                for sample in span:
                    journal.append(scope, trajectory(prompt, sample))


def test_each_place_is_counted_once_and_only_where_it_was_asked_for(tmp_path):
    with Journal(tmp_path) as journal:
        write(journal, [0, 1, 1, 3])
        journal.append("0/current", trajectory(2, 1))
        journal.append("0/current", trajectory(2, 7))  # of other settings
        journal.append("9/current", trajectory(2, 0))
    assert PLACES.count == 20
    assert Journal(tmp_path).missing(PLACES) == {2: 4}
    read = [
        (t.info["prompt_index"], t.info["sample_index"])
        for group in Journal(tmp_path).read_by_prompt(PLACES)
        for t in group
    ]
    assert len(read) == 16 and read.count((2, 1)) == 1 and (2, 7) not in read


def test_what_shows_late_is_waited_for(tmp_path, monkeypatch, caplog):
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        with Journal(tmp_path) as journal:
            write(journal, [2 if len(waits) == 1 else 3])

    monkeypatch.setattr(arrivals.time, "sleep", sleep)
    with Journal(tmp_path) as journal:
        write(journal, [0, 1])
    arrivals.await_trajectories(Journal(tmp_path), PLACES, processes=2)
    assert len(waits) == 2 and "10 trajectories do not show" in caplog.text


def test_what_never_shows_is_an_error_that_names_the_processes(tmp_path):
    with Journal(tmp_path) as journal:
        write(journal, [0, 2])
    with pytest.raises(JournalError, match="shows 10 of 20 trajectories; missing are 10 of process 1"):
        arrivals.await_trajectories(Journal(tmp_path), PLACES, processes=2, patience_seconds=0)
