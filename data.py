"""Preference data: rows -> tokens -> packed batches. Knows nothing of the model or the loss.

    from data import read_pairs, Tokenizer, encode_pair, pack
    python train.py --dry_run --model MODEL --data FILE      # shows what this file makes of your rows

In reading order: packing, the tokens of a pair, the tokenizer, rows from files, the demo, errors and files.
Notation in all modules:  T tokens in a pack, N pairs in a pack, P / C / R tokens of one prompt / chosen /
rejected.
"""
import functools
import gzip
import heapq
import itertools
import json
import math
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tqdm import tqdm

# -----------------------------------------------------------------------------------------------------------
# Packing: a pair is a tree, and trees stand end to end. For a prompt p0..p3, chosen c0..c2, rejected r0 r1:
#
#              prefix    | chosen branch | rejected branch
# t            0  1  2   | 3  4  5       | 6  7                then the next pair
# inputs       p0 p1 p2  | p3 c0 c1      | p3 r0
# targets      p1 p2 p3  | c0 c1 c2      | r0 r1
# positions    0  1  2   | 3  4  5       | 3  4
# sees         causal    | + prefix      | + prefix, never the chosen branch

# The parts of a pair, in the order in which they are stored and packed.
PREFIX, CHOSEN, REJECTED = 0, 1, 2
PARTS = 3


@dataclass
class Batch:
    """One pack of N pairs, T positions, as torch tensors. Position t reads inputs[t] and predicts targets[t].

    inputs, targets, positions (T,).   owner (T,): PARTS * pair + PREFIX, CHOSEN or REJECTED.
    counts (N, 3): scored targets of each part.   scored (S,): positions whose target counts; None: all.
    cu_q, cu_k (2N + 1,) are int32, all other tensors int64.   share: 1, or 0 for a pack that only keeps a
    rank in step with the others.

    Attention runs over two segments a pair, as variable-length attention kernels want them. A segment's
    queries stand side by side in the pack; its keys are gathered, so that both find the prefix before them.
    Segment s has the queries cu_q[s]:cu_q[s+1] and the keys kv_index[cu_k[s]:cu_k[s+1]]. It is causal, and
    its last query is aligned with its last key. The pair above:

                   segment 0: prefix, chosen     segment 1: rejected
        queries    t = 0 1 2 3 4 5               t = 6 7            queries = [6, 2]   cu_q = [0, 6, 8]
        keys       t = 0 1 2 3 4 5               t = 0 1 2 6 7      keys    = [6, 5]   cu_k = [0, 6, 11]
                   query 3 sees 0 1 2 3          query 6 sees 0 1 2 6
        kv_index = [0, 1, 2, 3, 4, 5,   0, 1, 2, 6, 7]              max_q   = 6        max_k = 6
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
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.pin_memory().to(device, non_blocking=True)
        return replace(self, **moved)


def pack(pairs, *, prompt_loss=True):
    """(prompt, chosen, rejected) ids of N pairs -> Batch. Without prompt_loss prompts are not scored."""
    inputs = []
    targets = []
    positions = []
    owners = []
    kv_index = []
    counts = []
    queries = []
    keys = []
    start = 0  # of the pair in the pack
    for n, (prompt, chosen, rejected) in enumerate(pairs):
        p, c, r = len(prompt) - 1, len(chosen), len(rejected)
        inputs += [prompt[:-1], prompt[-1:], chosen[:-1], prompt[-1:], rejected[:-1]]
        targets += [prompt[1:], chosen, rejected]
        positions += [np.arange(p), p + np.arange(c), p + np.arange(r)]
        owners.append(PARTS * n + np.repeat([PREFIX, CHOSEN, REJECTED], [p, c, r]))
        t = start + np.arange(p + c + r)
        kv_index += [t[: p + c], t[:p], t[p + c :]]  # prefix and chosen, prefix and rejected
        counts.append([p * prompt_loss, c, r])
        queries += [p + c, r]
        keys += [p + c, p + r]
        start += p + c + r

    def joined(arrays):
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64))

    def ends(lengths):
        return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)

    owner = joined(owners)
    return Batch(
        inputs=joined(inputs),
        targets=joined(targets),
        positions=joined(positions),
        owner=owner,
        counts=torch.tensor(counts),
        scored=None if prompt_loss else (owner % PARTS != PREFIX).nonzero()[:, 0],
        cu_q=ends(queries),
        cu_k=ends(keys),
        kv_index=joined(kv_index),
        queries=queries,
        keys=keys,
        max_q=max(queries),
        max_k=max(keys),
    )


def deal(lengths, max_tokens, ranks=1):
    """Indices of `lengths`, dealt to packs of at most max_tokens in sum: longest first, each to the emptiest
    pack. The number of packs is the smallest multiple of `ranks` found to do; some may be empty."""
    assert max(lengths) <= max_tokens, "checked before training"
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = ranks * math.ceil(sum(lengths) / max_tokens / ranks)
    while True:
        packs = [[] for _ in range(count)]
        emptiest = [(0, number) for number in range(count)]  # a heap of (tokens so far, number of the pack)
        for i in longest_first:
            tokens, number = emptiest[0]
            heapq.heapreplace(emptiest, (tokens + int(lengths[i]), number))
            packs[number].append(i)
        if max(emptiest)[0] <= max_tokens:
            return packs
        count += ranks * (1 + count // ranks // 16)


def make_packs(pairs, indices, max_tokens, *, rank=0, ranks=1, prompt_loss=True):
    """The packs, of at most max_tokens positions each, in which this rank computes its part of the pairs of
    one optimizer step. Every rank gets equally many: where nothing is left to do, the first pair with a share
    of 0."""
    batches = []
    for members in deal(pairs.spans()[indices].sum(1), max_tokens, ranks)[rank::ranks]:
        batch = pack([pairs[indices[i]] for i in members or [0]], prompt_loss=prompt_loss)
        batch.share = 1.0 if members else 0.0
        batches.append(batch)
    return batches


def epoch_order(count, seed, epoch):
    """The order in which epoch number `epoch` takes `count` pairs: a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_indices(count, batch_size, seed, step):
    """The pairs of optimizer step 0, 1, ... (an epoch's last may be short), and the epochs done after it."""
    epoch, step_in_epoch = divmod(step, math.ceil(count / batch_size))
    start = step_in_epoch * batch_size
    end = min(count, start + batch_size)
    return epoch_order(count, seed, epoch)[start:end], epoch + end / count


