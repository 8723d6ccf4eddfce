"""What the page holds: the documented JSON, what is chosen, token layers that are computed, and the page around it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import byte_tokenizer, save_tiny, user
from tests.viewer.runs import HOSTILE, TOKENIZER, make_run
from trl_multiturn import ValueModel
from trl_multiturn.cli import main
from trl_multiturn.viewer import page as page_module, read_page, view
from trl_multiturn.viewer.source import open_source
from trl_multiturn.viewer.token_texts import token_texts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def payload(run):
    return view(run).payload


def entry(payload, kind, number):
    """A trajectory's text or tokens, as docs/viewer.md says how to find them."""
    starts = payload["index"]["chunks"][kind]
    chunk = max(k for k, start in enumerate(starts) if start <= number)
    found = payload[f"{kind}-{chunk}"]
    there = found["entries"][number - found["first"]]
    return {**there, "prompt": found["prompts"][there["prompt"]]}


def column(payload, name):
    index = payload["index"]
    values = index["columns"][name]
    return [index["enums"][name][value] for value in values] if name in index["enums"] else values


def test_columns_have_a_value_per_trajectory(payload):
    index = payload["index"]
    assert (index["format"], index["version"], index["count"]) == ("trl-multiturn-view", 1, 33)
    assert {len(values) for values in index["columns"].values()} == {33}
    assert column(payload, "id")[0] == "0/current/0/0" and column(payload, "verdict")[:3] == ["correct"] * 2 + [
        "incorrect"
    ]
    assert column(payload, "calls")[:4] == ["ok", "ok", "error", ""]
    assert column(payload, "answer")[:4] == ["0", "0", "1", None]
    assert all(re.fullmatch(r"\d+", seed) for seed in column(payload, "seed"))  # 63 bits: text, not numbers


def test_layers_are_whole_multiples_of_a_unit_on_sampled_tokens(payload):
    tokens, unit = entry(payload, "tokens", 2), payload["index"]["logp_unit"]
    sampled = [i for a, b in zip(tokens["turns"][::2], tokens["turns"][1::2], strict=True) for i in range(a, b)]
    assert [round(x * unit, 6) for x in tokens["layers"]["logps"]] == [-(tokens["ids"][i] % 10) / 10 for i in sampled]
    assert column(payload, "sampled")[2] == len(sampled) and column(payload, "tokens")[2] == len(tokens["ids"])
    text = payload["vocabulary"]
    assert "".join(map(str, (text[str(i)] for i in tokens["prompt"]))).endswith("<|im_start|>assistant\n")


def test_messages_and_times_are_those_of_the_run(payload):
    text = entry(payload, "text", 2)
    assert [message["role"] for message in text["completion"]] == ["assistant", "user", "assistant"]
    assert HOSTILE in text["completion"][1]["content"]
    assert text["timing"]["call_seconds"] == [0.25] and len(text["timing"]["sampling_seconds"]) == 2
    assert text["info"]["tool_turns"] == [0] and text["info"]["rewards"] == {"judge": 0.0}


def test_what_trajectories_share_is_kept_once(payload):
    index = payload["index"]
    assert {p["policy_revision"] for p in index["provenance"] if p["policy_revision"]} == {"revision 0", "revision 1"}
    assert len(index["provenance"]) == 3 and len(index["prompts"]) == 3  # two iterations and the evaluations


def test_reasons_are_explained(payload):
    reasons = payload["index"]["reasons"]
    assert set(reasons) == {"dropped: duplicate", "unused: no_correct_one", "unused: in_no_pair"}
    assert all(len(text) > 10 and not text.startswith("duplicate") for text in reasons.values())


def test_pairs_name_their_sides_by_number(payload):
    pairs, verdicts = payload["index"]["pairs"], column(payload, "verdict")
    assert {verdicts[i] for i in pairs["chosen"]} == {"correct"} and {verdicts[i] for i in pairs["rejected"]} == {
        "incorrect"
    }
    assert set(pairs["ref_chosen_logps"]) == {-1.5} and set(pairs["trained"]) == {True} and set(pairs["shared"]) == {0}


def test_a_character_of_several_tokens_keeps_its_bytes():
    ids = TOKENIZER.encode("é the\n")
    texts = [token_texts(TOKENIZER, ids)[i] for i in ids]
    assert texts == [[0xC3], [0xA9], " the", "\n"]


def test_the_blank_before_a_sentencepiece_word_is_kept():
    class SentencePiece:
        """As Llama 2's: a decoder drops the blank before the first word, and bytes are tokens like `<0xE2>`."""

        def convert_ids_to_tokens(self, token):
            return ["▁word", "s", "<0xE2>"][token]

        def decode(self, ids, **kwargs):
            return ["word", "s", "\ufffd"][ids[0]]

    assert token_texts(SentencePiece(), [0, 1, 2]) == {0: " word", 1: "s", 2: [0xE2]}


def test_another_tokenizer_is_told(run):
    other = byte_tokenizer("qwen2_5")
    assert any(
        "another than that of the rollouts" in note for note in view(run, tokenizer=other).payload["index"]["notes"]
    )


def test_without_a_tokenizer_ids_stay_ids(run, tmp_path):
    found = view(run / "rollouts" / "iteration_000" / "journal").payload
    assert found["vocabulary"] == {} and any("--tokenizer" in note for note in found["index"]["notes"])


# What is chosen


