"""Preference data: rows -> tokens -> packed tree batches. Knows nothing of the model or the loss.

    from data import read_pairs, Tokenizer, encode_pair, pack
    python train.py --dry_run --model MODEL --data FILE      # shows what this file makes of your rows

Notation used in all modules:  T tokens in a pack, N pairs in a pack, P / C / R tokens of one prompt / chosen / rejected.
"""
import gzip
import heapq
import json
import os
import re
from array import array
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
import tokenizers
import torch
from tokenizers import normalizers, pre_tokenizers
from tqdm import tqdm

PROMPT, CHOSEN, REJECTED = 0, 1, 2  # the three parts of a pair, everywhere in this order


class UserError(Exception):
    """Something the user can put right: one line that says what, where, and what to do. Programs print it and exit 1."""


# ---------------------------------------------------------------------------------------------------------------------
# Where files come from: a directory, or a repository of the Hugging Face hub.

MODEL_FILES = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                   "chat_template.jinja"]


def fetch(path_or_repo, revision=None, patterns=(), repo_type="model"):
    """The local directory of a model or data set; a hub id is downloaded first, only the files that match `patterns`.

    HF_HOME and HF_HUB_OFFLINE are respected. Raises UserError where there is neither such a directory nor such an id.
    """
    path = os.fspath(path_or_repo)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w-]+", path):
        raise UserError(f"{path}: not a directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, revision=revision, repo_type=repo_type, allow_patterns=list(patterns))
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors: to a user all are one
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: no directory here, and the hub did not give it ({type(error).__name__}: {reason})") from error


def read_json(path, default=None):
    """The object in a JSON file; `default`, if given, where the file does not exist."""
    if default is not None and not os.path.exists(path):
        return default
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not a {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Rows. Every form ends as {"prompt", "chosen", "rejected"}: three strings, or three lists of messages.

HH_TURN = "\n\nAssistant:"
EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}{input}\n\n### Response:\n")


def read_pairs(sources, progress=False):
    """All rows of the given files or hub data sets, in order, the prompt always explicit.

    sources: a path or id, or a list of them; `id:split` picks a split other than train.
    Returns a list of {"prompt", "chosen", "rejected"}, each a string or a list of {"role", "content"} messages.
    Raises UserError with file and line where a row cannot be used.
    """
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    rows = []
    for path in [path for source in sources for path in _files(os.fspath(source))]:
        form = None
        before = len(rows)
        for place, row in tqdm(_raw_rows(path), desc=f"reading {os.path.basename(path)}", unit=" rows", disable=not progress, leave=False):
            where = f"{path}, {place}"
            found = _form(row, where)
            form = form or found
            if found != form:
                raise UserError(f"{where}: this row is {found}, the rows before it are {form}; one file holds one form")
            try:
                rows.append(_explicit(row, form))
            except RecursionError as error:
                raise UserError(f"{where}: nested too deeply to be a conversation") from error
        if len(rows) == before:
            raise UserError(f"{path}: no rows in it")
    return rows


def _files(source):
    """The files of one --data value: a file itself, or those of one split of a directory or hub data set."""
    if os.path.isfile(source):
        return [source]
    name, _, split = (source, "", "") if os.path.isdir(source) else source.partition(":")
    if source.endswith(EXTENSIONS) or not (os.path.isdir(name) or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise UserError(f"{source}: no such file (and not a hub data set's id, owner/name or owner/name:split)")
    split = split or "train"
    root = fetch(name, patterns=[f"*{split}*{extension}" for extension in EXTENSIONS], repo_type="dataset")
    found = sorted(os.path.join(folder, file) for folder, _, files in os.walk(root) for file in files if file.endswith(EXTENSIONS))
    # train-00000-of-00001.parquet, train.jsonl, train/0.parquet; but not train_sft-00000..., which is another split
    wanted = [path for path in found if re.search(rf"(^|[/_-]){re.escape(split)}([-./]|$)", os.path.relpath(path, root))]
    if not wanted:
        there = ", ".join(os.path.relpath(path, root) for path in found) or "none at all"
        raise UserError(f"{source}: no data files of split '{split}' ({there}); name one as {name}:SPLIT")
    return wanted


def _raw_rows(path):
    """("line 1" or "row 1", decoded object) of a .jsonl, .json (a list, or lines), gzipped or .parquet file."""
    if path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches()
            yield from _numbered(row for batch in batches for row in batch.to_pylist())
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: not a readable parquet file ({error})") from error
        return
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()  # a byte-order mark is no part of the text
            file.seek(0)
            if head.startswith(b"["):
                yield from _numbered(json.loads(file.read().decode("utf-8-sig")))
                return
            for number, text in enumerate(file, 1):
                text = text.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"line {number}", json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number or error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}{f', line {number}' * bool(number)}: not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (EOFError, OSError, gzip.zlib.error) as error:
        raise UserError(f"{path}, after line {number}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number or 1}: JSON that cannot be used ({error})") from error


def _numbered(rows):
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _kind(value):
    if value is None:
        return "absent"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        return "messages"
    return "unusable"


def _form(row, where):
    """Which of the supported forms a row has, in words."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is expected, not a {type(row).__name__}")
    kinds = tuple(_kind(row.get(key)) for key in ("prompt", "chosen", "rejected"))
    if kinds == ("absent", "text", "text") and _kind(row.get("instruction")) == "text" and _kind(row.get("input")) in ("text", "absent"):
        return "instruction/chosen/rejected strings"
    forms = {
        ("text", "text", "text"): "prompt/chosen/rejected strings",
        ("absent", "text", "text"): "chosen/rejected strings that share their prompt",
        ("messages", "messages", "messages"): "prompt/chosen/rejected messages",
        ("absent", "messages", "messages"): "chosen/rejected conversations",
        ("text", "messages", "messages"): "a prompt string with chosen/rejected conversations",
    }
    if kinds not in forms:
        found = ", ".join(f"{key}: {type(value).__name__}" for key, value in row.items()) or "none"
        raise UserError(f"{where}: not a preference pair; needed are chosen and rejected (and prompt, if they do not share it), "
                        f"all strings or all non-empty lists of role/content messages; columns found: {found}")
    return forms[kinds]


def _clean(value):
    """The value with text a tokenizer can take: lone surrogates become U+FFFD, here and in all that messages hold."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {_clean(key): _clean(item) for key, item in value.items()} if isinstance(value, dict) else value


def _explicit(row, form):
    prompt, chosen, rejected = (_clean(row.get(key)) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and not isinstance(prompt, list):  # whole conversations: the prompt is the run of turns they share
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        turns = chosen[:shared] or ([{"role": "user", "content": prompt}] if prompt else [])
        return {"prompt": turns, "chosen": chosen[shared:], "rejected": rejected[shared:]}
    if form.startswith("instruction"):
        extra = _clean(row.get("input")) or ""
        prompt = ALPACA.format(instruction=_clean(row["instruction"]), input=f"\n\n### Input:\n{extra}" if extra else "")
    elif prompt is None:
        end = len(os.path.commonprefix([chosen, rejected]))
        turn = chosen.rfind(HH_TURN, 0, end)
        if turn >= 0:
            end = turn + len(HH_TURN)
        else:  # back to a word boundary; the space before a word belongs to the word's token
            while end and not chosen[end - 1].isspace():
                end -= 1
            end -= end > 0 and chosen[end - 1] == " "
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---------------------------------------------------------------------------------------------------------------------
# Text -> ids.

# For a model that brings no chat template: the authors' <|user|> / <|assistant|> turns, each closed by EOS.
DEFAULT_TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
                    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A Hugging Face tokenizer's files: text <-> ids, special tokens, chat template.

    eos_id, bos_id: ids or None.  adds_bos: whether the tokenizer itself begins a text with BOS.
    chat_template: the model's own, or DEFAULT_TEMPLATE with has_template False.
    """

    def __init__(self, backend, specials, adds_bos=False, chat_template=None, directory=None):
        backend.no_truncation()  # some tokenizer.json files come with both switched on
        backend.no_padding()
        self.backend, self.specials, self.directory = backend, specials, directory
        self.eos_id, self.bos_id = (backend.token_to_id(specials[name]) if name in specials else None for name in ("eos_token", "bos_token"))
        first, first_of_text = (backend.encode("a", add_special_tokens=added).ids[:1] for added in (True, False))
        processed = first == [self.bos_id] and first_of_text != [self.bos_id]  # the post-processor puts it
        self.adds_bos = self.bos_id is not None and (processed or adds_bos)
        self.has_template = chat_template is not None
        self.chat_template = chat_template if self.has_template else DEFAULT_TEMPLATE
        self._compiled = None

    @classmethod
    def from_pretrained(cls, path_or_repo, *, revision=None):
        """Read tokenizer.json (or vocab.json + merges.txt) and what goes with it. Raises UserError."""
        directory = fetch(path_or_repo, revision, TOKENIZER_FILES + ["config.json", "generation_config.json"])
        at = lambda name: os.path.join(directory, name)
        settings, model, listed = (read_json(at(name), {}) for name in ("tokenizer_config.json", "config.json", "special_tokens_map.json"))
        try:
            if os.path.exists(at("tokenizer.json")):
                backend = tokenizers.Tokenizer.from_file(at("tokenizer.json"))
            elif os.path.exists(at("vocab.json")) and os.path.exists(at("merges.txt")):
                backend = _byte_level_bpe(at, settings, model)
            else:
                raise UserError(f"{directory}: no tokenizer.json, and no vocab.json with merges.txt")
            # The names of the special tokens: three places, the first that speaks wins, and null is a word too (Qwen has no BOS).
            specials = {}
            for name, token in [*settings.items(), *listed.items()]:
                if name.endswith("_token"):
                    specials.setdefault(name, token.get("content") if isinstance(token, dict) else token)
            for name in ("eos_token", "bos_token"):
                number = model.get(f"{name}_id")
                number = number[0] if isinstance(number, list) and number else number
                if name not in specials and isinstance(number, int) and number >= 0:
                    specials[name] = backend.id_to_token(number)
            specials = {name: token for name, token in specials.items() if isinstance(token, str)}
            # A special token is found in text even where the file that lists added tokens forgets it; one with no id stays text.
            known = {token.content for token in backend.get_added_tokens_decoder().values()}
            forgotten = [token for token in specials.values() if token not in known and backend.token_to_id(token) is not None]
            backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in forgotten])
            template = settings.get("chat_template")
            if isinstance(template, list):
                named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
                template = named.get("default")
            if os.path.exists(at("chat_template.jinja")):
                with open(at("chat_template.jinja"), encoding="utf-8") as file:
                    template = file.read()
            return cls(backend, specials, bool(settings.get("add_bos_token")), template, directory)
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # the tokenizers library raises bare Exception, and its panics derive from BaseException
            raise UserError(f"{directory}: the tokenizer's files cannot be read ({error})") from error

    def save_pretrained(self, directory):
        """Write the tokenizer's files: those it came from, unchanged, or (for one made here) new ones."""
        os.makedirs(directory, exist_ok=True)
        if self.directory:
            for name in TOKENIZER_FILES:
                if os.path.exists(os.path.join(self.directory, name)):
                    with open(os.path.join(self.directory, name), "rb") as file:
                        content = file.read()
                    with open(os.path.join(directory, name), "wb") as file:  # only now: it may be the same file
                        file.write(content)
            if self.has_template and self.chat_template == DEFAULT_TEMPLATE:  # used for want of the model's own; from now on it is
                with open(os.path.join(directory, "chat_template.jinja"), "w", encoding="utf-8") as file:
                    file.write(self.chat_template)
        else:
            self.backend.save(os.path.join(directory, "tokenizer.json"))
            with open(os.path.join(directory, "tokenizer_config.json"), "w", encoding="utf-8") as file:
                json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.chat_template, **self.specials}, file, indent=2)

    def encode(self, text):
        """text -> list of ids; no special tokens are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """texts -> lists of ids, computed on all cores."""
        try:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # a vocabulary without a token for unknown words, say
            raise UserError(f"the tokenizer cannot encode a text ({error})") from error

    def decode(self, ids):
        """ids -> text, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def apply_chat_template(self, messages, add_generation_prompt=False):
        """messages -> text, as transformers renders it. Raises UserError where the template refuses or misbehaves."""
        try:
            self._compiled = self._compiled or _template_environment().from_string(self.chat_template)
            # A key without a value is a key that is not there: parquet and APIs write "tool_calls": null into every message.
            messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
            variables = dict(messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt)
            return self._compiled.render(variables | self.specials)
        except Exception as error:  # a template is a stranger's program: it can fail in any way
            roles = [message.get("role") for message in messages]
            raise UserError(f"the chat template refused a conversation with roles {roles} ({type(error).__name__}: {error})") from error

    def stop_ids(self):
        """The ids that end an answer: EOS, generation_config.json's, and the one with which the chat template closes a turn."""
        stops = {self.eos_id} - {None}
        if self.directory:
            listed = read_json(os.path.join(self.directory, "generation_config.json"), {}).get("eos_token_id", [])
            stops.update(i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int))
        if self.has_template:
            try:
                turn = self.apply_chat_template([{"role": "user", "content": "u"}, {"role": "assistant", "content": "ANSWER"}])
            except UserError:  # a template with rules of its own about turns: the other two sources have to do
                return stops
            added = {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
            closing = turn.rpartition("ANSWER")[2].lstrip()
            stops.update(i for token, i in added.items() if closing.startswith(token))
        return stops


def _byte_level_bpe(at, settings, model):
    """A tokenizer of the GPT-2, OPT or Qwen kind from vocab.json + merges.txt, the form older hub repositories have."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(at("vocab.json"), at("merges.txt")))
    if "qwen" in str(settings.get("tokenizer_class", model.get("model_type"))).lower():
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    backend.decoder = tokenizers.decoders.ByteLevel()
    added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    added = added or {i: {"content": token} for token, i in read_json(at("added_tokens.json"), {}).items()}
    for i in sorted(added):
        token = {"special": True, "normalized": False} | {k: v for k, v in added[i].items() if k != "__type"}
        backend.add_tokens([tokenizers.AddedToken(token.pop("content"), **token)])
    return backend


def _template_environment():
    """jinja2's immutable sandbox with the names and options that transformers gives chat templates."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):  # {% generation %}...{% endgeneration %} marks the assistant's text; here it is only passed through
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda format: datetime.now().strftime(format))
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # not the class: dict.update(message, ...) would change rows
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# A row -> the ids of prompt, chosen, rejected.


