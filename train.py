"""Train a model with ORPO.

    python train.py                                  # the built-in demo, on a CPU, in a minute
    python train.py --model MODEL --data FILE        # a Hugging Face directory or hub id, preference pairs
    torchrun --nproc_per_node=8 train.py --model MODEL --data FILE
    python train.py --resume                         # continue exactly where the newest checkpoint ended
    python train.py --model MODEL --eval_data FILE --max_steps 0      # evaluate without training
    python train.py --help                           # every flag, its default and unit

In reading order: the flags, the training loop, then the functions it calls, in the order of the calls.

The trajectory does not depend on the hardware: a step is the next `batch_size` pairs of the epoch's order,
however many packs, micro-steps and ranks compute it, and its losses are sums divided once by the counts of
the whole step.
"""
import fcntl
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
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

# Before importing torch: threads that spin while waiting slow down shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import CHOSEN, PREFIX, UserError, read_json, where, write_json
from model import Config, Transformer, assign, find_tensors, read_tensor, whole, write_tensors
from orpo import orpo_loss
from sample import check_limits, check_numbers, continuations, make_parser, stop_ids

# -----------------------------------------------------------------------------------------------------------
# Flags. Names are TRL's and transformers' where they have one.


@dataclass
class Flags:
    # the model and the data
    model: str = ""  # directory or hub id; without --model and --data: the demo
    revision: str = ""  # branch, tag or commit of a hub id, such as refs/pr/1
    data: list = ()  # preference pairs: .jsonl, .jsonl.gz, .json, .parquet files, or hub ids, id[:split]
    eval_data: list = ()  # pairs to evaluate on, in the same forms
    eval_pairs: int = None  # held out of --data (default: a tenth, at most 200; none with --eval_data)
    prompt_column: str = ""  # column of the prompt, in place of all usual ones; none: the answers share it
    as_conversation: bool = False  # rows of text become a user's turn and an answer
    chat_template: str = ""  # file with a jinja template, in place of the model's own
    max_length: int = 1024  # tokens of the longest prompt + response
    max_prompt_length: int = None  # its tokens kept if prompt + response exceed --max_length (default: half)
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"  # which end of a cut prompt is kept

    # the method
    beta: float = 0.1  # weight of L_OR: lambda in the paper, alpha in the authors' code; 0: plain SFT
    prompt_loss: bool = True  # L_SFT over prompt + chosen (authors' code, TRL); --no-: over chosen (paper)
    lora_r: int = 0  # rank of LoRA adapters, trained in place of the frozen model; 0: train the model
    lora_alpha: float = 16.0  # the adapters' updates are scaled by lora_alpha / lora_r

    # the optimizer and its schedule
    batch_size: int = 32  # pairs per optimizer step, over all devices
    learning_rate: float = None  # AdamW's peak (default: 5e-6 sqrt(7e9 / size) <= 1e-3, LoRA 2e-4)
    lr_scheduler_type: Literal["linear", "cosine", "inverse_sqrt", "constant"] = "linear"  # after the warmup
    warmup_steps: int = 0  # steps up to the peak; if positive, it overrides --warmup_ratio
    warmup_ratio: float = 0.1  # the same as a fraction of all steps
    weight_decay: float = 0.0  # decoupled; of matrices, not of norms and biases
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the root of the second moment
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    num_train_epochs: float = 3.0  # passes over the pairs
    max_steps: int = None  # optimizer steps; overrides --num_train_epochs; 0: only evaluate the model
    seed: int = 0  # of the epochs' orders, the demo's weights and the adapters

    # speed and memory: no effect on the result, up to rounding
    dtype: Literal["bfloat16", "float32"] = None  # of products (default: bfloat16 on a GPU that has it)
    max_tokens: int = None  # tokens per pack and device: the memory knob (default: 8192, on a CPU 1024)
    gradient_checkpointing: bool = False  # recompute blocks in the backward: a quarter more time, less memory
    compile: bool = False  # torch.compile the blocks: faster on GPUs after a minute's start
    shard: bool = False  # spread weights, gradients and moments over the ranks (FSDP2) instead of DDP

    # the run
    output_dir: str = "out"  # metrics.jsonl, checkpoints and the final model go here
    overwrite_output_dir: bool = False  # remove the run that --output_dir holds
    resume: bool = False  # continue from the newest checkpoint with its flags; without one, start the run
    config: str = ""  # JSON file of flags, such as a run's train_config.json; the command line wins
    logging_steps: int = 10  # steps per line of metrics.jsonl, which gives their mean
    eval_steps: int = None  # steps between evaluations; also before and after; 0: none (default: total / 10)
    generate_during_eval: int = 2  # answers shown at each evaluation and in samples.jsonl; none with --shard
    save_steps: int = 500  # steps between checkpoints; also at the end; 0: only when stopped
    save_total_limit: int = 2  # newest checkpoints kept; 0: all
    save_dtype: Literal["bfloat16", "float16", "float32"] = None  # of the final model (default: as loaded)
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # another log
    run_name: str = ""  # for --report_to (default: the name of --output_dir)
    push_to_hub: str = ""  # repository of the hub to upload the final model to
    dry_run: bool = False  # read and tokenize, show what would be trained of the first pairs, and end
    debug: bool = False  # show the traceback behind a one-line error


