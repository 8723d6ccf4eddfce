"""An engine with weights and kernels of its own: vLLM in this process, one request stream per trajectory."""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal

from packaging.version import InvalidVersion, Version
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...images.vision import vision_of
from ...messages.images import open_image
from ..beside import SeeingPolicyBeside
from ..engine import Engine, FinishReason, Generation, SamplingParams


# Earlier ones look for the names that layers bear without LoRA, and leave the engine with half of its weights.
RELOADS_UNDER_LORA = (0, 28)


class VLLMEngine:
    """Samples with vLLM's asynchronous engine.

    Every call of `generate` is a request of its own, which vLLM batches with whatever runs; its prefix cache serves
    the turns of a trajectory, so `session` needs no bookkeeping here. vLLM runs on an event loop of its own in a
    background thread, so one engine serves any number of event loops, one after another or at once.

    The weights are vLLM's copy. [`refresh`] loads a checkpoint folder in place, or swaps the LoRA adapter where the
    folder holds one; the iterative loop calls it with the policy that is to sample. Log-probabilities are those of the
    distribution drawn from, as vLLM's kernels compute them: they agree with the training model's to rounding error.

    Args:
        model (`str`):
            Folder or name of the model to start with.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; loaded from `model` by default. Stop strings need it to lie in `model` too, or the engine
            argument `tokenizer` to say where it lies, as vLLM decodes in a process of its own.
        **engine_args:
            Passed to `vllm.AsyncEngineArgs`: `gpu_memory_utilization`, `max_model_len`, `tensor_parallel_size`,
            `enable_sleep_mode`, …; for LoRA policies `enable_lora=True` and `max_lora_rank`.

    Raises:
        ImportError: if vLLM is not installed.
    """

    weights: Literal["shared", "own"] = "own"

    def __init__(
        self, model: str, processing_class: PreTrainedTokenizerBase | None = None, **engine_args: Any
    ) -> None:
        try:
            import vllm
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ImportError(
                "`VLLMEngine` needs vLLM, which is not installed. Install `trl-multiturn[vllm]`, or use "
                "`TransformersEngine`, which needs nothing more."
            ) from error
        if engine_args.get("logprobs_mode", "processed_logprobs") != "processed_logprobs":
            raise ValueError(
                f"`logprobs_mode={engine_args['logprobs_mode']!r}` would report log-probabilities of another "
                "distribution than the one drawn from. Leave it out."
            )
        self._vllm = vllm
        self.processing_class = processing_class or AutoTokenizer.from_pretrained(model)
        self._settings = {
            "model": model,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            # Sampling is what the caller says, never what the checkpoint recommends.
            "generation_config": "vllm",
        } | engine_args
        if self._settings.get("enable_lora"):
            self._settings.setdefault("max_loras", 2)  # the policy and the one before it, in one batch
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._asleep = False
        self._in_flight = 0  # callers that wait; guarded by the lock
        self._running: set[asyncio.Task] = set()  # requests, cancelled ones included; of vLLM's event loop
        self._adapter: Any = None
        self._others: list[Any] = []  # adapters of policies beside it
        self._prompt_tokens, self._cached_tokens = 0, 0  # of finished requests
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="VLLMEngine", daemon=True)
        thread.start()

        async def start() -> AsyncLLM:
            return AsyncLLM.from_engine_args(vllm.AsyncEngineArgs(**self._settings))

        try:
            # In a box that shutting down empties: collected as late as the interpreter's end, vLLM's engine complains.
            self._box = [self._wait(start())]
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        self._finalizer = weakref.finalize(self, _shut_down, self._box, self._loop, thread)

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingParams, *, session: str | None = None
    ) -> Generation:
        """Samples one turn after `prompt_ids`; see [`Engine.generate`]. A turn is cut at `max_model_len`.

        Raises:
            ValueError: if `prompt_ids` leaves no room in `max_model_len`, or the temperature is above 2, vLLM's limit.
        """
        self._check_request(prompt_ids, sampling)
        return await self._submit(prompt_ids, sampling, self._adapter)

    async def generate_with_images(
        self, prompt_ids: list[int], images: Sequence[Any], sampling: SamplingParams
    ) -> Generation:
        """Samples one turn after ids that hold the tokens of `images`; see [`ReadsImages`].

        Raises:
            ValueError: as in [`generate`], if `processing_class` is no processor of images, or if vLLM gives an image
                other tokens than that does.
        """
        return await self._after_images(prompt_ids, images, sampling, self._adapter)

    async def _after_images(
        self, prompt_ids: list[int], images: Sequence[Any], sampling: SamplingParams, adapter: Any
    ) -> Generation:
        self._check_request(prompt_ids, sampling)
        opened = list(map(open_image, images))
        collapsed = vision_of(self.processing_class).collapse(prompt_ids, opened)
        prompt = {"prompt_token_ids": collapsed, "multi_modal_data": {"image": opened}}
        return await self._submit(prompt_ids, sampling, adapter, prompt)

    def _check_request(self, prompt_ids: list[int], sampling: SamplingParams) -> None:
        self._check_open()
        if not 0 < len(prompt_ids) < self._llm.model_config.max_model_len:
            raise ValueError(
                f"`prompt_ids` has {len(prompt_ids)} tokens, but the engine reads 1 to `max_model_len - 1` = "
                f"{self._llm.model_config.max_model_len - 1}. Raise `max_model_len`, or lower the trajectory's limit."
            )
        if sampling.temperature > 2:
            raise ValueError(
                f"vLLM samples at temperatures up to 2, got {sampling.temperature}. Lower it, or use "
                "`TransformersEngine`."
            )

    async def _submit(
        self, prompt_ids: list[int], sampling: SamplingParams, adapter: Any, prompt: dict[str, Any] | None = None
    ) -> Generation:
        """Samples one turn with an adapter, or with the plain weights; after ids, or what vLLM makes the same of."""
        request = self._generate(list(prompt_ids), sampling, adapter, prompt)
        with self._lock:
            self._in_flight += 1
        try:
            # Cancelling the caller cancels the coroutine over there, which aborts the request.
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(request, self._loop))
        finally:
            with self._lock:
                self._in_flight -= 1

    def release(self, session: str) -> None:
        """Nothing to do: vLLM's prefix cache evicts by use."""

    def refresh(self, model_path: str | None = None) -> None:
        """Loads the policy's new weights and drops the prefix cache.

        Args:
            model_path (`str`):
                Folder that `save_pretrained` wrote: a whole checkpoint of the same architecture, or a LoRA adapter.

        Raises:
            RuntimeError: if requests are in flight; their turns would mix two policies.
            ValueError: if there is no folder to load from, or it holds an adapter and the engine was started without
                LoRA, or a whole checkpoint and it was started with LoRA on vLLM before 0.28.
        """
        self._check_open()
        if self._in_flight:
            raise RuntimeError(
                f"`refresh` was called while {self._in_flight} requests are being generated, so their turns would mix "
                "two policies. Await or cancel them first."
            )
        if model_path is None or not Path(model_path).is_dir():
            raise ValueError(
                f"`VLLMEngine` has weights of its own and would go on with the old ones: `model_path={model_path!r}` "
                "is no folder. Pass the folder of the policy's newest checkpoint."
            )
        if (Path(model_path) / "adapter_config.json").exists():
            self._wait(self._swap_adapter(str(model_path)))
        else:
            self._wait(self._reload_weights(str(model_path)))

    @property
    def samples_beside(self) -> bool:
        """Whether a second adapter fits: with `enable_lora=True`, unless `max_loras=1`."""
        return bool(self._settings.get("enable_lora")) and int(str(self._settings["max_loras"])) >= 2

    def beside(self, model_path: str) -> Engine:
        """An engine that samples with the LoRA adapter in `model_path` while this one samples with its own weights;
        see [`SamplesBeside`]."""
        self._check_open()
        adapter = self._wait(self._add_other(str(model_path)))

        async def generate(prompt_ids: list[int], sampling: SamplingParams, session: str | None) -> Generation:
            self._check_request(prompt_ids, sampling)
            return await self._submit(prompt_ids, sampling, adapter)

        async def after_images(prompt_ids: list[int], images: Sequence[Any], sampling: SamplingParams) -> Generation:
            return await self._after_images(prompt_ids, images, sampling, adapter)

        return SeeingPolicyBeside(self, generate, after_images)

    def sleep(self, level: int = 1) -> None:
        """Frees the device's memory while the trainer works (`enable_sleep_mode=True`): level 1 keeps the weights in
        host memory, level 2 forgets them, so that [`refresh`] has to follow [`wake_up`]."""
        self._check_open()
        if not self._asleep:
            self._wait(self._llm.sleep(level=level))
            self._asleep = True

    def wake_up(self) -> None:
        """Takes the device's memory back after [`sleep`]."""
        self._check_open()
        if self._asleep:
            self._wait(self._llm.wake_up())
            self._asleep = False

    @property
    def sleeps_while_training(self) -> bool:
        """Whether the online loop lets it [`sleep`] while the policy is trained: with `enable_sleep_mode=True`."""
        return bool(self._settings.get("enable_sleep_mode"))

    def close(self) -> None:
        """Ends vLLM's processes; also done when the engine is collected and at exit."""
        self._finalizer()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the model can sample."""
        return self._llm.model_config.get_vocab_size()

    def describe(self) -> dict[str, Any]:
        """Name, version and settings; not the weights, so that a run taken up again finds the engine it had."""
        self._check_open()
        config = self._llm.model_config
        return {
            "engine": "vllm",
            "vllm_version": self._vllm.__version__,
            "model": self._settings["model"],
            "architecture": config.architecture,
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
        }

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start: prompt tokens of all turns, and those of them that the prefix cache held."""
        return {"prompt_tokens": self._prompt_tokens, "cached_tokens": self._cached_tokens}

    @property
    def _llm(self) -> Any:
        return self._box[0]

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("The engine was closed, so it cannot be used any more. Create a new one.")

    def _wait(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # The rest runs on vLLM's event loop.

    async def _generate(
        self, prompt_ids: list[int], sampling: SamplingParams, adapter: Any, prompt: dict[str, Any] | None
    ) -> Generation:
        task = asyncio.current_task()
        assert task is not None  # it runs as one
        self._running.add(task)
        try:
            stream = self._llm.generate(
                prompt or {"prompt_token_ids": prompt_ids},
                self._sampling_params(sampling),
                request_id=str(next(self._ids)),
                lora_request=adapter,
            )
            async for result in stream:
                output = result.outputs[0]
        finally:
            self._running.discard(task)
        if prompt is not None and list(result.prompt_token_ids) != prompt_ids:
            raise ValueError(
                f"vLLM reads {len(result.prompt_token_ids)} tokens of a prompt with images that has {len(prompt_ids)} "
                "under the processor, so the trainer would score another prompt. Sample with a `TransformersEngine`."
            )
        self._prompt_tokens += len(prompt_ids)
        self._cached_tokens += result.num_cached_tokens or 0
        token_ids = list(output.token_ids)
        logps = [step[token].logprob for token, step in zip(token_ids, output.logprobs, strict=True)]
        return Generation(token_ids, logps, _finish_reason(output))

    def _sampling_params(self, sampling: SamplingParams) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            # -1 and beyond 63 bits mean something else to vLLM.
            seed=None if sampling.seed is None else sampling.seed % 2**63,
            stop_token_ids=list(sampling.stop_token_ids),
            stop=list(sampling.stop_strings) or None,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            detokenize=bool(sampling.stop_strings),
            # Turns end where the caller says, not at the checkpoint's end-of-sequence token.
            ignore_eos=True,
            logprobs=0,  # of the sampled token alone
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    async def _aborted(self) -> None:
        """Waits for requests whose callers were cancelled to be gone."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _reload_weights(self, path: str) -> None:
        version = self._vllm.__version__
        if self._settings.get("enable_lora") and _release(version) < RELOADS_UNDER_LORA:
            raise ValueError(
                f"{path} holds a whole checkpoint, which vLLM {version} cannot load in place in an engine started "
                f"with LoRA. Install vLLM 0.28 or later, start the engine without `enable_lora`, or "
                "save an adapter."
            )
        await self._aborted()
        await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        await self._drop_adapter()
        await self._llm.reset_prefix_cache()

    async def _swap_adapter(self, path: str) -> None:
        if not self._settings.get("enable_lora"):
            raise ValueError(
                f"{path} holds a LoRA adapter, but the engine was started without LoRA, so it cannot be loaded. Start "
                "it with `enable_lora=True, max_lora_rank=<rank>`, or save the merged model."
            )
        await self._aborted()
        await self._drop_adapter()
        self._adapter = await self._add_adapter(path)
        await self._llm.reset_prefix_cache()

    async def _add_adapter(self, path: str) -> Any:
        from vllm.lora.request import LoRARequest

        # A new id and name each time: neither adapters nor prefixes of an earlier policy are taken for this one's.
        number = next(self._ids)
        adapter = LoRARequest(f"policy-{number}", number, path)
        await self._llm.add_lora(adapter)
        return adapter

    async def _add_other(self, path: str) -> Any:
        adapter = await self._add_adapter(path)
        self._others.append(adapter)
        return adapter

    async def _drop_adapter(self) -> None:
        adapters = [*filter(None, [self._adapter]), *self._others]
        self._adapter, self._others = None, []
        for adapter in adapters:
            await self._llm.remove_lora(adapter.lora_int_id)


def _release(version: str) -> tuple[int, ...]:
    """Of a build from source, whose version may say nothing, the newest is assumed."""
    try:
        return Version(version).release
    except InvalidVersion:
        return RELOADS_UNDER_LORA


def _finish_reason(output: Any) -> FinishReason:
    if output.finish_reason == "stop" and isinstance(output.stop_reason, str):
        return "stop_string"
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended the request with {output.finish_reason!r}, so the turn is not complete.")
    return output.finish_reason


def _shut_down(box: list, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    async def stop() -> None:
        box.pop().shutdown()
        loop.call_soon(loop.stop)

    asyncio.run_coroutine_threadsafe(stop(), loop)
    thread.join(30)
