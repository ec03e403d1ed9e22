"""Generation: one prompt, a chat, or a file of prompts.

    python sample.py --model out                                     # chat: answers stream, history is kept
    python sample.py --model out --prompt "Name a number above 57."
    python sample.py --model out --prompts questions.txt --output answers.jsonl

A model with a chat template is asked through it (--raw: not); one without goes on from the text as it stands.
Where no --temperature, --top_k or --top_p is given, generation_config.json's count; its repetition_penalty
does not.
"""
import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import FlagError, Tokenizer, UserError, kind_of, parse_flags, refuse, run_program, where
from model import Cache, Transformer


@dataclass
class Flags:
    model: str = "out"  # directory or hub id
    revision: str = ""  # branch, tag or commit of a hub id
    prompt: str = None  # one prompt: print its answer and end
    prompts: str = None  # file of prompts, one a line, or .jsonl with `prompt`
    output: str = None  # where the answers to --prompts go, as .jsonl (default: standard output)
    raw: bool = False  # do not use the chat template
    system: str = ""  # system message before the prompt or chat
    max_new_tokens: int = 256  # longest answer, in tokens
    temperature: float = None  # 0: the likeliest token (default: generation_config.json's, else 0)
    top_k: int = None  # sample among the k likeliest tokens; 0: all (default: likewise, else 0)
    top_p: float = None  # sample among the likeliest of this total probability (default: likewise, else 1)
    seed: int = 0  # of the sampling
    batch_size: int = 16  # prompts of a file answered together
    debug: bool = False  # show tracebacks


CHAT_HELP = "/new forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer."
RANGES = dict(max_new_tokens=(1, 2**31), temperature=(0, 1e6), top_p=(1e-9, 1), batch_size=(1, 2**20))


