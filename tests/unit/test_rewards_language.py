"""Language consistency on texts of six languages, on mixtures of a known share, and under attack."""

import itertools
import time

import pytest

from rewards.language import language_consistency, language_of, words_of
from rollout.template import Reasoning
from rollout.types import Problem
from tests.unit.reasoning_texts import TEXTS

TARGETS = ("en", "es", "ru", "zh", "hi", "ar")


def judge(thinking: str | None, target: str = "prompt", prompt: str = "", **options):
    return language_consistency(Problem(id="p", prompt=prompt), Reasoning(thinking, "", True), target=target, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_one_language_is_consistent(target):
    score = judge(" ".join(TEXTS[target]), target)
    assert score.value is not None and score.value >= 0.98
    assert 0 < score.metrics["left_out"] < 0.1


@pytest.mark.parametrize(("target", "other"), [*list(itertools.permutations(TARGETS, 2)), ("en", "de"), ("ru", "uk")])
def test_a_mixture_scores_its_share(target, other):
    own, foreign = TEXTS[target][:4], TEXTS[other][:4]
    count = lambda text: judge(text, target, min_words=1).metrics["words"]  # noqa: E731
    for k in range(1, 5):
        alternating = [s for pair in itertools.zip_longest(own, foreign[:k]) for s in pair if s]
        for parts in (own + foreign[:k], alternating):
            share = count("\n".join(own)) / count("\n".join(parts))
            assert judge("\n".join(parts), target).value == pytest.approx(share, abs=0.08)
    foreign_alone = judge(" ".join(TEXTS[other]), target).value
    assert foreign_alone is not None and foreign_alone <= 0.08


def test_a_single_foreign_word_is_seen():
    text = "first we add both numbers and then we divide the result by their count because that is the mean"
    assert judge(text, "en").value == 1.0
    assert judge(text.replace("because", "porque"), "en").value == pytest.approx(18 / 19)
    assert judge(text.replace("because", "потому"), "en").value == pytest.approx(18 / 19)


def test_the_language_of_the_problem():
    for language in TARGETS:
        assert language_of(TEXTS[language][0]) == language
    assert judge(" ".join(TEXTS["ru"]), prompt=TEXTS["ru"][0]).value == 1.0
    assert judge(" ".join(TEXTS["ru"]), prompt=TEXTS["en"][0]).value == 0.0
    assert judge(" ".join(TEXTS["en"]), prompt="$2+2$").value is None


def test_a_few_words_beside_code_earn_nothing_and_the_metric_says_so():
    score = judge("ok let us\n```python\n" + "total = price * count\n" * 50 + "```", "en")
    assert score.value is None
    assert score.metrics["words"] == 3.0 and score.metrics["left_out"] > 0.9
    for thinking in (None, "", " \n", "12 + 5 = 17"):
        assert judge(thinking, "en").value is None


@pytest.mark.parametrize("form", ["${}$", "```\n{}\n```", "`{}`", "\\({}\\)", "\\[{}\\]", "$\\text{{{}}}$"])
def test_prose_cannot_hide_in_a_formula_or_in_code(form):
    hidden = "primero sumamos los dos numeros y luego dividimos el resultado entre la cantidad total"
    open_ = "first we add both numbers and then we divide the result by their count"
    score = judge(f"{open_} {form.format(hidden)}", "en")
    assert score.value == pytest.approx(0.5, abs=0.06)


def test_gibberish_is_no_language():
    gibberish = " ".join(f"{a}{b}rblo{c}" for a in "qzxk" for b in "wvj" for c in "fgq")
    text = " ".join(TEXTS["en"][:3])
    share = len(words_of(text)[0]) / len(words_of(f"{text} {gibberish}")[0])
    assert judge(f"{text} {gibberish}", "en").value == pytest.approx(share, abs=0.05)


def test_names_of_variables_and_functions_are_no_words():
    assert words_of("x_1 fooBar sin2 \\alpha ABC") == ([], 5)
    text = "пусть x и y стороны, тогда gcd и sin дают одно и то же число для всех"
    assert judge(text, "ru").value == 1.0


@pytest.mark.parametrize(
    "piece", ["a", "\\(", "$ a", "```", "` \n", "a'", "中", "the ", "a_", "\u0301", "\\( a b ", "\n", "的 the "]
)
def test_hostile_text_is_read_in_linear_time(piece):
    start = time.process_time()
    judge(piece * (300_000 // len(piece)), "en")
    assert time.process_time() - start < 4


def test_what_is_refused():
    with pytest.raises(ValueError, match="target must be prompt or one of ar, bg"):
        judge("a", "xx")
    with pytest.raises(ValueError, match="min_words"):
        judge("a", "en", min_words=0)
