"""Preference data: rows -> tokens -> packed tree batches. Knows nothing of the model or the loss.

    from data import read_pairs, Tokenizer, encode_pair, pack
    python train.py --dry_run --model MODEL --data FILE      # shows what this file makes of your rows

In the order of reading: packing, a pair's ids, the tokenizer, rows from files, the demo's task, what
programs share. Notation in all modules:  T tokens in a pack, N pairs in a pack, P / C / R tokens of one
prompt / chosen / rejected.
"""
import argparse
import difflib
import functools
import gzip
import heapq
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
from bisect import bisect_left
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import get_args

import numpy as np
import tokenizers
import torch
from tqdm import tqdm

# -----------------------------------------------------------------------------------------------------------
# Packing: a pair is a tree, and trees stand end to end.
#
#              prefix    | chosen branch | rejected branch     (prompt p0..p3, chosen c0..c2, rejected r0 r1)
# inputs       p0 p1 p2  | p3 c0 c1      | p3 r0               then the next pair
# targets      p1 p2 p3  | c0 c1 c2      | r0 r1
# positions    0  1  2   | 3  4  5       | 3  4
# sees         causal    | + prefix      | + prefix, never the chosen branch


@dataclass
class Batch:
    """One pack of N pairs, T positions, as torch tensors. Position t reads inputs[t] and predicts targets[t].

    inputs, targets, positions (T,).   owner (T,): 3 * pair + (0 prefix, 1 chosen branch, 2 rejected branch).
    counts (N, 3): scored targets of each part.   scored (S,): positions whose target counts; None: all.
    Attention goes by segments of queries, two a pair (prefix + chosen branch; rejected branch), each causal
    and aligned at the end of its keys. Segment s has the queries cu_q[s]:cu_q[s+1] and the keys
    kv_index[cu_k[s]:cu_k[s+1]].   cu_q, cu_k (2N + 1,) int32, all else int64.   queries, keys: the lengths
    of the segments, on the host; max_q, max_k: the longest.
    share: 1, or 0 for a pack that only keeps a rank in step with the others.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    owner: torch.Tensor
    counts: torch.Tensor
    scored: torch.Tensor | None
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    kv_index: torch.Tensor
    queries: list
    keys: list
    max_q: int
    max_k: int
    share: float = 1.0

    def to(self, device):
        """On `device`; the copy to a GPU goes through pinned memory and does not wait."""
        if torch.device(device).type == "cpu":
            return self
        moved = {name: tensor.pin_memory().to(device, non_blocking=True)
                 for name, tensor in vars(self).items() if isinstance(tensor, torch.Tensor)}
        return replace(self, **moved)


def pack(pairs, *, prompt_loss=True):
    """(prompt, chosen, rejected) ids of N pairs -> Batch. Without prompt_loss prompts are not scored."""
    inputs, targets, positions, owner, kv_index, start = [], [], [], [], [], 0
    counts, queries, keys = [], [], []  # scored targets, a row a pair; lengths of segments, two a pair
    for n, (prompt, chosen, rejected) in enumerate(pairs):
        p, c, r = len(prompt) - 1, len(chosen), len(rejected)
        inputs += [prompt[:-1], prompt[-1:], chosen[:-1], prompt[-1:], rejected[:-1]]
        targets += [prompt[1:], chosen, rejected]
        positions += [np.arange(p), p + np.arange(c), p + np.arange(r)]
        owner.append(np.repeat([3 * n, 3 * n + 1, 3 * n + 2], [p, c, r]))
        here = start + np.arange(p + c + r)
        kv_index += [here[: p + c], here[:p], here[p + c :]]  # prefix, chosen; prefix, rejected
        counts.append([p * prompt_loss, c, r])
        queries += [p + c, r]
        keys += [p + c, p + r]
        start += p + c + r
    inputs, targets, positions, owner, kv_index = (torch.from_numpy(np.concatenate(parts).astype(np.int64))
                                                   for parts in (inputs, targets, positions, owner, kv_index))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in (queries, keys))
    scored = None if prompt_loss else (owner % 3 != 0).nonzero()[:, 0]
    return Batch(inputs, targets, positions, owner, torch.tensor(counts), scored, cu_q, cu_k, kv_index,
                 queries, keys, max(queries), max(keys))


def deal(lengths, max_tokens, ranks=1):
    """Positions of `lengths` dealt to packs of at most max_tokens in sum: longest first, each to the
    emptiest pack. The number of packs is the smallest multiple of `ranks` found to do, so they come out
    nearly equal; some may be empty."""
    assert max(lengths) <= max_tokens, "checked before training"
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = ranks * math.ceil(sum(lengths) / max_tokens / ranks)
    while True:
        packs, totals = [[] for _ in range(count)], [(0, pack) for pack in range(count)]  # totals: a heap
        for i in longest_first:
            total, pack = totals[0]
            heapq.heapreplace(totals, (total + int(lengths[i]), pack))
            packs[pack].append(i)
        if max(totals)[0] <= max_tokens:
            return packs
        count += ranks * (1 + count // ranks // 16)


def make_packs(pairs, indices, max_tokens, *, rank=0, ranks=1, prompt_loss=True):
    """The packs, of at most max_tokens positions each, in which this rank computes the pairs of one
    optimizer step. Every rank gets equally many: where there is nothing left to do, the first pair with a
    share of 0."""
    batches = []
    for members in deal(pairs.spans()[indices].sum(1), max_tokens, ranks)[rank::ranks]:
        batch = pack([pairs[indices[i]] for i in members or [0]], prompt_loss=prompt_loss)
        batches.append(replace(batch, share=float(bool(members))))
    return batches


def epoch_order(count, seed, epoch):
    """The order in which epoch number `epoch` takes `count` pairs: a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_indices(count, batch_size, seed, step):
    """The pairs of optimizer step 0, 1, ... (an epoch's last may be short), and the epochs done after it."""
    epoch, place = divmod(step, math.ceil(count / batch_size))
    end = min(count, (place + 1) * batch_size)
    return epoch_order(count, seed, epoch)[place * batch_size : end], epoch + end / count


