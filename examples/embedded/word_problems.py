"""A world small enough for a CPU: word problems, and an imperfect teacher that solves them with Python.

The embedded default of the examples. Real models arrive at preference learning knowing more than they show: the right
way is in them, but not ranked first. This world has that property by construction. Each verb of a problem means one
operation, and the teacher mistakes it at the verb's own rate, between 10 % and 65 %. A policy that imitates the
teacher answers greedily wrong wherever the mistake is the majority, and finds the right way when it samples: there is
something for preference learning to learn, and everything needed to learn it from.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from datasets import Dataset

from trl_multiturn.sandbox.sandbox import Sandbox, Session


@dataclass(frozen=True)
class Verb:
    """What a verb of the problems means, and how often the teacher gets it wrong.

    Attributes:
        phrase (`str`): as the problem says it; `{n}` is the amount.
        right (`str`), wrong (`str`): augmented assignment of its meaning, and the one the teacher mistakes it for.
        error_rate (`float`): share of the teacher's programs that take the wrong one.
        amounts (`tuple[int, int]`): smallest and largest amount.
    """

    phrase: str
    right: str
    wrong: str
    error_rate: float
    amounts: tuple[int, int] = (2, 9)

    def amount(self, rng: random.Random) -> int:
        return rng.randint(*self.amounts)


VERBS = (
    Verb("buys {n}", "+=", "-=", 0.10),
    Verb("picks {n}", "+=", "-=", 0.20),
    Verb("wins {n}", "+=", "-=", 0.35),
    Verb("finds {n}", "+=", "-=", 0.60),
    Verb("saves {n}", "+=", "-=", 0.65),
    Verb("eats {n}", "-=", "+=", 0.15),
    Verb("loses {n}", "-=", "+=", 0.25),
    Verb("drops {n}", "-=", "+=", 0.40),
    Verb("sells {n}", "-=", "+=", 0.65),
    Verb("gives away {n}", "-=", "+=", 0.60),
    Verb("doubles them", "*=", "+=", 0.30, amounts=(2, 2)),
    Verb("triples them", "*=", "+=", 0.60, amounts=(3, 3)),
)
NAMES = ("Ana", "Eva", "Leo", "Mia", "Sam", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
ORDER = ("first", "then", "finally")


def apply(total: int, operation: str, amount: int) -> int:
    """What `total operation amount` leaves in `total`."""
    return {"+=": total + amount, "-=": total - amount, "*=": total * amount}[operation]


def tell(verbs: list[int], amounts: list[int]) -> list[str]:
    """The steps of a problem in words: `["first buys 7", "then doubles them"]`."""
    steps = zip(ORDER, verbs, amounts, strict=False)
    return [f"{order} {VERBS[verb].phrase.format(n=amount)}" for order, verb, amount in steps]


def make_problems(n: int, seed: int, split: str = "train") -> Dataset:
    """Draws `n` different problems of one to three operations.

    Args:
        n (`int`):
            Number of problems.
        seed (`int`):
            Seed of the draw.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`. A problem belongs to the test split where the sum of its numbers is a multiple of
            four, so that no two calls, whatever their seeds, put one problem into both.

    Returns:
        `Dataset` with the columns `prompt` (messages), `answer` (the number, as text), and what the teacher reads:
        `start` (the first number), `verbs` (indices into `VERBS`) and `amounts`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    rng = random.Random(seed)
    rows: dict[str, dict] = {}
    while len(rows) < n:
        start = rng.randint(5, 99)
        verbs = [rng.randrange(len(VERBS)) for _ in range(rng.randint(1, len(ORDER)))]
        amounts = [VERBS[verb].amount(rng) for verb in verbs]
        totals = [start]
        for verb, amount in zip(verbs, amounts, strict=True):
            totals.append(apply(totals[-1], VERBS[verb].right, amount))
        held_out = (start + sum(amounts)) % 4 == 0
        if min(totals) < 0 or max(totals) > 999 or held_out != (split == "test"):
            continue
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        story = ", ".join([f"{name} has {start} {thing}", *tell(verbs, amounts)])
        question = f"{story}. How many {thing} now?"
        rows[question] = {
            "prompt": [{"role": "user", "content": question}],
            "answer": str(totals[-1]),
            "start": start,
            "verbs": verbs,
            "amounts": amounts,
        }
    return Dataset.from_list(list(rows.values()))


# How often the teacher goes astray in ways that are not a wrong operation.
NO_CODE_RATE = 0.05  # answers without a program
GIVES_UP_RATE = 0.02  # neither a program nor an answer
CRASH_RATE = 0.10  # the program reads a name that was never assigned, or adds text to a number
REPAIR_RATE = 0.5  # of the crashes: writes the program anew (else guesses)
NOISE_RATE = 0.06  # prints much more than the answer
IGNORE_RATE = 0.08  # answers with a number of the problem after reading the output
TWO_CELLS_RATE = 0.25  # looks at the total half-way, which needs a stateful interpreter

CODE = "```python\n{}\n```"
OBSERVATION = "```output\n{}\n```"
ANSWER = "The answer is \\boxed{{{}}}."
GIVE_UP = "I do not know."


def teacher_trajectories(problems: Dataset, seed: int) -> Dataset:
    """Lets the teacher try each problem once, running its programs in the interpreter that the policy will use.

    A session serves many attempts, which is what makes thousands of them cheap. They cannot see each other: a program
    assigns `x` before it reads it, and the name on which the broken ones fail is never assigned.

    Args:
        problems (`Dataset`):
            From [`make_problems`].
        seed (`int`):
            Seed of the teacher's luck.

    Returns:
        `Dataset` with a `messages` column: whole conversations, with the interpreter's own words as observations.
    """
    rng = random.Random(seed)
    attempts = [_attempt(problem, rng) for problem in problems]
    sessions = min(8, os.cpu_count() or 1)
    with Sandbox() as sandbox, ThreadPoolExecutor(sessions) as pool:

        def play(attempts: list[Attempt]) -> list[list[dict[str, str]]]:
            with sandbox.open() as session:
                return [attempt.play(session) for attempt in attempts]

        size = max(1, -(-len(attempts) // sessions))
        shares = [attempts[start : start + size] for start in range(0, len(attempts), size)]
        return Dataset.from_list([{"messages": messages} for share in pool.map(play, shares) for messages in share])


@dataclass(frozen=True)
class Attempt:
    """What the teacher will do about a problem.

    Attributes:
        prompt (`list[dict]`): the problem.
        programs (`list[str]`): what it runs, one turn each.
        answer (`str`, *optional*): what it says last, unless it reads its answer off the last output.
    """

    prompt: list[dict[str, str]]
    programs: list[str]
    answer: str | None = None

    def play(self, session: Session) -> list[dict[str, str]]:
        messages, output = list(self.prompt), ""
        for code in self.programs:
            output = session.run(code).output
            messages.append({"role": "assistant", "content": CODE.format(code)})
            messages.append({"role": "user", "content": OBSERVATION.format(output)})
        total = output.strip("[]").split(",")[0]  # a noisy program prints a list
        answer = ANSWER.format(total) if self.answer is None else self.answer
        return [*messages, {"role": "assistant", "content": answer}]


def _attempt(problem: dict, rng: random.Random) -> Attempt:
    prompt, programs = problem["prompt"], list[str]()
    guess = ANSWER.format(problem["start"])
    if rng.random() < GIVES_UP_RATE:
        return Attempt(prompt, programs, GIVE_UP)
    if rng.random() < NO_CODE_RATE:
        return Attempt(prompt, programs, guess)
    program = write_program(problem, rng)
    if rng.random() < CRASH_RATE:
        programs.append("\n".join([*_broken(program, rng), "x"]))
        if rng.random() > REPAIR_RATE:
            return Attempt(prompt, programs, guess)
    if len(program) > 2 and rng.random() < TWO_CELLS_RATE:
        half = rng.randrange(2, len(program))
        programs.append("\n".join([*program[:half], "x"]))
        program = program[half:]
    noisy = rng.random() < NOISE_RATE
    programs.append("\n".join([*program, "print([x] * 12)" if noisy else "x"]))
    return Attempt(prompt, programs, guess if rng.random() < IGNORE_RATE else None)


def write_program(problem: dict, rng: random.Random) -> list[str]:
    """The teacher's reading of a problem: a line per number, each verb quoted and mistaken at its own rate."""
    lines = [f"x = {problem['start']}"]
    verbs, amounts = problem["verbs"], problem["amounts"]
    for verb, amount, step in zip(verbs, amounts, tell(verbs, amounts), strict=True):
        meaning = VERBS[verb]
        operation = meaning.wrong if rng.random() < meaning.error_rate else meaning.right
        lines.append(f"# {step}\nx {operation} {amount}")
    return lines


def _broken(program: list[str], rng: random.Random) -> list[str]:
    """The program with one line that raises: it reads a name that was never assigned, or adds text to a number."""
    line = rng.randrange(1, len(program))
    mistake = program[line].replace("\nx", "\ny") if rng.random() < 0.7 else "x += 'x'"
    return [*program[:line], mistake, *program[line + 1 :]]


def texts() -> list[str]:
    """Texts with every word of the world, for [`tiny_policy.build_tokenizer`]."""
    return [
        *(f"{name} has 1 {thing}, 1. How many {thing} now?" for name in NAMES for thing in THINGS),
        *(f"# {order} {verb.phrase.format(n=1)}, " for order in ORDER for verb in VERBS),
        *(CODE.format(f"x = 1\nx {sign} 2\nprint([x] * 12)") for sign in ("+=", "-=", "*=")),
        OBSERVATION.format("[1, 1]"),
        "NameError: name 'y' is not defined",
        "TypeError: unsupported operand type(s) for +=: 'int' and 'str'",
        ANSWER.format(1),
        GIVE_UP,
    ]
