"""A tool with a namespace per session, and a policy that follows a tree: for tests in which state matters."""

from __future__ import annotations

from collections import Counter

from tests.support import byte_tokenizer
from trl_multiturn.rollout import ScriptedEngine
from trl_multiturn.tools import ToolFailure, ToolResult


TOKENIZER = byte_tokenizer("qwen2_5")


def code(text):
    return f"```python\n{text}\n```"


def boxed(text):
    return f"\\boxed{{{text}}}"


class Notebook:
    """A session tool with a namespace per session; `print` is the only output."""

    name = "python"
    version = "notebook-1"
    schema = {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Runs code.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "Code."}},
                "required": ["code"],
            },
        },
    }

    def __init__(self):
        self.opened, self.open_now, self.most_open = 0, 0, 0

    def open(self):
        self.opened += 1
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        return NotebookSession(self)


class NotebookSession:
    def __init__(self, notebook):
        self.notebook, self.names, self.closed = notebook, {}, False

    def run(self, code):
        assert not self.closed
        if "fail" in code:
            raise ToolFailure("the machine is gone")
        lines = []
        exec(code, {"print": lambda *values: lines.append(" ".join(map(str, values)))}, self.names)
        return ToolResult("\n".join(lines))

    def close(self):
        assert not self.closed
        self.closed = True
        self.notebook.open_now -= 1


def policy(tree, **kwargs):
    """Plays the options of the key that occurs last in the text so far, in turn; `""` is the key before all others."""
    visits = Counter()

    def script(prompt_text, sampling, session):
        spoken = prompt_text.partition("Question?")[2]
        place = max(tree, key=lambda key: spoken.rfind(key) if key else -1)
        options = tree[place]
        visits[place] += 1
        return options[(visits[place] - 1) % len(options)]

    return ScriptedEngine(script, TOKENIZER, logp=-0.5, **kwargs)
