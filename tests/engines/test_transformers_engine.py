"""The engine against the definition: a full forward pass without any cache, one sequence at a time."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn.engines.engine import Engine, SamplingParams
from trl_multiturn.engines.transformers.engine import EngineError, TransformersEngine
from trl_multiturn.engines.transformers.slot_attention import SLOT_ATTENTION


TOKENIZER = byte_tokenizer()
VOCAB = len(TOKENIZER)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine: TransformersEngine, *requests: tuple, session: str | None = None):
    """Awaits `(prompt_ids, sampling)` requests together."""

    async def gather():
        return await asyncio.gather(*(engine.generate(ids, params, session=session) for ids, params in requests))

    return asyncio.run(gather())


def run_held(engine: TransformersEngine, *requests: tuple):
    """[`run`], but the model computes nothing before it has been asked for all of them."""
    asked = threading.Event()
    hold = engine.model.register_forward_pre_hook(lambda *_: None if asked.wait(30) else pytest.fail("not asked"))

    async def gather():
        tasks = [asyncio.create_task(engine.generate(ids, params)) for ids, params in requests]
        await asyncio.sleep(0)
        assert len(engine._in_flight) == len(requests)
        asked.set()
        return await asyncio.gather(*tasks)

    try:
        return asyncio.run(gather())
    finally:
        hold.remove()


@torch.no_grad()
def score(model, prompt_ids, token_ids, temperature=1.0):
    """Log-probabilities and most probable tokens after each prefix, from one pass over the whole sequence."""
    logits = model(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1].float()
    logps = (logits / temperature).log_softmax(-1)
    return logps.gather(1, torch.tensor(token_ids)[:, None])[:, 0], logits.argmax(-1).tolist()


ARCHITECTURES = {
    "qwen2": ("Qwen2", {}),
    "qwen2-grouped-queries": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen2-mixed-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "gemma2-eager": ("Gemma2", {"head_dim": 8, "sliding_window": 6, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 6}),
    "gpt2-learned-positions": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def build(name: str):
    family, overrides = ARCHITECTURES[name]
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    config = getattr(transformers, f"{family}Config")(**{**settings, **overrides})
    torch.manual_seed(0)
    model_name = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(family, f"{family}ForCausalLM")
    implementation = overrides.get("attn_implementation", "sdpa")
    return getattr(transformers, model_name)._from_config(config, attn_implementation=implementation)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ragged_batches_and_second_turns_equal_the_full_forward_pass(name):
    model = build(name).eval()
    engine = TransformersEngine(model, TOKENIZER, max_batch_size=3)
    params = [SamplingParams(n, temperature=t, seed=n) for n, t in [(5, 0), (12, 1.0), (8, 0.7), (3, 0), (9, 1.3)]]
    prompts = [prompt(n, seed=n) for n in (1, 20, 7, 13, 2)]

    async def trajectory(i):
        first = await engine.generate(prompts[i], params[i], session=f"t{i}")
        middle = prompts[i] + first.token_ids + prompt(4, seed=99)
        return first, middle, await engine.generate(middle, params[i], session=f"t{i}")

    async def all_trajectories():
        return await asyncio.gather(*map(trajectory, range(5)))

    for i, (first, middle, second) in enumerate(asyncio.run(all_trajectories())):
        for prompt_ids, generation in ((prompts[i], first), (middle, second)):
            assert len(generation.token_ids) == params[i].max_new_tokens
            logps, modes = score(model, prompt_ids, generation.token_ids, params[i].temperature or 1.0)
            torch.testing.assert_close(torch.tensor(generation.logps), logps, atol=2e-5, rtol=1e-4)
            if params[i].temperature == 0:
                assert generation.token_ids == modes


@pytest.fixture(scope="module")
def model():
    return tiny_model(TOKENIZER).eval()


@pytest.fixture
def engine(model):
    return TransformersEngine(model, TOKENIZER, max_batch_size=8)


def test_it_is_an_engine(engine):
    assert isinstance(engine, Engine)
    description = engine.describe()
    assert (description["architecture"], description["dtype"]) == ("Qwen2ForCausalLM", "float32")


def test_greedy_is_what_generate_says(model, engine):
    ids = prompt(9)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=15, do_sample=False, eos_token_id=None)
    assert run(engine, (ids, SamplingParams(15, temperature=0)))[0].token_ids == expected[0, 9:].tolist()


def test_a_seeded_request_does_not_depend_on_its_company(engine):
    request = (prompt(11), SamplingParams(20, temperature=1.2, top_p=0.9, seed=5))
    (alone,) = run(engine, request)
    others = [
        (prompt(n, seed=n), SamplingParams(1 + 2 * n, temperature=0.5 * (n % 4), top_k=n % 3, seed=n))
        for n in range(1, 21)
    ]
    crowd = run(engine, *others[:7], request, *others[7:])
    # To the last bit: rows are left-aligned and padded to the kernels' tile.
    assert crowd[7] == alone
    assert run(engine, request)[0] == alone
    (other_seed,) = run(engine, (request[0], SamplingParams(20, temperature=1.2, top_p=0.9, seed=6)))
    assert other_seed.token_ids != alone.token_ids


def test_on_several_threads_it_depends_on_its_company_by_rounding_alone(engine):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        requests = [(prompt(n, seed=n), SamplingParams(8, temperature=0, seed=n)) for n in range(1, 9)]
        crowd = run(engine, *requests)
        alone = [run(engine, request)[0] for request in requests]
    finally:
        torch.set_num_threads(threads)
    assert [generation.token_ids for generation in crowd] == [generation.token_ids for generation in alone]
    for one, other in zip(crowd, alone, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-5)


def test_the_draws_follow_the_policy(model, engine):
    ids = prompt(6)
    generations = run(engine, *((ids, SamplingParams(1, temperature=0.1, seed=seed)) for seed in range(400)))
    with torch.no_grad():
        expected = (model(torch.tensor([ids])).logits[0, -1] / 0.1).softmax(-1)
    counts = torch.bincount(torch.tensor([g.token_ids[0] for g in generations]), minlength=VOCAB)
    top = expected.argmax()
    assert 0.1 < expected[top] < 0.9
    standard_error = (expected[top] * (1 - expected[top]) / 400).sqrt()
    assert abs(counts[top] / 400 - expected[top]) < 4 * standard_error


def test_requests_without_a_seed_differ_unless_the_engine_has_one(model):
    request = (prompt(5), SamplingParams(12, temperature=2.0))
    engine = TransformersEngine(model, TOKENIZER, seed=3)
    first, second = run(engine, request)[0], run(engine, request)[0]
    assert first.token_ids != second.token_ids
    assert run(TransformersEngine(model, TOKENIZER, seed=3), request)[0] == first


def test_a_turn_ends_at_its_stop_token(engine):
    ids = prompt(8)
    (free,) = run(engine, (ids, SamplingParams(20, seed=1)))
    stop = free.token_ids[7]
    end = free.token_ids.index(stop) + 1
    (stopped,) = run(engine, (ids, SamplingParams(20, seed=1, stop_token_ids=(VOCAB - 1, stop))))
    assert (stopped.token_ids, stopped.logps) == (free.token_ids[:end], free.logps[:end])
    assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")


def test_a_turn_ends_with_the_token_that_completes_a_stop_string():
    # Tokens of several characters: the string ends inside one, which is kept whole.
    tokenizer = byte_tokenizer(merges=[("a", "b"), ("ab", "c")])
    ids = tokenizer.encode("xabcabz")
    assert [tokenizer.decode([i]) for i in ids] == ["x", "abc", "ab", "z"]

    class Parrot(nn.Module):
        """Answers position by position with `ids`."""

        def forward(self, position_ids):
            return nn.functional.one_hot(torch.tensor(ids + [0] * 50)[position_ids], len(tokenizer)) * 100.0

    model = tiny_model(tokenizer)
    parrot, head = Parrot(), model.lm_head

    class Head(nn.Module):
        def forward(self, hidden):
            return parrot(self.position_ids[:, -1:])

    model.lm_head = Head()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: setattr(model.lm_head, "position_ids", kwargs["position_ids"]), with_kwargs=True
    )
    engine = TransformersEngine(model, tokenizer)
    (generation,) = run(engine, ([3], SamplingParams(4, temperature=0, stop_strings=("nope", "xab"))))
    assert tokenizer.decode(generation.token_ids) == "xabc"
    assert generation.finish_reason == "stop_string"
    (across,) = run(engine, ([3], SamplingParams(4, temperature=0, stop_strings=("cab",))))
    assert tokenizer.decode(across.token_ids) == "xabcab"
    model.lm_head = head


def test_a_session_reads_only_what_is_new(engine):
    ids = prompt(30)
    (first,) = run(engine, (ids, SamplingParams(6, seed=1)), session="a")
    assert engine.stats["prefilled_tokens"] == 29  # the last token is fed as a step
    longer = ids + first.token_ids + prompt(5, seed=8)
    (kept,) = run(engine, (longer, SamplingParams(6, seed=2)), session="a")
    # The last sampled token was never fed; the last prompt token is fed as a step: 1 + 5 - 1.
    assert engine.stats["prefilled_tokens"] == 29 + 5
    (fresh,) = run(engine, (longer, SamplingParams(6, seed=2)))
    assert kept.token_ids == fresh.token_ids
    torch.testing.assert_close(torch.tensor(kept.logps), torch.tensor(fresh.logps), atol=1e-5, rtol=1e-5)


def test_a_session_may_turn_back(model, engine):
    """A caller that rewrites the last turn keeps the common prefix, and nothing of the rest."""
    ids = prompt(20)
    run(engine, (ids, SamplingParams(6, seed=1)), session="a")
    edited = ids[:12] + prompt(6, seed=4)
    before = engine.stats["prefilled_tokens"]
    (generation,) = run(engine, (edited, SamplingParams(5, temperature=0)), session="a")
    assert engine.stats["prefilled_tokens"] - before == 5
    assert generation.token_ids == score(model, edited, generation.token_ids)[1]


def test_a_fork_goes_on_from_what_was_read_and_costs_no_memory(model, engine):
    ids = prompt(30)
    (first,) = run(engine, (ids, SamplingParams(6, seed=1)), session="a")
    held, before = engine.stats["retained_bytes"], engine.stats["prefilled_tokens"]
    for name in ("b", "c"):
        engine.fork("a", name)
    engine.fork("nothing is held under this name", "d")
    assert (engine.stats["retained_caches"], engine.stats["retained_bytes"]) == (3, held)
    for read, name in enumerate(("b", "a", "c"), start=1):
        longer = ids + first.token_ids + prompt(5, seed=read)
        (generation,) = run(engine, (longer, SamplingParams(4, temperature=0)), session=name)
        assert engine.stats["prefilled_tokens"] - before == 5 * read  # the last sampled token and all but the last new
        assert generation.token_ids == score(model, longer, generation.token_ids)[1]
    for name in ("a", "b", "c"):
        engine.release(name)
    assert (engine.stats["retained_caches"], engine.stats["retained_bytes"]) == (0, 0)


def test_equal_prompts_are_read_once(model):
    engine = TransformersEngine(model, TOKENIZER)
    ids = prompt(25)
    generations = run_held(engine, *((ids, SamplingParams(4, seed=seed)) for seed in range(10)))
    # The first is taken before the others are there; these then share one reading.
    assert engine.stats["prefilled_tokens"] <= 2 * 24
    assert generations[7] == run(engine, (ids, SamplingParams(4, seed=7)))[0]


def test_equal_prompts_are_read_once_whenever_they_join(model):
    engine = TransformersEngine(model, TOKENIZER, max_batch_size=2)
    ids = prompt(25)
    # One leaves at a time, so the next joins beside one that has read the prompt.
    generations = run_held(engine, *((ids, SamplingParams(4 + seed, seed=seed)) for seed in range(6)))
    assert engine.stats["prefilled_tokens"] == 24
    assert generations[5] == run(TransformersEngine(model, TOKENIZER), (ids, SamplingParams(9, seed=5)))[0]


def test_a_prompt_that_a_session_keeps_is_not_read_again(model, engine):
    ids = prompt(30)
    alone = run(TransformersEngine(model, TOKENIZER), (ids, SamplingParams(6, seed=2)))
    (first,) = run(engine, (ids, SamplingParams(6, seed=1)), session="a")
    assert run(engine, (ids, SamplingParams(6, seed=2))) == alone
    longer = ids + first.token_ids + prompt(5, seed=8)
    run(engine, (longer, SamplingParams(4, seed=1)), session="a")
    before = engine.stats["prefilled_tokens"]
    assert run(engine, (ids, SamplingParams(6, seed=2)), session="b") == alone
    assert engine.stats["prefilled_tokens"] == before == 29 + 5


def test_what_was_read_in_parts_is_no_source_for_a_whole_prompt(model, engine):
    """Its last bits may be others."""
    ids = prompt(30)
    (first,) = run(engine, (ids, SamplingParams(6, seed=1)), session="a")
    longer = ids + first.token_ids + prompt(5, seed=8)
    run(engine, (longer, SamplingParams(4, seed=1)), session="a")
    before = engine.stats["prefilled_tokens"]
    alone = run(TransformersEngine(model, TOKENIZER), (longer, SamplingParams(6, seed=2)))
    assert run(engine, (longer, SamplingParams(6, seed=2))) == alone
    assert engine.stats["prefilled_tokens"] - before == len(longer) - 1


def test_release_and_refresh_drop_caches(engine):
    ids = prompt(10)
    for name in ("a", "b", "c"):
        run(engine, (ids, SamplingParams(2)), session=name)
    assert engine.stats["retained_caches"] == 3
    engine.release("b")
    assert engine.stats["retained_caches"] == 2
    engine.refresh()
    assert (engine.stats["retained_caches"], engine.stats["retained_bytes"]) == (0, 0)
    assert engine._batch.slots.cache.tensors() == []


def test_nothing_is_held_after_the_last_release(engine):
    for name in ("a", "b"):
        run(engine, (prompt(10), SamplingParams(2)), session=name)
    engine.release("a")
    assert engine._batch.slots.cache.tensors() != []
    engine.release("b")
    assert engine._batch.slots.cache.tensors() == []


def test_refresh_forgets_what_the_old_weights_said():
    model = tiny_model(TOKENIZER, seed=1)
    engine = TransformersEngine(model, TOKENIZER)
    ids = prompt(10)
    (first,) = run(engine, (ids, SamplingParams(4, temperature=0)), session="a")
    model.load_state_dict(tiny_model(TOKENIZER, seed=2).state_dict())
    engine.refresh()
    longer = ids + first.token_ids + [5]
    (second,) = run(engine, (longer, SamplingParams(6, temperature=0)), session="a")
    assert second.token_ids == score(model.eval(), longer, second.token_ids)[1]


def test_kept_caches_are_bounded_and_dropped_ones_read_again(model):
    # 2 layers × (keys, values) × 16 numbers × 4 bytes = 256 bytes per token; 1 MiB holds 4096 tokens.
    engine = TransformersEngine(model, TOKENIZER, cache_memory_limit_mb=1)
    prompts = {f"t{i}": prompt(999, seed=i) for i in range(6)}
    firsts = {name: run(engine, (ids, SamplingParams(2, seed=0)), session=name)[0] for name, ids in prompts.items()}
    assert engine.stats["retained_caches"] == 4
    assert engine.stats["retained_bytes"] == 4 * 1000 * 256
    assert engine.stats["evicted_caches"] == 2
    for name, read in (("t5", 3), ("t0", 1003)):
        before = engine.stats["prefilled_tokens"]
        longer = prompts[name] + firsts[name].token_ids + [1, 2, 3]
        (again,) = run(engine, (longer, SamplingParams(3, temperature=0)), session=name)
        assert engine.stats["prefilled_tokens"] - before == read
        assert again.token_ids == score(model, longer, again.token_ids)[1]


def test_long_prompts_are_read_in_chunks(model):
    whole = TransformersEngine(model, TOKENIZER)
    chunked = TransformersEngine(model, TOKENIZER, max_prefill_tokens=64)
    requests = [(prompt(n, seed=n), SamplingParams(5, seed=n)) for n in (300, 40, 3, 77)]
    for a, b in zip(run(whole, *requests), run(chunked, *requests), strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-5, rtol=1e-5)


def test_a_finished_request_leaves_its_slot_to_the_next(model):
    engine = TransformersEngine(model, TOKENIZER, max_batch_size=2)
    requests = [(prompt(4), SamplingParams(40, seed=0))] + [(prompt(4), SamplingParams(4, seed=i)) for i in range(10)]
    run_held(engine, *requests)
    # Ten short ones follow each other beside the long one; in lock-step it would be 40 + 5 · 4 steps.
    assert 40 <= engine.stats["steps"] < 50


def test_the_event_loop_runs_while_the_model_computes():
    model = tiny_model(TOKENIZER)
    loop_ran = threading.Event()
    model.register_forward_pre_hook(lambda *_: None if loop_ran.wait(30) else pytest.fail("the loop is blocked"))
    engine = TransformersEngine(model, TOKENIZER)

    async def main():
        task = asyncio.create_task(engine.generate(prompt(3), SamplingParams(2)))
        await asyncio.sleep(0.01)
        loop_ran.set()
        return await task

    assert len(asyncio.run(main()).token_ids) == 2


def test_one_engine_serves_many_event_loops_and_leaves_no_thread(engine):
    request = (prompt(6), SamplingParams(5, seed=1))
    results = [run(engine, request)[0] for _ in range(5)]
    assert results == [results[0]] * 5
    in_threads = []
    threads = [threading.Thread(target=lambda: in_threads.append(run(engine, request)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert in_threads == [results[0]] * 3
    workers = [thread for thread in threading.enumerate() if thread.name == "TransformersEngine"]
    for worker in workers:  # at most on their way out
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


def test_an_error_in_the_model_reaches_every_caller_and_the_engine_survives():
    model = tiny_model(TOKENIZER)
    engine = TransformersEngine(model, TOKENIZER, max_batch_size=2)
    request = (prompt(6), SamplingParams(5, seed=1))
    (expected,) = run(engine, request, session="a")
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("broken")))

    async def crowd():
        return await asyncio.gather(*(engine.generate(*request) for _ in range(7)), return_exceptions=True)

    errors = asyncio.run(crowd())
    assert [type(error) for error in errors] == [EngineError] * 7
    assert all(isinstance(error.__cause__, KeyError) for error in errors)
    assert model.training
    hook.remove()
    assert engine.stats["retained_caches"] == 0
    assert run(engine, request)[0] == expected


def test_diverged_weights_are_named():
    model = tiny_model(TOKENIZER)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="weights have diverged"):
        run(TransformersEngine(model, TOKENIZER), (prompt(3), SamplingParams(2)))


def test_a_cancelled_request_leaves_and_keeps_nothing(engine):
    async def main():
        task = asyncio.create_task(engine.generate(prompt(5), SamplingParams(100_000), session="gone"))
        other = asyncio.create_task(engine.generate(prompt(5), SamplingParams(3)))
        await other
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    engine.refresh()
    assert engine.stats["retained_caches"] == 0
    assert engine.stats["steps"] < 50_000
    assert len(run(engine, (prompt(5), SamplingParams(3)))[0].token_ids) == 3


def test_refresh_while_generating_is_refused(engine):
    refused = threading.Event()
    hold = engine.model.register_forward_pre_hook(lambda *_: None if refused.wait(30) else pytest.fail("waits"))

    async def main():
        task = asyncio.create_task(engine.generate(prompt(5), SamplingParams(5)))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="1 requests are being generated"):
            engine.refresh()
        refused.set()
        await task

    asyncio.run(main())
    hold.remove()


def test_training_mode_is_suspended_and_restored_module_by_module():
    model = tiny_model(TOKENIZER, attention_dropout=0.5)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[1].eval()  # frozen by hand: must not come back in training mode
    modes = [module.training for module in model.modules()]
    seen = []
    model.register_forward_hook(
        lambda module, args, out: seen.append((any(m.training for m in module.modules()), out.logits.requires_grad))
    )
    (generation,) = run(TransformersEngine(model, TOKENIZER), (prompt(5), SamplingParams(6, temperature=0)))
    assert set(seen) == {(False, False)}
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    # And a training step still works.
    model(torch.tensor([prompt(5)]), labels=torch.tensor([prompt(5)])).loss.backward()
    assert model.lm_head.weight.grad is not None
    assert generation.token_ids == score(model.eval(), prompt(5), generation.token_ids)[1]


def test_a_lora_policy_is_sampled_with_its_active_adapter():
    model = get_peft_model(tiny_model(TOKENIZER), LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5))
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False))
    engine = TransformersEngine(model, TOKENIZER)
    answers = []
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        engine.refresh()
        (generation,) = run(engine, (prompt(7), SamplingParams(10, temperature=0)))
        model.eval()
        logps, modes = score(model, prompt(7), generation.token_ids)
        model.train()
        assert generation.token_ids == modes
        torch.testing.assert_close(torch.tensor(generation.logps), logps, atol=1e-5, rtol=1e-5)
        answers.append(generation.token_ids)
    assert answers[0] != answers[1]


def test_a_ddp_policy_is_sampled_without_its_wrapper(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model(TOKENIZER)
        wrapped = nn.parallel.DistributedDataParallel(model)
        (generation,) = run(TransformersEngine(wrapped, TOKENIZER), (prompt(7), SamplingParams(8, temperature=0)))
        assert wrapped.training and model.training
        assert generation.token_ids == score(model.eval(), prompt(7), generation.token_ids)[1]
    finally:
        torch.distributed.destroy_process_group()


def test_accelerates_mixed_precision_and_compilation_are_seen_through():
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's trainer may have set it otherwise
    model = tiny_model(TOKENIZER)
    wrapped = torch.compile(Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model))
    dtypes = set()
    model.lm_head.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    (generation,) = run(TransformersEngine(wrapped, TOKENIZER), (prompt(7), SamplingParams(8, seed=0)))
    assert dtypes == {torch.bfloat16}
    logps, _ = score(model.eval(), prompt(7), generation.token_ids)
    torch.testing.assert_close(torch.tensor(generation.logps), logps, atol=0.05, rtol=0)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_sharded_weights_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(tiny_model(TOKENIZER), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(EngineError, match="is sharded over processes.*gathered_for_sampling"):
            run(TransformersEngine(model, TOKENIZER), (prompt(3), SamplingParams(1)))
    finally:
        torch.distributed.destroy_process_group()


def test_another_attention_implementation_is_replaced_while_sampling():
    model = tiny_model(TOKENIZER)
    model.set_attn_implementation("flex_attention")
    seen = set()
    model.register_forward_pre_hook(lambda module, _: seen.add(module.config._attn_implementation))
    (generation,) = run(TransformersEngine(model, TOKENIZER), (prompt(7), SamplingParams(4, temperature=0)))
    assert (seen, model.config._attn_implementation) == ({SLOT_ATTENTION}, "flex_attention")
    model.set_attn_implementation("eager")
    assert generation.token_ids == score(model.eval(), prompt(7), generation.token_ids)[1]


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2),
        transformers.Lfm2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_states_that_cannot_be_gathered_are_refused(config):
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="cannot be gathered.*VLLMEngine"):
        TransformersEngine(model, TOKENIZER)


def test_models_that_cannot_be_sampled_are_refused(model):
    with pytest.raises(ValueError, match="PREFIX_TUNING.*virtual tokens"):
        prefix = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        TransformersEngine(get_peft_model(tiny_model(TOKENIZER), prefix), TOKENIZER)
    with pytest.raises(ValueError, match="no decoder-only"):
        TransformersEngine(model.model, TOKENIZER)
    with pytest.raises(ValueError, match="max_batch_size"):
        TransformersEngine(model, TOKENIZER, max_batch_size=0)


def test_prompts_that_cannot_be_read_are_refused(engine):
    with pytest.raises(ValueError, match="is empty"):
        run(engine, ([], SamplingParams(1)))
    with pytest.raises(ValueError, match="outside"):
        run(engine, ([VOCAB + 50_000], SamplingParams(1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    model = tiny_model(TOKENIZER).to("cuda", dtype).eval()
    engine = TransformersEngine(model, TOKENIZER)
    requests = [(prompt(n, seed=n), SamplingParams(20, seed=n)) for n in range(1, 30)]
    for (ids, _), generation in zip(requests, run(engine, *requests), strict=True):
        logits = model(torch.tensor([ids + generation.token_ids], device="cuda")).logits[0, len(ids) - 1 : -1]
        logps = logits.float().log_softmax(-1).cpu().gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(torch.tensor(generation.logps), logps.detach(), atol=tolerance, rtol=0)


def test_a_model_that_does_not_name_its_head_is_sampled_too(monkeypatch):
    model = tiny_model(TOKENIZER)
    expected = run(TransformersEngine(model, TOKENIZER), (prompt(9), SamplingParams(5, seed=3)))
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)  # as in code that came with a model
    assert run(TransformersEngine(model, TOKENIZER), (prompt(9), SamplingParams(5, seed=3))) == expected