# -----------------------------------------------------------------------------------------------------------
# A row -> the ids of prompt, chosen, rejected.


def pair_texts(row, tokenizer):
    """prompt, prompt + chosen, prompt + rejected as text; conversations through the chat template."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return [prompt, prompt + row["chosen"], prompt + row["rejected"]]
    options = getattr(row, "template_options", {})
    opening = ""
    if prompt:
        opening = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    with_chosen = tokenizer.apply_chat_template(prompt + row["chosen"], **options)
    with_rejected = tokenizer.apply_chat_template(prompt + row["rejected"], **options)
    return [opening, with_chosen, with_rejected]


def split_ids(prompt_alone, with_chosen, with_rejected, tokenizer, max_length, max_prompt_length,
              truncation_mode):
    """Ids of the three texts of pair_texts -> (prompt, chosen, rejected) as encode_pair describes them, and
    whether they were cut."""
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end-of-sequence token; tokenizer_config.json can set eos_token")
    bos = []
    # A template may have written BOS where the tokenizer would add none.
    if tokenizer.adds_bos or with_chosen[:1] == [tokenizer.bos_id]:
        bos = [tokenizer.bos_id]
    bare = [ids[1:] if ids[:1] == bos else ids for ids in (prompt_alone, with_chosen, with_rejected)]
    prompt = os.path.commonprefix(bare)  # tokens merged across the boundary belong to the responses
    chosen = end_with_eos(bare[CHOSEN][len(prompt) :], tokenizer)
    rejected = end_with_eos(bare[REJECTED][len(prompt) :], tokenizer)
    if not prompt and not bos:  # some token has to open the branches: BOS or EOS, as in generation
        bos = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    cut = len(bos) + len(prompt) + max(len(chosen), len(rejected)) > max_length
    if cut:
        room = (max_prompt_length or max_length // 2) - len(bos)
        if truncation_mode == "keep_start":
            prompt = prompt[:room]
        else:
            prompt = prompt[max(0, len(prompt) - room) :]
    prompt = bos + prompt
    room = max_length - len(prompt)
    return (prompt, chosen[:room], rejected[:room]), cut


def end_with_eos(response, tokenizer):
    """A response's ids with one EOS at the end, in place of those that stand there and white space after
    them."""
    end = len(response)
    for i in reversed(range(len(response))):
        if response[i] == tokenizer.eos_id:
            end = i
        elif tokenizer.decode([response[i]]).strip():
            break
    return response[:end] + [tokenizer.eos_id] if end else []  # no token at all: the row will be left out


def encode_pair(row, tokenizer, max_length=1024, max_prompt_length=None, truncation_mode="keep_end"):
    """One row of read_pairs -> (prompt, chosen, rejected) lists of ids, as they are trained.

    The prompt is the longest common prefix of encode(prompt), encode(prompt + chosen), encode(prompt +
    rejected). It begins with BOS where the tokenizer would put one; a response ends in EOS exactly once.
    When prompt + longer response exceed max_length tokens, the prompt is cut to max_prompt_length (default:
    half of it; from the left: keep_end; from the right: keep_start), BOS staying first, then each response
    on the right to what is left.
    """
    ids = tokenizer.encode_batch(pair_texts(row, tokenizer))
    parts, _ = split_ids(*ids, tokenizer, max_length, max_prompt_length, truncation_mode)
    return parts


@dataclass
class Pairs:
    """Tokenized pairs as flat arrays. tokens: int32, all pairs' prompt, chosen, rejected ids end to end;
    ends: (3 * pairs + 1,) int64, 0 and where each part ends; rows: (pairs,) int64, the 1-based number of the
    row it came from."""

    tokens: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    report: str = ""  # what was read, kept, left out and cut

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        """(prompt, chosen, rejected) ids of pair i."""
        ends = self.ends[PARTS * i : PARTS * (i + 1) + 1]
        return [self.tokens[start:end] for start, end in itertools.pairwise(ends)]

    def lengths(self):
        """(pairs, 3): tokens of each pair's prompt, chosen and rejected response."""
        return np.diff(self.ends).reshape(-1, PARTS)

    def spans(self):
        """(pairs, 3): positions that a pair's prefix, chosen and rejected branch take in a pack."""
        return self.lengths() - [1, 0, 0]

    @classmethod
    def joined(cls, parts, rows, report=""):
        """From the prompt, chosen, rejected ids of all pairs, one after the other."""
        tokens = np.concatenate([np.empty(0, np.int32), *parts])
        ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(tokens, ends, np.asarray(rows, np.int64), report)

    def select(self, indices):
        """The pairs of the given indices, in that order, as new Pairs."""
        parts = [part for i in indices for part in self[i]]
        return Pairs.joined(parts, self.rows[indices], self.report)


