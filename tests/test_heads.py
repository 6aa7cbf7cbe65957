"""Heads of labels, numbers, choices, tags, spans and semantic roles: losses against plain loops, decoding against definitions
and seqeval, padding, batching, unread words, and whether they can learn."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from seqeval.metrics.sequence_labeling import get_entities
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.config import HeadsConfig
from lightning_modules.network.model import HEADS
from lightning_modules.network.task_heads.base import HeadSpec, States
from lightning_modules.network.task_heads.spans import BioSpans, without_overlaps
from lightning_modules.network.task_heads.srl import SRLHead, SRLOutputs
from lightning_modules.network.task_heads.tagging import Scores

WIDTH = 24
SMALL = HeadsConfig(dropout=0.0, span_size=32, label_size=16, srl_max_width=4)
SPECS = {
    "classification": HeadSpec("x", "classification", 3, dropout=0.0),
    "regression": HeadSpec("x", "regression", 1, {"mean": 50.0, "sd": 8.0}, dropout=0.0),
    "choice": HeadSpec("x", "choice", 1, dropout=0.0),
    "tagging": HeadSpec("x", "tagging", 5, dropout=0.0),
    "biaffine": HeadSpec("x", "spans", 3, heads=replace(SMALL, spans="biaffine"), dropout=0.0),
    "bio": HeadSpec("x", "spans", 3, heads=replace(SMALL, spans="bio"), dropout=0.0),
    "srl": HeadSpec("x", "srl", 3, heads=SMALL, dropout=0.0),
}
OF_WORDS = ("tagging", "biaffine", "bio", "srl")
COUNTS = (9, 5, 7, 1, 8)
"""Words of the examples that most tests use."""
OPTIONS = (2, 1, 2)
"""Which of the five examples' rows belong together as a choice."""
every_head = pytest.mark.parametrize("name", SPECS)
every_head_of_words = pytest.mark.parametrize("name", OF_WORDS)


def build(name: str, **changes: Any) -> Any:
    spec = replace(SPECS[name], **changes)
    return HEADS[spec.kind](WIDTH, spec)


def sequence(seed: int, num_words: int) -> tuple[Tensor, Tensor]:
    """States and word numbers of one input: special tokens around words of one to three subwords."""
    rng = random.Random(seed)
    words = [-1, *(word for word in range(num_words) for _ in range(rng.randint(1, 3))), -1]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(words), WIDTH, generator=generator), torch.tensor(words)


def states(counts: tuple[int, ...], first: int = 0, padding: int = 0, options: tuple[int, ...] | None = None) -> States:
    """Inputs number ``first`` on, of ``counts`` words; ``padding`` more positions than the longest needs, full of noise."""
    inputs = [sequence(first + i, count) for i, count in enumerate(counts)]
    words = functional.pad(pad_sequence([words for _, words in inputs], True, -1), (0, padding), value=-1)
    mask = torch.arange(words.shape[1]) < torch.tensor([[len(words)] for _, words in inputs])
    hidden = functional.pad(pad_sequence([hidden for hidden, _ in inputs], True), (0, 0, 0, padding))
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(99))
    starts = mask & (torch.arange(words.shape[1]) == 0)
    given = None if options is None else torch.tensor(options)
    return States(hidden.where(mask[..., None], noise), mask, words, starts, given)


def inputs(name: str, padding: int = 0) -> States:
    return states(COUNTS, padding=padding, options=OPTIONS if name == "choice" else None)


def flat_spans(rng: random.Random, num_words: int, most: int, labels: int) -> list[tuple[int, int, int]]:
    """Random spans of up to four words that do not overlap."""
    spans, start = [], rng.randint(0, 2)
    while start < num_words and len(spans) < most:
        end = min(start + rng.randint(1, 4), num_words)
        spans.append((start, end, rng.randrange(labels)))
        start = end + rng.randint(0, 2)
    return spans


def frames(rng: random.Random, num_words: int, labels: int) -> list[tuple[int, int, int, int]]:
    """Random frames: one or two predicates, with up to two arguments or none."""
    predicates = sorted(rng.sample(range(num_words), min(num_words, 1 + (num_words > 5))))
    return [
        (predicate, *span)
        for predicate in predicates
        for span in flat_spans(rng, num_words, rng.randint(0, 2), labels) or [(-1, -1, -1)]
    ]


