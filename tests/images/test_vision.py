"""What processors make of images, and the tokens of a conversation with images in it."""

from __future__ import annotations

import pytest
import torch

from tests.support import assistant, byte_tokenizer
from tests.templates.chatml import chatml
from tests.vision import PROCESSORS, llava_processor, picture
from trl_multiturn import TurnTemplate, tokenize_trajectory
from trl_multiturn.errors import VanishedPartError
from trl_multiturn.images.vision import Vision
from trl_multiturn.messages.images import text_in


FAMILIES = ["gemma3", "llava", "llava_next"]


@pytest.fixture(scope="module")
def processors():
    return {name: make() for name, make in PROCESSORS.items()}


SEEN = {"role": "tool", "name": "look", "content": [{"type": "image", "image": picture()}]}


def ask(*parts):
    """A user turn of images and text."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_has_the_tokens_that_the_processor_gives_it(processors, family):
    processor, image = processors[family], picture(size=(40, 16))
    messages = [ask(image, "Which color?"), {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]
    text = processor.apply_chat_template(messages, tokenize=False)
    own = processor(text=[text], images=[[image]], add_special_tokens=False)["input_ids"][0]
    row = tokenize_trajectory(processor, messages[:1], messages[1:])
    assert row["prompt_ids"] + row["completion_ids"] == own


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_policys_tokens_train(processors, family):
    processor = processors[family]
    prompt = [ask(picture(), "Which color?")]
    turns = [assistant("Red."), ask(picture("blue"), "And this?"), assistant("Blue.")]
    row = tokenize_trajectory(processor, prompt, turns)
    trained = [t for t, bit in zip(row["completion_ids"], row["action_mask"], strict=True) if bit]
    assert (
        processor.decode(trained, skip_special_tokens=True).split()
        == {
            "gemma3": ["Red.Blue."],
            "llava": ["Red.", "Blue."],
            "llava_next": ["Red.", "Blue."],
        }[family]
    )
    assert len(row["images"]) == len(row["completion_images"]) == 1


def test_an_image_that_a_tool_returns_is_context(processors):
    """`look<|im_end|>` ⏎ `<|im_start|>tool` ⏎ 16 image tokens, `seen<|im_end|>` … `red<|im_end|>` ⏎."""
    seen = {"role": "tool", "name": "look", "content": [*ask(picture(), "seen")["content"]]}
    row = tokenize_trajectory(processors["chatml"], [ask("Which?")], [assistant("look"), seen, assistant("red")])
    tail = "\n<|im_start|>tool\n" + "<image>" * 16 + "seen<|im_end|>\n<|im_start|>assistant\n"
    tokens = [processors["chatml"].decode([token]) for token in row["completion_ids"]]
    assert "".join(tokens) == "look<|im_end|>" + tail + "red<|im_end|>\n"
    context = len("\ntool\nseen\nassistant\n") + 16 + len(["start", "end", "start"])
    assert row["action_mask"] == [1] * 5 + [0] * context + [1] * 4 + [0]
    assert row["completion_image_tokens"] == [16]


def test_the_tensors_of_a_batch_are_those_of_its_images_in_order(processors):
    vision = Vision(processors["llava"])
    red, blue = picture("red"), picture("blue")
    ids = torch.tensor([[*vision.token_ids] * 32, [0] * 32, [*vision.token_ids] * 16 + [0] * 16])
    pixels = vision.inputs(ids, [[red, blue], [], [red]])["pixel_values"]
    alone = [vision.tensors([[image]])["pixel_values"] for image in (red, blue, red)]
    assert torch.equal(pixels, torch.cat(alone))


@pytest.mark.parametrize("family", PROCESSORS)
def test_an_engine_that_reads_images_itself_gets_one_placeholder_for_each(processors, family):
    processor, images = processors[family], [picture(size=(40, 16)), picture("blue")]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}
    messages = [ask(*images, "Which?"), answer, ask("Sure?", images[0])]
    ids = TurnTemplate(processor).prompt_ids(messages)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert Vision(processor).collapse(ids, [*images, images[0]]) == expected


def test_so_it_does_where_empty_lines_around_an_image_are_one_token_with_the_text():
    processor = PROCESSORS["gemma3"]()
    processor.tokenizer.add_tokens(["\n\n", "\n\n\n"])
    ids = TurnTemplate(processor).prompt_ids([ask(picture(), picture(), "x")])
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("\n\n\n")) == 2  # after the header; between the two
    collapsed = processor.tokenizer.decode(Vision(processor).collapse(ids, [picture(), picture()]))
    assert "user\n<start_of_image><start_of_image>x<end" in collapsed


@pytest.mark.parametrize(
    ("tokens", "error"), [(15, "do not hold the 16 tokens"), (17, "more image tokens than those of 1 images")]
)
def test_ids_in_which_the_images_do_not_stand_are_not_sent(processors, tokens, error):
    vision = Vision(processors["llava"])
    with pytest.raises(ValueError, match=error):
        vision.collapse([1, *[*vision.token_ids] * tokens, 2], [picture()])


def test_types_of_tokens_are_the_processors(processors):
    processor, image = processors["gemma3"], picture()
    text = processor.apply_chat_template([ask(image, "x")], tokenize=False)
    own = processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")
    types = Vision(processor).token_types(own["input_ids"])
    assert torch.equal(types["token_type_ids"], own["token_type_ids"]) and types["token_type_ids"].any()


def test_ids_without_the_tokens_of_an_image_are_refused(processors):
    with pytest.raises(ValueError, match="make 16 image tokens, but its ids hold 0"):
        Vision(processors["llava"]).inputs(torch.zeros(1, 4, dtype=torch.long), [[picture()]])


@pytest.mark.parametrize(
    ("family", "prompt", "completion", "error"),
    [
        ("chatml", [ask(picture(), "an <image> tag")], [assistant("x")], "1 images as 2 times '<image>'"),
        ("chatml", [ask("x")], [{"role": "assistant", "content": ask(picture())["content"]}], "no policy samples"),
        ("chatml", [{"role": "user", "content": [{"type": "image"}]}], [assistant("x")], "part without an image"),
        ("llava", [ask("x")], [assistant("x"), SEEN], "`tool_dialect='hermes'`"),
    ],
)
def test_images_that_cannot_be_masked_are_refused(processors, family, prompt, completion, error):
    with pytest.raises(ValueError, match=error):
        tokenize_trajectory(processors[family], prompt, completion)


def test_an_image_that_the_template_leaves_out_is_refused():
    words = (
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% elif m.role == 'user' %}<image>{% endif %}"
    )
    processor = llava_processor(chatml(words + "{% endfor %}"))
    with pytest.raises(
        VanishedPartError, match=r"Message 2 \(tool\): .* leaves out the image in part 0 of its content"
    ):
        tokenize_trajectory(processor, [ask(picture())], [assistant("x"), SEEN, assistant("y")])


def test_a_tokenizer_alone_is_refused():
    with pytest.raises(ValueError, match="message 0 .user. holds an image, but a `.*` reads text alone"):
        tokenize_trajectory(byte_tokenizer(), [ask(picture(), "x")], [assistant("x")])


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "the image is at an address"),
        ({"type": "image", "image": 3}, "the image is a `int`"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,???"}}, "no valid base64"),
    ],
)
def test_parts_that_are_no_image_are_refused(processors, part, error):
    with pytest.raises(ValueError, match=f"message 0 .user.: part 0: .*{error}"):
        tokenize_trajectory(processors["chatml"], [{"role": "user", "content": [part]}], [assistant("x")])


def test_the_words_of_a_message_stand_without_its_images():
    assert text_in(ask("a", picture(), "b"), image="[image]") == "a[image]b"
