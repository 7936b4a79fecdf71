"""The engine of a run: forward, backward, step, and the optimizer states that this rank owns.

On one data rank there is nothing to share, whatever the ZeRO stage (tp cuts the model itself), and this is all:

    fp32    AdamW steps the weights
    bf16    AdamW steps fp32 masters; a micro-batch's gradient is added to the master's, in fp32, and freed as soon as
            backward has it; after the step the weights are the rounded masters

More data ranks share the work by DeepSpeed: deepspeed_engine.py. `session.make_engine` chooses.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch._dynamo  # AdamW loads it; imported here, forked ranks inherit it
from torch import Tensor, nn

from moe_engine.config import Optimizer, Run
from moe_engine.labels import beside_the_model
from moe_engine.model.moe import MoE
from moe_engine.parallel.collectives import sum_
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import WeightNote, note_of


class StepOutcome(NamedTuple):
    """grad_norm: global, before clipping; nan when it was not finite and the step was skipped, on all ranks alike."""

    grad_norm: float
    skipped: bool


class OwnedSlice(NamedTuple):
    """This rank's part of one parameter's state: elements [start, start + numel) of the flattened local weight."""

    name: str
    start: int
    master: Tensor
    moments: dict[str, Tensor]
    first_copy: bool  # no rank before this one holds the same values


class Engine:
    """A model whose weights, gradients and optimizer states are whole on this rank; `masters` are what AdamW steps.

    forward: the model's. whole: every weight is whole between two passes too.
    """

    def __init__(self, model: nn.Module, run: Run, mesh: Mesh):
        self.model: Any = model
        self.forward: Callable[..., Any] = model
        self.mesh, self.stage, self.clip, self.whole = mesh, run.parallel.zero, run.optimizer.clip_grad, True
        self.names = {p: name for name, p in model.named_parameters()}
        self.routers = [module.router for module in model.modules() if isinstance(module, MoE)]
        self.by_expert = mesh.ep.size > 1
        self.device = next(iter(self.names)).device
        self.masters: dict[nn.Parameter, Tensor] = {p: p for p in self.names}
        self.optimizer: Any

    def train(self) -> None:
        """Training mode: dropout-like noise (router jitter) on."""
        self.model.train()

    def eval(self) -> None:
        """Evaluation mode: no noise."""
        self.model.eval()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of this rank's part of the global mean loss; `last` marks the step's last micro-batch."""
        loss.backward()

    def step(self, lr: float) -> StepOutcome:
        """Clip by the global norm and step at `lr`; skipped on all ranks alike when the norm is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            return StepOutcome(math.nan, True)
        if self.clip and norm > self.clip:
            gradients = [master.grad for master in self.masters.values() if master.grad is not None]
            torch._foreach_mul_(gradients, self.clip / (norm + 1e-6))
        self._advance()
        return StepOutcome(norm, False)

    def _advance(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights_from_masters()

    def _gradient_norm(self) -> float:
        """Of the whole model: one sum of squares over each distinct element."""
        squares = {axis: torch.zeros((), dtype=torch.float64, device=self.device) for axis in ("", "tp", "ep", "ep tp")}
        for parameter, master in self.masters.items():
            note, grad = note_of(parameter), master.grad
            if grad is not None:
                cut = " ".join(a for a, is_cut in (("ep", note.expert), ("tp", note.tensor_parallel)) if is_cut)
                # by rows: over a whole embedding the norm of torch on CPU, a running sum in fp32, is wrong by percents
                rows = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32)
                squares[cut] += rows.double().square().sum()
        for cut in squares:
            for axis in cut.split():
                sum_(squares[cut], self.mesh.ep if axis == "ep" else self.mesh.tp)
        return float(sum(squares.values()) ** 0.5)  # pyright: ignore[reportArgumentType]

    def gradients(self) -> dict[str, Tensor]:
        """The complete gradient of every local weight, fp32, after the last backward and before `step`; collective."""
        return {self.names[p]: m.grad.float() for p, m in self.masters.items() if m.grad is not None}

    def owned(self) -> Iterator[OwnedSlice]:
        """The fp32 master values and Adam moments that this rank owns, as writable views, parameter by parameter."""
        for parameter, master in self.masters.items():
            note = note_of(parameter)
            replicas = self.mesh.dp if note.expert and self.by_expert else self.mesh.data
            first_copy = replicas.rank == 0 and (note.tensor_parallel or self.mesh.tp.rank == 0)
            moments = {key: value.view(-1) for key, value in self.optimizer.state.get(master, {}).items()}
            yield OwnedSlice(self.names[parameter], 0, master.data.view(-1), moments, first_copy)

    def create_optimizer_states(self) -> None:
        """AdamW makes its moments on the first step; a checkpoint needs them before."""
        make_moments(self.optimizer, self.masters.values())

    def weights_from_masters(self) -> None:
        """After the masters were written: the weights that forward reads, on every rank."""
        for parameter, master in self.masters.items():
            if master is not parameter:
                parameter.data.copy_(master.data)

    def close(self) -> None:
        """Release hooks and buffers; the weights stay."""

    def adamw(self, run: Run) -> torch.optim.AdamW:
        """AdamW on the masters: matrices decay, vectors (norms) do not; experts are apart when ep > 1, and so is what
        learns at a rate of its own, `factor` times the run's."""
        kinds: dict[tuple[bool, bool, float], list[Tensor]] = {}
        for parameter, master in self.masters.items():
            note, factor = note_of(parameter), lr_factor(self.names[parameter], note_of(parameter), run.optimizer)
            kinds.setdefault((note.expert and self.by_expert, len(note.shape) > 1, factor), []).append(master)
        groups = []
        for (expert, decays, factor), masters in kinds.items():
            group = {"params": masters, "weight_decay": run.optimizer.weight_decay if decays else 0.0}
            group |= {"factor": factor}
            name = f"ep_size_{self.mesh.ep.size}" if expert else f"dense_{'matrices' if decays else 'vectors'}"
            groups.append(group | {"name": name} | ({"moe": True} if expert else {}))
        settings = run.optimizer
        return torch.optim.AdamW(
            groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
        )


def lr_factor(name: str, note: WeightNote, settings: Optimizer) -> float:
    """What the learning rate of a weight is multiplied by."""
    if name.endswith("router.weight") or beside_the_model(name):
        return settings.router_lr_factor
    return settings.expert_lr_factor if note.expert else 1.0


class OneRank(Engine):
    """The engine of a single data rank."""

    def __init__(self, model: nn.Module, run: Run, mesh: Mesh):
        super().__init__(model, run, mesh)
        if run.train.precision == "bf16":
            for parameter in self.names:
                parameter.data = parameter.data.bfloat16()
                self.masters[parameter] = parameter.detach().float()
                parameter.register_post_accumulate_grad_hook(self._to_master)
        self.optimizer = self.adamw(run)

    def _to_master(self, parameter: nn.Parameter) -> None:
        master, grad, parameter.grad = self.masters[parameter], parameter.grad, None
        assert grad is not None
        master.grad = grad.float() if master.grad is None else master.grad.add_(grad)


def make_moments(optimizer: torch.optim.Optimizer, masters: Any) -> None:
    """AdamW's state before its first step, for each of its `masters`."""
    for master in masters:
        optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
