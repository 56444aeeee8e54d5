"""Running a model whose blocks stay on the disk: each is read when the forward pass reaches it.

The ends of the model (embeddings, final LayerNorm, projections, unembedding) are in memory. For the
blocks there are two buffers, each of one block's size. While a block computes with the weights in
one, a thread reads the next block's into the other; so a run takes the longer of reading and
computing, once, for all prompts of its batch together.

Every part of a block that has weights asks for them before it runs (`Streamer.hold`), so also code
that calls the parts one by one, as patching sweeps do, finds them in place. Between runs the model
shows `OnDisk` parameters. Weights always lie at multiples of 64 bytes: a product's last bits
depend on that, and so a streamed model computes exactly what a resident one does that lies so too.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from optlens.checkpoints.matching import EMBEDDING, Places
from optlens.checkpoints.on_disk import OnDisk, StreamError
from optlens.checkpoints.placement import choose_dtype
from optlens.checkpoints.read import Weights
from optlens.checkpoints.stored_tensors import StoredTensors, aligned
from optlens.memory import describe_bytes
from optlens.weight_sample import weight_sample

_NO_GRADIENT = (
    "No gradient flows through a model that is streamed from disk: the backward pass would need "
    "every block's weights again. Patching by running (patch_sweep, path_patch) works; for "
    'gradients load without device_map="stream", in dtype=torch.bfloat16 if memory is short.'
)


_BLOCK = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def stream(
    model: nn.Module,
    places: Places,
    stored: dict[str, str],
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype | None,
    name: str,
) -> None:
    """Load the ends of a model, and have its blocks read whenever it runs.

    Args:
        model: The model, on the meta device.
        places: Its parameters by canonical name.
        stored: Canonical parameter name to the canonical name of the stored tensor.
        weights: The checkpoint.
        device: Where the model computes.
        dtype: In which dtype; None for float32 on a CPU where that fits, else the stored one.
        name: What to call the checkpoint in messages.

    Raises:
        CheckpointError: If the files are no safetensors, or two blocks do not fit into memory.
    """
    tensors = StoredTensors(weights, stored.values())
    names: list[dict[str, str]] = [{} for _ in model.decoder.layers]
    ends = []
    for parameter in places:
        found = _BLOCK.fullmatch(parameter)
        if found:
            names[int(found[1])][found[2]] = stored[parameter]
        else:
            ends.append(parameter)
    kept = [*(stored[end] for end in ends), *(t for block in names[:2] for t in block.values())]
    n_kept = sum(torch.Size(weights.specs[tensor].shape).numel() for tensor in kept)
    dtype = choose_dtype(
        dtype,
        device,
        stored=weights.specs[stored[EMBEDDING]].dtype,
        size=lambda dtype: n_kept * dtype.itemsize,
        name=f"{name}, streamed,",
        mapped=False,
    )
    place_of = {stored[end]: places[end] for end in ends}
    for tensor in tensors.in_file_order(place_of):
        weight = nn.Parameter(tensors.read(tensor, dtype, device), requires_grad=False)
        for module, attribute in place_of[tensor]:
            setattr(module, attribute, weight)
    model.placement = Streamer(model, tensors, names, dtype, device)
    refuse_moving(model)


class _Buffer:
    """Memory for the weights of one block, used for one block after the other."""

    def __init__(self, shapes: dict[str, torch.Size], dtype: torch.dtype, device: torch.device):
        self.layer: int | None = None  # whose weights it holds, complete
        self.shown: int | None = None  # the block that has these parameters in place
        self.parameters = {
            name: nn.Parameter(aligned(tuple(shape), dtype, device), requires_grad=False)
            for name, shape in shapes.items()
        }


class _Reading:
    """A thread that fills a buffer with a block's weights, and ends.

    Its end is told by an event: before Python 3.13 an interrupt of `Thread.join` marks a thread that
    still runs as ended, and it would go on writing into a buffer that is used for another block.
    """

    def __init__(self, layer: int, buffer: _Buffer, fill: Callable[[Callable[[], bool]], None]):
        self.layer, self.buffer, self._fill = layer, buffer, fill
        self._stop, self._ended = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"optlens-read-block-{layer}", daemon=True
        )

    def start(self) -> None:
        """Begin to read. An interrupt leaves it open whether the thread runs; it is told to end."""
        try:
            self._thread.start()
        except BaseException:
            self._stop.set()
            if self._thread.is_alive():
                self._ended.wait()
            raise

    def _run(self) -> None:
        try:
            self._fill(self._stop.is_set)
        except BaseException as error:  # it is raised where the weights are waited for
            self._error = error
        finally:
            self._ended.set()

    def wait(self) -> None:
        """Wait until the buffer is full."""
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def serves(self, layer: int) -> bool:
        """Tell whether a block's weights are coming, from a thread that nobody has stopped."""
        return self.layer == layer and not self._stop.is_set()

    def stop(self) -> None:
        """End the thread after the piece that it is reading."""
        self._stop.set()
        self._ended.wait()
        self._thread.join()


