"""What the project promises, tested.  python -m pytest -q

Tests against transformers and trl, or on ../shared/realdata, skip with a reason where those are missing; so do those that need a GPU.
"""
import ast
import copy
import dataclasses
import functools
import gzip
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import model as model_module
import orpo
import sample
import train
from data import demo_tokenizer, encode_pair, epoch_order, first_fit_decreasing, make_packs, pack, Pairs, read_json, read_pairs, spread, tokenize_pairs, Tokenizer, UserError
from model import _weight_files, Cache, Config, TargetLogps, Transformer, Tree
from orpo import closed_form, log_odds, METRICS, odds_ratio_loss, orpo_loss, SMALLEST

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
REAL, MODELS = SHARED / "realdata", SHARED / "realdata" / "models"
needs_shared = pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/realdata")
torch.set_num_threads(1)  # for tiny models the fastest, by far so where others share the cores


def tiny_llama(**more):
    """A decoder from random weights, small enough for anything."""
    shape = dict(model_type="llama", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return Transformer(Config.from_hf(shape | more)).initialise()


# ---------------------------------------------------------------------------------------------------------------------
# The loss

LOGPS = [-1e4, -300.0, -20.0, -2.0, -0.6931472, -0.1, -1e-3, -1e-7, -1e-12, -1e-20, -1e-29, 0.0]


def exact_log_odds(x):  # float64 with the stated clamp
    x = torch.as_tensor(x, dtype=torch.float64).clamp(max=-SMALLEST)
    return x - torch.log(-torch.expm1(x))


@pytest.mark.parametrize("x", LOGPS)
def test_log_odds_is_right_and_its_gradient_is_one_over_one_minus_p(x):
    logps = torch.tensor(x, requires_grad=True)
    value = log_odds(logps)
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact_log_odds(logps.detach()), rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(logps.grad.double(), 1 / -torch.expm1(logps.detach().double().clamp(max=-SMALLEST)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("chosen", LOGPS)
@pytest.mark.parametrize("rejected", LOGPS)
def test_loss_and_gradient_are_finite_and_right_everywhere(chosen, rejected):
    xs = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    loss = odds_ratio_loss(*xs)
    gradients = torch.autograd.grad(loss.sum(), xs)
    w, l = (exact_log_odds(x.detach()) for x in xs)
    torch.testing.assert_close(loss.detach().double(), torch.nn.functional.softplus(l - w, threshold=30), rtol=1e-5, atol=1e-7)
    delta = torch.sigmoid(l - w)  # Eq. 9
    for gradient, x, sign in zip(gradients, xs, (-1, 1)):  # Eq. 10
        expected = sign * delta / -torch.expm1(x.detach().double().clamp(max=-SMALLEST))
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-8)


def test_half_precision_log_probabilities_are_scored_in_fp32():
    assert log_odds(torch.tensor([-0.002], dtype=torch.bfloat16)).dtype == torch.float32
    assert log_odds(torch.tensor([-0.002], dtype=torch.bfloat16)).isfinite().all()


def test_gradient_towards_chosen_at_certainty_is_odds_of_rejected():
    chosen, rejected = torch.tensor(0.0, requires_grad=True), torch.tensor(-2.0)
    odds_ratio_loss(chosen, rejected).backward()
    assert chosen.grad.item() == pytest.approx(-np.exp(-2) / (1 - np.exp(-2)), rel=1e-5)


def test_peer_loses_what_we_keep_near_certainty():
    """The README's row on log-odds near certainty: TRL's two-branch formula has a NaN gradient there."""
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="trl is not installed")
    for x in (-1e-8, 0.0):
        theirs, ours = (torch.tensor(x, requires_grad=True) for _ in range(2))
        (theirs - trainer.log1mexp(theirs)).backward()
        log_odds(ours).backward()
        assert theirs.grad.isnan() and ours.grad.isfinite()


def some_pairs(count=6, vocab=50, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(vocab, size=rng.integers(low, 9)).tolist() for low in (1, 1, 1)) for _ in range(count)]


@pytest.mark.parametrize("prompt_loss", [True, False])
def test_orpo_loss_and_metrics_by_hand(prompt_loss):
    pairs, beta = some_pairs(), 0.3
    batch = pack(pairs, prompt_loss=prompt_loss)
    logps = -torch.rand(len(batch.inputs), generator=torch.Generator().manual_seed(1))
    if batch.scored is not None:
        logps = torch.zeros_like(logps).index_copy(0, batch.scored, logps[batch.scored])
    nll, tokens, rows, at = 0.0, 0, [], 0
    for prompt, chosen, rejected in pairs:
        parts = logps[at : at + len(prompt) - 1 + len(chosen) + len(rejected)].split([len(prompt) - 1, len(chosen), len(rejected)])
        at += sum(map(len, parts))
        nll -= parts[1].sum() + prompt_loss * parts[0].sum()
        tokens += len(chosen) + prompt_loss * (len(prompt) - 1)
        w, l = parts[1].mean(), parts[2].mean()
        log_or = torch.log(w.exp() / (1 - w.exp())) - torch.log(l.exp() / (1 - l.exp()))
        rows.append([torch.log(torch.sigmoid(log_or)), log_or, beta * w, beta * l, float(w > l), beta * (w - l), w, l])
    means = torch.tensor(rows).mean(0)
    loss, metrics = orpo_loss(logps, batch, beta, tokens, len(pairs))
    expected = torch.cat([torch.stack([nll / tokens - beta * means[0], nll / tokens]), means])
    torch.testing.assert_close(metrics, expected, rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_reward_accuracy_of_plain_sft():
    """The README's row on beta 0: the rewards are all 0 then, the accuracy is that of the log-probabilities."""
    batch = pack([([1, 2], [3], [4]), ([1], [2, 3], [5])])
    logps = torch.tensor([-1.0, -0.5, -0.7, -0.2, -0.3, -0.1])  # wins, loses
    metrics = dict(zip(METRICS, orpo_loss(logps, batch, 0.0, 4, 2)[1].tolist()))
    assert metrics["rewards/accuracies"] == 0.5 and metrics["rewards/margins"] == 0 and metrics["loss"] == metrics["nll_loss"]


def test_losses_of_packs_add_up_to_the_loss_of_the_step():
    pairs = some_pairs(9)
    tokens = sum(len(p) - 1 + len(c) for p, c, _ in pairs)
    model = tiny_llama()

    def total(groups):
        model.zero_grad()
        losses = []
        for group in groups:
            batch = pack([pairs[i] for i in group])
            loss, metrics = orpo_loss(model(batch), batch, 0.5, tokens, len(pairs))
            loss.backward()
            losses.append(metrics)
        return torch.stack(losses).sum(0), torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, gradient = total([range(9)])
    for groups in ([[0], [1, 2, 3], [4, 5, 6, 7, 8]], [[8, 0, 4], [1, 7], [2, 3, 5, 6]]):
        sums, other = total(groups)
        torch.testing.assert_close(sums, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_gradient_check_program():
    done = subprocess.run([sys.executable, HERE / "orpo.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "delta upside down" in done.stdout and "DISAGREES" not in done.stdout and "MUST NOT" not in done.stdout


def test_gradient_check_fails_when_it_should(monkeypatch, capsys):
    for wrong in (lambda w, l: [x * 1.001 for x in closed_form(w, l)], lambda w, l: [-x for x in closed_form(w, l)]):
        monkeypatch.setattr(orpo, "closed_form", wrong)
        assert orpo.main() == 1
    capsys.readouterr()


def test_spread_of_the_ratios_is_the_papers():
    assert orpo.ratio_spread() == pytest.approx([0.28, 1.41, 2.57], abs=0.02)  # Figure 6


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU (skipped elsewhere)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("more", [[], ["--compile"], ["--gradient_checkpointing"]])
def test_training_on_a_gpu(tmp_path, more):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, HERE / "train.py", "--output_dir", out, "--max_steps", "60", "--logging_steps", "20", *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


# ---------------------------------------------------------------------------------------------------------------------
# The README

README = (HERE / "README.md").read_text(encoding="utf-8")


def code_lines(path):
    """Lines with code: no blank lines, comments or docstrings."""
    text, lines = path.read_text(encoding="utf-8"), set()
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("module", ["data", "model", "orpo", "train", "sample"])
def test_readme_counts_the_lines(module):
    stated = re.search(rf"\| `{module}.py` \|.*\| (\d+) \|", README)
    assert int(stated[1]) == code_lines(HERE / f"{module}.py")


def test_readme_quotes_the_code():
    quoted = re.findall(r"^\| \([\d, ]+\) \|.*\| `(.+)` \|$", README, re.M)
    assert len(quoted) == 6
    source = (HERE / "orpo.py").read_text(encoding="utf-8")
    assert [line for line in quoted if line not in source] == []


def test_readme_flags_and_files_exist():
    known = {f"--{field.name}" for field in dataclasses.fields(train.Flags)} | {"--no-prompt_loss", "--help"}
    known |= set(re.findall(r'"(--\w+)"', (HERE / "sample.py").read_text() + (HERE / "assets/figures.py").read_text()))
    known |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - known) == []
    assert [file for file in re.findall(r"\]\((assets/[\w.]+)\)", README) if not (HERE / file).exists()] == []
    assert sorted(path.name for path in HERE.glob("*.*") if path.is_file() and not path.name.startswith(".")) == sorted(
        ["README.md", "requirements.txt", "model.py", "data.py", "orpo.py", "train.py", "sample.py", "test_orpo.py"])


# ---------------------------------------------------------------------------------------------------------------------
# Helpers

EOS, BOS = 256, 257  # of byte_tokenizer, whose other ids are one to a byte


def byte_tokenizer(*, post_processor=False, adds_bos=False, bos=True, template=None):
    backend = demo_tokenizer().backend
    backend.add_special_tokens(["<s>"])
    if post_processor:
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    specials = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} | ({"bos_token": "<s>"} if bos else {})
    return Tokenizer(backend, specials, adds_bos, template)


@functools.lru_cache(maxsize=None)
def real_tokenizer(name):
    return Tokenizer.from_pretrained(REAL / name)


@functools.lru_cache(maxsize=None)
def real_rows(name):
    return read_pairs(REAL / "pref" / name)


def put(path, content):
    """Write bytes, text, or objects as JSON lines; returns the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def user(text):
    return turn("user", text)


def assistant(text):
    return turn("assistant", text)


PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers against transformers

TOKENIZERS = ["models/slm4096-gpt2", "models/stories260K"] + [f"tokenizers/{name}" for name in ("gpt2", "minimind3", "phi3", "qwen2.5", "smollm")]
TEXTS = [
    "  Héllo naïve café e\u0301 ﬁ İ Å — 你好，世界！日本語テスト 한국어 🙂👩‍👩‍👧 \u00a0nbsp\u200b\u3000",
    "\n\n\nline\r\n\ttab   long          spaces   \n def f(x):\n    return x**2  it's WE'LL 12345 x1 ½①٣   ",
    " spaces   5   67 before digits\n\n  8",
    "<|endoftext|> <|im_start|>user\n<|im_end|> <s>a</s> </s>  y<|user|> \n hi<|end|>\n <unk>[PAD]<pad><tool_call> <think>▁▁<0x0A>",
    "",
]


@needs_shared
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_encode_as_transformers(name):
    transformers = pytest.importorskip("transformers")
    ours, theirs = real_tokenizer(name), transformers.AutoTokenizer.from_pretrained(REAL / name)
    if name == "tokenizers/smollm":
        # transformers 5 builds its GPT2Tokenizer class from the vocabulary and merges alone, and so loses the Digits splitter of
        # this tokenizer.json, with which the model was trained. The file is right: so did transformers 4, and so do we.
        assert "Digits" in str(ours.backend.pre_tokenizer)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(REAL / name / "tokenizer.json"))
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, truncation=False, padding=False).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@needs_shared
@pytest.mark.parametrize("name, files", [
    ("gpt2", ["vocab.json", "merges.txt", "config.json"]),
    ("smollm", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]),
])
def test_vocab_and_merges_alone_encode_as_transformers(name, files, tmp_path):
    transformers = pytest.importorskip("transformers")
    for file in files:
        os.symlink(REAL / "tokenizers" / name / file, tmp_path / file)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.eos_id, ours.adds_bos) == (theirs.eos_token_id, False)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


@needs_shared
def test_opt_like_tokenizer(tmp_path):
    """No tokenizer.json, add_bos_token, BOS = EOS, a pad token that only special_tokens_map.json names."""
    transformers = pytest.importorskip("transformers")
    words = [w for w in json.loads((REAL / "tokenizers/gpt2/vocab.json").read_text()) if w != "<|endoftext|>"]
    put(tmp_path / "vocab.json", json.dumps({w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}))
    os.symlink(REAL / "tokenizers/gpt2/merges.txt", tmp_path / "merges.txt")
    end = {"content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "__type": "AddedToken"}
    put(tmp_path / "tokenizer_config.json", json.dumps({"bos_token": end, "eos_token": end, "unk_token": end, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}))
    put(tmp_path / "special_tokens_map.json", json.dumps({"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}))
    ours, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a <pad></s> b <s>é"
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.adds_bos and ours.bos_id == ours.eos_id == 2 and theirs("a").input_ids[0] == 2


@needs_shared
def test_truncation_and_padding_in_a_tokenizer_file_are_switched_off():
    assert len(real_tokenizer("tokenizers/smollm").encode("a b " * 500)) > 900
    assert len(real_tokenizer("tokenizers/smollm").encode("a")) == 1


@needs_shared
@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("setting", [None, False, True])
def test_bos_where_the_tokenizer_itself_puts_one(post_processor, setting, tmp_path):
    """Its post-processor, which add_bos_token false does not switch off (nor in transformers 5), or add_bos_token true."""
    file = json.loads((REAL / "models/stories260K/tokenizer.json").read_text())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast"} | ({} if setting is None else {"add_bos_token": setting})
    put(tmp_path / "tokenizer.json", json.dumps(file if post_processor else file | {"post_processor": None}))
    put(tmp_path / "tokenizer_config.json", json.dumps(settings))
    assert Tokenizer.from_pretrained(tmp_path).adds_bos == bool(post_processor or setting)
    if not (setting and not post_processor):  # there transformers 5 ignores the setting, transformers 4 and we follow it
        transformers = pytest.importorskip("transformers")
        assert (transformers.AutoTokenizer.from_pretrained(tmp_path)("a").input_ids[0] == 1) == post_processor


@needs_shared
@pytest.mark.parametrize("name, eos, bos, adds_bos, template", [
    ("models/slm4096-gpt2", 0, 0, False, False), ("models/stories260K", 2, 1, True, False), ("tokenizers/gpt2", 50256, 50256, False, False),
    ("tokenizers/minimind3", 2, 1, False, True), ("tokenizers/phi3", 32000, 1, False, True), ("tokenizers/qwen2.5", 151643, None, False, True),
    ("tokenizers/smollm", 0, 0, False, False),
])
def test_special_tokens_of_real_tokenizers(name, eos, bos, adds_bos, template):
    tok = real_tokenizer(name)
    assert (tok.eos_id, tok.bos_id, tok.adds_bos, tok.has_template) == (eos, bos, adds_bos, template)


@needs_shared
@pytest.mark.parametrize("name, stops", [("tokenizers/qwen2.5", {151643, 151645}), ("tokenizers/minimind3", {2}), ("tokenizers/phi3", {32000, 32007}), ("models/stories260K", {2})])
def test_stop_ids_include_what_closes_a_turn(name, stops):
    assert real_tokenizer(name).stop_ids() == stops


@needs_shared
@pytest.mark.parametrize("name", TOKENIZERS)
def test_saved_tokenizer_is_the_same(name, tmp_path):
    tok = real_tokenizer(name)
    tok.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)  # onto itself: must not empty the files
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode(TEXTS[0]) == tok.encode(TEXTS[0]) and again.chat_template == tok.chat_template


def test_a_tokenizer_made_here_is_saved_whole(tmp_path):
    tok = demo_tokenizer()
    tok.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.eos_id == tok.eos_id and again.encode(TEXTS[0]) == tok.encode(TEXTS[0]) and again.chat_template == tok.chat_template


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates against transformers

TEMPLATES = ["chatml.json", "cohere.jinja", "gemma.jinja", "llama2.json", "llama3.jinja", "llama3_1.jinja", "mistral.json", "phi3.5.json", "phi3.jinja",
             "qwen2_5.jinja", "qwen2_5_training.jinja", "qwen3.jinja"]
SYSTEM, U1, A1, U2, A2 = turn("system", " Be brief. "), user("Hi <b>&amp;</b> 'q' \"d\"\n"), assistant("  Hello!\n"), user("你好 é 🙂"), assistant("日本語\n\n<think>\nhm\n</think>\n\nbien sûr </s>")
CALL = turn("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"città": "<Zürich>", "n": [1, None]}}}])
CONVERSATIONS = {
    "one turn": [U1], "answered": [U1, A1], "multi-turn": [U1, A1, U2, A2], "asked again": [U1, A1, U2],
    "system": [SYSTEM, U1], "system answered": [SYSTEM, U1, A1], "system multi-turn": [SYSTEM, U1, A1, U2, A2],
    "two users": [U1, U2], "assistant first": [A1, U1], "system twice": [SYSTEM, U1, A1, SYSTEM, U2], "system alone": [SYSTEM],
    "empty content": [user(""), assistant("")], "unknown role": [turn("critic", "x"), A1], "reasoning": [U1, assistant("4") | {"reasoning_content": "2+2\n"}],
    "tool call": [U1, CALL, turn("tool", "21°"), A1], "null keys": [U1 | {"tool_calls": None}, A1 | {"tool_calls": None, "name": None}],
}
SMALL_TEMPLATES = {  # one feature each
    "generation tag": "{% for m in messages %}{% set x = m.role %}{% generation %}{{ m.content }}{% set x = 'inner' %}{{ x }}{% endgeneration %}{{ x }}{{ loop.index }}\n{% endfor %}",
    "generation tag trims": "{%- for m in messages %}\n  {%- generation -%}\n  {{ m.content }}  \n  {%- endgeneration -%}\n  {% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages[0] | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': '<é>', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "strftime_now": "{{ strftime_now('%Y') }}{{ strftime_now(format='%d %b') }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ pad_token }}",
    "no tools": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ add_generation_prompt }}{{ custom is defined }}",
    "blocks trimmed": "  {% if true %}\n  a\n    {% endif %}\n{{ 'b' }}\n{# comment #}\nc\n",
    "raises": "{{ raise_exception('refused: ' + messages[0].role) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1).a }}",
    "broken": "{% for m in messages %}{{ m.content }}",
    "undefined attribute": "{{ messages[0].nothing.more }}",
}


def check_template(source):
    """Ours and transformers' rendering of `source` agree on every conversation, exceptions included."""
    transformers = pytest.importorskip("transformers")
    ours = byte_tokenizer(template=source)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours.backend, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    rendered = 0
    for name, messages in CONVERSATIONS.items():
        for generation in (False, True):
            try:
                expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=generation)
            except Exception as error:
                with pytest.raises(UserError, match=re.escape(str(error)[:40])):
                    ours.apply_chat_template(messages, generation)
            else:
                assert ours.apply_chat_template(messages, generation) == expected, (name, generation)
                rendered += 1
    return rendered


@needs_shared
@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_render_as_transformers(name):
    source = (REAL / "chat_templates" / name).read_text(encoding="utf-8")
    assert check_template(json.loads(source)["chat_template"] if name.endswith(".json") else source) >= 8


@pytest.mark.parametrize("name", SMALL_TEMPLATES)
def test_template_features_render_as_transformers(name):
    check_template(SMALL_TEMPLATES[name])


@needs_shared
@pytest.mark.parametrize("name", ["tokenizers/minimind3", "tokenizers/phi3", "tokenizers/qwen2.5"])
def test_tokenizers_with_a_template_render_as_transformers(name):
    transformers = pytest.importorskip("transformers")
    ours, theirs = real_tokenizer(name), transformers.AutoTokenizer.from_pretrained(REAL / name)
    theirs.eos_token = ours.specials["eos_token"]  # the phi3 directory has no tokenizer_config.json: we take EOS from config.json
    for row in real_rows("orca.conv_explicit.jsonl")[:40] + real_rows("dpo_en_demo.conv_explicit.jsonl")[:40]:
        for messages, generation in [(row["prompt"], True), (row["prompt"] + row["chosen"], False)]:
            assert ours.apply_chat_template(messages, generation) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


def tokenizer_directory(directory, template_file=None, **settings):
    demo_tokenizer().save_pretrained(directory)
    put(directory / "tokenizer_config.json", json.dumps({"eos_token": "<|endoftext|>", **settings}))
    if template_file is not None:
        put(directory / "chat_template.jinja", template_file)
    return Tokenizer.from_pretrained(directory)


def test_null_special_tokens_are_undefined_to_a_template(tmp_path):
    put(tmp_path / "config.json", json.dumps({"bos_token_id": 5}))
    tok = tokenizer_directory(tmp_path, bos_token=None, pad_token=None, chat_template="{{ bos_token is defined }} {{ pad_token is defined }} {{ eos_token }}")
    assert tok.apply_chat_template([U1]) == "False False <|endoftext|>"
    assert tok.bos_id is None


@pytest.mark.parametrize("settings, file, expected", [
    ({"chat_template": "config"}, None, "config"),
    ({"chat_template": "config"}, "file", "file"),
    ({"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]}, None, "named"),
])
def test_where_the_template_comes_from(settings, file, expected, tmp_path):
    tok = tokenizer_directory(tmp_path, file, **settings)
    assert tok.has_template and tok.apply_chat_template([U1]) == expected


def test_default_template_is_the_authors(tmp_path):
    tok = tokenizer_directory(tmp_path)
    assert not tok.has_template
    assert tok.apply_chat_template([user("q")], True) == "<|user|>\nq<|endoftext|>\n<|assistant|>\n"
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert [tok.decode(part) for part in encode_pair(row, tok)][1:] == ["a<|endoftext|>", "b<|endoftext|>"]


@pytest.mark.parametrize("attack", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ raise_exception.__globals__['__builtins__'].open('/etc/passwd').read() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages).x }}",
    "{{ (messages | attr('append'))(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'content': 'changed'}) }}",
    "{{ dict.update(messages[0], {'content': 'changed'}) }}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ self.__init__.__globals__.os }}",
])
def test_templates_cannot_leave_the_sandbox(attack):
    messages = [user("q")]
    with pytest.raises(UserError, match="chat template"):
        byte_tokenizer(template=attack).apply_chat_template(messages)
    assert messages == [user("q")]


