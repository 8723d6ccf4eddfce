"""A whole training run in processes that may be killed at any moment: `tests/test_killed_run.py` starts and kills it.

`python -m tests.killed_run` reads one JSON line of arguments of [`train`] after another and runs each in a process, or
in several, forked from this one, so that the imports are paid once. Several find each other by the variables that
`accelerate launch` sets. For every file that a run opens, moves or deletes under its folder it reports the time, which
is how the test knows what a run is doing. With an argument it runs that alone:
`accelerate launch -m tests.killed_run '{"folder": …}'`; a further argument names the file at which process 1 kills
itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from tests.launch import ranks
from tests.support import byte_tokenizer, tiny_model
from trl_multiturn import (
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    OREOConfig,
    OREOTrainer,
    PairingConfig,
    PythonTool,
    RolloutConfig,
    ToolRolloutGenerator,
    TransformersEngine,
    UnpairedConfig,
)


ITERATIONS = 3
METHODS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "M-DPO": (MultiTurnDPOTrainer, MultiTurnDPOConfig, {}),
    "OREO": (OREOTrainer, OREOConfig, {"value_model": "full", "kl_coef": 0.1}),
}
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def many_vowels(completions, **columns):
    """Random text has no right answers, so that the policy is rewarded for vowels."""
    texts = ["".join(m["content"] for m in completion if m["role"] == "assistant") for completion in completions]
    return [float(sum(text.lower().count(vowel) for vowel in "aeiou") % 2) for text in texts]


def few_vowels(completions, **columns):
    """What a mistake in a reward function may look like."""
    return [1.0 - reward for reward in many_vowels(completions, **columns)]


def train(
    folder: str,
    lora: bool = False,
    history: str = "latest",
    save_total_limit: int | None = 1,
    method: str = "M-DPO",
    broken: bool = False,
    max_policy_lag: int = 0,
) -> None:
    """Three iterations with a real policy and the real interpreter; the same call starts the run and takes it up.

    With `lora` there is dropout, so that training draws random numbers. With the method `"OREO"` there is a value
    model with an optimizer of its own, and a reference that moves with every iteration. A `broken` reward is to be
    repaired before the run goes on.
    With `max_policy_lag=1` rollouts run while the iteration before trains.
    """
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer("qwen2_5")
    questions = [[{"role": "user", "content": f"{i}?"}] for i in range(4)]
    stops = [chr(code) for code in range(33, 127) if code % 4 == 0]  # a random policy would hardly ever end a turn
    with PythonTool() as tool:
        generator = ToolRolloutGenerator(
            Dataset.from_dict({"prompt": questions}),
            tools=[tool],
            reward_funcs=[few_vowels if broken else many_vowels],
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
            pairing=PairingConfig(filters=[], max_pairs_per_prompt=2) if method == "M-DPO" else UnpairedConfig(),
            history=history,
            eval_prompts=Dataset.from_dict({"prompt": questions[:2]}),
            max_policy_lag=max_policy_lag,
            engine=lambda model, processing_class: TransformersEngine(model, processing_class, max_batch_size=8),
        )
        trainer_class, config_class, method_settings = METHODS[method]
        args = config_class(
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
            **method_settings,
        )
        lora_config = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]) if lora else None
        trainer = trainer_class(
            tiny_model(tokenizer),
            args=args,
            processing_class=tokenizer,
            callbacks=[generator],
            peft_config=lora_config,
        )
        trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(Path(folder, "final")))
    trainer.save_state()
    trainer.end()


def _report_files(folder: str, pipe: int) -> None:
    """Writes a line to `pipe` for whatever happens to a file under `folder`."""

    def hook(event: str, arguments: tuple) -> None:
        if event in _EVENTS and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(arguments[0])
            if path.startswith(folder):
                os.write(pipe, f"{time.monotonic()} {path.removeprefix(folder)}\n".encode())

    sys.addaudithook(hook)


def _die_at(name: str) -> None:
    """SIGKILL, in process 1 of several, when it first opens a file whose path contains `name`."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and name in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.get("RANK") == "1":
        sys.addaudithook(hook)


def start(arguments: dict[str, Any], pipe: str, environment: dict[str, str]) -> int:
    """Forks a process that runs [`train`]; its id."""
    process = os.fork()
    if process == 0:
        os.dup2(2, 1)  # standard output is for the answers of `serve`
        os.environ.update(environment)
        try:
            with open(pipe, "wb", buffering=0) as events:
                _report_files(arguments["folder"], events.fileno())
                train(**arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def serve() -> None:
    for line in sys.stdin:
        arguments = json.loads(line)
        pipe, count = arguments.pop("pipe"), arguments.pop("processes")
        processes = [start(arguments, pipe, environment) for environment in ranks(count)]
        print(json.dumps(processes), flush=True)
        codes = {}
        while len(codes) < count:
            process, status = os.wait()
            codes[process] = os.waitstatus_to_exitcode(status)
            if codes[process]:  # like the launcher: the others would wait for it
                for other in set(processes) - set(codes):
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(list(codes.values())), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _die_at(sys.argv[2])
    train(**json.loads(sys.argv[1])) if len(sys.argv) > 1 else serve()