class Streamer:
    """Brings the weights of a model's blocks into memory, one block at a time.

    One run at a time uses the buffers: a second thread's forward pass waits for the first to end.

    Attributes:
        no_saving: Why the model cannot be saved.
    """

    no_saving = (
        "A streamed model is not saved: its blocks are on the disk already, in the checkpoint that "
        'it was loaded from. Copy that folder, or load without device_map="stream".'
    )

    def __init__(
        self,
        model: nn.Module,
        stored: StoredTensors,
        names: list[dict[str, str]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Take over the blocks of a model that has no values yet.

        Args:
            model: The model, on the meta device.
            stored: Where the weights are.
            names: For each block, the name of a parameter inside it ("fc1.weight") to the
                canonical name of the stored tensor.
            dtype: To compute in.
            device: Where blocks run.
        """
        self._stored, self._names, self._dtype, self._device = stored, names, dtype, device
        self._lock = threading.RLock()
        self._buffers: list[_Buffer] = []
        self._reading: _Reading | None = None
        self._held: int | None = None
        self._samples: dict[str, Tensor] = {}
        self._layers = list(model.decoder.layers)
        self._last = len(self._layers) - 1
        self._hook_points = list(model.hook_dict.values())
        self._shapes = {name: self._layers[0].get_parameter(name).shape for name in names[0]}
        self._on_disk = [self._placeholders(layer) for layer in range(len(self._layers))]
        for layer in range(len(self._layers)):
            self._show(layer, self._on_disk[layer])
        self._attach(model.decoder)

    def __str__(self) -> str:
        """Say where the weights are, for `model.summary()`."""
        block = sum(shape.numel() for shape in self._shapes.values()) * self._dtype.itemsize
        return (
            f"blocks are streamed from disk to {self._device}: at most 2 of {len(self._layers)} in "
            f"memory ({describe_bytes(2 * block)})"
        )

    def __deepcopy__(self, memo: dict) -> Streamer:
        raise StreamError(
            'A streamed model cannot be copied; load it again, or without device_map="stream".'
        )

    def __reduce_ex__(self, protocol: int) -> Any:
        raise StreamError(
            "A streamed model cannot be pickled; its weights are in its checkpoint's files already."
        )

    # ------------------------------------------------------------------------- reading

    def _placeholders(self, layer: int) -> dict[str, OnDisk]:
        made = {}
        for name, shape in self._shapes.items():
            stored = self._names[layer][name]
            made[name] = OnDisk.make(
                f"{name} of block {layer}",
                shape,
                self._dtype,
                lambda stored=stored: self._stored.read(stored, self._dtype, self._device),
                lambda stored=stored: self._sample(stored),
            )
        return made

    def _sample(self, stored: str) -> Tensor:
        """Return the sample of a weight for fingerprints; a run has left those of its blocks."""
        if stored not in self._samples:
            weight = self._stored.read(stored, self._dtype, self._device)
            self._samples[stored] = weight_sample(weight).to("cpu", torch.float32, copy=True)
        return self._samples[stored]

    def _fill(self, layer: int, buffer: _Buffer, stopped: Callable[[], bool]) -> None:
        targets = {
            stored: buffer.parameters[name].data for name, stored in self._names[layer].items()
        }
        self._stored.fill(targets, stopped)
        for stored, target in targets.items():
            if stored not in self._samples:
                self._samples[stored] = weight_sample(target).to("cpu", torch.float32, copy=True)
        buffer.layer = layer

    def _start_reading(self, layer: int) -> None:
        """Begin to fill the buffer that the running block does not use."""
        self._stop_reading()  # one whose stopping was interrupted
        if not self._buffers:
            pair = range(min(2, len(self._layers)))
            self._buffers = [_Buffer(self._shapes, self._dtype, self._device) for _ in pair]
        # a block's work on a GPU may not be done yet; in the same queue, the copy comes after it
        on_gpu = self._device.type == "cuda"
        queue = torch.cuda.current_stream(self._device) if on_gpu else None
        buffer = next(b for b in self._buffers if self._held is None or b.layer != self._held)
        self._take_out(buffer)
        buffer.layer = None

        def fill(stopped: Callable[[], bool]) -> None:
            with torch.no_grad(), torch.cuda.stream(queue) if on_gpu else nullcontext():
                self._fill(layer, buffer, stopped)

        reading, place = _Reading(layer, buffer, fill), self._buffers.index(buffer)
        try:
            reading.start()
        except BaseException:  # what may still write into this buffer must find nobody using it
            self._buffers[place] = _Buffer(self._shapes, self._dtype, self._device)
            raise
        self._reading = reading

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.stop()
            self._reading = None  # not before: an interrupt may leave it to the next run

    # --------------------------------------------------------------------- weights in place

    def hold(self, layer: int) -> None:
        """Have a block's weights in place, and begin to read the next block's.

        Raises:
            CheckpointError: If they cannot be read.
        """
        if self._held == layer:
            return
        with self._lock:
            self._held = None
            if self._reading is not None and not self._reading.serves(layer):
                self._stop_reading()
            buffer = self._buffer_of(layer)
            if buffer is None:
                if self._reading is None:
                    self._start_reading(layer)
                reading = self._reading
                try:
                    reading.wait()
                finally:
                    self._stop_reading()
                buffer = reading.buffer
            buffer.shown = layer
            self._show(layer, buffer.parameters)
            self._held = layer
            if layer < self._last and self._buffer_of(layer + 1) is None:
                self._start_reading(layer + 1)

    def _buffer_of(self, layer: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.layer == layer), None)

    def _take_out(self, buffer: _Buffer) -> None:
        """Give a buffer's block its placeholders back."""
        if buffer.shown is not None:
            self._show(buffer.shown, self._on_disk[buffer.shown])
            buffer.shown = None

    def _show(self, layer: int, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            path, _, attribute = name.rpartition(".")
            self._layers[layer].get_submodule(path)._parameters[attribute] = parameter

    # --------------------------------------------------------------------- during a run

    def _begin(self, blocks: range) -> None:
        """Read the first of the blocks that a run goes through at once."""
        if blocks and self._held is None and self._buffer_of(blocks[0]) is None:
            self._stop_reading()
            self._start_reading(blocks[0])

    def _end(self) -> None:
        """Leave no thread and show no weights."""
        self._held = None
        for buffer in self._buffers:
            self._take_out(buffer)
        self._stop_reading()  # last, as one has to wait for it, and may be interrupted

    def _attach(self, decoder: nn.Module) -> None:
        run_blocks = decoder.forward

        def forward(inputs: Any, *args: Any, **options: Any) -> Any:
            if any(point.gradient_hooks for point in self._hook_points):
                raise StreamError(_NO_GRADIENT)
            with self._lock:
                last, self._last = self._last, inputs.blocks[-1] if inputs.blocks else -1
                try:
                    self._begin(inputs.blocks)
                    resid, *rest = run_blocks(inputs, *args, **options)
                finally:
                    self._last = last
                    self._end()
            if torch.is_grad_enabled() and not resid.requires_grad and inputs.blocks:
                resid = _EndOfGradient.apply(resid, torch.zeros((), requires_grad=True))
            return resid, *rest

        decoder.forward = forward
        for number, layer in enumerate(self._layers):
            for module in layer.modules():
                if module is layer or next(module.parameters(recurse=False), None) is not None:
                    module.register_forward_pre_hook(_Ask(self, number))


class _Ask:
    """A forward pre-hook that has a block's weights put in place."""

    def __init__(self, streamer: Streamer, layer: int) -> None:
        self._streamer, self._layer = streamer, layer

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled() and isinstance(args[0], Tensor) and args[0].requires_grad:
            raise StreamError(_NO_GRADIENT)
        self._streamer.hold(self._layer)


class _EndOfGradient(torch.autograd.Function):
    """Passes a value on, and refuses its gradient."""

    @staticmethod
    def forward(ctx: Any, resid: Tensor, anchor: Tensor) -> Tensor:
        return resid.view_as(resid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise StreamError(_NO_GRADIENT)


def refuse_moving(model: nn.Module) -> None:
    """Have `model.to`, `.half()` and their like raise before they convert a part of the model."""

    def refuse(*args: Any, **options: Any) -> None:
        raise StreamError(
            "A streamed model stays where it is and in its dtype: its blocks are on the disk. "
            'Load it again with device= or dtype= beside device_map="stream".'
        )

    model._apply = refuse
