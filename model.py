"""One decoder-only transformer for the families ORPO is used on, exact against transformers, in and out.

    model = Transformer.from_pretrained("HuggingFaceTB/SmolLM2-135M")      # a directory or a hub id
    model.logits(tokens)               # (B, T) ids -> (B, T, vocab): the plain teaching path
    model(batch)                       # a packed batch (data.pack) -> log-probability of each target
    model.save_pretrained("out")       # what transformers loads again

In reading order: small parts, attention, MLPs, the block, scoring, the whole; then families, configs, files.
Notation:  T positions in a pack, B sequences, C hidden size, D head_dim, E experts, V vocabulary.
Parameters carry Hugging Face's Llama names. A family differs from Llama by a row of FAMILIES and of RENAMES.
"""
import inspect
import math
import re
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from data import UserError, fetch, read_json, where, write_json

CHUNK = {"cpu": 2**24, "cuda": 2**28}  # logits (floats) that scoring computes at a time
KEPT = 2**27  # logits that it keeps for the backward pass, if a pack has no more
# torch 2.11 takes fewer key heads than query heads without being told; later releases want this argument
GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# -----------------------------------------------------------------------------------------------------------
# Small parts.

TANH_GELU = nn.GELU(approximate="tanh")  # the exact one differs by 1e-3
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": TANH_GELU,
    "gelu_pytorch_tanh": TANH_GELU,
}


def compute_dtype(x):
    """What matrix products are computed in: autocast's dtype where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# Under autocast the residual stream between blocks stays fp32, and norms return autocast's dtype. In bf16 its
# rounding error would grow with depth (rms of log-probs at 2, 24, 48 layers: 0.010, 0.014, 0.026; in fp32
# 0.009, 0.011, 0.011), to save 4 of some 60 bytes per channel, token and layer.
class RMSNorm(nn.RMSNorm):
    offset = 0.0  # 1 in Gemma, whose weights are stored as their difference from 1

    def forward(self, x):
        weight = self.weight + self.offset if self.offset else self.weight
        y = F.rms_norm(x, self.normalized_shape, weight.to(x.dtype), self.eps)
        return y.to(compute_dtype(x))


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        y = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(compute_dtype(x))


def identity(x):  # in place of nn.Identity, whose call takes as long as a small kernel
    return x


def make_norm(config, size, wanted):
    """The family's norm over the last `size` channels; the identity where there is none."""
    if not wanted:
        return identity
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    norm = kind(size, eps=config.norm_eps)
    norm.offset = config.norm_offset
    return norm


class Linear(nn.Linear):
    """nn.Linear; after add_adapters with a trained low-rank update: W x + (alpha / r) B A x (LoRA, Hu et al.
    2021)."""

    first = None  # with an adapter: [the layer that holds A], in a list so that it is no submodule of this

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.first is None:
            return y
        return y + self.scale * F.linear(F.linear(x, self.first[0].lora_A), self.lora_B)


