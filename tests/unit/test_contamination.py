"""Contamination: what is copied is found, what is not is not, however it is typed and wherever it stands."""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evals.overlap
from evals.contamination import Hit, Tally, check_contamination, hits_in, passages_of, texts_of
from evals.overlap import OverlapIndex, Passage
from evals.wording import half_words, normalise, symbols, words
from pipelines import eval_contamination
from rollout.prompts import ORIGINAL_PROMPT, DataConfig, fingerprints, load_problems
from rollout.types import Problem

DUCKS = (
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends "
    "every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg. How much?"
)
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrs"]  # 300


def index_of(*questions: str, n: int = 10) -> OverlapIndex:
    return OverlapIndex([Passage("b", str(i), question) for i, question in enumerate(questions)], n=n)


def found(index: OverlapIndex, text: str) -> list[str]:
    return sorted(match.passage.problem for match in index.find(text))


def numbered(first: int, last: int) -> str:
    return " ".join(WORDS[first:last])


# --- what a text says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Janet’s  Ducks,\tlay 16!", "janet s ducks lay 16"),
        ("1,234,567 and 12,34 and 1{,}000 and 2\\,000", "1234567 and 12 34 and 1000 and 2000"),
        (r"$\left( \dfrac{1}{2} \right)\quad\text{cm}$", "frac 1 2 cm"),
        (r"\(x\cdot 3.50\)", "x 3.50"),
        ("x² + 3x", "x 2 3 x"),
        ("１２ ﬁne fi​ne", "12 fine fine"),
        (r"90^\circ = 90° = 90^{\circ}", "90 90 90"),
        ("Straße STRASSE", "strasse strasse"),
        ("an [asy] and [asy]\nsize(150);\n[/asy] and [asy] draw", "an asy and and asy draw"),
        ("3*60 = <<3*60=180>>180, 1 << 2, <<what is 1 = 2>>", "3 60 180 1 2 what is 1 2"),
        ("求最大值3.5。", "求 最 大 值 3.5"),
        ("हिन्दी ภาษา", "हिन्दी ภ า ษ า"),
    ],
)
def test_words(text: str, said: str) -> None:
    assert " ".join(words(normalise(text))) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r"3 \times 4 \le x", "3 * 4 ≤ x"),
        ("3×4 ≤ x", "3 * 4 ≤ x"),
        ("3 − 4", "3 - 4"),
        ("a well-known **bold** word", "a well known bold word"),
        ("(2+3)^2 = 25.", "( 2 + 3 ) ^ 2 = 25"),
        (r"\(x\) \[y\] $z$ `a` {b}", "x y z a b"),
        ("[[1, 0], [1]]", "[ [ 1 0 ] [ 1 ] ]"),
        ("###  # |_Q__| 5 %", "### # | _ q __ | 5 %"),
        ("p → ¬q ✅✅❌", "p → ¬ q ✅✅ ❌"),
    ],
)
def test_symbols(text: str, said: str) -> None:
    assert " ".join(token for token, _, _ in symbols(normalise(text))) == said


def test_a_character_of_a_script_without_blanks_is_half_a_word() -> None:
    assert [half_words(word) for word in ("duck", "3.5", "é", "求", "が", "ไ", "한국")] == [2, 2, 2, 1, 1, 1, 2]


# --- the span rule ---------------------------------------------------------------------------------------------------


def test_ten_words_are_found_at_every_place_and_nine_are_not() -> None:
    """By hand: 10 of 20 words are shared, wherever they begin in the question and in the text."""
    index = index_of(numbered(0, 20))
    for start in range(11):
        for before in range(7):
            text = " ".join([*WORDS[100 : 100 + before], *WORDS[start : start + 10], *WORDS[110:115]])
            [match] = index.find(text)
            assert (match.words, match.share, match.span) == (10, 0.5, numbered(start, start + 10))
            short = " ".join([*WORDS[100 : 100 + before], *WORDS[start : start + 9], *WORDS[110:115]])
            assert index.find(short) == []


def test_a_copy_with_one_changed_word_is_covered_on_both_sides() -> None:
    """By hand: 30 words, the 13th changed: runs of 12 and 17 are shared, 29/30 in all."""
    [match] = index_of(numbered(0, 30)).find(" ".join([*WORDS[:12], "other", *WORDS[13:30]]))
    assert (match.words, match.share) == (17, pytest.approx(29 / 30))
    [match] = index_of(numbered(0, 30)).find(" ".join([*WORDS[:24], "other", *WORDS[25:30]]))
    assert (match.words, match.share) == (24, pytest.approx(24 / 30)), "five words alone are no shared run"


