"""What the warm interpreter imports and touches before sessions are forked, so that they find it done.

Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable


WARM_UP = {
    "numpy": "import numpy.random, numpy.linalg, numpy.polynomial, numpy.fft",
    "sympy": "x, y = sympy.symbols('x y')\n"
    "sympy.solve(x**2 - 5 * x + 6, x), sympy.simplify((x + 1) ** 2 - x**2), str(sympy.Rational(1, 3) + x)\n"
    "sympy.sqrt(8), sympy.factorint(60), sympy.integrate(x, (x, 0, 1)), sympy.Eq(x, y), sympy.N(sympy.pi, 20)\n"
    "sympy.solve([x + y - 3, x - y - 1], [x, y]), sympy.expand((x + 1) ** 3), sympy.latex(x / 2)",
}
STANDARD = (
    "asyncio array bisect calendar cmath collections concurrent.futures copy csv dataclasses datetime decimal enum "
    "fractions functools hashlib heapq inspect io itertools json math numbers operator pickle pprint queue random re "
    "secrets statistics string textwrap threading timeit types typing unicodedata uuid zoneinfo"
).split()


def import_modules(preload: Iterable[str], kernels: bool) -> None:
    """Imports what cells commonly import; modules that are absent are left for the cell to complain about."""
    if kernels:
        sys.modules["debugpy"] = None  # a debugger costs every kernel a tenth of a second
    for name in (*STANDARD, *preload):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def warm_up() -> None:
    """Runs typical code once: lazy imports and caches would otherwise cost every session anew."""
    for name, code in WARM_UP.items():
        if name in sys.modules:
            exec(code, {name: sys.modules[name]})
