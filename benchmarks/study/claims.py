"""What the papers say, as comparisons of two arms that can come out otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


MDPO, OREO, DQO, OURS = "M-DPO", "OREO", "DQO", "ours"


@dataclass(frozen=True)
class Claim:
    """One ordering.

    Attributes:
        paper (`str`), where (`str`): the source; `OURS` where no paper says so.
        text (`str`): the claim in words.
        theirs (`str`): the paper's numbers.
        better (`str`), worse (`str`): the arms; `arm:metric` where the metric is not `score`.
        worlds (`tuple[str, ...]`): where it is asked, each on its own.
        kind (`str`): whether the first is `"greater"`, or both are `"equal"`.
        margin (`float`): what still counts as equal.
    """

    paper: str
    where: str
    text: str
    theirs: str
    better: str
    worse: str
    worlds: tuple[str, ...]
    kind: Literal["greater", "equal"] = "greater"
    margin: float = 0.03


OFFLINE_WORLDS = ("words", "noisy", "late")
GEMMA = "Gemma-1.1-7B, GSM8K / MATH"

CLAIMS = (
    Claim(
        MDPO,
        "table 1",
        "M-DPO improves on SFT",
        f"81.5 / 49.1 > 77.5 / 46.1 ({GEMMA}, 1 iteration)",
        "m-dpo",
        "start",
        OFFLINE_WORLDS,
    ),
    Claim(MDPO, "table 1", "M-KTO improves on SFT", "82.1 / 49.5 > 77.5 / 46.1", "m-kto", "start", OFFLINE_WORLDS),
    Claim(MDPO, "table 1", "RAFT improves on SFT", "79.2 / 47.3 > 77.5 / 46.1", "raft", "start", OFFLINE_WORLDS),
    Claim(MDPO, "table 1", "M-DPO is better than RAFT", "83.9 / 51.2 > 79.2 / 47.3", "m-dpo", "raft", OFFLINE_WORLDS),
    Claim(MDPO, "table 1", "M-KTO is better than RAFT", "82.1 / 49.5 > 79.2 / 47.3", "m-kto", "raft", OFFLINE_WORLDS),
    Claim(
        MDPO,
        "table 1",
        "Masking observations: M-DPO is better than single-turn DPO",
        "83.9 / 51.2 > 81.7 / 48.9",
        "m-dpo",
        "dpo",
        OFFLINE_WORLDS,
    ),
    Claim(
        MDPO,
        "table 1",
        "Masking observations: M-KTO is better than single-turn KTO",
        "82.1 / 49.5 > 80.6 / 49.0",
        "m-kto",
        "kto",
        OFFLINE_WORLDS,
    ),
    Claim(
        MDPO,
        "table 1",
        "Single-turn DPO still improves on SFT",
        "81.7 / 48.9 > 77.5 / 46.1",
        "dpo",
        "start",
        OFFLINE_WORLDS,
    ),
    Claim(
        MDPO,
        "table 1",
        "A second iteration improves on the first",
        "82.5 / 49.7 > 81.5 / 49.1",
        "online:iteration_2",
        "online:iteration_1",
        ("late",),
    ),
    Claim(
        MDPO,
        "table 1",
        "A third iteration improves on the second",
        "83.9 / 51.2 > 82.5 / 49.7",
        "online:iteration_3",
        "online:iteration_2",
        ("late",),
    ),
    Claim(
        MDPO,
        "table 2",
        "The previous policy is a better reference than the initial one",
        "83.9 / 51.2 > 79.9 / 48.0",
        "online",
        "online-initial",
        ("late",),
    ),
    Claim(
        MDPO,
        "table 2",
        "A moderate β is better than a small one",
        "83.9 / 51.2 (0.1) > 81.7 / 50.1 (0.01)",
        "online",
        "online-beta0.05",
        ("late",),
    ),
    Claim(
        MDPO,
        "table 2",
        "A moderate β is better than a large one",
        "83.9 / 51.2 (0.1) > 82.8 / 49.7 (0.5)",
        "online",
        "online-beta2",
        ("late",),
    ),
    Claim(
        MDPO,
        "table 3",
        "Mixture sampling is better than on-policy sampling",
        "83.9 / 51.2 > 83.1 / 49.5",
        "online",
        "online-current",
        ("late",),
    ),
    Claim(
        MDPO,
        "table 3",
        "More rollouts per prompt are better (12 against 4; the paper 12 against 6)",
        "83.5 / 51.2 > 82.0 / 49.2",
        "online",
        "online-n4",
        ("late",),
    ),
    Claim(
        MDPO,
        "table 5",
        "The NLL term hurts after a good SFT, online",
        "83.9 / 51.2 > 81.7 / 49.5",
        "online",
        "online-nll",
        ("late",),
    ),
    Claim(
        MDPO,
        "table 5",
        "The NLL term helps in the first iteration of an underfit policy",
        "61.0 / 30.1 > 57.8 / 27.9",
        "m-dpo-nll",
        "m-dpo",
        ("late",),
    ),
    Claim(
        MDPO,
        "figure 4",
        "Preference learning raises pass@1 at temperature 0.7",
        "a gap at n = 1",
        "m-dpo-samples:mean@64",
        "start-samples:mean@64",
        ("late",),
    ),
    Claim(
        MDPO,
        "figure 4",
        "… and leaves pass@64 as it was",
        "all models alike for n > 16",
        "m-dpo-samples:pass@64",
        "start-samples:pass@64",
        ("late",),
        "equal",
    ),
    Claim(
        MDPO,
        "eq. 11",
        "With certain tools M-DPO finds the optimum (distance to π*)",
        "the term C vanishes",
        "m-dpo:distance",
        "zero",
        ("tabular-certain",),
        "equal",
        0.001,
    ),
    Claim(
        MDPO,
        "eq. 11",
        "With uncertain tools M-DPO is biased (distance to π*)",
        "the term C does not vanish",
        "m-dpo:distance",
        "m-dpo-margin:distance",
        ("tabular-uncertain",),
    ),
    Claim(
        MDPO,
        "eq. 11",
        "With the term C as a margin it is not",
        "(proposed, not tried)",
        "m-dpo-margin:distance",
        "zero",
        ("tabular-uncertain",),
        "equal",
        0.001,
    ),
    Claim(
        OURS,
        "section 3",
        "Token-level OREO finds the optimum with uncertain tools, too",
        "(implied by eqs. 6–9)",
        "oreo:distance",
        "zero",
        ("tabular-uncertain",),
        "equal",
        0.001,
    ),
    Claim(
        OURS,
        "section 3",
        "… response-level OREO does not (distance to π*)",
        "(not discussed)",
        "oreo-response:distance",
        "oreo:distance",
        ("tabular-uncertain",),
    ),
    Claim(
        OURS,
        "–",
        "With uncertain tools, values earn more than preferences by outcome",
        "(not discussed)",
        "oreo",
        "m-dpo",
        ("uncertain",),
    ),
    Claim(
        OREO,
        "table 1",
        "OREO improves on SFT",
        "+5.2 / +10.5 % relative (Qwen2.5-Math-1.5B)",
        "oreo",
        "start",
        ("noisy", "late"),
    ),
    Claim(
        OREO,
        "table 1",
        "OREO is better than rejection sampling",
        "consistently, table 1",
        "oreo",
        "raft",
        ("noisy", "late"),
    ),
    Claim(
        OREO,
        "table 1",
        "OREO is better than DPO",
        "consistently, table 1",
        "oreo",
        "m-dpo",
        ("noisy", "late"),
    ),
    Claim(OREO, "table 1", "OREO is better than KTO", "consistently, table 1", "oreo", "m-kto", ("noisy", "late")),
    Claim(
        OREO,
        "figure 5",
        "Token level is better than response level",
        "a bar each; response lowest",
        "oreo",
        "oreo-response",
        ("noisy", "late"),
    ),
    Claim(
        OREO,
        "figure 5",
        "Step level is comparable to token level",
        "slightly above on GSM8K, below on MATH",
        "oreo-step",
        "oreo",
        ("late",),
        "equal",
    ),
    Claim(OREO, "table 3", "OREO is better than DQO", "77.3 / 52.5 > 75.1 / 49.4", "oreo", "dqo", ("noisy", "late")),
    Claim(
        OREO,
        "figure 2",
        "A third iteration of OREO improves on the first",
        "rises over three iterations",
        "online-oreo:iteration_3",
        "online-oreo:iteration_1",
        ("late",),
    ),
    Claim(
        OREO,
        "figure 3",
        "Search by value (B = 4) is better than greedy decoding",
        "+11 to +18 % relative (B = 7)",
        "oreo-search:width_4",
        "oreo-search",
        ("words",),
    ),
    Claim(
        OREO,
        "figure 4",
        "The best of 4 actions by value is better than greedy decoding",
        "rises until K = 5 (ALFWorld)",
        "oreo-search:width_4",
        "oreo-search",
        ("late",),
    ),
    Claim(
        MDPO,
        "section 3.3",
        "A small learning rate keeps M-DPO from collapsing (1e-4 against 3e-4)",
        "4e-7 learns, 1e-6 collapses",
        "m-dpo-lr1e-4",
        "m-dpo",
        ("noisy",),
    ),
    Claim(
        MDPO,
        "table 1",
        "Masking observations, at a learning rate of 1e-4",
        "83.9 / 51.2 > 81.7 / 48.9",
        "m-dpo-lr1e-4",
        "dpo-lr1e-4",
        ("noisy",),
    ),
    Claim(
        DQO,
        "table 4",
        "DQO is better than DRO",
        "63.9 / 24.9 > 60.6 / 24.6 (Gemma-1.1-7B, greedy)",
        "dqo",
        "dro",
        ("late",),
    ),
    Claim(DQO, "table 4", "DQO is better than DPO", "63.9 / 24.9 > 57.9 / 22.6", "dqo", "m-dpo", ("noisy", "late")),
    Claim(
        DQO,
        "table 4",
        "DQO is better than rejection sampling",
        "63.9 / 24.9 > 53.6 / 21.7",
        "dqo",
        "raft",
        ("noisy", "late"),
    ),
    Claim(DQO, "table 4", "DQO is better than KTO", "63.9 / 24.9 > 50.5 / 18.6", "dqo", "m-kto", ("noisy", "late")),
    Claim(
        DQO,
        "table 6",
        "λ = 1 is better than λ = 0.95",
        "63.9 / 24.9 > 60.2 / 22.6",
        "dqo",
        "dqo-lam0.95",
        ("late",),
    ),
    Claim(
        DQO,
        "table 5",
        "Importance weights help",
        "63.9 / 24.9 > 58.7 / 22.0",
        "dqo",
        "dqo-unweighted",
        ("late",),
    ),
)