def test_a_run_that_occurs_twice_in_a_text_counts_once() -> None:
    [match] = index_of(numbered(0, 20)).find(" ".join([*WORDS[:15], *WORDS[5:20], *WORDS[:12]]))
    assert (match.words, match.share) == (15, 1.0)


@given(
    length=st.integers(10, 60),
    before=st.lists(st.sampled_from([*WORDS, "-", "\n", "=", "7"]), max_size=20),
    after=st.lists(st.sampled_from([*WORDS, "+", ".", "12"]), max_size=20),
    seed=st.integers(0, 10**6),
)
def test_a_copied_question_is_found_wherever_it_stands(
    length: int, before: list[str], after: list[str], seed: int
) -> None:
    rng = random.Random(seed)
    question = rng.choices(WORDS, k=length)  # words may repeat
    others = [" ".join(rng.choices(WORDS, k=30)) for _ in range(5)]
    index = index_of(" ".join(question), *others)
    [match] = [m for m in index.find(" ".join([*before, *question, *after])) if m.passage.problem == "0"]
    assert match.share == 1.0 and match.words >= length


@given(
    question=st.lists(st.sampled_from("abc"), min_size=10, max_size=40),
    text=st.lists(st.sampled_from("abcd"), max_size=60),
)
def test_the_span_rule_is_that_of_sets_of_ten_grams(question: list[str], text: list[str]) -> None:
    """Against the definition itself: over three letters nearly everything is shared somewhere."""

    def grams(said: list[str]) -> set[tuple[str, ...]]:
        return {tuple(said[i : i + 10]) for i in range(len(said) - 9)}

    shared = grams(question) & grams(text)
    matches = index_of(" ".join(question)).find(" ".join(text))
    assert bool(matches) == bool(shared)
    if matches:
        covered = {
            p for i in range(len(question) - 9) if tuple(question[i : i + 10]) in shared for p in range(i, i + 10)
        }
        assert matches[0].share == pytest.approx(len(covered) / len(question))
        longest = max(
            length
            for i in range(len(question))
            for length in range(10, len(question) - i + 1)
            if f" {' '.join(question[i : i + length])} " in f" {' '.join(text)} "
        )
        assert matches[0].words == longest


@given(st.integers(0, 10**6), st.sampled_from([" ", "\t", "  ", " \t ", " ", "\n"]))
def test_case_white_space_and_punctuation_change_nothing(seed: int, blank: str) -> None:
    rng = random.Random(seed)
    text = " ".join(rng.choices([*WORDS, DUCKS, numbered(0, 12), r"\frac{1}{2}", "1,000", "x = 3"], k=12))
    index = index_of(DUCKS, numbered(0, 20), "Compute 3 - x.")
    changed = "".join(rng.choice((c.upper(), c.lower())) for c in text).replace(" ", blank)
    changed = changed.replace("’", "'").replace("breakfast ", "breakfast, ").replace("=", r"\quad = \,")
    as_json = [(m.passage.problem, m.span, m.words, m.share) for m in index.find(text)]
    assert [(m.passage.problem, m.span, m.words, m.share) for m in index.find(changed)] == as_json


def test_other_lengths_of_runs() -> None:
    for n in range(4, 16):
        index = index_of(numbered(0, 40), n=n)
        assert found(index, numbered(7, 7 + n)) == ["0"] and found(index, numbered(7, 6 + n)) == []
    with pytest.raises(ValueError, match="at least 4 words long, got 3"):
        index_of("x", n=3)


def test_hashes_that_collide_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = evals.overlap._hashes

    def worst(said: Any, length: int, stride: int = 1) -> Iterator[int]:
        return (value % 2 for value in real(said, length, stride))

    monkeypatch.setattr(evals.overlap, "_hashes", worst)
    monkeypatch.setattr(evals.overlap, "COMMON_LEAST", 10**6)  # two hashes only: all would be common
    index = index_of(numbered(0, 20), numbered(30, 50), "What is 3 + 4?")
    assert found(index, numbered(3, 14)) == ["0"]
    assert found(index, numbered(3, 12)) == []
    assert found(index, "What is 3 + 4?") == ["2"]


# --- common phrases --------------------------------------------------------------------------------------------------

