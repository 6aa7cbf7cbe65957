"""Selections give what their formulas say, start as the pretrained network, and never see padding or other rows."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_modules.building import ConfigError
from lightning_modules.network.routers.record import Routing, Units
from lightning_modules.network.routers.selection import choose, expert_choice, limit, slots
from lightning_modules.router_config import RouterConfig

UNITS, EXPERTS = 40, 8
TOP_1, TOP_2 = RouterConfig(kind="token"), RouterConfig(kind="token", top_k=2)
DRAWING = ("gumbel", "gumbel_st", "sampled", "skills")
SELECTIONS = [("top_k", score) for score in ("softmax", "sigmoid", "sqrt_softplus")]
SELECTIONS += [(selection, "softmax") for selection in ("soft", *DRAWING)]


def config_of(selection: str, **settings: object) -> RouterConfig:
    kind = {"sampled": "example", "skills": "task", "task": "task"}.get(selection, "token")
    return RouterConfig(kind=kind, selection=selection, **settings)  # type: ignore[arg-type]


def random_logits(units: int = UNITS, experts: int = EXPERTS, std: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(units, experts, generator=torch.Generator().manual_seed(seed)) * std


def random_uniform(units: int = UNITS, experts: int = EXPERTS, seed: int = 1) -> Tensor:
    return torch.rand(units, experts, generator=torch.Generator().manual_seed(seed))


def score(config: RouterConfig, logits: Tensor, **given: Tensor | None) -> Routing:
    return choose(config, logits, temperature=config.temperature, training=False, **given)


def train(config: RouterConfig, logits: Tensor, **given: Tensor | None) -> Routing:
    return choose(config, logits, temperature=config.temperature, training=True, **given)


def tokens(lengths: list[int], tasks: list[int] | None = None, width: int | None = None) -> Units:
    """Real tokens of rows of ``lengths``, row by row; ``tasks`` of the rows, in groups."""
    tasks, width = tasks or [0] * len(lengths), width or max(lengths)
    groups, start = [], 0
    for task, length in zip(tasks, lengths, strict=True):
        if groups and groups[-1][0] == task:
            groups[-1] = (task, groups[-1][1], start + length)
        else:
            groups.append((task, start, start + length))
        start += length
    sizes = torch.tensor(lengths)
    example = torch.arange(len(lengths)).repeat_interleave(sizes)
    index = torch.cat([torch.arange(length) + row * width for row, length in enumerate(lengths)])
    weight = (1 / len(lengths) / sizes).repeat_interleave(sizes)
    return Units("token", torch.tensor(tasks).repeat_interleave(sizes), example, weight, index, tuple(groups))


# -- the record's laws and the old rule --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("selection, score_of", SELECTIONS)
def test_a_routing_keeps_the_records_laws(selection: str, score_of: str, training: bool) -> None:
    config = config_of(selection, score=score_of, **({"top_k": 3} if selection == "top_k" else {}))
    routing = choose(config, random_logits().bfloat16(), temperature=0.7, training=training, uniform=random_uniform())
    for rows in (routing.weights, routing.probabilities, routing.logits):
        assert rows.shape == (UNITS, EXPERTS) and rows.dtype == torch.float32
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(UNITS))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(UNITS))
    runs = torch.zeros(UNITS, EXPERTS).scatter(-1, routing.chosen, 1.0)
    assert torch.equal(runs.bool(), routing.weights > 0)
    ranked = routing.probabilities.gather(-1, routing.chosen)
    assert (ranked.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_default_weights_are_the_straight_through_and_the_renormalised_to_the_bit(top_k: int) -> None:
    logits = random_logits().requires_grad_()
    probabilities = (logits / 0.7).softmax(-1)
    kept, chosen = probabilities.topk(top_k, dim=-1)
    kept = (kept - kept.detach()) + 1 if top_k == 1 else kept / kept.sum(-1, keepdim=True)
    expected = torch.zeros_like(probabilities).scatter(-1, chosen, kept)
    routing = choose(RouterConfig(top_k=top_k), logits, temperature=0.7, training=True)
    assert torch.equal(routing.weights, expected) and torch.equal(routing.chosen, chosen)
    assert torch.equal(routing.probabilities, probabilities)
    values = random_uniform()
    grads = [torch.autograd.grad((w * values).sum(), logits)[0] for w in (routing.weights, expected)]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_other_weightings_follow_their_formulas() -> None:
    logits = random_logits()
    p, chosen = logits.softmax(-1).topk(2)
    for weighting, expected in {
        "raw": p,
        "renormalise": p / p.sum(-1, keepdim=True),
        "straight_through": torch.full_like(p, 0.5),
        "scaled": EXPERTS * p / 2,
    }.items():
        routing = score(replace(TOP_2, weighting=weighting), logits)
        torch.testing.assert_close(routing.weights.gather(-1, chosen), expected)


def test_scores_that_do_not_compete_give_the_weights() -> None:
    logits = random_logits()
    for name, scores in {"sigmoid": logits.sigmoid(), "sqrt_softplus": logits.exp().log1p().sqrt()}.items():
        kept, chosen = scores.topk(2)
        for weighting, expected in {"raw": kept, "auto": kept / kept.sum(-1, keepdim=True)}.items():
            routing = score(replace(TOP_2, score=name, weighting=weighting), logits)
            torch.testing.assert_close(routing.weights.gather(-1, chosen), expected)
            torch.testing.assert_close(routing.probabilities, scores / scores.sum(-1, keepdim=True))


# -- the table of specs/task_aware_gating.md 2.3 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"weighting": "raw"}, 0.84),
        ({"weighting": "straight_through"}, 0.0),
        ({"weighting": "scaled"}, 0.28),
        ({"top_k": 2, "weighting": "raw"}, 0.70),
        ({"top_k": 2, "weighting": "renormalise"}, 0.0),
        ({"selection": "soft"}, 0.0),
        ({"selection": "gumbel"}, 0.0),
        ({"selection": "gumbel_st"}, 0.0),
    ],
    ids=str,
)
def test_equal_experts_start_as_the_dense_network(settings: dict, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 80, generator=generator)
    router = (torch.randn(80, EXPERTS, generator=generator) * 0.02).requires_grad_()
    dense = torch.randn(80, 80, generator=generator)
    copies = [dense.clone() for _ in range(EXPERTS)]
    config = RouterConfig(kind="token", **settings)
    routing = train(config, hidden @ router, uniform=random_uniform(512))
    outputs = torch.stack([hidden @ copy for copy in copies], dim=1)
    out = (routing.weights.unsqueeze(-1) * outputs).sum(1)
    assert ((out - hidden @ dense).norm() / (hidden @ dense).norm()).item() == pytest.approx(error, abs=0.04 if error else 1e-6)
    # Weights that sum to 1 whatever the router says have a gradient only where experts differ, as they do after one step.
    spread = torch.stack([hidden @ (copy + 0.1 * torch.randn(80, 80, generator=generator)) for copy in copies], dim=1)
    chosen = torch.zeros_like(routing.weights).scatter(-1, routing.chosen, 1.0)
    ((routing.weights * chosen).unsqueeze(-1) * spread).square().mean().backward()
    assert router.grad is not None and router.grad.norm() > 1e-4


def test_renormalised_top_1_is_refused_because_it_has_no_gradient() -> None:
    with pytest.raises(ConfigError, match="no gradient"):
        RouterConfig(kind="token", weighting="renormalise")


# -- temperature, dropout, bias ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["top_k", "soft"])
def test_an_infinite_temperature_averages_and_a_small_one_picks(selection: str) -> None:
    config = config_of(selection, **({"top_k": EXPERTS} if selection == "top_k" else {}))
    logits = random_logits()
    hot, cold = (choose(config, logits, temperature=t, training=False).weights for t in (1e9, 1e-4))
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / EXPERTS))
    torch.testing.assert_close(cold, torch.zeros_like(cold).scatter(-1, logits.argmax(-1, keepdim=True), 1.0))


@pytest.mark.parametrize("selection, score_of", SELECTIONS)
def test_dropped_experts_get_nothing_and_the_others_their_share(selection: str, score_of: str) -> None:
    drop = random_uniform(seed=2) < 0.5
    drop[0], drop[1] = True, False
    config = config_of(selection, score=score_of, **({"top_k": 3} if selection == "top_k" else {}))
    logits = random_logits().requires_grad_()
    routing, whole = (train(config, logits, uniform=random_uniform(), drop=d) for d in (drop, None))
    live = ~drop
    live[0] = True
    assert (routing.probabilities[~live] == 0).all() and (routing.weights[~live] == 0).all()
    kept = whole.probabilities * live
    torch.testing.assert_close(routing.probabilities, kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(UNITS))
    torch.testing.assert_close(routing.weights[:2], whole.weights[:2])
    if selection != "sampled":
        (routing.weights * random_uniform()).sum().backward()
        assert logits.grad is not None and logits.grad.isfinite().all() and (logits.grad[~live] == 0).all()


@pytest.mark.parametrize("weighting", ["raw", "renormalise", "straight_through", "scaled"])
@pytest.mark.parametrize("way", ["drop", "-inf"])
def test_where_fewer_than_k_are_left_the_others_weigh_nothing(weighting: str, way: str) -> None:
    logits, drop = random_logits(), torch.ones(UNITS, EXPERTS, dtype=torch.bool)
    drop[:, 3] = False
    given = {"drop": drop} if way == "drop" else {}
    logits = logits if given else logits.masked_fill(drop, -torch.inf)
    bias = torch.linspace(1, 0, EXPERTS)
    for routing in (score(replace(TOP_2, weighting=weighting), logits, bias=b, **given) for b in (None, bias)):
        assert (routing.chosen[:, 0] == 3).all() and (routing.chosen[:, 1] != 3).all()
        assert (routing.weights[:, 3] == {"scaled": EXPERTS / 2}.get(weighting, 1.0)).all()
        assert (routing.weights[drop] == 0).all()


def test_a_bias_moves_the_choice_and_nothing_else() -> None:
    logits, bias = random_logits(), torch.zeros(EXPERTS)
    bias[5] = 1.0
    free, pulled = (score(replace(TOP_2, weighting="raw", score="sigmoid"), logits, bias=b) for b in (None, bias))
    assert (pulled.chosen == 5).any(-1).all() and not (free.chosen == 5).any(-1).all()
    torch.testing.assert_close(pulled.probabilities, free.probabilities)
    torch.testing.assert_close(pulled.weights, torch.zeros(UNITS, EXPERTS).scatter(-1, pulled.chosen, 1.0) * logits.sigmoid())
    assert (pulled.probabilities.gather(-1, pulled.chosen).diff(dim=-1) <= 0).all()


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", DRAWING)
def test_scoring_does_not_draw_and_training_must(selection: str) -> None:
    config, logits = config_of(selection), random_logits()
    with_numbers, without = (score(config, logits, uniform=u) for u in (random_uniform(), None))
    assert torch.equal(with_numbers.weights, without.weights) and torch.equal(with_numbers.chosen, without.chosen)
    with pytest.raises(ValueError, match="uniform"):
        train(config, logits)


@pytest.mark.parametrize("selection", DRAWING)
def test_numbers_at_the_ends_stay_finite(selection: str) -> None:
    uniform = torch.zeros(UNITS, EXPERTS)
    uniform[:, ::2] = 1.0
    uniform[1::2] = 1.0 - uniform[1::2]
    logits = random_logits().requires_grad_()
    routing = train(config_of(selection), logits, uniform=uniform)
    (routing.weights.sum() + sum(term.sum() for term in routing.terms.values())).backward()
    assert routing.weights.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()


def test_gumbel_is_soft_when_scoring_and_keeps_its_probabilities_when_drawing() -> None:
    config, logits = replace(TOP_1, selection="gumbel", temperature=0.5), random_logits()
    soft = score(replace(TOP_1, selection="soft", temperature=0.5), logits)
    torch.testing.assert_close(score(config, logits).weights, soft.weights)
    drawn = train(config, logits, uniform=random_uniform())
    torch.testing.assert_close(drawn.probabilities, soft.probabilities)
    noise = -(-random_uniform().log()).log()
    torch.testing.assert_close(drawn.weights, ((logits + noise) / 0.5).softmax(-1))


@pytest.mark.parametrize("selection", ["gumbel", "gumbel_st", "sampled"])
def test_draws_follow_the_softmax(selection: str) -> None:
    row = torch.tensor([1.0, 0.0, -1.0, 2.0])
    logits, uniform = row.expand(40_000, -1), random_uniform(40_000, 4)
    # The law of the largest Gumbel-softmax weight does not depend on the temperature; that of the CDF does.
    temperature = 1.0 if selection == "sampled" else 0.3
    routing = choose(config_of(selection), logits, temperature=temperature, training=True, uniform=uniform)
    frequency = routing.weights.argmax(-1).bincount(minlength=4) / len(logits)
    torch.testing.assert_close(frequency, row.softmax(-1), atol=0.01, rtol=0)


def test_straight_through_draws_are_one_hot_with_the_soft_gradient() -> None:
    config, logits, uniform = replace(TOP_1, selection="gumbel_st", temperature=0.5), random_logits(), random_uniform()
    values, grads = random_uniform(seed=3), []
    for selection in ("gumbel_st", "gumbel"):
        leaf = logits.clone().requires_grad_()
        routing = train(replace(config, selection=selection), leaf, uniform=uniform)
        (routing.weights * values).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
        if selection == "gumbel_st":
            assert routing.chosen.shape == (UNITS, 1)
            assert torch.equal(routing.weights, torch.zeros(UNITS, EXPERTS).scatter(-1, routing.chosen, 1.0))
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0.1
    scored = score(config, logits)
    assert torch.equal(scored.chosen.squeeze(-1), logits.argmax(-1)) and torch.equal(scored.weights.amax(-1), torch.ones(UNITS))


def test_sampled_weighs_one_without_gradient_and_records_what_reinforce_needs() -> None:
    config, value = config_of("sampled"), torch.arange(float(UNITS))
    logits = random_logits().requires_grad_()
    drop = random_uniform(seed=4) < 0.4
    routing = train(config, logits, uniform=random_uniform(), value=value, drop=drop)
    assert not routing.weights.requires_grad and (routing.weights.sum(-1) == 1).all()
    assert (routing.probabilities.gather(-1, routing.chosen) > 0).all()
    expected = routing.probabilities.gather(-1, routing.chosen).log().squeeze(-1)
    torch.testing.assert_close(routing.terms["log_probability"], expected)
    assert routing.terms["value"] is value
    routing.terms["log_probability"].sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    assert torch.equal(score(config, logits).chosen.squeeze(-1), logits.argmax(-1))


def test_skills_are_relaxed_bernoulli_draws_each_of_its_own() -> None:
    config, logits, u = config_of("skills", temperature=0.5), random_logits(), random_uniform()
    drawn = torch.distributions.RelaxedBernoulli(torch.tensor(0.5), logits=logits)
    noise = u.log() - (1 - u).log()
    expected = ((logits + noise) / drawn.temperature).sigmoid()
    torch.testing.assert_close(train(config, logits, uniform=u).weights, expected / expected.sum(-1, keepdim=True))
    switched = logits.sigmoid()
    for routing in (score(config, logits), train(config, logits, uniform=u)):
        torch.testing.assert_close(routing.probabilities, switched / switched.sum(-1, keepdim=True))
    torch.testing.assert_close(score(config, logits).weights, switched / switched.sum(-1, keepdim=True))


# -- capacity ----------------------------------------------------------------------------------------------------------


def slow_limit(config: RouterConfig, routing: Routing, room: int) -> list[list[int]]:
    order = list(range(len(routing.chosen)))
    if config.priority == "confidence":
        order.sort(key=lambda unit: -routing.probabilities[unit].max().item())
    chosen, taken = routing.chosen.tolist(), [0] * routing.weights.shape[1]
    for choice in range(routing.chosen.shape[1]):
        for unit in order:
            expert = chosen[unit][choice]
            if taken[expert] >= room:
                chosen[unit][choice] = -1
            taken[expert] += 1
    return chosen


@pytest.mark.parametrize("priority", ["position", "confidence"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [0.3, 1.0, 1.25, 8.0])
def test_what_finds_no_room_is_dropped_and_counted(capacity: float, top_k: int, priority: str) -> None:
    config = RouterConfig(kind="token", top_k=top_k, capacity=capacity, priority=priority)
    units = tokens([9, 16, 6, 9], tasks=[0, 0, 1, 2])
    free = score(config, random_logits() + torch.linspace(2, 0, EXPERTS))
    routing = limit(config, free, units)
    room = math.ceil(capacity * top_k * UNITS / EXPERTS)
    assert routing.chosen.tolist() == slow_limit(config, free, room)
    assert routing.wanted is free.chosen and torch.equal(routing.probabilities, free.probabilities)
    kept = routing.chosen >= 0
    assert (routing.chosen[kept].bincount(minlength=EXPERTS) <= room).all()
    runs = torch.zeros(UNITS, EXPERTS + 1).scatter(-1, routing.chosen.masked_fill(~kept, EXPERTS), 1.0)[:, :EXPERTS]
    assert torch.equal(routing.weights, free.weights * runs)
    by_task = [int((~kept)[units.task == task].sum()) for task in range(3)]
    assert sum(by_task) == int((routing.chosen != routing.wanted).sum())
    assert (sum(by_task) == 0) == (capacity == 8.0)


def test_first_choices_come_before_second_ones_and_confidence_before_position() -> None:
    logits = torch.tensor([[1.0, 0.9, -9.0, -9.0], [0.9, 1.0, -9.0, -9.0], [9.0, -9.0, -9.0, 8.0], [9.5, -9.0, -9.0, 8.0]])
    units = tokens([4])
    two = RouterConfig(kind="token", top_k=2, capacity=0.5)
    assert limit(two, score(two, logits), units).chosen.tolist() == [[0, -1], [1, -1], [-1, 3], [-1, -1]]
    one = RouterConfig(kind="token", capacity=1.0)
    assert limit(one, score(one, logits), units).chosen.tolist() == [[0], [1], [-1], [-1]]
    sure = replace(one, priority="confidence")
    assert limit(sure, score(sure, logits), units).chosen.tolist() == [[-1], [1], [-1], [0]]


def test_without_a_capacity_nothing_is_dropped() -> None:
    routing = score(TOP_2, random_logits())
    assert limit(TOP_2, routing, tokens([UNITS])) is routing


def test_an_even_share_leaves_room_for_exactly_itself() -> None:
    logits = torch.eye(11).repeat(10, 1)
    config = RouterConfig(kind="token", capacity=1.0)
    assert (limit(config, score(config, logits), tokens([110])).chosen >= 0).all()
    taken = expert_choice(
        RouterConfig(kind="token", selection="expert_choice", capacity=1.1), logits[:110], tokens([110]), torch.tensor([110])
    )
    assert ((taken.weights > 0).sum(0) == 11).all()


# -- expert choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [None, 0.5, 2.0, 100.0])
@pytest.mark.parametrize("score_of", ["softmax", "sigmoid"])
def test_every_expert_takes_its_quota_of_every_row(capacity: float | None, score_of: str) -> None:
    lengths = [9, 16, 1, 6]
    config = RouterConfig(kind="token", selection="expert_choice", capacity=capacity, score=score_of)
    units, logits = tokens(lengths), random_logits(32, 4)
    routing = expert_choice(config, logits, units, torch.tensor(lengths))
    scores = logits.softmax(-1) if score_of == "softmax" else logits.sigmoid()
    taken = routing.weights > 0
    torch.testing.assert_close(routing.weights, scores * taken)
    for row, length in enumerate(lengths):
        own, quota = units.example == row, min(length, math.ceil((capacity or 1.0) * length / 4))
        best = scores[own].topk(quota, dim=0).indices
        assert torch.equal(taken[own], torch.zeros(length, 4).scatter(0, best, 1.0).bool())
    for chosen, row in zip(routing.chosen.tolist(), routing.probabilities * taken, strict=True):
        ranked = row.argsort(descending=True)[: int((row > 0).sum())].tolist()
        assert chosen == ranked + [-1] * (4 - len(ranked))


def test_a_task_takes_its_quota_from_all_of_its_rows() -> None:
    lengths, tasks = [9, 7, 4, 12, 8], [2, 2, 0, 1, 2]
    config = RouterConfig(kind="token", selection="task_expert_choice")
    units, logits = tokens(lengths, tasks), random_logits(40, 4)
    taken = expert_choice(config, logits, units, torch.tensor(lengths)).weights > 0
    for task in range(3):
        own = units.task == task
        quota = math.ceil(int(own.sum()) / 4)
        best = logits.softmax(-1)[own].topk(quota, dim=0).indices
        assert torch.equal(taken[own], torch.zeros(int(own.sum()), 4).scatter(0, best, 1.0).bool())


@pytest.mark.parametrize("selection", ["expert_choice", "task_expert_choice"])
def test_rows_do_not_depend_on_others_nor_tasks_on_other_tasks(selection: str) -> None:
    config = RouterConfig(kind="token", selection=selection)
    logits = random_logits(30, 4)
    whole = expert_choice(config, logits, tokens([8, 12, 10], [0, 1, 1]), torch.tensor([8, 12, 10]))
    alone = expert_choice(config, logits[:8], tokens([8]), torch.tensor([8]))
    assert torch.equal(whole.weights[:8], alone.weights) and torch.equal(whole.chosen[:8], alone.chosen)
    if selection == "expert_choice":
        of_row = expert_choice(config, logits[8:20], tokens([12]), torch.tensor([12]))
        assert torch.equal(whole.weights[8:20], of_row.weights)


def test_expert_choice_leaves_dropped_and_missing_experts_out() -> None:
    config = RouterConfig(kind="token", selection="expert_choice", capacity=4.0)
    logits, drop = random_logits(10, 4), torch.zeros(10, 4, dtype=torch.bool)
    drop[:, 1] = True
    for given, of in (({"drop": drop}, logits), ({}, logits.masked_fill(drop, -torch.inf))):
        routing = expert_choice(config, of, tokens([10]), torch.tensor([10]), **given)
        assert not (routing.chosen == 1).any() and (routing.weights[:, 1] == 0).all()
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(10))


def test_what_compares_units_is_not_chosen_unit_by_unit() -> None:
    with pytest.raises(ConfigError, match="selection"):
        score(RouterConfig(kind="token", selection="expert_choice"), random_logits())


# -- slots -------------------------------------------------------------------------------------------------------------


def soft_moe(lengths: list[int], width: int, per_expert: int = 2) -> tuple[Routing, Tensor]:
    """Routing and mask of rows with ``lengths`` real tokens among ``width`` positions; padding is garbage."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3 * per_expert, 16, generator=generator)
    rows = [torch.randn(length, 16, generator=generator) for length in lengths]
    hidden = torch.full((len(lengths), width, 16), 7.0)
    for row, states in zip(hidden, rows, strict=True):
        row[: len(states)] = states
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)
    config = RouterConfig(kind="token", selection="slots", slots=per_expert)
    units = tokens(lengths, width=width)
    return slots(config, hidden, mask, keys, torch.tensor(3.0), units), mask


