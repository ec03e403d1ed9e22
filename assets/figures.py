"""The README's pictures and tables, from runs of train.py.  Needs matplotlib; `speed` also needs trl, transformers, datasets, accelerate.

    python assets/figures.py demo                              # the demo with beta 0, 0.1, 0.5, 1.0: sft_against_orpo.svg, beta.svg, a table
    python assets/figures.py real --model DIR --data FILE      # the same sweep on a pretrained model: beta_real.svg, a table
    python assets/figures.py ratio                             # the demo with a probability ratio in the odds ratio's place: ratio.svg, a table
    python assets/figures.py mask                              # the attention mask of two packed pairs: mask.svg
    python assets/figures.py speed --model DIR --data FILE     # train.py and TRL's ORPOTrainer in turn: speed.svg, a table
"""
import argparse
import json
import os
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
plt.rcParams.update({"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.titlecolor": GREY,
                     "svg.fonttype": "none", "svg.hashsalt": "orpo", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10})


def save(figure, name):
    figure.tight_layout()
    figure.savefig(HERE / name, transparent=True, metadata={"Date": None})
    print(f"wrote assets/{name}")


# train.py with -log sigmoid(log P_w - log P_l), a probability ratio, as the loss beside L_SFT
PROBABILITY_RATIO = """
import sys, orpo, train
orpo.odds_ratio_loss = lambda chosen, rejected: -orpo.F.logsigmoid(chosen - rejected)
sys.exit(train.main(*train.parse(sys.argv[1:])))
"""


def train(*arguments, program=(HERE.parent / "train.py",)):
    """Run train.py in a fresh directory; its metrics.jsonl as a list of dicts."""
    with tempfile.TemporaryDirectory() as out:
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        subprocess.run([sys.executable, *program, "--output_dir", out, "--save_steps", "0", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, env=environment)
        return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def sweep(arguments):
    """{beta: evaluation lines} and a table of both ends."""
    runs = {}
    print("| beta | chosen, before | chosen, after | rejected, before | rejected, after | accuracy | margin of log-probs |\n| --- | --- | --- | --- | --- | --- | --- |")
    for beta in BETAS:
        runs[beta] = [line for line in train("--beta", beta, *arguments) if "eval_loss" in line]
        a, b = runs[beta][0], runs[beta][-1]
        c, r = "eval_logps/chosen", "eval_logps/rejected"
        print(f"| {beta:g} | {a[c]:.3f} | {b[c]:.3f} | {a[r]:.3f} | {b[r]:.3f} | {b['eval_rewards/accuracies']:.3f} | {b[c] - b[r]:.3f} |", flush=True)
    return runs


def curves(axes, lines, title):
    for key, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        axes.plot([line["step"] for line in lines], [line[f"eval_logps/{key}"] for line in lines], color=colour, label=key, linewidth=2)
    axes.set(title=title, xlabel="step")


def draw_sweep(runs, name):
    figure, axes = plt.subplots(1, len(runs), figsize=(9, 2.8), sharey=True)
    for ax, (beta, lines) in zip(axes, runs.items()):
        curves(ax, lines, f"beta {beta:g}" + (" (SFT)" if beta == 0 else ""))
    axes[0].set_ylabel("mean log-prob, held out")
    axes[-1].legend(loc="lower right")
    save(figure, name)


def demo(args):
    runs = sweep(["--eval_steps", 25])
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3), sharey=True)
    curves(axes[0], runs[0.0], "SFT alone (beta 0)")
    curves(axes[1], runs[0.5], "ORPO (beta 0.5)")
    axes[0].set_ylabel("mean log-prob, held out")
    axes[1].legend(loc="lower right")
    save(figure, "sft_against_orpo.svg")
    draw_sweep(runs, "beta.svg")


def real(args):
    draw_sweep(sweep(["--model", args.model, "--data", args.data, "--eval_steps", 20, *args.rest]), "beta_real.svg")


