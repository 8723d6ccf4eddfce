r"""One notation for many: what people and models write is brought to plain LaTeX before anything is compared.

Each rule changes how an answer is written, never what it says. The table is the whole list, with a reason each.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple


_SYMBOLS = {
    "−": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ",
    "∕": "/", "⁄": "/", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≅": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ",
    "→": r"\to ", "⇒": r"\to ",
    "∅": r"\emptyset ", "ℝ": r"\mathbb{R} ", "ℤ": r"\mathbb{Z} ", "°": r"^{\circ}", "º": r"^{\circ}", "′": "'",
    "’": "'", "‘": "'", "″": '"', "“": '"', "”": '"', "«": '"', "»": '"', "⟨": "(", "⟩": ")", "√": r"\sqrt",
}  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_TEXT_COMMANDS = "text|textrm|textbf|textit|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mathnormal"


_NESTED = r"(?:[^{}]|\{[^{}]*\})*"  # with braces of one level


class Rule(NamedTuple):
    """One change of notation: every match of `pattern` becomes `replacement`."""

    reason: str
    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]


_FUNCTIONS = "ln|log|exp|sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan"


def _rule(reason: str, pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> Rule:
    return Rule(reason, re.compile(pattern), replacement)


def _text_or_symbol(match: re.Match[str]) -> str:
    """Words stay words, and so do upright letters, which may be units; numbers and variables are only printed so."""
    inner = match[2].strip()
    variable = len(inner) == 1 and (inner in "eid" or match[1] not in ("text", "textrm", "mathrm"))
    return match[2] if variable or not re.search("[A-Za-z]", inner) else rf"\text{{{match[2]}}}"


_ARGUMENT = r"(?:(\d|[A-Za-z](?![A-Za-z])|\\[a-z]+(?![A-Za-z{[]))|\{([^{}]*)\})"  # one token, or braces


def _bracketed(match: re.Match[str]) -> str:
    return rf"\frac{{{match[1] or match[2]}}}{{{match[3] or match[4]}}}"


LAYOUT = (
    _rule("a size is no meaning", r"\\m?(?:left|right|[bB]ig{1,2}[lrm]?)(?![A-Za-z])\s*\.?", ""),
    _rule("a style is no meaning", r"\\(?:display|text|script)style(?![A-Za-z])|\\(?:no)?limits(?![A-Za-z])", ""),
    _rule("a negative space joins: `1\\!\\,000`", r"\\!", ""),
    _rule("a space is a space", r"(?<!\\)\\(?:[,;:> ]|q?quad(?![A-Za-z])|enspace|thinspace)|(?<=\S)~|\s+", " "),
    _rule("braces keep LaTeX from spacing a comma: `1{,}000`", r"\{\s*,\s*\}", ","),
    _rule("comments of the typesetter", r"\\(?:tag|label|phantom|hspace)\*?\{[^{}]*\}", ""),
    _rule("a color is no meaning", r"\\(?:text)?color\{[^{}]*\}", ""),
    _rule("fractions of three sizes", r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    _rule("a fraction without braces", rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}", _bracketed),
    _rule("underlined or bold is the same", r"\\(?:underline|boldsymbol|bm|emph)\s*\{([^{}]*)\}", r"\1"),
    _rule("one command for words", rf"\\({_TEXT_COMMANDS}|mbox|hbox)\s*\{{({_NESTED})\}}", _text_or_symbol),
    _rule("degrees", r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degrees?(?![A-Za-z])", r"^{\\circ}"),
    _rule("degrees, typed with a letter", r"(?<=\d)\s*\^\s*(?:o(?![A-Za-z])|\{\s*o\s*\})", r"^{\\circ}"),
    _rule("a remainder", r"\\bmod(?![A-Za-z])", r"\\mod"),
    _rule("one empty set", r"\\varnothing(?![A-Za-z])|\\O(?![A-Za-z])", r"\\emptyset"),
    _rule("angle brackets of vectors", r"\\langle(?![A-Za-z])", "("),
    _rule("angle brackets of vectors", r"\\rangle(?![A-Za-z])", ")"),
    _rule("an escaped percent sign", r"(?<!\\)%", r"\\%"),
    _rule("the logarithm to the base e", r"\\log_\{?e\}?(?![A-Za-z])", r"\\ln"),
)
"""Rules about LaTeX."""

KEYBOARD = (
    _rule("a power in Python's way", r"\*\*\s*\(([^()]*)\)|\*\*\s*(-?\w+)", r"^{\1\2}"),
    _rule("a product in Python's way", r"\s*\*\s*", r" \\cdot "),
    _rule("a root as a function", r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    _rule("a root sign before a number", r"\\sqrt\s*(\d+(?:\.\d+)?|[A-Za-z])(?![\d}])", r"\\sqrt{\1}"),
    _rule("a root sign before brackets", r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    _rule("a function from the keyboard", rf"(?<![A-Za-z\\])({_FUNCTIONS})(?=\s*[(\d])", r"\\\1"),
    _rule("a name from the keyboard", r"(?<![A-Za-z\\])(pi|infinity|theta)(?![A-Za-z])", r"\\\1 "),
    _rule("relations from the keyboard", r"<\s*=", r"\\le "),
    _rule("relations from the keyboard", r">\s*=", r"\\ge "),
    _rule("relations from the keyboard", r"!=", r"\\ne "),
    _rule(
        "a function of degrees",
        r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{?-?\d\}?)?\s*[({]?\s*)(\d+(?:\.\d+)?)\s*\^\{\\circ\}",
        r"\1(\\frac{\2 \\pi}{180})",
    ),
    _rule("one name of infinity", r"\\infinity", r"\\infty"),
    _rule("a power of several digits", r"\^(-?\d{2,})", r"^{\1}"),
)
"""Rules about what is typed without LaTeX."""

MARKUP = (
    _rule("Markdown's bold", r"(?<![\w)}*\]])\*\*(?=\S)([^*]+)(?<=\S)\*\*(?![\w({*])", r"\1"),
    _rule("Markdown's bold", r"(?<![\w)}\]])__(?=\S)([^_]+)(?<=\S)__(?!\w)", r"\1"),
    _rule("Markdown's italics", r"^\*(?=\S)([^*]+)(?<=\S)\*$|^_([^_]+)_$", r"\1\2"),
    _rule("Markdown's code", r"`+([^`]+)`+", r"\1"),
    _rule("math delimiters", r"(?<!\\)\\[\[(](.*?)(?<!\\)\\[\])]", r" \1 "),
    _rule("math delimiters", r"\$\$(.+?)\$\$", r" \1 "),
    _rule("math delimiters", r"(?<!\\)\$(?=\S)([^$]*[^\s$\\])\$(?!\d)", r"\1"),
    _rule("a dollar sign that stands for money", r"\\?\$", r"\\$"),
)
"""Rules about Markdown and math delimiters."""

WHOLE = (
    _rule("a box in a box", r"^\\f?box(?:ed)?\s*\{(.*)\}$", r"\1"),
    _rule("an answer in words", r"^\\text\s*\{([^{}]*)\}$", r"\1"),
    _rule("math delimiters", r"^\\\$([^$]*)\\\$$", r"\1"),
    _rule("GSM8K's mark of an answer", r"^#{2,}\s*", ""),
    _rule("quotation marks", r"^([\"'])(?=\S)([^\"']+)\1$", r"\2"),
    _rule("braces that group everything", r"^\{([^{}]*)\}$", r"\1"),
    _rule("a number in parentheses", r"^\(\s*([+-]?[\d.]+)\s*\)$", r"\1"),
    _rule("the modulus is in the question", r"\s*(?:\\pmod\s*\{[^{}]*\}|\(\s*\\?mod\s*\w+\s*\))$", ""),
    _rule("a set told by a condition is the condition",
          r"^\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|:|\|)(.*(?:[<>]|\\[lg]e).*)\\\}$", r"\1"),
    _rule("a line break at the end", r"\s*\\+$", ""),
    _rule("a full stop ends a sentence", r"[,;:?]+$|(?<!\.)\.$", ""),
    _rule("an estimate is told by its number",
          r"^(?:\\approx|\\sim|\\(?:right|Right)arrow|\\to|~|=|:)(?![A-Za-z])\s*(?=\S)", ""),
    _rule("an exact answer is told by its number", r"(?i)^(?:exactly|only|just)\s+(?=[\d\\$.+-])", ""),
    _rule("an estimate is told by its number",
          r"(?i)^(?:about|around|approximately|approx\.?|roughly|nearly|almost)\s+(?=[\d\\$.+-])", ""),
)  # fmt: skip
"""Rules about what surrounds all of an answer."""


def _characters(text: str) -> str:
    """Typographic characters as LaTeX: raised and lowered digits, fractions, signs, Greek letters, odd spaces."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: "^{" + match[0].translate(_RAISED) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + match[0].translate(_LOWERED) + "}", text)
    text = re.sub(r"(?<!\w)[–—]\s*(?=[\d.\\$])", "-", text)  # between two words or numbers it may mean a range
    return "".join(map(_character, text))


