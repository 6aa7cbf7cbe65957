"""Scores of generated text against the rouge-score package and SQuAD's definition, and the reading of labels and numbers."""

import string

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics

from lightning_modules.measure.scores import score

WORDS = [
    "the",
    "A",
    "an",
    "cat",
    "Cat",
    "cats",
    "dog's",
    "-5",
    "5",
    "3.0",
    "theme",
    "(house)",
    "naïve",
    "猫",
    ",",
    "...",
    "an,",
]
LABELS = ("Yes", "No", "not sure")


def sentence(rng: np.random.Generator, longest: int = 9) -> str:
    spaces = rng.choice([" ", "  ", "\n", "-"], longest)
    return "".join(word + space for word, space in zip(rng.choice(WORDS, rng.integers(longest + 1)), spaces, strict=False))


def pairs(seed: int, n: int = 30) -> tuple[list[str], list[list[str]]]:
    """Predictions, and one to three references each, of which some share a part with the prediction."""
    rng = np.random.default_rng(seed)
    guess = [sentence(rng) for _ in range(n)]
    gold = [[text[: int(rng.integers(20))] + sentence(rng, 4) for _ in range(rng.integers(1, 4))] for text in guess]
    return guess, gold


@pytest.mark.parametrize("seed", range(40))
def test_rouge_l_equals_the_rouge_score_package(seed: int) -> None:
    guess, gold = pairs(seed)
    scorer = RougeScorer(["rougeL"])
    expected = np.mean([scorer.score_multi(g, p)["rougeL"].fmeasure for p, g in zip(guess, gold, strict=True)])
    value = score("text2text", "rouge_l", (), guess, gold).values["rouge_l"]
    assert value == pytest.approx(expected) and 0.1 < expected < 0.9


def test_rouge_l_of_long_texts_equals_the_rouge_score_package() -> None:
    rng = np.random.default_rng(0)
    guess, gold = (" ".join(rng.choice(list("abcdef"), 400)) for _ in range(2))
    expected = RougeScorer(["rougeL"]).score(gold, guess)["rougeL"].fmeasure
    assert score("text2text", "rouge_l", (), [guess], [[gold]]).values["rouge_l"] == pytest.approx(expected)


