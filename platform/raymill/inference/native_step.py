"""The step as one call into compiled code (native/*.cpp): the CPU default. Loads neither torch nor numba.

In: a checkpoint's folder of any architecture, fp32, int8 or int4. The matrices are packed for the kernels as they are read,
so a model is in memory once: 110 MB for 125M parameters in int8, loaded in about a second. Per call Python writes the
chunks into one list of integers and hands it over: 2 us, and 0.25 us for each further sequence. Logits lie in
memory that the next call overwrites.

What a row gives is the same to the bit whatever stands beside it, however its prompt was cut, on any number of threads.

Shapes: those of step.py, and C head_width, F hidden_dim, K columns of a matrix, r rank of an adapter.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymill.errors import ArtifactError, MachineError
from raymill.inference import native
from raymill.inference.joins import Place, joins, not_in_blocks, places
from raymill.inference.kv_cache import KvPrecision
from raymill.inference.native import door
from raymill.inference.native.build import Target
from raymill.inference.native_weights import EMBEDDING, HEAD, POSITIONS, CheckpointWeights, StoredMatrix
from raymill.inference.step import Chunk, Floats, PageTable, StepOutput
from raymill.memory import give_back_memory
from raymill.model.angles import rotary_angles

_KEPT_ROWS = 64
"""Room for logits that is kept between calls; more, asked for in one call, is given back."""
_LINE_BYTES = 64
"""A cache line: packed matrices begin at one."""
_PIECE_BYTES = 32 * 2**20
"""Memory for packed matrices is taken in pieces of so much, or of a matrix's size where that is larger."""

_CLOSED = "a step was refused: it was closed, or this process is a fork of the one that made it"
_open: weakref.WeakSet[NativeStep] = weakref.WeakSet()


