"""ZeRO by DeepSpeed: the only file that imports it.

DeepSpeed averages gradients over the data ranks and steps AdamW on the part of the states that this rank owns:

    dense weights    gradients and states cut over data = dp x ep ranks
    expert weights   cut over the dp ranks that hold the same experts; their sum is divided by dp * ep as well, because
                     an expert's gradient already holds the tokens of its whole ep group (spec: never by dp alone)

stage 0 replicates everything, 1 cuts the optimizer states, 2 the gradients too, 3 the weights too (ep 1 only: experts
are then ordinary weights). Losses arrive already divided by the global token count, so `backward` undoes the average.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # initialize loads it; imported here, forked ranks inherit it
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups, safe_get_full_grad
from torch import Tensor, nn

from moe_engine.config import Run
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import note_of
from moe_engine.train.engine import Engine, OwnedSlice, StepOutcome, make_moments


class DeepSpeedEngine(Engine):
    """A model under DeepSpeed. At stage 0 all is whole, and DeepSpeed but sums the gradients."""

    def __init__(self, model: nn.Module, run: Run, mesh: Mesh):
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # of a skipped step the loop says more
        warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)  # names that it still calls
        super().__init__(model, run, mesh)
        self.whole = self.stage < 3
        mpu = _tell_deepspeed_the_layout(mesh)
        for parameter in self.names:
            self._mark(parameter)
        experts = max(run.model.num_local_experts, run.model.num_attention_experts)
        carrier = _Carrier(model, experts if self.by_expert else 0)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory figures
            self.engine: Any = deepspeed.initialize(
                model=carrier,
                optimizer=self.adamw(run),  # pyright: ignore[reportArgumentType]
                config=_deepspeed_config(run, mesh),
                mpu=mpu,
                dist_init_required=False,
            )[0]
        self.forward, self.optimizer = self.engine, self.engine.optimizer
        # the object that keeps flat fp32 partitions; stage 0, which is fp32, steps the weights themselves
        self.flat: Any = None if self.stage == 0 else self.optimizer
        for router in self.routers:  # DeepSpeed cast every buffer to bf16; biases are fp32, and zero at this point
            if router.expert_bias is not None:
                router.expert_bias = router.expert_bias.float()

    def backward(self, loss: Tensor, last: bool) -> None:
        """As in Engine; the factor undoes DeepSpeed's average over the data ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.mesh.data.size, scale_wrt_gas=False)

    def step(self, lr: float) -> StepOutcome:
        """As in Engine, but from stage 1 on DeepSpeed clips and decides what to skip."""
        if self.flat is None:
            return super().step(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        skipped = self.engine.skipped_steps > skipped_before
        return StepOutcome(math.nan if skipped else norm, skipped)

    def gradients(self) -> dict[str, Tensor]:
        """As in Engine, put together from the partitions of the data ranks."""
        if self.flat is None:
            return super().gradients()
        return {name: safe_get_full_grad(p) for p, name in self.names.items()}  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        self.engine.destroy()

    def owned(self) -> Iterator[OwnedSlice]:
        """As in Engine, from stage 1 on as views of DeepSpeed's flat fp32 partitions. One parameter may lie on several
        ranks, and a rank yields only those of which it has elements."""
        if self.flat is None:
            yield from super().owned()
            return
        for parameter, name in self.names.items():
            if (place := self._place(parameter)) is not None:
                flat, part, start = place
                states = self.flat.optimizer.state.get(flat, {})
                moments = {key: v.view(-1) if key == "step" else v[part] for key, v in states.items()}
                first_copy = note_of(parameter).tensor_parallel or self.mesh.tp.rank == 0
                yield OwnedSlice(name, start, flat.data[part], moments, first_copy)

    def _place(self, parameter: Any) -> tuple[Tensor, slice, int] | None:
        """Where this rank's fp32 part of a parameter lies: flat partition, part of it, number of its first element."""
        if self.stage == 3:
            group, offset, padded = self.flat.grad_position[self.flat.get_param_id(parameter)]
            start = self.mesh.data.rank * padded
            length = min(padded, parameter.ds_numel - start)
            return (self._flat_masters()[group], slice(offset, offset + length), start) if length > 0 else None
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        address = mapping.get_hp_fragment_address()
        flat = next(flat for flat in self._flat_masters() if _holds(flat, mapping.hp_fragment))
        return flat, slice(address.start, address.start + address.numel), mapping.lp_fragment_address.start

    def create_optimizer_states(self) -> None:
        """As in Engine, from stage 1 on for the flat partitions: DeepSpeed steps those, not the masters."""
        if self.flat is None:
            return super().create_optimizer_states()
        make_moments(self.flat.optimizer, self._flat_masters())

    def _flat_masters(self) -> list[Tensor]:
        """DeepSpeed's flat fp32 partitions of this rank; each of its optimizers calls them by another name."""
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
        return next(getattr(self.flat, name) for name in names if hasattr(self.flat, name))

    @torch.no_grad()
    def weights_from_masters(self) -> None:
        """As in Engine, from stage 1 on from the flat partitions; at stage 0 the weights are what AdamW steps."""
        if self.stage == 3:
            for low, master in zip(self.flat.fp16_partitioned_groups_flat, self._flat_masters(), strict=True):
                low.copy_(master)
        elif self.flat is not None:
            self.flat.update_lp_params()

    def _advance(self) -> None:
        self.engine.step()

    def _mark(self, parameter: nn.Parameter) -> None:
        """DeepSpeed's own attributes for expert and tensor-parallel parameters, from the weight's note."""
        note = note_of(parameter)
        if note.expert and self.by_expert:
            parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
            parameter.group_name = f"ep_size_{self.mesh.ep.size}"  # pyright: ignore[reportAttributeAccessIssue]
        if note.tensor_parallel and self.mesh.tp.size > 1:
            parameter.model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
            parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]


