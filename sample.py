"""Generation: one prompt, a chat, or a file of prompts.

    python sample.py --model out                                     # chat: history is kept, answers stream; /new starts afresh
    python sample.py --model out --prompt "Which is larger, 12 or 90?"
    python sample.py --model out --prompts questions.txt --output answers.jsonl

A model with a chat template is asked through it (--raw: not); one without goes on from the text as it stands.
"""
import argparse
import json
import os
import sys
import time

import torch
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

from data import Tokenizer, UserError
from model import Cache, Transformer


def pick(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """Next tokens (B,) from logits (B, vocab). temperature 0 (below 1e-6): the likeliest. top_k > 0: among the k likeliest;
    top_p < 1: among the fewest likeliest tokens that together have at least that probability."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # what stands before it suffices already; the first always stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop_ids=(), **choice):
    """Continue a batch of prompts (lists of ids, any lengths) together. Yields, a step at a time, the list of each row's next id;
    None once a row has ended, at one of stop_ids or at the model's last position. `choice`: the arguments of `pick`."""
    device = model.lm_head.weight.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.lm_head.weight.dtype
    if any(not prompt for prompt in prompts):
        raise UserError("a prompt without a single token cannot be continued")
    too_large = max(map(max, prompts))
    if too_large >= model.config.vocab_size:
        raise UserError(f"token id {too_large} is beyond the model's vocabulary of {model.config.vocab_size}: "
                        "tokenizer and model do not belong together")
    longest = max(map(len, prompts))
    room = (model.max_positions or longest + max_new_tokens) - longest
    if room < 1:
        raise UserError(f"a prompt of {longest} tokens leaves no room in the model's {model.max_positions} positions; shorten it")
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)  # (B, T), padded on the right
    cache = Cache(model.config, len(prompts), longest + max_new_tokens, device, dtype)
    running = [True] * len(prompts)
    logits = model.next_logits(tokens, torch.arange(longest, device=device).expand_as(tokens), cache, longest, lengths - 1)
    for step in range(1, min(max_new_tokens, room) + 1):
        tokens = pick(logits, **choice)
        new = tokens.tolist()
        running = [on and token not in stop_ids for on, token in zip(running, new)]
        if not any(running):
            return
        yield [token if on else None for on, token in zip(running, new)]
        if step < min(max_new_tokens, room):
            logits = model.next_logits(tokens[:, None], lengths[:, None], cache, longest + step)
            lengths = lengths + 1


def continuations(model, prompts, max_new_tokens, stop_ids=(), **choice):
    """What `generate` yields, gathered: a list of ids for each prompt."""
    answers = [[] for _ in prompts]
    for row in generate(model, prompts, max_new_tokens, stop_ids, **choice):
        for answer, token in zip(answers, row):
            if token is not None:
                answer.append(token)
    return answers


def prompt_ids(prompt, tokenizer, raw=False, system=None):
    """Ids of a prompt: a list of messages through the chat template, a string as a user's message if the model has a template."""
    if isinstance(prompt, str) and tokenizer.has_template and not raw:
        prompt = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
    ids = tokenizer.encode(prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, add_generation_prompt=True))
    return [tokenizer.bos_id] * (tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]) + ids


def text_after(ids, new, tokenizer):
    """The text that the ids `new` add to a prompt's ids: decoded alone, they could lose the space before their first word."""
    return tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]


def answer(model, tokenizer, ids, args, choice):
    """Generate from one prompt, printing as it goes; returns the text. Tokens a second go to standard error."""
    stream, new, start = DecodeStream(ids=ids, skip_special_tokens=False), [], time.perf_counter()
    for (token,) in generate(model, [ids], args.max_new_tokens, tokenizer.stop_ids(), **choice):
        new.append(token)
        print(stream.step(tokenizer.backend, token) or "", end="", flush=True)  # None: half of a character, the rest is to come
    seconds = time.perf_counter() - start
    print(flush=True)
    print(f"[{len(new)} tokens, {len(new) / seconds:.0f} tokens/s]", file=sys.stderr)
    return text_after(ids, new, tokenizer)


def read_prompts(path):
    """Prompts of a file: one a line, or .jsonl lines with a string or a list of messages under `prompt`."""
    prompts = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line) if path.endswith(".jsonl") else {"prompt": line.rstrip("\r\n")}
                    prompt = row.get("prompt") if isinstance(row, dict) else None
                    is_message = lambda m: isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m
                    if not prompt or not (isinstance(prompt, str) or isinstance(prompt, list) and all(map(is_message, prompt))):
                        raise UserError(f"{path}, line {number}: an object with a `prompt`, "
                                        "a string or a list of role/content messages, is expected")
                    prompts.append(prompt)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    return prompts


