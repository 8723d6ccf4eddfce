"""Rows written prompt by prompt are, bit for bit, those of all trajectories at once."""

from __future__ import annotations

import random
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, List, Value, load_from_disk

from tests.rows.test_pairing import fresh, trajectory
from trl_multiturn.data import columns
from trl_multiturn.data.columns import list_lengths, with_list_column
from trl_multiturn.rows.pairing import build_preference_dataset, build_unpaired_dataset
from trl_multiturn.rows.row_files import forget_caches, save_rows, write_rows
from trl_multiturn.rows.selection import PairingConfig, UnpairedConfig, select, select_by_prompt
from trl_multiturn.trajectory import StopReason
from trl_multiturn.verify import AUTHORS_FILTERS


PAIRINGS = [
    PairingConfig(filters=[]),
    PairingConfig(strategy="best_worst", max_pairs_per_prompt=3, min_reward_gap=0.25, filters=[], seed=3),
    PairingConfig(strategy="step", max_pairs_per_prompt=2, filters=[], deduplicate=False),
    PairingConfig(filters=list(AUTHORS_FILTERS), max_pairs_per_prompt=9),
]
UNPAIRED = [
    UnpairedConfig(),
    UnpairedConfig(max_positives=2, max_negatives=1, seed=5),
    UnpairedConfig("winners", max_positives=1),
    UnpairedConfig("all", deduplicate=False, filters=["not_answered"]),
]


def name(config):
    return f"{type(config).__name__} {config.strategy} {config.seed}"


def scripted():
    """24 prompts with rewards of every kind, tools that failed, duplicates, and tokens that won once and lost once."""
    generator = random.Random(0)
    found = []
    for prompt in range(24):
        for sample in range(generator.randrange(1, 12)):
            first, second = generator.randrange(3), generator.randrange(3)
            reward = generator.choice([None, 0.0, 0.25, 0.75, 1.0, 1.0])
            stop = generator.choice([StopReason.ANSWERED] * 8 + [StopReason.MAX_TURNS, StopReason.TOOL_FAILED])
            info = {"prompt_index": prompt, "sample_index": sample, "trajectory_id": f"0/current/{prompt}/{sample}"}
            turns = ((first, 8), (second, generator.randrange(2), 8))
            each = trajectory(prompt, reward, turns, observations=((first,),), stop_reason=stop, info=info)
            if prompt % 7 == 0 and sample % 2:
                each = trajectory(prompt, reward, turns, ((first,),), info=info, prompt_ids=[99])  # another prompt
            found.append(each)
    return found


def by_prompt(trajectories):
    ordered = sorted(trajectories, key=lambda each: each.info["prompt_index"])
    return [list(group) for _, group in groupby(ordered, key=lambda each: each.info["prompt_index"])]


def streamed(trajectories, config, row_format, folder):
    write_rows((part for _, part in select_by_prompt(by_prompt(trajectories), config)), folder, row_format)
    return load_from_disk(folder)


def assert_same(found, expected):
    assert found.features == expected.features and found.column_names == expected.column_names
    assert found.to_list() == expected.to_list()


@pytest.mark.parametrize("config", PAIRINGS + UNPAIRED, ids=name)
def test_prompt_by_prompt_selects_what_all_at_once_does(config):
    trajectories = scripted()
    random.Random(1).shuffle(trajectories)
    whole = select(trajectories, config)
    reasons = {each.info["trajectory_id"]: why for each, why in zip(trajectories, whole.reasons, strict=True)}
    pairs, chosen, dropped, counts, found = [], [], whole.dropped.copy(), whole.counts.copy(), {}
    for group, part in select_by_prompt(by_prompt(trajectories), config):
        pairs += part.pairs
        chosen += part.trajectories
        dropped.subtract(part.dropped)
        counts.subtract(part.counts)
        found |= {each.info["trajectory_id"]: why for each, why in zip(group, part.reasons, strict=True)}
    assert chosen == whole.trajectories and pairs == whole.pairs and chosen
    assert found == reasons and set(dropped.values()) <= {0} and set(counts.values()) == {0}
    assert whole.dropped.keys() >= {"tool_failed", "undecided"}


