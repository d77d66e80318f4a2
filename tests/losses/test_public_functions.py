"""The two functions the package root offers, with arrays and with floats."""

import mlx.core as mx
import pytest

import mlx_align
from mlx_align import bt_loss, dpo_loss


def test_floats_give_a_scalar():
    assert bt_loss(1.0, 1.0).item() == pytest.approx(0.693147, abs=1e-6)
    assert bt_loss(3.0, 0.0).item() == pytest.approx(0.048587, abs=1e-6)
    assert dpo_loss(-10.0, -12.0, -11.0, -11.0, 0.5).item() == pytest.approx(0.313262, abs=1e-6)
    assert dpo_loss(-10, -10, -10, -10, 0.1).shape == ()


def test_arrays_give_elementwise_losses_of_their_common_shape():
    chosen, rejected = mx.array([[1.0, 2.0], [3.0, -1e4]]), mx.array([[1.0], [0.0]])
    losses = bt_loss(chosen, rejected)
    assert losses.shape == (2, 2)
    assert losses[1, 1].item() == pytest.approx(1e4)
    assert dpo_loss(chosen, rejected, 0.0, 0.0, 0.1).shape == (2, 2)


def test_reference_cancels_and_beta_scales():
    one = dpo_loss(mx.array(-3.0), mx.array(-5.0), mx.array(-4.0), mx.array(-4.5), 0.2).item()
    other = bt_loss(0.2 * (-3.0 + 4.0), 0.2 * (-5.0 + 4.5)).item()
    assert one == pytest.approx(other, rel=1e-6)


def test_exported_names():
    for name in mlx_align.__all__:
        assert hasattr(mlx_align, name)