# -----------------------------------------------------------------------------------------------------------
# A row -> the ids of prompt, chosen, rejected.


def _texts(row, tokenizer):
    """prompt, prompt + chosen, prompt + rejected as text."""
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        return prompt, prompt + chosen, prompt + rejected
    options = getattr(row, "template_options", {})
    opening = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options) if prompt else ""
    full = (tokenizer.apply_chat_template(prompt + turns, **options) for turns in (chosen, rejected))
    return opening, *full


def _split(ids, tokenizer, max_length=1024, max_prompt_length=None, truncation_mode="keep_end"):
    """Ids of the three texts -> (prompt, chosen, rejected), special tokens in place; was it cut?"""
    refuse((tokenizer.eos_id is None, "no end-of-sequence token; tokenizer_config.json can set eos_token"))
    # a template may have written BOS where the tokenizer would add none
    bos = [tokenizer.bos_id] if tokenizer.adds_bos or ids[1][:1] == [tokenizer.bos_id] else []
    ids = [full[1:] if full[:1] == bos else full for full in ids]
    prompt = os.path.commonprefix(ids)  # of all three: merges across the boundary go to the responses
    responses = [_ended(full[len(prompt) :], tokenizer) for full in ids[1:]]
    if not prompt and not bos:  # something has to open the branches: BOS or EOS, as a generator would start
        bos = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    cut = len(bos) + len(prompt) + max(map(len, responses)) > max_length
    if cut:
        room = (max_prompt_length or max_length // 2) - len(bos)
        prompt = prompt[:room] if truncation_mode == "keep_start" else prompt[max(0, len(prompt) - room) :]
    prompt = bos + prompt
    return (prompt, *(response[: max_length - len(prompt)] for response in responses)), cut


def _ended(response, tokenizer):
    """A response's ids with one EOS at the end: those that stand there, and white space after them, go."""
    while tokenizer.eos_id in response:
        last = len(response) - 1 - response[::-1].index(tokenizer.eos_id)
        if tokenizer.decode(response[last + 1 :]).strip():
            break
        response = response[:last]
    return response + [tokenizer.eos_id] if response else []  # no token at all: the row will be dropped


def encode_pair(row, tokenizer, *, max_length=1024, max_prompt_length=None, truncation_mode="keep_end"):
    """One row of read_pairs -> (prompt, chosen, rejected) lists of ids, as they are trained.

    The prompt is the longest common prefix of encode(prompt), encode(prompt + chosen), encode(prompt +
    rejected). It begins with BOS where the tokenizer would put one; a response ends in EOS exactly once.
    When prompt + longer response exceed max_length tokens, the prompt is cut to max_prompt_length (default:
    half of it; from the left: keep_end; from the right: keep_start), BOS staying first, then each response
    on the right to what is left.
    """
    ids = tokenizer.encode_batch(_texts(row, tokenizer))
    return _split(ids, tokenizer, max_length, max_prompt_length, truncation_mode)[0]


@dataclass
class Pairs:
    """Tokenized pairs as flat arrays. tokens: int32, all pairs' prompt, chosen, rejected ids end to end;
    ends: (3 * pairs,) int64, where each part ends; rows: (pairs,) int64, the 1-based number of the row it
    came from."""

    tokens: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    report: str = ""  # what was read, kept, left out and cut

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        """(prompt, chosen, rejected) ids of pair i."""
        start = self.ends[3 * i - 1] if i else 0
        a, b, c = self.ends[3 * i : 3 * i + 3]
        return self.tokens[start:a], self.tokens[a:b], self.tokens[b:c]

    def spans(self):
        """(pairs, 3): positions that a pair's prefix, chosen and rejected branch take in a pack."""
        return np.diff(self.ends, prepend=0).reshape(-1, 3) - [1, 0, 0]

    @classmethod
    def joined(cls, parts, rows, report=""):
        """From the prompt, chosen, rejected ids of all pairs, one after the other."""
        tokens = np.concatenate([np.empty(0, np.int32), *parts])
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(tokens, ends, np.asarray(rows, np.int64), report)

    def select(self, indices):
        """The pairs of the given indices, in that order, as new Pairs."""
        return Pairs.joined([part for i in indices for part in self[i]], self.rows[indices], self.report)


def tokenize_pairs(rows, tokenizer, *, progress=False, **lengths):
    """Rows of read_pairs -> Pairs; `lengths`: the options of encode_pair. Leaves out, and counts by reason,
    what cannot teach: chosen equal to rejected (also once encoded and cut), responses empty but for white
    space, or without a token. Raises UserError if nothing is left."""
    kept, kept_parts, early, counts = [], [], [], dict.fromkeys(("equal", "empty", "cut", "dropped"), 0)
    bar = dict(desc="tokenizing", unit=" rows", unit_scale=512, disable=not progress, leave=False)
    for start in tqdm(range(0, len(rows), 512), **bar):  # many at a time, for the tokenizer's threads
        numbers, texts = [], []
        for number, row in enumerate(rows[start : start + 512], start + 1):
            empty = not all(_text(row[side]).strip() for side in ("chosen", "rejected"))
            if empty or row["chosen"] == row["rejected"]:
                counts["empty" if empty else "equal"] += 1
                continue
            name = getattr(row, "place", f"row {number}")
            with where(name):
                opening, *full = _texts(row, tokenizer)
            early += [] if all(text.startswith(opening) for text in full) else [name]
            texts += [opening, *full]
            numbers.append(number)
        ids = tokenizer.encode_batch(texts)
        for i, number in enumerate(numbers):
            parts, cut = _split(ids[3 * i : 3 * i + 3], tokenizer, **lengths)
            if not all(parts) or parts[1] == parts[2]:
                counts["equal" if all(parts) else "dropped"] += 1
                continue
            counts["cut"] += cut
            kept.append(number)
            kept_parts += [np.array(part, np.int32) for part in parts]
    report = f"{len(rows)} rows read, {len(kept)} kept: "
    report += ", ".join(f"{count} {reason}" for reason, count in counts.items())
    refuse((not kept, f"no pair is left to train on ({report})"))
    report += "\n  most are cut: is --max_length as meant?" * (2 * counts["cut"] > len(kept))
    if early:
        report += (f"\n  in {len(early)} (first: {early[0]}) the template writes an answered prompt otherwise"
                   "\n  than an open one: the response begins where the texts part, inside the prompt")
    return Pairs.joined(kept_parts, kept, report)


def _text(response):
    return response if isinstance(response, str) else "".join(message["content"] for message in response)


def describe(pairs, tokenizer, prompt_loss):
    """What will be trained of the first three pairs, as text: their tokens, and which losses score them."""
    scored = {"prompt": "L_SFT (from the second token on)" if prompt_loss else "nothing",
              "chosen": "L_SFT and L_OR", "rejected": "L_OR"}
    lines = []
    for pair in range(min(3, len(pairs))):
        lines.append(f"\nrow {pairs.rows[pair]}")
        for (name, losses), ids in zip(scored.items(), pairs[pair]):
            lines.append(f"  {name}: {len(ids)} tokens, scored by {losses}")
            pieces = (tokenizer.decode(ids[i : i + 1], after=ids[max(0, i - 3) : i]) for i in range(len(ids)))
            shown = "|".join(repr(piece)[1:-1] for piece in pieces)
            lines.append("    " + shown + " <- EOS" * bool(ids[-1] == tokenizer.eos_id))
    lengths = np.diff(pairs.ends, prepend=0).reshape(-1, 3)
    summary = "\nmean tokens: prompt {:.0f}, chosen {:.0f}, rejected {:.0f}; longest {}, {}, {}"
    return "\n".join([*lines, summary.format(*lengths.mean(0), *lengths.max(0))])


# -----------------------------------------------------------------------------------------------------------
# Text -> ids.

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja"]
# For a model that brings no chat template: the authors' <|user|> / <|assistant|> turns, each closed by EOS.
DEFAULT_TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
                    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")


class Tokenizer:
    """A Hugging Face tokenizer's files: text <-> ids, special tokens, chat template.

    eos_id, bos_id: ids or None.  adds_bos: whether the tokenizer itself begins a text with BOS.  clock: what
    templates see. chat_template: the model's own, or DEFAULT_TEMPLATE with has_template False.  files:
    {name: bytes} as they were read.
    """

    def __init__(self, backend, specials, adds_bos=False, chat_template=None, files=None):
        backend.no_truncation()  # some tokenizer.json files come with both switched on
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None  # BPE dropout: another tokenization each time
        self.backend, self.specials, self.files, self.clock = backend, specials, files or {}, datetime.now()
        ids = {name: backend.token_to_id(token) for name, token in specials.items()}
        self.eos_id, self.bos_id = ids.get("eos_token"), ids.get("bos_token")
        first, plain = (backend.encode("a", add_special_tokens=added).ids[:1] for added in (True, False))
        processed = first == [self.bos_id] != plain  # the post-processor puts it
        self.adds_bos = self.bos_id is not None and (processed or adds_bos)
        self.has_template, self.original_template = chat_template is not None, files and chat_template
        default = "{{ bos_token }}" * self.adds_bos + DEFAULT_TEMPLATE
        self.chat_template = chat_template if self.has_template else default

    @classmethod
    def from_pretrained(cls, path_or_repo, *, revision=None):
        """Read tokenizer.json (or vocab.json + merges.txt) and what goes with it. Raises UserError."""
        names = [*TOKENIZER_FILES, "config.json", "generation_config.json"]
        directory = fetch(path_or_repo, revision, names)
        files = {name: content for name in names if (content := read_inside(directory, name)) is not None}
        settings, listed, model = (parse_json(files.get(name), f"{directory}/{name}") for name in
                                   ("tokenizer_config.json", "special_tokens_map.json", "config.json"))
        if "tokenizer.json" in files:
            with where(f"{directory}/tokenizer.json"):
                backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        else:
            with where(directory, "no tokenizer.json, and no usable vocab.json with merges.txt"):
                backend = _bpe_from_files(files, settings, model)
        with where(directory, "the tokenizer's settings"):
            adds_bos = settings.get("add_bos_token")
            refuse((not isinstance(adds_bos, bool | None), f"add_bos_token: {adds_bos!r} is no truth value"))
            specials = _special_tokens(backend, settings, listed, model)
            return cls(backend, specials, bool(adds_bos), _model_template(files, settings), files)

    def save_pretrained(self, directory):
        """Write the tokenizer's files: those it came from, unchanged, or (for one made here) new ones."""
        os.makedirs(directory, exist_ok=True)
        files = {name: content for name, content in self.files.items() if name in TOKENIZER_FILES}
        if not files:
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.specials}
            files = {"tokenizer.json": self.backend.to_str(pretty=True).encode(),
                     "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
        if self.has_template and self.chat_template != self.original_template:
            files["chat_template.jinja"] = self.chat_template.encode()  # from now on the model's own
        for name, content in files.items():
            Path(directory, name).write_bytes(content)

    def encode(self, text):
        """text -> list of ids; no special tokens are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """texts -> lists of ids, computed on all cores."""
        # lone surrogates, which are no text
        texts = [text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
        with where("the tokenizer cannot encode a text"):  # it may have no token for unknown words
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids, after=()):
        """ids -> text, special tokens included: what they add to the text of those that they stand `after`.
        Decoded alone, they could lose the space before their first word."""
        before, text = (self.backend.decode(part, skip_special_tokens=False)
                        for part in ([*after], [*after, *ids]))
        return text[len(before) :]

    def apply_chat_template(self, messages, add_generation_prompt=False, **options):
        """messages -> text, as transformers renders it; options: more names for the template. Raises
        UserError where it refuses."""
        # A key without a value is a key that is not there: parquet writes "tool_calls": null everywhere.
        messages = [{k: value for k, value in message.items() if value is not None} for message in messages]
        options = dict(tools=None, documents=None, add_generation_prompt=add_generation_prompt) | options
        with where("the chat template refused a conversation"), time_limit(5):  # some do not end
            template = _compiled(self.chat_template, self.clock)
            return template.render(self.specials | options, messages=messages)

    def stop_ids(self):
        """The ids that end an answer: EOS, generation_config.json's, what closes a turn of the template."""
        listed = parse_json(self.files.get("generation_config.json")).get("eos_token_id")
        stops = {self.eos_id, *(listed if isinstance(listed, list) else [listed])} - {None}
        with suppress(UserError):  # a template with rules of its own about turns: the others have to do
            turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "ANSWER"}]
            closing = self.apply_chat_template(turns).rpartition("ANSWER")[2].lstrip()
            added = self.backend.get_added_tokens_decoder()
            stops |= {i for i, token in added.items() if token.special and closing.startswith(token.content)}
        return stops


