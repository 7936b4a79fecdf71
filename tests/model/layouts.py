"""One model on several ranks and on one: the objective and every gradient are the same. Runs on every rank."""

import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.model.router_losses import balance_loss, z_loss
from moe_engine.model.transformer import Output, Transformer
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.parallel.weight import initialise, note_of

LENGTH = 12


def batch(vocab_size: int, sequences: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and labels; documents start at random places, and one window starts inside a document."""
    draw = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(vocab_size, (2, sequences, LENGTH), generator=draw)
    starts = (torch.rand(sequences, LENGTH, generator=draw) < 0.15).index_fill(1, torch.tensor([0]), True)
    place = torch.arange(LENGTH).expand(sequences, LENGTH)
    positions = place - torch.where(starts, place, 0).cummax(1).values
    positions[1] = place[1] + 40
    return tokens, positions, labels


def objective(model: Transformer, inputs: list[Tensor]) -> Tensor:
    """Sum of token losses plus the router losses, weighted by the tokens."""
    output = model(*inputs)
    return output.loss_T.sum() + output.loss_T.numel() * router_loss(model.config, output)


def router_loss(config: Model, output: Output) -> Tensor:
    """Balancing loss and z-loss with their coefficients."""
    balance = balance_loss(config.router_aux_loss, output.stats)
    return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss(output.stats)


def compare(config: Model, layout: tuple[int, int, int], recompute: str = "none", **options: bool) -> None:
    """On layout (dp, ep, tp), against the whole batch on one rank; `sequence` is the loss that no layout changes.

    A data rank has three sequences, so that tp cuts one of them in two or more."""
    mesh = build_mesh(*layout)
    whole, part = Transformer(config, Mesh()), Transformer(config, mesh, recompute, **options)
    initialise(whole, 0)
    initialise(part, 0)
    inputs = list(batch(config.vocab_size, 3 * mesh.data.size))
    truth = objective(whole, inputs)
    truth.backward()
    ours = objective(part, [x[mesh.data.cut(len(x))] for x in inputs])
    ours.backward()
    total = ours.detach().clone()
    torch.distributed.all_reduce(total)
    assert abs(float(total) / mesh.tp.size / float(truth.detach()) - 1) < 1e-5
    named = dict(whole.named_parameters())
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, name
        axis = mesh.dp if note_of(parameter).expert else mesh.data
        if axis.size > 1:
            torch.distributed.all_reduce(parameter.grad, group=axis.group)
        wanted = named[name].grad
        assert wanted is not None and float(wanted.norm()) > 0, name
        wanted = wanted[note_of(parameter).local_slices()]
        assert float((parameter.grad - wanted).norm() / wanted.norm()) < 1e-5, name
