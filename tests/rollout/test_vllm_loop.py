"""The whole loop on the real vLLM: turns and tools, prefix caching, weights that follow the policy (`-m vllm`)."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests.support import byte_tokenizer, save_tiny, tiny_model, user
from tests.templates.chatml import chatml
from trl_multiturn import (
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    PairingConfig,
    PythonTool,
    RolloutConfig,
    ToolRolloutGenerator,
    generate_trajectories,
)
from trl_multiturn.engines.vllm.engine import VLLMEngine
from trl_multiturn.rollout import Journal
from trl_multiturn.tools import current_rollout
from trl_multiturn.trainer.loop.policy_weights import load_policy_weights, policy_revision
from trl_multiturn.trajectory import StopReason


HAS_VLLM = importlib.util.find_spec("vllm") is not None
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed in this environment")]

TOKENIZER = byte_tokenizer("qwen2_5")
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 32: the smallest vLLM takes
BLOCK = 32
PROMPTS = [{"prompt": [user(f"{i}? " + "Think about it. " * 4)]} for i in range(4)]
LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])


def config(**overrides):
    # A random policy hardly ever ends a turn, so that many letters do; every turn is the text of a call.
    stops = [chr(code) for code in range(33, 127) if code % 3 == 0]
    settings = dict(
        num_generations=4, previous_policy_generations=2, dialect="action", action_prefix="", stop_strings=stops,
        max_turn_tokens=120, max_tool_calling_iterations=3, max_trajectory_tokens=1500, seed=1,
    )  # fmt: skip
    return RolloutConfig(**{**settings, **overrides})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("policy"), TOKENIZER, seed=0, **SIZES)


@pytest.fixture(scope="module")
def loaded_engine(start):
    engine = VLLMEngine(
        start,
        dtype="float32",
        max_model_len=1536,
        block_size=BLOCK,
        enforce_eager=True,
        kv_cache_memory_bytes=128 * 2**20,
        enable_lora=True,
        max_lora_rank=8,
    )
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded_engine, start):
    """With the weights of the first policy, whatever the test before has loaded."""
    loaded_engine.refresh(start)
    return loaded_engine


@torch.no_grad()
def disagreement(model, trajectories):
    """Largest difference between the log-probabilities that came with sampled tokens and those of `model`."""
    differences = [0.0]
    for each in (segment for trajectory in trajectories for segment in trajectory.segments):
        logits = model.eval()(torch.tensor([each.context_ids + each.completion_ids])).logits[0]
        scored = logits[len(each.context_ids) - 1 : -1].log_softmax(-1)
        logps = scored.gather(-1, torch.tensor(each.completion_ids).unsqueeze(-1)).squeeze(-1)
        sampled = torch.tensor(each.action_mask).bool()
        differences.append((logps - torch.tensor(each.logps))[sampled].abs().max().item())
    return max(differences)


def test_trajectories_with_the_real_interpreter(engine):
    before = engine.stats
    with PythonTool() as tool:
        trajectories = generate_trajectories(PROMPTS, engine, [tool], config(), progress=False)
    assert len(trajectories) == 16
    assert {each.info["turns"] for each in trajectories} >= {4} and {each.stop_reason for each in trajectories} <= {
        StopReason.MAX_TURNS,
        StopReason.MAX_TOKENS,
    }
    outputs = [m["content"] for each in trajectories for m in each.completion if m["role"] == "user"]
    assert len(outputs) > 30 and any("SyntaxError" in output for output in outputs)
    assert disagreement(tiny_model(TOKENIZER, seed=0, **SIZES), trajectories) < 1e-3
    # What a turn reads beyond the turn before it is new; the rest was cached in whole blocks.
    read = engine.stats["prompt_tokens"] - before["prompt_tokens"]
    known = sum(
        (len(each.prompt_ids) + start) // BLOCK * BLOCK
        for each in trajectories
        for start, _ in list(each.turn_spans())[:-1]
    )
    assert 0.9 * known < engine.stats["cached_tokens"] - before["cached_tokens"] < read


def test_a_template_that_rewrites_earlier_turns(engine):
    """What was read and sampled is kept in segments, with the log-probabilities of tokens behind just that context."""
    template = chatml(words="{{ m.content[-9:] if m.role == 'assistant' and not loop.last else m.content }}")
    settings = config(chat_template_kwargs={"chat_template": template})

    def look(text: str) -> str:
        """
        Looks.

        Args:
            text: Where.
        """
        return "nothing"

    trajectories = generate_trajectories(PROMPTS, engine, [look], settings, progress=False)
    turns = [[m["content"] for m in each.completion if m["role"] == "assistant"] for each in trajectories]
    rewritten = [any(len(words) > 9 for words in earlier) for *earlier, _ in turns]
    assert any(rewritten)
    assert all(len(each.segments) > 1 for each, was in zip(trajectories, rewritten, strict=True) if was)
    assert disagreement(tiny_model(TOKENIZER, seed=0, **SIZES), trajectories) < 1e-3


def test_nobody_waits_for_anothers_tool(engine):
    everyone, others_are_done = threading.Barrier(16), threading.Event()
    calls, finished = {}, []

    def wait(text: str) -> str:
        """
        Waits.

        Args:
            text: Anything.
        """
        name = current_rollout().trajectory_id
        calls[name] = calls.get(name, 0) + 1
        if calls[name] == 1:
            everyone.wait(120)  # all 16 first calls are under way at the same time
        elif name == "0/current/0/0":
            assert others_are_done.wait(120)  # the others sample, call and finish meanwhile
        return f"call {calls[name]}"

    def note(trajectory):
        finished.append(trajectory.info["trajectory_id"])
        if len(finished) == 15:
            others_are_done.set()

    settings = config(tool_timeout_seconds=None, max_turn_tokens=200)
    trajectories = generate_trajectories(PROMPTS, engine, [wait], settings, progress=False, on_trajectory=note)
    assert finished[-1] == "0/current/0/0" and set(calls.values()) == {3}
    assert [m["content"] for m in trajectories[0].completion if m["role"] == "user"] == ["call 1", "call 2", "call 3"]


def make_trainer(folder, engine, tool, reward, iterations, peft_config, **arguments):
    args = MultiTurnDPOConfig(
        str(folder), num_train_epochs=iterations, per_device_train_batch_size=2, learning_rate=5e-2, logging_steps=1,
        save_strategy="epoch", report_to="none", bf16=False, use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    generator = ToolRolloutGenerator(
        Dataset.from_list(PROMPTS),
        tools=[tool],
        reward_funcs=[reward],
        pairing=PairingConfig(filters=[], max_pairs_per_prompt=2),
        engine=engine,
        **{"config": config(max_tool_calling_iterations=1), **arguments},
    )
    model = tiny_model(TOKENIZER, seed=0, **SIZES)
    return MultiTurnDPOTrainer(
        model, args=args, processing_class=TOKENIZER, callbacks=[generator], peft_config=peft_config
    ), generator


def odd_lengths_win(completions, **columns):
    return [float(sum(len(message["content"]) for message in completion) % 2) for completion in completions]


def interrupted_after(turns, generate):
    """An engine's `generate` that is interrupted after so many turns."""
    left = iter(range(turns))

    async def limited(*args, **kwargs):
        if next(left, None) is None:
            raise InterruptedError
        return await generate(*args, **kwargs)

    return limited


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "adapter"])
def test_the_engine_follows_the_policy_through_the_iterations(engine, tmp_path, peft_config, monkeypatch):
    reward = odd_lengths_win
    with PythonTool() as tool:
        first, _ = make_trainer(tmp_path, engine, tool, reward, 1, peft_config)
        first.train(resume_from_checkpoint=True)
        # Interrupted in the second iteration and taken up again: what was sampled is kept
        stopped, generator = make_trainer(tmp_path, engine, tool, reward, 2, peft_config)
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(engine, "generate", interrupted_after(10, engine.generate))
            stopped.train(resume_from_checkpoint=True)
        journal = Journal(generator.run_folder / "iteration_001" / "journal")
        kept = {(t.info["policy"], t.info["trajectory_id"]): t.completion_ids for t in journal.read()}
        trainer, generator = make_trainer(tmp_path, engine, tool, reward, 2, peft_config)
        trainer.train(resume_from_checkpoint=True)
    assert [report.trajectories for report in generator.reports] == [16, 16]
    assert all(report.rows > 1 for report in generator.reports)
    assert (
        kept.items() <= {(t.info["policy"], t.info["trajectory_id"]): t.completion_ids for t in journal.read()}.items()
    )

    fresh, _ = make_trainer(tmp_path / "fresh", engine, tool, reward, 1, peft_config)
    policies = []
    for number in range(2):
        load_policy_weights(fresh.model, Path(generator.run_folder, f"iteration_{number:03d}", "policy.safetensors"))
        assert policy_revision(fresh.model) == generator.reports[number].policy_revision
        by_scope = {
            scope: disagreement(fresh.model, Journal(generator.run_folder / f"iteration_{scope[0]:03d}/journal").read(
                f"{scope[0]}/{scope[1]}"
            ))
            for scope in [(0, "current"), (1, "previous"), (1, "current")]
        }  # fmt: skip
        policies.append(by_scope)
    old, new = policies
    assert max(old[0, "current"], old[1, "previous"], new[1, "current"]) < 2e-3
    assert min(new[0, "current"], new[1, "previous"], old[1, "current"]) > 2e-2