FRAME = "Let x be a positive real number such that the following equation holds for all y:"


def test_a_common_phrase_alone_is_no_hit_and_what_follows_it_is() -> None:
    """Fourteen words that six of six problems begin with: 14 shared words count in none, five own ones do."""
    questions = [f"{FRAME} {numbered(20 * i, 20 * i + 15)}" for i in range(6)]
    index = index_of(*questions)
    assert found(index, f"{FRAME} {numbered(200, 230)}") == []
    assert found(index, f"{FRAME} {numbered(20, 24)} {numbered(200, 230)}") == [], "four own words"
    assert found(index, f"{FRAME} {numbered(20, 25)} {numbered(200, 230)}") == ["1"], "five"
    assert found(index, f"{FRAME} {numbered(20, 35)}") == ["1"]
    assert found(index, numbered(21, 32)) == ["1"]
    assert found(index_of(*questions[:4]), FRAME) == ["0", "1", "2", "3"], "four problems do not make a phrase common"


def test_the_same_question_over_and_over_is_not_a_common_phrase() -> None:
    assert found(index_of(*[DUCKS] * 8, numbered(0, 20)), f"Q: {DUCKS}") == [str(i) for i in range(8)]


def test_a_copy_is_found_though_every_piece_of_it_that_is_looked_up_is_common() -> None:
    """Each sixth run of five words stands in six problems; what parts them is the question's own."""
    blocks = [numbered(5 * i, 5 * i + 5) for i in range(12)]
    questions = [
        " ".join(f"{block} {own}" for block, own in zip(blocks, WORDS[100 + 12 * i :], strict=False)) for i in range(6)
    ]
    index = index_of(*questions)
    for before in range(6):
        assert found(index, " ".join([*WORDS[250 : 250 + before], questions[2], "end"])) == ["2"]


def test_own_words_in_the_middle_of_a_frame() -> None:
    """Two own words are too few for a span though every look-up could find it: the question is compared whole."""
    index = index_of(*(f"{numbered(0, 7)} {WORDS[100 + i]} {i} {numbered(7, 14)}" for i in range(6)))
    assert found(index, f"Q {numbered(0, 7)} {WORDS[103]} 3 {numbered(7, 14)} A") == ["3"]
    assert found(index, f"Q {numbered(0, 7)} {WORDS[103]} 4 {numbered(7, 14)} A") == []


def test_what_a_problem_says_more_than_once_is_still_its_own() -> None:
    solutions = [
        Passage("b", "7", f"{numbered(20 * i, 20 * i + 9)} {numbered(200, 212)}", "solution") for i in range(8)
    ]
    [match] = OverlapIndex([Passage("b", "7", DUCKS), *solutions[:1]]).find(numbered(200, 212))
    assert match.words == 12
    assert len(OverlapIndex([Passage("b", "7", DUCKS), *solutions]).find(numbered(200, 212))) == 8


def test_boards_of_equal_words_are_not_the_same_question() -> None:
    boards = ["##\n#", "# #\n##", "#\n#\n###", "###\n\n#", "####", "# ### #"]
    index = index_of(*(f"{FRAME}\n{board}" for board in boards))
    for number, board in enumerate(boards):
        assert found(index, f"{FRAME} {board}") == [str(number)]
    assert found(index, f"{FRAME}\n#####") == []


def test_a_common_phrase_of_one_benchmark_is_none_of_another() -> None:
    many = [Passage("many", str(i), f"{FRAME} {numbered(20 * i, 20 * i + 15)}") for i in range(6)]
    index = OverlapIndex([*many, Passage("one", "alone", f"{FRAME} {numbered(200, 215)}")])
    assert found(index, f"{FRAME} and no more") == ["alone"]


def chain(rng: random.Random, terms: int) -> str:
    return "".join(f" {rng.choice('+-')} {rng.randint(0, 9)}" for _ in range(terms)).removeprefix(" +").strip()


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(3, 4))
def test_of_generated_problems_only_the_copy_is_found(seed: int, terms: int) -> None:
    """All share ten words; they are told apart by their numbers and signs."""
    rng = random.Random(seed)
    frame = "State the final answer to the following arithmetic problem:"
    sums = list(dict.fromkeys(chain(rng, terms) for _ in range(30)))
    held, train = sums[:20], sums[20:]
    index = index_of(*(f"{frame} {each} =" for each in held))
    for number, each in enumerate(held):
        assert found(index, f"{frame} {each} =") == [str(number)]
        assert found(index, f"Q.\n{frame.upper()}\n{each.replace(' ', '')} = ?\nA. 7") == [str(number)]
        assert found(index, f"{frame} {each} + 3 =") == []
    for each in train:
        assert found(index, f"{frame} {each} =") == []