def tokenize_pairs(rows, tokenizer, max_length=1024, max_prompt_length=None, truncation_mode="keep_end",
                   progress=False):
    """Rows of read_pairs -> Pairs; for the lengths see encode_pair. Leaves out, and counts by reason, what
    cannot teach: chosen equal to rejected (also once encoded and cut), responses empty but for white space,
    or without a token. Raises UserError if nothing is left."""
    counts = dict(equal=0, empty=0, cut=0, dropped=0)
    kept_rows = []
    kept_parts = []
    blocks = range(0, len(rows), 512)  # many rows at a time, for the tokenizer's threads
    for start in tqdm(blocks, "tokenizing", unit=" x 512 rows", disable=not progress, leave=False):
        numbers = []
        texts = []
        for number, row in enumerate(rows[start : start + 512], start + 1):
            if not (plain_text(row["chosen"]).strip() and plain_text(row["rejected"]).strip()):
                counts["empty"] += 1
            elif row["chosen"] == row["rejected"]:
                counts["equal"] += 1
            else:
                with where(getattr(row, "place", f"row {number}")):
                    texts += pair_texts(row, tokenizer)
                numbers.append(number)
        ids = tokenizer.encode_batch(texts)
        for i, number in enumerate(numbers):
            of_row = ids[PARTS * i : PARTS * (i + 1)]
            parts, cut = split_ids(*of_row, tokenizer, max_length, max_prompt_length, truncation_mode)
            if not all(parts):
                counts["dropped"] += 1
            elif parts[CHOSEN] == parts[REJECTED]:
                counts["equal"] += 1
            else:
                counts["cut"] += cut
                kept_rows.append(number)
                kept_parts += [np.array(part, np.int32) for part in parts]
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    report = f"{len(rows)} rows read, {len(kept_rows)} kept: {reasons}"
    if not kept_rows:
        raise UserError(f"no pair is left to train on ({report})")
    return Pairs.joined(kept_parts, kept_rows, report)


