# /// script
# dependencies = ["trl-multiturn"]
# ///

r"""
How good a policy with tools is: pass@1 (greedy), with samples pass@n and maj@n, and with a value model the search that
it guides, each with a standard error.

# The policy of the embedded default, on its 200 held-out problems
```bash
python examples/evaluate.py --config examples/configs/evaluate_cpu.yaml \
    --model_name_or_path outputs/iterative_multi_turn_dpo
```

# A chat model with vLLM, 9 samples per problem
```bash
python examples/evaluate.py --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name openai/gsm8k --dataset_config main --dataset_test_split test --num_eval_prompts 1319 \
    --eval_generations 9 --use_vllm --vllm_gpu_memory_utilization 0.9
```

# Search by the values that OREO learned
```bash
python examples/evaluate.py --config examples/configs/evaluate_cpu.yaml \
    --model_name_or_path outputs/iterative_oreo --value_model outputs/iterative_oreo/value_model --beam 3
```
"""

import functools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from embedded.default_job import load_held_out_problems

from trl_multiturn.scripts.arguments import EngineArguments, PromptArguments, RolloutArguments


@dataclass
class EvaluationArguments(PromptArguments):
    """What is evaluated, and how."""

    seed: int = field(default=42, metadata={"help": "Seed of the samples."})
    eval_temperature: float = field(default=0.7, metadata={"help": "Temperature of the samples (not the search)."})
    value_model: str | None = field(default=None, metadata={"help": "Folder of a value model that guides a search."})
    beam: int = field(default=3, metadata={"help": "Partial trajectories that the search keeps."})
    search_vote: str = field(
        default="weighted", metadata={"help": "How its answer is chosen: `none` (highest value), `plain`, `weighted`."}
    )
    search_step: str = field(default="turn", metadata={"help": "What it decides on: `turn`, `line` or `sentence`."})
    device: str | None = field(default=None, metadata={"help": "Where model and values run; a GPU if there is one."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the numbers."})


def main(script_args, model_args, rollout_args, engine_args):
    import torch

    from trl_multiturn import RolloutConfig, ValueModel, evaluate_policy, value_guided_search
    from trl_multiturn.scripts.arguments import seeded, system_prompt
    from trl_multiturn.scripts.online import shots_of
    from trl_multiturn.scripts.prompts import with_shots
    from trl_multiturn.scripts.sampling import engine_factory, load_policy
    from trl_multiturn.scripts.tools import load_tools

    # The policy, plain or adapter, its tools, and the held-out problems
    device = script_args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    policy, tokenizer = load_policy(model_args.model_name_or_path, device)
    tools = load_tools(script_args.tools)
    config = seeded(RolloutConfig, rollout_args, script_args.seed)
    config.system_prompt = system_prompt(config, script_args.tools)
    prompts = load_held_out_problems(script_args)
    prompts = with_shots(prompts, shots_of(script_args, config, model_args.model_name_or_path, tools))
    engine = engine_factory(engine_args, model_args, config)(policy, tokenizer)

    # Greedy and samples; with values a search
    arguments = (prompts, engine, tools, script_args.reward_funcs)
    n, temperature = script_args.eval_generations, script_args.eval_temperature
    result = evaluate_policy(
        *arguments,
        n=n,
        temperature=temperature,
        config=config,
        progress=True,
        log_completions=script_args.log_completions,
        num_completions_to_print=script_args.num_completions_to_print,
    )
    metrics = result.metrics()
    if script_args.value_model:
        values = ValueModel.from_pretrained(script_args.value_model).to(device)
        search = functools.partial(
            value_guided_search,
            score=values.score,
            beam=script_args.beam,
            step=script_args.search_step,
            finished="pool",
            vote=script_args.search_vote,
        )
        found = evaluate_policy(*arguments, n=max(n, 2), temperature=temperature, config=config, search=search)
        metrics |= {"search": found.greedy.value, "search_se": found.greedy.standard_error}
        metrics |= found.comparison.metrics()

    for name in (name for name in metrics if f"{name}_se" in metrics and not name.startswith("search/")):
        print(f"{name:<10} {100 * metrics[name]:5.1f} ± {100 * metrics[f'{name}_se']:.1f} % of {len(prompts)}")
    if script_args.value_model:
        print(f"At the same number of sampled tokens:\n{found.comparison}")
    print(", ".join(f"{name} {count}" for name, count in sorted(result.counts.items())))
    if script_args.output:
        Path(script_args.output).write_text(json.dumps(metrics, indent=2), encoding="utf-8")


def make_parser():
    from trl import ModelConfig, TrlParser

    return TrlParser((EvaluationArguments, ModelConfig, RolloutArguments, EngineArguments))


if __name__ == "__main__":
    parser = make_parser()
    if len(sys.argv) == 1:
        parser.error("Name the policy: --model_name_or_path.")
    main(*parser.parse_args_and_config())
