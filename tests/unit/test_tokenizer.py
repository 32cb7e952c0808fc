"""The built-in tokenizer: any text round-trips, digits stand alone, R1's template, folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from policy.presets import preset_config
from policy.tokenizer import SPECIAL_TOKENS, TAG_TOKENS, VOCAB_SIZE, build_tokenizer

TOKENIZER = build_tokenizer()


@given(st.text())
@example("<think>1+2=3</think><answer>3</answer><|eos|>")
@example(" the  theory\t of\r\n numbers .!?")
@example("é ñ 漢字 🙂 \x00\x7f \u2028")
@example("٣ ² ½ 12")
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < VOCAB_SIZE for i in ids)


@given(st.binary())
def test_any_bytes_round_trip(data: bytes) -> None:
    text = data.decode("latin-1")
    assert str(TOKENIZER.decode(TOKENIZER.encode(text))).encode("latin-1") == data


@given(st.integers(min_value=0))
def test_digits_stand_alone(number: int) -> None:
    tokens = TOKENIZER.tokenize(f"{number}")
    assert tokens == list(str(number))


def test_every_id_has_a_token() -> None:
    vocabulary = TOKENIZER.get_vocab()
    assert sorted(vocabulary.values()) == list(range(VOCAB_SIZE))
    assert len(TOKENIZER) == VOCAB_SIZE == preset_config("tiny").vocab_size
    assert VOCAB_SIZE % 64 == 0


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, *TAG_TOKENS])
def test_named_tokens_are_single(token: str) -> None:
    assert TOKENIZER(f"1{token}2")["input_ids"][1:-1] == [TOKENIZER.convert_tokens_to_ids(token)]


def test_skipping_special_tokens_keeps_the_tags() -> None:
    ids = TOKENIZER.encode("<|bos|><|User|>1+1<|Assistant|><think>2</think><answer>2</answer><|eos|><|pad|>")
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "1+1<think>2</think><answer>2</answer>"


def test_merges_shorten_english() -> None:
    assert TOKENIZER.tokenize("the theory and") == ["the", "Ġthe", "or", "y", "Ġand"]


def test_nothing_is_added() -> None:
    assert TOKENIZER.encode("1") == TOKENIZER.encode("1", add_special_tokens=False) == [TOKENIZER.get_vocab()["1"]]
    assert TOKENIZER.encode("") == []


def test_chat_template() -> None:
    turn = [{"role": "user", "content": "1+2=?"}]
    prompt = str(TOKENIZER.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    assert prompt == "<|bos|><|User|>1+2=?<|Assistant|><think>"
    assert TOKENIZER.apply_chat_template(turn, tokenize=False) == "<|bos|><|User|>1+2=?"
    answered = [*turn, {"role": "assistant", "content": "<think>3</think><answer>3</answer>"}]
    whole = TOKENIZER.apply_chat_template(answered, tokenize=False)
    assert whole == prompt + "3</think><answer>3</answer><|eos|>"
    with_system = [{"role": "system", "content": "Be brief."}, *turn]
    assert TOKENIZER.apply_chat_template(with_system, tokenize=False) == "<|bos|>Be brief.<|User|>1+2=?"
    ids = TOKENIZER.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert ids == TOKENIZER.encode(prompt)
    with pytest.raises(Exception, match="roles are system, user and assistant, got tool"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_a_saved_folder_loads_identically(tmp_path: Path, beside_a_model: bool) -> None:
    if beside_a_model:
        preset_config("tiny").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again.special_tokens_map == TOKENIZER.special_tokens_map
    assert again.chat_template == TOKENIZER.chat_template
    for text in ("<|User|>the 42 <think> x</think>", "é🙂 \n\n  ", "</answer><|eos|>"):
        ids = again.encode(text)
        assert ids == TOKENIZER.encode(text)
        assert again.decode(ids) == text
        assert again.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids, skip_special_tokens=True)
