# /// script
# dependencies = ["trl-multiturn[alfworld]"]
# ///

"""
OREO on ALFWorld beside behavior cloning, rejection sampling, M-DPO and M-KTO (OREO paper, 2412.16145, section 4.2).

Players do household tasks in ALFWorld's engine. They know the planner's solution, but must search for the things, and
they hesitate, before cabinets more often than not, so that many run out of time. A policy imitates them all; then it
learns from what was won and what was lost, in each of four ways. The end is the share of tasks done in rooms that
nobody has seen, greedily, and for OREO also by the best of K sampled commands by value.

The rooms are made up and not those of AI2-THOR, so these numbers are no numbers on ALFWorld. With ALFWorld's data
(`alfworld-download`, ALFWORLD_DATA set), `--data alfworld` plays its games.

# The embedded default: a CPU, no download
```bash
pip install "trl-multiturn[alfworld]"
python examples/alfworld_oreo.py --seed 0
```
Further seeds reuse games and episodes; each prints the table of all seeds so far. A run that was broken off goes on
with the method that was under way. A policy of 0.4 million parameters copies the names of things from what it sees
only after it has read the games without hesitation, each time with other names (`--readings`). It is not told which
commands are possible. `benchmarks/results/environments.md` has what came of it.

# A pretrained policy, the embedded episodes or ALFWorld's data
```bash
accelerate launch examples/alfworld_oreo.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct --data alfworld \
    --max_commands 40 --max_length 8192 --max_turn_tokens 64 \
    --value_model full --learning_rate 5e-6 --per_device_train_batch_size 1 --gradient_accumulation_steps 64 \
    --output_dir Qwen2.5-1.5B-ALFWorld-OREO
```
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from trl import ScriptArguments


# What the embedded default uses in place of the defaults of TRL and of the paper
EMBEDDED = {
    "output_dir": "outputs/alfworld_oreo",
    "num_train_epochs": 6,
    "learning_rate": 5e-4,
    # The value model learns first: until it tells won from lost, the policy's loss is noise, and it forgets to copy
    "value_model": "full",
    "value_learning_rate": 2e-3,
    "value_warmup_steps": 120,
    "oreo_batches": 2,
    "other_epochs": 2,
    "per_device_train_batch_size": 8,
    "max_length": 512,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}
INSTRUCTION = "Do the task.\n\n"  # ALFWorld's own words would cost a small policy more than the task's
SHARED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_length"),
    *("seed", "bf16", "use_cpu", "save_strategy", "report_to", "logging_steps", "gradient_checkpointing"),
)
METHODS = ("rejection_sampling", "oreo", "dpo", "kto")
# Settings that may differ between two starts of a run
FREE = ("output_dir", "games_folder", "methods", "best_of", "disable_tqdm", "report_to", "run_name", "logging_dir")


@dataclass
class ALFWorldScriptArguments(ScriptArguments):
    dataset_name: str | None = field(default=None, metadata={"help": "Not used: games are played."})
    data: str = field(default="made_up", metadata={"help": "`made_up` rooms, or `alfworld`: its data."})
    games_folder: str = field(default="outputs/alfworld_games", metadata={"help": "Where games and episodes stay."})
    num_games: int = field(default=200, metadata={"help": "Games to train on."})
    num_eval_games: int = field(default=64, metadata={"help": "Games in unseen rooms to evaluate on."})
    eval_split: str = field(
        default="valid_unseen", metadata={"help": "Their rooms: `valid_unseen`, or `valid_seen` to try settings out."}
    )
    task_types: list[str] = field(
        default_factory=lambda: ["pick_and_place_simple"], metadata={"help": "Of ALFWorld's six, for made-up rooms."}
    )
    num_rooms: int = field(default=60, metadata={"help": "Made-up rooms of each kind and split."})
    num_things: int = field(default=3, metadata={"help": "Things in a made-up room."})
    furniture: float = field(default=0.3, metadata={"help": "Furniture of a made-up room, as a share of the usual."})
    max_commands: int = field(default=16, metadata={"help": "Commands after which a game is lost (40 in the paper)."})
    max_turn_tokens: int = field(default=24, metadata={"help": "Most tokens of one command."})
    hesitation: list[float] = field(
        default_factory=lambda: [0.2, 0.35, 0.5, 0.6],
        metadata={"help": "The players of each game: how often each plays a useless command."},
    )
    readings: int = field(
        default=32, metadata={"help": "Embedded default only: how often the policy reads each game at first."}
    )
    reading_rate: float = field(default=3e-3, metadata={"help": "Embedded default only: its learning rate then."})
    cloning_rate: float = field(
        default=1e-3, metadata={"help": "Embedded default only: the learning rate of behavior cloning."}
    )
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": f"Among {', '.join(METHODS)}."})
    oreo_batches: int = field(default=1, metadata={"help": "Batches of OREO's optimizer steps, for one of others."})
    other_epochs: float | None = field(
        default=None,
        metadata={"help": "Passes over the rows by others than OREO; by default as many (`num_train_epochs`)."},
    )
    best_of: int = field(default=5, metadata={"help": "Commands among which the value model chooses (K)."})


def main(script_args, training_args, model_args):
    games, unseen = load_games(script_args)
    rows = load_episodes(games, script_args)
    won = sum(row["reward"] for group in rows for row in group)
    print(f"{won:.0f} of {sum(map(len, rows))} episodes of the players are won.")
    folder = Path(training_args.output_dir, f"seed_{training_args.seed}")
    refuse_other_settings(folder, script_args, training_args, model_args)
    path, cloned = Path(folder, "results.json"), Path(folder, "behavior_cloning")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "behavior_cloning" not in results:
        clone_behavior(rows, cloned, script_args, training_args, model_args)
    rows = as_tokens(rows, cloned)
    with player_pool(script_args) as pool:

        def compare(name, policy, values=None):
            if name not in results:
                results[name] = evaluate(name, policy, unseen, pool, script_args, training_args, values)
                path.write_text(json.dumps(results), encoding="utf-8")

        compare("behavior_cloning", cloned)
        for method in script_args.methods:
            trained = Path(folder, method)
            if method not in results:
                train(method, cloned, rows, trained, script_args, training_args)
            compare(method, trained)
            if method == "oreo":
                compare(f"oreo_best_of_{script_args.best_of}", trained, trained / "value_model")
    print_table(Path(training_args.output_dir))


def refuse_other_settings(folder, *arguments):
    """Raises where the folder holds results of other settings, which would stand for those of the present ones."""
    settings = {name: str(value) for each in arguments for name, value in vars(each).items() if name[0] != "_"}
    settings = {name: settings[name] for name in sorted(settings.keys() - {*FREE})}
    path = Path(folder, "settings.json")
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8"))) != settings:
        differing = sorted(name for name in kept.keys() | settings.keys() if kept.get(name) != settings.get(name))
        raise ValueError(
            f"{folder} holds results of other settings ({', '.join(differing)}), and a run goes on with what it "
            "finds. Pass another `--output_dir`, or delete the folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def load_games(script_args):
    """Games to train on, and games in rooms that those do not know."""
    from trl_multiturn.tools import alfworld_games, make_alfworld_games

    if script_args.data == "alfworld":
        rng = random.Random(0)
        splits = zip(("train", "valid_unseen"), (script_args.num_games, script_args.num_eval_games), strict=True)
        return tuple(rng.sample(alfworld_games(split), count) for split, count in splits)
    size = {name: getattr(script_args, name) for name in ("task_types", "num_rooms", "num_things", "furniture")}
    make = functools.partial(make_alfworld_games, script_args.games_folder, instruction=INSTRUCTION, **size)
    return make(range(script_args.num_games)), make(range(script_args.num_eval_games), script_args.eval_split)


def load_episodes(games, script_args):
    """The players' episodes, game by game; played once and kept."""
    from embedded.household import episodes

    played = [[game["game"] for game in games], script_args.hesitation, script_args.max_commands]
    name = hashlib.sha256(json.dumps(played).encode()).hexdigest()[:8]
    path = Path(script_args.games_folder, f"episodes-{name}.json")
    if not path.exists():
        rows = episodes(games, script_args.hesitation, script_args.max_commands)
        path.write_text(json.dumps(rows), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def player_pool(script_args):
    """The environments that all evaluations share."""
    from trl_multiturn import EnvironmentPool
    from trl_multiturn.tools import ALFWorldEnvironment

    factory = functools.partial(ALFWorldEnvironment, max_steps=script_args.max_commands)
    return EnvironmentPool(factory, max_environments=script_args.num_eval_games)


def clone_behavior(rows, folder, script_args, training_args, model_args):
    """Imitates all episodes, won and lost; writes the policy and its tokenizer into `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rate = training_args.learning_rate
    if model_args.model_name_or_path is None:
        model, tokenizer = build_reader(rows, folder, script_args, training_args)
        rate = script_args.cloning_rate
    else:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype="float32")
    tokenizer.save_pretrained(folder)
    flat = [row for group in as_tokens(rows, folder) for row in group]
    imitate(model, tokenizer, flat, folder, shared(script_args, training_args) | {"learning_rate": rate})


def as_tokens(rows, folder):
    """The rows as the tokens of the tokenizer in `folder`."""
    from transformers import AutoTokenizer

    from trl_multiturn.data import tokenize_trajectory

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(row):
        return {**tokenize_trajectory(tokenizer, row["prompt"], row["completion"]), "reward": row["reward"]}

    return [[tokens(row) for row in group] for group in rows]


def build_reader(rows, folder, script_args, training_args):
    """A small policy that reads the games before it imitates the players, from which it learns to copy names.

    It reads the longest episode of each game several times, without the commands that change nothing, each time with
    other names in the place of those of things and furniture. `mug 1` is one token, which begins like that of `mug`.
    """
    from datasets import Dataset
    from embedded.household import PIECES, begin_alike, names_in, renamed, without_hesitation
    from embedded.tiny_policy import build_policy, build_tokenizer
    from trl import SFTConfig, SFTTrainer

    texts = {message["content"] for group in rows for row in group for message in row["prompt"] + row["completion"]}
    names = names_in(texts)
    tokenizer = build_tokenizer([*sorted(texts), *names], PIECES)
    model, rng = build_policy(tokenizer, seed=training_args.seed), random.Random(training_args.seed)
    begin_alike(model, tokenizer, names, training_args.seed)
    short = [max(map(without_hesitation, group), key=lambda row: len(row["completion"])) for group in rows]
    read = []
    for _ in range(script_args.readings):
        for row in renamed([row for row in short if row["completion"]], rng):
            tokens = tokenizer.apply_chat_template(
                row["prompt"] + row["completion"], return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = tokens["input_ids"], tokens["assistant_masks"]
            labels = [token if bit else -100 for token, bit in zip(ids, mask, strict=True)]
            read.append({"input_ids": ids, "labels": labels})
    settings = shared(script_args, training_args)
    settings |= {"learning_rate": script_args.reading_rate, "num_train_epochs": 1}
    config = SFTConfig(
        output_dir=str(folder),
        lr_scheduler_type="linear",
        warmup_steps=20,
        adam_beta2=0.95,
        train_sampling_strategy="group_by_length",
        **settings,
    )
    SFTTrainer(model, config, train_dataset=Dataset.from_list(read), processing_class=tokenizer).train()
    return model, tokenizer


def shared(script_args, training_args):
    """The settings of the methods other than OREO."""
    settings = {name: getattr(training_args, name) for name in SHARED}
    return settings | {"num_train_epochs": script_args.other_epochs or training_args.num_train_epochs}


def imitate(model, tokenizer, rows, folder, settings):
    """Imitates rows, the commands alone; writes the policy into `folder`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from trl_multiturn.data.supervised import supervised_rows

    config = SFTConfig(
        output_dir=str(folder),
        lr_scheduler_type="cosine",
        warmup_steps=10,
        train_sampling_strategy="group_by_length",
        **settings,
    )
    dataset = supervised_rows(Dataset.from_list(rows), tokenizer)
    SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(method, cloned, rows, folder, script_args, training_args):
    """Trains the policy that imitates by one method; writes the result into `folder`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_multiturn import (
        MultiTurnDPOConfig,
        MultiTurnDPOTrainer,
        MultiTurnKTOConfig,
        MultiTurnKTOTrainer,
        OREOTrainer,
    )

    tokenizer, rng = AutoTokenizer.from_pretrained(cloned), random.Random(training_args.seed)
    flat = [row for group in rows for row in group]
    if method == "rejection_sampling":
        model, won = AutoModelForCausalLM.from_pretrained(cloned), [row for row in flat if row["reward"]]
        imitate(model, tokenizer, won, folder, shared(script_args, training_args))
        return
    settings = shared(script_args, training_args) | {"output_dir": str(folder)}
    if method == "oreo":
        batches = training_args.gradient_accumulation_steps * script_args.oreo_batches
        config = dataclasses.replace(training_args, output_dir=str(folder), gradient_accumulation_steps=batches)
        kind, dataset = OREOTrainer, flat
    elif method == "dpo":
        config, kind, dataset = MultiTurnDPOConfig(**settings), MultiTurnDPOTrainer, pairs(rows, rng)
    else:
        config, kind = MultiTurnKTOConfig(**settings), MultiTurnKTOTrainer
        dataset = [{"label": bool(row["reward"]), **row} for row in rng.sample(flat, len(flat))]
        for row in dataset:
            del row["reward"]
    trainer = kind(str(cloned), args=config, train_dataset=Dataset.from_list(dataset), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder))


def pairs(rows, rng):
    """Of each game every lost episode beside a won one."""
    found = []
    for group in rows:
        won, lost = ([row for row in group if row["reward"] == reward] for reward in (1.0, 0.0))
        for loser in lost if won else ():
            pair = {"prompt_ids": loser["prompt_ids"]}
            for side, row in (("chosen", rng.choice(won)), ("rejected", loser)):
                pair |= {f"{side}_ids": row["completion_ids"], f"{side}_action_mask": row["action_mask"]}
            found.append(pair)
    return found


def evaluate(name, folder, games, pool, script_args, training_args, values=None):
    """The share of games that a policy wins, and its standard error; by value where a value model is named."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_multiturn import (
        RolloutConfig,
        TransformersEngine,
        ValueModel,
        Verdict,
        evaluate_policy,
        value_guided_search,
    )

    config = RolloutConfig(
        dialect="action",
        max_tool_calling_iterations=script_args.max_commands,
        max_turn_tokens=script_args.max_turn_tokens,
        max_trajectory_tokens=training_args.max_length,
        tool_timeout_seconds=300.0,
        seed=training_args.seed,
    )
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    search = None
    if values is not None:
        score = ValueModel.from_pretrained(values).score
        search = functools.partial(value_guided_search, score=score, beam=1, candidates=script_args.best_of)
    result = evaluate_policy(games, engine, config=config, search=search, environment_factory=pool)
    result.save(Path(training_args.output_dir, f"seed_{training_args.seed}", f"{name}.jsonl"))
    print(f"unseen rooms, {name}: {result.greedy} of {result.greedy.num_prompts} done.", flush=True)
    done = [float(trajectory.verdict is Verdict.CORRECT) for trajectory in result.trajectories]
    commands = [trajectory.num_turns for trajectory in result.trajectories]
    return {"done": done, "commands": commands}


