"""TRL's own scripts with nothing changed but the class they import."""

from __future__ import annotations

import importlib
import json

import pytest
import trl
from transformers import AutoModelForCausalLM

from tests.support import preference_rows, save_tiny
from tests.trainer.helpers import logged
from trl_multiturn.trainer import MultiTurnDPOConfig, MultiTurnDPOTrainer, MultiTurnKTOConfig, MultiTurnKTOTrainer


CLASSES = {
    "dpo": ("DPOTrainer", MultiTurnDPOTrainer, "DPOConfig", MultiTurnDPOConfig),
    "kto": ("KTOTrainer", MultiTurnKTOTrainer, "KTOConfig", MultiTurnKTOConfig),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder and a data folder of JSON lines, as a user would pass them on the command line."""
    root = tmp_path_factory.mktemp("scripts")
    rows = root / "rows"
    rows.mkdir()
    for split in ("train", "test"):
        (rows / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in preference_rows(6)))
    return save_tiny(root / "model"), str(rows)


def run(monkeypatch, script, files, output, *extra):
    trainer_name, trainer_class, config_name, config_class = CLASSES[script]
    made = []

    class Recorded(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(trl, trainer_name, Recorded)
    monkeypatch.setattr(trl, config_name, config_class)
    module = importlib.import_module(f"trl.scripts.{script}")
    arguments = (
        f"--model_name_or_path {files[0]} --dataset_name {files[1]} --output_dir {output} --max_steps 2 "
        "--per_device_train_batch_size 2 --logging_steps 1 --report_to none --use_cpu --bf16 false --disable_tqdm true"
    ).split()
    module.main(*module.make_parser().parse_args_and_config([*arguments, *extra], fail_with_unknown_args=False))
    return made[0]


@pytest.mark.parametrize("script", ["dpo", "kto"])
@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--eval_strategy", "steps", "--eval_steps", "1", "--precompute_ref_log_probs"],
        ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"],
        ["--dataset_streaming", "--train_on_turns", "last"],
    ],
    ids=["full", "eval", "lora", "streaming"],
)
def test_trl_script(monkeypatch, files, tmp_path, script, extra):
    trainer = run(monkeypatch, script, files, tmp_path, *extra)
    assert len(logged(trainer, "loss")) == 2
    row = next(iter(trainer.train_dataset))
    mask = row["chosen_action_mask" if script == "dpo" else "action_mask"]
    assert 0 < sum(mask) < len(mask)
    if "--use_peft" not in extra:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        assert (tmp_path / "adapter_model.safetensors").exists()
