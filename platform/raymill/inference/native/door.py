"""The compiled step's structures and functions as ctypes sees them: what model.h, matmul.h and door.cpp declare."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

KINDS = ("qkv", "out", "up", "down")
"""Matrices of a layer, joined (joins.py)."""
OF_HEAD, OF_EMBEDDING = -1, -2
"""In place of a layer."""
VECTORS = ("norm", "norm_bias", "next_norm", "next_norm_bias", "query_norm", "key_norm")
"""Of a layer."""
MODEL_VECTORS = ("last_norm", "last_norm_bias", "positions", "cos", "sin")
"""Of none."""
REFUSALS = (
    "",
    "its list of chunks does not add up",
    "a chunk's slot has no row in the page table",
    "a chunk's positions reach beyond max_seq_len or its pages",
    "the page table names a page that is not there",
    "an id is outside the vocabulary",
    "a chunk asks for more logits than it has ids",
    "a chunk names an adapter that was not loaded",
    "there is too little room for what it gives",
    "there is too little memory",
)


class Shape(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in ("layers", "dim", "hidden", "heads", "kv_heads", "width", "vocab", "max_seq_len")
        ),
        *((name, c_int32) for name in ("window", "gated", "rotary", "int8_cache", "pages", "threads")),
        ("eps", c_float),
    ]


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("precision", "rows", "columns", "group")),
        ("packed", c_void_p),
        ("bias", c_void_p),
    ]


class Delta(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rank", "columns", "first", "rows")),
        ("down", c_void_p),
        ("up", c_void_p),
    ]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "raymill_model_new": (c_void_p, [POINTER(Shape)]),
    "raymill_model_free": (None, [c_void_p]),
    "raymill_model_matrix": (None, [c_void_p, c_int, c_int, POINTER(Matrix)]),
    "raymill_model_vector": (None, [c_void_p, c_int, c_int, c_void_p]),
    "raymill_adapter_new": (c_int, [c_void_p]),
    "raymill_adapter_part": (None, [c_void_p, c_int, c_int, c_int, POINTER(Delta)]),
    "raymill_packed_bytes": (c_int64, [c_int, c_int, c_int, c_int]),
    "raymill_pack": (None, [c_int, c_void_p, c_void_p, c_int, c_int, c_int, c_void_p]),
    "raymill_step": (
        c_int,
        [c_void_p, c_void_p, c_int64, c_void_p, c_int, c_int, c_void_p, c_int64, c_void_p, c_int64],
    ),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tells ctypes what the functions take and give."""
    for name, (gives, takes) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = gives, takes
    return library
