"""Pickling of tensors as raw bytes. torch's own pickling copies each tensor through an archive in memory.

Only storages and plain tensors are handled here. All other objects made of storages (Parameters, sparse and
quantised tensors, subclasses) keep torch's own way, and views still share their storage. The receiver imports
torch when a tensor arrives; the sender already has it.
"""

import importlib
import pickle
import sys
from typing import Any, cast

from torchrunx_ray.wire.values import memory

_all_come_to_current_device = False


def bring_all_to_current_device() -> None:
    """Place CUDA tensors that arrive on the current device, not on the sender's. Called in a worker."""
    global _all_come_to_current_device
    _all_come_to_current_device = True


def reduce(value: Any, owners: list[object]) -> Any:
    """Return the answer of `pickle.Pickler.reducer_override` for tensors and storages.

    The buffers are valid as long as the objects appended to `owners` live.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "UntypedStorage"):  # torch is just being imported
        return NotImplemented
    # Not isinstance: a subclass may have its own way of pickling.
    kind = cast("Any", type(value))
    if kind is torch.Tensor:
        return _reduce_tensor(torch, value)
    if kind is torch.storage.TypedStorage:
        return _typed_storage, (value._untyped_storage, value.dtype)
    if kind is torch.UntypedStorage and value.device.type in ("cpu", "cuda"):
        return _reduce_storage(value, owners)
    return NotImplemented


def _reduce_tensor(torch: Any, tensor: Any) -> Any:
    """Return a short reduce tuple for a plain tensor, since there may be very many of them."""
    is_plain = (
        tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not (tensor.__dict__ or tensor._backward_hooks or any(getattr(tensor, "names", ())))
    )
    if not is_plain:
        return NotImplemented
    shape = tensor.storage_offset(), tuple(tensor.size()), tensor.stride()
    return _tensor, (tensor.untyped_storage(), tensor.dtype, *shape, tensor.requires_grad)


def _reduce_storage(storage: Any, owners: list[object]) -> Any:
    cuda_index = storage.device.index if storage.device.type == "cuda" else None
    if cuda_index is not None:
        storage = storage.cpu()
    size: int = storage.nbytes()
    if size == 0:
        return _storage, (bytearray(), cuda_index)
    owners.append(storage)
    view = memory.view(storage.data_ptr(), size)
    return _storage, (pickle.PickleBuffer(view), cuda_index)


def _storage(data: Any, cuda_index: int | None) -> Any:
    """Return a writable storage on the bytes themselves if they are a writable mapping, otherwise on a copy.

    A storage that does not own its bytes cannot be resized.
    """
    torch: Any = importlib.import_module("torch")
    view = memoryview(data).cast("B")
    if view.readonly or isinstance(data, bytearray):  # a bytearray was small, and in the stream
        storage = torch.UntypedStorage(view.nbytes)
        memory.expect_copy(storage.data_ptr(), view.nbytes)
        memory.copy(view, storage.data_ptr())
    else:
        storage = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
    if cuda_index is not None and torch.cuda.is_available():
        index = torch.cuda.current_device() if _all_come_to_current_device else cuda_index
        if index < torch.cuda.device_count():
            storage = storage.cuda(index)
    return storage


def _typed_storage(storage: Any, dtype: Any) -> Any:
    torch: Any = importlib.import_module("torch")
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _tensor(
    storage: Any,
    dtype: Any,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> Any:
    torch: Any = importlib.import_module("torch")
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    tensor.set_(storage, offset, size, stride)
    if requires_grad:
        tensor.requires_grad_(True)
    return tensor
