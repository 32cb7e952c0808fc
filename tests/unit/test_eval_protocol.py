"""Protocols, and what a base model's text becomes before it is graded."""

import gzip
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.benchmark import find_benchmark
from evals.benchmark_data import as_answer
from evals.continuation import after_prefix, cut_at
from evals.protocol import PROTOCOLS, Protocol, protocol_of
from rewards.accuracy import quick_equal
from rewards.answers import final_answer
from rewards.choice import final_letter
from rewards.code_tests import last_program
from rollout.template import split_reasoning
from rollout.types import Problem, SamplingParams

BASE, CHAT = PROTOCOLS["few-shot"], PROTOCOLS["deepseek"]


# --- protocols


def test_protocols():
    assert (CHAT.sampling.temperature, CHAT.sampling.top_p, CHAT.sampling.max_tokens) == (0.6, 0.95, 32_768)
    assert (CHAT.template, CHAT.force_think, CHAT.samples) == ("chat", True, 0)
    greedy = PROTOCOLS["greedy"]
    assert (greedy.sampling.temperature, greedy.samples, greedy.template) == (0.0, 1, "chat")
    assert (BASE.template, BASE.force_think, BASE.samples) == ("raw", False, 1)
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())


def test_what_a_protocol_takes_from_the_benchmark():
    benchmark = find_benchmark("gsm8k")
    assert [CHAT.samples_for(benchmark), BASE.samples_for(benchmark)] == [4, 1]
    assert [CHAT.shots_for(benchmark), BASE.shots_for(benchmark)] == [0, 8]
    assert [CHAT.sampling_for(benchmark).stop, BASE.sampling_for(benchmark).stop] == [(), ("\nQuestion:",)]
    assert protocol_of("few-shot", stop="END").sampling_for(benchmark).stop == ("END",)
    with pytest.raises(ValueError, match="gsm8k: 9 few-shot examples are asked for and it has 8"):
        protocol_of("few-shot", num_fewshot=9).shots_for(benchmark)


def test_changes_of_a_protocol():
    changed = protocol_of("deepseek", temperature=1.0, samples=3, max_tokens=None, template="r1-zero")
    assert (changed.sampling.temperature, changed.sampling.top_p, changed.sampling.max_tokens) == (1.0, 0.95, 32_768)
    assert (changed.samples, changed.template, changed.force_think) == (3, "r1-zero", False)
    assert protocol_of("deepseek") == CHAT and protocol_of("deepseek", temperature=0.0).samples == 1
    assert protocol_of("few-shot", temperature=0.6, samples=4).samples == 4


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepsek", {}, "there is no protocol 'deepsek'; did you mean 'deepseek'"),
        ("deepseek", {"temprature": 1.0}, "a protocol has no 'temprature'; did you mean 'temperature'"),
        ("deepseek", {"samples": 0}, "samples must be >= 1, got 0"),
        ("deepseek", {"samples": -1}, "samples must be >= 0"),
        ("greedy", {"samples": 4}, "temperature 0 draws the same completion each time"),
        ("deepseek", {"top_p": 0.0}, "top_p must be in"),
        ("deepseek", {"max_tokens": 0}, "max_tokens must be >= 1"),
        ("deepseek", {"template": "chatml"}, "template must be one of chat, r1-zero, raw"),
        ("deepseek", {"template": "raw", "force_think": True}, "force_think is for the chat template"),
        ("few-shot", {"num_fewshot": -2}, "num_fewshot must be >= 0"),
    ],
)
def test_what_a_protocol_refuses(name, changes, message):
    with pytest.raises(ValueError, match=message):
        protocol_of(name, **changes)


def test_a_protocol_is_written_out_in_full():
    row = protocol_of("few-shot", stop=["a", "b"]).to_json()
    assert row == {
        "name": "few-shot", "samples": 1, "template": "raw", "force_think": False, "num_fewshot": -1,
        "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_tokens": 2048, "stop": ["a", "b"]},
    }  # fmt: skip
    again = Protocol(
        **{**row, "sampling": SamplingParams(**{**row["sampling"], "stop": tuple(row["sampling"]["stop"])})}
    )
    assert again == protocol_of("few-shot", stop=["a", "b"])


# --- what a base model's text becomes


GSM8K = find_benchmark("gsm8k")


