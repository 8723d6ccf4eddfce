#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, peft 0.21.2: the reference of a policy that is passed as an object is read from the folder that
# its config names, not copied from the object. After a merged adapter, or a few steps of training, the first DPO loss is
# not log 2 = 0.6931, and a token added in memory has no row in the reference. DPOTrainer and KTOTrainer alike; seen with DPO.
# Hurts: whoever merges an SFT adapter in memory and goes on with DPO.
# Seen (2026-11-28): first loss 0.6931, object that equals its folder; 1.6449, object that was changed
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 2>/dev/null
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY' 2>/dev/null
import math, torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

words = ["<eos>", "a", "b", "c", "d"]
inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
model.save_pretrained("policy")
rows = Dataset.from_list([{"prompt": "a b", "chosen": " c", "rejected": " d"}] * 2)


def first_loss(change):
    policy = Qwen2ForCausalLM.from_pretrained("policy", dtype=torch.float32)
    if change:
        with torch.no_grad():
            for index, parameter in enumerate(policy.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    args = DPOConfig("out", max_steps=1, beta=1.0, logging_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=False)
    trainer = DPOTrainer(policy, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


same, changed = first_loss(False), first_loss(True)
print(f"first loss {same:.4f}, object that equals its folder; {changed:.4f}, object that was changed")
assert abs(same - math.log(2)) < 1e-3 and abs(changed - math.log(2)) > 1e-2
PY
