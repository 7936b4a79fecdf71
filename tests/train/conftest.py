"""Imports that forked ranks would otherwise pay one by one: DeepSpeed's engine loads torch's compiler on first use."""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch._dynamo
import torch.distributed.tensor  # noqa: F401

import moe_engine.train.deepspeed_engine  # noqa: F401
