# /// script
# dependencies = ["trl-multiturn"]
# ///

r"""
RAFT: roll out, keep the answers that the verifier accepts, at most k per prompt, and fine-tune on them.

The baseline of the M-DPO paper (2409.02392, section 3.1; k = 1). Run it on the folder it wrote for another round; as a
warm start before M-DPO it is `iterative_multi_turn_dpo.py --warm_start rollouts`.

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
    --num_generations 8 --winners_per_prompt 2 --max_turn_tokens 80 --max_trajectory_tokens 256 --system_prompt "" \
    --learning_rate 5e-4 --per_device_train_batch_size 16 --use_cpu --bf16 False \
    --report_to none --output_dir outputs/raft
```
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl_multiturn.scripts.arguments import EngineArguments, PromptArguments, RolloutArguments


@dataclass
class RaftScriptArguments(PromptArguments):
    """Where prompts come from, and how many winners are imitated."""

    num_prompts: int = field(default=400, metadata={"help": "Most prompts to roll out from."})
    winners_per_prompt: int = field(default=1, metadata={"help": "Most accepted answers per prompt (k)."})


def main(script_args, training_args, model_args, rollout_args, engine_args):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    from trl_multiturn import RolloutConfig, UnpairedConfig
    from trl_multiturn.data import supervised_rows
    from trl_multiturn.scripts.arguments import seeded, system_prompt
    from trl_multiturn.scripts.online import shots_of
    from trl_multiturn.scripts.prompts import with_shots
    from trl_multiturn.scripts.sampling import engine_factory
    from trl_multiturn.scripts.tools import load_tools
    from trl_multiturn.scripts.warm_start import verified_rows

    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype or "float32",
        quantization_config=get_quantization_config(model_args),
    ).to(training_args.device)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    tools = load_tools(script_args.tools)
    config = seeded(RolloutConfig, rollout_args, training_args.seed)
    config.system_prompt = system_prompt(config, script_args.tools)
    prompts = load_first_prompts(script_args)
    prompts = with_shots(prompts, shots_of(script_args, config, model_args.model_name_or_path, tools))

    # Roll out and verify; keep at most k winners per prompt; imitate their own words
    engine = engine_factory(engine_args, model_args, config)(model, tokenizer)
    winners = UnpairedConfig(strategy="winners", max_positives=script_args.winners_per_prompt, seed=training_args.seed)
    rows = verified_rows(
        prompts,
        engine,
        tools,
        script_args.reward_funcs,
        config,
        winners,
        Path(training_args.output_dir),
        training_args,
    )
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=supervised_rows(rows, tokenizer),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.accelerator.print(f"{len(rows)} accepted answers of {len(prompts) * config.num_generations} rollouts.")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if hasattr(trainer, "end"):  # transformers >= 5.18
        trainer.end()


def load_first_prompts(script_args):
    """The first prompts of the dataset, or embedded problems."""
    from embedded.word_problems import make_problems

    from trl_multiturn.data.loading import load_split
    from trl_multiturn.scripts.prompts import as_prompts

    if script_args.dataset_name is None:
        return make_problems(script_args.num_prompts, seed=1000)
    rows = load_split(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
    return as_prompts(rows.select(range(min(script_args.num_prompts, len(rows)))), script_args)


def make_parser():
    from trl import ModelConfig, SFTConfig, TrlParser

    return TrlParser((RaftScriptArguments, SFTConfig, ModelConfig, RolloutArguments, EngineArguments))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