# ---------------------------------------------------------------------------------------------------------------------
# Rows

HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: who\n\nAssistant:"
TALK = [turn("system", "s"), user("q"), assistant("a"), user("q2")]
FORMS = {  # name: a row as people have it, the row as read_pairs gives it
    "strings": (PAIR, PAIR),
    "more columns": (PAIR | {"score": 1.5, "id": None, "messages": ["x"]}, PAIR),
    "messages": ({"prompt": TALK, "chosen": [assistant("good")], "rejected": [assistant("bad")]},) * 2,
    "shared turns": ({"chosen": TALK + [assistant("good")], "rejected": TALK + [assistant("bad")]}, {"prompt": TALK, "chosen": [assistant("good")], "rejected": [assistant("bad")]}),
    "equal conversations": ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]}, {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("a")]}),
    "one continues the other": ({"chosen": [user("q"), assistant("a"), user("r")], "rejected": [user("q"), assistant("a")]},
                                {"prompt": [user("q")], "chosen": [assistant("a"), user("r")], "rejected": [assistant("a")]}),
    "several turns to answer": ({"chosen": [user("q"), assistant("a"), user("r"), assistant("b")], "rejected": [user("q"), assistant("c")]},
                                {"prompt": [user("q")], "chosen": [assistant("a"), user("r"), assistant("b")], "rejected": [assistant("c")]}),
    "ultrafeedback": ({"prompt": "q", "prompt_id": "0", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")], "score_chosen": 9.0},
                      {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}),
    "prompt not repeated": ({"prompt": "q", "chosen": [assistant("good")], "rejected": [assistant("bad")]}, {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}),
    "HH": ({"chosen": HH + " me", "rejected": HH + " my dog"}, {"prompt": HH, "chosen": " me", "rejected": " my dog"}),
    "HH, an earlier turn differs": ({"chosen": HH + " me", "rejected": HH.replace("yes", "no") + " me"},
                                    {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes?\n\nHuman: who\n\nAssistant: me", "rejected": " no?\n\nHuman: who\n\nAssistant: me"}),
    "shared words": ({"chosen": "What is it? A cat", "rejected": "What is it? A car"}, {"prompt": "What is it? A", "chosen": " cat", "rejected": " car"}),
    "shared lines": ({"chosen": "Q: 2+2?\nFour", "rejected": "Q: 2+2?\nFive"}, {"prompt": "Q: 2+2?\n", "chosen": "Four", "rejected": "Five"}),
    "nothing shared": ({"chosen": "abc d", "rejected": "abx d"}, {"prompt": "", "chosen": "abc d", "rejected": "abx d"}),
    "null prompt": ({"prompt": None, "instruction": None, "chosen": "x y", "rejected": "x z"}, {"prompt": "x", "chosen": " y", "rejected": " z"}),
    "alpaca": ({"instruction": "Do {it}.", "input": "", "output": "o", "chosen": "good", "rejected": "bad"},
               {"prompt": data.ALPACA.format(instruction="Do {it}.", input=""), "chosen": "good", "rejected": "bad"}),
    "alpaca with input": ({"instruction": "Do it.", "input": "in", "chosen": "good", "rejected": "bad"},
                          {"prompt": data.ALPACA.format(instruction="Do it.", input="\n\n### Input:\nin"), "chosen": "good", "rejected": "bad"}),
}


def write_table(directory, kind, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "a.parquet")
        return directory / "a.parquet"
    name, content = {
        "jsonl": ("a.jsonl", lines.encode()), "jsonl.gz": ("a.jsonl.gz", gzip.compress(lines.encode())), "json list": ("a.json", json.dumps(rows, indent=1).encode()),
        "json lines": ("a.json", lines.encode()), "BOM": ("a.jsonl", lines.encode("utf-8-sig")), "BOM list": ("a.json", json.dumps(rows).encode("utf-8-sig")),
        "CRLF": ("a.jsonl", lines.replace("\n", "\r\n").encode()), "blank lines": ("a.jsonl", ("\n \r\n" + lines.replace("\n", "\n\n\t\n")).encode()), "no newline": ("a.jsonl", lines.strip().encode()),
    }[kind]
    return put(directory / name, content)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json list", "json lines", "parquet", "BOM", "BOM list", "CRLF", "blank lines", "no newline"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_file(form, kind, tmp_path):
    row, expected = FORMS[form]
    assert read_pairs(write_table(tmp_path, kind, [row, row])) == [expected, expected]


def test_several_sources_in_their_order(tmp_path):
    files = [put(tmp_path / f"{i}.jsonl", [PAIR | {"chosen": f"good {i}"}]) for i in range(3)]
    assert [row["chosen"] for row in read_pairs(files[::-1])] == ["good 2", "good 1", "good 0"]


@pytest.mark.parametrize("split, expected", [("", ["a", "b", "c"]), (":train", ["a", "b", "c"]), (":test", ["t"]), (":train_sft", ["s"])])
def test_the_split_of_a_directory(split, expected, tmp_path):
    for name, mark in [("data/train-00000-of-00002.jsonl", "a"), ("data/train-00001-of-00002.jsonl", "b"), ("train.jsonl", "c"), ("test.json", "t"), ("data/train_sft-00000-of-00001.jsonl", "s")]:
        put(tmp_path / "12:00" / name, [PAIR | {"chosen": mark}])
    put(tmp_path / "12:00" / "train.txt", "not data")
    if split:
        os.rename(tmp_path / "12:00", tmp_path / "plain")
    assert [row["chosen"] for row in read_pairs(f"{tmp_path / ('plain' if split else '12:00')}{split}")] == expected


@needs_shared
def test_derived_files_agree_with_what_they_derive_from():
    assert real_rows("orca.conv_explicit.jsonl") == real_rows("orca.conv_implicit.jsonl")
    strings, alpaca = real_rows("rasbt_alpaca.standard_explicit.jsonl"), real_rows("rasbt_instruction_preference.json")
    assert [row | {"prompt": row["prompt"].replace("\n\n### Input:\n", "\n\n")} for row in alpaca] == strings  # derived without that header
    without_system = [row | {"prompt": row["prompt"][1:]} if row["prompt"][0]["role"] == "system" else row for row in real_rows("orca.conv_explicit.jsonl")]
    assert real_rows("orca.ultrafeedback_shape.jsonl") == without_system


@needs_shared
def test_hh_prompts_end_where_the_assistant_speaks():
    for row, line in zip(real_rows("hh_harmless_test.jsonl.gz"), gzip.open(REAL / "pref/hh_harmless_test.jsonl.gz", "rt", encoding="utf-8"), strict=True):
        assert row["prompt"].endswith("\n\nAssistant:") and json.loads(line)["chosen"] == row["prompt"] + row["chosen"] and json.loads(line)["rejected"] == row["prompt"] + row["rejected"]
        assert "\n\nAssistant:" not in os.path.commonprefix([row["chosen"], row["rejected"]])


@pytest.mark.parametrize("row, expected", [
    ({"prompt": "p\ud800", "chosen": "\udfffc", "rejected": "r \U0001F642"}, {"prompt": "p\ufffd", "chosen": "\ufffdc", "rejected": "r \U0001F642"}),
    ({"prompt": [user("p\ud800")], "chosen": [turn("assistant", "c", x={"\ud800": ["\udfff"]})], "rejected": [assistant("r \U0001F642")]},
     {"prompt": [user("p\ufffd")], "chosen": [turn("assistant", "c", x={"\ufffd": ["\ufffd"]})], "rejected": [assistant("r \U0001F642")]}),
])
def test_lone_surrogates_become_replacement_characters(row, expected, tmp_path):
    """The emoji is written \\ud83d\\ude42 in the file: a pair, which stays what it is."""
    rows = read_pairs(put(tmp_path / "a.jsonl", [row]))
    assert rows == [expected] and len(tokenize_pairs(rows, byte_tokenizer())) == 1


def test_parquet_fills_messages_with_nulls_that_templates_do_not_see(tmp_path):
    template = "{% for m in messages %}{{ 'name' in m }} {% endfor %}"
    rows = read_pairs(write_table(tmp_path, "parquet", [{"chosen": [turn("user", "q", name="n"), assistant("a")], "rejected": [turn("user", "q", name="n"), assistant("b")]}]))
    assert rows[0]["chosen"][0]["name"] is None and byte_tokenizer(template=template).apply_chat_template(rows[0]["prompt"] + rows[0]["chosen"]) == "True False "


# ---------------------------------------------------------------------------------------------------------------------
# Ids: BOS, EOS, the boundary, truncation

TURNS = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% if m.role == 'assistant' %}CLOSE{% endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"


def conversation(chosen="good", rejected="bad", prompt="q"):
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


@pytest.mark.parametrize("close, expected", [
    ("", "good<|endoftext|>"),
    ("{{ eos_token }}", "good<|endoftext|>"),
    ("{{ eos_token }}\n", "good<|endoftext|>"),
    ("{{ eos_token + ' \n\n' }}", "good<|endoftext|>"),
    ("{{ eos_token + '\n' + eos_token }}", "good<|endoftext|>"),
    ("</turn>\n", "good</turn>\n<|endoftext|>"),
    ("{{ eos_token + '</turn>' }}", "good<|endoftext|></turn><|endoftext|>"),
])
@pytest.mark.parametrize("content", ["good", "good<|endoftext|>"])
def test_a_response_ends_in_eos_exactly_once(content, close, expected):
    tok = byte_tokenizer(template=TURNS.replace("CLOSE", close))  # its pad token is EOS, too
    if content != "good" and "</turn>" in close:
        expected = expected.replace("good", content, 1)  # there EOS inside the turn is text
    prompt, chosen, rejected = encode_pair(conversation(content), tok)
    assert (tok.decode(prompt), tok.decode(chosen)) == ("[u]q[a]", expected)
    assert chosen[-1] == rejected[-1] == EOS != chosen[-2]


@pytest.mark.parametrize("text, expected", [("a", "a"), ("a<|endoftext|>", "a"), ("a<|endoftext|>\n", "a"), ("a \n", "a \n"), ("a<|endoftext|>b", "a<|endoftext|>b"), ("a<|endoftext|><|endoftext|>", "a")])
def test_string_responses_end_in_eos_exactly_once(text, expected):
    tok = byte_tokenizer()
    assert tok.decode(encode_pair(PAIR | {"chosen": text}, tok)[1]) == expected + "<|endoftext|>"


@needs_shared
@pytest.mark.parametrize("name", ["tokenizers/minimind3", "tokenizers/phi3", "tokenizers/qwen2.5"])
def test_real_templates_end_in_eos_exactly_once(name):
    tok = real_tokenizer(name)
    for row in real_rows("orca.conv_explicit.jsonl")[:30]:
        for response in encode_pair(row, tok, max_length=10**6)[1:]:
            assert response[-1] == tok.eos_id and response.count(tok.eos_id) == 1


@pytest.mark.parametrize("options, text, expected", [
    (dict(), "", "abc"), (dict(post_processor=True), "", "<s>abc"), (dict(adds_bos=True), "", "<s>abc"),
    (dict(post_processor=True), "<s>", "<s>abc"), (dict(adds_bos=True), "<s>", "<s>abc"), (dict(), "<s>", "<s>abc"),
    (dict(adds_bos=True, bos=False), "", "abc"),
])
@pytest.mark.parametrize("conversational", [False, True])
def test_bos_stands_first_exactly_once(options, text, expected, conversational):
    """`text` is what the data or the template has written already."""
    tok = byte_tokenizer(template=text + "{% for m in messages %}{{ m.content }}{% endfor %}", **options)
    row = conversation(prompt="abc") if conversational else PAIR | {"prompt": text + "abc"}
    prompt, chosen, rejected = encode_pair(row, tok)
    assert tok.decode(prompt) == expected and BOS not in prompt[1:] + chosen + rejected


@pytest.mark.parametrize("options, text", [(dict(post_processor=True), ""), (dict(post_processor=True), "<s>"), (dict(), "<s>")])
@pytest.mark.parametrize("mode, kept", [("keep_end", "789"), ("keep_start", "012")])
def test_bos_stays_first_when_the_prompt_is_cut(options, text, mode, kept):
    tok = byte_tokenizer(**options)
    row = {"prompt": text + "0123456789", "chosen": "good", "rejected": "a longer answer"}
    prompt, chosen, rejected = encode_pair(row, tok, max_length=9, max_prompt_length=4, truncation_mode=mode)
    assert [tok.decode(part) for part in (prompt, chosen, rejected)] == ["<s>" + kept, "good<|endoftext|>", "a lon"]


@pytest.mark.parametrize("options, first", [(dict(post_processor=True), BOS), (dict(), BOS), (dict(bos=False), EOS)])
def test_an_empty_prompt_opens_with_bos_or_eos(options, first):
    assert encode_pair({"prompt": "", "chosen": "a", "rejected": "b"}, byte_tokenizer(**options)) == ([first], [*byte_tokenizer().encode("a"), EOS], [*byte_tokenizer().encode("b"), EOS])


def test_a_conversation_without_prompt_has_one_bos():
    tok = byte_tokenizer(post_processor=True, template="{{ bos_token }}" + TURNS.replace("CLOSE", ""))
    prompt, chosen, rejected = encode_pair({"prompt": [], "chosen": [assistant("good")], "rejected": [assistant("bad")]}, tok)
    assert (tok.decode(prompt), tok.decode(chosen), tok.decode(rejected)) == ("<s>", "[a]good<|endoftext|>", "[a]bad<|endoftext|>")


@needs_shared
@pytest.mark.parametrize("name", ["tokenizers/gpt2", "models/stories260K", "tokenizers/phi3", "tokenizers/qwen2.5"])
@pytest.mark.parametrize("prompt, chosen, rejected", [("Hello wor", "ld one", "k two"), ("Once upon a ti", "me", "red"), ("x \n", "\n\ny", "  z"), ("The A", "", "B"), ("the end ", " of", "of")])
def test_the_prompt_is_the_longest_common_prefix_of_the_three_encodings(name, prompt, chosen, rejected):
    tok = real_tokenizer(name)
    p, c, r = encode_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tok)
    p = p[tok.adds_bos :]
    three = [tok.encode(text) for text in (prompt, prompt + chosen, prompt + rejected)]
    for response, full in zip((c, r), three[1:]):
        assert p + response == full + [tok.eos_id] * (len(full) > len(p))
    assert p == three[0][: len(p)] and len({tuple(full[: len(p) + 1]) for full in three}) > 1


@needs_shared
def test_a_merge_across_the_boundary_goes_to_the_response():
    tok = real_tokenizer("tokenizers/gpt2")
    parts = encode_pair({"prompt": "Hello wor", "chosen": "ld", "rejected": "k"}, tok)
    assert [tok.decode(part) for part in parts] == ["Hello", " world<|endoftext|>", " work<|endoftext|>"]


def test_a_template_that_is_not_prefix_stable():
    """The generation prompt opens a thought that the full conversation does not have (DeepSeek): the prompt ends where they part."""
    tok = byte_tokenizer(template="{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]<think>{% endif %}")
    assert [tok.decode(part) for part in encode_pair(conversation(), tok)] == ["[u]q[a]", "good<|endoftext|>", "bad<|endoftext|>"]


MATRIX = [((100, 950, 950), (100, 924, 924)), ((10, 1020, 400), (10, 1014, 400)), ((100, 1200, 150), (100, 924, 150)), ((600, 500, 500), (512, 500, 500)),
          ((1100, 50, 50), (512, 50, 50)), ((512, 512, 1), (512, 512, 1)), ((513, 512, 1), (512, 512, 1)), ((1000, 24, 24), (1000, 24, 24)), ((1000, 25, 24), (512, 25, 24)), ((2000, 2000, 2000), (512, 512, 512))]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("lengths, kept", MATRIX)
def test_truncation_matrix(lengths, kept, mode, bos):
    """Lengths in tokens: the prompt's includes BOS, a response's its EOS."""
    tok = byte_tokenizer(post_processor=bos)
    text = lambda start, count: "".join(chr(start + i % 26) for i in range(count))
    row = {"prompt": text(65, lengths[0] - bos), "chosen": text(97, lengths[1] - 1), "rejected": "!" + text(97, lengths[2] - 2) if lengths[2] > 1 else ""}
    prompt, chosen, rejected = encode_pair(row, tok, max_length=1024, max_prompt_length=512, truncation_mode=mode)
    if lengths[2] == 1:
        rejected = [EOS]  # no text, no EOS: such a row is left out before
    assert (len(prompt), len(chosen), len(rejected)) == kept and len(prompt) + max(len(chosen), len(rejected)) <= 1024
    full = [BOS] * bos + tok.encode(row["prompt"])
    assert prompt == [BOS] * bos + (full[-(kept[0] - bos):] if mode == "keep_end" else full[bos : kept[0]])
    assert chosen == (tok.encode(row["chosen"]) + [EOS])[: kept[1]]


@pytest.mark.parametrize("rows, report", [
    ([PAIR], "1 rows read, 1 kept: 0 equal, 0 empty, 0 cut, 0 dropped"),
    ([PAIR, PAIR | {"rejected": "good"}, PAIR], "3 rows read, 2 kept: 1 equal, 0 empty, 0 cut, 0 dropped"),
    ([PAIR, PAIR | {"chosen": ""}, PAIR | {"rejected": " \n\t\u3000"}], "3 rows read, 1 kept: 0 equal, 2 empty, 0 cut, 0 dropped"),
    ([PAIR, conversation(), conversation(chosen=" "), conversation(rejected="good")], "4 rows read, 2 kept: 1 equal, 1 empty, 0 cut, 0 dropped"),
    ([PAIR | {"chosen": "x" * 30}], "1 rows read, 1 kept: 0 equal, 0 empty, 1 cut, 0 dropped"),
    ([PAIR | {"prompt": "x" * 30, "chosen": "x" * 9}, PAIR], "2 rows read, 2 kept: 0 equal, 0 empty, 1 cut, 0 dropped"),
])
def test_rows_left_out_are_counted_by_reason(rows, report):
    pairs = tokenize_pairs(rows, byte_tokenizer(template=TURNS.replace("CLOSE", "")), max_length=20, max_prompt_length=12)
    assert pairs.report == report and all(len(part) for i in range(len(pairs)) for part in pairs[i])


@needs_shared
def test_a_response_without_any_known_character_is_dropped():
    tok = real_tokenizer("models/slm4096-gpt2")
    pairs = tokenize_pairs([PAIR | {"chosen": "\u4f60\u597d"}, PAIR], tok)
    assert pairs.report == "2 rows read, 1 kept: 0 equal, 0 empty, 0 cut, 1 dropped" and pairs.rows.tolist() == [2]


@needs_shared
@pytest.mark.parametrize("file, tokenizer, report", [
    ("hh_harmless_test.jsonl.gz", "tokenizers/gpt2", "2312 rows read, 2308 kept: 0 equal, 4 empty, 0 cut, 0 dropped"),
    ("hh_harmless_test.jsonl.gz", "models/stories260K", "2312 rows read, 2308 kept: 0 equal, 4 empty, 140 cut, 0 dropped"),
    ("rasbt_instruction_preference.json", "tokenizers/gpt2", "1100 rows read, 1094 kept: 6 equal, 0 empty, 0 cut, 0 dropped"),
    ("rasbt_alpaca.standard_explicit.jsonl", "models/stories260K", "1100 rows read, 1094 kept: 6 equal, 0 empty, 0 cut, 0 dropped"),
    ("orca.conv_explicit.jsonl", "tokenizers/qwen2.5", "284 rows read, 284 kept: 0 equal, 0 empty, 14 cut, 0 dropped"),
    ("orca.conv_implicit.jsonl", "tokenizers/qwen2.5", "284 rows read, 284 kept: 0 equal, 0 empty, 14 cut, 0 dropped"),
    ("orca.ultrafeedback_shape.jsonl", "tokenizers/qwen2.5", "284 rows read, 284 kept: 0 equal, 0 empty, 14 cut, 0 dropped"),
    ("dpo_en_demo.conv_explicit.jsonl", "tokenizers/minimind3", "300 rows read, 300 kept: 0 equal, 0 empty, 137 cut, 0 dropped"),
])
def test_real_files(file, tokenizer, report):
    pairs = tokenize_pairs(real_rows(file), real_tokenizer(tokenizer))
    assert pairs.report == report
    lengths = pairs.spans() + [1, 0, 0]
    assert lengths.min() >= 1 and (lengths[:, 0] + lengths[:, 1:].max(1)).max() <= 1024
    over = sum(map(lambda row: len(row[0]) + max(len(row[1]), len(row[2])) > 1024,
                   (encode_pair(real_rows(file)[n - 1], real_tokenizer(tokenizer), max_length=10**6) for n in pairs.rows.tolist())))
    assert f" {over} cut" in report


# ---------------------------------------------------------------------------------------------------------------------
# Pairs as flat arrays


def random_rows(count, seed=0, longest=12):
    """Pairs whose every token is different, so that each can be recognised in a pack."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, (count, 3))
    return Pairs(np.arange(lengths.sum(), dtype=np.int32), np.cumsum(lengths.ravel()), np.arange(1, count + 1))


def test_pairs_are_flat_arrays():
    tok = byte_tokenizer()
    rows = [PAIR | {"prompt": "p" * i, "chosen": "c" * (i + 1), "rejected": "r" * (2 * i + 1)} for i in range(1200)]
    pairs = tokenize_pairs(rows, tok, max_length=500, max_prompt_length=100)
    assert (pairs.tokens.dtype, pairs.ends.dtype, pairs.rows.dtype) == (np.int32, np.int64, np.int64) and pairs.tokens.ndim == 1
    assert pairs.rows.tolist() == list(range(1, 1201)) and len(pairs) == 1200 and pairs.ends[-1] == len(pairs.tokens)
    for i in (0, 1, 511, 512, 513, 1199):
        assert [part.tolist() for part in pairs[i]] == list(encode_pair(rows[i], tok, max_length=500, max_prompt_length=100))
    assert pairs.spans()[7].tolist() == [6, 9, 16]
    few = pairs.select([5, 3, 1199])
    assert few.rows.tolist() == [6, 4, 1200] and few.tokens.dtype == np.int32 and [[p.tolist() for p in few[i]] for i in range(3)] == [[p.tolist() for p in pairs[i]] for i in (5, 3, 1199)]


@needs_shared
def test_memory_is_at_most_six_bytes_a_token():
    rows, tok = real_rows("hh_harmless_test.jsonl.gz")[:1000], real_tokenizer("tokenizers/gpt2")
    tokenize_pairs(rows[:10], tok)
    tracemalloc.start()
    pairs = tokenize_pairs(rows, tok)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held <= 6 * len(pairs.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Packs


def test_a_pack_is_the_drawing():
    batch = pack([([10, 11, 12, 13], [20, 21, 22], [30, 31]), ([40], [50], [60, 61])])
    #                                 prefix      | chosen    | rejected || the second pair has no prefix
    assert batch.inputs.tolist() == [10, 11, 12, 13, 20, 21, 13, 30, 40, 40, 60]
    assert batch.targets.tolist() == [11, 12, 13, 20, 21, 22, 30, 31, 50, 60, 61]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 0, 0, 1]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 4, 5, 5]
    assert batch.spans.tolist() == [[3, 3, 2], [0, 1, 2]]
    assert batch.cu_q.tolist() == [0, 6, 8, 9, 11] and batch.cu_k.tolist() == [0, 6, 11, 12, 14]
    assert batch.kv_index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 9, 10]
    assert (batch.max_q, batch.max_k, batch.scored) == (6, 6, None)
    assert {t.dtype for t in (batch.inputs, batch.targets, batch.positions, batch.owner, batch.spans, batch.kv_index)} == {torch.int64}
    assert batch.cu_q.dtype == batch.cu_k.dtype == torch.int32  # what variable-length attention takes


@pytest.mark.parametrize("feed_last", [False, True])
@pytest.mark.parametrize("prompt_loss", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_attention_layout_is_the_mask_and_each_token_is_predicted_once(seed, prompt_loss, feed_last):
    source = random_rows(5, seed)
    pairs = [tuple(part.tolist() for part in source[i]) for i in range(5)]
    batch = pack(pairs, prompt_loss=prompt_loss, feed_last=feed_last)
    T = len(batch.inputs)
    pair, branch = batch.owner // 3, batch.owner % 3
    same = pair[:, None] == pair[None, :]
    expected = same & ((branch[None, :] == 0) | (branch[:, None] == branch[None, :])) & (batch.positions[None, :] <= batch.positions[:, None])
    expected &= ~((branch[:, None] == 0) & (branch[None, :] != 0))
    seen = torch.zeros(T, T, dtype=torch.bool)
    for s in range(len(batch.cu_q) - 1):
        queries, keys = torch.arange(batch.cu_q[s], batch.cu_q[s + 1]), batch.kv_index[batch.cu_k[s] : batch.cu_k[s + 1]]
        assert len(queries) <= batch.max_q and len(keys) <= batch.max_k
        for i, q in enumerate(queries):  # causal, aligned at the end of the keys
            seen[q, keys[: len(keys) - len(queries) + i + 1]] = True
    assert batch.cu_q[-1] == T and torch.equal(seen, expected)
    # What a scored position has seen is its sequence up to there; all targets together are the pairs, each token but the first once.
    scored = batch.scored.tolist() if batch.scored is not None else range(T)
    assert (batch.scored is None) == (prompt_loss and not feed_last)
    got = []
    for t in scored:
        prompt, *responses = pairs[pair[t]]
        sequence = prompt + (responses[branch[t] - 1] if branch[t] else [])
        assert sorted(batch.inputs[seen[t]].tolist()) == sorted(sequence[: batch.positions[t] + 1]) and batch.targets[t] == sequence[batch.positions[t] + 1]
        got.append(int(batch.targets[t]))
    assert sorted(got) == sorted(token for prompt, *responses in pairs for token in [*(prompt[1:] if prompt_loss else []), *responses[0], *responses[1]])
    assert T == source.spans().sum() + 10 * feed_last
    assert batch.spans.tolist() == (source.spans() + [0, feed_last, feed_last]).tolist()


def test_a_batch_on_the_cpu_is_itself():
    batch = pack([([1, 2], [3], [4])])
    assert batch.to("cpu") is batch


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [50, 64, 500])
def test_first_fit_decreasing_keeps_the_capacity_and_every_item(seed, capacity):
    lengths = np.random.default_rng(seed).integers(1, 51, 200)
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(200))
    sums = [sum(lengths[i] for i in b) for b in bins]
    assert max(sums) <= capacity and len(bins) <= -(-lengths.sum() // capacity) * 11 / 9 + 1  # the known bound of the algorithm


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_spread_is_even(ranks):
    lengths = np.random.default_rng(0).integers(10, 1000, 64)
    shares = spread(lengths, ranks)
    sums = [sum(lengths[i] for i in share) for share in shares]
    assert len(shares) == ranks and sorted(i for share in shares for i in share) == list(range(64))
    assert {len(share) for share in spread([9] + [1] * 9, 2)} == {1, 9}  # the long one alone
    assert max(sums) - min(sums) <= lengths.max() and max(sums) <= 1.1 * lengths.sum() / ranks


@pytest.mark.parametrize("max_tokens", [40, 100, 10**6])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 40])
def test_packs_over_all_ranks_hold_every_pair_once(ranks, max_tokens):
    pairs = random_rows(60)
    indices = epoch_order(60, 0, 0)[:33]
    packs = [p for rank in range(ranks) for p in make_packs(pairs, indices, max_tokens, rank=rank, ranks=ranks, prompt_loss=False)]
    assert all(len(p.inputs) <= max_tokens for p in packs)
    targets = sorted(t for p in packs for t in (p.targets if p.scored is None else p.targets[p.scored]).tolist())
    assert targets == sorted(t for i in indices for part in pairs[i][1:] for t in part.tolist())


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    first = epoch_order(100, 3, 5)
    np.random.seed(1), torch.manual_seed(1), np.random.rand(7)
    assert sorted(first) == list(range(100)) and (epoch_order(100, 3, 5) == first).all()
    assert (epoch_order(100, 3, 6) != first).any() and (epoch_order(100, 4, 5) != first).any() and (epoch_order(100, 5, 3) != first).any()


# ---------------------------------------------------------------------------------------------------------------------
# Bad inputs: each one line that says where

GOOD = json.dumps(PAIR)


def reading(name, content):
    return lambda d: read_pairs(put(d / name, content))


def tokenizing(rows, **options):
    return lambda d: tokenize_pairs(rows, options.pop("tokenizer", None) or byte_tokenizer(**options))


def loading(**files):
    """A tokenizer directory of these files; dots are written as two underscores."""

    def build(d):
        for name, content in files.items():
            put(d / "model" / name.replace("__", "."), content if isinstance(content, (str, bytes)) else json.dumps(content))
        return Tokenizer.from_pretrained(d / "model")

    return build


def tokenizer_json(**changes):
    return json.loads(demo_tokenizer().backend.to_str()) | changes


def small_tokenizer(model):
    return Tokenizer(tokenizers.Tokenizer(model), {"eos_token": "</s>"})


def parquet_without_pairs(d):
    return read_pairs(write_table(d, "parquet", [{"text": "a"}]))


def parquet_truncated(d):
    path = write_table(d, "parquet", [PAIR])
    return read_pairs(put(d / "b.parquet", path.read_bytes()[:-9]))


BAD_DATA = [
    # files
    ("missing file", lambda d: read_pairs(d / "no.jsonl"), r"no\.jsonl: no such file"),
    ("missing directory", lambda d: read_pairs(d / "no" / "where"), r"where: no such file"),
    ("no source at all", lambda d: read_pairs(""), r"no such file"),
    ("empty file", reading("a.jsonl", ""), r"a\.jsonl: no rows"),
    ("blank file", reading("a.jsonl", "\n \n\r\n"), r"a\.jsonl: no rows"),
    ("empty list", reading("a.json", "[]"), r"a\.json: no rows"),
    ("second file empty", lambda d: read_pairs([put(d / "a.jsonl", [PAIR]), put(d / "b.jsonl", "")]), r"b\.jsonl: no rows"),
    ("empty gzip", reading("a.jsonl.gz", gzip.compress(b"")), r"a\.jsonl\.gz: no rows"),
    ("empty directory", lambda d: read_pairs(d), r"no data files of split 'train' \(none at all\)"),
    ("directory without the split", lambda d: (put(d / "test.jsonl", [PAIR]), read_pairs(d)), r"no data files of split 'train' \(test\.jsonl\).*:SPLIT"),
    ("unknown split", lambda d: (put(d / "train.jsonl", [PAIR]), read_pairs(f"{d}:dev")), r"no data files of split 'dev' \(train\.jsonl\)"),
    ("a directory named like a file", lambda d: (put(d / "a.jsonl" / "x", "x"), read_pairs(d / "a.jsonl")), r"a\.jsonl: no (such file|data files)"),
    ("hub data set without network", lambda d: read_pairs("no-such-owner/no-such-set"), r"no-such-owner/no-such-set: .*the hub did not give it"),
    ("a CSV file", reading("a.csv", "prompt,chosen,rejected\na,b,c\n"), r"a\.csv, line 1: not valid JSON"),
    ("a gzip file without the name", reading("a.jsonl", gzip.compress(GOOD.encode())), r"a\.jsonl, line 1: not UTF-8"),
    ("a plain file named gzip", reading("a.jsonl.gz", GOOD), r"a\.jsonl\.gz, after line 0: cannot be read .*gzip"),
    ("truncated gzip", reading("a.jsonl.gz", gzip.compress("".join(f'{{"prompt": "{i * 7919 % 10007}", "chosen": "a", "rejected": "b"}}\n' for i in range(20000)).encode())[:-2000]), r"a\.jsonl\.gz, after line \d{3,}: cannot be read"),
    ("gzip with a flipped byte", lambda d: (b := bytearray(gzip.compress(b"".join(b'{"i": %d}\n' % i for i in range(999)))), b.__setitem__(len(b) // 2, b[len(b) // 2] ^ 255), read_pairs(put(d / "a.jsonl.gz", bytes(b)))), r"a\.jsonl\.gz, "),
    ("invalid UTF-8", reading("a.jsonl", GOOD.encode() + b'\n{"prompt": "\xff"}\n'), r"a\.jsonl, line 2: not UTF-8"),
    ("invalid UTF-8 in a list", reading("a.json", b'[{"prompt": "\xff"}]'), r"a\.json: not UTF-8"),
    ("UTF-16", reading("a.jsonl", GOOD.encode("utf-16")), r"a\.jsonl, line 1: not UTF-8"),
    ("not parquet", lambda d: (pytest.importorskip("pyarrow"), read_pairs(put(d / "a.parquet", b"garbage" * 9))), r"a\.parquet: not a readable parquet file"),
    ("empty parquet", lambda d: (pytest.importorskip("pyarrow"), read_pairs(put(d / "a.parquet", b""))), r"a\.parquet: not a readable parquet file"),
    ("truncated parquet", parquet_truncated, r"b\.parquet: not a readable parquet file"),
    ("parquet of other columns", parquet_without_pairs, r"a\.parquet, row 1: not a preference pair.*text: str"),
    # JSON
    ("broken JSON", reading("a.jsonl", GOOD + '\n\n{"prompt": \n'), r"a\.jsonl, line 3: not valid JSON"),
    ("broken JSON in a list", reading("a.json", "[\n" + GOOD + ",\n{]"), r"a\.json, line 3: not valid JSON"),
    ("unclosed list", reading("a.json", "[" + GOOD), r"a\.json, line 1: not valid JSON"),
    ("two objects in a line", reading("a.jsonl", GOOD + GOOD), r"a\.jsonl, line 1: not valid JSON \(Extra data"),
    ("Python instead of JSON", reading("a.jsonl", "{'prompt': 'x'}"), r"a\.jsonl, line 1: not valid JSON"),
    ("a number of ten thousand digits", reading("a.jsonl", '{"prompt": ' + "1" * 10000 + "}"), r"a\.jsonl, line 1: JSON that cannot be used"),
    ("nested too deeply", reading("a.jsonl", GOOD + "\n" + "[" * 100000), r"a\.jsonl, line 2: JSON that cannot be used"),
    ("messages nested too deeply", reading("a.jsonl", '{"chosen": [{"role": "user", "content": "q", "x": %s}], "rejected": [{"role": "user", "content": "q"}]}' % ("[" * 700 + "]" * 700)), r"a\.jsonl, line 1: nested too deeply"),
    # rows
    ("a row that is a list", reading("a.jsonl", GOOD + "\n[1, 2]\n"), r"a\.jsonl, line 2: a JSON object is expected, not a list"),
    ("a row that is a string", reading("a.json", '[{"prompt": "p", "chosen": "c", "rejected": "r"}, "text"]'), r"a\.json, row 2: a JSON object is expected, not a str"),
    ("a row that is null", reading("a.jsonl", "null"), r"a\.jsonl, line 1: a JSON object is expected, not a NoneType"),
    ("no columns", reading("a.jsonl", "{}"), r"a\.jsonl, line 1: not a preference pair.*columns found: none"),
    ("other columns", reading("a.jsonl", [{"question": "q", "answer": "a"}]), r"line 1: not a preference pair.*question: str, answer: str"),
    ("rejected missing", reading("a.jsonl", [PAIR, {"prompt": "p", "chosen": "c"}]), r"a\.jsonl, line 2: not a preference pair.*prompt: str, chosen: str$"),
    ("chosen null", reading("a.jsonl", [PAIR | {"chosen": None}]), r"line 1: .*chosen: NoneType"),
    ("chosen a number", reading("a.jsonl", [PAIR | {"chosen": 3}]), r"line 1: .*chosen: int"),
    ("prompt a number", reading("a.jsonl", [PAIR | {"prompt": 3}]), r"line 1: .*prompt: int"),
    ("chosen a message, not a list", reading("a.jsonl", [PAIR | {"chosen": assistant("a"), "rejected": assistant("b")}]), r"line 1: .*chosen: dict"),
    ("no messages", reading("a.jsonl", [{"prompt": [user("q")], "chosen": [], "rejected": [assistant("b")]}]), r"line 1: .*non-empty lists"),
    ("strings beside messages", reading("a.jsonl", [{"prompt": [user("q")], "chosen": "a", "rejected": "b"}]), r"line 1: .*prompt: list, chosen: str"),
    ("chosen messages, rejected string", reading("a.jsonl", [{"prompt": "q", "chosen": [assistant("a")], "rejected": "b"}]), r"line 1: .*chosen: list, rejected: str"),
    ("message without role", reading("a.jsonl", [{"chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}]), r"line 1: .*role/content"),
    ("message without content", reading("a.jsonl", [{"chosen": [{"role": "a", "content": None}], "rejected": [{"role": "a", "content": "b"}]}]), r"line 1: .*role/content"),
    ("ShareGPT messages", reading("a.jsonl", [{"chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]}]), r"line 1: .*role/content"),
    ("instruction without answers", reading("a.jsonl", [{"instruction": "do", "input": "", "output": "o"}]), r"line 1: .*instruction: str"),
    ("forms mixed in one file", reading("a.jsonl", [PAIR, {"chosen": "a b", "rejected": "a c"}]), r"a\.jsonl, line 2: this row is chosen/rejected strings that share their prompt, the rows before it are prompt/chosen/rejected strings"),
    # pairs
    ("all equal", tokenizing([PAIR | {"chosen": "bad"}]), r"no pair is left to train on \(1 rows read, 0 kept: 1 equal"),
    ("all empty", tokenizing([PAIR | {"chosen": "  "}]), r"no pair is left to train on .*1 empty"),
    ("all dropped", lambda d: tokenize_pairs([PAIR], small_tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))), r"no pair is left to train on .*1 dropped"),
    ("no row", tokenizing([]), r"no pair is left to train on \(0 rows read"),
    ("the template refuses a row", tokenizing([conversation(), conversation(prompt="no!")], template="{% if 'no!' in messages[0].content %}{{ raise_exception('Only yes') }}{% endif %}"), r"row 2: the chat template refused .*Only yes"),
    ("the template does not parse", tokenizing([conversation()], template="{% if %}"), r"row 1: the chat template .*TemplateSyntaxError"),
    ("the template fails", tokenizing([conversation()], template="{{ messages[9].content.strip() }}"), r"row 1: the chat template .*UndefinedError"),
    ("a text the tokenizer cannot encode", lambda d: tokenize_pairs([PAIR], small_tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, "<unk>"))), r"cannot encode"),
    ("tokenizer without EOS", lambda d: tokenize_pairs([PAIR], Tokenizer(demo_tokenizer().backend, {})), r"no end-of-sequence token; set eos_token in its tokenizer_config\.json"),
    ("tokenizer without EOS, one pair", lambda d: encode_pair(PAIR, Tokenizer(demo_tokenizer().backend, {})), r"no end-of-sequence token; set eos_token in its tokenizer_config\.json"),
    ("EOS that is not in the vocabulary", lambda d: tokenize_pairs([PAIR], Tokenizer(demo_tokenizer().backend, {"eos_token": "</nowhere>"})), r"no end-of-sequence token"),
    # tokenizers
    ("no tokenizer", lambda d: Tokenizer.from_pretrained(d), r"no tokenizer\.json, and no vocab\.json with merges\.txt"),
    ("vocabulary without merges", loading(vocab__json={"a": 0}), r"no tokenizer\.json, and no vocab"),
    ("a tokenizer that is a file", lambda d: Tokenizer.from_pretrained(put(d / "tokenizer.json", "{}")), r"tokenizer\.json: not a directory"),
    ("a path that is no id", lambda d: Tokenizer.from_pretrained("/no/such/directory"), r"/no/such/directory: not a directory, and not a hub id"),
    ("hub model without network", lambda d: Tokenizer.from_pretrained("no-such-owner/no-such-model"), r"no-such-owner/no-such-model: .*the hub did not give it"),
    ("empty tokenizer.json", loading(tokenizer__json=""), r"model: the tokenizer's files cannot be read"),
    ("broken tokenizer.json", loading(tokenizer__json='{"model": '), r"model: the tokenizer's files cannot be read"),
    ("binary tokenizer.json", loading(tokenizer__json=b"\xff\x00"), r"model: the tokenizer's files cannot be read"),
    ("tokenizer.json of another kind", loading(tokenizer__json={"a": 1}), r"model: the tokenizer's files cannot be read"),
    ("tokenizer.json that names an unknown model", loading(tokenizer__json=tokenizer_json(model={"type": "Magic"})), r"model: the tokenizer's files cannot be read"),
    ("merges of unknown tokens", loading(vocab__json={"a": 0, "b": 1}, merges__txt="#version: 0.2\nx y\n"), r"model: the tokenizer's files cannot be read"),
    ("broken tokenizer_config.json", loading(tokenizer__json=tokenizer_json(), tokenizer_config__json="{"), r"tokenizer_config\.json: cannot be read as JSON"),
    ("tokenizer_config.json that is a list", loading(tokenizer__json=tokenizer_json(), tokenizer_config__json=[]), r"tokenizer_config\.json: a JSON object is expected, not a list"),
    ("broken special_tokens_map.json", loading(tokenizer__json=tokenizer_json(), special_tokens_map__json="nul"), r"special_tokens_map\.json: cannot be read as JSON"),
    ("a token id beyond integers", loading(tokenizer__json=tokenizer_json(), config__json={"eos_token_id": 2**70}), r"model: the tokenizer's files cannot be read"),
    ("a surrogate as a special token", loading(tokenizer__json=tokenizer_json(), tokenizer_config__json={"eos_token": "\ud800"}), r"model: the tokenizer's files cannot be read"),
    ("binary chat_template.jinja", loading(tokenizer__json=tokenizer_json(), chat_template__jinja=b"\xff\xfe"), r"model: the tokenizer's files cannot be read"),
    ("broken added tokens", loading(vocab__json={"a": 0}, merges__txt="", tokenizer_config__json={"added_tokens_decoder": {"one": {"content": "x"}}}), r"model: the tokenizer's files cannot be read"),
    # read_json
    ("JSON missing", lambda d: read_json(d / "config.json"), r"config\.json: cannot be read as JSON .*No such file"),
    ("JSON that is a directory", lambda d: ((d / "config.json").mkdir(), read_json(d / "config.json")), r"config\.json: cannot be read as JSON"),
    ("JSON empty", lambda d: read_json(put(d / "config.json", "")), r"config\.json: cannot be read as JSON"),
    ("JSON not UTF-8", lambda d: read_json(put(d / "config.json", b'{"a": "\xff"}')), r"config\.json: cannot be read as JSON"),
    ("JSON nested too deeply", lambda d: read_json(put(d / "config.json", "[" * 100000)), r"config\.json: cannot be read as JSON"),
    ("JSON number", lambda d: read_json(put(d / "config.json", "3")), r"config\.json: a JSON object is expected, not a int"),
]


@pytest.mark.parametrize("build, expected", [case[1:] for case in BAD_DATA], ids=[case[0] for case in BAD_DATA])
def test_bad_data_ends_in_one_clear_line(build, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=expected) as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    os.chmod(put(tmp_path / "a.jsonl", [PAIR]), 0)
    with pytest.raises(UserError, match=r"a\.jsonl, after line 0: cannot be read .*Permission"):
        read_pairs(tmp_path / "a.jsonl")


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_pairs(put(tmp_path / "a.parquet", b""))


# ---------------------------------------------------------------------------------------------------------------------
# Fuzz: a result or a UserError, never anything else

try:
    from hypothesis import HealthCheck, given, settings, strategies as st
except ImportError:
    st = None

    def test_fuzz():
        pytest.skip("needs hypothesis")


def result_or_user_error(call, *args):
    try:
        return call(*args)
    except UserError as error:
        assert str(error)


def check_rows(rows):
    """What read_pairs returned is what it promises, and can be tokenized."""
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"} and len({type(part) for part in row.values()}) == 1
        for part in row.values():
            assert isinstance(part, str) or all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in part)
    result_or_user_error(lambda: tokenize_pairs(rows, byte_tokenizer(), max_length=16, max_prompt_length=8))


if st:
    fuzz = settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    texts = st.text(st.characters(), max_size=8) | st.sampled_from(["a b", "a c", "\ud800", " ", HH + " x", "<|endoftext|>"])
    messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), max_size=3)
    values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5)
    columns = texts | messages | values
    json_rows = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "instruction", "input"]), columns) | values
    valid = [("".join(json.dumps(row) + "\n" for row in [form, form])).encode() for form, _ in FORMS.values()] + [json.dumps([form for form, _ in FORMS.values()][:1] * 3, indent=1).encode()]

    @st.composite
    def mutated(draw, originals):
        content = bytearray(draw(st.sampled_from(originals)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, max(0, len(content) - 1)))
            kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
            if kind == "flip" and content:
                content[at] = draw(st.integers(0, 255))
            elif kind == "cut":
                del content[at : at + draw(st.integers(1, 20))]
            elif kind == "insert":
                content[at:at] = draw(st.binary(max_size=4) | st.sampled_from([b"\\ud800", b"null", b"[", b"{", b"\n", b"1e999", b"NaN", b"\xef\xbb\xbf"]))
            else:
                content[at:at] = content[at : at + 30]
        return bytes(content)

    @fuzz
    @given(st.data())
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
    def test_fuzz_row_files(name, tmp_path, data):
        content = data.draw(st.binary(max_size=200) | mutated(valid))
        if name.endswith(".gz"):
            content = gzip.compress(content)
            content = data.draw(st.just(content) | mutated([content]))
        check_rows(result_or_user_error(read_pairs, put(tmp_path / name, content)) or [])

    @fuzz
    @given(st.lists(json_rows, min_size=1, max_size=3))
    def test_fuzz_rows_of_any_json(tmp_path, rows):
        check_rows(result_or_user_error(read_pairs, put(tmp_path / "a.jsonl", rows)) or [])

    @fuzz
    @given(st.binary(max_size=100) | mutated([b'{"a": [1, {"b": null}], "c": "\\u00e9"}']))
    def test_fuzz_read_json(tmp_path, content):
        value = result_or_user_error(read_json, put(tmp_path / "config.json", content))
        assert value is None or isinstance(value, dict)

    @settings(fuzz, max_examples=60)
    @given(st.data())
    def test_fuzz_parquet(tmp_path, data):
        original = write_table(tmp_path, "parquet", [{"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}] * 3)
        check_rows(result_or_user_error(read_pairs, put(tmp_path / "b.parquet", data.draw(mutated([original.read_bytes()])))) or [])

    @fuzz
    @given(st.fixed_dictionaries({}, optional={key: columns for key in ["eos_token", "bos_token", "chat_template", "add_bos_token", "added_tokens_decoder"]}), st.fixed_dictionaries({}, optional={"eos_token_id": values, "bos_token_id": values}))
    def test_fuzz_tokenizer_settings(tmp_path, settings, config):
        tok = result_or_user_error(loading(tokenizer__json=tokenizer_json(), tokenizer_config__json=settings, config__json=config), tmp_path)
        if tok:
            result_or_user_error(lambda: tokenize_pairs([conversation(), PAIR], tok))


# ---------------------------------------------------------------------------------------------------------------------
# Tiny random checkpoints, made by transformers: odd sizes, few KV heads, heads wider than hidden / heads where allowed.

SIZES = dict(vocab_size=53, hidden_size=48, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128)
SQUARE = dict(vocab_size=53, hidden_size=60, ffn_dim=44, num_hidden_layers=3, num_attention_heads=5, max_position_embeddings=128)  # OPT: every head has its keys
GPT = dict(vocab_size=53, n_embd=60, n_layer=3, n_head=5, n_positions=128)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
MOE = dict(SIZES, num_experts_per_tok=2, moe_intermediate_size=20, num_experts=5, head_dim=10)

CHECKPOINTS = {  # name: (model_type, config)
    "llama": ("llama", dict(SIZES, head_dim=10, tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(SIZES, attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "llama3": ("llama", dict(SIZES, head_dim=16, rope_parameters=LLAMA3)),
    "llama-linear": ("llama", dict(SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0})),
    "mistral": ("mistral", dict(SIZES, head_dim=10, sliding_window=7)),
    "mistral-full": ("mistral", dict(SIZES, sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("qwen2", dict(SIZES, use_sliding_window=False, sliding_window=5, max_window_layers=0)),
    "qwen2-window": ("qwen2", dict(SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True)),
    "qwen2-types": ("qwen2", dict(SIZES, use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "qwen3": ("qwen3", dict(SIZES, head_dim=14, tie_word_embeddings=True)),
    "qwen3-window": ("qwen3", dict(SIZES, head_dim=10, attention_bias=True, use_sliding_window=True, sliding_window=6, max_window_layers=2)),
    "phi": ("phi", dict(SIZES, hidden_size=72, partial_rotary_factor=0.4)),  # 4 of 12 rotated
    "phi-norms": ("phi", dict(SIZES, qk_layernorm=True, rope_theta=300.0)),
    "opt-125m": ("opt", dict(SQUARE)),
    "opt-350m": ("opt", dict(SQUARE, word_embed_proj_dim=24, do_layer_norm_before=False)),
    "opt-no-bias": ("opt", dict(SQUARE, enable_bias=False, activation_function="gelu", _remove_final_layer_norm=True, tie_word_embeddings=False)),
    "gpt2": ("gpt2", dict(GPT)),
    "gpt2-untied": ("gpt2", dict(GPT, n_inner=44, activation_function="gelu", tie_word_embeddings=False)),
    "mixtral": ("mixtral", dict(SIZES, num_local_experts=5, num_experts_per_tok=2, sliding_window=7)),
    "mixtral-odd": ("mixtral", dict(SIZES, intermediate_size=27, num_local_experts=3, num_experts_per_tok=3, head_dim=10, tie_word_embeddings=True)),
    "qwen3moe": ("qwen3_moe", dict(MOE, norm_topk_prob=True)),
    "qwen3moe-dense": ("qwen3_moe", dict(MOE, norm_topk_prob=False, mlp_only_layers=[0], attention_bias=True, tie_word_embeddings=True)),
    "qwen3moe-sparse": ("qwen3_moe", dict(MOE, norm_topk_prob=False, decoder_sparse_step=2, use_sliding_window=True, sliding_window=6)),
}
ONE_OF_EACH = ["llama", "mistral", "qwen2-window", "qwen3", "phi", "opt-125m", "opt-350m", "gpt2", "mixtral", "qwen3moe"]
ROOT = tempfile.TemporaryDirectory()  # every checkpoint is made once


@functools.cache
def checkpoint(name, dtype="float32"):
    """The directory of a random checkpoint, and transformers' model of it."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    family, options = CHECKPOINTS[name]
    torch.manual_seed(sum(map(ord, name)))
    config = transformers.AutoConfig.for_model(family, **options)
    reference = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if parameter.ndim == 1:  # norm weights around one, biases around zero, none of them neutral
                parameter.normal_(float("norm" in key.lower() or "ln_" in key) * ("weight" in key), 0.3)
            else:
                parameter.normal_(0, 1.2 / math.sqrt(parameter.shape[-1]))
    reference.to(getattr(torch, dtype))
    directory = os.path.join(ROOT.name, f"{name}-{dtype}")
    reference.save_pretrained(directory)
    return directory, reference


def load(name):
    return Transformer.from_pretrained(checkpoint(name)[0])


def random_pairs(lengths, vocab=53, seed=0):
    """(prompt, chosen, rejected) ids of the given lengths."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, vocab, n) for n in three) for three in lengths]  # 1 is OPT's pad: transformers trains no input row of it


# empty prefix, one-token responses, long ones, many: longer than any window
LENGTHS = [(1, 1, 1), (1, 5, 9), (13, 1, 7), (9, 12, 1), (17, 11, 14), (2, 3, 20), (1, 19, 1), (6, 4, 4), (16, 10, 13), (5, 2, 3)]


def sequence_logps(logits, *parts):
    """Log-probability of every token but the first of parts, end to end; logits: (1, T) ids -> (1, T, vocab)."""
    ids = torch.tensor(np.concatenate(parts))[None]
    return logits(ids[:, :-1])[0].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def plain_logps(logits, pairs):
    """What model(pack(pairs)) returns, from two plain forward passes for each pair."""
    out = []
    for prompt, chosen, rejected in pairs:
        out += [sequence_logps(logits, prompt, chosen), sequence_logps(logits, prompt, rejected)[len(prompt) - 1 :]]
    return torch.cat(out)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_transformers(name):
    directory, reference = checkpoint(name)
    tokens = torch.randint(0, 53, (2, 61), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = Transformer.from_pretrained(directory).logits(tokens), reference(tokens).logits
    assert theirs.std() > 0.3 and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_packed_equals_plain(name):
    """The tree layout changes nothing: log-probabilities and the gradient of every parameter."""
    model, pairs = load(name), random_pairs(LENGTHS)
    packed, plain = model(pack(pairs)), plain_logps(model.logits, pairs)
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
    weight = torch.randn(len(packed), generator=torch.Generator().manual_seed(2)) / len(packed)
    ours, theirs = gradients(model, packed @ weight), gradients(model, plain @ weight)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def orpo_like(parts, targets):
    """A loss of ORPO's form. parts: [(log-probabilities of chosen, of rejected)] per pair; targets: those that the SFT term counts."""
    odds = [[x - torch.log(-torch.expm1(x)) for x in (chosen.mean(), rejected.mean())] for chosen, rejected in parts]
    return -targets.mean() + 0.5 * torch.stack([-F.logsigmoid(w - l) for w, l in odds]).mean()


def packed_loss(model, pairs):
    batch = pack(pairs)
    logps = model(batch)
    parts = [[logps[batch.owner == 3 * n + branch] for branch in (1, 2)] for n in range(len(pairs))]
    return orpo_like(parts, logps[batch.owner % 3 != 2])


def reference_loss(reference, pairs):
    parts, targets = [], []
    for prompt, chosen, rejected in pairs:
        whole = [sequence_logps(lambda ids: reference(ids).logits, prompt, response) for response in (chosen, rejected)]
        parts.append([logps[len(prompt) - 1 :] for logps in whole])
        targets.append(whole[0])
    return orpo_like(parts, torch.cat(targets))


def gradient_files(model, directory):
    """The gradients, under the names and in the layout of the checkpoint's files."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(directory)
    return load_file(os.path.join(directory, "model.safetensors"))


def fresh_reference(name):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name)[0], experts_implementation="eager").eval()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_step_equals_transformers(name, tmp_path):
    """The step's gradients are those of two unpadded forward passes for each pair, and every tensor moves."""
    model, reference, pairs = load(name), fresh_reference(name), random_pairs([(9, 5, 8), (1, 6, 3), (14, 12, 2)])
    loss, expected = packed_loss(model, pairs), reference_loss(reference, pairs)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-4)
    loss.backward(), expected.backward()
    moved = copy.deepcopy(model)
    for p, q in zip(moved.parameters(), model.parameters()):
        assert q.grad.isfinite().all()
        p.grad = q.grad.clone()
    torch.optim.AdamW(moved.parameters(), lr=1e-3, weight_decay=0).step()
    assert [key for (key, p), q in zip(moved.named_parameters(), model.parameters()) if torch.equal(p, q)] == []
    ours, theirs = gradient_files(model, tmp_path / "ours"), gradient_files(reference, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_saved_again_loads_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory, reference = checkpoint(name)
    Transformer.from_pretrained(directory).save_pretrained(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, experts_implementation="eager")
    assert not any(info.values()), info
    assert again.config.to_dict() | {"_name_or_path": ""} == reference.config.to_dict() | {"_name_or_path": ""}
    assert (tmp_path / "generation_config.json").read_bytes().split() == Path(directory, "generation_config.json").read_bytes().split()
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(os.path.join(directory, "model.safetensors")).keys()
    tokens = torch.randint(0, 53, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, reference(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3moe"])
def test_dtype_of_files_is_kept(name, dtype, tmp_path):
    """Any floating point file -> fp32 parameters -> the same file; the config states the dtype, as transformers follows it."""
    transformers = pytest.importorskip("transformers")
    directory, reference = checkpoint(name, dtype)
    model = Transformer.from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    before, after = load_file(os.path.join(directory, "model.safetensors")), load_file(tmp_path / "model.safetensors")
    for key in before:
        torch.testing.assert_close(after[key], before[key].float().to(before[key].dtype), rtol=0, atol=0)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == getattr(torch, dtype)
    model.save_pretrained(tmp_path, dtype=torch.float32)  # asked for explicitly
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32


def test_old_and_new_config_spellings():
    """config.json as transformers 4 wrote it and as 5 does: the same model."""
    base = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=9, intermediate_size=8)
    llama, moe = dict(base, model_type="llama"), dict(base, model_type="qwen3_moe", moe_intermediate_size=4)
    numbers = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}
    pairs = [
        (dict(llama, rope_theta=500.0, rope_scaling=None), dict(llama, rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
        (dict(llama, rope_theta=1e4, rope_scaling={"rope_type": "llama3", **numbers}), dict(llama, rope_parameters=LLAMA3)),
        (dict(llama, rope_scaling={"type": "linear", "factor": 2}), dict(llama, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})),
        (dict(base, model_type="phi", partial_rotary_factor=0.5), dict(base, model_type="phi", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})),
        (dict(moe, num_experts=6, torch_dtype="bfloat16"), dict(moe, num_local_experts=6, dtype="bfloat16")),
        (dict(llama, head_dim=None, num_key_value_heads=None), dict(llama, head_dim=12, num_key_value_heads=4)),
        (dict(base, model_type="mistral"), dict(base, model_type="mistral", sliding_window=4096)),  # absent and null differ
        (dict(base, model_type="qwen3"), dict(base, model_type="qwen3", head_dim=128)),
        (dict(base, model_type="mixtral", num_local_experts=2), dict(base, model_type="mixtral", num_local_experts=2, rope_theta=1e6, rms_norm_eps=1e-5)),
        (dict(base, model_type="qwen2", sliding_window=8, use_sliding_window=False, max_window_layers=0), dict(base, model_type="qwen2", sliding_window=None)),
        (dict(base, model_type="qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1),
         dict(base, model_type="qwen2", sliding_window=8, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])),
    ]
    for old, new in pairs:
        assert Config.from_hf(old) == Config.from_hf(new)
    assert Config.from_hf(pairs[1][0]).rope["factor"] == 8 and Config.from_hf(pairs[2][0]).rope["rope_type"] == "linear"
    assert Config.from_hf(pairs[-1][0]).windows == [None, 8] and Config.from_hf(dict(base, model_type="mistral", sliding_window=None)).windows == [None, None]
    assert [Config.from_hf(dict(base, model_type=t)).tie_word_embeddings for t in ("gpt2", "opt", "llama")] == [True, True, False]


# ---------------------------------------------------------------------------------------------------------------------
# Real models.


@needs_shared
@pytest.mark.parametrize("name", ["stories260K", "slm4096-gpt2"])
def test_real_models_equal_reference(name):
    model = Transformer.from_pretrained(MODELS / name)
    for case in json.loads((MODELS / name / "reference_logprobs.json").read_text()).values():
        ids, expected = np.array(case["ids"]), torch.tensor(case["logprob_of_next"])
        pairs = [(ids[:k], ids[k:], ids[k : k + 2]) for k in (1, 40)]
        with torch.no_grad():
            plain, packed, batch = sequence_logps(model.logits, ids), model(pack(pairs)), pack(pairs)
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-4)
        for n, (prompt, _, _) in enumerate(pairs):
            torch.testing.assert_close(packed[torch.isin(batch.owner, torch.tensor([3 * n, 3 * n + 1]))], expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(packed[batch.owner == 3 * n + 2], expected[len(prompt) - 1 : len(prompt) + 1], rtol=0, atol=1e-4)


@needs_shared
def test_stories_continue_as_they_should():
    model, tokenizer = Transformer.from_pretrained(MODELS / "stories260K"), Tokenizer.from_pretrained(MODELS / "stories260K")
    prompt = [tokenizer.bos_id] + tokenizer.encode("Once upon a time")
    text = tokenizer.decode(greedy(model, [prompt], 40)[0][0].tolist())
    assert ", there was a little girl named Lily. She loved to play outside in the park." in text


# ---------------------------------------------------------------------------------------------------------------------
# Generation.


@torch.no_grad()
def greedy(model, prompts, count):
    """Cached greedy generation after prompts of different lengths -> tokens (B, T), and the (B, vocab) logits of each step."""
    lengths, rows = torch.tensor([len(prompt) for prompt in prompts]), torch.arange(len(prompts))
    used = int(lengths.max())
    tokens = torch.full((len(prompts), used + count), 7)  # what pads must not matter
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = torch.as_tensor(prompt)
    cache = Cache(model.config, len(prompts), used + count)
    steps = [model.next_logits(tokens[:, :used], torch.arange(used).expand(len(prompts), -1), cache, used, lengths - 1)]
    for step in range(count):
        tokens[rows, lengths + step] = steps[-1].argmax(-1)
        if step + 1 < count:
            steps.append(model.next_logits(tokens[rows, lengths + step, None], (lengths + step)[:, None], cache, used + step + 1))
    return tokens, steps


@pytest.mark.parametrize("lengths", [[3], [2, 23, 1, 9]], ids=["one", "batch"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_cached_generation_equals_uncached(name, lengths):
    model = load(name)
    tokens, steps = greedy(model, [prompt for prompt, _, _ in random_pairs([(n, 1, 1) for n in lengths])], 64)
    with torch.no_grad():
        uncached = model.logits(tokens)  # causal: what stands right of a position does not matter
    for row, length in enumerate(lengths):
        expected = uncached[row, length - 1 : length + 63]
        torch.testing.assert_close(torch.stack(steps)[:, row], expected, rtol=0, atol=1e-4)
        assert torch.equal(tokens[row, length : length + 64], expected.argmax(-1))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_cache_continues_a_chat(name):
    """Several tokens at once after a cached beginning, as the second turn of a chat does."""
    model, tokens = load(name), torch.randint(0, 53, (1, 30), generator=torch.Generator().manual_seed(4))
    cache, positions = Cache(model.config, 1, 30), torch.arange(30)[None]
    with torch.no_grad():
        for start, end in [(0, 12), (12, 13), (13, 30)]:
            last = model.next_logits(tokens[:, start:end], positions[:, start:end], cache, end)
            torch.testing.assert_close(last, model.logits(tokens[:, :end])[:, -1], rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of experts.


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "mo" in name or "mix" in name])
def test_router_statistics_give_transformers_balancing_loss(name, tmp_path):
    """Prefix positions, computed once here, count twice as in TRL's concatenated forward; gradients too."""
    load_balancing_loss_func = pytest.importorskip("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    model, reference, pairs = load(name), fresh_reference(name), random_pairs(LENGTHS)
    batch = pack(pairs, feed_last=True)
    weight = torch.where(batch.owner % 3 == 0, 2.0, 1.0)
    logps, router = model(batch, weight)
    rows = weight.sum() * len(model.config.moe_layers)
    loss = model.config.num_experts * (router[0] / rows * router[1] / rows).sum()

    sequences = [torch.tensor(np.concatenate([prompt, response]))[None] for prompt, *responses in pairs for response in responses]
    gates = zip(*(reference(ids, output_router_logits=True).router_logits for ids in sequences))
    expected = load_balancing_loss_func(tuple(torch.cat(layer) for layer in gates), model.config.num_experts, model.config.num_experts_per_tok)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logps[batch.scored], model(pack(pairs)), rtol=0, atol=1e-5)  # the last tokens change nothing else

    for some in (model, reference):
        for parameter in some.parameters():
            parameter.grad = torch.zeros_like(parameter)
    loss.backward(), expected.backward()
    ours, theirs = gradient_files(model, tmp_path / "ours"), gradient_files(reference, tmp_path / "theirs")
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5, msg=key)


def test_router_statistics_are_not_rounded_by_autocast():
    model, batch = load("qwen3moe"), pack(random_pairs(LENGTHS))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        sent, probability = model(batch, torch.ones(len(batch.inputs)))[1]
    assert sent.sum() == 2 * 3 * len(batch.inputs)
    torch.testing.assert_close(probability.sum(), torch.tensor(3.0 * len(batch.inputs)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["qwen3moe", "mixtral-odd"])  # grouped_mm, and what stands in for it
def test_idle_experts_have_zero_gradients(name):
    """Zero and not None, which DDP could not reduce."""
    model = load(name)
    for layer in model.model.layers:
        layer.mlp.top_k = 1
    for key, gradient in gradients(model, model(pack(random_pairs([(1, 1, 1)]))).sum()).items():
        assert gradient is not None and gradient.isfinite().all(), key
        if "experts" in key:
            assert 1 <= (gradient.flatten(1) != 0).any(1).sum() <= 2 < len(gradient), key  # two positions, one expert each


def test_experts_cost_grows_with_top_k(monkeypatch):
    """Each grouped product has exactly T * k rows, however many experts there are."""
    rows, product = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda a, *args, **options: rows.append(len(a)) or product(a, *args, **options))
    model, batch = load("qwen3moe"), pack(random_pairs(LENGTHS))
    with torch.no_grad():
        model(batch)
    assert rows == [2 * len(batch.inputs)] * 3 * 3  # three matrices in each of three layers


# ---------------------------------------------------------------------------------------------------------------------
# Attention on a GPU, rehearsed without one.


def varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn computes, one segment after the other."""
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max())) and cu_q.dtype == cu_k.dtype == torch.int32
    out = []
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist()):
        back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)  # aligned at the end
        sees = (back >= 0) & (back <= (window_size[0] if window_size[0] >= 0 else d))
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) / math.sqrt(q.shape[-1])
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -math.inf).softmax(-1), values))
    return torch.cat(out)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-types", "gpt2"])
def test_flash_layout_equals_masked(name, monkeypatch):
    model, batch = load(name), pack(random_pairs(LENGTHS))
    weight = torch.randn(len(batch.inputs), generator=torch.Generator().manual_seed(5)) / len(batch.inputs)
    masked = model(batch)
    expected = gradients(model, masked @ weight)
    monkeypatch.setattr(model_module, "varlen_attn", varlen_reference)
    monkeypatch.setattr(model_module, "Tree", lambda batch, flash: Tree(batch, True))
    flash = model(batch)
    torch.testing.assert_close(flash, masked, rtol=0, atol=1e-5)
    for key, gradient in gradients(model, flash @ weight).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ONE_OF_EACH + ["phi-norms"])
def test_flash_on_a_gpu(name, monkeypatch):
    """The flash path in bf16 is as near to fp32 as the masked path in bf16 is; gradients too."""
    hf = dict(CHECKPOINTS[name][1], model_type=CHECKPOINTS[name][0], head_dim=16)
    model, batch = Transformer(Config.from_hf(hf), hf).initialise().cuda(), pack(random_pairs(LENGTHS)).to("cuda")
    exact = model(batch)
    expected = gradients(model, exact.mean())
    for flash in (True, False):
        monkeypatch.setattr(model_module, "Tree", lambda batch, ready: Tree(batch, flash) if ready else pytest.fail("no flash attention"))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logps = model(batch)
        torch.testing.assert_close(logps, exact, rtol=0, atol=0.05)
        for key, gradient in gradients(model, logps.mean()).items():
            assert (gradient - expected[key]).norm() <= 0.05 * expected[key].norm() + 1e-4, key


def test_arguments_of_varlen_attn():
    """The installed torch takes the arguments that the GPU path gives it."""
    import inspect

    parameters = inspect.signature(model_module.varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"] and "window_size" in parameters


# ---------------------------------------------------------------------------------------------------------------------
# Scoring targets without their logits.


def scoring(S=50, V=37, C=8, dtype=torch.float32, bias=True):
    torch.manual_seed(6)
    h, weight = torch.randn(S, C, dtype=dtype, requires_grad=True), torch.randn(V, C, dtype=dtype, requires_grad=True)
    return h, weight, torch.randn(V, dtype=dtype, requires_grad=True) if bias else None, torch.randint(0, V, (S,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 50 * 128, 2**23])  # 64 words of 200 at a time (the least), 128, all
def test_target_logps_equal_log_softmax(chunk, bias, monkeypatch):
    monkeypatch.setattr(TargetLogps, "CHUNK", {"cpu": chunk})
    h, weight, b, targets = scoring(V=200, bias=bias)
    inputs = [h, weight] + [b] * bias
    expected = F.linear(h, weight, b).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours = TargetLogps.apply(h, weight, b, targets)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    some = torch.randn(len(h))
    for ours, theirs in zip(torch.autograd.grad(ours @ some, inputs), torch.autograd.grad(expected @ some, inputs)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_target_logps_gradcheck(bias, monkeypatch):
    monkeypatch.setattr(TargetLogps, "CHUNK", {"cpu": 1})
    assert torch.autograd.gradcheck(TargetLogps.apply, scoring(6, 70, 3, torch.float64, bias))


def test_target_logps_under_autocast():
    h, weight, bias, targets = scoring(V=300)
    exact = TargetLogps.apply(h, weight, bias, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = TargetLogps.apply(h.bfloat16(), weight, bias, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=0, atol=0.1)
    for ours, theirs in zip(torch.autograd.grad(ours.sum(), (h, weight, bias)), torch.autograd.grad(exact.sum(), (h, weight, bias))):
        assert ours.dtype == torch.float32 and F.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.999


def test_target_logps_never_hold_all_logits(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.numel = max([self.numel] + [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)])
            return out

    monkeypatch.setattr(TargetLogps, "CHUNK", {"cpu": 400 * 64})
    h, weight, bias, targets = scoring(S=400, V=1000)
    with Largest() as largest:
        TargetLogps.apply(h, weight, bias, targets).sum().backward()
    assert largest.numel == 400 * 64 and h.grad is not None  # 64 columns of the logits at a time, of 1000


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products on a CPU.


@pytest.mark.skipif(not model_module.ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("rows", [(300,), (2, 150), (20,)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_by_onednn(rows, bias, monkeypatch):
    """Large products go through oneDNN and equal F.linear, gradients included; the backward's own where they are large."""
    torch.manual_seed(7)
    x, weight = torch.randn(*rows, 512, requires_grad=True), torch.randn(768, 512, requires_grad=True)
    inputs = [x, weight] + [torch.randn(768, requires_grad=True)] * bias
    ours, theirs = model_module.linear(*inputs), F.linear(*inputs)
    assert type(ours.grad_fn).__name__ == "OneDNNBackward"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    some = torch.randn_like(ours)
    for ours, theirs in zip(torch.autograd.grad(ours, inputs, some), torch.autograd.grad(theirs, inputs, some)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)
    for other in (inputs[1][:, :200], inputs[1].double(), inputs[1].bfloat16()):  # narrow, or not fp32
        product = model_module.linear(torch.randn(4096, other.shape[1], dtype=other.dtype), other)
        assert type(product.grad_fn).__name__ != "OneDNNBackward"


@pytest.mark.parametrize("shape", [(1, 1, 512), (1, 512), (2, 512)])
@pytest.mark.parametrize("C_out, bias", [(256, True), (256, False), (250, True)])
def test_product_of_a_single_row(shape, C_out, bias, monkeypatch):
    torch.manual_seed(8)
    calls, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *pair: calls.append(1) or bmm(*pair))
    layer, x = model_module.Linear(512, C_out, bias=bias), torch.randn(shape)
    with torch.no_grad():
        ours = layer(x)
    made_of_pieces = C_out == 256 and shape != (2, 512)
    assert len(calls) == made_of_pieces and layer(x).requires_grad and len(calls) == made_of_pieces  # in training the usual product
    torch.testing.assert_close(ours, F.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-5)


