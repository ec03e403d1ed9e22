"""Train a model with ORPO: a script, in the order in which things happen.

    python train.py                                  # the built-in demo, on a CPU, in a minute
    python train.py --model MODEL --data FILE        # a Hugging Face directory or hub id, preference pairs
    torchrun --nproc_per_node=8 train.py --model MODEL --data FILE
    python train.py --resume                         # go on exactly where the newest checkpoint ended
    python train.py --model MODEL --eval_data FILE --max_steps 0      # evaluate without training
    python train.py --help                           # every flag, its default and unit

The trajectory does not depend on the hardware: a step is the next `batch_size` pairs of the epoch's order,
however many packs, micro-steps and ranks compute it, and its losses are sums divided once by the counts of
the whole step.
"""
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
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

# Before torch: threads that spin while they wait slow shared cores down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import FlagError, UserError, checked_flags, parse_flags, read_json, refuse, where, write_json
from model import Config, Transformer, assign, find_tensors, read_tensor, whole, write_tensors
from orpo import METRICS, orpo_loss
from sample import continuations

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
    chat_template: str = ""  # a file with a jinja template, in place of the model's own
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
    learning_rate: float = None  # AdamW's peak (default: 5e-6 sqrt(7e9 / parameters), to 1e-3; LoRA 2e-4)
    lr_scheduler_type: Literal["linear", "cosine", "inverse_sqrt", "constant"] = "linear"  # after the warmup
    warmup_steps: int = 0  # steps from 0 to the peak; over --warmup_ratio if positive
    warmup_ratio: float = 0.1  # the same as a fraction of all steps
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    num_train_epochs: float = 3.0  # passes over the pairs
    max_steps: int = None  # optimizer steps, over --num_train_epochs; 0: evaluate the model as it is, and end
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
    save_dtype: Literal["bfloat16", "float16", "float32", "float64"] = None  # final (default: as before)
    generate_during_eval: int = 2  # answers shown at each evaluation and kept in samples.jsonl
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # also log to
    push_to_hub: str = ""  # repository to upload the final model to, with a model card
    dry_run: bool = False  # read and tokenize, show what would be trained of the first pairs, and end
    debug: bool = False  # show tracebacks


MANY = 2**31
RANGES = dict(batch_size=(1, MANY), max_length=(2, MANY), max_prompt_length=(1, MANY), max_tokens=(1, MANY),
              logging_steps=(1, MANY), ddp_timeout=(1, 10**7), adam_beta1=(0, 0.9999), warmup_ratio=(0, 1),
              adam_beta2=(0, 0.999999), learning_rate=(1e-15, 1e3), adam_epsilon=(1e-30, 1),
              num_train_epochs=(1e-9, 1e9))
PACKED = "--batch_size counts a step's pairs; --max_tokens, without effect on the result, saves memory"
ELSEWHERE = {  # what other trainers call things
    "alpha": "it is --beta here", "lr": "it is --learning_rate here", "bf16": "it is --dtype bfloat16 here",
    "resume_from_checkpoint": "it is --resume here", "model_name_or_path": "it is --model here",
    "dataset_name": "it is --data here", "use_peft": "it is --lora_r 16 here",
    "max_completion_length": "a response takes what --max_length leaves",
    "per_device_train_batch_size": PACKED, "gradient_accumulation_steps": PACKED}
