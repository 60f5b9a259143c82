"""A device without hardware: tensors that say they are on ``gpu:0``, compute on the CPU and mind CUDA's manners.

Each operation runs on CPU tensors inside (`VirtualTensor`), so that numbers are those of the CPU. What would fail on
CUDA fails here: tensors of two devices in one operation, NumPy on a tensor of the device. What would make the host wait
is written down (`synchronisations`): reading a number, shapes that depend on values, copies to and from the CPU.

Not the same as on CUDA: nothing is asynchronous, memory is not limited, copies to the device always count, since
nothing is pinned, and ``torch.tensor(values, device=...)`` is an error.
"""

import threading
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import library
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map_only

import emsplat

NAME = "gpu"
DEVICE = torch.device("cpu")  # until `make` has been called
_SOURCE = Path(emsplat.__file__).parent

# Operations whose result has a shape that depends on values, or that read values to choose what to do.
_WAITING = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "linalg_eigh",
    "_linalg_eigh",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
# Operations that take even a CPU number (0 dimensions) only where CUDA's do: elementwise ones.
_STRICT = {"_index_put_impl_", "bmm", "cat", "gather", "index", "index_add", "index_add_", "index_put", "index_put_"}
_STRICT |= {"index_select", "mm", "scatter", "scatter_", "scatter_add", "scatter_add_", "stack"}

_waits = []
_lock = threading.Lock()


class VirtualTensor(torch.Tensor):
    """A tensor on the device; ``inner`` is what it holds, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"VirtualTensor({self.inner!r})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, args, kwargs or {})


def _is_virtual(value):
    return isinstance(value, VirtualTensor)


def _on_device(device):
    return device is not None and torch.device(device).type == NAME


def _wait(what):
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(_SOURCE)]
    where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    with _lock:
        _waits.append((threading.current_thread().name, what, where[-1] if where else "tests"))


def _check_devices(op, name, tensors):
    """As CUDA does: one device, or numbers from the CPU."""
    if not any(map(_is_virtual, tensors)):
        return
    for tensor in tensors:
        if not _is_virtual(tensor) and (tensor.dim() or name in _STRICT):
            shapes = ", ".join(f"{t.device} {tuple(t.shape)}" for t in tensors)
            raise RuntimeError(f"Expected all tensors to be on the same device, but {op} got {shapes}")


def _masks(indices):
    return [t for t in indices if t is not None and t.dtype in (torch.bool, torch.uint8)]


def _note_waiting(name, args):
    if name in _WAITING:
        _wait(name)
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index") and _masks(args[1]):
        # CUDA fills by a mask without looking, if there is one mask and one value.
        filling = name != "index" and len(args[1]) == 1 and args[2].numel() == 1
        if not filling:
            _wait(f"{name} by a mask")


def _run(op, args, kwargs):
    name = op.overloadpacket.__name__
    if name in ("_to_copy", "to"):
        return _moved(op, args, kwargs)
    if name in ("copy_", "_copy_from", "_copy_from_and_resize") and _is_virtual(args[0]) != _is_virtual(args[1]):
        source, target = (args[1], args[0]) if name == "copy_" else args[:2]
        _wait(f"copy {source.device} to {target.device}")
        _inner(target).copy_(_inner(source))
        return target
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    _check_devices(op, name, tensors)
    _note_waiting(name, args)
    wanted = kwargs.get("device")
    stays = _on_device(wanted) if wanted is not None else any(map(_is_virtual, tensors))
    if wanted is not None:
        if not stays and any(map(_is_virtual, tensors)) and name not in _FACTORIES:
            _wait(f"{name} to {wanted}")
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(VirtualTensor, _inner, (args, kwargs))
    result = op(*plain_args, **plain_kwargs)
    owners = {id(_inner(tensor)): tensor for tensor in tensors if _is_virtual(tensor)}

    def wrapped(tensor):
        # What an operation changes in place is given back as the same tensor.
        # Conjugates are worked out at once, since a wrapper cannot say that it is one.
        return owners[id(tensor)] if id(tensor) in owners else VirtualTensor(tensor.resolve_conj().resolve_neg())

    return tree_map_only(torch.Tensor, wrapped, result) if stays else result


_FACTORIES = {f"{kind}{like}" for kind in ("empty", "zeros", "ones", "full", "rand", "randn") for like in ("", "_like")}
_FACTORIES |= {f"new_{kind}" for kind in ("empty", "zeros", "ones", "full")} | {"new_empty_strided", "empty_strided"}


def _inner(tensor):
    return tensor.inner if _is_virtual(tensor) else tensor


def _moved(op, args, kwargs):
    source, wanted = args[0], kwargs.get("device")
    stays = _is_virtual(source) if wanted is None else _on_device(wanted)
    if stays != _is_virtual(source):
        _wait(f"copy {source.device} to {wanted}")
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    result = op(_inner(source), *args[1:], **kwargs)
    if result is _inner(source):
        result = result.clone()
    return VirtualTensor(result) if stays else result


def _fallback(op, *args, **kwargs):
    """Operations without a tensor on the device that are to make one: factories."""
    return _run(op, args, kwargs)


_library = None


def make():
    """Registers the device with PyTorch, once for the process, and gives it."""
    global _library, DEVICE
    if _library is None:
        backend_registration._setup_privateuseone_for_python_backend(NAME)
        DEVICE = torch.device(f"{NAME}:0")
        _library = library.Library("_", "IMPL")
        _library.fallback(_fallback, "PrivateUse1")
    return DEVICE


def on_device(tensor):
    """A tensor with these values on the device, without a copy that counts."""
    return VirtualTensor(tensor.detach().clone())


def _shim():
    """The CPU kernels behind the contract of the device's tensors."""
    from emsplat.kernels import cpu

    def call(name):
        def run(*args):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            _check_devices(name, name, tensors)
            assert all(map(_is_virtual, tensors)), f"{name}: tensors of the CPU"
            result = getattr(cpu, name)(*map(_inner, args))
            return tree_map_only(torch.Tensor, VirtualTensor, result)

        return run

    names = (
        "project",
        "project_gradient",
        "project_each",
        "project_each_gradient",
        "voxelize",
        "voxelize_gradient",
        "insert",
        "place",
    )
    return SimpleNamespace(**{name: call(name) for name in names})


def install(monkeypatch):
    """The device with kernels, for the length of a test."""
    import emsplat.imaging.project
    import emsplat.poses.local
    import emsplat.sums.statistics
    from emsplat.kernels import backend

    device, shim = make(), _shim()

    def chosen(wanted):
        return shim if wanted.type == NAME else backend(wanted)

    monkeypatch.setattr(emsplat.imaging.project, "backend", chosen)
    monkeypatch.setattr(emsplat.sums.statistics, "backend", chosen)
    monkeypatch.setattr(emsplat.poses.local, "backend", chosen)
    return device


@contextmanager
def synchronisations(but_threads=("emsplat-reader",)):
    """What made the host wait in this block: (thread, operation, place). Threads that may wait are left out."""
    found = []
    start = len(_waits)
    yield found
    with _lock:
        found += [wait for wait in _waits[start:] if not wait[0].startswith(but_threads)]