def _texts(row, tokenizer):
    """prompt, prompt + chosen, prompt + rejected as text."""
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        return prompt, prompt + chosen, prompt + rejected
    opening = tokenizer.apply_chat_template(prompt, add_generation_prompt=True) if prompt else ""
    return opening, tokenizer.apply_chat_template(prompt + chosen), tokenizer.apply_chat_template(prompt + rejected)


def _split(ids, tokenizer, max_length, max_prompt_length, truncation_mode):
    """Token ids of the three texts -> prompt, chosen, rejected ids, special tokens placed and lengths kept; were any cut?"""
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no end-of-sequence token; set eos_token in its tokenizer_config.json")
    written = ids[1][:1] == [tokenizer.bos_id]  # by the template
    bos = [tokenizer.bos_id] if tokenizer.adds_bos or written else []
    ids = [full[1:] if full[:1] == bos else full for full in ids]
    prompt = os.path.commonprefix(ids)  # the longest common prefix: merges across the boundary go to the responses
    responses = [_ended(full[len(prompt):], tokenizer) for full in ids[1:]]
    if not prompt and not bos:  # something has to open the branches: BOS or EOS, as a generator would start
        bos = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    cut = len(bos) + len(prompt) + max(map(len, responses)) > max_length
    if cut:
        room = max_prompt_length - len(bos)
        prompt = prompt[:room] if truncation_mode == "keep_start" else prompt[max(0, len(prompt) - room):]
    prompt = bos + prompt
    return prompt, *(response[: max_length - len(prompt)] for response in responses), cut


