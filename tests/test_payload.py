"""Values as they travel: packed, from memory to memory, and unpacked."""

import collections
import dataclasses
import gc
import os
import pickle
import signal
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.messages import StartMethod
from torchrunx_ray.wire.values import memory, transfer
from torchrunx_ray.wire.values.memory import Remote
from torchrunx_ray.wire.values.payload import Packed, pack
from torchrunx_ray.worker.function.call import HeldCall


def always() -> bool:
    return True


def as_a_result(value: object, pid: int | None = None) -> Any:
    """Out of a worker, into its agent."""
    packed = pack([("value", value)])
    own_memory = memory.open_own()
    remote = Remote(os.getpid() if pid is None else pid, own_memory, always)
    taken = transfer.take(remote, transfer.offer(packed))
    os.close(own_memory)
    assert taken is not None
    return taken.unpack()


def as_a_result_without_the_right_to_trace(value: object) -> Any:
    return as_a_result(value, pid=-1)  # as where the kernel refuses the pid


def as_an_argument(value: object) -> Any:
    """Out of an agent, into a template, and so into what is forked from it."""
    (packed,) = hold([pack([("value", value)])], "fork").values()
    return packed.unpack()


def as_a_file(value: object) -> Any:
    """For workers that are spawned, and where memory cannot be reached from outside."""
    (packed,) = hold([pack([("value", value)])], "spawn").values()
    return packed.unpack()


def hold(values: list[Packed], start_method: StartMethod) -> HeldCall:
    call = HeldCall(transfer.Layout.of(values), start_method)
    if call.address is None:
        memory.write_file(call.fd, transfer.moves(0, values))
    else:
        Remote(os.getpid(), call.fd, always).write(transfer.moves(call.address, values))
    return call


def through_ray(value: object) -> Any:
    """As they travel between hosts: buffers out of band, and read-only where they arrive."""
    buffers: list[pickle.PickleBuffer] = []
    packed = pack([("value", value)])  # owns what the buffers show
    stream = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(stream, buffers=[buffer.raw().toreadonly() for buffer in buffers])


ways = pytest.mark.parametrize(
    "travel",
    [
        as_a_result,
        as_a_result_without_the_right_to_trace,
        as_an_argument,
        as_a_file,
        through_ray,
    ],
)

BIG = 10_000

TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.arange(BIG),
    "small": lambda: torch.arange(3),
    "0-dim": lambda: torch.tensor(1.5),
    "empty": lambda: torch.empty(0, 3),
    "transposed": lambda: torch.randn(100, 100).t(),
    "strided": lambda: torch.arange(BIG)[10::7],
    "expanded": lambda: torch.randn(1).expand(BIG),
    "channels last": lambda: torch.randn(2, 3, 30, 30).to(memory_format=torch.channels_last),
    "bf16": lambda: torch.randn(BIG).bfloat16(),
    "fp8": lambda: torch.randn(BIG).to(torch.float8_e4m3fn),
    "bool": lambda: torch.arange(BIG) % 2 == 0,
    "complex": lambda: torch.randn(BIG, dtype=torch.complex64),
    "conjugated": lambda: torch.randn(BIG, dtype=torch.complex64).conj(),
    "negated view": lambda: torch.randn(BIG, dtype=torch.complex64).conj().imag,
    "requires_grad": lambda: torch.randn(BIG, requires_grad=True),
    "not a leaf": lambda: torch.randn(BIG, requires_grad=True) * 2,
    "sparse coo": lambda: torch.eye(100).to_sparse(),
    "sparse csr": lambda: torch.eye(100).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(BIG), 0.1, 0, torch.qint8),
    "parameter": lambda: torch.nn.Parameter(torch.randn(BIG)),
    "buffer": lambda: torch.nn.Buffer(torch.randn(BIG)),
    "in shared memory": lambda: torch.randn(BIG).share_memory_(),
    "with an attribute": lambda: with_attribute(torch.randn(BIG)),
    "subclass": lambda: torch.randn(BIG).as_subclass(Celsius),
}