def test_only_scored_positions_are_scored():
    model, pairs = load("phi"), random_pairs(LENGTHS)
    every, some = pack(pairs), pack(pairs, prompt_loss=False)
    wanted = every.owner % 3 != 0
    assert torch.equal(some.scored, wanted.nonzero()[:, 0])
    ours, theirs = model(some), model(every) * wanted
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours, theirs = gradients(model, ours.mean()), gradients(model, theirs.mean())
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)


# ---------------------------------------------------------------------------------------------------------------------
# What must change nothing.


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_gradient_checkpointing_changes_nothing(name):
    model, batch = load(name), pack(random_pairs(LENGTHS))

    def loss():
        if not model.config.moe_layers:
            return model(batch).mean()
        logps, router = model(batch, torch.ones(len(batch.inputs)))
        return logps.mean() + (router[0] * router[1]).mean() / len(logps) ** 2

    expected = gradients(model, loss())
    model.gradient_checkpointing = True
    for key, gradient in gradients(model, loss()).items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-6, msg=key)


def test_bf16_autocast_is_close():
    """Parameters stay fp32, their gradients too, and scores stay near the exact ones."""
    for name in ONE_OF_EACH:
        model, batch = load(name), pack(random_pairs(LENGTHS))
        exact = model(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(batch)
        assert rough.dtype == torch.float32 and (rough - exact).abs().mean() < 0.1, name
        a, b = gradients(model, exact.mean()), gradients(model, rough.mean())
        assert {g.dtype for g in b.values()} == {torch.float32}
        a, b = (torch.cat([g.flatten() for g in some.values()]) for some in (a, b))
        assert F.cosine_similarity(a, b, 0) > 0.95, name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.parametrize("name", ["mistral", "qwen3moe"])
def test_compiled_blocks_change_nothing(name):
    """Nor is anything compiled again for each new size of pack."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset(), counters.clear()
    model, compiled = load(name), load(name)
    for layer in compiled.model.layers:
        layer.compile(dynamic=True)
    graphs = []
    for n in (3, 5, 7, len(LENGTHS)):
        pairs = random_pairs(LENGTHS[:n], seed=n)
        ours, theirs = packed_loss(compiled, pairs), packed_loss(model, pairs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        for a, b in zip(gradients(compiled, ours).values(), gradients(model, theirs).values()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[-1] == graphs[0], graphs


def hypothesis_in(directory):
    """hypothesis, keeping its notes in a scratch directory; the test is skipped without it."""
    hypothesis = pytest.importorskip("hypothesis")
    hypothesis.configuration.set_hypothesis_home_dir(directory)
    return hypothesis, hypothesis.strategies, hypothesis.settings(deadline=None, database=None, derandomize=True)


def test_packed_equals_plain_whatever_the_lengths(tmp_path):
    hypothesis, st, settings = hypothesis_in(tmp_path)
    model, length = load("mistral"), st.integers(1, 12)

    @hypothesis.settings(settings, max_examples=30)
    @hypothesis.given(st.lists(st.tuples(length, length, length), min_size=1, max_size=6))
    def check(lengths):
        pairs = random_pairs(lengths)
        packed, plain = model(pack(pairs)), plain_logps(model.logits, pairs)
        torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
        ours, theirs = gradients(model, packed.mean()), gradients(model, plain.mean())
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)

    check()


# ---------------------------------------------------------------------------------------------------------------------
# Files, as people have them.

TINY = dict(model_type="llama", vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)


def tiny_checkpoint(directory, **changes):
    hf = TINY | changes
    model = Transformer(Config.from_hf(hf), hf).initialise(7)
    model.save_pretrained(directory)
    return model.eval()


def rewrite(directory, change):
    """Pass the tensors of model.safetensors through `change`, a function of {name: tensor}."""
    tensors = load_file(directory / "model.safetensors")
    save_file({key: value.contiguous() for key, value in (change(tensors) or tensors).items()}, directory / "model.safetensors")


def same(a, b):
    tokens = torch.arange(8)[None]
    return torch.equal(a.logits(tokens), b.logits(tokens))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe"])
def test_shards(model_type, tmp_path, monkeypatch):
    options = dict(model_type=model_type, num_experts=3, moe_intermediate_size=4)
    whole = tiny_checkpoint(tmp_path / "whole", **options)
    monkeypatch.setattr(model_module, "SHARD_BYTES", 1000)
    whole.save_pretrained(tmp_path / "whole")  # where a single file stands
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    shards = [[t.nbytes for t in load_file(tmp_path / "whole" / name).values()] for name in names]
    assert all(sum(sizes) <= 1000 or len(sizes) == 1 for sizes in shards)
    assert same(Transformer.from_pretrained(tmp_path / "whole"), whole)
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in whole.parameters())
    if model_type == "llama":
        transformers = pytest.importorskip("transformers")
        _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(info.values()), info
    monkeypatch.undo()
    with torch.no_grad():
        whole.model.layers[0].input_layernorm.weight.fill_(2)
    whole.save_pretrained(tmp_path / "whole")  # and back, where shards stand
    assert [path.name for path in (tmp_path / "whole").glob("model*")] == ["model.safetensors"]
    assert same(Transformer.from_pretrained(tmp_path / "whole"), whole)


def bare(prefix):
    return lambda tensors: {key.removeprefix(prefix): value for key, value in tensors.items()}


def with_buffers(tensors):
    for i in range(2):
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}


@pytest.mark.parametrize("options, change", [
    (dict(model_type="gpt2"), lambda t: with_buffers(t := bare("transformer.")(t)) or t),
    (dict(model_type="opt"), bare("model.")),
    (dict(model_type="opt"), lambda t: bare("model.")(t) | {"lm_head.weight": t["model.decoder.embed_tokens.weight"].clone()}),
    (dict(model_type="opt"), lambda t: {"lm_head.weight": t.pop("model.decoder.embed_tokens.weight")} | t),
    (dict(tie_word_embeddings=True), lambda t: {"lm_head.weight": t.pop("model.embed_tokens.weight")} | t),
    (dict(tie_word_embeddings=True), lambda t: {"lm_head.weight": t["model.embed_tokens.weight"].clone()} | t),
    (dict(), lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
], ids=["gpt2-bare-buffers", "opt-bare", "opt-bare-both-halves", "opt-head-only", "head-only", "both-halves", "inv-freq"])
def test_files_of_other_shapes(options, change, tmp_path):
    """As found on the hub: no prefix, constants among the weights, either half of tied weights."""
    model = tiny_checkpoint(tmp_path, **options)
    rewrite(tmp_path, change)
    again = Transformer.from_pretrained(tmp_path)
    assert same(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert not again.training and all(p.requires_grad for p in again.parameters())


def config(**changes):
    return lambda directory: (directory / "config.json").write_text(json.dumps(json.loads((directory / "config.json").read_text()) | changes))


def without(key):
    def build(directory):
        values = json.loads((directory / "config.json").read_text())
        del values[key]
        (directory / "config.json").write_text(json.dumps(values))
    return build


def weights_in(change):
    return lambda directory: rewrite(directory, change)


def index(weight_map):
    def build(directory):
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return build


def file(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def instead(name):
    return lambda directory: (directory / "model.safetensors").rename(directory / name)


def cut(directory, keep=-40):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


NORM = "model.layers.1.input_layernorm.weight"
BAD_MODELS = [
    ("no config", lambda d: (d / "config.json").unlink(), "no config.json"),
    ("config is no JSON", file("config.json", b"{"), "config.json: cannot be read as JSON"),
    ("config is a list", file("config.json", b"[]"), "config.json: a JSON object is expected"),
    ("config is binary", file("config.json", b"\xff\x00"), "config.json: cannot be read as JSON"),
    ("no model_type", without("model_type"), "model_type None is not supported; supported are llama, mistral, qwen2, qwen3, phi, opt, gpt2, mixtral, qwen3_moe"),
    ("foreign model_type", config(model_type="t5"), "model_type 't5' is not supported; supported are llama"),
    ("odd model_type", config(model_type=["llama"]), "not supported; supported are"),
    ("no hidden_size", without("hidden_size"), "config.json: .*hidden_size"),
    ("text for a number", config(hidden_size="8"), "config.json: .*makes no sense"),
    ("no heads", config(num_attention_heads=0), "config.json: .*makes no sense"),
    ("negative layers", config(num_hidden_layers=-1), "num_hidden_layers = -1"),
    ("endless layers", config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    ("immense", config(hidden_size=2**40), "config.json: .*makes no sense"),
    ("wide", config(vocab_size=2**30, hidden_size=2**19, head_dim=2**19, intermediate_size=2**19), "is F32 of shape"),
    ("fraction of a size", config(intermediate_size=12.5), "intermediate_size = 12.5"),
    ("truth for a size", config(num_key_value_heads=True), "num_key_value_heads = True"),
    ("heads that do not divide", config(num_attention_heads=3, num_key_value_heads=2), "3 heads over 2 key/value heads"),
    ("norm_eps of text", config(rms_norm_eps="small"), "norm_eps = 'small'"),
    ("ties of text", config(tie_word_embeddings="yes"), "tie_word_embeddings = 'yes'"),
    ("unknown activation", config(hidden_act="swoosh"), "activation 'swoosh': not supported"),
    ("unknown rope", config(rope_scaling={"rope_type": "yarn", "factor": 2}), "yarn.*not supported"),
    ("rope without its factor", config(rope_scaling={"type": "linear"}), "factor"),
    ("rope by layer type", config(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "not supported"),
    ("rope of text", config(rope_scaling="linear"), "config.json: .*makes no sense"),
    ("rope_theta of text", config(rope_theta="big"), "config.json: .*makes no sense"),
    ("rope_theta of nought", config(rope_theta=0), "rotary positions"),
    ("odd rotary part", config(partial_rotary_factor=0.3), "rotary positions"),
    ("window of nought", config(model_type="mistral", sliding_window=0), "sliding_window = 0"),
    ("window of text", config(model_type="mistral", sliding_window="wide"), "sliding_window = 'wide'"),
    ("layer types", config(model_type="mistral", layer_types=["full_attention"]), "1 layer types for 2 layers"),
    ("more experts a token than there are", config(model_type="mixtral", num_local_experts=2, num_experts_per_tok=3), "3 of 2 experts"),
    ("quantized", config(quantization_config={"quant_method": "gptq"}), "quantized weights .*not supported"),
    ("GPT-2's other scale", config(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), "not supported"),
    ("pickled weights", instead("pytorch_model.bin"), "pickled weights.*refs/pr/N.*save_pretrained"),
    ("no weights", lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    ("truncated", cut, "model.safetensors: cannot be read as safetensors"),
    ("truncated early", lambda d: cut(d, 5), "model.safetensors: cannot be read as safetensors"),
    ("empty file", file("model.safetensors", b""), "model.safetensors: cannot be read as safetensors"),
    ("immense header", file("model.safetensors", b"\xff" * 64), "model.safetensors: cannot be read as safetensors"),
    ("weights are a directory", lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()), "model.safetensors: cannot be read"),
    ("index reaches up", index({NORM: "../x.safetensors"}), "names the file '../x.safetensors'"),
    ("index reaches anywhere", index({NORM: "/etc/x.safetensors"}), "names the file '/etc/x.safetensors'"),
    ("index names a pickle", index({NORM: "pytorch_model.bin"}), "names the file 'pytorch_model.bin'"),
    ("index names no file", index({NORM: "model-9.safetensors"}), "model-9.safetensors: cannot be read"),
    ("index with NUL", index({NORM: "a\0.safetensors"}), "cannot be read"),
    ("index with a lone surrogate", index({NORM: "\ud800.safetensors"}), "cannot be read"),
    ("index without a map", index(None), "no usable weight_map"),
    ("index with an odd map", index({NORM: 3}), "no usable weight_map"),
    ("missing tensor", weights_in(lambda t: {k: v for k, v in t.items() if k != NORM}), f"missing tensors: {NORM}; unexpected tensors: none"),
    ("unexpected tensor", weights_in(lambda t: t | {"model.extra": torch.ones(1)}), "missing tensors: none; unexpected tensors: model.extra"),
    ("mis-shaped tensor", weights_in(lambda t: t | {NORM: torch.ones(9)}), rf"tensor {NORM} is F32 of shape \[9\].*\[8\]"),
    ("scalar tensor", weights_in(lambda t: t | {NORM: torch.tensor(1.0)}), f"tensor {NORM} is F32 of shape"),
    ("integer tensor", weights_in(lambda t: t | {NORM: torch.ones(8, dtype=torch.int8)}), f"tensor {NORM} is I8"),
    ("fp8 tensor", weights_in(lambda t: t | {NORM: torch.ones(8).to(torch.float8_e4m3fn)}), f"tensor {NORM} is F8_E4M3"),
    ("no head", weights_in(lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}), "missing tensors: lm_head.weight"),
    ("halves that differ", config(tie_word_embeddings=True), "lm_head.weight and model.embed_tokens.weight differ"),
    ("generation config", file("generation_config.json", b"nonsense"), "generation_config.json: cannot be read as JSON"),
]


@pytest.mark.parametrize("build, expected", [case[1:] for case in BAD_MODELS], ids=[case[0] for case in BAD_MODELS])
def test_bad_models(build, expected, tmp_path):
    """One line that says what and where, and nothing else raised."""
    tiny_checkpoint(tmp_path)
    build(tmp_path)
    with pytest.raises(UserError, match=expected) as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_hub_id_offline(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody-here/no-such-model", "no such form", "/no/such/directory"):
        with pytest.raises(UserError, match=name):
            Transformer.from_pretrained(name)


def test_config_fuzz(tmp_path):
    """Whatever stands in config.json: a UserError, or a model that runs."""
    hypothesis, st, settings = hypothesis_in(tmp_path)
    names = [*Config.__dataclass_fields__, "n_embd", "n_layer", "n_head", "ffn_dim", "num_local_experts", "sliding_window", "use_sliding_window", "max_window_layers",
             "layer_types", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "attention_bias", "enable_bias", "do_layer_norm_before",
             "word_embed_proj_dim", "qk_layernorm", "decoder_sparse_step", "mlp_only_layers", "scale_attn_weights", "quantization_config"]
    scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(width=16) | st.sampled_from(["llama3", "linear", "gelu", "sliding_attention", "x", ""])
    rope = st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"]), scalars)
    values = scalars | st.lists(scalars, max_size=3) | rope
    families = st.sampled_from(list(model_module.FAMILIES))

    @hypothesis.settings(settings, max_examples=400)
    @hypothesis.given(families, st.dictionaries(st.sampled_from(names), values, max_size=4), st.sampled_from([{}, {"num_experts": 3, "moe_intermediate_size": 4}]))
    def check(family, changes, experts):
        try:
            c = Config.from_hf(TINY | {"model_type": family, "head_dim": 4} | experts | changes)
        except UserError:
            return
        model = Transformer(c).initialise()
        tokens = torch.zeros(1, min(4, model.max_positions or 4), dtype=torch.long)
        assert model.logits(tokens).shape == (*tokens.shape, c.vocab_size)

    @hypothesis.settings(settings, max_examples=300)
    @hypothesis.given(families, st.dictionaries(st.sampled_from(names), values | st.integers() | st.floats() | st.text() | st.integers(-10**400, 10**400), max_size=4))
    def check_any_size(family, changes):
        try:
            Config.from_hf(TINY | {"model_type": family} | changes)
        except UserError:
            pass

    check(), check_any_size()


def test_index_fuzz(tmp_path):
    hypothesis, st, settings = hypothesis_in(tmp_path / "notes")
    tiny_checkpoint(tmp_path)
    index(None)(tmp_path)
    json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
    maps = st.dictionaries(st.text(), json_values | st.text().map(lambda name: name + ".safetensors"), max_size=4)

    @hypothesis.settings(settings, max_examples=300)
    @hypothesis.given(json_values | st.fixed_dictionaries({"weight_map": json_values | maps}))
    def check(value):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(value))
        with pytest.raises(UserError):
            _weight_files(tmp_path)

    check()


MEASURE = """
import sys, torch
from model import Transformer
memory = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
Transformer.from_pretrained(sys.argv[1])  # a tiny one: libraries are loaded, pools are there
before = memory("VmRSS")
model = Transformer.from_pretrained(sys.argv[2])
print((memory("VmHWM") - before) / (4 * sum(p.numel() for p in model.parameters())))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_peak_memory_of_loading(dtype, tmp_path):
    """At most 1.15 times the fp32 parameters, the file's mapped pages included."""
    tiny_checkpoint(tmp_path / "tiny")
    layers = int(os.environ.get("ORPO_TEST_LAYERS", 8))  # 300 MB; 32 layers: 1.1 GB
    hf = TINY | dict(vocab_size=16000, hidden_size=768, intermediate_size=2304, num_hidden_layers=layers, num_attention_heads=12, tie_word_embeddings=True)
    Transformer(Config.from_hf(hf), hf).save_pretrained(tmp_path / "large", dtype=dtype)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.abspath(model_module.__file__))}
    run = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "tiny", tmp_path / "large"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 1.15