@pytest.mark.parametrize("config", PAIRINGS, ids=name)
def test_preference_rows(tmp_path, monkeypatch, config):
    monkeypatch.setattr(columns, "_ROWS_PER_BATCH", 3)
    expected = build_preference_dataset(scripted(), config)
    assert_same(streamed(scripted(), config, "preference", tmp_path / "rows"), expected)
    assert len(expected) > 6 and [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("config", PAIRINGS[:2] + UNPAIRED, ids=name)
@pytest.mark.parametrize("lacking", ["nothing", "one", "all"])
def test_unpaired_rows_have_the_columns_that_all_bring(tmp_path, monkeypatch, config, lacking):
    """One prompt without log-probabilities and process rewards, far down, decides for all."""
    monkeypatch.setattr(columns, "_ROWS_PER_BATCH", 3)
    trajectories = scripted()
    if lacking != "all":
        for each in trajectories:
            each.info.update(process_rewards=[[1, 0.5], [3, -1.0]], turn_rewards=[0.1, 0.2])
    if lacking == "one":
        last = select(trajectories, config).trajectories[-1].info["prompt_index"]
        for each in trajectories:
            if each.info["prompt_index"] == last:
                del each.info["process_rewards"]
                object.__setattr__(each, "logps", None)
    expected = build_unpaired_dataset(trajectories, config)
    assert_same(streamed(trajectories, config, "unpaired", tmp_path / "rows"), expected)
    optional = {"behavior_logps", "turn_rewards", "process_rewards"} & set(expected.column_names)
    assert len(optional) == {"nothing": 3, "one": 1, "all": 1}[lacking]


@pytest.mark.parametrize("row_format", ["preference", "unpaired"])
def test_no_rows_are_rows_of_the_same_type(tmp_path, row_format):
    build, config = {
        "preference": (build_preference_dataset, PairingConfig()),
        "unpaired": (build_unpaired_dataset, UnpairedConfig()),
    }[row_format]
    for number, trajectories in enumerate(([], [fresh(0, None), fresh(1, None)])):
        found = streamed(trajectories, config, row_format, tmp_path / str(number))
        assert_same(found, build(trajectories, config))
        assert len(found) == 0


def test_rows_are_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "rows"
    save_rows(Dataset.from_dict({"a": [1, 2, 3]}), folder)
    with pytest.raises(ZeroDivisionError):
        write_rows((1 / 0 for _ in range(1)), folder, "preference")
    assert load_from_disk(folder)["a"][:] == [1, 2, 3]
    (tmp_path / "rows.partial").mkdir()
    (tmp_path / "rows.partial" / "data-00000-of-00001.arrow").write_text("what a killed run left")
    save_rows(Dataset.from_dict({"a": [4]}), folder)
    assert load_from_disk(folder)["a"][:] == [4] and not (tmp_path / "rows.partial").exists()


def test_groups_that_are_torn_or_out_of_order_are_refused():
    one, two = [fresh(0, 1.0), fresh(0, 0.0)], [fresh(1, 1.0)]
    for groups in ([two, one], [one[:1], one[1:]], [one + two]):
        with pytest.raises(ValueError, match="Pass all trajectories of one prompt in each group"):
            list(select_by_prompt(groups))


def test_a_column_is_written_as_it_comes(tmp_path, monkeypatch):
    """Beside the rows where these are files, in memory where they are there; float32 to the last bit."""
    monkeypatch.setattr(columns, "_ROWS_PER_BATCH", 3)
    values = [np.random.default_rng(i).standard_normal(i % 4).astype(np.float32) for i in range(11)]
    in_memory = Dataset.from_dict({"ids": [list(range(len(v))) for v in values]})
    save_rows(in_memory, tmp_path / "rows")
    on_disk = load_from_disk(tmp_path / "rows")

    def computed(where):
        for number, each in enumerate(values):
            if where is on_disk and number == 7:  # six rows are on the disk before the eighth is computed
                (cache,) = (tmp_path / "rows").glob("cache-*.arrow")
                assert cache.stat().st_size > 6 * 4
            yield each

    for rows, order in ((in_memory, range(11)), (on_disk, range(11)), (on_disk.select([5, 2, 9]), (5, 2, 9))):
        assert list_lengths(rows, "ids").tolist() == [len(values[i]) for i in order]
        found = with_list_column(rows, "logps", computed(rows) if rows is on_disk else (values[i] for i in order))
        assert found.features["logps"] == List(Value("float32")) and found["ids"][:] == rows["ids"][:]
        for row, i in zip(found, order, strict=True):
            assert np.asarray(row["logps"], np.float32).tobytes() == values[i].tobytes()
    assert [Path(file["filename"]).parent for file in found.cache_files] == [tmp_path / "rows"] * 2
    caches = sorted((tmp_path / "rows").glob("cache-*.arrow"))
    forget_caches(found, tmp_path / "another")
    forget_caches(in_memory, tmp_path)
    assert sorted((tmp_path / "rows").glob("cache-*.arrow")) == caches != []
    forget_caches(found, tmp_path)
    forget_caches(found, tmp_path)
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == [
        "checksums.json", "data-00000-of-00001.arrow", "dataset_info.json", "state.json"
    ]  # fmt: skip
    assert list_lengths(in_memory.select([]), "ids").tolist() == []