def rotary_tables(rope, positions):
    """cos and sin (..., T, 1, rotary_dim / 2), fp32, of the angles by which queries and keys are rotated at
    positions (..., T). Not in a buffer: a cast of the module would round the frequencies."""
    n = rope["rotary_dim"]
    exponents = torch.arange(0, n, 2, device=positions.device, dtype=torch.float32) / n
    freqs = 1.0 / rope["rope_theta"] ** exponents  # (rotary_dim / 2,) radians per position
    if rope["rope_type"] == "linear":
        freqs = freqs / rope["factor"]
    elif rope["rope_type"] == "llama3":  # low frequencies divided by `factor`, high ones kept
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freqs / (2 * torch.pi)  # in the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / rope["factor"]
    angles = positions[..., None, None] * freqs
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): of each head's first rotary_dim channels, (x1, x2) of the first and
    the second half turn by an angle; the rest stays. x (..., T, heads, D); cos, sin (..., T, 1, half)."""
    half = cos.shape[-1]
    x1, x2, rest = x.split_with_sizes([half, half, x.shape[-1] - 2 * half], -1)
    y1 = torch.addcmul(x1 * cos, x2, sin, value=-1)  # x1 cos - x2 sin
    y2 = torch.addcmul(x2 * cos, x1, sin)  # x2 cos + x1 sin
    return torch.cat([y1, y2, rest], -1).type_as(x)


# -----------------------------------------------------------------------------------------------------------
# Attention: one softmax and three layouts of queries and keys: plain, Packed, Cache. A layout is called with
# the Attention module and its q, k, v, and returns (..., T, heads, D), the shape of q.


def causal_attention(q, k, v, window=None, positions=None):
    """q (B, Q, heads, D), k and v (B, K, kv heads, D) -> (B, Q, heads, D). The queries stand at the end of
    the keys, or at `positions` (B, Q) among them."""
    Q = q.shape[1]
    K = k.shape[1]
    mask = None
    if positions is not None or 1 < Q < K or (window and K > window):
        if positions is None:
            positions = torch.arange(K - Q, K, device=q.device)[None]
        back = positions[:, None, :, None] - torch.arange(K, device=q.device)  # (B, 1, Q, K): query - key
        mask = (back >= 0) & (back < (window or K))
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.device.type != "cpu" and (mask is not None or q.dtype.itemsize > 2):
        # On a GPU only flash attention takes grouped heads, and it takes no mask and no fp32. The kernel for
        # the rest would hold all scores, so it gets equally many heads instead.
        repeats = q.shape[2] // k.shape[2]
        k = k.repeat_interleave(repeats, dim=2)
        v = v.repeat_interleave(repeats, dim=2)
        grouped = False
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask,
        is_causal=mask is None and Q > 1, enable_gqa=grouped)
    return out.transpose(1, 2)


def plain(module, q, k, v):
    """Whole sequences (B, T, ...): the layout of Transformer.logits."""
    return causal_attention(q, k, v, module.window)


class Packed:
    """A packed batch: each position sees its own prefix and its own branch. A pair is two segments of queries
    with the keys that they see, drawn in data.Batch's docstring. With flash attention (CUDA, fp16 or bf16)
    all segments are one call without mask or padding, elsewhere a loop."""

    def __init__(self, batch, flash):
        self.batch = batch
        self.flash = flash

    def __call__(self, module, q, k, v):
        """q (T, heads, D), k and v (T, kv heads, D) -> (T, heads, D)."""
        b = self.batch
        k = k.index_select(0, b.kv_index)  # the keys of all segments, end to end: prefixes stand there twice
        v = v.index_select(0, b.kv_index)
        if not self.flash:
            return self.loop(module.window, q[None], k[None], v[None])
        back = (module.window or 0) - 1  # -1: no limit
        return varlen_attn(q, k, v, b.cu_q, b.cu_k, b.max_q, b.max_k, window_size=(back, 0), **GROUPED_HEADS)

    @torch.compiler.disable  # what depends on the pack's lengths stays outside of the graph
    def loop(self, window, q, k, v):
        queries = q.split(self.batch.queries, 1)
        keys = k.split(self.batch.keys, 1)
        values = v.split(self.batch.keys, 1)
        outputs = [causal_attention(*segment, window) for segment in zip(queries, keys, values)]
        return torch.cat(outputs, 1)[0]


class Cache:
    """Keys and values kept for generation. Rows may differ in length: a row's next token overwrites the
    padding after its last one, and no position sees later ones."""

    def __init__(self):
        self.kept = {}  # Attention -> its keys and its values, (B, room, kv heads, D) each

    def at(self, positions, used):
        """Set the positions (B, T) of the next tokens; `used`: the length of the longest row with them."""
        self.used = used
        self.positions = positions
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.place = rows, positions
        if len(positions) == 1:  # one sequence ends where its keys do: it needs no mask
            self.positions = None
            self.place = slice(None), slice(used - positions.shape[1], used)
        return self

    def __call__(self, module, q, k, v):
        keys, values = self.kept.get(module, (k[:, :0], v[:, :0]))
        if keys.shape[1] < self.used:
            more = (0, 0, 0, 0, 0, 2 * self.used + 64 - keys.shape[1])
            keys = F.pad(keys, more)
            values = F.pad(values, more)
            self.kept[module] = keys, values
        keys[self.place] = k
        values[self.place] = v
        keys = keys[:, : self.used]
        values = values[:, : self.used]
        return causal_attention(q, keys, values, module.window, self.positions)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.hidden_size
        D = config.head_dim
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        self.head_dim = D
        self.window = config.windows[layer]
        self.rotated = bool(config.rotated[layer])
        # How a position's channels are split to be normalised: not at all, or by head
        joint = config.qk_norm_joint
        self.normed = (1, -1) if joint else (-1, D)
        self.query_scale = (D / (config.query_pre_attn_scalar or D)) ** 0.5
        self.q_proj = Linear(C, heads * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, kv_heads * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, kv_heads * D, bias=config.qkv_bias)
        self.o_proj = Linear(heads * D, C, bias=config.attention_bias)
        self.q_norm = make_norm(config, heads * D if joint else D, config.qk_norm)
        self.k_norm = make_norm(config, kv_heads * D if joint else D, config.qk_norm)

    def forward(self, x, rotary, layout):
        heads = (*x.shape[:-1], -1, self.head_dim)
        normed = (*x.shape[:-1], *self.normed)
        q = self.q_norm(self.q_proj(x).view(normed)).view(heads)  # (..., T, heads, D)
        k = self.k_norm(self.k_proj(x).view(normed)).view(heads)  # (..., T, kv heads, D)
        v = self.v_proj(x).view(heads)
        if self.query_scale != 1:  # in place of sqrt(D), scores are divided by sqrt(query_pre_attn_scalar)
            q = q * self.query_scale
        if self.rotated:
            cos, sin = rotary[self.window]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = layout(self, q, k, v)  # (..., T, heads, D)
        return self.o_proj(out.flatten(-2))


# -----------------------------------------------------------------------------------------------------------
# MLPs.


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        inner = config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear(C, inner, bias=config.mlp_bias) if config.gated else None
        self.up_proj = Linear(C, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, C, bias=config.mlp_bias)

    def forward(self, x):
        up = self.up_proj(x)
        hidden = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up
        return self.down_proj(hidden)


@torch.compiler.disable  # the compiler knows it in bf16 only
def grouped_mm(a, weight, ends):
    """Rows ends[e-1]:ends[e] of a (T k, in) times weight[e].T (out, in), for each expert e -> (T k, out)."""
    return F.grouped_mm(a, weight.to(a.dtype).transpose(-2, -1), offs=ends)


class MoE(nn.Module):
    """Top-k mixture of experts. Tokens are sorted by expert, and each matrix is one grouped product, so the
    cost grows with k, not with E. Weights are stacked, so the gradient of an idle expert is 0, not None."""

    def __init__(self, config):
        super().__init__()
        E = config.num_experts
        C = config.hidden_size
        inner = config.moe_intermediate_size or config.intermediate_size
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate = nn.Linear(C, E, bias=False)
        self.experts = nn.ParameterDict()
        self.experts["gate_proj"] = torch.empty(E, inner, C)
        self.experts["up_proj"] = torch.empty(E, inner, C)
        self.experts["down_proj"] = torch.empty(E, C, inner)

    def forward(self, x):  # (..., C) -> the same
        shape = x.shape
        x = x.flatten(0, -2).to(compute_dtype(x))  # (T, C)
        probs = self.gate(x).float().softmax(-1)  # (T, E)
        share, expert = probs.topk(self.top_k)  # (T, k)
        if self.renormalise:
            share = share / share.sum(-1, keepdim=True)
        ordered, order = expert.flatten().sort(stable=True)  # (T k,): assignments, grouped by expert
        token = order // self.top_k
        experts = torch.arange(probs.shape[-1], device=x.device)
        ends = torch.searchsorted(ordered, experts, right=True).int()  # (E,): where each expert's rows end
        rows = x.index_select(0, token)  # (T k, C)
        gate = self.act(grouped_mm(rows, self.experts.gate_proj, ends))
        hidden = gate * grouped_mm(rows, self.experts.up_proj, ends)
        output = grouped_mm(hidden, self.experts.down_proj, ends)
        output = output * share.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, output).view(shape)


# -----------------------------------------------------------------------------------------------------------
# The block.


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm_first = config.norm_first
        norm = partial(make_norm, config, config.hidden_size)
        self.input_layernorm = norm(config.norm_inputs)  # before the attention
        self.self_attn = Attention(config, layer)
        self.attention_norm = norm(config.norm_outputs)  # of what it puts out
        # before the MLP, in spite of its name, which is Llama's
        self.post_attention_layernorm = None if config.parallel else norm(config.norm_inputs)
        self.mlp = MoE(config) if config.num_experts else MLP(config)
        self.post_feedforward_layernorm = norm(config.norm_outputs)  # of what it puts out

    def forward(self, x, rotary, layout):
        """x (..., T, C) -> the same."""
        if not self.norm_first:  # OPT-350M: after the residual sum
            x = self.input_layernorm(x + self.self_attn(x, rotary, layout))
            return self.post_attention_layernorm(x + self.mlp(x))
        h = self.input_layernorm(x)
        x = x + self.attention_norm(self.self_attn(h, rotary, layout))
        if self.post_attention_layernorm is not None:  # else attention and MLP read the same h (Phi)
            h = self.post_attention_layernorm(x)
        return x + self.post_feedforward_layernorm(self.mlp(h))


# -----------------------------------------------------------------------------------------------------------
# Scoring: log-probabilities of targets, without the logits of the batch.


def wide_product(a, b):
    """a @ b in fp32, also of half-precision factors: their product is not rounded to half precision."""
    if a.dtype.itemsize > 2:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def add_product(total, a, b):
    """total += a @ b, in fp32 also of half-precision factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)  # in one pass over the total, which is as large as the vocabulary
    else:
        total += wide_product(a, b)