def _ended(response, tokenizer):
    """A response's ids with EOS at its end exactly once: those that stand there, and white space after them, go first."""
    eos = tokenizer.eos_id
    while eos in response:
        last = len(response) - 1 - response[::-1].index(eos)
        if tokenizer.decode(response[last + 1 :]).strip():
            break
        response = response[:last]
    return response + [eos] if response else []  # no token at all: the row will be dropped


def encode_pair(row, tokenizer, *, max_length=1024, max_prompt_length=512, truncation_mode="keep_end"):
    """One row of read_pairs -> (prompt, chosen, rejected) lists of ids, as they are trained.

    The prompt is the longest common prefix of encode(prompt), encode(prompt + chosen), encode(prompt + rejected). It begins with
    BOS where the tokenizer would put one; a response ends in EOS exactly once. When prompt + longer response exceed max_length
    tokens, the prompt is cut to max_prompt_length (from the left: keep_end; from the right: keep_start), BOS staying first, then
    each response on the right to what is left.
    """
    ids = [tokenizer.encode(text) for text in _texts(row, tokenizer)]
    return _split(ids, tokenizer, max_length, max_prompt_length, truncation_mode)[:3]


def _text(response):
    return response if isinstance(response, str) else "".join(message["content"] for message in response)


@dataclass
class Pairs:
    """Tokenized pairs as flat arrays. tokens: int32, all pairs' prompt, chosen, rejected ids end to end;
    ends: (3 * pairs,) int64, where each part ends; rows: (pairs,) int64, the 1-based number of the row it came from."""

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
        """(pairs, 3): positions that each pair's prefix, chosen and rejected branch take in a pack (see `pack`)."""
        spans = np.diff(self.ends, prepend=0).reshape(-1, 3)
        return spans - np.array([1, 0, 0])

    def select(self, indices):
        """The pairs of the given indices, in that order, as new Pairs."""
        parts = [part for i in indices for part in self[i]]
        return replace(self, tokens=np.concatenate(parts), ends=np.cumsum([len(part) for part in parts]), rows=self.rows[indices])