# What the demo sets where nothing is said: a tiny model needs a larger rate, and shows more at a larger beta.
DEMO = dict(learning_rate=2e-3, adam_beta2=0.98, beta=0.5, max_steps=500, max_length=64, logging_steps=50)
DEMO_SHAPE = dict(model_type="llama", hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
                  tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
RECORDS = ["metrics.jsonl", "samples.jsonl", "train_config.json"]
BAD_STEPS = 5  # this many steps in a row without a finite gradient end the run
# dense bf16 peak, operations per second (vendors' data sheets, without sparsity; H100: the SXM card)
PEAK = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def parse(arguments):
    """Command line -> (Flags, names of those that were given). FlagError where a value cannot be right."""
    flags, given = parse_flags(Flags, arguments, __doc__, RANGES, ELSEWHERE)
    resumed, prompt = flags.resume != "no", flags.max_prompt_length
    if not (flags.model or flags.data or resumed):
        flags = replace(flags, **{name: DEMO[name] for name in DEMO.keys() - given})
    rows, missing = flags.data or flags.max_steps == 0 and flags.eval_data, "data" if flags.model else "model"
    refuse(
        (not resumed and bool(flags.model) != bool(rows), f"--{missing} is missing: give both, or neither"),
        (prompt and prompt >= flags.max_length, f"--max_prompt_length {prompt}: must be below --max_length"),
        (resumed and flags.overwrite_output_dir, "--resume and --overwrite_output_dir contradict each other"),
        (flags.eval_pairs and flags.eval_data, "--eval_pairs and --eval_data: give one of the two"),
        (not flags.output_dir, "--output_dir is empty; name a directory"),
        (flags.resume == "yes" and not checkpoints(flags.output_dir),
         f"--resume: --output_dir {flags.output_dir} has no checkpoint"), kind=FlagError)
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
            if cuda:
                gpus = torch.cuda.device_count()
                refuse((local >= gpus, f"{gpus} GPUs here; torchrun --nproc_per_node={gpus}"))
                torch.cuda.set_device(self.device)
            if self.count > 1:
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", None, timedelta(0, timeout))

    def sum(self, tensor, operation=dist.ReduceOp.SUM):
        """The tensor's sum over the ranks, on all, in place; or another operation than the sum."""
        if self.count > 1:
            dist.all_reduce(tensor, operation)
        return tensor

    def of_first(self, values):
        """The first rank's 1-D integers, on all: the others add zeros to them."""
        values = torch.as_tensor(np.asarray(values if self.first else [], np.int64))
        found = torch.zeros(int(self.sum(torch.tensor(len(values)))), dtype=torch.int64)
        found[: len(values)] = values
        return self.sum(found).numpy()

    def say(self, text):
        if self.first:
            tqdm.write(text)  # above a progress bar


# -----------------------------------------------------------------------------------------------------------
# Files of a run: complete or absent, never half.


class RunDirectory:
    """--output_dir, locked against other runs. `.orpo` in it is the lock (until `record` is closed), and
    lists the names that runs wrote there: only these are ever replaced or removed."""

    def __init__(self, path):
        self.path = Path(path)
        with where(f"--output_dir {path} cannot be written to"):
            self.path.mkdir(parents=True, exist_ok=True)
            self.record = open(self.path / ".orpo", "a", encoding="utf-8")
            with where("another run is writing there; wait for it, or choose another"):
                fcntl.flock(self.record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            names = (self.path / ".orpo").read_text(encoding="utf-8").splitlines()
            self.names = {name for name in names if os.path.lexists(self.path / name)}

    def claim(self, names):
        """Before these are written: nothing may stand there that is not a run's."""
        for name in sorted(set(names) - self.names):
            refuse((os.path.lexists(self.path / name), f"{self.path / name} is from no run; move it away"))
            self.names.add(name)
            self.record.write(name + "\n")
        self.record.flush()

    def discard(self, names):
        """Remove those of the names that are a run's; at no time does half of a directory have its name."""
        trash = self.path / ".discarded"
        for path in [self.path / name for name in names if name in self.names]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(trash, ignore_errors=True)
                shutil.rmtree(path.rename(trash))
            else:
                path.unlink(missing_ok=True)

    def write(self, fill, name=""):
        """What fill(folder) writes appears, flushed and whole, as the directory `name`, or without one in
        this one. Returns the names of what was written."""
        folder = self.path / ".unfinished"
        try:
            with where(self.path / name, "could not be written; make room, then --resume"):
                shutil.rmtree(folder, ignore_errors=True)
                fill(folder)
                for path in [*folder.rglob("*"), folder]:
                    flush(path)
                written = {name: folder} if name else {path.name: path for path in folder.iterdir()}
                self.claim(written)
                for new, path in written.items():
                    self.discard([new] if path.is_dir() else [])  # no directory is replaced in one go
                    path.replace(self.path / new)
                flush(self.path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return [*written]


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
    names = [path.name for path in Path(output_dir).glob("checkpoint-*")]
    steps = sorted(int(name[11:]) for name in names if re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", name))
    return {step: os.path.join(output_dir, f"checkpoint-{step}") for step in steps}


def check_whole(directory):
    """UserError unless every file of a checkpoint is what was written, for the step it says."""
    manifest, state = (os.path.join(directory, name) for name in ("manifest.json", "state.json"))
    with where(directory):
        refuse((read_json(manifest) != digests(directory), "its files are not what was written"),
               (Path(directory).name != f"checkpoint-{read_json(state)['step']}", "of another step"))


def newest_checkpoint(flags):
    """The step of the newest checkpoint that is whole, 0 without one; damaged ones are reported."""
    for step, directory in reversed(checkpoints(flags.output_dir).items()):
        try:
            check_whole(directory)
            return step
        except UserError as error:
            print(f"a damaged checkpoint is passed over: {error}", file=sys.stderr)
    refuse((flags.resume == "yes", f"{flags.output_dir} has no whole checkpoint; start without --resume"))
    return 0


def cut_back(path, step):
    """Drop the lines of a .jsonl file that are later than `step`, and a last one that was cut off."""
    if os.path.exists(path):
        lines = re.findall(rb".*\n", Path(path).read_bytes())  # bytes: it may be cut inside a character
        steps = [re.match(rb'{"step": (\d+)', line) for line in lines]
        kept = [line for line, at in zip(lines, steps) if not at or int(at[1]) <= step]
        Path(f"{path}.tmp").write_bytes(b"".join(kept))
        os.replace(f"{path}.tmp", path)


# -----------------------------------------------------------------------------------------------------------
# The stages of a run before its loop.


def start_up(flags, given, ranks, directory):
    """This run's flags, of a resumed one those that its newest checkpoint records, and that checkpoint or "".
    Refused: ranks that differ, and to mix with a run that is there."""
    mine = {name: zlib.crc32(repr(value).encode()) for name, value in asdict(flags).items()}
    for name, theirs in zip(mine, ranks.of_first([*mine.values()])):
        refuse((mine[name] != theirs, f"--{name} differs between ranks: {getattr(flags, name)!r} on one"))
    (step,) = ranks.of_first([newest_checkpoint(flags) if ranks.first and flags.resume != "no" else 0])
    if step:
        checkpoint = os.path.join(flags.output_dir, f"checkpoint-{step}")
        return recorded_flags(flags, given, checkpoint, ranks), checkpoint
    names, out = directory.names if directory else set(), os.path.realpath(flags.output_dir)
    reads = [os.path.realpath(path) for path in (flags.model, *flags.data, *flags.eval_data) if path]
    lost = {os.path.relpath(path, out).split(os.sep)[0] for path in reads} & {".", *names}
    if names and (flags.resume == "no" or "config.json" in names):  # else stopped before its first checkpoint
        told = f"{flags.output_dir} holds a run; --resume goes on with it, --overwrite_output_dir discards it"
        refuse((not flags.overwrite_output_dir, told),
               (lost, f"--overwrite_output_dir would discard {flags.output_dir}, from which this run reads"))
    return flags, ""


def recorded_flags(flags, given, checkpoint, ranks):
    """The flags of a resumed run: as recorded, but for those given now that may change."""
    path = os.path.join(checkpoint, "train_config.json")
    recorded = read_json(path)
    for field in fields(Flags):
        name, value = field.name, getattr(flags, field.name)
        if name in given and name in recorded and value != recorded[name]:
            was = f"--{name} {value}: it was {recorded[name]}"
            refuse((not field.kw_only, f"{was}, and stays so when resumed; leave it out, or start afresh"))
            ranks.say(f"{was} up to here")
    if "num_train_epochs" in given or not recorded.get("max_steps"):
        recorded["max_steps"] = None  # it is not to outweigh what was asked for
    now = given | {"resume", "output_dir", "overwrite_output_dir", "config", "debug", "dry_run"}
    with where(path):
        return checked_flags(Flags, recorded | {name: getattr(flags, name) for name in now}, RANGES)


def load(flags, checkpoint):
    """Tokenizer and model, the latter without its weights: what cannot be is said before they are read."""
    source = checkpoint or flags.model
    tokenizer = data.demo_tokenizer()
    if source:
        tokenizer = data.Tokenizer.from_pretrained(source, revision=flags.revision)
    if checkpoint:  # templates see the day on which the run began
        path = os.path.join(checkpoint, "state.json")
        with where(path):
            tokenizer.clock = datetime.fromisoformat(read_json(path)["clock"])
    source = flags.model if flags.lora_r else source  # a checkpoint of adapters has no model
    if source:
        return tokenizer, Transformer.outline(source, revision=flags.revision)
    shape = DEMO_SHAPE | {"vocab_size": tokenizer.backend.get_vocab_size(), "eos_token_id": tokenizer.eos_id}
    return tokenizer, Transformer(Config.from_hf(shape), shape).initialise(flags.seed)


def use_template(flags, tokenizer, ranks, rows):
    """--chat_template, or what a model without one will be asked through: it is saved with the model."""
    talks, alpaca = any(isinstance(row["chosen"], list) for row in rows), "with the prompt in instruction"
    if flags.chat_template:
        with where(f"--chat_template {flags.chat_template}"):
            tokenizer.chat_template = Path(flags.chat_template).read_text(encoding="utf-8")
    elif tokenizer.has_template or not (talks or rows[0].form.endswith(alpaca)):
        return
    elif not talks:
        tokenizer.chat_template = "{{ bos_token }}" * tokenizer.adds_bos + data.ALPACA_TEMPLATE
    tokenizer.has_template = True
    name = flags.chat_template or ("<|user|> and <|assistant|> turns closed by EOS" if talks else "Alpaca's")
    ranks.say(f"chat template, saved with the model: {name}")


def load_pairs(flags, tokenizer, ranks):
    """Read and tokenize -> the pairs to train on, then those to evaluate on: --eval_data, or some held out.
    Where nothing is trained each file of --eval_data stands apart, the first also in place of --data."""
    show, alone = sys.stderr.isatty(), flags.max_steps == 0 and flags.eval_data
    sources = [[name] for name in flags.eval_data] if alone else [flags.data, flags.eval_data]
    named = [] if flags.data or alone else [("the demo", data.demo_pairs(6000))]
    for names in filter(None, sources):
        files = data.find_files(names)
        rows = data.read_pairs(files, prompt_column=flags.prompt_column, progress=show)
        found = [] if files == names else [os.path.join(*Path(path).parts[-2:]) for path in files]
        named.append((f"{', '.join(names)}{found or ''}: {rows[0].form}", rows))
    use_template(flags, tokenizer, ranks, [row for _, rows in named for row in rows])
    lengths = {name: getattr(flags, name) for name in ("max_length", "max_prompt_length", "truncation_mode")}
    parts = [data.tokenize_pairs(rows, tokenizer, progress=show, **lengths) for _, rows in named]
    for (name, _), pairs in zip(named, parts):
        ranks.say(f"{name}\n  {pairs.report}")
    if flags.eval_data:
        return [parts[0], *parts] if alone else parts
    pairs, count = parts[0], flags.eval_pairs
    count = min(200, len(pairs) // 10) if count is None else count
    refuse((count >= len(pairs), f"--eval_pairs {count}: of {len(pairs)} pairs some must be trained on"))
    order = np.random.default_rng(0).permutation(len(pairs))  # of the data alone: seeds can be compared
    return [pairs.select(np.sort(part)) for part in (order[count:], order[:count]) if len(part)]


def share_pairs(parts, ranks):
    """What the first rank read, on every rank: tokenizing is done once."""
    shared = []
    for i in range(*ranks.of_first([len(parts)])):
        arrays = (getattr(parts[i], name) if ranks.first else [] for name in ("tokens", "ends", "rows"))
        tokens, ends, rows = map(ranks.of_first, arrays)
        shared.append(data.Pairs(tokens.astype(np.int32), ends, rows))
    return shared


def check_fit(flags, model, parts, ranks):
    """Do pairs, model and flags go together?"""
    spans = np.concatenate([pairs.spans() for pairs in parts])
    longest, tree = int((spans[:, 0] + spans[:, 1:].max(1)).max()) + 1, int(spans.sum(1).max())
    largest, size = max(int(pairs.tokens.max()) for pairs in parts), model.config.vocab_size
    limit = model.max_positions or longest
    refuse(
        (largest >= size, f"token id {largest} in a vocabulary of {size}: tokenizer and model are no match"),
        (longest > limit, f"{longest} tokens in a model of {limit} positions; use --max_length {limit}"),
        (flags.max_tokens < tree, f"--max_tokens {flags.max_tokens}: the longest pair takes {tree} of them"))
    if longest > model.config.max_position_embeddings:
        ranks.say(f"note: sequences of {longest} tokens, for {model.config.max_position_embeddings} of which "
                  "the model was made; --max_length cuts them")


def spread(model, flags, ranks):
    """Load the weights on this rank's device -> the module that the loop calls: the model alone, copied to
    every rank (DDP), or with --shard spread over the ranks (FSDP2)."""
    if flags.lora_r:
        model.add_adapters(flags.lora_r, flags.lora_alpha)
    if flags.shard and ranks.count > 1:
        for module in (*model.model.layers, model):
            fully_shard(module, reshard_after_forward=True)
        register_fsdp_forward_method(model, "next_logits")
    if hasattr(model, "source"):
        half = flags.dtype == "bfloat16" and not flags.shard  # FSDP wants one dtype
        model.load(ranks.device, torch.bfloat16 if half else torch.float32)
    model.start_adapters(flags.seed)
    model.to(ranks.device)
    model.gradient_checkpointing = flags.gradient_checkpointing
    for block in model.model.layers if flags.compile else ():
        block.compile(dynamic=True)  # one graph for all blocks and all lengths of a pack
    if flags.shard or ranks.count == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def begin_files(run, checkpoint, start):
    """Before the first step: an overwritten run goes, a resumed one loses what is later than its start."""
    out = run.directory.path
    run.directory.discard([] if checkpoint else run.directory.names)
    names = [*RECORDS, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    run.directory.claim([*names, *run.tokenizer.files] + ["README.md"] * bool(run.flags.push_to_hub))
    (out / "metrics.jsonl").touch()
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_back(out / name, start)
    write_json(out / "train_config.json", asdict(run.flags))


# -----------------------------------------------------------------------------------------------------------
# Parts of the loop.


class Run:
    """What the parts of the loop share. network: the model, perhaps as DDP.  names: of the metrics that
    packs add to.  fingerprint: of the pairs.  held_out: what is evaluated, a list of Pairs.  trained: {name:
    parameter}.  signal: the number of one that came, or 0.

    Since the last line of metrics: sums (this rank's part) of the metrics, grad_norm and the steps with a
    finite gradient; indices of the pairs; clock, its time.  unseen: (step, its pairs, was it finite?) of the
    steps that report_bad has not looked at; in_a_row: how many up to there were not finite."""

    def __init__(self, flags, ranks, directory, tokenizer, model, parts, ending):
        self.flags, self.ranks, self.directory, self.tokenizer = flags, ranks, directory, tokenizer
        self.model, (self.pairs, *self.held_out), cuda = model, parts, ranks.device.type == "cuda"
        self.fingerprint = [zlib.crc32(p.tokens.tobytes(), zlib.crc32(p.ends.tobytes())) for p in parts]
        parameters = sum(p.numel() for p in model.parameters())
        usual = 2e-4 if flags.lora_r else min(1e-3, 5e-6 * math.sqrt(7e9 / parameters))
        flags.learning_rate = flags.learning_rate or usual
        self.total = steps_in_all(flags, len(self.pairs))
        self.eval_steps = max(1, self.total // 10) if flags.eval_steps is None else flags.eval_steps
        self.network = spread(model, flags, ranks)
        flags.save_dtype = flags.save_dtype or str(model.file_dtype).removeprefix("torch.")
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [dict(params=[p for p in self.trained.values() if p.ndim > 1]),
                  dict(params=[p for p in self.trained.values() if p.ndim <= 1], weight_decay=0.0)]
        betas, decay = (flags.adam_beta1, flags.adam_beta2), flags.weight_decay
        self.optimizer = torch.optim.AdamW(groups, 0.0, betas, flags.adam_epsilon, decay, fused=True)
        aux = flags.output_router_logits or model.config.output_router_logits
        self.names = METRICS + ("aux_loss",) * bool(aux and model.config.moe_layers)
        gpu = torch.cuda.get_device_name(ranks.device) if cuda and flags.dtype == "bfloat16" else ""
        self.peak = sum(flops for name, flops in PEAK.items() if re.search(rf"\b{name}\b", gpu))
        self.report = reporter(flags, ranks, ending)
        self.unseen, self.in_a_row, self.signal = [], 0, 0
        self.new_line()
        ranks.say(f"{parameters:,} parameters, {len(self.pairs)} pairs, {self.total} steps, {flags.dtype} on "
                  f"{ranks.count} {ranks.device.type}, beta {flags.beta:g}, rate {flags.learning_rate:.2g}")

    def new_line(self):
        self.sums = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=self.ranks.device)
        self.indices, self.clock = [], time.perf_counter()

    def ask(self, number, frame):
        """SIGTERM and SIGINT ask for the end: the step in hand is finished. A second SIGINT ends at once."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step and saving it; Ctrl-C ends at once\n")

    def autocast(self):
        # no cache: a forward uses each weight once, and cached casts of all would outlive their blocks
        on = self.flags.dtype == "bfloat16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=on, cache_enabled=False)

    def packs(self, pairs, indices):
        """This rank's packs of some pairs, and what losses are divided by: the tokens and pairs of all."""
        spans, prompt_loss = pairs.spans()[indices].sum(0), self.flags.prompt_loss
        batches = data.make_packs(pairs, indices, self.flags.max_tokens, rank=self.ranks.rank,
                                  ranks=self.ranks.count, prompt_loss=prompt_loss)
        counts = int(spans[1] + spans[0] * prompt_loss), len(indices)
        return [batch.to(self.ranks.device) for batch in batches], counts

    def gather(self, tensors):
        """{name: tensor}, whole and on the CPU, on the first rank; of a sharded model all give their part."""
        if not (self.ranks.first or self.flags.shard):
            return {}
        full = ((name, whole(tensor.detach())) for name, tensor in tensors)
        return {name: tensor.cpu() for name, tensor in full if self.ranks.first}

    def record(self, file, values):
        """Append a line to a file of --output_dir. JSON has no NaN: null."""
        odd = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if self.ranks.first:
            path = self.directory.path / file
            with where(path, "make room, then --resume"), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values | dict.fromkeys(odd), ensure_ascii=False) + "\n")


def steps_in_all(flags, pairs):
    steps = math.ceil(flags.num_train_epochs * math.ceil(pairs / flags.batch_size))
    return steps if flags.max_steps is None else flags.max_steps


def learning_rate(flags, step, total):
    """For step 0 .. total - 1. Warmup reaches the peak in its last step; the shapes after it are
    transformers'."""
    warmup = flags.warmup_steps or math.ceil(flags.warmup_ratio * total)
    if step < warmup:
        return flags.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    scale = warmup or 10_000
    shapes = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0,
              "inverse_sqrt": math.sqrt(scale / (scale + step - warmup))}
    return flags.learning_rate * shapes[flags.lr_scheduler_type]


def router_weight(batch):
    """How often each position counts in the router's statistics: prompts twice, as in two plain sequences."""
    return torch.where(batch.owner % 3 == 0, 2.0, 1.0) * batch.share


def balance_factors(run, batches):
    """Mixtures of experts: the balance loss E sum_e f_e P_e needs the step's fractions f of tokens sent to
    each expert before any gradient: a forward pass of its own. -> (E,), what to multiply the sums of
    probabilities with; None without that loss."""
    if "aux_loss" not in run.names:
        return None
    sent, config = torch.zeros(run.model.config.num_experts, device=run.ranks.device), run.model.config
    with torch.no_grad(), run.autocast():
        for batch in batches:
            sent += run.model(batch, router_weight(batch))[1][0]
    rows = run.ranks.sum(sent).sum() / config.num_experts_per_tok
    return config.num_experts * sent / rows**2


def pack_loss(run, network, batch, counts, balance):
    """Loss and metrics that one pack adds to its step; counts: the tokens and pairs of the step."""
    with run.autocast():
        logps, router = (network(batch), None) if balance is None else network(batch, router_weight(batch))
    loss, metrics = orpo_loss(logps, batch, run.flags.beta, *counts)
    if router is not None:
        balancing = balance @ router[1]
        loss = loss + run.model.config.router_aux_loss_coef * balancing
        metrics = torch.cat([loss.detach()[None], metrics[1:], balancing.detach()[None]])
    return loss * batch.share, metrics.double() * batch.share


def in_short(result):
    """What people look at in an evaluation: {label: number}."""
    result = {key: math.nan if value is None else value for key, value in result.items()}  # a file's null
    chosen, rejected = result["eval_logps/chosen"], result["eval_logps/rejected"]
    return {"log-prob chosen": chosen, "log-prob rejected": rejected, "margin": chosen - rejected,
            "reward accuracy": result["eval_rewards/accuracies"]}


@torch.no_grad()
def evaluate(run, step, epoch):
    """Log the metrics of the held-out pairs, and, if asked for, answers to their first prompts."""
    for number, pairs in enumerate(run.held_out):
        batches, counts = run.packs(pairs, np.arange(len(pairs)))
        balance = balance_factors(run, batches)
        sums = sum(pack_loss(run, run.model, batch, counts, balance)[1] for batch in batches)
        result = {f"eval_{name}": value for name, value in zip(run.names, run.ranks.sum(sums).tolist())}
        file = {"eval_data": run.flags.eval_data[number]} if len(run.held_out) > 1 else {}
        run.record("metrics.jsonl", {"step": step, "epoch": round(epoch, 6)} | file | result)
        run.report(result, step)
        shown = ", ".join(f"{label} {value:.3f}" for label, value in in_short(result).items())
        run.ranks.say(f"eval {step} | {shown}" + "".join(f"\n    on {name}" for name in file.values()))
        for prompt, answer in answers_to(run, pairs, run.flags.generate_during_eval, 128):
            asked, text = run.tokenizer.decode(prompt), run.tokenizer.decode(answer, after=prompt)
            run.record("samples.jsonl", {"step": step, "prompt": asked, "answer": text})
            run.ranks.say(f"  {asked[-30:]!r:.44} -> {text!r:.50}")


def answers_to(run, pairs, count, max_new_tokens):
    """(prompt, greedy answer) of the first pairs, by the first rank, or by all that hold a part of the model;
    elsewhere none."""
    prompts = [pairs[i][0].tolist() for i in range(min(count, len(pairs)))]
    if not prompts or not (run.ranks.first or run.flags.shard):
        return []
    with torch.compiler.set_stance("force_eager"), run.autocast():  # not a graph for each length
        return list(zip(prompts, continuations(run.model, prompts, max_new_tokens, run.tokenizer.stop_ids())))


def log_line(run, step, epoch):
    """Log the means over the steps since the last line; nothing where none of these was finite."""
    *sums, steps = run.ranks.sum(run.sums).tolist()
    seconds, spans = time.perf_counter() - run.clock, run.pairs.spans()[np.concatenate(run.indices)]
    run.new_line()
    if not steps:
        return
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    metrics = {"step": step, "epoch": round(epoch, 6)}
    metrics |= {name: value / steps for name, value in zip((*run.names, "grad_norm"), sums)}
    metrics |= {"learning_rate": learning_rate(run.flags, step - 1, run.total),
                "pairs_per_second": len(spans) / seconds, "tokens_per_second": int(spans.sum()) / seconds,
                "peak_memory_gb": (torch.cuda.max_memory_allocated() or resident) / 2**30}
    if run.peak:
        flops_per_second = run.model.training_flops(torch.from_numpy(spans)) / seconds
        metrics["mfu"] = flops_per_second / (run.peak * run.ranks.count)
    run.record("metrics.jsonl", metrics)
    run.report(metrics, step)
    shown = ("step {step}/{total} | loss {loss:.4f}, nll {nll_loss:.4f}, margin {margin:.3f}, accuracy "
             "{rewards/accuracies:.3f}, lr {learning_rate:.0e}, {pairs_per_second:.1f} pairs/s")
    margin = metrics["logps/chosen"] - metrics["logps/rejected"]
    run.ranks.say(shown.format(total=run.total, margin=margin, **metrics))


def report_bad(run):
    """Say which steps since the last look had no finite gradient; BAD_STEPS of them in a row end the run.
    Here the host waits for the device."""
    for step, indices, finite in run.unseen:
        run.in_a_row = 0 if finite else run.in_a_row + 1
        if not finite:
            rows = run.pairs.rows[indices].tolist()
            run.ranks.say(f"step {step}: no finite gradient, the weights stay as they are; rows {rows}")
            kept = ", ".join(checkpoints(run.flags.output_dir).values()) or "none"
            refuse((run.in_a_row >= min(BAD_STEPS, run.total), f"step {step}: {run.in_a_row} such steps in a "
                    f"row; try a lower --learning_rate. Checkpoints: {kept}"))
    run.unseen = []


def reporter(flags, ranks, ending):
    """report(metrics, step) for --report_to, under transformers' names: train/loss, eval/loss. The ExitStack
    `ending` closes what this opens, or its last lines would be lost."""
    name, kind = flags.run_name or os.path.basename(os.path.abspath(flags.output_dir)), flags.report_to
    if kind == "none" or not ranks.first:
        return lambda metrics, step: None
    with where(f"--report_to {kind} cannot start (pip install {kind})"):
        if kind == "wandb":
            import wandb

            project = os.environ.get("WANDB_PROJECT", "orpo")
            log = ending.enter_context(wandb.init(project=project, name=name, config=asdict(flags))).log
        else:
            from torch.utils.tensorboard import SummaryWriter

            writer = ending.enter_context(SummaryWriter(os.path.join(flags.output_dir, "runs", name)))

    def report(metrics, step):
        evaluated = "eval_loss" in metrics
        named = {f"eval/{key[5:]}" if evaluated else f"train/{key}": metrics[key] for key in metrics}
        if kind == "wandb":
            return log(named, step=step)
        for key, value in named.items():
            writer.add_scalar(key, value, step)

    return report


# -----------------------------------------------------------------------------------------------------------
# Checkpoints and the final model.


def save_checkpoint(run, step):
    """Everything needed to go on from here, as checkpoint-N; of the older ones --save_total_limit stay."""
    flags, trained, moments = run.flags, run.trained, run.optimizer.state
    state = {"step": step, "window": run.ranks.sum(run.sums.clone()).tolist(), "data": run.fingerprint,
             "clock": run.tokenizer.clock.isoformat()}
    weights = run.gather(() if flags.lora_r else run.model.named_parameters())
    tensors = {f"{key}.{name}": value for name, p in trained.items() for key, value in moments[p].items()}
    adapters = {f"adapter.{name}": p for name, p in trained.items()} if flags.lora_r else {}
    tensors = run.gather((tensors | adapters).items())

    def fill(folder):
        if weights:
            run.model.save_pretrained(folder, torch.float32, weights)
        write_tensors(folder, "optimizer", tensors)
        run.tokenizer.save_pretrained(folder)
        write_json(folder / "train_config.json", asdict(flags))
        write_json(folder / "state.json", state)
        write_json(folder / "manifest.json", digests(folder))

    if run.ranks.first:
        flush(run.directory.path / "metrics.jsonl")
        run.directory.write(fill, f"checkpoint-{step}")
        old = [os.path.basename(path) for path in checkpoints(flags.output_dir).values()]
        run.directory.discard(old[: -flags.save_total_limit] if flags.save_total_limit else [])
    run.ranks.sum(torch.zeros(1))  # all wait until it is written: torchrun ends the others when one has ended


def restore(checkpoint, run):
    """What a checkpoint has beside the model: the optimizer's state, adapters, the sums of the open line of
    metrics -> the steps done."""
    device = run.ranks.device
    with where(checkpoint, "cannot be resumed from; remove it to go back to the one before it"):
        stored = find_tensors(checkpoint, "optimizer")
        state = read_json(os.path.join(checkpoint, "state.json"))
        refuse((state["data"] != run.fingerprint, "the pairs are not those that this run was started with"))
        run.sums += torch.tensor(state["window"], dtype=torch.float64, device=device) * run.ranks.first
        for name, parameter in run.trained.items():
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            run.optimizer.state[parameter] = moments = {"step": torch.zeros((), device=device)} | moments
            for key, value in (moments | ({"adapter": parameter.data} if run.flags.lora_r else {})).items():
                assign(value, read_tensor(*stored[f"{key}.{name}"], value.shape))
        run.ranks.say(f"going on after step {state['step']}")
        return int(state["step"])


def model_card(flags, logged):
    """README.md for the hub: method, beta, data, final metrics."""
    last = {key: value for line in logged for key, value in line.items() if value is not None}
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in last.items())
    names = [os.path.basename(path) if os.path.exists(path) else path for path in (flags.model, *flags.data)]
    return (f"---\ntags: [orpo]\n---\nTrained with [ORPO](https://arxiv.org/abs/2403.07691) from {names[0]} "
            f"on {', '.join(names[1:])}: beta {flags.beta:g}, learning rate {flags.learning_rate:g}, "
            f"{flags.batch_size} pairs a step.\n\n| metric | value |\n| --- | --- |\n{rows}\n")


def write_model(run, logged):
    """The model and its tokenizer in --output_dir, and on the hub with --push_to_hub. logged: all metrics."""
    flags, directory, weights = run.flags, run.directory, run.gather(run.model.named_parameters())

    def fill(folder):
        run.model.save_pretrained(folder, getattr(torch, flags.save_dtype), weights)
        run.tokenizer.save_pretrained(folder)
        if flags.lora_r:
            run.model.save_adapters(folder / "adapter", weights, flags.model, flags.lora_r, flags.lora_alpha)
        if flags.push_to_hub:
            (folder / "README.md").write_text(model_card(flags, logged), encoding="utf-8")

    if run.ranks.first:
        names = directory.write(fill)
        kept = {*names, *RECORDS, *(f"checkpoint-{step}" for step in checkpoints(flags.output_dir))}
        directory.discard(directory.names - kept)  # an older model's, such as shards
    if run.ranks.first and flags.push_to_hub:
        with where(f"--push_to_hub {flags.push_to_hub}", f"not done; the model is in {flags.output_dir}"):
            from huggingface_hub import create_repo, upload_folder

            create_repo(flags.push_to_hub, exist_ok=True)
            upload_folder(repo_id=flags.push_to_hub, folder_path=flags.output_dir, allow_patterns=names)


def summarise(run, logged, seconds):
    """A table of the held-out metrics, the demo's right answers, and the next command."""
    demo, say, out = not run.flags.model, run.ranks.say, run.flags.output_dir
    evaluated = [in_short(line) for line in logged if "eval_loss" in line]
    if evaluated:
        say(f"\n{'on held-out pairs':24}{'before':>11}{'after':>11}")
        for name, value in evaluated[0].items():
            say(f"{name:24}{value:11.3f}{evaluated[-1][name]:11.3f}")
    if demo and run.held_out:
        held_out, decode = run.held_out[0], run.tokenizer.decode
        answers = answers_to(run, held_out, len(held_out), 32)
        right = sum(data.demo_right(decode(prompt), decode(answer)) for prompt, answer in answers)
        say(f"{'right greedy answers':24}{right / len(held_out):22.3f}")
    say(f"\n{timedelta(seconds=round(seconds))} in all; the model and metrics.jsonl are in {out}. Next:"
        f"\n    python sample.py --model {out}" + ' --prompt "Name a number above 57."' * demo)


# -----------------------------------------------------------------------------------------------------------
# The run.


def main(arguments):
    """Train as the command line says -> exit status. Raises UserError."""
    flags, given = parse(arguments)
    ranks, begun = Ranks(flags.ddp_timeout), time.perf_counter()
    directory = RunDirectory(flags.output_dir) if ranks.first and not flags.dry_run else None
    with ExitStack() as ending:
        if directory:
            ending.enter_context(directory.record)  # the lock is given up with it
        # -- what can be wrong with flags, model and pairs, before any weights are read
        flags, checkpoint = start_up(flags, given, ranks, directory)
        cuda = ranks.device.type == "cuda"
        half = cuda and torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 emulates it
        flags.dtype = flags.dtype or ("bfloat16" if half else "float32")
        refuse((cuda and not half and flags.dtype == "bfloat16", "this GPU has no bfloat16; --dtype float32"))
        tokenizer, model = load(flags, checkpoint)
        parts = share_pairs(load_pairs(flags, tokenizer, ranks) if ranks.first else [], ranks)
        check_fit(flags, model, parts, ranks)
        if flags.dry_run:
            ranks.say(data.describe(parts[0], tokenizer, flags.prompt_loss))
            ranks.say(f"{steps_in_all(flags, len(parts[0]))} steps of {flags.batch_size} pairs")
            return 0

        # -- on the device
        run = Run(flags, ranks, directory, tokenizer, model, parts, ending)
        network, optimizer, trained = run.network, run.optimizer, [*run.trained.values()]
        start = restore(checkpoint, run) if checkpoint else 0
        signal.signal(signal.SIGTERM, run.ask)
        signal.signal(signal.SIGINT, run.ask)
        if ranks.first:
            begin_files(run, checkpoint, start)
        if not run.total or run.eval_steps and not checkpoint:
            evaluate(run, 0, 0.0)
        if not run.total:
            ranks.say(f"{time.perf_counter() - begun:.0f} seconds in all")
            return 0
        if network is not model:  # DDP orders its sums anew after one backward, a resumed run's too
            batch = data.pack([run.pairs[0]], prompt_loss=flags.prompt_loss).to(ranks.device)
            pack_loss(run, network, batch, (1, 1), balance_factors(run, [batch]))[0].backward()
            optimizer.zero_grad(set_to_none=False)
        run.clock = time.perf_counter()

        # -- the loop
        steps, hidden = range(start + 1, run.total + 1), None if ranks.first else True  # None: no terminal
        for step in tqdm(steps, "training", run.total, initial=start, unit=" steps", disable=hidden):
            indices, epoch = data.step_indices(len(run.pairs), flags.batch_size, flags.seed, step - 1)
            batches, counts = run.packs(run.pairs, indices)
            balance = balance_factors(run, batches)
            sums = torch.zeros(len(run.names), dtype=torch.float64, device=ranks.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(flags, step - 1, run.total)
            for batch in batches:
                # DDP: gradients meet in the last micro-step only, overlapping with its backward
                alone = network is not model and batch is not batches[-1]
                with network.no_sync() if alone else nullcontext():
                    loss, metrics = pack_loss(run, network, batch, counts, balance)
                    # Ranks' gradients are averaged, here they add up. A loss that is not finite makes all so.
                    loss.backward(torch.where(loss.isfinite(), float(ranks.count), torch.nan).to(loss.dtype))
                sums += metrics
            norm = whole(torch.nn.utils.get_total_norm([p.grad for p in trained]))
            if flags.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(trained, flags.max_grad_norm, norm)
            finite = norm.isfinite()
            optimizer.found_inf = (~finite).float()  # where it is 1, all stays as it is
            optimizer.step()
            optimizer.zero_grad(set_to_none=network is model)  # with DDP set to none, they would exist twice
            once = torch.stack([norm, finite]) / ranks.count  # the same on all
            run.sums += torch.where(finite, torch.cat([sums, once]), 0.0)
            run.unseen.append((step, indices, finite))
            run.indices.append(indices)

            signalled = int(ranks.sum(torch.tensor(run.signal), dist.ReduceOp.MAX))  # by any of the ranks
            logging = step % flags.logging_steps == 0 or step == run.total
            saving = flags.save_steps and (step % flags.save_steps == 0 or step == run.total) or signalled
            if logging or saving:
                report_bad(run)
            if logging:
                log_line(run, step, epoch)
            pause = time.perf_counter()
            if run.eval_steps and (step % run.eval_steps == 0 or step == run.total):
                evaluate(run, step, epoch)
            saved = bool(saving) and not run.in_a_row  # no checkpoint of what may be poisoned
            if saved:
                save_checkpoint(run, step)
            run.clock += time.perf_counter() - pause
            if signalled and step < run.total:
                ranks.say(f"{signal.Signals(signalled).name}: stopped after step {step}{', saved' * saved}; "
                          f"go on with --resume --output_dir {flags.output_dir}")
                return 128 + signalled
        logged = []
        for line in (directory.path / "metrics.jsonl").read_text().splitlines() if ranks.first else ():
            with suppress(ValueError):  # a line that somebody garbled
                logged.append(json.loads(line))
        write_model(run, logged)
        summarise(run, logged, time.perf_counter() - begun)
        return 0


def explain(error):
    """What to tell of an error that a lost rank or a missing compiler caused; empty for any other."""
    if re.match(r"torch\._(inductor|dynamo)", type(error).__module__):
        return f"--compile needs a C++ compiler, on a GPU Triton ({type(error).__name__}); leave it out"
    lost = isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.I)
    return "another rank has ended, see what it says, or is late beyond --ddp_timeout" if lost else ""


if __name__ == "__main__":
    advice = "lower --max_tokens or add --gradient_checkpointing; neither changes the result"
    status = data.run_program("train.py", main, advice, explain)
    sys.stdout.flush()
    if dist.is_initialized() and not 0 < status < 128:  # of a failed run the others may be gone or waiting
        dist.destroy_process_group()
    if "RANK" in os.environ:  # gloo's threads outlive that, and have aborted ranks when Python's end met them
        os._exit(status)
    sys.exit(status)
