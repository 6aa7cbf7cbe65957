"""Ray Tune decides when and where trials run. The only file that imports ray.

Tune schedules actors; an actor is a slot that holds a preloaded server and runs each trial in a forked child
(:mod:`pipelines.workers`). A trial with several workers gets one bundle per worker in its own placement group: all or
nothing, so two gangs cannot starve each other. Tune's own directory is disposable: what is finished or can be resumed is
read from the trials' folders, and every launch builds a fresh Tuner (``Tuner.restore`` is never used, INTEGRATION 0.1).
"""

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Read by ray when it is imported.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our journal is the log; theirs loses rows on retry
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C must reach the command, which says how to go on
os.environ.setdefault("TUNE_RESULT_BUFFER_LENGTH", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # with verbose=0: the old output, which can be silent

import ray
from ray import tune
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lightning_modules.building import ConfigError
from pipelines.spec import ResourcesConfig
from pipelines.store import TrialFolder
from pipelines.workers import Event, Job, Worker, WorkerPool

QUIET_S = 2.0
"""An actor answers Tune at least this often while its trial trains."""

OBJECT_STORE_BYTES = 256 * 2**20
"""For a local Ray: nothing of ours goes through the object store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What one launch of a sweep needs besides its trials."""

    sweep: str
    storage: Path
    prepared: Path
    resources: ResourcesConfig
    retries: int
    address: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)


def run_trials(trial_ids: Sequence[str], launch: Launch) -> None:
    """Train the trials (their ``config.yaml`` is written already) and return when none is left. How each one ended stands
    in its folder.

    A trial that starts from another's weights (``start.trial``) waits until that one has finished; if it has not, the trial
    fails without having been attempted.

    Raises:
        ConfigError: the cluster cannot hold one trial.
    """
    earlier = {t: TrialFolder(launch.storage, t).read_config().start.trial for t in trial_ids}
    with _ray(launch):
        _check_cluster(launch.resources)
        for number, wave in enumerate(waves(earlier)):
            ready = [trial_id for trial_id in wave if _can_start(trial_id, earlier[trial_id], launch.storage)]
            if ready:
                _run_wave(ready, launch, number)


def waves(earlier: Mapping[str, str]) -> list[list[str]]:
    """Trial ids in waves, each after all those that its trials start from.

    Args:
        earlier: trial id -> id of the trial it starts from, "" for none; one that is no key has trained before.
    """

    def depth(trial_id: str) -> int:
        return 1 + depth(earlier[trial_id]) if earlier.get(trial_id) in earlier else 0

    found: dict[int, list[str]] = {}
    for trial_id in earlier:
        found.setdefault(depth(trial_id), []).append(trial_id)
    return [found[number] for number in sorted(found)]


def _can_start(trial_id: str, earlier: str, storage: Path) -> bool:
    """Whether what the trial starts from is there. If not, it has failed."""
    if not earlier or TrialFolder(storage, earlier).result() is not None:
        return True
    reason = TrialFolder(storage, earlier).status().get("error") or {}
    why = f": {reason['message'].splitlines()[0]}" if reason.get("message") else ""
    message = f"not attempted: the trial that it starts from, {earlier}, has no result{why}"
    error = {"type": "EarlierTrialFailed", "message": message, "traceback": ""}
    TrialFolder(storage, trial_id).write_status(state="failed", error=error)
    return False


def _run_wave(trial_ids: Sequence[str], launch: Launch, number: int) -> None:
    scratch = launch.storage / ".tune" / f"{launch.sweep}-{int(time.time() * 1000)}-{number}"
    try:
        grid = _tuner(trial_ids, launch, scratch).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    errors = {result.config["trial_id"]: result.error for result in grid if result.config and result.error}
    for trial_id in trial_ids:
        _tell_lost(TrialFolder(launch.storage, trial_id), errors.get(trial_id))


def _tell_lost(folder: TrialFolder, error: Exception | None) -> None:
    """A trial that neither finished nor said why it failed has lost its actor (killed, out of memory, node gone)."""
    if folder.result() is not None or folder.status().get("state") == "failed":
        return
    lines = str(error or "Ray gave no reason").strip().splitlines()
    told = {"type": type(error).__name__ if error else "Lost", "message": lines[-1], "traceback": "\n".join(lines[-40:])}
    folder.write_status(state="failed", error=told)


@contextlib.contextmanager
def _ray(launch: Launch) -> Iterator[None]:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if launch.address:
        ray.init(address=launch.address, **options)
    else:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **options)
    signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts in one of its own, which aborts the driver
    try:
        yield
    finally:
        ray.shutdown()


def _check_cluster(resources: ResourcesConfig) -> None:
    have = ray.cluster_resources()
    for key, need, name in (("cpus", resources.cpus, "CPU"), ("gpus", resources.gpus, "GPU")):
        total = need * resources.workers
        if total > have.get(name, 0):
            given = f"{key}={need:g} x workers={resources.workers}"
            raise ConfigError(
                f"resources.{key}", f"must be at most what the cluster has, got {given}, cluster has {have.get(name, 0):g}"
            )