def test_a_sample_is_the_same_every_time_and_keeps_pairs_whole(run):
    samples = [view(run, sample=9).payload["index"] for _ in range(2)]
    assert samples[0]["columns"]["id"] == samples[1]["columns"]["id"] and samples[0]["count"] == 9
    assert samples[0]["selection"] == {"sample": 9}
    order = column(view(run).payload, "id")
    assert sorted(samples[0]["columns"]["id"], key=order.index) == samples[0]["columns"]["id"]
    ids = set(samples[0]["columns"]["id"])
    sides = [{p.chosen, p.rejected} for p in open_source(run).pairs]
    assert sum(0 < len(side & ids) < 2 for side in sides) <= 1  # but for one that did not fit in


@pytest.mark.parametrize(
    ("only", "count"),
    [("dropped", 8), ("rows", 8), ("unused", 16), ("correct", 12), ("tool_errors", 12), ("evaluation", 9)],
)
def test_only_some(run, only, count):
    index = view(run, only=only).payload["index"]
    assert index["count"] == count, index["columns"]["id"]


def test_unknown_choices_are_refused(run):
    with pytest.raises(ValueError, match="`only='best'` is unknown"):
        view(run, only="best")
    with pytest.raises(ValueError, match="`sample` must be at least 1"):
        view(run, sample=0)


# What is computed


def test_models_fill_in_the_layers_that_the_run_did_not_record(run, tmp_path):
    model = save_tiny(tmp_path / "policy", TOKENIZER)
    reference = save_tiny(tmp_path / "reference", TOKENIZER, seed=1)
    ValueModel.from_policy(AutoModelForCausalLM.from_pretrained(model), "full").save_pretrained(tmp_path / "value")
    found = view(run, sample=2, model=model, reference=reference, value_model=str(tmp_path / "value")).payload
    assert {layer["name"] for layer in found["index"]["layers"]} >= {"policy_logps", "ref_logps", "values"}
    tokens = entry(found, "tokens", 0)
    policy = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([tokens["prompt"] + tokens["ids"]])
    logps = policy(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    start, (first, stop) = len(tokens["prompt"]) - 1, tokens["turns"][:2]
    wanted = logps[start + first : start + stop].tolist()
    assert [x * 1e-5 for x in tokens["layers"]["policy_logps"][: stop - first]] == pytest.approx(wanted, abs=2e-5)
    assert tokens["layers"]["ref_logps"] != tokens["layers"]["policy_logps"]
    assert set(tokens["layers"]["values"]) == {0}  # a new value head


def test_a_model_of_another_tokenizer_is_refused(run, tmp_path):
    model = save_tiny(tmp_path, TOKENIZER, vocab_size=262)
    with pytest.raises(ValueError, match="knows 262 ids only"):
        view(run, sample=2, model=model)


# The page


@pytest.fixture(scope="module")
def page(run):
    return view(run, title=HOSTILE).to_html()


def test_a_view_says_what_it_holds_in_a_line(run):
    assert repr(view(run, sample=2, title="two")) == "View('two': 2 trajectories)"


def test_the_page_lets_only_its_own_script_and_style_in(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    for kind, text in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_no_text_of_a_model_stands_in_the_markup(page):
    assert "<img" not in page and "hacked=1</script>" not in page and "&lt;img src=x" in page
    assert page.count("<script") == len(re.findall(r'<script type="text/plain" id="block-', page)) + 1


def test_the_script_builds_no_markup_from_text():
    sources = "".join(path.read_text() for path in Path(page_module.__file__).with_name("page").glob("*.js"))
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert way not in sources


def test_a_page_is_read_back(page, payload):
    assert read_page(page)["index"]["columns"] == payload["index"]["columns"]
    assert read_page(page).blocks.keys() == payload.blocks.keys()
    with pytest.raises(ValueError, match="no block `index`"):
        read_page("<html></html>")


def test_a_cell_of_a_notebook_is_a_frame_of_its_own(run):
    cell = view(run, sample=1)._repr_html_()
    assert cell.startswith('<iframe sandbox="allow-scripts"') and "<script" not in cell


def test_numbers_that_are_none_are_null(tmp_path):
    rows = [{"prompt": [user("?")], "completion": [{"role": "assistant", "content": "!"}], "reward": float("nan")}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    assert column(view(tmp_path / "rows.jsonl").payload, "reward") == [None]


def test_arguments_that_json_does_not_know_are_shown_as_text(tmp_path):
    """A policy may write `{"a": NaN}`, which Python reads."""
    odd = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]
    odd[0]["tool_calls"][0]["function"]["arguments"] = {"a": float("nan"), "b": [float("-inf")]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": [user("?")], "completion": odd, "label": True}))
    (message,) = entry(view(tmp_path / "rows.jsonl").payload, "text", 0)["completion"]
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": "nan", "b": ["-inf"]}


# The command


def test_the_command_writes_beside_the_source_and_says_where(run, tmp_path, capsys):
    assert main(["view", str(run), "--no_open"]) == 0
    assert capsys.readouterr().out == f"33 trajectories and 4 pairs: {run / 'view.html'}\n"
    assert read_page((run / "view.html").read_text())["index"]["title"] == str(run)
    assert main(["view", str(run), "-o", str(tmp_path / "some.json"), "--only", "dropped", "--iteration", "1"]) == 0
    found = json.loads((tmp_path / "some.json").read_text())
    assert found["index"]["selection"] == {"iteration": 1, "only": "dropped"} and found["index"]["count"] == 4


def test_half_a_character_is_shown_all_the_same(tmp_path):
    row = {"prompt": [user("?")], "completion": [{"role": "assistant", "content": "\ud800"}], "label": True}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert main(["view", str(tmp_path / "rows.jsonl"), "--no_open"]) == 0
    assert entry(read_page((tmp_path / "rows.html").read_text()), "text", 0)["completion"][0]["content"] == "?"