def plain_text(response):
    """A response's text: a string, or what all its messages say."""
    if isinstance(response, str):
        return response
    return "".join(message["content"] for message in response)


def describe(pairs, tokenizer, prompt_loss):
    """What will be trained of the first three pairs, as text: their tokens, and which losses score them."""
    scored_by = {
        "prompt": "L_SFT (from the second token on)" if prompt_loss else "nothing",
        "chosen": "L_SFT and L_OR",
        "rejected": "L_OR",
    }
    lines = []
    for pair in range(min(3, len(pairs))):
        lines.append(f"\nrow {pairs.rows[pair]}")
        for (name, losses), ids in zip(scored_by.items(), pairs[pair]):
            lines.append(f"  {name}: {len(ids)} tokens, scored by {losses}")
            tokens = []
            for i in range(len(ids)):
                token = tokenizer.decode(ids[i : i + 1], after=ids[max(0, i - 3) : i])
                tokens.append(repr(token)[1:-1])
            line = "    " + "|".join(tokens)
            if ids[-1] == tokenizer.eos_id:
                line += " <- EOS"
            lines.append(line)
    lengths = pairs.lengths()
    means = lengths.mean(0).round().astype(int)
    lines.append(f"\nmean tokens of prompt, chosen, rejected: {means}; longest: {lengths.max(0)}")
    return "\n".join(lines)


# -----------------------------------------------------------------------------------------------------------
# Text -> ids.

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
# For a model that brings no chat template: the authors' <|user|> / <|assistant|> turns, each closed by EOS.
DEFAULT_TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
                    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")


