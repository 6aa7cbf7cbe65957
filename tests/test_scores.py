"""Scores against scikit-learn, scipy and seqeval on random predictions, and the cases where a score does not exist."""

import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.metrics.sequence_labeling import get_entities
from sklearn import metrics

from lightning_modules.measure.scores import score, spans

LABELS = ("negative", "neutral", "positive", "unused")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


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


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_correlation_survives_extreme_scales(scale: float) -> None:
    guess = [scale * x for x in (1.0, 2.0, 4.0)]
    scores = score("regression", "pearson", (), guess, [1.0, 2.0, 4.0])
    assert scores.values["pearson"] == pytest.approx(1.0)
    assert ("mse" in scores.undefined) == (scale > 1)


@pytest.mark.parametrize("seed", range(20))
def test_spans_and_their_f1_equal_seqeval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 15)
    gold = [rng.integers(0, 5, n).tolist() for n in lengths]
    guess = [[tag if rng.random() < 0.7 else int(rng.integers(0, 5)) for tag in tags] for tags in gold]
    text = [[[TAGS[t] for t in tags] for tags in side] for side in (gold, guess)]
    for tags in text[0]:
        assert spans(tags) == [tuple(span) for span in get_entities(tags)]
    values = score("tagging", "span_f1", TAGS, guess, gold).values
    assert values["span_f1"] == pytest.approx(seqeval_f1(text[0], text[1]))
    assert values["accuracy"] == pytest.approx(np.mean(np.concatenate(gold) == np.concatenate(guess)))


def test_no_span_anywhere_scores_zero_as_seqeval_does() -> None:
    assert score("tagging", "span_f1", TAGS, [[0, 0]], [[0, 0]]).values["span_f1"] == 0.0


def test_labels_that_mark_no_spans_leave_span_f1_undefined() -> None:
    scores = score("tagging", "accuracy", ("NOUN", "VERB"), [[0, 1]], [[0, 0]])
    assert scores.values == {"accuracy": 0.5, "span_f1": None}
    assert "NOUN" in scores.undefined["span_f1"]


@pytest.mark.parametrize("kind, metric", [("classification", "accuracy"), ("regression", "mse"), ("tagging", "span_f1")])
def test_without_examples_everything_is_undefined(kind: str, metric: str) -> None:
    scores = score(kind, metric, TAGS, [], [])
    assert set(scores.values.values()) == {None}
    assert set(scores.undefined.values()) == {"no examples"}


def test_unknown_metrics_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="metric must be one of"):
        score("regression", "accuracy", (), [1.0], [1.0])
    with pytest.raises(ValueError, match="got 2 and 1"):
        score("classification", "accuracy", LABELS, [1, 2], [1])
