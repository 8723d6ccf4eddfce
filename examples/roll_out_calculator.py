# /// script
# dependencies = ["trl-multiturn"]
# ///

"""
A policy's own solutions with a calculator, judged by their answers: what verifiers learn from (Cobbe et al., 2021).

Rows in which one number was swapped (`prepare_real_data.py --source gsm8k_train`) are wrong in other ways than a model
is. Here the policy answers the training problems itself, and `oreo.py` takes what is written:

```bash
python examples/roll_out_calculator.py \
    --policy outputs/language_model --dataset_name data/gsm8k_train_trajectory.jsonl --output data/own_trajectory.jsonl
```

The policy must write calls as the rows do, without having read the calculator's schema (`sft.py --without_tools`).
With `--share 0/4` every fourth problem from the first is answered, so that several processes can share the work.
Trajectories are written as they finish; a run that is stopped leaves those.
"""

import argparse
import json
import random
import re
from pathlib import Path

from embedded.one_mistake import calculate


# How the small policies' chat template writes a call, in the form that `parse_response` reads
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def calculator(expression: str) -> str:
    """
    Evaluates an arithmetic expression.

    Args:
        expression: For example `16-3-4`.
    """
    value = calculate(expression)
    if value is None:
        return "error"
    return value if "/" not in expression or "." in value else f"{value}.0"  # as Python's division says it


def answer_of(text: str) -> float | None:
    """The number after the last `A:`."""
    found = re.findall(r"A: *\$?(-?[\d,]*\.?\d+)", text)
    return float(found[-1].replace(",", "")) if found else None


def same_answer(completions, answer, **kwargs) -> list[float]:
    """1 where the last turn gives the gold answer."""
    return [
        float(answer_of(turns[-1]["content"] or "") == gold) for turns, gold in zip(completions, answer, strict=True)
    ]


def load_problems(name: str, share: str, num_prompts: int | None) -> list[dict]:
    """The problems of the gold rows, in random order; of a problem told with several numbers all."""
    from trl_multiturn.data import load_split

    gold = load_split(name).filter(lambda row: row["label"])
    problems = [
        {"prompt": row["prompt"], "answer": answer_of(row["completion"][-1]["content"]), "id": row["question_id"]}
        for row in gold
    ]
    problems = [problem for problem in problems if problem["answer"] is not None]
    random.Random(0).shuffle(problems)
    first, step = map(int, share.split("/"))
    return problems[first:num_prompts:step]


def main(args):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_multiturn import RolloutConfig, TransformersEngine, generate_trajectories
    from trl_multiturn.trajectory import StopReason, Verdict

    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    tokenizer.chat_template = "{%- set tools = none -%}" + tokenizer.chat_template
    tokenizer.response_template = RESPONSE_TEMPLATE
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.policy).to(device)
    problems = load_problems(args.dataset_name, args.share, args.num_prompts)
    config = RolloutConfig(
        num_generations=args.num_generations,
        temperature=args.temperature,
        max_tool_calling_iterations=12,
        max_turn_tokens=120,
        max_trajectory_tokens=640,
        dialect="native",
        malformed_calls="end",
        max_concurrent_trajectories=args.batch_size,
        seed=args.seed,
    )
    counts = dict.fromkeys(("answers", "correct"), 0)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", encoding="utf-8") as file:

        def write(trajectory):
            said = answer_of(trajectory.completion[-1]["content"] or "")
            if trajectory.stop_reason is not StopReason.ANSWERED or trajectory.verdict is Verdict.UNDECIDED:
                return
            if said is None:  # wrong at first sight, which teaches nothing
                return
            label = trajectory.verdict is Verdict.CORRECT
            counts["answers"] += 1
            counts["correct"] += label
            row = {name: getattr(trajectory, name) for name in ("prompt_ids", "completion_ids", "action_mask")}
            row |= {"label": label, "reward": float(label)}
            row["question_id"] = problems[trajectory.info["prompt_index"]]["id"]
            file.write(json.dumps(row) + "\n")
            file.flush()

        generate_trajectories(
            problems, TransformersEngine(model, tokenizer, args.batch_size), [calculator], config,
            reward_funcs=same_answer, on_trajectory=write, progress=False,
        )  # fmt: skip
    print(f"{counts['answers']} answers to {len(problems)} problems, {counts['correct']} of them correct.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Answer problems with a calculator, and keep right and wrong.")
    parser.add_argument("--policy", required=True, help="Folder or name of the policy.")
    parser.add_argument("--dataset_name", required=True, help="Gold rows with `question_id`.")
    parser.add_argument("--output", required=True, help="JSONL file to write.")
    parser.add_argument("--num_generations", type=int, default=4, help="Answers to each problem.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Temperature of the answers.")
    parser.add_argument("--num_prompts", type=int, default=None, help="So many of the problems, chosen at random.")
    parser.add_argument("--share", default="0/1", help="`k/n`: every n-th of them, from the k-th.")
    parser.add_argument("--batch_size", type=int, default=256, help="Answers under way at the same time.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the answers.")
    main(parser.parse_args())
