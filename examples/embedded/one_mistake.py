"""Near misses without a model: gold solutions in which one step goes wrong and everything after it follows correctly.

Recorded solutions with verdicts are few. What tells a right one from a wrong one of the same problem (a number of the
problem that was never used, a step that is missing, a quotient where a product belongs) can be learned from other
problems of which only the gold solution is known: each gets company that is wrong in one place. And a problem asks the
same with other numbers in it, so that it can be told again and again without being learned by heart.
"""

from __future__ import annotations

import ast
import operator
import random
import re


# `<<expr=value>>`, a calculator's call and its answer; the value is what follows the last equals sign
MARK = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
NUMBER = re.compile(r"(?<![\d.])\d+(?:\.\d+)?(?!\d|\.\d)")

# Taken from general knowledge (days, months, percent), so that one in the question may mean something else there
_COMMON = {"1", "2", "7", "10", "12", "24", "60", "100"}
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_WRITTEN = {"+": r"\+", "-": "-", "*": r"(?:\*|x|X)", "/": "/"}  # in the words before the mark


def one_mistake(question: str, solution: str, rng: random.Random) -> tuple[str, str] | None:
    """Makes one mistake in a solution with calculator marks.

    The mistake is one of three: the solution stops a step early, takes another operator, or takes another number (of
    the question, or of a step before). After the last two the numbers of later steps follow.

    Args:
        question (`str`):
            The problem, which has numbers to take by mistake.
        solution (`str`):
            Lines with marks, e.g. `He has 3 + 4 = <<3+4=7>>7.`
        rng (`random.Random`):
            Chooses the mistake.

    Returns:
        The solution and its answer, which may happen to be the right one; `None` where the mistake that was chosen
        cannot be made in this solution.
    """
    lines = solution.split("\n")
    steps = [index for index, line in enumerate(lines) if MARK.search(line)]
    kind = rng.choice(("stop early", "operator", "operator", "number", "number", "number"))
    if len(steps) < (2 if kind == "stop early" else 1):
        return None
    if kind == "stop early":
        lines = lines[: steps[-1]]
    else:
        lines = _go_astray(question, lines, rng.choice(steps), kind, rng)
    text = "\n".join(lines or ())
    answers = [value.strip() for _, value in MARK.findall(text)]
    return (text, answers[-1]) if answers else None


def other_numbers(question: str, solution: str, rng: random.Random) -> tuple[str, str, str] | None:
    """Tells a problem with other numbers, and solves it in the same words.

    Args:
        question (`str`):
            The problem.
        solution (`str`):
            Lines with marks, which take their numbers from the question, from steps before, or from general knowledge.
        rng (`random.Random`):
            Chooses the numbers.

    Returns:
        Question, solution and answer; `None` where some number comes from elsewhere, may mean two things, or no other
        numbers were found with which every result stays positive, and an integer where it was one.
    """
    asked, results, used = set(NUMBER.findall(question)), set(), set()
    for expression, value in MARK.findall(solution):
        literals = set(NUMBER.findall(expression))
        if not literals <= asked | results | _COMMON or calculate(expression) != value.strip():
            return None
        used |= literals
        results.add(value.strip())
    free = sorted(n for n in asked & used - results - _COMMON if n.isdigit() and int(n))
    if not free or not results or re.search(r"\d,\d", question + solution):
        return None
    for _ in range(20):
        followed = {n: _another(int(n), rng) for n in free if rng.random() < 0.6}
        changed = any(old != new for old, new in followed.items())
        told = _solve_again(solution, dict(followed), asked) if changed else None
        if told is not None:
            return _follow(question, followed), *told
    return None


def _another(number: int, rng: random.Random) -> str:
    """A number of about the same size, and round where the old one is."""
    unit = next(unit for unit in (100, 10, 5, 1) if number % unit == 0)
    return str(max(unit, unit * rng.randint(number // (2 * unit), 2 * number // unit)))


def _solve_again(solution: str, followed: dict[str, str], asked: set[str]) -> tuple[str, str] | None:
    """The solution with the numbers of `followed` and what follows from them, and its last result."""
    pieces, end, value = [], 0, None
    for mark in MARK.finditer(solution):
        expression, old = _follow(mark[1], followed), mark[2].strip()
        value = calculate(expression)
        if value is None or float(value) <= 0 or ("." in value) != ("." in old):
            return None
        if followed.get(old, old if old in asked else value) != value:
            return None  # one number would have to become two
        pieces += [_follow(solution[end : mark.start()], followed), f"<<{expression}={value}>>"]
        followed[old] = value
        end = mark.end()
    return "".join([*pieces, _follow(solution[end:], followed)]), value


def _go_astray(question: str, lines: list[str], step: int, kind: str, rng: random.Random) -> list[str] | None:
    """Changes the first calculation of line `step`, and calculates everything after it again."""
    known = [*NUMBER.findall(question), *(value for line in lines[:step] for _, value in MARK.findall(line))]
    followed: dict[str, str] = {}  # numbers as they were, and as they are now
    mistaken = False
    result = lines[:step]
    for line in lines[step:]:
        pieces, end = [], 0
        for mark in MARK.finditer(line):
            words, expression = _follow(line[end : mark.start()], followed), _follow(mark[1], followed)
            if not mistaken:
                changed = _swap(expression, words, known, kind, rng)
                if changed is None:
                    return None
                (expression, words), mistaken = changed, True
            value = calculate(expression)
            if value is None:
                return None
            if value != mark[2]:
                followed[mark[2].strip()] = value
            pieces += [words, f"<<{expression}={value}>>"]
            end = mark.end()
        result.append("".join([*pieces, _follow(line[end:], followed)]))
    return result


def _follow(text: str, followed: dict[str, str]) -> str:
    return NUMBER.sub(lambda number: followed.get(number[0], number[0]), text)


def _swap(expression: str, words: str, known: list[str], kind: str, rng: random.Random) -> tuple[str, str] | None:
    """An expression with another operator or number, and the words before it, which say it, too."""
    if kind == "number":
        numbers = list(NUMBER.finditer(expression))
        if not numbers or not known:
            return None
        old, new = rng.choice(numbers), rng.choice(known)
        words = re.sub(rf"(?<![\d.]){re.escape(old[0])}(?!\d)", new, words)
        swapped = expression[: old.start()] + new + expression[old.end() :]
        return None if new == old[0] else (swapped, words)
    places = [place for place, sign in enumerate(expression) if place and sign in _WRITTEN]
    if not places:
        return None
    place = rng.choice(places)
    old, new = expression[place], rng.choice([sign for sign in _WRITTEN if sign != expression[place]])
    left, right = expression[:place].strip("( ")[-3:], expression[place + 1 :].strip(") ")[:3]
    spoken = re.compile(rf"({re.escape(left)}\s*){_WRITTEN[old]}(\s*\$?{re.escape(right)})")
    if not spoken.search(words):
        return None  # the words would still say the right operation, which no real solution does
    swapped = expression[:place] + new + expression[place + 1 :]
    return swapped, spoken.sub(lambda match: match[1] + new + match[2], words)


def calculate(expression: str) -> str | None:
    """The value of an arithmetic expression as GSM8K writes it; `None` where it has none below ten million."""
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) < 1e7 else None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{ast.dump(node)} is no arithmetic.")