class Tokenizer:
    """A Hugging Face tokenizer's files: text <-> ids, special tokens, chat template.

    eos_id, bos_id: ids or None.  adds_bos: whether the tokenizer itself begins a text with BOS.  clock: the
    time that templates see.  chat_template: the model's own, or DEFAULT_TEMPLATE with has_template False.
    files: {name: bytes} as they were read.
    """

    def __init__(self, backend, specials, adds_bos=False, chat_template=None, files=None):
        backend.no_truncation()  # some tokenizer.json files switch these on
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None  # BPE dropout: other tokens each time
        self.backend = backend
        self.specials = specials
        self.files = files
        if files is None:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
            self.files = {
                "tokenizer.json": backend.to_str(pretty=True).encode(),
                "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            }
        self.clock = datetime.now()
        ids = {name: backend.token_to_id(token) for name, token in specials.items()}
        self.eos_id = ids.get("eos_token")
        self.bos_id = ids.get("bos_token")
        # Its post-processor may put it there, or its Python class, by this setting.
        adds_bos = adds_bos or backend.encode("a").ids[:1] == [self.bos_id]
        self.adds_bos = adds_bos and self.bos_id is not None
        self.template_of_files = chat_template if files else None
        self.has_template = chat_template is not None
        self.chat_template = chat_template
        if not self.has_template:
            self.chat_template = "{{ bos_token }}" * self.adds_bos + DEFAULT_TEMPLATE

    @classmethod
    def from_pretrained(cls, path_or_repo, *, revision=None):
        """Read tokenizer.json (or GPT-2's and OPT's vocab.json + merges.txt) and what goes with it. Raises
        UserError."""
        names = [*TOKENIZER_FILES, "config.json", "generation_config.json"]
        directory = Path(fetch(path_or_repo, revision, names))
        files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}

        def settings(name):
            return read_json(directory / name) if name in files else {}

        config = settings("tokenizer_config.json")
        model = settings("config.json")
        listed = settings("special_tokens_map.json")
        with where(directory / "tokenizer.json"):
            backend = read_backend(files, config, model)
        with where(f"{directory}: the tokenizer's settings"):
            specials = special_tokens(backend, listed | config, model)
            adds_bos = config.get("add_bos_token") is True
            return cls(backend, specials, adds_bos, model_template(files, config), files)

    def save_pretrained(self, directory):
        """Write the tokenizer's files: those it came from, unchanged, or (for one made here) new ones."""
        os.makedirs(directory, exist_ok=True)
        for name in TOKENIZER_FILES:
            if name in self.files:
                Path(directory, name).write_bytes(self.files[name])
        if self.has_template and self.chat_template != self.template_of_files:  # from now on the model's own
            Path(directory, "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def encode(self, text):
        """text -> list of ids; no special tokens are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """texts -> lists of ids, computed on all cores."""
        # Half of a surrogate pair is no text; the tokenizers library would raise.
        texts = [text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
        with where("the tokenizer cannot encode a text"):  # it may have no token for unknown words
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids, after=()):
        """ids -> text, special tokens included: what they add to the text of those that they stand `after`.
        Decoded alone, they could lose the space before their first word."""
        before = self.backend.decode([*after], skip_special_tokens=False)
        text = self.backend.decode([*after, *ids], skip_special_tokens=False)
        return text[len(before) :]

    def apply_chat_template(self, messages, add_generation_prompt=False, **options):
        """messages -> text, as transformers renders it; options: more names for the template. Raises
        UserError where the template refuses."""
        names = dict(tools=None, documents=None, add_generation_prompt=add_generation_prompt)
        names |= self.specials | options
        shown = []
        for message in messages:  # a key without a value is a key that is not there
            shown.append({key: value for key, value in message.items() if value is not None})
        with where("the chat template refused a conversation"):
            return compiled_template(self.chat_template, self.clock).render(names, messages=shown)

    def stop_ids(self):
        """The ids that end an answer: EOS, generation_config.json's, what closes a turn of the template."""
        generation_config = json.loads(self.files.get("generation_config.json", "{}"))
        listed = generation_config.get("eos_token_id")
        if not isinstance(listed, list):
            listed = [listed]
        stops = {self.eos_id, *listed} - {None}
        with suppress(UserError):  # a template with rules of its own about turns
            turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "ANSWER"}]
            closing = self.apply_chat_template(turns).rpartition("ANSWER")[2].lstrip()
            added = self.backend.get_added_tokens_decoder()
            for token in self.encode(closing)[:1]:
                if token in added and added[token].special:
                    stops.add(token)
        return stops


def byte_level_bpe(vocab, merges):
    """A tokenizer of GPT-2's kind from {token: id} and [(left, right), ...]."""
    return tokenizers.Tokenizer.from_str(tokenizers.ByteLevelBPETokenizer(vocab, merges).to_str())


def read_backend(files, config, model):
    """What the tokenizers library makes of tokenizer.json, or of vocab.json and merges.txt as GPT-2 and OPT
    have them. Other models split text by other rules, which stand in tokenizer.json alone."""
    if "tokenizer.json" in files:
        return tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    kind = config.get("tokenizer_class") or model.get("model_type") or "gpt2"
    complete = "merges.txt" in files and "added_tokens.json" not in files
    if not complete or not kind.lower().startswith(("gpt2", "opt")):
        raise UserError("no tokenizer.json; vocab.json and merges.txt do instead for GPT-2 and OPT alone. "
                        "transformers can write it: AutoTokenizer.from_pretrained(...).save_pretrained(...)")
    lines = files["merges.txt"].decode().splitlines()
    merges = []
    for line in lines:
        if line.strip() and not line.startswith("#version"):
            merges.append(tuple(line.split()))
    return byte_level_bpe(json.loads(files["vocab.json"]), merges)


def special_tokens(backend, settings, model):
    """{"eos_token": text, ...} as the tokenizer's settings name them, null included (Qwen has no BOS);
    config.json has ids. Each is then found in text even where the list of added tokens forgets it."""
    specials = {}
    for name in ("eos_token", "bos_token"):
        if isinstance(model.get(f"{name}_id"), int):
            specials[name] = backend.id_to_token(model[f"{name}_id"])
    for name, token in settings.items():
        if name.endswith("_token"):
            specials[name] = token["content"] if isinstance(token, dict) else token
    specials = {name: text for name, text in specials.items() if isinstance(text, str)}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for text in sorted(set(specials.values()) - known):
        if backend.token_to_id(text) is not None:
            backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False)])
    return specials


