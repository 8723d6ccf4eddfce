"""The program of the warm interpreter: `python -P start.py FD`, where FD is the socket of its owner.

It loads the folder of this file as a package named `_trl_multiturn_inside`. Neither the folder nor `trl_multiturn`
becomes importable for the sessions.
"""

from __future__ import annotations

import importlib.util
import os
import sys


def main() -> None:
    folder = os.path.dirname(os.path.abspath(__file__))
    name = "_trl_multiturn_inside"
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    importlib.import_module(f"{name}.zygote").main()


if __name__ == "__main__":
    main()
