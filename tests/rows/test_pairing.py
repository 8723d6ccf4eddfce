import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from datasets import List, Value

from trl_multiturn import MultiTurnDPOConfig, RolloutConfig
from trl_multiturn.rows.pairing import (
    PairingConfig,
    UnpairedConfig,
    build_preference_dataset,
    build_unpaired_dataset,
    select,
)
from trl_multiturn.trajectory import StopReason, Trajectory, Verdict
from trl_multiturn.verify import PAPER_FILTERS, default_filters


TOKENS = itertools.count(1000)


def trajectory(prompt, reward, turns=((7, 8),), observations=(), **changes):
    """Assistant turns given as tuples of token ids, with one observation (a tuple of ids too) between two of them."""
    ids, mask, completion = [], [], []
    for i, turn in enumerate(turns):
        ids += turn
        mask += [1] * len(turn)
        call = {"type": "function", "function": {"name": "python", "arguments": {"code": str(turn)}}}
        completion.append({"role": "assistant", "content": f"turn {turn}", "tool_calls": [call]})
        if i < len(observations):
            ids += observations[i]
            mask += [0] * len(observations[i])
            completion.append({"role": "tool", "name": "python", "content": f"saw {observations[i]}"})
    verdict = Verdict.UNDECIDED if reward is None else Verdict.CORRECT if reward >= 0.5 else Verdict.INCORRECT
    fields = {
        "prompt": [{"role": "user", "content": f"question {prompt}"}],
        "completion": completion,
        "prompt_ids": [100 + prompt, 5],
        "completion_ids": ids,
        "action_mask": mask,
        "stop_reason": StopReason.ANSWERED,
        "logps": [-0.5 * bit for bit in mask],
        "reward": reward,
        "verdict": verdict,
        "info": {"prompt_index": prompt},
    }
    return Trajectory(**{**fields, **changes})


def fresh(prompt, reward, **changes):
    """A trajectory that no other one equals."""
    return trajectory(prompt, reward, turns=((next(TOKENS), 8),), **changes)


def group(prompt, winners, losers):
    return [fresh(prompt, 1.0) for _ in range(winners)] + [fresh(prompt, 0.0) for _ in range(losers)]


def ids(trajectories):
    return [trajectory.completion_ids for trajectory in trajectories]


def test_the_row_of_a_pair_literally():
    winner = trajectory(3, 1.0, turns=((7, 8), (9, 8)), observations=((1, 2),), info={"prompt_index": 3, "seed": 11})
    loser = trajectory(3, 0.0, turns=((6, 8),))
    dataset = build_preference_dataset([loser, winner])
    assert dataset.to_list() == [
        {
            "prompt_ids": [103, 5],
            "prompt_index": 3,
            "chosen_ids": [7, 8, 1, 2, 9, 8],
            "chosen_action_mask": [1, 1, 0, 0, 1, 1],
            "chosen_turn_calls": [1, 1],
            "chosen_reward": 1.0,
            "chosen_info": '{"prompt_index": 3, "seed": 11, "stop_reason": "answered", "verdict": "correct"}',
            "rejected_ids": [6, 8],
            "rejected_action_mask": [1, 1],
            "rejected_turn_calls": [1],
            "rejected_reward": 0.0,
            "rejected_info": '{"prompt_index": 3, "stop_reason": "answered", "verdict": "incorrect"}',
        }
    ]
    assert dataset.features["chosen_ids"] == List(Value("int32"))
    assert dataset.features["chosen_action_mask"] == List(Value("int8"))


def test_messages_come_back_as_they_were():
    # a column of messages would merge the arguments of all tools into one struct, with None in every gap
    other = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1]}}}]}
    winner, loser = trajectory(0, 1.0), trajectory(0, 0.0, turns=((6, 8),), completion=[other])
    row = build_preference_dataset([winner, loser], include_messages=True)[0]
    assert json.loads(row["prompt_messages"]) == winner.prompt
    assert json.loads(row["chosen_messages"]) == winner.completion
    assert json.loads(row["rejected_messages"]) == [other]
    row = build_unpaired_dataset([winner, loser], include_messages=True)[1]
    assert json.loads(row["completion_messages"]) == [other]