# About this start of the program, not about the run: not recorded in train_config.json
NOT_RECORDED = ("output_dir", "overwrite_output_dir", "resume", "config", "dry_run", "debug")
POSITIVE = ("lora_alpha", "batch_size", "max_length", "max_prompt_length", "max_tokens", "logging_steps",
            "learning_rate", "adam_epsilon", "num_train_epochs")
BELOW_ONE = ("adam_beta1", "adam_beta2", "warmup_ratio")
# The demo's own defaults: a tiny model needs a larger rate, and shows more at a larger beta.
DEMO = dict(learning_rate=2e-3, adam_beta2=0.98, beta=0.5, max_steps=500, max_length=64, logging_steps=50)
DEMO_SHAPE = dict(model_type="llama", hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                  num_attention_heads=4, max_position_embeddings=256,
                  tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
MODEL_FILES = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
               "model-?????-of-?????.safetensors"]
# Peak dense bf16 operations per second, from the vendors' data sheets (H100: the SXM card)
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}

# Which process this is among those that torchrun started
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


# -----------------------------------------------------------------------------------------------------------
# The training loop.


def main(arguments):
    """Train as the command line says -> exit status. Raises UserError."""
    flags, checkpoint = parse_flags(arguments)
    device = init_device(flags)
    with lock_output_dir(flags):
        check_output_dir(flags, checkpoint)
        with reporter(flags) as report:
            return train(flags, checkpoint, device, report)