def _special_tokens(backend, settings, listed, model):
    """{"eos_token": text, ...}. Three files name them, the first that speaks wins, and null is a word too
    (Qwen has no BOS); config.json has ids. Each is then found in text even where the list of added tokens
    forgets it."""
    named = {name: token for name, token in (listed | settings).items() if name.endswith("_token")}
    for name in ("eos_token", "bos_token"):
        number = model.get(f"{name}_id")
        if name not in named and isinstance(number, int):
            named[name] = backend.id_to_token(number)
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    specials = {name: text for name, text in texts.items() if isinstance(text, str)}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    forgotten = {text for text in specials.values() if backend.token_to_id(text) is not None} - known
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in forgotten])
    return specials


def _model_template(files, settings):
    """The model's chat template or None: chat_template.jinja, else tokenizer_config.json's default one."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8-sig")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        text = f"of the tokenizer's chat templates none is the default: {', '.join(named)}"
        template = named.get("default", "{{ raise_exception(%s) }}" % json.dumps(text))
    return template


def _byte_level(model):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _bpe_from_files(files, settings, model):
    """A tokenizer of the GPT-2, OPT or Qwen kind from vocab.json + merges.txt, as old repositories have."""
    lines = files["merges.txt"].decode().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    backend = _byte_level(tokenizers.models.BPE(parse_json(files["vocab.json"]), merges))
    if "qwen" in str(settings.get("tokenizer_class", model.get("model_type"))).lower():
        backend.normalizer = tokenizers.normalizers.NFC()
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    added = settings.get("added_tokens_decoder", {})
    backend.add_tokens([tokenizers.AddedToken(**added[i]) for i in sorted(added, key=int)])
    return backend


@functools.cache
def _compiled(template, clock):
    """The template in jinja2's immutable sandbox, with the names and options that transformers gives chat
    templates."""
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, **options):
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    def make_dict(*args, **kwargs):  # not the class itself: dict.update(message, ...) would change rows
        return dict(*args, **kwargs)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=clock.strftime, dict=make_dict)
    # {% generation %} marks what the assistant says; to text it is no more than a scope of names
    scopes = re.sub(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}", r"{%\1 \2with \3%}", template)
    return environment.from_string(scopes)


# -----------------------------------------------------------------------------------------------------------
# Rows. Every form ends as {"prompt", "chosen", "rejected"}: three strings, or three lists of messages.

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
          "request.\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n")
QUESTIONS = "conversations", "question", "query"  # read as turns, after one in `system`
PROMPTS = "prompt", "instruction", *QUESTIONS  # where people keep a prompt
COLUMNS = {"chosen", "rejected", "input", "system", "chat_template_kwargs", *PROMPTS}
SHAREGPT = {"human": "user", "gpt": "assistant"}


# The Alpaca text as a chat template, for a model that brings none and was trained on such rows.
ALPACA_TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}"
                   + ALPACA.format(instruction="{{ m.content }}", input="")
                   + "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")


class Row(dict):
    """A pair's prompt, chosen and rejected.  place: file and line, where it has them.  form: what was read,
    in words.  template_options: more names for the chat template."""

    form, template_options = "", {}


def read_pairs(sources, *, prompt_column="", progress=False):
    """All rows of the given files or hub data sets, in order, the prompt always explicit.

    sources: a path or id, or a list of them; `id:split` picks a split other than train.  prompt_column:
    where the prompt stands, if not in one of the columns people use; "none": nowhere. Returns a list of
    {"prompt", "chosen", "rejected"}, each a string or a list of {"role", "content"} messages. Raises
    UserError with file and line where a row cannot be used.
    """
    rows = []
    for path in find_files(sources):
        before, form = len(rows), ""
        bar = dict(desc=f"reading {Path(path).name}", unit=" rows", disable=not progress, leave=False)
        for place, raw in tqdm(_raw_rows(path), **bar):
            with where(path, place):
                row = _explicit(raw, prompt_column)
                form = form or row.form
                refuse((row.form != form, f"has {row.form}, those before it {form}; a file has one form"))
            row.place = f"{path}, {place}"
            rows.append(row)
        refuse((len(rows) == before, f"{path}: no rows in it"))
    return rows


def find_files(sources):
    """The files that `sources` of read_pairs stand for."""
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    return [path for source in sources for path in _files(os.fspath(source))]


def _files(source):
    """The files of one --data value: a file itself, or those of one split of a directory or hub data set."""
    if os.path.isfile(source):
        return [source]
    refuse((source.endswith(EXTENSIONS), f"{source}: no such file"))
    name, _, part = (source, "", "") if os.path.isdir(source) else source.partition(":")
    config, _, split = (part or "train").rpartition("/")
    patterns = [f"*{config}*{split}*{extension}" for extension in EXTENSIONS]
    root = fetch(name, patterns=patterns, repo_type="dataset")
    files = (path for path in Path(root).rglob("*") if path.name.endswith(EXTENSIONS))
    found = [str(path.relative_to(root)) for path in sorted(files)]
    # train-00000-of-00001.parquet, train.jsonl, train/0.parquet; not train_sft-00000..., another split
    of_config = [path for path in found if not config or f"/{config}/" in f"/{path}"]
    wanted = [path for path in of_config if re.search(rf"(^|[/_-]){re.escape(split)}([-./]|$)", path)]
    folders = sorted({os.path.dirname(path).removesuffix(split).strip("/") or "." for path in wanted})
    refuse((not wanted, f"{source}: no files of split '{split}' among {found}; name one as {name}:SPLIT"),
           (len(folders) > 1, f"{source}: '{split}' is in {folders}; name one as {name}:FOLDER/{split}"))
    return [os.path.join(root, path) for path in wanted]


def _raw_rows(path):
    """("line 1" or "row 1", decoded object) of a .jsonl, .json (list or lines), gzipped or .parquet file."""
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    with where(path), (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        head = file.peek(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()  # a byte-order mark is not text
        if head.startswith(b"["):
            for number, row in enumerate(json.loads(file.read()), 1):
                yield f"row {number}", row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                with where(f"line {number}"):
                    yield f"line {number}", json.loads(line)


def _parquet_rows(path):
    with where("reading parquet needs pyarrow (pip install pyarrow)"):
        import pyarrow.parquet
    with where(path):
        file = pyarrow.parquet.ParquetFile(path)
        wanted = [column.name for column in file.schema_arrow  # others may hold what Python cannot
                  if column.name in COLUMNS or column.type in (pyarrow.string(), pyarrow.large_string())]
        rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"row {number}", row


def _explicit(raw, prompt_column):
    """A decoded object in any of the supported forms -> Row."""
    refuse((not isinstance(raw, dict), f"a JSON object is expected, not a {type(raw).__name__}"))
    column = next((name for name in (prompt_column, *PROMPTS) if raw.get(name) is not None), None)
    prompt, chosen, rejected, extra, system = (
        _value(raw.get(name)) for name in (column, "chosen", "rejected", "input", "system"))
    if column in QUESTIONS and kind_of(chosen) == kind_of(rejected) == "strings":
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    match kind_of(prompt), kind_of(chosen), kind_of(rejected):
        case ("strings", "strings", "strings") | ("messages", "messages", "messages"):
            if column == "instruction" and isinstance(prompt, str):
                prompt = ALPACA.format(instruction=prompt, input=f"\n\n### Input:\n{extra}" if extra else "")
        case "nothing", "strings", "strings":
            prompt, chosen, rejected = _shared_text(chosen, rejected)
        case "nothing" | "strings", "messages", "messages":
            prompt, chosen, rejected = _shared_turns(prompt, chosen, rejected)
        case _:
            columns = ", ".join(f"{name}: {type(value).__name__}" for name, value in raw.items())
            raise UserError("not a preference pair: chosen, rejected (and prompt, if not shared) as strings, "
                            f"or all as lists of role/content messages; columns found: {columns}")
    opening = {"role": "system", "content": system}
    if system and isinstance(system, str) and isinstance(prompt, list) and opening not in prompt:
        prompt = [opening, *prompt]
    others = [name for name in raw if name not in COLUMNS and raw[name] and isinstance(raw[name], str | list)]
    refuse((not prompt and not column and prompt_column != "none" and others,
            f"chosen and rejected share no prompt; is it in --prompt_column {', '.join(others)} or none?"))
    row = Row(prompt=prompt, chosen=chosen, rejected=rejected)
    row.form = f"{kind_of(chosen)} with {f'the prompt in {column}' if column else 'a shared prompt'}"
    row.template_options = dict(raw.get("chat_template_kwargs") or {})
    return row


def _value(value):
    """A column's value; turns as role/content messages, also where they are written as ShareGPT's from/value,
    a single one, or with OpenAI's blocks of text."""
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return value
    return [_message(turn) for turn in turns]


