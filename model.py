"""One decoder-only transformer for the families ORPO is used on, exact against transformers, in and out.

    model = Transformer.from_pretrained("HuggingFaceTB/SmolLM2-135M")      # a directory or a hub id
    model.logits(tokens)               # (B, T) ids -> (B, T, vocab): the plain teaching path
    model(batch)                       # a packed batch (data.pack) -> log-probability of each target
    model.save_pretrained("out")       # what transformers loads again

In the order of reading: the small parts, attention, MLPs, scoring, the whole; then families, configs, files.
Notation:  T positions in a pack, B sequences, C hidden size, D head_dim, E experts, V vocabulary.
Parameters carry Hugging Face's Llama names. A family differs from Llama by a row of FAMILIES and of RENAMES.
"""
import inspect
import os
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from data import UserError, fetch, parse_json, read_inside, read_json, refuse, where, write_json

# varlen_attn changed between releases: 2.11 takes grouped heads as they come, later ones want to be told
GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
CHUNK = {"cpu": 2**22, "cuda": 2**28}  # logits (floats) that scoring holds at a time

# -----------------------------------------------------------------------------------------------------------
# Small parts.

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}  # exact and tanh GELU differ by 1e-3
ACTIVATIONS["gelu_new"] = ACTIVATIONS["gelu_pytorch_tanh"] = nn.GELU(approximate="tanh")


def compute_dtype(x):
    """What matrix products are computed in: autocast's dtype where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def without_autocast(x):
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


# The residual stream between blocks stays fp32 under autocast, and norms hand on autocast's dtype: in bf16
# its error grows with depth (rms of log-probs at 2, 24, 48 layers: 0.010, 0.014, 0.026; so 0.009, 0.011,
# 0.011) for 4 bytes less a channel, token and layer, of some 60.
class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        y = F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return y.to(compute_dtype(x))


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(compute_dtype(x))


def make_norm(config, size, wanted=True):
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(size, eps=config.norm_eps) if wanted else None


class Linear(nn.Linear):
    """nn.Linear; after add_adapters with a trained update of low rank: W x + alpha / r B A x (LoRA, Hu et
    al. 2021)."""

    def __init__(self, *shape, bias):
        super().__init__(*shape, bias=bias)
        self.lora_A = self.lora_B = None

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.lora_A is None else y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def rope_frequencies(rope, n, device):
    """(n / 2,) radians per position, fp32, n: rotary_dim. Not a buffer: casting a module would round it."""
    freqs = 1.0 / rope["rope_theta"] ** (torch.arange(0, n, 2, device=device, dtype=torch.float32) / n)
    if rope["rope_type"] == "linear":
        freqs = freqs / rope["factor"]
    elif rope["rope_type"] == "llama3":  # low ones are slowed by `factor`, high ones kept, between: blended
        turns = rope["original_max_position_embeddings"] * freqs / (2 * torch.pi)  # over the first context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / rope["factor"]
    return freqs


def rotate(x, cos, sin):
    """Rotary positions, on the first part of each head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) of its
    halves. x (..., T, heads, D); cos, sin (..., T, 1, rotary_dim), sin with the first half's sign."""
    n = cos.shape[-1]
    turned = x if n == x.shape[-1] else x[..., :n]
    turned = torch.addcmul(turned * cos, turned.roll(n // 2, -1), sin).type_as(x)
    return turned if n == x.shape[-1] else torch.cat([turned, x[..., n:]], dim=-1)


# -----------------------------------------------------------------------------------------------------------
# Attention: one softmax, three layouts, called with the module and q, k, v: q (..., T, heads, D) -> the same.


def causal_attention(q, k, v, window=None, positions=None):
    """q (B, Q, heads, D), k and v (B, K, kv heads, D) -> (B, Q, heads, D). The queries stand at the end of
    the keys, or at `positions` (B, Q) among them."""
    Q, K, mask = q.shape[1], k.shape[1], None
    if positions is not None or 1 < Q < K or window and K > window:
        at = torch.arange(K - Q, K, device=q.device)[None] if positions is None else positions
        back = at[:, None, :, None] - torch.arange(K, device=q.device)  # (B, 1, Q, K): how far each key lies
        mask = (back >= 0) & (back < (window or K))
    grouped, causal = q.shape[2] != k.shape[2], mask is None and Q > 1
    if grouped and q.device.type != "cpu" and (mask is not None or q.dtype.itemsize > 2):
        # on a GPU only flash attention takes grouped heads, and no mask, no fp32: all scores would be held
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        grouped = False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def plain(module, q, k, v):
    """Plain causal attention over (B, T, ...), of `logits`."""
    return causal_attention(q, k, v, module.window)


class Packed:
    """A packed batch: each position sees its own prefix and its own branch, as data.Batch says in segments.
    With flash attention (CUDA, fp16 or bf16) one call without mask or padding, elsewhere a loop."""

    def __init__(self, batch, flash):
        self.batch, self.flash = batch, flash

    def __call__(self, module, q, k, v):
        b = self.batch
        k, v = k.index_select(0, b.kv_index), v.index_select(0, b.kv_index)
        if not self.flash:
            return self.loop(module.window, q[None], k[None], v[None])
        back = -1 if module.window is None else module.window - 1
        return varlen_attn(q, k, v, b.cu_q, b.cu_k, b.max_q, b.max_k, window_size=(back, 0), **GROUPED_HEADS)

    @torch.compiler.disable  # what depends on the pack's lengths stays outside of the graph
    def loop(self, window, q, k, v):
        queries, keys = self.batch.queries, self.batch.keys
        segments = zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1))
        return torch.cat([causal_attention(*segment, window) for segment in segments], 1)[0]