# --- short questions, other scripts ----------------------------------------------------------------------------------

SHORT = r"Compute $\dfrac{3}{4} - x^2$."


@pytest.mark.parametrize(
    "text",
    [
        SHORT,
        r"compute \frac34 - x^{2}".replace("34", "{3}{4}"),
        f"Problem 3: {SHORT} Show your work.",
        f"First line\n- {SHORT[:-1]}\nanother line",
        r"(b) Compute $\tfrac 3 4 - x²$ = ?",
        f"<|user|>{SHORT[:-1]}<|end|>",
    ],
)  # fmt: skip
def test_a_short_question_is_found_where_it_stands_by_itself(text: str) -> None:
    [match] = index_of(SHORT, "What is it?").find(text)
    assert (match.passage.problem, match.share, match.words) == ("0", 1.0, 6)


@pytest.mark.parametrize(
    "text",
    [
        r"Compute $\frac{3}{4} + x^2$.",
        r"Compute $\frac{3}{4} - x^2 + 1$.",
        r"Compute $\frac{3}{4} - x^{2}y$.",
        r"We compute $\frac{3}{4} - x^2$.",
        r"Compute $\frac{3}{4} - x^2$ and add one.",
        r"Compute $\frac{3}{4} - x^{2.5}$.",
        "What is it? No one knows",
        "",
    ],
)
def test_a_short_question_is_not_found_in_another(text: str) -> None:
    assert index_of(SHORT, "What is").find(text) == []


def test_of_a_short_question_the_figure_is_a_part() -> None:
    index = index_of("What is x in the diagram?\n[asy] draw(A--B); [/asy]")
    assert found(index, "1. What is x in the diagram? [asy] draw(A--B); [/asy]\n") == ["0"]
    assert found(index, "What is x in the diagram? [asy] draw(A--C); [/asy]") == []
    assert found(index, "What is x in the diagram?") == []


def test_one_or_two_words_must_be_the_whole_text() -> None:
    index = index_of("3 + 4 =", "Why?", "")
    assert found(index, "3+4") == ["0"] and found(index, " 3 + 4 = ") == ["0"] and found(index, "why") == ["1"]
    assert found(index, "3 - 4") == [] and found(index, "Why? Because.") == [] and found(index, "4 + 3") == []


def test_compact_sums_are_told_apart() -> None:
    index = index_of("3+5-2", "-2+5+3")
    assert found(index, "3+5-2") == ["0"] and found(index, "-2+5+3") == ["1"] and found(index, "3 + 5 - 2 = ?") == ["0"]
    for other in ("3-5+2", "3+5-2+4", "1+3+5-2", "13+5-2", "3+5-21", "4-2+5+3", "3+5-2=6", "3+5-2.5"):
        assert found(index, other) == []


def test_a_text_without_words_is_known_by_its_fingerprint() -> None:
    [match] = index_of("★ ☆ ★ ?", DUCKS).find("★\t☆ ★ ?")
    assert (match.passage.problem, match.share, match.words, match.span) == ("0", 1.0, 0, "★ ☆ ★ ?")


def test_chinese() -> None:
    """Twenty characters count as ten words."""
    question = "珍妮特的鸭子每天下十六个蛋她每天早上早餐吃三个并用四个为朋友们烤松饼剩下的在市场上卖"
    index = index_of(question, "求最大值。")
    [match] = index.find(f"题目：{question[4:24]}，然后呢")
    assert (match.passage.problem, match.words, match.share) == ("0", 10, pytest.approx(20 / len(question)))
    assert index.find(question[4:23]) == []
    assert found(index, f"问：{question}答") == ["0"]
    fourteen = index_of("三角形的内角和等于多少度呢请说")
    assert (
        found(fourteen, "第二题：三角形的内角和等于多少度呢请说！") == ["0"]
        and found(fourteen, "三角形的内角和等于多少度呢") == []
    )
    assert found(index, "第一题。求最大值。谢谢") == ["1"] and found(index, "他求最大值。") == []


# --- rows, counts ----------------------------------------------------------------------------------------------------


