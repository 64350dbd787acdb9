"""CUDA graphs of blocks: their operations are recorded once; after that the host launches all of them at once.

Launching an operation costs the host some microseconds, and a pass through the blocks has a thousand of them. With
small images or models the GPU computes faster than the host launches, and waits.
"""

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ssl_vit.models.blocks import run_in_turn, runs_blocks

_MOST = 8  # recordings of a run: sizes of crops, with gradients and without, encoder, teacher and decoder
_WARM_UPS = 3  # passes before a recording, in which libraries choose and load what they need
_TOLERANCE = 2e-2  # of a tensor's norm: attention's backward pass adds up in another order each time
_NOISE = 1e-7  # of the norm of all: what is smaller may be rounding and nothing else
_PROVEN = False  # whether tests/test_gpu.py has passed on a GPU with recordings as they now are; till then auto is off


def resolve_cuda_graphs(
    setting: bool | Literal["auto"],
    device: torch.device,
    *,
    num_processes: int = 1,
    num_micro: int = 1,
    fills_memory: bool = False,
    is_sharded: bool = False,
    grad_checkpointing: bool = False,
    has_plain_blocks: bool = True,
) -> bool:
    """Whether to record blocks: with `auto` nowhere, until recordings in their present form were proven on a GPU.

    Once proven, `auto` will record in runs of one process on a GPU with one micro-batch a step. Several processes
    exchange gradients during the backward pass, and a recording returns them all at its end. Accumulated batches, and
    batches that fill the memory (`batch.auto`), gain little, since they keep the GPU busy.

    Raises:
        ValueError: it is asked for where it cannot work.
    """
    works = {
        "needs a GPU": device.type == "cuda",
        "one process only": num_processes == 1,
        "not with FSDP": not is_sharded,
        "not with encoder.grad_checkpointing, which runs blocks again": not grad_checkpointing,
        "records lists of plain transformer blocks, which this encoder.arch has not": has_plain_blocks,
    }
    if setting == "auto":
        return _PROVEN and all(works.values()) and num_micro == 1 and not fills_memory
    if setting and not all(works.values()):
        reason = next(reason for reason, holds in works.items() if not holds)
        raise ValueError(f"cuda_graphs=True: {reason}; use false")
    return setting


class BlockGraphs:
    """Records and replays the forward and backward passes through the blocks of one run.

    A replay runs the same kernels on the same parameters; if parameters have moved, it is recorded anew. Blocks run
    eagerly at more sizes than are recorded, between a forward pass and its backward pass, and after a recording failed.

    Args:
        enabled: False = `active` does nothing.
        must_work: a recording that fails ends the run.
    """

    def __init__(self, enabled: bool, must_work: bool = False) -> None:
        self.enabled, self.must_work = enabled, must_work
        self._recordings: dict[Any, GraphedPass] = {}
        self._ending: list[GraphedPass] = []  # cleared, and awaiting their backward pass

    @contextmanager
    def active(self) -> Iterator[None]:
        """Record passes through blocks in this block the first time, and replay them after that."""
        if self._ending:
            _wait_for_replays()
            self._ending.clear()
        if not self.enabled:
            yield
            return
        with runs_blocks(self._run):
            yield

    def clear(self) -> None:
        """Free the memory of all recordings, as much as a step needs; the next step records anew."""
        if not self._recordings:
            return
        _wait_for_replays()
        # These graphs must live until their backward pass was replayed.
        self._ending += [recording for recording in self._recordings.values() if recording.awaits_backward()]
        self._recordings.clear()
        torch.cuda.empty_cache()

    def _run(
        self, blocks: nn.Module, tokens: Float[Tensor, "b t d"], pack_kwargs: dict[str, Any]
    ) -> Float[Tensor, "b _ d"]:
        modes = torch.is_grad_enabled(), tokens.requires_grad, blocks.training
        key = (id(blocks), tuple(tokens.shape), tokens.dtype, modes, *pack_kwargs.items())
        if key in self._recordings and self._recordings[key].is_stale():
            del self._recordings[key]
        if key not in self._recordings and self.enabled and len(self._recordings) < _MOST and any(blocks.children()):
            self._record(key, blocks, tokens, pack_kwargs)
        recording = self._recordings.get(key)
        if recording is None or recording.awaits_backward():
            return run_in_turn(blocks, tokens, pack_kwargs)
        return recording.replay(tokens)

    def _record(self, key: Any, blocks: nn.Module, tokens: Tensor, pack_kwargs: dict[str, Any]) -> None:
        try:
            self._recordings[key] = GraphedPass(blocks, tokens, pack_kwargs)
            torch.cuda.empty_cache()  # memory of the proof, which other streams cannot reuse
        except Exception as error:  # blocks that cannot be recorded can still run eagerly
            if self.must_work:
                raise
            self.enabled = False  # all of it: a capture that failed may leave CUDA's allocator in disorder
            self.clear()
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"cuda_graphs=auto: blocks cannot be recorded, so they run as they are written ({reason})", stacklevel=2
            )