class Cache:
    """Keys and values kept for generation. Sequences may differ in length: a row's next token is written
    where that row ends, over the padding left there; nobody looks past his own position."""

    def __init__(self):
        self.kept = {}  # Attention -> its keys and its values, (B, room, kv heads, D)

    def at(self, positions, used):
        """Where the next tokens stand: positions (B, T); `used`: the longest row's length with them."""
        self.used, self.positions = used, positions
        self.place = torch.arange(len(positions), device=positions.device)[:, None], positions
        if len(positions) == 1:  # one sequence ends where its keys do: it needs no mask
            self.positions, self.place = None, (slice(None), slice(used - positions.shape[1], used))
        return self

    def __call__(self, module, q, k, v):
        keys, values = self.kept.get(module) or (k[:, :0], v[:, :0])
        if keys.shape[1] < self.used:
            more = (0, 0, 0, 0, 0, 2 * self.used + 64 - keys.shape[1])
            keys, values = self.kept[module] = F.pad(keys, more), F.pad(values, more)
        keys[self.place], values[self.place] = k, v
        keys, values = keys[:, : self.used], values[:, : self.used]
        return causal_attention(q, keys, values, module.window, self.positions)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window, self.rotated = D, config.windows[layer], config.rotated[layer]
        self.q_proj = Linear(C, heads * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, kv_heads * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, kv_heads * D, bias=config.qkv_bias)
        self.o_proj = Linear(heads * D, C, bias=config.out_bias)
        self.q_norm, self.k_norm = (make_norm(config, D, config.qk_norm) for _ in "qk")

    def forward(self, x, rotary, layout):
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(x).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # (..., T, heads, D), and (..., T, kv heads, D)
        if self.rotated:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.o_proj(layout(self, q, k, v).flatten(-2))


# -----------------------------------------------------------------------------------------------------------
# MLPs. Each returns its output and the router's statistics, None without experts.


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear(C, inner, bias=config.mlp_bias) if config.gated else None
        self.up_proj = Linear(C, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, C, bias=config.mlp_bias)

    def forward(self, x, weight=None):
        up = self.up_proj(x)
        hidden = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up
        return self.down_proj(hidden), None


@torch.compiler.disable  # which knows it in bf16 only
def grouped_mm(a, weight, ends):
    """Rows ends[e-1]:ends[e] of a (T k, in) times weight[e].T (out, in), for each expert e -> (T k, out)."""
    w = weight.to(a.dtype).transpose(-2, -1)
    if a.dtype.itemsize <= 4 and all(n * a.dtype.itemsize % 16 == 0 for n in w.shape[1:]):
        return F.grouped_mm(a, w, offs=ends)
    pieces = a.tensor_split(ends[:-1].tolist())  # what it does not take: float64 and odd sizes
    return torch.cat([piece @ matrix for piece, matrix in zip(pieces, w)])


class MoE(nn.Module):
    """Top-k mixture of experts. Tokens are sorted by expert, each matrix is one grouped product: cost grows
    with k. The experts' weights are stacked: an idle expert has a zero gradient, and not none at all."""

    def __init__(self, config):
        super().__init__()
        E, C, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate = nn.Linear(C, E, bias=False)
        shapes = dict(gate_proj=(E, inner, C), up_proj=(E, inner, C), down_proj=(E, C, inner))
        self.experts = nn.ParameterDict((name, torch.empty(shape)) for name, shape in shapes.items())

    def forward(self, x, weight=None):
        """x (..., C); weight (T,): how often each token counts in the router's statistics, None where nobody
        asks. They are (2, E): the numbers of tokens sent, and the sums of probability given, to each."""
        shape, x, w = x.shape, x.flatten(0, -2).to(compute_dtype(x)), self.experts  # (T, C)
        probs = self.gate(x).float().softmax(-1)  # (T, E)
        share, expert = probs.topk(self.top_k, dim=-1)  # (T, k)
        if self.renormalise:
            share = share / share.sum(-1, keepdim=True)
        ordered, order = expert.flatten().sort(stable=True)  # (T k,): assignments, grouped by expert
        token = order // self.top_k
        ends = torch.searchsorted(ordered, torch.arange(probs.shape[-1], device=x.device), right=True).int()
        sorted_x = x.index_select(0, token)  # (T k, C)
        hidden = self.act(grouped_mm(sorted_x, w.gate_proj, ends)) * grouped_mm(sorted_x, w.up_proj, ends)
        output = grouped_mm(hidden, w.down_proj, ends) * share.flatten()[order, None].to(x.dtype)
        output = torch.zeros_like(x).index_add(0, token, output).view(shape)
        if weight is None:
            return output, None
        sent = torch.zeros_like(probs[0]).index_add(0, expert.flatten(), weight.repeat_interleave(self.top_k))
        return output, torch.stack([sent, (weight[:, None] * probs).sum(0)])  # `@`: autocast would round it


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.parallel, self.norm_first = config.parallel, config.norm_first
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.hidden_size, not config.parallel)
        self.mlp = MoE(config) if layer in config.moe_layers else MLP(config)

    def forward(self, x, rotary, layout, weight=None):
        """x (..., T, C) -> the same, and the router's statistics of this layer (None without experts)."""
        if not self.norm_first:  # OPT-350M: after the residual sum
            x = self.input_layernorm(x + self.self_attn(x, rotary, layout))
            out, router = self.mlp(x, weight)
            return self.post_attention_layernorm(x + out), router
        h = self.input_layernorm(x)
        x = x + self.self_attn(h, rotary, layout)
        out, router = self.mlp(h if self.parallel else self.post_attention_layernorm(x), weight)
        return x + out, router