def test_the_texts_of_a_row() -> None:
    row = {"q": "a", "n": 3, "chat": [{"role": "user", "content": "b"}, {"role": "x", "content": ["c"]}], "none": None}
    assert list(texts_of(row)) == ["a", "user", "b", "x", "c"]
    assert list(texts_of(row, ["none", "q"])) == ["a"]
    with pytest.raises(ValueError, match=r"no column 'question'; it has q, n, chat, none"):
        list(texts_of(row, ["question"]))


def test_questions_and_solutions_are_passages() -> None:
    problem = Problem(
        id="7", prompt="Q", answer="3", metadata={"Solution": numbered(0, 20), "test": "assert", "level": 3}
    )
    assert [(p.part, p.text) for p in passages_of("b", [problem])] == [("question", "Q"), ("solution", numbered(0, 20))]
    assert [p.part for p in passages_of("b", [problem], solutions=False)] == ["question"]
    index = OverlapIndex(passages_of("b", [problem]))
    [hit] = hits_in(index, "t:1", [numbered(30, 40), numbered(5, 17)])
    assert hit.to_json() == {
        "benchmark": "b", "problem": "7", "train_row": "t:1", "part": "solution", "span": numbered(5, 17), "words": 12,
        "share": 0.6,
    }  # fmt: skip


def test_of_a_question_in_a_frame_the_bare_question_counts_too() -> None:
    rows = [{"problem": SHORT, "type": "Problem", "level": 1}, {"problem": DUCKS, "type": "Ducks"}]
    asked = [
        Problem(id=str(i), prompt=f"Problem: {row['problem']}\nSolution:", metadata=row) for i, row in enumerate(rows)
    ]
    assert [p.text for p in passages_of("b", asked)] == [asked[0].prompt, SHORT, asked[1].prompt, DUCKS]
    index = OverlapIndex(passages_of("b", asked))
    [hit] = hits_in(index, "t:1", [f"Q. {SHORT}"])
    assert (hit.problem, hit.share) == ("0", 1.0)
    [hit] = hits_in(index, "t:1", [DUCKS])
    assert (hit.problem, hit.share) == ("1", 1.0)


def test_a_short_question_in_a_long_frame() -> None:
    tests = " ".join(f"assert area({i}) == {i * i}" for i in range(12))
    text = "Write a function for the area of a square."
    problem = Problem(
        id="7", prompt=f"{text} The code must pass {tests}", metadata={"text": text, "level": "must pass"}
    )
    assert [p.text for p in passages_of("b", [problem])] == [problem.prompt, text]
    assert OverlapIndex(passages_of("b", [problem])).find(f"Task: {text}\n")[0].share == 1.0


def test_a_subject_that_a_question_names_is_no_question() -> None:
    problem = Problem(id="7", prompt="Algebra: what is x when 3x = 4?", metadata={"type": "Algebra"})
    assert OverlapIndex(passages_of("b", [problem])).find("algebra") == []


def test_a_final_answer_is_no_solution() -> None:
    gold = "x^5 - x^4 + x^3 - x^2 + x - 1"
    problem = Problem(id="7", prompt=DUCKS, answer=gold, metadata={"answer": gold, "code": numbered(0, 9)})
    assert [p.text for p in passages_of("b", [problem])] == [DUCKS, numbered(0, 9)]


def test_a_short_solution_is_not_compared_whole() -> None:
    problem = Problem(id="7", prompt=DUCKS, metadata={"answer": "The answer is 18"})
    assert OverlapIndex(passages_of("b", [problem])).find("The answer is 18") == []


def test_a_row_gives_one_hit_per_problem_the_gravest() -> None:
    index = OverlapIndex([Passage("b", "7", numbered(0, 20)), Passage("b", "7", numbered(50, 100), "solution")])
    texts = [numbered(0, 10), numbered(2, 16), numbered(50, 75)]
    [hit] = hits_in(index, "t:1", texts)
    assert (hit.part, hit.share, hit.words) == ("question", 0.7, 14)
    assert hits_in(index, "t:1", texts, min_share=0.71) == []
    assert len(hits_in(index, "t:1", texts, min_share=0.7)) == 1


def hit(problem: str, row: int, share: float, length: int = 10) -> Hit:
    return Hit(
        benchmark="b", problem=problem, train_row=f"t:{row}", part="question", span="", words=length, share=share
    )