def pick(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """Next tokens (B,) from logits (B, vocab). temperature 0 (below 1e-6): the likeliest. top_k > 0: among
    the k likeliest; top_p < 1: among the fewest likeliest tokens that together have at least that
    probability."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    refuse((not logits.isfinite().all(), "the model's logits are not finite; its weights are broken"))
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # what stands before it suffices; the first stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop_ids=(), **choice):
    """Continue a batch of prompts (lists of ids, any lengths) together. Yields, a step at a time, the list
    of each row's next id; None once a row has ended, at one of stop_ids or at the model's last position.
    `choice`: see `pick`."""
    check_prompts(model, prompts)
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it would plan anew for every length of the keys
    end, cache, device = model.max_positions or 2**40, Cache(), model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    inputs = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)  # (B, T)
    longest, last, rooms = inputs.shape[1], lengths - 1, (end - lengths).tolist()
    positions = torch.arange(longest, device=device).expand_as(inputs)
    for step in range(max_new_tokens):
        tokens = pick(model.next_logits(inputs, positions, cache, longest + step, last), **choice)
        picked = tokens.tolist()  # here the host waits for the device
        rooms = [0 if token in stop_ids else room for token, room in zip(picked, rooms)]
        if step >= max(rooms):
            return
        yield [token if step < room else None for token, room in zip(picked, rooms)]
        inputs, last = tokens[:, None], None
        positions = (lengths + step)[:, None].clamp(max=end - 1)  # a row that has ended stays at its last


def check_prompts(model, prompts):
    """Raise UserError for what cannot be continued."""
    refuse((not all(prompts), "a prompt without a single token cannot be continued"))
    largest, longest = max(map(max, prompts)), max(map(len, prompts))
    size, end = model.config.vocab_size, model.max_positions
    refuse((largest >= size, f"token id {largest} is beyond the model's {size}: this is not its tokenizer"),
           (end and longest >= end, f"a prompt of {longest} tokens leaves no room in the model's {end}"))


def continuations(model, prompts, max_new_tokens, stop_ids=(), **choice):
    """What `generate` yields, gathered: a list of ids for each prompt."""
    steps = [[None] * len(prompts), *generate(model, prompts, max_new_tokens, stop_ids, **choice)]
    return [[token for token in row if token is not None] for row in zip(*steps)]


def prompt_ids(prompt, tokenizer, history=()):
    """Ids of a prompt: a list of messages through the chat template, a string as the user's turn after those
    of `history` if there is one."""
    if isinstance(prompt, str) and tokenizer.has_template:
        prompt = [*history, {"role": "user", "content": prompt}]
    text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, True)
    ids = tokenizer.encode(text)
    return [tokenizer.bos_id] * (tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]) + ids


def answer(model, tokenizer, ids, options):
    """Generate from one prompt, printing as it goes; Ctrl-C ends it. Returns the text. Tokens a second go to
    stderr."""
    tokens, shown, text, start = list(ids), len(ids), "", time.perf_counter()
    try:
        for (token,) in generate(model, [ids], **options):
            tokens.append(token)
            text = tokenizer.decode(tokens[shown:], after=tokens[max(0, shown - 8) : shown])
            if not text.endswith("\ufffd"):  # else inside of a character: the next token may complete it
                print(text, end="", flush=True)
                shown, text = len(tokens), ""
    except KeyboardInterrupt:
        text += " [stopped]"
    print(text, flush=True)
    new, seconds = tokens[len(ids) :], time.perf_counter() - start
    print(f"[{len(new)} tokens, {len(new) / seconds:.0f} tokens/s]", file=sys.stderr)
    return tokenizer.decode(new, after=ids)


def read_prompts(path):
    """[(line number, name, prompt)] of a file: one a line, or .jsonl lines with text or messages under the
    name `prompt` or, as AlpacaEval has it, `instruction`."""
    prompts = []
    with where(path), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with where(f"line {number}"):
                    row = json.loads(line) if path.endswith(".jsonl") else {"prompt": line.rstrip("\n")}
                    name = "instruction" if "instruction" in row else "prompt"
                    prompts.append((number, name, row[name]))
                    refuse((kind_of(row[name]) not in ("strings", "messages"), "neither text nor messages"))
        refuse((not prompts, "no prompts in it"))
    return prompts


def answer_file(model, tokenizer, prompts, opening, flags, options):
    """Answer a file of prompts in its order, writing as they come."""
    ids = []
    for number, _, prompt in prompts:
        with where(flags.prompts, f"line {number}"):
            ids.append(prompt_ids(prompt, tokenizer, opening))
            check_prompts(model, ids[-1:])
    with where(f"--output {flags.output}"):
        # by lines: what is answered stays, whatever happens to the rest
        file = open(flags.output, "w", 1, "utf-8", "replace") if flags.output else sys.stdout
    for first in tqdm(range(0, len(ids), flags.batch_size), desc="answering", unit=" batches", disable=None):
        batch = ids[first : first + flags.batch_size]
        answers = continuations(model, batch, **options)
        for (_, name, prompt), asked, new in zip(prompts[first:], batch, answers):
            text = tokenizer.decode(new, after=asked)
            said = {"output": text, "generator": flags.model} if name == "instruction" else {"answer": text}
            file.write(json.dumps({name: prompt} | said, ensure_ascii=False) + "\n")


def chat(model, tokenizer, opening, options):
    """Answer line after line, with what was said before where the model has a chat template."""
    with suppress(ImportError):  # line editing, a history of what was typed, pasted lines as one message
        import readline
    history = list(opening)
    print(CHAT_HELP, file=sys.stderr)
    with suppress(EOFError):  # Ctrl-D
        while (text := input("> ").strip()) != "/exit":
            if text == "/help":
                print(CHAT_HELP, file=sys.stderr)
            elif text == "/new":
                history = list(opening)
            elif text:
                try:
                    said = answer(model, tokenizer, prompt_ids(text, tokenizer, history), options)
                    history += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
                except UserError as error:  # one message that cannot be answered does not end the chat
                    print(f"{error} (/new starts afresh)", file=sys.stderr)


def main(arguments):
    """Generate as the command line says -> exit status. Raises UserError."""
    flags, _ = parse_flags(Flags, arguments, __doc__, RANGES)
    refuse((None not in (flags.prompt, flags.prompts), "--prompt and --prompts: give one of the two"),
           (flags.output and not flags.prompts, "--output is for the answers to --prompts, which is missing"),
           kind=FlagError)
    prompts = flags.prompts and read_prompts(flags.prompts)  # before the model: a mistake shows at once
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_pretrained(flags.model, revision=flags.revision)
    model = Transformer.from_pretrained(flags.model, revision=flags.revision)
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    tokenizer.has_template = tokenizer.has_template and not flags.raw  # without: a prompt as it stands
    refuse((flags.system and not tokenizer.has_template, "--system needs a chat template"))
    opening = [{"role": "system", "content": flags.system}] * bool(flags.system)
    if device == "cpu" and sum(p.numel() for p in model.parameters()) < 2e7:
        torch.set_num_threads(1)  # waking a second thread for so little work takes longer than the work
    usual = model.generation_config if model.generation_config.get("do_sample") else {"temperature": 0.0}
    options = dict(temperature=1.0, top_k=0, top_p=1.0)
    for source in (usual, asdict(flags)):  # as transformers reads it; the command line wins
        options |= {name: source[name] for name in options if source.get(name) is not None}
    options |= dict(stop_ids=tokenizer.stop_ids(), max_new_tokens=flags.max_new_tokens,
                    generator=torch.Generator(device).manual_seed(flags.seed))
    if prompts:
        answer_file(model, tokenizer, prompts, opening, flags, options)
    elif flags.prompt is not None:
        answer(model, tokenizer, prompt_ids(flags.prompt, tokenizer, opening), options)
    else:
        chat(model, tokenizer, opening, options)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("sample.py", main, "lower --max_new_tokens or --batch_size"))