# -----------------------------------------------------------------------------------------------------------
# Scoring: log-probabilities of targets, without the logits of the batch.


def wide_product(a, b):
    """a @ b; that of half-precision factors in fp32, without rounding to half precision first."""
    if a.dtype.itemsize > 2:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def some_logits(weight, bias, h, *tensors):
    """Logits of some rows of h at a time, no more than CHUNK of them, with those rows of h and the others."""
    rows = max(1, CHUNK.get(weight.device.type, 2**26) // len(weight))
    for x, *others in zip(*(tensor.split(rows) for tensor in (h, *tensors))):
        logits = wide_product(x, weight.T)
        yield logits if bias is None else logits.add_(bias), x, *others


class TargetLogps(torch.autograd.Function):
    """target_logps. The backward computes the logits again; by hand, it holds fewer than checkpointing."""

    @staticmethod
    def forward(ctx, h, weight, bias, targets):
        ctx.save_for_backward(h, weight, bias, targets)
        some = some_logits(weight.to(h.dtype), bias, h, targets[:, None])
        return torch.cat([logits.log_softmax(-1).gather(1, target)[:, 0] for logits, _, target in some])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        h, weight, bias, targets = ctx.saved_tensors
        w, dh, wanted = weight.to(h.dtype), torch.empty_like(h), ctx.needs_input_grad
        dw = torch.zeros_like(weight) if wanted[1] else None  # a frozen head has none
        db = torch.zeros_like(bias) if wanted[2] else None
        with without_autocast(h):
            for logits, x, target, g, dx in some_logits(w, bias, h, targets[:, None], grad[:, None], dh):
                d = logits.softmax(-1).scatter_add_(1, target, torch.full_like(g, -1))
                d = d.mul_(-g)  # (onehot - softmax) g
                if db is not None:
                    db += d.sum(0)
                d = d.to(h.dtype)
                dx.copy_(wide_product(d, w))
                if dw is not None:
                    dw += wide_product(d.T, x)
        return dh, dw, db, None


def target_logps(h, weight, bias, targets):
    """log softmax(h W^T + b)[target], fp32: h (S, C), weight (V, C), bias (V,) or None, targets (S,)."""
    h = h.to(compute_dtype(weight))
    with without_autocast(h):
        return TargetLogps.apply(h, weight, bias, targets)


# -----------------------------------------------------------------------------------------------------------
# The whole.


class Transformer(nn.Module):
    """A causal language model.  config: Config.  hf_config: config.json as it was read.  Set the attribute
    gradient_checkpointing to compute each block again in the backward pass."""

    def __init__(self, config, hf_config=None):
        super().__init__()
        self.config, self.hf_config, self.generation_config = config, hf_config, None
        self.file_dtype, self.gradient_checkpointing = torch.float32, False
        # The longest sequence the model can take; None for rotary positions, which do not end
        self.max_positions = config.max_position_embeddings if config.learned_positions else None
        C, narrow, vocabulary = config.hidden_size, config.embed_dim, config.vocab_size
        rows = config.max_position_embeddings + config.position_offset
        m = self.model = nn.Module()  # only for the parameters' names (`model.layers...`)
        m.embed_tokens = nn.Embedding(vocabulary, narrow)
        m.embed_positions = nn.Embedding(rows, C) if config.learned_positions else None
        m.project_in = nn.Linear(narrow, C, bias=False) if narrow != C else nn.Identity()
        m.project_out = nn.Linear(C, narrow, bias=False) if narrow != C else nn.Identity()
        m.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        m.norm = make_norm(config, C, config.norm_first and not config.no_final_norm) or nn.Identity()
        self.lm_head = nn.Linear(narrow, vocabulary, bias=config.head_bias)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialise(self, seed=0):
        """Random weights: N(0, 0.02) for matrices, ones for norms, zeros for biases. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            p.normal_(0, 0.02, generator=generator) if p.ndim > 1 else p.fill_(name.endswith("weight"))
        return self

    def add_adapters(self, r, alpha):
        """LoRA: the blocks' linear layers (not a router's, nor experts) learn an update of rank r, all else
        is frozen. Their start is set by start_adapters, once the parameters are where they will be."""
        joined = [name for name, held in self.file_parts().items() if len(held) > 1]
        # PEFT has one update for what is several layers here
        refuse((joined, f"--lora_r: {self.config.model_type} joins layers {joined[:1]}: not supported"))
        self.requires_grad_(False)
        for layer in self.modules():
            if isinstance(layer, Linear):
                empty = partial(torch.empty, device=layer.weight.device, dtype=torch.float32)
                layer.lora_A = nn.Parameter(empty(r, layer.in_features))
                layer.lora_B = nn.Parameter(empty(layer.out_features, r))
                layer.scale = alpha / r

    @torch.no_grad()
    def start_adapters(self, seed=0):
        """As PEFT: A uniform in +-1/sqrt(inputs), B zero, so that training starts from the model as it is."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                limit = parameter.shape[1] ** -0.5 if name.endswith("lora_A") else 0.0
                assign(parameter, torch.empty(parameter.shape).uniform_(-limit, limit, generator=generator))

    def hidden(self, tokens, positions, layout, weight=None):
        """tokens, positions (..., T) -> final hidden states (..., T, C), and the router's statistics summed
        over layers."""
        m, rotary, statistics = self.model, None, []
        x = m.project_in(m.embed_tokens(tokens))
        if m.embed_positions is not None:
            x = x + m.embed_positions(positions + self.config.position_offset)
        else:
            freqs = rope_frequencies(self.config.rope, self.config.rotary_dim, tokens.device)
            angles = positions[..., None, None].float() * torch.cat([-freqs, freqs])
            angles = angles.to(torch.promote_types(torch.float32, x.dtype))  # float64 in the gradient check
            rotary = angles.cos(), angles.sin()  # sin(-a) = -sin(a): the sign that `rotate` asks for
        for layer in m.layers:
            again = self.gradient_checkpointing and torch.is_grad_enabled()
            block = partial(checkpoint, layer, use_reentrant=False) if again else layer
            x, stats = block(x, rotary, layout, weight)
            statistics += [] if stats is None else [stats]
        return m.project_out(m.norm(x)), sum(statistics) if statistics else None

    def forward(self, batch, router_weight=None):
        """A packed batch (data.Batch, on the model's device) -> (T,) log-probability of each target, fp32; 0
        where not scored. With router_weight (T,), how often each position counts: (logps, router), router
        (2, E) summed over the layers: tokens sent to and probability given to each expert."""
        half = batch.inputs.is_cuda and compute_dtype(self.lm_head.weight).itemsize == 2
        layout = Packed(batch, flash=half and self.config.head_dim % 8 == 0 and self.config.head_dim <= 256)
        x, router = self.hidden(batch.inputs, batch.positions, layout, router_weight)  # (T, C)
        some = slice(None) if batch.scored is None else batch.scored
        logps = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        logps[some] = target_logps(x[some], self.lm_head.weight, self.lm_head.bias, batch.targets[some])
        return logps if router_weight is None else (logps, router)

    def logits(self, tokens):
        """(B, T) ids -> (B, T, vocab) fp32 logits, plain causal: for teaching and for parity tests."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.lm_head(self.hidden(tokens, positions, plain)[0]).float()

    def next_logits(self, tokens, positions, cache, used, last=None):
        """Generation: tokens, positions (B, T) continue the cached sequences, the longest of which then has
        `used` tokens; last (B,): index of each row's last real token, None: T - 1. -> (B, vocab) fp32 logits
        for what follows."""
        x = self.hidden(tokens, positions, cache.at(positions, used))[0]  # (B, T, C)
        x = x[:, -1] if last is None else x[torch.arange(len(x), device=x.device), last]
        return self.lm_head(x).float()

    def training_flops(self, spans):
        """Floating-point operations of one forward and backward over pairs of the given spans (N, 3), the
        useful ones only: no padding, no second prompt, no recomputation. 6 per matrix weight and token
        (Kaplan et al. 2020), 4 of a frozen one, 12 D per head and query-key pair; of the experts only those
        a token visits."""
        c, weights = self.config, 0
        for name, parameter in (*self.model.named_parameters(), ("head", self.lm_head.weight)):
            if parameter.ndim > 1 and "embed" not in name:
                part = c.num_experts_per_tok / c.num_experts if ".experts." in name else 1
                weights += parameter.numel() * part * (1 if parameter.requires_grad else 2 / 3)
        prefix, chosen, rejected = spans.double().unbind(1)
        n = torch.stack([prefix + chosen, prefix + rejected, prefix])  # less the last, which both others have
        chosen, rejected, twice = (n * (n + 1)).sum(1) / 2
        seen = c.num_hidden_layers * c.num_attention_heads * (chosen + rejected - twice)  # sliding or not
        return float(6 * weights * spans.sum() + 12 * c.head_dim * seen)

    # -- Hugging Face files --------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path_or_repo, *, revision=None):
        """A Hugging Face model directory or hub id -> Transformer with fp32 parameters, on the CPU, in eval
        mode. Raises UserError naming whatever is missing, unexpected, of the wrong shape or not supported."""
        return cls.outline(path_or_repo, revision=revision).load().eval()

    @classmethod
    def outline(cls, path_or_repo, *, revision=None):
        """The model without its weights, on the meta device; only its two JSON files are read."""
        directory = fetch(path_or_repo, revision, ["config.json", "generation_config.json"])
        hf, generation = (parse_json(read_inside(directory, name), directory, name)
                          for name in ("config.json", "generation_config.json"))
        with torch.device("meta"):
            model = cls(Config.from_hf(hf, f"{directory}/config.json"), hf)
        model.source, model.generation_config = (path_or_repo, revision), generation
        return model

    @torch.no_grad()
    def load(self, device="cpu", frozen_dtype=torch.float32):
        """Fill an outline's parameters from its files, one tensor after the other, once all fit.
        frozen_dtype: of those that are not trained."""
        directory, parts = fetch(*self.source, WEIGHT_FILES), self.file_parts()
        outline = {name: torch.empty(p.shape, device="meta") for name, p in self.named_parameters()}
        wanted = self.in_files(outline, "meta", torch.float32)
        with where(directory):
            stored = self.known_names(find_tensors(directory, "model"))
            missing, unexpected = sorted(parts.keys() - stored), sorted(stored.keys() - parts)
            what = f"missing tensors: {missing[:5]}, unexpected: {unexpected[:5]} (the first five)"
            refuse((missing or unexpected, f"the weights do not fit config.json; {what}"))
        for name, tensor in wanted.items():
            read_tensor(*stored[name], tensor.shape, values=False)
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(frozen_dtype)
        self.to_empty(device=device)  # memory that is not touched yet, and so not taken yet
        self.tie()
        parameters, dtypes = dict(self.named_parameters()), set()
        # Largest first: no more of the files is held than one tensor, and at the end that is a small one.
        for name in sorted(parts, key=lambda name: -wanted[name].numel()):
            tensor = read_tensor(*stored[name], wanted[name].shape)
            rows = [len(outline[ours][index]) for ours, index in parts[name]]
            for (ours, index), piece in zip(parts[name], self.turned(tensor, name).split(rows)):
                assign(parameters[ours], piece, index)
            dtypes.add(tensor.dtype)
        self.file_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return self

    @torch.no_grad()
    def save_pretrained(self, directory, dtype=None, weights=None):
        """Write config.json, the weights (in `dtype`; default: as they were loaded) and
        generation_config.json, as transformers would. weights: {name: tensor} in place of the parameters,
        where these are spread over ranks."""
        dtype = dtype or self.file_dtype
        tensors = self.in_files(weights or dict(self.named_parameters()), "cpu", dtype)
        for name, tensor in tensors.items():
            if dtype == torch.float16 and not tensor.isfinite().all():
                raise UserError("its values do not fit float16; save as bfloat16 or float32", name)
        write_tensors(directory, "model", tensors)
        # transformers follows the file's dtype only if config.json states it; old releases read the second
        stated = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
        write_json(os.path.join(directory, "config.json"), self.hf_config | stated)
        if self.generation_config:
            write_json(os.path.join(directory, "generation_config.json"), self.generation_config)

    def file_name(self, ours):
        """A name of ours as this family's files have it."""
        for old, new in RENAMES.get(self.config.model_type, {}).items():
            ours = ours.replace(old, new)
        return ours

    def file_parts(self):
        """{name in the files: [(our name, index)]}: what a file's tensor holds, joined by rows. The index is
        an expert's number, or ... for all of a parameter; a tied head stands there as the embedding alone."""
        parts = {}
        for ours, parameter in self.named_parameters():
            if "lora_" in ours:
                continue
            expert = ".experts." in ours
            name = self.file_name(ours.replace(".experts.", ".experts.{}.") + ".weight" * expert)
            for index in range(len(parameter)) if expert else [...]:
                parts.setdefault(name.format(index), []).append((ours, index))
        return parts

    def in_files(self, weights, device, dtype):
        """{our name: tensor} -> {name in the files: tensor}."""
        tensors = {}
        for name, held in self.file_parts().items():
            pieces = [self.merged(weights, ours)[index].to(device, dtype) for ours, index in held]
            alone = held[0][1] is ... and len(held) == 1  # else copied: shards take no views
            tensors[name] = self.turned(pieces[0] if alone else torch.cat(pieces), name).contiguous()
        return tensors

    def merged(self, weights, ours):
        """A parameter with its adapter's update, if it has one."""
        weight, layer = weights[ours], ours.removesuffix("weight")
        if layer + "lora_A" not in weights:
            return weight
        update = weights[layer + "lora_B"] @ weights[layer + "lora_A"]
        return weight + (self.get_submodule(layer.rstrip(".")).scale * update).to(weight.device)

    def save_adapters(self, directory, weights, base, r, alpha):
        """Write adapter_config.json and adapter_model.safetensors, which peft.PeftModel.from_pretrained
        loads."""
        adapters = {self.file_name(ours): tensor for ours, tensor in weights.items() if "lora_" in ours}
        tensors = {f"base_model.model.{name}.weight": tensor.cpu() for name, tensor in adapters.items()}
        write_tensors(directory, "adapter_model", tensors)
        write_json(os.path.join(directory, "adapter_config.json"), {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": r,
            "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": sorted({name.split(".")[-2] for name in adapters})})

    def turned(self, tensor, name):
        """A file's tensor as ours, and back: GPT-2 stores its linear weights as (in, out)."""
        transposed = self.config.model_type == "gpt2" and re.search(r"\.c_\w+\.weight$", name)
        return tensor.T if transposed else tensor

    def known_names(self, stored):
        """The tensors that count, under their full names: hub files may lack a prefix, or hold either half
        of a tied head."""
        embedding = self.file_name("model.embed_tokens.weight")
        prefix = embedding.partition(".")[0] + "."  # model. or transformer.
        full = {name: entry for name, entry in stored.items() if not BUFFERS.search(name)}
        if not any(name.startswith(prefix) for name in full):
            full = {name if name.startswith("lm_head") else prefix + name: full[name] for name in full}
        if self.config.tie_word_embeddings and "lm_head.weight" in full:
            two = full.setdefault(embedding, full["lm_head.weight"]), full.pop("lm_head.weight")
            differ = not torch.equal(*(read_tensor(*entry, self.lm_head.weight.shape) for entry in two))
            refuse((differ, f"lm_head.weight and {embedding} differ, but tie_word_embeddings is true"))
        return full


