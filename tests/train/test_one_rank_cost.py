"""What one data rank costs: no more memory than the same model in a plain torch loop."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMON = """
import resource, sys
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
VOCAB, D, F, LAYERS, HEADS, S = 8192, 512, 1408, 8, 8, 128
tokens = torch.randint(VOCAB, (2, S + 1))
bf16 = sys.argv[1] == "bf16"
"""
OURS = """
from moe_engine.config import Model, Run, Train
from moe_engine.data.loader import plain_batch
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import initialise
from moe_engine.train.session import make_engine
from moe_engine.train.step import accumulate, finish
from moe_engine.train.terms import pretraining_terms
model = Model(vocab_size=VOCAB, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
run = Run(model=model, train=Train(seq_length=S, micro_batch=2, global_batch=2, precision=sys.argv[1]))
transformer = Transformer(model, Mesh())
initialise(transformer, 0)
engine, terms = make_engine(transformer, run, Mesh()), pretraining_terms(model)
positions = torch.arange(S).repeat(2, 1)
batch = plain_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions)
step = lambda: finish(engine, terms, Mesh(), [batch], accumulate(engine, terms, Mesh(), [batch]), 1e-4)
"""
PLAIN = """
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=VOCAB, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
                     num_attention_heads=HEADS)
model = LlamaForCausalLM(config).to(torch.bfloat16 if bf16 else torch.float32)
masters = [p.detach().float().requires_grad_() if bf16 else p for p in model.parameters()]
optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
def step():
    model(tokens[:, :-1], labels=tokens[:, :-1]).loss.backward()
    for p, master in zip(model.parameters(), masters) if bf16 else ():
        master.grad, p.grad = p.grad.float(), None
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    for p, master in zip(model.parameters(), masters) if bf16 else ():
        p.data.copy_(master.data)
"""
MEASURE = """

for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(setup: str, precision: str) -> float:
    """GB of a process that trains four steps."""
    command = [sys.executable, "-c", COMMON + setup + MEASURE, precision]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1e6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_case_23_one_rank_takes_no_more_memory_than_a_plain_loop(precision: str) -> None:
    """It took 1.6 times as much: DeepSpeed's flat copies of weights, gradients and masters."""
    ours, plain = peak(OURS, precision), peak(PLAIN, precision)
    assert ours < 1.1 * plain, f"{ours:.2f} GB, a plain loop {plain:.2f} GB"
