"""Imports that forked ranks would otherwise pay one by one."""

import torch.distributed.tensor  # noqa: F401 (torch.testing and DeepSpeed load it on first use)
