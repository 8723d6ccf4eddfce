"""Rollouts beside the training (`max_policy_lag=1`) in one of several processes: with engines of two kinds."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, TrainerCallback

from tests import test_overlap
from tests.test_callbacks import TOKENIZER, make_run, problems, solve
from trl_multiturn import ScriptedEngine
from trl_multiturn.rollout import Journal
from trl_multiturn.trainer.loop.policy_weights import policy_revision


SECONDS = 120  # after which something that should have happened by itself has not


class Meeting(ScriptedEngine, TrainerCallback):
    """An engine with weights of its own. Its rollouts of iteration 2 and the first step of the training wait for each
    other, in every process. The second process loads the first policy of iteration 3 once the first has loaded all."""

    weights = "own"

    def __init__(self, rank: int, all_loaded: Path) -> None:
        ScriptedEngine.__init__(self, solve, TOKENIZER)
        self.rank, self.all_loaded = rank, all_loaded
        self.loaded: list[str] = []
        self.sampled: set[tuple[str, str]] = set()
        self.rolls_out, self.stepped = threading.Event(), threading.Event()

    def refresh(self, model_path: str | None = None) -> None:
        assert model_path is not None
        if self.rank == 1 and len(self.loaded) == 2:
            end = time.monotonic() + SECONDS
            while not self.all_loaded.exists():
                assert time.monotonic() < end, "the other process has not gone on"
                time.sleep(0.01)
        self.loaded.append(policy_revision(AutoModelForCausalLM.from_pretrained(model_path)))
        if self.rank == 0 and len(self.loaded) == 4:
            self.all_loaded.touch()

    async def generate(self, prompt_ids: list[int], sampling: Any, *, session: str | None = None) -> Any:
        assert session is not None
        if session.startswith("1/"):
            self.rolls_out.set()
            assert await asyncio.to_thread(self.stepped.wait, SECONDS), "no step was trained meanwhile"
        self.sampled.add((session[: session.index("/", 2)], self.loaded[-1]))
        return await super().generate(prompt_ids, sampling, session=session)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.rolls_out.wait(SECONDS), "nothing was rolled out meanwhile"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepped.set()


def with_weights_of_its_own(folder: Path, tool: Any, rank: int) -> dict[str, Any]:
    """What the process knows of a run of three iterations."""
    engine = Meeting(rank, folder / "all_loaded")
    trainer, generator, _ = make_run(folder, tool, engine=engine, prompts=problems(5), iterations=3, max_policy_lag=1)
    trainer.add_callback(engine)
    trainer.train()
    return {
        "revision": policy_revision(trainer.model),
        "started": [report.starting_revision for report in generator.reports],
        "lags": [report.policy_lag for report in generator.reports],
        "sampled": sorted(engine.sampled),
        "said": sorted({
            (f"{iteration}/{t.info['policy']}", t.info["policy_revision"])
            for iteration in range(3)
            for t in Journal(generator.run.iteration(iteration).journal).read()
        }),
        "rolled_out": sorted({call.session for call in engine.calls}),
        "checkpoints": len(generator.run.engine_checkpoints()),
    }  # fmt: skip


def over_a_copy(folder: Path) -> None:
    """The policy itself samples; the assertions are those of one process."""
    trained = test_overlap.sampled_run(folder)
    trained[0].train()
    test_overlap.test_rows_are_of_the_policy_before_and_say_so(trained)
    test_overlap.test_trajectories_are_to_the_last_bit_those_of_the_policy_that_is_named(trained)
