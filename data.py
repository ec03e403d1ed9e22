"""Preference data: rows -> tokens -> packed batches. Knows nothing of the model or the loss.

    from data import read_pairs, Tokenizer, encode_pair, pack
    python train.py --dry_run --model MODEL --data FILE      # shows what this file makes of your rows

In reading order: packing, the tokens of a pair, the tokenizer, rows from files, the demo, errors and files.
Notation:  T positions in a pack, N pairs in it, S of its positions that are scored.
"""
import functools
import gzip
import itertools
import json
import math
import os
import re
from collections import Counter
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
    pack. It begins with as few packs as could hold them, a multiple of `ranks`, and takes more until they do;
    some may be empty."""
    assert max(lengths) <= max_tokens, "checked before training"
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = ranks * math.ceil(sum(lengths) / max_tokens / ranks)
    while True:
        packs = [[] for _ in range(count)]
        tokens = np.zeros(count, np.int64)  # in each pack so far
        for i in longest_first:
            emptiest = tokens.argmin()
            packs[emptiest].append(i)
            tokens[emptiest] += lengths[i]
        if tokens.max() <= max_tokens:
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


def step_indices(count, batch_size, seed, step):
    """The pairs of optimizer step 0, 1, ... (an epoch's last may be short), and the epochs done after it. The
    order of an epoch depends on the seed and its number alone."""
    epoch, step_in_epoch = divmod(step, math.ceil(count / batch_size))
    start = step_in_epoch * batch_size
    end = min(count, start + batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[start:end], epoch + end / count


# -----------------------------------------------------------------------------------------------------------
# A row -> the ids of prompt, chosen, rejected.


def pair_texts(row, tokenizer):
    """The texts of prompt, prompt + chosen, prompt + rejected, these without EOS at their end. Conversations
    go through the chat template, the prompt as a generator is asked."""
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end-of-sequence token; tokenizer_config.json can set eos_token")
    eos = re.escape(tokenizer.specials["eos_token"])
    prompt = row["prompt"]
    options = getattr(row, "template_options", {})
    texts = [prompt or ""]
    if prompt and isinstance(prompt, list):
        texts = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)]
    for name in ("chosen", "rejected"):
        whole = prompt + row[name]
        if isinstance(whole, list):
            whole = conversation_text(whole, options, tokenizer)
        texts.append(re.sub(rf"{eos}(\s|{eos})*$", "", whole))  # the template or the data may have written it
    return texts


def conversation_text(turns, options, tokenizer):
    """A conversation through the chat template. Raises UserError if its text would be the same without the
    tools, the tool calls, or what one of the roles says."""
    text = tokenizer.apply_chat_template(turns, **options)
    # What a template may leave out: a role's words, the tools (an option), the calls (a key of a turn)
    parts = {turn["role"] for turn in turns} - {"user", "assistant"}
    parts |= {"tools", "tool_calls"} & {key for names in (options, *turns) for key in names if names[key]}
    for part in parts:
        others = [{**turn, part: None} for turn in turns]  # no calls; a role is no key
        for turn in others:
            if turn["role"] == part:
                turn["content"] = "OTHER"
        same = False
        with suppress(UserError):  # a template that refuses these tells them apart
            same = tokenizer.apply_chat_template(others, **{**options, part: None}) == text
        if same:
            raise UserError(f"the chat template leaves out {part}; train.py's --chat_template names another")
    return text


def with_bos(ids, tokenizer):
    """The ids of a text where a sequence begins, here and in a generator: BOS goes first, exactly once, if
    the tokenizer would put it there. Where there would be no ids at all, BOS stands alone, or else EOS."""
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:  # a template may have written it
        return [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]


def continuation(text, prompt, whole, tokenizer):
    """The ids of a response where those of the whole text do not begin with the prompt's, because tokens
    would merge across its end: the response is encoded for itself."""
    # Some tokenizers put a space before a text, but not after a line end, which is then taken off.
    line_end = tokenizer.encode("\n")
    ids = tokenizer.encode("\n" + text)
    response = ids[len(line_end) :]
    if tokenizer.decode(prompt + response) == tokenizer.decode(whole):
        return response
    return tokenizer.encode(text)


def pair_ids(texts, ids, tokenizer, max_length, max_prompt_length, truncation_mode):
    """The three texts of pair_texts and their ids -> [prompt, chosen, rejected] as encode_pair describes
    them, and a set of notes on what was done."""
    notes = set()
    opening = texts[PREFIX]
    prompt = with_bos(ids[PREFIX], tokenizer)
    parts = [prompt]
    for part in (CHOSEN, REJECTED):
        whole = with_bos(ids[part], tokenizer)
        shared = len(os.path.commonprefix([prompt, whole]))  # ids (lists will do as well as strings)
        response = whole[shared:]
        if not texts[part].startswith(opening):  # it may end in a <think> that no answered text has
            notes.add("the chat template writes an answer otherwise than it asks for one")
        elif opening and shared < len(prompt):
            response = continuation(texts[part][len(opening) :], prompt, whole, tokenizer)
            notes.add("tokens would merge across the end of the prompt: answers are encoded for themselves")
        parts.append(response + [tokenizer.eos_id] if response else [])
    if len(prompt) + max(len(parts[CHOSEN]), len(parts[REJECTED])) > max_length:
        notes.add("cut")
        room = max_prompt_length or max_length // 2
        bos = int(prompt[0] == tokenizer.bos_id)  # it stays
        if truncation_mode == "keep_start":
            prompt = prompt[:room]
        else:
            prompt = prompt[:bos] + prompt[max(bos, len(prompt) - room + bos) :]
    left = max_length - len(prompt)
    return [prompt, parts[CHOSEN][:left], parts[REJECTED][:left]], notes


def encode_pair(row, tokenizer, max_length=1024, max_prompt_length=None, truncation_mode="keep_end"):
    """One row of read_pairs -> [prompt, chosen, rejected], lists of ids, as they are trained.

    The prompt's ids are those that a generator starts from; a response's continue them, and end in EOS
    exactly once, unless they are cut. When prompt + longer response exceed max_length tokens, the prompt is
    cut to max_prompt_length (default: half of it; from the left: keep_end; from the right: keep_start), BOS
    staying first, then each response on the right to what is left.
    """
    texts = pair_texts(row, tokenizer)
    ids = tokenizer.encode_batch(texts)
    parts, _ = pair_ids(texts, ids, tokenizer, max_length, max_prompt_length, truncation_mode)
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

    def spans(self):
        """(pairs, 3): positions that a pair's prefix, chosen and rejected branch take in a pack."""
        return np.diff(self.ends).reshape(-1, PARTS) - [1, 0, 0]

    @classmethod
    def joined(cls, parts, rows, report=""):
        """From the prompt, chosen, rejected ids (int32) of all pairs, one after the other."""
        tokens = np.concatenate(parts)
        ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(tokens, ends, np.asarray(rows, np.int64), report)

    def select(self, indices):
        """The pairs of the given indices, in that order, as new Pairs."""
        parts = [part for i in indices for part in self[i]]
        return Pairs.joined(parts, self.rows[indices])


def tokenize_pairs(rows, tokenizer, max_length=1024, max_prompt_length=None, truncation_mode="keep_end",
                   progress=False):
    """Rows of read_pairs -> Pairs; for the lengths see encode_pair. Leaves out, and counts by reason, what
    cannot teach: chosen equal to rejected (also once encoded and cut), responses empty but for white space,
    or without a token. Raises UserError if nothing is left."""
    counts = Counter()
    kept_rows = []
    kept_parts = []
    blocks = range(0, len(rows), 512)  # many rows at a time, for the tokenizer's threads
    for start in tqdm(blocks, "tokenizing", unit=" x 512 rows", disable=not progress, leave=False):
        numbers = []
        texts = []
        for number, row in enumerate(rows[start : start + 512], start + 1):
            if plain_text(row["chosen"]).strip() and plain_text(row["rejected"]).strip():
                with where(getattr(row, "place", f"row {number}")):
                    texts += pair_texts(row, tokenizer)
                numbers.append(number)
            else:
                counts["empty"] += 1
        ids = tokenizer.encode_batch(texts)
        for i, number in enumerate(numbers):
            three = slice(PARTS * i, PARTS * (i + 1))
            parts, notes = pair_ids(texts[three], ids[three], tokenizer, max_length, max_prompt_length,
                                    truncation_mode)
            if parts[CHOSEN] == parts[REJECTED]:
                counts["equal"] += 1
            elif not all(parts):
                counts["without a token"] += 1
            else:
                counts.update(notes)
                kept_rows.append(number)
                kept_parts += [np.array(part, np.int32) for part in parts]
    reasons = [f"{counts.pop(reason, 0)} {reason}" for reason in ("equal", "empty", "cut", "without a token")]
    report = f"{len(rows)} rows read, {len(kept_rows)} kept: {', '.join(reasons)}"
    for note, count in counts.items():
        report += f"\n  {count}: {note}"
    if not kept_rows:
        raise UserError(f"no pair is left to train on ({report})")
    return Pairs.joined(kept_parts, kept_rows, report)


def plain_text(said):
    """The text of a string, or what all messages say."""
    if isinstance(said, str):
        return said
    return "".join(f"{turn['content'] or ''}{turn.get('tool_calls') or ''}" for turn in said)


def without_space(said):
    return "".join(plain_text(said).split())


def describe(pairs, tokenizer, prompt_loss):
    """What will be trained of the first three pairs, as text: their tokens, and which losses score them."""
    scored_by = {
        "prompt": "L_SFT (from the second token on)" if prompt_loss else "nothing",
        "chosen": "L_SFT and L_OR",
        "rejected": "L_OR",
    }
    lines = []
    for n in range(min(3, len(pairs))):
        lines.append(f"\nrow {pairs.rows[n]}")
        for (name, losses), ids in zip(scored_by.items(), pairs[n]):
            lines.append(f"  {name}: {len(ids)} tokens, scored by {losses}")
            tokens = []
            for i in range(len(ids)):
                token = tokenizer.decode(ids[i : i + 1], after=ids[max(0, i - 3) : i])
                tokens.append(repr(token)[1:-1])
            end = " <- EOS" if ids[-1] == tokenizer.eos_id else ""
            lines.append(f"    {'|'.join(tokens)}{end}")
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

    files: {name: bytes}, those of a model's directory.  eos_id, bos_id: ids or None.  adds_bos: whether the
    tokenizer itself begins a text with BOS.  clock: the time that templates see.  chat_template: text or
    None, for which DEFAULT_TEMPLATE stands in.  raw: None until adopt_template, then whether all rows to
    train on are text, asked as it stands.
    """

    raw = None

    def __init__(self, files):
        config = read_json("tokenizer_config.json", files)
        listed = read_json("special_tokens_map.json", files)
        model = read_json("config.json", files)
        with where("tokenizer.json"):
            backend = read_backend(files, config, model)
        backend.no_truncation()  # some tokenizer.json files switch these on
        backend.no_padding()
        with suppress(AttributeError):
            backend.model.dropout = None  # of BPE: other tokens each time
        self.files = files
        self.backend = backend
        self.specials = special_tokens(backend, listed | config, model)
        self.clock = datetime.now()
        self.eos_id = backend.token_to_id(self.specials.get("eos_token", ""))
        self.bos_id = backend.token_to_id(self.specials.get("bos_token", ""))
        # Its post-processor may put BOS first, or its Python class, by this setting.
        puts_bos = config.get("add_bos_token") is True or backend.encode("a").ids[:1] == [self.bos_id]
        self.adds_bos = puts_bos and self.bos_id is not None
        self.template_of_files = model_template(files, config)
        self.chat_template = self.template_of_files

    @classmethod
    def from_pretrained(cls, path_or_repo, *, revision=None):
        """Read tokenizer.json (or GPT-2's and OPT's vocab.json + merges.txt) and what goes with it. Raises
        UserError."""
        names = [*TOKENIZER_FILES, "config.json"]
        directory = Path(fetch(path_or_repo, revision, names))
        files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
        with where(directory):
            return cls(files)

    def save_pretrained(self, directory):
        """Write the tokenizer's files, unchanged, and a chat template that is not the model's own."""
        os.makedirs(directory, exist_ok=True)
        for name in TOKENIZER_FILES:
            if name in self.files:
                Path(directory, name).write_bytes(self.files[name])
        if self.chat_template != self.template_of_files:  # from now on the model's own
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
        names = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        names |= self.specials | options
        # A key without a value is a key that is not there, except for the content.
        shown = [{key: message[key] for key in message if message[key] is not None or key == "content"}
                 for message in messages]
        with where("the chat template refused a conversation"):
            template = compiled_template(self.chat_template or DEFAULT_TEMPLATE, self.clock)
            return template.render(names, messages=shown)


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
    merges = []
    for line in files["merges.txt"].decode().splitlines():
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
    # {% generation %} marks the assistant's words for loss masks; {% with %} just prints what is inside
    template = re.sub(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}", r"{%\1 \2with \3%}", template)
    return environment.from_string(template)


# -----------------------------------------------------------------------------------------------------------
# Rows. Every form ends as {"prompt", "chosen", "rejected"}: three strings, or three lists of messages.

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
# The columns of a pair, by the names that people use. Of each kind the first one that a row fills counts.
QUESTION = (
    "prompt",  # text here, or where --prompt_column says, is trained as it stands; elsewhere a user says it
    "question",
    "query",
    "instruction",  # Alpaca's; `input` is part of it
    "input",  # OpenAI's holds `messages` and `tools`
    "messages",
    "conversations",  # ShareGPT's
)
ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
)
FRAME = (
    "system",  # text or turns
    "system_prompt",
    "history",  # turns, or pairs of a question and its answer
    "tools",  # a list for the template, also as JSON
    "chat_template_kwargs",  # more names for the template
)
# Columns that can be part of what is asked, and are not read (system_prompt only where there is no system):
# what they say has to stand in the question, unless --prompt_column says what the question is.
UNREAD = ("system_prompt", "system_message", "context", "documents", "image", "images", "audio", "video")
# [{"role": "user", "content": ...}], as JSON or Python writes it
TURNS_AS_TEXT = re.compile(r"""(?si)\s*\[\s*\{(?=.*['"](content|value)['"]\s*:)"""
                           r""".*['"](role|from)['"]\s*:\s*['"](system|user|human|assistant|gpt)['"]""")
# Roles as data name them (in upper or lower case), and as templates do.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# For a model that brings no template and is trained on rows with an `instruction`.
ALPACA_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}Below is an instruction that describes a task. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{{ m.content }}\n\n### "
    "Response:\n{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


class Row(dict):
    """A pair's prompt, chosen and rejected.  place: file and line.  form: what was read, as what.  column:
    where the question stood.  framed: the columns of FRAME that turn this text into a conversation, if any.
    template_options: more names for the chat template."""

    form = "prompt, chosen, rejected as conversations"
    template_options = {}


def read_pairs(sources, *, prompt_column="", as_conversation=False):
    """All rows of the given files or hub data sets, in order, the prompt always explicit.

    sources: a path or id, or a list of them; `id:split` picks a split other than train.  prompt_column:
    where the prompt stands, in place of the columns of QUESTION; "none": nowhere.  as_conversation: rows of
    text become turns. Returns a list of {"prompt", "chosen", "rejected"}, each a string or a list of
    {"role", "content"} messages. Raises UserError with file and line where a row cannot be used.
    """
    rows = []
    for path in find_files(sources):
        for place, raw in raw_rows(path):
            with where(f"{path}, {place}"):
                row = explicit_row(decoded(raw), prompt_column, as_conversation)
            row.place = f"{path}, {place}"
            rows.append(row)
    if not rows:
        raise UserError(f"{sources}: no rows in it")
    return rows


def adopt_template(tokenizer, rows, path=""):
    """Settle the chat template that rows go through and that is saved with the model: --chat_template's file,
    the model's own or, for a model that has none, one that asks as the rows do. Returns a line for people:
    what was read, and through which template it goes."""
    talks = [row for row in rows if isinstance(row["prompt"], list)]
    source = "the model's" if tokenizer.chat_template else "none"
    if path:
        with where(f"--chat_template {path}"):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8-sig")
        source = path
    elif talks and not tokenizer.chat_template:
        for row in talks:
            if row.framed:
                raise UserError(f"{row.place}: {row.framed} need a --chat_template; the model has none")
        source = "<|user|> and <|assistant|> turns, saved with the model"
        template = DEFAULT_TEMPLATE
        if all(row.column == "instruction" for row in talks):
            source = "Alpaca's text, saved with the model"
            template = ALPACA_TEMPLATE
        tokenizer.chat_template = "{{ bos_token }}" * tokenizer.adds_bos + template
    if tokenizer.raw is None:
        tokenizer.raw = not talks
    forms = [f"{count} rows of {form}" for form, count in Counter(row.form for row in rows).items()]
    if tokenizer.chat_template and len(talks) < len(rows):
        source += ", not for text (but see --as_conversation)"
    return f"{', '.join(forms)}; chat template: {source}"


def find_files(sources):
    """The files that `sources` of read_pairs stand for."""
    if isinstance(sources, str | os.PathLike):
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
    # train-00000-of-00001.parquet, train.jsonl, train/0.parquet; not train_sft-00000..., another split
    pattern = rf"(^|/){re.escape(split)}/|(^|[/_-]){re.escape(split)}[-.][^/]*$"
    for glob in (f"*{split}*", "*"):  # in a data set of one file it may have any name
        patterns = [glob + extension for extension in EXTENSIONS]
        root = Path(fetch(name, patterns=patterns, repo_type="dataset"))
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*")
                       if path.name.endswith(EXTENSIONS))
        found = [file for file in files if re.search(pattern, file)]
        if found:
            break
    if split == "train" and len(files) == 1 and not re.search("test|val|dev", files[0]):
        found = files
    if not found:
        raise UserError(f"{source}: no files of split '{split}' among {files}; name one as {name}:SPLIT")
    kinds = sorted({os.path.join(os.path.dirname(file), "*" + Path(file).suffix) for file in found})
    if len(kinds) > 1:  # other data, or the same rows again
        raise UserError(f"{source}: '{split}' is in {kinds}; name one folder as {name}:FOLDER/{split}, or "
                        "download them and name the files of one kind")
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
        if head.startswith(b"[") and path.endswith(EXTENSIONS):  # other files: lines of text
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
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"row {number}", without_nulls(row)


def without_nulls(value):
    """A parquet value without the keys that are null: parquet gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def decoded(raw):
    """The object that a row of raw_rows is."""
    if isinstance(raw, bytes):
        raw = json.loads(raw)
    if not isinstance(raw, dict):
        raise UserError(f"a JSON object is expected, not a {type(raw).__name__}")
    return raw


def explicit_row(raw, prompt_column="", as_conversation=False):
    """A row, in any of the supported forms -> Row."""
    if isinstance(raw.get("input"), dict):
        raw = {**raw, **raw["input"], "input": None}
    names = [prompt_column] if prompt_column else QUESTION
    if prompt_column == "none":
        names = [None]
    column = next((name for name in names if raw.get(name)), names[0])
    answers = max(ANSWERS, key=lambda both: raw.get(both[0]) is not None)  # of equals the first
    question, chosen, rejected = [raw.get(name) for name in (column, *answers)]
    if None in (chosen, rejected) or (prompt_column and column and not question):
        raise UserError(f"not a pair: chosen, rejected and {prompt_column or 'prompt (if not shared)'} as "
                        f"strings or lists of role/content messages; columns found: {', '.join(raw)}")
    if column == "instruction" and raw.get("input"):
        question = f"{question}\n\n{raw['input']}"
    frame = [name for name in FRAME if raw.get(name)]
    is_text = all(isinstance(part, str | None) for part in (question, chosen, rejected))
    if is_text:
        question, chosen, rejected = split_text(question, chosen, rejected)
    # Answers may begin alike by chance: what they share is the prompt if a user speaks in it, or if the row
    # has no columns but the two of them.
    roles = [turn["role"] for turn in as_turns(chosen, "assistant")]
    sure = "user" in roles or (is_text and "\n\nAssistant:" in question)
    if not sure and column and raw.get(column) is None and sum(map(bool, raw.values())) > 2:
        raise UserError(f"no known column of a prompt; --prompt_column NAME or none; found: {', '.join(raw)}")
    repeated = chosen != raw[answers[0]]
    stands = is_text and not as_conversation and column in ("prompt", prompt_column, None)
    row = Row()
    row.column = column
    row.framed = stands and frame
    if frame or not stands:
        question, chosen, rejected = split_turns(raw, question, chosen, rejected)
        tools = raw.get("tools")
        if isinstance(tools, str):
            tools = json.loads(tools)
        row.template_options = {"tools": tools, **(raw.get("chat_template_kwargs") or {})}
    asked = without_space(question)
    answered = without_space(chosen + rejected)
    for name in (*names, *UNREAD * (not prompt_column)):
        with where(f"its {name}"):
            for turn in as_turns(raw.get(name), "user"):
                # messages may be the whole conversation, but text is a question's
                if without_space([turn]) not in asked + answered * (not isinstance(raw[name], str)):
                    raise UserError(f"{column} does not say this; --prompt_column says what to ask, or none")
    row.update(prompt=question, chosen=chosen, rejected=rejected)
    filled = ", ".join(name for name in (*names, *answers, *frame) if raw.get(name))
    kind = "text" if isinstance(question, str) else "conversations"
    row.form = f"{filled} as {kind}{', answers begin with the prompt' * repeated}"
    return row


def as_turns(value, role):
    """A column's value as role/content messages: text is what `role` says. Messages may be a single one, in
    ShareGPT's words, pairs of a question and its answer, or hold OpenAI's blocks of text."""
    if isinstance(value, str):
        if TURNS_AS_TEXT.match(value):
            raise UserError("its messages are written as text; lists of messages are expected")
        value = {"role": role, "content": value}
    if not isinstance(value, list):
        value = [value] if value else []
    messages = []
    for turn in value:
        if isinstance(turn, list):
            for text, speaker in zip(turn, ("user", "assistant")):
                messages += as_turns(text, speaker)
        elif isinstance(turn, dict):
            messages.append(as_message(turn))
        else:
            raise UserError(f"{type(turn).__name__} is neither text nor a message")
    return messages


def as_message(turn):
    """A turn of any kind -> {"role", "content"} and what else it has."""
    message = dict(turn)
    role = str(message.pop("from", message.get("role"))).lower()
    content = message.pop("value", message.get("content"))
    if isinstance(content, list):
        for block in content:
            if "text" not in block:
                raise UserError(f"a message has the block {str(block)[:60]}; only text can be read")
        content = "".join(block["text"] for block in content)
    if role == "function_call":
        calls = json.loads(content)
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        content = ""
    if role not in ROLES or not (isinstance(content, str) or message.get("tool_calls")):
        raise UserError(f"messages need a role ({', '.join(ROLES)}) and a content; this one has {role}")
    return {**message, "role": ROLES[role], "content": content}


def split_turns(raw, question, chosen, rejected):
    """-> prompt, chosen, rejected turns. The prompt is what chosen and rejected share (by role and content),
    with the question unless a user speaks there, after the row's system and history."""
    def said(turns):
        return [(turn["role"], plain_text([turn]).strip()) for turn in turns]

    chosen = as_turns(chosen, "assistant")
    rejected = as_turns(rejected, "assistant")
    shared = len(os.path.commonprefix([said(chosen[:-1]), said(rejected[:-1])]))
    prompt = chosen[:shared]
    if not any(turn["role"] == "user" for turn in prompt):
        prompt = prompt + as_turns(question or [], "user")
    for turns in (chosen[shared:], rejected[shared:]):
        for turn in turns[:1] + turns[-1:]:
            if turn["role"] != "assistant":
                raise UserError(f"an answer begins and ends with the assistant, not the role {turn['role']}")
    system = as_turns(raw.get("system") or raw.get("system_prompt"), "system")
    system = [turn for turn in system if turn not in prompt]
    prompt = system + as_turns(raw.get("history"), "user") + prompt
    if not prompt or prompt[-1]["role"] == "assistant":
        raise UserError("an answer needs a message before it that the assistant did not write")
    return prompt, chosen[shared:], rejected[shared:]


def split_text(question, chosen, rejected):
    """Text -> prompt, chosen, rejected. Without a question the prompt ends with the last shared
    "\\n\\nAssistant:" after which no "\\n\\nHuman:" is shared (HH-RLHF); in other text at the last word
    boundary that both have. A question that both answers repeat is taken off them, if it is not so short
    that they may just begin like it."""
    shared = os.path.commonprefix([chosen, rejected])
    end = 0
    if question is None:
        found = re.match(r"(?s).*\n\nAssistant:(?!.*\n\nHuman:)", shared) or re.match(r"(?s)(.*\s)?", shared)
        question = found[0].removesuffix(" ")  # that space is part of the next word
        end = len(question)
    elif len(question) > 10 and shared.startswith(question):
        end = len(question)
    return question, chosen[end:], rejected[end:]


# -----------------------------------------------------------------------------------------------------------
# The demo: a task on which the difference between SFT and ORPO shows.


def demo_tokenizer():
    """A byte-level tokenizer: 256 bytes and EOS. Its chat template shows the last question alone."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = byte_level_bpe({symbol: i for i, symbol in enumerate(alphabet)}, [])
    backend.add_special_tokens(["<|endoftext|>"])
    template = ("{% for m in (messages[-2:] if messages[-1].role == 'assistant' else messages[-1:]) %}"
                "{{ m.content }}{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}")
    return Tokenizer({
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "<|endoftext|>"}',
        "chat_template.jinja": template.encode(),
    })


def demo_pairs(count, seed=0):
    """`count` rows, no two alike, on 140 questions such as "Name a number above 57." The chosen answer is one
    of many right ones, so a model that has learnt them all still gives each little probability, as with real
    text; the rejected one is wrong. All are two digits and a full stop: learning to write the chosen ones
    (SFT) makes the rejected ones likelier, too."""
    triples = [three for three in itertools.combinations(range(10, 100), 3) if 20 <= three[1] < 90]
    rows = []
    for i in np.random.default_rng(seed).permutation(len(triples))[:count].tolist():
        low, limit, high = triples[i]
        word, right, wrong = ("below", low, high) if i % 2 else ("above", high, low)
        rows.append(Row(
            prompt=as_turns(f"Name a number {word} {limit}.", "user"),
            chosen=as_turns(f"{right}.", "assistant"),
            rejected=as_turns(f"{wrong}.", "assistant"),
        ))
    return rows


def demo_right(question, answer):
    """Does a text answer a question of the demo?"""
    word, limit = re.search(r"(above|below) (\d\d)", question).groups()
    number = re.fullmatch(r"(\d\d)\.", answer)
    if number is None or number[1] == limit:
        return False
    return (number[1] > limit) == (word == "above")


# -----------------------------------------------------------------------------------------------------------
# Errors and files, for all modules.


class UserError(Exception):
    """Something the user can put right: one line that says where, what, and what to do. The programs print it
    and exit."""

    def __str__(self):
        text = super().__str__()  # part of it may be a file's, with line ends and control codes
        return "".join(c if c.isprintable() else " " for c in text)


# What is not the user's to put right, or the user's own doing: `where` lets these pass as they are.
PASSING = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, torch.OutOfMemoryError, AssertionError,
           NameError)


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
        return snapshot_download(str(path_or_repo), revision=revision or None, repo_type=repo_type,
                                 allow_patterns=patterns)


def read_json(path, files=None):
    """The object in a JSON file, or in that one of `files` {name: bytes}, where it may be missing."""
    with where(path):
        content = Path(path).read_bytes() if files is None else files.get(path, b"{}")
        value = json.loads(content.decode("utf-8-sig"))
        if not isinstance(value, dict):
            raise UserError(f"a JSON object is expected, not a {type(value).__name__}")
    return value


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2), encoding="utf-8")