class Meetings(TrainerCallback):
    """A tool and a training that wait for each other: rollouts go on after a step of the training beside them.

    The first steps of an iteration wait for the first call in the rollouts of the next one, and all calls there for
    the end of that step, which changes the weights.
    """

    def __init__(self, stops_in=None):
        self.called, self.stepped = ([threading.Event() for _ in range(3)] for _ in range(2))
        self.generator, self.stops_in = None, stops_in

    def look(self, text: str) -> str:
        """
        Looks.

        Args:
            text: Where.
        """
        iteration = int(current_rollout().trajectory_id.partition("/")[0])
        self.called[iteration].set()
        assert iteration == 0 or self.stepped[iteration - 1].wait(120), "no step was trained beside the rollouts"
        return "nothing"

    @property
    def trained(self):
        return len(self.generator.reports) - 1

    def on_step_begin(self, args, state, control, **kwargs):
        assert self.trained == 2 or self.called[self.trained + 1].wait(120), "nothing was rolled out beside it"
        if self.trained == self.stops_in:
            raise InterruptedError

    def on_step_end(self, args, state, control, **kwargs):
        self.stepped[self.trained].set()


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "adapter"])
def test_rollouts_beside_the_training_are_those_of_the_policy_that_they_name(engine, tmp_path, peft_config):
    def run(stops_in=None):
        meetings = Meetings(stops_in)
        trainer, generator = make_trainer(
            tmp_path, engine, meetings.look, odd_lengths_win, 3, peft_config, max_policy_lag=1,
            config=config(max_tool_calling_iterations=1, tool_timeout_seconds=None),
            eval_prompts=Dataset.from_list(PROMPTS[:1]),
        )  # fmt: skip
        meetings.generator = generator
        trainer.add_callback(meetings)
        trainer.train(resume_from_checkpoint=True)
        return trainer.model, generator

    with pytest.raises(InterruptedError):  # while vLLM samples the iteration after
        run(stops_in=1)
    model, generator = run()
    revisions = [report.starting_revision for report in generator.reports]
    assert len(set(revisions)) == 3 and generator.reports[2].overlapped_seconds > 0
    assert [(report.policy_revision, report.policy_lag) for report in generator.reports] == [
        (revisions[0], 0), (revisions[0], 1), (revisions[1], 1),
    ]  # fmt: skip

    # (iteration, policy) -> its trajectories, and the number of the policy that they have to name
    names = ("policy_revision", "policy_iteration", "policy_lag")
    said = {
        (0, "current"): (revisions[0], None, None),
        (1, "current"): (revisions[0], 0, 1),
        (2, "current"): (revisions[1], 1, 1),
        (2, "previous"): (revisions[0], 0, 2),
    }
    found = {
        (iteration, policy): list(Journal(generator.run.iteration(iteration).journal).read(f"{iteration}/{policy}"))
        for iteration, policy in said
    }
    assert sum(map(len, found.values())) == 3 * 16
    for scope, trajectories in found.items():
        assert {tuple(t.info.get(name) for name in names) for t in trajectories} == {said[scope]}
    differences = {}
    for number, revision in enumerate(revisions):
        load_policy_weights(model, generator.run.iteration(number).policy)
        assert policy_revision(model) == revision
        for scope, trajectories in found.items():
            differences.setdefault(said[scope][0] == revision, []).append(disagreement(model, trajectories))
    assert max(differences[True]) < 2e-3 and min(differences[False]) > 2e-2
