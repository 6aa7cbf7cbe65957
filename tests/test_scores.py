"""Scores of labels and numbers against scikit-learn and scipy on random predictions, the cases where a score does not exist,
and what holds of the metrics of every kind."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from lightning_modules.data.tasks import METRICS
from lightning_modules.measure.label_scores import answer_score
from lightning_modules.measure.scores import score

LABELS = ("negative", "neutral", "positive", "unused")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


class Case(NamedTuple):
    """A task's right answers, and wrong ones."""

    labels: tuple[str, ...]
    targets: list[Any]
    wrong: list[Any]


CASES = {
    "classification": Case(LABELS[:3], [0, 1, 2, 2], [1, 2, 0, -1]),
    "choice": Case((), [0, 3, 1, 1], [1, 0, 2, -1]),
    "regression": Case((), [0.0, 1.0, 5.0], [5.0, 0.5, -1.0]),
    "tagging": Case(TAGS, [[0, 1, 2], [3]], [[1, 0, -1], [0]]),
    "spans": Case(("PER", "LOC"), [[(0, 2, 0)], [], [(1, 2, 1)]], [[(0, 2, 1)], [(0, 1, 0)], []]),
    "dependency": Case(("root", "nsubj"), [[(2, 1), (0, 0)], [(0, 0)]], [[(0, 0), (1, 1)], [(-1, -1)]]),
    "constituency": Case(("S", "NP"), [[(0, 2, 0), (0, 1, 1)]], [[(0, 1, 0), (1, 2, 1)]]),
    "srl": Case(("ARG0", "ARG1"), [[(1, 0, 1, 0)], [(0, -1, -1, -1)]], [[(2, 0, 1, 0), (2, 2, 3, 1)], []]),
}
TEXT = Case((), [["the red house"], ["a b", "so it is"]], ["", "green"])
ANSWERS = Case(("Yes", "No"), [["yes"], ["No"], ["yes"]], ["no", "what", ""])
NUMBERS = Case((), [["1.5"], ["2"], ["-1"]], ["0", "none", "7"])
BY_NAME: dict[str, Case] = dict.fromkeys(("exact_match", "token_f1", "rouge_l"), TEXT) | dict.fromkeys(
    ("pearson", "spearman", "mse"), NUMBERS
)


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in METRICS for name in METRICS[kind] if name != "invalid_rate"])
def test_every_metric_is_best_for_right_answers_only(kind: str, name: str) -> None:
    case = BY_NAME.get(name, ANSWERS) if kind == "text2text" else CASES[kind]
    metric = f"f1_positive({case.labels[0]})" if name == "f1_positive" else name
    right = [target[-1] for target in case.targets] if kind == "text2text" else case.targets
    best = score(kind, metric, case.labels, right, case.targets)
    worse = score(kind, metric, case.labels, case.wrong, case.targets)
    assert best.values[metric] == pytest.approx(0.0 if name == "mse" else 1.0)
    assert best.undefined == worse.undefined == {}
    value = worse.values[metric]
    assert value is not None and (value > 1 if name == "mse" else value < 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_classification_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold, guess = rng.integers(0, 3, 60).tolist(), rng.integers(0, 3, 60).tolist()
    values = score("classification", "f1_positive(positive)", LABELS, guess, gold).values
    assert values["accuracy"] == pytest.approx(metrics.accuracy_score(gold, guess))
    assert values["mcc"] == pytest.approx(metrics.matthews_corrcoef(gold, guess))
    per_label = metrics.f1_score(gold, guess, labels=range(4), average=None, zero_division=0)
    assert values["macro_f1"] == pytest.approx(per_label.mean())
    assert values["f1_positive(positive)"] == pytest.approx(per_label[2])
    without = score("classification", "macro_f1(without unused)", LABELS, guess, gold).values
    assert without["macro_f1(without unused)"] == pytest.approx(per_label[:3].mean())


def test_constant_predictions_have_no_matthews_correlation_but_zero() -> None:
    assert score("classification", "mcc", LABELS, [1, 1, 1], [0, 1, 2]).values["mcc"] == 0.0
    assert metrics.matthews_corrcoef([0, 1, 2], [1, 1, 1]) == 0.0


@pytest.mark.parametrize("seed", range(30))
def test_no_answer_is_wrong_and_adds_no_class_as_scikit_learn_has_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold, guess = rng.integers(0, 3, 40).tolist(), rng.integers(-1, 3, 40).tolist()
    values = score("classification", "macro_f1", LABELS, guess, gold).values
    assert values["accuracy"] == pytest.approx(metrics.accuracy_score(gold, guess))
    assert values["mcc"] == pytest.approx(metrics.matthews_corrcoef(gold, guess))
    for average in ("macro", "micro"):
        expected = metrics.f1_score(gold, guess, labels=range(4), average=average, zero_division=0)
        assert values[f"{average}_f1"] == pytest.approx(expected)


def test_one_answer_that_is_no_label_costs_its_own_share_only() -> None:
    gold = [0, 1] * 50
    values = score("classification", "macro_f1", LABELS[:2], [-1, *gold[1:]], gold).values
    assert values["accuracy"] == 0.99
    assert 0.99 < (values["macro_f1"] or 0) < 1
    assert metrics.f1_score(gold, [-1, *gold[1:]], average="macro", zero_division=0) < 0.67


@pytest.mark.parametrize("seed", range(30))
def test_choice_averages_over_the_options_that_are_right_at_least_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold, guess = rng.integers(0, 4, 12).tolist(), rng.integers(-1, 6, 12).tolist()
    values = score("choice", "accuracy", ("not", "used"), guess, gold).values
    assert values["accuracy"] == pytest.approx(metrics.accuracy_score(gold, guess))
    assert values["mcc"] == pytest.approx(metrics.matthews_corrcoef(gold, guess))
    expected = metrics.f1_score(gold, guess, labels=sorted(set(gold)), average="macro", zero_division=0)
    assert values["macro_f1"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_regression_equals_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 6, 40).astype(float)
    guess = gold + rng.normal(0, 2, 40).round(1)
    values = score("regression", "pearson", (), guess.tolist(), gold.tolist()).values
    assert values["pearson"] == pytest.approx(stats.pearsonr(guess, gold).statistic)
    assert values["spearman"] == pytest.approx(stats.spearmanr(guess, gold).statistic)
    assert values["mse"] == pytest.approx(metrics.mean_squared_error(gold, guess))


@pytest.mark.parametrize("guess", [[2.0, 2.0, 2.0], [0.1, 0.1, 0.1]])
def test_a_constant_prediction_has_no_correlation(guess: list[float]) -> None:
    scores = score("regression", "pearson", (), guess, [1.0, 2.0, 3.0])
    assert scores.values["pearson"] is None and scores.values["spearman"] is None
    assert "constant" in scores.undefined["pearson"]
    assert scores.values["mse"] is not None and "mse" not in scores.undefined


def test_constant_targets_and_non_finite_predictions_are_undefined() -> None:
    assert "targets" in score("regression", "pearson", (), [1.0, 2.0], [3.0, 3.0]).undefined["pearson"]
    scores = score("regression", "mse", (), [1.0, float("nan")], [3.0, 4.0])
    assert scores.values == {"pearson": None, "spearman": None, "mse": None}
    assert scores.undefined["mse"] == "1 of 2 predictions are not finite"


@pytest.mark.parametrize("scale", [1e-170, 1e170, 4e307])
def test_correlation_survives_extreme_scales(scale: float) -> None:
    guess = [scale * x for x in (1.0, 2.0, 4.0)]
    scores = score("regression", "pearson", (), guess, [1.0, 2.0, 4.0])
    assert scores.values["pearson"] == pytest.approx(1.0)
    assert ("mse" in scores.undefined) == (scale > 1)


@pytest.mark.parametrize("seed", range(30))
def test_an_unanswered_example_shrinks_the_correlation_by_its_share_of_the_spread(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold = rng.normal(0, 3, 30)
    guess = gold + rng.normal(0, 3, 30)
    there = rng.random(30) < 0.8
    answers = [float(number) if given else None for number, given in zip(guess, there, strict=True)]
    of_the_answered = stats.pearsonr(guess[there], gold[there]).statistic
    share = np.sum((gold[there] - gold[there].mean()) ** 2) / np.sum((gold - gold.mean()) ** 2)
    value = answer_score("pearson", answers, gold.tolist())
    assert value == pytest.approx(of_the_answered * np.sqrt(share))
    assert 0 < value <= of_the_answered
    ranks = np.full(30, (there.sum() + 1) / 2)
    ranks[there] = stats.rankdata(guess[there])
    expected = stats.pearsonr(ranks, stats.rankdata(gold)).statistic
    assert answer_score("spearman", answers, gold.tolist()) == pytest.approx(expected)
    expected = metrics.mean_squared_error(gold, np.where(there, guess, gold.mean()))
    assert answer_score("mse", answers, gold.tolist()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "kind, metric", [(kind, metric) for kind in METRICS for metric in METRICS[kind] if metric != "f1_positive"]
)
def test_without_examples_everything_is_undefined(kind: str, metric: str) -> None:
    scores = score(kind, metric, TAGS, [], [])
    assert set(scores.values.values()) == {None}
    assert set(scores.undefined.values()) == {"no examples"}


def test_unknown_metrics_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="metric must be one of"):
        score("regression", "accuracy", (), [1.0], [1.0])
    with pytest.raises(ValueError, match="got 2 and 1"):
        score("classification", "accuracy", LABELS, [1, 2], [1])
