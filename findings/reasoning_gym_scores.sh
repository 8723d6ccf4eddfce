#!/usr/bin/env bash
# reasoning-gym 0.1.25 (2026-11-28): scores of some of its 106 generators that a policy under training would exploit, or
# that end a training run.
#
# - `game_of_life_halting` gives 1.0 to any text that is not empty, whatever the answer is: it compares truth values.
# - The scorer that most generators inherit gives a part of the score to a wrong number that contains the right digits:
#   `gcd` with the answer 3 gives 0.5 to 13, `letter_counting` with the answer 1 gives 0.5 to 10.
# - Two scorers raise on text that a model writes: `prime_factorization` (ValueError) on words, `boxnet` (TypeError) on a
#   number.
#
# Output seen:
#   game_of_life_halting: 'I do not know.' for 'True' -> 1.0
#   game_of_life_halting: 'True' for 'False' -> 1.0
#   gcd: '13' for '3' -> 0.5
#   letter_counting: '10' for '1' -> 0.5
#   prime_factorization: 'I do not know.' -> ValueError
#   boxnet: '12345' -> TypeError
#
# What to do: look at a generator's scorer before training on it; count full scores alone; take a scorer that raises for
# no verdict (this package does: `ReasoningGymReward`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q reasoning-gym==0.1.25
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import reasoning_gym


def score(name, text, answer=None):
    """Of the generator's first puzzle, or its first one with this answer."""
    puzzles = reasoning_gym.create_dataset(name, size=50, seed=0)
    puzzle = next(puzzle for puzzle in puzzles if answer is None or puzzle["answer"] == answer)
    try:
        found = puzzles.score_answer(text, puzzle)
    except Exception as error:
        found = type(error).__name__
    print(f"{name}: {text!r}" + (f" for {answer!r}" if answer else "") + f" -> {found}")
    return found


assert score("game_of_life_halting", "I do not know.", "True") == 1.0, "no longer so"
assert score("game_of_life_halting", "True", "False") == 1.0, "no longer so"
assert score("gcd", "13", "3") == 0.5, "no longer so"
assert score("letter_counting", "10", "1") == 0.5, "no longer so"
assert score("prime_factorization", "I do not know.") == "ValueError", "no longer so"
assert score("boxnet", "12345") == "TypeError", "no longer so"
PYTHON