def parse(arguments):
    p = argparse.ArgumentParser("sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model", default="out", help="directory or hub id (default: out)")
    p.add_argument("--revision", help="branch, tag or commit of a hub id")
    p.add_argument("--prompt", help="one prompt: print its answer and end")
    p.add_argument("--prompts", help="file of prompts, one a line, or .jsonl with `prompt`")
    p.add_argument("--output", help="where the answers to --prompts go, as .jsonl (default: standard output)")
    p.add_argument("--raw", action="store_true", help="do not use the chat template")
    p.add_argument("--system", help="system message before the prompt or chat")
    p.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, in tokens (default: 256)")
    p.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    p.add_argument("--top_k", type=int, default=0, help="sample among the k likeliest tokens; 0: all (default)")
    p.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of this total probability (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    p.add_argument("--batch_size", type=int, default=16, help="prompts of a file answered together (default: 16)")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    p.error = lambda message: (print(f"sample.py: {message}; see python sample.py --help", file=sys.stderr), sys.exit(2))
    args = p.parse_args(arguments)
    for name, least in dict(max_new_tokens=1, temperature=0, top_k=0, seed=0, batch_size=1).items():
        below = float("inf") if name == "temperature" else 2**63
        if not least <= getattr(args, name) < below:
            p.error(f"--{name} {getattr(args, name)}: must be at least {least}" + " and smaller" * (getattr(args, name) >= below))
    if not 0 < args.top_p <= 1:
        p.error(f"--top_p {args.top_p}: must be above 0 and at most 1")
    if args.prompt == "":
        p.error("--prompt is empty")
    if args.prompt is not None and args.prompts is not None:
        p.error("--prompt and --prompts: give one of the two")
    if args.output is not None and args.prompts is None:
        p.error("--output is for the answers to --prompts, which is missing")
    return args


def main(args):
    prompts = None if args.prompts is None else read_prompts(args.prompts)  # before the model: a mistake shows at once
    if args.output is not None and (os.path.isdir(args.output) or not os.path.isdir(os.path.dirname(args.output) or ".")):
        raise UserError(f"{args.output}: --output must be a file in a directory that exists")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_pretrained(args.model, revision=args.revision)
    model = Transformer.from_pretrained(args.model, revision=args.revision).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    if device == "cpu" and sum(p.numel() for p in model.parameters()) < 2e7:
        torch.set_num_threads(1)  # waking a second thread for so little work takes longer than the work
    templated = tokenizer.has_template and not args.raw
    if args.system and not templated:
        raise UserError("--system needs a chat template, and " + ("--raw does without" if args.raw else f"{args.model} has none"))
    generator = torch.Generator(device).manual_seed(args.seed)
    choice = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, generator=generator)

    if prompts is not None:
        ids = []
        for number, prompt in enumerate(prompts, 1):
            try:
                ids.append(prompt_ids(prompt, tokenizer, args.raw, args.system))
            except UserError as error:
                raise UserError(f"{args.prompts}, prompt {number}: {error}") from error
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # similar lengths together
        answers, start = {}, time.perf_counter()
        for first in tqdm(range(0, len(order), args.batch_size), desc="answering", unit=" batches", disable=None):
            batch = order[first : first + args.batch_size]
            answers |= zip(batch, continuations(model, [ids[i] for i in batch], args.max_new_tokens, tokenizer.stop_ids(), **choice))
        seconds, count = time.perf_counter() - start, sum(map(len, answers.values()))
        texts = [text_after(ids[i], answers[i], tokenizer) for i in range(len(prompts))]
        lines = [json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) + "\n" for prompt, text in zip(prompts, texts)]
        if args.output:
            with open(args.output + ".part", "w", encoding="utf-8") as file:
                file.writelines(lines)
            os.replace(args.output + ".part", args.output)
        else:
            sys.stdout.writelines(lines)
        print(f"[{len(prompts)} answers, {count} tokens, {count / seconds:.0f} tokens/s]", file=sys.stderr)
    elif args.prompt is not None:
        answer(model, tokenizer, prompt_ids(args.prompt, tokenizer, args.raw, args.system), args, choice)
    else:
        opening = [{"role": "system", "content": args.system}] if args.system else []
        history = list(opening)
        print("Type a message; /new forgets what was said, Ctrl-D ends."
              + " This model has no chat template: it goes on from each text as it stands." * (not templated), file=sys.stderr)
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                print()
                return
            if text == "/new":
                history = list(opening)
            elif text:
                asked = history + [{"role": "user", "content": text}]
                try:
                    said = answer(model, tokenizer, prompt_ids(asked if templated else text, tokenizer, args.raw), args, choice)
                    history = asked + [{"role": "assistant", "content": said}]
                except UserError as error:  # one message that cannot be answered does not end the chat
                    print(f"{error} (/new starts afresh)", file=sys.stderr)


if __name__ == "__main__":
    args = parse(sys.argv[1:])
    try:
        main(args)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if args.debug:
            raise
        if isinstance(error, torch.OutOfMemoryError):
            error = "the GPU's memory is full; lower --max_new_tokens" + " or --batch_size" * bool(args.prompts)
        sys.exit("sample.py: " + str(error).replace("\n", " "))
    except KeyboardInterrupt:
        sys.exit(130)