class NativeStep:
    """`ModelStep` over compiled code. Not for two threads at once."""

    def __init__(
        self, library: ctypes.CDLL, weights: CheckpointWeights, num_pages: int, kv: KvPrecision, threads: int
    ) -> None:
        self.vocab_size, self.num_pages = weights.vocab_size, num_pages
        self.max_seq_len = weights.config.max_seq_len
        self._config = weights.config
        self._library = door.declare(library)
        self._kept: list[NDArray[Any]] = []  # what compiled code reads, beside the matrices
        self._memory = _MatrixMemory()
        shape = _shape(weights, num_pages, kv, threads)
        self._model = library.raymill_model_new(ctypes.byref(shape))
        _open.add(self)
        if not self._model:
            raise MachineError(
                "the native engine cannot start",
                why=f"no memory for {num_pages} pages of KV cache, or no {threads} threads",
                fix="lower serve.max_kv_cache_mib, or the serve role's threads",
            )
        self._hand_over(weights)
        self._hidden_scale_D = weights.head_input_scale()
        weights.check_all_read()
        self._logits = np.empty((0, self.vocab_size), np.float32)
        self._logits_at = 0
        self._table: PageTable | None = None
        self._table_at: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        num_pages: int,
        kv_precision: KvPrecision,
        threads: int,
        target: Target | None = None,
    ) -> NativeStep:
        """The checkpoint in `folder`. ArtifactError when it is not whole, MachineError without compiled code.

        `target` (native.library) is for tests.
        """
        library = native.library(target)
        if library is None:
            raise MachineError("there is no compiled step", fix="install a C++ compiler, or use the torch step")
        step = cls(library, CheckpointWeights(folder), num_pages, kv_precision, threads)
        give_back_memory()  # what reading left, the tokenizer's too: 13 MB with a vocabulary of 32,000
        return step

    def __call__(self, chunks: Sequence[Chunk], table: PageTable) -> StepOutput:
        words: list[int] = []
        num_logits = num_hidden = 0
        for chunk in chunks:
            ids = chunk.ids
            count, wanted, hidden = len(ids), chunk.num_logits, chunk.wants_hidden
            words += (chunk.slot, chunk.start, count, wanted, chunk.adapter, hidden)
            words += ids
            num_logits += wanted
            if hidden:
                num_hidden += count
        logits_NV = self._room(num_logits)
        hidden_ND = np.empty((num_hidden, self._config.model_dim), np.float32) if num_hidden else None
        hidden_at = None if hidden_ND is None else hidden_ND.ctypes.data
        if self._model is None:
            raise ValueError(_CLOSED)
        packed = array("i", words)
        at, length = packed.buffer_info()
        place = self._table_at if table is self._table else self._find_table(table)
        refusal = self._library.raymill_step(
            self._model, at, length, *place, self._logits_at, num_logits, hidden_at, num_hidden
        )
        if refusal:
            raise ValueError(f"a step was refused: {door.REFUSALS[refusal]}")
        if hidden_ND is not None and self._hidden_scale_D is not None:
            hidden_ND *= self._hidden_scale_D
        return StepOutput(logits_NV, hidden_ND)

    def load_adapter(self, tensors: dict[str, tuple[Floats, Floats]], scale: float) -> int:
        """See ModelStep. ArtifactError where a tensor belongs to no matrix of the blocks, or is of another shape."""
        if self._model is None:
            raise ValueError(_CLOSED)
        found = places(self._config)
        unknown = next((name for name in sorted(tensors) if name not in found), None)
        if unknown is not None:
            raise not_in_blocks(unknown)
        deltas = [(found[name], self._delta(name, found[name], *pair, scale)) for name, pair in sorted(tensors.items())]
        number: int = self._library.raymill_adapter_new(self._model)
        for place, delta in deltas:
            kind = door.KINDS.index(place.join.name)
            self._library.raymill_adapter_part(self._model, number, place.layer, kind, ctypes.byref(delta))
        return number

    def close(self) -> None:
        """Ends its threads and gives its memory back; a call that follows is refused. In a fork of the process that made it
        it is closed from the start."""
        if self._model:
            self._library.raymill_model_free(self._model)
            self._model = None

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self.close()

    def _room(self, rows: int) -> Floats:
        """Where the logits go: the kept rows, or for very many some of their own."""
        if rows > len(self._logits):
            room = np.empty((rows, self.vocab_size), np.float32)
            if rows > _KEPT_ROWS:
                self._logits_at = room.ctypes.data
                self._logits = self._logits[:0]  # the kept rows' address is gone
                return room
            self._logits = room
            self._logits_at = room.ctypes.data
        return self._logits[:rows]

    def _find_table(self, table: PageTable) -> tuple[int, int, int]:
        assert table.dtype == np.int32 and table.ndim == 2 and table.flags.c_contiguous
        self._table, self._table_at = table, (table.ctypes.data, *table.shape)
        return self._table_at

    def _keep(self, array: NDArray[Any]) -> int:
        """The address of an array that stays as long as the model."""
        self._kept.append(array)
        return array.ctypes.data

    def _hand_over(self, weights: CheckpointWeights) -> None:
        config = self._config
        vocab, dim = self.vocab_size, config.model_dim
        embedding = self._pack(weights.matrix((EMBEDDING,), (vocab,), dim), None)
        head = embedding if config.tie_embeddings else self._pack(weights.matrix((HEAD,), (vocab,), dim), None)
        self._library.raymill_model_matrix(self._model, door.OF_EMBEDDING, 0, ctypes.byref(embedding))
        self._library.raymill_model_matrix(self._model, door.OF_HEAD, 0, ctypes.byref(head))
        for number in range(config.num_layers):
            self._hand_over_layer(weights, number)
        vectors = self._norm(weights, "last_norm", "model.norm")
        if config.rotary:
            vectors.update(zip(("cos", "sin"), rotary_angles(config), strict=True))
        else:
            vectors["positions"] = weights.vector(POSITIONS, config.max_seq_len, dim)
        self._give_vectors(-1, door.MODEL_VECTORS, vectors)

    def _hand_over_layer(self, weights: CheckpointWeights, number: int) -> None:
        prefix = f"model.layers.{number}"
        for join in joins(self._config):
            names = tuple(f"{prefix}.{name}" for name in join.matrices)
            bias = None
            if join.bias:
                parts = (weights.vector(f"{name}.bias", rows) for name, rows in zip(names, join.rows, strict=True))
                bias = np.concatenate(list(parts))
            matrix = self._pack(weights.matrix(names, join.rows, join.columns), bias)
            kind = door.KINDS.index(join.name)
            self._library.raymill_model_matrix(self._model, number, kind, ctypes.byref(matrix))
        vectors = self._norm(weights, "norm", f"{prefix}.input_layernorm")
        vectors |= self._norm(weights, "next_norm", f"{prefix}.post_attention_layernorm")
        if self._config.qk_norm:
            width = self._config.head_width
            vectors["query_norm"] = weights.vector(f"{prefix}.self_attn.q_norm.weight", width)
            vectors["key_norm"] = weights.vector(f"{prefix}.self_attn.k_norm.weight", width)
        self._give_vectors(number, door.VECTORS, vectors)

    def _norm(self, weights: CheckpointWeights, ours: str, theirs: str) -> dict[str, Floats]:
        kinds = {ours: "weight"} if self._config.gated else {ours: "weight", f"{ours}_bias": "bias"}
        return {name: weights.vector(f"{theirs}.{kind}", self._config.model_dim) for name, kind in kinds.items()}

    def _give_vectors(self, layer: int, kinds: tuple[str, ...], vectors: dict[str, Floats]) -> None:
        for name, vector in vectors.items():
            self._library.raymill_model_vector(self._model, layer, kinds.index(name), self._keep(vector))

    def _pack(self, matrix: StoredMatrix, bias: Floats | None) -> door.Matrix:
        form = (matrix.rows, matrix.columns, matrix.group_size)
        at = self._memory.take(self._library.raymill_packed_bytes(matrix.precision, *form))
        scales = None if matrix.scale is None else matrix.scale.ctypes.data
        self._library.raymill_pack(matrix.precision, matrix.weight.ctypes.data, scales, *form, at)
        return door.Matrix(matrix.precision, *form, at, None if bias is None else self._keep(bias))

    def _delta(self, name: str, place: Place, a_rK: Floats, b_Nr: Floats, scale: float) -> door.Delta:
        """An adapter's part of one matrix, and where in the joined one it adds that."""
        rows, columns = place.shape
        if a_rK.ndim != 2 or a_rK.shape[1] != columns or b_Nr.shape != (rows, len(a_rK)):
            why = f"A is {a_rK.shape} and B {b_Nr.shape} for a matrix of {place.shape}"
            raise ArtifactError(f"an adapter does not fit {name}", why=why, fix="name an adapter of this very model")
        down = self._keep(np.ascontiguousarray(a_rK, np.float32))
        up = self._keep(np.ascontiguousarray((b_Nr * np.float32(scale)).T, np.float32))
        return door.Delta(len(a_rK), columns, place.first, rows, down, up)


