#!/usr/bin/env bash
# trl 1.16.0: of the chat templates that it ships, diffusion_gemma renders no generation prompt after a tool result, but a history
# with a turn there shows `<|turn>model` before it; gemma4 shows none in either. A policy that is sampled from the generation
# prompt of diffusion_gemma is therefore asked to write its own header, and masks that count from the generation prompt
# train the header. Seen: both renderings, as asserted below.
# Hurts: masks and rollouts of tool conversations under that template.
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-deps trl==1.16.0 jinja2==3.1.6 markupsafe==3.0.3 2>/dev/null
cd "$work"
"$work/venv/bin/python" - <<'PY'
import importlib.util, json, pathlib
import jinja2, jinja2.sandbox

folder = pathlib.Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "First."}}, "required": ["a"]}}}
call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
start = [{"role": "user", "content": "q"}, call, {"role": "tool", "name": "add", "content": "3"}]


def render(name, messages, generation):
    def refuse(message):
        raise ValueError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((folder / f"{name}.jinja").read_text())
    return template.render(messages=messages, tools=[tool], add_generation_prompt=generation, bos_token="", eos_token="")


for name, header in (("diffusion_gemma", True), ("gemma4", False)):
    asked = render(name, start, True)
    kept = render(name, [*start, {"role": "assistant", "content": "It is 3."}], False)
    between = kept[len(asked) : kept.index("It is 3.")]
    print(f"{name}: the prompt ends in {asked[-18:]!r}; between it and the answer the history has {between!r}")
    assert kept.startswith(asked) and ("<|turn>model" in between) is header
PY
