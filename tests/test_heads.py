"""Heads: losses per example against plain loops, predictions in their kind's form, padding and precision."""

import pytest
import torch
from helpers import HEADS, VOCAB, labels_for, tiny_batch, tiny_network, wider
from torch import Tensor
from torch.nn import functional

from lightning_modules.config import DenseConfig, TrialConfig
from lightning_modules.network.model import HeadSpec, build_network
from lightning_modules.network.task_heads.base import TaskHead
from lightning_modules.network.task_heads.classification import ClassificationHead
from lightning_modules.network.task_heads.regression import RegressionHead
from lightning_modules.network.task_heads.tagging import TaggingHead

KINDS: list[tuple[type[TaskHead], int]] = [(ClassificationHead, 3), (RegressionHead, 1), (TaggingHead, 5)]
WORDS = torch.tensor([[-1, 0, 0, 1, 2, -1], [-1, 0, 1, 1, -1, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def states() -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def test_tagging_reads_the_mean_of_each_words_subwords() -> None:
    head, hidden = TaggingHead(8, 5, 0.0, seed=0), states()
    outputs = head(hidden, MASK, WORDS)
    assert outputs.shape == (2, 6, 5)
    torch.testing.assert_close(outputs[0, 0], head.linear(hidden[0, 1:3].mean(0)))
    torch.testing.assert_close(outputs[0, 2], head.linear(hidden[0, 4]))
    torch.testing.assert_close(outputs[1, 1], head.linear(hidden[1, 2:4].mean(0)))


def test_tagging_loss_is_the_mean_over_each_examples_words() -> None:
    head = TaggingHead(8, 5, 0.0, seed=0)
    outputs = head(states(), MASK, WORDS)
    labels = torch.tensor([[1, 0, 4], [2, 3, -100]])
    loss = head.loss(outputs, labels)
    expected = [functional.cross_entropy(outputs[0, :3], labels[0]), functional.cross_entropy(outputs[1, :2], labels[1, :2])]
    torch.testing.assert_close(loss, torch.stack(expected))


def test_tagging_predicts_one_tag_per_word() -> None:
    head = TaggingHead(8, 5, 0.0, seed=0)
    outputs = head(states(), MASK, WORDS)
    predicted = head.predict(outputs, WORDS)
    assert [len(tags) for tags in predicted] == [3, 2]
    assert predicted[1] == outputs[1, :2].argmax(-1).tolist()


def test_an_example_without_words_costs_nothing() -> None:
    head, none = TaggingHead(8, 5, 0.0, seed=0), torch.full((2, 6), -1)
    outputs = head(states(), MASK, none)
    assert head.loss(outputs, torch.full((2, 0), -100)).tolist() == [0.0, 0.0]
    assert head.predict(outputs, none) == [[], []]


def test_classification_and_regression_losses_are_per_example() -> None:
    classify, regress = ClassificationHead(8, 3, 0.0, seed=0), RegressionHead(8, 1, 0.0, seed=0)
    logits, numbers = classify(states(), MASK, WORDS), regress(states(), MASK, WORDS)
    labels = torch.tensor([2, 0])
    torch.testing.assert_close(classify.loss(logits, labels), -logits.log_softmax(-1)[[0, 1], labels])
    torch.testing.assert_close(regress.loss(numbers, torch.tensor([1.5, -1.0])), (numbers - torch.tensor([1.5, -1.0])) ** 2)
    assert classify.predict(logits, WORDS) == logits.argmax(-1).tolist()
    assert regress.predict(numbers, WORDS) == numbers.tolist()


@pytest.mark.parametrize("kind, size", KINDS)
def test_heads_compute_in_float32_under_autocast(kind: type[TaskHead], size: int) -> None:
    head = kind(8, size, 0.0, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = head(states().bfloat16(), MASK, WORDS)
        spec = HeadSpec("x", kind.__name__.removesuffix("Head").lower(), size)
        loss = head.loss(outputs, labels_for(spec, 2, 3, torch.Generator().manual_seed(0)))
    assert outputs.dtype == loss.dtype == torch.float32 and loss.shape == (2,)
    torch.testing.assert_close(outputs, head(states().bfloat16().float(), MASK, WORDS))


@pytest.mark.parametrize("kind, size", KINDS)
def test_dropout_acts_in_training_only(kind: type[TaskHead], size: int) -> None:
    head = kind(8, size, 0.5, seed=0)
    assert not torch.equal(head(states(), MASK, WORDS), head(states(), MASK, WORDS))
    head.eval()
    assert torch.equal(head(states(), MASK, WORDS), head(states(), MASK, WORDS))


def test_padding_changes_nothing() -> None:
    network = tiny_network(DenseConfig()).eval()
    batch = tiny_batch([0, 1, 2])
    for group, outputs, padded in zip(batch.tasks, network(batch), network(wider(batch, 5)), strict=True):
        kept = padded[:, : outputs.shape[1]] if outputs.dim() == 3 else padded
        torch.testing.assert_close(kept, outputs, atol=1e-6, rtol=0)
        head = network.heads[group.task]
        torch.testing.assert_close(head.loss(padded, group.labels), head.loss(outputs, group.labels), atol=1e-6, rtol=0)


def test_a_head_starts_the_same_whatever_its_number_and_the_other_tasks_are() -> None:
    alone, together = tiny_network(DenseConfig(), [HEADS[3]]), tiny_network(DenseConfig())
    torch.testing.assert_close(alone.heads[0].state_dict(), together.heads[3].state_dict(), atol=0, rtol=0)
    other = tiny_network(DenseConfig(), [HeadSpec("weather", "classification", 2)])
    assert not torch.equal(alone.heads[0].linear.weight, other.heads[0].linear.weight)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="task x: kind must be one of classification, regression, tagging, got 'srl'"):
        tiny_network(DenseConfig(), [HeadSpec("x", "srl", 2)])


def test_the_default_trial_builds() -> None:
    assert len(build_network(TrialConfig(), HEADS, VOCAB).heads) == len(HEADS)
