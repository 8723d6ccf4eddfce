"""Draws the pictures of the documentation: `python docs/pictures/draw.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path


HERE = Path(__file__).parent
ACTION, CONTEXT, LINE, GOOD, BAD, PLAIN = "#1a7f5a", "#80858f", "#70757f", "#1a7f5a", "#c2410c", "#4a6fc4"
HEIGHT, CHARACTER = 30, 7.4  # of a box; of a letter at 12 px


class Picture:
    """Boxes and words, placed by hand; readable on light and on dark pages."""

    def __init__(self, height: int, width: int = 760):
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, text: str, color: str, filled: bool = True) -> float:
        """Returns where the box ends."""
        fill, ink = (color, "#ffffff") if filled else ("none", color)
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT}" rx="4" fill="{fill}" stroke="{color}"/>'
        )
        self.word(x + width / 2, y + 19.5, text, ink, "middle")
        return x + width

    def strip(self, x: float, y: float, *pieces: tuple[str, str]) -> float:
        """Boxes in a row, outlined where they are context. Returns where the last one ends."""
        for text, color in pieces:
            x = self.box(x, y, len(text) * CHARACTER + 14, text, color, color != CONTEXT) + 4
        return x - 4

    def word(self, x: float, y: float, text: str, color: str = LINE, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.path(f"M{x:g} {y:g} L{to_x:g} {to_y:g}")

    def path(self, path: str) -> None:
        self.parts.append(f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#head)"/>')

    def save(self, name: str) -> None:
        (HERE / f"{name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="ui-monospace, monospace" font-size="12">\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto">'
            f'<path d="M0 0 8 4 0 8z" fill="{LINE}"/></marker></defs>\n' + "\n".join(self.parts) + "\n</svg>\n",
            encoding="utf-8",
        )


def trajectory() -> None:
    p = Picture(70)
    turns = [("turn 1: code", ACTION), ("observation", CONTEXT), ("turn 2: code", ACTION), ("observation", CONTEXT)]
    p.strip(4, 8, ("prompt", CONTEXT), *turns, ("turn 3: answer", ACTION))
    p.word(4, 60, "read by the policy: outlined", CONTEXT)
    p.word(250, 60, "sampled by the policy: filled", ACTION)
    p.save("trajectory")


def turn() -> None:
    p = Picture(70)
    sampled = [(text, ACTION) for text in ("17", "*", "23", "= 391.", "<|im_end|>")]
    p.strip(4, 8, ("<|im_start|>assistant", CONTEXT), *sampled, ("line break", CONTEXT))
    p.word(4, 60, "generation prompt", CONTEXT)
    p.word(178, 60, "the turn: what is sampled, its end-of-turn token included", ACTION)
    p.save("turn")


def mask() -> None:
    p, x = Picture(72), 4.0
    read, sampled = (
        "user 17*23? assistant|output 391 assistant".split("|"),
        "print (17*23) <end>|It is 391. <end>".split("|"),
    )
    for context, actions in zip(read, sampled, strict=True):
        for text, on in [(text, 0) for text in context.split()] + [(text, 1) for text in actions.split()]:
            width = len(text) * CHARACTER + 6
            p.box(x, 8, width, text, ACTION if on else CONTEXT, bool(on))
            p.word(x + width / 2, 60, str(on), ACTION if on else CONTEXT, "middle")
            x += width + 3
    p.save("mask")


def segment() -> None:
    p = Picture(96)
    end = p.strip(4, 30, ("prompt", CONTEXT))
    p.arrow(end, 40, end + 24, 23)
    p.arrow(end, 50, end + 24, 67)
    p.strip(end + 28, 8, ("thinking", ACTION), ("call", ACTION))
    p.strip(end + 28, 52, ("call", CONTEXT), ("observation", CONTEXT), ("thinking", ACTION), ("answer", ACTION))
    p.word(480, 28, "segment 1: as turn 1 was sampled")
    p.word(480, 72, "segment 2: as turn 2 was read")
    p.save("segment")


def verdict() -> None:
    p = Picture(112)
    p.box(4, 40, 110, "trajectory", PLAIN, False)
    p.arrow(114, 55, 150, 55)
    p.box(154, 40, 140, "reward functions", PLAIN, False)
    verdicts = [("correct", GOOD, "may win a pair"), ("incorrect", BAD, "may lose a pair")]
    for y, (text, color, what) in zip((4, 40, 76), [*verdicts, ("undecided", CONTEXT, "trains nothing")], strict=True):
        p.arrow(294, 55, 340, y + 15)
        p.box(344, y, 100, text, color, color != CONTEXT)
        p.word(456, y + 19, what)
    p.save("verdict")


def reference() -> None:
    p, x = Picture(112), 4
    for t in range(3):
        p.box(x, 8, 110, f"policy {t}", ACTION)
        p.arrow(x + 110, 23, x + 206, 23)
        p.word(x + 156, 16, f"iteration {t + 1}", LINE, "middle")
        p.arrow(x + 55, 38, x + 55, 68)
        p.word(x + 62, 58, "log-probabilities")
        p.box(x, 72, 190, f"rows {t + 1}: reference", CONTEXT, False)
        x += 210
    p.box(x, 8, 110, "policy 3", ACTION)
    p.save("reference")


def journal() -> None:
    p = Picture(116)
    lines = ["prompt 0, sample 2: correct, seed, policy, checksum", "prompt 3, sample 0: incorrect, ..."]
    for row, text in enumerate([*lines, "prompt 1, sample 1: undecided, ..."]):
        p.box(4, 4 + 36 * row, 420, text, PLAIN, False)
    p.arrow(660, 91, 430, 91)
    p.word(476, 84, "appended when it finishes")
    p.word(440, 24, "kill -9 loses what is under way, no more")
    p.save("journal")


def loop() -> None:
    p, x = Picture(96, 800), 4.0
    for step in ("roll out", "verify", "filter", "pair", "reference", "train", "save", "evaluate"):
        if x > 4:
            p.arrow(x - 18, 23, x - 2, 23)
        x = p.box(x, 8, len(step) * CHARACTER + 18, step, ACTION if step == "train" else PLAIN, step == "train") + 18
    p.path(f"M{x - 60:g} 38 V66 H42 V42")
    p.word(x / 2, 86, "the next iteration, with the policy as it is now", LINE, "middle")
    p.save("loop")


if __name__ == "__main__":
    for draw in (trajectory, turn, mask, segment, verdict, reference, journal, loop):
        draw()
