"""A copy of this Python, and of this checkout, that any user of the machine can run.

A Python below a home folder (pyenv, conda, a runner's cache) is closed to everybody else, and so are many checkouts.
Tests that give up root's rights on purpose therefore take a copy along.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import sysconfig
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


_CHECKOUT = Path(__file__).parents[2]
# what no cell imports (`third_party`: jedi's stubs), and what only another optimisation level would read
_LEFT_OUT = shutil.ignore_patterns(
    "test", "tests", "idlelib", "lib2to3", "tkinter", "ensurepip", "turtledemo", "config-*", "site-packages",
    "dist-packages", "third_party", "*.a", "*.opt-?.pyc",
)  # fmt: skip


class PortablePython:
    """Copies an interpreter, the distributions it needs, and the package's and the tests' sources.

    The interpreter is a virtual environment, as most users' are. `python` starts it, `checkout` is where the sources
    are (outside of what the interpreter calls its own), and `environment` is what it needs to find both.

    Args:
        requirements (`tuple[str, ...]`):
            Distributions to take along, with everything that they require.
    """

    def __init__(self, requirements: tuple[str, ...]) -> None:
        self.root = _reachable_folder()
        try:
            base, venv, self.checkout = self.root / "base", self.root / "venv", self.root / "checkout"
            self.python = self._copy_interpreter(base, venv)
            for path in _distributed(requirements):
                _copy(path, venv / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages" / path.name)
            for name in ("trl_multiturn", "tests/sandbox"):
                _copy(_CHECKOUT / name, self.checkout / name)
            _open_to_everybody(self.root)
        except BaseException:
            self.remove()
            raise
        self.environment = {"PYTHONPATH": str(self.checkout), "LD_LIBRARY_PATH": str(base / "lib")}

    @staticmethod
    def _copy_interpreter(base: Path, venv: Path) -> Path:
        name = f"python{sysconfig.get_python_version()}"
        _copy(Path(sys._base_executable).resolve(), base / "bin" / name)
        library = Path(sysconfig.get_path("stdlib"))
        _copy(library, base / library.relative_to(sys.base_prefix))
        for shared in Path(sys.base_prefix, "lib").glob("libpython*.so*"):
            _copy(shared, base / "lib" / shared.name)
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / name).symlink_to(base / "bin" / name)
        (venv / "pyvenv.cfg").write_text(f"home = {base / 'bin'}\ninclude-system-site-packages = false\n")
        return venv / "bin" / name

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def _reachable_folder() -> Path:
    """A new folder to which everybody has the way; raises `OSError` where there is none."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        resolved = Path(parent).resolve()
        if all(path.exists() and path.stat().st_mode & stat.S_IXOTH for path in (resolved, *resolved.parents)):
            return Path(tempfile.mkdtemp(prefix="portable-python-", dir=resolved))
    raise FileNotFoundError("no folder for temporary files is open to every user")


def _distributed(requirements: tuple[str, ...]) -> set[Path]:
    """Packages, modules and metadata that the distributions and their requirements have installed."""
    pending, seen, found = [Requirement(name) for name in requirements], set(), set()
    while pending:
        requirement = pending.pop()
        if requirement.name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:  # not all that is required is installed everywhere; the copy is no worse
            continue
        pending += [Requirement(text) for text in installed.requires or ()]
        found |= {Path(installed.locate_file(file.parts[0])) for file in installed.files or ()}
    return {path for path in found if path.name not in ("..", "__pycache__") and path.exists()}


def _copy(source: Path, target: Path) -> None:
    """With the times of the files: their compiled forms stay valid."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=_LEFT_OUT)
    else:
        shutil.copy2(source, target)


def _open_to_everybody(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            mode = os.stat(path).st_mode
            wanted = mode | 0o444 | (0o111 if mode & stat.S_IXUSR else 0)
            if wanted != mode:
                os.chmod(path, wanted)