def gold(name: str) -> list[Any]:
    """A random right answer for each of the examples, in the form of predictions."""
    rng, spec = random.Random(5), SPECS[name]
    match spec.kind:
        case "classification":
            return [rng.randrange(spec.num_labels) for _ in COUNTS]
        case "regression":
            return [rng.uniform(30, 70) for _ in COUNTS]
        case "choice":
            return [rng.randrange(count) for count in OPTIONS]
        case "tagging":
            return [[rng.randrange(spec.num_labels) for _ in range(count)] for count in COUNTS]
        case "spans":
            return [flat_spans(rng, count, 9, spec.num_labels) for count in COUNTS]
    return [frames(rng, count, spec.num_labels) for count in COUNTS]


def labels_of(answers: list[Any], extra: int = 0) -> Tensor:
    """Answers as the loss reads them, with ``extra`` more columns of padding."""
    if not isinstance(answers[0], list):
        return torch.tensor(answers)
    item = next((answer[0] for answer in answers if answer), 0)
    shape = (0, len(item)) if isinstance(item, tuple) else (0,)
    rows = [torch.tensor(answer) if answer else torch.zeros(shape, dtype=torch.int64) for answer in answers]
    padded = pad_sequence(rows, True, -100)
    return functional.pad(padded, (0, 0) * (padded.dim() - 2) + (0, extra), value=-100)


def same_answers(answers: list[Any], expected: list[Any], error: float = 1e-4) -> None:
    """The same, but for rounding where they are numbers."""
    assert answers == (pytest.approx(expected, abs=error) if isinstance(expected[0], float) else expected)


@every_head
def test_a_loss_per_example_and_predictions_in_the_kinds_form(name: str) -> None:
    head, answers = build(name), gold(name)
    outputs = head(inputs(name))
    loss = head.loss(outputs, labels_of(answers))
    assert loss.shape == (len(answers),) and loss.dtype == torch.float32 and bool((loss >= 0).all()) and bool(loss.any())
    predicted = head.predict(outputs)
    assert len(predicted) == len(answers)
    if name in ("biaffine", "bio", "srl"):
        assert all(type(part) is int for answer in predicted for item in answer for part in item)
        assert all(type(item) is tuple and len(item) == len(answers[0][0]) for answer in predicted for item in answer)
        assert any(predicted)
    elif name == "tagging":
        assert [len(tags) for tags in predicted] == list(COUNTS)
    else:
        assert all(type(answer) is type(answers[0]) for answer in predicted)