def _message(turn):
    """A turn with a role and a text, where it has them under other names or in blocks."""
    if "from" in turn and "role" not in turn:
        turn = {"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")}
    blocks = turn.get("content")
    if isinstance(blocks, list):
        kinds = [block.get("type") for block in blocks if "text" not in block]
        refuse((kinds, f"a message has blocks of type {kinds}; only text can be read"))
        turn = turn | {"content": "".join(block["text"] for block in blocks)}
    return turn


def kind_of(value):
    """What a column holds: "strings" (one), "messages" (with a role and a content, both text), "nothing", or
    None for anything else."""
    def is_message(turn):
        return isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))

    if isinstance(value, list) and value and all(map(is_message, value)):
        return "messages"
    return {str: "strings", type(None): "nothing"}.get(type(value))


def _shared_turns(prompt, chosen, rejected):
    """Whole conversations -> prompt, chosen, rejected turns: the prompt is the run of turns they share (by
    role and content), and a prompt given as text has to be in it; without a user's turn in it, that text
    becomes one."""
    said = [[(turn["role"], turn["content"].strip()) for turn in turns[:-1]] for turns in (chosen, rejected)]
    shared = len(os.path.commonprefix(said))
    turns = chosen[:shared]
    if prompt and not any(prompt.strip() in turn["content"] for turn in turns):
        refuse((any(turn["role"] == "user" for turn in turns), "its prompt is not among the shared turns"))
        turns = [*turns, {"role": "user", "content": prompt}]
    return turns, chosen[shared:], rejected[shared:]