def model_template(files, config):
    """The model's chat template or None: chat_template.jinja, else tokenizer_config.json's default one."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8-sig")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}["default"]
    return template


@functools.cache
def compiled_template(template, clock):
    """A chat template in jinja2's sandbox, with the names and options that transformers gives it."""
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = clock.strftime
    # {% generation %} marks what the assistant says; in text it is no more than a scope of names
    template = re.sub(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}", r"{%\1 \2with \3%}", template)
    return environment.from_string(template)


# -----------------------------------------------------------------------------------------------------------
# Rows. Every form ends as {"prompt", "chosen", "rejected"}: three strings, or three lists of messages.

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
          "request.\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n")
# The same text as a chat template, for a model that brings none and is trained on such rows.
ALPACA_TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}"
                   + ALPACA.format(instruction="{{ m.content }}", input="")
                   + "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
QUESTIONS = ("conversations", "question", "query")  # read as turns, after one in `system`
PROMPTS = ("prompt", "instruction", *QUESTIONS)  # where people keep a prompt
COLUMNS = {"chosen", "rejected", "input", "system", "chat_template_kwargs", *PROMPTS}
SHAREGPT = {"human": "user", "gpt": "assistant"}


class Row(dict):
    """A pair's prompt, chosen and rejected.  place: file and line.  form: what was read, in words.
    template_options: more names for the chat template."""

    form = ""
    template_options = {}


def read_pairs(sources, *, prompt_column="", progress=False):
    """All rows of the given files or hub data sets, in order, the prompt always explicit.

    sources: a path or id, or a list of them; `id:split` picks a split other than train.  prompt_column:
    where the prompt stands, if not in one of the columns people use; "none": nowhere. Returns a list of
    {"prompt", "chosen", "rejected"}, each a string or a list of {"role", "content"} messages. Raises
    UserError with file and line where a row cannot be used.
    """
    rows = []
    for path in find_files(sources):
        first = len(rows)
        title = f"reading {Path(path).name}"
        for place, raw in tqdm(raw_rows(path), title, unit=" rows", disable=not progress, leave=False):
            with where(f"{path}, {place}"):
                row = explicit_row(raw, prompt_column)
                row.place = f"{path}, {place}"
                rows.append(row)
                if row.form != rows[first].form:
                    raise UserError(f"has {row.form}, those before it {rows[first].form}")
        if len(rows) == first:
            raise UserError(f"{path}: no rows in it")
    return rows


def find_files(sources):
    """The files that `sources` of read_pairs stand for."""
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    return [file for source in sources for file in files_of(os.fspath(source))]


def files_of(source):
    """The files of one --data value: a file itself, or those of one split of a directory or hub data set."""
    if os.path.isfile(source):
        return [source]
    if source.endswith(EXTENSIONS):
        raise UserError(f"{source}: no such file")
    name = source
    split = "train"
    if ":" in source and not os.path.isdir(source):
        name, _, split = source.partition(":")
    patterns = [f"*{split}*{extension}" for extension in EXTENSIONS]
    root = Path(fetch(name, patterns=patterns, repo_type="dataset"))
    files = [str(path.relative_to(root)) for path in sorted(root.rglob("*"))]
    files = [file for file in files if file.endswith(EXTENSIONS)]
    # train-00000-of-00001.parquet, train.jsonl, train/0.parquet; not train_sft-00000..., another split
    found = [file for file in files if re.search(rf"(^|[/_-]){re.escape(split)}[-./]", file)]
    if not found:
        raise UserError(f"{source}: no files of split '{split}' among {files}; name one as {name}:SPLIT")
    folders = sorted({os.path.dirname(file).removesuffix(split).rstrip("/") for file in found})
    if len(folders) > 1:
        raise UserError(f"{source}: '{split}' is in {folders}; name one as {name}:FOLDER/{split}")
    return [str(root / file) for file in found]


