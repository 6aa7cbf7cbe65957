"""The parsers: their decoders against enumeration of all trees, their losses against plain loops, and learning by heart."""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_modules.config import HeadsConfig
from lightning_modules.network.task_heads.base import HeadSpec, States, TaskHead
from lightning_modules.network.task_heads.biaffine import Biaffine, Projection
from lightning_modules.network.task_heads.constituency import ConstituencyHead, ConstituencyScores, binarised
from lightning_modules.network.task_heads.dependency import DependencyHead, DependencyScores
from lightning_modules.network.task_heads.trees import (
    best_binary_tree,
    best_projective_tree,
    best_tree,
    log_partition,
    span_marginals,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WIDTH, LABELS = 16, 4
CHAINS = [[0], [1], [2, 0], [3], [1, 3, 2]]

Span = tuple[int, int]
Tree = Literal["projective", "nonprojective", "greedy"]
TREES: tuple[Tree, ...] = get_args(Tree)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Trees, enumerated ----------------------------------------------------------------------------------------------------------


def is_tree(heads: Sequence[int]) -> bool:
    """Every word reaches the root, through exactly one word that depends on it."""
    for word in range(1, len(heads) + 1):
        seen = set()
        while word and word not in seen:
            seen.add(word)
            word = heads[word - 1]
        if word:
            return False
    return list(heads).count(0) == 1


def is_projective(heads: Sequence[int]) -> bool:
    arcs = [sorted((word, head)) for word, head in enumerate(heads, 1)]
    return not any(a < c < b < d for a, b in arcs for c, d in arcs)


@cache
def all_heads(words: int) -> list[tuple[int, ...]]:
    return [heads for heads in product(range(words + 1), repeat=words) if is_tree(heads)]


@cache
def all_binary_trees(start: int, end: int) -> list[frozenset[Span]]:
    if end - start == 1:
        return [frozenset({(start, end)})]
    splits = [product(all_binary_trees(start, k), all_binary_trees(k, end)) for k in range(start + 1, end)]
    return [left | right | {(start, end)} for pairs in splits for left, right in pairs]


def total(scores: Any, heads: Sequence[int]) -> float:
    return float(sum(scores[word, head] for word, head in enumerate(heads)))


def tree_scores(scores: Tensor, words: int) -> Tensor:
    """The score of each binary tree of ``words`` words."""
    return torch.stack([sum((scores[i, j] for i, j in tree), scores.new_zeros(())) for tree in all_binary_trees(0, words)])


def random_arcs(words: int, seed: int, ties: bool = False) -> Tensor:
    scores = torch.randn(words, words + 1, generator=generator(seed), dtype=torch.float64) * 3
    scores = scores.round() if ties else scores
    return scores.masked_fill(torch.eye(words, words + 1, dtype=torch.bool).roll(1, 1), -torch.inf)


def padded_arcs(examples: Sequence[Tensor], width: int) -> Tensor:
    """(n, width, width + 1); what is no word has finite scores of its own heads, none as a head."""
    arcs = torch.randn(len(examples), width, width + 1, generator=generator(99), dtype=torch.float64) * 9
    for row, scores in zip(arcs, examples, strict=True):
        row[:, len(scores) + 1 :] = -torch.inf
        row[: len(scores), : len(scores) + 1] = scores
    return arcs


def test_the_enumerations_have_the_known_sizes() -> None:
    assert [len(all_heads(words)) for words in range(1, 6)] == [1, 2, 9, 64, 625]  # n^(n-1), Cayley
    assert [len(list(filter(is_projective, all_heads(words)))) for words in range(1, 6)] == [1, 2, 7, 30, 143]
    assert [len(all_binary_trees(0, words)) for words in range(1, 7)] == [1, 1, 2, 5, 14, 42]  # Catalan


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("words", range(1, 6))
def test_the_best_tree_is_the_best_of_all(words: int, ties: bool) -> None:
    for seed in range(40):
        scores = random_arcs(words, seed, ties)
        found = best_tree(scores.numpy())
        best = max(all_heads(words), key=lambda heads: total(scores, heads))
        assert is_tree(found)
        assert total(scores, found) == pytest.approx(total(scores, best), abs=1e-9)
        assert ties or tuple(found) == best


def test_one_word_depends_on_the_root_however_good_the_root_is() -> None:
    scores = random_arcs(5, 0)
    scores[:, 0] += 1e4
    assert tuple(best_tree(scores.numpy())) == max(all_heads(5), key=lambda heads: total(scores, heads))


def test_rings_inside_rings_come_apart() -> None:
    # 1-2 and 3-4 are rings, and so is the pair of them; only then the root.
    scores = np.full((4, 5), -50.0)
    scores[[0, 1, 2, 3], [2, 1, 4, 3]] = 10.0
    scores[0, 4], scores[2, 1] = 5.0, 6.0
    scores[3, 0] = -20.0
    assert best_tree(scores) == [4, 1, 4, 0]


def test_the_best_tree_agrees_with_networkx() -> None:
    networkx = pytest.importorskip("networkx")
    for seed in range(8):
        scores = random_arcs(9, seed)
        totals = []
        for root in range(9):
            graph = networkx.DiGraph()
            graph.add_edge(0, root + 1, weight=float(scores[root, 0]))
            graph.add_weighted_edges_from(
                (head, word + 1, float(scores[word, head])) for word in range(9) for head in range(1, 10) if head != word + 1
            )
            best = networkx.maximum_spanning_arborescence(graph)
            totals.append(sum(data["weight"] for _, _, data in best.edges(data=True)))
        assert total(scores, best_tree(scores.numpy())) == pytest.approx(max(totals))


@pytest.mark.parametrize("ties", [False, True])
def test_the_best_projective_tree_is_the_best_of_all_projective_ones(ties: bool) -> None:
    for seed in range(40):
        examples = [random_arcs(words, 10 * seed + words, ties) for words in (3, 5, 1, 4, 2)]
        counts = torch.tensor([len(scores) for scores in examples])
        found = best_projective_tree(padded_arcs(examples, 6), counts).tolist()
        for scores, heads in zip(examples, found, strict=True):
            words = len(scores)
            best = max(filter(is_projective, all_heads(words)), key=lambda one: total(scores, one))
            assert is_tree(heads[:words]) and is_projective(heads[:words])
            assert total(scores, heads[:words]) == pytest.approx(total(scores, best), abs=1e-9)
            assert ties or tuple(heads[:words]) == best


def test_long_sentences_get_trees() -> None:
    examples = [random_arcs(words, words) for words in (60, 37)]
    counts = torch.tensor([60, 37])
    projective = best_projective_tree(padded_arcs(examples, 60), counts).tolist()
    for scores, heads in zip(examples, projective, strict=True):
        words, free = len(scores), best_tree(scores.numpy())
        assert is_tree(free) and is_tree(heads[:words]) and is_projective(heads[:words])
        assert total(scores, free) >= total(scores, heads[:words])


def test_reduced_precision_does_not_round_the_numbers_of_words() -> None:
    heads = torch.arange(1, 301) % 300  # each word depends on the next, the last on the root
    heads = torch.where(heads == 0, 0, heads + 1)
    scores = functional.one_hot(heads, 301).float()[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert best_projective_tree(scores, torch.tensor([300]))[0].tolist() == heads.tolist()


def test_sums_over_binary_trees_are_those_of_enumeration() -> None:
    scores = torch.randn(7, 8, 8, generator=generator(0), dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([6, 1, 4, 2, 3, 5, 0])
    log_z = log_partition(scores, counts)
    expected = [tree_scores(scores[row], int(words)).logsumexp(0) for row, words in enumerate(counts[:6])]
    torch.testing.assert_close(log_z[:6], torch.stack(expected))
    weights = torch.randn(6, generator=generator(1), dtype=torch.float64)
    (ours,) = torch.autograd.grad((log_z[:6] * weights).sum(), scores)
    (theirs,) = torch.autograd.grad((torch.stack(expected) * weights).sum(), scores)
    torch.testing.assert_close(ours[:6], theirs[:6])
    assert log_z[6] == 0
    marginals = span_marginals(scores, counts)
    (expected_marginals,) = torch.autograd.grad(tree_scores(scores[0], 6).logsumexp(0), scores)
    torch.testing.assert_close(marginals[0], expected_marginals[0])
    assert not marginals.requires_grad


def test_the_best_binary_tree_is_the_best_of_all() -> None:
    for seed in range(30):
        scores = torch.randn(6, 8, 8, generator=generator(seed), dtype=torch.float64)
        counts = torch.tensor([6, 1, 4, 2, 3, 5])
        found = best_binary_tree(scores, counts)
        for row, words in enumerate(counts.tolist()):
            best = all_binary_trees(0, words)[int(tree_scores(scores[row], words).argmax())]
            assert {(i, j) for i, j in found[row].nonzero().tolist()} == best


def test_no_words_no_tree() -> None:
    assert best_tree(np.zeros((0, 1))) == []
    assert best_projective_tree(torch.zeros(2, 1, 2), torch.tensor([0, 1])).tolist() == [[0], [0]]
    assert best_binary_tree(torch.zeros(1, 3, 3), torch.tensor([0])).sum() == 0


# Binarisation ---------------------------------------------------------------------------------------------------------------


def random_brackets(words: int, seed: int) -> set[Span]:
    """Properly nested spans of a random tree; not always with the whole sentence or the single words in it."""
    stream = np.random.default_rng(seed)

    def grow(start: int, end: int) -> Iterator[Span]:
        if stream.random() < 0.6:
            yield start, end
        if end - start > 1:
            cuts = stream.choice(np.arange(start + 1, end), size=int(stream.integers(1, end - start)), replace=False)
            edges = [start, *sorted(cuts.tolist()), end]
            for left, right in pairwise(edges):
                yield from grow(left, right)

    return set(grow(0, words))


def left_binarised(brackets: set[Span], words: int) -> set[Span]:
    """By the definition: child by child."""
    spans = brackets | {(0, words)} | {(i, i + 1) for i in range(words)}

    def children(span: Span) -> list[Span]:
        inside = [one for one in spans if one != span and span[0] <= one[0] and one[1] <= span[1]]
        return sorted(one for one in inside if not any(o != one and o[0] <= one[0] and one[1] <= o[1] for o in inside))

    return spans | {(span[0], child[1]) for span in spans for child in children(span)[1:]}


def as_tensors(examples: Sequence[set[Span]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, examples))
    rows = [[*sorted(brackets), *[(0, 0)] * (width - len(brackets))] for brackets in examples]
    starts, ends = torch.tensor(rows, dtype=torch.int64).view(len(rows), width, 2).unbind(-1)
    return starts, ends


def test_binarisation_is_that_of_the_definition() -> None:
    words = [1 + seed % 9 for seed in range(200)]
    examples = [random_brackets(count, seed) for seed, count in enumerate(words)]
    trees = binarised(*as_tensors(examples), torch.tensor(words), 9)
    for brackets, count, tree in zip(examples, words, trees, strict=True):
        spans = {(i, j) for i, j in tree.nonzero().tolist()}
        assert spans == left_binarised(brackets, count)
        assert len(spans) == 2 * count - 1 and brackets <= spans
        assert count > 7 or spans in all_binary_trees(0, count)


# The layers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_biaffine_is_its_formula(bias: bool) -> None:
    layer, left, right = Biaffine(3, 2, generator(0), bias), torch.randn(1, 4, 3), torch.randn(1, 5, 3)
    scores, one = layer(left, right), torch.ones(1)
    assert scores.shape == (1, 4, 5, 2)
    for i, j, c in product(range(4), range(5), range(2)):
        y = torch.cat([right[0, j], one]) if bias else right[0, j]
        torch.testing.assert_close(scores[0, i, j, c], torch.cat([left[0, i], one]) @ layer.weight[:, c] @ y)


def test_a_projection_drops_the_same_features_of_all_words() -> None:
    layer, states = Projection(6, 40, 0.5, generator(0)), torch.randn(3, 5, 6)
    dropped = layer(states) == 0
    assert torch.equal(dropped, dropped[:, :1].expand(-1, 5, -1)) and 0 < dropped.sum() < dropped.numel()
    assert not torch.equal(dropped[0], dropped[1])
    layer.eval()
    torch.testing.assert_close(layer(states), functional.leaky_relu(layer.linear(states), 0.1))


# The heads ------------------------------------------------------------------------------------------------------------------


def make_states(counts: Sequence[int], seed: int = 0, extra: int = 0) -> States:
    """Random states of examples of ``counts`` words: a special token, words of one to three tokens, a special token."""
    rows, words = [], []
    for row, count in enumerate(counts):
        sizes = torch.randint(1, 4, (count,), generator=generator(seed + row)).tolist()
        index = [-1, *(word for word, size in enumerate(sizes) for _ in range(size)), -1]
        words.append(index)
        rows.append(torch.randn(len(index), WIDTH, generator=generator(seed + row)))
    length = max(map(len, words)) + extra
    mask = torch.tensor([[place < len(index) for place in range(length)] for index in words])
    index = torch.tensor([[*index, *[-1] * (length - len(index))] for index in words])
    # What stands in padding must not matter.
    hidden = torch.stack([functional.pad(row, (0, 0, 0, length - len(row)), value=7.0) for row in rows])
    return States(hidden, mask, index, mask & (torch.arange(length) == 0))


def make_head(kind: str, dropout: float = 0.0, seed: int = 0, tree: Tree = "nonprojective") -> TaskHead:
    config = HeadsConfig(dropout=dropout, arc_size=24, label_size=12, tree=tree)
    kinds: dict[str, type[TaskHead]] = {"dependency": DependencyHead, "constituency": ConstituencyHead}
    return kinds[kind](WIDTH, HeadSpec("x", kind, LABELS, {"chains": CHAINS}, config, dropout=dropout, seed=seed))


def padded(rows: Sequence[Sequence[Sequence[int]]], size: int) -> Tensor:
    width = max(map(len, rows))
    filled = [[*map(list, row), *[[-100] * size] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).view(len(rows), width, size)


def random_heads(words: int, seed: int, projective: bool = False) -> list[int]:
    scores = random_arcs(words, seed)
    if projective:
        return best_projective_tree(scores[None], torch.tensor([words]))[0].tolist()
    return best_tree(scores.numpy())


def random_labels(kind: str, counts: Sequence[int], seed: int = 0, projective: bool = False) -> Tensor:
    """Random trees in the form of the kind's labels."""
    stream = np.random.default_rng(seed)
    rows: list[list[tuple[int, ...]]]
    if kind == "dependency":
        trees = [random_heads(words, seed + i, projective) for i, words in enumerate(counts)]
        rows = [[(head, int(stream.integers(LABELS))) for head in heads] for heads in trees]
    else:
        spans = [sorted(random_brackets(words, seed + i)) for i, words in enumerate(counts)]
        rows = [[(*span, int(stream.integers(len(CHAINS)))) for span in one] for one in spans]
    return padded(rows, 2 if kind == "dependency" else 3)


def as_predictions(labels: Tensor) -> list[list[tuple[int, ...]]]:
    """What a perfect prediction is, in order."""
    rows = [[tuple(one) for one in row if one[0] >= 0] for row in labels.tolist()]
    if labels.shape[-1] == 2:
        return rows
    ordered = [sorted(row, key=lambda one: (one[0], -one[1])) for row in rows]
    return [[(start, end, label) for start, end, chain in row for label in CHAINS[chain]] for row in ordered]


KINDS = ("dependency", "constituency")
COUNTS = (5, 1, 7, 2)


def test_dependency_loss_is_arc_plus_relation_over_the_words() -> None:
    head, labels = make_head("dependency"), random_labels("dependency", COUNTS)
    outputs: DependencyScores = head(make_states(COUNTS))
    assert outputs.arcs.shape == (4, 7, 8) and outputs.relations.shape == (4, 7, 8, LABELS)
    for row, (count, loss) in enumerate(zip(COUNTS, head.loss(outputs, labels), strict=True)):
        expected = torch.zeros(())
        for word, (parent, relation) in enumerate(labels[row, :count].tolist()):
            candidates = [h for h in range(count + 1) if h != word + 1]
            arc = outputs.arcs[row, word, candidates].log_softmax(-1)[candidates.index(parent)]
            expected = expected - arc - outputs.relations[row, word, parent].log_softmax(-1)[relation]
        torch.testing.assert_close(loss, expected / count)


def test_constituency_loss_is_structure_plus_chains_over_the_tree() -> None:
    counts = (5, 1, 6, 2)
    head, labels = make_head("constituency"), random_labels("constituency", counts)
    outputs: ConstituencyScores = head(make_states(counts))
    assert outputs.spans.shape == (4, 7, 7) and outputs.labels.shape == (4, 7, 7, len(CHAINS) + 1)
    for row, (count, loss) in enumerate(zip(counts, head.loss(outputs, labels), strict=True)):
        chains = {(start, end): chain for start, end, chain in labels[row].tolist() if start >= 0}
        tree = left_binarised(set(chains), count)
        gold = all_binary_trees(0, count).index(frozenset(tree))
        structure = -tree_scores(outputs.spans[row], count).log_softmax(0)[gold]
        labelling = [-outputs.labels[row, i, j].log_softmax(-1)[chains.get((i, j), len(CHAINS))] for i, j in tree]
        torch.testing.assert_close(loss, structure / count + torch.stack(labelling).mean(), atol=1e-5, rtol=1e-5)


def learn(head: TaskHead, states: States, labels: Tensor, steps: int = 150) -> float:
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = head.loss(head(states), labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(head.loss(head(states), labels).max().detach())


@pytest.mark.parametrize("tree", TREES)
def test_dependency_trees_are_learned_by_heart(tree: Tree) -> None:
    counts = (6, 1, 9, 3)
    labels = random_labels("dependency", counts, projective=tree == "projective")
    head, states = make_head("dependency", tree=tree), make_states(counts)
    assert learn(head, states, labels) < 0.02
    assert head.predict(head(states)) == as_predictions(labels)


def test_constituency_trees_are_learned_by_heart() -> None:
    counts = (6, 1, 9, 3, 4)
    labels = random_labels("constituency", counts, seed=3)
    labels[4] = -100  # no constituent at all
    head, states = make_head("constituency"), make_states(counts)
    assert learn(head, states, labels) < 0.02
    assert head.predict(head(states)) == as_predictions(labels)
    assert head.predict(head(states))[4] == []


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_the_states(kind: str) -> None:
    head, states, labels = make_head(kind, dropout=0.3), make_states(COUNTS), random_labels(kind, COUNTS)
    hidden = states.hidden.requires_grad_()
    head.loss(head(states), labels).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert (hidden.grad[states.words >= 0].abs().sum(-1) > 0).all()
    assert hidden.grad[states.words < 0].abs().sum() == 0


@pytest.mark.parametrize("kind, tree", [("constituency", "nonprojective"), *(("dependency", tree) for tree in TREES)])
def test_a_batch_is_its_examples_one_by_one_whatever_the_padding(kind: str, tree: Tree) -> None:
    head = make_head(kind, tree=tree)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(8)
    labels = random_labels(kind, COUNTS, seed=5)
    outputs = head(make_states(COUNTS))
    together, predicted = head.loss(outputs, labels), head.predict(outputs)
    wider = head(make_states(COUNTS, extra=4))
    torch.testing.assert_close(head.loss(wider, functional.pad(labels, (0, 0, 0, 3), value=-100)), together)
    assert head.predict(wider) == predicted
    for row, count in enumerate(COUNTS):
        alone = head(make_states([count], seed=row))
        known = labels[row, labels[row, :, 0] >= 0]
        torch.testing.assert_close(head.loss(alone, known[None])[0], together[row])
        assert head.predict(alone)[0] == predicted[row]


def test_dependency_ignores_words_that_were_not_read() -> None:
    head, outputs = make_head("dependency"), make_head("dependency")(make_states([3, 4]))
    read = [[(2, 1), (0, 0), (2, 3)], [(0, 2), (1, 1), (1, 0), (3, 3)]]
    expected = head.loss(outputs, padded([read[0][:2], read[1]], 2))
    # The first example has two more words; its third word's head is one of them, within or beyond the batch's width.
    for unread in (4, 5):
        cut = padded([[(2, 1), (0, 0), (unread, 3), (2, 1), (2, 0)], read[1]], 2)
        torch.testing.assert_close(head.loss(outputs, cut), expected)
    assert not torch.isclose(head.loss(outputs, padded(read, 2))[0], expected[0])
    torch.testing.assert_close(head.loss(outputs, cut[:, :2])[0], expected[0])  # fewer words than read
    assert [len(row) for row in head.predict(outputs)] == [3, 4]


def test_constituency_ignores_spans_that_reach_words_that_were_not_read() -> None:
    head, outputs = make_head("constituency"), make_head("constituency")(make_states([4, 6]))
    inside, other = [(0, 2, 1), (2, 3, 0)], [(2, 6, 1)]
    beyond = [(0, 9, 2), (1, 6, 3), (2, 5, 1), (5, 7, 1)]
    expected = head.loss(outputs, padded([inside, other], 3))
    torch.testing.assert_close(head.loss(outputs, padded([[*beyond, *inside], other], 3)), expected)
    whole = head.loss(outputs, padded([[(0, 4, 2), *inside], other], 3))
    assert not torch.isclose(whole[0], expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_examples_without_words_or_labels_are_harmless(kind: str) -> None:
    head, size = make_head(kind), 2 if kind == "dependency" else 3
    outputs = head(make_states([0, 3]))
    for width in (0, 3):
        loss = head.loss(outputs, torch.full((2, width, size), -100))
        assert loss.shape == (2,) and loss[0] == 0 and loss.isfinite().all()
        head.zero_grad()
        loss.sum().backward(retain_graph=True)
        gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert head.predict(outputs)[0] == []
    assert head.predict(head(make_states([0, 0]))) == [[], []]


@pytest.mark.parametrize("tree", TREES)
def test_no_word_is_its_own_head(tree: Tree) -> None:
    head = make_head("dependency", tree=tree)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(20)
    counts = (1, 8, 12, 3)
    predicted = head.predict(head(make_states(counts)))
    for row, count in zip(predicted, counts, strict=True):
        heads = [parent for parent, _ in row]
        assert all(0 <= parent <= count and parent != word for word, parent in enumerate(heads, 1))
        assert tree == "greedy" or is_tree(heads)
        assert tree != "projective" or is_projective(heads)
        assert all(0 <= relation < LABELS for _, relation in row)


def test_a_word_without_a_token_is_still_a_word() -> None:
    states = make_states([4])
    silent = States(states.hidden, states.mask, torch.where(states.words == 1, -1, states.words), states.starts)
    head = make_head("dependency")
    assert len(head.predict(head(silent))[0]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_heads_compute_in_float32_under_autocast(kind: str) -> None:
    head, states, labels = make_head(kind), make_states(COUNTS), random_labels(kind, COUNTS)
    low = States(states.hidden.bfloat16(), states.mask, states.words, states.starts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = head(low)
        loss, predicted = head.loss(outputs, labels), head.predict(outputs)
    rounded = head(States(low.hidden.float(), states.mask, states.words, states.starts))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, head.loss(rounded, labels), atol=0, rtol=0)
    assert predicted == head.predict(rounded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_starts_from_its_own_seed(kind: str) -> None:
    first, same, other = make_head(kind, seed=1), make_head(kind, seed=1), make_head(kind, seed=2)
    torch.testing.assert_close(first.state_dict(), same.state_dict(), atol=0, rtol=0)
    assert all(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True) if a.abs().sum() > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only(kind: str) -> None:
    head, states, labels = make_head(kind, dropout=0.5), make_states(COUNTS), random_labels(kind, COUNTS)
    assert not torch.equal(head.loss(head(states), labels), head.loss(head(states), labels))
    head.eval()
    assert torch.equal(head.loss(head(states), labels), head.loss(head(states), labels))


# Real trees -----------------------------------------------------------------------------------------------------------------


def rows(task: str) -> list[dict[str, Any]]:
    path = DATA / task / "dev.jsonl"
    if not path.is_file():
        pytest.skip(f"needs the development data at {path}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_real_constituency_trees_survive_binarisation() -> None:
    examples = [row for row in rows("ewt_con") if len(row["tokens"]) <= 40]
    names = sorted({span[2] for row in examples for span in row["spans"]})
    gold = [[(start, end, names.index(label)) for start, end, label in row["spans"]] for row in examples]
    nodes = [[(start, end, tuple(b[2] for b in row if b[:2] == (start, end))) for start, end, _ in row] for row in gold]
    chains = sorted({chain for row in nodes for _, _, chain in row})
    labels = padded([sorted({(start, end, chains.index(chain)) for start, end, chain in row}) for row in nodes], 3)
    counts = torch.tensor([len(row["tokens"]) for row in examples])

    starts, ends, _ = labels.clamp_min(0).unbind(-1)
    tree = binarised(starts, ends, counts, int(counts.max()))
    targets = torch.full_like(tree, len(chains), dtype=torch.int64)
    for row, one in enumerate(labels.tolist()):
        for start, end, chain in one:
            if start >= 0:
                targets[row, start, end] = chain
    facts = {"chains": [list(chain) for chain in chains]}
    head = ConstituencyHead(4, HeadSpec("x", "constituency", len(names), facts))
    oracle = functional.one_hot(targets, len(chains) + 1).float()
    predicted = head.predict(ConstituencyScores(tree.float() * 9, oracle, counts))
    assert predicted == [sorted(row, key=lambda b: (b[0], -b[1])) for row in gold]


def test_real_dependency_trees_come_back_from_their_own_scores() -> None:
    examples = rows("ewt_dep")[:300]
    names = sorted({relation for row in examples for relation in row["deprels"]})
    gold = [[(h, names.index(r)) for h, r in zip(row["heads"], row["deprels"], strict=True)] for row in examples]
    counts = torch.tensor([len(row) for row in gold])
    width = int(counts.max())
    labels = padded(gold, 2).clamp_min(0)
    arcs = functional.one_hot(labels[..., 0], width + 1).float()
    relations = functional.one_hot(labels[..., 1], len(names)).float()[:, :, None].expand(-1, -1, width + 1, -1)
    outputs = DependencyScores(arcs, relations, counts)
    for tree in TREES:
        head = DependencyHead(4, HeadSpec("x", "dependency", len(names), heads=HeadsConfig(tree=tree)))
        same = [is_projective([h for h, _ in row]) or tree != "projective" for row in gold]
        predicted = head.predict(outputs)
        assert [row for row, kept in zip(predicted, same, strict=True) if kept] == [
            row for row, kept in zip(gold, same, strict=True) if kept
        ]
        assert sum(same) > 250
