# /// script
# dependencies = ["trl-multiturn"]
# ///

r"""
Online group regression (AGRO, A*-PO, OAPL): roll out with tools, verify, regress the log-ratios of all trajectories of
a prompt on what each earned beyond the others, refresh the reference; repeat. There is no value model and no pair.

# The embedded default: a CPU, no download, a few minutes
```bash
python examples/iterative_group_regression.py
```

# Full training on one GPU, and LoRA
```bash
accelerate launch examples/iterative_group_regression.py --config examples/configs/group_regression_one_gpu.yaml
accelerate launch examples/iterative_group_regression.py --config examples/configs/group_regression_one_gpu.yaml \
    --use_peft --lora_r 32 --lora_alpha 16 --learning_rate 5e-6
```

A flag on the command line changes what the file says; `--help` lists all. A run that was stopped goes on where it was
when the same command is given again.
"""

from embedded.default_job import CONFIGS, load_policy_and_rows, load_problems


def main(arguments):
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_multiturn import GroupRegressionTrainer
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
    trainer = GroupRegressionTrainer(
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
    from trl_multiturn import GroupRegressionConfig, GroupRegressionTrainer
    from trl_multiturn.scripts.arguments import UnpairedArguments, online_parser

    parser = online_parser(GroupRegressionConfig, UnpairedArguments)
    parser.set_defaults(**GroupRegressionTrainer.default_sampling, previous_policy_generations=0)
    return parser


if __name__ == "__main__":
    from trl_multiturn.scripts.arguments import parse_online
    from trl_multiturn.scripts.online import run_script

    run_script(main, parse_online(make_parser(), default_config=CONFIGS / "group_regression_cpu.yaml"))
