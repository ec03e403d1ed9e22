"""Generation: one prompt, a chat, or a file of prompts.

    python sample.py --model out                                     # chat: answers stream, history is kept
    python sample.py --model out --prompt "Name a number above 57."
    python sample.py --model out --prompts questions.txt --output answers.jsonl

A model with a chat template is asked through it (--raw: not); one without continues the text as it stands.
Where no --temperature, --top_k or --top_p is given, generation_config.json's count; its repetition_penalty
does not.
"""
import argparse
import inspect
import json
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import get_args

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import (ANSWERS, EXTENSIONS, Tokenizer, UserError, as_turns, conversation_text, decoded,
                  explicit_row, raw_rows, where, with_bos)
from model import Cache, Transformer

CHAT_HELP = "/new forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer."


@dataclass
class Flags:
    model: str = "out"  # directory or hub id
    revision: str = ""  # branch, tag or commit of a hub id
    prompt: str = None  # one prompt: print its answer and end
    prompts: str = ""  # file of prompts: lines of text, or rows as train.py's --data has them
    prompt_column: str = ""  # where a row's prompt stands, as for train.py; none: its answers share it
    output: str = ""  # where the answers to --prompts go, as .jsonl (default: standard output)
    raw: bool = False  # do not use the chat template
    system: str = ""  # system message before the prompt or chat, also before messages with one of their own
    max_new_tokens: int = 256  # longest answer, in tokens
    temperature: float = None  # 0: the likeliest token (default: generation_config.json's, else 0)
    top_k: int = None  # sample among the k likeliest tokens; 0: all (default: likewise, else 0)
    top_p: float = None  # sample among the likeliest tokens of this total probability (likewise, else 1)
    seed: int = 0  # of the sampling
    batch_size: int = 16  # prompts of a file answered together
    debug: bool = False  # show the traceback behind a one-line error


# -----------------------------------------------------------------------------------------------------------
# Generation.


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop_ids=(), **choice):
    """Continue a batch of prompts (lists of ids, any lengths) together. Yields, a step at a time, the list
    of each row's next id; None once a row has ended, at one of stop_ids or at the model's last position.
    `choice`: the options of `pick`. Raises UserError for prompts that cannot be continued."""
    check_prompts(model, prompts)
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it would plan anew for every length of the keys
    device = model.lm_head.weight.device
    cache = Cache()
    inputs = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)  # (B, T)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    longest = inputs.shape[1]
    positions = torch.arange(longest, device=device).expand_as(inputs)
    last = lengths - 1  # the index of each row's last token among the inputs
    end = model.max_positions or 2**40  # rotary positions have no end
    rooms = (end - lengths).tolist()  # tokens that each row may still get
    for step in range(max_new_tokens):
        logits = model.next_logits(inputs, positions, cache, longest + step, last)  # (B, vocab)
        tokens = pick(logits, **choice)
        picked = tokens.tolist()  # here the host waits for the device
        rooms = [0 if token in stop_ids else room for token, room in zip(picked, rooms)]
        if step >= max(rooms):
            return
        yield [token if step < room else None for token, room in zip(picked, rooms)]
        inputs = tokens[:, None]
        last = -1
        positions = (lengths + step)[:, None].clamp(max=end - 1)  # a row that has ended stays at its last


