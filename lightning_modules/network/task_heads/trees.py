"""The best dependency tree, the best binary tree, and sums over all binary trees.

Charts are filled by width, for all examples and all spans of a width at once; the splits of a width are strided views of the
chart, so nothing is gathered. What is shorter than the chart needs no mask: a span is built only from spans inside it.

Legend: n examples, W words of the longest, N = W + 1 boundaries between words; span (i, j) is words i to j - 1.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _Halves(NamedTuple):
    """Views (n, size - width, splits) of the two parts of all spans of one width, for each way to split them."""

    left: Tensor
    right: Tensor

    def scores(self) -> Tensor:
        return self.left + self.right

    def mark(self, marks: Tensor) -> None:
        self.left.add_(marks)
        self.right.add_(marks)


def _lefts(chart: Tensor, width: int, first: int, number: int) -> Tensor:
    """The view (n, size - width, number) of cells (i, i + first), (i, i + first + 1), ... of a contiguous (n, size, size)."""
    size = chart.shape[1]
    shape, strides = (len(chart), size - width, number), (size * size, size + 1, 1)
    return chart.as_strided(shape, strides, chart.storage_offset() + first)


def _rights(chart: Tensor, width: int, first: int, number: int) -> Tensor:
    """The view (n, size - width, number) of cells (i + first, i + width), (i + first + 1, i + width), ... of the chart."""
    size = chart.shape[1]
    shape, strides = (len(chart), size - width, number), (size * size, size + 1, size)
    return chart.as_strided(shape, strides, chart.storage_offset() + first * size + width)


def _best_split(splits: Tensor) -> Tensor:
    """1 at the best (of equals, the first) entry of the last axis, 0 elsewhere."""
    return functional.one_hot(splits.argmax(-1), splits.shape[-1]).to(splits.dtype)


def _spans(chart: Tensor, width: int) -> _Halves:
    return _Halves(_lefts(chart, width, 1, width - 1), _rights(chart, width, 1, width - 1))


def _inside(scores: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """Bottom up: cell (i, j) combines over all binary trees of words i to j - 1 the sum of their spans' scores."""
    chart = scores.detach().triu(1).contiguous()
    for width in range(2, chart.shape[1]):
        chart.diagonal(width, 1, 2).add_(combine(_spans(chart, width).scores()))
    return chart


def _outside(chart: Tensor, counts: Tensor, share: Callable[[Tensor], Tensor]) -> Tensor:
    """Top down: each example's whole span has weight 1, and every span hands its weight to its splits by ``share``."""
    weights = torch.zeros_like(chart)
    weights[torch.arange(len(chart), device=chart.device), 0, counts] = 1
    for width in range(chart.shape[1] - 1, 1, -1):
        shares = share(_spans(chart, width).scores())
        _spans(weights, width).mark(shares * weights.diagonal(width, 1, 2).unsqueeze(-1))
    return weights.triu(1)


_log_sum = partial(torch.logsumexp, dim=-1)
_maximum = partial(torch.amax, dim=-1)
_probabilities = partial(torch.softmax, dim=-1)


