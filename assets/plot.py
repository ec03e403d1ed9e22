"""The curves of one or several runs over each other: loss, log-probabilities, accuracy, margin.  Needs
matplotlib.

    python assets/plot.py RUN [RUN ...] [--output curves.png]     # RUN: an --output_dir or its metrics.jsonl
"""
import argparse
import json
import sys
from pathlib import Path

PANELS = {"loss": ["loss"], "mean log-prob": ["logps/chosen", "logps/rejected"],
          "reward accuracy": ["rewards/accuracies"], "reward margin": ["rewards/margins"]}


def curve(lines, key):
    """(steps, values) of the lines that have the key."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return zip(*points) if points else ([], [])


def main():
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", default="curves.png", help="a .png, .svg or .pdf (default: curves.png)")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot.py: pip install matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2))
    for number, run in enumerate(args.runs):
        path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            sys.exit(f"plot.py: {path}: {error}")
        for ax, (title, keys) in zip(axes, PANELS.items()):
            for key, style in zip(keys, ("-", "--")):
                ax.plot(*curve(lines, key), style, color=f"C{number}", alpha=0.4)
                label = f"{Path(run).name} {key.partition('/')[2] if len(keys) > 1 else ''}".strip()
                ax.plot(*curve(lines, f"eval_{key}"), style, color=f"C{number}", marker=".", label=label)
            ax.set(title=f"{title} (dots: held out)", xlabel="step")
    for ax in axes:
        ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.output, dpi=150)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
