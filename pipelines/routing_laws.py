"""What a router needs to know of the tasks, filled in; what cannot work, refused before anything is scheduled. No torch here.

Laws: specs/task_aware_gating.md 12. Those that need neither tasks nor backbone stand in ``lightning_modules.router_config``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_modules.building import ConfigError
from lightning_modules.config import AdapterMoEConfig, MixtureConfig, RouterConfig, TaskMoEConfig
from lightning_modules.data.kinds import STRUCTURED
from lightning_modules.data.tasks import TaskSpec, select
from lightning_modules.router_config import ENCODER_ONLY, READS_WHOLE_ROWS
from pipelines.architecture import Architecture

GIVEN_VECTORS = ("description", "centroid", "text_embedding", "random")
"""Task vectors that a task has without being trained on."""


@dataclass(frozen=True, slots=True)
class Routed:
    """A trial's experts and the tasks that they are to serve."""

    model: TaskMoEConfig | AdapterMoEConfig
    mixture: MixtureConfig
    """With task names for patterns."""
    specs: Mapping[str, TaskSpec]
    """Task name -> what the catalogue says, of every task of the mixture."""
    architecture: Architecture | None
    """None: not known before the backbone is downloaded."""
    posed: bool = False
    """Whether all tasks are answered as text."""
    precision: str = "fp32"
    """``train.precision``."""

    @property
    def router(self) -> RouterConfig:
        """The router's settings."""
        return self.model.router

    @property
    def fewest(self) -> int:
        """Experts of the routed block that has fewest."""
        numbers = self.model.num_experts
        return numbers if isinstance(numbers, int) else min(numbers)

    @property
    def trained(self) -> list[str]:
        """The tasks that are trained on, in order."""
        return [name for name in self.mixture.tasks if name not in self.mixture.held_out]


def resolve_router(routed: Routed) -> RouterConfig:
    """The router with ``experts_of``, ``descriptions`` and ``donors`` filled in, checked against tasks and backbone.

    Raises:
        ConfigError: the settings cannot work with them.
    """
    _check_blocks(routed)
    _check_losses(routed)
    router = replace(routed.router, experts_of=_experts_of(routed), descriptions=_descriptions(routed), donors=_donors(routed))
    _check_held_out(routed, router)
    return router


def _refuse(setting: str, law: str) -> ConfigError:
    return ConfigError(f"trial.model.{setting}", law)


# -- the backbone ----------------------------------------------------------------------------------------------------------


