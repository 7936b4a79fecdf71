"""The rank grid, against DeepSpeed's own lists and the published examples."""

import pytest
import torch.distributed as dist

from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Axis, build_mesh, rank_lists

LAYOUTS = [(d, e, t) for d in (1, 2, 4, 8) for e in (1, 2, 4, 8) for t in (1, 2, 4, 8) if d * e * t <= 8]


def test_goldens():
    assert rank_lists(4, 2, 1)["ep"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rank_lists(4, 2, 1)["dp"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert rank_lists(4, 2, 1)["data"] == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert rank_lists(2, 4, 1)["ep"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rank_lists(2, 4, 1)["dp"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    with_tp = rank_lists(2, 2, 2)
    assert with_tp["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert sorted(with_tp["ep"]) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert sorted(with_tp["dp"]) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert with_tp["data"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert rank_lists(1, 4, 1)["ep"] == [[0, 1, 2, 3]]
    assert rank_lists(1, 4, 1)["dp"] == [[0], [1], [2], [3]]


@pytest.mark.parametrize(("dp", "ep", "tp"), LAYOUTS)
def test_equals_deepspeed(dp: int, ep: int, tp: int):
    groups = pytest.importorskip("deepspeed.utils.groups")
    expert, expert_data = groups._get_expert_parallel_ranks(dp * ep * tp, tp, ep)
    ours = rank_lists(dp, ep, tp)
    assert sorted(ours["ep"]) == sorted(expert)
    assert sorted(ours["dp"]) == sorted(expert_data)


@pytest.mark.parametrize(("dp", "ep", "tp"), LAYOUTS)
def test_each_axis_holds_every_rank_once(dp: int, ep: int, tp: int):
    for name, size in {"dp": dp, "ep": ep, "tp": tp, "data": dp * ep, "world": dp * ep * tp}.items():
        groups = rank_lists(dp, ep, tp)[name]
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(dp * ep * tp))


def test_axis_cuts_evenly_or_not_at_all():
    assert [Axis("tp", 3, rank).cut(12) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(AssertionError, match="tp=3 does not divide 10"):
        Axis("tp", 3, 0).cut(10)


def test_one_rank_needs_no_group():
    mesh = build_mesh(1, 1, 1)
    assert {(a.size, a.rank, a.group) for a in (mesh.dp, mesh.ep, mesh.tp, mesh.data, mesh.world)} == {(1, 0, None)}
    with pytest.raises(ValueError, match=r"dp 2 x ep 2 x tp 1 = 4 ranks, but the world has 1"):
        build_mesh(2, 2, 1)


def grid_on_rank(rank: int) -> tuple[list[int], dict[str, list[int]]]:
    with pytest.raises(ValueError, match=r"= 8 ranks, but the world has 4"):
        build_mesh(2, 2, 2)
    mesh = build_mesh(1, 2, 2)
    members = {}
    for axis in (mesh.ep, mesh.tp, mesh.data, mesh.world):
        assert axis.group is not None and dist.get_rank(axis.group) == axis.rank
        members[axis.name] = dist.get_process_group_ranks(axis.group)
    assert mesh.dp.group is None
    return [mesh.dp.rank, mesh.ep.rank, mesh.tp.rank], members


def test_groups_on_real_ranks():
    results = run_on_ranks(grid_on_rank, 4)
    assert [place for place, _ in results] == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert [members["ep"] for _, members in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [members["tp"] for _, members in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(members["world"] == [0, 1, 2, 3] for _, members in results)
