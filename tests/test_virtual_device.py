"""The device without hardware behaves as CUDA does, or tests that pass on it would say nothing."""

import threading

import pytest
import torch

from virtual_device import on_device, synchronisations


@pytest.fixture
def gpu(virtual_gpu):
    return virtual_gpu


def test_operations_compute_on_the_device(gpu):
    a = torch.arange(6.0, device=gpu).reshape(2, 3)
    a[1].mul_(10)
    a[a > 40] = 0
    assert a.device == gpu
    assert torch.fft.rfft2(a).real.device == gpu
    assert a.tolist() == [[0, 1, 2], [30, 40, 0]]
    assert torch.where(a > 1, a, torch.tensor(-1.0)).sum().item() == 69


def test_two_devices_in_one_operation_are_an_error(gpu):
    a = torch.zeros(3, device=gpu)
    for mixing in (
        lambda: a + torch.ones(3),
        lambda: a[torch.tensor([0, 1])],
        lambda: torch.cat([a, torch.ones(1)]),
        lambda: torch.where(torch.ones(3) > 0, a, 1.0),
        lambda: a.index_add_(0, torch.tensor([0]), a[:1]),
        lambda: torch.ones(3).add_(a),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixing()
    assert (a + torch.tensor(1.0)).sum().item() == 3
    with pytest.raises((RuntimeError, TypeError)):
        a.numpy()


@pytest.mark.parametrize(
    "waiting",
    [
        float,
        bool,
        torch.Tensor.cpu,
        lambda a: a.tolist(),
        torch.nonzero,
        torch.unique,
        lambda a: a[a > 0],
        lambda a: torch.ones(2).to(a.device),
        lambda a: torch.bincount(a.long()),
        lambda a: a.copy_(torch.zeros(1)),
        lambda a: torch.zeros(1).copy_(a),
    ],
)
def test_what_makes_the_host_wait_is_seen(gpu, waiting):
    a = torch.ones(1, device=gpu)
    with synchronisations() as found:
        waiting(a)
    assert found


def test_what_does_not_make_it_wait_is_not(gpu):
    with synchronisations() as found:
        parameter = torch.nn.Parameter(torch.ones(4, 3, device=gpu))
        optimiser = torch.optim.Adam([parameter], lr=0.1, fused=True)
        (parameter[torch.arange(2, device=gpu)] * 2.0).square().sum().backward()
        optimiser.step()
        parameter.detach()[parameter.detach() < 0] = 0.0
        torch.zeros(3, device=gpu).index_add_(
            0, torch.zeros(4, dtype=torch.int64, device=gpu), torch.ones(4, device=gpu)
        )
    assert not found
    torch.testing.assert_close(parameter.detach().cpu(), torch.tensor([[0.9] * 3] * 2 + [[1.0] * 3] * 2))


def test_threads_are_told_apart(gpu):
    tensor = on_device(torch.ones(1))
    for name, seen in (("emsplat-reader", 0), ("other", 1)):
        with synchronisations() as found:
            thread = threading.Thread(target=tensor.item, name=name)
            thread.start()
            thread.join()
        assert len(found) == seen
