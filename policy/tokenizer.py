"""A small byte-level BPE tokenizer, built in code: no file and no training data behind it.

Every byte is a token, so that any text can be written; a few English pairs are merged; digits always stand alone, so
that numbers are read digit by digit. The chat template is R1's: one user turn, then the assistant, whose thinking is
forced open.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|User|>", "<|Assistant|>")
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

# Frequent English pairs, in merge order; "Ġ" is how byte-level BPE writes a space.
_MERGES = (
    "Ġ t|h e|Ġ a|i n|Ġt he|t he|r e|o n|e r|Ġ s|Ġ w|a t|e n|o r|n d|Ġ o|Ġ c|i s|i t|Ġ b|e s|Ġ f|in g|Ġ p|Ġ i|a n|o u|"
    "Ġ m|a l|Ġa nd|e d|Ġ d|Ġt o|a r|Ġo f|Ġ h|i c|Ġ in|l e|Ġ n|o m|Ġ l|s t|Ġ e|v e|l l|Ġ is|i l|"
    "e t|Ġ g|o w|u t|i d|c h|a s"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|Assistant|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the small presets: ids 0..319, special and tag tokens first, then bytes, then merges.

    Special tokens vanish with ``skip_special_tokens``, the <think> and <answer> tags never do. Nothing is added to an
    encoded text: the beginning-of-sequence token comes from the chat template alone.
    """
    named = [*SPECIAL_TOKENS, *TAG_TOKENS]
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in _MERGES.split("|"))]
    tokens = [*named, *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    assert len(tokens) == len(set(tokens)) == VOCAB_SIZE, len(tokens)
    core = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    core.decoder = ByteLevelDecoder()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAG_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|User|>", "<|Assistant|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
