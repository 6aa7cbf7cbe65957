"""One trial: train, score, write the result; resumes its own checkpoint. Runs without Ray (and is all that Ray runs).

``run_trial`` is the whole interface. Every worker of a gang calls it; rank 0 writes the files.
"""

import fcntl
import importlib.metadata
import logging
import math
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from lightning_modules.checkpoints import load_newest, save_checkpoint
from lightning_modules.config import TrialConfig
from lightning_modules.data.batches import Batch, StepBatches, chosen_rows
from lightning_modules.data.mixtures import OnlineMixing
from lightning_modules.data.prepared import TaskData, open_tasks
from lightning_modules.data.tasks import Split
from lightning_modules.files import atomic_file
from lightning_modules.gang import Gang, gather, make_trainer
from lightning_modules.measure.evaluation import Evaluation, evaluate
from lightning_modules.measure.routing import RoutingTally, churn, merge
from lightning_modules.multitask import MultiTaskModule
from lightning_modules.network.model import count_parameters
from lightning_modules.stages import check_optimiser, freeze, start_from, trainable_parts
from lightning_modules.task_vectors import task_vectors
from pipelines.store import TrialFolder, TrialResult

Report = Callable[[Mapping[str, Any]], None]
"""Called by rank 0 with ``{"step": int, "loss": float}`` whenever the trial has logged."""

GANG_TIMEOUT = timedelta(minutes=30)
"""How long workers of a gang wait for each other, rank 0's wait for a trial that another process trains included."""

EVALUATED: tuple[Split, ...] = ("dev", "test")
"""Splits that a finished trial is scored on."""

PACKAGES = ("torch", "lightning", "transformers", "numpy")


class DivergedError(RuntimeError):
    """The training loss is no longer a finite number."""


def run_trial(
    config: TrialConfig,
    folder: TrialFolder,
    prepared: Path,
    *,
    gang: Gang | None = None,
    report: Report = lambda event: None,
    threads: int = 1,
    gpu: bool = False,
    provenance: Mapping[str, str] | None = None,
) -> TrialResult | None:
    """Train ``config`` from its last checkpoint, or from the start, and write its result.

    Args:
        config: the trial; its data must have been prepared (``lightning_modules.data.batches.prepare``).
        folder: where its files are. A finished trial is returned as it is.
        prepared: folder of the prepared data.
        gang: this worker's place; None for the only worker.
        report: called by rank 0 at every logging step.
        threads: CPU threads of this worker. Other numbers of threads sum in another order, so they give other last bits.
        gpu: train on the first visible GPU instead of the CPU.
        provenance: ``sweep`` and ``git_sha`` for the result.

    Returns:
        The result on rank 0, None on the other ranks.

    Raises:
        DivergedError: the loss became infinite or NaN.
    """
    gang = gang or Gang()
    torch.set_num_threads(threads)
    _quiet_lightning()
    with _only_trainer(folder, gang), _process_group(gang, gpu):
        finished = folder.result()  # only now: rank 0 may have waited for another process to finish it
        if gather(finished is not None)[0]:
            return finished if gang.rank == 0 else None
        return _Trial(config, folder, prepared, gang, report, threads, gpu, provenance or {}).run()


