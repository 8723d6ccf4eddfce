"""The engine's log-probabilities beside the trainer's own: equal to rounding, or told."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from types import SimpleNamespace

import pytest
import torch

from tests.support import byte_tokenizer, tiny_model, user
from trl_multiturn import RolloutConfig, StopReason, Trajectory, TransformersEngine, generate_trajectories
from trl_multiturn.online.agreement import SamplerAgreement, agreement_metrics


TOKENIZER = byte_tokenizer("qwen2_5")


def trainer_of(model, **settings):
    unwrapped = SimpleNamespace(unwrap_model=lambda model: model, autocast=torch.no_grad)
    return SimpleNamespace(
        **{
            "model": model,
            "accelerator": unwrapped,
            "is_fsdp_enabled": False,
            "is_deepspeed_enabled": False,
            **settings,
        }
    )


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return tiny_model(TOKENIZER)


@pytest.fixture(scope="module")
def rollouts(policy):
    config = RolloutConfig(num_generations=1, max_turn_tokens=12, temperature=0.8)
    prompts = [{"prompt": [user(f"{n} * 7?")]} for n in range(3)]
    return generate_trajectories(prompts, TransformersEngine(policy, TOKENIZER), None, config, progress=False)


def measured(rollouts, model, config=None, **settings):
    agreement = SamplerAgreement(config or RolloutConfig(temperature=0.8))
    for rollout in rollouts:
        agreement.see(rollout, None)
    return agreement.measure(trainer_of(model, **settings))


def test_an_engine_that_samples_from_the_policy_agrees_to_rounding(rollouts, policy, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = measured(rollouts, policy)
    assert 0 <= metrics["sampling/kl"] < 1e-9 and metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert not caplog.records


def test_other_weights_are_told(rollouts, policy, caplog):
    torch.manual_seed(1)
    other = tiny_model(TOKENIZER)
    with torch.no_grad():
        other.lm_head.weight.mul_(20.0)
    with caplog.at_level(logging.WARNING):
        metrics = measured(rollouts, other)
    assert metrics["sampling/kl"] > 0.02
    assert "not those of the policy that is trained" in caplog.text and "same weights" in caplog.text


def test_the_metrics_by_hand():
    differences = [torch.tensor([0.0, 0.0, 0.0, math.log(2.0)]), torch.tensor([0.0, 0.0, 0.0, 0.0])]
    metrics = agreement_metrics(differences)
    one = 2.0 - 1.0 - math.log(2.0)  # exp(d) - 1 - d
    assert metrics["sampling/kl"] == pytest.approx(one / 8)
    assert metrics["sampling/kl_quarter_4"] == pytest.approx(one / 2) and metrics["sampling/kl_quarter_1"] == 0
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("truncated", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_nothing_is_measured_where_samples_come_from_another_distribution(rollouts, policy, truncated):
    assert measured(rollouts, policy, RolloutConfig(**truncated)) == {}


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_nothing_is_measured_where_weights_are_in_parts(rollouts, policy, sharded):
    assert measured(rollouts, policy, **{sharded: True}) == {}


def test_rollouts_of_the_previous_policy_and_without_log_probabilities_are_left_out(rollouts, policy):
    previous = [dataclasses.replace(r, info={**r.info, "policy": "previous"}) for r in rollouts]
    silent = [dataclasses.replace(r, logps=[0.0] * len(r.completion_ids)) for r in rollouts]
    assert measured(previous, policy) == {} and measured(silent, policy) == {}


def test_the_policy_is_in_its_mode_of_training_afterwards(rollouts, policy):
    policy.train()
    measured(rollouts, policy)
    assert policy.training


def test_segments_are_scored_as_the_policy_read_them(policy):
    """Two sequences without a common history: each token's score depends on its own segment alone."""
    from trl_multiturn.engines.engine import SamplingParams
    from trl_multiturn.segments import Segment

    engine = TransformersEngine(policy, TOKENIZER)
    contexts = [TOKENIZER("one").input_ids, TOKENIZER("another one").input_ids]
    segments = []
    for seed, context in enumerate(contexts):
        sampled = asyncio.run(engine.generate(context, SamplingParams(6, seed=seed)))
        ids = sampled.token_ids
        segments.append(Segment(context, ids, [1] * len(ids), sampled.logps))
    whole = Trajectory.from_segments(
        segments,
        prompt=[user("?")],
        completion=[],
        stop_reason=StopReason.ENDED,
        info={"prompt_index": 0, "policy": "current"},
    )
    assert measured([whole], policy, RolloutConfig())["sampling/sampling_logp_difference/max"] < 1e-4