def _shared_text(chosen, rejected):
    """Whole texts -> prompt, chosen, rejected: the prompt ends with the last shared "\\n\\nAssistant:" after
    which no "\\n\\nHuman:" is shared (HH-RLHF); in other text at the last word boundary that both have."""
    lengths = range(min(len(chosen), len(rejected)))  # by bisection, not letter by letter: texts are long
    prompt = chosen[: bisect_left(lengths, True, key=lambda n: chosen[: n + 1] != rejected[: n + 1])]
    shared = re.match(r"(?s).*\n\nAssistant:(?!.*\n\nHuman:)", prompt) or re.match(r"(?s)(.*\s)?", prompt)
    end = len(shared[0].removesuffix(" "))  # that space is part of the next word
    return chosen[:end], chosen[end:], rejected[end:]


# -----------------------------------------------------------------------------------------------------------
# The demo: a task on which the difference between SFT and ORPO shows.


def demo_tokenizer():
    """A byte-level tokenizer: 256 bytes and EOS. Its chat template shows the last question alone."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    backend = _byte_level(tokenizers.models.BPE(vocab, []))
    backend.add_special_tokens(["<|endoftext|>"])
    template = ("{% for m in (messages[-2:] if messages[-1].role == 'assistant' else messages[-1:]) %}"
                "{{ m.content }}{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}")
    return Tokenizer(backend, {"eos_token": "<|endoftext|>"}, chat_template=template)


def demo_pairs(count, seed=0):
    """`count` different questions, as rows: "Name a number above 57." The chosen answer is one of many right
    ones, so a model that has learnt them all still gives each little probability, as with real text; the
    rejected one is wrong. All are two digits and a full stop: learning to write the chosen ones (SFT) makes
    the rejected ones likelier, too."""
    triples = [three for three in itertools.combinations(range(10, 100), 3) if 20 <= three[1] < 90]
    rows = []
    for i in np.random.default_rng(seed).permutation(len(triples))[:count].tolist():
        low, limit, high = triples[i]
        word, right, wrong = [("above", high, low), ("below", low, high)][i % 2]
        question = {"role": "user", "content": f"Name a number {word} {limit}."}
        chosen, rejected = ([{"role": "assistant", "content": f"{x}."}] for x in (right, wrong))
        rows.append(Row(prompt=[question], chosen=chosen, rejected=rejected))
    return rows


def demo_right(question, answer):
    """Does a text answer a question of the demo?"""
    word, limit = re.search(r"(above|below) (\d\d)", question).groups()
    number = re.fullmatch(r"(\d\d)\.", answer)
    return number is not None and (number[1] > limit if word == "above" else number[1] < limit)


# -----------------------------------------------------------------------------------------------------------
# What the programs share: errors, files, flags.


class UserError(Exception):
    """Something the user can put right: UserError(reason, *places), one line that says where, what, and what
    to do. Programs print it and exit."""

    status = 1

    def __str__(self):
        reason, *places = map(str, self.args)
        line = ", ".join(places) + ": " * bool(places) + reason
        return "".join(c if c.isprintable() else " " for c in line)  # a stranger's text may hold escape codes


class FlagError(UserError):
    """A flag that is unknown, or whose value cannot be right."""

    status = 2


def refuse(*cases, kind=UserError):
    """Raise the line of the first (condition, line) that holds."""
    for wrong, line in cases:
        if wrong:
            raise kind(line)


# What no file, library or flag raises but a mistake of ours does: these keep their tracebacks.
OUR_OWN = AssertionError, NameError, NotImplementedError


@contextmanager
def where(*places):
    """Whatever fails inside becomes a UserError at this place; nested places add up."""
    try:
        yield
    except UserError as error:
        error.args = error.args[0], *places, *error.args[1:]
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, torch.OutOfMemoryError, *OUR_OWN):
        raise
    except BaseException as error:  # not Exception alone: the panics of the tokenizers library are none
        first_line = str(error).strip().partition("\n")[0]
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {first_line}"
        raise UserError(reason, *places) from error


def run_program(name, main, memory_advice, explain=lambda error: ""):
    """Run main(arguments) on the command line's arguments -> exit status. A user's error becomes one line,
    as does any other for which explain(error) has one."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller
            setattr(sys, stream, open(os.devnull, "w"))
        getattr(sys, stream).reconfigure(errors="replace")  # an output encoding that lacks a character
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        line = explain(error)
        if isinstance(error, UserError | OSError):
            line = str(error).replace("\n", " ")
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "t allocate memory" in str(error):
            line = f"the memory is full; {memory_advice}"
        if "--debug" in sys.argv or not line:
            raise
        tqdm.write(f"{name}: {line}", file=sys.stderr)  # below a progress bar
        return getattr(error, "status", 1)


