"""Train a model with ORPO: a script, in the order in which things happen.

    python train.py                                                  # the built-in demo, on a CPU, in about a minute
    python train.py --model MODEL --data FILE                        # a Hugging Face directory or hub id, preference pairs
    torchrun --nproc_per_node=8 train.py --model mistralai/Mistral-7B-v0.1 --data argilla/ultrafeedback-binarized-preferences-cleaned
    python train.py --resume                                         # go on exactly where the newest checkpoint ended
    python train.py --help                                           # every flag, its default and unit

The trajectory does not depend on the hardware: a step is the next `batch_size` pairs of the epoch's order, however many packs,
micro-steps and ranks compute it, and its losses are sums divided once by the counts of the whole step.
"""
import argparse
import ctypes
import dataclasses
import difflib
import fnmatch
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin while they wait slow shared cores down several times
if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: freed memory stays at hand for the next tensors, instead of being fetched anew
    libc.mallopt(-3, 2**26)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import UserError
from model import Config, Transformer
from orpo import METRICS, orpo_loss
from sample import continuations, text_after

# ---------------------------------------------------------------------------------------------------------------------
# Flags. Names are TRL's and transformers' where they have one.


def flag(default, text, choices=None, changes_run=True):
    """A field of Flags. changes_run: a resumed run may not have another value."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices, "changes_run": changes_run})


@dataclass
class Flags:
    # model and data
    model: str = flag("", "directory or hub id; empty: the demo's tiny decoder from random weights")
    revision: str = flag("", "branch, tag or commit of a hub id, such as refs/pr/1")
    data: list = flag((), "preference pairs: .jsonl, .jsonl.gz, .json, .parquet, or a hub data set id[:split]; repeatable; empty: the demo's")
    eval_data: list = flag((), "pairs to evaluate on, in the same forms; repeatable")
    eval_pairs: int = flag(-1, "pairs held out of --data for evaluation; -1: a tenth, at most 200, or none with --eval_data")
    # the objective
    beta: float = flag(0.1, "weight of the odds ratio loss: lambda in the paper, alpha in the authors' code, beta in TRL; 0: plain SFT")
    prompt_loss: bool = flag(True, "L_SFT over prompt + chosen (authors' code, TRL); --no-prompt_loss: over the chosen response alone (paper)")
    output_router_logits: bool = flag(False, "mixtures of experts: add the load-balancing loss even if config.json does not ask for it")
    # the optimizer
    learning_rate: float = flag(-1.0, "peak learning rate of AdamW; -1: by size, 5e-6 x sqrt(7e9 / parameters), at most 1e-3 (2e-5 at 0.5B)")
    lr_scheduler_type: str = flag("linear", "what follows the warmup", ("linear", "cosine", "inverse_sqrt", "constant"))
    warmup_steps: int = flag(0, "steps from 0 to the peak; over --warmup_ratio if positive")
    warmup_ratio: float = flag(0.1, "the same as a fraction of all steps")
    weight_decay: float = flag(0.0, "decoupled; matrices only, not norms and biases")
    adam_beta1: float = flag(0.9, "decay of the first moment")
    adam_beta2: float = flag(0.999, "decay of the second moment")
    adam_epsilon: float = flag(1e-8, "added to the root of the second moment")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0: never")
    # how much
    num_train_epochs: float = flag(3.0, "passes over the pairs", changes_run=False)
    max_steps: int = flag(0, "optimizer steps; over --num_train_epochs if positive", changes_run=False)
    batch_size: int = flag(32, "pairs per optimizer step, over all devices")
    # lengths, in tokens
    max_length: int = flag(1024, "longest prompt + response")
    max_prompt_length: int = flag(512, "what a prompt is cut to when prompt + longer response exceed --max_length")
    truncation_mode: str = flag("keep_end", "which end of a cut prompt stays", ("keep_end", "keep_start"))
    # the machine
    max_tokens: int = flag(8192, "tokens per packed micro-batch per device: the memory knob, without effect on the result", changes_run=False)
    dtype: str = flag("", "of the computation; parameters stay float32; default: bfloat16 on GPUs that have it, else float32", ("bfloat16", "float32"))
    gradient_checkpointing: bool = flag(False, "recompute each block in the backward: a quarter more time, much less memory", changes_run=False)
    compile: bool = flag(False, "torch.compile the blocks: faster on GPUs after a minute's start", changes_run=False)
    seed: int = flag(0, "of the epochs' orders, the held-out pairs and the demo's weights")
    # output
    output_dir: str = flag("out", "metrics.jsonl, checkpoints and the final model go here", changes_run=False)
    overwrite_output_dir: bool = flag(False, "discard the run that --output_dir holds", changes_run=False)
    resume: bool = flag(False, "go on from the newest checkpoint in --output_dir; flags not given are the recorded ones", changes_run=False)
    logging_steps: int = flag(10, "steps per line of metrics.jsonl, which gives their mean", changes_run=False)
    eval_steps: int = flag(100, "steps between evaluations; there is always one before the first step and one at the end; 0: none", changes_run=False)
    save_steps: int = flag(500, "steps between checkpoints; there is always one at the end; 0: none at all", changes_run=False)
    save_total_limit: int = flag(2, "checkpoints kept, the newest ones; 0: all", changes_run=False)
    save_dtype: str = flag("", "of the final weights; default: as the model came", ("bfloat16", "float16", "float32"), changes_run=False)
    generate_during_eval: int = flag(0, "answers to this many evaluation prompts shown at each evaluation and kept in samples.jsonl", changes_run=False)
    report_to: str = flag("none", "also log to", ("none", "tensorboard", "wandb"), changes_run=False)
    push_to_hub: str = flag("", "repository to upload the final model to, with a model card", changes_run=False)
    dry_run: bool = flag(False, "read and tokenize, show what would be trained of the first pairs, and end", changes_run=False)
    debug: bool = flag(False, "show tracebacks", changes_run=False)


GROUPS = {"model": "model and data", "beta": "objective", "learning_rate": "optimizer", "num_train_epochs": "how much",
          "max_length": "lengths, in tokens", "max_tokens": "machine", "output_dir": "output"}  # a group begins at its first flag
# What the demo sets where nothing is said: a tiny model needs a larger learning rate, and its task shows more at a larger beta.
DEMO = dict(learning_rate=2e-3, adam_beta2=0.98, beta=0.5, batch_size=32, max_steps=750, max_length=64, max_prompt_length=32, eval_steps=250,
            logging_steps=50)
DEMO_SHAPE = dict(model_type="llama", hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                  max_position_embeddings=256, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
LINE = ("step {step}/{total} | epoch {epoch:.2f} | loss {loss:.4f} = nll {nll_loss:.4f} - {beta:g} x {log_odds_ratio:.4f}"
        " | accuracy {rewards/accuracies:.3f} | margin {rewards/margins:.4f} | grad {grad_norm:.2f} | lr {learning_rate:.2e}"
        " | {pairs_per_second:.1f} pairs/s | {tokens_per_second:.0f} tokens/s | {peak_memory_gb:.2f} GB")
SUMMARY = {"eval_logps/chosen": "log-prob chosen", "eval_logps/rejected": "log-prob rejected", "eval_rewards/accuracies": "reward accuracy",
           "eval_rewards/margins": "reward margin"}
BAD_STEPS = 5  # this many steps in a row without a finite gradient end the run
# dense bf16 peak by name, in operations per second (vendors' data sheets, without sparsity)
PEAK = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


def wrong_with(flags):
    """What cannot be right about the values of flags, in words; empty if nothing. Types: a recorded run's come from a file."""
    for field in dataclasses.fields(Flags):
        value, choices = getattr(flags, field.name), field.metadata["choices"]
        types = {float: (float, int), list: (list, tuple)}.get(field.type, (field.type,))
        if type(value) not in types or field.type is list and not all(type(item) is str for item in value):
            return f"--{field.name} {value!r}: must be {'a list of strings' if field.type is list else field.type.__name__}"
        if choices and value not in (*choices, field.default):
            return f"--{field.name} {value}: must be one of {', '.join(choices)}"
    at_least = dict(eval_pairs=-1, batch_size=1, max_length=2, max_prompt_length=1, max_tokens=1, logging_steps=1)
    others = ("beta", "warmup_steps", "weight_decay", "max_grad_norm", "max_steps", "eval_steps", "save_steps", "save_total_limit", "generate_during_eval", "seed")
    for name, least in (at_least | dict.fromkeys(others, 0)).items():
        if not (least <= getattr(flags, name) < 2**63):
            return f"--{name} {getattr(flags, name)}: must be at least {least}" + " and below 2^63" * (getattr(flags, name) >= 2**63)
    for name in ("learning_rate", "adam_epsilon", "num_train_epochs"):
        if not (0 < getattr(flags, name) < 1e9 or name == "learning_rate" and flags.learning_rate == -1):
            return f"--{name} {getattr(flags, name)}: must be above 0 and below 1e9"
    for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
        if not 0 <= getattr(flags, name) < 1:
            return f"--{name} {getattr(flags, name)}: must be at least 0 and below 1"
    if flags.max_prompt_length >= flags.max_length:
        return (f"--max_prompt_length {flags.max_prompt_length}: must be smaller than --max_length {flags.max_length}, "
                "or no room is left for a response")
    if flags.eval_pairs > 0 and flags.eval_data:
        return "--eval_pairs and --eval_data: give one of the two"
    return "" if flags.output_dir else "--output_dir is empty; name a directory"


