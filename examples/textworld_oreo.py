# /// script
# dependencies = ["trl-multiturn[textworld]"]
# ///

"""
OREO on TextWorld games, in the manner of the ALFWorld experiment of the OREO paper (2412.16145, section 4.2).

Games are generated on this machine. A policy plays them, each turn one command; the trajectories, won and lost, train
policy and value model; at the end the policy plays greedily, and with the best of K sampled commands by value.

# The embedded default: a CPU, no download
```bash
pip install "trl-multiturn[textworld]"
python examples/textworld_oreo.py
```
The small player imitates hesitating episodes of 16 games, and knows these by heart. Games won (2026-11-20, CPU): of
the 16 training games 81 ± 10 % by the imitating policy playing greedily, 94 ± 6 % after OREO, 100 % with the best of 5
sampled commands by value; of 8 other games none, before and after: so small a player generalises to no other game.

# Full training
```bash
accelerate launch examples/textworld_oreo.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --num_games 400 --num_eval_games 100 --num_rooms 3 --num_objects 6 --quest_length 3 \
    --max_commands 40 --num_generations 10 --max_turn_tokens 64 --max_length 8192 \
    --value_model full --learning_rate 5e-6 --per_device_train_batch_size 1 --gradient_accumulation_steps 64 \
    --output_dir Qwen2.5-1.5B-TextWorld-OREO
```

# LoRA
```bash
accelerate launch examples/textworld_oreo.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --num_games 400 --num_eval_games 100 --num_rooms 3 --num_objects 6 --quest_length 3 \
    --max_commands 40 --num_generations 10 --max_turn_tokens 64 --max_length 8192 \
    --use_peft --lora_r 64 --lora_alpha 64 --value_model adapter --learning_rate 1e-5 --value_learning_rate 1e-4 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 64 \
    --output_dir Qwen2.5-1.5B-TextWorld-OREO-LoRA
```

ALFWorld has an example of its own, `alfworld_oreo.py`.
"""

import argparse
import functools
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from trl import ScriptArguments