def chunks(h, weight):
    """Slices of the positions of h (S, C), each with at most CHUNK logits."""
    size = max(1, CHUNK.get(h.device.type, 2**26) // len(weight))
    return [slice(start, start + size) for start in range(0, len(h), size)]


def vocabulary_logps(h, weight, bias):
    """log softmax(h W^T + b), fp32."""
    logits = wide_product(h, weight.T)
    if bias is not None:
        logits += bias
    return logits.log_softmax(-1)


class TargetLogps(torch.autograd.Function):
    """target_logps. Its backward pass needs the log-probabilities of the whole vocabulary: with `keep` the
    forward pass keeps them, else they are computed again."""

    @staticmethod
    def forward(ctx, h, weight, bias, targets, keep):
        ctx.save_for_backward(h, weight, bias, targets)
        ctx.kept = []
        w = weight.to(h.dtype)
        logps = torch.empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        for rows in chunks(h, w):
            all_logps = vocabulary_logps(h[rows], w, bias)  # (rows, V)
            logps[rows] = all_logps.gather(1, targets[rows, None])[:, 0]
            if keep:
                ctx.kept.append(all_logps)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        h, weight, bias, targets = ctx.saved_tensors
        w = weight.to(h.dtype)
        dh = torch.empty_like(h)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: the head is frozen
        db = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        with torch.autocast(h.device.type, enabled=False):
            for rows in chunks(h, w):
                # (rows, V): log-probabilities, which become, in place, the gradient of the logits
                d = ctx.kept.pop(0) if ctx.kept else vocabulary_logps(h[rows], w, bias)
                d.exp_()
                d[torch.arange(len(d), device=d.device), targets[rows]] -= 1
                d *= -grad[rows, None]  # (onehot - softmax) * grad
                if db is not None:
                    db += d.sum(0)
                d = d.to(h.dtype)
                dh[rows] = wide_product(d, w).to(h.dtype)
                if dw is not None:
                    add_product(dw, d.T, h[rows])
        return dh, dw, db, None, None


def target_logps(h, weight, bias, targets):
    """log softmax(h W^T + b)[target], fp32: h (S, C), weight (V, C), bias (V,) or None, targets (S,). The
    logits of all positions are in memory only if there are no more than KEPT of them."""
    h = h.to(compute_dtype(weight))
    with torch.autocast(h.device.type, enabled=False):
        keep = torch.is_grad_enabled() and len(h) * len(weight) <= KEPT
        return TargetLogps.apply(h, weight, bias, targets, keep)


# -----------------------------------------------------------------------------------------------------------
# The whole.


class Transformer(nn.Module):
    """A causal language model of a shape given by `config`. max_positions: the longest sequence that it can
    take; None where positions are rotary, which do not end."""

    gradient_checkpointing = False  # True: compute each block again in the backward pass
    file_dtype = torch.float32  # of the weights in the files
    generation_config = {}  # generation_config.json as it was read

    def __init__(self, config, hf_config=None):
        super().__init__()
        self.config = config
        self.hf_config = hf_config  # config.json as it was read
        self.max_positions = config.max_position_embeddings if config.learned_positions else None
        C = config.hidden_size
        m = self.model = nn.Module()  # only for the parameters' names (`model.layers...`)
        m.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        if config.learned_positions:
            m.embed_positions = nn.Embedding(config.max_position_embeddings + config.position_offset, C)
        m.project_in = identity
        m.project_out = identity
        if config.embed_dim != C:
            m.project_in = nn.Linear(config.embed_dim, C, bias=False)
            m.project_out = nn.Linear(C, config.embed_dim, bias=False)
        m.layers = nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)])
        m.norm = make_norm(config, C, config.norm_first)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=config.head_bias)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialise(self, seed=0):
        """Random weights: N(0, 0.02) for matrices, norms that only normalise, biases zero. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.02, generator=generator)
            else:
                p.fill_(1 - self.config.norm_offset if name.endswith("weight") else 0)
        return self

    def add_adapters(self, r, alpha):
        """LoRA: the blocks' linear layers (not routers, nor experts) get a trained update of rank r, all else
        is frozen. start_adapters initialises it, once the parameters are on their device. PEFT adapts layers
        that the files join (Phi-3's q, k, v) as one: they share the first one's A, and the B of each is its
        rows of the joint B."""
        self.requires_grad_(False)
        self.adapter_scale = alpha / r
        firsts = {}  # by the layer's name in the files
        for name, layer in self.named_modules():
            if isinstance(layer, Linear):
                first = firsts.setdefault(file_name(self, name), layer)
                if first is layer:
                    layer.lora_A = nn.Parameter(layer.weight.new_empty(r, layer.in_features))
                layer.lora_B = nn.Parameter(layer.weight.new_empty(layer.out_features, r))
                layer.scale = alpha / r
                layer.first = [first]

    @torch.no_grad()
    def start_adapters(self, seed=0):
        """As PEFT: A uniform in +-1/sqrt(inputs), B zero, so that training starts from the model as it is."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if "lora_" in name:
                limit = p.shape[1] ** -0.5 if name.endswith("lora_A") else 0.0
                assign(p, torch.empty(p.shape).uniform_(-limit, limit, generator=generator))

    def hidden(self, tokens, positions, layout):
        """tokens, positions (..., T) -> final hidden states (..., T, C)."""
        m = self.model
        c = self.config
        x = m.project_in(m.embed_tokens(tokens))
        if torch.is_autocast_enabled(x.device.type):  # as above RMSNorm; frozen embeddings may be bf16
            x = x.float()
        if c.scaled_embeddings:  # by sqrt(C), rounded as x is
            x = x * x.new_full((), c.hidden_size**0.5)
        if c.learned_positions:
            x = x + m.embed_positions(positions + c.position_offset)
        rotary = {window: rotary_tables(rope, positions) for window, rope in c.ropes.items()}
        for layer in m.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, rotary, layout)
        return m.project_out(m.norm(x))

    def forward(self, batch):
        """A packed batch (data.Batch, on the model's device) -> (T,) log-probability of each target, fp32; 0
        where not scored."""
        half = compute_dtype(self.lm_head.weight).itemsize == 2
        flash = batch.inputs.is_cuda and half and self.config.head_dim % 8 == 0
        flash = flash and not torch.version.hip  # AMD's may align queries with the first keys, not the last
        x = self.hidden(batch.inputs, batch.positions, Packed(batch, flash))  # (T, C)
        scored = slice(None) if batch.scored is None else batch.scored
        logps = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        head = self.lm_head
        logps[scored] = target_logps(x[scored], head.weight, head.bias, batch.targets[scored])
        return logps

    def logits(self, tokens):
        """(B, T) ids -> (B, T, vocab) fp32 logits, plain causal: for teaching and for parity tests."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.lm_head(self.hidden(tokens, positions, plain)).float()

    def next_logits(self, tokens, positions, cache, used, last=-1):
        """Generation: tokens, positions (B, T) continue the cached sequences, the longest of which then has
        `used` tokens; last (B,): index of each row's last real token, -1: T - 1. -> (B, vocab) fp32 logits
        for what follows."""
        x = self.hidden(tokens, positions, cache.at(positions, used))  # (B, T, C)
        x = x[torch.arange(len(x), device=x.device), last]
        return self.lm_head(x).float()

    def training_flops(self, spans):
        """Floating-point operations of a forward and a backward pass over pairs of these spans (N, PARTS).
        After PaLM, appendix B: 6 per weight and token, 4 if it is frozen, of experts the active ones; 12 per
        channel of the heads and pair of tokens of which one sees the other (nanoGPT counts all T^2)."""
        c = self.config
        per_token = 0
        for name, p in [*self.model.layers.named_parameters(), ("head", self.lm_head.weight)]:
            active = c.num_experts_per_tok / c.num_experts if ".experts." in name else 1
            per_token += (6 if p.requires_grad else 4) * active * p.numel()
        sequences = spans[:, :1] + spans[:, 1:]  # (N, 2): prompt + chosen, prompt + rejected
        seen = ((sequences**2).sum() - (spans[:, 0] ** 2).sum()) / 2  # the prompt is computed once
        attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seen
        return float(per_token * spans.sum() + attention)

    # -- Hugging Face files --------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path_or_repo, *, revision=None):
        """A Hugging Face model directory or hub id -> Transformer with fp32 parameters, on the CPU, in eval
        mode. Raises UserError naming whatever is missing, unexpected, of the wrong shape or not supported."""
        return cls.outline(path_or_repo, revision=revision).load().eval()

    @classmethod
    def outline(cls, path_or_repo, *, revision=None):
        """The model without its weights, on the meta device; only its JSON files are read."""
        directory = Path(fetch(path_or_repo, revision, ["*config.json"]))
        config = directory / "config.json"
        generation = directory / "generation_config.json"
        adapter = directory / "adapter_config.json"
        if adapter.exists() and not config.exists():
            base = read_json(adapter).get("base_model_name_or_path")
            raise UserError(f"{path_or_repo}: a LoRA adapter of {base}; merge it first (PEFT's "
                            "merge_and_unload), then name the merged model")
        hf = read_json(config)
        with where(config), torch.device("meta"):
            if hf.get("model_type") == "gemma3":
                print(f"{path_or_repo}: its text model alone, without what reads images", file=sys.stderr)
                hf = hf["text_config"] | {"architectures": ["Gemma3ForCausalLM"]}
            model = cls(Config.from_hf(hf), hf)
        model.source = path_or_repo, revision
        model.generation_config = read_json(generation) if generation.exists() else {}
        return model

    @torch.no_grad()
    def load(self, device="cpu", frozen_dtype=torch.float32):
        """Fill an outline's parameters from its files, one tensor after the other.  frozen_dtype: of those
        that are not trained."""
        directory = fetch(*self.source, WEIGHT_FILES)
        parts = file_parts(self)
        outline = {name: torch.empty(p.shape, device="meta") for name, p in self.named_parameters()}
        wanted = in_files(self, outline, "meta", torch.float32)  # the shapes that the files have to have
        with where(directory):
            stored = known_names(self, find_tensors(directory, "model"))
            missing = sorted(parts.keys() - stored)
            unexpected = sorted(stored.keys() - parts)
            if missing or unexpected:
                raise UserError("the weights do not fit config.json; the first five missing tensors: "
                                f"{missing[:5]}, unexpected: {unexpected[:5]}")
        for p in self.parameters():
            if not p.requires_grad:
                p.data = p.data.to(frozen_dtype)
        self.to_empty(device=device)
        self.tie()
        parameters = dict(self.named_parameters())
        dtypes = set()
        # Largest first: a tensor of the file is in memory beside the parameters loaded so far
        for name in sorted(parts, key=lambda name: -wanted[name].numel()):
            tensor = read_tensor(*stored[name], wanted[name].shape)
            dtypes.add(tensor.dtype)
            rows = [len(outline[ours][index]) for ours, index in parts[name]]
            pieces = turned(tensor, name).split(rows)
            for (ours, index), piece in zip(parts[name], pieces):
                assign(parameters[ours], piece, index)
        self.file_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return self

    @torch.no_grad()
    def save_pretrained(self, directory, dtype=None, weights=None):
        """Write config.json, the weights (in `dtype`; default: as they were loaded) and
        generation_config.json, as transformers would. weights: {name: tensor} in place of the parameters,
        where these are spread over ranks."""
        dtype = dtype or self.file_dtype
        tensors = in_files(self, weights or dict(self.named_parameters()), "cpu", dtype)
        write_tensors(directory, "model", tensors)
        # transformers follows the file's dtype only if config.json states it; old releases read the second
        stated = dict.fromkeys(["dtype", "torch_dtype"], str(dtype).removeprefix("torch."))
        write_json(Path(directory, "config.json"), self.hf_config | stated)
        if self.generation_config:
            write_json(Path(directory, "generation_config.json"), self.generation_config)

    def save_adapters(self, directory, weights, base, r, alpha):
        """Write adapter_config.json and adapter_model.safetensors, which peft.PeftModel.from_pretrained
        loads."""
        adapters = adapters_in_files(self, weights)
        tensors = {f"base_model.model.{name}.weight": tensor.cpu() for name, tensor in adapters.items()}
        write_tensors(directory, "adapter_model", tensors)
        write_json(Path(directory, "adapter_config.json"), {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": r,
            "lora_alpha": alpha,
            "target_modules": sorted({name.split(".")[-2] for name in adapters})})


# -----------------------------------------------------------------------------------------------------------
# The families, as data.

GPT = dict(norm="layer", norm_eps=1e-5, gated=False, hidden_act="gelu_new", attention_bias=True)
QWEN = dict(sliding_window=4096, use_sliding_window=False)
GEMMA = dict(norm_offset=1.0, scaled_embeddings=True, hidden_act="gelu_pytorch_tanh", head_dim=256,
             tie_word_embeddings=True)
FAMILIES = {  # what a family's config.json leaves unsaid, where it is not Llama's case (Config's defaults)
    "llama": {},
    "mistral": dict(sliding_window=4096),
    "qwen2": dict(QWEN, max_window_layers=28, qkv_bias=True),
    "qwen3": dict(QWEN, max_window_layers=28, qk_norm=True, head_dim=128),
    "smollm3": dict(tie_word_embeddings=True, rope_theta=2e6, no_rope_layers=[1, 1, 1, 0] * 99),
    "olmo2": dict(norm_eps=1e-5, norm_inputs=False, norm_outputs=True, qk_norm=True, qk_norm_joint=True),
    "gemma": GEMMA,
    "gemma3_text": dict(GEMMA, norm_outputs=True, qk_norm=True, query_pre_attn_scalar=256, rope_theta=1e6,
                        rope_local_base_freq=1e4, sliding_window=4096, sliding_window_pattern=6,
                        vocab_size=262208, num_attention_heads=8, num_key_value_heads=4),
    "phi3": dict(sliding_window=None, norm_eps=1e-5),
    "phi": dict(GPT, parallel=True, head_bias=True, partial_rotary_factor=0.5),
    "stablelm": dict(norm="layer", norm_eps=1e-5, partial_rotary_factor=0.25),
    "gpt2": dict(GPT, learned_positions=True, tie_word_embeddings=True),
    "opt": dict(GPT, learned_positions=True, position_offset=2, hidden_act="relu", tie_word_embeddings=True),
    "mixtral": dict(sliding_window=None, norm_eps=1e-5, rope_theta=1e6, norm_topk_prob=True),
    "qwen3_moe": dict(QWEN, qk_norm=True, moe_intermediate_size=768),
}
CONFIG_KEYS = {  # config.json's older and other names -> the one used here
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "ffn_dim": "intermediate_size",
    "word_embed_proj_dim": "embed_dim",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "rms_norm_eps": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "num_local_experts": "num_experts",
    "qk_layernorm": "qk_norm",
    "use_qkv_bias": "qkv_bias",
    "enable_bias": "attention_bias",
    "use_parallel_residual": "parallel",
    "do_layer_norm_before": "norm_first",
    "rope_scaling": "rope_parameters",
}
SUPPORTED = {  # entries that have to have this value
    "quantization_config": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "no_rope_layer_interval": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
NORM_OUTPUTS = {"post_attention_layernorm": "pre_feedforward_layernorm",
                "attention_norm": "post_attention_layernorm"}
RENAMES = {  # our name -> the file's name, by substitution, top to bottom; used to load and to save
    "olmo2": NORM_OUTPUTS,
    "gemma3_text": NORM_OUTPUTS,
    "phi": {"self_attn.o_proj": "self_attn.dense", "up_proj": "fc1", "down_proj": "fc2",
            "model.norm": "model.final_layernorm", "q_norm": "q_layernorm", "k_norm": "k_layernorm"},
    # several names that become one: the file has these tensors joined by rows
    "phi3": {".q_proj": ".qkv_proj", ".k_proj": ".qkv_proj", ".v_proj": ".qkv_proj",
             ".gate_proj": ".gate_up_proj", ".up_proj": ".gate_up_proj"},
    "opt": {"model.": "model.decoder.", "self_attn.o_proj": "self_attn.out_proj",
            "input_layernorm": "self_attn_layer_norm", "post_attention_layernorm": "final_layer_norm",
            "mlp.up_proj": "fc1", "mlp.down_proj": "fc2", "decoder.norm": "decoder.final_layer_norm"},
    "gpt2": {"model.": "transformer.", "layers": "h", "embed_tokens": "wte", "embed_positions": "wpe",
             "transformer.norm": "transformer.ln_f", "input_layernorm": "ln_1",
             "post_attention_layernorm": "ln_2", "self_attn": "attn", "o_proj": "c_proj", "q_proj": "c_attn",
             "k_proj": "c_attn", "v_proj": "c_attn", "up_proj": "c_fc", "down_proj": "c_proj"},
    "mixtral": {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
}
# Tensors that are left out: constants in older files, and what reads images
LEFT_OUT = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$|vision_tower|multi_modal_projector")

# -----------------------------------------------------------------------------------------------------------
# A model's shape, from config.json.

ROPE = {  # types of rotary positions, and the numbers that they need
    "default": ["rope_theta"],
    "linear": ["rope_theta", "factor"],
    "llama3": ["rope_theta", "factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"],
}


@dataclass
class Config:
    """A model's shape. The defaults are what Llama's config.json leaves unsaid; of sizes there are none."""

    model_type: str = "llama"
    vocab_size: int = None
    hidden_size: int = None
    intermediate_size: int = None
    num_hidden_layers: int = None
    num_attention_heads: int = None
    num_key_value_heads: int = None
    head_dim: int = None
    embed_dim: int = None  # OPT-350M: embeddings narrower than the model
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    gated: bool = True  # silu(gate) * up; else one matrix up
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # what is added to the norms' weights
    norm_inputs: bool = True  # of attention and MLP
    norm_outputs: bool = False  # of attention and MLP, before the residual sum
    norm_first: bool = True  # False, in OPT-350M: after the residual sum
    qk_norm: bool = False  # queries and keys are normalised, head by head
    qk_norm_joint: bool = False  # or all heads at once
    query_pre_attn_scalar: float = 0.0  # scores are q k / sqrt(this); 0: head_dim
    scaled_embeddings: bool = False  # by sqrt(hidden_size)
    parallel: bool = False  # attention and MLP read the same input
    attention_bias: bool = False  # in queries, keys, values and output
    qkv_bias: bool = False
    mlp_bias: bool = False  # without a gate: as attention_bias
    head_bias: bool = False
    # Positions, and what each layer sees
    max_position_embeddings: int = 2048
    learned_positions: bool = False  # instead of rotary ones
    position_offset: int = 0  # the row of their table that position 0 has
    rope_theta: float = 1e4
    partial_rotary_factor: float = 1.0  # how much of each head is rotated
    windows: list = None  # by layer: how many positions a query sees, its own included; None: all before it
    ropes: dict = None  # by window: rope_type, rotary_dim and the numbers of ROPE; empty: not rotary
    rotated: list = None  # by layer: are queries and keys rotated?
    # Mixture of experts
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0  # 0: as intermediate_size
    norm_topk_prob: bool = False

    @classmethod
    def from_hf(cls, hf):
        """Hugging Face's config.json, as a dict, old spellings and new. Raises UserError for what is not
        supported. Entries that neither Config nor the family's row in FAMILIES has mean nothing to it."""
        family = hf.get("model_type")
        if family == "gemma2":
            raise UserError("Gemma 2 caps its attention scores, which no fused attention does: not supported")
        if family not in FAMILIES:
            raise UserError(f"model_type {family!r} is not supported (known are {', '.join(FAMILIES)})")
        c = cls()
        c.rope_parameters = None  # with the numbers of rotary positions; in older files rope_scaling
        c.layer_types = None
        vars(c).update(FAMILIES[family])  # also what is no field, but read by windows_of and rope_of
        for name, value in hf.items():
            key = CONFIG_KEYS.get(name, name)
            given = value is not None or key == "sliding_window"  # null: the default, but of a window: none
            if key in vars(c) and given:
                setattr(c, key, value)
        with where("a value is missing or not supported"):
            for key, value in SUPPORTED.items():
                if hf.get(key) not in (value, None):
                    raise UserError(f"{key} = {hf[key]!r}")
            complete(c)
            check_types(c)
            c.windows = windows_of(c)
            c.ropes = {} if c.learned_positions else {window: rope_of(c, window) for window in c.windows}
            c.rotated = getattr(c, "no_rope_layers", [not c.learned_positions] * c.num_hidden_layers)
        return c