@every_head
def test_heads_compute_in_float32_under_autocast(name: str) -> None:
    head, given, labels = build(name), inputs(name), labels_of(gold(name))
    rounded = replace(given, hidden=given.hidden.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(head(rounded), labels)
    expected = head.loss(head(replace(given, hidden=rounded.hidden.float())), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0, rtol=0)


@every_head
def test_padding_changes_nothing(name: str) -> None:
    head, answers = build(name), gold(name)
    outputs, padded = head(inputs(name)), head(inputs(name, padding=6))
    torch.testing.assert_close(head.loss(padded, labels_of(answers, extra=4)), head.loss(outputs, labels_of(answers)))
    same_answers(head.predict(padded), head.predict(outputs))


@every_head
def test_a_batch_is_its_examples(name: str) -> None:
    head, answers = build(name), gold(name)
    outputs = head(inputs(name))
    losses, predicted, row = head.loss(outputs, labels_of(answers)), head.predict(outputs), 0
    for i, answer in enumerate(answers):
        rows = OPTIONS[i] if name == "choice" else 1
        alone = head(states(COUNTS[row : row + rows], first=row, options=(rows,) if name == "choice" else None))
        torch.testing.assert_close(head.loss(alone, labels_of([answer])), losses[i : i + 1])
        same_answers(head.predict(alone), predicted[i : i + 1])
        row += rows


@every_head
def test_a_head_learns_its_examples_by_heart(name: str) -> None:
    head, given, answers = build(name), inputs(name), gold(name)
    labels, optimiser = labels_of(answers), torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(250):
        optimiser.zero_grad()
        head.loss(head(given), labels).mean().backward()
        optimiser.step()
    same_answers(head.predict(head(given)), answers, error=0.5)


@every_head
def test_the_loss_reaches_every_parameter(name: str) -> None:
    head = build(name)
    head.loss(head(inputs(name)), labels_of(gold(name))).sum().backward()
    assert [key for key, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_head
def test_dropout_acts_in_training_only(name: str) -> None:
    labels, given = labels_of(gold(name)), inputs(name)
    for head in (build(name, dropout=0.5), build(name, heads=replace(SPECS[name].heads, dropout=0.5))):
        losses = [head.loss(head(given), labels) for _ in range(2)]
        acts = head.spec.dropout > 0 or name in ("biaffine", "srl")
        assert torch.equal(*losses) != acts
        head.eval()
        torch.testing.assert_close(*(head.loss(head(given), labels) for _ in range(2)), atol=0, rtol=0)


@every_head
def test_initial_weights_are_the_seeds(name: str) -> None:
    first, again, other = build(name).state_dict(), build(name).state_dict(), build(name, seed=1).state_dict()
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    weights = [key for key, value in first.items() if value.any()]
    assert weights and not any(torch.equal(first[key], other[key]) for key in weights)


@pytest.mark.parametrize("name", ["classification", "regression", "choice", "tagging"])
def test_linear_heads_start_from_a_small_normal_distribution(name: str) -> None:
    head = build(name, seed=3)
    drawn = torch.empty_like(head.linear.weight).normal_(0, 0.02, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(head.linear.weight, torch.nn.Parameter(drawn), atol=0, rtol=0)
    assert head.linear.bias is None or not head.linear.bias.any()


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_classification_reads_the_pooled_state(pooling: str) -> None:
    head, given = build("classification", pooling=pooling), inputs("classification")
    rows = [hidden[0] if pooling == "first" else hidden.mean(0) for hidden, _ in map(sequence, range(5), COUNTS)]
    logits = head(given)
    torch.testing.assert_close(logits, head.linear(torch.stack(rows)))
    labels = torch.tensor(gold("classification"))
    torch.testing.assert_close(head.loss(logits, labels), -logits.log_softmax(-1)[range(5), labels])
    assert head.predict(logits) == logits.argmax(-1).tolist()


def test_regression_is_in_units_of_the_labels_deviation() -> None:
    head, labels = build("regression"), torch.tensor([50.0, 58.0, 34.0])
    outputs = torch.tensor([0.0, 0.5, 1.0])
    assert head.loss(outputs, labels).tolist() == [0.0, 0.25, 9.0]
    assert head.predict(outputs) == [50.0, 54.0, 58.0]


def test_a_choice_is_among_the_examples_own_options() -> None:
    head, given = build("choice"), inputs("choice")
    outputs = head(given)
    scores = head.linear(given.hidden[:, 0]).squeeze(-1)
    torch.testing.assert_close(outputs, torch.stack([scores[:2], torch.stack([scores[2], outputs[1, 1]]), scores[3:]]))
    assert outputs[1, 1] == float("-inf")
    labels = torch.tensor([1, 0, 0])
    expected = [-scores[:2].log_softmax(0)[1], torch.tensor(0.0), -scores[3:].log_softmax(0)[0]]
    torch.testing.assert_close(head.loss(outputs, labels), torch.stack(expected))
    assert head.predict(outputs) == [int(scores[:2].argmax()), 0, int(scores[3:].argmax())]
    head.loss(outputs, labels).sum().backward()
    assert bool(head.linear.weight.grad.isfinite().all())


def test_tagging_reads_the_mean_of_each_words_subwords() -> None:
    head, given, tags = build("tagging"), inputs("tagging"), gold("tagging")
    outputs = head(given)
    losses = head.loss(outputs, labels_of(tags))
    for i, count in enumerate(COUNTS):
        hidden, words = sequence(i, count)
        logits = head.linear(torch.stack([hidden[words == word].mean(0) for word in range(count)]))
        torch.testing.assert_close(outputs.scores[i, :count], logits)
        torch.testing.assert_close(losses[i], functional.cross_entropy(logits, torch.tensor(tags[i])))
        assert head.predict(outputs)[i] == logits.argmax(-1).tolist()


def cut(given: States, last: int) -> States:
    """``given`` as if the model had read no word after number ``last``."""
    return replace(given, words=given.words.masked_fill(given.words > last, -1))


UNREAD: dict[str, list[tuple[int, ...]]] = {
    "biaffine": [(3, 5, 0), (5, 6, 1), (6, 9, 2), (40, 41, 0)],
    "bio": [(5, 6, 1), (6, 9, 2), (40, 41, 0)],
    "srl": [(0, 3, 5, 0), (0, 6, 8, 1), (6, 0, 1, 2), (40, 50, 51, 0), (7, -1, -1, -1)],
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_touches_unread_words_costs_nothing(name: str) -> None:
    head, given = build(name), cut(states((9,)), last=3)
    read = {"biaffine": [(0, 2, 1)], "bio": [(0, 2, 1)], "srl": [(0, 1, 2, 1), (2, -1, -1, -1)]}[name]
    outputs = head(given)
    expected = head.loss(outputs, labels_of([read]))
    torch.testing.assert_close(head.loss(outputs, labels_of([read + UNREAD[name]])), expected, atol=0, rtol=0)


def test_tags_of_unread_words_cost_nothing() -> None:
    head, given = build("tagging"), cut(states((9,)), last=3)
    outputs, read = head(given), torch.tensor([[1, 4, 0, 2]])
    wider = torch.cat([read, torch.full((1, 5), 3)], 1)
    torch.testing.assert_close(head.loss(outputs, wider), head.loss(outputs, read), atol=0, rtol=0)
    assert len(head.predict(outputs)[0]) == 4


def test_bio_does_not_teach_the_read_part_of_a_cut_span() -> None:
    head, given = build("bio"), cut(states((9,)), last=3)
    outputs = head(given)
    loss = head.loss(outputs, labels_of([[(0, 2, 1), (2, 6, 0)]]))
    torch.testing.assert_close(loss[0], functional.cross_entropy(outputs.scores[0, :2], torch.tensor([3, 4])))


@every_head_of_words
def test_an_example_without_read_words_costs_nothing(name: str) -> None:
    head, answers = build(name), gold(name)
    whole, none = head(inputs(name)), head(cut(inputs(name), last=-1))
    assert head.loss(none, labels_of(answers)).tolist() == [0.0] * len(COUNTS)
    assert head.predict(none) == [[]] * len(COUNTS)
    mixed = inputs(name)
    mixed.words[1] = -1
    outputs = head(mixed)
    expected = head.loss(whole, labels_of(answers))
    expected[1] = 0
    torch.testing.assert_close(head.loss(outputs, labels_of(answers)), expected)
    assert head.predict(outputs) == [[] if i == 1 else answer for i, answer in enumerate(head.predict(whole))]


@pytest.mark.parametrize("name", ["biaffine", "bio", "srl"])
def test_labels_may_be_empty(name: str) -> None:
    head, given = build(name), inputs(name)
    outputs, size = head(given), 4 if name == "srl" else 3
    none = torch.zeros(5, 0, size, dtype=torch.int64)
    torch.testing.assert_close(head.loss(outputs, none), head.loss(outputs, torch.full((5, 2, size), -100)))


def test_biaffine_spans_against_a_loop() -> None:
    head, given, answers = build("biaffine"), inputs("biaffine"), gold("biaffine")
    outputs = head(given)
    words, losses, scheme = given.word_states(given.hidden), head.loss(outputs, labels_of(answers)), head.scheme
    for i, count in enumerate(COUNTS):
        gold_labels = {(start, end): label for start, end, label in answers[i]}
        expected = []
        for start in range(count):
            for end in range(start + 1, count + 1):
                left = torch.cat([scheme.first(words[i, start]), torch.ones(1)])
                right = torch.cat([scheme.last(words[i, end - 1]), torch.ones(1)])
                scores = torch.stack([left @ scheme.biaffine.weight[:, c] @ right for c in range(4)])
                torch.testing.assert_close(outputs.scores[i, start, end - 1], scores)
                expected.append(functional.cross_entropy(scores, torch.tensor(gold_labels.get((start, end), 3))))
        torch.testing.assert_close(losses[i], torch.stack(expected).mean())


def test_greedy_decoding_takes_the_best_span_that_is_left_until_none_is() -> None:
    head = build("biaffine")
    words = torch.arange(9) < torch.tensor([[9], [6], [2], [8]])
    for seed in range(20):
        scores = torch.randn(4, 9, 9, 4, generator=torch.Generator().manual_seed(seed))
        mask = (words[:, :, None] & words[:, None]).triu()
        expected = []
        for row, count in zip(scores.tolist(), (9, 6, 2, 8), strict=True):
            spans = [(max(row[i][j]), i, j + 1, row[i][j].index(max(row[i][j]))) for i in range(count) for j in range(i, count)]
            left, taken = [span for span in spans if span[3] != 3], []
            while left:
                _, start, end, label = max(left)
                taken.append((start, end, label))
                left = [span for span in left if span[2] <= start or span[1] >= end]
            expected.append(sorted(taken))
        assert head.predict(Scores(scores, mask)) == expected


def test_overlaps_are_dropped_in_the_order_given() -> None:
    crossing, nested, apart = (2, 5, 0), (0, 1, 1), (4, 6, 2)
    assert without_overlaps([(0, 3, 0), crossing, nested, apart, (0, 3, 1)]) == [(0, 3, 0), apart]
    assert without_overlaps([crossing, (0, 3, 0), nested, apart]) == [nested, crossing]
    assert without_overlaps([]) == []


def test_bio_tags_are_read_as_seqeval_reads_them() -> None:
    scheme, rng = BioSpans(WIDTH, SPECS["bio"], torch.Generator()), random.Random(0)
    letters = ["O", "B-0", "I-0", "B-1", "I-1", "B-2", "I-2"]
    assert scheme.names == letters
    for _ in range(500):
        tags = [rng.randrange(7) for _ in range(rng.randint(0, 9))]
        entities = get_entities([letters[tag] for tag in tags])
        assert scheme.spans(tags) == [(first, last + 1, int(label)) for label, first, last in entities]


def test_gold_spans_survive_bio_tags() -> None:
    scheme, rng = BioSpans(WIDTH, SPECS["bio"], torch.Generator()), random.Random(1)
    for _ in range(100):
        counts = [rng.randint(1, 9) for _ in range(3)]
        answers = [flat_spans(rng, count, 9, 3) for count in counts]
        mask = torch.arange(9) < torch.tensor(counts)[:, None]
        tags = scheme.targets(labels_of([*answers, [(0, 1, 0)]])[:3], mask)
        assert scheme.decode(Scores(functional.one_hot(tags, 7).float(), mask)) == answers


def srl_scores(head: SRLHead, words: Tensor) -> tuple[Tensor, dict[tuple[int, int], Tensor], Any]:
    """phi_pred of each word, phi_arg of each span, and phi_label of a predicate and a span, of one example's ``words``
    (W, d), from the representation that He et al. write down."""

    def of_span(layer: Any, start: int, end: int) -> Tensor:
        first, last, content = layer.words.weight.split(layer.size)
        weight = torch.cat([first, last, content, layer.width.weight], 1)
        inside = words[start:end]
        attended = (head.attention(inside).softmax(0) * inside).sum(0)
        parts = torch.cat([words[start], words[end - 1], attended, head.width[end - start - 1]])
        return weight @ parts + layer.width.bias

    def label(predicate: int, start: int, end: int) -> Tensor:
        return head.label_score(head.label_predicate(words[predicate]) + of_span(head.label_argument, start, end))

    count, longest = len(words), head.spec.heads.srl_max_width
    predicates = torch.stack([head.predicate_score(head.predicate_input(word))[0] for word in words])
    spans = [(start, end) for start in range(count) for end in range(start + 1, min(start + longest, count) + 1)]
    arguments = {span: head.argument_score(of_span(head.argument_input, *span))[0] for span in spans}
    return predicates, arguments, label


def test_srl_against_loops() -> None:
    head, given, answers = build("srl"), inputs("srl"), gold("srl")
    outputs = head(given)
    losses, all_words = head.loss(outputs, labels_of(answers)), given.word_states(given.hidden)
    for i, count in enumerate(COUNTS):
        predicates, arguments, label = srl_scores(head, all_words[i, :count])
        kept_predicates = predicates.argsort(descending=True)[: max(1, int(count * 0.4))].tolist()
        kept_arguments = sorted(arguments, key=lambda span: -arguments[span].item())[: max(1, int(count * 0.8))]
        roles = {answer[:3]: answer[3] for answer in answers[i]}
        expected = []
        for predicate in kept_predicates:
            for span in kept_arguments:
                scores = label(predicate, *span) + predicates[predicate] + arguments[span]
                target = torch.tensor(roles.get((predicate, *span), 3))
                expected.append(functional.cross_entropy(torch.cat([scores, torch.zeros(1)]), target))
        is_predicate = torch.tensor([float(word in {answer[0] for answer in answers[i]}) for word in range(count)])
        is_argument = torch.tensor([float(span in {answer[1:3] for answer in answers[i]}) for span in arguments])
        detection = functional.binary_cross_entropy_with_logits(predicates, is_predicate)
        detection += functional.binary_cross_entropy_with_logits(torch.stack(list(arguments.values())), is_argument)
        torch.testing.assert_close(losses[i], torch.stack(expected).mean() + detection)


def srl_outputs(predicates: list[int], spans: list[tuple[int, int]], scores: Tensor, detection: list[float]) -> SRLOutputs:
    """One example with every pair kept; ``scores`` (P, A, roles)."""
    starts, ends = torch.tensor(spans).unbind(1)
    arguments = Scores(torch.zeros(1, len(spans)), torch.ones(1, len(spans), dtype=torch.bool))
    words = Scores(torch.tensor([detection]), torch.ones(1, len(detection), dtype=torch.bool))
    pairs = Scores(functional.pad(scores[None], (0, 1)), torch.ones(1, len(predicates), len(spans), dtype=torch.bool))
    return SRLOutputs(arguments, words, pairs, starts, ends, torch.arange(len(spans))[None], torch.tensor([predicates]))


def test_srl_decoding_drops_overlaps_and_names_bare_predicates() -> None:
    head, none = build("srl"), [-1.0, -1.0, -1.0]
    outputs = srl_outputs(
        predicates=[4, 1, 0],
        spans=[(0, 3), (2, 4), (5, 6), (2, 3)],
        scores=torch.tensor(
            [
                [[0.5, 2.0, 1.0], [3.0, 0.0, 0.0], [-0.5, -0.2, 0.1], [1.0, 0.0, 0.0]],
                [[0.5, 2.0, 1.0], none, none, [1.0, 1.5, 0.0]],
                [none, none, none, none],
            ]
        ),
        detection=[0.3, -2.0, -0.1, 0.2, 5.0, -1.0],
    )
    assert head.predict(outputs) == [
        [
            (0, -1, -1, -1),  # detected, every pair without a role
            (1, 0, 3, 1),  # not detected, but it has an argument; its nested (2, 3) scores less
            (3, -1, -1, -1),  # detected, but pruned
            (4, 2, 4, 0),  # the best of three that overlap
            (4, 5, 6, 2),
        ]
    ]


def test_srl_candidates_are_as_wide_as_set_and_as_many_as_set() -> None:
    head, given = build("srl", heads=replace(SMALL, srl_max_width=2, srl_argument_ratio=9.0)), states((6, 1))
    outputs = head(given)
    numbers = [kept[mask] for kept, mask in zip(outputs.kept_arguments, outputs.pairs.mask[:, 0], strict=True)]
    kept = [sorted(zip(outputs.starts[n].tolist(), outputs.ends[n].tolist(), strict=True)) for n in numbers]
    assert kept == [sorted([(i, i + 1) for i in range(6)] + [(i, i + 2) for i in range(5)]), [(0, 1)]]
    assert outputs.pairs.mask.any(-1).sum(-1).tolist() == [2, 1]