def squad_words(text: str) -> list[str]:
    """SQuAD's normalisation by its definition, a character and a word at a time."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in letters.split() if word not in ("a", "an", "the")]


def squad_f1(prediction: str, reference: str) -> float:
    guess, rest = squad_words(prediction), squad_words(reference)
    wanted, same = len(rest), 0
    for word in guess:
        if word in rest:
            rest.remove(word)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(guess), same / wanted
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(40))
def test_exact_match_and_token_f1_equal_squad_by_its_definition(seed: int) -> None:
    guess, gold = pairs(seed)
    values = score("text2text", "token_f1", (), guess, gold).values
    both = list(zip(guess, gold, strict=True))
    assert values["exact_match"] == pytest.approx(np.mean([any(squad_words(p) == squad_words(r) for r in g) for p, g in both]))
    assert values["token_f1"] == pytest.approx(np.mean([max(squad_f1(p, r) for r in g) for p, g in both]))


@pytest.mark.parametrize(
    "prediction, reference, exact, f1",
    [
        ("The Eiffel-Tower!", "eiffeltower", 1, 1),
        ("in Paris, France", "Paris", 0, 0.5),
        ("the", "a", 1, 0),  # as the official script: no word is in common
        ("", "Paris", 0, 0),
        ("theme a", "the me", 0, 0),
        ("5€a€6", "5€ €6", 1, 1),  # an article is replaced by a space, not dropped
    ],
)
def test_squad_by_hand(prediction: str, reference: str, exact: float, f1: float) -> None:
    values = score("text2text", "token_f1", (), [prediction], [[reference]]).values
    assert (values["exact_match"], values["token_f1"]) == (exact, pytest.approx(f1))


@pytest.mark.parametrize(
    "prediction, right",
    [
        ("so it is 1,234 #### 1,234", True),
        ("#### 7 #### $1234.", True),
        ("####1234.00", True),
        ("#### $ 1,234.0 dollars", True),
        ("#### -1234", False),
        ("#### 1234.5", False),
        ("#### 12345", False),
        ("#### 1234 #### none", False),
        ("1234", False),
        ("#### ", False),
        ("", False),
    ],
)
def test_the_number_after_the_last_mark_counts(prediction: str, right: bool) -> None:
    metric = "exact_match(number after ####)"
    assert score("text2text", metric, (), [prediction], [["1 + 1233 = 1234\n#### 1,234"]]).values[metric] == right


def test_signs_count_and_a_reference_without_number_leaves_no_score() -> None:
    metric = "exact_match(number after ####)"
    for prediction in ("#### -$.5", "#### $-0.50", "#### -.5."):
        assert score("text2text", metric, (), [prediction], [["#### -0.5"]]).values[metric] == 1
    scores = score("text2text", metric, (), ["#### 1", "2"], [["#### 1"], ["2"]])
    assert scores.values[metric] is None and "'2'" in scores.undefined[metric]
    assert scores.values["exact_match"] == 1.0


@pytest.mark.parametrize("seed", range(30))
def test_generated_labels_score_as_label_numbers_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 3, 40).tolist()
    guess = [g if rng.random() < 0.5 else int(rng.integers(-1, 3)) for g in gold]
    spelled = [[" yes", "NO\n", "Not  Sure"][g] if g >= 0 else rng.choice(["", "yess", "not", "3"]) for g in guess]
    metric = "macro_f1(without No)"
    values = score("text2text", metric, LABELS, spelled, [[LABELS[g]] for g in gold]).values
    numbers = score("classification", metric, LABELS, guess, gold).values
    for name in ("accuracy", "macro_f1", "micro_f1", "mcc", metric):
        assert values[name] == numbers[name]
    assert values["accuracy"] == pytest.approx(metrics.accuracy_score(gold, guess))
    assert values["invalid_rate"] == guess.count(-1) / 40
    assert "rouge_l" not in values


def test_one_malformed_answer_costs_its_own_share_only() -> None:
    gold = ["Yes", "No"] * 50
    values = score("text2text", "macro_f1", LABELS[:2], ["Yess", *gold[1:]], [[g] for g in gold]).values
    assert values["accuracy"] == 0.99 and values["invalid_rate"] == 0.01
    assert 0.99 < (values["macro_f1"] or 0) < 1


def test_any_reference_is_right_and_confusable_labels_are_refused() -> None:
    values = score("text2text", "accuracy", LABELS, ["no", "yes"], [["Yes", "No"], ["No"]]).values
    assert values["accuracy"] == 0.5
    for labels, targets, reason in (
        (("Yes", "yes "), [["Yes"]], "must differ"),
        (LABELS, [["maybe"]], "'maybe' is none of"),
        ((), [["Yes"]], "lists no labels"),
    ):
        scores = score("text2text", "mcc", labels, ["yes"], targets)
        assert scores.values["mcc"] is None and reason in scores.undefined["mcc"]
        assert scores.values["exact_match"] in (0.0, 1.0)


def test_accuracy_without_labels_is_equality_but_for_case_and_white_space() -> None:
    values = score("text2text", "accuracy", (), ["THE  sun ", "sun", "the moon."], [["the sun"]] * 2 + [["the moon"]]).values
    assert values["accuracy"] == pytest.approx(1 / 3)
    assert values["exact_match"] == 1.0 and "invalid_rate" not in values


def test_the_mark_is_the_metrics_own() -> None:
    metric = "exact_match(number after Answer:)"
    assert score("text2text", metric, (), ["so. Answer: 5 apples", "5"], [["Answer: 5.0"]] * 2).values[metric] == 0.5


@pytest.mark.parametrize("seed", range(10))
def test_numbers_in_text_score_as_numbers_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 6, 30).astype(float).tolist()
    guess = (np.array(gold) + rng.normal(0, 2, 30)).round(1).tolist()
    values = score("text2text", "pearson", (), [f" {g}\n" for g in guess], [[str(g)] for g in gold]).values
    numbers = score("regression", "pearson", (), guess, gold).values
    assert values == {**numbers, "invalid_rate": 0.0}


@pytest.mark.parametrize("malformed", ["", "five", "nan", "inf", "-1e30", "1e999", "2.5.0", "1 2"])
def test_one_malformed_number_costs_little_and_is_counted(malformed: str) -> None:
    gold = [[str(i % 7)] for i in range(100)]
    values = score("text2text", "spearman", (), [malformed, *(g[0] for g in gold[1:])], gold).values
    assert values["invalid_rate"] == 0.01
    for name in ("pearson", "spearman"):
        assert 0.97 < (values[name] or 0) < 1
    assert 0 < (values["mse"] or 0) < 0.1


def test_malformed_numbers_never_leave_the_correlation_undefined() -> None:
    gold = [["1"], ["2"], ["3"]]
    values = score("text2text", "pearson", (), ["x", "y", ""], gold).values
    assert values == {"pearson": 0, "spearman": 0, "mse": pytest.approx(2 / 3), "invalid_rate": 1}
    assert score("text2text", "pearson", (), ["x", "4", "4"], gold).values["pearson"] == 0
    assert "constant" in score("text2text", "pearson", (), ["4", "4", "4"], gold).undefined["pearson"]
    assert "targets" in score("text2text", "pearson", (), ["x", "1", "4"], [["3"]] * 3).undefined["pearson"]
    assert "'x' is not a number" in score("text2text", "pearson", (), ["1"], [["x"]]).undefined["pearson"]


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        score("text2text", "exact_match(number before ##)", (), ["1"], [["1"]])