def raw_rows(path):
    """Yields ("line 1" or "row 1", row) of a .jsonl, .json (list or lines), gzipped or .parquet file. A row
    is a decoded object, or the bytes of its line."""
    if path.endswith(".parquet"):
        yield from parquet_rows(path)
        return
    opener = gzip.open if path.endswith(".gz") else open
    with where(path), opener(path, "rb") as file:
        head = file.peek(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()  # a byte-order mark is no text
        if head.startswith(b"["):
            for number, row in enumerate(json.loads(file.read()), 1):
                yield f"row {number}", row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", line


def parquet_rows(path):
    """As raw_rows. Times are left out: not all that a file may hold are times to Python."""
    with where("reading parquet needs pyarrow (pip install pyarrow)"):
        import pyarrow.parquet
    with where(path):
        file = pyarrow.parquet.ParquetFile(path)
        columns = [field.name for field in file.schema_arrow if not pyarrow.types.is_temporal(field.type)]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", without_nulls(row)


def without_nulls(value):
    """A parquet value without the keys that are null: parquet gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def explicit_row(raw, prompt_column):
    """A row of raw_rows, in any of the supported forms -> Row."""
    if isinstance(raw, bytes):
        raw = json.loads(raw)
    if not isinstance(raw, dict):
        raise UserError(f"a JSON object is expected, not a {type(raw).__name__}")
    column = next((name for name in (prompt_column, *PROMPTS) if raw.get(name) is not None), None)
    prompt = as_messages(raw.get(column))
    chosen = as_messages(raw.get("chosen"))
    rejected = as_messages(raw.get("rejected"))
    if column in QUESTIONS and kind_of(chosen) == kind_of(rejected) == "strings":
        chosen = [{"role": "assistant", "content": chosen}]
        rejected = [{"role": "assistant", "content": rejected}]
    kinds = (kind_of(prompt), kind_of(chosen), kind_of(rejected))
    if kinds == ("nothing", "strings", "strings"):
        prompt, chosen, rejected = split_shared_text(chosen, rejected)
    elif kinds in [("nothing", "messages", "messages"), ("strings", "messages", "messages")]:
        prompt, chosen, rejected = split_shared_turns(prompt, chosen, rejected)
    elif kinds not in [("strings",) * 3, ("messages",) * 3]:
        columns = ", ".join(f"{name}: {type(value).__name__}" for name, value in raw.items())
        raise UserError("not a preference pair: chosen, rejected (and prompt, if not shared) as strings, "
                        f"or all as lists of role/content messages; columns found: {columns}")
    elif column == "instruction" and isinstance(prompt, str):
        context = f"\n\n### Input:\n{raw['input']}" if raw.get("input") else ""
        prompt = ALPACA.format(instruction=prompt, input=context)
    system = raw.get("system")
    if system and isinstance(system, str) and isinstance(prompt, list):
        opening = {"role": "system", "content": system}
        if opening not in prompt:
            prompt = [opening, *prompt]
    others = []  # columns that may hold the prompt
    for name, value in raw.items():
        if value and name not in COLUMNS and isinstance(value, str | list):
            others.append(name)
    if others and not prompt and not column and prompt_column != "none":
        raise UserError("chosen and rejected share no prompt; is it in --prompt_column "
                        f"{', '.join(others)} or none?")
    row = Row(prompt=prompt, chosen=chosen, rejected=rejected)
    origin = f"the prompt in {column}" if column else "a shared prompt"
    row.form = f"{kind_of(chosen)} with {origin}"
    row.template_options = dict(raw.get("chat_template_kwargs") or {})
    return row


def as_messages(value):
    """A column's value; turns as role/content messages, also a single one, ShareGPT's from/value, and those
    with OpenAI's blocks of text."""
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return value
    messages = []
    for turn in turns:
        if "from" in turn and "role" not in turn:
            turn = {"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")}
        blocks = turn.get("content")
        if isinstance(blocks, list):
            kinds = [block.get("type") for block in blocks if "text" not in block]
            if kinds:
                raise UserError(f"a message has blocks of type {kinds}; only text can be read")
            turn = {**turn, "content": "".join(block["text"] for block in blocks)}
        messages.append(turn)
    return messages


def kind_of(value):
    """What a column holds: "strings" (one), "messages" (with a role and a content, both text), "nothing", or
    None for anything else."""
    def is_message(turn):
        return isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))

    if isinstance(value, list) and value and all(map(is_message, value)):
        return "messages"
    return {str: "strings", type(None): "nothing"}.get(type(value))


