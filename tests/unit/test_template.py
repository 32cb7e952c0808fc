"""Taking completions apart, and rendering prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.template import (
    Reasoning,
    answer_in_tags,
    extract_answer,
    forces_thinking,
    prompt_text,
    render_prompt,
    split_reasoning,
)
from rollout.types import Problem

PROBLEM = Problem(id="p1", prompt="3+5-2")


class CharacterTokenizer:
    """One token per character; 1 stands for the beginning of a text."""

    chat_template = "present"

    def apply_chat_template(self, conversation, add_generation_prompt=False, tokenize=True, **options):
        assert add_generation_prompt and not tokenize
        return "".join(f"[{m['role']}]{m['content']}" for m in conversation) + "<think>"

    def encode(self, text, add_special_tokens=True, **options):
        return [1] * add_special_tokens + [ord(character) for character in text]


@pytest.mark.parametrize(
    ("text", "forced", "expected"),
    [
        ("a</think>b", True, Reasoning("a", "b", True)),
        ("a</think> <answer>b</answer>\n", True, Reasoning("a", "<answer>b</answer>", True)),
        ("</think>b", True, Reasoning("", "b", True)),
        ("a", True, Reasoning("a", "", False)),
        ("", True, Reasoning("", "", False)),
        # The policy repeats the tag that the prompt has opened already.
        ("<think>a</think>b", True, Reasoning("a", "b", True)),
        (" \n<think>a</think>b", True, Reasoning("a", "b", True)),
        # A later tag is part of the thinking.
        ("a<think>b</think>c", True, Reasoning("a<think>b", "c", True)),
        # The first end counts.
        ("a</think>b</think>c", True, Reasoning("a", "b</think>c", True)),
        ("<think>a</think>b", False, Reasoning("a", "b", True)),
        ("well <think>a</think>b", False, Reasoning("a", "b", True)),
        ("<think>a", False, Reasoning("a", "", False)),
        ("  b ", False, Reasoning(None, "b", True)),
        ("a</think>b", False, Reasoning("a", "b", True)),
        ("a</think><think>b", False, Reasoning("a", "<think>b", True)),
    ],
)
def test_split_reasoning(text, forced, expected):
    assert split_reasoning(text, forced_think=forced) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3+5=8</think><answer>8</answer>", "8"),
        ("3+5=8</think><answer> 8\n</answer>", "8"),
        ("t</think>so 8", "so 8"),
        ("t</think><answer>7</answer><answer>8</answer>", "8"),
        ("t</think><answer></answer>", ""),
        ("t</think>", ""),
        # Never closed: whatever it says, it has not answered.
        ("<answer>8</answer>", None),
        ("", None),
        # Tags within the thinking never count.
        ("<answer>9</answer></think>8", "8"),
        # An answer that was cut off is not complete: the text stands as it is.
        ("t</think><answer>8", "<answer>8"),
        # The last complete pair wins over a torn one after it.
        ("t</think><answer>8</answer><answer>9", "8"),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


def test_extract_answer_without_any_thinking():
    assert extract_answer("<answer>8</answer>", forced_think=False) == "8"
    assert extract_answer("8", forced_think=False) == "8"


plain = st.text(st.characters(blacklist_characters="<>"), max_size=20)


@given(plain, plain)
def test_what_was_put_together_comes_apart(thinking, answer):
    assert split_reasoning(f"{thinking}</think>{answer}") == Reasoning(thinking, answer.strip(), True)
    assert extract_answer(f"{thinking}</think><answer>{answer}</answer>") == answer.strip()


PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " "])


@given(st.lists(PIECES, max_size=12).map("".join), st.booleans())
def test_any_order_of_tags_is_taken_apart_without_an_error(text, forced):
    reasoning = split_reasoning(text, forced_think=forced)
    assert reasoning.closed == ("</think>" in text or (not forced and "<think>" not in text))
    assert reasoning.closed or not reasoning.answer
    assert (extract_answer(text, forced_think=forced) is None) == (not reasoning.closed)


def test_answer_in_tags_needs_a_complete_pair():
    assert answer_in_tags("</answer>3<answer>") is None
    assert answer_in_tags("3") is None
    assert answer_in_tags("<answer>3</answer>") == "3"


def test_chat_template_ends_in_thinking_and_adds_no_second_start_token():
    text = prompt_text(PROBLEM, CharacterTokenizer(), "chat")
    assert text == "[user]3+5-2<think>"
    assert forces_thinking(text) and forces_thinking(text + "\n")
    assert render_prompt(PROBLEM, CharacterTokenizer(), "chat") == [ord(c) for c in text]


def test_raw_and_r1_zero_take_the_usual_special_tokens():
    assert render_prompt(PROBLEM, CharacterTokenizer(), "raw") == [1] + [ord(c) for c in "3+5-2"]
    text = prompt_text(PROBLEM, CharacterTokenizer(), "r1-zero")
    assert "<think> reasoning process here </think>" in text
    assert text.endswith("User: 3+5-2. Assistant:")
    assert not forces_thinking(text)
    assert render_prompt(PROBLEM, CharacterTokenizer(), "r1-zero")[0] == 1


def test_braces_in_a_problem_are_text():
    problem = Problem(id="b", prompt=r"\frac{1}{2} {prompt}")
    assert r"\frac{1}{2} {prompt}" in prompt_text(problem, CharacterTokenizer(), "r1-zero")


def test_unknown_template_is_refused_by_name():
    with pytest.raises(ValueError, match="chat, r1-zero, raw, got 'chatml'"):
        render_prompt(PROBLEM, CharacterTokenizer(), "chatml")


def test_a_tokenizer_without_chat_template_is_refused():
    tokenizer = CharacterTokenizer()
    tokenizer.chat_template = ""
    with pytest.raises(ValueError, match="no chat template"):
        render_prompt(PROBLEM, tokenizer, "chat")
    assert render_prompt(PROBLEM, tokenizer, "raw")


def test_an_empty_prompt_is_refused():
    class Mute(CharacterTokenizer):
        def encode(self, text, add_special_tokens=True, **options):
            return []

    with pytest.raises(ValueError, match="'p1' renders to an empty prompt"):
        render_prompt(PROBLEM, Mute(), "raw")
