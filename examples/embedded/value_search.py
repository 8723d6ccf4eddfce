"""What `iterative_oreo.py` does after the loop: fits the values, and lets them guide a search."""

import functools


# What the value model's training takes from the loop's
SHARED = (
    "per_device_train_batch_size gradient_accumulation_steps max_length train_on_turns packed max_tokens_per_batch "
    "value_objective use_cpu bf16 fp16 gradient_checkpointing gradient_checkpointing_kwargs deepspeed seed report_to "
    "logging_steps disable_tqdm"
).split()


def fit_values(epochs, run_folder, training_args):
    """Lets the saved value model alone learn on, from all judged trajectories of the run."""
    from accelerate import PartialState
    from transformers import AutoTokenizer

    from trl_multiturn import ValueModel, ValueModelConfig, train_value_model
    from trl_multiturn.journal import run_trajectories

    trajectories = list(run_trajectories(run_folder))
    if not any(trajectory.reward is not None for trajectory in trajectories):
        return
    folder = training_args.output_dir
    args = ValueModelConfig(
        f"{folder}/values",
        num_train_epochs=epochs,
        learning_rate=training_args.value_learning_rate,
        lr_scheduler_type="cosine",
        save_strategy="no",
        **{name: getattr(training_args, name) for name in SHARED},
    )
    value_model = train_value_model(
        ValueModel.from_pretrained(f"{folder}/value_model", is_trainable=True),
        trajectories,
        args,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    if PartialState().is_main_process:
        value_model.save_pretrained(f"{folder}/value_model")
    PartialState().wait_for_everyone()


def compare_decoding(beam, step, eval_prompts, engine, value_model, tools, reward_funcs, rollout_config):
    """Prints what a search gives on the held-out prompts, beside as many sampled tokens without one."""
    from trl_multiturn import evaluate_policy, value_guided_search

    score = functools.partial(value_model.score, batch_size=32)
    search = functools.partial(
        value_guided_search, score=score, beam=beam, step=step, finished="pool", vote="weighted"
    )
    result = evaluate_policy(
        eval_prompts,
        engine,
        tools,
        reward_funcs,
        n=4,
        temperature=rollout_config.temperature,
        config=rollout_config,
        search=search,
    )
    print(f"Search by value, beam {beam}, each {step} a step, at the same number of sampled tokens:")
    print(result.comparison)