KILLS = int(os.environ.get("ORPO_KILLS", 2))  # how many runs are killed; 20: the thorough version of this section

# ---------------------------------------------------------------------------------------------------------------------
# Helpers. A process of its own costs a second with a fork server that has imported torch, three without.


@pytest.fixture(scope="session")
def forks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        patch.setenv("OMP_WAIT_POLICY", "passive")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train", "sample"])
        first = context.Process(target=exec, args=("pass", {}))  # the server starts here, with this environment
        first.start()
        first.join()
        yield context


def start(forks, log, arguments, *, script="train.py", before="", environment={}):
    """Run a script in a process of its own; what it prints goes to `log`.out and `log`.err. `before`: code to run first."""
    for name in ("out", "err"):
        Path(f"{log}.{name}").write_text("")
    code = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open({str(log)!r} + "." + name, os.O_WRONLY), number)
os.environ.update({environment!r})
sys.argv = {[script, *map(str, arguments)]!r}
{before}
runpy.run_path({str(HERE / script)!r}, run_name="__main__")
"""
    process = forks.Process(target=exec, args=(code, {"__name__": "child"}))
    process.start()
    return process


def finish(process, log, seconds=120):
    """(exit status, standard output, standard error) of a started process."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"still running after {seconds} s")
    return process.exitcode, Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text()


