"""Two torchrun agents on the loopback interface give the losses of one agent with as many ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moe_engine.log.rows import read_rows
from moe_engine.prepare.pipeline import PrepareOptions, prepare

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(agents: list[list[str]], script: list[str], out: Path) -> list[float]:
    """Runs all agents to their end; each must succeed."""
    processes = [start(*agent, "launch/pretrain_moe.py", *script, "--out", str(out)) for agent in agents]
    try:
        outputs = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    rows = read_rows(out / "metrics.jsonl")
    return [x for row in rows for x in (row["loss"], row["grad_norm"], row["aux_loss"])]


def compare(tmp_path: Path, ranks_each: int, layout: list[str], rendezvous: str) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i * i} of the text. " for i in range(4000)))
    prepare({"a": [tmp_path / "a.txt"]}, tmp_path / "tokens", None, PrepareOptions(eval_fraction=0.05), quiet=True)
    script = ["--steps", "4", "--seq-length", "16", "--micro-batch", "2", "--data", str(tmp_path / "tokens"), *layout]
    one = losses([["--nproc_per_node", str(2 * ranks_each)]], script, tmp_path / "one")
    port = free_port()
    both = ["--nnodes", "2", "--nproc_per_node", str(ranks_each)]
    if rendezvous == "c10d":
        meet = [
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            f"127.0.0.1:{port}",
            "--rdzv_id",
            "test",
            "--local_addr",
            "127.0.0.1",
        ]
        agents = [[*both, *meet]] * 2
    else:
        meet = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        agents = [[*both, "--node_rank", str(node), *meet] for node in (0, 1)]
    two = losses(agents, script, tmp_path / "two")
    assert len(one) == 12 and two == pytest.approx(one, rel=1e-6)


def test_two_agents_of_one_rank(tmp_path: Path):
    compare(tmp_path, 1, ["--ep", "2"], "static")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_agents_of_four_ranks(tmp_path: Path, rendezvous: str):
    compare(tmp_path, 4, ["--ep", "2", "--dp", "4"], rendezvous)
