"""A whole training run in a process that may be killed at any moment: `tests/test_killed_run.py` starts and kills it.

`python -m tests.killed_run` reads one JSON line of arguments of [`train`] after another and runs each in a process
forked from this one, so that the imports are paid once. For every file that a run opens, moves or deletes under its
folder it reports the time, which is how the test knows what a run is doing.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn import (
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    PairingConfig,
    PythonTool,
    RolloutConfig,
    ToolRolloutGenerator,
    TransformersEngine,
)


ITERATIONS = 3
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def many_vowels(completions, **columns):
    """Random text has no right answers, so that the policy is rewarded for vowels."""
    texts = ["".join(m["content"] for m in completion if m["role"] == "assistant") for completion in completions]
    return [float(sum(text.lower().count(vowel) for vowel in "aeiou") % 2) for text in texts]


def train(folder: str, lora: bool = False, history: str = "latest", save_total_limit: int | None = 1) -> None:
    """Three iterations with a real policy and the real interpreter; the same call starts the run and takes it up.

    With `lora` there is dropout, so that training draws random numbers.
    """
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer("qwen2_5")
    questions = [[{"role": "user", "content": f"{i}?"}] for i in range(4)]
    stops = [chr(code) for code in range(33, 127) if code % 4 == 0]  # a random policy would hardly ever end a turn
    with PythonTool() as tool:
        generator = ToolRolloutGenerator(
            Dataset.from_dict({"prompt": questions}),
            tools=[tool],
            reward_funcs=[many_vowels],
            config=RolloutConfig(
                num_generations=5,
                previous_policy_generations=2,
                max_turn_tokens=60,
                max_trajectory_tokens=1024,
                max_tool_calling_iterations=2,
                dialect="action",
                action_prefix="",
                stop_strings=stops,
                max_concurrent_trajectories=12,
            ),
            pairing=PairingConfig(filters=[], max_pairs_per_prompt=2),
            history=history,
            eval_prompts=Dataset.from_dict({"prompt": questions[:2]}),
            engine=lambda model, processing_class: TransformersEngine(model, processing_class, max_batch_size=8),
        )
        args = MultiTurnDPOConfig(
            output_dir=folder,
            num_train_epochs=ITERATIONS,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="steps",  # inside the iterations, too; every iteration ends with one anyway
            save_steps=3,
            save_total_limit=save_total_limit,
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        lora_config = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]) if lora else None
        trainer = MultiTurnDPOTrainer(
            tiny_model(tokenizer),
            args=args,
            processing_class=tokenizer,
            callbacks=[generator],
            peft_config=lora_config,
        )
        trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(Path(folder, "final")))
    trainer.save_state()


def _report_files(folder: str, pipe: int) -> None:
    """Writes a line to `pipe` for whatever happens to a file under `folder`."""

    def hook(event: str, arguments: tuple) -> None:
        if event in _EVENTS and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(arguments[0])
            if path.startswith(folder):
                os.write(pipe, f"{time.monotonic()} {path.removeprefix(folder)}\n".encode())

    sys.addaudithook(hook)


def serve() -> None:
    for line in sys.stdin:
        arguments = json.loads(line)
        pipe = arguments.pop("pipe")
        process = os.fork()
        if process == 0:
            os.dup2(2, 1)  # standard output is for the answers below
            try:
                with open(pipe, "wb", buffering=0) as events:
                    _report_files(arguments["folder"], events.fileno())
                    train(**arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