def whole(tensor):
    """All of a tensor that may be sharded over ranks, where it comes as a view of something padded."""
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor


def assign(tensor, value, index=...):
    """tensor[index] <- value. Of a tensor sharded over ranks (by rows, as FSDP does) each takes its part."""
    start, value = (0, torch.atleast_1d(value)) if index is ... else (index, value[None])
    first, tensor = 0, torch.atleast_1d(tensor)
    if hasattr(tensor, "to_local"):
        first = -(-len(tensor) // tensor.device_mesh.size()) * tensor.device_mesh.get_local_rank()
        tensor = tensor.to_local()
    low, high = max(start, first), min(start + len(value), first + len(tensor))
    if low < high:
        tensor[low - first : high - first].copy_(value[low - start : high - start])


# -----------------------------------------------------------------------------------------------------------
# The families, as data.

CONFIG_KEYS = {  # config.json's older and other names -> the one used here
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_inner": "intermediate_size", "n_positions": "max_position_embeddings", "ffn_dim": "intermediate_size",
    "activation_function": "hidden_act", "rms_norm_eps": "norm_eps", "layer_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps", "num_local_experts": "num_experts", "word_embed_proj_dim": "embed_dim",
    "qk_layernorm": "qk_norm", "_remove_final_layer_norm": "no_final_norm", "use_qkv_bias": "qkv_bias",
    "use_parallel_residual": "parallel", "do_layer_norm_before": "norm_first"}
# A model's shape: the sizes that config.json has to give, and what it leaves unsaid in Llama's case.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "intermediate_size", "embed_dim")  # OPT-350M: embeddings narrower than the model
LLAMA = dict(
    model_type="llama", tie_word_embeddings=False, hidden_act="silu", norm="rms", norm_eps=1e-6,  # or "layer"
    rope_theta=1e4, partial_rotary_factor=1.0, max_position_embeddings=2048,
    learned_positions=False, position_offset=0,  # instead of rotary ones, from this row of their table on
    gated=True, parallel=False,  # silu(gate) * up or one matrix up; attention and MLP read the same input
    qk_norm=False, qkv_bias=False, out_bias=False, mlp_bias=False, head_bias=False,
    norm_first=True, no_final_norm=False,  # OPT-350M: after the residual sum, and none at the end
    num_experts=0, num_experts_per_tok=2, moe_intermediate_size=0, norm_topk_prob=False,
    router_aux_loss_coef=0.0, output_router_logits=False)
LIMITS = dict(vocab_size=2**31, max_position_embeddings=2**31, num_hidden_layers=2**12, num_experts=2**12,
              rope_theta=1e15)  # of the other numbers: 2**20

# What another family's config.json leaves unsaid. "=key" stands for what it says under another name.
BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
LAYER_NORM = dict(norm="layer", norm_eps=1e-5)
PLAIN = dict(LAYER_NORM, gated=False, hidden_act="gelu_new", **BIASES)
ATTENTION_BIAS = dict(qkv_bias="=attention_bias", out_bias="=attention_bias")
QWEN = dict(sliding_window=4096, use_sliding_window=False)
QWEN3 = dict(QWEN, **ATTENTION_BIAS, qk_norm=True)
MIXTURE = dict(decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.001)
FAMILIES = {
    "llama": ATTENTION_BIAS,
    "mistral": dict(sliding_window=4096),
    "qwen2": dict(QWEN, qkv_bias=True, max_window_layers=28),
    "qwen3": dict(QWEN3, head_dim=128, max_window_layers=28),
    "smollm3": dict(ATTENTION_BIAS, tie_word_embeddings=True, rope_theta=2e6, no_rope_layer_interval=4),
    "phi3": dict(sliding_window=None, norm_eps=1e-5),
    "phi": dict(PLAIN, parallel=True, head_bias=True, partial_rotary_factor=0.5),
    "stablelm": dict(LAYER_NORM, partial_rotary_factor=0.25),
    "gpt2": dict(PLAIN, learned_positions=True, tie_word_embeddings=True),
    "opt": dict(PLAIN, learned_positions=True, position_offset=2, hidden_act="relu", tie_word_embeddings=True,
                enable_bias=True, **dict.fromkeys(BIASES, "=enable_bias")),
    "mixtral": dict(MIXTURE, sliding_window=None, norm_eps=1e-5, rope_theta=1e6, norm_topk_prob=True,
                    moe_intermediate_size="=intermediate_size"),
    "qwen3_moe": dict(QWEN3, **MIXTURE, moe_intermediate_size=768)}
REFUSED = dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True,
               layer_norm_elementwise_affine=False)