@contextmanager
def time_limit(seconds):
    """Raises TimeoutError inside after so long."""

    def ring(*_):
        raise TimeoutError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fetch(path_or_repo, revision=None, patterns=None, repo_type="model"):
    """The local directory of a model or data set; a hub id is downloaded first, only the files that match
    `patterns`. HF_HOME and HF_HUB_OFFLINE are respected. Raises UserError where there is neither."""
    path, revision = os.fspath(path_or_repo), revision or None
    if os.path.isdir(path):
        return path
    from huggingface_hub import snapshot_download

    with where(path, "no directory here, and the hub did not give it"):
        return snapshot_download(path, revision=revision, repo_type=repo_type, allow_patterns=patterns)


def read_inside(directory, name):
    """The bytes of a file in a model's directory, None without it. A stranger's link may not lead out of the
    directory (a hub cache's lead to its own blobs), and what is no regular file is not read."""
    path, root = Path(directory, name), Path(directory).resolve()
    if not path.exists():
        return None
    real = path.resolve()
    inside = real.is_relative_to(root) or real.parent == root.parent.parent / "blobs"
    refuse((not (inside and real.is_file()), f"{path}: no regular file of its directory; put a copy there"))
    return real.read_bytes()


def parse_json(content, *places):
    """The object in the bytes of a JSON file; {} for None."""
    with where(*places):
        value = {} if content is None else json.loads(content.decode("utf-8-sig"))
        refuse((not isinstance(value, dict), f"a JSON object is expected, not a {type(value).__name__}"))
    return value