def complete(c):
    """Entries that follow from others."""
    c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
    c.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
    c.embed_dim = c.embed_dim or c.hidden_size
    c.intermediate_size = c.intermediate_size or 4 * c.hidden_size
    if not c.gated:
        c.mlp_bias = c.attention_bias
    c.qkv_bias = c.qkv_bias or c.attention_bias
    if c.model_type == "gemma" and c.hidden_act == "gelu":  # in older files; the tanh one is meant
        c.hidden_act = "gelu_pytorch_tanh"


def check_types(c):
    """Raise UserError where an entry is of the wrong type, missing or negative."""
    for field in fields(c):
        value = getattr(c, field.name)
        right = type(value) is field.type or (field.type is float and type(value) is int)
        if right and type(value) in (int, float):
            right = value > 0 if field.default is None else value >= 0  # sizes have no default
        if not right and field.type not in (list, dict):  # those are set afterwards
            raise UserError(f"{field.name} = {value!r}")
    if c.hidden_act not in ACTIVATIONS:
        raise UserError(f"activation {c.hidden_act!r}")


def rope_of(c, window):
    """The rotary positions of layers with this window. In Gemma 3 those with a window have their own: new
    files list both kinds in rope_parameters; in older ones it is that of the layers without a window."""
    given = c.rope_parameters or {}
    if window and hasattr(c, "rope_local_base_freq"):
        given = given.get("sliding_attention", {"rope_theta": c.rope_local_base_freq})
    entries = vars(c) | given.get("full_attention", given)
    kind = entries.get("rope_type", entries.get("type", "default"))
    if kind not in ROPE:
        raise UserError(f"rope_type {kind!r}")
    rope = {"rope_type": kind, "rotary_dim": int(c.head_dim * entries["partial_rotary_factor"])}
    for key in ROPE[kind]:
        rope[key] = float(entries[key])
    if rope["rotary_dim"] % 2 or rope["rope_theta"] <= 0:
        raise UserError(f"rotary positions {rope}")
    return rope


