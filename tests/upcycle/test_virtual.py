"""Virtual groups: exact with the scale on w_down, whole groups chosen, and how far the cube root is off."""

import pytest
import torch

from moe_engine.config import Model
from moe_engine.errors import ConfigError
from moe_engine.model.moe import MoE
from moe_engine.parallel.mesh import Mesh
from moe_engine.upcycle import virtual
from moe_engine.upcycle.layer import Dense
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.receipt import receipt
from moe_engine.upcycle.routers import drawn
from tests.upcycle.small import DENSE, dense_model, expert, random_dense, relative, swiglu_ffn, tokens, upcycle

CASES = [(8, 2, 2), (8, 4, 4), (16, 8, 4), (12, 4, 2), (24, 8, 8), (4, 1, 1)]  # N, K, G


def rows(options: Options, kind: str = "normal"):
    return lambda layer: virtual.repeat_rows(drawn(kind, options.experts, DENSE.hidden_size, layer, 0), options)


@pytest.mark.parametrize(("experts", "top_k", "granularity"), CASES)
def test_exact_with_renormalised_weights(experts: int, top_k: int, granularity: int) -> None:
    parent, options = dense_model(), Options(experts=experts, top_k=top_k, granularity=granularity)
    child = upcycle(parent, "virtual", options, rows(options))
    assert child.config.moe_intermediate_size == 40 // granularity and child.config.routed_scaling_factor == 1
    found = receipt(parent, child, tokens(), virtual.preserves(options))
    assert found.max <= 2e-6 and found.holds and found.bound


@pytest.mark.parametrize(("experts", "top_k", "granularity"), CASES)
def test_exact_with_a_uniform_router_that_is_not_renormalised(experts: int, top_k: int, granularity: int) -> None:
    """s = X G^2 / K, X = N / G."""
    options = Options(experts=experts, top_k=top_k, granularity=granularity, norm_topk_prob=False)
    assert virtual.factor(options) == pytest.approx(experts / granularity * granularity**2 / top_k)
    parent = dense_model()
    assert receipt(parent, upcycle(parent, "virtual", options, rows(options, "zeros")), tokens()).max <= 2e-6
    assert virtual.preserves(options).bound is None


@pytest.mark.parametrize(("experts", "top_k", "granularity"), CASES)
def test_each_shard_is_chosen_k_over_g_times(experts: int, top_k: int, granularity: int) -> None:
    options = Options(experts=experts, top_k=top_k, granularity=granularity)
    config = DENSE.model_copy(update={"num_local_experts": experts, "num_experts_per_tok": top_k})
    router = MoE(config, Mesh()).router
    router.weight.data.copy_(rows(options, "random")(0))
    x_TD = torch.randn(301, DENSE.hidden_size, generator=torch.Generator().manual_seed(5))
    shard_TK = router(x_TD).index_TK.long() % granularity
    assert torch.equal(
        torch.nn.functional.one_hot(shard_TK, granularity).sum(dim=1).unique(), torch.tensor([top_k // granularity])
    )


def test_rows_are_the_first_ones_repeated() -> None:
    options = Options(experts=6, top_k=2, granularity=2)
    router_ND = torch.arange(12.0).view(6, 2)
    assert virtual.repeat_rows(router_ND, options)[:, 0].tolist() == [0, 0, 2, 2, 4, 4]
    with pytest.raises(ConfigError, match="2 rows, expected 3"):
        virtual.repeat_rows(router_ND[:2], options)


@pytest.mark.parametrize(("scale", "error"), [(2, 0.07), (4, 0.14), (8, 0.20)])
def test_the_cube_root_is_off_by_7_14_and_20_percent(scale: int, error: float) -> None:
    """Gates of unit variance, as after a norm: silu(s^(1/3) g) is not s^(1/3) silu(g)."""
    dense = random_dense(512, 256)
    dense = Dense(dense.gate_FD / 16, dense.up_FD / 16, dense.down_DF)
    x = torch.randn(500, 256, generator=torch.Generator().manual_seed(9))
    truth = scale * swiglu_ffn(x, dense)
    for compat in (False, True):
        options = Options(experts=8, top_k=8, granularity=scale, compat=compat)
        routed = virtual.build(0, dense, options)
        ours = sum(swiglu_ffn(x, expert(routed, n)) for n in range(scale))
        if compat:
            assert abs(relative(ours, truth) - error) < 0.01
        else:
            assert relative(ours, truth) < 1e-6
    assert virtual.preserves(Options(granularity=2, compat=True)).bound is None


def test_shards_in_order_and_impossible_values() -> None:
    dense = random_dense(12, 4)
    routed = virtual.build(0, dense, Options(experts=6, top_k=3, granularity=3))
    for n in range(6):
        shard = slice(n % 3 * 4, n % 3 * 4 + 4)
        assert torch.equal(routed.w_gate_up[n], torch.stack([dense.gate_FD[shard], dense.up_FD[shard]]))
        assert torch.equal(routed.w_down[n], 3 * dense.down_DF[:, shard])
    for values in (dict(experts=8, top_k=2, granularity=4), dict(experts=9, top_k=4, granularity=4)):
        with pytest.raises(ConfigError, match="granularity 4 must divide"):
            Options(**values)
    parent = Model.model_validate(DENSE.model_dump() | {"intermediate_size": 42})
    with pytest.raises(ConfigError, match=r"granularity 4 does not divide the 42 neurons .* valid are 1, 2, 3, 6"):
        virtual.child(parent, Options(experts=8, top_k=4, granularity=4))
