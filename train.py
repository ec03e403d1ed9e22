"""Train a model with ORPO: a script, in the order in which things happen.

    python train.py                                  # the built-in demo, on a CPU, in about a minute
    python train.py --model MODEL --data FILE        # a Hugging Face directory or hub id, preference pairs
    torchrun --nproc_per_node=8 train.py --model MODEL --data FILE
    python train.py --resume                         # go on exactly where the newest checkpoint ended
    python train.py --help                           # every flag, its default and unit

The trajectory does not depend on the hardware: a step is the next `batch_size` pairs of the epoch's order,
however many packs, micro-steps and ranks compute it, and its losses are sums divided once by the counts of
the whole step.
"""
import dataclasses
import fcntl
import hashlib
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
from contextlib import nullcontext, suppress
from dataclasses import KW_ONLY, asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

# Before torch: threads that spin while they wait slow shared cores down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import FlagError, UserError, checked_flags, parse_flags, read_json, refuse, where, write_json
from model import Config, Transformer, assign, find_tensors, whole, write_tensors
from orpo import METRICS, orpo_loss
from sample import continuations, text_after

# -----------------------------------------------------------------------------------------------------------
# Flags. Names are TRL's and transformers' where they have one.


@dataclass
class Flags:
    beta: float = 0.1  # weight of L_OR: lambda in the paper, alpha in the authors' code; 0: plain SFT
    prompt_loss: bool = True  # L_SFT over prompt + chosen (authors' code, TRL); --no-: over chosen (paper)
    output_router_logits: bool = False  # experts: the balancing loss, unasked by config.json too
    batch_size: int = 32  # pairs per optimizer step, over all devices
    weight_decay: float = 0.0  # decoupled; matrices only, not norms and biases
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the root of the second moment
    max_length: int = 1024  # tokens of the longest prompt + response
    max_prompt_length: int = None  # what a prompt is cut to beyond --max_length (default: half of it)
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"  # which end of a cut prompt stays
    prompt_column: str = ""  # where the prompt stands, if in no column of a usual name; none: nowhere
    eval_pairs: int = None  # held out of --data (default: a tenth, at most 200; none with --eval_data)
    dtype: Literal["bfloat16", "float32"] = None  # of products, not of weights (default: the GPU's)
    seed: int = 0  # of the epochs' orders, the demo's weights and adapters
    lora_r: int = 0  # rank of adapters (LoRA), trained in place of the model, which stays frozen; 0: none
    lora_alpha: float = 16.0  # adapters' updates are scaled by lora_alpha / lora_r
    _: KW_ONLY  # a resumed run may change what follows
    model: str = ""  # directory or hub id; without --model and --data: the demo
    revision: str = ""  # branch, tag or commit of a hub id, such as refs/pr/1
    data: list = ()  # pairs: .jsonl, .jsonl.gz, .json, .parquet, or a hub id[:split]; several: in turn
    eval_data: list = ()  # pairs to evaluate on, in the same forms
    learning_rate: float = None  # AdamW's peak (default: 5e-6 x sqrt(7e9 / parameters), at most 1e-3; LoRA 2e-4)
    lr_scheduler_type: Literal["linear", "cosine", "inverse_sqrt", "constant"] = "linear"  # after the warmup
    warmup_steps: int = 0  # steps from 0 to the peak; over --warmup_ratio if positive
    warmup_ratio: float = 0.1  # the same as a fraction of all steps
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    num_train_epochs: float = 3.0  # passes over the pairs
    max_steps: int = 0  # optimizer steps; over --num_train_epochs if positive
    max_tokens: int = 8192  # tokens per pack per device: the memory knob, without effect on the result
    gradient_checkpointing: bool = False  # recompute blocks in the backward: a quarter more time, less memory
    compile: bool = False  # torch.compile the blocks: faster on GPUs after a minute's start
    shard: bool = False  # weights, gradients and moments spread over the ranks (FSDP2), not copied (DDP)
    ddp_timeout: int = 7200  # seconds that ranks wait for each other, such as for the first one's tokenizing
    output_dir: str = "out"  # metrics.jsonl, checkpoints and the final model go here
    overwrite_output_dir: bool = False  # discard the run that --output_dir holds
    resume: Literal["no", "yes", "auto"] = "no"  # go on from the newest checkpoint; auto: or start afresh
    config: str = ""  # a JSON file of flags, such as a run's train_config.json; the command line wins
    run_name: str = None  # for --report_to (default: the name of --output_dir)
    logging_steps: int = 10  # steps per line of metrics.jsonl, which gives their mean
    eval_steps: int = None  # steps between evaluations, also before and after; 0: none (default: a tenth)
    save_steps: int = 500  # steps between checkpoints; there is always one at the end; 0: none at all
    save_total_limit: int = 2  # checkpoints kept, the newest ones; 0: all
    save_dtype: Literal["bfloat16", "float16", "float32"] = None  # of the final weights (default: as before)
    generate_during_eval: int = 0  # answers shown at each evaluation and kept in samples.jsonl
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # also log to
    push_to_hub: str = ""  # repository to upload the final model to, with a model card
    dry_run: bool = False  # read and tokenize, show what would be trained of the first pairs, and end
    debug: bool = False  # show tracebacks


MANY = 2**31
RANGES = dict(batch_size=(1, MANY), max_length=(2, MANY), max_prompt_length=(1, MANY), max_tokens=(1, MANY),
              logging_steps=(1, MANY), ddp_timeout=(1, 10**7), adam_beta1=(0, 0.9999), adam_beta2=(0, 0.999999),
              warmup_ratio=(0, 1), learning_rate=(1e-15, 1e3), adam_epsilon=(1e-30, 1),
              num_train_epochs=(1e-9, 1e9))