def ranks(forks, count, log, arguments, **options):
    """The processes of `count` ranks, as torchrun would start them."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(forks, f"{log}-{r}", arguments, environment=world | {"RANK": str(r), "LOCAL_RANK": str(r)}, **options) for r in range(count)]


def run(*arguments):
    """train.py in this process; the signal handlers it sets are taken back."""
    kept, threads = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes of `start`: bit for bit holds for one number of threads
    try:
        return train.main(*train.parse([str(a) for a in arguments]))
    finally:
        torch.set_num_threads(threads)
        for number, handler in kept.items():
            signal.signal(number, handler)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lengths_differ(count, seed=0):
    """Rows whose prompts and answers have many lengths."""
    rng = np.random.default_rng(seed)
    text = lambda least, most: "".join(rng.choice(list("abcdefgh "), rng.integers(least, most)))
    return [{"prompt": text(3, 20), "chosen": "x" + text(2, 25), "rejected": "y" + text(2, 25)} for _ in range(count)]


def lines(directory, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(directory) / name).read_text().splitlines()]


TIMES = ("pairs_per_second", "tokens_per_second", "peak_memory_gb")


def curve(directory):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines(directory)]


def weights(directory):
    """Bytes of the model and, where it is a checkpoint, of the optimizer."""
    return [(Path(directory) / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors") if (Path(directory) / name).exists()]


def same_run(one, other, steps):
    """The final weights, the last checkpoint, and each line of the metrics, bit for bit."""
    last = f"checkpoint-{steps}"
    return weights(one) == weights(other) and weights(Path(one) / last) == weights(Path(other) / last) and curve(one) == curve(other)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", lengths_differ(26))


STEPS = 8
# 23 pairs to train on, 5 a step: the fifth step of an epoch has 3


@pytest.fixture(scope="session")
def flags(pairs_file):
    return ["--data", pairs_file, "--eval_pairs", 3, "--batch_size", 5, "--lr_scheduler_type", "constant", "--warmup_steps", 3, "--learning_rate", 3e-3,
            "--logging_steps", 1, "--eval_steps", 4, "--save_steps", 2, "--save_total_limit", 0]


@pytest.fixture(scope="session")
def whole(tmp_path_factory, flags, forks):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = start(forks, out.parent / "log", [*flags, "--max_steps", STEPS, "--output_dir", out])
    assert finish(done, out.parent / "log")[0] == 0
    return out


@pytest.fixture
def interrupted(whole, tmp_path):
    """The same run as after a kill in step 7: checkpoints 2, 4 and 6, metrics beyond them, no model."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-8")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).unlink()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 0.1')  # a line that was cut off
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The demo, and what a run writes.


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo, shortened: `python train.py` as one types it."""
    home = tmp_path_factory.mktemp("demo")
    done = subprocess.run([sys.executable, HERE / "train.py", "--max_steps", "40", "--logging_steps", "10", "--eval_steps", "20"], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "out", done.stdout


def test_demo_prints_progress_a_table_and_the_next_command(demo):
    out, printed = demo
    assert "step 40/40" in printed and re.search(r"reward accuracy +0\.\d+ +0\.\d+", printed) and "exact greedy answers" in printed
    assert printed.rstrip().endswith('python sample.py --model out --prompt "Which is larger, 12 or 90?"')


def test_files_of_a_run(demo):
    out, _ = demo
    train_lines = [line for line in lines(out) if "loss" in line]
    eval_lines = [line for line in lines(out) if "eval_loss" in line]
    assert [line["step"] for line in train_lines] == [10, 20, 30, 40] and [line["step"] for line in eval_lines] == [0, 20, 40]
    assert all(list(line) == ["step", "epoch", *METRICS, "grad_norm", "learning_rate", *TIMES] for line in train_lines)
    assert all(list(line) == ["step", "epoch", *(f"eval_{name}" for name in METRICS)] for line in eval_lines)
    last = train_lines[-1]
    assert last["loss"] == pytest.approx(last["nll_loss"] - 0.5 * last["log_odds_ratio"], rel=1e-5) and last["epoch"] == pytest.approx(40 * 32 / 3000, abs=1e-5)
    assert last["rewards/margins"] == pytest.approx(0.5 * (last["logps/chosen"] - last["logps/rejected"]), rel=1e-4)
    recorded = json.loads((out / "train_config.json").read_text())
    assert list(recorded) == [field.name for field in dataclasses.fields(train.Flags)] and recorded["max_steps"] == 40 and recorded["beta"] == 0.5
    assert sorted(os.listdir(out)) == ["checkpoint-40", "config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "train_config.json"]


def test_the_model_loads_here_and_in_transformers(demo):
    out, _ = demo
    model, tokens = Transformer.from_pretrained(out), torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
    auto = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(auto(tokens).logits.float(), model.logits(tokens), rtol=1e-4, atol=1e-4)


def test_generation_config_and_shards_of_an_older_model_do_not_stay(flags, tmp_path):
    out = tmp_path / "out"
    run(*flags, "--output_dir", out, "--max_steps", 1)
    stale = ["generation_config.json", "chat_template.jinja", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "checkpoint-9"]
    for name in stale[:-1]:
        (out / name).write_text("{}")
    shutil.copytree(out / "checkpoint-1", out / "checkpoint-9")
    (out / "notes.txt").write_text("mine")
    run(*flags, "--output_dir", out, "--max_steps", 2, "--overwrite_output_dir")
    assert not [name for name in stale if (out / name).exists()] and (out / "notes.txt").read_text() == "mine"
    assert [line["step"] for line in lines(out)] == [0, 1, 2, 2]


def test_seed(flags, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(*flags, "--max_steps", 3, "--seed", seed, "--output_dir", tmp_path / name)
    assert same_run(tmp_path / "a", tmp_path / "b", 3) and weights(tmp_path / "a") != weights(tmp_path / "c")


def test_dry_run_writes_nothing(flags, tmp_path, capsys):
    assert run(*flags, "--dry_run", "--output_dir", tmp_path / "out") == 0
    assert not (tmp_path / "out").exists() and "chosen:" in capsys.readouterr().out


@pytest.mark.parametrize("prompt_loss", [True, False])
def test_dry_run_shows_what_is_trained(prompt_loss):
    pairs = data.tokenize_pairs([dict(prompt="ab", chosen="c\n", rejected="d")], demo_tokenizer())
    assert data.describe(pairs, demo_tokenizer(), prompt_loss).split("\n") == [
        "", "row 1",
        f"  prompt: 2 tokens, scored by {'L_SFT (from the second token on)' if prompt_loss else 'nothing'}", "    a|b",
        "  chosen: 3 tokens, scored by L_SFT and L_OR", "    c|\\n|<|endoftext|> <- EOS",
        "  rejected: 2 tokens, scored by L_OR", "    d|<|endoftext|> <- EOS",
        "", "mean tokens: prompt 2, chosen 3, rejected 2; longest 2, 3, 2"]


def test_save_dtype_and_samples(flags, tmp_path):
    run(*flags, "--max_steps", 2, "--eval_steps", 2, "--save_dtype", "bfloat16", "--generate_during_eval", 2, "--output_dir", tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "checkpoint-2" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert [line["step"] for line in lines(tmp_path, "samples.jsonl")] == [0, 0, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def test_sample_one_prompt(demo, capsys):
    out, _ = demo
    sample.main(sample.parse(["--model", str(out), "--prompt", "Which is larger, 31 or 50?", "--max_new_tokens", "30"]))
    printed = capsys.readouterr()
    tokenizer, model = Tokenizer.from_pretrained(out), Transformer.from_pretrained(out)
    ids = tokenizer.encode("Which is larger, 31 or 50?\n")
    assert sample.prompt_ids("Which is larger, 31 or 50?", tokenizer) == ids
    with torch.inference_mode():  # greedy by the plain path, without a cache
        for _ in range(30):
            token = int(model.logits(torch.tensor([ids]))[0, -1].argmax())
            if token == tokenizer.eos_id:
                break
            ids.append(token)
    assert printed.out.rstrip("\n") == tokenizer.decode(ids).partition("\n")[2] and "tokens/s" in printed.err


def test_sample_streams_what_it_returns(demo, capsys):
    """Byte tokens at a high temperature: characters in several pieces, and bytes that are none."""
    out, _ = demo
    tokenizer, model = Tokenizer.from_pretrained(out), Transformer.from_pretrained(out)
    args = sample.parse(["--max_new_tokens", "200"])
    for seed in range(3):
        choice = dict(temperature=5.0, generator=torch.Generator().manual_seed(seed))
        text = sample.answer(model, tokenizer, tokenizer.encode("héllo 世"), args, choice)
        assert text.startswith(capsys.readouterr().out[:-1])  # half a character at the end is not shown


def test_sample_chat(demo, capsys, monkeypatch):
    out, _ = demo
    monkeypatch.setattr(sys, "stdin", io.StringIO("Which is larger, 31 or 50?\n\n/new\nhi\n"))
    seen = []
    monkeypatch.setattr(sample, "answer", lambda model, tokenizer, ids, args, choice: seen.append(tokenizer.decode(ids)) or "an answer")
    sample.main(sample.parse(["--model", str(out)]))
    assert seen == ["Which is larger, 31 or 50?\n", "hi\n"]
    history = []
    monkeypatch.setattr(Tokenizer, "apply_chat_template", lambda self, messages, add_generation_prompt: history.append([m["content"] for m in messages]) or "x")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n/new\nthree\n"))
    sample.main(sample.parse(["--model", str(out), "--system", "be brief"]))
    assert history == [["be brief", "one"], ["be brief", "one", "an answer", "two"], ["be brief", "three"]]


def test_chat_goes_on_after_a_message_that_cannot_be_answered(demo, capsys, monkeypatch):
    out, _ = demo
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))

    def refuse(*_):
        raise UserError("too long")

    monkeypatch.setattr(sample, "answer", refuse)
    sample.main(sample.parse(["--model", str(out)]))
    assert capsys.readouterr().err.count("too long (/new starts afresh)") == 2


def test_sample_file(demo, tmp_path, capsys):
    out, _ = demo
    questions = [f"Which is larger, {a} or {b}?" for a, b in ((12, 90), (45, 23), (71, 17))] + ["hello"]
    rows = [{"prompt": q} for q in questions[:3]] + [{"prompt": [{"role": "user", "content": "hello"}]}]
    write_rows(tmp_path / "q.jsonl", rows)
    (tmp_path / "q.txt").write_bytes("\ufeff".encode() + "\r\n\r\n".join(questions).encode())  # BOM, CRLF, blank lines
    common = ["--model", str(out), "--batch_size", "3", "--max_new_tokens", "20"]
    sample.main(sample.parse([*common, "--prompts", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl")]))
    answers = lines(tmp_path, "a.jsonl")
    assert [row["prompt"] for row in answers] == [row["prompt"] for row in rows]
    capsys.readouterr()
    sample.main(sample.parse([*common, "--prompts", str(tmp_path / "q.txt")]))  # to standard output
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in shown] == [row["answer"] for row in answers] and [row["prompt"] for row in shown] == questions
    for question, row in zip(questions, answers):  # as alone, without padding
        sample.main(sample.parse([*common, "--prompt", question]))
        assert capsys.readouterr().out == row["answer"] + "\n"


def test_sample_raw_and_seed(demo, capsys):
    out, _ = demo
    tokenizer = Tokenizer.from_pretrained(out)
    assert sample.prompt_ids("hi", tokenizer, raw=True) == tokenizer.encode("hi") != sample.prompt_ids("hi", tokenizer)
    said = []
    for seed in (1, 1, 2):
        sample.main(sample.parse(["--model", str(out), "--prompt", "hi", "--raw", "--temperature", "1", "--seed", str(seed), "--max_new_tokens", "20"]))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_pick():
    generator = torch.Generator().manual_seed(0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20_000, 4)
    share = lambda **choice: torch.bincount(sample.pick(logits, generator=generator, **choice), minlength=4) / 20_000
    close = lambda got, expected: torch.testing.assert_close(got, torch.tensor(expected), atol=0.015, rtol=0)
    close(share(temperature=1.0), [0.5, 0.3, 0.15, 0.05])
    close(share(temperature=1.0, top_k=2), [0.625, 0.375, 0.0, 0.0])
    close(share(temperature=1.0, top_k=99), [0.5, 0.3, 0.15, 0.05])
    close(share(temperature=1.0, top_p=0.8), [0.625, 0.375, 0.0, 0.0])  # the first two have 0.8 together
    close(share(temperature=1.0, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0])
    close(share(temperature=1.0, top_p=1e-6), [1.0, 0.0, 0.0, 0.0])
    close(share(temperature=1.0, top_k=3, top_p=0.6), [0.625, 0.375, 0.0, 0.0])  # top_p of what top_k leaves: 0.53, 0.32, 0.16
    close(share(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])
    for temperature in (0.0, 1e-9, 1e-50):
        close(share(temperature=temperature), [1.0, 0.0, 0.0, 0.0])


def test_the_default_template_is_saved_with_the_model(flags, tmp_path):
    """A model without a chat template, trained on conversations, is asked afterwards as it was trained."""
    good_model(tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": f"a{i}"}], "rejected": [{"role": "assistant", "content": "b"}]} for i in range(3)]
    run("--model", tmp_path / "m", "--data", write_rows(tmp_path / "c.jsonl", rows), "--max_steps", 1, "--output_dir", tmp_path / "out")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(sample.prompt_ids("q", tokenizer)) == "<|user|>\nq<|endoftext|>\n<|assistant|>\n"


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("stopped", [1, 5])
def test_resume_with_more_steps_is_exact(whole, flags, tmp_path, stopped):
    """Stopped in mid-epoch after 1 step, and at the end of an epoch after 5; the last line of the metrics is of all its steps."""
    out = tmp_path / "out"
    run(*flags, "--max_steps", stopped, "--output_dir", out)
    run("--resume", "--max_steps", STEPS, "--output_dir", out)
    assert weights(out) == weights(whole) and weights(out / "checkpoint-8") == weights(whole / "checkpoint-8")
    assert [line for line in curve(out) if "loss" in line] == [line for line in curve(whole) if "loss" in line]


def test_resume_after_a_kill_is_exact(whole, interrupted, capsys):
    run("--resume", "--output_dir", interrupted)  # nothing else: the flags are the recorded ones
    assert same_run(whole, interrupted, STEPS)
    assert "resumed after step 6" in capsys.readouterr().out


def test_resume_in_the_middle_of_a_line_of_metrics(flags, tmp_path):
    """Logging every 3 steps, saving every 2: the sums of the open line are in the checkpoint."""
    often = [*flags, "--logging_steps", 3, "--max_steps", 6]
    run(*often, "--output_dir", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    run("--resume", "--output_dir", tmp_path / "b")
    assert [line["step"] for line in lines(tmp_path / "b") if "loss" in line] == [3, 6] and same_run(tmp_path / "a", tmp_path / "b", 6)


def test_epochs_asked_for_outweigh_recorded_steps(interrupted):
    run("--resume", "--num_train_epochs", 2, "--output_dir", interrupted)
    assert lines(interrupted)[-1]["step"] == 10 and lines(interrupted)[-1]["epoch"] == 2


def test_resume_of_a_finished_run_changes_nothing(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "model.safetensors").unlink()
    run("--resume", "--output_dir", out)
    assert same_run(whole, out, STEPS)


@pytest.mark.parametrize("given, named", [(["--beta", "0.2"], "--beta 0.2"), (["--seed", "1"], "--seed 1"), (["--batch_size", "6"], "--batch_size 6"),
                                         (["--no-prompt_loss"], "--prompt_loss False"), (["--data", "other.jsonl"], "--data"), (["--learning_rate", "1"], "--learning_rate 1")])
def test_resume_refuses_changed_flags(interrupted, given, named):
    before = sorted(os.listdir(interrupted)), (interrupted / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=re.escape(named) + ".* would change the run, which has"):
        run("--resume", "--output_dir", interrupted, *given)
    assert (sorted(os.listdir(interrupted)), (interrupted / "metrics.jsonl").read_bytes()) == before


def test_resume_takes_flags_that_do_not_change_the_run(whole, interrupted, pairs_file):
    run("--resume", "--output_dir", interrupted, "--max_tokens", 4000, "--logging_steps", 2, "--eval_steps", 0, "--save_total_limit", 1, "--beta", 0.1, "--data", pairs_file)
    assert weights(interrupted) == weights(whole) and os.listdir(interrupted).count("checkpoint-8") == 1 and not (interrupted / "checkpoint-6").exists()


def test_resume_refuses_other_data(flags, tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", lengths_differ(26))
    run(*flags, "--data", file, "--max_steps", 1, "--output_dir", tmp_path / "out")
    rows = lengths_differ(26)
    rows[0]["chosen"] += "!"
    write_rows(file, rows)
    with pytest.raises(UserError, match="the pairs are not those"):
        run("--resume", "--output_dir", tmp_path / "out", "--max_steps", 2)


def truncate(checkpoint):
    file = checkpoint / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(checkpoint):
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


DAMAGES = {
    "truncated": (truncate, "optimizer.safetensors is not what was written"),
    "a flipped bit": (flip, "model.safetensors is not what was written"),
    "a file missing": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest cannot be used"),
    "manifest garbage": (lambda c: (c / "manifest.json").write_bytes(b"\xff\x00{"), "manifest cannot be used"),
    "manifest empty": (lambda c: (c / "manifest.json").write_text("{}"), "manifest is incomplete"),
    "all files gone": (lambda c: [file.unlink() for file in c.iterdir()], "manifest cannot be used"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(whole, interrupted, capfd, name):
    spoil, reported = DAMAGES[name]
    spoil(interrupted / "checkpoint-6")
    run("--resume", "--output_dir", interrupted)
    printed = capfd.readouterr()
    assert re.search(f"checkpoint-6 is damaged .*{reported}.*: going back", printed.err) and "resumed after step 4" in printed.out
    assert same_run(whole, interrupted, STEPS)


def test_no_checkpoint_is_an_error_that_names_the_way_out(interrupted, tmp_path):
    for step in (2, 4, 6):
        truncate(interrupted / f"checkpoint-{step}")
    for out in (interrupted, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no checkpoint to resume from; start afresh"):
            run("--resume", "--output_dir", out)
    assert sorted(train.checkpoints(interrupted)) == [2, 4, 6]  # they may hold what a person can save


def test_leftovers_of_a_kill_go(whole, interrupted):
    shutil.copytree(interrupted / "checkpoint-6", interrupted / "checkpoint-7.tmp")
    shutil.copytree(interrupted / "checkpoint-6", interrupted / "final")
    (interrupted / "final.tmp").mkdir()
    run("--resume", "--output_dir", interrupted)
    assert sorted(os.listdir(interrupted)) == sorted(os.listdir(whole)) and same_run(whole, interrupted, STEPS)


@pytest.mark.parametrize("limit, left", [(1, [6]), (2, [5, 6]), (0, [1, 2, 3, 4, 5, 6])])
def test_save_total_limit(flags, tmp_path, limit, left):
    run(*flags, "--eval_steps", 0, "--save_steps", 1, "--max_steps", 6, "--save_total_limit", limit, "--output_dir", tmp_path)
    assert list(train.checkpoints(tmp_path)) == left and not any(train.damage(d) for d in train.checkpoints(tmp_path).values())


def test_save_steps_0_writes_the_model_alone(flags, tmp_path):
    run(*flags, "--max_steps", 2, "--save_steps", 0, "--output_dir", tmp_path)
    assert not train.checkpoints(tmp_path) and (tmp_path / "model.safetensors").exists()


def test_only_checkpoints_are_taken_for_checkpoints(tmp_path):
    for name in ("checkpoint-7", "checkpoint-007", "checkpoint-²", "checkpoint-", "checkpoint-x", "checkpoint-8.tmp", "checkpoint-10"):
        (tmp_path / name).mkdir()
    assert list(train.checkpoints(tmp_path)) == [7, 10]


def test_cut_back(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_bytes('{"step": 1, "a": "ä"}\n{"step": 3}\n{"step": 2}\n{"step": 2, "a": "ä'.encode()[:-1])  # cut off inside of a character
    train.cut_back(str(file), 2)
    assert file.read_text() == '{"step": 1, "a": "ä"}\n{"step": 2}\n'


def test_bit_for_bit_on_three_ranks(forks, flags, tmp_path):
    """DDP's first backward sums in another order than the later ones; with three ranks that is another result."""
    args = [*flags, "--eval_steps", 0, "--max_steps", 4]
    for r, process in enumerate(ranks(forks, 3, tmp_path / "a", [*args, "--output_dir", tmp_path / "a"])):
        assert finish(process, tmp_path / f"a-{r}")[0] == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    for r, process in enumerate(ranks(forks, 3, tmp_path / "b", ["--resume", "--output_dir", tmp_path / "b"])):
        assert finish(process, tmp_path / f"b-{r}")[0] == 0
    assert same_run(tmp_path / "a", tmp_path / "b", 4)


