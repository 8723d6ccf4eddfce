#!/usr/bin/env bash
# math-verify 0.9.0 with latex2sympy2_extended 1.11.0 (2026-11-28), the verifier of TRL's `accuracy_reward` and of most
# recipes for reinforcement learning on mathematics: answers that differ are equal, and plain answers are not, because
# units at the end are removed unread (`t`, `m`, `s`, `c` and `d` are among them, variables too), a base is dropped, a
# percent sign is passed over beside the same integer, numbers are equal at six decimals, and words behind a number (or a
# mixed number, or an exponent) leave the whole answer unread. No verdict is "unknown": what cannot be read is wrong.
#
# Output seen:
#   equal:     12 cm | 12 m
#   equal:     4t | 4
#   equal:     101_2 | 101_3
#   equal:     10 | 10\%
#   equal:     \frac{1}{2004!} | \frac{1}{2006!}
#   equal:     0.1 | 0.10000001
#   different: 18 | 18 dollars
#   different: \frac{3}{2} | 1 1/2
#   different: 1000 | 1e3
#   different: 7000000 | 7 million
#   different: 3 hours | 180 minutes
#   different: 18 | **18**
#
# What to do: read numbers, units and words before (here: `math_reward`, docs/verifiers.md), and leave expressions to it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
from math_verify import LatexExtractionConfig, parse, verify

config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]  # as TRL's accuracy_reward
equal = [
    ("12 cm", "12 m"),
    ("4t", "4"),
    ("101_2", "101_3"),
    ("10", r"10\%"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    ("0.1", "0.10000001"),
]
different = [
    ("18", "18 dollars"),
    (r"\frac{3}{2}", "1 1/2"),
    ("1000", "1e3"),
    ("7000000", "7 million"),
    ("3 hours", "180 minutes"),
    ("18", "**18**"),
]
for gold, answer in equal + different:
    verdict = verify(*(parse(rf"\boxed{{{text}}}", config, extraction_mode="first_match") for text in (gold, answer)))
    print("equal:    " if verdict else "different:", gold, "|", answer)
    assert verdict is ((gold, answer) in equal), "no longer so"
PYTHON