class _LogPartition(torch.autograd.Function):
    """The gradient of log Z with respect to a span's score is the span's marginal probability (Eisner 2016): no chart is kept
    for automatic differentiation."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, counts: Tensor) -> Tensor:
        chart = _inside(scores, _log_sum)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_outside(chart, counts, _probabilities))
        return chart[torch.arange(len(chart), device=chart.device), 0, counts]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (marginals,) = ctx.saved_tensors
        return gradient[:, None, None] * marginals, None


def log_partition(scores: Tensor, counts: Tensor) -> Tensor:
    """The inside algorithm: the log of the sum, over all binary trees of each example, of exp(the sum of its spans' scores).

    ``scores`` (n, N, N), ``counts`` (n,) words -> (n,). Differentiable once.
    """
    return _LogPartition.apply(scores, counts)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def span_marginals(scores: Tensor, counts: Tensor) -> Tensor:
    """The probability (n, N, N) that a span is in the tree, if a tree's log-probability is the sum of its spans' scores."""
    return _outside(_inside(scores, _log_sum), counts, _probabilities)


@torch.no_grad()
def best_binary_tree(scores: Tensor, counts: Tensor) -> Tensor:
    """CKY: the spans (n, N, N) bool, single words included, of the binary tree with the largest sum of scores."""
    return _outside(_inside(scores, _maximum), counts, _best_split) > 0


class _HalfTrees(NamedTuple):
    """Eisner's charts (n, W, W), cell (i, j) for words i to j: the head is the word at one end, ``right`` means i governs.

    In an open one the arc between i and j has just been drawn; a done one has all its dependents on that side.
    """

    right_open: Tensor
    left_open: Tensor
    right_done: Tensor
    left_done: Tensor

    @classmethod
    def zeros(cls, like: Tensor) -> "_HalfTrees":
        return cls(*torch.zeros((4, *like.shape), dtype=like.dtype, device=like.device).unbind())

    def facing(self, width: int) -> _Halves:
        """What an arc of this width joins."""
        return _Halves(_lefts(self.right_done, width, 0, width), _rights(self.left_done, width, 1, width))

    def rightward(self, width: int) -> _Halves:
        """What a done half tree of this width, governed by i, is made of."""
        return _Halves(_lefts(self.right_open, width, 1, width), _rights(self.right_done, width, 1, width))

    def leftward(self, width: int) -> _Halves:
        """What a done half tree of this width, governed by j, is made of."""
        return _Halves(_lefts(self.left_done, width, 0, width), _rights(self.left_open, width, 0, width))


def _fill(arcs: Tensor) -> _HalfTrees:
    """The best score of every half tree; ``arcs`` (n, W, W) [dependent, head]."""
    charts = _HalfTrees.zeros(arcs)
    for width in range(1, arcs.shape[1]):
        facing = charts.facing(width).scores().amax(-1)
        charts.right_open.diagonal(width, 1, 2).copy_(facing + arcs.diagonal(-width, 1, 2))
        charts.left_open.diagonal(width, 1, 2).copy_(facing + arcs.diagonal(width, 1, 2))
        charts.right_done.diagonal(width, 1, 2).copy_(charts.rightward(width).scores().amax(-1))
        charts.left_done.diagonal(width, 1, 2).copy_(charts.leftward(width).scores().amax(-1))
    return charts


def _trace(charts: _HalfTrees, chosen: _HalfTrees) -> None:
    """Top down: mark in ``chosen``, where the half trees at the root are marked, all that the best tree is made of."""

    def hand_down(marks: Tensor, parts: Callable[[_HalfTrees, int], _Halves], width: int) -> None:
        best = _best_split(parts(charts, width).scores()) * marks.diagonal(width, 1, 2).unsqueeze(-1)
        parts(chosen, width).mark(best)

    for width in range(charts.right_open.shape[1] - 1, 0, -1):
        hand_down(chosen.right_done, _HalfTrees.rightward, width)
        hand_down(chosen.left_done, _HalfTrees.leftward, width)
        hand_down(chosen.right_open + chosen.left_open, _HalfTrees.facing, width)


@torch.no_grad()
def best_projective_tree(scores: Tensor, counts: Tensor) -> Tensor:
    """Eisner's algorithm (Eisner 1996): the best projective tree in which exactly one word depends on the root.

    ``scores`` (n, W, N) of [word, head], head 0 the root and h the word h - 1, minus infinity for words that are none;
    ``counts`` (n,) words -> heads (n, W) int64, 0 for what is no word.
    """
    examples, words = torch.arange(len(scores), device=scores.device), torch.arange(scores.shape[1], device=scores.device)
    charts = _fill(scores[:, :, 1:])
    last = (counts - 1).clamp_min(0)
    from_root = scores[:, :, 0] + charts.left_done[:, 0] + charts.right_done[examples, :, last]
    root = from_root.masked_fill(words >= counts[:, None], -torch.inf).argmax(-1)
    chosen = _HalfTrees.zeros(charts.right_open)
    chosen.left_done[examples, 0, root] = 1
    chosen.right_done[examples, root, last] = 1
    _trace(charts, chosen)
    # No matrix product: at reduced precision it would round the words' numbers.
    numbers = words + 1
    return ((chosen.right_open * numbers[:, None]).sum(1) + (chosen.left_open * numbers).sum(2)).long()


def _cycle(heads: Sequence[int], nodes: Sequence[int]) -> list[int]:
    """Nodes, none the root 0, that are each other's heads in a ring; empty if there is no ring."""
    seen_from = {0: 0}
    for start in nodes:
        node = start
        while node not in seen_from:
            seen_from[node] = start
            node = heads[node]
        if seen_from[node] == start and node:
            ring = [node]
            while heads[ring[-1]] != node:
                ring.append(heads[ring[-1]])
            return ring
    return []


class _Graph:
    """A graph that contracts rings to one node and remembers which arc of the whole graph each of its arcs stands for."""

    def __init__(self, scores: NDArray[np.float64]) -> None:
        size = scores.shape[1]
        self.scores = np.full((size, size), -np.inf)
        self.scores[1:] = scores
        np.fill_diagonal(self.scores, -np.inf)
        self.dependents, self.heads = np.indices((size, size))
        self.nodes = list(range(1, size))
        self.inside: list[set[int]] = [{node} for node in range(size)]
        """The nodes of the whole graph that are contracted in each node."""

    def contract(self, ring: list[int], best: Sequence[int]) -> list[tuple[int, int, set[int]]]:
        """Make ``ring`` its first node; returns the ring's arcs, each with the nodes inside its dependent."""
        rows, others = np.array(ring), np.arange(len(self.scores))
        ends = [(int(self.dependents[node, best[node]]), int(self.heads[node, best[node]])) for node in ring]
        arcs = [(dependent, head, self.inside[node]) for node, (dependent, head) in zip(ring, ends, strict=True)]
        # An arc into the ring replaces the arc of the node that it enters.
        entering = self.scores[rows] - self.scores[rows, [best[node] for node in ring]][:, None]
        self._replace((ring[0], others), entering.max(0), (rows[entering.argmax(0)], others))
        leaving = self.scores[:, rows]
        self._replace((others, ring[0]), leaving.max(1), (others, rows[leaving.argmax(1)]))
        self.scores[ring[0], ring[0]] = -np.inf
        self.scores[rows[1:]] = self.scores[:, rows[1:]] = -np.inf
        self.nodes = [node for node in self.nodes if node not in ring[1:]]
        self.inside[ring[0]] = set().union(*(self.inside[node] for node in ring))
        return arcs

    def _replace(self, where: Any, scores: NDArray[np.float64], source: Any) -> None:
        self.scores[where] = scores
        self.dependents[where], self.heads[where] = self.dependents[source], self.heads[source]


def best_tree(scores: NDArray[np.float64]) -> list[int]:
    """Chu-Liu/Edmonds: the best tree, projective or not, in which exactly one word depends on the root.

    ``scores`` (W, N) of one example's [word, head], head 0 the root and h the word h - 1; a word's score as its own head is
    not read. Returns the words' heads. (McDonald et al. 2005; the law of one root is that of the CoNLL 2018 shared task.)
    """
    words = len(scores)
    scores = scores.copy()
    arcs = scores[~np.eye(words, words + 1, k=1, dtype=bool)]
    if words:
        # A tree with one root arc is then better than any with two, and trees with one root arc keep their order.
        scores[:, 0] -= words * (arcs.max() - arcs.min()) + 1
    graph, contracted = _Graph(scores), []
    best = graph.scores.argmax(1).tolist()
    while ring := _cycle(best, graph.nodes):
        contracted.append(graph.contract(ring, best))
        best = graph.scores.argmax(1).tolist()
    heads = {int(graph.dependents[node, best[node]]): int(graph.heads[node, best[node]]) for node in graph.nodes}
    for arcs_of_ring in reversed(contracted):
        entered = [inside for _, _, inside in arcs_of_ring if not inside.isdisjoint(heads)]
        heads.update((dependent, head) for dependent, head, inside in arcs_of_ring if inside not in entered)
    return [heads[word] for word in range(1, words + 1)]