def _leave_to_parent() -> None:
    """In a fork no step has its threads: to end them would wait for ever. Its memory goes with the process."""
    for step in _open:
        step._model = None


os.register_at_fork(after_in_child=_leave_to_parent)


class _MatrixMemory:
    """Memory for packed matrices, in pages of 2 MB where the system has them: a step reads all of it, in order."""

    def __init__(self) -> None:
        self._pieces: list[NDArray[np.uint8]] = []
        self._left_bytes = 0

    def take(self, count_bytes: int) -> int:
        """The address of so many bytes at the beginning of a cache line."""
        count_bytes = -(-count_bytes // _LINE_BYTES) * _LINE_BYTES
        if count_bytes > self._left_bytes:
            # Private: shared memory, which mmap gives otherwise, gets no large pages.
            piece = mmap.mmap(-1, max(count_bytes, _PIECE_BYTES), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    piece.madvise(mmap.MADV_HUGEPAGE)
            self._pieces.append(np.frombuffer(piece, np.uint8))
            self._left_bytes = len(piece)
        piece_at: int = self._pieces[-1].ctypes.data
        at = piece_at + len(self._pieces[-1]) - self._left_bytes
        self._left_bytes -= count_bytes
        return at


def _shape(weights: CheckpointWeights, num_pages: int, kv: KvPrecision, threads: int) -> door.Shape:
    config = weights.config
    return door.Shape(
        layers=config.num_layers,
        dim=config.model_dim,
        hidden=config.hidden_dim,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        width=config.head_width,
        vocab=weights.vocab_size,
        max_seq_len=config.max_seq_len,
        window=min(config.sliding_window or 0, config.max_seq_len),
        gated=config.gated,
        rotary=config.rotary,
        int8_cache=kv == "int8",
        pages=num_pages,
        threads=threads,
        eps=config.norm_eps,
    )