def test_random_pairs_stay_inside_a_prompt_and_use_each_trajectory_once():
    trajectories = group(0, 4, 2) + group(1, 1, 5) + group(2, 3, 0) + group(3, 0, 3)
    selection = select(trajectories, PairingConfig(max_pairs_per_prompt=3))
    assert [pair.chosen.info["prompt_index"] for pair in selection.pairs] == [0, 0, 1]
    for pair in selection.pairs:
        assert pair.chosen.prompt_ids == pair.rejected.prompt_ids
        assert (pair.chosen.verdict, pair.rejected.verdict) == (Verdict.CORRECT, Verdict.INCORRECT)
    used = [tuple(side.completion_ids) for pair in selection.pairs for side in (pair.chosen, pair.rejected)]
    assert len(used) == len(set(used)) == 6
    assert selection.counts == {
        "trajectories": 18,
        "correct": 8,
        "incorrect": 10,
        "kept": 18,
        "prompts": 4,
        "prompts_without_correct": 1,
        "prompts_without_incorrect": 1,
        "pairs": 3,
        "rows": 3,
    }


def test_random_pairs_are_uniform():
    trajectories = group(0, 3, 3)
    counts = {}
    for seed in range(900):
        (pair,) = select(trajectories, PairingConfig(seed=seed)).pairs
        key = (pair.chosen.completion_ids[0], pair.rejected.completion_ids[0])
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 9
    # 900 draws over nine cells: a chi-square of 26 has probability 0.001 under uniform choice; the seeds are fixed
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 26


def test_the_order_of_arrival_changes_nothing():
    trajectories = [t for prompt in range(6) for t in group(prompt, 4, 4)]
    trajectories += trajectories[::3]  # duplicates
    shuffled = random.Random(1).sample(trajectories, len(trajectories))
    for config in (PairingConfig(max_pairs_per_prompt=2), PairingConfig(strategy="best_worst"), UnpairedConfig()):
        build = build_preference_dataset if isinstance(config, PairingConfig) else build_unpaired_dataset
        assert build(trajectories, config).to_list() == build(shuffled, config).to_list()
    first, second = (build_preference_dataset(trajectories, PairingConfig(seed=seed)).to_list() for seed in (0, 1))
    assert first != second


def test_best_meets_worst():
    rewards = [0.1, 0.9, 0.5, 0.3, 0.7]
    trajectories = [fresh(0, reward) for reward in rewards]
    pairs = select(trajectories, PairingConfig(strategy="best_worst", max_pairs_per_prompt=9)).pairs
    assert [(pair.chosen.reward, pair.rejected.reward) for pair in pairs] == [(0.9, 0.1), (0.7, 0.3)]
    config = PairingConfig(strategy="best_worst", max_pairs_per_prompt=9, min_reward_gap=0.5)
    assert [(pair.chosen.reward, pair.rejected.reward) for pair in select(trajectories, config).pairs] == [(0.9, 0.1)]
    assert select([fresh(0, 0.4), fresh(0, 0.4)], PairingConfig(strategy="best_worst")).pairs == []


def test_undecided_and_failed_never_become_rows():
    trajectories = [
        fresh(0, 1.0),
        fresh(0, None),
        fresh(0, 0.0, stop_reason=StopReason.TOOL_FAILED),
        fresh(0, None, stop_reason=StopReason.TOOL_FAILED),
    ]
    for config in (
        PairingConfig(filters=()),
        PairingConfig(strategy="best_worst", filters=()),
        UnpairedConfig(strategy="all"),
    ):
        selection = select(trajectories, config)
        assert selection.dropped == {"undecided": 1, "tool_failed": 2}
        assert selection.reasons == [None, "undecided", "tool_failed", "tool_failed"]
        assert selection.pairs == [] and all(t.verdict is Verdict.CORRECT for t in selection.trajectories)


def test_filters_are_counted_and_can_be_switched_off():
    text = [
        {"role": "assistant", "content": "no code here"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "done"},
    ]
    trajectories = [fresh(0, 1.0), fresh(0, 0.0, completion=text), fresh(1, 1.0), fresh(1, 0.0)]
    selection = select(trajectories)
    assert selection.dropped == {"turn_without_code": 1} and selection.counts["pairs"] == 1
    assert len(select(trajectories, PairingConfig(filters=())).pairs) == 2
    assert selection.counts["kept"] + selection.dropped.total() == selection.counts["trajectories"] == 4


