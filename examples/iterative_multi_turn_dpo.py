# /// script
# dependencies = ["trl-multiturn"]
# ///

r"""
Online iterative M-DPO: roll out with tools, verify, filter, pair, train, refresh the reference; repeat.

# The embedded default: a CPU, no download, a few minutes
```bash
python examples/iterative_multi_turn_dpo.py
```

# A real chat model on a CPU, from its first program to M-DPO, in under an hour
```bash
python examples/fetch_smollm2.py outputs/smollm2
python examples/iterative_multi_turn_dpo.py --config examples/configs/dpo_smollm2.yaml
```

# Full training on one GPU (M-DPO paper 2409.02392, section 3.1)
```bash
accelerate launch examples/iterative_multi_turn_dpo.py --config examples/configs/dpo_one_gpu.yaml
```

# LoRA
```bash
accelerate launch examples/iterative_multi_turn_dpo.py --config examples/configs/dpo_lora.yaml
```

# Eight GPUs; one GPU with vLLM in a server beside
```bash
accelerate launch --num_processes 8 examples/iterative_multi_turn_dpo.py --config examples/configs/dpo_eight_gpus.yaml
accelerate launch examples/iterative_multi_turn_dpo.py --config examples/configs/dpo_server.yaml
```

A flag on the command line changes what the file says; `--help` lists all, those of `RolloutConfig`, `PairingConfig`
and `MultiTurnDPOConfig` among them. A run that was stopped goes on where it was when the same command is given again.
"""

from embedded.default_job import CONFIGS, load_policy_and_rows, load_problems


def main(arguments):
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_multiturn import MultiTurnDPOTrainer
    from trl_multiturn.scripts.online import finish, in_front, init_kwargs, rollout_generator, train_and_save
    from trl_multiturn.scripts.tools import load_tools
    from trl_multiturn.scripts.warm_start import warm_started

    # Prompts, tools, and a policy that knows the tools' format
    tools = load_tools(arguments.script.tools)
    demonstrations = load_policy_and_rows(arguments)
    prompts, eval_prompts = load_problems(arguments.script, arguments.training)
    prompts, eval_prompts = in_front(arguments, prompts, eval_prompts, tools)
    arguments.model.model_name_or_path = warm_started(arguments, prompts, tools, demonstrations)

    # The loop: a callback in place of a training set
    generator = rollout_generator(arguments, prompts, eval_prompts, tools)
    arguments.training.model_init_kwargs = init_kwargs(arguments)
    trainer = MultiTurnDPOTrainer(
        model=arguments.model.model_name_or_path,
        args=arguments.training,
        processing_class=AutoTokenizer.from_pretrained(arguments.model.model_name_or_path),
        callbacks=[generator],
        quantization_config=get_quantization_config(arguments.model),
        peft_config=get_peft_config(arguments.model),
    )
    train_and_save(trainer, generator, arguments)
    finish(trainer, generator, arguments)


def make_parser():
    from trl_multiturn import MultiTurnDPOConfig
    from trl_multiturn.scripts.arguments import online_parser

    return online_parser(MultiTurnDPOConfig)


if __name__ == "__main__":
    from trl_multiturn.scripts.arguments import parse_online
    from trl_multiturn.scripts.online import run_script

    run_script(main, parse_online(make_parser(), default_config=CONFIGS / "dpo_cpu.yaml"))
