"""The open files that a rank needs: enough of them are allowed, or it is said at start how many there should be."""

import os
import resource
from pathlib import Path

import pytest
import torch

from moe_engine.config.command_line import load
from moe_engine.data.corpus import open_corpus
from moe_engine.errors import ConfigError
from moe_engine.host.files import allow_open_files
from moe_engine.parallel.collectives import sum_
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from moe_engine.plan.open_files import ALONE, group_files, read_files
from moe_engine.prepare.pipeline import PrepareOptions, prepare


def test_case_16_a_low_limit_is_raised_or_named() -> None:
    def on_rank(rank: int) -> tuple[list[int], str]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
        soft = []
        for needed in (90, 150):
            allow_open_files(needed, "why")
            soft.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        with pytest.raises(ConfigError) as caught:
            allow_open_files(201, "why")
        return soft, str(caught.value)

    ((soft, said),) = run_on_ranks(on_rank, 1)
    assert soft == [100, 200] and "found a limit of 200, expected 201 or more (why); raise ulimit -n" in said


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 2), (4, 1, 1)])
def test_groups_open_no_more_than_is_counted(layout: tuple[int, int, int]) -> None:
    dp, ep, tp = layout
    run = load(["--ep", str(ep), "--tp", str(tp), "--seq-length", "16"], dp * ep * tp).run

    def on_rank(rank: int) -> int:
        before = len(os.listdir("/proc/self/fd"))  # the group of all ranks is up: `run_on_ranks` made it
        mesh = build_mesh(dp, ep, tp)
        for axis in (mesh.dp, mesh.ep, mesh.tp, mesh.data, mesh.world):
            sum_(torch.ones(1), axis)
        return len(os.listdir("/proc/self/fd")) - before

    for opened in run_on_ranks(on_rank, dp * ep * tp):
        assert 0 < opened <= group_files(run)


def test_data_and_checkpoints_count(tmp_path: Path) -> None:
    """Each shard of the data stays mapped, so a corpus of many may need more than the usual 1024."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "some words and {i} others"}}\n' for i in range(100)))
    options = PrepareOptions(shard_tokens=100, eval_fraction=0.0)
    prepare({"a": [tmp_path / "a.jsonl"]}, tmp_path / "a", None, options, quiet=True)
    shards = len(list((tmp_path / "a").glob("*.bin")))
    newest = tmp_path / "out" / "checkpoints" / "step-00000003"
    newest.mkdir(parents=True)
    for rank in range(4):
        (newest / f"rank-{rank:05d}.safetensors").touch()
    out = ["--out", str(tmp_path / "out"), "--data", str(tmp_path / "a")]
    before = len(os.listdir("/proc/self/fd"))
    corpus = open_corpus(load(out, 1).run)
    assert len(os.listdir("/proc/self/fd")) - before == shards > 20 and corpus
    for resume, files in ((["--resume", "auto"], 4), (["--resume", str(newest)], 4), ([], 0)):
        assert read_files(load([*out, *resume], 1).run) == shards + files
    assert ALONE + read_files(load([], 1).run) == 26
