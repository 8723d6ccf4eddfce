"""A small run on disk, made by the loop's own parts: rolled out by a script, judged, selected, with a reference."""

from __future__ import annotations

import re
from pathlib import Path

from datasets import Dataset, load_from_disk

from tests.rollout.test_loop import Echo, EchoSession
from tests.support import byte_tokenizer
from trl_multiturn import PairingConfig, RolloutConfig, ScriptedEngine, UnpairedConfig, generate_trajectories
from trl_multiturn.iteration import find_rows
from trl_multiturn.journal.evaluations import write_evaluation
from trl_multiturn.journal.run_folder import RunFolder
from trl_multiturn.online.report import save_start
from trl_multiturn.rows import save_rows
from trl_multiturn.sandbox import ToolResult


# A merge, so that tokens are longer than a byte, and the bytes of "é" (Ã and ©) stay apart
TOKENIZER = byte_tokenizer("qwen2_5", merges=[("t", "h"), ("th", "e"), ("Ġ", "the")])

HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script></script><b>bold</b> &amp; '
    "\x1b[31mred\x1b[0m \u202edesrever\u202c zero\u200bwidth café {{title}} --> ]]>"
)


class VariedEngine(ScriptedEngine):
    """A scripted engine whose log-probabilities tell tokens apart: -0.1 times the last digit of the id."""

    def _play(self, turn, sampling):
        ids, reason = super()._play(turn, sampling)
        self.logp = 0.0
        self.last = [-(token % 10) / 10 for token in ids]
        return ids, reason

    async def generate(self, prompt_ids, sampling, *, session=None):
        generation = await super().generate(prompt_ids, sampling, session=session)
        return type(generation)(generation.token_ids, self.last, generation.finish_reason)


def play(prompt_text, sampling, session):
    """Sample 0 is right, but for question 2; sample 1 repeats it; 2 is wrong after an error; 3 is hostile."""
    question = int(re.search(r"question (\d+)", prompt_text)[1])
    sample = int(session.rpartition("/")[2])
    if sample == 3:
        return HOSTILE
    right = sample < 2 and question != 2
    if "```output" not in prompt_text:
        return f"Let the machine do it.\n```python\ncompute({question}, {right})\n```"
    return f"So the answer is \\boxed{{{question if right else question + 1}}}."


class Machine(Echo):
    """The interpreter: what is computed wrongly is an error."""

    def open(self):
        return MachineSession(self.reply)


class MachineSession(EchoSession):
    async def arun(self, code):
        return ToolResult(HOSTILE, "ok" if "True" in code else "error", 0.25)


def judge(completions, answer, **kwargs):
    """The answer of the last message, compared."""
    said = [re.search(r"boxed\{(\d+)\}", completion[-1]["content"]) for completion in completions]
    return [float(found is not None and found[1] == gold) for found, gold in zip(said, answer, strict=True)]


def prompts(count=3):
    return [
        {"prompt": [{"role": "user", "content": f"This is question {i} of the run."}], "answer": str(i)}
        for i in range(count)
    ]


def roll_out(script=play, count=3, **kwargs):
    settings = {"num_generations": 4, **kwargs.pop("settings", {})}
    return generate_trajectories(
        prompts(count), VariedEngine(script, TOKENIZER), [Machine()], RolloutConfig(dialect="fenced", **settings),
        reward_funcs=[judge], progress=False, **kwargs,
    )  # fmt: skip


def make_run(output: Path, iterations=2, pairing=None, row_format="preference", **kwargs) -> Path:
    """Writes a run with its tokenizer, and gives back its `output_dir`."""
    run = RunFolder(output / "rollouts")
    pairing = pairing or PairingConfig(max_pairs_per_prompt=2, filters=["turn_without_code"])
    for number in range(iterations):
        folder = run.iteration(number)
        roll_out(journal=folder.journal, iteration=number, policy_revision=f"revision {number}", **kwargs)
        report = find_rows(folder.journal, folder, None, pairing, row_format)
        rows = load_from_disk(folder.rows)
        save_rows(with_reference(rows), folder.training_rows)
        report.iteration, report.rows, report.trained_rows = number, len(rows), len(rows)
        report.policy_revision = f"revision {number}"
        report.settings = {"reference": "previous", "pairing": {"kind": type(pairing).__name__}}
        report.evaluation = {"pass@1": 0.5 + number / 4, "pass@1_se": 0.05}
        report.save(folder.path)
        write_evaluation(run, number + 1, evaluate(number + 1))
    write_evaluation(run, 0, evaluate(0))
    save_start(run.path, {"policy_revision": "revision 0", "evaluation": {"pass@1": 0.25, "pass@1_se": 0.04}})
    TOKENIZER.save_pretrained(output)
    return output


def evaluate(number):
    """One greedy trajectory per prompt; those of the first policy are wrong."""
    return roll_out(lambda *call: "\\boxed{99}" if not number else play(*call), policy="evaluation-greedy",
                    settings={"num_generations": 1})  # fmt: skip


def with_reference(rows: Dataset) -> Dataset:
    """What `compute_reference_columns` adds: sums for pairs, a number per token for single trajectories."""
    if "chosen_ids" in rows.column_names:
        return rows.map(lambda row: {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5})

    def reference(row):
        aligned = zip(row["behavior_logps"], row["action_mask"], strict=True)
        return {"ref_logps": [logp - 0.25 * bit for logp, bit in aligned]}

    return rows.map(reference)


UNPAIRED = UnpairedConfig(strategy="all")