def train(flags, checkpoint, device, report):
    """The set-up and the loop -> exit status.  report(metrics, step) passes metrics on to --report_to."""
    started = time.perf_counter()

    # Model and pairs. What is wrong with them shows here, before any weights are read.
    tokenizer, model = outline_model(flags, checkpoint)
    tokenizer, pairs, eval_sets = load_pairs(flags, tokenizer)
    all_sets = [pairs, *eval_sets.values()]
    check_fit(flags, model, all_sets, device)
    total = flags.max_steps
    if total is None:
        total = math.ceil(flags.num_train_epochs * math.ceil(len(pairs) / flags.batch_size))
    if flags.dry_run:
        print0(data.describe(pairs, tokenizer, flags.prompt_loss))
        print0(f"{total} steps of {flags.batch_size} pairs")
        return 0

    # The weights, the optimizer, and where a resumed run stands.
    network = load_weights(model, flags, device)  # what the loop calls: the model, or DDP around it
    ddp = network is not model
    size = sum(p.numel() for p in model.parameters())
    settle_defaults(flags, model, size, total)
    optimizer = make_optimizer(flags, model)
    fingerprint = [zlib.crc32(part.tokens.tobytes() + part.ends.tobytes()) for part in all_sets]
    start = 0  # steps that are done
    recent = []  # the metrics of each step since the last training line of metrics.jsonl
    if checkpoint:
        start, recent = load_checkpoint(checkpoint, model, optimizer, fingerprint)
        if start > total:
            raise UserError(f"{checkpoint} is beyond the {total} steps asked for; raise --max_steps or "
                            "--num_train_epochs")
    begin_files(flags, checkpoint, start)
    print0(f"{size:,} parameters, {len(pairs)} pairs, {total} steps, {flags.dtype} on {WORLD_SIZE} "
           f"{device.type}, beta {flags.beta:g}, rate {flags.learning_rate:.2g}")
    stop_signals = catch_signals()
    epoch = 0.0
    bad_in_a_row = 0  # steps without a finite loss and gradient, at the end of those logged so far
    seen = []  # indices of the pairs trained since the last training line, step by step
    clock = time.perf_counter()  # start of the steps since that line; a pause moves it on

    # A step's number is how many are done. disable=None: the bar is for terminals
    for step in tqdm(range(start, total + 1), "training", total, initial=start, unit=" steps",
                     disable=RANK > 0 or None):
        # Before each step and after the last one: an evaluation and a checkpoint, where they are due.
        pause = time.perf_counter()
        stop = received_signal(stop_signals)  # a signal's number, on any rank, or 0
        just_resumed = checkpoint and step == start  # its evaluation is in metrics.jsonl already
        if due(step, flags.eval_steps, total) and not just_resumed:
            for name, eval_pairs in eval_sets.items():
                line = {"step": step, "epoch": round(epoch, 6)}
                if len(eval_sets) > 1:
                    line["eval_data"] = name
                line |= evaluate(flags, model, eval_pairs, device)
                log_evaluation(flags, report, line)
                show_answers(flags, model, tokenizer, eval_pairs, step)
        if step > start and (stop or due(step, flags.save_steps, total)):
            save_checkpoint(flags, model, tokenizer, optimizer, fingerprint, step, recent)
        if stop or step == total:
            break
        clock += time.perf_counter() - pause

        # Forward and backward, over this rank's packs of the step's pairs.
        indices, epoch = data.step_indices(len(pairs), flags.batch_size, flags.seed, step)
        batches, divisors = make_batches(flags, pairs, indices, device)
        metrics = {}
        for batch in batches:
            if ddp:  # it averages the gradients once a step, in the backward pass of the last pack
                network.require_backward_grad_sync = batch is batches[-1]
            loss, pack_metrics = pack_loss(flags, network, batch, divisors)
            (loss * WORLD_SIZE).backward()  # DDP and FSDP average over the ranks; these losses add up
            metrics = add(metrics, pack_metrics)
        metrics = sum_over_ranks(metrics)

        # Clip the gradient and update the weights, unless the loss or the gradient is not finite.
        norm = torch.nn.utils.clip_grad_norm_(trained(model).values(), flags.max_grad_norm or math.inf)
        metrics["grad_norm"] = whole(norm)  # with --shard it is spread over the ranks
        rate = learning_rate(flags, step, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        update(optimizer, metrics["loss"].isfinite() & metrics["grad_norm"].isfinite())
        optimizer.zero_grad(set_to_none=not ddp)  # DDP's gradients are views of its buckets, and stay
        recent.append(metrics)
        seen.append(indices)

        # A line of metrics.jsonl: means over the finite steps since the last one. Only here, and for an
        # evaluation or a checkpoint, does the CPU wait for the GPU.
        if due(step + 1, flags.logging_steps, total):
            finite, bad_in_a_row = finite_steps(recent, bad_in_a_row, total)
            if finite:
                line = {"step": step + 1, "epoch": round(epoch, 6), **means(finite), "learning_rate": rate}
                spans = pairs.spans()[np.concatenate(seen)]
                line |= speed(flags, model, spans, time.perf_counter() - clock)
                log_training(flags, report, line, total)
            skipped = len(recent) - len(finite)
            if skipped:
                print0(f"{skipped} steps skipped: loss or gradient not finite")
            recent, seen = [], []
            clock = time.perf_counter()

    if stop and step < total:
        print0(f"{signal.Signals(stop).name}: stopped after step {step}; "
               f"continue with --resume --output_dir {flags.output_dir}")
        return 128 + stop
    if total:  # else nothing was trained
        save_model(flags, model, tokenizer)
        push_to_hub(flags)
        summarise(flags, model, tokenizer, eval_sets, time.perf_counter() - started)
    return 0


def due(step, every, total):
    """At every so many steps and at the last one; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step == total)


# -----------------------------------------------------------------------------------------------------------
# Before the run: flags, ranks, the output directory.


def parse_flags(arguments):
    """Command line -> Flags, and the checkpoint to continue from, or None. A flag has the value of the last
    of these that gives one: the demo's defaults, the checkpoint's record, --config, the command line."""
    parser = make_parser(Flags, "train.py", __doc__)
    given = vars(parser.parse_args(arguments))
    if "config" in given:
        given = from_file(parser, given["config"]) | given
    recorded = {}
    checkpoint = None
    if given.get("resume"):
        checkpoint = newest_checkpoint(given.get("output_dir", Flags.output_dir))
    if checkpoint:
        recorded = from_file(parser, checkpoint / "train_config.json")
        del recorded["chat_template"]  # it is in the checkpoint
        given = recorded | given
    demo = not (given.get("model") or given.get("data") or given.get("eval_data"))
    flags = Flags(**(DEMO | given if demo else given))
    if demo and flags.resume and not checkpoint:
        parser.error(f"--resume: no checkpoint in {flags.output_dir}, and no --model to start")
    check_flags(flags, demo, parser.error)
    if checkpoint:
        if flags.lora_r != recorded["lora_r"]:
            parser.error(f"--lora_r {flags.lora_r}: the run was started with {recorded['lora_r']}")
        changed = [f"--{name} {given[name]} (was {was})"
                   for name, was in recorded.items() if given[name] != was]
        print0(f"continuing from {checkpoint}; changed: {', '.join(changed) or 'nothing'}")
    elif flags.resume:
        print0(f"no checkpoint in {flags.output_dir}: starting the run")
    return flags, checkpoint


def from_file(parser, path):
    """The flags of a JSON file, read as the words of a command line, so that they are checked like typed
    ones."""
    words = []
    for name, value in read_json(path).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}={item}" for item in value]
        elif value is not None:
            words.append(f"--{name}={value}")
    return vars(parser.parse_args(words))


def check_flags(flags, demo, error):
    """Call error(line) for a value that cannot be right."""
    check_numbers(flags, POSITIVE, error)
    for name in BELOW_ONE:
        if getattr(flags, name) >= 1:
            error(f"--{name} must be below 1")
    only_evaluate = flags.max_steps == 0 and flags.eval_data
    if not demo and not (flags.model and (flags.data or only_evaluate)):
        error(f"--{'data' if flags.model else 'model'} is missing: give both, or neither for the demo")
    if flags.max_prompt_length and flags.max_prompt_length >= flags.max_length:
        error(f"--max_prompt_length {flags.max_prompt_length} must be below --max_length {flags.max_length}")
    if flags.resume and flags.overwrite_output_dir:
        error("--resume and --overwrite_output_dir contradict each other")
    if flags.eval_pairs and flags.eval_data:
        error("--eval_pairs and --eval_data: give one of the two")
    if not flags.output_dir:
        error("--output_dir is empty; name a directory")


def checkpoints(output_dir):
    """The directories of the checkpoints there, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*")
             if re.fullmatch(r"checkpoint-[1-9][0-9]*", path.name)]
    return sorted(found, key=lambda path: int(path.name[11:]))


def newest_checkpoint(output_dir):
    """The checkpoint of the most steps, or None; its files have to be as long as their headers say."""
    found = checkpoints(output_dir)
    if not found:
        return None
    newest = found[-1]
    with where(f"{newest} is damaged or another program's; remove it, or choose another --output_dir"):
        read_json(newest / "state.json")
        find_tensors(newest, "optimizer")
        if not read_json(newest / "train_config.json").get("lora_r"):
            find_tensors(newest, "model")
    return newest


