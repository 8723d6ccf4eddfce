"""Tiny local vision-language models with their processors, of families whose image processors need Pillow alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from .support import byte_tokenizer, template_text
from .templates.chatml import CALLS, chatml


PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content or [] %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
IMAGE_CHATML = chatml(PARTS + CALLS)

TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)


def gemma3_processor() -> Any:
    tokenizer = byte_tokenizer("gemma3")
    marks = {"image": "<image_soft_token>", "boi": "<start_of_image>", "eoi": "<end_of_image>"}
    tokenizer.add_tokens(list(marks.values()), special_tokens=True)
    for name, token in marks.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(images, tokenizer, chat_template=template_text("gemma3"), image_seq_length=4)


def llava_processor(template: str | None = None) -> Any:
    return LlavaProcessor(
        LlavaImageProcessorPil(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}),
        _tokenizer_with_image(template),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template or template_text("llava_next"),
    )


def llava_next_processor() -> Any:
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        ),
        _tokenizer_with_image(None),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template_text("llava_next"),
    )


def chatml_processor() -> Any:
    """LLaVA's processor under a template that shows images and tool results in every role."""
    return llava_processor(IMAGE_CHATML)


def _tokenizer_with_image(template: str | None) -> Any:
    tokenizer = byte_tokenizer(template or "llava_next")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


PROCESSORS: dict[str, Callable[[], Any]] = {
    "gemma3": gemma3_processor,
    "llava": llava_processor,
    "llava_next": llava_next_processor,
    "chatml": chatml_processor,
}


def tiny_vision_model(processor: Any, seed: int = 0, **text: Any) -> Any:
    """A model with random weights for one of these processors; `text` changes its language model."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    common = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    common = {**text, **common}
    config: Any
    if isinstance(processor, Gemma3Processor):
        config = Gemma3Config(
            text_config=Gemma3TextConfig(**{**TEXT, "head_dim": 8, **common}),
            vision_config=SiglipVisionConfig(**VISION),
            mm_tokens_per_image=4,
            image_token_index=tokenizer.image_token_id,
            boi_token_index=tokenizer.boi_token_id,
            eoi_token_index=tokenizer.eoi_token_id,
        )
    else:
        given: dict[str, Any] = dict(
            text_config=LlamaConfig(**{**TEXT, **common}),
            vision_config=CLIPVisionConfig(**VISION, projection_dim=16),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
        if isinstance(processor, LlavaNextProcessor):
            config = LlavaNextConfig(**given, image_grid_pinpoints=processor.image_processor.image_grid_pinpoints)
        else:
            config = LlavaConfig(**given)
    return AutoModelForImageTextToText.from_config(config)


def picture(color: str = "red", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A small image of one color."""
    return Image.new("RGB", size, color)