def _wait_for_replays() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@functools.cache
def _stream(device: torch.device, slot: int) -> torch.cuda.Stream:
    """The stream of one recording; when it ends, cuBLAS frees the memory that it keeps for the stream."""
    return torch.cuda.Stream(device)


class Capture:
    """Streams and pools around a capture.

    Args:
        device: the GPU.
        slot: number of the recording among those that there are.
    """

    def __init__(self, device: torch.device, slot: int) -> None:
        self.device, self.stream = device, _stream(device, slot)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run and capture without touching the random generator's state or autocast's cache."""
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        with (
            torch.random.fork_rng([self.device]),  # the step must draw what it would have drawn
            torch.cuda.stream(self.stream),
            # Weights that autocast cached before would be recorded as constants.
            torch.autocast("cuda", dtype=precision, enabled=precision is not None, cache_enabled=False),
        ):
            try:
                yield
            finally:
                before.wait_stream(self.stream)

    def __call__(self, work: Callable[[], Any], after: "torch.cuda.CUDAGraph | None" = None) -> tuple[Any, Any]:
        """Record what `work` does.

        Args:
            after: an earlier graph, whose memory this one goes on with.

        Returns:
            The graph, and what `work` returned: tensors that each replay fills anew.
        """
        pool = torch.cuda.graph_pool_handle() if after is None else after.pool()
        failure: Exception | None = None
        try:
            with self._capturing(graph := torch.cuda.CUDAGraph(), pool):
                try:
                    result = work()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            # In older versions (torch 2.11) the end of a broken capture stops halfway: before the allocator is told,
            # and before the generator of random numbers is, which a capture that ends well makes up for.
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, pool)  # pyright: ignore[reportAttributeAccessIssue]
            with self._capturing(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
                torch.zeros(1, device=self.device)
            raise failure or error from None  # the end of a broken capture complains of its own
        finally:
            failure = None  # whose frames hold this one, and the tensors of a step
        return graph, result

    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: Any) -> torch.cuda.graph:
        # A loader's thread pins memory meanwhile, which "global", the default, forbids to all threads.
        return torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")


class GraphedPass:
    """A pass through blocks at one size as CUDA graphs, forward and, with gradients, backward.

    It is made only if a replay gives what blocks give as they are written, to rounding. Each has memory of its own:
    what the forward pass leaves for the backward pass must outlive the passes of others.
    """

    _all: ClassVar["weakref.WeakSet[GraphedPass]"] = weakref.WeakSet()

    def __init__(self, blocks: nn.Module, tokens: Float[Tensor, "b t d"], pack_kwargs: dict[str, Any]) -> None:
        grad = torch.is_grad_enabled()
        self.blocks = blocks  # held, so that its id stays its own
        taken = {other.slot for other in GraphedPass._all}
        self.slot = next(slot for slot in itertools.count() if slot not in taken)
        GraphedPass._all.add(self)
        self._pass: Callable[[], Any] = lambda: None  # the last one of autograd, for as long as that holds it
        named = dict(blocks.named_parameters(prefix="blocks"))
        self.parameters = list(named.values())
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]
        self._tokens = torch.empty_like(tokens.detach())
        leaf = self._tokens.detach().requires_grad_(grad and tokens.requires_grad)
        # The same weights as other leaves of autograd, which ties a leaf to the stream that it was first used on.
        twins: dict[str, Tensor] = {
            name: nn.Parameter(value.detach(), requires_grad=grad and value.requires_grad)
            for name, value in named.items()
        }
        self.learns = [value for name, value in named.items() if twins[name].requires_grad]
        inputs = [leaf] * leaf.requires_grad + [twin for twin in twins.values() if twin.requires_grad]
        module = _InTurn(blocks, pack_kwargs)
        last: list[Tensor] = []

        def forward() -> Tensor:
            last[:] = [functional_call(module, twins, (leaf,))]
            return last[0]

        def backward() -> tuple[Tensor | None, ...]:
            with torch.autocast("cuda", enabled=False):  # as a backward pass runs
                return torch.autograd.grad(last.pop(), inputs, self._grad_out, allow_unused=True)

        capture = Capture(tokens.device, self.slot)
        with capture.aside():
            self._tokens.normal_()
            self._grad_out = torch.randn_like(forward()) / 100  # or fp16 might overflow
            last.clear()
            for _ in range(_WARM_UPS):
                wanted: tuple[Tensor | None, ...] = ()
                torch.manual_seed(0)
                wanted_out = forward().detach()
                if inputs:
                    wanted = backward()
            self._forward, out = capture(forward)
            self._out = out.detach()
            self._backward: Any = None
            found: list[Tensor | None] = []
            if inputs:
                self._backward, gradients = capture(backward, after=self._forward)
                found += gradients
            # Prove the recording before anything is learned from it.
            torch.manual_seed(0)
            self._forward.replay()
            # Compare output minus input: with a small LayerScale the output alone proves nothing.
            before = self._tokens if self._out.shape == self._tokens.shape else torch.zeros_like(self._out)
            _compare(["what blocks add"], [self._out - before], [wanted_out - before])
            if inputs:
                self._backward.replay()
                learned = [name for name, twin in twins.items() if twin.requires_grad]
                _compare(
                    [f"the gradient of {name}" for name in ["tokens"] * leaf.requires_grad + learned], found, wanted
                )
        places = [gradient.data_ptr() for gradient in found if gradient is not None]
        if len(set(places)) < len(
            places
        ):  # two parameters would share a buffer, and in-place clipping would scale both
            raise RuntimeError("two parameters have one gradient")
        self._grad_tokens = found[0] if leaf.requires_grad else None
        self._gradients = found[leaf.requires_grad :]

    def awaits_backward(self) -> bool:
        """Whether the last forward pass still waits for its backward pass."""
        last = self._pass()
        return last is not None and last.recording is not None

    def is_stale(self) -> bool:
        """Whether parameters have moved in memory since they were recorded."""
        return any(
            parameter.data_ptr() != address for parameter, address in zip(self.parameters, self._addresses, strict=True)
        )

    def replay(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b _ d"]:
        """The blocks' output for `tokens`, differentiable if gradients were recorded."""
        if self._backward is None:
            with torch.no_grad():
                return self.replay_forward(tokens)
        return _Replay.apply(self, tokens, *self.learns)  # pyright: ignore[reportReturnType]

    def begin(self, last: Any) -> None:
        """Note a pass of autograd, which says by its `recording` that it awaits its backward pass."""
        self._pass = weakref.ref(last)

    def replay_forward(self, tokens: Tensor) -> Tensor:
        """The forward pass. Returns a copy: the next one writes over what this one left."""
        for parameter, gradient in zip(self.learns, self._gradients, strict=True):
            # Of a micro-batch before this one: it lies where this pass keeps what the backward pass will need.
            held = parameter.grad
            if held is not None and gradient is not None and held.data_ptr() == gradient.data_ptr():
                parameter.grad = held.clone()
        self._tokens.copy_(tokens)
        self._forward.replay()
        return self._out.clone()

    def replay_backward(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of tokens and parameters. Those of parameters may become their `grad` as they are, not copied."""
        assert self._backward is not None
        self._grad_out.copy_(grad)
        self._backward.replay()
        of_tokens = None if self._grad_tokens is None else self._grad_tokens.clone()
        return [of_tokens, *(None if gradient is None else gradient.detach() for gradient in self._gradients)]


def _compare(names: Sequence[str], found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    """Refuse tensors that differ from the expected ones by more than rounding."""
    pairs = [
        (name, one.float(), other.float())
        for name, one, other in zip(names, found, wanted, strict=True)
        if one is not None and other is not None
    ]
    differences = torch.stack([(one - other).norm() for _, one, other in pairs])
    sizes = torch.stack([other.norm() for _, _, other in pairs])
    right = differences <= _TOLERANCE * sizes + _NOISE * sizes.norm()
    if not right.all():
        wrong = int(right.int().argmin())
        share = (differences[wrong] / sizes[wrong]).item()
        raise RuntimeError(f"what is replayed differs: {pairs[wrong][0]} by {share:.1%}")


class _InTurn(nn.Module):
    """Blocks as a module of their own, which can be called with other parameters."""

    def __init__(self, blocks: nn.Module, pack_kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.blocks, self.pack_kwargs = blocks, pack_kwargs

    def forward(self, tokens: Tensor) -> Tensor:
        return run_in_turn(self.blocks, tokens, self.pack_kwargs)


class _Replay(torch.autograd.Function):
    """Forward and backward of a recording as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, recording: GraphedPass, tokens: Tensor, *parameters: Tensor) -> Tensor:
        ctx.recording = recording
        recording.begin(ctx)
        return recording.replay_forward(tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        recording, ctx.recording = ctx.recording, None  # a loss that is still held must not hold a step's memory
        if recording is None:
            raise RuntimeError("the backward pass of recorded blocks can be run once only; set cuda_graphs=false")
        return None, *recording.replay_backward(grad)
