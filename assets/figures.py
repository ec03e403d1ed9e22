"""The README's pictures and tables, from runs of train.py.  Needs matplotlib; `speed` also needs trl,
transformers, datasets, accelerate.

    python assets/figures.py demo --seeds 3                 # the demo with four betas: beta.svg, a table
    python assets/figures.py real --model DIR --data FILE   # the same on a pretrained model: beta_real.svg
    python assets/figures.py mask                           # the attention mask of two packed pairs: mask.svg
    python assets/figures.py speed --model DIR --data FILE  # train.py and TRL's ORPOTrainer in turn: a table
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
BETAS = (0.0, 0.1, 0.5, 1.0)
GREY, CHOSEN, REJECTED = "#808080", "#2a9d8f", "#e76f51"  # readable on white and on black
matplotlib.use("svg")
PAINTED = "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"
plt.rcParams.update(dict.fromkeys(PAINTED, GREY))
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "orpo", "axes.spines.top": False,
                     "axes.spines.right": False, "legend.frameon": False, "font.size": 10})


def save(figure, name):
    figure.tight_layout()
    figure.savefig(HERE / name, transparent=True, metadata={"Date": None}, bbox_inches="tight")
    print(f"wrote assets/{name}")


def train(*arguments, keep=None):
    """Run train.py -> the evaluation and the other lines of its metrics.jsonl, and what it printed. In a
    fresh directory, or in `keep`, where a run that is there already is not made again."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(keep or scratch)
        log = out / "printed.txt"
        if not log.exists():
            command = sys.executable, HERE.parent / "train.py", "--output_dir", out, "--save_steps", 0
            words = [*map(str, command), *map(str, arguments)]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            log.write_text(done.stdout)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        printed = log.read_text()
    evaluations = [line for line in lines if "eval_loss" in line]
    steps = [line for line in lines if "loss" in line]
    return evaluations, steps, printed


def span(values):
    """Mean, and the range over several seeds where they differ."""
    mean, least, most = (f"{value:.2f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def sweep(name, args, *arguments):
    """The runs of each beta and seed: a table of their ends, a picture of mean and range on the way."""
    print("| beta | chosen, after | rejected, after | accuracy | right answers |")
    print("| --- | --- | --- | --- | --- |")
    figure, axes = plt.subplots(1, len(args.betas), figsize=(9, 2.9), sharey=True, squeeze=False)
    for ax, beta in zip(axes[0], args.betas):
        runs = []
        for seed in range(args.seeds):
            keep = args.runs and Path(args.runs, f"beta-{beta:g}-seed-{seed}")
            runs.append(train("--beta", beta, "--seed", seed, *arguments, *args.rest, keep=keep))
        ends = [evaluations[-1] for evaluations, _, _ in runs]
        keys = "logps/chosen", "logps/rejected", "rewards/accuracies"
        columns = [[end[f"eval_{key}"] for end in ends] for key in keys]
        found = [re.search(r"right greedy answers +([\d.]+)", text) for _, _, text in runs]
        right = [float(match[1]) for match in found if match]
        cells = [span(columns[0]), span(columns[1]), span(columns[2]), span(right) if right else "-"]
        print(f"| {beta:g}{' (SFT)' * (beta == 0)} | {' | '.join(cells)} |", flush=True)
        for key, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            steps = [line["step"] for line in runs[0][0]]
            values = [[line[f"eval_logps/{key}"] for line in evaluations] for evaluations, _, _ in runs]
            means, lows, highs = ([f(column) for column in zip(*values)] for f in (statistics.mean, min, max))
            ax.plot(steps, means, color=colour, label=key, linewidth=2)
            ax.fill_between(steps, lows, highs, color=colour, alpha=0.25, linewidth=0)
        ax.set(title=f"beta {beta:g}" + " (SFT)" * (beta == 0), xlabel="step")
    axes[0, 0].set_ylabel("mean log-prob, held out")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.09))
    save(figure, name)


def demo(args):
    sweep("beta.svg", args, "--eval_steps", 25)


def real(args):
    inputs = "--model", args.model, "--data", args.data
    sweep("beta_real.svg", args, *inputs, "--eval_steps", 20)