def test_slots_are_means_of_a_rows_real_tokens_and_tokens_means_of_slots() -> None:
    routing, mask = soft_moe([5, 8, 1], 8)
    dispatch, combine = routing.terms["dispatch"], routing.terms["combine"]
    torch.testing.assert_close(dispatch.sum(1), torch.ones(3, 6))
    torch.testing.assert_close(combine.sum(-1), mask.float())
    assert (dispatch[~mask] == 0).all() and (combine[~mask] == 0).all()
    by_expert = combine.unflatten(-1, (3, 2)).sum(-1)[mask]
    torch.testing.assert_close(routing.weights, by_expert)
    torch.testing.assert_close(routing.logits.softmax(-1), by_expert)
    assert routing.weights.shape == routing.chosen.shape == (14, 3)


def test_slots_do_not_depend_on_padding_or_batch_mates() -> None:
    narrow, wide = soft_moe([5, 8, 1], 8)[0], soft_moe([5, 8, 1], 11)[0]
    torch.testing.assert_close(narrow.weights, wide.weights)
    torch.testing.assert_close(narrow.terms["dispatch"], wide.terms["dispatch"][:, :8])
    alone = soft_moe([5], 5)[0]
    torch.testing.assert_close(alone.terms["dispatch"][0], narrow.terms["dispatch"][0, :5])


def test_slots_stay_float32_under_autocast() -> None:
    plain = soft_moe([5, 8], 8)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = soft_moe([5, 8], 8)[0]
    assert torch.equal(cast.weights, plain.weights) and torch.equal(cast.terms["combine"], plain.terms["combine"])
