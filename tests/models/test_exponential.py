"""e^x, sigmoid and log-sum-exp agree with float64, whichever way they are computed."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.models import patches
from mlx_align.models.patches import exp, logsumexp, sigmoid

WAYS = pytest.mark.parametrize("by_power", [False, True], ids=["mlx's", "by power"])


@pytest.fixture
def way(by_power: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_by_power", lambda: by_power)


@WAYS
@pytest.mark.usefixtures("way")
def test_exp_is_within_its_stated_error(by_power: bool) -> None:
    x = np.concatenate([np.linspace(-85, 85, 20_001), np.linspace(-1, 1, 2_001)]).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    off = np.abs(np.array(exp(mx.array(x))) / want - 1)
    assert off.max() < 1e-5
    assert not by_power or (off <= 3e-8 * np.abs(x) + 1e-7).all()


@WAYS
@pytest.mark.usefixtures("way")
def test_infinities_and_nan() -> None:
    x = mx.array([-float("inf"), -200.0, 0.0, 200.0, float("inf"), float("nan")])
    np.testing.assert_array_equal(np.array(exp(x)), [0, 0, 1, np.inf, np.inf, np.nan])
    np.testing.assert_array_equal(np.array(sigmoid(x)), [0, 0, 0.5, 1, 1, np.nan])


@WAYS
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.usefixtures("way")
def test_sigmoid(dtype: mx.Dtype) -> None:
    x = mx.array(np.linspace(-30, 30, 4_001).astype(np.float32)).astype(dtype)
    got = sigmoid(x)
    assert got.dtype == dtype
    want = 1 / (1 + np.exp(-np.array(x.astype(mx.float32), np.float64)))
    within = 2e-6 if dtype == mx.float32 else 1e-2
    np.testing.assert_allclose(np.array(got.astype(mx.float32)), want, rtol=within)


@WAYS
@pytest.mark.usefixtures("way")
def test_logsumexp_and_its_gradient() -> None:
    x = np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32) * 20 - 1_000
    value, gradient = mx.value_and_grad(lambda x: logsumexp(x).sum())(mx.array(x))
    wide = x.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    share = np.exp(wide - top)
    total = share.sum(-1, keepdims=True)
    assert value.item() == pytest.approx((np.log(total) + top).sum(), rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), share / total, rtol=1e-5, atol=1e-30)


def test_one_switch_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_power(*_args: object) -> mx.array:
        raise AssertionError("computed as a power")

    monkeypatch.setattr(patches, "EXPONENTIAL_BY_POWER", False)
    monkeypatch.setattr(mx, "power", no_power)
    x = mx.array([0.5, 1.0])
    assert mx.allclose(exp(x), mx.exp(x))
    assert mx.allclose(sigmoid(x), mx.sigmoid(x))
    assert mx.allclose(logsumexp(x), mx.logsumexp(x))
