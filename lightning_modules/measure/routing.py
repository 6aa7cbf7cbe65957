"""How tasks use experts, from routing records alone (specs/task_aware_gating.md section 9). Pure numpy except for the reading.

A table is (T, E): row t holds the combine weights of task t, which sum to 1. Every task counts 1/T.
"""

from collections.abc import Mapping

import numpy as np

from lightning_modules.network.routers import Routing


def table_of(routing: Routing) -> np.ndarray:
    """The (T, E) table of a routing whose rows are the T tasks."""
    return routing.weights.detach().float().cpu().numpy().astype(float)


def utilisation(table: np.ndarray) -> np.ndarray:
    """(E,) share of the tasks' weight that each expert carries; sums to 1."""
    return table.mean(0)


def routing_entropy(table: np.ndarray) -> float:
    """Mean over tasks of H(weights) / ln E: 0 one expert each, 1 all experts alike. 0 for a single expert."""
    experts = table.shape[1]
    return float(np.mean([_entropy(row) for row in table]) / np.log(experts)) if experts > 1 else 0.0


def mutual_information(table: np.ndarray) -> float:
    """I(task; expert) in nats of the task-uniform joint J = table / T, in [0, ln min(T, E)]."""
    return max(0.0, _entropy(table.mean(0)) - float(np.mean([_entropy(row) for row in table])))


def normalised_mutual_information(table: np.ndarray) -> float:
    """I / min(H(task), H(expert)), in [0, 1]; 0 when one of the entropies is 0 (one task, or one expert for all)."""
    least = min(float(np.log(table.shape[0])), _entropy(table.mean(0)))
    return min(1.0, mutual_information(table) / least) if least > 1e-12 else 0.0


def dead_experts(table: np.ndarray) -> int:
    """Experts that carry less than 0.01 / E of the weight."""
    return int(np.sum(utilisation(table) < 0.01 / table.shape[1]))


def max_violation(table: np.ndarray) -> float:
    """(largest - mean) / mean utilisation: 0 balanced, E - 1 collapsed."""
    share = utilisation(table)
    return float(share.max() / share.mean() - 1)


def measure_routing(routings: Mapping[int, Routing]) -> dict[str, float]:
    """``route/{layer}/{name}`` for every routed block, and ``route/nmi``, the mean over them; {} without routed blocks.

    Names: ``entropy``, ``nmi``, ``dead_experts``, ``max_violation``, ``effective_experts`` (exp of the entropy of the
    utilisation) and ``utilisation_{e}``.
    """
    values: dict[str, float] = {}
    for layer, routing in routings.items():
        values |= {f"route/{layer}/{name}": value for name, value in measure_table(table_of(routing)).items()}
    if routings:
        values["route/nmi"] = float(np.mean([values[f"route/{layer}/nmi"] for layer in routings]))
    return values


def measure_table(table: np.ndarray) -> dict[str, float]:
    """All measurements of one block's table by name."""
    share = utilisation(table)
    return {
        "entropy": routing_entropy(table),
        "nmi": normalised_mutual_information(table),
        "dead_experts": float(dead_experts(table)),
        "max_violation": max_violation(table),
        "effective_experts": float(np.exp(_entropy(share))),
        **{f"utilisation_{e}": float(value) for e, value in enumerate(share)},
    }


def _entropy(distribution: np.ndarray) -> float:
    positive = distribution[distribution > 0]
    return float(-(positive * np.log(positive)).sum())
