"""What the signals of any rank ask of all of them: to stop, or to save."""

from typing import NamedTuple

import torch

from moe_engine.host.signals import Requests
from moe_engine.parallel.collectives import max_
from moe_engine.parallel.mesh import Axis


class Asked(NamedTuple):
    """stop: save and end. save: save and go on."""

    stop: bool = False
    save: bool = False


def asked_of_any(requests: Requests, world: Axis) -> Asked:
    """The same on all ranks; collective. A request to save is met once."""
    stop, save = requests.stop, requests.save
    if save:
        requests.save = False
    mine = torch.tensor([stop, save], dtype=torch.int32)
    return Asked(*map(bool, max_(mine, world).tolist()))


def told_to_stop(requests: Requests, world: Axis) -> bool:
    """Whether any rank was; collective. A request to save stays."""
    return bool(max_(torch.tensor(int(requests.stop)), world))
