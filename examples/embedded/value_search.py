"""What `iterative_oreo.py` does after the loop: fits the values, and lets them choose among samples and steps."""

import copy
import functools
from collections import Counter


def fit_values(epochs, run_folder, training_args):
    """Lets the saved value model alone learn on: its states, on the rows of all iterations, regress to their outcomes.

    That is the paper's eq. 8 with the policy as its own reference, whose log-ratios are 0; a mean over states.
    """
    from datasets import concatenate_datasets, load_from_disk
    from transformers import AutoTokenizer, Trainer

    from trl_multiturn import ValueModel
    from trl_multiturn.models.reward_model import DataCollatorForRewardModel

    parts = [load_from_disk(found) for found in sorted(run_folder.glob("iteration_*/rows"))]
    if not any(map(len, parts)):
        return
    rows = concatenate_datasets([part for part in parts if len(part)])
    folder = training_args.output_dir
    value_model = ValueModel.from_pretrained(f"{folder}/value_model", is_trainable=True)
    args = copy.copy(training_args)
    args.output_dir, args.save_strategy, args.push_to_hub = f"{folder}/values", "no", False
    args.num_train_epochs, args.learning_rate, args.lr_scheduler_type = epochs, args.value_learning_rate, "cosine"
    args.train_sampling_strategy, args.remove_unused_columns = "group_by_length", False
    if args.gradient_checkpointing:
        value_model.backbone.activation_checkpointing_enable(args.gradient_checkpointing_kwargs)
        args.gradient_checkpointing = False  # a value model has no switch of its own
    trainer = Trainer(
        value_model,
        args,
        DataCollatorForRewardModel(AutoTokenizer.from_pretrained(folder).pad_token_id),
        train_dataset=rows.map(to_states, remove_columns=rows.column_names),
        compute_loss_func=value_loss,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(f"{folder}/value_model")
    trainer.accelerator.wait_for_everyone()


def to_states(row):
    """Token ids, and the row's reward as the label of each state in which the policy chose a token."""
    from trl_multiturn.models.reward_model import IGNORED

    ids = row["prompt_ids"] + row["completion_ids"]
    chosen = [0] * len(row["prompt_ids"]) + row["action_mask"]  # the state after a token chooses the next one
    labels = [row["reward"] if action else float(IGNORED) for action in [*chosen[1:], 0]]
    return {"input_ids": ids, "labels": labels, "length": len(ids)}


def value_loss(values, labels, num_items_in_batch=None):
    from trl_multiturn.models.reward_model import IGNORED

    valued = labels != IGNORED
    total = (values - labels)[valued].square().sum()
    return total / (valued.sum() if num_items_in_batch is None else num_items_in_batch)


def compare_decoding(beam, step, eval_prompts, engine, value_model, tools, reward_funcs, rollout_config):
    """Prints pass@1 on the held-out prompts: greedy, one sample, and what values and votes choose."""
    from trl_multiturn import evaluate_policy
    from trl_multiturn.evaluation import summarize
    from trl_multiturn.rollout.search import value_guided_search

    n = beam**2
    evaluate = functools.partial(evaluate_policy, eval_prompts, engine, tools, reward_funcs, config=rollout_config)
    plain = evaluate(n=n, temperature=rollout_config.temperature)
    samples = plain.trajectories[len(eval_prompts) :]
    values = value_model.score([last_state(t) for t in samples], 32)
    groups = [[] for _ in eval_prompts]
    for trajectory, value in zip(samples, values, strict=True):
        groups[trajectory.info["prompt_index"]].append((value, trajectory))
    best = [max(group, key=lambda pair: pair[0])[1] for group in groups]
    elected = [elect(group) for group in groups]
    search = functools.partial(value_guided_search, score=value_model.score, beam=beam, step=step)
    for name, estimate in {
        "greedy": plain.greedy,
        "one sample": plain.pass_at_k[1],
        f"majority of {n}": plain.majority,
        f"majority of {n}, weighted by value": summarize(elected).greedy,
        f"best of {n} by value": summarize(best).greedy,
        f"search by value, beam {beam}, each {step} a step": evaluate(search=search).greedy,
        f"any of {n}, the most that choosing among them can reach": plain.pass_at_k[n],
    }.items():
        print(f"{name:<56} {estimate}")


def elect(group):
    """A trajectory with the answer whose trajectories have the largest sum of values; any where none has answered."""
    from trl_multiturn.verify import canonical_answer, final_answer

    answered = [(value, t, canonical_answer(a)) for value, t in group if (a := final_answer(t.completion))]
    votes = Counter()
    for value, _, answer in answered:
        votes[answer] += max(value, 0.0)
    return next((t for _, t, answer in answered if votes[answer] == max(votes.values())), group[0][1])


def last_state(trajectory):
    """The state in which the last token, which ends the trajectory, was chosen: all has been said."""
    last = max((t for t, action in enumerate(trajectory.action_mask) if action), default=0)
    return trajectory.prompt_ids + trajectory.completion_ids[:last]