def pick(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """Next tokens (B,) from logits (B, vocab). temperature 0 (below 1e-6): the likeliest. top_k > 0: among
    the k likeliest; top_p < 1: among the fewest likeliest tokens that together have at least that
    probability."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite; its weights are broken")
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        likelier = ordered.cumsum(-1) - ordered  # the probability of all that stand before
        excluded = torch.zeros_like(ordered, dtype=torch.bool).scatter(1, index, likelier >= top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check_limits(model, largest_id, longest):
    """Raise UserError for ids that the model does not know, and for more positions than it has."""
    if largest_id >= model.config.vocab_size:
        raise UserError(f"token id {largest_id} in a vocabulary of {model.config.vocab_size}: this tokenizer "
                        "is not the model's")
    if model.max_positions and longest > model.max_positions:
        raise UserError(f"{longest} tokens in a model of {model.max_positions} positions")


def check_prompts(model, prompts):
    """Raise UserError for what cannot be continued by a token."""
    check_limits(model, max(map(max, prompts)), max(map(len, prompts)) + 1)


def continuations(model, prompts, max_new_tokens, stop_ids=(), **choice):
    """What `generate` yields, gathered: a list of ids for each prompt."""
    answers = [[] for _ in prompts]
    for tokens in generate(model, prompts, max_new_tokens, stop_ids, **choice):
        for ids, token in zip(answers, tokens):
            if token is not None:
                ids.append(token)
    return answers


def prompt_ids(prompt, tokenizer, history=(), options={}):
    """Ids of a prompt, a string or messages: through the chat template, after the messages of `history`; as
    it stands where there is none.  options: more names for the template, such as tools."""
    turns = as_turns(prompt, "user")
    text = turns[0]["content"]
    if tokenizer.chat_template:
        text = conversation_text([*history, *turns], options | {"add_generation_prompt": True}, tokenizer)
    elif len(turns) > 1 or options.get("tools"):
        raise UserError("several messages and tools need a chat template")
    return with_bos(tokenizer.encode(text), tokenizer)


def stop_ids(model, tokenizer):
    """The ids that end an answer: EOS, generation_config.json's, what closes a turn of the template."""
    listed = model.generation_config.get("eos_token_id")
    if not isinstance(listed, list):
        listed = [listed]
    stops = {tokenizer.eos_id, *listed} - {None}
    with suppress(UserError):  # a template with rules of its own about turns
        turns = as_turns("QUESTION", "user") + as_turns("ANSWER", "assistant")
        closing = tokenizer.apply_chat_template(turns).rpartition("ANSWER")[2].lstrip()
        added = tokenizer.backend.get_added_tokens_decoder()
        for token in tokenizer.encode(closing)[:1]:
            if token in added and added[token].special:
                stops.add(token)
    return stops


# -----------------------------------------------------------------------------------------------------------
# One prompt, a chat, a file.


def answer(model, tokenizer, ids, options):
    """Generate from one prompt, printing as it goes; Ctrl-C ends it. Returns the text. Tokens a second go to
    stderr."""
    tokens = list(ids)
    printed = len(ids)  # so many tokens are on the screen
    text = ""
    start = time.perf_counter()
    try:
        for [token] in generate(model, [ids], **options):
            tokens.append(token)
            text = tokenizer.decode(tokens[printed:], after=tokens[max(0, printed - 8) : printed])
            if not text.endswith("\ufffd"):  # else inside of a character: the next token may complete it
                print(text, end="", flush=True)
                printed = len(tokens)
                text = ""
    except KeyboardInterrupt:
        text += " [stopped]"
    print(text, flush=True)
    print_speed(len(tokens) - len(ids), start)
    return tokenizer.decode(tokens[len(ids) :], after=ids)


def print_speed(count, start):
    print(f"[{count} tokens, {count / (time.perf_counter() - start):.0f} tokens/s]", file=sys.stderr)


def chat(model, tokenizer, opening, options):
    """Answer line after line, with what was said before where the model has a chat template."""
    with suppress(ImportError):  # line editing, a history of what was typed, pasted lines as one message
        import readline
    history = list(opening)
    print(CHAT_HELP, file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:  # Ctrl-D
            return
        if text == "/exit":
            return
        if text == "/new":
            history = list(opening)
        elif text:
            try:
                said = answer(model, tokenizer, prompt_ids(text, tokenizer, history), options)
                history += as_turns(text, "user") + as_turns(said, "assistant")
            except UserError as error:  # one message that cannot be answered does not end the chat
                print(f"{error} (/new starts afresh)", file=sys.stderr)


def read_prompts(path, prompt_column):
    """[(row, what train.py makes of it)] of a file: lines of text, or rows in any form that train.py reads;
    they need no answers."""
    prompts = []
    for place, raw in raw_rows(path):
        with where(f"{path}, {place}"):
            if path.endswith(EXTENSIONS):
                row = decoded(raw)
            else:
                row = {"prompt": raw.decode("utf-8-sig").strip("\r\n")}
            # Without answers: under the last names that they can have, so that a row's own come first
            asked = explicit_row(dict.fromkeys(["rejected", *ANSWERS[-1]], "") | row, prompt_column)
            if not asked["prompt"]:
                raise UserError(f"no prompt; columns found: {', '.join(row)}")
            prompts.append((row, asked))
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    return prompts


def answer_file(model, tokenizer, prompts, opening, flags, options):
    """Answer a file of prompts in its order, writing as they come."""
    with where(flags.prompts):
        ids = []
        for _, asked in prompts:
            ids.append(prompt_ids(asked["prompt"], tokenizer, opening, asked.template_options))
        check_prompts(model, ids)
    with where(f"--output {flags.output}"):
        # by lines: what is answered stays, whatever happens to the rest
        file = sys.stdout
        if flags.output:
            file = open(flags.output, "w", buffering=1, encoding="utf-8", errors="replace")
    count = 0
    start = time.perf_counter()
    for first in tqdm(range(0, len(ids), flags.batch_size), desc="answering", unit=" batches", disable=None):
        batch = ids[first : first + flags.batch_size]
        answers = continuations(model, batch, **options)
        count += sum(map(len, answers))
        for (row, _), asked, new in zip(prompts[first:], batch, answers):
            row["answer"] = tokenizer.decode(new, after=asked)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print_speed(count, start)


# -----------------------------------------------------------------------------------------------------------
# The program. The parser serves train.py, too.


def make_parser(cls, program, description):
    """A field of the dataclass is a flag, its comment the help, a Literal its choices. What is not given is
    not in the result."""
    parser = argparse.ArgumentParser(prog=program, usage=argparse.SUPPRESS, description=description,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    for field in fields(cls):
        options = {"help": comments[field.name]}
        if field.default not in (None, "", ()):
            options["help"] += f" (default: {field.default})"
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.type is list:
            options.update(action="extend", nargs="+")
        elif get_args(field.type):
            options["choices"] = get_args(field.type)
        else:
            options["type"] = field.type
        parser.add_argument(f"--{field.name}", **options)
    return parser


def check_numbers(flags, positive, error):
    """Call error(line) for a number that is negative or not finite, or 0 where it has to be positive."""
    for name, value in vars(flags).items():
        if isinstance(value, int | float) and not 0 <= value < 2**63:  # NaN neither
            error(f"--{name} {value} is out of range")
        if value == 0 and name in positive:
            error(f"--{name} must be positive")


def parse_flags(arguments):
    parser = make_parser(Flags, "sample.py", __doc__)
    flags = Flags(**vars(parser.parse_args(arguments)))
    check_numbers(flags, ["max_new_tokens", "batch_size", "top_p"], parser.error)
    if flags.prompt is not None and flags.prompts:
        parser.error("--prompt and --prompts: give one of the two")
    if (flags.top_p or 0) > 1:
        parser.error("--top_p must be at most 1")
    if (flags.output or flags.prompt_column) and not flags.prompts:
        parser.error("--output and --prompt_column go with --prompts, which is missing")
    return flags


def sampling_options(model, flags):
    """Those of generation_config.json, greedy without its do_sample; the command line wins. Where neither has
    a top_k, all tokens count (in transformers 50)."""
    options = dict(temperature=1.0, top_k=0, top_p=1.0)
    usual = model.generation_config if model.generation_config.get("do_sample") else {"temperature": 0.0}
    for source in (usual, vars(flags)):
        for name in options:
            if source.get(name) is not None:
                options[name] = source[name]
    return options


def main(arguments):
    """Generate as the command line says. Raises UserError."""
    flags = parse_flags(arguments)
    prompts = []
    if flags.prompts:  # before the model: mistakes show at once
        prompts = read_prompts(flags.prompts, flags.prompt_column)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformer.outline(flags.model, revision=flags.revision).requires_grad_(False)
    tokenizer = Tokenizer.from_pretrained(flags.model, revision=flags.revision)
    model.load(device, torch.bfloat16 if device == "cuda" else torch.float32)
    if flags.raw:
        tokenizer.chat_template = None  # a prompt as it stands
    if flags.system and not tokenizer.chat_template:
        raise UserError("--system needs a chat template")
    opening = as_turns(flags.system or None, "system")
    options = sampling_options(model, flags)
    options["stop_ids"] = stop_ids(model, tokenizer)
    options["max_new_tokens"] = flags.max_new_tokens
    options["generator"] = torch.Generator(device).manual_seed(flags.seed)
    if prompts:
        answer_file(model, tokenizer, prompts, opening, flags, options)
    elif flags.prompt is not None:
        answer(model, tokenizer, prompt_ids(flags.prompt, tokenizer, opening), options)
    else:
        chat(model, tokenizer, opening, options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, torch.OutOfMemoryError):
            error = "out of memory; lower --max_new_tokens or --batch_size"
        sys.exit(f"sample.py: {error}")
