"""The training loop.

    begin -> (batch -> step -> row -> evaluate -> save) until `steps`, a signal, or five skipped steps in a row

Every rank executes the same lines; the main rank alone writes logs.
"""

import time
from functools import partial

from moe_engine.errors import Preempted
from moe_engine.train.begin import begin
from moe_engine.train.evaluation import evaluate, held_out_batches
from moe_engine.train.metrics import Metrics, nested
from moe_engine.train.saving import Saving
from moe_engine.train.schedule import learning_rate
from moe_engine.train.session import Session
from moe_engine.train.signals import asked_of_any, told_to_stop
from moe_engine.train.skipped import MAX_SKIPPED, too_many_skipped
from moe_engine.train.step import accumulate, finish


def fit(session: Session) -> None:
    """Train to the last step, evaluating and saving on the way.

    EngineError after five skipped steps in a row; Preempted, when all is saved, after a signal to stop.
    """
    run, mesh, device, engine, terms, loader, held_out, saver, log, requests, heartbeat = session
    heartbeat(0, "looking for a checkpoint")
    start, tokens = begin(run, mesh, engine, loader, log, heartbeat)
    heartbeat(start, "starting")
    log.truncate_after(start)
    if start >= run.train.steps:
        log.info(f"nothing to train: the checkpoint is at step {start} of {run.train.steps}")
    if not run.evaluates:
        log.info("no evaluation: train.eval_every or train.eval_batches is 0")
    elif not held_out:
        log.warn("no held-out text: nothing is evaluated (prepare_data --eval-fraction sets some aside)")
    metrics, saving = Metrics(run, device, mesh), Saving(run, mesh, engine, loader, saver, log)
    if asked_of_any(requests, mesh.world).stop:
        raise Preempted("told to stop before the first step; nothing was to be saved")
    minimised = [term.name for term in terms if term.coefficient]
    skipped, first_began = 0, time.perf_counter()
    for step in range(start + 1, run.train.steps + 1):
        heartbeat(step, "training")
        began, last = time.perf_counter(), step == run.train.steps
        batches = [batch.to(device) for batch in loader.next_step()]
        lr = learning_rate(step - 1, run.train.steps, run.optimizer)
        for term in terms:
            term.at(step - 1)
        tally = accumulate(engine, terms, mesh, batches)
        report = finish(engine, terms, mesh, batches, tally, lr, run.model.expert_bias_update_rate)
        tokens += metrics.tokens
        log.step(metrics.row(step, report, lr, time.perf_counter() - began, tokens), minimised)
        skipped = skipped + 1 if report.skipped else 0
        if report.skipped:
            log.warn(f"step {step} skipped ({skipped} in a row), {report.skipped}")
        if skipped == MAX_SKIPPED:
            saver.finish()
            raise too_many_skipped(step, report.skipped)
        if held_out and (last or step % run.train.eval_every == 0):
            text = held_out_batches(run, mesh, held_out, device, partial(heartbeat, step, "evaluating"))
            names = [domain.name for domain in held_out]
            found = evaluate(engine, mesh, text, partial(told_to_stop, requests, mesh.world), names)
            if found is not None:
                log.eval({"step": step, **nested(found)})
        asked = asked_of_any(requests, mesh.world)
        heartbeat(step, "saving")
        saving.after_step(step, tokens, asked, last)
        if asked.stop and not last:
            raise Preempted(f"told to stop: step {step} is saved, --resume auto goes on from there")
    log.info(*(line for term in terms for line in term.report()))
    waited = saver.stalled / max(time.perf_counter() - first_began, 1e-9)
    log.info(f"training waited for checkpoints in {100 * waited:.1f} % of the time")
