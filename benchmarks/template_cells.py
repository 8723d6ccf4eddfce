"""How much of what people train on can be masked exactly: chat templates times kinds of conversation.

    python benchmarks/template_cells.py                    # the templates that TRL ships
    python benchmarks/template_cells.py FOLDER [FOLDER …]  # every `*.jinja` in folders of your own, each text once
    python benchmarks/template_cells.py FOLDER --json cells.json
    python benchmarks/template_cells.py FOLDER --switches  # refused cells again, with the switches that errors name

A cell is exact where the context of every assistant turn is what the template prompts a policy with, and the sampled
tokens hold the turn's own words, nobody else's, and end with a special token. It is *inexpressible* where the template
raises an error or, with its switches as they are, nowhere shows a part of the conversation. Everything else that is
not exact is refused with an error, or wrong. With `--switches` a refused cell is counted again under the switches that
its error names (`tool_dialect`, `write_reasoning`, the template's own). Templates are rendered with a tokenizer of one
token per byte and one per special token; no model is needed. Results: results/segments.md.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chat_templates import shipped_templates
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_multiturn.data import turn_template
from trl_multiturn.messages import REASONING
from trl_multiturn.segments import path
from trl_multiturn.templates import TurnTemplate


_SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜<>\n]+｜>|<\|\"\|>|<SPECIAL_\d+>|<extra_id_\d+>|<sop>|</?s>|<sep>|<end_of_sentence>|</?assistant>"
    r"|\[/?[A-Z_]{3,}\]|\[gMASK\]|\]~!?b\[?|\[e~\[|</?(?:think|tool_call|tool_response|seed:[a-z_]+|minimax:[a-z_]+)>"
    r"|<(?:start|end)_(?:of_turn|of_utterance|function_call|function_response|function_declaration)>"
)
_EOS = (
    "<|im_end|> <|eot_id|> <|return|> <end_of_turn> <turn|> <|END_OF_TURN_TOKEN|> <|end|> <｜end▁of▁sentence｜> [e~[ "
    "<seed:eos> <|end_of_text|> <|endoftext|> <|assistant_end|> </s>"
).split()
_SWITCH = re.compile(r"`(\w+)=(True|False|'\w+')`")
_BOS = "<|begin_of_text|> <｜begin▁of▁sentence｜> <bos> <s> <|startoftext|>".split()


def _parameters(**types: str) -> dict[str, Any]:
    properties = {name: {"type": kind, "description": f"The {name}."} for name, kind in types.items()}
    return {"type": "object", "properties": properties, "required": list(types)}


TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Looks up.", "parameters": _parameters(**types)}}
    for name, types in (
        ("tide_times", {"harbor": "string", "days": "integer"}),
        ("ferry_price", {"route": "string", "adults": "integer"}),
    )
]


def _user(words: str) -> dict[str, Any]:
    return {"role": "user", "content": words}


def _answer(words: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words, **more}


def _calls(*calls: tuple[str, str | None, dict[str, Any]], **more: Any) -> dict[str, Any]:
    made = [
        {**({"id": identity} if identity else {}), "type": "function", "function": {"name": name, "arguments": given}}
        for name, identity, given in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": made, **more}


def _result(name: str, words: str, identity: str | None) -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": words, **({"tool_call_id": identity} if identity else {})}


TIDE = ("tide_times", "qwertz123", {"harbor": "Sundhavn", "days": 31007})
FERRY = ("ferry_price", "asdfgh456", {"route": "Holmbukt", "adults": 52013})
RESULT = _result("tide_times", "tideresult", TIDE[1])
LONG = "ferryresult " + " ".join(f"row{number}\n" for number in range(200)) + " ferryending"
SYSTEM = {"role": "system", "content": "systemrule"}
ASKED, ANSWERED = _user("firstquestion"), _answer("firstanswer follows")
CHAT = [ASKED, ANSWERED, _user("secondquestion"), _answer("secondanswer follows")]
STRINGS = _calls(("tide_times", "call_0123456789abcdef", json.dumps(TIDE[2])))  # type: ignore[arg-type]

# Messages; how many of them are the prompt; whether tools are offered
KINDS: dict[str, tuple[list[dict[str, Any]], int, bool]] = {
    "chat": (CHAT, 1, False),
    "system": ([SYSTEM, ASKED, ANSWERED], 2, False),
    "developer": ([{"role": "developer", "content": "developerrule"}, ASKED, ANSWERED], 2, False),
    "call": ([ASKED, _calls(TIDE), RESULT, ANSWERED], 1, True),
    "words beside a call": ([ASKED, _calls(TIDE, content="lookingup"), RESULT, ANSWERED], 1, True),
    "parallel calls": (
        [ASKED, _calls(TIDE, FERRY), RESULT, _result("ferry_price", "ferryresult", FERRY[1]), ANSWERED],
        1,
        True,
    ),
    "second call": (
        [ASKED, _calls(TIDE), RESULT, _calls(FERRY), _result("ferry_price", "ferryresult", FERRY[1]), ANSWERED],
        1,
        True,
    ),
    "error, then chat": (
        [ASKED, _calls(TIDE), _result("tide_times", "Error: ValueError(noharbor)", TIDE[1]), ANSWERED, *CHAT[2:]],
        1,
        True,
    ),
    "reasoning": ([ASKED, {**ANSWERED, "reasoning_content": "firstthought"}], 1, False),
    "reasoning and call": (
        [ASKED, _calls(TIDE, reasoning="firstthought"), RESULT, {**ANSWERED, "reasoning": "secondthought"}],
        1,
        True,
    ),
    "null content": ([ASKED, _calls(TIDE, content=None), RESULT, ANSWERED], 1, True),
    "arguments as strings": (
        [ASKED, {**STRINGS, "content": None}, _result("tide_times", "tideresult", "call_0123456789abcdef"), ANSWERED],
        1,
        True,
    ),
    "content in parts": (
        [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT[:2]],
        1,
        False,
    ),
    "long result, then chat": (
        [
            *(SYSTEM, ASKED, _calls(FERRY), _result("ferry_price", LONG, FERRY[1]), ANSWERED),
            *(*CHAT[2:], _user("thirdquestion"), _answer("thirdanswer follows")),
        ],
        2,
        True,
    ),
    "tools, no call": (CHAT, 1, True),
}


def words_of(message: dict[str, Any]) -> list[str]:
    """Words that stand in no template and in no other message."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    found = [word for word in re.findall(r"[a-z]{9,}", text) if word != "ValueError"]
    for key in REASONING:
        found += [message[key]] if message.get(key) else []
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        found += [call["function"]["name"], *map(str, arguments.values())]
    return found


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte, and one for each special token of a chat template."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    eos = next((token for token in _EOS if token in template), "</s>")
    bos = next((token for token in _BOS if token in template), "<bos>")
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token="<pad>")
    fast.chat_template = template
    texts = [template]
    for kind in ("chat", "call", "reasoning"):  # special tokens that a template puts together
        texts.append(_render(fast, *_shown(kind)) or "")
    fast.add_tokens(sorted(set(_SPECIAL.findall("".join(texts))) - {"<pad>", bos, eos}), special_tokens=True)
    return fast


