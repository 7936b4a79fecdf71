"""One training step against a peer, on this machine: `python tools/bench_step.py --peer transformers`

The same 4-layer Mixtral (512 wide, vocabulary 8,192, 4 x 512 tokens a step) is trained by the engine and by the peer,
each in a process of its own, step by step in turn: forward, backward, clipping, AdamW. transformers runs each of its
experts' implementations, and the fastest counts. In bf16 the engine steps fp32 master weights; transformers, as it
comes, has none. Printed are medians, the ratio to the peer, and the share of a matrix product's ceiling measured in the
same run.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_engine.host.console import run_program

SEQUENCES, LENGTH, LAYERS, VOCAB = 4, 512, 4, 8192
OURS, WARM_UP = "moe_engine", 2


class Shape(NamedTuple):
    """Experts of one layer."""

    experts: int
    width: int
    top_k: int


class Result(NamedTuple):
    """Median seconds of a step; `share` of the measured matrix-product ceiling."""

    name: str
    seconds: float
    tokens_per_s: float
    share: float
    ratio: float


PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
COARSE, FINE = Shape(8, 1792, 2), Shape(64, 256, 8)


def model_config(shape: Shape):
    """The benchmark's model as the engine's configuration."""
    from moe_engine.config import Model

    return Model(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=shape.width, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=LENGTH, num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k, router_aux_loss="hf_mixtral", router_aux_loss_coef=0.01,
    )  # fmt: skip


def our_step(shape: Shape, precision: Literal["fp32", "bf16"], device) -> Callable[[], Any]:
    """A step of the engine as launch/pretrain_moe.py runs it on one rank."""
    import torch

    from moe_engine.config import Optimizer, Run, Train
    from moe_engine.data.loader import plain_batch
    from moe_engine.model.transformer import Transformer
    from moe_engine.parallel.mesh import Mesh
    from moe_engine.parallel.weight import initialise
    from moe_engine.train.session import make_engine
    from moe_engine.train.step import accumulate, finish
    from moe_engine.train.terms import pretraining_terms

    run = Run(
        model=model_config(shape),
        optimizer=Optimizer(lr=1e-4),
        train=Train(seq_length=LENGTH, micro_batch=SEQUENCES, global_batch=SEQUENCES, precision=precision),
    )
    mesh = Mesh()
    with device:
        model = Transformer(run.model, mesh)
    initialise(model, 0)
    engine = make_engine(model, run, mesh)
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), device=device)
    positions = torch.arange(LENGTH, device=device).repeat(SEQUENCES, 1)
    batch = plain_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions)
    terms = pretraining_terms(run.model)
    return lambda: finish(engine, terms, mesh, [batch], accumulate(engine, terms, mesh, [batch]), 1e-4)


def transformers_step(shape: Shape, precision: str, device, experts: str) -> Callable[[], Any]:
    """The same step by transformers' Mixtral with one of its experts' implementations and torch's fused AdamW."""
    import torch
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=shape.width, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=LENGTH,
        num_local_experts=shape.experts, num_experts_per_tok=shape.top_k, output_router_logits=True,
        router_aux_loss_coef=0.01, use_cache=False,
    )  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = transformers.MixtralForCausalLM(config).to(device, dtype)
    model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH), device=device)

    def step() -> None:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())

    return step


class Contender:
    """A process that trains one of the models, a step whenever it is told to."""

    def __init__(self, name: str, shape: Shape, precision: str, threads: int):
        self.name = name
        self.pipe, there = multiprocessing.Pipe()
        arguments = (there, name, shape, precision, threads)
        self.process = multiprocessing.get_context("spawn").Process(target=contend, args=arguments, daemon=True)
        self.process.start()
        there.close()

    def ask(self, what: Literal["step", "ceiling"]) -> float:
        """Seconds of a step, or FLOP/s of a matrix product."""
        self.pipe.send(what)
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name} stopped; what it printed says why") from None

    def stop(self) -> None:
        self.pipe.send("stop")
        self.process.join()


def contend(pipe: Connection, name: str, shape: Shape, precision: Literal["fp32", "bf16"], threads: int) -> None:
    """What a contender's process does: build the model, then answer."""
    os.environ.update(LOCAL_RANK="0", OMP_NUM_THREADS=str(threads))

    import torch
    import torch.distributed as dist

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    from moe_engine.host.memory import keep_freed_memory
    from moe_engine.parallel.mesh import Mesh
    from moe_engine.train.peak import measured_ceiling

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if name == OURS:
        keep_freed_memory()
        step = our_step(shape, precision, device)
    else:
        step = transformers_step(shape, precision, device, name.split()[1])
    while (what := pipe.recv()) != "stop":
        if what == "ceiling":
            pipe.send(measured_ceiling(device, dtype, Mesh(), 0.5))
            continue
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)
    dist.destroy_process_group()


def bench(shape: Shape, precision: Literal["fp32", "bf16"], repeats: int, threads: int) -> list[Result]:
    """The engine's row, then the peer's implementations. In turn: a slow moment of the machine hits all of them."""
    from moe_engine.model.flops import step_flops_per_token

    implementations = ["eager"] * (shape.experts <= 16) + ["grouped_mm"]  # a loop over 64 experts is never the fastest
    names = [OURS, *(f"transformers {name}" for name in implementations)]
    contenders = [Contender(name, shape, precision, threads) for name in names]
    for _ in range(WARM_UP):
        for contender in contenders:
            contender.ask("step")
    ceiling = max(contenders[0].ask("ceiling") for _ in range(3))
    rounds = [[contender.ask("step") for contender in contenders] for _ in range(repeats)]
    for contender in contenders:
        contender.stop()
    seconds = dict(zip(names, map(statistics.median, zip(*rounds, strict=True)), strict=True))
    tokens = SEQUENCES * LENGTH
    flops = tokens * step_flops_per_token(model_config(shape), LENGTH)
    peer = min(value for name, value in seconds.items() if name != OURS)
    return [Result(name, s, tokens / s, flops / s / ceiling, peer / s) for name, s in seconds.items()]


def main() -> int:
    from moe_engine.config import short_dtype

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["transformers"], default="transformers")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    parser.add_argument("--precision", type=short_dtype, choices=["fp32", "bf16", "both"], default="both")
    parser.add_argument("--experts", choices=["8", "64", "both"], default="both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    rows = []
    for shape in [s for s in (COARSE, FINE) if options.experts in (str(s.experts), "both")]:
        for precision in PRECISIONS if options.precision == "both" else [options.precision]:
            print(f"\n{shape.experts} experts of {shape.width}, top-{shape.top_k}, {precision}", flush=True)
            for result in bench(shape, precision, options.repeats, options.threads):
                print(
                    f"  {result.name:24} {1e3 * result.seconds:8.0f} ms  {result.tokens_per_s:7.0f} tokens/s  "
                    f"{100 * result.share:5.1f} % of the ceiling  {result.ratio:5.2f}x the fastest peer",
                    flush=True,
                )
                rows.append({"experts": shape.experts, "precision": precision, **result._asdict()})
    if options.json:
        system = f"{platform.system()} {platform.machine()}"
        machine = {"platform": system, "torch": version("torch"), "threads": options.threads}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    run_program(main)
