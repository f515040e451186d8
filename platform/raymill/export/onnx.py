"""A checkpoint as an ONNX graph of the decoder with its KV cache, for onnxruntime and whatever else reads ONNX.

In: a checkpoint of any method. Out: model.onnx, its weights in model.onnx_data, and beside them config.json and the
tokenizer's files as transformers reads them. The graph is written node by node: it holds what is computed and nothing a
tracer would leave there, and needs no torch export. Opset 17, the oldest with LayerNormalization.

    in   input_ids (B, T), attention_mask (B, P + T), position_ids (B, T), past_key_values.<layer>.key|value (B, K, P, C)
    out  logits (B, T, V), present.<layer>.key|value (B, K, P + T, C)

These are the names Optimum gives. P may be 0; what attention_mask masks (padding, to the left) no query sees. As int8 an
int8 checkpoint keeps its arithmetic: rows of activations are quantized as they come, products are MatMulInteger, exact.

Shapes: B batch, T new positions, P past positions, S = P + T, V vocab_size, D model_dim, H num_heads, K num_kv_heads,
G = H / K, C head_width; of a matrix N output channels, M input channels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from raymill.export.hugging_face import NOTE, write_beside_weights
from raymill.export.source import Quantized, Source
from raymill.model.rope import rotary_tables

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto, ValueInfoProto

OPSET = 17
_IR_VERSION = 8  # the one of opset 17; the library would write its newest, which older runtimes refuse
FILE, WEIGHTS_FILE = "model.onnx", "model.onnx_data"
_MASKED = -3e38
"""Added to scores that must not count. Not infinity: a row of padding sees nothing, and would be NaN."""
_SMALLEST_SCALE = 1e-12  # as in compression/int8.py
_FLOAT, _INT8, _BOOL = 1, 3, 9
"""onnx.TensorProto's numbers of the types, which the format fixes."""


def write(source: Source, folder: Path, precision: str) -> list[str]:
    """Writes graph, weights, settings and tokenizer."""
    import onnx
    from onnx import helper

    graph = _Graph(source, exact_int8=precision == "int8")
    inputs, outputs = graph.decoder()
    made = helper.make_graph(graph.nodes, source.config.architecture, inputs, outputs, graph.tensors)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="raymill")
    onnx.save_model(model, str(folder / FILE), save_as_external_data=True, location=WEIGHTS_FILE, size_threshold=1024)
    write_beside_weights(source, folder, torch.float32, {})
    return [NOTE]