def _shown(kind: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    messages, _, tools = KINDS[kind]
    return messages, TOOLS if tools else None


def _render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], tools: Any) -> str | None:
    try:
        return tokenizer.apply_chat_template(copy.deepcopy(list(messages)), tools=tools, tokenize=False)
    except Exception:  # whatever a template raises
        return None


def inexpressible(tokenizer: PreTrainedTokenizerFast, kind: str) -> str:
    """Why a template cannot show a conversation, whatever is tried to please it; empty where it can."""
    messages, _, tools = KINDS[kind]
    offered = TOOLS if tools else None
    forms = [list(form) for form in _forms(messages)]
    if not any(_render(tokenizer, form, offers) for form in forms for offers in (offered, offered or [])):
        return "raises an error"
    for at, message in enumerate(messages):
        # As it is read now or later, in any form
        ends = range(at + 1, len(messages) + 1)
        texts = [_render(tokenizer, form[:end], offered) or "" for form in forms for end in ends]
        for word in words_of(message):
            if not any(word in text for text in texts):
                return _kind_of_part(message, word)
    return ""


def _forms(messages: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for key in (None, *REASONING):
        for strings in (False, True):
            for parts in (False, True):
                yield [_form(message, key, strings, parts) for message in messages]


def _form(message: dict[str, Any], key: str | None, strings: bool, parts: bool) -> dict[str, Any]:
    made = copy.deepcopy({**message, "content": message.get("content") or ""})
    if made["role"] == "developer":
        made["role"] = "system"
    for name in REASONING:
        if key and name in made:
            made[key] = made.pop(name)
    for call in made.get("tool_calls") or ():
        given = call["function"]["arguments"]
        given = json.loads(given) if isinstance(given, str) else given
        call["function"]["arguments"] = json.dumps(given) if strings else given
        call["id"] = str(call.get("id", ""))[-9:]
    if "tool_call_id" in made:
        made["tool_call_id"] = made["tool_call_id"][-9:]
    content = made["content"]
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    return {**made, "content": [{"type": "text", "text": content}] if parts else content}


def _kind_of_part(message: dict[str, Any], word: str) -> str:
    if any(message.get(key) == word for key in REASONING):
        return "shows no reasoning"
    if word in str(message.get("content")):
        return f"leaves out words of the {message['role']}"
    return "leaves out calls"


def outcome(tokenizer: PreTrainedTokenizerFast, kind: str, **switches: Any) -> tuple[str, str]:
    """`exact` (with the number of sequences), `refused` (with the error) or `wrong` (with what is)."""
    found = _outcome(tokenizer, kind, switches)
    # A template may print the time of day, which goes on between two renderings
    return _outcome(tokenizer, kind, switches) if found[0] == "wrong" else found


def named_switches(error: str) -> dict[str, Any]:
    """The switches that an error names first, of which none leaves out what somebody said."""
    first = next((part for part in re.split(r", or (?![^(]*\))", error) if _SWITCH.search(part)), "")
    return {name: ast.literal_eval(value) for name, value in _SWITCH.findall(first) if name != "drop_reasoning"}


def _outcome(tokenizer: PreTrainedTokenizerFast, kind: str, switches: dict[str, Any]) -> tuple[str, str]:
    messages, first, tools = copy.deepcopy(KINDS[kind])
    try:
        template = turn_template(tokenizer, copy.deepcopy(TOOLS) if tools else None, switches)
        row = template.tokenize(messages[:first], messages[first:])
    except ValueError as error:
        return "refused", str(error)
    fault = _fault(template, row, messages, first, switches)
    return ("wrong", fault) if fault else ("exact", str(1 + len(row.get("branches", []))))


def _fault(
    template: TurnTemplate,
    row: dict[str, Any],
    messages: list[dict[str, Any]],
    first: int,
    switches: dict[str, Any],
) -> str:
    tokenizer = template.processing_class
    ids = row["prompt_ids"] + row["completion_ids"]
    mask = [0] * len(row["prompt_ids"]) + row["action_mask"] + [0]
    starts = [at for at in range(len(ids)) if mask[at] and not mask[at - 1]]
    turns = [at for at in range(first, len(messages)) if messages[at]["role"] == "assistant"]
    if len(starts) != len(turns):
        return f"{len(starts)} runs of sampled tokens for {len(turns)} turns"
    special = set(tokenizer.get_added_vocab().values())
    for start, at in zip(starts, turns, strict=True):
        stop = next(end for end in range(start, len(mask)) if not mask[end])
        sampled = tokenizer.decode(ids[start:stop])
        context = [ids[column] for column in path(row.get("branches", []), start)]
        # Reasoning is written where a check finds that it is left out
        if context != template.prompt_ids(messages[:at], check="write_reasoning" in switches):
            return f"message {at}: its context is not the template's prompt"
        if "tool_dialect" in switches:
            read = tokenizer.decode(context)
            said = [word for message in messages[:at] if message["role"] != "assistant" for word in words_of(message)]
            if missing := [word for word in [*map(json.dumps, template.tools or ()), *said] if word not in read]:
                return f"message {at}: {missing} not in its context"
        if missing := [word for word in words_of(messages[at]) if word not in sampled]:
            return f"message {at}: {missing} not in its sampled tokens"
        others = [message for other, message in enumerate(messages) if other != at and message["role"] != "assistant"]
        if foreign := [word for message in others for word in words_of(message) if word in sampled]:
            return f"message {at}: {foreign} of others in its sampled tokens"
        if ids[stop - 1] not in special:
            return f"message {at}: ends with {sampled[-12:]!r}"
    return ""


def templates(folders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and text of each template, each text once."""
    if not folders:
        yield from shipped_templates()
        return
    seen: set[str] = set()
    for folder in folders:
        for file in sorted(Path(folder).glob("*.jinja")):
            text = file.read_text(encoding="utf-8")
            if text not in seen:
                seen.add(text)
                yield f"{Path(folder).name}/{file.stem}", text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--json", help="a file for the outcome of every cell")
    parser.add_argument("--switches", action="store_true", help="refused cells once more, with switches")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cells: dict[str, dict[str, tuple[str, str, str]]] = {}
    again: dict[str, dict[str, tuple[str, str, str]]] = {}
    for name, text in templates(options.folders):
        tokenizer = byte_tokenizer(text)
        cells[name] = {}
        for kind in KINDS:
            result, detail = outcome(tokenizer, kind)
            cells[name][kind] = (result, detail, "" if result == "exact" else inexpressible(tokenizer, kind))
            switches = named_switches(detail) if options.switches and result == "refused" else {}
            if switches:
                found, more = outcome(tokenizer, kind, **switches)
                again.setdefault(name, {})[kind] = (found, more, " ".join(switches))
    if options.json:
        Path(options.json).write_text(json.dumps([cells, again], indent=0), encoding="utf-8")
    report(cells)
    if options.switches:
        report_switches(cells, again)


def report(cells: dict[str, dict[str, tuple[str, str, str]]]) -> None:
    """Prints the counts."""
    every = [cell for kinds in cells.values() for cell in kinds.values()]
    exact = sum(result == "exact" for result, _, _ in every)
    several = sum(result == "exact" and detail != "1" for result, detail, _ in every)
    mute = collections.Counter(reason for _, _, reason in every if reason)
    shown = len(every) - sum(mute.values())
    wrong = sum(result == "wrong" for result, _, _ in every)
    print(f"{len(cells)} templates x {len(KINDS)} kinds = {len(every)} cells")
    print(f"exact: {exact}, {exact / len(every):.1%} of all; {several} of them in several sequences; wrong: {wrong}")
    print(f"expressible: {shown}; exact of these: {exact / shown:.1%}")
    print("inexpressible:", ", ".join(f"{reason} {count}" for reason, count in mute.most_common()))
    print("\n| kind | exact | refused | inexpressible |\n| --- | --- | --- | --- |")
    for kind in KINDS:
        row = [kinds[kind] for kinds in cells.values()]
        good, silent = sum(cell[0] == "exact" for cell in row), sum(bool(cell[2]) for cell in row)
        print(f"| {kind} | {good} | {len(row) - good - silent} | {silent} |")


def report_switches(
    cells: dict[str, dict[str, tuple[str, str, str]]], again: dict[str, dict[str, tuple[str, str, str]]]
) -> None:
    """Prints the counts with the switches that errors name."""
    total = sum(map(len, cells.values()))
    before = sum(cell[0] == "exact" for kinds in cells.values() for cell in kinds.values())
    tried = [cell for kinds in again.values() for cell in kinds.values()]
    by_switch = collections.Counter(switches for result, _, switches in tried if result == "exact")
    exact = before + by_switch.total()
    print(f"\nwith the switches that errors name: exact {exact}, {exact / total:.1%} of all")
    print("of these with", ", ".join(f"{names}: {count}" for names, count in by_switch.most_common()))
    print("otherwise:", dict(collections.Counter(result for result, _, _ in tried if result != "exact")))


if __name__ == "__main__":
    main()