def boxed_form(text: str) -> str:
    return as_answer(GSM8K, BASE, Problem(id="1", prompt="?", answer="18"), text)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        ("9 * 2 = 18. The answer is 18.", "18"),
        ("so the answer is: $18.", "$18"),
        ("The answer is $18$.", "18"),
        ("9 * 2 = <<9*2=18>>18\nA: 18", "18"),
        ("The answer is 17. No: 9 * 2 = 18.\nThe answer is 18.", "18"),
        ("#### 18\n\nQuestion: And 3 + 4?\nAnswer: 3 + 4 = 7\n#### 7", "18"),
        ("#### 1,800 \nand more", "1,800"),
    ],
)
def test_the_answer_of_a_continuation_gets_a_box(text, box):
    found = boxed_form(text)
    assert found.endswith(f"\n\\boxed{{{box}}}") and found.count("boxed") == 1
    assert "And 3 + 4" not in found


def test_a_continuation_without_an_answer_or_with_a_box_stays():
    for text in (
        "I do not know.",
        "The answer is",
        "#### ",
        "It is \\boxed{18}. The answer is 3.",
        "<answer>18</answer>",
    ):
        assert boxed_form(text) == text


def test_only_plain_continuations_change():
    text = "#### 18\n\nQuestion: more"
    for protocol in (CHAT, PROTOCOLS["greedy"], protocol_of("deepseek", template="r1-zero")):
        assert as_answer(find_benchmark("gsm8k"), protocol, Problem(id="1", prompt="?"), text) == text


@given(st.text(alphabet="#A 1\n.Qb", max_size=40), st.integers(0, 10**9))
def test_a_continuation_is_changed_once(text, answer):
    once = boxed_form(f"{text}\n#### {answer}")
    assert boxed_form(once) == once and once.endswith(f"\\boxed{{{answer}}}")


def test_openais_own_completions_get_openais_own_labels(data_folder):
    path = data_folder.parent / "cases" / "math_answers" / "real_gsm8k_openai.jsonl.gz"
    if not path.is_file():
        pytest.skip("the completions are not there")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    differing = []
    for row in rows:
        answer = final_answer(split_reasoning(boxed_form(row["completion"]), forced_think=False))
        if (answer is not None and quick_equal(row["gold"], answer) is True) != row["expected"]:
            differing.append(row["id"])
    assert len(rows) == 1500 and differing == []


def test_a_function_body_becomes_a_program():
    benchmark = find_benchmark("humaneval")
    row = {"task_id": "HumanEval/0", "prompt": "def double(x):\n    '''Twice x.'''\n"}
    problem = Problem(id="HumanEval/0", prompt=row["prompt"], metadata=row)
    text = as_answer(benchmark, BASE, problem, "    return 2 * x\n\n\ndef other():\n    pass\n")
    program = last_program(split_reasoning(text, forced_think=False))
    assert program == f"{row['prompt']}    return 2 * x\n"
    names: dict = {}
    exec(str(program), names)
    assert names["double"](4) == 8
    ticks = as_answer(
        replace(benchmark, until=("\ndef ",)), BASE, problem, "    return '''\n    ```\n    x\n    ```\n'''"
    )
    assert "```\n    x\n    ```" in str(last_program(split_reasoning(ticks, forced_think=False)))


def test_a_program_that_ends_at_its_fence():
    problem = Problem(id="1", prompt="?", metadata={"text": "t", "test_list": ["assert f(1) == 2"]})
    text = as_answer(
        find_benchmark("mbpp"), BASE, problem, "def f(x):\n    return x + 1\n```\n\nTask: more\n```\nno\n```"
    )
    assert last_program(split_reasoning(text, forced_think=False)) == "def f(x):\n    return x + 1\n"


def test_letters_and_tags():
    gpqa = find_benchmark("gpqa_diamond")
    text = as_answer(gpqa, BASE, Problem(id="1", prompt="?", answer="C"), " (C)\nQuestion: …(D)")
    assert final_letter(split_reasoning(text, forced_think=False)) == "C"
    gym = find_benchmark("reasoning_gym:chain_sum")
    assert as_answer(gym, BASE, Problem(id="1", prompt="?"), "The answer is 12.\nQuestion:").endswith(
        "<answer>12</answer>"
    )


def test_pieces_of_a_continuation():
    assert cut_at("a\nQ: b\nA: c", ("\nA:", "\nQ:")) == "a" and cut_at("a", ()) == "a"
    assert after_prefix("x = 3\ny = 4", r"(?:x|y) = (\d)") == "4"
    assert after_prefix("nothing", "####") is None
