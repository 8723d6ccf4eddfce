#!/usr/bin/env bash
# transformers 5.23.0: where torch.distributed is initialized, `model.save_pretrained(folder)` writes nothing on any process but
# the first, not even the config, and says nothing; it does so whatever `is_main_process` is, of which the docs say that it
# decides. The folder is made and stays empty. An adapter of PEFT is written on every process.
# Hurts: a trainer in which each process hands the policy's weights to an engine of its own (vLLM beside training) by a folder;
# also processes on machines without a shared disk.
# Seen (2026-11-29): process 0: ['config.json', 'generation_config.json', 'model.safetensors']; process 1: []
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 2>/dev/null
cd "$work"
cat > save.py <<'PY'
import os
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

dist.init_process_group("gloo")
rank = dist.get_rank()
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
model.save_pretrained(f"of_process_{rank}", is_main_process=True)
dist.barrier()
if rank == 0:
    files = [sorted(os.listdir(f"of_process_{process}")) for process in range(2)]
    print("; ".join(f"process {process}: {names}" for process, names in enumerate(files)))
    assert "model.safetensors" in files[0] and files[1] == []
dist.destroy_process_group()
PY
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$work/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 save.py 2>/dev/null
