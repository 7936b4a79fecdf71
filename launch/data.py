"""The data of a run that names no prepared folder: samples, or the standard library's own sources."""

from pathlib import Path

from launch.run import Launched
from moe_engine.config import Domain, Run


def with_data(here: Launched) -> Run:
    """The run with its domains, which rank 0 prepares under OUT/data if it names none; collective."""
    from moe_engine.parallel.agree import act_together
    from moe_engine.prepare.default import NAME

    run, lines = here.run, list[str]()
    if run.data.domains:
        return run
    folder = Path(run.train.out) / "data"
    act_together(lambda: lines.extend(_prepare(folder, run)), here.mesh.world, everywhere=False)
    here.log.info(*lines)
    domains = (Domain(name="samples" if run.samples.given else NAME, path=str(folder)),)
    return run.model_copy(update={"data": run.data.model_copy(update={"domains": domains})})


def _prepare(folder: Path, run: Run) -> list[str]:
    """Write the folder; what is to be said of it."""
    from moe_engine.plan.tokenizers import tokenizer_of
    from moe_engine.prepare.default import prepare_default_corpus
    from moe_engine.prepare.run_samples import mixture_lines, prepare_run_samples

    if run.samples.given:
        return mixture_lines(prepare_run_samples(folder, run, tokenizer_of(run)))
    prepare_default_corpus(folder, run)
    return []