class _Carrier(nn.Module):
    """The model, beside a module that makes DeepSpeed see that there are experts."""

    def __init__(self, model: nn.Module, num_experts: int):
        super().__init__()
        self.model = model
        self.forward = model.__call__
        if num_experts:
            self.experts_marker = _ExpertsMarker(num_experts)


class _ExpertsMarker(DeepSpeedMoE):
    """DeepSpeed keeps expert groups apart only if it sees an instance of its own MoE layer; this one holds nothing."""

    def __init__(self, num_experts: int):
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already (`_tell_deepspeed_the_layout`)."""


class _ModelParallelUnit:
    """Megatron's `mpu` interface over our axes: how DeepSpeed learns of tensor parallelism."""

    def __init__(self, mesh: Mesh):
        self.tp, self.data = mesh.tp, mesh.data
        me = torch.distributed.get_rank()
        self.data_group = mesh.data.group or torch.distributed.new_group([me], use_local_synchronization=True)

    def get_model_parallel_group(self):
        return self.tp.group

    def get_model_parallel_rank(self) -> int:
        return self.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp.size

    def get_data_parallel_group(self):
        """The data axis, or a group of this rank alone where it has size 1: None would be the world to torch."""
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def _holds(flat: Tensor, part: Tensor) -> bool:
    """Whether `part` is a view into `flat`."""
    return 0 <= part.data_ptr() - flat.data_ptr() < flat.numel() * flat.element_size()


def _tell_deepspeed_the_layout(mesh: Mesh) -> _ModelParallelUnit | None:
    """DeepSpeed keeps its groups in a module of its own; they are set anew for every engine of this process."""
    # else a run on CPU first compiles an op that it does not need
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    mpu = _ModelParallelUnit(mesh) if mesh.tp.size > 1 else None
    groups.mpu = mpu
    if mesh.ep.size > 1:
        groups._create_expert_data_and_model_parallel(mesh.ep.size, mpu)
    return mpu


def _deepspeed_config(run: Run, mesh: Mesh) -> dict[str, Any]:
    parallel = run.parallel
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.train.micro_batch,
        "gradient_accumulation_steps": run.train.accumulation,
        "train_batch_size": run.train.micro_batch * run.train.accumulation * mesh.data.size,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "gradient_clipping": 0.0 if parallel.zero == 0 else run.optimizer.clip_grad,
        "zero_optimization": {
            "stage": parallel.zero,
            "overlap_comm": parallel.overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": parallel.reduce_bucket_size,
            "allgather_bucket_size": parallel.allgather_bucket_size,
        },
    }
    if parallel.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if run.train.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = (
            "fp32"  # gradients are summed over ranks in fp32, as they are over micro-batches
        )
    return config