def test_resume_on_another_number_of_ranks(forks, whole, interrupted):
    """The same to floating-point order."""
    for r, process in enumerate(ranks(forks, 2, interrupted.parent / "log", ["--resume", "--output_dir", interrupted, "--max_tokens", 100])):
        assert finish(process, interrupted.parent / f"log-{r}")[0] == 0
    assert [line["step"] for line in curve(interrupted)] == [line["step"] for line in curve(whole)] and largest_difference([curve(whole), curve(interrupted)], ["loss", "grad_norm"]) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Kills and signals

SLOW_WRITE = "import time\nsync = os.fsync\nos.fsync = lambda handle: (time.sleep({}), sync(handle))\n"  # seconds for each file of a checkpoint


def wait_for(seen, alive, seconds=60):
    """Until seen() is true, or alive() no more."""
    until = time.monotonic() + seconds
    while not seen() and alive():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.002)


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_runs_resume(forks, flags, whole, tmp_path, number):
    """SIGKILL twice to a run: even ones at any moment, odd ones inside of a checkpoint's writing; then it ends as if nothing had been."""
    out, chance, kills = tmp_path / "out", random.Random(number), []
    while len(kills) < 2:
        done = max(train.checkpoints(out), default=0)
        again = ["--resume"] if done else [*flags, "--max_steps", STEPS, "--overwrite_output_dir"]
        process = start(forks, tmp_path / "log", [*again, "--output_dir", out], before=SLOW_WRITE.format(0.03))
        if number % 2:
            target = chance.choice(range(done + 2, STEPS + 1, 2))
            wait_for(lambda: list(out.glob(f"checkpoint-{target}.tmp/*")), process.is_alive)
            time.sleep(chance.uniform(0, 0.2))
        else:
            wait_for(lambda: " steps an epoch" in (tmp_path / "log.out").read_text(), process.is_alive)
            time.sleep(chance.uniform(0, 1.2))
        inside = [path.name for path in out.glob("*.tmp")]
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster
            shutil.rmtree(out / f"checkpoint-{STEPS}")
        else:
            kills.append(f"after {max(train.checkpoints(out), default=0)}" + "".join(f", inside of {name}" for name in inside))
    assert not any(train.damage(directory) for directory in train.checkpoints(out).values())  # complete or absent
    process = start(forks, tmp_path / "log", ["--resume", "--output_dir", out] if train.checkpoints(out) else [*flags, "--max_steps", STEPS, "--overwrite_output_dir", "--output_dir", out])
    assert finish(process, tmp_path / "log")[0] == 0
    print(f"killed: {'; '.join(kills)}")
    assert same_run(whole, out, STEPS) and not list(out.glob("*.tmp"))


