"""The text of a run: its domains, opened for training and for evaluation, and its batches."""

from moe_engine.config import Run
from moe_engine.data.loader import Loader, OpenDomain, open_domains
from moe_engine.data.mixture import Epochs
from moe_engine.data.packing import PackedOrder


def open_corpus(run: Run) -> tuple[list[OpenDomain], list[OpenDomain]]:
    """Training and held-out domains of a run. Without evaluation nothing is held out to read."""
    named = [(domain.name, domain.path, domain.weight) for domain in run.data.domains]
    train = open_domains(named, "train", run.model.vocab_size)
    held_out = open_domains(named, "eval", run.model.vocab_size) if run.evaluates else []
    return train, [domain for domain in held_out if domain.dataset.tokens > 1]


def loader_of(run: Run, domains: list[OpenDomain], data_rank: int = 0) -> Loader:
    """The batches of one data rank of a run."""
    return Loader(
        domains,
        seed=run.train.seed,
        seq_length=run.train.seq_length,
        micro_batch=run.train.micro_batch,
        accumulation=run.train.accumulation,
        data_rank=data_rank,
        data_size=run.data_ranks,
        document_mask=run.data.document_mask,
        packing=run.data.packing,
        epochs=run.train.epochs > 0,
    )


def packing_lines(loader: Loader) -> list[str]:
    """How samples fill the sequences of a run, a line a domain."""
    lines = []
    for name, order in zip(loader.domains, loader.orders):
        if isinstance(order, PackedOrder):
            room = order.per_epoch * order.seq_length
            cut = f"; {order.cut:,} longer samples are cut" if order.cut else ""
            filled = f"{order.samples:,} samples in {order.per_epoch:,} sequences of {order.seq_length}"
            lines.append(f"packing     {name}: {filled}, {100 * (1 - order.inputs / room):.1f} % padding{cut}")
    return lines


def with_epochs(run: Run, loader: Loader) -> Run:
    """The run with the steps that its epochs take, and the usual warm-up unless one was given."""
    if not isinstance(loader.draws, Epochs):
        return run
    steps = loader.draws.steps(run.train.epochs, loader.global_batch)
    train, optimizer = run.train.model_copy(update={"steps": steps}), run.optimizer
    if "warmup_steps" not in optimizer.model_fields_set or optimizer.warmup_steps > steps:
        optimizer = optimizer.model_copy(update={"warmup_steps": min(steps, max(optimizer.warmup_steps, steps // 10))})
    return run.model_copy(update={"train": train, "optimizer": optimizer})