def windows_of(c):
    """By layer_types in new files; in older ones all layers from max_window_layers on have the window, but
    each sliding_window_pattern-th."""
    window = getattr(c, "sliding_window", None) if getattr(c, "use_sliding_window", True) else None
    if window is not None and window < 1:
        raise UserError(f"sliding_window {window!r}")
    if c.layer_types is not None:
        window_of = {"full_attention": None, "sliding_attention": window}
        return [window_of[kind] for kind in c.layer_types]
    first = getattr(c, "max_window_layers", 0)
    pattern = getattr(c, "sliding_window_pattern", c.num_hidden_layers + 1)
    layers = range(c.num_hidden_layers)
    return [window if layer >= first and (layer + 1) % pattern else None for layer in layers]


# -----------------------------------------------------------------------------------------------------------
# A model's tensors under the names of its family's files. A part of a file's tensor is (our name, index): an
# expert's number, or ... for all of a parameter. A file's tensor has several parts where it joins layers.


def file_name(model, ours):
    """A name of ours as this family's files have it."""
    for old, new in RENAMES.get(model.config.model_type, {}).items():
        ours = ours.replace(old, new)
    return ours


def file_parts(model):
    """{name in the files: its parts, joined by rows}; a tied head stands there as the embedding alone."""
    parts = {}
    for ours, p in model.named_parameters():
        if ".experts." in ours:
            name = file_name(model, ours.replace(".experts.", ".experts.{}.") + ".weight")
            for expert in range(len(p)):
                parts[name.format(expert)] = [(ours, expert)]
        elif "lora_" not in ours:
            parts.setdefault(file_name(model, ours), []).append((ours, ...))
    return parts


