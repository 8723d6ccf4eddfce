#!/usr/bin/env bash
# datasets 5.2.0 (2026-11-28): the Json type, the way to store tool calls that name different arguments
# (`Dataset.from_list(rows, on_mixed_types="use_json")`), changes floating-point numbers. It encodes with pandas' ujson at
# ten digits, and decodes imprecisely: an argument 0.3 comes back as 0.30000000000000004, 51.5073510123456 as
# 51.5073510123, and a chat template prints (and a trainer trains) the changed number. (A report about the JSON reader's
# fallback to pandas, huggingface/datasets#8652, knows the decoder; here the stored value differs, too.)
#
# Output seen:
#   0.3 -> 0.30000000000000004
#   0.7 -> 0.7000000000000001
#   51.5073510123456 -> 51.5073510123
#   29 of 10000 prices with two decimals changed
#
# What to do: write a call's `arguments` as a JSON string, which is stored as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q datasets==5.2.0 pandas==2.3.3
cd "$folder"
HF_HOME="$folder" "$folder/env/bin/python" - <<'PYTHON'
import random

from datasets import Dataset


def stored(numbers):
    rows = [{"calls": [{"number": number}]} for number in numbers]
    dataset = Dataset.from_list([*rows, {"calls": [{"other": "x"}, "text"]}], on_mixed_types="use_json")
    return [dataset[index]["calls"][0]["number"] for index in range(len(numbers))]


numbers = [0.3, 0.7, 51.5073510123456]
for before, after in zip(numbers, stored(numbers)):
    print(before, "->", after)
    assert before != after, "no longer so"
random.seed(0)
prices = [round(random.uniform(0, 200), 2) for _ in range(10000)]
changed = sum(before != after for before, after in zip(prices, stored(prices)))
print(changed, "of", len(prices), "prices with two decimals changed")
assert changed
PYTHON