def tokenize_pairs(rows, tokenizer, *, max_length=1024, max_prompt_length=512, truncation_mode="keep_end", progress=False):
    """Rows of read_pairs -> Pairs. Leaves out, and counts by reason, what cannot teach: chosen equal to rejected, empty
    responses (white space only), rows with no token left in a response. Raises UserError if nothing is left."""
    tokens, ends, kept, counts = array("i"), array("q"), array("q"), dict.fromkeys(("equal", "empty", "cut", "dropped"), 0)
    bar = tqdm(total=len(rows), desc="tokenizing", unit=" rows", disable=not progress, leave=False)
    for start in range(0, len(rows), 512):
        numbers, texts = [], []
        for number, row in enumerate(rows[start : start + 512], start + 1):
            bar.update()
            if not _text(row["chosen"]).strip() or not _text(row["rejected"]).strip():
                counts["empty"] += 1
            elif row["chosen"] == row["rejected"]:
                counts["equal"] += 1
            else:
                try:
                    texts += _texts(row, tokenizer)
                except UserError as error:
                    raise UserError(f"row {number}: {error}") from error
                numbers.append(number)
        ids = tokenizer.encode_batch(texts)
        for i, number in enumerate(numbers):
            *parts, cut = _split(ids[3 * i : 3 * i + 3], tokenizer, max_length, max_prompt_length, truncation_mode)
            if not all(parts):
                counts["dropped"] += 1
                continue
            counts["cut"] += cut
            kept.append(number)
            for part in parts:
                tokens.extend(part)
                ends.append(len(tokens))
    bar.close()
    report = f"{len(rows)} rows read, {len(kept)} kept: " + ", ".join(f"{count} {reason}" for reason, count in counts.items())
    if not kept:
        raise UserError(f"no pair is left to train on ({report})")
    return Pairs(np.frombuffer(tokens, np.int32), np.frombuffer(ends, np.int64), np.frombuffer(kept, np.int64), report)