def test_a_tally_ranks_counts_and_stays_small() -> None:
    tally = Tally({"b": 5, "c": 3}, keep=2)
    tally.add([])
    for row in range(1000):
        tally.add([hit("p", row, (row % 100) / 100), hit("q", row, 0.5, 10 + (row == 7))])
    answer = tally.to_json()
    assert (answer["ok"], answer["n_train"], answer["train_rows"]) == (False, 1001, 1000)
    assert answer["benchmarks"]["c"] == {"n": 3, "contaminated": 0, "hits": 0, "rows": []}
    found = answer["benchmarks"]["b"]
    assert (found["n"], found["contaminated"], found["hits"]) == (5, 2, 2000)
    rows = [(row["problem"], row["train_row"], row["share"]) for row in found["rows"]]
    assert rows == [("p", "t:99", 0.99), ("p", "t:199", 0.99), ("q", "t:7", 0.5), ("q", "t:0", 0.5)]
    assert Tally({"b": 1}).to_json()["ok"] is True


# --- the recipe's check ----------------------------------------------------------------------------------------------


def problems(*prompts: str, **more: Any) -> list[Problem]:
    return [Problem(id=f"p{i}", prompt=prompt, **more) for i, prompt in enumerate(prompts)]


def test_a_recipe_that_trains_on_what_it_evaluates_is_refused() -> None:
    train = problems(numbered(100, 120), f"Solve: {DUCKS}", DUCKS)
    with pytest.raises(ValueError) as caught:
        check_contamination(train, problems(DUCKS), mode="refuse", train_name="rl", heldout_name="gsm8k")
    text = str(caught.value)
    assert text.startswith(
        "rl problem 'p1' holds 100% of the question of gsm8k problem 'p0' ('janet s ducks lay 16 eggs"
    )
    assert "; 2 such pairs: take these rows out" in text and "set contamination to warn or off" in text
    assert len(text.splitlines()) == 1


