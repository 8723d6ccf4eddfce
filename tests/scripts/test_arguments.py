"""The flags of the example scripts: every field is reachable, and every configuration file parses."""

from __future__ import annotations

import importlib
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from trl_multiturn import MultiTurnDPOConfig, PairingConfig, RolloutConfig, UnpairedConfig
from trl_multiturn.scripts.arguments import FENCED_PROMPT, TOOLS_PROMPT, UnpairedArguments, online_parser, parse_online


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
SCRIPTS = {
    "dpo": "iterative_multi_turn_dpo",
    "evaluate": "evaluate",
    "group": "iterative_group_regression",
    "kto": "iterative_multi_turn_kto",
    "oreo": "iterative_oreo",
}


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def parse(*arguments, pairing=None, **kwargs):
    parser = online_parser(MultiTurnDPOConfig, *([pairing] if pairing else []))
    return parse_online(parser, ["--output_dir", "out", "--bf16", "False", *arguments], **kwargs)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_file_is_read_by_its_script(config):
    script = importlib.import_module(SCRIPTS[config.stem.partition("_")[0]])
    arguments = ["--config", str(config)]
    if script.__name__ == "evaluate":
        parsed = script.make_parser().parse_args_and_config(arguments)
        assert parsed[0].num_eval_prompts == 200
    else:
        parsed = parse_online(script.make_parser(), [*arguments, "--bf16", "False"])
        assert parsed.rollout.max_trajectory_tokens <= parsed.training.max_length  # nothing is rolled out in vain


def test_the_flags_of_rollouts_and_rows_are_all_those_of_their_configurations():
    flags = {action.dest for action in online_parser(MultiTurnDPOConfig)._actions}
    for config_class in (RolloutConfig, PairingConfig):
        assert {f.name for f in fields(config_class)} <= flags


def test_one_seed_is_the_seed_of_everything():
    arguments = parse("--seed", "7")
    assert (arguments.training.seed, arguments.rollout.seed, arguments.pairing.seed) == (7, 7, 7)


def test_configurations_are_the_packages_own():
    """What a run records of its settings names them."""
    arguments = parse("--filters", "over_length", "--temperature_variants", "0.5", "1.2", "--top_p", "0.9")
    assert type(arguments.rollout) is RolloutConfig and type(arguments.pairing) is PairingConfig
    assert arguments.pairing.filters == ["over_length"]
    assert (arguments.rollout.temperature_variants, arguments.rollout.top_p) == ([0.5, 1.2], 0.9)
    assert type(parse("--max_positives", "2", pairing=UnpairedArguments).pairing) is UnpairedConfig


@pytest.mark.parametrize(
    ("flags", "prompt"),
    [
        ([], FENCED_PROMPT),
        (["--tools", "my.tool"], TOOLS_PROMPT),
        (["--dialect", "native"], TOOLS_PROMPT),
        (["--system_prompt", ""], None),
        (["--system_prompt", "Think."], "Think."),
    ],
)
def test_the_system_prompt_fits_dialect_and_tools(flags, prompt):
    assert parse(*flags).rollout.system_prompt == prompt


def test_the_default_file_is_read_only_where_no_model_and_no_file_is_named(tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("num_generations: 5\n")
    assert parse(default_config=default).rollout.num_generations == 5
    assert parse("--num_generations", "3", default_config=default).rollout.num_generations == 3
    assert parse("--model_name_or_path", "x", default_config=default).rollout.num_generations == 30