def describe(pairs, tokenizer, prompt_loss=True, count=3):
    """What will be trained of the first pairs, as text: their tokens one by one, which losses score them, and where EOS stands."""
    lines = []
    scored = ("L_SFT (from the second token on)" if prompt_loss else "nothing", "L_SFT and L_OR", "L_OR")
    for pair in range(min(count, len(pairs))):
        lines.append(f"\nrow {pairs.rows[pair]}")
        for name, ids, losses in zip(("prompt", "chosen", "rejected"), pairs[pair], scored):
            pieces = "|".join(repr(tokenizer.decode([i]))[1:-1] + " <- EOS" * (i == tokenizer.eos_id) for i in ids.tolist())
            lines.append(f"  {name}: {len(ids)} tokens, scored by {losses}\n    {pieces}")
    lengths = np.diff(pairs.ends, prepend=0).reshape(-1, 3)
    mean, longest = "{:.0f}, chosen {:.0f}, rejected {:.0f}".format(*lengths.mean(0)), "{}, {}, {}".format(*lengths.max(0))
    return "\n".join([*lines, f"\nmean tokens: prompt {mean}; longest {longest}"])


# ---------------------------------------------------------------------------------------------------------------------
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

    inputs, targets, positions (T,) int64.   owner (T,) int64: 3 * pair + (0 prefix, 1 chosen branch, 2 rejected branch).
    spans (N, 3) int64, always on the CPU: lengths of prefix, chosen and rejected branch.  counts (N, 3) int64: their scored targets.
    scored (S,) int64: positions whose target counts; None: all.
    Attention as segments of queries, two a pair (prefix + chosen branch; rejected branch), each causal, aligned at the end of
    its keys: segment s has queries cu_q[s]:cu_q[s+1] and keys kv_index[cu_k[s]:cu_k[s+1]]; max_q, max_k: the longest.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    owner: torch.Tensor
    spans: torch.Tensor
    counts: torch.Tensor
    scored: torch.Tensor | None
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    kv_index: torch.Tensor
    max_q: int
    max_k: int

    def to(self, device):
        """On `device`; the copy to a GPU goes through pinned memory and does not wait."""
        if torch.device(device).type == "cpu":
            return self
        pin = torch.device(device).type == "cuda"
        moved = {
            name: (value.pin_memory() if pin else value).to(device, non_blocking=True)
            for name, value in vars(self).items() if isinstance(value, torch.Tensor) and name != "spans"
        }
        return replace(self, **moved)