def test_warn_and_off(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    found = check_contamination(problems(DUCKS), {"a": [], "b": problems(DUCKS)}, mode="warn", warn=said.append)
    assert [(h.benchmark, h.problem, h.train_row, h.share) for h in found] == [("b", "p0", "p0", 1.0)]
    assert len(said) == 1 and "holds 100% of the question of b problem 'p0'" in said[0]
    assert capsys.readouterr().err == ""
    check_contamination(problems(DUCKS), problems(DUCKS), mode="warn")
    assert capsys.readouterr().err.startswith("r1: warning: training problem 'p0' holds")
    assert check_contamination(iter(problems(DUCKS)), problems(DUCKS), mode="off") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "stop"}, "contamination must be one of refuse, warn, off, got 'stop'"),
        ({"mode": "warn", "min_share": 0}, r"must be in \(0, 1\], got 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_contamination([], [], **options)


def test_a_small_share_is_let_through_unless_asked_for() -> None:
    train, held = problems(numbered(0, 12)), problems(numbered(0, 30))
    assert check_contamination(train, held, mode="refuse") == []
    with pytest.raises(ValueError, match="holds 40% of the question"):
        check_contamination(train, held, mode="refuse", min_share=0.4)


def test_what_is_common_is_told_from_either_set() -> None:
    """FRAME is 14 of 29 words. In 6 of 6 held-out problems it is common, however much is trained on; so it is with 3
    held-out ones when 30 training problems have it; but not when one text that has it is there 30 times."""
    framed = [f"{FRAME} {numbered(10 * i, 10 * i + 15)}" for i in range(28)]
    others = [f"{WORDS[i % 300]} {i}" for i in range(1000)]
    held = problems(*(f"{FRAME} {' '.join(reversed(WORDS[15 * i : 15 * i + 15]))}" for i in range(6)))
    options: dict[str, Any] = {"mode": "warn", "min_share": 0.4, "warn": lambda text: None}
    assert check_contamination(problems(framed[0], *others), held, **options) == []
    assert check_contamination(problems(*framed), held[:3], **options) == []
    assert len(check_contamination(problems(*framed[:1] * 30), held[:3], **options)) == 90


def test_demonstrations_and_reference_solutions_are_looked_at() -> None:
    held = [Problem(id="h", prompt=DUCKS, metadata={"solution": numbered(0, 30)})]
    chat = {"messages": [{"role": "assistant", "content": f"So {numbered(0, 25)}"}]}
    for train in ([Problem(id="t", prompt="Q", answer=DUCKS)], [Problem(id="t", prompt="Q", metadata=chat)]):
        with pytest.raises(ValueError, match="training problem 't' holds"):
            check_contamination(train, held, mode="refuse")


def sums(size: int, seed: int, rewrite: str | None = None) -> list[Problem]:
    config = DataConfig(source="reasoning_gym:chain_sum", params={"min_terms": 3, "max_terms": 4, "max_digits": 1,
                        "min_digits": 1}, size=size, seed=seed, distinct=True, rewrite=rewrite)  # fmt: skip
    return [replace(problem, source="jsonl:sums.jsonl") for problem in load_problems(config)]


@pytest.mark.parametrize(
    "rewrite", [None, "pipelines.recipes.chain_sum:compact", "pipelines.recipes.chain_sum:backwards"]
)
@pytest.mark.parametrize("held_out", [3, 100])
def test_generated_problems_of_one_kind_may_be_held_out(rewrite: str | None, held_out: int) -> None:
    """They share ten words by design; a copy is refused all the same, whichever way it is written."""
    held = sums(held_out, 1, rewrite)
    known = {print_ for problem in held for print_ in fingerprints(problem)}
    train = [problem for problem in sums(300, 2, rewrite) if not fingerprints(problem) & known]
    assert check_contamination(train, held, mode="refuse", min_share=0.01) == []
    spaced = held[-1].prompt.replace("+", " + ").replace("-", " - ")
    for copy in (replace(held[-1], id="copy"), Problem(id="copy", prompt=spaced)):
        with pytest.raises(ValueError, match=rf"training problem 'copy' holds 100% of .* problem '{held[-1].id}'"):
            check_contamination([*train, copy], held, mode="refuse")


def test_of_one_generator_only_whole_copies_count() -> None:
    """A long frame with one number in it: share 29/30, and still another problem."""
    held = [Problem(id="h", prompt=f"{numbered(0, 29)} 7", source="reasoning_gym:stories")]
    for source in ("reasoning_gym:stories", "reasoning_gym:others", "jsonl:stories.jsonl"):
        sibling = Problem(id="t", prompt=f"{numbered(0, 29)} 8", source=source)
        copy = replace(sibling, prompt=f"{numbered(0, 29).upper()}\n 7")
        found = check_contamination([sibling, replace(copy, id="c")], held, mode="warn", warn=lambda text: None)
        assert [h.train_row for h in found] == (["c"] if source == held[0].source else ["c", "t"])


def test_of_a_rewritten_problem_the_source_counts_against_the_source_only() -> None:
    """``-2+5+3`` is ``3+5-2`` backwards: a source that says so itself is another problem."""
    held = [Problem(id="h", prompt="-2+5+3", metadata={ORIGINAL_PROMPT: "Calculate 3 + 5 - 2 ="})]
    train = [Problem(id="t", prompt="+3+5-2", metadata={ORIGINAL_PROMPT: "-2+5+3"})]
    assert check_contamination(train, held, mode="refuse") == []
    train = [Problem(id="t", prompt="other", metadata={ORIGINAL_PROMPT: "calculate 3+5-2"})]
    with pytest.raises(ValueError, match="'t' holds 100%"):
        check_contamination(train, held, mode="refuse")


# --- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    asked = {
        "ducks": [Problem(id="d1", prompt=DUCKS), Problem(id="d2", prompt=numbered(0, 30))],
        "other": [Problem(id="o", prompt=numbered(200, 230), metadata={"solution": numbered(250, 290)})],
    }
    monkeypatch.setattr(
        eval_contamination, "load_questions", lambda names, data_dir: {name: asked[name] for name in names}
    )
    rows = [{"prompt": "hello", "n": 1}, {"prompt": f"Q: {DUCKS} A: 18"}, {"prompt": "x", "text": numbered(10, 25)}]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "x", "text": numbered(250, 275)}))
    return tmp_path