def mask(args):
    from data import pack

    batch = pack([([0] * 4, [0] * 3, [0] * 2), ([0] * 3, [0] * 2, [0] * 4)])
    T = len(batch.inputs)
    sees = torch.zeros(T, T)  # row: a query; filled from the segments that the GPU's attention is given
    for s in range(len(batch.cu_q) - 1):
        keys = batch.kv_index[batch.cu_k[s] : batch.cu_k[s + 1]]
        for query in range(batch.cu_q[s], batch.cu_q[s + 1]):
            last = len(keys) - (int(batch.cu_q[s + 1]) - query)
            sees[query, keys[: last + 1]] = 1 + int(batch.owner[query] % 3)
    colours = matplotlib.colors.ListedColormap(["#80808020", "#457b9d", CHOSEN, REJECTED])
    figure, ax = plt.subplots(figsize=(4.6, 4.6))
    ax.pcolormesh(sees.flip(0), cmap=colours, edgecolors="#80808040", linewidth=0.5)
    labels = []
    for pair, (p, c, r) in (("", (4, 3, 2)), ("'", (3, 2, 4))):
        labels += [f"p{i}{pair}" for i in range(p - 1)]
        for branch, n in (("c", c), ("r", r)):
            labels += [f"p{p - 1}{pair}"] + [f"{branch}{i}{pair}" for i in range(n - 1)]
    ax.set_xticks([i + 0.5 for i in range(T)], labels, rotation=90, fontsize=8)
    ax.set_yticks([T - i - 0.5 for i in range(T)], labels, fontsize=8)
    ax.set(xlabel="key", ylabel="query", title="who sees whom", aspect="equal")
    ax.title.set_fontsize(9)
    names = {"prefix": "#457b9d", "chosen branch": CHOSEN, "rejected branch": REJECTED}
    patches = [matplotlib.patches.Patch(color=colour, label=f"query in a {name}")
               for name, colour in names.items()]
    figure.legend(handles=patches, loc="lower center", ncols=3, fontsize=8, bbox_to_anchor=(0.5, -0.04))
    save(figure, "mask.svg")


PEER = """
import json, os, resource, sys, time
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
model, rows, batch, steps, bf16 = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
ends = []
class Clock(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        ends.append(time.perf_counter())
class InOrder(ORPOTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
config = ORPOConfig(output_dir=os.path.dirname(rows), per_device_train_batch_size=batch, max_steps=steps,
                    learning_rate=1e-5, max_length=1024, bf16=bool(bf16), gradient_checkpointing=False,
                    report_to=[], save_strategy="no", disable_tqdm=True,
                    use_cpu=not torch.cuda.is_available())
dataset = Dataset.from_list([json.loads(line) for line in open(rows)])
network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
InOrder(network, args=config, processing_class=tokenizer, callbacks=[Clock()], train_dataset=dataset).train()
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
print(json.dumps([batch * (steps - 2) / (ends[-1] - ends[1]), peak / 2**30]))
"""


def speed(args):
    """Both on the same first rows, in turn, the first two steps left out; medians over the rounds."""
    from data import read_pairs

    cuda, results = torch.cuda.is_available(), {"TRL": [], "here": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "pairs.jsonl"
        kept = [row for row in read_pairs(args.data) if row["chosen"] != row["rejected"]]
        kept = kept[: args.batch_size * args.steps]
        rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
        peer = sys.executable, "-c", PEER, args.model, rows, args.batch_size, args.steps, int(cuda)
        ours = {"model": args.model, "data": rows, "batch_size": args.batch_size, "max_steps": args.steps,
                "logging_steps": 1, "eval_pairs": 0, "learning_rate": 1e-5}
        for _ in range(args.rounds):
            done = subprocess.run([*map(str, peer)], check=True, capture_output=True, text=True)
            results["TRL"].append(json.loads(done.stdout.splitlines()[-1]))
            _, lines, _ = train(*(f"--{name}={value}" for name, value in ours.items()), *args.rest)
            rate = statistics.median(line["pairs_per_second"] for line in lines[2:])
            results["here"].append([rate, lines[-1]["peak_memory_gb"]])
            print({name: [f"{x:.2f}" for x in runs[-1]] for name, runs in results.items()}, flush=True)
    median = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in results.items()}
    (pairs_trl, memory_trl), (pairs, memory) = median["TRL"], median["here"]
    print("| | pairs/s | peak memory, GB |\n| --- | --- | --- |")
    print(f"| TRL | {pairs_trl:.2f} | {memory_trl:.2f} |\n| here | {pairs:.2f} | {memory:.2f} |")
    print(f"| ratio | {pairs / pairs_trl:.2f} | {memory / memory_trl:.2f} |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["demo", "real", "mask", "speed"])
    p.add_argument("--model", help="directory or hub id")
    p.add_argument("--data", help="preference pairs")
    p.add_argument("--seeds", type=int, default=1, help="of `demo` and `real`")
    p.add_argument("--betas", type=float, nargs="+", default=BETAS, help="of `demo` and `real`")
    p.add_argument("--runs", help="keep the runs of `demo` and `real` here, and take those that are here")
    p.add_argument("--batch_size", type=int, default=8, help="of `speed`")
    p.add_argument("--steps", type=int, default=8, help="of `speed`")
    p.add_argument("--rounds", type=int, default=3, help="of `speed`")
    args, args.rest = p.parse_known_args()
    if args.what in ("real", "speed") and not (args.model and args.data):
        p.error(f"{args.what} needs --model and --data")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    {"demo": demo, "real": real, "mask": mask, "speed": speed}[args.what](args)