ELSEWHERE = {  # what other trainers call things
    "alpha": "it is --beta here", "lr": "it is --learning_rate here", "bf16": "it is --dtype bfloat16 here",
    "resume_from_checkpoint": "it is --resume here", "model_name_or_path": "it is --model here",
    "dataset_name": "it is --data here", "max_completion_length": "a response takes what --max_length leaves",
    "per_device_train_batch_size": "--batch_size counts a step's pairs, --max_tokens saves memory",
    "gradient_accumulation_steps": "--batch_size counts a step's pairs; --max_tokens makes its micro-steps",
    "per_device_eval_batch_size": "--max_tokens limits the memory of evaluations too"}
# What the demo sets where nothing is said: a tiny model needs a larger rate, its task shows more at a larger
# beta.
DEMO = dict(learning_rate=2e-3, adam_beta2=0.98, beta=0.5, max_steps=750, max_length=64, logging_steps=50)
DEMO_SHAPE = dict(model_type="llama", hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
                  tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
SUMMARY = {"eval_logps/chosen": "log-prob chosen", "eval_logps/rejected": "log-prob rejected",
           "eval_rewards/accuracies": "reward accuracy"}
RECORDS = ["metrics.jsonl", "samples.jsonl", "train_config.json"]
BAD_STEPS = 5  # this many steps in a row without a finite gradient end the run
# dense bf16 peak, operations per second (vendors' data sheets, without sparsity; H100: the SXM card)
PEAK = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def parse(arguments):
    """Command line -> (Flags, names of those that were given). Raises FlagError where a value cannot be
    right."""
    flags, given = parse_flags(Flags, arguments, __doc__, RANGES, ELSEWHERE)
    resumed, both, neither = flags.resume != "no", flags.model and flags.data, not (flags.model or flags.data)
    if neither and not resumed:
        unsaid = {name: value for name, value in DEMO.items() if name not in given}
        flags = dataclasses.replace(flags, **unsaid)
    prompt, missing = flags.max_prompt_length, "data" if flags.model else "model"
    refuse(
        (not (both or neither or resumed), f"--{missing} is missing: give both, or neither for the demo"),
        (prompt and prompt >= flags.max_length, f"--max_prompt_length {prompt}: must be below --max_length"),
        (resumed and flags.overwrite_output_dir, "--resume and --overwrite_output_dir contradict each other"),
        (flags.eval_pairs and flags.eval_data, "--eval_pairs and --eval_data: give one of the two"),
        (not flags.output_dir, "--output_dir is empty; name a directory"), kind=FlagError)
    return flags, given


# -----------------------------------------------------------------------------------------------------------
# Ranks: torchrun's processes.


class Ranks:
    """This process among those that torchrun started; one alone without it."""

    def __init__(self, timeout):
        with where("torchrun's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR or MASTER_PORT"):
            names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
            self.rank, self.count, local = (int(os.environ.get(name, usual)) for name, usual in names.items())
            self.first, cuda = self.rank == 0, torch.cuda.is_available()
            self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
            if cuda and local >= torch.cuda.device_count():
                raise UserError(f"rank {self.rank} has no GPU: this machine has {torch.cuda.device_count()}, "
                                f"so use torchrun --nproc_per_node={torch.cuda.device_count()}")
            if cuda:
                torch.cuda.set_device(self.device)
            if self.count > 1:
                backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
                dist.init_process_group(backend, timeout=timedelta(seconds=timeout))

    def sum(self, tensor):
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def of_first(self, values):
        """The first rank's 1-D integers, on all."""
        if self.count == 1:
            return values
        size = torch.tensor(len(values) if self.first else 0)
        dist.broadcast(size, 0)
        tensor = torch.empty(int(size), dtype=torch.int64)
        if self.first:
            tensor.copy_(torch.as_tensor(np.asarray(values)))
        dist.broadcast(tensor, 0)
        return tensor.numpy()

    def say(self, text):
        if self.first:
            tqdm.write(text)


# -----------------------------------------------------------------------------------------------------------
# Files of a run: complete or absent, never half.


class RunDirectory:
    """--output_dir, locked against other runs. `.orpo` in it is the lock, and lists the names that runs
    wrote there: only these are ever replaced or removed."""

    def __init__(self, path):
        self.path = path
        with where(f"--output_dir {path} cannot be written to"):
            os.makedirs(path, exist_ok=True)
            self.record = open(os.path.join(path, ".orpo"), "a+", encoding="utf-8")
            try:
                fcntl.flock(self.record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError("another run is writing there; wait for it, or choose another") from error
            self.record.seek(0)
            self.names = set(self.record.read().splitlines())

    def there(self):
        """What runs wrote and is still there."""
        return sorted(name for name in self.names if os.path.lexists(os.path.join(self.path, name)))

    def claim(self, names):
        """Before these are written: nothing may stand there that is not a run's."""
        for name in sorted(set(names) - self.names):
            if os.path.lexists(os.path.join(self.path, name)):
                raise UserError(f"{name} is there, from no run; move it or choose another directory", self.path)
            self.names.add(name)
            self.record.write(name + "\n")
        self.record.flush()

    def discard(self, names):
        """Remove those of the names that are a run's; at no time does half of a directory have its name."""
        trash = os.path.join(self.path, ".discarded")
        for path in (os.path.join(self.path, name) for name in names if name in self.names):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(trash, ignore_errors=True)
                os.rename(path, trash)
                shutil.rmtree(trash)
            elif os.path.lexists(path):
                os.remove(path)

    def write(self, fill, name=""):
        """What fill(folder) writes appears, flushed and whole, as the directory `name`, or without one in
        this one. Returns the files' names."""
        folder, path = os.path.join(self.path, ".unfinished"), os.path.join(self.path, name)
        try:
            with where(path, "could not be written; make room, then --resume"):
                shutil.rmtree(folder, ignore_errors=True)
                os.makedirs(folder)
                fill(folder)
                files = sorted(os.listdir(folder))
                for file in [*Path(folder).rglob("*"), folder]:
                    flush(file)
                self.claim([name] if name else files)
                self.discard([name] if name else [file for file in files if os.path.isdir(os.path.join(path, file))])
                for file in [""] if name else files:
                    os.replace(os.path.join(folder, file), os.path.join(path, file))
                flush(self.path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return files


def flush(path):
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError) if os.path.isdir(path) else nullcontext():  # not all can flush a directory
        os.fsync(handle)
    os.close(handle)


def digests(directory):
    """{file: its sha256} of all in a directory but the manifest."""
    found = {}
    for name in sorted(set(os.listdir(directory)) - {"manifest.json"}):
        with open(os.path.join(directory, name), "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def checkpoints(output_dir):
    """{step: directory} of the checkpoints there, oldest first."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted(int(name[11:]) for name in names if re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", name))
    return {step: os.path.join(output_dir, f"checkpoint-{step}") for step in steps}


def damage(directory):
    """What is wrong with a checkpoint, in words; empty if every file is what was written, for the step it
    says."""
    try:
        if read_json(os.path.join(directory, "manifest.json")) != digests(directory):
            return "its files are not what was written"
        step = read_json(os.path.join(directory, "state.json"))["step"]
        return "" if os.path.basename(directory) == f"checkpoint-{step}" else f"it is that of step {step}"
    except (UserError, OSError, KeyError) as error:
        return str(error)


def newest_checkpoint(flags):
    """The step of the newest checkpoint that is whole; others are reported and passed over. 0 where a run
    starts."""
    for step, directory in reversed(checkpoints(flags.output_dir).items()) if flags.resume != "no" else ():
        wrong = damage(directory)
        if not wrong:
            return step
        print(f"{directory} is damaged, passed over: {wrong}", file=sys.stderr)
    if flags.resume == "yes":
        raise UserError("no checkpoint to resume from; start afresh without --resume", flags.output_dir)
    return 0


def cut_back(path, step):
    """Drop the lines of a .jsonl file that are later than `step`, and a last one that was cut off."""
    if os.path.exists(path):
        with open(path, "rb") as file:  # bytes: the cut may have gone through a character
            lines = [line for line in file if line.endswith(b"\n")]
        steps = [re.match(rb'{"step": (\d+)', line) for line in lines]
        with open(path + ".tmp", "wb") as file:
            file.writelines(line for line, at in zip(lines, steps) if not at or int(at[1]) <= step)
        os.replace(path + ".tmp", path)


# -----------------------------------------------------------------------------------------------------------
# The stages of a run before its loop.


def start_up(flags, given, ranks):
    """Take --output_dir, and for a resumed run the flags that its newest checkpoint records -> flags,
    directory (on the first rank), checkpoint or ""."""
    mine = {name: zlib.crc32(repr(value).encode()) for name, value in asdict(flags).items()}
    for name, theirs in zip(mine, ranks.of_first([*mine.values()])):
        if mine[name] != theirs:
            raise UserError(f"--{name} differs: on rank {ranks.rank} it is {getattr(flags, name)!r}")
    out = flags.output_dir
    directory = RunDirectory(out) if ranks.first and not flags.dry_run else None
    step = int(ranks.of_first([newest_checkpoint(flags)] if ranks.first else [])[0])
    if step:
        checkpoint = os.path.join(out, f"checkpoint-{step}")
        return recorded_flags(flags, given, checkpoint, ranks), directory, checkpoint
    reads = [os.path.realpath(path) for path in (flags.model, *flags.data, *flags.eval_data) if path]
    names = directory.there() if directory else []
    if flags.resume == "auto" and "config.json" not in names:
        return flags, directory, ""  # a run that was stopped before its first checkpoint
    for name in names:
        path = os.path.join(os.path.realpath(out), name)
        used = os.path.dirname(path) in reads or any(Path(file).is_relative_to(path) for file in reads)
        with where(out):
            refuse((not flags.overwrite_output_dir, f"holds a run already ({name}); go on with it (--resume), "
                    "discard it (--overwrite_output_dir), or choose another --output_dir"),
                   (used, f"--overwrite_output_dir would discard {name}, which this run reads"))
    return flags, directory, ""


def recorded_flags(flags, given, checkpoint, ranks):
    """The flags of a resumed run: as recorded, but for those given now that may change."""
    recorded, values = read_json(os.path.join(checkpoint, "train_config.json")), asdict(flags)
    for field in dataclasses.fields(Flags):
        name, text = field.name, json.dumps(values[field.name])
        if name in given and name in recorded and text != json.dumps(recorded[name]):
            refuse((not field.kw_only, f"--{name} {text} would change the run, which has {recorded[name]}; leave "
                    "it out, or start afresh in another --output_dir"))
            ranks.say(f"--{name} {text} from here on; it was {recorded[name]}")
    if "num_train_epochs" in given and "max_steps" not in given:
        recorded["max_steps"] = 0  # it is not to outweigh what was asked for
    now = given | {"resume", "output_dir", "overwrite_output_dir", "config", "debug", "dry_run"}
    with where(checkpoint, "train_config.json"):
        return checked_flags(Flags, recorded | {name: values[name] for name in now}, RANGES)


def load_pairs(flags, tokenizer, ranks):
    """Read and tokenize --data and --eval_data, or hold pairs out -> the pairs to train on and those to
    evaluate on."""
    reading = dict(prompt_column=flags.prompt_column, progress=sys.stderr.isatty())
    rows = {"the demo's pairs": data.demo_pairs(3200)}
    if flags.data:
        rows = {", ".join(files): data.read_pairs(files, **reading) for files in (flags.data, flags.eval_data) if files}
    answers = [row["chosen"] for part in rows.values() for row in part]
    if not tokenizer.has_template and any(isinstance(answer, list) for answer in answers):
        ranks.say("The model has no chat template: conversations are written as <|user|> and <|assistant|> "
                  "turns closed by EOS, and the template is saved with the model.")
        tokenizer.has_template = True
    found = []
    for name, part in rows.items():
        lengths = dict(max_length=flags.max_length, max_prompt_length=flags.max_prompt_length)
        found.append(data.tokenize_pairs(part, tokenizer, progress=reading["progress"],
                                         truncation_mode=flags.truncation_mode, **lengths))
        ranks.say(f"{name}: {found[-1].report}")
    if flags.eval_data:
        return found
    pairs, count = found[0], flags.eval_pairs
    count = min(200, len(pairs) // 10) if count is None else count
    refuse((count >= len(pairs), f"--eval_pairs {count}: only {len(pairs)} pairs are there, some must be trained on"))
    order = np.random.default_rng(0).permutation(len(pairs))  # of the data alone: seeds can be compared
    return pairs.select(np.sort(order[count:])), pairs.select(np.sort(order[:count]))


def share_pairs(pairs, ranks):
    """The pairs that the first rank read, on every rank: tokenizing is done once."""
    tokens, ends, rows = (ranks.of_first(getattr(pairs, name, None)) for name in ("tokens", "ends", "rows"))
    return data.Pairs(tokens.astype(np.int32), ends, rows)


def check_fit(flags, model, everything):
    """Do pairs, model and flags go together?"""
    spans, limit = np.concatenate([pairs.spans() for pairs in everything]), model.max_positions
    largest, vocabulary = max(int(pairs.tokens.max()) for pairs in everything), model.config.vocab_size
    longest, tree = int((spans[:, 0] + spans[:, 1:].max(1)).max()) + 1, int(spans.sum(1).max())
    refuse(
        (largest >= vocabulary, f"token id {largest} is beyond the model's vocabulary of {vocabulary}: tokenizer "
         "and model do not belong together"),
        (limit and longest > limit, f"a sequence of {longest} tokens does not fit the model's {limit} positions; "
         f"use --max_length {limit}"),
        (flags.max_tokens < tree, f"--max_tokens {flags.max_tokens}: the longest pair needs {tree}; use at least "
         "that, or cut pairs with --max_length"))


def load_model(flags, checkpoint, tokenizer):
    """The model without its weights (of a resumed run, as its checkpoint has it; of the demo, with random
    ones)."""
    if flags.model and (flags.lora_r or not checkpoint):
        return Transformer.outline(flags.model, revision=flags.revision)
    if checkpoint and not flags.lora_r:
        return Transformer.outline(checkpoint)
    shape = DEMO_SHAPE | {"vocab_size": tokenizer.backend.get_vocab_size(), "eos_token_id": tokenizer.eos_id}
    return Transformer(Config.from_hf(shape), shape).initialise(flags.seed)


def spread(model, flags, ranks):
    """Load the weights on this rank's device -> the module that the loop calls: the model alone, copied to
    every rank (DDP), or with --shard spread over the ranks (FSDP2)."""
    if flags.lora_r:
        model.add_adapters(flags.lora_r, flags.lora_alpha)
    if flags.shard and ranks.count > 1:
        mesh = init_device_mesh(ranks.device.type, (ranks.count,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(model, "next_logits")
    if hasattr(model, "source"):  # FSDP wants one dtype
        half = flags.dtype == "bfloat16" and not flags.shard
        model.load(ranks.device, torch.bfloat16 if half else torch.float32)
    if flags.lora_r:
        model.start_adapters(flags.seed)
    model.to(ranks.device).train()
    model.gradient_checkpointing = flags.gradient_checkpointing
    if flags.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)  # one graph for all blocks and all lengths of a pack
    if flags.shard or ranks.count == 1:
        return model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def has_bfloat16(device):
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)  # as a T4's


def make_optimizer(flags, parameters):
    matrices, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [dict(params=matrices, weight_decay=flags.weight_decay), dict(params=others, weight_decay=0.0)]
    betas = flags.adam_beta1, flags.adam_beta2
    return torch.optim.AdamW(groups, lr=flags.learning_rate, betas=betas, eps=flags.adam_epsilon, fused=True)


def restore(checkpoint, run, since):
    """The optimizer's state, and the sums of the open line of metrics, from a checkpoint -> the steps
    done."""
    with where(checkpoint, "cannot be resumed from; remove it to go back to the one before it"):
        state = read_json(os.path.join(checkpoint, "state.json"))
        stored = find_tensors(checkpoint, "optimizer")
        if state["data"] != run.fingerprint:
            raise UserError("the pairs are not those that this run was started with")
        if run.ranks.first:
            since.sums += torch.tensor(state["window"], dtype=torch.float64, device=run.ranks.device)
        since.in_a_row, run.model.file_dtype = int(state["in_a_row"]), getattr(torch, state["file_dtype"])
        adapters = find_tensors(checkpoint, "adapters") if run.flags.lora_r else {}
        for name, parameter in run.trained().items():
            if adapters:
                assign(parameter.data, adapters[name].read())
            moments = {"step": torch.zeros((), device=run.ranks.device)}
            moments |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            for key, value in moments.items():
                stored[f"{key}.{name}"].check(list(value.shape))
                assign(value, stored[f"{key}.{name}"].read())
            run.optimizer.state[parameter] = moments
        return int(state["step"])


def begin_files(run, checkpoint, start):
    """Before the first step: an overwritten run goes, a resumed one loses what is later than its
    checkpoint."""
    if not checkpoint:
        run.directory.discard(run.directory.there())
    names = [*RECORDS, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    run.directory.claim([*names, *run.tokenizer.files, *["README.md"] * bool(run.flags.push_to_hub)])
    for name in RECORDS[:2]:
        cut_back(os.path.join(run.flags.output_dir, name), start)
    open(os.path.join(run.flags.output_dir, RECORDS[0]), "a").close()
    write_json(os.path.join(run.flags.output_dir, "train_config.json"), asdict(run.flags))


# -----------------------------------------------------------------------------------------------------------
# Parts of the loop.


@dataclass
class Run:
    """What the parts of the loop share. network: the model, perhaps as DDP.  names: of the metrics that
    packs add to. fingerprint: of the pairs.  log: (metrics, step) -> --report_to."""

    flags: Flags
    ranks: Ranks
    directory: RunDirectory
    tokenizer: data.Tokenizer
    pairs: data.Pairs
    held_out: data.Pairs
    model: Transformer
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    names: tuple
    fingerprint: list
    log: object

    def trained(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def autocast(self):
        # no cache: a forward uses each weight once, and cached casts of all would outlive the blocks they
        # serve
        on = self.flags.dtype == "bfloat16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=on, cache_enabled=False)

    def packs(self, pairs, indices):
        """This rank's packs of some pairs, and what their losses are divided by: the tokens and pairs of
        all."""
        spans, prompt_loss = pairs.spans()[indices].sum(0), self.flags.prompt_loss
        options = dict(rank=self.ranks.rank, ranks=self.ranks.count, prompt_loss=prompt_loss)
        batches = data.make_packs(pairs, indices, self.flags.max_tokens, **options)
        return batches, (int(spans[1] + spans[0] * prompt_loss), len(indices))

    def packs_of_step(self, step):
        indices, epoch = data.step_indices(len(self.pairs), self.flags.batch_size, self.flags.seed, step - 1)
        return indices, epoch, *self.packs(self.pairs, indices)

    def gather(self, tensors):
        """{name: tensor}, whole and on the CPU, on the first rank; of a sharded model all give their part."""
        if not (self.ranks.first or self.flags.shard):
            return {}
        full = ((name, whole(tensor.detach())) for name, tensor in tensors)
        return {name: tensor.cpu() for name, tensor in full if self.ranks.first}

    def record(self, metrics, file="metrics.jsonl"):
        path = os.path.join(self.flags.output_dir, file)
        if self.ranks.first:
            with where(path, "cannot be written; make room, then --resume"), open(path, "ab") as file:
                file.write(json.dumps(metrics, ensure_ascii=False).encode() + b"\n")


class SinceLine:
    """What the steps since the last line of metrics add up to. sums: of the metrics, grad_norm, and the
    steps, on each rank its part; spans: of their pairs; finite: had each step a finite gradient?  in_a_row:
    how many had none."""

    def __init__(self, count, ranks):
        self.sums = torch.zeros(count + 2, dtype=torch.float64, device=ranks.device)
        self.ranks, self.in_a_row = ranks, 0
        self.clear()

    def clear(self):
        self.sums.zero_()
        self.finite, self.spans, self.paused, self.clock = [], [], 0.0, time.perf_counter()

    def add(self, metrics, grad_norm, spans):
        self.finite.append(grad_norm.isfinite())
        once = torch.stack([grad_norm, torch.ones_like(grad_norm)]) / self.ranks.count
        self.sums += torch.where(self.finite[-1], torch.cat([metrics, once]), 0.0)
        self.spans.append(spans)

    def bad_steps(self, step):
        """The steps up to this one, not looked at yet, without a finite gradient. Here the host waits for
        the device."""
        found = torch.stack(self.finite).tolist() if self.finite else []
        self.finite = []
        for number, good in enumerate(found, step + 1 - len(found)):
            self.in_a_row = 0 if good else self.in_a_row + 1
            if not good:
                yield number


def learning_rate(flags, step, total):
    """For step 0 .. total - 1. Warmup reaches the peak in its last step; the shapes after it are
    transformers'."""
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


def router_weight(batch):
    """How often each position counts in the router's statistics: prompts twice, as in two plain sequences."""
    return torch.where(batch.owner % 3 == 0, 2.0, 1.0) * batch.share


def balance_factors(run, batches):
    """Mixtures of experts: the balance loss E sum_e f_e P_e needs the step's fractions f of tokens sent to
    each expert before any gradient: a forward pass of its own. -> (E,), what to multiply the sums of
    probabilities with."""
    sent, config = torch.zeros(run.model.config.num_experts, device=run.ranks.device), run.model.config
    with torch.no_grad(), run.autocast():
        for batch in batches:
            sent += run.model(batch, router_weight(batch))[1][0]
    rows = run.ranks.sum(sent).sum() / config.num_experts_per_tok
    return config.num_experts * sent / rows**2


def pack_loss(run, network, batch, counts, balance=None):
    """Loss and metrics that one pack adds to its step; counts: the tokens and pairs of the step."""
    with run.autocast():
        logps, router = (network(batch), None) if balance is None else network(batch, router_weight(batch))
    loss, metrics = orpo_loss(logps, batch, run.flags.beta, *counts)
    if router is not None:
        balancing = balance @ router[1]
        loss = loss + run.model.config.router_aux_loss_coef * balancing
        metrics = torch.cat([loss.detach()[None], metrics[1:], balancing.detach()[None]])
    return loss * batch.share, metrics.double() * batch.share


@torch.no_grad()
def evaluate(run, step, epoch):
    """Metrics of the held-out pairs, logged, and with --generate_during_eval answers to some of their
    prompts."""
    batches, counts = run.packs(run.held_out, np.arange(len(run.held_out)))
    batches = [batch.to(run.ranks.device) for batch in batches]
    balance = balance_factors(run, batches) if "aux_loss" in run.names else None
    sums = sum(pack_loss(run, run.model, batch, counts, balance)[1] for batch in batches)
    values = [number(value) for value in run.ranks.sum(sums).tolist()]
    result = {f"eval_{name}": value for name, value in zip(run.names, values)}
    run.record({"step": step, "epoch": round(epoch, 6)} | result)
    run.log(result, step)
    shown = ", ".join(f"{text} {result[key]:.3f}" for key, text in SUMMARY.items() if result[key] is not None)
    run.ranks.say(f"evaluation at step {step}: {shown}")
    shown = min(run.flags.generate_during_eval, len(run.held_out))
    prompts = [run.held_out[i][0].tolist() for i in range(shown)]
    for prompt, answer in zip(prompts, answers_to(run, prompts, 128)):
        text = text_after(prompt, answer, run.tokenizer)
        run.record({"step": step, "prompt": run.tokenizer.decode(prompt), "answer": text}, "samples.jsonl")
        run.ranks.say(f"  {run.tokenizer.decode(prompt[-40:])!r} -> {text!r}")
    return result


def answers_to(run, prompts, max_new_tokens):
    """Greedy answers by the first rank, or by all that hold a part of the model."""
    if not prompts or not (run.ranks.first or run.flags.shard):
        return []
    torch.compiler.set_stance("force_eager")  # not a graph for each length
    try:
        with run.autocast():
            return continuations(run.model, prompts, max_new_tokens, run.tokenizer.stop_ids())
    finally:
        torch.compiler.set_stance("default")


def number(value):
    return value if math.isfinite(value) else None  # JSON has no NaN


def log_line(run, since, step, epoch, total):
    """Log the means over the steps since the last line -> the metrics, {} where none of these steps was
    finite."""
    *values, steps = run.ranks.sum(since.sums.clone()).tolist()
    seconds, spans = time.perf_counter() - since.clock - since.paused, np.concatenate(since.spans)
    since.clear()
    if not steps:
        return {}
    memory, gpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), ""
    if run.ranks.device.type == "cuda":
        memory, gpu = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name(run.ranks.device)
    metrics = {"step": step, "epoch": round(epoch, 6)}
    metrics |= {name: number(value / steps) for name, value in zip((*run.names, "grad_norm"), values)}
    metrics["learning_rate"] = learning_rate(run.flags, step - 1, total)
    metrics |= {"pairs_per_second": len(spans) / seconds, "tokens_per_second": int(spans.sum()) / seconds}
    metrics["peak_memory_gb"] = memory / 2**30
    peak = next((flops for name, flops in PEAK.items() if name in gpu and run.flags.dtype == "bfloat16"), None)
    if peak:
        flops = run.model.training_flops(torch.from_numpy(spans))
        metrics["mfu"] = flops / seconds / (peak * run.ranks.count)
    run.record(metrics)
    run.log(metrics, step)
    run.ranks.say("step {step}/{total} | loss {loss:.4f} | nll {nll_loss:.4f} | accuracy {rewards/accuracies:.3f} | "
                  "lr {learning_rate:.1e} | {pairs_per_second:.1f} pairs/s".format(total=total, **metrics))
    return metrics


def report_bad(run, since, step, limit):
    """Say which steps since the last look had no finite gradient; `limit` of them in a row end the run."""
    for bad in since.bad_steps(step):
        rows = run.pairs.rows[run.packs_of_step(bad)[0]].tolist()
        run.ranks.say(f"step {bad}: the loss or its gradient is not finite; the weights stay as they were. "
                      f"Rows: {rows}")
        if since.in_a_row >= limit:
            kept = ["There is no checkpoint yet", *checkpoints(run.flags.output_dir).values()]
            raise UserError(f"step {bad}: {since.in_a_row} steps in a row without a finite gradient; try a lower "
                            f"--learning_rate. {'Intact: ' * (len(kept) > 1)}{kept[-1]}")


def save_checkpoint(run, since, step):
    """Everything needed to go on from here, as checkpoint-N; of the older ones --save_total_limit stay."""
    sums, flags, states = run.ranks.sum(since.sums.clone()).tolist(), run.flags, run.optimizer.state
    weights = run.gather((run.trained() if flags.lora_r else dict(run.model.named_parameters())).items())
    moments = run.gather((f"{key}.{name}", value) for name, parameter in run.trained().items()
                         for key, value in states[parameter].items())

    def fill(folder):
        if flags.lora_r:
            write_tensors(folder, "adapters", weights)
        else:
            run.model.save_pretrained(folder, torch.float32, weights)
        write_tensors(folder, "optimizer", moments)
        run.tokenizer.save_pretrained(folder)
        state = {"step": step, "in_a_row": since.in_a_row, "window": sums, "data": run.fingerprint,
                 "file_dtype": str(run.model.file_dtype)[6:], "clock": run.tokenizer.clock.isoformat()}
        write_json(os.path.join(folder, "train_config.json"), asdict(flags))
        write_json(os.path.join(folder, "state.json"), state)
        write_json(os.path.join(folder, "manifest.json"), digests(folder))

    if run.ranks.first:
        flush(os.path.join(flags.output_dir, "metrics.jsonl"))
        run.directory.write(fill, f"checkpoint-{step}")
        old = [os.path.basename(path) for path in checkpoints(flags.output_dir).values()]
        run.directory.discard(old[: -flags.save_total_limit] if flags.save_total_limit else [])
    run.ranks.sum(torch.zeros(1))  # all wait until it is written: torchrun ends the others when one has ended


class Stop:
    """SIGTERM and SIGINT ask for the end: the step in hand is finished first. A second SIGINT ends at
    once."""

    signal = 0

    def __init__(self):
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step and saving it; Ctrl-C ends at once\n")

    def agreed(self, ranks):
        """The signal that any rank has received, the same on all."""
        number = torch.tensor(self.signal)
        if ranks.count > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


def reporter(flags, ranks):
    """log(metrics, step) for --report_to."""
    name, kind = flags.run_name or os.path.basename(os.path.abspath(flags.output_dir)), flags.report_to
    if kind == "none" or not ranks.first:
        return lambda metrics, step: None
    with where(f"--report_to {kind} cannot start (pip install {kind})"):
        if kind == "wandb":
            import wandb

            wandb.init(project=os.environ.get("WANDB_PROJECT", "orpo"), name=name, config=asdict(flags))
            return lambda metrics, step: wandb.log(metrics, step=step)
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(os.path.join(flags.output_dir, "runs", name))
    return lambda metrics, step: [writer.add_scalar(key, value or 0, step) for key, value in metrics.items()]


# -----------------------------------------------------------------------------------------------------------
# The final model.


def model_card(flags, results):
    """README.md for the hub: method, beta, data, final metrics."""
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in results.items() if value is not None)
    base = f"base_model: {flags.model}\n" if flags.model and not os.path.exists(flags.model) else ""
    sources = [os.path.basename(path) if os.path.exists(path) else path for path in flags.data]
    return (f"---\n{base}tags: [orpo]\n---\n# {flags.push_to_hub.split('/')[-1]}\n\nTrained from "
            f"`{os.path.basename(flags.model) or 'random weights'}` with ORPO (Odds Ratio Preference Optimization, "
            f"[arXiv 2403.07691](https://arxiv.org/abs/2403.07691)), beta {flags.beta:g}, learning rate "
            f"{flags.learning_rate:g}, {flags.batch_size} pairs a step, on "
            f"`{', '.join(sources) or 'generated pairs'}`.\n\n| metric | value |\n| --- | --- |\n{rows}\n")


def write_model(run, results):
    """The model and its tokenizer in --output_dir, and on the hub with --push_to_hub."""
    flags, weights = run.flags, run.gather(run.model.named_parameters())

    def fill(folder):
        dtype = getattr(torch, flags.save_dtype) if flags.save_dtype else run.model.file_dtype
        run.model.save_pretrained(folder, dtype, weights)
        run.tokenizer.save_pretrained(folder)
        if flags.lora_r:
            adapter = os.path.join(folder, "adapter")
            run.model.save_adapters(adapter, weights, flags.model, flags.lora_r, flags.lora_alpha)
        if flags.push_to_hub:
            Path(folder, "README.md").write_text(model_card(flags, results), encoding="utf-8")

    if not run.ranks.first:
        return
    names = run.directory.write(fill)
    kept = {*names, *RECORDS, *map(os.path.basename, checkpoints(flags.output_dir).values())}
    run.directory.discard(set(run.directory.there()) - kept)  # an older model's, such as shards
    if flags.push_to_hub:
        from huggingface_hub import HfApi

        with where(f"--push_to_hub {flags.push_to_hub}", f"not uploaded; the model is in {flags.output_dir}"):
            HfApi().create_repo(flags.push_to_hub, exist_ok=True)
            upload = dict(repo_id=flags.push_to_hub, allow_patterns=names)
            HfApi().upload_folder(folder_path=flags.output_dir, **upload)
        run.ranks.say(f"Uploaded to {flags.push_to_hub}.")


def summarise(run, before, after):
    """A table of the held-out metrics, the demo's exact answers, and the next command."""
    demo, say, out = not run.flags.model, run.ranks.say, run.flags.output_dir
    if after:
        say(f"\n{'on held-out pairs':24}" + f"{'before':>11}" * bool(before) + f"{'after':>11}")
        for key, name in SUMMARY.items():
            columns = [values[key] or math.nan for values in (before, after) if values]
            say(f"{name:24}" + "".join(f"{value:11.3f}" for value in columns))
    if demo:
        held_out = [[part.tolist() for part in run.held_out[i]] for i in range(len(run.held_out))]
        answers = answers_to(run, [prompt for prompt, _, _ in held_out], 32)
        right = [answer == chosen[:-1] for answer, (_, chosen, _) in zip(answers, held_out)]
        share = sum(right) / max(1, len(right))
        say(f"{'exact greedy answers':24}" + " " * 11 * bool(before) + f"{share:11.3f}")
    say(f"\nThe model is in {out}, its metrics in {os.path.join(out, RECORDS[0])}. Next:\n    python sample.py "
        f"--model {out}" + ' --prompt "Which is larger, 12 or 90?"' * demo)


# -----------------------------------------------------------------------------------------------------------
# The run.


def main(arguments):
    """Train as the command line says -> exit status. Raises UserError."""
    # -- the directory, the pairs, the model
    flags, given = parse(arguments)
    ranks = Ranks(flags.ddp_timeout)
    flags, directory, checkpoint = start_up(flags, given, ranks)
    device, source = ranks.device, checkpoint or flags.model
    if not source:
        ranks.say("No --model and no --data: the demo, a tiny decoder learns which of two numbers is larger.")
    tokenizer = data.demo_tokenizer()
    if source:
        tokenizer = data.Tokenizer.from_pretrained(source, revision=flags.revision)
    if checkpoint:
        with where(checkpoint, "state.json"):
            state = read_json(os.path.join(checkpoint, "state.json"))
            tokenizer.clock = datetime.fromisoformat(state["clock"])
    model = load_model(flags, checkpoint, tokenizer)  # its weights later: what cannot be is said first
    pairs, held_out = load_pairs(flags, tokenizer, ranks) if ranks.first else (None, None)
    if flags.dry_run:
        ranks.say(data.describe(pairs, tokenizer, flags.prompt_loss) if ranks.first else "")
        return 0
    pairs, held_out = share_pairs(pairs, ranks), share_pairs(held_out, ranks)
    everything = [pairs, held_out] if held_out else [pairs]
    check_fit(flags, model, everything)
    parameters = sum(p.numel() for p in model.parameters())
    usual = 2e-4 if flags.lora_r else min(1e-3, 5e-6 * math.sqrt(7e9 / parameters))
    flags.learning_rate = flags.learning_rate or usual
    flags.dtype = flags.dtype or ("bfloat16" if has_bfloat16(device) else "float32")
    if device.type == "cuda" and flags.dtype == "bfloat16" and not has_bfloat16(device):
        raise UserError("--dtype bfloat16: this GPU has no bfloat16; use --dtype float32")
    per_epoch = math.ceil(len(pairs) / flags.batch_size)
    total = flags.max_steps or math.ceil(flags.num_train_epochs * per_epoch)
    eval_steps = max(1, total // 10) if flags.eval_steps is None else flags.eval_steps
    eval_steps = eval_steps if held_out else 0

    # -- on the device; what the parts of the loop share
    network = spread(model, flags, ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(flags, trained)
    asked = flags.output_router_logits or model.config.output_router_logits
    aux = bool(model.config.moe_layers) and asked and model.config.router_aux_loss_coef > 0
    fingerprint = [zlib.crc32(p.tokens.tobytes(), zlib.crc32(p.ends.tobytes())) for p in everything]
    run = Run(flags, ranks, directory, tokenizer, pairs, held_out, model, network, optimizer,
              METRICS + ("aux_loss",) * aux, fingerprint, reporter(flags, ranks))
    since = SinceLine(len(run.names), ranks)
    start = restore(checkpoint, run, since) if checkpoint else 0
    stop, last = Stop(), {}
    if ranks.first:
        begin_files(run, checkpoint, start)
    ranks.say(f"{parameters:,} parameters ({model.config.model_type}); {len(pairs)} pairs, {per_epoch} steps an "
              f"epoch, {total} steps; {flags.dtype} on {ranks.count} {device.type}; beta {flags.beta:g}, learning "
              f"rate {flags.learning_rate:.2g}" + f"; resumed after step {start}" * bool(checkpoint))
    before = after = evaluate(run, 0, 0.0) if eval_steps and not checkpoint else None
    if network is not model:  # DDP orders its sums anew after one backward, a resumed run's too
        batch = data.pack([pairs[0]], prompt_loss=flags.prompt_loss).to(device)
        balance = torch.zeros(model.config.num_experts, device=device) if aux else None
        pack_loss(run, network, batch, (1, 1), balance)[0].backward()
        optimizer.zero_grad(set_to_none=False)
    worker = ThreadPoolExecutor(1)  # packs the next step's pairs while this one is computed
    upcoming = worker.submit(run.packs_of_step, start + 1)
    hidden = None if ranks.first else True  # None: where no terminal is
    bar = tqdm(total=total, initial=start, desc="training", unit=" steps", disable=hidden)
    since.clock = time.perf_counter()

    # -- the loop
    for step in range(start + 1, total + 1):
        indices, epoch, batches, counts = upcoming.result()
        upcoming = worker.submit(run.packs_of_step, step + 1)
        batches = [batch.to(device) for batch in batches]
        balance = balance_factors(run, batches) if aux else None
        sums = torch.zeros(len(run.names), dtype=torch.float64, device=device)
        for batch in batches:
            # DDP: gradients meet in the last micro-step only, overlapping with its backward
            with network.no_sync() if network is not model and batch is not batches[-1] else nullcontext():
                loss, metrics = pack_loss(run, network, batch, counts, balance)
                # The ranks' gradients are averaged, here they add up. A loss that is not finite makes all so.
                loss.backward(torch.where(loss.isfinite(), float(ranks.count), torch.nan).to(loss.dtype))
            sums += metrics
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if flags.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, flags.max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(flags, step - 1, total)
        grad_norm = whole(norm)
        optimizer.found_inf = (~grad_norm.isfinite()).float()  # where it is 1, all stays as it is
        optimizer.step()
        optimizer.zero_grad(set_to_none=network is model)  # with DDP set to none, they would exist twice
        since.add(sums, grad_norm, pairs.spans()[indices])

        signalled = stop.agreed(ranks)
        logging = step % flags.logging_steps == 0 or step == total
        saving = flags.save_steps and (step % flags.save_steps == 0 or step == total) or signalled
        if logging or saving:
            report_bad(run, since, step, min(BAD_STEPS, total))
        if logging:
            last = log_line(run, since, step, epoch, total) or last
        pause = time.perf_counter()
        if eval_steps and (step % eval_steps == 0 or step == total):
            after = evaluate(run, step, epoch)
        saved = bool(saving) and not since.in_a_row  # no checkpoint of what may be poisoned
        if saved:
            save_checkpoint(run, since, step)
        since.paused += time.perf_counter() - pause
        bar.update()
        if signalled and step < total:
            bar.close()
            ranks.say(f"{signal.Signals(signalled).name}: stopped after step {step}{', which is saved' * saved}; "
                      f"go on with --resume --output_dir {flags.output_dir}")
            return 128 + signalled
    bar.close()
    worker.shutdown()
    write_model(run, last | (after or {}))
    summarise(run, before, after)
    return 0


def explain(error):
    """What to tell of an error that a lost rank caused; empty for any other."""
    lost = isinstance(error, dist.DistBackendError) or "gloo" in str(error)
    if not (lost and isinstance(error, RuntimeError) and dist.is_initialized()):
        return ""
    late = re.search("timed? ?out", str(error), re.I)
    reason = "it waited for --ddp_timeout" if late else "another rank has ended; see what that one says"
    return f"rank {dist.get_rank()} ends because {reason}"


if __name__ == "__main__":
    advice = "lower --max_tokens or add --gradient_checkpointing; neither changes the result"
    status = data.run_program("train.py", main, advice, explain)
    sys.stdout.flush()
    if status and status < 128:
        os._exit(status)  # at once: the other ranks may be gone or waiting
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