def _check_blocks(routed: Routed) -> None:
    architecture, model = routed.architecture, routed.model
    blocks = architecture.blocks(model.layers) if architecture else None
    if architecture is None or architecture.stacks is None or blocks is None:
        return
    if isinstance(model.num_experts, tuple) and len(model.num_experts) != len(blocks):
        law = f"must have one number for each of the {len(blocks)} routed blocks, got {list(model.num_experts)}"
        raise _refuse("num_experts", law)
    decoding = [block for block in blocks if architecture.decodes and block >= architecture.stacks[0].blocks]
    if decoding and routed.router.kind in ENCODER_ONLY:
        law = (
            f"cannot be {routed.router.kind} in decoder blocks, which do not see the input's tokens, got layers={list(blocks)}"
        )
        raise _refuse("router.kind", law)
    if decoding and routed.router.selection in READS_WHOLE_ROWS:
        law = f"cannot be {routed.router.selection} in decoder blocks, whose tokens must not depend on later ones, "
        raise _refuse("router.selection", f"{law}got layers={list(blocks)}")
    if decoding and routed.router.capacity is not None:
        law = "must be null in decoder blocks, whose tokens must not wait for room that later ones decide on, "
        raise _refuse("router.capacity", f"{law}got {routed.router.capacity} with layers={list(blocks)}")
    if isinstance(model, TaskMoEConfig) and model.expert == "ffn_split":
        for inner in {stack.inner for stack in map(architecture.stack_of, blocks)}:
            if inner is not None and inner % model.router.top_k:
                law = (
                    f"must divide the feed-forward layers' inner width {inner} with expert: ffn_split, got {model.router.top_k}"
                )
                raise _refuse("router.top_k", law)
    if isinstance(model, TaskMoEConfig) and model.dispatch == "grouped":
        multiple, parts = (8 if routed.precision == "bf16" else 4), (model.router.top_k if model.expert == "ffn_split" else 1)
        for stack in map(architecture.stack_of, blocks):
            for width in (stack.width, stack.inner and stack.inner // parts):
                if width is not None and width % multiple:
                    law = f"cannot be grouped in {routed.precision} unless widths are multiples of {multiple}, got {width}"
                    raise _refuse("dispatch", law)


# -- losses ------------------------------------------------------------------------------------------------------------------


def _check_losses(routed: Routed) -> None:
    router, mixture = routed.router, routed.mixture
    if router.balance == "bias" and mixture.tasks_per_step == 1:
        law = "cannot be bias with one task per step (mixture.tasks_per_step=1), which would push it off its experts"
        raise _refuse("router.balance", law)
    if router.consistency > 0 and not routed.posed:
        for name in mixture.tasks:
            if (kind := routed.specs[name].kind) in STRUCTURED:
                law = f"must be 0 with tasks of the kinds {', '.join(STRUCTURED)}: {name} is {kind}, got {router.consistency:g}"
                raise _refuse("router.consistency", law)


# -- tasks -------------------------------------------------------------------------------------------------------------------


def _experts_of(routed: Routed) -> dict[str, int]:
    """Task -> expert's number, of fixed and supervised routers; {} where each task has the expert of its own number."""
    router = routed.router
    if router.kind == "category":
        return _by_category(routed)
    if router.kind != "task_id" and router.supervision == 0:
        return {}
    own = {name: routed.specs[name] for name in routed.mixture.tasks}
    named: dict[str, int] = {}
    for pattern, number in router.experts_of.items():
        key = f"trial.model.router.experts_of.{pattern}"
        if number >= routed.fewest:
            raise ConfigError(key, f"must be below the number of experts ({routed.fewest}), got {number}")
        try:
            named |= dict.fromkeys(select(own, [pattern], key), number)
        except ConfigError:
            law = f"must match a task of the mixture, which has {_shown(routed.mixture.tasks)}, got {pattern!r}"
            raise ConfigError(key, law) from None
    for number, name in enumerate(routed.mixture.tasks):
        if name not in named and number >= routed.fewest:
            what = "kind: task_id" if router.kind == "task_id" else "supervision"
            law = f"must be at least {number + 1} with {what}, which gives task number {number} ({name}) an expert of its own "
            raise _refuse("num_experts", f"{law}unless router.experts_of names one, got {routed.fewest}")
    return {name: named[name] for name in routed.mixture.tasks if name in named}


def _by_category(routed: Routed) -> dict[str, int]:
    if routed.router.experts_of:
        law = f"must be empty with kind: category, whose experts follow the catalogue, got {dict(routed.router.experts_of)}"
        raise _refuse("router.experts_of", law)
    numbers: dict[str, int] = {}
    for name in routed.mixture.tasks:
        category = routed.specs[name].category
        if not category:
            raise _refuse("router.kind", f"cannot be category: the task {name} has none ({routed.specs[name].catalogue})")
        numbers.setdefault(category, len(numbers))
    if len(numbers) > routed.fewest:
        law = (
            f"must be at least the {len(numbers)} categories ({_shown(list(numbers))}) with kind: category, got {routed.fewest}"
        )
        raise _refuse("num_experts", law)
    return {name: numbers[routed.specs[name].category] for name in routed.mixture.tasks}


def _descriptions(routed: Routed) -> dict[str, str]:
    """Task -> description: the catalogue's, unless the router's settings have another."""
    router = routed.router
    if not (router.computed_vectors and router.task_vectors == "description"):
        return {}
    if foreign := [name for name in router.descriptions if name not in routed.mixture.tasks]:
        law = f"must name tasks of the mixture, which has {_shown(routed.mixture.tasks)}, got {_shown(foreign)}"
        raise _refuse("router.descriptions", law)
    found = {}
    for name in routed.mixture.tasks:
        found[name] = router.descriptions.get(name) or routed.specs[name].description
        if not found[name]:
            law = f"cannot be description: the task {name} has none ({routed.specs[name].catalogue})"
            raise _refuse("router.task_vectors", law)
    return found


def _donors(routed: Routed) -> dict[str, str]:
    """Held-out task -> the trained task whose row it gets: the first of its category, unless the settings name another."""
    router = routed.router
    if router.unseen != "nearest_category":
        return {}
    held_out, trained = routed.mixture.held_out, routed.trained
    for name, donor in router.donors.items():
        if name not in held_out or donor not in trained:
            law = f"must map held-out tasks ({_shown(held_out)}) to trained ones ({_shown(trained)}), got {name}: {donor}"
            raise _refuse("router.donors", law)
    donors = {}
    for name in routed.mixture.tasks:
        if name in held_out:
            same = [t for t in trained if routed.specs[t].category == routed.specs[name].category != ""]
            if name not in router.donors and not same:
                law = f"cannot be nearest_category: no trained task has the category of {name} "
                raise _refuse(
                    "router.unseen", f"{law}({routed.specs[name].category or 'it has none'}); name one in router.donors"
                )
            donors[name] = router.donors.get(name) or same[0]
    return donors


def _check_held_out(routed: Routed, router: RouterConfig) -> None:
    """Whether the router has a route for tasks that it never trains on."""
    held_out = routed.mixture.held_out
    if router.unseen != "none" and not held_out:
        law = f"applies where mixture.held_out names tasks, got {router.unseen!r} and none"
        raise _refuse("router.unseen", law)
    if not held_out or router.unseen != "none":
        return
    key = "trial.mixture.held_out"
    if router.kind in ("task_id", "category"):
        number = {name: router.experts_of.get(name, i) for i, name in enumerate(routed.mixture.tasks)}
        trained = {number[name] for name in routed.trained}
        for name in held_out:
            if number[name] not in trained:
                law = f"must share an expert with a trained task under kind: {router.kind}, got expert {number[name]}"
                raise ConfigError(key, f"{law} for {name} alone")
        return
    by_row = (router.kind == "task" and router.network == "logits") or router.conditioning == "per_task"
    if by_row or (router.reads_vectors and router.task_vectors not in GIVEN_VECTORS):
        law = f"must be empty with a learned router whose routes of {held_out[0]} would never train: set router.unseen"
        given = f"or task_vectors to one of {', '.join(GIVEN_VECTORS)}"
        raise ConfigError(key, f"{law}, {given}, got kind={router.kind!r}, unseen='none'")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