def read_json(path):
    """The object in a JSON file."""
    with where(path):
        return parse_json(Path(path).read_bytes())


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2), encoding="utf-8")


ARGUMENTS = {  # the type of a flag: how argparse reads it
    bool: dict(action=argparse.BooleanOptionalAction), list: dict(action="extend", nargs="+", metavar="NAME"),
    int: dict(type=int, metavar="INT"), float: dict(type=float, metavar="FLOAT"), str: dict(metavar="TEXT")}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise FlagError(f"{message}; see python {self.prog} --help")


def parse_flags(cls, arguments, description, ranges, elsewhere={}):
    """Command line -> (an instance of the dataclass `cls`, the set of flags given). A field is a flag: its
    comment is the help, a Literal its choices, None the default of what is decided later. A field `config`
    names a JSON file of flags. ranges: {flag: (least, most)}.  elsewhere: {a flag's name in other programs:
    what to say of it}."""
    given = _given(cls, arguments, ranges, description, elsewhere)
    if given.get("config"):
        recorded = read_json(given["config"])
        with where(given["config"]):
            given = _given(cls, _as_arguments(recorded), ranges, elsewhere=elsewhere) | given
    return cls(**given), set(given)


def checked_flags(cls, values, ranges):
    """An instance of `cls` from {flag: value}, of whatever origin; FlagError for what cannot be right."""
    return cls(**_given(cls, _as_arguments(values), ranges))