def init_device(flags):
    """Join torchrun's process group -> this rank's device. Settles --dtype."""
    cuda = torch.cuda.is_available()
    if cuda:
        if LOCAL_RANK >= torch.cuda.device_count():
            raise UserError(f"more ranks than GPUs; torchrun --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD_SIZE > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        with where("torchrun's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"):
            # the first rank may tokenize for long
            dist.init_process_group(backend, timeout=timedelta(hours=2))
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if flags.dtype is None:
        flags.dtype = "bfloat16" if has_bf16 else "float32"
    if cuda and flags.dtype == "bfloat16" and not has_bf16:
        raise UserError("this GPU has no bfloat16; use --dtype float32")
    return torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")


def print0(text):
    """Print on the first rank, above a progress bar."""
    if RANK == 0:
        tqdm.write(text)


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """The sum (or another operation) over the ranks, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def lock_output_dir(flags):
    """Hold --output_dir against other runs until the returned file is closed."""
    if RANK != 0 or flags.dry_run:
        return nullcontext()
    with where(f"--output_dir {flags.output_dir} cannot be written to"):
        os.makedirs(flags.output_dir, exist_ok=True)
        lock = open(Path(flags.output_dir, ".lock"), "w")
    with where(f"--output_dir {flags.output_dir}: another run is writing there; wait, or choose another"):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def check_output_dir(flags, checkpoint):
    """Refuse to mix with a run or a model that is there."""
    if RANK != 0 or flags.dry_run or checkpoint:
        return
    out = Path(flags.output_dir)
    has_run = (out / "train_config.json").exists()
    if not has_run and run_files(out):
        raise UserError(f"{run_files(out)[0]} was written by no run; choose another --output_dir")
    if flags.overwrite_output_dir and Path(flags.model).resolve().is_relative_to(out.resolve()):
        raise UserError(f"--overwrite_output_dir would remove {out}, which holds --model {flags.model}")
    # --resume also starts a run again that was killed before its first checkpoint
    starts_anew = flags.overwrite_output_dir or (flags.resume and not (out / "config.json").exists())
    if has_run and not starts_anew:
        raise UserError(f"{out} holds a run; --resume continues it where it has a checkpoint, "
                        "--overwrite_output_dir removes it")


@contextmanager
def reporter(flags):
    """Yields report(metrics, step), which passes metrics on to --report_to."""
    name = flags.run_name or Path(flags.output_dir).resolve().name
    if flags.report_to == "none" or flags.dry_run or RANK != 0:
        yield lambda metrics, step: None
    elif flags.report_to == "wandb":
        with where("--report_to wandb (pip install wandb)"):
            import wandb
        with wandb.init(name=name, config=asdict(flags)) as run:
            yield lambda metrics, step: run.log(metrics, step=step)
    else:
        with where("--report_to tensorboard (pip install tensorboard)"):
            from torch.utils.tensorboard import SummaryWriter
        with SummaryWriter(os.path.join(flags.output_dir, "runs", name)) as writer:
            def report(metrics, step):
                for key, value in metrics.items():
                    writer.add_scalar(key, value, step)
            yield report


# -----------------------------------------------------------------------------------------------------------
# Set-up: model, pairs, optimizer.


def outline_model(flags, checkpoint):
    """Tokenizer, and model without its weights, which load_weights reads once all is known to fit; the demo's
    has them at once."""
    source = checkpoint or flags.model
    base = flags.model if flags.lora_r else source  # a checkpoint of adapters has no model
    if not base:
        tokenizer = data.demo_tokenizer()
        shape = dict(DEMO_SHAPE, vocab_size=tokenizer.backend.get_vocab_size(), eos_token_id=tokenizer.eos_id)
        return tokenizer, Transformer(Config.from_hf(shape), shape).initialise(flags.seed)
    model = Transformer.outline(base, revision=flags.revision)
    tokenizer = data.Tokenizer.from_pretrained(source, revision=flags.revision)
    if checkpoint:  # templates that read the clock have to see the time at which the run began
        tokenizer.clock = datetime.fromisoformat(read_json(checkpoint / "state.json")["clock"])
    return tokenizer, model


def load_pairs(flags, tokenizer):
    """The tokenizer with the chat template that the rows settled, the pairs to train on, and {name: pairs} to
    evaluate on; read on the first rank, for all."""
    shared = [(tokenizer, *train_and_eval_pairs(flags, tokenizer)) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(shared, device=torch.device("cpu"))
    return shared[0]


def train_and_eval_pairs(flags, tokenizer):
    """The pairs of load_pairs. Where nothing is trained, each file of --eval_data is evaluated for itself."""
    if flags.max_steps == 0 and flags.eval_data:
        # a copy: what the rows of a file say of the template is for that file
        eval_sets = {name: tokenize(flags, copy(tokenizer), [name]) for name in flags.eval_data}
        return eval_sets[flags.eval_data[0]], eval_sets  # the first in place of pairs to train on
    pairs = tokenize(flags, tokenizer, flags.data)
    if flags.eval_data:
        return pairs, {"--eval_data": tokenize(flags, tokenizer, flags.eval_data)}
    count = min(200, len(pairs) // 10) if flags.eval_pairs is None else flags.eval_pairs
    if count == 0:
        return pairs, {}
    if count >= len(pairs):
        raise UserError(f"--eval_pairs {count}: of {len(pairs)} pairs some must be trained on")
    order = np.random.default_rng(0).permutation(len(pairs))  # the same for all seeds, to compare them
    return pairs.select(np.sort(order[count:])), {"held out": pairs.select(np.sort(order[:count]))}


def tokenize(flags, tokenizer, sources):
    """The Pairs of some files or hub data sets, or the demo's if there are none."""
    if sources:
        files = data.find_files(sources)
        rows = data.read_pairs(files, prompt_column=flags.prompt_column,
                               as_conversation=flags.as_conversation)
        name = ", ".join(os.path.join(*Path(file).parts[-2:]) for file in files)
    else:
        rows = data.demo_pairs(6000)
        name = "the demo"
    reading = data.adopt_template(tokenizer, rows, flags.chat_template)
    pairs = data.tokenize_pairs(
        rows, tokenizer, max_length=flags.max_length, max_prompt_length=flags.max_prompt_length,
        truncation_mode=flags.truncation_mode, progress=sys.stderr.isatty())
    print0(f"{name}: {reading}\n  {pairs.report}")
    return pairs


def check_fit(flags, model, all_sets, device):
    """Do pairs, model and flags go together? Settles --max_tokens."""
    spans = np.concatenate([pairs.spans() for pairs in all_sets])
    longest = int((spans[:, PREFIX] + spans[:, CHOSEN:].max(1)).max()) + 1  # prompt + response
    largest_tree = int(spans.sum(1).max())
    largest_id = max(int(pairs.tokens.max()) for pairs in all_sets)
    check_limits(model, largest_id, longest)
    if flags.max_tokens is None:
        flags.max_tokens = max(largest_tree, 1024 if device.type == "cpu" else 8192)
    if flags.max_tokens < largest_tree:
        raise UserError(f"--max_tokens {flags.max_tokens}: the longest pair takes {largest_tree}")
    if model.hf_config.get("output_router_logits"):
        print0("note: the balance loss of its router, for which config.json asks, is not computed")
    if longest > model.config.max_position_embeddings:
        print0(f"note: sequences of {longest} tokens; the model was made for "
               f"{model.config.max_position_embeddings}; --max_length cuts them")


def load_weights(model, flags, device):
    """Load the weights on this rank's device -> the module that the loop calls: the model itself, or with DDP
    around it; with --shard (FSDP2) its parameters are spread over the ranks."""
    if flags.lora_r:
        model.add_adapters(flags.lora_r, flags.lora_alpha)
    if flags.shard and WORLD_SIZE > 1:
        for module in (*model.model.layers, model):
            fully_shard(module, reshard_after_forward=True)
    if hasattr(model, "source"):  # else the demo's, whose weights are not read
        frozen_bf16 = flags.dtype == "bfloat16" and not flags.shard  # FSDP wants all parameters of one dtype
        model.load(device, torch.bfloat16 if frozen_bf16 else torch.float32)
    model.start_adapters(flags.seed)
    model.to(device)
    model.gradient_checkpointing = flags.gradient_checkpointing
    if flags.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)  # one graph for all blocks and all lengths of a pack
    if flags.shard or WORLD_SIZE == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def settle_defaults(flags, model, size, total):
    """Settle the flags whose defaults depend on the model and the data."""
    if flags.learning_rate is None:
        flags.learning_rate = 2e-4 if flags.lora_r else min(1e-3, 5e-6 * math.sqrt(7e9 / size))
    if flags.eval_steps is None:
        flags.eval_steps = max(1, total // 10)
    if flags.save_dtype is None:
        flags.save_dtype = str(model.file_dtype).removeprefix("torch.")


def trained(model):
    """{name: parameter} of those that are trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(flags, model):
    """AdamW; matrices decay, norms and biases do not."""
    matrices = [p for p in trained(model).values() if p.ndim > 1]
    others = [p for p in trained(model).values() if p.ndim <= 1]
    groups = [dict(params=matrices, weight_decay=flags.weight_decay), dict(params=others, weight_decay=0.0)]
    betas = (flags.adam_beta1, flags.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=flags.adam_epsilon, fused=True)


@torch.no_grad()
def load_checkpoint(checkpoint, model, optimizer, fingerprint):
    """Fill the optimizer's state and the adapters -> the steps done, and the metrics of those since the last
    training line of metrics.jsonl."""
    state = read_json(checkpoint / "state.json")
    if state["pairs"] != fingerprint:
        raise UserError(f"{checkpoint}: the pairs are not those that this run was started with")
    parameters = trained(model)
    for entry, stored in find_tensors(checkpoint, "optimizer").items():
        key, _, name = entry.partition(".")  # such as exp_avg.model.norm.weight
        p = parameters[name]
        value = read_tensor(*stored)
        if key == "adapter":
            assign(p, value)
        elif value.shape == p.shape:  # with --shard each rank keeps its part
            optimizer.state[p][key] = torch.zeros_like(p)
            assign(optimizer.state[p][key], value)
        else:
            optimizer.state[p][key] = value.to(p.device)
    return state["step"], state["recent"]


def begin_files(flags, checkpoint, start):
    """Remove an overwritten run, or the lines after a resumed run's checkpoint; write train_config.json."""
    out = Path(flags.output_dir)
    if all_reduce(torch.tensor(start), dist.ReduceOp.MAX) != start:
        raise UserError("other ranks see a newer checkpoint; all need the same --output_dir")
    if RANK != 0:
        return
    if not checkpoint:
        remove_run(out)
    with where(f"{out} could not be written to; make room, then --resume"):
        write_json(out / "train_config.json", recorded_flags(flags))
        for path in (out / "metrics.jsonl", out / "samples.jsonl"):
            path.touch()
            kept = [line for line in read_lines(path) if line["step"] <= start]
            unfinished = path.with_suffix(".unfinished")  # a full disk or a kill may not cost what is there
            unfinished.write_text("".join(map(as_line, kept)), encoding="utf-8")
            unfinished.rename(path)


def recorded_flags(flags):
    return {name: value for name, value in asdict(flags).items() if name not in NOT_RECORDED}


def read_lines(path):
    """The objects in a .jsonl file of a run; a line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def as_line(values):
    return json.dumps(values, ensure_ascii=False) + "\n"


def run_files(out):
    """What a run has written there, by name."""
    names = ["metrics.jsonl", "samples.jsonl", "adapter", *MODEL_FILES, *data.TOKENIZER_FILES,
             "train_config.json"]  # the last to go: without it the others would be nobody's
    return checkpoints(out) + [path for name in names for path in out.glob(name)]


def remove_run(out):
    """Remove a run's files; others stay."""
    for path in run_files(out):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def catch_signals():
    """A list that holds SIGTERM or SIGINT once it has come: the step in hand is finished and saved. A second
    SIGINT ends the program at once."""
    received = []

    def ask(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step and saving it; Ctrl-C ends at once\n")

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    return received


# -----------------------------------------------------------------------------------------------------------
# Parts of a step.


def received_signal(stop_signals):
    """The number of a signal that came to any of the ranks, or 0."""
    return int(all_reduce(torch.tensor(max(stop_signals, default=0)), dist.ReduceOp.MAX))


@torch.no_grad()
def evaluate(flags, model, pairs, device):
    """The metrics of some pairs, as if they were one step: {eval_loss: ...}."""
    batches, divisors = make_batches(flags, pairs, np.arange(len(pairs)), device)
    metrics = {}
    for batch in batches:
        _, pack_metrics = pack_loss(flags, model, batch, divisors)
        metrics = add(metrics, pack_metrics)
    return {f"eval_{name}": value.item() for name, value in sum_over_ranks(metrics).items()}


def log_evaluation(flags, report, line):
    """A line of metrics.jsonl with eval_ metrics, also on the terminal and to --report_to."""
    append_line(flags, "metrics.jsonl", line)
    group = line.get("eval_data", "eval")
    report({f"{group}/{key.removeprefix('eval_')}": value for key, value in line.items()
            if isinstance(value, float)}, line["step"])
    shown = ", ".join(f"{label} {value:.3f}" for label, value in in_short(line).items())
    print0(f"eval {line['step']} | {shown}" + (f" | {line['eval_data']}" if "eval_data" in line else ""))


def in_short(line):
    """What people look at in an evaluation: {label: number}."""
    chosen = line["eval_logps/chosen"]
    rejected = line["eval_logps/rejected"]
    return {"log-prob chosen": chosen, "log-prob rejected": rejected, "margin": chosen - rejected,
            "reward accuracy": line["eval_rewards/accuracies"]}


def append_line(flags, name, values):
    """Append a line to a .jsonl file of --output_dir; what is not finite is null, as JSON has no NaN."""
    values = {key: None if isinstance(value, float) and not math.isfinite(value) else value
              for key, value in values.items()}
    path = Path(flags.output_dir, name)
    if RANK == 0:
        with where(f"{path}: make room, then --resume"), open(path, "a", encoding="utf-8") as file:
            file.write(as_line(values))


def show_answers(flags, model, tokenizer, pairs, step):
    """Print answers to the first held-out prompts and append them to samples.jsonl."""
    half = shutil.get_terminal_size().columns // 2 - 4
    for prompt, answer in answers_to(flags, model, tokenizer, pairs, flags.generate_during_eval, 128):
        asked = tokenizer.decode(prompt)
        text = tokenizer.decode(answer, after=prompt)
        append_line(flags, "samples.jsonl", {"step": step, "prompt": asked, "answer": text})
        question = " ".join(last_words(tokenizer, asked).split())
        print0(f"  {question[-half:]} -> {' '.join(text.split())[:half]}")


def last_words(tokenizer, prompt):
    """What the user said last in a prompt, without what the chat template writes around it."""
    if not tokenizer.chat_template:
        return prompt
    turn = [{"role": "user", "content": "WORDS"}]
    with suppress(UserError, ValueError):  # a template with rules about turns, or with nothing before them
        before, _, after = tokenizer.apply_chat_template(turn, add_generation_prompt=True).rpartition("WORDS")
        return prompt.removesuffix(after).split(before[-10:])[-1]
    return prompt


def answers_to(flags, model, tokenizer, pairs, count, max_new_tokens):
    """(prompt, greedy answer) of the first pairs, on the first rank. With --shard none: all ranks would send
    each other the whole model for each token."""
    prompts = [pairs[i][PREFIX].tolist() for i in range(min(count, len(pairs)))]
    if not prompts or RANK != 0 or flags.shard:
        return []
    # not compiled: it would be a graph for each length
    with torch.compiler.set_stance("force_eager"), autocast(flags, model.lm_head.weight.device):
        return list(zip(prompts, continuations(model, prompts, max_new_tokens, stop_ids(model, tokenizer))))


def autocast(flags, device):
    # without a cache: a forward pass uses each weight once, and cached copies would outlive their blocks
    bf16 = flags.dtype == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def gather(flags, tensors):
    """{name: tensor}, whole and on the CPU, on the first rank; with --shard all ranks give their part."""
    found = {}
    if RANK != 0 and not flags.shard:
        return found
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if RANK == 0:
            found[name] = tensor.cpu()
    return found


def save_checkpoint(flags, model, tokenizer, optimizer, fingerprint, step, recent):
    """Whatever is needed to continue exactly from here, as checkpoint-N. It is complete or absent: written
    under another name, flushed to the disk, and renamed."""
    out = Path(flags.output_dir)
    final = out / f"checkpoint-{step}"
    unfinished = out / "checkpoint-unfinished"
    tensors = {}
    for name, p in trained(model).items():
        for key, value in optimizer.state[p].items():
            if value is not None:  # such as the momentum of an SGD that has none
                tensors[f"{key}.{name}"] = torch.as_tensor(value).float()
        if flags.lora_r:
            tensors[f"adapter.{name}"] = p
    tensors = gather(flags, tensors)
    weights = {} if flags.lora_r else gather(flags, dict(model.named_parameters()))
    recent = [{name: float(value) for name, value in metrics.items()} for metrics in recent]
    if RANK == 0:
        with where(f"{final} could not be written; make room, then --resume"):
            shutil.rmtree(unfinished, ignore_errors=True)
            write_tensors(unfinished, "optimizer", tensors)
            tokenizer.save_pretrained(unfinished)
            if weights:
                model.save_pretrained(unfinished, torch.float32, weights)
            else:  # of adapters; but some tokenizers' EOS stands in config.json alone
                write_json(unfinished / "config.json", model.hf_config)
            write_json(unfinished / "train_config.json", recorded_flags(flags))
            write_json(unfinished / "state.json", dict(step=step, pairs=fingerprint, recent=recent,
                                                       clock=tokenizer.clock.isoformat()))
            for path in [*unfinished.iterdir(), unfinished, out / "metrics.jsonl"]:
                flush(path)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            flush(out)
        if flags.save_total_limit:
            for old in checkpoints(out)[: -flags.save_total_limit]:
                shutil.rmtree(old)
    all_reduce(torch.zeros(1))  # wait until it is written: torchrun ends all ranks when one fails


def flush(path):
    """Have the system write a file, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def make_batches(flags, pairs, indices, device):
    """This rank's packs of some pairs, and what their losses are divided by: the scored tokens and the pairs
    of all ranks."""
    batches = data.make_packs(pairs, indices, flags.max_tokens, rank=RANK, ranks=WORLD_SIZE,
                              prompt_loss=flags.prompt_loss)
    prompt, chosen, _ = pairs.spans()[indices].sum(0).tolist()
    tokens = prompt + chosen if flags.prompt_loss else chosen
    return [batch.to(device) for batch in batches], (tokens, len(indices))


def pack_loss(flags, network, batch, divisors):
    """What one pack adds to the loss of its step, and {name: what it adds to a metric}.  divisors: the step's
    scored tokens and pairs."""
    with autocast(flags, batch.inputs.device):
        logps = network(batch)
    loss, metrics = orpo_loss(logps, batch, flags.beta, *divisors)
    metrics = {name: value.double() * batch.share for name, value in metrics.items()}  # sums of many packs
    return loss * batch.share, metrics


def add(totals, metrics):
    return {name: totals.get(name, 0.0) + value for name, value in metrics.items()}


def sum_over_ranks(metrics):
    """{name: this rank's part of a metric} -> {name: their sum over the ranks}."""
    sums = all_reduce(torch.stack(list(metrics.values())))
    return dict(zip(metrics, sums))


def learning_rate(flags, step, total):
    """Of step 0 .. total - 1. The last step of the warmup has the peak; the shapes after it are
    transformers'."""
    warmup = flags.warmup_steps or math.ceil(flags.warmup_ratio * total)
    if step < warmup:
        return flags.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    scale = warmup or 10_000
    shapes = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0,
              "inverse_sqrt": math.sqrt(scale / (scale + step - warmup))}
    return flags.learning_rate * shapes[flags.lr_scheduler_type]


def update(optimizer, finite):
    """optimizer.step(), which changes nothing where `finite`, a tensor on the device, is false."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # torch's fused optimizers look at this themselves (it was made for GradScaler): no wait for the GPU
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()


def finite_steps(recent, bad_in_a_row, total):
    """The metrics, as numbers, of the recent steps whose loss and gradient were finite, and how many steps in
    a row were not, at their end (bad_in_a_row: before them). Too many in a row end the run."""
    finite = []
    for metrics in recent:
        metrics = {name: float(value) for name, value in metrics.items()}
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            finite.append(metrics)
            bad_in_a_row = 0
        else:
            bad_in_a_row += 1
        if bad_in_a_row >= min(5, total):
            raise UserError(f"{bad_in_a_row} steps in a row without a finite loss and gradient; try a lower "
                            "--learning_rate")
    return finite, bad_in_a_row


def means(steps):
    return {name: sum(metrics[name] for metrics in steps) / len(steps) for name in steps[0]}


def speed(flags, model, spans, seconds):
    """Metrics of how fast pairs of the given spans (N, PARTS) were trained, and in how much memory."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on macOS bytes
    resident = kilobytes * (1 if sys.platform == "darwin" else 1024)
    found = {"pairs_per_second": len(spans) / seconds, "tokens_per_second": int(spans.sum()) / seconds,
             "peak_memory_gb": (torch.cuda.max_memory_allocated() or resident) / 2**30}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and flags.dtype == "bfloat16" else ""
    for name, peak in PEAK.items():
        if name in gpu:
            found["mfu"] = model.training_flops(spans) / seconds / (peak * WORLD_SIZE)
    return found


def log_training(flags, report, line, total):
    """A line of metrics.jsonl, also on the terminal and, under transformers' names, to --report_to."""
    append_line(flags, "metrics.jsonl", line)
    report({"train/" + key: value for key, value in line.items()}, line["step"])
    margin = line["logps/chosen"] - line["logps/rejected"]
    print0(f"step {line['step']}/{total} | loss {line['loss']:.4f}, nll {line['nll_loss']:.4f}, "
           f"margin {margin:.3f}, accuracy {line['rewards/accuracies']:.3f}, "
           f"lr {line['learning_rate']:.0e}, {line['pairs_per_second']:.1f} pairs/s")


# -----------------------------------------------------------------------------------------------------------
# The end of a run.


def save_model(flags, model, tokenizer):
    """The final model and its tokenizer, in --output_dir; adapters also alone, for PEFT."""
    out = Path(flags.output_dir)
    weights = gather(flags, dict(model.named_parameters()))
    if RANK == 0:
        with where(f"the model could not be written to {out}; make room, then --resume"):
            model.save_pretrained(out, getattr(torch, flags.save_dtype), weights)
            tokenizer.save_pretrained(out)
            if flags.lora_r:
                model.save_adapters(out / "adapter", weights, flags.model, flags.lora_r, flags.lora_alpha)


def push_to_hub(flags):
    """Upload the final model and its tokenizer, if --push_to_hub names a repository."""
    if flags.push_to_hub and RANK == 0:
        with where(f"--push_to_hub {flags.push_to_hub} failed; the model is in {flags.output_dir}"):
            from huggingface_hub import create_repo, upload_folder

            create_repo(flags.push_to_hub, exist_ok=True)
            upload_folder(repo_id=flags.push_to_hub, folder_path=flags.output_dir,
                          allow_patterns=MODEL_FILES + data.TOKENIZER_FILES)


def summarise(flags, model, tokenizer, eval_sets, seconds):
    """A table of the held-out metrics, the demo's right answers, and the next command."""
    demo = not flags.model
    lines = read_lines(Path(flags.output_dir, "metrics.jsonl")) if RANK == 0 else []
    evaluations = [line for line in lines if line.get("eval_loss")]  # null: it was not finite
    if evaluations:
        before = in_short(evaluations[0])
        after = in_short(evaluations[-1])
        print0(f"\n{'on held-out pairs':24}{'before':>11}{'after':>11}")
        for label in before:
            print0(f"{label:24}{before[label]:11.3f}{after[label]:11.3f}")
    if demo and not flags.shard:
        for pairs in eval_sets.values():
            right = 0
            for prompt, answer in answers_to(flags, model, tokenizer, pairs, len(pairs), 32):
                right += data.demo_right(tokenizer.decode(prompt), tokenizer.decode(answer))
            print0(f"{'right greedy answers':24}{right / len(pairs):22.3f}")
    print0(f"\n{timedelta(seconds=round(seconds))} in all; the model and metrics.jsonl are in "
           f"{flags.output_dir}. Next:\n    python sample.py --model {flags.output_dir}"
           + " --raw" * bool(tokenizer.raw and tokenizer.chat_template)
           + ' --prompt "Name a number above 57."' * demo)


# -----------------------------------------------------------------------------------------------------------
# The program: an error that the user can put right is one line.


def explain(error):
    """One line about an error that is no mistake of this code, else None."""
    if isinstance(error, UserError | OSError):
        return str(error)
    # as PyTorch's allocators (can't, or can not), NCCL and cuBLAS say it
    no_memory = "t allocate memory|out of memory|ALLOC_FAILED"
    if isinstance(error, MemoryError) or re.search(no_memory, str(error)):
        return "out of memory; lower --max_tokens or add --gradient_checkpointing: the result stays the same"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile needs a C++ compiler, on a GPU Triton ({type(error).__name__}); leave it out"
    if isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.I):
        return "another rank has ended (see what it says), or is late by two hours"
    return None


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        status = 1
        line = explain(error)
        if line is None or "--debug" in sys.argv:
            raise
        tqdm.write(f"train.py: {line}", file=sys.stderr)
    if WORLD_SIZE > 1:
        if status != 1:  # else the other ranks may be gone, or waiting
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)  # gloo's threads live on, and could abort a normal exit
    sys.exit(status)