def _character(character: str) -> str:
    if character.isascii():
        return character
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    plain = unicodedata.normalize("NFKC", character)
    if "⁄" in plain:  # ½ and its like
        return r"\frac{{{}}}{{{}}}".format(*plain.split("⁄"))
    name = unicodedata.name(character, "")
    if name.startswith("GREEK SMALL LETTER ") and name.count(" ") == 3:
        return "\\" + name.rpartition(" ")[2].lower().replace("lamda", "lambda") + " "
    return "" if unicodedata.category(character) == "Cf" else plain


def normalize(text: str) -> str:
    r"""An answer in one notation: LaTeX without layout, `\text{…}` for words, `\%`, `\$` for money.

    Nothing is evaluated. Applying it twice changes nothing more.
    """
    text = _apply(MARKUP, text.strip())
    text = _apply(LAYOUT, _characters(text))
    text = _apply(KEYBOARD, _unwrap(text))
    return re.sub(" +", " ", text).strip()


def _apply(rules: Iterable[Rule], text: str) -> str:
    for rule in rules:
        text = rule.pattern.sub(rule.replacement, text)
    return text


def _unwrap(text: str) -> str:
    """The text without what surrounds all of it."""
    before = None
    while text != before:
        before, text = text, _apply(WHOLE, text).strip()
    return text


def words(text: str) -> str:
    r"""A normalized answer as it reads: without `\text{…}`, and with signs in place of their escapes."""
    text = re.sub(rf"\\text\{{({_NESTED})\}}", r" \1 ", text)
    return re.sub(" +", " ", text.replace(r"\%", "%").replace(r"\$", "$")).strip()
