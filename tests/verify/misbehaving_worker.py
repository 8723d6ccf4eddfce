r"""The verifier's own worker, in which two gold answers misbehave: `\mathcal{S}` spins, `\mathcal{G}` grows.

They stand for an expression that sympy works on for hours or fills the memory with; both do no more than that.
"""

import importlib.util
from pathlib import Path


SPINS, GROWS = r"\mathcal{S}", r"\mathcal{G}"


def main():
    package = Path(importlib.util.find_spec("trl_multiturn").origin).parent
    spec = importlib.util.spec_from_file_location("math_worker", package / "verify" / "_math_worker.py")
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)

    class Misbehaving(worker.Comparison):
        def exact(self, gold, answer):
            grown = bytearray(400 << 20) if gold == GROWS else bytearray()
            while gold in (SPINS, GROWS):
                grown[::4096] = grown[::4096]  # stays in memory
            return super().exact(gold, answer)

    worker.Comparison = Misbehaving
    worker.main()


if __name__ == "__main__":
    main()
