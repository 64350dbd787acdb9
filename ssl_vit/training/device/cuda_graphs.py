"""CUDA graphs of blocks: their operations are recorded once, and from then on the host starts all of them at once.

Handing an operation to a GPU costs the host some microseconds, and a pass through the blocks is made of a thousand.
Where images or models are small the GPU is faster than that, and waits.
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
) -> bool:
    """Whether to record blocks: with `auto` nowhere, until recordings in their present form were proven on a GPU.

    Then it will be in runs of one process on a GPU, one micro-batch a step. Several processes exchange gradients while
    the backward pass goes on; out of a recording they come all at once. Where batches are accumulated, or fill the
    memory (`batch.auto`), there is little to win, since the GPU is full.

    Raises:
        ValueError: it is asked for where it cannot work.
    """
    works = {
        "needs a GPU": device.type == "cuda",
        "one process only": num_processes == 1,
        "not with FSDP": not is_sharded,
        "not with encoder.grad_checkpointing, which runs blocks again": not grad_checkpointing,
    }
    if setting == "auto":
        return _PROVEN and all(works.values()) and num_micro == 1 and not fills_memory
    if setting and not all(works.values()):
        reason = next(reason for reason, holds in works.items() if not holds)
        raise ValueError(f"cuda_graphs=True: {reason}; use false")
    return setting


class BlockGraphs:
    """Records passes through blocks, forward and backward, and replays them; one run's.

    What is replayed are the same kernels on the same parameters, wherever these have moved by then. Blocks run as they
    are written where a recording cannot serve: at a size too many, between a forward pass and its backward pass, and
    for good once a recording failed.

    Args:
        enabled: False = `active` does nothing.
        must_work: a recording that fails ends the run.
    """

    def __init__(self, enabled: bool, must_work: bool = False) -> None:
        self.enabled, self.must_work = enabled, must_work
        self._recordings: dict[Any, Recording] = {}
        self._ending: list[Recording] = []  # cleared, and awaiting their backward pass

    @contextmanager
    def active(self) -> Iterator[None]:
        """What goes through blocks in here is recorded the first time and replayed from then on."""
        if self._ending:
            _wait_for_replays()
            self._ending.clear()
        if not self.enabled:
            yield
            return
        with runs_blocks(self._run):
            yield

    def clear(self) -> None:
        """Give back the memory of all recordings, which is that of a step; the next step records anew."""
        if not self._recordings:
            return
        _wait_for_replays()
        # A graph must not end under the replay of its backward pass, which is still to come for these.
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
            self._recordings[key] = Recording(blocks, tokens, pack_kwargs)
            torch.cuda.empty_cache()  # what the proof needed, which lies where no other stream takes it from
        except Exception as error:  # whatever cannot be recorded can still be run
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
    """The stream of one recording at a time: with it ends the memory that cuBLAS keeps for its stream."""
    return torch.cuda.Stream(device)


class Capture:
    """What CUDA needs around a capture.

    Args:
        device: the GPU.
        slot: number of the recording among those that there are.
    """

    def __init__(self, device: torch.device, slot: int) -> None:
        self.device, self.stream = device, _stream(device, slot)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """In here passes are run and recorded, without a trace in random numbers or what autocast keeps."""
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        with (
            torch.random.fork_rng([self.device]),  # the step must draw what it would have drawn
            torch.cuda.stream(self.stream),
            # Copies of weights that autocast keeps from before would be recorded as if they never changed.
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


class Recording:
    """A pass through blocks at one size as CUDA graphs, forward and, with gradients, backward.

    It is made only if a replay gives what blocks give as they are written, to rounding. Each has memory of its own:
    what the forward pass leaves for the backward pass must outlive the passes of others.
    """

    _all: ClassVar["weakref.WeakSet[Recording]"] = weakref.WeakSet()

    def __init__(self, blocks: nn.Module, tokens: Float[Tensor, "b t d"], pack_kwargs: dict[str, Any]) -> None:
        grad = torch.is_grad_enabled()
        self.blocks = blocks  # held, so that its id stays its own
        taken = {other.slot for other in Recording._all}
        self.slot = next(slot for slot in itertools.count() if slot not in taken)
        Recording._all.add(self)
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
            # Proof, before anything is learned from it.
            torch.manual_seed(0)
            self._forward.replay()
            # What blocks add, where each token comes out: with LayerScale next to nothing of what does.
            before = self._tokens if self._out.shape == self._tokens.shape else torch.zeros_like(self._out)
            _compare(["what blocks add"], [self._out - before], [wanted_out - before])
            if inputs:
                self._backward.replay()
                learned = [name for name, twin in twins.items() if twin.requires_grad]
                _compare(
                    [f"the gradient of {name}" for name in ["tokens"] * leaf.requires_grad + learned], found, wanted
                )
        places = [gradient.data_ptr() for gradient in found if gradient is not None]
        if len(set(places)) < len(places):  # and what changes one in place, as clipping does, would change both
            raise RuntimeError("two parameters have one gradient")
        self._grad_tokens = found[0] if leaf.requires_grad else None
        self._gradients = found[leaf.requires_grad :]

    def awaits_backward(self) -> bool:
        """Whether what the last forward pass left is still needed."""
        last = self._pass()
        return last is not None and last.recording is not None

    def is_stale(self) -> bool:
        """Whether parameters lie elsewhere than when they were recorded."""
        return any(
            parameter.data_ptr() != address for parameter, address in zip(self.parameters, self._addresses, strict=True)
        )

    def replay(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b _ d"]:
        """What blocks make of `tokens`, differentiable if it was recorded so."""
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
    """Refuse tensors of which one differs from the one wanted by more than rounding."""
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
    def forward(ctx: Any, recording: Recording, tokens: Tensor, *parameters: Tensor) -> Tensor:
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