def _as_arguments(values):
    """{flag: value} as a command line would have it, so that flags are checked in one way; None: not
    given."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}={item}" for item in (value if isinstance(value, list | tuple) else [value])]
    return words


def _given(cls, arguments, ranges, description="", elsewhere={}):
    """{flag: value} of a command line."""
    parser = _Parser(usage="%(prog)s [flags]", description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    for field in fields(cls):
        choices, text = get_args(field.type), comments[field.name].replace("%", "%%")
        text += f" (default: {field.default})" * (field.default not in (None, "", ()))
        options = dict(choices=choices) if choices else ARGUMENTS[field.type]
        if "yes" in choices:
            options |= dict(nargs="?", const="yes")  # the flag alone means yes
        parser.add_argument(f"--{field.name}", help=text, **options)
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(name, [f"--{field.name}" for field in fields(cls)], 1)
        hint = elsewhere.get(name.lstrip("-")) or (f"did you mean {close[0]}?" if close else "see --help")
        raise FlagError(f"unknown flag {name}; {hint}")
    for name, value in vars(known).items():
        least, most = ranges.get(name, (0, 2**62))
        if isinstance(value, int | float) and not least <= value <= most:
            limit = f" and at most {most:g}" * (most < 2**31)
            raise FlagError(f"--{name} {value}: must be at least {least:g}{limit}")
    return vars(known)