def pack(pairs, *, prompt_loss=True, feed_last=False):
    """(prompt, chosen, rejected) ids of N pairs -> Batch.

    prompt_loss False: the prompt's targets are not scored.  feed_last True: the responses' last tokens, after which nothing is
    predicted, are fed in as well (unscored); the router statistics of mixtures of experts count them, as elsewhere.
    """
    inputs, targets, positions, owner, spans, scored, keys = [], [], [], [], [], [], []
    start = 0
    for n, (prompt, *responses) in enumerate(pairs):
        prefix = len(prompt) - 1
        parts = [(prompt[:-1], prompt[1:], 0)]
        for response in responses:
            fed = response if feed_last else response[:-1]
            parts.append((np.concatenate([prompt[-1:], fed]), response, prefix))
        spans.append([len(part[0]) for part in parts])
        for branch, (read, predict, first) in enumerate(parts):
            inputs.append(read)
            targets.append(np.resize(predict, len(read)) if len(read) > len(predict) else predict)  # any token: it is not scored
            positions.append(first + np.arange(len(read)))
            owner.append(np.full(len(read), 3 * n + branch))
            wanted = np.arange(len(read)) < len(predict)
            scored.append(wanted & (prompt_loss or branch != PROMPT))
        _, chosen, rejected = spans[-1]
        keys.append(np.arange(start, start + prefix + chosen))  # segment 1: the prefix and the chosen branch
        keys.append(np.r_[start : start + prefix, start + prefix + chosen : start + prefix + chosen + rejected])  # segment 2
        start += prefix + chosen + rejected
    spans = np.array(spans)
    queries = np.stack([spans[:, PROMPT] + spans[:, CHOSEN], spans[:, REJECTED]], 1).ravel()
    key_counts = np.array([len(k) for k in keys])
    long = lambda arrays: torch.from_numpy(np.concatenate(arrays).astype(np.int64))
    cumulative = lambda counts: torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    mask = np.concatenate(scored)
    return Batch(
        long(inputs), long(targets), long(positions), long(owner), torch.from_numpy(spans.astype(np.int64)),
        torch.tensor([part.sum() for part in scored]).view(-1, 3),
        None if mask.all() else torch.from_numpy(mask.nonzero()[0]),
        cumulative(queries), cumulative(key_counts), long(keys), int(queries.max()), int(key_counts.max()),
    )


