"""Runs of the online loop in one of several processes; writes what its rank ended with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from tests import overlap_worker
from tests.support import byte_tokenizer, tiny_model
from tests.test_callbacks import problems, solve
from trl_multiturn import (
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    PythonTool,
    RolloutConfig,
    ScriptedEngine,
    ToolRolloutGenerator,
    math_reward,
)
from trl_multiturn.trainer.loop.policy_weights import policy_revision


class LoadingEngine(ScriptedEngine):
    """An engine with weights of its own, in each process: it loads what it is told to."""

    weights = "own"

    def refresh(self, model_path: str | None = None) -> None:
        self.loaded = [*getattr(self, "loaded", []), policy_revision(AutoModelForCausalLM.from_pretrained(model_path))]


def main(folder: Path) -> None:
    rank, outcome = int(os.environ["RANK"]), in_turns(folder / "in_turns")
    with PythonTool() as tool:
        outcome["ahead"] = overlap_worker.with_weights_of_its_own(folder / "ahead", tool, rank)
    overlap_worker.over_a_copy(folder / "copied")
    (folder / f"rank{rank}.json").write_text(json.dumps(outcome))


def in_turns(folder: Path) -> dict[str, Any]:
    """What the process knows of a run of two iterations."""
    tokenizer = byte_tokenizer("qwen2_5")
    args = MultiTurnDPOConfig(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    engine = LoadingEngine(solve, tokenizer)
    with PythonTool() as tool:
        generator = ToolRolloutGenerator(
            problems(5),
            tools=[tool],
            reward_funcs=math_reward,
            config=RolloutConfig(
                num_generations=4, previous_policy_generations=2, max_turn_tokens=100, dialect="fenced"
            ),
            eval_prompts=problems(3, first=50),
            engine=engine,
        )
        model = tiny_model(tokenizer)
        trainer = MultiTurnDPOTrainer(model, args=args, processing_class=tokenizer, callbacks=[generator])
        trainer.train()
    return {
        "revision": policy_revision(model),
        "loaded": engine.loaded,
        "rows": [report.rows for report in generator.reports],
        "trajectories": [report.trajectories for report in generator.reports],
        "steps": trainer.state.global_step,
        "evaluated": sorted({c.session for c in engine.calls if "evaluation" in c.session}),
        "rolled_out": sorted({c.session for c in engine.calls if "evaluation" not in c.session}),
        "pass@1": generator.reports[-1].evaluation["pass@1"],
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:  # one run after the other
        main(Path(argument))
