"""One decoder-only transformer for the families ORPO is used on, exact against transformers, in and out.

    model = Transformer.from_pretrained("HuggingFaceTB/SmolLM2-135M")      # a directory or a hub id; safetensors only
    model.logits(tokens)                                                   # (B, T) ids -> (B, T, vocab): the plain teaching path
    model(batch)                                                           # a packed batch (data.pack) -> log-probability of each target
    model.save_pretrained("out")                                           # what transformers loads again

Notation:  T positions in a pack, B sequences, C hidden size, D head_dim, E experts, V vocabulary.
Parameters carry Hugging Face's Llama names. A family differs from Llama by a row of FAMILIES and, on disk, by a row of RENAMES.
"""
import inspect
import json
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from data import MODEL_FILES, UserError, fetch, read_json

# varlen_attn changed between releases: 2.11 takes grouped heads as they come, later ones want to be told
GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
ONEDNN = torch.backends.mkldnn.is_available()
SHARD_BYTES = 5 * 10**9  # larger models are saved in files of at most this size, with an index

# ---------------------------------------------------------------------------------------------------------------------
# The families, as data.

# config.json's older and other names -> the one used here
CONFIG_KEYS = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings", "ffn_dim": "intermediate_size", "activation_function": "hidden_act",
    "rms_norm_eps": "norm_eps", "layer_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps",
    "num_local_experts": "num_experts", "word_embed_proj_dim": "embed_dim", "qk_layernorm": "qk_norm",
}
GPT_LIKE = dict(norm="layer", norm_eps=1e-5, gated=False, qkv_bias=True, out_bias=True, mlp_bias=True)  # LayerNorm, plain MLP, biases
FAMILIES = {
    "llama": dict(),
    "mistral": dict(sliding_window=4096),
    "qwen2": dict(qkv_bias=True, sliding_window=4096),
    "qwen3": dict(qk_norm=True, head_dim=128, sliding_window=4096),
    "phi": dict(GPT_LIKE, parallel=True, head_bias=True, hidden_act="gelu_new", partial_rotary_factor=0.5),
    "opt": dict(GPT_LIKE, position_offset=2, hidden_act="relu", tie_word_embeddings=True),
    "gpt2": dict(GPT_LIKE, position_offset=0, hidden_act="gelu_new", tie_word_embeddings=True),
    "mixtral": dict(sliding_window=None, norm_eps=1e-5, rope_theta=1e6, norm_topk_prob=True),
    "qwen3_moe": dict(qk_norm=True, sliding_window=4096),
}
# our name -> the file's name, by substitution, top to bottom; used to load and to save
RENAMES = {
    "phi": {"self_attn.o_proj": "self_attn.dense", "up_proj": "fc1", "down_proj": "fc2", "model.norm": "model.final_layernorm",
            "q_norm": "q_layernorm", "k_norm": "k_layernorm"},
    "opt": {"model.": "model.decoder.", "self_attn.o_proj": "self_attn.out_proj", "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
            "decoder.norm": "decoder.final_layer_norm"},
    "gpt2": {"model.layers": "transformer.h", "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe",
             "model.norm": "transformer.ln_f", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
             "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn", "self_attn.v_proj": "attn.c_attn",
             "self_attn.o_proj": "attn.c_proj", "up_proj": "c_fc", "down_proj": "c_proj"},
    "mixtral": {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
}
ROPE = {"default": (), "linear": ("factor",),  # rope types, and their numbers
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # GPT-2 stores its linear weights as (in, out)
BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")  # constants in older files
ACTIVATIONS = {
    "silu": F.silu, "relu": F.relu, "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class Config:
    """A model's shape. Names are transformers'; what only some families have has Llama's case as its default."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    hidden_act: str = "silu"
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    norm_after: bool = False  # OPT-350M: after the residual sum, and none at the end
    final_norm: bool = True
    gated: bool = True  # silu(gate) * up, or one matrix up
    parallel: bool = False  # Phi: attention and MLP read the same input
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tie_word_embeddings: bool = False
    embed_dim: int = 0  # OPT-350M: embeddings narrower than the model
    position_offset: int | None = None  # learned positions, starting at this row of their table; None: rotary
    max_position_embeddings: int = 2048
    rope: dict = field(default_factory=dict)  # rope_theta, rope_type and its parameters
    rotary_dim: int = 0  # how much of each head is rotated
    windows: list = field(default_factory=list)  # per layer: how many positions back it sees, itself included; None: all
    num_experts: int = 0
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = False
    moe_layers: list = field(default_factory=list)  # which layers have experts
    moe_intermediate_size: int = 0
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False

    @classmethod
    def from_hf(cls, hf, where="config.json"):
        """Hugging Face's config.json, as a dict, old spellings and new. Raises UserError for what is not supported."""
        family = hf.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise UserError(f"{where}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
        given = {CONFIG_KEYS.get(key, key): value for key, value in hf.items() if value is not None}
        c = FAMILIES[family] | given
        try:
            layers, heads = c["num_hidden_layers"], c["num_attention_heads"]
            if not (type(layers) is int and 0 < layers < 2**12):  # first, as what follows has one entry per layer
                raise ValueError(f"num_hidden_layers = {layers!r}")
            c.setdefault("num_key_value_heads", heads)
            c.setdefault("head_dim", c["hidden_size"] // heads)
            c.setdefault("intermediate_size", 4 * c["hidden_size"])
            if family == "llama":
                c["qkv_bias"] = c["out_bias"] = c.get("attention_bias", False)
            elif family.startswith("qwen3") and c.get("attention_bias"):
                c["qkv_bias"] = c["out_bias"] = True
            elif family == "opt":
                c["qkv_bias"] = c["out_bias"] = c["mlp_bias"] = c.get("enable_bias", True)
                c["norm_after"] = not c.get("do_layer_norm_before", True)
                c["final_norm"] = not (c["norm_after"] or c.get("_remove_final_layer_norm"))
            if c.get("position_offset") is None:  # rope_parameters is transformers 5's name, rope_theta and rope_scaling the older ones
                rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
                above = {key: c[key] for key in ("rope_theta", "partial_rotary_factor") if key in c}
                usual = {"rope_theta": 1e4, "rope_type": rope.get("type", "default"),
                         "original_max_position_embeddings": c.get("max_position_embeddings")}
                rope = usual | above | rope
                known = rope["rope_type"] in ROPE and not any(isinstance(value, dict) for value in rope.values())
                _unless(known, f"rotary positions {rope}", where)
                c["rope"] = {"rope_type": rope["rope_type"]} | {key: float(rope[key]) for key in ("rope_theta", *ROPE[rope["rope_type"]])}
                c["rotary_dim"] = int(c["head_dim"] * rope.get("partial_rotary_factor", 1.0))
            window = None
            if "sliding_window" in FAMILIES[family] and c.get("use_sliding_window", not family.startswith("qwen")):
                window = hf.get("sliding_window", c["sliding_window"])  # null: none; absent: the family's
            from_layer = c.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
            types = c.get("layer_types") or ["sliding_attention" if i >= from_layer else "" for i in range(layers)]
            c["windows"] = [window if kind == "sliding_attention" else None for kind in types]
            if c.get("num_experts") and family in ("mixtral", "qwen3_moe"):
                step, dense = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers", [])
                c["moe_layers"] = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
                c.setdefault("moe_intermediate_size", c["intermediate_size"])
                c.setdefault("router_aux_loss_coef", 0.001)
            _unless(c.get("hidden_act", "silu") in ACTIVATIONS, f"activation {c.get('hidden_act')!r}", where)
            _unless(c.get("scale_attn_weights", True) and not c.get("scale_attn_by_inverse_layer_idx"), "GPT-2's other attention scales", where)
            _unless(c.get("layer_norm_elementwise_affine", True), "LayerNorm without weights", where)
            _unless("quantization_config" not in c, "quantized weights (quantization_config)", where)
            config = cls(**{key: value for key, value in c.items() if key in cls.__dataclass_fields__})
            config._check()
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
            raise UserError(f"{where}: a value is missing or makes no sense ({type(error).__name__}: {error})") from error
        return config

    def _check(self):
        """Raise ValueError for what no model can be: it would fail much later, or ask for all of the memory."""
        for f in fields(self):
            value, limit = getattr(self, f.name), 2 ** (31 if f.name in ("vocab_size", "max_position_embeddings") else 20)
            size = f.type is not int or type(value) is int and (f.default != 0) <= value < limit  # those with the default 0 may be 0
            if not (size and isinstance(value, (int, float) if f.type is float else f.type)):
                raise ValueError(f"{f.name} = {value!r}")
        if self.num_attention_heads % self.num_key_value_heads or len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"{self.num_attention_heads} heads over {self.num_key_value_heads} key/value heads, "
                             f"{len(self.windows)} layer types for {self.num_hidden_layers} layers")
        if not all(w is None or type(w) is int and w > 0 for w in self.windows):
            raise ValueError(f"sliding_window = {max(self.windows, key=bool)!r}")
        if self.position_offset is None:
            if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim or not rope_frequencies(self, "cpu").isfinite().all():
                raise ValueError(f"rotary positions {self.rope} over {self.rotary_dim} of {self.head_dim}")
        if self.moe_layers and not (self.moe_intermediate_size and self.num_experts_per_tok <= self.num_experts):
            raise ValueError(f"{self.num_experts_per_tok} of {self.num_experts} experts of size {self.moe_intermediate_size}")


def _unless(supported, what, where):
    if not supported:
        raise UserError(f"{where}: {what}: not supported")


# ---------------------------------------------------------------------------------------------------------------------
# Small parts.


# Sums are fp32 inside the kernels. Autocast on a GPU would return fp32 as well: twice the memory, and q and k unlike v.
def without_autocast(x):
    return torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        weight = self.weight
        if weight.dtype == x.dtype:
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        with without_autocast(x):
            return F.rms_norm(x, self.normalized_shape, weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        with without_autocast(x):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def make_norm(config, size):
    return (RMSNorm if config.norm == "rms" else LayerNorm)(size, eps=config.norm_eps)


class OneDNN(torch.autograd.Function):
    """x W^T + b in fp32 by oneDNN, by way of its own tensor layout; only x and W are kept for the backward, as F.linear does."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x.to_mkldnn(), weight, bias).to_dense()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        dx = linear(grad, weight.T) if ctx.needs_input_grad[0] else None
        dw = linear(rows.T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x, weight, bias=None):
    """x W^T + b, F.linear. Large fp32 products on a CPU go through oneDNN, which uses all of the processor where torch's usual
    library holds back: on AMD it is twice as fast."""
    large = min(weight.shape) >= 256 and x.numel() * len(weight) >= 2**22  # others are not worth the copies
    if large and ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        if not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
            return OneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`; but for the single row of a generated token on a CPU, where either library reaches only a part of the
    memory's speed, the product is made of PIECES, which torch spreads over the threads."""

    PIECES = 16

    def __init__(self, C_in, C_out, bias):
        super().__init__(C_in, C_out, bias=bias)
        self.small = C_in * C_out < 2**16

    def forward(self, x):
        if self.small:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() or x.is_cuda or x.numel() > self.in_features or self.out_features % self.PIECES:
            return linear(x, self.weight, self.bias)
        pieces, column = self.weight.view(self.PIECES, -1, self.in_features), x.reshape(1, -1).T  # a contiguous column is slower
        y = torch.bmm(pieces, column.expand(self.PIECES, -1, -1)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def rope_frequencies(config, device):
    """(rotary_dim / 2,) radians per position, fp32. Computed when needed: a buffer would be rounded when a module is cast."""
    rope, n = config.rope, config.rotary_dim
    freqs = 1.0 / rope["rope_theta"] ** (torch.arange(0, n, 2, device=device, dtype=torch.float32) / n)
    if rope["rope_type"] == "linear":
        freqs = freqs / rope["factor"]
    elif rope["rope_type"] == "llama3":  # low frequencies are slowed by `factor`, high ones kept, those between blended
        turns = rope["original_max_position_embeddings"] * freqs / (2 * torch.pi)  # over the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / rope["factor"]
    return freqs


def rotate(x, cos, sin):
    """Rotary position embedding on the first part of each head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) of its halves.
    x (..., T, heads, D), cos and sin (..., T, 1, rotary_dim), sin with the first half's sign."""
    n = cos.shape[-1]
    turned = x if n == x.shape[-1] else x[..., :n]
    turned = torch.addcmul(turned * cos, turned.roll(n // 2, -1), sin).type_as(x)
    return turned if n == x.shape[-1] else torch.cat([turned, x[..., n:]], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: three layouts of the same softmax. Each has attend(q, k, v, layer, window): q (..., T, heads, D) -> the same shape.


def sdpa(q, k, v, mask=None, causal=False):
    """scaled_dot_product_attention for (B, T, heads, D) tensors with grouped heads."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


class Causal:
    """Plain causal attention over (B, T, ...): of `logits`, and of the padded sequences in a Tree."""

    def attend(self, q, k, v, layer, window):
        T = q.shape[1]
        if window is None or T <= window:
            return sdpa(q, k, v, causal=True)
        back = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)  # how far back each key lies
        return sdpa(q, k, v, mask=(back >= 0) & (back < window))


class Cache:
    """Keys and values of `batch` sequences, kept for generation. Sequences may differ in length: a row's next token is written
    where that row ends, over whatever padding a longer row's prompt left there, and nobody looks past his own position."""

    def __init__(self, config, batch, size, device="cpu", dtype=torch.float32):
        shape = (batch, size, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)] for _ in range(2))
        self.rows = torch.arange(batch, device=device)[:, None]

    def at(self, positions, used):
        """Set where the next call's tokens stand: positions (B, T); `used`: the longest row's length including them."""
        self.positions, self.used = positions, used
        self.aligned = positions.shape[0] == 1  # a single sequence: slices serve, no mask is needed
        self.start = used - positions.shape[1]
        return self

    def attend(self, q, k, v, layer, window):
        keys, values = self.keys[layer], self.values[layer]
        if self.aligned:
            keys.narrow(1, self.start, k.shape[1]).copy_(k)
            values.narrow(1, self.start, k.shape[1]).copy_(v)
        else:
            keys[self.rows, self.positions], values[self.rows, self.positions] = k.to(keys.dtype), v.to(keys.dtype)
        if self.aligned and q.shape[1] == 1:
            first = max(0, self.used - window) if window else 0
            return sdpa(q, keys[:, first : self.used], values[:, first : self.used])
        if self.start == 0 and (window is None or self.used <= window):
            return sdpa(q, k, v, causal=True)
        back = self.positions[:, :, None] - torch.arange(self.used, device=q.device)  # (B, T, used)
        mask = (back >= 0) & (back < (window or self.used + 1))
        return sdpa(q, keys[:, : self.used], values[:, : self.used], mask=mask[:, None])


class Tree:
    """A packed batch: each position sees its own prefix and its own branch (see data.pack).

    With flash attention (CUDA, fp16 or bf16): one variable-length call, no mask, no padding. Elsewhere, for the attention alone, each
    pair becomes the sequences prefix + chosen and prefix + rejected, and those of similar length are padded at their end to the
    longest of them: plain causal attention never looks there.
    """

    SIMILAR = 0.75  # sequences join a group while they are at least this part of its longest

    def __init__(self, batch, flash):
        self.batch, self.flash = batch, flash
        if flash:
            return
        prefix, chosen, rejected = batch.spans.unbind(1)
        starts, none = batch.spans.sum(1).cumsum(0) - batch.spans.sum(1), torch.zeros_like(prefix)
        lengths = torch.cat([prefix + chosen, prefix + rejected])  # (2N,), as are the next four
        starts, prefix, skipped = starts.repeat(2), prefix.repeat(2), torch.cat([none, chosen])  # the chosen branch stands between
        computed = torch.cat([none, prefix[: len(none)]])  # the second sequence's prefix repeats the first's: its results are dropped
        order, self.shapes, rows, wanted = lengths.argsort(descending=True), [], [], []
        while len(order):
            some = order[: int((lengths[order] >= self.SIMILAR * lengths[order[0]]).sum())]
            order, column = order[len(some) :], lambda x: x[some, None]
            offset = torch.arange(int(lengths[some[0]]))
            row = column(starts) + torch.minimum(offset, column(lengths) - 1)  # (n, L); padding reads the last row
            rows.append((row + column(skipped) * (offset >= column(prefix))).flatten())
            wanted.append(((offset >= column(computed)) & (offset < column(lengths))).flatten())
            self.shapes.append((len(some), len(offset)))
        rows, wanted = torch.cat(rows), torch.cat(wanted).nonzero()[:, 0]
        self.rows = rows.to(batch.inputs.device)  # order of the pack -> groups, one after the other
        self.back = wanted[rows[wanted].argsort()].to(batch.inputs.device)  # and back

    @torch.compiler.disable  # compiled blocks break here: what depends on the pack's layout stays outside of the graph
    def attend(self, q, k, v, layer, window):
        b = self.batch
        if self.flash:
            k, v = k.index_select(0, b.kv_index), v.index_select(0, b.kv_index)
            causal = (-1 if window is None else window - 1, 0)
            return varlen_attn(q, k, v, b.cu_q, b.cu_k, b.max_q, b.max_k, window_size=causal, **GROUPED_HEADS)
        groups = zip(*(x.index_select(0, self.rows).split([n * L for n, L in self.shapes]) for x in (q, k, v)))
        outputs = []
        for shape, group in zip(self.shapes, groups):
            outputs.append(Causal().attend(*(x.unflatten(0, shape) for x in group), layer, window).flatten(0, 1))  # (n, L, heads, D)
        return torch.cat(outputs).index_select(0, self.back)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.layer, self.head_dim, self.window = layer, D, config.windows[layer]
        self.q_proj = Linear(C, config.num_attention_heads * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, config.num_key_value_heads * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, config.num_key_value_heads * D, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * D, C, bias=config.out_bias)
        self.q_norm, self.k_norm = (make_norm(config, D), make_norm(config, D)) if config.qk_norm else (None, None)

    def forward(self, x, rotary, layout):
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)  # (..., T, heads, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.o_proj(layout.attend(q, k, v, self.layer, self.window).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear(C, inner, bias=config.mlp_bias) if config.gated else None
        self.up_proj = Linear(C, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, C, bias=config.mlp_bias)

    def forward(self, x, weight=None):
        hidden = self.act(self.up_proj(x)) if self.gate_proj is None else self.act(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden), None


class Experts(nn.Module):
    """The weights of all experts, stacked, so that an idle expert has a zero gradient and not none at all."""

    def __init__(self, config):
        super().__init__()
        E, C, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, inner, C))
        self.up_proj = nn.Parameter(torch.empty(E, inner, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, inner))


@torch.compiler.disable  # which knows it in bf16 only
def grouped_mm(a, w, ends):
    """Rows ends[e-1]:ends[e] of a (T k, in) times w[e] (in, out), for each expert e -> (T k, out)."""
    if a.dtype.itemsize <= 4 and all(n * a.dtype.itemsize % 16 == 0 for n in w.shape[1:]):
        return F.grouped_mm(a, w, offs=ends)
    pieces = a.tensor_split(ends[:-1].tolist())  # what it does not take: float64 (the gradient check) and odd sizes
    return torch.cat([piece @ matrix for piece, matrix in zip(pieces, w)])


class MoE(nn.Module):
    """Top-k mixture of experts. Tokens are sorted by expert and each matrix is one grouped product: cost grows with k, not with E."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.renormalise, self.act = config.num_experts_per_tok, config.norm_topk_prob, ACTIVATIONS[config.hidden_act]
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x, weight=None):
        """x (..., C); weight (T,): how often each token counts in the router's statistics, None where nobody asks.
        Returns the output and (2, E): the weighted numbers of tokens sent to, and the sums of probabilities given to, each expert."""
        shape, x = x.shape, x.flatten(0, -2)  # (T, C)
        probs = self.gate(x).float().softmax(-1)  # (T, E)
        share, expert = probs.topk(self.top_k, dim=-1)  # (T, k)
        if self.renormalise:
            share = share / share.sum(-1, keepdim=True)
        order = expert.flatten().argsort(stable=True)  # (T k,): token-expert assignments, grouped by expert
        token = order // self.top_k
        # without a one-hot of (T k, E) and without waiting for the GPU: where each expert's run ends
        ends = torch.searchsorted(expert.flatten()[order], torch.arange(probs.shape[-1], device=x.device), right=True).int()
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        product = lambda a, w: grouped_mm(a, w.to(dtype).transpose(-2, -1), ends)
        inputs = x.to(dtype).index_select(0, token)
        hidden = self.act(product(inputs, self.experts.gate_proj)) * product(inputs, self.experts.up_proj)
        output = product(hidden, self.experts.down_proj) * share.flatten()[order, None].to(dtype)
        output = torch.zeros_like(x, dtype=dtype).index_add(0, token, output)
        router = None
        if weight is not None:
            sent = torch.zeros_like(probs[0]).index_add(0, expert.flatten(), weight.repeat_interleave(self.top_k))
            router = torch.stack([sent, (weight[:, None] * probs).sum(0)])  # no matrix product: autocast would round it
        return output.view(shape), router


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.parallel, self.norm_after = config.parallel, config.norm_after
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = None if config.parallel else make_norm(config, config.hidden_size)
        self.mlp = MoE(config) if layer in config.moe_layers else MLP(config)

    def forward(self, x, rotary, layout, weight=None):
        """x (..., T, C) -> the same, and the router's statistics of this layer (None without experts)."""
        if self.parallel:
            h = self.input_layernorm(x)
            out, router = self.mlp(h)
            return x + self.self_attn(h, rotary, layout) + out, router
        if self.norm_after:
            x = self.input_layernorm(x + self.self_attn(x, rotary, layout))
            out, router = self.mlp(x)
            return self.post_attention_layernorm(x + out), router
        x = x + self.self_attn(self.input_layernorm(x), rotary, layout)
        out, router = self.mlp(self.post_attention_layernorm(x), weight)
        return x + out, router


def wide_product(a, b):
    """a @ b; that of half-precision factors in fp32, without rounding the product to half precision first."""
    if a.dtype.itemsize > 2:
        return linear(a, b.T)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class TargetLogps(torch.autograd.Function):
    """log softmax(h W^T + b)[target] in fp32, a part of the vocabulary at a time: neither pass ever holds the logits of the batch.

    h (S, C), weight (V, C), bias (V,) or None, targets (S,) -> (S,). The backward computes each part's logits once more.
    """

    CHUNK = {"cpu": 2**22, "cuda": 2**28}  # logits at a time (floats)

    @staticmethod
    def parts(h, weight, bias, targets):
        """Yields (slice of the vocabulary, its weights in h's dtype, its logits (S, v) in fp32 or wider, which may be overwritten,
        each target's place among them (S, 1), whether it stands there at all (S,))."""
        size = max(64, TargetLogps.CHUNK.get(h.device.type, 2**26) // len(h) // 64 * 64)
        for start in range(0, len(weight), size):
            part = slice(start, min(start + size, len(weight)))
            w = weight[part].to(h.dtype)
            logits = wide_product(h, w.T)
            place = (targets - start).clamp(0, len(w) - 1)[:, None]
            yield part, w, logits if bias is None else logits.add_(bias[part]), place, (targets >= start) & (targets < part.stop)

    @staticmethod
    def forward(ctx, h, weight, bias, targets):
        device = h.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        picked = torch.zeros(len(h), device=h.device, dtype=torch.promote_types(ctx.dtype, torch.float32))  # the targets' logits
        lse = torch.full_like(picked, -torch.inf)
        with torch.autocast(device, enabled=False):
            for _, _, logits, place, here in TargetLogps.parts(h.to(ctx.dtype), weight, bias, targets):
                picked += logits.gather(1, place)[:, 0] * here
                top = logits.amax(1)
                lse = torch.logaddexp(lse, top + logits.sub_(top[:, None]).exp_().sum(1).log())
        ctx.save_for_backward(h, weight, bias, targets, lse)
        return picked - lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        h, weight, bias, targets, lse = ctx.saved_tensors
        dh, dw, db = torch.zeros_like(h, dtype=lse.dtype), torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
        with torch.autocast(h.device.type, enabled=False):
            grad = -grad[:, None]  # it scales rows: done before and after the large products, not on what stands between them
            x, scaled = h.to(ctx.dtype), (h * grad).to(ctx.dtype)
            for part, w, logits, place, here in TargetLogps.parts(x, weight, bias, targets):
                # - d logp / d logits = softmax(logits) - onehot(target), (S, v)
                d = logits.sub_(lse[:, None]).exp_().scatter_add_(1, place, -here[:, None].to(logits.dtype))
                if bias is not None:
                    db[part] = grad[:, 0] @ d
                d = d.to(ctx.dtype)
                dh += wide_product(d, w)
                dw[part] = wide_product(d.T, scaled)
        return (dh * grad).to(h.dtype), dw, db, None


# ---------------------------------------------------------------------------------------------------------------------
# The whole.


class Decoder(nn.Module):
    """Embeddings, blocks, final norm: everything but the output head. Exists for the parameters' names (`model.layers...`)."""

    def __init__(self, config):
        super().__init__()
        C, narrow = config.hidden_size, config.embed_dim or config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, narrow)
        learned = config.position_offset is not None
        self.embed_positions = nn.Embedding(config.max_position_embeddings + config.position_offset, C) if learned else None
        self.project_in, self.project_out = (Linear(narrow, C, bias=False), Linear(C, narrow, bias=False)) if narrow != C else (None, None)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config, C) if config.final_norm else None


class Transformer(nn.Module):
    """A causal language model.  config: Config.  hf_config: config.json as it was read.  gradient_checkpointing: bool."""

    def __init__(self, config, hf_config=None):
        super().__init__()
        self.config, self.hf_config, self.generation_config = config, hf_config, None
        self.file_dtype, self.gradient_checkpointing = torch.float32, False
        self.model = Decoder(config)
        self.lm_head = Linear(config.embed_dim or config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialise(self, seed=0):
        """Random weights: N(0, 0.02) for matrices, ones for norms, zeros for biases. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.zero_()
        for module in self.modules():
            if isinstance(module, (RMSNorm, LayerNorm)):
                module.weight.fill_(1)
        return self

    @property
    def max_positions(self):
        """The longest sequence the model can take; None for rotary positions, which do not end."""
        return None if self.config.position_offset is None else self.config.max_position_embeddings

    def hidden(self, tokens, positions, layout, weight=None):
        """tokens, positions (..., T) -> final hidden states (..., T, C), and the router's statistics summed over layers."""
        m = self.model
        x = m.embed_tokens(tokens)
        if m.project_in is not None:
            x = m.project_in(x)
        rotary = None
        if m.embed_positions is not None:
            x = x + m.embed_positions(positions + self.config.position_offset)
        else:
            frequencies = rope_frequencies(self.config, tokens.device)
            angles = positions[..., None, None].float() * torch.cat([-frequencies, frequencies])  # (..., T, 1, rotary_dim)
            rotary = angles.cos(), angles.sin()  # cos(-a) = cos(a), sin(-a) = -sin(a): the sign that `rotate` asks for
            if x.dtype == torch.float64:  # the gradient check's precision
                rotary = angles.double().cos(), angles.double().sin()
        if torch.is_autocast_enabled(x.device.type):  # the residual stream has autocast's precision; norms and sums inside are fp32
            x = x.to(torch.get_autocast_dtype(x.device.type))
        router = 0
        for layer in m.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, stats = checkpoint(layer, x, rotary, layout, weight, use_reentrant=False)
            else:
                x, stats = layer(x, rotary, layout, weight)
            router = router if stats is None else router + stats
        x = x if m.norm is None else m.norm(x)
        return (x if m.project_out is None else m.project_out(x)), (None if isinstance(router, int) else router)

    def forward(self, batch, router_weight=None):
        """A packed batch (data.Batch, on the model's device) -> (T,) log-probability of each target, fp32; 0 where not scored.

        With router_weight (T,), how often each position counts: (logps, router), router (2, E) summed over the layers:
        tokens sent to and probability given to each expert.
        """
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
        flash = batch.inputs.is_cuda and dtype.itemsize == 2 and self.config.head_dim % 8 == 0 and self.config.head_dim <= 256
        layout = Tree(batch, flash)
        x, router = self.hidden(batch.inputs, batch.positions, layout, router_weight)  # (T, C)
        head = self.lm_head
        if batch.scored is None:
            logps = TargetLogps.apply(x, head.weight, head.bias, batch.targets)
        else:
            some = TargetLogps.apply(x[batch.scored], head.weight, head.bias, batch.targets[batch.scored])
            logps = some.new_zeros(len(x)).index_copy(0, batch.scored, some)
        return logps if router_weight is None else (logps, router)

    def logits(self, tokens):
        """(B, T) ids -> (B, T, vocab) fp32 logits, plain causal: for teaching and for parity tests."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.lm_head(self.hidden(tokens, positions, Causal())[0]).float()

    def next_logits(self, tokens, positions, cache, used, last=None):
        """Generation: tokens, positions (B, T) continue the cached sequences, the longest of which then has `used` tokens;
        last (B,): index of each row's last real token, None: T - 1. Returns (B, vocab) fp32 logits for what follows it."""
        x = self.hidden(tokens, positions, cache.at(positions, used))[0]  # (B, T, C)
        x = x[:, -1] if last is None else x[torch.arange(len(x), device=x.device), last]
        return self.lm_head(x).float()

    def training_flops(self, spans):
        """Floating-point operations of one forward and backward over pairs of the given spans (N, 3), the useful ones only:
        no padding, no second prompt, no recomputation. 6 per matrix weight and token (Kaplan et al. 2020), 12 D per head and
        query-key pair; of the experts only those a token visits."""
        c, spans = self.config, spans.double()
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim > 1 and "embed" not in name and "lm_head" not in name)
        weights = matrices - experts + experts * c.num_experts_per_tok / max(1, c.num_experts) + self.lm_head.weight.numel()
        prefix, chosen, rejected = spans.unbind(1)
        flops = 6 * weights * spans.sum()
        for window in c.windows:
            inside = lambda n: n * (n + 1) / 2
            seen = lambda n: inside(n) if window is None else torch.where(n <= window, inside(n), n * window - inside(window - 1))
            looked_at = seen(prefix + chosen) + seen(prefix + rejected) - seen(prefix)
            flops = flops + 12 * c.head_dim * c.num_attention_heads * looked_at.sum()
        return float(flops)

    # -- Hugging Face files -------------------------------------------------------------------------------------------

    def file_layout(self):
        """{name in the file: [our tensors that it holds, side by side along the last dimension]}; views, to be read or written."""
        family, layout = self.config.model_type, {}
        for name, tensor in self.named_parameters():  # a tied head appears once, as the embedding
            tensor = tensor.detach()
            if name.startswith("model.layers.") and ".experts." in name:
                name = name.replace(".experts.", ".experts.{}.") + ".weight"
            for ours, theirs in RENAMES.get(family, {}).items():
                name = name.replace(ours, theirs)
            if "{}" in name:
                layout |= {name.format(e): [tensor[e]] for e in range(len(tensor))}
            else:
                layout.setdefault(name, []).append(tensor.T if TRANSPOSED.search(name) else tensor)
        return layout

    @classmethod
    def from_pretrained(cls, path_or_repo, *, revision=None):
        """A Hugging Face model directory or hub id -> Transformer with fp32 parameters, on the CPU, in eval mode.

        Raises UserError naming whatever is missing, unexpected, of the wrong shape or not supported.
        """
        directory = fetch(path_or_repo, revision, MODEL_FILES)
        config_file = os.path.join(directory, "config.json")
        if not os.path.exists(config_file):
            raise UserError(f"{directory}: no config.json; give the directory of a model in Hugging Face layout")
        hf = read_json(config_file)
        config = Config.from_hf(hf, config_file)
        files = _weight_files(directory)
        with torch.device("meta"):
            model = cls(config, hf)
        model._load(directory, files)
        generation = os.path.join(directory, "generation_config.json")
        model.generation_config = read_json(generation) if os.path.exists(generation) else None
        return model.eval()

    @torch.no_grad()
    def _load(self, directory, files):
        """Fill the parameters, still on the meta device: no memory is taken before names and shapes are known to fit."""
        layout = self.file_layout()
        stored = {}  # name in the file, in full -> (file, name as written)
        prefix = {"gpt2": "transformer.", "opt": "model."}.get(self.config.model_type)  # hub files of these may lack it
        bare = prefix and not any(name.startswith(prefix) for names in files.values() for name in names)
        for file, names in files.items():
            for name in names:
                if not BUFFERS.search(name):
                    stored[prefix + name if bare and not name.startswith("lm_head") else name] = file, name
        if self.config.tie_word_embeddings:  # either half will do; both are fine if they agree
            embedding, head = next(iter(layout)), stored.pop("lm_head.weight", None)  # the embedding is the first of all parameters
            if head and embedding in stored and not torch.equal(_read(directory, *head), _read(directory, *stored[embedding])):
                raise UserError(f"{directory}: lm_head.weight and {embedding} differ, but config.json ties them (tie_word_embeddings)")
            if head:
                stored.setdefault(embedding, head)
        missing, unexpected = sorted(layout.keys() - stored.keys()), sorted(stored.keys() - layout.keys())
        if missing or unexpected:
            some = lambda names: ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
            raise UserError(f"{directory}: the weights do not fit config.json; missing tensors: {some(missing)}; "
                            f"unexpected tensors: {some(unexpected)}")
        for name, tensors in layout.items():
            file, written = stored[name]
            shape, dtype = files[file][written]
            asked = [*tensors[0].shape[:-1], sum(t.shape[-1] for t in tensors)]
            if shape != asked or dtype not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{os.path.join(directory, file)}: tensor {written} is {dtype} of shape {shape}; "
                                f"F64, F32, F16 or BF16 of shape {asked} is needed")
        self.to_empty(device="cpu")  # memory that is not touched yet, and so not taken yet
        self.tie()
        dtypes = set()
        # Largest first, each through a mapping of its own: at no time are more of the file's pages held than one tensor's.
        for name, tensors in sorted(self.file_layout().items(), key=lambda item: -sum(t.numel() for t in item[1])):
            tensor = _read(directory, *stored[name])
            dtypes.add(tensor.dtype)
            for ours, theirs in zip(tensors, tensor.split([t.shape[-1] for t in tensors], dim=-1)):
                ours.copy_(theirs)
        self.file_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    @torch.no_grad()
    def save_pretrained(self, directory, dtype=None):
        """Write config.json, the weights (in `dtype`; default: as they were loaded) and generation_config.json, as transformers would."""
        os.makedirs(directory, exist_ok=True)
        dtype = dtype or self.file_dtype
        # transformers follows the file's dtype only if config.json states it; old releases read the one key, new ones the other
        stated = {"dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}
        shards, size = [{}], 0
        layout = self.file_layout()
        for name, tensors in layout.items():
            nbytes = sum(t.numel() for t in tensors) * dtype.itemsize
            if shards[-1] and size + nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = tensors
            size += nbytes
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        names = ["model.safetensors"] if len(shards) == 1 else names
        for file, shard in zip(names, shards):
            whole = {name: torch.cat([t.to("cpu", dtype) for t in tensors], dim=-1).contiguous() for name, tensors in shard.items()}
            save_file(whole, os.path.join(directory, file), metadata={"format": "pt"})
        for old in os.listdir(directory):  # another run's weights: readers prefer a single file to shards
            if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old) and old not in names:
                os.remove(os.path.join(directory, old))
        objects = {"config.json": self.hf_config | stated}
        if len(shards) > 1:
            total = sum(t.numel() for tensors in layout.values() for t in tensors) * dtype.itemsize
            where = {name: file for file, shard in zip(names, shards) for name in shard}
            objects["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": where}
        if self.generation_config is not None:
            objects["generation_config.json"] = self.generation_config
        for file, value in objects.items():
            with open(os.path.join(directory, file), "w", encoding="utf-8") as out:
                json.dump(value, out, indent=2)


def _weight_files(directory):
    """{safetensors file: {name of a tensor in it: (shape, dtype)}}; the index, where there is one, says which files."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if os.path.exists(os.path.join(directory, "model.safetensors")):
        names = ["model.safetensors"]
    elif os.path.exists(index):
        weight_map = read_json(index).get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
            raise UserError(f"{index}: no usable weight_map in it")
        names = sorted(set(weight_map.values()))
        for name in names:  # a stranger's index must not reach outside of the model's directory
            if os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise UserError(f"{index}: names the file {name!r}; only .safetensors files beside it are read")
    elif any(file.endswith((".bin", ".pt", ".pth")) for file in os.listdir(directory)):
        raise UserError(f"{directory}: only pickled weights (pytorch_model.bin), which can run code when loaded and are refused; "
                        "use the repository's safetensors conversion (--revision refs/pr/N on the hub), or load and save_pretrained() it once with transformers")
    else:
        raise UserError(f"{directory}: no model.safetensors and no model.safetensors.index.json; on the hub, "
                        "a repository with pytorch_model.bin alone often has its safetensors conversion as a pull request: --revision refs/pr/N")
    files = {}
    for name in names:
        try:
            with safe_open(os.path.join(directory, name), "pt") as file:
                slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}
                files[name] = {tensor: (part.get_shape(), part.get_dtype()) for tensor, part in slices.items()}
        except (OSError, SafetensorError, ValueError) as error:  # ValueError: a name that no file system takes
            raise UserError(f"{os.path.join(directory, name)}: cannot be read as safetensors ({error}); fetch or copy it again") from error
    return files


def _read(directory, file, name):
    with safe_open(os.path.join(directory, file), "pt") as f:
        return f.get_tensor(name)