def split_shared_turns(prompt, chosen, rejected):
    """Whole conversations -> prompt, chosen, rejected turns: the prompt is the run of turns they share (by
    role and content). A prompt given as text has to be among them, or, where no user speaks in them, becomes
    the user's turn."""
    def said(turns):
        return [(turn["role"], turn["content"].strip()) for turn in turns[:-1]]

    shared = len(os.path.commonprefix([said(chosen), said(rejected)]))
    turns = chosen[:shared]
    if prompt and not any(prompt.strip() in turn["content"] for turn in turns):
        if any(turn["role"] == "user" for turn in turns):
            raise UserError("its prompt is not among the turns that chosen and rejected share")
        turns = [*turns, {"role": "user", "content": prompt}]
    return turns, chosen[shared:], rejected[shared:]


def split_shared_text(chosen, rejected):
    """Whole texts -> prompt, chosen, rejected: the prompt ends with the last shared "\\n\\nAssistant:" after
    which no "\\n\\nHuman:" is shared (HH-RLHF); in other text at the last word boundary that both have."""
    shared = os.path.commonprefix([chosen, rejected])
    found = re.match(r"(?s).*\n\nAssistant:(?!.*\n\nHuman:)", shared) or re.match(r"(?s)(.*\s)?", shared)
    end = len(found[0].removesuffix(" "))  # that space is part of the next word
    return chosen[:end], chosen[end:], rejected[end:]


# -----------------------------------------------------------------------------------------------------------
# The demo: a task on which the difference between SFT and ORPO shows.


def demo_tokenizer():
    """A byte-level tokenizer: 256 bytes and EOS. Its chat template shows the last question alone."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = byte_level_bpe({symbol: i for i, symbol in enumerate(alphabet)}, [])
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
        word, right, wrong = ("below", low, high) if i % 2 else ("above", high, low)
        row = Row(
            prompt=[{"role": "user", "content": f"Name a number {word} {limit}."}],
            chosen=[{"role": "assistant", "content": f"{right}."}],
            rejected=[{"role": "assistant", "content": f"{wrong}."}],
        )
        rows.append(row)
    return rows


def demo_right(question, answer):
    """Does a text answer a question of the demo?"""
    word, limit = re.search(r"(above|below) (\d\d)", question).groups()
    number = re.fullmatch(r"(\d\d)\.", answer)
    if number is None:
        return False
    return number[1] > limit if word == "above" else number[1] < limit


# -----------------------------------------------------------------------------------------------------------
# Errors and files, for all modules.


class UserError(Exception):
    """Something the user can put right: one line that says where, what, and what to do. The programs print it
    and exit."""

    def __str__(self):
        text = super().__str__()  # part of it may be a file's, with line ends and control codes
        return "".join(c if c.isprintable() else " " for c in text)


# What the user cannot put right, or did himself: `where` lets these pass as they are.
PASSING = (
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    MemoryError,
    torch.OutOfMemoryError,
    AssertionError,
    NameError,
)


@contextmanager
def where(place):
    """Whatever fails inside becomes a UserError that begins with this place. What failed is its __cause__,
    which a program's --debug shows."""
    try:
        yield
    except PASSING:
        raise
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except BaseException as error:  # not Exception alone: the panics of the tokenizers library are none
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"{place}: {type(error).__name__}: {first_line}") from error


def fetch(path_or_repo, revision=None, patterns=None, repo_type="model"):
    """The local directory of a model or data set; of a hub id the files that match `patterns` are downloaded
    first. HF_HOME and HF_HUB_OFFLINE are respected."""
    if os.path.isdir(path_or_repo):
        return path_or_repo
    from huggingface_hub import snapshot_download

    with where(f"{path_or_repo}: no directory here, and the hub did not give it"):
        return snapshot_download(
            str(path_or_repo),
            revision=revision or None,
            repo_type=repo_type,
            allow_patterns=patterns,
        )


def read_json(path):
    """The object in a JSON file."""
    with where(path):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise UserError(f"a JSON object is expected, not a {type(value).__name__}")
    return value


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2), encoding="utf-8")
