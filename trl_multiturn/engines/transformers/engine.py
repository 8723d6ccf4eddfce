"""The default engine: the training model itself, sampled in place with continuous batching."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_peft_available

from ...errors import EngineError as EngineError
from ...images.vision import vision_of
from ..engine import Generation, SamplingParams
from .decoding import DecodingBatch, DecodingRequest
from .images import sample_after_images
from .kv_cache import RetainedCaches
from .prompts import prefill_tokens
from .slot_attention import attention_for_sampling
from .stop_strings import StopStringMatcher


# While other rows are live, new requests are gathered until they are one for so many live rows, or have waited so many
# steps, so that their prompts share a pass.
JOIN_SHARE = 16
MAX_STEPS_WAITING = 2

Outcome = tuple[DecodingRequest, Generation | BaseException]


class TransformersEngine:
    """Samples from a Transformers model in this process, many trajectories at once.

    Whatever is pending is batched: a request joins within a few steps, a finished one leaves its slot at once, and its
    keys and values are kept under its `session`, so that the next turn reads only what was appended. Compute runs in
    one worker thread that lives as long as there is work; the event loop and the tools never wait for it.

    The model may be the one in training, wrapped (DDP, Accelerate, PEFT) or not. While requests are in flight it is in
    evaluation mode, and without gradients; afterwards every module is in the mode that it was in. Weights must not
    change meanwhile; call [`refresh`] when they have. Nothing here is collective: under several processes each has its
    own engine and rolls out its own share. Sharded weights (ZeRO-3, FSDP) have to be gathered around the rollout;
    [`ToolRolloutGenerator`] does that.

    A request with a `seed` depends on nothing else that runs: its draws are its own, and rows do not see each other.
    On a CPU in float32 with one thread per process (`OMP_NUM_THREADS=1`) its tokens and log-probabilities are the same
    to the last bit whatever shares its batch, as long as its session's cache was not evicted in between. Elsewhere
    (several threads, other types, GPUs) kernels and sums are split by the size of the batch: log-probabilities then
    agree to rounding error, and a token differs where a draw falls within that error of the boundary between two.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A decoder whose cache is keys and values per token (with sliding windows or not). State-space and hybrid
            models are refused.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer; used for stop strings only.
        max_batch_size (`int`, *optional*, defaults to `64`):
            Most requests sampled at once; more wait in line. The live cache has so many rows, each as long as the
            longest live conversation.
        device (`torch.device` or `str`, *optional*):
            Moves the model there; by default it stays where it is.
        cache_memory_limit_mb (`int`, *optional*, defaults to `4096`):
            Bound on the caches kept for trajectories between turns, in MiB on the model's device. The least recently
            used are dropped, and their prompts read again.
        max_prefill_tokens (`int`, *optional*):
            Most tokens, padding included, read in one forward pass. By default 16,384; on a CPU as many as leave a
            feed-forward block's states in its caches (1,024 for 1,536 wide ones), 512 at least.
        seed (`int`, *optional*):
            Seed of the draws for requests without one of their own; by default they differ from run to run.
        step_weights_limit_mb (`int`, *optional*, defaults to `2048`):
            Bound on transposed copies of weights, in MiB, on a CPU in float32: decoding steps multiply faster with
            them. They are as large as the weights of the linear layers (513 MiB for SmolLM2-135M); layers that do not
            fit do without, and 0 makes none. They go when the caches go: with the last request, [`release`] or
            [`refresh`].
    """

    weights: Literal["shared", "own"] = "shared"

    def __init__(
        self,
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase,
        max_batch_size: int = 64,
        device: torch.device | str | None = None,
        cache_memory_limit_mb: int = 4096,
        max_prefill_tokens: int | None = None,
        seed: int | None = None,
        step_weights_limit_mb: int = 2048,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"`max_batch_size` must be at least 1, got {max_batch_size}.")
        self.processing_class = processing_class
        self.max_batch_size = max_batch_size
        self.model = model
        self._shell, self._policy = unwrap_policy(model)
        if device is not None:
            model.to(device)
        self._architecture = type(self._policy).__name__  # now, as sharding (FSDP2) changes the class
        self._vocab_size = int(cast(nn.Embedding, self._policy.get_input_embeddings()).num_embeddings)
        self._retained = RetainedCaches(cache_memory_limit_mb * 2**20)
        self._matcher = StopStringMatcher(processing_class)
        self._batch = DecodingBatch(
            self._shell,
            self._policy,
            self._matcher,
            self._retained,
            max_prefill_tokens=max_prefill_tokens or prefill_tokens(self._policy),
            max_batch_size=max_batch_size,
            step_weights_bytes=step_weights_limit_mb * 2**20,
        )
        self._settings: dict[str, Any] = {
            "cache_memory_limit_mb": cache_memory_limit_mb,
            "max_prefill_tokens": max_prefill_tokens,
            "seed": seed,
            "step_weights_limit_mb": step_weights_limit_mb,
        }
        self._seeds = random.Random(seed)
        # Guards the four fields below, which the event loop's thread and the worker share.
        self._lock = threading.Lock()
        self._inbox: deque[DecodingRequest] = deque()
        self._with_images: deque[DecodingRequest] = deque()
        self._worker: threading.Thread | None = None
        self._in_flight: dict[DecodingRequest, asyncio.Future[Generation]] = {}

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingParams, *, session: str | None = None
    ) -> Generation:
        """Samples one turn after `prompt_ids`; see [`Engine.generate`].

        Raises:
            ValueError: if `prompt_ids` is empty or holds an id that the model's embedding does not have.
            EngineError: if the model failed.
        """
        return await self._sample(prompt_ids, sampling, session)

    async def generate_with_images(
        self, prompt_ids: list[int], images: Sequence[Any], sampling: SamplingParams
    ) -> Generation:
        """Samples one turn after ids that hold the tokens of `images`; see [`ReadsImages`].

        Such turns are sampled one at a time, by the model's own `generate`, and every turn reads its conversation from
        the start.

        Raises:
            ValueError: as in [`generate`], or if `processing_class` is no processor of images.
            EngineError: if the model failed.
        """
        vision_of(self.processing_class)
        return await self._sample(prompt_ids, sampling, None, tuple(images))

    async def _sample(
        self, prompt_ids: list[int], sampling: SamplingParams, session: str | None, images: tuple[Any, ...] = ()
    ) -> Generation:
        if not prompt_ids:
            raise ValueError("`prompt_ids` is empty: there is nothing to continue. Pass at least one token.")
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._vocab_size:
            raise ValueError(
                f"`prompt_ids` holds ids outside [0, {self._vocab_size}), the model's embedding, so it cannot be "
                "read. Use the tokenizer that belongs to the model, or resize the model's embeddings."
            )
        seed = self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed
        request = DecodingRequest(list(prompt_ids), sampling, session, random.Random(seed), images)
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            self._in_flight[request] = future
            (self._with_images if images else self._inbox).append(request)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="TransformersEngine")
                self._worker.start()
        try:
            return await future
        except asyncio.CancelledError:
            with self._lock:
                request.cancelled = True
                self._in_flight.pop(request, None)
            raise

    def fork(self, session: str, new_session: str) -> None:
        """Lets `new_session` start from the cache that `session` now has; see [`Engine`]."""
        self._retained.fork(session, new_session)

    def release(self, session: str) -> None:
        """Drops the cache of a trajectory; with the last one, the live batch's buffers too, if it is idle."""
        with self._lock:
            self._retained.pop(session)
            if not self._retained and self._worker is None:
                self._batch.drop_buffers()

    def refresh(self, model_path: str | None = None) -> None:
        """Drops all caches, as the model's weights have changed. `model_path` is not read: the model in place *is* the
        policy.

        Raises:
            RuntimeError: if requests are in flight; their turns would mix two policies.
        """
        with self._lock:
            waiting, worker = len(self._in_flight), self._worker
        if waiting:
            raise RuntimeError(
                f"`refresh` was called while {waiting} requests are being generated, so their turns would mix two "
                "policies. Await or cancel them first."
            )
        if worker is not None:  # finishing the step in which the last request was cancelled
            worker.join()
        self._retained.clear()
        self._batch.drop_buffers()

    def shares_weights_with(self, model: nn.Module) -> bool:
        """Whether the model sampled from is the one in `model`, which may be wrapped (DDP, PEFT)."""
        return unwrap_policy(model)[1] is self._policy

    def over(self, model: nn.Module) -> TransformersEngine:
        """An engine with the same settings that samples with another model; see [`SamplesFromCopies`]."""
        return TransformersEngine(model, self.processing_class, self.max_batch_size, **self._settings)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the model can sample."""
        return self._vocab_size

    def describe(self) -> dict[str, Any]:
        """Name, versions and settings."""
        config = self._policy.config
        return {
            "engine": "transformers",
            "transformers_version": transformers.__version__,
            "torch_version": torch.__version__,
            "model": config.name_or_path,
            "architecture": self._architecture,
            "dtype": str(self._policy.dtype).removeprefix("torch."),
            "device": self._batch.slots.device.type,
        }

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start: decoding steps, prompt tokens read, caches evicted; and caches and copies of weights
        now held."""
        return {
            "steps": self._batch.steps,
            "prefilled_tokens": self._batch.prefilled_tokens,
            "evicted_caches": self._retained.evictions,
            "retained_caches": len(self._retained),
            "retained_bytes": self._retained.nbytes,
            "step_weights_bytes": self._batch.slots.step_weights.nbytes,
        }

    # The rest runs in the worker thread.

    def _work(self) -> None:
        """Serves until nothing is pending. The last results go out only once the model is back in its own mode."""
        while True:
            try:
                outcomes = self._serve_images()
                if self._inbox:
                    with sampling_mode(self.model, self._policy):
                        outcomes += self._serve()
            except BaseException as error:  # whatever it is, every caller has to hear of it
                outcomes = self._fail(error)
            if not self._retained:
                self._batch.drop_buffers()
            with self._lock:
                idle = not (self._inbox or self._with_images)
                if idle:
                    self._worker = None
            self._deliver(outcomes)
            if idle:
                return

    def _serve_images(self) -> list[Outcome]:
        """Samples the turns that follow images, one after another. Returns the results that are not delivered yet."""
        with self._lock:
            requests = [self._with_images.popleft() for _ in range(len(self._with_images))]
        outcomes: list[Outcome] = []
        if requests:
            vision = vision_of(self.processing_class)
            with sampling_mode(self.model, self._policy, own_attention=True):
                for request in requests:
                    if not self._is_abandoned(request):
                        outcomes.append((request, sample_after_images(self._shell, vision, request, self._matcher)))
        return outcomes

    def _serve(self) -> list[Outcome]:
        """Decodes until every request is done. Returns the results that are not delivered yet."""
        batch = self._batch
        begun: deque[DecodingRequest] = deque()
        new: deque[DecodingRequest] = deque()
        steps_waited = 0
        while True:
            with self._lock:
                # Trajectories that have begun go first: they end sooner, and fewer caches are kept at a time.
                for request in self._inbox:
                    (begun if request.session in self._retained else new).append(request)
                self._inbox.clear()
            ready = min(self.max_batch_size - len(batch.rows), len(begun) + len(new))
            # A prefill pass costs about as much as a step, so a few newcomers share one; none waits for long.
            if ready > len(batch.rows) // JOIN_SHARE or (ready and steps_waited >= MAX_STEPS_WAITING):
                joining = [(begun or new).popleft() for _ in range(ready)]
                joining = [request for request in joining if not self._is_abandoned(request)]
                if joining:
                    batch.join(joining)
                ready = steps_waited = 0
            finished: list[Outcome] = [
                (request, request.generation()) for request in batch.step() if not request.cancelled
            ]
            steps_waited += bool(ready)
            if not (batch.rows or begun or new or self._inbox):
                return finished
            self._deliver(finished)

    def _fail(self, error: BaseException) -> list[Outcome]:
        """Every request in flight gets the error; nothing that may be half-written is kept."""
        self._batch.clear()
        self._retained.clear()
        with self._lock:
            self._inbox.clear()
            self._with_images.clear()
            requests = list(self._in_flight)
        what, config = f"{type(error).__name__}: {error}", self._policy.config.get_text_config(decoder=True)
        longest = max((len(request.prompt_ids) + len(request.token_ids) for request in requests), default=0)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and longest > context:  # where positions are learned, torch knows of an index only
            what += f" (a conversation has {longest} tokens, the model {context} positions: lower "
            what += "`max_trajectory_tokens`)"
        outcomes: list[Outcome] = []
        for request in requests:
            # One exception per caller: a shared one would collect the tracebacks of all of them.
            failure = EngineError(f"Generation failed: {what}")
            failure.__cause__ = error
            outcomes.append((request, failure))
        return outcomes

    def _is_abandoned(self, request: DecodingRequest) -> bool:
        with self._lock:
            if request.cancelled or self._in_flight[request].get_loop().is_closed():
                self._in_flight.pop(request, None)
                return True
        return False

    def _deliver(self, outcomes: list[Outcome]) -> None:
        """Hands results to the event loops that wait for them, one wake-up per loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future, Generation | BaseException]]] = {}
        with self._lock:
            for request, outcome in outcomes:
                future = self._in_flight.pop(request, None)
                if future is not None:
                    by_loop.setdefault(future.get_loop(), []).append((future, outcome))
        for loop, results in by_loop.items():
            try:
                loop.call_soon_threadsafe(_resolve, results)
            except RuntimeError:  # the loop was closed: nobody waits any more
                pass


def _resolve(results: list[tuple[asyncio.Future, Generation | BaseException]]) -> None:
    for future, outcome in results:
        if future.done():  # cancelled in the meantime
            continue
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def unwrap_policy(model: nn.Module) -> tuple[nn.Module, PreTrainedModel]:
    """What to call, without DDP and compilation, and the decoder inside it; they differ by PEFT's shell.

    Accelerate's mixed-precision wrapper around `forward` stays, so that sampling sees training's precision.

    Raises:
        ValueError: for PEFT methods that prepend to the prompt, and for models that are not decoders.
    """
    shell = policy = extract_model_from_parallel(model, keep_torch_compile=False)
    if is_peft_available():
        from peft import PeftModel

        if isinstance(policy, PeftModel):
            if policy.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"The adapter is a {policy.active_peft_config.peft_type.value}, which puts virtual tokens before "
                    "every prompt, so cached positions would not match. Train a LoRA adapter, or merge the prompt "
                    "into an engine of its own."
                )
            policy = policy.get_base_model()
    if not isinstance(policy, PreTrainedModel) or not policy.can_generate() or policy.config.is_encoder_decoder:
        raise ValueError(
            f"A {type(policy).__name__} is no decoder-only Transformers model with a language-model head, so it "
            "cannot be sampled from. Pass e.g. `AutoModelForCausalLM.from_pretrained(...)`."
        )
    return shell, policy


def _is_sharded(parameter: nn.Parameter) -> bool:
    zero_3 = hasattr(parameter, "ds_id") and parameter.numel() == 0
    return zero_3 or isinstance(parameter, DTensor) or getattr(parameter, "_is_flat_param", False)


@contextmanager
def sampling_mode(model: nn.Module, policy: PreTrainedModel, own_attention: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients, on an attention implementation that takes a mask (or the model's own); undone
    on exit, module by module.

    `no_grad` rather than inference mode: tensors that a model caches for itself (rotary tables) must stay usable in
    training. Gradient checkpointing needs no switch, as it acts in training mode only.

    Raises:
        RuntimeError: if the weights are sharded over processes (ZeRO-3, FSDP) and not gathered.
    """
    # Not the rest of the module: a value model may hang on the policy, and stay sharded
    head = policy.get_output_embeddings()  # `None` where code that is not transformers' own does not say
    for part in (policy.base_model, *([] if head is None else [head])):
        for name, parameter in part.named_parameters():
            if _is_sharded(parameter):
                raise RuntimeError(
                    f"The parameter {name!r} is sharded over processes, so this process cannot sample alone. Sample "
                    "inside `trl_multiturn.distributed.sharding.gathered_for_sampling(trainer)`, as "
                    "`ToolRolloutGenerator` does, or use an engine with weights of its own, e.g. `VLLMEngine`."
                )
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if policy.device.type == "cuda":
            stack.enter_context(torch.cuda.device(policy.device))
        if not own_attention:
            stack.enter_context(attention_for_sampling(policy))
        stack.callback(_set_training, training)
        model.eval()
        yield


def _set_training(modules: list[nn.Module]) -> None:
    # `module.train()` would recurse into children that were in evaluation mode.
    for module in modules:
        module.training = True