def _quiet_lightning() -> None:
    """Leave the trial's log to what matters: no tips, no hints about things that are as they are on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.. is deprecated.*")


@contextmanager
def _only_trainer(folder: TrialFolder, gang: Gang) -> Iterator[None]:
    """Hold the trial's lock while rank 0 trains, and wait for it if another process on this machine has it: another sweep that
    needs the same trial, or a worker that has outlived its killed driver, must not write beside us."""
    if gang.rank != 0:
        yield
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder.trial_id} is being trained by another process; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _process_group(gang: Gang, gpu: bool) -> Iterator[None]:
    if gang.world_size == 1:
        yield
        return
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"tcp://{gang.address}:{gang.port}",
        rank=gang.rank,
        world_size=gang.world_size,
        timeout=GANG_TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _check_finite(name: str, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"{name} is {loss} at step {step}; a smaller train.lr or train.clip may help")


class _Steps(Dataset[list[Batch]]):
    """The steps from ``start`` on, each as the list of its forwards."""

    def __init__(self, batches: StepBatches, start: int, stop: int) -> None:
        self.batches, self.start, self.stop = batches, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> list[Batch]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.batches.batches(self.start + index)


class _Trial(lightning.Callback):
    """The life of one trial on one worker; as a callback it watches the training step by step."""

    def __init__(
        self,
        config: TrialConfig,
        folder: TrialFolder,
        prepared: Path,
        gang: Gang,
        report: Report,
        threads: int,
        gpu: bool,
        provenance: Mapping[str, str],
    ) -> None:
        self.config, self.folder, self.gang, self.report = config, folder, gang, report
        self.threads, self.gpu, self.provenance = threads, gpu, provenance
        self.tasks = open_tasks(config, prepared)
        self.batches = StepBatches(config, self.tasks, gang.rank, gang.world_size)
        vectors = task_vectors(config, self.tasks, prepared)
        self.module = MultiTaskModule(config, self.tasks, self.batches, gang, vectors)
        freeze(self.module.network, config.train.freeze)
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        self.resume: dict[str, Any] = {"count": 0, "exact": True, "differences": []}
        self.mixing: OnlineMixing | None = None
        if config.mixture.sampling == "adaptive":
            self.mixing = OnlineMixing(len(self.batches.trained), config.mixture.adapt_every or 1)
        self.started_ms = int(time.time() * 1000)
        self.seconds_before = 0.0
        self.state: dict[str, Any] | None = None

    # -- the whole life ------------------------------------------------------------------------------------------------

    def run(self) -> TrialResult | None:
        """Load, train, score, write."""
        self.state = self._newest_checkpoint()
        start = 0
        if self.state is not None:
            start = self._continue_from(self.state)
        elif self.config.start.load:
            earlier = TrialFolder(self.folder.path.parents[1], self.config.start.trial)
            start_from(self.module.network, self.config, earlier.read_config(), earlier.checkpoints)
        self.clock = self.log_clock = time.perf_counter()
        self.log_step = start
        if self.gang.rank == 0:
            self.folder.rewind(start)
            self.folder.write_status(state="running", step=start, error=None, host=socket.gethostname())
        if start < self.config.train.steps:
            self._fit(start)
        else:
            assert self.state is not None
            self.module.network.load_state_dict(self.state["network"])
        self.state = None
        return self._finish()

    def _fit(self, start: int) -> None:
        loader = DataLoader(_Steps(self.batches, start, self.config.train.steps), batch_size=None, collate_fn=lambda step: step)
        trainer = make_trainer(self.gang, self.gpu, self.config.train.precision, [self])
        trainer.fit(self.module, loader)

    def _finish(self) -> TrialResult | None:
        module, config = self.module.to(self.device), self.config
        splits, measured = {}, {}
        for split in EVALUATED:
            tally = self._tally()
            splits[split] = self._evaluate(split, tally)
            measured[split] = self._measure_routing(tally, split, config.train.steps)
        # Earlier evaluations, which the last routes are compared with, were on dev.
        measurements = {key: value for key, value in measured["dev"].items() if key.endswith("/churn")} | measured["test"]
        if self.gang.rank != 0:
            return None
        result = TrialResult(
            trial_id=self.folder.trial_id,
            status="finished",
            scores={split: evaluation.scores for split, evaluation in splits.items()},
            undefined={f"{split}/{name}": why for split, e in splits.items() for name, why in e.undefined.items()},
            primary={task.name: task.metric for task in self.tasks},
            floors={split: {t.name: t.floor(split, chosen_rows(config, t, split)) for t in self.tasks} for split in EVALUATED},
            steps=config.train.steps,
            seconds=self._seconds(),
            started_ms=self.started_ms,
            finished_ms=int(time.time() * 1000),
            resume=self.resume,
            params=count_parameters(module.network, len(self.tasks))
            | {f"trainable/{part}": count for part, count in trainable_parts(module.network).items()},
            data={task.name: self._data_facts(number, task) for number, task in enumerate(self.tasks)},
            measurements=measurements,
            workers=self.gang.world_size,
            sweep=self.provenance.get("sweep", ""),
            host=socket.gethostname(),
            versions={name: importlib.metadata.version(name) for name in PACKAGES},
            git_sha=self.provenance.get("git_sha", ""),
        )
        self.folder.write_result(result)
        self.folder.write_status(state="finished", step=result.steps, checkpoint=result.steps)
        return result

    def _data_facts(self, number: int, task: TaskData) -> dict[str, int]:
        used = {"train": len(self.batches.rows[number]) if number in self.batches.trained else 0}
        for split in EVALUATED:
            used[split] = len(chosen_rows(self.config, task, split))
        return used | {what: task.count(what) for what in ("windowed", "cut_tokens", "cut_target_tokens")}

    def _evaluate(self, split: Split, tally: RoutingTally | None) -> Evaluation:
        routers = self.module.network.routers
        if routers is not None and self.config.mixture.held_out:
            trained = self.batches.trained
            routers.seed_unseen(trained, [task for task in range(len(self.tasks)) if task not in trained])
        return evaluate(self.module.network, self.config, self.tasks, split, self.gang, self.device, tally)

    def _tally(self) -> RoutingTally | None:
        """What an evaluation counts its routes in; None where there is nothing to count, or a route needs no input."""
        routers = self.module.network.routers
        return None if routers is None or routers.config.per_task else RoutingTally(len(self.tasks), routers.experts)

    def _measure_routing(self, tally: RoutingTally | None, split: Split, step: int) -> dict[str, float]:
        """The routing measurements on rank 0, {} elsewhere; the arrays go to ``measurements/routing``."""
        routers = self.module.network.routers
        if routers is None:
            return {}
        if tally is None:
            tally = RoutingTally(len(self.tasks), routers.experts)
            for record in routers.records_of_tasks():
                tally.add(record)
        else:
            tally = merge([part for part in gather(tally) if isinstance(part, RoutingTally)])
        if self.gang.rank != 0:
            return {}
        names = [task.name for task in self.tasks]
        arrays, values = tally.arrays(names), tally.measure(names)
        folder = self.folder.measurements / "routing"
        folder.mkdir(parents=True, exist_ok=True)
        earlier = [file for file in sorted(folder.glob(f"{split}_*.npz")) if file.stem < f"{split}_{step:09d}"]
        if earlier:
            with np.load(earlier[-1], allow_pickle=False) as before:
                values |= churn(before, arrays)
        with atomic_file(folder / f"{split}_{step:09d}.npz", "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        return values

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.clock

    # -- resuming ------------------------------------------------------------------------------------------------------

    def _newest_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint that rank 0 can read, on every rank."""
        state, refused = load_newest(self.folder.checkpoints, self.folder.trial_id)
        if self.gang.rank == 0 and refused:
            self.folder.write_status(passed_over=refused)
            print("\n".join(f"checkpoint passed over: {line}" for line in refused), flush=True)
        steps = gather(None if state is None else state["step"])
        if len(set(steps)) != 1:
            raise RuntimeError(f"the workers see different newest checkpoints (steps {steps}); is the storage shared?")
        return state

    def _continue_from(self, state: dict[str, Any]) -> int:
        if self.mixing is not None:
            self.mixing.load(state["mixing"])
            self.batches.schedule.load(state["segments"])
        before, now = state["audit"], self._audit(state["step"])
        differences = [f"{key}: {before[key]} before, {now[key]} now" for key in now if before.get(key) != now[key]]
        earlier = state["resume"]
        self.resume = {
            "count": earlier["count"] + 1,
            "exact": earlier["exact"] and not differences,
            "differences": earlier["differences"] + differences,
        }
        self.started_ms, self.seconds_before = state["started_ms"], state["seconds"]
        return state["step"]

    def _audit(self, step: int) -> dict[str, Any]:
        """What must be the same when the trial goes on for its numbers to be the same to the bit."""
        return {
            "next_batch": self.batches.digest(step),
            "workers": self.gang.world_size,
            "threads": self.threads,
            "device": torch.cuda.get_device_name(0) if self.gpu else "cpu",
            "torch": str(torch.__version__),
        }

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the checkpoint back (Lightning has made the optimiser by now)."""
        frozen, others = self.config.train.freeze, list(self.module.weights.parameters())
        check_optimiser(self.module.network, trainer.optimizers[0], frozen, others)
        if self.state is None:
            return
        self.module.network.load_state_dict(self.state["network"])
        trainer.optimizers[0].load_state_dict(self.state["optimizer"])
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(self.state["scheduler"])
        self.module.weights.load_state_dict(self.state["weights"])
        for means, states in ((self.module.losses, self.state["losses"]), (self.module.segment, self.state["segment"])):
            if len(states) == self.gang.world_size:
                means.load(states[self.gang.rank])
            elif self.gang.rank == 0:
                means.load(torch.stack(states).sum(0))
        self.module.completed = self.state["step"]

    # -- step by step --------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, score and checkpoint when they are due."""
        step, train = self.module.completed, self.config.train
        if self.mixing is not None and step % (self.config.mixture.adapt_every or 1) == 0:
            self._adapt(step, self.mixing)
        if step % train.log_every == 0 or step == train.steps:
            self._log(step)
        if train.eval_every and step % train.eval_every == 0 and step < train.steps:
            self._log_scores(step)
        if step % train.checkpoint_every == 0 or step == train.steps:
            self._checkpoint(trainer, step)

    def _log(self, step: int) -> None:
        values, examples = self.module.losses.read(self.module.task_names)
        _check_finite("train/loss", values["train/loss"], step)
        if self.gang.rank != 0:
            return
        now = time.perf_counter()
        seconds, steps = now - self.log_clock, max(1, step - self.log_step)
        self.log_clock, self.log_step = now, step
        values |= {"time/step_s": seconds / steps, "time/examples_per_s": examples / seconds}
        self._append(step, values)
        self.report({"step": step, "loss": values["train/loss"]})

    def _adapt(self, step: int, mixing: OnlineMixing) -> None:
        """Set the shares of the next segment from the losses of the one that ends."""
        losses = self.module.segment.means()
        for name, loss in zip(self.module.task_names, losses, strict=True):
            _check_finite(f"train/loss/{name}", loss or 0.0, step)
        shares = mixing.observe([losses[task] for task in self.batches.trained])
        self.batches.schedule.extend(shares)
        if self.gang.rank == 0:
            names = [self.tasks[task].name for task in self.batches.trained]
            self._append(step, {f"mixture/share/{name}": share for name, share in zip(names, shares, strict=True)})

    def _log_scores(self, step: int) -> None:
        tally = self._tally()
        evaluation = self._evaluate("dev", tally)
        routes = self._measure_routing(tally, "dev", step)
        flat = {f"score/dev/{t}/{m}": v for t, scores in evaluation.scores.items() for m, v in scores.items() if v is not None}
        if self.gang.rank == 0:
            self._append(step, flat | routes)

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        self.folder.append([{"t": int(time.time() * 1000), "step": step, "values": dict(values)}])

    def _checkpoint(self, trainer: lightning.Trainer, step: int) -> None:
        losses, segment = gather(self.module.losses.state()), gather(self.module.segment.state())
        if self.gang.rank != 0:
            return
        state = {
            "network": self.module.network.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "losses": losses,
            "segment": segment,
            "weights": self.module.weights.state_dict(),
            "segments": self.batches.schedule.segments,
            "mixing": None if self.mixing is None else self.mixing.state(),
            "resume": self.resume,
            "seconds": self._seconds(),
            "started_ms": self.started_ms,
            "audit": self._audit(step),
        }
        save_checkpoint(self.folder.checkpoints, self.folder.trial_id, step, state)
        self.folder.write_status(state="running", step=step, checkpoint=step)
