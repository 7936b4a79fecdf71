"""The value that leaves the data package: one micro-batch of one data rank."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """tokens_BS, labels_BS, positions_BS, domain_B, all int64.

    labels_BS is already shifted (the token after tokens_BS), -100 where it is not counted. positions_BS restart at 0
    where a document starts, and attention does not cross such a place. domain_B numbers the domain of each sequence.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    domain_B: Tensor