def parse(arguments):
    """Command line -> (Flags, names of the flags that were given). Exits with status 2 and one line where a value cannot be right."""
    parser = argparse.ArgumentParser(prog="train.py", usage="python train.py [flags]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)

    def refuse(message):
        print(f"train.py: {message}", file=sys.stderr)
        sys.exit(2)

    group = parser
    parser.error = lambda message: refuse(f"{message}; see python train.py --help")
    for field in dataclasses.fields(Flags):
        text, choices = field.metadata["help"], field.metadata["choices"]
        group = parser.add_argument_group(GROUPS[field.name]) if field.name in GROUPS else group
        default = f"{field.default:g}" if field.type in (int, float) else field.default
        text += f" (default: {default})" if default and field.type not in (bool, list) else ""
        text += f"; in the demo {DEMO[field.name]:g}" if field.name in DEMO else ""
        if field.type is bool:
            negatable = argparse.BooleanOptionalAction if field.default else "store_true"
            group.add_argument(f"--{field.name}", action=negatable, help=text)
        elif field.type is list:
            group.add_argument(f"--{field.name}", action="extend", nargs="+", metavar="FILE", help=text)
        else:
            metavar = None if choices else field.type.__name__.upper()
            group.add_argument(f"--{field.name}", type=field.type, choices=choices, metavar=metavar, help=text)
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        close = difflib.get_close_matches(unknown[0].partition("=")[0], [f"--{f.name}" for f in dataclasses.fields(Flags)], 1)
        refuse(f"unknown flag {unknown[0]}" + (f"; did you mean {close[0]}?" if close else "; see python train.py --help"))
    given = vars(known)
    flags = Flags(**(DEMO if not given.get("model") and not given.get("data") else {}) | given)
    if wrong := wrong_with(flags):
        refuse(wrong)
    if flags.resume and flags.overwrite_output_dir:
        refuse("--resume and --overwrite_output_dir contradict each other")
    return flags, set(given)


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run: complete or absent, never half.

OWN_FILES = ["metrics.jsonl", "samples.jsonl", "train_config.json"]
CHECKPOINT = r"checkpoint-(0|[1-9][0-9]*)"


def run_files(output_dir):
    """What a run left in a directory and a new one would replace: records, checkpoints, the model with its tokenizer, unfinished ones."""
    patterns = OWN_FILES + data.MODEL_FILES + data.TOKENIZER_FILES
    names = sorted(os.listdir(output_dir), reverse=True) if os.path.isdir(output_dir) else []  # x.tmp before x
    return [os.path.join(output_dir, name) for name in names
            if re.fullmatch(rf"({CHECKPOINT}|final)(\.tmp)?", name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def write_directory(path, write):
    """Make a directory whole: write(temporary) fills it; with a manifest of sizes and checksums it is flushed to the disk, then renamed."""
    temporary = path + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        os.makedirs(temporary)
        write(temporary)
        files = {name: os.path.join(temporary, name) for name in sorted(os.listdir(temporary))}
        manifest = {name: {"size": os.path.getsize(file), "sha256": checksum(file)} for name, file in files.items()}
        write_json(os.path.join(temporary, "manifest.json"), manifest)
        for name in [*manifest, "manifest.json", ""]:
            flush(os.path.join(temporary, name))
        if os.path.exists(path):
            shutil.rmtree(path)
        os.rename(temporary, path)
        flush(os.path.dirname(path))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{path}: could not be written ({error}); make room or choose another --output_dir, "
                        "then --resume from the checkpoint before it") from error


def discard(path):
    """Remove a file or a directory; the directory is renamed first, so that no half of it ever has its name."""
    if not os.path.isdir(path):
        os.remove(path)
        return
    temporary = path.removesuffix(".tmp") + ".tmp"
    if path != temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        os.rename(path, temporary)
    shutil.rmtree(temporary)


def flush(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checksum(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


def checkpoints(output_dir):
    """{step: directory} of the checkpoints there, oldest first."""
    names = [os.path.basename(path) for path in run_files(output_dir)]
    steps = sorted(int(name[11:]) for name in names if re.fullmatch(CHECKPOINT, name))
    return {step: os.path.join(output_dir, f"checkpoint-{step}") for step in steps}


def damage(directory):
    """What is wrong with a checkpoint, in words; empty if every file is as its manifest says."""
    try:
        manifest = data.read_json(os.path.join(directory, "manifest.json"))
        for name, entry in manifest.items():
            path = os.path.join(directory, name)
            if os.path.basename(name) != name or not os.path.isfile(path):
                return f"{name} is missing"
            if os.path.getsize(path) != entry["size"] or checksum(path) != entry["sha256"]:
                return f"{name} is not what was written"
        return "" if {"state.json", "optimizer.safetensors", "config.json"} <= manifest.keys() else "its manifest is incomplete"
    except (UserError, OSError, TypeError, KeyError) as error:
        return f"its manifest cannot be used ({error})"


def newest_checkpoint(output_dir):
    """The newest checkpoint that is whole; damaged ones are reported and passed over. Raises UserError where there is none."""
    for directory in reversed(checkpoints(output_dir).values()):
        wrong = damage(directory)
        if not wrong:
            return directory
        print(f"{directory} is damaged ({wrong}): going back to the one before it", file=sys.stderr)
    raise UserError(f"{output_dir}: no checkpoint to resume from; start afresh without --resume"
                    + " (with --overwrite_output_dir)" * os.path.exists(output_dir))


def cut_back(path, step):
    """Drop the lines of a .jsonl file that are later than `step`, and a last line that was cut off."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, "rb") as file:  # bytes: the cut may have gone through a character
        for line in file:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break
    with open(path + ".part", "wb") as file:
        file.writelines(kept)
    os.replace(path + ".part", path)


# ---------------------------------------------------------------------------------------------------------------------
# Small parts of the loop.


def learning_rate(flags, step, total):
    """For step 0 .. total - 1. Warmup reaches the peak in its last step; the shapes after it are transformers'."""
    warmup = flags.warmup_steps or math.ceil(flags.warmup_ratio * total)
    if step < warmup:
        return flags.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return flags.learning_rate * {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "inverse_sqrt": math.sqrt((warmup or 10_000) / ((warmup or 10_000) + step - warmup)),
        "constant": 1.0,
    }[flags.lr_scheduler_type]


def step_indices(count, batch_size, seed, step):
    """Indices of the pairs of an optimizer step (the last of an epoch may be short), and the epochs done after it."""
    per_epoch = math.ceil(count / batch_size)
    epoch, place = divmod(step, per_epoch)
    chosen = data.epoch_order(count, seed, epoch)[place * batch_size : (place + 1) * batch_size]
    return chosen, epoch + min(count, (place + 1) * batch_size) / count


def sft_tokens(spans, prompt_loss):
    """Targets that L_SFT averages over, of pairs with the given spans: prompt and chosen, or chosen alone."""
    return int(spans[:, 1].sum() + (spans[:, 0].sum() if prompt_loss else 0))


def share_pairs(pairs, rank):
    """The pairs that rank 0 read, on every rank: tokenizing is done once."""
    sizes = torch.tensor([0] * 3 if pairs is None else [len(pairs.tokens), len(pairs.ends), len(pairs.rows)])
    dist.broadcast(sizes, 0)
    arrays = []
    for name, size, dtype in zip(("tokens", "ends", "rows"), sizes.tolist(), (torch.int32, torch.int64, torch.int64)):
        array = torch.from_numpy(np.array(getattr(pairs, name))) if rank == 0 else torch.empty(size, dtype=dtype)
        dist.broadcast(array, 0)
        arrays.append(array.numpy())
    return data.Pairs(*arrays)


class Stop:
    """SIGTERM and SIGINT ask for the end: the step in hand is finished first. A second SIGINT ends at once."""

    signal = 0

    def __init__(self):
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def agreed(self, ranks):
        """The signal that any rank has received, the same on all."""
        if ranks == 1:
            return self.signal
        number = torch.tensor(self.signal)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


def reporter(flags):
    """log(metrics, step) for --report_to."""
    if flags.report_to == "none":
        return lambda metrics, step: None
    if flags.report_to == "wandb":
        import wandb

        try:
            wandb.init(project="orpo", config=asdict(flags))
        except Exception as error:  # no login, no network: its own kinds of errors
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--report_to wandb: it cannot start ({type(error).__name__}: {reason})") from error
        return lambda metrics, step: wandb.log(metrics, step=step)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(flags.output_dir)
    return lambda metrics, step: [writer.add_scalar(key, value, step) for key, value in metrics.items() if key != "step"]


def model_card(flags, final):
    """README.md for the hub: method, beta, data, final metrics."""
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in final.items())
    base = f"base_model: {flags.model}\n" if flags.model and not os.path.exists(flags.model) else ""
    origin = os.path.basename(flags.model) or "random weights"
    sources = ", ".join(f"`{os.path.basename(source) if os.path.exists(source) else source}`" for source in flags.data) or "generated pairs"
    return (f"---\n{base}tags: [orpo]\n---\n# {flags.push_to_hub.split('/')[-1]}\n\nTrained from `{origin}` with ORPO "
            "(Odds Ratio Preference Optimization, [arXiv 2403.07691](https://arxiv.org/abs/2403.07691)), "
            f"beta {flags.beta:g}, learning rate {flags.learning_rate:g}, {flags.batch_size} pairs a step, on {sources}.\n\n"
            f"| metric | value |\n| --- | --- |\n{rows}\n")


# ---------------------------------------------------------------------------------------------------------------------
# The stages of a run before and after its loop.


def take_up(flags, given, rank, ranks):
    """Check --output_dir, and with --resume take over the flags that its newest checkpoint records. Returns that checkpoint, or None."""
    out, checkpoint = flags.output_dir, None
    if flags.resume:
        step = torch.tensor(int(newest_checkpoint(out).rpartition("-")[2]) if rank == 0 else 0)
        if ranks > 1:
            dist.broadcast(step, 0)
        checkpoint = checkpoints(out).get(int(step))
        if not checkpoint:
            raise UserError(f"{out}: rank {rank} does not see checkpoint-{int(step)} there; all machines must share --output_dir")
        recorded = data.read_json(os.path.join(checkpoint, "train_config.json"))
        for field in dataclasses.fields(Flags):
            name, now = field.name, getattr(flags, field.name)
            if name not in recorded or name in ("resume", "debug", "output_dir", "overwrite_output_dir"):
                continue
            if name not in given:
                setattr(flags, name, recorded[name])
            elif field.metadata["changes_run"] and now != recorded[name]:
                raise UserError(f"--{name} {now} would change the run, which has {recorded[name]}; "
                                "leave it out, or start afresh in another --output_dir")
        if wrong := wrong_with(flags):
            raise UserError(f"{checkpoint}: its train_config.json cannot be used ({wrong})")
    elif os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out}: --output_dir is a file; choose another")
    elif run_files(out) and not (flags.overwrite_output_dir or flags.dry_run):
        raise UserError(f"{out}: holds a run or a model already; go on with it (--resume), discard it (--overwrite_output_dir), "
                        "or choose another --output_dir")
    elif flags.overwrite_output_dir and flags.model and (os.path.realpath(flags.model) + os.sep).startswith(os.path.realpath(out) + os.sep):
        raise UserError(f"{out}: --overwrite_output_dir would discard --model {flags.model}; choose another --output_dir")
    if "num_train_epochs" in given and "max_steps" not in given:
        flags.max_steps = 0  # neither the demo's nor the recorded one is to outweigh what was asked for
    if flags.report_to != "none" and not importlib.util.find_spec(flags.report_to):
        raise UserError(f"--report_to {flags.report_to}: pip install {flags.report_to}")
    if not flags.dry_run:
        probe = os.path.join(out, f".writable-{rank}")
        try:
            os.makedirs(out, exist_ok=True)
            open(probe, "w").close()
            os.remove(probe)
        except OSError as error:
            raise UserError(f"{out}: --output_dir cannot be written to ({error.strerror})") from error
    return checkpoint


def load_pairs(flags, tokenizer, say):
    """Read and tokenize --data and --eval_data, or hold pairs out. Returns the pairs to train on and those to evaluate on, or None."""
    options = dict(max_length=flags.max_length, max_prompt_length=flags.max_prompt_length, truncation_mode=flags.truncation_mode,
                   progress=sys.stderr.isatty())
    if not flags.model and not flags.data:
        say("No --model and no --data: the demo, a tiny decoder learns which of two numbers is larger.")
    rows = data.read_pairs(flags.data, progress=options["progress"]) if flags.data else data.demo_pairs(3200, flags.seed)
    if not tokenizer.has_template and isinstance(rows[0]["chosen"], list):
        say("The model has no chat template: conversations are written as <|user|> and <|assistant|> turns closed by EOS, "
            "and the template is saved with the model.")
        tokenizer.has_template = True
    pairs, held_out = data.tokenize_pairs(rows, tokenizer, **options), None
    say(f"{', '.join(flags.data) or 'demo pairs'}: {pairs.report}")
    if flags.eval_data:
        held_out = data.tokenize_pairs(data.read_pairs(flags.eval_data), tokenizer, **options)
        say(f"{', '.join(flags.eval_data)}: {held_out.report}")
    elif flags.eval_pairs:
        count = flags.eval_pairs if flags.eval_pairs > 0 else min(200, len(pairs) // 10)
        if count >= len(pairs):
            raise UserError(f"--eval_pairs {count}: only {len(pairs)} pairs are there, and some must be left to train on")
        order = np.random.default_rng([flags.seed, 2**32]).permutation(len(pairs))  # not the order of any epoch
        if count:
            pairs, held_out = pairs.select(np.sort(order[count:])), pairs.select(np.sort(order[:count]))
            say(f"{count} pairs are held out for evaluation.")
    return pairs, held_out


def restore(checkpoint, fingerprint, window, named, optimizer):
    """Load the optimizer's state from a checkpoint, and return its state.json, with `window` as a tensor like the given one."""
    try:
        state = data.read_json(os.path.join(checkpoint, "state.json"))
        if state["data"] != fingerprint:
            raise UserError(f"{checkpoint}: the pairs are not those that this run was started with; restore the data files, "
                            "or start afresh in another --output_dir")
        if not (type(state["in_a_row"]) is int and isinstance(getattr(torch, state["save_dtype"]), torch.dtype)):
            raise ValueError(f"in_a_row {state['in_a_row']!r}, save_dtype {state['save_dtype']!r}")
        state["window"] = torch.tensor(state["window"], dtype=window.dtype, device=window.device).view_as(window)
        moments = load_file(os.path.join(checkpoint, "optimizer.safetensors"))
        for name, parameter in named.items():
            shapes = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": ()}
            optimizer.state[parameter] = {key: moments[f"{key}.{name}"].to(parameter.device).view(shape) for key, shape in shapes.items()}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: cannot be resumed from ({type(error).__name__}: {error}); "
                        "remove it to go back to the one before it") from error
    return state


def write_model(flags, model, tokenizer, save_dtype, results):
    """Write the final model to --output_dir, whole files only, with `results` in the card for the hub. Returns their names."""
    def write(directory):
        model.save_pretrained(directory, save_dtype)
        tokenizer.save_pretrained(directory)
        if flags.push_to_hub:
            with open(os.path.join(directory, "README.md"), "w", encoding="utf-8") as file:
                file.write(model_card(flags, results))

    out, final = flags.output_dir, os.path.join(flags.output_dir, "final")
    write_directory(final, write)
    os.remove(os.path.join(final, "manifest.json"))
    names = sorted(os.listdir(final))
    for name in names:
        os.replace(os.path.join(final, name), os.path.join(out, name))
    os.rmdir(final)
    for path in run_files(out):  # an older model's other files, such as shards beside a single file, would be read with the new ones
        if os.path.isfile(path) and os.path.basename(path) not in names + OWN_FILES:
            os.remove(path)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# The run.


def main(flags, given):
    # -- ranks and devices --------------------------------------------------------------------------------------------
    rank, ranks, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(f"rank {rank} has no GPU: this machine has {torch.cuda.device_count()}, "
                            f"so use torchrun --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    first = rank == 0
    say = lambda text: tqdm.write(text) if first else None
    out, checkpoint = flags.output_dir, take_up(flags, given, rank, ranks)
    if not flags.dtype:
        flags.dtype = "bfloat16" if cuda and torch.cuda.is_bf16_supported() else "float32"

    # -- pairs: read and tokenized by one rank, the others get the arrays ---------------------------------------------
    demo = not flags.model
    tokenizer = data.demo_tokenizer() if demo else data.Tokenizer.from_pretrained(flags.model, revision=flags.revision or None)
    pairs, held_out = load_pairs(flags, tokenizer, say) if first else (None, None)
    if flags.dry_run:
        if first:
            say(data.describe(pairs, tokenizer, flags.prompt_loss))
        return 0
    if ranks > 1:
        pairs = share_pairs(pairs, rank)
        evaluated = torch.tensor(int(held_out is not None))
        dist.broadcast(evaluated, 0)
        held_out = share_pairs(held_out, rank) if evaluated else None
    everything = [pairs] + [held_out] * (held_out is not None)

    # -- model --------------------------------------------------------------------------------------------------------
    if checkpoint or flags.model:
        model = Transformer.from_pretrained(checkpoint or flags.model, revision=None if checkpoint else flags.revision or None)
    else:
        shape = DEMO_SHAPE | {"vocab_size": tokenizer.backend.get_vocab_size(), "eos_token_id": tokenizer.eos_id}
        model = Transformer(Config.from_hf(shape), shape).initialise(flags.seed)
    config = model.config
    longest = max(int((p.spans()[:, :1] + p.spans()[:, 1:]).max()) + 1 for p in everything)
    too_large = max(int(p.tokens.max()) for p in everything)
    if too_large >= config.vocab_size:
        raise UserError(f"token id {too_large} is beyond the model's vocabulary of {config.vocab_size}: "
                        "tokenizer and model do not belong together")
    if model.max_positions and longest > model.max_positions:
        raise UserError(f"a sequence of {longest} tokens does not fit the model's {model.max_positions} positions; "
                        f"use --max_length {model.max_positions} (and a smaller --max_prompt_length)")
    aux = bool(config.moe_layers) and (flags.output_router_logits or config.output_router_logits) and config.router_aux_loss_coef > 0
    packing = dict(max_tokens=flags.max_tokens, prompt_loss=flags.prompt_loss, feed_last=aux)
    longest_tree = max(int(p.spans().sum(1).max()) for p in everything) + 2 * aux
    if flags.max_tokens < longest_tree:
        raise UserError(f"--max_tokens {flags.max_tokens}: the longest pair needs {longest_tree}; "
                        "use at least that, or cut pairs with --max_length")
    model.gradient_checkpointing = flags.gradient_checkpointing
    model.to(device).train()

    # -- optimizer, and the state of a resumed run --------------------------------------------------------------------
    named = dict(model.named_parameters())
    parameters = sum(p.numel() for p in named.values())
    if flags.learning_rate == -1:
        flags.learning_rate = min(1e-3, 5e-6 * math.sqrt(7e9 / parameters))
    groups = [{"params": [p for p in named.values() if p.ndim > 1], "weight_decay": flags.weight_decay},
              {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0}]
    betas = flags.adam_beta1, flags.adam_beta2
    optimizer = torch.optim.AdamW(groups, lr=flags.learning_rate, betas=betas, eps=flags.adam_epsilon, fused=True)
    per_epoch = math.ceil(len(pairs) / flags.batch_size)
    total = flags.max_steps or math.ceil(flags.num_train_epochs * per_epoch)
    NAMES = METRICS + ("aux_loss",) * aux + ("grad_norm",)
    window = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=device)  # sums over the steps since the last line, and how many
    fingerprint = [zlib.crc32(p.tokens.tobytes(), zlib.crc32(p.ends.tobytes())) for p in everything]
    start, in_a_row, file_dtype = 0, 0, str(model.file_dtype)[6:]  # steps done; steps in a row without a finite gradient
    if checkpoint:
        state = restore(checkpoint, fingerprint, window, named, optimizer)
        start, in_a_row, file_dtype = int(checkpoint.rpartition("-")[2]), state["in_a_row"], state["save_dtype"]
        if first:
            window += state["window"]
    save_dtype = flags.save_dtype or file_dtype
    if flags.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)  # one graph for all blocks and all lengths of a pack
    network = DistributedDataParallel(model, device_ids=[local] if cuda else None, gradient_as_bucket_view=True) if ranks > 1 else model
    # no cache: a forward uses each weight once, and cached casts of all of them would outlive the blocks they serve
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=flags.dtype == "bfloat16", cache_enabled=False)

    # -- what is written ----------------------------------------------------------------------------------------------
    metrics_file = os.path.join(out, "metrics.jsonl")
    if first:
        log = reporter(flags)
        unfinished = [path for path in run_files(out) if path.endswith(".tmp")]
        damaged = [directory for step, directory in checkpoints(out).items() if step > start]  # or newest_checkpoint would have taken them
        for path in unfinished + damaged if checkpoint else run_files(out):
            discard(path)
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_back(os.path.join(out, name), start)
        write_json(os.path.join(out, "train_config.json"), asdict(flags))

    def record(metrics, file=metrics_file):
        try:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(metrics, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}); make room, then go on with --resume") from error

    def save_checkpoint(step):
        sums = window.clone()
        if ranks > 1:
            dist.all_reduce(sums)

        def write(directory):
            model.save_pretrained(directory, torch.float32)
            tokenizer.save_pretrained(directory)
            moments = {f"{key}.{name}": value for name, p in named.items() for key, value in optimizer.state[p].items()}
            save_file(moments, os.path.join(directory, "optimizer.safetensors"))
            write_json(os.path.join(directory, "train_config.json"), asdict(flags))
            state = {"in_a_row": in_a_row, "window": sums.tolist(), "data": fingerprint, "save_dtype": save_dtype}
            write_json(os.path.join(directory, "state.json"), state)

        if first:
            write_directory(os.path.join(out, f"checkpoint-{step}"), write)
            for directory in list(checkpoints(out).values())[: -flags.save_total_limit or None] if flags.save_total_limit else []:
                discard(directory)
        if ranks > 1:  # all wait until it is written, as torchrun ends the others when one has ended; by gloo, which waits longer than nccl
            dist.all_reduce(torch.zeros(1))

    # -- the loss of a pack, and of a step ----------------------------------------------------------------------------
    # how often each position counts in the router's statistics: prompts twice, as in two plain sequences
    weights_of = lambda batch: torch.where(batch.owner % 3 == 0, 2.0, 1.0)

    def balance_loss(batches):
        """Mixtures of experts: f -> E sum_e f_e P_e needs the step's fractions f of tokens sent to each expert before any gradient:
        a forward pass of its own. Returns what to multiply the sums of probabilities with."""
        sent = torch.zeros(config.num_experts, device=device)
        with torch.no_grad(), autocast():
            for batch in batches:
                sent += model(batch, weights_of(batch))[1][0]
        if ranks > 1:
            dist.all_reduce(sent)
        rows = sent.sum() / config.num_experts_per_tok
        return config.num_experts * sent / rows**2

    def contribution(batch, module, tokens, count, balance):
        """Loss and metrics that one pack adds to its step."""
        with autocast():
            logps, router = module(batch, weights_of(batch)) if aux else (module(batch), None)
        loss, sums = orpo_loss(logps, batch, flags.beta, tokens, count)
        if aux:
            balancing = balance @ router[1]
            loss = loss + config.router_aux_loss_coef * balancing
            sums = torch.cat([loss.detach()[None], sums[1:], balancing.detach()[None]])
        return loss, sums

    @torch.no_grad()
    def evaluate(step, epoch):
        sums = torch.zeros(len(NAMES) - 1, dtype=torch.float64, device=device)
        batches = data.make_packs(held_out, np.arange(len(held_out)), rank=rank, ranks=ranks, **packing)
        balance = balance_loss([batch.to(device) for batch in batches]) if aux else None
        tokens = sft_tokens(held_out.spans(), flags.prompt_loss)
        for batch in batches:
            sums += contribution(batch.to(device), model, tokens, len(held_out), balance)[1]
        if ranks > 1:
            dist.all_reduce(sums)
        result = {f"eval_{name}": value for name, value in zip(NAMES, sums.tolist())}
        if first:
            record({"step": step, "epoch": round(epoch, 6)} | result)
            log(result, step)
            say("evaluation at step {}: loss {eval_loss:.4f} | log-prob chosen {eval_logps/chosen:.3f}, rejected {eval_logps/rejected:.3f}"
                " | accuracy {eval_rewards/accuracies:.3f} | margin {eval_rewards/margins:.4f}".format(step, **result))
            prompts = [held_out[i][0].tolist() for i in range(min(flags.generate_during_eval, len(held_out)))]
            with autocast():
                answers = continuations(model, prompts, 128, tokenizer.stop_ids()) if prompts else []
            for prompt, answer in zip(prompts, answers):
                text = text_after(prompt, answer, tokenizer)
                record({"step": step, "prompt": tokenizer.decode(prompt), "answer": text}, os.path.join(out, "samples.jsonl"))
                say(f"  {tokenizer.decode(prompt[-40:])!r} -> {text!r}")
        return result

    # -- before the loop ----------------------------------------------------------------------------------------------
    gpu = torch.cuda.get_device_name(device) if cuda else ""
    say(f"{parameters:,} parameters ({config.model_type}); {len(pairs)} pairs, {per_epoch} steps an epoch, {total} steps; "
        f"{flags.dtype} on {ranks} {gpu or 'CPU'}{' processes' * (ranks > 1)}; beta {flags.beta:g}, learning rate {flags.learning_rate:.2g}"
        + (f"; resumed after step {start}" if checkpoint else ""))
    if cuda and flags.dtype == "bfloat16" and (config.head_dim % 8 or config.head_dim > 256):
        say(f"flash attention has no kernel for heads of size {config.head_dim}: the slower scaled_dot_product_attention is used")
    peak = next((flops for name, flops in PEAK.items() if flags.dtype == "bfloat16" and name in gpu), None)
    stop = Stop()
    before = after = None  # the evaluations before the first step and after the last
    if held_out is not None and flags.eval_steps and not checkpoint:
        before = after = evaluate(0, 0.0)
    if ranks > 1:  # after its first backward DDP orders its buckets anew, and so its sums: one for nothing, or no resume were exact
        batch = data.pack([pairs[0]], prompt_loss=flags.prompt_loss, feed_last=aux).to(device)
        contribution(batch, network, 1, 1, torch.zeros(config.num_experts, device=device))[0].backward()
        optimizer.zero_grad(set_to_none=True)
    indices_of = lambda step: step_indices(len(pairs), flags.batch_size, flags.seed, step)
    prepare = lambda step: data.make_packs(pairs, indices_of(step)[0], rank=rank, ranks=ranks, **packing)
    worker = ThreadPoolExecutor(1)  # packs the next step's pairs while this one is computed
    upcoming = worker.submit(prepare, start)
    bar = tqdm(total=total, initial=start, desc="training", unit=" steps", disable=None if first else True, dynamic_ncols=True)
    finite, seen, paused, clock = [], [], 0.0, time.perf_counter()  # all since the last line; seen: the spans of its pairs
    last = {}

    def look_at_gradients(step):
        """Report the steps since the last look whose gradient was not finite. Here, and in a logged line, the host waits for the device."""
        nonlocal in_a_row
        for number, good in enumerate(torch.stack(finite).tolist(), step + 1 - len(finite)):
            in_a_row = 0 if good else in_a_row + 1
            if not good:
                rows = pairs.rows[indices_of(number - 1)[0]].tolist()
                say(f"step {number}: the loss or its gradient is not finite; the weights stay as they were. Rows: {rows}")
            if in_a_row >= BAD_STEPS:
                kept = list(checkpoints(out).values())[-1:]
                raise UserError(f"step {number}: {in_a_row} steps in a row without a finite gradient; try a lower --learning_rate. "
                                + (f"Intact: {kept[0]}" if kept else "There is no checkpoint yet"))
        finite.clear()

    def line(step, epoch):
        """The metrics of the steps since the last line, as means; empty if none of them had a finite gradient."""
        sums = window.clone()
        if ranks > 1:
            dist.all_reduce(sums)  # the one reduction of a logged line
        *values, steps = sums.tolist()
        seconds = time.perf_counter() - clock - paused
        spans = np.concatenate(seen)
        unit = 1 if sys.platform == "darwin" else 1024
        memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if not steps:
            return {}
        metrics = {"step": step, "epoch": round(epoch, 6)} | {name: value / steps for name, value in zip(NAMES, values)}
        metrics |= {"learning_rate": learning_rate(flags, step - 1, total), "pairs_per_second": len(spans) / seconds,
                    "tokens_per_second": int(spans.sum()) / seconds, "peak_memory_gb": memory / 2**30}
        return metrics | ({"mfu": model.training_flops(torch.from_numpy(spans)) / seconds / (peak * ranks)} if peak else {})

    # -- the loop -----------------------------------------------------------------------------------------------------
    for step in range(start + 1, total + 1):
        indices, epoch = indices_of(step - 1)
        spans = pairs.spans()[indices]
        tokens = sft_tokens(spans, flags.prompt_loss)
        batches, upcoming = upcoming.result(), worker.submit(prepare, step)
        share = 1.0 if batches else 0.0  # fewer pairs than ranks: this one computes the first pair for nothing, to stay in step
        batches = [batch.to(device) for batch in batches or [data.pack([pairs[indices[0]]], prompt_loss=flags.prompt_loss, feed_last=aux)]]
        balance = balance_loss(batches if share else []) if aux else None
        sums = torch.zeros(len(NAMES) - 1, dtype=torch.float64, device=device)
        for number, batch in enumerate(batches, 1):
            # gradients meet in the last micro-step only, overlapping with its backward
            with network.no_sync() if ranks > 1 and number < len(batches) else nullcontext():
                loss, metrics = contribution(batch, network, tokens, len(indices), balance)
                # DDP divides by the ranks what here is a sum. A loss that is not finite makes every rank's gradient so.
                loss.backward(torch.where(loss.isfinite(), share * ranks, torch.nan).to(loss.dtype))
            sums += share * metrics
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in named.values()])
        if flags.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(named.values(), flags.max_grad_norm, grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(flags, step - 1, total)
        finite.append(grad_norm.isfinite())
        optimizer.found_inf = (~finite[-1]).float()  # on the device: the fused AdamW leaves everything as it is where this is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window += torch.where(finite[-1], torch.cat([sums, (grad_norm / ranks)[None], grad_norm.new_ones(1) / ranks]), 0.0)
        seen.append(spans)

        signalled = stop.agreed(ranks)
        logging = step % flags.logging_steps == 0 or step == total
        saving = flags.save_steps and (step % flags.save_steps == 0 or step == total) or signalled
        if logging or saving:
            look_at_gradients(step)
        if logging:
            metrics = line(step, epoch)
            last = metrics or last
            if first and metrics:
                record(metrics)
                log(metrics, step)
                bar.set_postfix_str("loss {loss:.3f}, accuracy {rewards/accuracies:.2f}".format(**metrics), refresh=False)
                say(LINE.format(total=total, beta=flags.beta, **metrics) + (f" | mfu {metrics['mfu']:.2f}" if peak else ""))
            window.zero_()
            seen, paused, clock = [], 0.0, time.perf_counter()
        pause = time.perf_counter()
        if held_out is not None and flags.eval_steps and (step % flags.eval_steps == 0 or step == total):
            after = evaluate(step, epoch)
        if saving:
            save_checkpoint(step)
        paused += time.perf_counter() - pause
        bar.update()
        if signalled and step < total:
            bar.close()
            say(f"{signal.Signals(signalled).name}: stopped after step {step}, which is saved; go on with --resume --output_dir {out}")
            return 128 + signalled
    bar.close()
    worker.shutdown()

    # -- the final model ----------------------------------------------------------------------------------------------
    if first:
        results = {key: value for key, value in (last | (after or {})).items() if key not in ("step", "epoch")}
        names = write_model(flags, model, tokenizer, getattr(torch, save_dtype), results)
        columns = {name: values for name, values in (("before", before), ("after", after)) if values}  # a resumed run did not see the start
        if columns:
            say(f"\n{'on held-out pairs':24}" + "".join(f"{name:>11}" for name in columns))
        for key, name in SUMMARY.items() if columns else ():
            say(f"{name:24}" + "".join(f"{values[key]:11.3f}" for values in columns.values()))
        playing = demo and not flags.data
        if playing and held_out:
            prompts, chosen, _ = zip(*([part.tolist() for part in held_out[i]] for i in range(len(held_out))))
            answers = continuations(model, prompts, 32, tokenizer.stop_ids())
            right = sum(new == response[:-1] for new, response in zip(answers, chosen))
            say(f"{'exact greedy answers':24}" + " " * 11 * bool(before) + f"{right / len(prompts):11.3f}")
        say(f"\nThe model is in {out}. Next: python sample.py --model {out}" + ' --prompt "Which is larger, 12 or 90?"' * playing)
        if flags.push_to_hub:
            from huggingface_hub import HfApi

            try:
                HfApi().create_repo(flags.push_to_hub, exist_ok=True)
                HfApi().upload_folder(folder_path=out, repo_id=flags.push_to_hub, allow_patterns=names)
            except Exception as error:  # the hub client raises many kinds; the model is safe on the disk
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"--push_to_hub {flags.push_to_hub}: not uploaded ({type(error).__name__}: {reason}); "
                                f"the model is in {out}") from error
            say(f"Uploaded to {flags.push_to_hub}.")
    return 0


def one_line(error, flags):
    """What to tell of an error that is not this program's fault; empty for any other, which deserves its traceback."""
    if isinstance(error, torch.OutOfMemoryError):
        return (f"the GPU's memory is full; lower --max_tokens (now {flags.max_tokens}) or add --gradient_checkpointing; "
                "neither changes the result")
    if isinstance(error, OSError):
        return f"{error}" + ("" if error.filename else f", while writing to {flags.output_dir}")
    if isinstance(error, UserError):
        return str(error).replace("\n", " ")
    if isinstance(error, RuntimeError) and dist.is_initialized() and ("gloo" in str(error) or isinstance(error, dist.DistBackendError)):
        return f"rank {dist.get_rank()} ends because another rank has ended; see what that one says"
    return ""


if __name__ == "__main__":
    flags, given = parse(sys.argv[1:])
    try:
        status = main(flags, given)
    except KeyboardInterrupt:  # before the loop, where there is nothing to save
        os._exit(130)
    except Exception as error:
        if flags.debug or not one_line(error, flags):
            raise
        tqdm.write(f"train.py: {one_line(error, flags)}", file=sys.stderr)  # below the progress bar
        sys.stdout.flush()
        os._exit(1)  # at once: the other ranks may be gone or waiting
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