class Celsius(torch.Tensor):
    pass


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = "mine"  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_quantized:
        return tensor.int_repr()
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor


@ways
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_tensors_of_every_kind(travel: Callable[[object], Any], kind: str) -> None:
    tensor = TENSORS[kind]()
    arrived = travel(tensor)

    assert type(arrived) is type(tensor)
    assert (arrived.dtype, arrived.shape, arrived.layout) == (
        tensor.dtype,
        tensor.shape,
        tensor.layout,
    )
    assert arrived.requires_grad == tensor.requires_grad
    assert arrived.__dict__ == tensor.__dict__
    one, other = dense(arrived), dense(tensor)
    if tensor.layout is torch.strided:
        assert arrived.stride() == tensor.stride()
    if one.dtype is torch.float8_e4m3fn:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    assert torch.equal(one.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor))


def test_what_was_loaded_with_a_class_goes_before_python_collects_garbage() -> None:
    class OfThisTest(torch.Tensor):
        pass

    arrived = through_ray(torch.zeros(BIG).as_subclass(OfThisTest))
    gone = weakref.ref(arrived)
    gc.disable()
    try:
        del arrived
        assert gone() is None
    finally:
        gc.enable()


@ways
def test_tensors_arrive_writable_and_leave_the_senders_alone(
    travel: Callable[[object], Any],
) -> None:
    tensor = torch.zeros(BIG)
    arrived = travel({"tensor": tensor, "small": torch.zeros(3)})
    arrived["tensor"].add_(1)
    arrived["small"].add_(1)

    assert arrived["tensor"].sum() == BIG
    assert arrived["small"].sum() == 3
    assert tensor.sum() == 0


