"""A tokenizer and a policy built on the spot, for the examples that must run on a CPU without a download.

Nothing here is special to this package: the tokenizer is an ordinary fast tokenizer with an ordinary tool-calling chat
template, the policy an ordinary Qwen3, and the warm start TRL's own SFT. They are merely small.
"""

from __future__ import annotations

import random

from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer


# ChatML, as Qwen writes it, but without a default system prompt: on a small policy its tokens would cost more than the
# problem's. The markers cover what is sampled (text and end-of-turn token), not the newline that the template prints.
CHAT_TEMPLATE = """\
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content }}
        {%- if tools %}{{- '\\n\\n' }}{%- endif %}
    {%- endif %}
    {%- if tools %}
        {{- 'Functions that may be called, one JSON object between <tool_call> tags each:' }}
        {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# One piece is one token where the vocabulary knows it, else its bytes. A code fence is one piece with its line break,
# an operator with the blanks around it, and a word with the blank before it and with the one before a number; digits
# stand alone. Every character belongs to exactly one piece, so that decoding gives back the text.
PIECES = (
    r"(?:system|user|assistant|tool)\n|\n?```python\n|\n?```output\n|\n```(?![a-z])| ?\\boxed\{"
    r"| [-+*/%=]?= | [-+*/] |\d| ?[A-Za-z_]+(?: (?=\d))?|, (?=\d)|\.(?: (?=\d))?|\s|[^\s\w]|\w"
)


def build_tokenizer(words: list[str], pieces: str = PIECES) -> PreTrainedTokenizerFast:
    """Builds a tokenizer that gives each word of a small world one token and spells everything else in bytes.

    Any text can be encoded and comes back unchanged, among it what an interpreter has to say about a program that
    nobody foresaw.

    Args:
        words (`list[str]`):
            Texts whose words get a token each.
        pieces (`str`, *optional*):
            What a word is, as a regular expression of which every character is a part of one match.

    Returns:
        `PreTrainedTokenizerFast` whose end-of-turn token `<|im_end|>` is its end-of-sequence token, whose padding
        token is another one, and whose chat template renders tools and marks the assistant's tokens. The teacher of
        [`word_problems`] writes in the fenced dialect: say `RolloutConfig(dialect="fenced")`, as the template can
        also call tools natively.
    """
    splits = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    headers = [f"{role}\n" for role in ("system", "user", "assistant", "tool")]
    known = {piece for text in [*headers, *words] for piece, _ in splits.pre_tokenize_str(text) if len(piece) > 1}
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(known)
    # No merge is ever applied: a piece that the vocabulary knows is taken whole (`ignore_merges`), any other is bytes.
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = splits
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_policy(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, hidden_size: int = 128, num_layers: int = 2
) -> Qwen3ForCausalLM:
    """Builds an untrained Qwen3 of about 0.4 million parameters in float32.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its vocabulary and special tokens become the policy's.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
        hidden_size (`int`, *optional*, defaults to `128`), num_layers (`int`, *optional*, defaults to `2`):
            Size.
    """
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        # many small heads: with 4 the policy needs about twice the steps until it copies numbers reliably
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden_size // 8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # about 1/sqrt(hidden_size): from Qwen3's own 0.02, made for large models, a small one learns to copy numbers
        # out of the problem several times later
        initializer_range=min(0.08, hidden_size**-0.5),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config).float()


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    output_dir: str,
    seed: int = 0,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    **config_kwargs,
) -> Qwen3ForCausalLM:
    """Fine-tunes the policy on a teacher's trajectories: TRL's SFT with the loss on the teacher's own words alone.

    One pass over the rows unless `num_train_epochs` or `max_steps` say otherwise. About 400 steps bring the loss down
    to the teacher's own randomness.

    Args:
        model, tokenizer:
            From [`build_policy`] and [`build_tokenizer`]; the model is trained in place.
        dataset (`Dataset`):
            Conversational rows with a `messages` column.
        output_dir (`str`):
            TRL's output folder; nothing is saved there.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the rows.
        batch_size (`int`, *optional*, defaults to `32`), learning_rate:
            As in `SFTConfig`.
        config_kwargs:
            Further fields of `SFTConfig`.
    """
    config = SFTConfig(
        output_dir=output_dir,
        seed=seed,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        **{
            "num_train_epochs": 1,
            "assistant_only_loss": True,
            "train_sampling_strategy": "sequential",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
            "max_length": 512,
            "bf16": False,
            "use_cpu": True,
            "activation_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 50,
            "report_to": "none",
            "dataloader_pin_memory": False,
            **config_kwargs,
        },
    )
    dataset = dataset.select(batched_by_length(dataset, batch_size, seed))
    SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer).train()
    return model


def batched_by_length(dataset: Dataset, batch_size: int, seed: int) -> list[int]:
    """An order of the rows in which neighbours are about equally long, and batches come in random order.

    The Trainer's own `group_by_length` walks from long rows to short ones again and again; here lengths go with the
    number of operations, and a small policy forgets one in the meantime.
    """
    rng = random.Random(seed)
    lengths = [sum(len(message["content"]) for message in messages) for messages in dataset["messages"]]
    rows = sorted(range(len(dataset)), key=lambda row: (lengths[row], rng.random()))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]
