"""Generation: one prompt, a chat, or a file of prompts.

    python sample.py --model out                                     # chat: answers stream, history is kept
    python sample.py --model out --prompt "Name a number above 57."
    python sample.py --model out --prompts questions.txt --output answers.jsonl

A model with a chat template is asked through it (--raw: not); one without continues the text as it stands.
Where no --temperature, --top_k or --top_p is given, generation_config.json's count; its repetition_penalty
does not.
"""
import argparse
import json
import sys
import time
from contextlib import suppress

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import Tokenizer, UserError, kind_of, where
from model import Cache, Transformer

CHAT_HELP = "/new forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer."


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
    end = model.max_positions or 2**40
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
        last = None
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


def check_prompts(model, prompts):
    """Raise UserError for what cannot be continued."""
    if not all(prompts):
        raise UserError("a prompt without a single token cannot be continued")
    largest = max(map(max, prompts))
    longest = max(map(len, prompts))
    if largest >= model.config.vocab_size:
        raise UserError(f"token id {largest} in a vocabulary of {model.config.vocab_size}: this tokenizer "
                        "is not the model's")
    if model.max_positions and longest >= model.max_positions:
        raise UserError(f"a prompt of {longest} tokens leaves no room in the model's {model.max_positions}")


def continuations(model, prompts, max_new_tokens, stop_ids=(), **choice):
    """What `generate` yields, gathered: a list of ids for each prompt."""
    answers = [[] for _ in prompts]
    for tokens in generate(model, prompts, max_new_tokens, stop_ids, **choice):
        for answer, token in zip(answers, tokens):
            if token is not None:
                answer.append(token)
    return answers


def prompt_ids(prompt, tokenizer, history=()):
    """Ids of a prompt: a list of messages through the chat template, a string as the user's turn after those
    of `history` if there is a template."""
    if isinstance(prompt, str) and tokenizer.has_template:
        prompt = [*history, {"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    ids = tokenizer.encode(prompt)
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:  # a template may have written it
        ids = [tokenizer.bos_id, *ids]
    return ids


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
    count = len(tokens) - len(ids)
    print(f"[{count} tokens, {count / (time.perf_counter() - start):.0f} tokens/s]", file=sys.stderr)
    return tokenizer.decode(tokens[len(ids) :], after=ids)


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
        if text == "/help":
            print(CHAT_HELP, file=sys.stderr)
        elif text == "/new":
            history = list(opening)
        elif text:
            try:
                said = answer(model, tokenizer, prompt_ids(text, tokenizer, history), options)
                history.append({"role": "user", "content": text})
                history.append({"role": "assistant", "content": said})
            except UserError as error:  # one message that cannot be answered does not end the chat
                print(f"{error} (/new starts afresh)", file=sys.stderr)


def read_prompts(path):
    """[(name, prompt)] of a file: one a line, or .jsonl lines with text or messages under the name `prompt`
    or, as AlpacaEval has it, `instruction`."""
    prompts = []
    with where(path), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            with where(f"line {number}"):
                row = json.loads(line) if path.endswith(".jsonl") else {"prompt": line.rstrip("\n")}
                name = "instruction" if "instruction" in row else "prompt"
                if kind_of(row[name]) not in ("strings", "messages"):
                    raise UserError("neither text nor messages")
                prompts.append((name, row[name]))
        if not prompts:
            raise UserError("no prompts in it")
    return prompts


def answer_file(model, tokenizer, prompts, opening, args, options):
    """Answer a file of prompts in its order, writing as they come."""
    ids = [prompt_ids(prompt, tokenizer, opening) for _, prompt in prompts]
    with where(args.prompts):
        check_prompts(model, ids)
    with where(f"--output {args.output}"):
        # by lines: what is answered stays, whatever happens to the rest
        file = open(args.output, "w", buffering=1, encoding="utf-8") if args.output else sys.stdout
    for first in tqdm(range(0, len(ids), args.batch_size), desc="answering", unit=" batches", disable=None):
        batch = ids[first : first + args.batch_size]
        answers = continuations(model, batch, **options)
        for (name, prompt), asked, new in zip(prompts[first:], batch, answers):
            text = tokenizer.decode(new, after=asked)
            row = {name: prompt, "answer": text}
            if name == "instruction":  # AlpacaEval's names
                row = {name: prompt, "output": text, "generator": args.model}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# -----------------------------------------------------------------------------------------------------------
# The program.


def parse_args(arguments):
    parser = argparse.ArgumentParser(prog="sample.py", usage=argparse.SUPPRESS, description=__doc__,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--model", default="out", help="directory or hub id (default: out)")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--prompt", help="one prompt: print its answer and end")
    flag("--prompts", help="file of prompts, one a line, or .jsonl with `prompt`")
    flag("--output", help="where the answers to --prompts go, as .jsonl (default: standard output)")
    flag("--raw", action="store_true", help="do not use the chat template")
    flag("--system", default="", help="system message before the prompt or chat")
    flag("--max_new_tokens", type=int, default=256, help="longest answer, in tokens (default: 256)")
    flag("--temperature", type=float, help="0: the likeliest token; this and the next two default to "
         "generation_config.json's, else to 0, 0 and 1")
    flag("--top_k", type=int, help="sample among the k likeliest tokens; 0: all")
    flag("--top_p", type=float, help="sample among the likeliest tokens of this total probability")
    flag("--seed", type=int, default=0, help="of the sampling (default: 0)")
    flag("--batch_size", type=int, default=16, help="prompts of a file answered together (default: 16)")
    flag("--debug", action="store_true", help="show the traceback behind a one-line error")
    args = parser.parse_args(arguments)
    if args.prompt is not None and args.prompts is not None:
        parser.error("--prompt and --prompts: give one of the two")
    if args.output and not args.prompts:
        parser.error("--output is for the answers to --prompts, which is missing")
    if args.max_new_tokens < 1 or args.batch_size < 1:
        parser.error("--max_new_tokens and --batch_size must be positive")
    if not (args.temperature or 0) >= 0:  # nor NaN
        parser.error("--temperature must not be negative")
    if (args.top_k or 0) < 0:
        parser.error("--top_k must not be negative")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")
    return args


def sampling_options(model, args):
    """As transformers reads generation_config.json; the command line wins."""
    options = dict(temperature=1.0, top_k=0, top_p=1.0)
    usual = model.generation_config if model.generation_config.get("do_sample") else {"temperature": 0.0}
    for source in (usual, vars(args)):
        for name in options:
            if source.get(name) is not None:
                options[name] = source[name]
    return options


def main(arguments):
    """Generate as the command line says. Raises UserError."""
    args = parse_args(arguments)
    prompts = read_prompts(args.prompts) if args.prompts else []  # before the model: a mistake shows at once
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformer.from_pretrained(args.model, revision=args.revision)
    tokenizer = Tokenizer.from_pretrained(args.model, revision=args.revision)
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    if args.raw:
        tokenizer.has_template = False  # a prompt as it stands
    if args.system and not tokenizer.has_template:
        raise UserError("--system needs a chat template")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    if device == "cpu" and sum(p.numel() for p in model.parameters()) < 2e7:
        torch.set_num_threads(1)  # waking a second thread for so little work takes longer than the work
    options = sampling_options(model, args)
    options["stop_ids"] = tokenizer.stop_ids()
    options["max_new_tokens"] = args.max_new_tokens
    options["generator"] = torch.Generator(device).manual_seed(args.seed)
    if prompts:
        answer_file(model, tokenizer, prompts, opening, args, options)
    elif args.prompt is not None:
        answer(model, tokenizer, prompt_ids(args.prompt, tokenizer, opening), options)
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