def in_files(model, weights, device, dtype):
    """{our name: tensor} -> {name in the files: tensor}, with the updates of adapters in them."""
    adapters = adapters_in_files(model, weights)
    tensors = {}
    for name, parts in file_parts(model).items():
        pieces = [weights[ours][index].to(device) for ours, index in parts]
        tensor = torch.cat(pieces)  # of a single piece a copy: an expert is a view, which cannot be saved
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in adapters:
            update = adapters[f"{layer}.lora_B"] @ adapters[f"{layer}.lora_A"]
            tensor = tensor + (model.adapter_scale * update).to(device)
        tensors[name] = turned(tensor.to(dtype), name).contiguous()
    return tensors


def adapters_in_files(model, weights):
    """{our name: tensor} -> {name in the files: tensor} of adapters."""
    pieces = {}
    for ours, tensor in weights.items():
        if "lora_" in ours:
            pieces.setdefault(file_name(model, ours), []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in pieces.items()}


def turned(tensor, name):
    """A file's tensor as ours, and back: GPT-2 stores its linear weights as (in, out)."""
    return tensor.T if re.search(r"\.c_\w+\.weight$", name) else tensor


def known_names(model, stored):
    """The tensors that count, under their full names: hub files may lack a prefix, or hold either half of a
    tied head. stored: {name: what read_tensor takes}."""
    embedding = file_name(model, "model.embed_tokens.weight")
    prefix = embedding.partition(".")[0] + "."  # model. or transformer.
    bare = not any(prefix in name for name in stored)
    full = {}
    for name, entry in stored.items():
        if bare and not name.startswith("lm_head"):
            name = prefix + name
        name = name.replace("language_model.", "")  # of Gemma 3 with images
        if not LEFT_OUT.search(name):
            full[name] = entry
    if model.config.tie_word_embeddings and "lm_head.weight" in full:
        full.setdefault(embedding, full.pop("lm_head.weight"))
    return full


