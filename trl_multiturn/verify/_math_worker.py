"""The verifier's process: reads JSON lines, compares two LaTeX answers with math-verify, writes JSON lines.

Run as a script by `workers.WorkerPool`, never imported: it loads neither torch nor the package nor the user's program.
Its first line of input is a list of folders to import from; its first line of output says whether it is ready.
"""

import json
import os
import re
import sys
from dataclasses import replace


# math-verify calls numbers equal that agree in six decimals: 1e-7 and 2e-7, too. Numbers are compared by their size.
_RELATIVE_ERROR = 5e-7  # where a side is a decimal
_EXACT_ERROR = 1e-20


class Comparison:
    """math-verify with two sets of rules: its own, and ours where everything that can be read was read before."""

    def __init__(self):
        import logging

        import sympy
        from math_verify import LatexExtractionConfig, parse, verify

        logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off, which is what we want
        self.sympy, self._parse, self._verify = sympy, parse, verify
        self._default = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
        # units were read before; here they would be variables that vanish (`4t` would be 4)
        rules = replace(self._default.normalization_config, units=False)
        self._unitless = replace(self._default, normalization_config=rules)
        self.exact("2x", "x+x")  # what is only imported now would be on the first answer's time

    def as_library(self, gold, answer):
        """math-verify's own verdict."""
        gold = self._read(gold, self._default)
        if not gold:
            raise ValueError("the gold answer cannot be parsed")
        return self._verify(gold, self._read(answer, self._default), timeout_seconds=None, raise_on_error=True)

    def exact(self, gold, answer):
        """The same on expressions without units, and not for numbers that only round to each other."""
        golds, answers = self._expressions(gold), self._expressions(answer)
        if not golds:
            raise ValueError("the gold answer cannot be parsed")
        if not answers:
            if getattr(golds[0], "is_number", False):
                return False  # an answer that equals a number can be read
            raise ValueError("the answer cannot be parsed")
        # x < 3 and (-∞, 3) are compared, whichever is the gold answer
        options = {"timeout_seconds": None, "raise_on_error": True, "allow_set_relation_comp": True}
        same = self._verify(golds, answers, **options) and self._near(golds[0], answers[0])
        return same or self._same_solutions(golds[0], answers[0])

    def _read(self, text, config):
        return self._parse(rf"\boxed{{{text}}}", [config], extraction_mode="first_match", parsing_timeout=None)

    def _expressions(self, text):
        parsed = [item for item in self._read(text, self._unitless) if not isinstance(item, str)]
        return [self._either(self._imaginary(item), text) for item in parsed]

    def _imaginary(self, item):
        """`i` is the imaginary unit, as in 1 + 2i."""
        symbols = {symbol: self.sympy.I for symbol in getattr(item, "free_symbols", ()) if symbol.name == "i"}
        return item.subs(symbols) if symbols else item

    def _either(self, item, text):
        """`x < 2 or x > 5` is one set of numbers, not two things."""
        if not isinstance(item, self.sympy.FiniteSet) or not re.search("(?<![A-Za-z])or(?![A-Za-z])", text):
            return item
        bounds = all(isinstance(a, self.sympy.Rel) and not isinstance(a, self.sympy.Eq) for a in item.args)
        return self.sympy.Or(*item.args).as_set() if bounds else item

    def _same_solutions(self, gold, answer):
        """Whether two conditions on one variable hold for the same numbers: |x| < 2 and -2 < x < 2."""
        conditions = (self.sympy.Rel, self.sympy.And, self.sympy.Or)
        if not all(isinstance(item, conditions) and len(item.free_symbols) == 1 for item in (gold, answer)):
            return False
        real = self.sympy.Symbol("x", real=True)
        sets = [item.subs(item.free_symbols.pop(), real).as_set() for item in (gold, answer)]
        return gold.free_symbols == answer.free_symbols and sets[0] == sets[1]

    def _near(self, gold, answer):
        """Whether two numbers differ by rounding only; whatever else they are passes."""
        if not (getattr(gold, "is_number", False) and getattr(answer, "is_number", False)):
            return True
        gold, answer = gold.doit(), answer.doit()
        decimal = gold.has(self.sympy.Float) or answer.has(self.sympy.Float)
        one, other = self.sympy.N(gold, 40), self.sympy.N(answer, 40)
        if one == other:  # infinities
            return True
        size = max(abs(one), abs(other))
        return bool(abs(one - other) <= (_RELATIVE_ERROR if decimal else _EXACT_ERROR) * size)


def main():
    import signal

    requests = sys.stdin
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not write into the protocol

    start = json.loads(requests.readline())
    sys.path.extend(folder for folder in start["path"] if folder not in sys.path)
    try:
        comparison = Comparison()
    except Exception as error:
        replies.write(json.dumps({"ready": False, "error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    replies.write('{"ready": true}\n')

    # The pool kills a worker that is late. Should the trainer itself be gone by then, the default action of the alarm
    # ends the process, even inside a C function that holds the interpreter's lock.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in requests:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, job["seconds"] + 1.0)
        try:
            equal = comparison.as_library if job.get("as_library") else comparison.exact
            reply = {"equal": bool(equal(job["gold"], job["answer"]))}
        except Exception as error:  # RecursionError among them: no verdict
            reply = {"equal": None, "error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
