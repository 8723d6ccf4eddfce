"""Bits that flip on a disk are told by the file's name: in rows, snapshots and checkpoints."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import nn

from trl_multiturn.distributed.checksums import DamagedFileError, find_damage, write_checksums
from trl_multiturn.rows.row_files import load_rows, save_rows
from trl_multiturn.trainer.loop.checkpoints import last_checkpoint
from trl_multiturn.trainer.loop.policy_weights import load_policy_weights, save_policy_weights


def flip(path, position=-9):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_each_kind_of_damage_is_named(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_bytes(b"0123456789")
    assert find_damage(tmp_path) is None  # of an earlier release: no checksums
    write_checksums(tmp_path)
    assert find_damage(tmp_path) is None
    flip(tmp_path / "inner" / "b")
    assert f"{tmp_path / 'inner' / 'b'} is not what was written" in find_damage(tmp_path)
    (tmp_path / "inner" / "b").unlink()
    assert "cannot be read" in find_damage(tmp_path)
    (tmp_path / "checksums.json").write_text("{")
    assert "checksums.json cannot be read" in find_damage(tmp_path)


def test_rows_come_back_or_their_file_is_named(tmp_path):
    save_rows(Dataset.from_dict({"ids": [[1, 2], [3]]}), tmp_path / "rows")
    assert load_rows(tmp_path / "rows")["ids"][:] == [[1, 2], [3]]
    (data,) = (tmp_path / "rows").glob("*.arrow")
    flip(data, 200)
    with pytest.raises(DamagedFileError, match=f"{data.name} is not what was written.*selected anew"):
        load_rows(tmp_path / "rows")
    (tmp_path / "rows" / "checksums.json").unlink()
    data.write_bytes(b"")
    with pytest.raises(DamagedFileError, match=f"{tmp_path / 'rows'} cannot be read"):
        load_rows(tmp_path / "rows")


@pytest.mark.parametrize("position", [-1, 20], ids=["weights", "header"])
def test_a_snapshot_whose_bits_flipped_is_named(tmp_path, position):
    model = nn.Linear(64, 64)
    save_policy_weights(model, tmp_path / "policy.safetensors")
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    load_policy_weights(model, tmp_path / "policy.safetensors")
    flip(tmp_path / "policy.safetensors", position)
    with pytest.raises(ValueError, match="policy.safetensors is not what was written"):
        load_policy_weights(model, tmp_path / "policy.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items() if name == "bias")


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    write_checksums(path)
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog, name):
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    assert last_checkpoint(tmp_path) == str(bad)
    flip(bad / name, 0)
    assert last_checkpoint(tmp_path) == str(good)
    assert f"{bad} is passed over" in caplog.text