class _Graph:
    """Nodes and tensors of one decoder as they are added; a value is known by its name."""

    def __init__(self, source: Source, *, exact_int8: bool) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self._source = source
        self._config = source.config
        self._exact_int8 = exact_int8
        self._known: set[str] = set()

    def decoder(self) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
        """Adds everything; returns the graph's inputs and outputs."""
        from onnx import TensorProto, helper

        config = self._config
        whole, floats = TensorProto.INT64, TensorProto.FLOAT
        ids = {"input_ids": ["B", "T"], "attention_mask": ["B", "S"], "position_ids": ["B", "T"]}
        inputs = [helper.make_tensor_value_info(name, whole, shape) for name, shape in ids.items()]
        outputs = [helper.make_tensor_value_info("logits", floats, ["B", "T", self._source.vocab_size])]
        x_BTD = self._embed()
        bias = self._mask()
        turns = self._turns() if config.rotary else None
        for number in range(config.num_layers):
            for kind in ("key", "value"):
                past, present = f"past_key_values.{number}.{kind}", f"present.{number}.{kind}"
                shape: list[str | int | None] = ["B", config.num_kv_heads, "P", config.head_width]
                inputs.append(helper.make_tensor_value_info(past, floats, shape))
                shape = ["B", config.num_kv_heads, "S", config.head_width]
                outputs.append(helper.make_tensor_value_info(present, floats, shape))
            x_BTD = self._block(number, x_BTD, bias, turns)
        normed = self._norm("model.norm", x_BTD)
        head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
        self._add("Identity", self._linear(head, normed), out="logits")
        return inputs, outputs

    def _block(self, number: int, x_BTD: str, bias: str, turns: tuple[str, str] | None) -> str:
        name = f"model.layers.{number}"
        normed = self._norm(f"{name}.input_layernorm", x_BTD)
        x_BTD = self._add("Add", x_BTD, self._attention(number, normed, bias, turns))
        normed = self._norm(f"{name}.post_attention_layernorm", x_BTD)
        up = self._linear(f"{name}.mlp.up_proj", normed)
        if self._config.gated:
            gate = self._linear(f"{name}.mlp.gate_proj", normed)
            inner = self._add("Mul", self._add("Mul", gate, self._add("Sigmoid", gate)), up)
        else:
            inner = self._gelu(up)
        return self._add("Add", x_BTD, self._linear(f"{name}.mlp.down_proj", inner))

    def _attention(self, number: int, normed_BTD: str, bias: str, turns: tuple[str, str] | None) -> str:
        config, name = self._config, f"model.layers.{number}.self_attn"
        groups, width = config.num_heads // config.num_kv_heads, config.head_width
        heads: dict[str, str] = {}
        for part in "qkv":
            shape = self._whole([0, 0, -1, width])
            heads[part] = self._add("Reshape", self._linear(f"{name}.{part}_proj", normed_BTD), shape)
            if config.qk_norm and part != "v":
                heads[part] = self._norm(f"{name}.{part}_norm", heads[part])
            if turns is not None and part != "v":
                heads[part] = self._turn(heads[part], *turns)
        kept = {}
        for part, kind in (("k", "key"), ("v", "value")):
            new_BKTC = self._add("Transpose", heads[part], perm=[0, 2, 1, 3])
            past, present = f"past_key_values.{number}.{kind}", f"present.{number}.{kind}"
            kept[part] = self._add("Concat", past, new_BKTC, axis=2, out=present)
        grouped = self._add("Reshape", heads["q"], self._whole([0, 0, config.num_kv_heads, groups, width]))
        q_BKGTC = self._add("Transpose", grouped, perm=[0, 2, 3, 1, 4])
        k_BK1CS = self._add("Unsqueeze", self._add("Transpose", kept["k"], perm=[0, 1, 3, 2]), self._whole([2]))
        scores = self._add("MatMul", q_BKGTC, k_BK1CS)
        scores = self._add("Mul", scores, self._number(1 / math.sqrt(width)))
        shares = self._add("Softmax", self._add("Add", scores, bias), axis=-1)
        y_BKGTC = self._add("MatMul", shares, self._add("Unsqueeze", kept["v"], self._whole([2])))
        y_BTKGC = self._add("Transpose", y_BKGTC, perm=[0, 3, 1, 2, 4])
        y_BTN = self._add("Reshape", y_BTKGC, self._whole([0, 0, config.num_heads * width]))
        return self._linear(f"{name}.o_proj", y_BTN)

    def _embed(self) -> str:
        weight = self._source.weights["model.embed_tokens.weight"]
        if self._exact_int8 and isinstance(weight, Quantized):
            values, scale = self._quantized("model.embed_tokens", weight)
            rows = self._add("Cast", self._add("Gather", values, "input_ids"), to=_FLOAT)
            x_BTD = self._add("Mul", rows, self._add("Gather", scale, "input_ids"))
        else:
            x_BTD = self._add("Gather", self._weight("model.embed_tokens.weight"), "input_ids")
        if self._config.rotary:
            return x_BTD
        positions = self._add("Gather", self._weight("model.embed_positions.weight"), "position_ids")
        return self._add("Add", x_BTD, positions)

    def _mask(self) -> str:
        """(B, 1, 1, T, S): 0 where a query sees a key."""
        nothing, one = self._tensor("zero", np.array(0)), self._tensor("one", np.array(1))
        length = self._add("Gather", self._add("Shape", "input_ids"), one)
        total = self._add("Gather", self._add("Shape", "attention_mask"), one)
        keys_S = self._add("Range", nothing, total, one)
        queries_T1 = self._add("Unsqueeze", self._add("Range", self._add("Sub", total, length), total, one), one)
        seen = self._add("LessOrEqual", keys_S, queries_T1)
        window = self._config.sliding_window
        if window is not None:
            first = self._add("Sub", queries_T1, self._tensor("window", np.array(window)))
            seen = self._add("And", seen, self._add("Greater", keys_S, first))
        real_BS = self._add("Cast", "attention_mask", to=_BOOL)
        real = self._add("Unsqueeze", real_BS, self._whole([1, 2, 3]))
        return self._add("Where", self._add("And", seen, real), self._number(0.0), self._number(_MASKED))

    def _turns(self) -> tuple[str, str]:
        """Cosines and sines of every position, each (B, T, 1, C/2)."""
        names = []
        for name, table_TC in zip(("cosines", "sines"), rotary_tables(self._config), strict=True):
            half = table_TC[:, : self._config.head_width // 2].contiguous()
            rows = self._add("Gather", self._tensor(name, half.numpy()), "position_ids")
            names.append(self._add("Unsqueeze", rows, self._whole([2])))
        return names[0], names[1]

    def _turn(self, x_BTHC: str, cos: str, sin: str) -> str:
        first, second = f"{x_BTHC}.first", f"{x_BTHC}.second"
        self._node("Split", [x_BTHC], [first, second], axis=-1)
        turned = self._add("Sub", self._add("Mul", first, cos), self._add("Mul", second, sin))
        other = self._add("Add", self._add("Mul", second, cos), self._add("Mul", first, sin))
        return self._add("Concat", turned, other, axis=-1)

    def _norm(self, name: str, x: str) -> str:
        weight = self._weight(f"{name}.weight")
        epsilon = self._config.norm_eps
        if f"{name}.bias" in self._source.weights:
            return self._add("LayerNormalization", x, weight, self._weight(f"{name}.bias"), epsilon=epsilon)
        squares = self._add("ReduceMean", self._add("Mul", x, x), axes=[-1])
        size = self._add("Sqrt", self._add("Add", squares, self._number(epsilon)))
        return self._add("Mul", self._add("Div", x, size), weight)

    def _gelu(self, x: str) -> str:
        """GPT-2's approximation by tanh."""
        cube = self._add("Mul", self._add("Mul", x, x), x)
        inner = self._add("Add", x, self._add("Mul", cube, self._number(0.044715)))
        bent = self._add("Tanh", self._add("Mul", inner, self._number(math.sqrt(2 / math.pi))))
        half = self._add("Mul", x, self._number(0.5))
        return self._add("Mul", half, self._add("Add", bent, self._number(1.0)))

    def _linear(self, name: str, x: str) -> str:
        weight = self._source.weights[f"{name}.weight"]
        if self._exact_int8 and isinstance(weight, Quantized):
            y = self._linear_int8(name, weight, x)
        else:
            y = self._add("MatMul", x, self._add("Transpose", self._weight(f"{name}.weight"), perm=[1, 0]))
        bias = f"{name}.bias"
        return self._add("Add", y, self._weight(bias)) if bias in self._source.weights else y

    def _linear_int8(self, name: str, weight: Quantized, x: str) -> str:
        """Rows of x as int8 and a scale, symmetric, rounded to even; sums in int32."""
        values, scale_N1 = self._quantized(name, weight)
        largest = self._add("ReduceMax", self._add("Abs", x), axes=[-1])
        scale = self._add("Max", self._add("Div", largest, self._number(127.0)), self._number(_SMALLEST_SCALE))
        rounded = self._add("Cast", self._add("Round", self._add("Div", x, scale)), to=_INT8)
        sums = self._add("MatMulInteger", rounded, self._add("Transpose", values, perm=[1, 0]))
        of_weight = self._add("Reshape", scale_N1, self._whole([-1]))
        return self._add("Mul", self._add("Mul", self._add("Cast", sums, to=_FLOAT), of_weight), scale)

    def _quantized(self, name: str, weight: Quantized) -> tuple[str, str]:
        values = self._tensor(f"{name}.weight", weight.values_NK.numpy())
        return values, self._tensor(f"{name}.weight_scale", weight.scale_NG.numpy())

    def _weight(self, name: str) -> str:
        return name if name in self._known else self._tensor(name, self._source.full(name).float().numpy())

    def _number(self, value: float) -> str:
        return self._tensor(f"number.{value!r}", np.array(value, np.float32))

    def _whole(self, values: list[int]) -> str:
        return self._tensor(f"whole.{'_'.join(map(str, values))}", np.array(values, np.int64))

    def _tensor(self, name: str, values: NDArray[Any]) -> str:
        from onnx import numpy_helper

        if name not in self._known:
            self._known.add(name)
            self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))
        return name

    def _add(self, kind: str, *inputs: str, out: str | None = None, **settings: Any) -> str:
        """One node with one output, whose name it returns."""
        made = out or f"{kind}_{len(self.nodes)}"
        self._node(kind, list(inputs), [made], **settings)
        return made

    def _node(self, kind: str, inputs: list[str], outputs: list[str], **settings: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, name=f"{kind}_{len(self.nodes)}", **settings))
