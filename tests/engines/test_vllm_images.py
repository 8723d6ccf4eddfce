"""The real vLLM after images. It needs a torchvision that loads beside the installed torch: `pytest -m vllm`."""

from __future__ import annotations

import asyncio
import importlib.util
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.vision import PROCESSORS, picture, tiny_vision_model
from trl_multiturn import TurnTemplate
from trl_multiturn.engines.engine import ReadsImages, SamplingParams
from trl_multiturn.engines.vllm.engine import VLLMEngine


MISSING = [name for name in ("vllm", "torchvision") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed")]

HEADS = {"hidden_size": 64}  # heads of 32: the smallest vLLM takes
IMAGES = [picture("red"), picture("blue", (9, 9))]
ASK = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": IMAGES[0]},
            {"type": "text", "text": "hi"},
            {"type": "image", "image": IMAGES[1]},
        ],
    }
]


@pytest.fixture(scope="module")
def processor():
    return PROCESSORS["chatml"]()


@pytest.fixture(scope="module")
def prompt_ids(processor):
    return TurnTemplate(processor).prompt_ids(ASK)


@pytest.fixture(scope="module")
def policy(processor):
    return tiny_vision_model(processor, **HEADS).eval()


@pytest.fixture(scope="module")
def engine(tmp_path_factory, processor, policy):
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    processor.save_pretrained(folder)
    # As published checkpoints call them, which is what vLLM reads
    weights = load_file(folder / "model.safetensors")
    named = {re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", n): w for n, w in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    engine = VLLMEngine(
        str(folder),
        processor,
        dtype="float32",
        max_model_len=512,
        max_num_batched_tokens=2048,
        enforce_eager=True,
        kv_cache_memory_bytes=64 * 2**20,
        enable_lora=True,
        max_lora_rank=8,
    )
    yield engine
    engine.close()


def scores(model, processor, prompt_ids, generation, images=IMAGES):
    ids = torch.tensor([prompt_ids + generation.token_ids])
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
    return logits.log_softmax(-1)[range(len(prompt_ids) - 1, ids.shape[1] - 1), generation.token_ids]


def test_a_turn_after_images_is_sampled_from_what_the_trainer_scores(engine, processor, policy, prompt_ids):
    generation = asyncio.run(engine.generate_with_images(prompt_ids, IMAGES, SamplingParams(8, seed=1)))
    expected = scores(policy, processor, prompt_ids, generation)
    torch.testing.assert_close(torch.tensor(generation.logps), expected, atol=1e-4, rtol=1e-4)


def test_a_policy_beside_it_reads_images_too(engine, processor, policy, prompt_ids, tmp_path):
    torch.manual_seed(0)
    base = tiny_vision_model(processor, **HEADS).eval()
    target = r".*language_model.*q_proj"
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=target, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    beside = engine.beside(str(tmp_path))
    assert isinstance(beside, ReadsImages)
    generation = asyncio.run(beside.generate_with_images(prompt_ids, IMAGES, SamplingParams(8, seed=1)))
    expected = scores(adapted, processor, prompt_ids, generation)
    torch.testing.assert_close(torch.tensor(generation.logps), expected, atol=1e-4, rtol=1e-4)


def test_images_that_vllm_gives_other_tokens_are_refused(engine, monkeypatch):
    other = PROCESSORS["chatml"]()
    other.patch_size *= 2
    monkeypatch.setattr(engine, "processing_class", other)
    ids = TurnTemplate(other).prompt_ids(ASK)
    with pytest.raises(ValueError, match="so the trainer would score another prompt"):
        asyncio.run(engine.generate_with_images(ids, IMAGES, SamplingParams(2)))