def test_the_default_filters_are_the_papers_where_the_tools_include_an_interpreter():
    assert default_filters(interpreter=True) == PAPER_FILTERS
    assert default_filters(interpreter=False) == ("over_length",)
    assert PairingConfig().filters is None
    with pytest.raises(ValueError, match="no filter 'unknown'"):
        PairingConfig(filters=["unknown"])


def test_filters_about_code_are_on_where_code_was_written():
    failed = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "look", "arguments": {"key": "a"}}}],
        },
        {"role": "tool", "name": "look", "content": "LookupError: nothing there"},
        {"role": "assistant", "content": r"So it is \boxed{none}."},
    ]
    ordinary = [fresh(0, 1.0, completion=failed), fresh(0, 0.0, completion=failed[:1])]
    assert select(ordinary).dropped == {}
    assert select([*ordinary, fresh(0, 0.0)]).dropped == {"error_before_answer": 1}  # `fresh` calls python
    recorded = [fresh(0, 1.0, completion=failed, info={"prompt_index": 0, "tools": {"python": "1", "look": "2"}})]
    assert select(recorded).dropped == {"error_before_answer": 1}


def test_every_trajectory_that_is_in_no_row_says_why():
    trajectories = [*group(0, 3, 1), *group(1, 2, 0), *group(2, 0, 2), fresh(3, None)]
    selection = select(trajectories)
    assert selection.unused.count("in_no_pair") == 2 and selection.unused[:4].count(None) == 2
    assert selection.unused[4:] == ["no_incorrect_one"] * 2 + ["no_correct_one"] * 2 + [None]
    assert selection.reasons == [None] * 8 + ["undecided"]
    one = select(trajectories, UnpairedConfig(max_positives=1, max_negatives=1))
    assert Counter(one.unused) == {None: 4 + 1, "not_drawn": 4}
    for each in (selection, one):
        accounted = len(each.trajectories) + each.dropped.total() + sum(why is not None for why in each.unused)
        assert accounted == len(trajectories)


def test_duplicates_count_once_within_a_prompt():
    trajectories = [trajectory(0, 0.0), trajectory(0, 0.0), fresh(0, 1.0), trajectory(1, 0.0)]
    selection = select(trajectories, UnpairedConfig(strategy="all"))
    assert selection.dropped == {"duplicate": 1} and len(selection.trajectories) == 3
    assert len(select(trajectories, UnpairedConfig(strategy="all", deduplicate=False)).trajectories) == 4


def test_the_same_tokens_judged_both_ways_are_no_pair():
    for deduplicate in (True, False):
        selection = select([trajectory(0, 1.0), trajectory(0, 0.0)], PairingConfig(deduplicate=deduplicate))
        assert selection.pairs == [] and selection.dropped == {"contradictory": 2}


def test_equal_index_with_another_prompt_is_another_group():
    # two iterations with their own prompt sets: row 0 of each
    one, other = fresh(0, 1.0), fresh(0, 0.0, prompt_ids=[999, 5])
    assert select([one, other]).pairs == []
    # without an index, the prompt alone decides
    one, other = fresh(0, 1.0, info={}), fresh(0, 0.0, info={})
    assert build_preference_dataset([one, other])[0]["prompt_index"] == -1


def test_siblings_part_after_a_turn_whatever_they_earned():
    def of(last, reward):
        return trajectory(0, reward, turns=((7, 8), (last, 8)), observations=((1, 2),))

    stranger = trajectory(0, 1.0, turns=((6, 8), (9, 8)), observations=((1, 2),))
    config = PairingConfig(strategy="siblings", max_pairs_per_prompt=9)
    pairs = select([of(3, 0.0), of(4, 0.0), stranger], config).pairs
    assert [(pair.shared_turns, pair.chosen.reward, pair.rejected.reward) for pair in pairs] == [(1, 0.0, 0.0)]
    (pair,) = select([of(3, 0.0), of(4, 1.0)], config).pairs
    assert (pair.chosen.reward, pair.rejected.reward) == (1.0, 0.0)