@ways
@pytest.mark.parametrize("size", [4, BIG])
def test_views_of_one_storage_still_share_it(travel: Callable[[object], Any], size: int) -> None:
    base = torch.zeros(size)
    tied = torch.nn.Parameter(torch.zeros(size))
    whole, half, one, other = travel([base, base[: size // 2], tied, tied])
    half.add_(1)

    assert whole.sum() == size // 2
    assert one is other


@ways
def test_module_with_optimizer_goes_on_training(travel: Callable[[object], Any]) -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().sum().backward()
        optimizer.step()

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
    model[0].bias = model[1].weight = torch.nn.Parameter(torch.ones(1, 64)[0:1].squeeze())
    model[1].weight = torch.nn.Parameter(torch.ones(1, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    arrived_model, arrived_optimizer = travel((model, optimizer))
    step(model, optimizer)
    step(arrived_model, arrived_optimizer)

    for name, tensor in model.state_dict().items():
        assert torch.equal(arrived_model.state_dict()[name], tensor)
    state, arrived_state = optimizer.state_dict(), arrived_optimizer.state_dict()
    assert state["param_groups"] == arrived_state["param_groups"]
    assert torch.equal(state["state"][0]["exp_avg"], arrived_state["state"][0]["exp_avg"])


@dataclasses.dataclass
class Batch:
    images: torch.Tensor
    names: list[str]


@ways
def test_containers_and_dataclasses(travel: Callable[[object], Any]) -> None:
    value = {"batches": [Batch(torch.ones(BIG), ["a"]), None], (1, 2): {3, "x"}}
    arrived = travel(value)

    assert arrived.keys() == value.keys()
    assert arrived["batches"][0].names == ["a"]
    assert torch.equal(arrived["batches"][0].images, torch.ones(BIG))
    assert arrived["batches"][1] is None


@ways
@pytest.mark.parametrize(
    "array",
    [
        np.arange(BIG),
        np.arange(3),
        np.asfortranarray(np.random.rand(100, 100)),
        np.arange(BIG)[::3],
        np.array(["a", None, {"b": 1}], dtype=object),
        np.zeros(BIG, dtype=[("x", "f4"), ("name", "U5")]),
        np.array(1.5),
        np.zeros((0, 3)),
    ],
    ids=["plain", "small", "fortran", "strided", "object", "structured", "0-dim", "empty"],
)
def test_arrays(travel: Callable[[object], Any], array: np.ndarray[Any, Any]) -> None:
    arrived = travel(array)

    assert arrived.dtype == array.dtype
    assert arrived.shape == array.shape
    assert (arrived == array).all()


def test_large_buffers_are_not_copied_when_packed() -> None:
    tensor, array = torch.zeros(BIG), np.zeros(BIG)
    packed = pack([("value", (tensor, array))])
    tensor.add_(1)
    array += 2

    arrived_tensor, arrived_array = packed.unpack()
    assert arrived_tensor.sum() == BIG
    assert arrived_array.sum() == 2 * BIG
    assert len(packed.stream) < 2000


def test_packed_tensor_outlives_the_one_that_was_packed() -> None:
    packed = pack([("value", torch.ones(BIG))])
    for _ in range(10):
        torch.zeros(BIG)

    assert packed.unpack().sum() == BIG


@pytest.mark.slow
def test_very_many_small_tensors() -> None:
    tensors = as_a_result([torch.full((2, 2), float(i)) for i in range(100_000)])

    assert len(tensors) == 100_000
    assert all(tensors[i][0, 0] == i for i in range(0, 100_000, 997))


@pytest.mark.slow
def test_one_tensor_of_2_gib() -> None:
    tensor = torch.zeros(2**31 + 5, dtype=torch.uint8)
    tensor[-1] = 7

    arrived = as_a_result(tensor)
    assert len(arrived) == 2**31 + 5
    assert arrived[-1] == 7


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("use", [True, False])
def test_several_values_leave_no_file_and_no_descriptor(
    start_method: StartMethod, use: bool
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    empty = Packed(b"a", (memoryview(b""),))
    call = hold([empty, Packed(b"bc"), pack([("value", [1])])], start_method)
    if use:
        first, second, third = call.values()
        assert (bytes(first.stream), [bytes(b) for b in first.buffers]) == (b"a", [b""])
        assert bytes(second.stream) == b"bc"
        assert third.unpack() == [1]
        del first, second, third
    else:
        call.drop()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("way", ["ended", "unwanted"])
def test_value_of_a_process_that_has_ended_is_not_taken(way: str) -> None:
    offered_by, our_end = Channel.pair()
    value = torch.ones(2**20)
    pid = os.fork()
    if pid == 0:
        packed = pack([("value", value)])
        own_memory = memory.open_own()
        returned = messages.Returned(os.getpid(), 0, transfer.offer(packed), False)
        offered_by.send(returned, [own_memory])
        os.read(0, 1) if way == "unwanted" else None
        os._exit(0)
    returned, (memory_fd,) = our_end.receive()
    assert isinstance(returned, messages.Returned)
    assert not isinstance(returned.value, transfer.Layout)
    if way == "ended":
        os.waitpid(pid, 0)
    remote = Remote(pid, memory_fd, lambda: way == "ended")

    assert transfer.take(remote, returned.value) is None
    if way == "unwanted":
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    offered_by.close()
    our_end.close()
    os.close(memory_fd)


def test_copy_works_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an atexit function, or at a limit of the host."""
    tensor = torch.arange(10_000_000)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert torch.equal(as_a_result(tensor), tensor)
    assert torch.equal(through_ray(tensor), tensor)


DISPATCHERS = """import functools


def traced(function):
    @functools.wraps(function)
    def call(value):
        return "traced", function(value)

    return call


@traced
@traced
@functools.singledispatch
def size(value):
    return None


@size.register
def size_of_list(value: list):
    return [size(each) for each in value]


@functools.singledispatch
def name(value):
    return ""


name.about = "what a value is called"
"""


def test_dispatching_function_keeps_its_decorators_and_attributes() -> None:
    names: dict[str, Any] = {"__name__": "script_of_no_module"}
    exec(DISPATCHERS, names)
    script = types.SimpleNamespace(**names)

    for value in (script.size, script.size_of_list):
        loaded = pack([("value", value)]).unpack()
        assert loaded([1]) == value([1])
    size = pack([("value", script.size)]).unpack()
    assert size.registry[list].__globals__["size"] is size
    assert size.dispatch(list) is size.registry[list]
    assert size.__wrapped__.__name__ == "size"
    assert pack([("value", script.name)]).unpack().about == "what a value is called"


def test_recursion_that_is_too_deep() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]

    with pytest.raises(PayloadError, match="excessively deep recursion"):
        pack([("the return value", value)])


class RaisesInReduce:
    def __reduce__(self) -> Any:
        raise RuntimeError("in reduce")


class Config:
    def __init__(self) -> None:
        self.left_out = threading.Lock()
        self.parts = collections.deque([threading.Lock()])

    def __getstate__(self) -> object:
        return {"parts": self.parts}


MADE_INSIDE = "Create it inside the function instead."


def object_of_a_script() -> object:
    """Of a class that no worker can import."""
    return type("Locked", (), {"lock": threading.Lock(), "__module__": "of_no_module"})()


@pytest.mark.parametrize(
    ("make", "path", "reason", "advice"),
    [
        (threading.Lock, "", "TypeError: cannot pickle '_thread.lock' object", MADE_INSIDE),
        (lambda: (i for i in ()), "", "TypeError: cannot pickle 'generator' object", MADE_INSIDE),
        (
            lambda: iter(torch.utils.data.DataLoader([1])),  # pyright: ignore[reportArgumentType]
            "",
            "NotImplementedError: _SingleProcessDataLoaderIter cannot be pickled",
            MADE_INSIDE,
        ),
        (
            Config,
            ".parts[0]",
            "TypeError: cannot pickle '_thread.lock' object",
            "Create it inside the function instead, or give Config a __getstate__ that leaves it out.",
        ),
        (
            RaisesInReduce,
            "",
            "RuntimeError: in reduce",
            "Create it inside the function instead, or give RaisesInReduce a __reduce__ or __getstate__ "
            "that works.",
        ),
        (
            object_of_a_script,
            ".__class__.lock",
            "TypeError: cannot pickle '_thread.lock' object",
            "Put the class Locked into a module beside the script, and import it: the class of "
            "a module is sent only by its name.",
        ),
    ],
)
def test_what_cannot_be_pickled_is_named_with_its_own_reason_and_fitting_advice(
    make: Callable[[], object], path: str, reason: str, advice: str
) -> None:
    with pytest.raises(PayloadError) as caught:
        pack([("args", ([make()],))])

    assert str(caught.value) == f"args[0][0]{path} cannot be pickled: {reason}\n{advice}"


class Reduces:
    def __init__(self, to: object) -> None:
        self.to = to

    def __reduce__(self) -> Any:
        return self.to


class KeyWithoutRepr:
    def __repr__(self) -> str:
        raise RuntimeError("in repr")


class MappingWithoutItems(Mapping[str, object]):
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __getitem__(self, key: str) -> object:
        raise RuntimeError("in getitem")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("in iter")

    def __len__(self) -> int:
        return 1


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("in str")


class RaisesWhenReduced:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def class_of_no_module() -> object:
    return type("Homeless", (), {"__module__": None, "__reduce__": lambda _self: 1 / 0})()  # pyright: ignore[reportUnknownLambdaType]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Reduces(None), r"a( of rank 0)? cannot be pickled: \w+: "),
        (lambda: Reduces((Reduces,)), r"a( of rank 0)? cannot be pickled: \w+: "),
        (lambda: Reduces((Reduces, None)), r"a( of rank 0)? cannot be pickled: \w+: "),
        (
            lambda: {"b": {KeyWithoutRepr(): threading.Lock()}},
            r"a\['b'\]\[a KeyWithoutRepr\]( of rank 0)? cannot be pickled: TypeError: cannot pickle",
        ),
        (
            lambda: [MappingWithoutItems()],
            r"a\[0\]( of rank 0)? cannot be pickled: TypeError: cannot pickle",
        ),
        (
            lambda: RaisesWhenReduced(RuntimeError("config {} lacks {name}", "x")),
            r"a( of rank 0)? cannot be pickled: RuntimeError: \('config {} lacks {name}', 'x'\)",
        ),
        (
            lambda: RaisesWhenReduced(Unspeakable()),
            r"a( of rank 0)? cannot be pickled: Unspeakable: <its __str__ raised RuntimeError>",
        ),
        (
            lambda: [class_of_no_module()],
            r"a\[0\]( of rank 0)? cannot be pickled: ZeroDivisionError",
        ),
    ],
)
def test_search_for_what_cannot_be_pickled_survives_what_it_meets(
    make: Callable[[], object], said: str
) -> None:
    for rank in (None, 0):
        with pytest.raises(PayloadError, match=said):
            pack([("a", make())], rank=rank)


def test_struct_of_msgspec_is_named_itself_and_not_its_field() -> None:
    metaclass = type(
        "StructMeta", (type,), {"__module__": "msgspec._core"}
    )  # msgspec is not installed here
    struct = metaclass("Point", (), {"__module__": "of_no_module", "__slots__": ("x",)})

    with pytest.raises(PayloadError, match=r"^args\[0\] cannot be pickled: msgspec keeps"):
        pack([("args", (struct,))])


def test_exception_in_reduce_is_shown_with_the_path() -> None:
    with pytest.raises(PayloadError, match=r"args\[0\]\['a'\] cannot be pickled: .*in reduce"):
        pack([("args", ({"a": RaisesInReduce()},))])


class OfAnOddModule:
    def __reduce__(self) -> Any:
        raise RuntimeError("in reduce")


@pytest.mark.parametrize(
    "module", [None, object(), types.SimpleNamespace(__file__=Path("/x/site-packages/odd.py"))]
)
def test_what_stands_for_a_module_does_not_replace_the_error(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs put such things into sys.modules, for instance None against an import."""
    monkeypatch.setitem(sys.modules, "odd", module)
    monkeypatch.setattr(OfAnOddModule, "__module__", "odd")

    with pytest.raises(
        PayloadError, match=r"^args\[0\] cannot be pickled: RuntimeError: in reduce"
    ):
        pack([("args", (OfAnOddModule(),))])


class RaisesWhenUnwrapped:
    @property
    def __wrapped__(self) -> Any:
        raise RuntimeError("in __wrapped__")


def test_function_whose_wrapped_leads_nowhere_travels() -> None:
    def answer() -> int:
        return 42

    for wrapped in (answer, RaisesWhenUnwrapped()):
        answer.__dict__["__wrapped__"] = wrapped
        assert pack([("value", answer)]).unpack()() == 42


def test_dispatching_function_of_a_module_that_travels_by_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("travels_by_value")
    exec(f"{DISPATCHERS}\ncached = functools.lru_cache(maxsize=7)(len)", vars(module))
    module.cached.__qualname__, module.cached.__module__ = "cached", module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cloudpickle.register_pickle_by_value(module)
    try:
        name, cached = pack([("value", [module.name, module.cached])]).unpack()
    finally:
        cloudpickle.unregister_pickle_by_value(module)

    assert name is not module.name
    assert (name("a"), name.about) == ("", "what a value is called")
    assert cached is not module.cached
    assert (cached("a"), cached.cache_parameters()["maxsize"]) == (1, 7)
