# /// script
# dependencies = ["trl-multiturn"]
# ///

r"""
Online iterative OREO: roll out with tools, verify, keep balanced trajectories, train policy and value model, refresh
the reference; repeat. The value model goes on learning from iteration to iteration, and at the end by itself
(`--value_epochs`); then what it chooses, among samples and in a search, is compared with greedy decoding on held-out
prompts. On the embedded default: pass@1 37.5 before, 76.5 % after; greedy decoding 77.0 and search by value 68.5 %
(`benchmarks/results/values.md`).

# The embedded default: a CPU, no download
```bash
python examples/iterative_oreo.py
```

# Full training (OREO paper 2412.16145, sections 3.3 and 4.4)
```bash
accelerate launch examples/iterative_oreo.py --config examples/configs/oreo_one_gpu.yaml
```

# LoRA, policy and value model on one backbone
```bash
accelerate launch examples/iterative_oreo.py --config examples/configs/oreo_lora.yaml
```

A flag on the command line changes what the file says; `--help` lists all. A run that was stopped goes on where it was
when the same command is given again; one that is finished fits its values and compares again. For DQO put `DQOConfig`
and `DQOTrainer` in place of `OREOConfig` and `OREOTrainer`: the rows bring the log-probabilities of the policy that
sampled them, which the importance weights need.
"""

from dataclasses import dataclass, field

from embedded.default_job import CONFIGS, load_policy_and_rows, load_problems
from embedded.value_search import compare_decoding, fit_values

from trl_multiturn.scripts.arguments import OnlineScriptArguments, UnpairedArguments


@dataclass
class IterativeOREOScriptArguments(OnlineScriptArguments):
    """Those of the online loop, and what is done with the values after it."""

    value_epochs: float = field(
        default=2,
        metadata={
            "help": "Passes over the rows of all iterations in which the value model learns on, while the policy is "
            "left alone, before it guides a search (0: none)."
        },
    )
    beam: int = field(
        default=3, metadata={"help": "Partial trajectories that the search keeps on held-out prompts (0: no search)."}
    )
    search_step: str = field(default="turn", metadata={"help": "What it decides on: `turn`, `line` or `sentence`."})


def main(arguments):
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_multiturn import OREOTrainer, TransformersEngine, ValueModel
    from trl_multiturn.scripts.online import finish, in_front, init_kwargs, rollout_generator, train_and_save
    from trl_multiturn.scripts.sampling import load_policy
    from trl_multiturn.scripts.tools import load_tools
    from trl_multiturn.scripts.warm_start import warm_started

    script, folder = arguments.script, arguments.training.output_dir

    # Prompts, tools, and a policy that knows the tools' format
    tools = load_tools(script.tools)
    demonstrations = load_policy_and_rows(arguments)
    prompts, eval_prompts = load_problems(script, arguments.training)
    prompts, eval_prompts = in_front(arguments, prompts, eval_prompts, tools)
    arguments.model.model_name_or_path = warm_started(arguments, prompts, tools, demonstrations)

    # The loop: a callback in place of a training set
    generator = rollout_generator(arguments, prompts, eval_prompts, tools)
    arguments.training.model_init_kwargs = init_kwargs(arguments)
    trainer = OREOTrainer(
        model=arguments.model.model_name_or_path,
        args=arguments.training,
        processing_class=AutoTokenizer.from_pretrained(arguments.model.model_name_or_path),
        callbacks=[generator],
        quantization_config=get_quantization_config(arguments.model),
        peft_config=get_peft_config(arguments.model),
    )
    train_and_save(trainer, generator, arguments)

    # Let the value model learn on; then load both as any user would, and let it choose among samples and among steps
    if script.value_epochs:
        fit_values(script.value_epochs, generator.run_folder, arguments.training)
    if eval_prompts is not None and script.beam and trainer.accelerator.is_main_process:
        device = trainer.accelerator.device
        engine = TransformersEngine(*load_policy(folder, device))
        values = ValueModel.from_pretrained(f"{folder}/value_model").to(device)
        rollout, rewards = arguments.rollout, script.reward_funcs
        compare_decoding(script.beam, script.search_step, eval_prompts, engine, values, tools, rewards, rollout)
    finish(trainer, generator, arguments)


def make_parser():
    from trl_multiturn import OREOConfig
    from trl_multiturn.scripts.arguments import online_parser

    parser = online_parser(OREOConfig, UnpairedArguments, IterativeOREOScriptArguments)
    parser.set_defaults(num_generations=16, previous_policy_generations=0)  # OREO paper, appendix A
    return parser


if __name__ == "__main__":
    from trl_multiturn.scripts.arguments import parse_online
    from trl_multiturn.scripts.online import run_script

    run_script(main, parse_online(make_parser(), default_config=CONFIGS / "oreo_cpu.yaml"))