def first_fit_decreasing(lengths, capacity):
    """Indices of `lengths` grouped into bins of at most `capacity` in sum, longest first, each into the first bin with room."""
    bins, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert lengths[i] <= capacity, "checked before training"
        b = next((b for b, free in enumerate(room) if lengths[i] <= free), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(capacity)
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def spread(lengths, ranks):
    """Indices of `lengths` dealt to `ranks`, longest first, each to the rank with the least so far: sums nearly equal."""
    heap, shares = [(0, rank) for rank in range(ranks)], [[] for _ in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, rank = heapq.heappop(heap)
        shares[rank].append(i)
        heapq.heappush(heap, (total + int(lengths[i]), rank))
    return shares


def make_packs(pairs, indices, max_tokens, *, rank=0, ranks=1, **options):
    """The packs, of at most max_tokens positions each, in which this rank computes the pairs of one optimizer step."""
    lengths = pairs.spans()[indices].sum(1) + 2 * options.get("feed_last", False)
    mine = spread(lengths, ranks)[rank]
    bins = first_fit_decreasing(lengths[mine], max_tokens)
    return [pack([pairs[indices[mine[i]]] for i in members], **options) for members in bins]


def epoch_order(count, seed, epoch):
    """The order in which epoch number `epoch` takes `count` pairs: a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


# ---------------------------------------------------------------------------------------------------------------------
# The demo: a task on which the difference between SFT and ORPO shows.


def demo_tokenizer():
    """A byte-level tokenizer: 256 bytes and an end-of-sequence token. Its chat template shows the last question alone."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    template = ("{% set last = messages[-2:] if messages[-1].role == 'assistant' else messages[-1:] %}"
                "{% for m in last %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}")
    return Tokenizer(backend, {"eos_token": "<|endoftext|>"}, chat_template=template)


def demo_pairs(count, seed=0):
    """`count` different questions about two numbers, as rows. The rejected answer is the chosen one with the numbers swapped:
    it shares every word with it, so learning to write the chosen answer (SFT) makes the rejected one likelier too."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation([(a, b) for a in range(10, 100) for b in range(10, 100) if a != b])[:count]
    turn = lambda role, content: [{"role": role, "content": content}]
    answer = lambda a, b: turn("assistant", f"{a} is larger than {b}.")
    question = lambda a, b: turn("user", f"Which is larger, {a} or {b}?")
    return [dict(prompt=question(a, b), chosen=answer(max(a, b), min(a, b)), rejected=answer(min(a, b), max(a, b))) for a, b in numbers.tolist()]