def print_table(folder):
    """What all seeds so far have done, and how far OREO is ahead in the same games; errors are over games."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed_*/results.json"))]
    methods = [name for name in found[-1] if all(name in results for results in found)]
    done = {name: np.mean([results[name]["done"] for results in found], axis=0) for name in methods}
    print(f"{len(found)} seeds, {len(done[methods[0]])} games in unseen rooms, % done and standard error over games")
    print("| method | done | of each seed | OREO is ahead by |")
    print("| --- | --- | --- | --- |")
    for name in methods:
        seeds = ", ".join(f"{100 * np.mean(results[name]['done']):.1f}" for results in found)
        ahead = percent(done["oreo"] - done[name]) if "oreo" in done else ""
        print(f"| {name} | {percent(done[name])} | {seeds} | {ahead} |")


def percent(shares):
    """Mean and standard error."""
    return f"{100 * shares.mean():.1f} ± {100 * shares.std(ddof=1) / len(shares) ** 0.5:.1f}"


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import ModelConfig, TrlParser

    from trl_multiturn import OREOConfig

    dataclass_types = (ALFWorldScriptArguments, OREOConfig, ModelConfig)
    if subparsers is not None:
        return subparsers.add_parser("alfworld-oreo", help="Run OREO on ALFWorld", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    parser = make_parser()
    if not any(argument.startswith(("--model_name_or_path", "--config")) for argument in sys.argv[1:]):
        parser.set_defaults(**EMBEDDED)
    script_args, training_args, model_args = parser.parse_args_and_config()
    main(script_args, training_args, model_args)