@pytest.mark.parametrize("number, status, moment", [(signal.SIGTERM, 143, 2 + i % 5) for i in range(max(1, KILLS // 4))] + [(signal.SIGINT, 130, 3)])
def test_a_signal_finishes_the_step_saves_and_ends(forks, flags, whole, tmp_path, number, status, moment):
    out, log = tmp_path / "out", tmp_path / "log"
    slow = "import time, data\nmake = data.make_packs\ndata.make_packs = lambda *a, **k: (time.sleep(0.2), make(*a, **k))[1]\n"
    process = start(forks, log, [*flags, "--save_steps", 100, "--max_steps", STEPS, "--output_dir", out], before=slow)
    wait_for(lambda: f"step {moment}/" in Path(f"{log}.out").read_text(), process.is_alive)
    os.kill(process.pid, number)
    code, printed, errors = finish(process, log, 30)
    (saved,) = train.checkpoints(out)
    assert code == status and f"{number.name}: stopped after step {saved}, which is saved; go on with --resume" in printed and not errors
    assert moment <= saved < STEPS and lines(out)[-1]["step"] == saved and not (out / "model.safetensors").exists()
    run("--resume", "--output_dir", out)
    assert same_run(whole, out, STEPS)


def test_a_second_sigint_ends_at_once(forks, flags, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(forks, log, [*flags, "--max_steps", 99, "--output_dir", out], before=SLOW_WRITE.format(30))
    wait_for(lambda: list(out.glob("checkpoint-2.tmp/manifest.json")), process.is_alive)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert finish(process, log, 5)[0] == -signal.SIGINT


def test_sigint_before_the_loop_needs_no_traceback(forks, flags, tmp_path):
    before = "import data, signal\ndata.read_pairs = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
    assert finish(start(forks, tmp_path / "log", [*flags, "--output_dir", tmp_path / "out"], before=before), tmp_path / "log") == (130, "", "")


def torchrun(home, flags):
    """torchrun with two ranks, in the step loop; (process, the pids of its workers, its log)."""
    log, script = home / "log", home / "train.py"  # the script leaves its pid behind
    script.write_text(f"import os, runpy, sys\nopen({str(home)!r} + '/pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\nsys.path.insert(0, {str(HERE)!r})\nrunpy.run_path({str(HERE / 'train.py')!r}, run_name='__main__')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags, "--max_steps", 100_000, "--save_steps", 0, "--eval_steps", 0, "--output_dir", home / "out"]
    with open(log, "w") as file:
        process = subprocess.Popen([str(part) for part in command], stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"})
    wait_for(lambda: (home / "out" / "metrics.jsonl").exists(), lambda: process.poll() is None)
    return process, [int((home / f"pid{r}").read_text()) for r in range(2)], log


def test_torchrun_all_ranks_agree_on_the_step(flags, tmp_path):
    process, workers, log = torchrun(tmp_path, flags)
    os.kill(workers[1], signal.SIGTERM)  # one alone: the other must hear of it
    process.wait(60)
    printed = log.read_text()
    (saved,) = train.checkpoints(tmp_path / "out")
    assert f"SIGTERM: stopped after step {saved}, which is saved" in printed and "exitcode  : 143" in printed, printed
    assert not train.damage(tmp_path / "out" / f"checkpoint-{saved}")


def test_torchrun_a_dead_rank_takes_the_others_down(flags, tmp_path):
    process, workers, log = torchrun(tmp_path, flags)
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(60) == 1 and "train.py: rank 0 ends because another rank has ended" in log.read_text()
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_no_rank_ends_before_the_checkpoint_is_written(forks, flags, tmp_path):
    """torchrun kills the other ranks half a minute after one has ended."""
    out = tmp_path / "out"
    first, second = ranks(forks, 2, tmp_path / "log", [*flags, "--eval_steps", 0, "--save_steps", 0, "--max_steps", 10000, "--output_dir", out], before=SLOW_WRITE.format(0.2))
    wait_for(lambda: (out / "metrics.jsonl").exists(), first.is_alive)
    os.kill(second.pid, signal.SIGTERM)
    code, _, errors = finish(second, tmp_path / "log-1")
    assert code == 143 and len(train.checkpoints(out)) == 1 and not list(out.glob("*.tmp")), errors
    assert finish(first, tmp_path / "log-0")[0] == 143


# ---------------------------------------------------------------------------------------------------------------------
# The trajectory does not depend on the hardware.


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory):
    """A mixture of experts over the demo's bytes, with its tokenizer."""
    directory = tmp_path_factory.mktemp("moe")
    hf = dict(model_type="mixtral", architectures=["MixtralForCausalLM"], vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1, max_position_embeddings=256, eos_token_id=256)
    model = Transformer(Config.from_hf(hf), hf).initialise(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # routes that differ
    model.save_pretrained(directory, torch.float32)
    demo_tokenizer().save_pretrained(directory)
    return directory


def largest_difference(curves, keys):
    """Over all runs and steps, relative to the first run."""
    first, *others = [[[line[key] for key in keys] for line in curve if "loss" in line] for curve in curves]
    return max(np.max(np.abs(np.array(other) - first) / np.abs(first)) for other in others)


HARDWARE = {  # name: (model, batch size, more): 23 pairs are trained on
    "an uneven batch, a short last one": ("", 7, []),
    "fewer pairs than ranks": ("", 2, ["--no-prompt_loss"]),
    "mixture of experts": ("moe", 7, ["--output_router_logits"]),
}


@pytest.mark.parametrize("name", HARDWARE)
def test_ranks_and_max_tokens_change_nothing(forks, flags, tiny_moe, tmp_path, name):
    model, batch_size, more = HARDWARE[name]
    keys = ["loss", "nll_loss", "grad_norm"] + ["aux_loss"] * (model == "moe")
    args = [*flags, *more, "--batch_size", batch_size, "--learning_rate", 1e-3, "--save_steps", 0, "--max_steps", 10]
    args += ["--model", tiny_moe] if model else []
    runs = [(1, 70), (1, 150), (1, 8192), (2, 70), (3, 150)]
    if KILLS >= 20:  # all of them
        runs = [(count, tokens) for count in (1, 2, 3) for tokens in (70, 150, 8192)]
    for count, tokens in runs:
        out = tmp_path / f"{count}-{tokens}"
        here = [*args, "--max_tokens", tokens, "--output_dir", out]
        if count == 1:
            run(*here)
        else:
            for r, process in enumerate(ranks(forks, count, out, here)):
                code, _, errors = finish(process, f"{out}-{r}")
                assert code == 0, errors
    curves = [curve(tmp_path / f"{count}-{tokens}") for count, tokens in runs]
    evaluations = [[line for line in c if "eval_loss" in line] for c in curves]
    worst, worst_eval = largest_difference(curves, keys), max(abs(e[-1]["eval_loss"] / evaluations[0][-1]["eval_loss"] - 1) for e in evaluations)
    print(f"{name}: largest relative difference over 10 steps: training {worst:.1e}, evaluation {worst_eval:.1e}")
    assert worst < 1e-4 and worst_eval < 1e-4


def test_the_smallest_max_tokens_is_named_and_works(flags, tiny_moe, tmp_path):
    for more in ([], ["--model", tiny_moe], ["--model", tiny_moe, "--output_router_logits"]):
        args = [*flags, *more, "--max_steps", 5, "--overwrite_output_dir", "--output_dir", tmp_path]
        with pytest.raises(UserError, match="use at least that") as refused:
            run(*args, "--max_tokens", 30)
        needed = int(re.search(r"needs (\d+)", str(refused.value))[1])
        with pytest.raises(UserError, match="use at least that"):
            run(*args, "--max_tokens", needed - 1)
        assert run(*args, "--max_tokens", needed) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, weight decay, clipping, normalisation


@pytest.mark.parametrize("kind", ["linear", "cosine", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_transformers(kind, warmup):
    """After the warmup; within it, ours is one step ahead: it begins above 0 and reaches the peak in its last step."""
    transformers = pytest.importorskip("transformers")
    flags = train.Flags(learning_rate=2.0, lr_scheduler_type=kind, warmup_steps=warmup, warmup_ratio=0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = transformers.get_scheduler("constant_with_warmup" if kind == "constant" else kind, optimizer, warmup, 50)
    for step in range(50):
        expected = 2.0 * (step + 1) / warmup if step < warmup else theirs.get_last_lr()[0]
        assert train.learning_rate(flags, step, 50) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        theirs.step()


def test_warmup_ratio():
    flags = train.Flags(learning_rate=1.0, warmup_ratio=0.1)
    assert [train.learning_rate(flags, step, 25) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1 - 0 / 22])


class Watched(torch.optim.AdamW):
    """AdamW that remembers its groups and the gradient norm of each step."""

    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        Watched.groups, Watched.norms = self.param_groups, []

    def step(self):
        Watched.norms.append(float(torch.nn.utils.get_total_norm([p.grad for group in self.param_groups for p in group["params"]])))
        return super().step()


def test_weight_decay_and_clipping(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    run(*flags, "--max_steps", 3, "--weight_decay", 0.1, "--max_grad_norm", 0.25, "--output_dir", tmp_path / "a")
    decayed, kept = Watched.groups
    assert decayed["weight_decay"] == 0.1 and all(p.ndim == 2 for p in decayed["params"]) and kept["weight_decay"] == 0 and all(p.ndim == 1 for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(load_file(tmp_path / "a" / "model.safetensors"))
    logged = [line["grad_norm"] for line in lines(tmp_path / "a") if "loss" in line]
    assert Watched.norms == pytest.approx([0.25] * 3, rel=1e-4) and min(logged) > 0.3  # before clipping
    run(*flags, "--max_steps", 2, "--max_grad_norm", 0, "--output_dir", tmp_path / "b")
    assert Watched.norms == pytest.approx([line["grad_norm"] for line in lines(tmp_path / "b") if "loss" in line], rel=1e-4)


def plain_sft(pairs, prompt_loss):
    """Token-mean negative log-likelihood of the demo's first weights on prompt + chosen, by the plain path; one pair at a time."""
    hf = train.DEMO_SHAPE | {"vocab_size": 257}
    model, total, count = Transformer(Config.from_hf(hf), hf).initialise(0), 0.0, 0
    for prompt, chosen, _ in pairs:
        ids = torch.tensor([[*prompt, *chosen]])
        logps = model.logits(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        logps = logps if prompt_loss else logps[len(prompt) - 1 :]
        total, count = total - logps.sum(), count + len(logps)
    loss = total / count
    loss.backward()
    return float(loss.detach()), float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


@pytest.mark.parametrize("prompt_loss", [True, False])
def test_beta_0_is_plain_sft_normalised_over_the_whole_batch(pairs_file, flags, tmp_path, prompt_loss):
    """With packs of one or two pairs, whose own means would give another number."""
    given = [*flags, "--eval_pairs", 0, "--beta", 0, "--max_steps", 1, "--max_tokens", 75, "--output_dir", tmp_path] + ["--no-prompt_loss"] * (not prompt_loss)
    run(*given)
    pairs = data.tokenize_pairs(data.read_pairs(pairs_file), demo_tokenizer())
    (line,) = lines(tmp_path)
    loss, norm = plain_sft([pairs[i] for i in train.step_indices(26, 5, 0, 0)[0]], prompt_loss)
    assert line["loss"] == line["nll_loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("max_tokens", [75, 8192])
def test_each_step_is_the_mean_over_its_own_pairs(pairs_file, flags, tmp_path, max_tokens):
    """All six steps of an epoch, the last with one pair, at weights that hardly move; the expected numbers from plain passes, a pair at a time."""
    run(*flags, "--eval_pairs", 0, "--beta", 0.7, "--max_steps", 6, "--learning_rate", 1e-12, "--max_tokens", max_tokens, "--save_steps", 0, "--output_dir", tmp_path)
    pairs, model = data.tokenize_pairs(data.read_pairs(pairs_file), demo_tokenizer()), Transformer.from_pretrained(tmp_path)
    for line in lines(tmp_path):
        logps, sft = [], []
        indices = train.step_indices(26, 5, 0, line["step"] - 1)[0]
        assert len(indices) == (1 if line["step"] == 6 else 5)
        for prompt, *responses in (pairs[i] for i in indices):
            for response in responses:
                ids = torch.tensor([[*prompt, *response]])
                with torch.no_grad():
                    scores = model.logits(ids)[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                sft += scores.tolist() if response is responses[0] else []
                logps.append(scores[len(prompt) - 1 :].mean())
        chosen, rejected = torch.stack(logps).view(-1, 2).unbind(1)
        odds = lambda x: x - torch.log(-torch.expm1(x))
        ratio = odds(chosen) - odds(rejected)
        expected = dict(nll_loss=-np.mean(sft), log_odds_ratio=torch.nn.functional.logsigmoid(ratio).mean(), log_odds_chosen=ratio.mean(), **{
            "rewards/chosen": 0.7 * chosen.mean(), "rewards/rejected": 0.7 * rejected.mean(), "rewards/accuracies": (chosen > rejected).double().mean(),
            "rewards/margins": 0.7 * (chosen - rejected).mean(), "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean()})
        expected["loss"] = expected["nll_loss"] - 0.7 * expected["log_odds_ratio"]
        assert {key: line[key] for key in expected} == pytest.approx({key: float(value) for key, value in expected.items()}, abs=1e-5)


def test_the_logged_learning_rate_is_the_one_used(flags, tmp_path, monkeypatch):
    used, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: used.append(self.param_groups[0]["lr"]) or step(self))
    run(*flags, "--eval_pairs", 0, "--max_steps", 5, "--output_dir", tmp_path)
    assert used == [line["learning_rate"] for line in lines(tmp_path)] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 3e-3])


def test_speeds_count_the_steps_since_the_last_line(pairs_file, flags, tmp_path):
    run(*flags, "--eval_pairs", 0, "--max_steps", 8, "--logging_steps", 2, "--output_dir", tmp_path)
    spans = data.tokenize_pairs(data.read_pairs(pairs_file), demo_tokenizer()).spans().sum(1)
    for line in lines(tmp_path):
        indices = np.concatenate([train.step_indices(26, 5, 0, step)[0] for step in (line["step"] - 2, line["step"] - 1)])
        assert line["tokens_per_second"] / line["pairs_per_second"] == pytest.approx(spans[indices].mean(), rel=1e-9)


def test_every_pair_once_an_epoch():
    steps = [train.step_indices(23, 5, 9, step) for step in range(10)]
    for epoch in (steps[:5], steps[5:]):
        assert sorted(np.concatenate([indices for indices, _ in epoch])) == list(range(23)) and len(epoch[-1][0]) == 3
    assert [done for _, done in steps[3:7]] == pytest.approx([20 / 23, 1.0, 1 + 5 / 23, 1 + 10 / 23])
    assert list(steps[0][0]) != list(steps[5][0])


def test_fractions_of_an_epoch(flags, tmp_path, capsys):
    run(*flags, "--num_train_epochs", 1.3, "--output_dir", tmp_path)
    assert lines(tmp_path)[-1]["step"] == 7 and "5 steps an epoch, 7 steps" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Faults while running


def faulty(bad_steps, real=orpo.orpo_loss):
    """orpo_loss that gives an infinite loss in the given steps (counted from 1, one pack a step)."""
    calls = 0

    def loss(logps, *arguments):
        nonlocal calls
        calls += logps.requires_grad
        value, metrics = real(logps, *arguments)
        return (value * math.inf if logps.requires_grad and calls in bad_steps else value), metrics

    return loss


def test_a_step_without_a_finite_gradient_is_reported_and_left_out(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "orpo_loss", faulty({3}))
    run(*flags, "--save_steps", 1, "--logging_steps", 2, "--max_steps", 4, "--output_dir", tmp_path / "a")
    assert weights(tmp_path / "a" / "checkpoint-2") == weights(tmp_path / "a" / "checkpoint-3") != weights(tmp_path / "a" / "checkpoint-4")
    pairs = [int(n) for n in re.search(r"step 3: the loss or its gradient is not finite; the weights stay as they were. Rows: \[(.*)\]", capsys.readouterr().out)[1].split(",")]
    order = np.random.default_rng([0, 2**32]).permutation(26)[3:]
    assert pairs == [int(i) + 1 for i in np.sort(order)[train.step_indices(23, 5, 0, 2)[0]]]
    monkeypatch.setattr(train, "orpo_loss", faulty({3}))
    run(*flags, "--save_steps", 0, "--max_steps", 4, "--output_dir", tmp_path / "b")
    once, twice = ([line for line in curve(tmp_path / name) if "loss" in line] for name in "ab")
    by_step = {line["step"]: line for line in twice}
    assert sorted(by_step) == [1, 2, 4] and once[-1]["loss"] == by_step[4]["loss"]  # a line of two steps has the mean of the good one
    assert once[0]["loss"] == (by_step[1]["loss"] + by_step[2]["loss"]) / 2


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_too_many_in_a_row_end_the_run(flags, tmp_path, monkeypatch, capsys, logging_steps):
    monkeypatch.setattr(train, "orpo_loss", faulty({2, 4, 5, 6, 7, 8}))
    with pytest.raises(UserError, match=f"step 8: {train.BAD_STEPS} steps in a row without a finite gradient.*Intact: .*checkpoint-6"):
        run(*flags, "--max_steps", 20, "--logging_steps", logging_steps, "--output_dir", tmp_path)
    assert capsys.readouterr().out.count("not finite") == 6
    assert all(p.isfinite().all() for p in load_file(tmp_path / "checkpoint-6" / "model.safetensors").values())


def test_nan_in_the_weights(flags, tmp_path):
    run(*flags, "--max_steps", 2, "--output_dir", tmp_path)
    model = load_file(tmp_path / "model.safetensors")
    model["model.norm.weight"][0] = math.nan
    save_file(model, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="5 steps in a row without a finite gradient.*There is no checkpoint yet"):
        run(*flags, "--model", tmp_path, "--max_steps", 9, "--save_steps", 0, "--output_dir", tmp_path / "out")


def test_an_infinite_loss_on_one_rank_leaves_the_step_out_on_all(forks, flags, tmp_path):
    before = "import orpo\nif os.environ['RANK'] == '1':\n    real = orpo.orpo_loss\n    orpo.orpo_loss = lambda *a: (real(*a)[0] * float('inf'), real(*a)[1])\n"
    out = tmp_path / "out"
    for r, process in enumerate(ranks(forks, 2, out, [*flags, "--max_steps", 20, "--save_steps", 4, "--output_dir", out], before=before)):
        code, _, errors = finish(process, f"{out}-{r}")
        assert code == 1 and errors.count("5 steps in a row without a finite gradient") == 1 == errors.count("\n")
    first = Transformer(Config.from_hf(train.DEMO_SHAPE | {"vocab_size": 257}), {}).initialise(0)
    saved = load_file(out / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in first.named_parameters())


def test_a_full_disk_leaves_the_checkpoint_before(forks, flags, tmp_path):
    """A limit on the size of a file stands for the disk: the optimizer's file is over it, the model's is not."""
    out, log = tmp_path / "out", tmp_path / "log"
    run(*flags, "--max_steps", 2, "--output_dir", out)
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))\n"
    code, _, errors = finish(start(forks, log, ["--resume", "--max_steps", 9, "--output_dir", out], before=full), log)
    assert code == 1 and re.fullmatch(r"train.py: .*checkpoint-4: could not be written \(.*\); make room or choose another --output_dir, then --resume .*\n", errors), errors
    assert list(train.checkpoints(out)) == [2] and not train.damage(out / "checkpoint-2") and not list(out.glob("*.tmp")) and (out / "model.safetensors").exists()
    assert run("--resume", "--max_steps", 5, "--output_dir", out) == 0


def test_metrics_that_cannot_be_written(forks, flags, tmp_path):
    before = "import builtins\nreal = open\ndef full(path, mode='r', **k):\n    if mode == 'a':\n        raise OSError(28, 'No space left on device')\n    return real(path, mode, **k)\nbuiltins.open = full\n"
    code, _, errors = finish(start(forks, tmp_path / "log", [*flags, "--output_dir", tmp_path / "out"], before=before), tmp_path / "log")
    assert code == 1 and re.fullmatch(r"train.py: .*metrics.jsonl: cannot be written \(No space left on device\); make room, then go on with --resume\n", errors)


def test_closed_standard_output(tmp_path):
    shell = f"{sys.executable} {HERE / 'train.py'} --max_steps 1 --output_dir {tmp_path / 'out'} | head -1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert re.fullmatch(r"train.py: .*Broken pipe.*\n", done.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, and nothing damaged. (name, what to run, exit status, the line)


def good_model(directory):
    hf = train.DEMO_SHAPE | {"vocab_size": 257, "architectures": ["LlamaForCausalLM"]}
    Transformer(Config.from_hf(hf), hf).initialise(0).save_pretrained(directory, torch.float32)
    demo_tokenizer().save_pretrained(directory)
    return directory


def small_vocabulary(t):
    hf = train.DEMO_SHAPE | {"vocab_size": 100}
    Transformer(Config.from_hf(hf), hf).initialise(0).save_pretrained(t / "m", torch.float32)
    demo_tokenizer().save_pretrained(t / "m")
    return ["--model", t / "m"]


def few_positions(t):
    hf = dict(model_type="gpt2", vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    Transformer(Config.from_hf(hf), hf).initialise(0).save_pretrained(t / "m", torch.float32)
    demo_tokenizer().save_pretrained(t / "m")
    return ["--model", t / "m"]


def without_eos(t):
    good_model(t / "m")
    settings = json.loads((t / "m" / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (t / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    return ["--model", t / "m"]


def with_template(t, template):
    good_model(t / "m")
    (t / "m" / "chat_template.jinja").write_text(template)
    return ["--model", t / "m"]


def conversations(t, name="c.jsonl"):
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    bad = row | {"prompt": [{"role": "tool", "content": "q"}]}
    return ["--data", write_rows(t / name, [row] * 3 + [bad])]


def a_run(t):
    (t / "out").mkdir()
    (t / "out" / "metrics.jsonl").write_text('{"step": 1}\n')
    return []


def a_file(t):
    (t / "out").write_text("mine")
    return []


def prompts(t, content, name="p.jsonl"):
    (t / name).write_bytes(content)
    return ["--prompts", t / name]


ONLY_USERS = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{{ m.content }}{% endfor %}"
NO_LIBRARY = "import importlib.util\nfind = importlib.util.find_spec\nimportlib.util.find_spec = lambda name, *a: None if name in ('wandb', 'tensorboard') else find(name, *a)\n"
NO_MEMORY = "import orpo, torch\ndef full(*a):\n    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB\\nmore')\norpo.orpo_loss = full\n"
NOT_FINITE = "import orpo\nreal = orpo.orpo_loss\norpo.orpo_loss = lambda *a: (real(*a)[0] * float('nan'), real(*a)[1])\n"
FEW_GPUS = "import torch\ntorch.cuda.is_available = lambda: True\ntorch.cuda.device_count = lambda: 2\nos.environ['LOCAL_RANK'] = os.environ['RANK'] = '2'\n"
TRAIN, SAMPLE = "train.py", "sample.py"
BAD_RUNS = [  # name, script, arguments or a function of the test's directory that gives them, exit status, line; code to run before
    ("unknown flag", TRAIN, ["--learningrate", "1"], 2, r"unknown flag --learningrate; did you mean --learning_rate\?"),
    ("abbreviated flag", TRAIN, ["--max_step", "1"], 2, r"unknown flag --max_step; did you mean --max_steps\?"),
    ("stray argument", TRAIN, ["data.jsonl"], 2, r"unknown flag data.jsonl; see python train.py --help"),
    ("flag without its value", TRAIN, ["--beta"], 2, r"argument --beta: expected one argument; see"),
    ("--data without files", TRAIN, ["--data"], 2, r"argument --data: expected at least one argument; see"),
    ("text for a number", TRAIN, ["--batch_size", "many"], 2, r"argument --batch_size: invalid int value: 'many'"),
    ("a fraction for a count", TRAIN, ["--max_steps", "1.5"], 2, r"argument --max_steps: invalid int value: '1.5'"),
    ("unknown choice", TRAIN, ["--lr_scheduler_type", "step"], 2, r"invalid choice: 'step' \(choose from"),
    ("negative beta", TRAIN, ["--beta", "-0.1"], 2, r"--beta -0.1: must be at least 0"),
    ("beta not a number", TRAIN, ["--beta", "nan"], 2, r"--beta nan: must be at least 0"),
    ("infinite weight decay", TRAIN, ["--weight_decay", "inf"], 2, r"--weight_decay inf: must be at least 0 and below"),
    ("zero batch", TRAIN, ["--batch_size", "0"], 2, r"--batch_size 0: must be at least 1"),
    ("zero learning rate", TRAIN, ["--learning_rate", "0"], 2, r"--learning_rate 0.0: must be above 0"),
    ("endless epochs", TRAIN, ["--num_train_epochs", "1e308"], 2, r"--num_train_epochs 1e\+308: must be above 0 and below 1e9"),
    ("Adam's beta of 1", TRAIN, ["--adam_beta2", "1"], 2, r"--adam_beta2 1.0: must be at least 0 and below 1"),
    ("negative steps", TRAIN, ["--save_steps", "-1"], 2, r"--save_steps -1: must be at least 0"),
    ("seed too large", TRAIN, ["--seed", str(2**64)], 2, r"--seed 18446744073709551616: must be at least 0 and below 2\^63"),
    ("prompt fills max_length", TRAIN, ["--max_length", "100", "--max_prompt_length", "100"], 2, r"--max_prompt_length 100: must be smaller than --max_length 100"),
    ("resume and overwrite", TRAIN, ["--resume", "--overwrite_output_dir"], 2, r"--resume and --overwrite_output_dir contradict"),
    ("two kinds of evaluation", TRAIN, ["--eval_pairs", "5", "--eval_data", "x.jsonl"], 2, r"--eval_pairs and --eval_data: give one"),
    ("output directory is a file", TRAIN, a_file, 1, r"out: --output_dir is a file; choose another"),
    ("output directory in a file", TRAIN, lambda t: a_file(t) + ["--output_dir", t / "out" / "x"], 1, r"out/x: --output_dir cannot be written to \(Not a directory\)"),
    ("output directory not writable", TRAIN, ["--output_dir", "/proc/orpo"], 1, r"/proc/orpo: --output_dir cannot be written to \("),
    ("output directory empty", TRAIN, ["--output_dir", ""], 2, r"--output_dir is empty; name a directory"),
    ("another run there", TRAIN, a_run, 1, r"out: holds a run or a model already; go on with it \(--resume\), discard it \(--overwrite_output_dir\), or choose"),
    ("the model itself there", TRAIN, lambda t: ["--model", good_model(t / "out")], 1, r"out: holds a run or a model already"),
    ("overwriting the model in use", TRAIN, lambda t: ["--model", good_model(t / "out"), "--overwrite_output_dir"], 1, r"out: --overwrite_output_dir would discard --model .*out"),
    ("overwriting a checkpoint in use", TRAIN, lambda t: ["--model", good_model(t / "out" / "checkpoint-3"), "--overwrite_output_dir"], 1, r"would discard --model .*checkpoint-3"),
    ("nothing to resume", TRAIN, ["--resume"], 1, r"out: no checkpoint to resume from; start afresh without --resume"),
    ("a run without checkpoints", TRAIN, lambda t: a_run(t) + ["--resume"], 1, r"out: no checkpoint to resume from; .* \(with --overwrite_output_dir\)"),
    ("no such model", TRAIN, ["--model", "/no/such/model"], 1, r"/no/such/model: not a directory, and not a hub id"),
    ("a model on the hub, no network", TRAIN, ["--model", "owner/name"], 1, r"owner/name: no directory here, and the hub did not give it \("),
    ("data on the hub, no network", TRAIN, ["--data", "owner/name"], 1, r"owner/name: no directory here, and the hub did not give it \("),
    ("token ids beyond the model", TRAIN, small_vocabulary, 1, r"token id \d+ is beyond the model's vocabulary of 100: tokenizer and model do not belong together"),
    ("more tokens than positions", TRAIN, few_positions, 1, r"a sequence of \d+ tokens does not fit the model's 24 positions; use --max_length 24"),
    ("no end-of-sequence token", TRAIN, without_eos, 1, r"the tokenizer names no end-of-sequence token; set eos_token"),
    ("a template that refuses", TRAIN, lambda t: with_template(t, ONLY_USERS) + conversations(t), 1, r"row 4: the chat template refused .*no tools here"),
    ("a template with a fault", TRAIN, lambda t: with_template(t, "{{ messages[ }}") + conversations(t), 1, r"row 1: the chat template refused"),
    ("a template that reaches out", TRAIN, lambda t: with_template(t, "{{ ''.__class__.__mro__ }}") + conversations(t), 1, r"row 1: the chat template refused .*SecurityError"),
    ("max_tokens too small", TRAIN, ["--max_tokens", "10"], 1, r"--max_tokens 10: the longest pair needs \d+; use at least that, or cut pairs with --max_length"),
    ("all pairs held out", TRAIN, ["--eval_pairs", "26"], 1, r"--eval_pairs 26: only 26 pairs are there"),
    ("no wandb", TRAIN, ["--report_to", "wandb"], 1, r"--report_to wandb: pip install wandb", NO_LIBRARY),
    ("no tensorboard", TRAIN, ["--report_to", "tensorboard"], 1, r"--report_to tensorboard: pip install tensorboard", NO_LIBRARY),
    ("the GPU's memory full", TRAIN, ["--max_tokens", "900"], 1, r"the GPU's memory is full; lower --max_tokens \(now 900\) or add --gradient_checkpointing; neither changes the result", NO_MEMORY),
    ("no finite gradient", TRAIN, ["--batch_size", "5", "--max_steps", "9", "--logging_steps", "1"], 1, r"step 5: 5 steps in a row without a finite gradient; try a lower --learning_rate. There is no checkpoint yet", NOT_FINITE),
    ("more ranks than GPUs", TRAIN, [], 1, r"rank 2 has no GPU: this machine has 2, so use torchrun --nproc_per_node=2", FEW_GPUS),
    ("upload without network", TRAIN, ["--push_to_hub", "me/mine", "--max_steps", "1"], 1, r"--push_to_hub me/mine: not uploaded \(.*\); the model is in .*out"),
    ("sample: unknown flag", SAMPLE, ["--promt", "x"], 2, r"unrecognized arguments: --promt x; see"),
    ("sample: temperature", SAMPLE, ["--temperature", "nan"], 2, r"--temperature nan: must be at least 0"),
    ("sample: top_p", SAMPLE, ["--top_p", "0"], 2, r"--top_p 0.0: must be above 0 and at most 1"),
    ("sample: seed", SAMPLE, ["--seed", "-1"], 2, r"--seed -1: must be at least 0"),
    ("sample: empty prompt", SAMPLE, ["--prompt", ""], 2, r"--prompt is empty"),
    ("sample: two kinds of prompts", SAMPLE, ["--prompt", "x", "--prompts", "y"], 2, r"--prompt and --prompts: give one of the two"),
    ("sample: output of nothing", SAMPLE, ["--output", "x"], 2, r"--output is for the answers to --prompts, which is missing"),
    ("sample: no such model", SAMPLE, ["--model", "/no/such/model", "--prompt", "x"], 1, r"/no/such/model: not a directory"),
    ("sample: no such file", SAMPLE, ["--prompts", "/no/such/file"], 1, r"/no/such/file: cannot be read \(No such file or directory\)"),
    ("sample: broken JSON", SAMPLE, lambda t: prompts(t, b'{"prompt": "x"}\n{"prompt": \n'), 1, r"p.jsonl, line 2: not valid JSON"),
    ("sample: JSON too deep", SAMPLE, lambda t: prompts(t, b"[" * 100_000), 1, r"p.jsonl, line 1: not valid JSON"),
    ("sample: a row without prompt", SAMPLE, lambda t: prompts(t, b'{"promt": "x"}\n'), 1, r"p.jsonl, line 1: an object with a `prompt`"),
    ("sample: messages that are none", SAMPLE, lambda t: prompts(t, b'{"prompt": ["hi"]}\n'), 1, r"p.jsonl, line 1: an object with a `prompt`"),
    ("sample: empty file", SAMPLE, lambda t: prompts(t, b"\n\n"), 1, r"p.jsonl: no prompts in it"),
    ("sample: not UTF-8", SAMPLE, lambda t: prompts(t, b"caf\xe9\n", "p.txt"), 1, r"p.txt: not UTF-8 text"),
    ("sample: nowhere to write", SAMPLE, lambda t: prompts(t, b"hi\n", "p.txt") + ["--output", t / "no" / "a.jsonl"], 1, r"a.jsonl: --output must be a file in a directory that exists"),
    ("sample: a system without a template", SAMPLE, lambda t: ["--model", good_model(t / "m"), "--raw", "--prompt", "x", "--system", "y"], 1, r"--system needs a chat template, and --raw does without"),
    ("sample: prompt longer than the model", SAMPLE, lambda t: few_positions(t) + ["--prompt", "x" * 24], 1, r"a prompt of 25 tokens leaves no room in the model's 24 positions; shorten it"),
    ("sample: ids beyond the model", SAMPLE, lambda t: small_vocabulary(t) + ["--prompt", "é"], 1, r"token id \d+ is beyond the model's vocabulary of 100"),
    ("sample: a template that refuses", SAMPLE, lambda t: with_template(t, ONLY_USERS) + prompts(t, b'{"prompt": "x"}\n{"prompt": [{"role": "tool", "content": "y"}]}\n'), 1, r"p.jsonl, prompt 2: the chat template refused"),
]


def listing(directory):
    return {path.relative_to(directory): path.read_bytes() if path.is_file() else None for path in Path(directory).rglob("*")}


@pytest.mark.parametrize("case", BAD_RUNS, ids=[case[0] for case in BAD_RUNS])
def test_bad_run(forks, flags, tmp_path, case):
    name, script, arguments, status, expected, *before = case
    log = tmp_path / "log"
    arguments = arguments(tmp_path) if callable(arguments) else arguments
    defaults = [] if script == SAMPLE or "--resume" in arguments else ["--data", flags[1]] if "--data" not in arguments and "--model" in arguments else []
    if script == TRAIN:
        defaults += ["--output_dir", tmp_path / "out"] + ([] if "--resume" in arguments or "--data" in arguments else ["--data", flags[1], "--save_steps", 0])
    found = listing(tmp_path)
    code, printed, errors = finish(start(forks, log, [*defaults, *arguments], script=script, before=before[0] if before else ""), log)
    print(f"| {name} | {errors.strip().replace(str(tmp_path), '.')} |")
    assert code == status and re.fullmatch(rf"{script}: .*\n", errors) and re.search(expected, errors), (code, errors)
    assert {path: content for path, content in listing(tmp_path).items() if path in found} == found  # all is as it was


# ---------------------------------------------------------------------------------------------------------------------
# Files that somebody has tampered with

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6)
except ImportError:
    given = None
needs_hypothesis = pytest.mark.skipif(given is None, reason="needs hypothesis")


@needs_hypothesis
def test_any_manifest_is_judged(whole, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(whole / "checkpoint-2", checkpoint)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert train.damage(checkpoint) == ""

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.binary(max_size=60))
    def bytes_(content):
        (checkpoint / "manifest.json").write_bytes(content)
        assert isinstance(train.damage(checkpoint), str) and train.damage(checkpoint)

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(sorted(manifest)) | st.text(), JSON | st.fixed_dictionaries({"size": JSON, "sha256": JSON}))
    def mutated(name, entry):
        (checkpoint / "manifest.json").write_text(json.dumps(manifest | {name: entry}))
        assert train.damage(checkpoint)

    bytes_()
    mutated()


@needs_hypothesis
def test_a_checkpoint_with_other_contents_is_refused_or_works(whole, tmp_path, monkeypatch):
    """Its manifest agrees with what somebody wrote into state.json or train_config.json: never a traceback."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint = whole / "checkpoint-2"
    originals = {name: json.loads((checkpoint / name).read_text()) for name in ("state.json", "train_config.json")}
    keys = [(name, key) for name, content in originals.items() for key in content if key not in ("max_steps", "num_train_epochs", "compile")]  # these may work for long
    outcomes = []

    @settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(keys), JSON | st.just("delete"))
    def resume(place, value):
        name, key = place
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        (out / "checkpoint-2").mkdir(parents=True)
        for file in checkpoint.iterdir():
            shutil.copy(file, out / "checkpoint-2")
        content = originals[name] | {key: value}
        if value == "delete":
            del content[key]
        (out / "checkpoint-2" / name).write_text(json.dumps(content))
        manifest = {file.name: {"size": file.stat().st_size, "sha256": train.checksum(file)} for file in (out / "checkpoint-2").iterdir() if file.name != "manifest.json"}
        (out / "checkpoint-2" / "manifest.json").write_text(json.dumps(manifest))
        try:
            outcomes.append(run("--resume", "--output_dir", out, "--max_steps", 3, "--eval_steps", 0))
        except UserError:
            outcomes.append("refused")

    resume()
    print({outcome: outcomes.count(outcome) for outcome in set(outcomes)})
    assert {0, "refused"} <= set(outcomes)


@pytest.mark.parametrize("spoil", ["name", "shape", "file"])
def test_an_optimizer_that_does_not_fit(interrupted, spoil):
    checkpoint = interrupted / "checkpoint-6"
    moments = load_file(checkpoint / "optimizer.safetensors")
    if spoil == "name":
        moments.pop("exp_avg.model.norm.weight")
    elif spoil == "shape":
        moments["exp_avg.model.norm.weight"] = torch.zeros(3)
    save_file(moments, checkpoint / "optimizer.safetensors")
    if spoil == "file":
        (checkpoint / "optimizer.safetensors").write_bytes(b"no tensors here")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    file = checkpoint / "optimizer.safetensors"
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {file.name: {"size": file.stat().st_size, "sha256": train.checksum(file)}}))
    with pytest.raises(UserError, match="checkpoint-6: cannot be resumed from .*; remove it to go back to the one before it"):
        run("--resume", "--output_dir", interrupted)


def test_no_pickle():
    for file in ("train.py", "sample.py", "model.py", "data.py", "orpo.py"):
        found = re.findall(r"torch\.(?:load|save)\b|import pickle|pickle\.|joblib|marshal|shelve|object_list|(?:gather|scatter|broadcast)_object|allow_pickle|trust_remote_code|np\.load|(?<![.\w])eval\(|(?<![.\w])exec\(", (HERE / file).read_text())
        assert not found, (file, found)


def trl_step(model_dir, rows, tokenizer, beta=0.1):
    """TRL's loss, metrics and gradients for one batch of these rows, in fp32."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trl = pytest.importorskip("trl.experimental.orpo", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = trl.ORPOConfig(output_dir=ROOT.name, per_device_train_batch_size=len(rows), beta=beta, max_length=4096, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = trl.ORPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    loss, metrics = trainer.get_batch_loss_metrics(model, batch, "train")
    loss.backward()
    return metrics | {"loss": loss.item()}, {name: p.grad for name, p in model.named_parameters()}


def our_step(model_dir, rows, tokenizer, beta=0.1, max_tokens=8192, prompt_loss=True):
    model = Transformer.from_pretrained(model_dir)
    pairs = tokenize_pairs(rows, tokenizer, max_length=4096, max_prompt_length=2048)
    spans = pairs.spans()
    tokens = int(spans[:, 1].sum() + prompt_loss * spans[:, 0].sum())
    total = 0
    for batch in make_packs(pairs, np.arange(len(pairs)), max_tokens, prompt_loss=prompt_loss):
        loss, metrics = orpo_loss(model(batch), batch, beta, tokens, len(pairs))
        loss.backward()
        total = total + metrics
    return dict(zip(METRICS, total.tolist())), {name: p.grad for name, p in model.named_parameters()}


# file, pairs, chat template, longest part of a row in tokens
CASES = [("hh_harmless_test.jsonl.gz", 64, "", 500), ("orca.conv_explicit.jsonl", 32, "chatml", 1200), ("rasbt_alpaca.standard_explicit.jsonl", 64, "", 500), ("rasbt_alpaca.standard_explicit.jsonl", 1, "", 500)]


@needs_shared
@pytest.mark.parametrize("file, count, template, longest", CASES)
def test_one_step_equals_trl(file, count, template, longest):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = SHARED / "realdata/models/stories260K"
    ours, theirs = Tokenizer.from_pretrained(model), transformers.AutoTokenizer.from_pretrained(model)
    theirs.pad_token = theirs.eos_token
    if template:
        ours.chat_template = theirs.chat_template = json.loads((SHARED / f"realdata/chat_templates/{template}.json").read_text())["chat_template"]
        ours.has_template = True
    rows = [row for row in read_pairs(SHARED / "realdata/pref" / file) if row["chosen"] != row["rejected"]]

    rows = [row for row in rows if max(map(len, encode_pair(row, ours, max_length=10**6, max_prompt_length=10**5))) < longest][:count]  # whole rows
    assert len(rows) == count
    theirs_metrics, theirs_grads = trl_step(model, rows, theirs)
    ours_metrics, ours_grads = our_step(model, rows, ours)
    print()
    for name in METRICS:
        print(f"{file} {name:20} trl {theirs_metrics[name]:.6f} ours {ours_metrics[name]:.6f}")
        assert ours_metrics[name] == pytest.approx(theirs_metrics[name], rel=2e-4, abs=2e-5), name
    worst = max(float((ours_grads[n] - g).norm() / g.norm()) for n, g in theirs_grads.items() if n in ours_grads)
    print("largest relative gradient difference", worst)
    assert worst < 1e-3
