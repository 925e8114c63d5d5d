"""One training from its configuration to its recorded result."""

import json
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass

from nflab.cluster import trained
from nflab.cluster.waiting import told_of_waiting
from nflab.data import example_image
from nflab.learning.loop import train
from nflab.learning.validation import validate
from nflab.recording.notes import recipe_note
from nflab.recording.run_record import RunRecord
from nflab.running.mailbox import Listener, mailbox
from nflab.running.worker_group import Task, TrainingFailedError, first_error, fit
from nflab.settings.config import Config
from nflab.settings.outcomes import Outcome
from nflab.storage.checkpoints import Checkpoints
from nflab.studies.life_cycle import live_run
from nflab.studies.session import Session
from nflab.terminal.progress import TrainingProgress
from nflab.terminal.wording import say

POLL_SECONDS = 2.0
"""How often the reports of a training are fetched."""


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended."""

    outcome: Outcome
    metrics: dict[str, float]
    """Last value of each metric, as MLflow recorded it."""
    history: dict[str, list[float]]
    """`val_top1` and `test_top1` in the order in which they were recorded."""
    run_id: str
    error: str | None
    """Why it failed, with the traceback of the first worker that did."""
    logs: str
    """Where the log of each worker is."""


def run_training(
    config: Config, experiment: str, resume: bool = False, task: Task = train
) -> TrainingResult:
    """Trains a configuration on the cluster, as a run of the MLflow experiment.

    Args:
        resume: continue the run called `config.run.name` from its last checkpoint.
        task: what every worker does, instead of training.

    Raises:
        ConfigError: the configuration, the name, a store or the cluster cannot be used.
        Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
    """
    validate(config, trains=task is train)
    with live_run(config, experiment, "training", resume) as run:
        session, outbox, tracker, run_id = run.session, run.outbox, run.tracker, run.run_id
        config = run.config
        say(
            f"{experiment} {session.name}: {config.model.model} on {config.data.dataset}, "
            f"{session.placement}"
        )
        record = RunRecord(outbox, run_id, config, outbox.read(lambda: tracker.last_epoch(run_id)))
        run.outcome, run.finish = "failed", record.finish
        outbox.put("add_text", run_id, text=json.dumps(session.class_names), file="classes.json")
        for note in recipe_note(config):
            outbox.put("describe", run_id, text=note)
        try:
            run.outcome = _train(session, record, task)
        except TrainingFailedError as failure:
            first = first_error(failure)
            run.error = first.text if first else str(failure)
        if run.outcome == "finished":
            outbox.read(lambda: _keep_model(session, run_id, registered=task is train))
    return TrainingResult(
        run.outcome,
        tracker.metrics(run_id),
        {name: [v for _, v in tracker.history(run_id, name)] for name in ("val_top1", "test_top1")},
        run_id,
        run.error,
        f"{session.folder}/logs",
    )


def _train(session: Session[Config], record: RunRecord, task: Task) -> Outcome:
    """Trains on the cluster, writes down and shows what is reported, and returns the outcome.

    Raises:
        TrainingFailedError: a worker raised an error, or workers were lost too often.
    """
    config = session.config
    progress = TrainingProgress(config.schedule.epochs)
    mail = mailbox()
    # In a thread: Ctrl-C is for this one, which knows what to write down.
    pool = ThreadPoolExecutor(max_workers=1)
    training = pool.submit(
        fit,
        config,
        session.placement,
        session.folder,
        Listener(mail),
        task,
        session.tags["dataset_fingerprint"],
    )
    reached: Outcome = "failed"
    # Another task does not say that it goes on.
    goes_on = trained.training() if task is train else nullcontext()
    with goes_on, told_of_waiting(progress.say):
        ended: set[Future[None]] = set()
        while not ended:
            try:
                ended = wait([training], timeout=POLL_SECONDS).done
            finally:
                # After an end all that was reported is there.
                for metrics in mail.get_nowait_batch(mail.qsize()):
                    record.report(metrics)
                    progress.reported(metrics)
                    reached = metrics["outcome"]
    training.result()
    return reached


def _keep_model(session: Session[Config], run_id: str, registered: bool) -> None:
    """Stores the network of the last checkpoint, if there is one, as a model."""
    config, tracker = session.config, session.tracker
    with Checkpoints.of_run(session.folder).last() as last:
        if last.damaged is not None:
            say(f"{last.damaged}: no weights are stored")
            return
        if last.folder is None:
            return
        tracker.add_model(run_id, last.folder, example_image(config))
        if registered:
            tracker.register_model(
                run_id,
                config.data.dataset,
                session.tags["dataset_fingerprint"],
                f"{config.model.model}, run {session.name}",
            )
