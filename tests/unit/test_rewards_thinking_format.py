"""One closed thinking, then one answer."""

import time

import pytest

from rewards.thinking_format import thinking_format
from rollout.template import split_reasoning
from tests.unit.reward_groups import completion


def judge(text: str, forced_think: bool = True, **options) -> float:
    return thinking_format(completion(text), split_reasoning(text, forced_think=forced_think), forced_think, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t</think><answer>6</answer>", 1.0),
        ("t</think>\n<answer> 6 </answer>\n", 1.0),
        ("</think><answer>6</answer>", 0.0),
        (" \n\t</think><answer>6</answer>", 0.0),
        ("\u200b\u2060</think><answer>6</answer>", 0.0),
        ("...</think><answer>6</answer>", 0.0),
        ("想</think><answer>六</answer>", 1.0),
        ("t</think><answer>.</answer>", 0.0),
        ("t <answer>6</answer></think><answer>6</answer>", 0.0),
        ("t <answer></think><answer>6</answer>", 0.0),
        ("t</think><answer>6</think></answer>", 0.0),
        ("t</think><answer><think>6</answer>", 0.0),
        ("t</think><answer>6</answer></answer>", 0.0),
        ("t</think><answer>6</ANSWER></answer>", 0.0),
        ("t<Think>u</think><answer>6</answer>", 0.0),
        ("t< /think>u</think><answer>6</answer>", 0.0),
        ("t<think/></think><answer>6</answer>", 0.0),
        ("a <thinker> b</think><answer>6 < 7</answer>", 1.0),
        ("t</think>6", 0.0),
        ("t</think><answer></answer>", 0.0),
        ("t</think><answer> \n</answer>", 0.0),
        ("t</think>", 0.0),
        ("t<answer>6</answer>", 0.0),
        ("", 0.0),
        ("t</think><answer>6</answer><answer>6</answer>", 0.0),
        ("t</think><answer>5<answer>6</answer>", 0.0),
        ("t</think>so <answer>6</answer>", 0.0),
        ("t</think><answer>6</answer> indeed", 0.0),
        ("t</think>u</think><answer>6</answer>", 0.0),
        ("<think>t</think><answer>6</answer>", 0.0),
        ("t<think>u</think><answer>6</answer>", 0.0),
        ("t</think><answer>6</answer><think>", 0.0),
    ],
)
def test_where_the_prompt_opens_the_thinking(text, expected):
    assert judge(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>t</think><answer>6</answer>", 1.0),
        (" \n<think>t</think> <answer>6</answer>", 1.0),
        ("t</think><answer>6</answer>", 0.0),
        ("well <think>t</think><answer>6</answer>", 0.0),
        ("<think>t</think><think>u</think><answer>6</answer>", 0.0),
        ("<answer>6</answer>", 0.0),
    ],
)
def test_where_the_policy_opens_it_itself(text, expected):
    assert judge(text, forced_think=False) == expected


def test_without_answer_tags_any_text_is_an_answer():
    assert judge("t</think>6", answer_tags=False) == 1.0
    assert judge("t</think> ", answer_tags=False) == 0.0
    assert judge("t</think>u</think>6", answer_tags=False) == 0.0
    assert judge("t</think><answer>6</answer>", answer_tags=False) == 0.0
    assert judge(" </think>6", answer_tags=False) == 0.0


def test_a_megabyte_of_tags_takes_no_time():
    for text in ("<think>" * 150_000, "<" * 1_000_000, "</ " * 330_000, "." * 1_000_000 + "</think><answer>6</answer>"):
        start = time.process_time()
        assert judge(text) == 0.0
        assert time.process_time() - start < 2