def called(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    eval_contamination.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return eval_contamination.run(parser.parse_args(arguments))


def test_the_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "hits.jsonl"
    answer = called("--train", "a.jsonl", "b.jsonl.gz", "--benchmarks", "ducks,other", "--json", "--out", str(out))
    assert capsys.readouterr().out == ""
    assert (answer["ok"], answer["n_train"], answer["train_rows"]) == (False, 4, 3)
    ducks, other = answer["benchmarks"]["ducks"], answer["benchmarks"]["other"]
    assert (ducks["n"], ducks["contaminated"], other["n"], other["contaminated"]) == (2, 2, 1, 1)
    assert [(r["problem"], r["train_row"], r["share"]) for r in ducks["rows"]] == [
        ("d1", "a.jsonl:2", 1.0),
        ("d2", "a.jsonl:3", 0.5),
    ]
    [row] = other["rows"]
    assert (row["part"], row["train_row"], row["words"], row["share"]) == ("solution", "b.jsonl.gz:1", 25, 0.625)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [*ducks["rows"], row]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_the_verb_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    called("--train", "a.jsonl", "b.jsonl.gz", "--benchmarks", "ducks,other")
    text = capsys.readouterr().out
    assert "4 training rows, 3 with a hit" in text and "o (solution)" in text and "--min-share 0.5" in text


@pytest.mark.parametrize(
    ("arguments", "hits"),
    [
        (["--min-share", "0.6"], {"ducks": 1, "other": 1}),
        (["--questions-only"], {"ducks": 2, "other": 0}),
        (["--field", "prompt"], {"ducks": 1, "other": 0}),
        (["--ngram", "20"], {"ducks": 1, "other": 1}),
        (["--min-share", "1", "--questions-only"], {"ducks": 1, "other": 0}),
    ],
)
def test_options_of_the_verb(folder: Path, arguments: list[str], hits: dict[str, int]) -> None:
    answer = called("--train", "a.jsonl", "b.jsonl.gz", "--benchmarks", "ducks,other", "--json", *arguments)
    assert {name: found["contaminated"] for name, found in answer["benchmarks"].items()} == hits


def test_nothing_found_is_ok(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "clean.jsonl").write_text('{"prompt": "hello"}\n')
    answer = called("--train", "jsonl:clean.jsonl", "--benchmarks", "ducks")
    assert answer == {
        "ok": True, "n_train": 1, "train_rows": 0,
        "benchmarks": {"ducks": {"n": 2, "contaminated": 0, "hits": 0, "rows": []}},
    }  # fmt: skip
    assert "1 training rows, 0 with a hit" in capsys.readouterr().out


def test_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"q": ["x", DUCKS]}), folder / "c.parquet")
    answer = called("--train", "c.parquet", "--benchmarks", "ducks", "--json")
    assert answer["benchmarks"]["ducks"]["rows"][0]["train_row"] == "c.parquet:2"
    assert eval_contamination._count("parquet:c.parquet") == 2
    assert eval_contamination._count("jsonl:a.jsonl") == 3 and eval_contamination._count("hf:some/data") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--train", "nothing.jsonl"],
            r"the training data nothing.jsonl are not there .*; a data set is hf:NAME:SPLIT",
        ),
        (
            ["--train", "notes.txt"],
            "training data are .jsonl, .jsonl.gz or .parquet files or hf:NAME:SPLIT, got notes.txt",
        ),
        (["--train", "a.jsonl", "--min-share", "1.5"], r"--min-share must be in \[0, 1\], got 1.5"),
        (["--train", "a.jsonl", "--field", "text"], "a.jsonl:1: no column 'text'; it has prompt, n"),
        (["--train", "a.jsonl", "--ngram", "2"], "at least 4 words long, got 2"),
        (["--train", "empty.jsonl"], "there are no training rows in empty.jsonl"),
        (["--train", "broken.jsonl"], "broken.jsonl:2: not JSON"),
    ],
)
def test_what_a_user_can_do_wrong(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "notes.txt").write_text("x")
    (folder / "empty.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text('{"a": "b"}\n{"a\n')
    with pytest.raises(ValueError, match=message):
        called(*arguments, "--benchmarks", "ducks", "--json", "--out", "hits.jsonl")
    assert not (folder / "hits.jsonl").exists() and not (folder / ".hits.jsonl.tmp").exists()


def test_rows_are_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is read before what was found in the one before has been handed on."""
    read: list[int] = []

    def rows(source: str, params: Any) -> Iterator[tuple[str, dict[str, str]]]:
        for number in range(1, 10**9):
            read.append(number)
            yield f"x:{number}", {"text": DUCKS}

    monkeypatch.setattr("rollout.sources.read_rows", rows)
    scan = eval_contamination._scan(index_of(DUCKS), ["jsonl:x"], [], 0.0)
    for number in range(1, 4):
        assert [hit.train_row for hit in next(scan)] == [f"x:{number}"] and read[-1] == number
