"""What `train_step.py` compares: its tables, row by row."""

from __future__ import annotations

from train_step_rows import Setting


# Of Qwen2.5's sizes
HALF_B = dict(num_hidden_layers=24, hidden_size=896, intermediate_size=4864, vocab_size=151_936,
              num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
ONE_AND_A_HALF_B = dict(num_hidden_layers=28, hidden_size=1536, intermediate_size=8960, vocab_size=151_936,
                        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
SEVEN_B = dict(num_hidden_layers=28, hidden_size=3584, intermediate_size=18_944, vocab_size=152_064,
               num_attention_heads=28, num_key_value_heads=4)  # fmt: skip
GPU = dict(device="cuda", bf16=True)

SMALL = {"num_hidden_layers": 4, "vocab_size": 16_000}
SMALL_HEAD = {"num_hidden_layers": 6, "hidden_size": 768, "intermediate_size": 2304, "vocab_size": 4096}

TABLES: dict[str, list[Setting]] = {
    "dpo": [
        Setting("float32, reference precomputed"),
        Setting("float32, reference online", online=True),
        Setting("float32, 4 pairs a batch", pairs=4),
        Setting("head small against the body, as at 7B", body=SMALL_HEAD),
    ],
    "real-model": [
        Setting("real rows, 2 pairs", checkpoint="--model"),
        Setting("real rows, 8 pairs", pairs=8, checkpoint="--model"),
    ],
    "dtype": [
        Setting("bfloat16 autocast", bf16=True),
        Setting("LoRA r=16", lora=True),
        Setting("gradient checkpointing", checkpointing=True),
        Setting("bfloat16, checkpointing", bf16=True, checkpointing=True),
    ],
    "groups": [
        Setting("4 pairs from 2 x 2 trajectories of one prompt", pairs=4, from_trajectories=2),
    ],
    "large": [Setting("9 pairs from 3 x 3 trajectories of one prompt", pairs=9, from_trajectories=3)],
    "kto": [
        Setting("KTO, 4 trajectories", kind="kto", pairs=2),
        Setting("KTO, 4 trajectories of one prompt", kind="kto", pairs=2, turns_shared=0.5, from_trajectories=2),
    ],
    "sharing": [Setting(f"turns shared with probability {p:.1f}", turns_shared=p) for p in (0.0, 0.2, 0.4, 0.6, 0.8)],
    "values": [
        Setting("OREO, value adapter, 8 trajectories", kind="oreo", trajectories=8, turns_shared=0.5, body=SMALL),
        Setting("OREO, full value model", kind="oreo", trajectories=8, turns_shared=0.5, value="full", body=SMALL),
        Setting("DQO, value head", kind="dqo", trajectories=8, turns_shared=0.5, value="head", body=SMALL),
    ],
    "group-regression": [
        Setting(
            f"group regression, 12 trajectories, turns shared with probability {p:.1f}",
            kind="group",
            trajectories=12,
            turns_shared=p,
            body=SMALL,
        )
        for p in (0.0, 0.5)
    ],
    "trajectories": [
        Setting(
            f"DQO, value head, {n} trajectories",
            kind="dqo",
            trajectories=n,
            turns_shared=0.5,
            value="head",
            body=SMALL,
        )
        for n in (2, 4, 8, 16)
    ],
    "length": [Setting(f"lengths x {s}", scale=s) for s in (0.1, 0.25, 0.5, 1.0)],
    "cuda": [
        Setting("0.5B, 2 pairs", body=HALF_B, **GPU),
        Setting("0.5B, 2 pairs, reference online", body=HALF_B, online=True, **GPU),
        Setting("0.5B, 8 pairs", pairs=8, body=HALF_B, **GPU),
        Setting("0.5B, 4 pairs from 2 x 2 trajectories", pairs=4, from_trajectories=2, body=HALF_B, **GPU),
        Setting("0.5B, 9 pairs from 3 x 3 trajectories", pairs=9, from_trajectories=3, body=HALF_B, **GPU),
        Setting("0.5B, 2 pairs, lengths x 4", scale=4, body=HALF_B, **GPU),
        Setting("0.5B, 2 pairs, lengths x 0.25", scale=0.25, body=HALF_B, **GPU),
        Setting("0.5B, 2 pairs, float32", device="cuda", body=HALF_B),
        Setting("0.5B, KTO, 8 trajectories", kind="kto", pairs=4, turns_shared=0.5, body=HALF_B, **GPU),
        Setting("0.5B, OREO, value adapter, 8 trajectories", kind="oreo", trajectories=8, turns_shared=0.5,
                body=HALF_B, **GPU),
        Setting("0.5B, DQO, value head, 8 trajectories", kind="dqo", trajectories=8, turns_shared=0.5, value="head",
                body=HALF_B, **GPU),
    ],
    "large-models": [
        Setting("1.5B, checkpointing, 8 pairs", pairs=8, checkpointing=True, body=ONE_AND_A_HALF_B, **GPU),
        Setting("7B, LoRA, checkpointing, 4 pairs", pairs=4, checkpointing=True, lora=True, body=SEVEN_B,
                weights="bfloat16", **GPU),
        Setting("7B, LoRA, checkpointing, 4 pairs from 2 x 2 trajectories", pairs=4, from_trajectories=2,
                checkpointing=True, lora=True, body=SEVEN_B, weights="bfloat16", **GPU),
    ],
}  # fmt: skip
# Left out where no table is named
NEED_A_GPU = ("cuda", "large-models")
NEED_A_MODEL = ("real-model",)
