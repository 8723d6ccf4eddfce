"""One trajectory: turn, tool, turn, tool, answer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..engines.arrivals import refuse_damaged, vocabulary_of
from ..engines.engine import Engine, Generation, ReadsImages, SamplingParams
from ..errors import UnsupportedOutput
from ..messages.images import with_portable_images
from ..sandbox.result import ToolFailure
from ..tools.base import RolloutContext, enter_rollout
from ..tools.environments import append_observation
from ..tools.toolbox import Toolbox
from ..trajectory import StopReason, Trajectory
from .config import RolloutConfig
from .conversation import Conversation
from .dialects.dialect import Message
from .provenance import derive_seed
from .transcript import Transcript


@dataclass(frozen=True)
class Episode:
    """One trajectory to be played: its prompt and place, and what it shares with the others.

    Args:
        prompt (`list[dict]`):
            Messages before the first sampled token.
        context ([`RolloutContext`]):
            The trajectory's name, place and seed; tools can read it.
        open_toolbox (`Callable[[], Toolbox]`):
            Opens tools of the trajectory's own; whoever opens a toolbox closes it.
        conversation ([`Conversation`]):
            Template and dialect.
        engine ([`Engine`]):
            Samples the turns.
        config ([`RolloutConfig`]):
            Limits and sampling.
    """

    prompt: list[Message]
    context: RolloutContext
    open_toolbox: Callable[[], Toolbox]
    conversation: Conversation
    engine: Engine
    config: RolloutConfig

    async def play(self, opening: Transcript | None = None) -> Trajectory:
        """Plays the trajectory; only a user's mistake, or the engine's error, raises.

        Args:
            opening ([`Transcript`], *optional*):
                What the trajectory begins with instead of sampling it. The calls of its turns are run again first.
        """
        enter_rollout(self.context)
        start = time.monotonic()
        transcript = Transcript(self.prompt) if opening is None else opening.fork()
        toolbox = self.open_toolbox()
        failure, reward = None, None
        try:
            observation = await toolbox.reset()
            if opening is None:
                self.open(transcript, observation)
            else:
                transcript.replays_differ = await self.replay(transcript, toolbox)
            stop_reason = await self._converse(transcript, toolbox)
            reward = await toolbox.reward()
        except ToolFailure as error:
            stop_reason, failure = StopReason.TOOL_FAILED, str(error)
            if not transcript.prompt_ids:  # the environment never started
                transcript.prompt_ids = self.conversation.prompt_ids(transcript.prompt)
        finally:
            self.engine.release(self.context.trajectory_id)
            await toolbox.close()
        return transcript.finish(self.context, stop_reason, time.monotonic() - start, failure, reward)

    async def _converse(self, transcript: Transcript, toolbox: Toolbox) -> StopReason:
        """Turn after turn, until one ends the trajectory."""
        alike = self.sampling()
        while True:
            prefix_ids, room = transcript.ids, transcript.room(self.config)
            seed = derive_seed(self.context.seed, len(transcript.turns))
            sampling, start = replace(alike, max_new_tokens=room, seed=seed), time.monotonic()
            images = transcript.images
            generation = await self.generate(prefix_ids, sampling, self.context.trajectory_id, images)
            transcript.add_sampled(generation, time.monotonic() - start)
            transcript.begun = self.conversation.within_turn(transcript.begun)
            turn = self.conversation.read(transcript.begun, transcript.last_read)
            stop_reason = transcript.end_turn(turn, self.config) or await self.answer(transcript, toolbox)
            if stop_reason is not None:
                return stop_reason

    # The steps of a conversation, for players of other kinds too

    async def generate(
        self, prefix_ids: list[int], sampling: SamplingParams, session: str, images: Sequence[str] = ()
    ) -> Generation:
        """Samples one turn, or a part of it, after ids that hold the tokens of `images`.

        Raises:
            [`EngineError`]: if the engine's answer cannot be what a policy sampled.
            [`UnsupportedOutput`]: if there are images, and the engine reads text alone.
        """
        if not images:
            generation = await self.engine.generate(prefix_ids, sampling, session=session)
        elif isinstance(self.engine, ReadsImages):
            generation = await self.engine.generate_with_images(prefix_ids, images, sampling)
        else:
            raise UnsupportedOutput(
                f"The conversation shows {len(images)} images, but a `{type(self.engine).__name__}` reads text alone. "
                "Sample with a `TransformersEngine` or a `VLLMEngine`, or have prompts and tools give text."
            )
        refuse_damaged(generation, self.engine, vocabulary_of(self.engine, self.conversation.vocab_size))
        return generation

    def open(self, transcript: Transcript, observation: str | list[Message] | None) -> None:
        """Writes the prompt, with what the environment said first.

        Raises:
            `ValueError`: if the prompt leaves no room for a turn.
        """
        transcript.prompt = with_portable_images(append_observation(transcript.prompt, observation))
        transcript.prompt_ids = self.conversation.prompt_ids(transcript.prompt)
        refuse_long_prompt(len(transcript), self.context.prompt_index, self.config)

    def sampling(self, sample: int = 0, stop_strings: tuple[str, ...] = ()) -> SamplingParams:
        """How the turns are sampled: all but their room and their seeds.

        Args:
            sample (`int`, *optional*, defaults to `0`):
                Which of several continuations of the trajectory; it chooses among the temperatures.
            stop_strings (`tuple[str, ...]`, *optional*):
                What ends a turn in addition.
        """
        return self.config.sampling(
            max_new_tokens=1,
            sample_index=self.context.sample_index + sample,
            stop_token_ids=self.conversation.stop_token_ids,
            stop_strings=(*self.conversation.stop_strings, *stop_strings),
        )

    async def answer(self, transcript: Transcript, toolbox: Toolbox) -> StopReason | None:
        """Runs the calls of the last turn and appends the answers; why the trajectory stops there, if it does.

        Raises:
            [`ToolFailure`]: if the machine failed.
        """
        turn = transcript.unanswered
        assert turn is not None
        results = await toolbox.call(turn.calls)
        transcript.results += results
        transcript.result_turns += [len(transcript.turns)] * len(results)
        if toolbox.done:
            transcript.final_observation = "\n".join(result.output for result in results)
            return StopReason.ANSWERED
        # A tool may answer with megabytes: what cannot fit is not tokenized, which would hold up all trajectories
        if any(len(result.output) > self.conversation.most_characters for result in results):
            return StopReason.MAX_TOKENS
        observations = self.conversation.dialect.observe(turn, results)
        try:
            ids = self.conversation.answer_ids(turn, transcript.unanswered_ids, observations)
            rewritten = self.conversation.rewritten(transcript.history, observations)
        except ValueError as error:
            if any(result.images for result in results):
                raise UnsupportedOutput(
                    f"An image that a tool returned cannot be shown to the policy: {error}"
                ) from error
            # The policy's doing: the template did render an ordinary call's answer
            transcript.unrenderable = str(error)
            return StopReason.ENDED
        length = len(transcript) + len(ids) if rewritten is None else len(rewritten[0])
        if length >= self.config.max_trajectory_tokens:
            return StopReason.MAX_TOKENS  # no room for another turn: the policy could not read the observation
        if rewritten is None:
            transcript.add_answer(observations, ids)
        else:
            transcript.begin_segment(observations, *rewritten)
        return None

    async def replay(self, transcript: Transcript, toolbox: Toolbox) -> int:
        """Runs again, in a new toolbox, the calls of a transcript's turns that leave something behind.

        Sessions and the environment are then as the transcript left them, if the calls are deterministic. Plain
        functions keep nothing for a trajectory and are not called.

        Returns:
            `int`: how many turns were answered otherwise than recorded. The transcript keeps what was recorded.

        Raises:
            [`ToolFailure`]: if the machine failed.
        """
        differing = 0
        for turn, observations in transcript.turns:
            calls = [copy.deepcopy(call) for call in turn.calls if toolbox.keeps_state(call.name)]
            results = await toolbox.call(calls)
            if calls and len(calls) == len(turn.calls):
                differing += self.conversation.dialect.observe(turn, results) != observations
        return differing


def refuse_long_prompt(length: int, prompt_index: int, config: RolloutConfig) -> None:
    """Raises `ValueError` where a prompt of `length` tokens leaves no room for a turn."""
    if length >= config.max_trajectory_tokens:
        raise ValueError(
            f"Row {prompt_index}: the prompt has {length} tokens, which leaves no room for a turn within "
            f"`max_trajectory_tokens={config.max_trajectory_tokens}`. Raise it or drop the row."
        )