def test_step_pairs_start_where_the_trajectories_part():
    shared = {"turns": ((7, 8), (9, 8)), "observations": ((1, 2),)}
    winner = trajectory(0, 1.0, turns=((7, 8), (9, 8), (4, 8)), observations=((1, 2), (3,)))
    loser = trajectory(0, 0.0, turns=((7, 8), (9, 9), (5, 8)), observations=((1, 2), (3,)))
    selection = select([winner, loser], PairingConfig(strategy="step"))
    (pair,) = selection.pairs
    assert (pair.shared_turns, pair.shared_tokens) == (1, 4)
    row = build_preference_dataset(selection, include_messages=True)[0]
    assert row["prompt_ids"] == [100, 5, 7, 8, 1, 2]
    assert row["chosen_ids"] == [9, 8, 3, 4, 8] and row["chosen_action_mask"] == [1, 1, 0, 1, 1]
    assert row["rejected_ids"] == [9, 9, 3, 5, 8] and row["rejected_action_mask"] == [1, 1, 0, 1, 1]
    assert json.loads(row["prompt_messages"]) == winner.prompt + winner.completion[:2]
    assert json.loads(row["chosen_messages"]) == winner.completion[2:]
    assert json.loads(row["rejected_messages"]) == loser.completion[2:]

    # the longest shared prefix wins; a prefix that ends in another observation is not shared
    closer = trajectory(0, 0.0, turns=((7, 8), (9, 8), (5, 8)), observations=((1, 2), (3,)))
    (pair,) = select([winner, loser, closer], PairingConfig(strategy="step")).pairs
    assert pair.rejected is closer and (pair.shared_turns, pair.shared_tokens) == (2, 7)
    elsewhere = trajectory(0, 0.0, turns=((7, 8), (9, 8)), observations=((1, 3),))
    assert select([winner, elsewhere], PairingConfig(strategy="step")).pairs == []
    (pair,) = select([winner, elsewhere], PairingConfig(strategy="step", min_shared_turns=0)).pairs
    assert (pair.shared_turns, pair.shared_tokens) == (0, 0)
    # one that stops after the shared turns took no other action there
    assert select([winner, trajectory(0, 0.0, **shared)], PairingConfig(strategy="step")).pairs[0].shared_turns == 1


def test_kto_rows_are_the_halves_of_the_pairs_in_turns():
    trajectories = group(0, 3, 3) + group(1, 2, 2)
    config = PairingConfig(max_pairs_per_prompt=2, seed=3)
    pairs, rows = build_preference_dataset(trajectories, config), build_unpaired_dataset(trajectories, config)
    assert rows["label"] == [True, False] * 4
    halves = [half for pair in pairs for half in (pair["chosen_ids"], pair["rejected_ids"])]
    assert list(rows["completion_ids"]) == halves


def test_the_unpaired_row_literally():
    rows = build_unpaired_dataset([trajectory(2, 0.25, turns=((7,), (9,)), observations=((1,),))], UnpairedConfig())
    assert rows.to_list() == [
        {
            "prompt_ids": [102, 5],
            "completion_ids": [7, 1, 9],
            "action_mask": [1, 0, 1],
            "turn_calls": [1, 1],
            "label": False,
            "reward": 0.25,
            "prompt_index": 2,
            "info": '{"prompt_index": 2, "stop_reason": "answered", "verdict": "incorrect"}',
            "behavior_logps": [-0.5, 0.0, -0.5],
        }
    ]


