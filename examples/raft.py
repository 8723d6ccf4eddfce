# /// script
# dependencies = ["trl-multiturn"]
# ///

r"""
RAFT: roll out, keep the answers that the verifier accepts, at most k per prompt, and fine-tune on them.

The baseline of the M-DPO paper (2409.02392, section 3.1; k = 1). Run it on the folder it wrote for another round.

# Full training
```bash
accelerate launch examples/raft.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name openai/gsm8k --dataset_config main \
    --num_generations 30 --winners_per_prompt 1 \
    --learning_rate 5e-6 --num_train_epochs 1 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
    --max_length 2048 --output_dir Qwen2.5-1.5B-RAFT
```

# LoRA
```bash
accelerate launch examples/raft.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name openai/gsm8k --dataset_config main \
    --num_generations 30 --winners_per_prompt 1 \
    --learning_rate 5e-5 --num_train_epochs 1 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
    --max_length 2048 --use_peft --lora_r 32 --lora_alpha 16 --output_dir Qwen2.5-1.5B-RAFT-LoRA
```

# CPU, the warm start of `iterative_multi_turn_dpo.py` and its embedded problems
```bash
python examples/raft.py \
    --model_name_or_path outputs/iterative_multi_turn_dpo/warm_start \
    --num_generations 8 --winners_per_prompt 2 --max_turn_tokens 80 --max_trajectory_tokens 256 \
    --learning_rate 5e-4 --per_device_train_batch_size 16 --use_cpu --bf16 False \
    --report_to none --output_dir outputs/raft
```
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from trl import ScriptArguments


SYSTEM_PROMPT = (
    "Solve the problem with Python. Write one ```python block at a time; its output comes back in an ```output block. "
    "When you know the answer, put it in \\boxed{}."
)


@dataclass
class RaftScriptArguments(ScriptArguments):
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset of questions and answers; without it the embedded problems are used."}
    )
    question_column: str = field(default="question", metadata={"help": "Column with the question."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the gold answer."})
    num_prompts: int = field(default=400, metadata={"help": "Most prompts to roll out from."})
    num_generations: int = field(default=30, metadata={"help": "Rollouts per prompt."})
    winners_per_prompt: int = field(default=1, metadata={"help": "Most accepted answers per prompt (k)."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the rollouts."})
    max_turn_tokens: int = field(default=512, metadata={"help": "Most tokens of one turn."})
    max_trajectory_tokens: int = field(default=2048, metadata={"help": "Most tokens of prompt and completion."})


def main(script_args, training_args, model_args):
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    from trl_multiturn import (
        Journal,
        PythonTool,
        RolloutConfig,
        TransformersEngine,
        UnpairedConfig,
        generate_trajectories,
        math_reward,
    )
    from trl_multiturn.data import supervised_rows
    from trl_multiturn.distributed.pace import at_own_pace
    from trl_multiturn.rows.row_files import write_rows
    from trl_multiturn.rows.selection import select_by_prompt

    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype or "float32",
        quantization_config=get_quantization_config(model_args),
    ).to(training_args.device)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)

    # Roll out and verify: each process its share, what finished is kept in the journal
    prompts = load_prompts(script_args)
    share = range(training_args.process_index, len(prompts), training_args.world_size)
    with Journal(Path(training_args.output_dir, "journal")) as journal, at_own_pace(training_args.ddp_timeout):
        generate_trajectories(
            prompts.select(share),
            TransformersEngine(model, tokenizer),
            tools=[PythonTool()],
            config=RolloutConfig(
                num_generations=script_args.num_generations,
                temperature=script_args.temperature,
                max_turn_tokens=script_args.max_turn_tokens,
                max_trajectory_tokens=script_args.max_trajectory_tokens,
                dialect="fenced",
                system_prompt=SYSTEM_PROMPT if script_args.dataset_name else None,
                seed=training_args.seed,
            ),
            reward_funcs=[math_reward],
            prompt_indices=list(share),
            journal=journal,
            collect=False,  # they are in the journal
        )

    # Keep at most k winners per prompt, one prompt after another, and imitate their own words
    winners = UnpairedConfig(strategy="winners", max_positives=script_args.winners_per_prompt, seed=training_args.seed)
    folder, count = Path(training_args.output_dir, "rows"), len(prompts) * script_args.num_generations
    if training_args.process_index == 0:
        found = select_by_prompt(journal.read_by_prompt(), winners)
        write_rows((selection for _, selection in found), folder, "unpaired")
    training_args.distributed_state.wait_for_everyone()
    rows = load_from_disk(folder)
    if len(rows) == 0:
        raise SystemExit(f"None of {count} rollouts is correct, so there is nothing to imitate.")
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=supervised_rows(rows, tokenizer),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.accelerator.print(f"{len(rows)} accepted answers of {count} rollouts.")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if hasattr(trainer, "end"):  # transformers >= 5.18
        trainer.end()


def load_prompts(script_args):
    """Prompts with the columns `prompt` (messages) and `answer`."""
    from trl_multiturn.data import load_rows

    if script_args.dataset_name is None:
        from word_problems import make_problems

        return make_problems(script_args.num_prompts, seed=1000)
    dataset = load_rows(script_args.dataset_name, script_args.dataset_config)[script_args.dataset_train_split]
    dataset = dataset.select(range(min(script_args.num_prompts, len(dataset))))

    def to_prompt(row):
        question = {"role": "user", "content": row[script_args.question_column]}
        return {"prompt": [question], "answer": row[script_args.answer_column]}

    return dataset.map(to_prompt, remove_columns=dataset.column_names)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import ModelConfig, SFTConfig, TrlParser

    dataclass_types = (RaftScriptArguments, SFTConfig, ModelConfig)
    if subparsers is not None:
        return subparsers.add_parser("raft", help="Run RAFT", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    script_args, training_args, model_args = make_parser().parse_args_and_config()
    main(script_args, training_args, model_args)
