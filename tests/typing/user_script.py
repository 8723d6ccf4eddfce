"""A user's script, right and wrong, as a type checker reads it: `tests/typing/test_types.py` compares the verdicts.

A line with such a comment must be reported with the code that it names, and no other line with any. It is never run.
"""

from __future__ import annotations

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig

import trl_multiturn
from trl_multiturn import (
    DQOConfig,
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    MultiTurnKTOConfig,
    MultiTurnKTOTrainer,
    OREOConfig,
    OREOTrainer,
    PairingConfig,
    PythonTool,
    RolloutConfig,
    Sandbox,
    SandboxConfig,
    ToolRolloutGenerator,
    Trajectory,
    Verdict,
    math_reward,
)
from trl_multiturn.tools import NoSuchTool  # wrong: attr-defined  # noqa: F401


rows = Dataset.from_list([])

# A script that was written for TRL, with one import changed
trainer = MultiTurnDPOTrainer(
    model="Qwen/Qwen3-0.6B",
    args=MultiTurnDPOConfig(output_dir="m-dpo", beta=0.1, train_on_turns="last", packed="auto"),
    train_dataset=rows,
    peft_config=LoraConfig(),
)
trainer.train()
trainer.save_model("m-dpo")
MultiTurnDPOTrainer("a-model", None, DPOConfig("run"), train_dataset=rows)
MultiTurnKTOTrainer("a-model", args=MultiTurnKTOConfig("run"), train_dataset=rows)
OREOTrainer(AutoModelForCausalLM.from_pretrained("a-model"), args=OREOConfig("run", level="step"), train_dataset=rows)

generator = ToolRolloutGenerator(
    rows,
    tools=[PythonTool()],
    reward_funcs=[math_reward],
    config=RolloutConfig(num_generations=8, temperature=1.0),
    pairing=PairingConfig(strategy="best_worst"),
)
MultiTurnDPOTrainer(model="a-model", args=MultiTurnDPOConfig("run"), callbacks=[generator])

with Sandbox(SandboxConfig(timeout_seconds=2.0)) as sandbox, sandbox.open() as session:
    output: str = session.run("1 + 1").output


def winners(trajectories: list[Trajectory]) -> list[Trajectory]:
    return [trajectory for trajectory in trajectories if trajectory.verdict is Verdict.CORRECT]


# Wrong uses
RolloutConfig(num_generation=3)  # wrong: call-arg
RolloutConfig(num_generations="3")  # wrong: arg-type
PairingConfig(strategy=3)  # wrong: arg-type
OREOConfig("run", level="word")  # wrong: arg-type
DQOConfig("run", lambda_=1.0)  # wrong: call-arg
MultiTurnDPOTrainer(modle="a-model")  # wrong: call-arg
session.runn("1")  # wrong: attr-defined
trl_multiturn.PythonTol  # wrong: attr-defined  # noqa: B018
Verdict.MAYBE  # wrong: attr-defined  # noqa: B018
generator.tols  # wrong: attr-defined  # noqa: B018