STRAY = "intermediate_size", "num_key_value_heads", "head_dim"  # mean nothing to OPT and GPT-2
# our name -> the file's name, by substitution, top to bottom; used to load and to save
RENAMES = {
    "phi": {"self_attn.o_proj": "self_attn.dense", "up_proj": "fc1", "down_proj": "fc2",
            "model.norm": "model.final_layernorm", "q_norm": "q_layernorm", "k_norm": "k_layernorm"},
    "phi3": {".q_proj": ".qkv_proj", ".k_proj": ".qkv_proj", ".v_proj": ".qkv_proj",
             ".gate_proj": ".gate_up_proj", ".up_proj": ".gate_up_proj"},
    "opt": {"model.": "model.decoder.", "self_attn.o_proj": "self_attn.out_proj",
            "input_layernorm": "self_attn_layer_norm", "post_attention_layernorm": "final_layer_norm",
            "mlp.up_proj": "fc1", "mlp.down_proj": "fc2", "decoder.norm": "decoder.final_layer_norm"},
    "gpt2": {"model.": "transformer.", "layers": "h", "embed_tokens": "wte", "embed_positions": "wpe",
             "transformer.norm": "transformer.ln_f", "input_layernorm": "ln_1",
             "post_attention_layernorm": "ln_2", "self_attn": "attn", "o_proj": "c_proj", "q_proj": "c_attn",
             "k_proj": "c_attn", "v_proj": "c_attn", "up_proj": "c_fc", "down_proj": "c_proj"},
    "mixtral": {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}}
BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")  # constants in older files
ROPE = {"default": (), "linear": ("factor",),  # rope types, and their numbers
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


class Config(SimpleNamespace):
    """A model's shape: SIZES, the keys of LLAMA, and what follows from them: rope, rotary_dim, and by layer
    windows (how far back it sees, itself included; None: all) and rotated; moe_layers: those with experts."""

    @classmethod
    def from_hf(cls, hf, place="config.json"):
        """Hugging Face's config.json, as a dict, old spellings and new. Raises UserError for what is not
        supported, or what no model can be: it would fail much later, or ask for all of the memory."""
        with where(place, "a value is missing or not supported"):
            family = hf.get("model_type")
            refuse((family not in FAMILIES, f"model_type {family!r} (known are {', '.join(FAMILIES)})"))
            row, kinds = FAMILIES[family], dict.fromkeys(SIZES, 1) | LLAMA
            stray = STRAY if "learned_positions" in row else ()
            said = {CONFIG_KEYS.get(k, k): v for k, v in hf.items() if v is not None and k not in stray}
            c = LLAMA | row | said
            c |= {key: c.get(source[1:], False) for key, source in row.items() if str(source).startswith("=")}
            width, heads = c["hidden_size"], c["num_attention_heads"]
            c = dict(num_key_value_heads=heads, head_dim=width // heads, intermediate_size=4 * width,
                     embed_dim=width) | c
            for key, usual in kinds.items():
                good = type(c[key]) is type(usual)
                if type(usual) in (int, float):
                    least = type(usual) is int and usual > 0  # sizes are at least 1, unless 0 is usual
                    good = type(c[key]) in (int, type(usual)) and least <= c[key] < LIMITS.get(key, 2**20)
                refuse((not good, f"{key} = {c[key]!r}"))
            for key, value in REFUSED.items():
                refuse((hf.get(key) == value, f"{key} = {value}"))
            refuse(
                (family == "stablelm" and c["qk_norm"], "qk_layernorm (a norm of its own to each head)"),
                ("quantization_config" in c, "quantized weights (quantization_config)"),
                (c["hidden_act"] not in ACTIVATIONS, f"activation {c['hidden_act']!r}"),
                (heads % c["num_key_value_heads"], f"{heads} heads over {c['num_key_value_heads']}"))
            shape = {key: c[key] for key in kinds} | _rope(c)
            return cls(**shape, windows=_windows(c, hf, row), moe_layers=_moe_layers(c, row))


def _rope(c):
    """Rotary positions, given as rope_parameters in new files, rope_theta and rope_scaling in older ones."""
    layers = range(c["num_hidden_layers"])
    if c["learned_positions"]:
        return dict(rope={}, rotary_dim=0, rotated=[False for _ in layers])
    said = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = said.get("rope_type", said.get("type", "default"))
    refuse((kind not in ROPE, f"rope_type {kind!r}"))
    said = c | {"original_max_position_embeddings": c["max_position_embeddings"]} | said
    rope = {"rope_type": kind} | {key: float(said[key]) for key in ("rope_theta", *ROPE[kind])}
    n = int(c["head_dim"] * said["partial_rotary_factor"])
    good = n % 2 == 0 and 0 < n <= c["head_dim"] and rope_frequencies(rope, n, "cpu").isfinite().all()
    refuse((not good, f"rotary positions {rope} over {n} of {c['head_dim']}"))
    every = c.get("no_rope_layer_interval", len(layers) + 1)
    rotated = c.get("no_rope_layers") or [(i + 1) % every for i in layers]
    return dict(rope=rope, rotary_dim=n, rotated=[bool(rotated[i]) for i in layers])


def _windows(c, hf, row):
    layers, windowed = range(c["num_hidden_layers"]), c.get("use_sliding_window", "sliding_window" in row)
    refuse((windowed and "sliding_window" not in row, "use_sliding_window"))
    window = hf.get("sliding_window", row["sliding_window"]) if windowed else None  # null: none
    good = window is None or type(window) is int and 0 < window < 2**31
    windows, first = {"full_attention": None, "sliding_attention": window}, c.get("max_window_layers", 0)
    types = c.get("layer_types") or [list(windows)[i >= first] for i in layers]
    refuse((not good or len(types) != len(layers), f"sliding_window {window!r}, {len(types)} layer_types"),
           (set(types) - set(windows), f"layer_types {sorted(set(types) - set(windows), key=str)}"))
    return [windows[kind] for kind in types]


def _moe_layers(c, row):
    if "decoder_sparse_step" not in row:
        return []
    top_k, experts, inner = c["num_experts_per_tok"], c["num_experts"], c["moe_intermediate_size"]
    refuse((inner == 0 or top_k > experts, f"{top_k} of {experts} experts of size {inner}"))
    sparse = [i for i in range(c["num_hidden_layers"]) if (i + 1) % c["decoder_sparse_step"] == 0]
    return [i for i in sparse if i not in c["mlp_only_layers"]]


# -----------------------------------------------------------------------------------------------------------
# safetensors on the disk.

WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
SHARD_BYTES = 5 * 10**9  # larger files are split, with an index
FILE_DTYPES = "F64", "F32", "F16", "BF16"
NO_WEIGHTS = ("no {}; pickled weights (.bin), which can run code when loaded, are refused: convert them with "
              "transformers, or take the hub's conversion, often a pull request: --revision refs/pr/N")


def find_tensors(directory, stem):
    """{name: (file, name)} of STEM.safetensors, or of the shards that STEM.safetensors.index.json names."""
    alone, index = f"{stem}.safetensors", os.path.join(directory, f"{stem}.safetensors.index.json")
    names, exists = [alone], os.path.exists(os.path.join(directory, alone))
    if os.path.exists(index):
        with where(index, "no usable weight_map in it"):
            names = sorted(set(read_json(index)["weight_map"].values()))
            for name in names:  # a stranger's index must not reach outside of the model's directory
                refuse((os.path.basename(name) != name, f"the file {name!r}"))
        differ = exists and names != [alone]  # readers differ in which they take
        refuse((differ, f"{index} is beside {alone}; remove what is not the model's"))
    else:
        refuse((not exists, NO_WEIGHTS.format(alone)))
    found = {}
    for path in (os.path.join(directory, name) for name in names):
        with where(path, "not readable; fetch or copy it again"), safe_open(path, "pt") as file:
            found |= {name: (path, name) for name in file.keys()}
    return found


def read_tensor(path, name, shape, values=True):
    """A tensor of a file, which has to have this shape; without `values` it is only checked."""
    with where(path, f"tensor {name}"), safe_open(path, "pt") as file:  # its own mapping, given up with it
        part = file.get_slice(name)
        found, dtype = part.get_shape(), part.get_dtype()
        refuse((found != [*shape] or dtype not in FILE_DTYPES,
                f"is {found} of {dtype}; a {[*shape]} of {', '.join(FILE_DTYPES)} is needed"))
        return file.get_tensor(name) if values else None


def write_tensors(directory, stem, tensors):
    """Write {name: tensor} as STEM.safetensors, or, beyond SHARD_BYTES, as shards with an index."""
    os.makedirs(directory, exist_ok=True)
    pattern = stem + "{suffix}.safetensors"
    save_torch_state_dict(tensors, directory, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