@pytest.mark.parametrize(
    ("winners", "losers", "expected"),  # OREO, appendix A: four and four, positives <= max(negatives, 1)
    [(8, 8, (4, 4)), (13, 3, (3, 3)), (16, 0, (1, 0)), (0, 16, (0, 4)), (2, 14, (2, 4)), (0, 0, (0, 0))],
)
def test_balanced_sampling(winners, losers, expected):
    labels = build_unpaired_dataset(group(0, winners, losers), UnpairedConfig())["label"]
    assert (sum(labels), len(labels) - sum(labels)) == expected
    alternating = 2 * min(expected)
    assert list(labels[:alternating]) == [True, False] * (alternating // 2)


def test_winners_alone_and_all():
    trajectories = group(0, 3, 2) + group(1, 0, 2)
    winners = build_unpaired_dataset(trajectories, UnpairedConfig(strategy="winners", max_positives=2))
    assert winners["label"] == [True, True] and set(winners["prompt_index"]) == {0}
    everything = select(trajectories, UnpairedConfig(strategy="all"))
    assert sorted(ids(everything.trajectories)) == sorted(ids(trajectories))
    assert everything.counts["rows"] == 7 and everything.counts["pairs"] == 0


def test_optional_columns_follow_the_trajectories(caplog):
    bare, full = fresh(0, 1.0, logps=None), fresh(0, 0.0)
    config = UnpairedConfig(strategy="all")
    assert "behavior_logps" in build_unpaired_dataset([full], config).column_names
    assert "behavior_logps" not in build_unpaired_dataset([bare], config).column_names
    assert not caplog.records
    assert "behavior_logps" not in build_unpaired_dataset([bare, full], config).column_names
    assert "1 of 2 trajectories carry no log-probabilities" in caplog.text
    turned = trajectory(0, 1.0, turns=((7,), (9,)), info={"prompt_index": 0, "turn_rewards": [0.5, 0.0]})
    assert build_unpaired_dataset([turned], config)["turn_rewards"] == [[0.5, 0.0]]
    assert "turn_rewards" not in build_unpaired_dataset([turned, full], config).column_names


def test_a_verdict_without_a_reward_counts_as_one_or_zero():
    winner, loser = fresh(0, 1.0).judged(Verdict.CORRECT, None), fresh(0, 0.0).judged(Verdict.INCORRECT, None)
    row = build_preference_dataset([winner, loser])[0]
    assert (row["chosen_reward"], row["rejected_reward"]) == (1.0, 0.0)


@pytest.mark.parametrize("trajectories", [[], group(0, 3, 0)])
def test_nothing_to_pair_gives_typed_rows(trajectories):
    pairs = build_preference_dataset(trajectories)
    assert pairs.num_rows == 0 and pairs.features == build_preference_dataset(group(0, 1, 1)).features
    unpaired = build_unpaired_dataset(trajectories, PairingConfig())
    assert unpaired.num_rows == 0
    assert unpaired.features == build_unpaired_dataset(group(0, 1, 1), UnpairedConfig()).features


def test_mistakes_in_the_configuration():
    for change in (
        {"strategy": "best"},
        {"max_pairs_per_prompt": 0},
        {"min_reward_gap": -1.0},
        {"min_shared_turns": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            PairingConfig(**change)
    for change in ({"strategy": "half"}, {"max_positives": 0}, {"max_negatives": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            UnpairedConfig(**change)
    with pytest.raises(TypeError, match="PairingConfig"):
        build_preference_dataset([], UnpairedConfig())
    with pytest.raises(ValueError, match="Selection"):
        build_preference_dataset(select([]), PairingConfig())


def test_both_configurations_are_read_from_a_command_line():
    from trl import TrlParser

    (pairing,) = TrlParser(PairingConfig).parse_args_and_config(
        ["--strategy", "best_worst", "--filters", "call_limit", "long_answer", "--deduplicate", "False"]
    )
    assert pairing == PairingConfig("best_worst", filters=["call_limit", "long_answer"], deduplicate=False)
    (unpaired,) = TrlParser(UnpairedConfig).parse_args_and_config(["--strategy", "winners", "--max_positives", "1"])
    assert unpaired == UnpairedConfig("winners", max_positives=1)


@dataclass
class RolloutArguments(RolloutConfig):
    seed: int = field(default=0, init=False)


@dataclass
class PairingArguments(PairingConfig):
    seed: int = field(default=0, init=False)


def test_a_script_reads_them_beside_the_trainers_configuration_with_one_seed(tmp_path):
    from trl import ModelConfig, ScriptArguments, TrlParser

    types = (ScriptArguments, MultiTurnDPOConfig, ModelConfig, RolloutArguments, PairingArguments)
    (tmp_path / "run.yaml").write_text("seed: 7\ntop_p: 0.9\nstrategy: step\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path), "--bf16", "False"]
    arguments += ["--num_generations", "5", "--max_pairs_per_prompt", "2"]
    _, training_args, _, rollout, pairing = TrlParser(types).parse_args_and_config(arguments)
    rollout.seed = pairing.seed = training_args.seed
    assert training_args.seed == 7
    assert vars(rollout) == vars(RolloutConfig(num_generations=5, top_p=0.9, seed=7))
    assert rollout.sampler_settings() == RolloutConfig(top_p=0.9, seed=7).sampler_settings()
    assert vars(pairing) == vars(PairingConfig("step", max_pairs_per_prompt=2, seed=7))