def ratio(args):
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3), sharey=True)
    print("| contrast | chosen, after | rejected, after | accuracy |\n| --- | --- | --- | --- |")
    for ax, name, program in zip(axes, ("odds ratio", "probability ratio"), ((HERE.parent / "train.py",), ("-c", PROBABILITY_RATIO))):
        lines = [line for line in train("--beta", 1, "--eval_steps", 25, program=program) if "eval_loss" in line]
        curves(ax, lines, f"{name}, beta 1")
        end = lines[-1]
        print(f"| {name} | {end['eval_logps/chosen']:.3f} | {end['eval_logps/rejected']:.3f} | {end['eval_rewards/accuracies']:.3f} |", flush=True)
    axes[0].set_ylabel("mean log-prob, held out")
    axes[1].legend(loc="lower right")
    save(figure, "ratio.svg")


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
    ax.set(xlabel="key", ylabel="query", title="who sees whom: prefix, chosen branch, rejected branch", aspect="equal")
    ax.title.set_fontsize(9)
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
config = ORPOConfig(output_dir="unused", per_device_train_batch_size=batch, max_steps=steps, learning_rate=1e-5, max_length=1024, bf16=bool(bf16), gradient_checkpointing=False,
                    report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available())
InOrder(model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=config, processing_class=tokenizer, callbacks=[Clock()],
        train_dataset=Dataset.from_list([json.loads(line) for line in open(rows)])).train()
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([batch * (steps - 2) / (ends[-1] - ends[1]), peak / 2**30]))
"""


def speed(args):
    """Both on the same first rows, in turn, the first two steps left out; medians over the rounds."""
    from data import read_pairs

    cuda, results = torch.cuda.is_available(), {"TRL": [], "here": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "pairs.jsonl"
        kept = [row for row in read_pairs(args.data) if row["chosen"] != row["rejected"]][: args.batch_size * args.steps]
        rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
        for _ in range(args.rounds):
            done = subprocess.run([sys.executable, "-c", PEER, args.model, rows, str(args.batch_size), str(args.steps), str(int(cuda))], check=True, capture_output=True, text=True)
            results["TRL"].append(json.loads(done.stdout.splitlines()[-1]))
            lines = train("--model", args.model, "--data", rows, "--batch_size", args.batch_size, "--max_steps", args.steps, "--max_tokens", 16384, "--logging_steps", 1,
                          "--eval_pairs", 0, "--learning_rate", 1e-5, *args.rest)[2:]
            results["here"].append([statistics.median(line["pairs_per_second"] for line in lines), lines[-1]["peak_memory_gb"]])
            print({name: [f"{x:.2f}" for x in runs[-1]] for name, runs in results.items()}, flush=True)
    median = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in results.items()}
    (pairs_trl, memory_trl), (pairs, memory) = median["TRL"], median["here"]
    print(f"| | pairs/s | peak memory, GB |\n| --- | --- | --- |\n| TRL | {pairs_trl:.2f} | {memory_trl:.2f} |\n| here | {pairs:.2f} | {memory:.2f} |\n| ratio | {pairs / pairs_trl:.2f} | {memory / memory_trl:.2f} |")
    figure, axes = plt.subplots(1, 2, figsize=(6.5, 1.9))
    for ax, column, title in zip(axes, (0, 1), ("pairs per second", "peak memory, GB")):
        bars = ax.barh(list(median), [values[column] for values in median.values()], color=[GREY, CHOSEN])
        ax.bar_label(bars, fmt="%.2f", color=GREY, padding=2)
        ax.set(title=title, xlim=(0, 1.25 * max(values[column] for values in median.values())))
    save(figure, "speed.svg")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["demo", "real", "ratio", "mask", "speed"])
    p.add_argument("--model", help="directory or hub id")
    p.add_argument("--data", help="preference pairs")
    p.add_argument("--batch_size", type=int, default=8, help="of `speed`")
    p.add_argument("--steps", type=int, default=8, help="of `speed`")
    p.add_argument("--rounds", type=int, default=3, help="of `speed`")
    args, args.rest = p.parse_known_args()
    if args.what in ("real", "speed") and not (args.model and args.data):
        p.error(f"{args.what} needs --model and --data")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    {"demo": demo, "real": real, "ratio": ratio, "mask": mask, "speed": speed}[args.what](args)
