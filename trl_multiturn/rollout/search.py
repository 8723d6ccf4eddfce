"""Decoding guided by a score: step-level beam search, and the best of K actions where nothing can be taken back.

A step is a whole turn, whose calls are run before it is scored, or a line or a sentence inside a turn. The score is
any callable from token ids to numbers; a value model's `score` is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

from datasets import Dataset

from ..concurrency import await_all, run_coroutine
from ..engines.engine import Engine, Forks
from ..sandbox.result import ToolFailure
from ..tools.base import enter_rollout
from ..tools.toolbox import Toolbox
from ..trajectory import StopReason, Trajectory
from ..verify.answers import final_answer
from ..verify.votes import elect
from .config import RolloutConfig
from .dialects.dialect import Message
from .episode import Episode
from .guided.candidate import Candidate, best_action, finite, ranked
from .guided.settings import SearchSettings, Step, Vote
from .loop import agenerate_trajectories
from .options import RolloutOptions
from .provenance import derive_seed
from .scoring import Score, Scorer
from .transcript import Transcript


Answer = Callable[[list[Message]], str | None]
Candidates = list[Candidate]


def value_guided_search(
    prompts: Dataset | Sequence[Mapping[str, Any]],
    engine: Engine,
    tools: Sequence[Any] | None,
    score: Score,
    beam: int = 3,
    candidates: int | None = None,
    config: RolloutConfig | None = None,
    *,
    step: Step = "turn",
    finished: Literal["rank", "pool"] = "rank",
    score_at: Literal["state", "action"] = "state",
    vote: Vote = "none",
    max_sampled_tokens: int | None = None,
    keep_candidates: bool = False,
    answer: Answer = final_answer,
    reward_funcs: Any = None,
    num_generations: int = 1,
    **options: Unpack[RolloutOptions],
) -> list[Trajectory]:
    """Searches for the trajectory of the highest score, one per prompt (OREO, arXiv:2412.16145, section 3.5).

    Step-level beam search keeps `beam` partial trajectories, draws `candidates` next steps for each, and keeps the
    best `beam` of them all, by the score of the state *after* the step: after the tools' answer, where the step was a
    turn that called tools. Candidates that equal another token by token are drawn but count once. Every candidate has
    interpreter sessions of its own; they are brought to its state by running its earlier calls again (plain functions,
    which keep no state, are not run again), and closed when it is dropped.

    The search is as good as its score. Without a vote, what the policy says most often has no more weight than what it
    says once, as equal candidates count once: with scores that know nothing it finds worse trajectories than greedy
    decoding and a majority vote do, the more so the more it draws. `examples/iterative_oreo.py` prints the table.

    A candidate that stops without an answer (cut at a token or turn limit, ended early) does not compete with those
    that go on; one such is returned only where no candidate answered. If none did and the machine failed for one, the
    result has stopped with `TOOL_FAILED`: it is unknown whether that one would have answered.

    With an `environment_factory`, whose environments cannot be taken back, each turn is the best of `candidates`
    sampled ones by the score of the state before its observation, and only that one is played: best of K actions.

    Args:
        prompts (`Dataset` or `list[dict]`), engine ([`Engine`]), tools (`list`, *optional*):
            As in [`generate_trajectories`].
        score (`Callable[[list[list[int]]], Sequence[float]]`):
            Scores states, each given as all token ids so far, e.g. `value_model.score`. It is called in a thread, one
            call at a time, with the states of as many prompts as wait for it.
        beam (`int`, *optional*, defaults to `3`):
            Partial trajectories kept (B); 1 with an `environment_factory`.
        candidates (`int`, *optional*):
            Steps drawn for each; `beam` by default.
        config ([`RolloutConfig`], *optional*):
            How to sample. With `beam=1, candidates=1` and whole turns the trajectories are those of
            [`generate_trajectories`].
        step (`str` or `int`, *optional*, defaults to `"turn"`):
            `"turn"`, `"line"` or `"sentence"` (line breaks and periods), or a number: a block of so many tokens. A
            step never crosses the end of a turn.
        finished (`str`, *optional*, defaults to `"rank"`):
            Where finished candidates compete. `"rank"`: in the beam, with those that go on. `"pool"`: in a pool apart,
            the best of which is taken once no candidate goes on (the authors' code).
        score_at (`str`, *optional*, defaults to `"state"`):
            What `score` reads. `"state"`, for value models: the state after the step, its observation included; where
            nothing answers a turn, the state before the token that ended it, for none comes after. `"action"`, for
            reward models: everything up to the step's last sampled token.
        vote (`str`, *optional*, defaults to `"none"`):
            How the result is chosen among the candidates that answered and compete. `"none"`: by the highest score.
            `"plain"`: the answer that the policy comes to most often, by the share of draws of each step on the way
            there. `"weighted"`: the answer with the largest sum of these shares times the scores, for scores that are
            chances (below 0 they count nothing). Of an answer, the trajectory of the highest score is returned. With
            `finished="pool"` all that answered vote, with `"rank"` the beam.
        max_sampled_tokens (`int`, *optional*):
            Tokens to sample for a prompt. The search is repeated, with other draws, as long as one more fits by what
            they took so far, and the candidates of all compete. The first is always finished.
        keep_candidates (`bool`, *optional*, defaults to `False`):
            Whether `info["search"]["candidates"]` holds the other candidates that ended, for [`distilled_rows`].
        answer (`Callable[[list[dict]], str | None]`, *optional*):
            The answer with which a completion votes; by default its last box.
        reward_funcs (`Callable`, `str` or list of them, *optional*):
            As in [`generate_trajectories`].
        num_generations (`int`, *optional*, defaults to `1`):
            Searches per prompt.
        **options ([`~trl_multiturn.rollout.options.RolloutOptions`]):
            As in [`generate_trajectories`], e.g. `environment_factory`, `reward_weights`, `journal`.

    Returns:
        `list[Trajectory]`: ids as sampled, with masks and log-probabilities. `info["search"]` holds the `score`, how
        many steps were `drawn` and how many were `duplicates`, all `sampled_tokens`, and the number of `searches`.

    Raises:
        `ValueError`: for arguments that allow no search, or if `score` does not give one finite number per state.

    Example:

    ```python
    >>> value_model = ValueModel.from_pretrained("my-oreo-run/value_model")
    >>> trajectories = value_guided_search(prompts, engine, [PythonTool()], value_model.score, beam=7)
    ```
    """
    return run_coroutine(
        avalue_guided_search(
            prompts,
            engine,
            tools,
            score,
            beam,
            candidates,
            config,
            step=step,
            finished=finished,
            score_at=score_at,
            vote=vote,
            max_sampled_tokens=max_sampled_tokens,
            keep_candidates=keep_candidates,
            answer=answer,
            reward_funcs=reward_funcs,
            num_generations=num_generations,
            **options,
        )
    )


async def avalue_guided_search(
    prompts: Dataset | Sequence[Mapping[str, Any]],
    engine: Engine,
    tools: Sequence[Any] | None,
    score: Score,
    beam: int = 3,
    candidates: int | None = None,
    config: RolloutConfig | None = None,
    *,
    step: Step = "turn",
    finished: Literal["rank", "pool"] = "rank",
    score_at: Literal["state", "action"] = "state",
    vote: Vote = "none",
    max_sampled_tokens: int | None = None,
    keep_candidates: bool = False,
    answer: Answer = final_answer,
    reward_funcs: Any = None,
    num_generations: int = 1,
    **options: Unpack[RolloutOptions],
) -> list[Trajectory]:
    """[`value_guided_search`] for event loops."""
    config = RolloutConfig.of(config)
    candidates = beam if candidates is None else candidates
    rewindable = options.get("environment_factory") is None
    settings = SearchSettings(
        beam=beam,
        candidates=candidates,
        step=step,
        finished=finished,
        score_at=score_at,
        vote=vote,
        max_sampled_tokens=max_sampled_tokens,
        keep_candidates=keep_candidates,
        rewindable=rewindable,
    )
    settings.check(score, config)
    return await agenerate_trajectories(
        prompts,
        engine,
        tools,
        config,
        reward_funcs=reward_funcs,
        num_generations=num_generations,
        player=_SearchPlayer(Scorer(score), settings, answer),
        **options,
    )


class _SearchPlayer:
    """Plays a trajectory by searching for it."""

    def __init__(self, scorer: Scorer, settings: SearchSettings, answer: Answer):
        self.scorer, self.settings, self.answer = scorer, settings, answer
        self.provenance: dict[str, Any] = {"decoding": {"score": scorer.name, **vars(settings)}}

    async def __call__(self, episode: Episode) -> Trajectory:
        enter_rollout(episode.context)
        return await _Search(episode, self.scorer, self.settings, self.answer).run()


class _Search:
    """The search for one prompt."""

    def __init__(self, episode: Episode, scorer: Scorer, settings: SearchSettings, answer: Answer):
        self.episode, self.scorer, self.settings, self.answer_of = episode, scorer, settings, answer
        self.toolboxes: set[Toolbox] = set()
        self.sessions: set[str] = set()
        self.named = 0
        self.counts = {"drawn": 0, "duplicates": 0, "sampled_tokens": 0, "searches": 0}
        self.found: list[Candidate] = []  # all candidates that ended, in the order of ending

    async def run(self) -> Trajectory:
        start, reward = time.monotonic(), None
        root = Candidate(Transcript(self.episode.prompt), self._new_session(), draws=self.settings.candidates)
        best = root
        try:
            await self._prepare(root)
            best = await self._search_within_budget(root)
            if best.toolbox is not None and best.stop_reason is not StopReason.TOOL_FAILED:
                reward = await best.toolbox.reward()
        except ToolFailure as error:  # the environment's
            best.stop_reason, best.failure = StopReason.TOOL_FAILED, str(error)
        finally:
            for session in self.sessions:
                self.episode.engine.release(session)
            for toolbox in list(self.toolboxes):
                await self._close(toolbox)
        assert best.stop_reason is not None
        seconds = time.monotonic() - start
        trajectory = best.transcript.finish(self.episode.context, best.stop_reason, seconds, best.failure, reward)
        trajectory.info["search"] = {"score": finite(best.score), **self.counts}
        if self.settings.keep_candidates:
            others = [node.told(self.episode.context) for node in self.found if node is not best]
            trajectory.info["search"]["candidates"] = others
        return trajectory

    async def _search_within_budget(self, root: Candidate) -> Candidate:
        """Searches once, and then again as often as the budget allows by what a search took so far."""
        opened, answered, stopped = root.transcript.fork(), list[Candidate](), list[Candidate]()
        while True:
            more_answered, more_stopped = await self._search(root)
            answered, stopped = answered + more_answered, stopped + more_stopped
            self.counts["searches"] += 1
            spent, times = self.counts["sampled_tokens"], self.counts["searches"]
            budget = self.settings.max_sampled_tokens
            if budget is None or not spent or spent * (times + 1) > budget * times:
                return self._choose(answered, stopped)
            root = Candidate(opened.fork(), self._new_session(), draws=self.settings.candidates)

    def _choose(self, answered: list[Candidate], stopped: list[Candidate]) -> Candidate:
        if not answered:
            failed = [node for node in stopped if node.stop_reason is StopReason.TOOL_FAILED]
            return failed[0] if failed else ranked(stopped)[0]
        if self.settings.vote == "none":
            return ranked(answered)[0]
        shares = [node.share(self.settings.candidates) for node in answered]
        scores = [node.score if self.settings.vote == "weighted" else 1.0 for node in answered]
        weights = [share * score for share, score in zip(shares, scores, strict=True)]
        answers = [self.answer_of(node.transcript.completion) for node in answered]
        return answered[elect(answers, weights, [node.score for node in answered])]

    async def _prepare(self, root: Candidate) -> None:
        """The prompt, with an environment's first observation."""
        observation = None
        if not self.settings.rewindable:
            root.toolbox = self._new_toolbox()
            try:
                observation = await root.toolbox.reset()
            except ToolFailure:
                root.transcript.prompt_ids = self.episode.conversation.prompt_ids(root.transcript.prompt)
                raise
        self.episode.open(root.transcript, observation)

    async def _search(self, root: Candidate) -> tuple[list[Candidate], list[Candidate]]:
        """The candidates that answered and compete, and those that stopped without an answer."""
        live, answered = [root], list[Candidate]()
        stopped: list[Candidate] = []
        while live:
            parents = live
            children = await self._expand(parents)
            if self.settings.rewindable:
                await await_all(self._answer(child) for child in children)
                await self._score(children)
            else:
                await self._score(children)
                children = [best_action(children)]
                await self._answer(children[0])
            new = [child for child in children if child.stop_reason is StopReason.ANSWERED]
            live = [child for child in children if child.stop_reason is None]
            stopped += [child for child in children if child not in new and child not in live]
            self.found += [child for child in children if child.stop_reason is not None]
            live, answered = self._keep(live, answered, new)
            await self._let_go(parents + children, live)
        return answered, stopped

    def _keep(self, live: Candidates, answered: Candidates, new: Candidates) -> tuple[Candidates, Candidates]:
        if self.settings.finished == "pool":
            return ranked(live)[: self.settings.beam], answered + new
        kept = ranked(answered + new + live)[: self.settings.beam]
        return [node for node in kept if node in live], [node for node in kept if node not in live]

    async def _let_go(self, nodes: list[Candidate], live: list[Candidate]) -> None:
        """Ends what only dropped candidates hold. A played environment stays open: it may give the reward."""
        in_use = {node.session for node in live}
        for session in [*self.sessions - in_use]:
            self.sessions.discard(session)
            self.episode.engine.release(session)
        if self.settings.rewindable:
            held = {node.toolbox for node in live}
            await await_all(self._close(toolbox) for toolbox in [*self.toolboxes] if toolbox not in held)

    # One round

    async def _expand(self, parents: list[Candidate]) -> list[Candidate]:
        """The next steps of all partial trajectories, each distinct one once."""
        places = [(rank, k) for rank in range(len(parents)) for k in range(self.settings.candidates)]
        # Forked before anything is drawn: the first candidate goes on in its parent's session and takes its cache
        sessions = [self._fork_session(parents[rank].session) if k else parents[rank].session for rank, k in places]
        draws = zip(places, sessions, strict=True)
        drawn = await await_all(self._draw(parents[rank], rank, k, session) for (rank, k), session in draws)
        self.counts["drawn"] += len(drawn)
        children: dict[tuple[int, ...], Candidate] = {}
        for (rank, _), child in zip(places, drawn, strict=True):
            first = children.setdefault(tuple(child.transcript.ids), child)
            if first is not child:
                first.draws += 1
                self.counts["duplicates"] += 1
            elif self.settings.rewindable:  # the first child goes on with the sessions, the others replay
                child.toolbox, parents[rank].toolbox = parents[rank].toolbox, None
            else:
                child.toolbox = parents[rank].toolbox
        return list(children.values())

    async def _draw(self, parent: Candidate, rank: int, k: int, session: str) -> Candidate:
        """Samples one step after `parent`; blank lines belong to the step before them and are no step."""
        conversation, transcript = self.episode.conversation, parent.transcript.fork()
        child = Candidate(transcript, session, parent_share=parent.share(self.settings.candidates))
        alike = self.episode.sampling(k, self.settings.stops)
        earlier = len(transcript.begun.token_ids)
        while True:
            begun = len(transcript.begun.token_ids)
            place: tuple[int, ...] = () if rank == k == begun == 0 else (rank, k, begun)
            if self.counts["searches"]:
                place = (rank, k, begun, self.counts["searches"])
            room = transcript.room(self.episode.config)
            room = min(room, self.settings.block or room)
            seed = derive_seed(self.episode.context.seed, len(transcript.turns), *place)
            sampling = replace(alike, max_new_tokens=room, seed=seed)
            piece = await self.episode.generate(transcript.ids, sampling, session, transcript.images)
            self.counts["sampled_tokens"] += len(piece.token_ids)
            transcript.add_sampled(piece)
            sampled, transcript.begun = transcript.begun, conversation.within_turn(transcript.begun)
            if transcript.begun is not sampled or self._turn_ended(transcript):
                turn = conversation.read(transcript.begun, transcript.last_read)
                child.stop_reason = transcript.end_turn(turn, self.episode.config)
                return child
            if conversation.text(transcript.begun.token_ids[earlier:]).strip():
                return child

    def _turn_ended(self, transcript: Transcript) -> bool:
        begun, conversation = transcript.begun, self.episode.conversation
        if self.settings.block:
            return begun.finish_reason != "length" or transcript.room(self.episode.config) < 1
        if self.settings.step == "turn" or begun.finish_reason != "stop_string":
            return True
        text = conversation.text(begun.token_ids)
        if any(stop in text for stop in conversation.stop_strings):
            return True
        if transcript.room(self.episode.config) < 1:
            transcript.begun = replace(begun, finish_reason="length")
            return True
        return False

    async def _answer(self, node: Candidate) -> None:
        """Runs the calls of a turn that was just sampled."""
        transcript = node.transcript
        if transcript.unanswered is None or node.stop_reason is not None:
            return
        try:
            if node.toolbox is None:
                node.toolbox = self._new_toolbox()
                differing = await self.episode.replay(transcript, node.toolbox)
                if differing:
                    transcript.replays_differ = max(differing, transcript.replays_differ or 0)
            node.stop_reason = await self.episode.answer(transcript, node.toolbox)
        except ToolFailure as error:
            node.stop_reason, node.failure = StopReason.TOOL_FAILED, str(error)

    async def _score(self, nodes: list[Candidate]) -> None:
        scored = [node for node in nodes if node.stop_reason is not StopReason.TOOL_FAILED]
        if scored:
            for node, score in zip(scored, await self.scorer([self._state(n) for n in scored]), strict=True):
                node.score = score

    def _state(self, node: Candidate) -> list[int]:
        ids, mask = node.transcript.ids, node.transcript.action_mask
        if node.transcript.begun.token_ids:
            return ids
        if self.settings.score_at == "action":
            unsampled = next((i for i, bit in enumerate(reversed(mask)) if bit), len(mask))
            return node.transcript.read_before(len(node.transcript.prompt_ids) + len(mask) - unsampled)
        return self.episode.conversation.without_end(ids) if mask and mask[-1] else ids

    # What is held

    def _new_session(self) -> str:
        """A name for the engine's cache; the first is that of plain sampling."""
        name = self.episode.context.trajectory_id
        session = f"{name}/{self.named}" if self.named else name
        self.named += 1
        self.sessions.add(session)
        return session

    def _fork_session(self, session: str) -> str:
        new_session = self._new_session()
        if isinstance(self.episode.engine, Forks):
            self.episode.engine.fork(session, new_session)
        return new_session

    def _new_toolbox(self) -> Toolbox:
        toolbox = self.episode.open_toolbox()
        self.toolboxes.add(toolbox)
        return toolbox

    async def _close(self, toolbox: Toolbox) -> None:
        await toolbox.close()
        self.toolboxes.discard(toolbox)