def whole(tensor):
    """All of a tensor that may be sharded over the ranks, as a copy (full_tensor may be a view of more)."""
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor


def assign(tensor, value, index=...):
    """tensor[index] = value; of a tensor sharded over the ranks (by rows, as in FSDP) each sets its rows."""
    if not hasattr(tensor, "to_local"):
        tensor[index] = value
        return
    start = 0  # value holds the rows from `start` on
    if index is not ...:
        start = index
        value = value[None]
    local = tensor.to_local()  # the rows from `first` on
    first = math.ceil(len(tensor) / tensor.device_mesh.size()) * tensor.device_mesh.get_local_rank()
    low = max(start, first)
    high = min(start + len(value), first + len(local))
    if low < high:
        local[low - first : high - first] = value[low - start : high - start]


# -----------------------------------------------------------------------------------------------------------
# safetensors on the disk.

WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
SHARD_BYTES = 5 * 10**9  # larger files are split, with an index


def find_tensors(directory, stem):
    """{name: (file, name)} of STEM.safetensors, or of the shards that STEM.safetensors.index.json names."""
    names = [f"{stem}.safetensors"]
    index = Path(directory, f"{stem}.safetensors.index.json")
    if index.exists():
        with where(index):
            names = sorted(set(read_json(index)["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise UserError("names files outside of its directory")
    elif not Path(directory, names[0]).exists():
        raise UserError(f"no {names[0]} (with adapters the model is in the run's directory, not in its "
                        "checkpoints); pickled weights (.bin) can run code when loaded and are refused: "
                        "convert them with transformers, or take the hub's conversion: --revision refs/pr/N")
    found = {}
    for name in names:
        path = Path(directory, name)
        with where(path), safe_open(path, "pt") as file:
            for tensor in file.keys():
                found[tensor] = path, tensor
    return found


def read_tensor(path, name, shape=None):
    """A tensor of a file, which has to have this shape, if one is given."""
    with where(f"{path}: tensor {name}"), safe_open(path, "pt") as file:  # its own mapping, given up with it
        tensor = file.get_tensor(name)
        shape = tensor.shape if shape is None else torch.Size(shape)
        if tensor.shape != shape or not tensor.is_floating_point():
            raise UserError(f"is {list(tensor.shape)} of {tensor.dtype}; {list(shape)} of floating-point "
                            "numbers is needed")
    return tensor


def write_tensors(directory, stem, tensors):
    """Write {name: tensor} as STEM.safetensors, or, beyond SHARD_BYTES, as shards with an index."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, directory, filename_pattern=stem + "{suffix}.safetensors",
                          max_shard_size=SHARD_BYTES)