# What the embedded default uses in place of the defaults of TRL and of the paper
EMBEDDED = {
    "output_dir": "outputs/textworld_oreo",
    "num_train_epochs": 3,
    "learning_rate": 3e-4,
    "value_model": "full",
    "value_learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}


@dataclass
class TextWorldScriptArguments(ScriptArguments):
    dataset_name: str | None = field(default=None, metadata={"help": "Not used: games are generated."})
    games_folder: str = field(default="outputs/games", metadata={"help": "Where the games are kept."})
    num_games: int = field(default=16, metadata={"help": "Games to train on."})
    num_eval_games: int = field(default=8, metadata={"help": "Further games to evaluate on."})
    num_rooms: int = field(default=1, metadata={"help": "Rooms of a game."})
    num_objects: int = field(default=3, metadata={"help": "Objects of a game."})
    quest_length: int = field(default=2, metadata={"help": "Commands of its shortest solution."})
    max_commands: int = field(default=6, metadata={"help": "Commands after which a game is lost (40 in the paper)."})
    num_generations: int = field(default=10, metadata={"help": "Episodes per game to train on."})
    max_turn_tokens: int = field(default=24, metadata={"help": "Most tokens of one command."})
    best_of: int = field(default=5, metadata={"help": "Commands among which the value model chooses (K)."})
    demonstrations: int = field(
        default=12, metadata={"help": "Embedded default only: episodes per game that the warm start imitates."}
    )


def main(script_args, training_args, model_args):
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_multiturn import (
        Journal,
        OREOTrainer,
        RolloutConfig,
        TransformersEngine,
        UnpairedConfig,
        generate_trajectories,
    )
    from trl_multiturn.distributed.pace import at_own_pace
    from trl_multiturn.rows.row_files import write_rows
    from trl_multiturn.rows.selection import select_by_prompt
    from trl_multiturn.tools.textworld import TextWorldEnvironment, make_games

    # Games: disjoint seeds, disjoint games
    count, size = script_args.num_games, ("num_rooms", "num_objects", "quest_length")
    seeds = range(count + script_args.num_eval_games)
    with training_args.main_process_first(desc="games", local=False):
        games = make_games(script_args.games_folder, seeds, **{name: getattr(script_args, name) for name in size})
    environment = functools.partial(TextWorldEnvironment, max_steps=script_args.max_commands)
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = warm_started_player(script_args, training_args, games, environment)

    # Play: every turn is a command, every observation is context
    config = RolloutConfig(
        dialect="action",
        num_generations=script_args.num_generations,
        max_tool_calling_iterations=script_args.max_commands,
        max_turn_tokens=script_args.max_turn_tokens,
        max_trajectory_tokens=training_args.max_length,
        seed=training_args.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype or "float32",
        quantization_config=get_quantization_config(model_args),
    ).to(training_args.device)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    engine = TransformersEngine(model, tokenizer)
    share = range(training_args.process_index, count, training_args.world_size)
    with Journal(Path(training_args.output_dir, "journal")) as journal, at_own_pace(training_args.ddp_timeout):
        generate_trajectories(
            [games[index] for index in share],
            engine,
            environment_factory=environment,
            config=config,
            prompt_indices=list(share),
            journal=journal,
            collect=False,  # they are in the journal
        )

    # Choose what trains, one game after another
    folder, counts = Path(training_args.output_dir, "rows"), Counter()

    def selections():
        for _, selection in select_by_prompt(journal.read_by_prompt(), UnpairedConfig(seed=training_args.seed)):
            counts.update(selection.counts)
            yield selection

    if training_args.process_index == 0:
        write_rows(selections(), folder, "unpaired")
    training_args.distributed_state.wait_for_everyone()
    rows = load_from_disk(folder)
    if len(rows) == 0:
        raise SystemExit(f"None of {count * script_args.num_generations} episodes ended: there is nothing to learn.")

    trainer = OREOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=rows,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.accelerator.print(f"{counts['correct']} of {counts['trajectories']} episodes won; {len(rows)} train.")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Policy saved to {training_args.output_dir}, the value model in its `value_model`.")

    if trainer.accelerator.is_main_process:
        for name, some in (("training games", games[:count]), ("held-out games", games[count:])):
            if some:
                compare(name, some, engine, training_args.output_dir, environment, config, script_args.best_of)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def compare(name, games, initial, folder, environment, config, best_of):
    """Prints the share of games won by the initial policy, the trained one, and the trained one guided by value."""
    from iterative_multi_turn_dpo import load_engine

    from trl_multiturn import ValueModel, evaluate_policy
    from trl_multiturn.rollout.search import value_guided_search

    trained = load_engine(folder)
    value_model = ValueModel.from_pretrained(Path(folder, "value_model"))
    by_value = functools.partial(value_guided_search, score=value_model.score, beam=1, candidates=best_of)
    for player, engine, search in (
        ("initial policy, greedy", initial, None),
        ("OREO, greedy", trained, None),
        (f"OREO, best of {best_of} by value", trained, by_value),
    ):
        result = evaluate_policy(games, engine, config=config, search=search, environment_factory=environment)
        print(f"{name}, {player}: {result.greedy} of {result.greedy.num_prompts} won.")


def warm_started_player(script_args, training_args, games, environment):
    """Builds a small policy that imitates a wandering player of the training games; the folder of the result."""
    from datasets import Dataset
    from embedded.tiny_policy import build_policy, build_tokenizer, warm_start

    folder = Path(training_args.output_dir, "warm_start")
    if not Path(folder, "config.json").exists():
        rng = random.Random(training_args.seed)
        rows = [
            {"messages": wander(game, environment(), rng)}
            for game in games[: script_args.num_games]
            for _ in range(script_args.demonstrations)
        ]
        texts = sorted({message["content"] for row in rows for message in row["messages"]})
        tokenizer = build_tokenizer(texts)
        policy = build_policy(tokenizer, seed=training_args.seed)
        warm_start(
            policy,
            tokenizer,
            Dataset.from_list(rows),
            str(folder),
            seed=training_args.seed,
            batch_size=8,
            max_steps=300,
            max_length=training_args.max_length,
        )
        tokenizer.save_pretrained(folder)
        policy.save_pretrained(folder)
    return str(folder)


# How often the player puts off the next command of a solution, by its verb; then it looks around, or tries anything
HESITATION = {"open": 0.2, "take": 0.4, "go": 0.5, "close": 0.6, "unlock": 0.6, "insert": 0.7, "put": 0.7, "drop": 0.7}
LOOKS_AROUND = 0.75


def wander(game, environment, rng):
    """One episode of a player who knows the solution, and hesitates before some kinds of command.

    A policy that imitates it hesitates for ever where hesitating is the more frequent choice, and so loses games when
    it plays greedily that it wins when it samples: what won and what lost is there to learn from.
    """
    from trl_multiturn.tools.environments import append_observation

    observation = environment.reset(**game)
    messages = append_observation(game["prompt"], observation)
    solution = list(game["walkthrough"])
    while not environment.done:
        commands = observation.rpartition("Admissible commands: ")[2].split(", ")
        command = "look" if rng.random() < LOOKS_AROUND else rng.choice(commands)
        if solution and solution[0] in commands and rng.random() >= HESITATION.get(solution[0].split()[0], 0.5):
            command = solution[0]
        if solution and command == solution[0]:
            solution.pop(0)
        messages.append({"role": "assistant", "content": f"Action: {command}"})
        observation = environment.act(command)
        if not environment.done:
            messages.append({"role": "user", "content": observation})
    return messages


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import ModelConfig, TrlParser

    from trl_multiturn import OREOConfig

    dataclass_types = (TextWorldScriptArguments, OREOConfig, ModelConfig)
    if subparsers is not None:
        return subparsers.add_parser("textworld-oreo", help="Run OREO on TextWorld", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    parser = make_parser()
    if not any(argument.startswith(("--model_name_or_path", "--config")) for argument in sys.argv[1:]):
        parser.set_defaults(**EMBEDDED)
    script_args, training_args, model_args = parser.parse_args_and_config()
    main(script_args, training_args, model_args)