def _tuner(trial_ids: Sequence[str], launch: Launch, scratch: Path) -> tune.Tuner:
    need = launch.resources
    bundle = {"CPU": float(need.cpus)} | ({"GPU": float(need.gpus)} if need.gpus else {})
    group = tune.PlacementGroupFactory([dict(bundle) for _ in range(need.workers)])
    limit = None if need.max_concurrent == "auto" else need.max_concurrent
    return tune.Tuner(
        tune.with_resources(TrialActor, group),
        param_space={"trial_id": tune.grid_search(list(trial_ids)), "launch": launch},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=limit,
            trial_name_creator=lambda trial: trial.config["trial_id"],
            trial_dirname_creator=lambda trial: trial.config["trial_id"],
        ),
        run_config=tune.RunConfig(
            name=launch.sweep,
            storage_path=str(scratch.absolute()),
            failure_config=tune.FailureConfig(max_failures=launch.retries),
            verbose=0,
        ),
    )


class TrialActor(tune.Trainable):
    """A slot: runs one trial after another, each as the gang of forked workers that its placement group holds."""

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing runs yet: the fork server starts with the first trial."""
        self.pool = WorkerPool()
        self.gang: _Gang | None = None
        self.others: list[Any] = []
        self.failures = 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Make ready for the next trial in the same actor."""
        self._end()
        self.failures = 0
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: a trial's folder holds its checkpoints. (Tune reuses an actor only if it has this method.)"""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: the trial finds its own checkpoint."""

    def step(self) -> dict[str, Any]:
        """Follow the trial for about :data:`QUIET_S` seconds, or to its end."""
        launch: Launch = self.config["launch"]
        folder = TrialFolder(launch.storage, self.config["trial_id"])
        if self.gang is None:
            self.gang = self._start(launch)
        deadline, last = time.monotonic() + QUIET_S, {"step": -1}
        while time.monotonic() < deadline:
            event = self.gang.next_event(max(0.0, deadline - time.monotonic()))
            if event is None:
                continue
            if event.kind == "report":
                last = {"step": event.values["step"]}
            elif event.kind == "done":
                self._end()
                return {**last, "ended": "finished", "done": True}
            elif self._give_up(event, folder, launch.retries):
                self._end()
                return {**last, "ended": "failed", "done": True}
            else:
                self._end()
                self.gang = self._start(launch)
        return {**last, "ended": ""}

    def _give_up(self, event: Event, folder: TrialFolder, retries: int) -> bool:
        self.failures += 1
        over = self.failures > retries or not event.values["retry"]
        error = {key: event.values[key] for key in ("type", "message", "traceback")}
        folder.write_status(
            state="failed" if over else "retrying", error=error, attempts=self.failures, host=socket.gethostname()
        )
        return over

    def _start(self, launch: Launch) -> "_Gang":
        need = launch.resources
        job = Job(
            storage=launch.storage,
            trial_id=self.config["trial_id"],
            prepared=launch.prepared,
            threads=max(1, int(need.cpus)),
            gpu=need.gpus > 0,
            world_size=need.workers,
            address=ray.util.get_node_ip_address() if need.workers > 1 else "127.0.0.1",
            port=_free_port() if need.workers > 1 else 0,
            provenance=launch.provenance,
        )
        if need.workers > 1 and not self.others:
            self.others = _other_workers(need)
        for rank, actor in enumerate(self.others, 1):
            ray.get(actor.start.remote(replace(job, rank=rank)))
        return _Gang(self.pool.start(job), self.others)

    def _end(self) -> None:
        if self.gang is not None:
            self.gang.stop()
            self.gang = None

    def cleanup(self) -> None:
        """Nothing of a trial survives its actor."""
        self._end()
        for actor in self.others:
            ray.kill(actor)


class _Gang:
    """The workers of one running trial: rank 0 here, the others in their own actors."""

    def __init__(self, leader: Worker, others: Sequence[Any]) -> None:
        self.leader, self.others = leader, others

    def next_event(self, timeout: float) -> Event | None:
        """What rank 0 says, or that any worker has failed: they all go together."""
        event = self.leader.next_event(timeout)
        if event is None or event.kind == "failed":
            failed = [e for e in ray.get([actor.failure.remote() for actor in self.others]) if e is not None]
            # Where a worker was killed, rank 0 only reports the connection that it lost.
            event = next((e for e in failed if e.values["type"] == "WorkerDied"), event or next(iter(failed), None))
        return event

    def stop(self) -> None:
        """Kill what still runs."""
        self.leader.stop()
        ray.get([actor.stop.remote() for actor in self.others])


def _other_workers(need: ResourcesConfig) -> list[Any]:
    group = ray.util.get_current_placement_group()
    assert isinstance(group, PlacementGroup)
    worker_class: Any = ray.remote(_WorkerActor)
    actors = [
        worker_class.options(
            num_cpus=need.cpus,
            num_gpus=need.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        for rank in range(1, need.workers)
    ]
    ray.get([actor.warm.remote() for actor in actors])
    return actors


class _WorkerActor:
    """Holds the fork server of one further worker of a gang, in its bundle of the trial's placement group."""

    def __init__(self) -> None:
        self._pool = WorkerPool()
        self._worker: Worker | None = None

    def warm(self) -> None:
        self._pool.warm()

    def start(self, job: Job) -> None:
        self._worker = self._pool.start(job)

    def failure(self) -> Event | None:
        event = self._worker.next_event(0.0) if self._worker else None
        return event if event is not None and event.kind == "failed" else None

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
