"""What the project promises, tested.  python -m pytest -q;  a part of it: python -m pytest -q -k train

A test's name begins with its part: loss, data, model, train, sample, readme. Tests against transformers, trl
and peft, or on ../shared/realdata, skip with a reason where those are missing; so do those that need a GPU.
"""
import copy
import functools
import gzip
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import random
import re
import shlex
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import tracemalloc
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
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
from data import Pairs, Tokenizer, UserError, demo_tokenizer, encode_pair, make_packs, pack
from data import read_json, read_pairs, tokenize_pairs
from model import Cache, Config, Packed, Transformer, target_logps
from orpo import SMALLEST, closed_form, log_odds, odds_ratio_loss, orpo_loss

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
REAL = SHARED / "realdata"
MODELS = REAL / "models"
needs_shared = pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/realdata")
# A real chat model, such as SmolLM2-135M-Instruct, in the directory that ORPO_REAL_MODEL names
REAL_MODEL = Path(os.environ.get("ORPO_REAL_MODEL", SHARED / "realmodel" / "smollm2"))
needs_real_model = pytest.mark.skipif(not (REAL_MODEL / "config.json").exists(),
                                      reason="needs a real model in ORPO_REAL_MODEL")
has_gpu = torch.cuda.is_available
needs_gpu = pytest.mark.skipif(not has_gpu(), reason="needs a CUDA GPU")
torch.cuda.is_available = lambda: False  # what the programs do is tested on a CPU, wherever the suite runs
huggingface_hub.constants.HF_HUB_OFFLINE = True
torch.set_num_threads(1)  # for tiny models the fastest, by far so where others share the cores

# The metrics of a step, by TRL's names
NAMES = ("loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected",
         "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
EOS, BOS = 256, 257  # of byte_tokenizer, whose other ids are one to a byte
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def put(path, content):
    """Write bytes, text, a dict as JSON, or a list of objects as JSON lines; returns the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
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


def conversation(chosen="good", rejected="bad", prompt="q"):
    return {
        "prompt": [user(prompt)],
        "chosen": [assistant(chosen)],
        "rejected": [assistant(rejected)]}


def byte_tokenizer(*, post_processor=False, adds_bos=False, bos=True, template=None):
    backend = demo_tokenizer().backend
    backend.add_special_tokens(["<s>"])
    if post_processor:
        bos_first = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        backend.post_processor = bos_first
    specials = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    if bos:
        specials["bos_token"] = "<s>"
    return tokenizer_of(backend, add_bos_token=adds_bos, chat_template=template, **specials)


def tokenizer_of(backend, **settings):
    """A Tokenizer from one of the tokenizers library and what stands in tokenizer_config.json."""
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(settings)}
    return Tokenizer({name: content.encode() for name, content in files.items()})


def random_pairs(lengths, vocab=53, seed=0):
    """(prompt, chosen, rejected) ids of the given lengths; none is 1, OPT's pad, which transformers does not
    train."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, vocab, n) for n in three) for three in lengths]


def fuzz(directory, examples):
    """hypothesis' strategies, and what runs check(drawn...), keeping its notes in a scratch directory; the
    test is skipped without it."""
    hypothesis = pytest.importorskip("hypothesis")
    hypothesis.configuration.set_hypothesis_home_dir(directory)
    settings = hypothesis.settings(deadline=None, database=None, derandomize=True, max_examples=examples,
                                   suppress_health_check=list(hypothesis.HealthCheck))
    return hypothesis.strategies, lambda check, *drawn: settings(hypothesis.given(*drawn)(check))()


# ------------------------------------------------------------------------------------------------------------
# The loss

LOGPS = torch.tensor([-1e4, -300.0, -20.0, -2.0, -0.6931472, -0.1, -1e-3, -1e-8, -1e-12, -1e-20, -1e-29, 0.0])


def loss_exactly(logps):
    """log odds and 1 - P in float64, with the stated clamp."""
    x = logps.detach().double().clamp(max=-SMALLEST)
    return x - torch.log(-torch.expm1(x)), -torch.expm1(x)


def test_loss_and_gradient_are_finite_and_right_for_every_pair():
    pairs = torch.cartesian_prod(LOGPS, LOGPS)
    chosen = pairs[:, 0].clone().requires_grad_()
    rejected = pairs[:, 1].clone().requires_grad_()
    loss = odds_ratio_loss(chosen, rejected)
    loss.sum().backward()
    odds_w, not_w = loss_exactly(chosen)
    odds_l, not_l = loss_exactly(rejected)
    delta = torch.sigmoid(odds_l - odds_w)  # Eq. 9
    expected = F.softplus(odds_l - odds_w, threshold=30)
    close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    close(chosen.grad.double(), -delta / not_w, rtol=1e-4, atol=1e-8)  # Eq. 10
    close(rejected.grad.double(), delta / not_l, rtol=1e-4, atol=1e-8)
    assert log_odds(LOGPS.bfloat16()).dtype == torch.float32
    assert log_odds(LOGPS.bfloat16()).isfinite().all()


def test_loss_of_the_peer_has_no_gradient_near_certainty():
    """The README's row: where ours is right, as above, TRL's two-branch formula gives NaN."""
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="trl is not installed")
    theirs = torch.tensor([-1e-8, 0.0], requires_grad=True)
    (theirs - trainer.log1mexp(theirs)).sum().backward()
    assert theirs.grad.isnan().all()


def sequence_logps(logits, *parts):
    """Log-probability of all tokens but the first of parts, end to end; logits: (1, T) ids -> (1, T, V)."""
    ids = torch.tensor(np.concatenate(parts))
    logps = logits(ids[None, :-1])[0].log_softmax(-1)  # (T - 1, V)
    return logps[torch.arange(len(ids) - 1), ids[1:]]


def plain_metrics(logits, pairs, beta, prompt_loss=True):
    """{name: metric} in float64, by plain passes over one unpadded sequence at a time."""
    targets, chosen, rejected = [], [], []
    for prompt, *responses in pairs:
        for response, means in zip(responses, (chosen, rejected)):
            logps = sequence_logps(logits, prompt, response).double()
            of_response = logps[len(prompt) - 1 :]
            means.append(of_response.mean())
            if means is chosen:
                targets.append(logps if prompt_loss else of_response)
    w, l = torch.stack(chosen), torch.stack(rejected)  # log P of the responses
    odds_w = w.exp() / (1 - w.exp())
    odds_l = l.exp() / (1 - l.exp())
    log_or = torch.log(odds_w / odds_l)
    log_ratio = torch.log(torch.sigmoid(log_or))
    nll = -torch.cat(targets).mean()
    of_pairs = {
        "log_odds_ratio": log_ratio,
        "log_odds_chosen": log_or,
        "rewards/chosen": beta * w,
        "rewards/rejected": beta * l,
        "rewards/accuracies": (w > l).double(),
        "rewards/margins": beta * (w - l),
        "logps/chosen": w,
        "logps/rejected": l}
    means = {name: values.mean() for name, values in of_pairs.items()}
    return {"loss": nll - beta * log_ratio.mean(), "nll_loss": nll} | means


@pytest.mark.parametrize("prompt_loss, beta", [(True, 0.0), (False, 0.3)])
def test_loss_and_metrics_are_those_of_plain_passes(prompt_loss, beta, checkpoint):
    """With beta 0, plain SFT, all rewards are 0 and the accuracy is that of the log-probabilities."""
    model = load(checkpoint("llama"))
    pairs = random_pairs(LENGTHS)
    batch = pack(pairs, prompt_loss=prompt_loss)
    tokens = 0
    for prompt, chosen, _ in pairs:
        tokens += len(chosen) + prompt_loss * (len(prompt) - 1)
    expected = plain_metrics(model.logits, pairs, beta, prompt_loss)
    for counts in (tokens, len(pairs)), ():  # the batch's own, too
        loss, metrics = orpo_loss(model(batch), batch, beta, *counts)
        for name in NAMES:
            close(metrics[name].double(), expected[name], rtol=1e-4)
        close(loss.double(), expected["loss"], rtol=1e-5)


def test_loss_odds_differ_by_more_than_probabilities():
    """The paper's Figure 6: standard deviations over uniform pairs, as the README gives them."""
    logps = torch.rand(2, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    odds = orpo.log_odds(logps)
    assert (logps[0] - logps[1]).std() == pytest.approx(1.41, abs=0.02)
    assert (odds[0] - odds[1]).std() == pytest.approx(2.57, abs=0.02)


def test_loss_gradient_check_program_passes_and_fails_when_it_should(script, monkeypatch):
    status, printed, _ = script("orpo.py")
    assert status == 0, printed
    assert "upside down" in printed  # the slips in circulation are shown failing
    shipped = orpo.orpo_loss

    def wrong_closed_form(chosen, rejected):
        return [x * 1.001 for x in closed_form(chosen, rejected)]

    def wrong_objective(logps, batch, beta, *counts):
        loss, metrics = shipped(logps, batch, beta, *counts)
        return 1.001 * loss, metrics

    for name, wrong in (("closed_form", wrong_closed_form), ("orpo_loss", wrong_objective)):
        with monkeypatch.context() as patch:
            patch.setattr(orpo, name, wrong)
            assert orpo.main() == 1


def loss_of_trl(rows, chat_template, scratch, directory=MODELS / "stories260K"):
    """TRL's metrics for one batch of these rows, in fp32, and its model with the gradients."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trl = pytest.importorskip("trl.experimental.orpo", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(directory)
    tok.pad_token = tok.eos_token
    tok.chat_template = chat_template
    config = trl.ORPOConfig(
        output_dir=str(scratch), beta=0.1, max_length=4096, report_to=[], use_cpu=True)
    trainer = trl.ORPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tok)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss, metrics = trainer.get_batch_loss_metrics(model, batch, "train")
    loss.backward()
    return metrics | {"loss": loss.item()}, model


@needs_shared
def test_loss_of_one_step_equals_trl_gradients_included(tmp_path):
    tok = copy.copy(data_real_tokenizer("models/stories260K"))
    tok.chat_template = read_json(REAL / "chat_templates/chatml.json")["chat_template"]
    for file, count in (("hh_harmless_test.jsonl.gz", 16), ("rasbt_alpaca.standard_explicit.jsonl", 64),
                        ("orca.conv_explicit.jsonl", 8)):
        different = [dict(row) for row in data_real_rows(file) if row["chosen"] != row["rejected"]]
        rows = [row for row in different if len(str(row)) < 1500][:count]
        expected, their_model = loss_of_trl(rows, tok.chat_template, tmp_path)
        model = load(MODELS / "stories260K")
        pairs = tokenize_pairs(rows, tok, max_length=4096)
        tokens = int(pairs.spans()[:, :2].sum())
        sums = dict.fromkeys(NAMES, 0)
        for batch in make_packs(pairs, np.arange(count), 2048):
            loss, metrics = orpo_loss(model(batch), batch, 0.1, tokens, count)
            loss.backward()
            sums = {name: sums[name] + metrics[name].item() for name in NAMES}
        expected = {name: expected[name] for name in NAMES}
        assert sums == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for name, parameter in model.named_parameters():
            gradient = their_model.get_parameter(name).grad
            assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm(), (file, name)


@needs_real_model
def test_loss_of_a_real_chat_model_equals_trl_and_its_answers_transformers(tmp_path):
    tok = Tokenizer.from_pretrained(REAL_MODEL)
    model = load(REAL_MODEL)
    reference = load_in_transformers(REAL_MODEL)
    for question in ("What is the capital of France?", "Name a tree.", "Who wrote Hamlet?"):
        ids = sample.prompt_ids([user(question)], tok)
        tokens = torch.tensor([ids])
        with torch.no_grad():
            close(model.logits(tokens), reference(tokens).logits, atol=2e-3)
        expected = reference.generate(tokens, max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        [answer] = sample.continuations(model, [ids], 12, [tok.eos_id])
        assert answer == expected[: len(answer)] and len(answer) > 2
    rows = []  # as text, since TRL adds a second EOS after a template's "<|im_end|>" and line end
    for prompt, chosen, rejected in (("What is the capital of France?", "It is Paris.", "Paris, obviously!"),
                                     ("Name a tree.", "An oak is a tree.", "Dog.")):
        opening = tok.apply_chat_template([user(prompt)], add_generation_prompt=True)
        rows.append(dict(prompt=opening, chosen=chosen, rejected=rejected))
    expected, their_model = loss_of_trl(rows, tok.chat_template, tmp_path, REAL_MODEL)
    batch = pack([encode_pair(row, tok) for row in rows])
    loss, metrics = orpo_loss(model(batch), batch, 0.1)
    loss.backward()
    for name in NAMES:
        assert metrics[name].item() == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    for name, parameter in model.named_parameters():
        gradient = their_model.get_parameter(name).grad
        difference = parameter.grad - gradient
        if name == EMBEDDING:  # transformers gives the pad token no gradient where it is an input
            difference[their_model.config.pad_token_id] = 0
        assert difference.norm() <= 1e-4 * gradient.norm(), name


# ------------------------------------------------------------------------------------------------------------
# The README, and what no module may do

README = (HERE / "README.md").read_text(encoding="utf-8")
MODULES = ["data.py", "model.py", "orpo.py", "sample.py", "train.py"]
UNSAFE = (r"torch\.(load|save)\b|import pickle|pickle\.|joblib|marshal|shelve|allow_pickle"
          r"|np\.load|trust_remote_code|(?<![.\w])(eval|exec)\(")


def test_readme_flags_and_linked_files_exist_and_the_top_holds_no_others(script):
    others = "nproc_per_node nnodes rdzv_backend rdzv_endpoint model_args tasks"
    known = {f"--{name}" for name in others.split()}
    known |= set(re.findall(r'"(--\w+)"', (HERE / "assets/figures.py").read_text(encoding="utf-8")))
    for name in ("train.py", "sample.py"):
        status, printed, _ = script(name, "--help")
        assert status == 0
        known |= set(re.findall(r"--[\w-]+", printed))
    theirs = README.partition("## Coming from TRL")[2].partition("\n## ")[0]  # a table: TRL's flags, ours
    ours = [line.split("|")[-2] for line in theirs.splitlines() if "|" in line]
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README.replace(theirs, " ".join(ours))))
    assert sorted(named - known) == []
    for file in re.findall(r"\]\((assets/[\w.]+)\)", README):
        assert (HERE / file).exists()
    top = {path.name for path in HERE.glob("[!.]*.*") if path.is_file()}
    assert top == {*MODULES, "README.md", "requirements.txt", "test_orpo.py"}


@pytest.mark.parametrize("module", MODULES)
def test_data_are_never_unpickled_or_executed(module):
    source = (HERE / module).read_text(encoding="utf-8")
    assert [line for line in source.splitlines() if re.search(UNSAFE, line)] == []


# ------------------------------------------------------------------------------------------------------------
# Tokenizers

TOKENIZERS = {  # name: eos, bos, adds_bos, has_template, ids that end an answer (EOS and what closes a turn)
    "models/slm4096-gpt2": (0, 0, False, False, {0}),
    "models/stories260K": (2, 1, True, False, {2}),
    "tokenizers/smollm": (0, 0, False, False, {0}),
    "tokenizers/minimind3": (2, 1, False, True, {2}),
    "tokenizers/gpt2": (50256, 50256, False, False, {50256}),
    "tokenizers/phi3": (32000, 1, False, True, {32000, 32007}),
}
TEXTS = [
    "  Héllo naïve e\u0301 ﬁ İ Å — 你好，世界！日本語 한국어 🙂👩‍👩‍👧 \u00a0nb\u200b\u3000", " spaces   5   67\n\n  8", "",
    "a b " * 500,  # truncation and padding, which some tokenizer.json files switch on, must be off
    "\n\n\nline\r\n\ttab   long          spaces   \n def f(x):\n    return x**2  it's WE'LL 12345 x1 ½①٣   ",
    "<|endoftext|> <|im_start|>user\n<|im_end|> <s>a</s> </s>  y<|user|> \n hi<|end|> <unk>[PAD]<pad>▁<0x0A>"]
END = "<|endoftext|>"


@functools.cache
def data_real_tokenizer(name):
    return Tokenizer.from_pretrained(REAL / name)


@functools.cache
def data_real_rows(name):
    return read_pairs(REAL / "pref" / name)


def data_loading(files=(), **settings):
    """For tables: what reads the demo's tokenizer with these settings and files from a directory `model`."""
    def load(directory):
        defaults = {"tokenizer.json": demo_tokenizer().backend.to_str(),
                    "tokenizer_config.json": {"eos_token": END, **settings}}
        for name, content in (defaults | dict(files)).items():
            put(directory / "model" / name, content)
        return Tokenizer.from_pretrained(directory / "model")

    return load


@needs_shared
@pytest.mark.parametrize("name", TOKENIZERS)
def test_data_real_tokenizers_are_saved_unchanged_and_encode_as_transformers(name, tmp_path):
    source = tmp_path / "source"
    for path in (REAL / name).glob("*.[jt]*"):  # all but the weights
        put(source / path.name, path.read_bytes())
    tok = Tokenizer.from_pretrained(source)
    model = Transformer(Config.from_hf(SHAPE))
    with suppress(UserError):  # it may have none
        model.generation_config = read_json(source / "generation_config.json")
    shutil.rmtree(source)  # not needed any more
    found = tok.eos_id, tok.bos_id, tok.adds_bos, bool(tok.chat_template), sample.stop_ids(model, tok)
    assert found == TOKENIZERS[name]
    tok.save_pretrained(tmp_path)
    Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)  # onto itself: empties nothing
    assert Tokenizer.from_pretrained(tmp_path).chat_template == tok.chat_template
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (REAL / name / path.name).read_bytes()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(REAL / name)
    if name == "tokenizers/smollm":
        # transformers 5 builds it from the vocabulary and merges alone, and so loses the Digits splitter of
        # this tokenizer.json, with which the model was trained. transformers 4 kept it.
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(REAL / name / "tokenizer.json"))
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, truncation=False, padding=False).input_ids
        assert tok.encode(text) == ids
        assert tok.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@needs_shared
def test_data_tokenizer_of_opt_is_read(tmp_path):
    """vocab.json and merges.txt alone, BOS = EOS, which special_tokens_map.json names, and add_bos_token."""
    for name in ("vocab.json", "merges.txt"):
        put(tmp_path / name, (REAL / "tokenizers/gpt2" / name).read_bytes())
    put(tmp_path / "tokenizer_config.json", {"add_bos_token": True, "bos_token": {"content": END}})
    put(tmp_path / "special_tokens_map.json", {"eos_token": END})
    tok = Tokenizer.from_pretrained(tmp_path)
    assert (tok.eos_id, tok.bos_id, tok.adds_bos) == (50256, 50256, True)
    text = "".join(TEXTS)
    assert tok.encode(text) == data_real_tokenizer("tokenizers/gpt2").encode(text)


def test_data_bos_of_a_post_processor_is_not_switched_off_by_add_bos_token(tmp_path):
    """Nor is it in transformers 5."""
    files = {"tokenizer.json": byte_tokenizer(post_processor=True).backend.to_str()}
    assert data_loading(files, bos_token="<s>", add_bos_token=False)(tmp_path).adds_bos


def test_data_lone_surrogates_become_u_fffd():
    tok = byte_tokenizer()
    assert tok.encode("é\ud800b\U0001F642") == tok.encode("é\ufffdb\U0001F642")


def test_data_tokenizer_is_read_from_a_hub_cache(tmp_path):
    """Whose files are links to blobs."""
    blobs = tmp_path / "models--owner--name/blobs"
    revision = tmp_path / "models--owner--name/snapshots/0123abc"
    demo_tokenizer().save_pretrained(blobs)
    revision.mkdir(parents=True)
    for path in blobs.iterdir():  # in a real cache its name is a hash
        (revision / path.name).symlink_to(f"../../blobs/{path.name}")
    tok = Tokenizer.from_pretrained(revision)
    assert (tok.eos_id, tok.chat_template) == (EOS, demo_tokenizer().chat_template)


# ------------------------------------------------------------------------------------------------------------
# Chat templates

SYSTEM, U1, A1 = turn("system", " Be brief. "), user("Hi <b>&amp;</b> 'q' \"d\"\n"), assistant("  Hello!\n")
U2, A2 = user("你好 é 🙂"), assistant("日本語\n\n<think>\nhm\n</think>\n\nbien sûr </s>")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"città": "<Zürich>", "n": [1, None]}}}
CONVERSATIONS = [
    [U1], [U1, A1], [U1, A1, U2], [U1, A1, U2, A2], [SYSTEM, U1], [SYSTEM, U1, A1, U2, A2], [SYSTEM],
    [U1, U2], [A1, U1], [SYSTEM, U1, A1, SYSTEM, U2], [user(""), assistant("")], [turn("critic", "x"), A1],
    [U1, assistant("4") | {"reasoning_content": "2+2\n"}],
    [U1, assistant("") | {"tool_calls": [CALL]}, turn("tool", "21°"), A1]]
EACH = "{% for m in messages %}"
TURNS = EACH + "[{{ m.role[0] }}]{{ m.content }}CLOSE{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
PLAIN_TURNS = TURNS.replace("CLOSE", "")
TEMPLATES = [  # a feature or two each
    EACH + "{% set x = 0 %}{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
    EACH + "\n  {%- generation -%}\n  {{ m.content }}  \n  {%- endgeneration -%}\n  \n{% endfor %}",
    EACH + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{{ messages[0] | tojson }}{{ {'é': 1} | tojson(ensure_ascii=True, indent=2, separators=(',', ':')) }}",
    "{{ strftime_now('%Y') }}{{ bos_token }}{{ pad_token }}{{ tools is none }}{{ documents is none }}{{ x }}",
    "{{ raise_exception('no ' + messages[0].role) }}", EACH, "{{ messages[0].nothing.more }}"]
REAL_TEMPLATES = ["../tokenizers/minimind3/tokenizer_config.json"] + """chatml.json cohere.jinja gemma.jinja
    llama2.json llama3.jinja llama3_1.jinja mistral.json phi3.5.json phi3.jinja qwen2_5.jinja
    qwen2_5_training.jinja qwen3.jinja""".split()


@pytest.mark.parametrize("template", [
    *TEMPLATES, *(pytest.param(name, marks=needs_shared) for name in REAL_TEMPLATES)])
def test_data_templates_render_or_refuse_as_transformers(template):
    transformers = pytest.importorskip("transformers")
    if template in REAL_TEMPLATES:
        text = (REAL / "chat_templates" / template).read_text("utf-8")
        template = json.loads(text)["chat_template"] if template.endswith(".json") else text
    ours = byte_tokenizer(template=template)
    specials = dict(bos_token="<s>", eos_token=END, pad_token=END, chat_template=template)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours.backend, **specials)
    for messages, opening in itertools.product(CONVERSATIONS, (False, True)):
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
        except Exception as error:
            with pytest.raises(UserError, match=re.escape(str(error)[:40])):
                ours.apply_chat_template(messages, opening)
        else:
            assert ours.apply_chat_template(messages, opening) == expected


SEVERAL = [{"name": "rag", "template": "documents"}, {"name": "default", "template": "default"}]


@pytest.mark.parametrize("settings, files, expected", [
    ({"chat_template": "x"}, {}, "x"),
    ({"chat_template": "x"}, {"chat_template.jinja": "file"}, "file"),
    ({"chat_template": SEVERAL}, {}, "default"),
    ({}, {}, "<|user|>\nq<|endoftext|>\n<|assistant|>\n"),  # the authors'
    ({"bos_token": None, "chat_template": "{{ bos_token }}."}, {"config.json": {"bos_token_id": 5}}, ".")])
def test_data_where_the_template_and_its_tokens_come_from(settings, files, expected, tmp_path):
    tok = data_loading(files, **settings)(tmp_path)
    assert tok.apply_chat_template([user("q")], True) == expected
    assert bool(tok.chat_template) == bool(settings)


@pytest.mark.parametrize("attack", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ '{0.__class__.__init__.x}'.format(messages).x }}",
    "{{ raise_exception.__globals__['__builtins__'].open('/etc/passwd') }}",
    "{% include '/etc/passwd' %}",
    "{{ (messages | attr('append'))(1) }}",
    "{{ messages[0].update({'content': 'changed'}) }}"])
def test_data_templates_cannot_leave_the_sandbox(attack):
    messages = [user("q")]
    with pytest.raises(UserError, match="template"):
        byte_tokenizer(template=attack).apply_chat_template(messages)
    assert messages == [user("q")]


# ------------------------------------------------------------------------------------------------------------
# Rows

HI, WHO = "\n\nHuman: hi\n\nAssistant:", "\n\nHuman: who\n\nAssistant:"
S, Q, G, B = turn("system", "s"), user("q"), assistant("good"), assistant("bad")
FORMS = {  # name: a row as people have it, then prompt, chosen, rejected as read_pairs gives it
    "strings, other columns": (PAIR | {"score": 1.5, "id": None, "source": ["x"]}, "p", "good", "bad"),
    "not ASCII": (dict(prompt="你好 é", chosen="🙂", rejected="\u2028x"), "你好 é", "🙂", "\u2028x"),
    "shared words": (dict(prompt=None, chosen="It? A cat", rejected="It? A car"), "It? A", " cat", " car"),
    "a word that goes on": (dict(chosen="It? A cat", rejected="It? A"), "It?", " A cat", " A"),
    "a longer word": (dict(chosen="It? A cat", rejected="It? Ash tree"), "It?", " A cat", " Ash tree"),
    "shared lines": (dict(chosen="2+2?\nFour", rejected="2+2?\nFive"), "2+2?\n", "Four", "Five"),
    "HH": (dict(chosen=HI + "y" + WHO + "me", rejected=HI + "y" + WHO + "I"), HI + "y" + WHO, "me", "I"),
    "HH, answers differ": (dict(chosen=HI + "y" + WHO, rejected=HI + "n" + WHO), HI, "y" + WHO, "n" + WHO),
    "HH, questions differ": (dict(chosen=HI + "yes\n\nHuman: a" + HI, rejected=HI + "yes\n\nHuman: b" + HI),
                             HI + "yes\n\nHuman:", " a" + HI, " b" + HI),  # the Assistant: there has answered
    "ids, spaces": (dict(chosen=[Q | {"id": 1}, G], rejected=[user("q\n"), B]), [Q | {"id": 1}], [G], [B]),
    "one continues the other": (dict(chosen=[Q, G, Q, G], rejected=[Q, G]), [Q], [G, Q, G], [G]),
    "several turns to answer": (dict(chosen=[Q, G, Q, G], rejected=[Q, B]), [Q], [G, Q, G], [B]),
    "ultrafeedback": (dict(prompt=" q\n", chosen=[S, Q, G], rejected=[S, Q, B], score=9.0), [S, Q], [G], [B]),
    "prompt not repeated, system": (dict(prompt="q", chosen=[S, G], rejected=[S, B]), [S, Q], [G], [B]),
    "alpaca": (PAIR | dict(prompt=None, instruction="{Do}.", input=""), [user("{Do}.")], [G], [B]),
    "alpaca, input": (PAIR | dict(prompt=None, instruction="Do.", input="in"), [user("Do.\n\nin")], [G], [B]),
    "question": (dict(question="q", system="s", chosen="good", rejected="bad"), [S, Q], [G], [B]),
    "ShareGPT": (dict(conversations=[{"from": "human", "value": "q"}],
                      chosen={"from": "gpt", "value": "good"}, rejected={"from": "gpt", "value": "bad"}),
                 [Q], [G], [B]),
    "text blocks": (dict(prompt=[turn("user", [{"type": "text", "text": "q"}])], chosen=[G], rejected=[B]),
                    [Q], [G], [B]),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_every_form_of_a_row_is_read(form, tmp_path):
    row, *parts = FORMS[form]
    rows = read_pairs(put(tmp_path / "a.jsonl", [row, row]))
    assert rows == [dict(zip(PAIR, parts))] * 2
    assert all(encode_pair(rows[0], byte_tokenizer()))


def test_data_a_prompt_in_a_column_of_no_usual_name_is_asked_for(tmp_path):
    file = put(tmp_path / "a.jsonl", [dict(task="p", chosen="good", rejected="bad", n=1)])
    with pytest.raises(UserError, match="line 1: .*--prompt_column .*found: task, chosen, rejected, n"):
        read_pairs(file)
    assert read_pairs(file, prompt_column="task") == [PAIR]
    assert read_pairs(file, prompt_column="none") == [PAIR | {"prompt": ""}]


def test_data_options_of_a_row_reach_its_template(tmp_path):
    row = conversation() | {"chat_template_kwargs": {"enable_thinking": False}}
    [row] = read_pairs(put(tmp_path / "a.jsonl", [row]))
    tok = byte_tokenizer(template="{{ enable_thinking == false }}" + EACH + "{{ m.content }}{% endfor %}")
    assert tok.decode(tokenize_pairs([row], tok)[0][0]).startswith("True")


def test_data_every_kind_of_file_is_read(tmp_path):
    row, *parts = FORMS["not ASCII"]
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    listed = json.dumps([row], indent=1).encode()
    crlf = b"\n \r\n" + line.replace(b"\n", b"\r\n\n\t\n")
    bom = b"\xef\xbb\xbf"
    kinds = {
        "a.jsonl": [line, line[:-1], bom + line, crlf],
        "a.json": [line, listed, bom + listed],
        "a.jsonl.gz": [gzip.compress(line)],
        "a.json.gz": [gzip.compress(listed)]}
    for name, contents in kinds.items():
        for content in contents:
            assert read_pairs(put(tmp_path / name, content)) == [dict(zip(PAIR, parts))]


def test_data_parquet_is_read_whatever_its_other_columns_hold(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "chosen": [[Q, G | {"name": "n"}]],
        "rejected": [[Q, B]],
        "score": [0.5],
        "tags": [["x"]],
        "when": pyarrow.array([2**62], pyarrow.timestamp("us"))}  # no Python date
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    [row] = read_pairs(tmp_path / "a.parquet")
    assert [row[part][0]["content"] for part in PAIR] == ["q", "good", "bad"]
    tok = byte_tokenizer(template=EACH + "{{ 'name' in m }} {% endfor %}")  # parquet gives every turn the key
    assert tok.apply_chat_template(row["prompt"] + row["chosen"]) == "False True "
    with pytest.raises(UserError, match=r"b\.parquet"):
        read_pairs(put(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-9]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_pairs(tmp_path / "a.parquet")


@pytest.mark.parametrize("sources, expected", [
    ("x:data/train", "abc"), ("x:more/train", "m"), ("x:dev", "d"), ("x:test", "t"), ("x:train_sft", "s"),
    (["x/test.json", "x/data/train.jsonl"], "tc"), (["x/data/train.jsonl", "x/test.json"], "ct"),
    ("x", "ambiguous"), ("12:00", "ambiguous")])
def test_data_sources_and_splits(sources, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"data/train-00000-of-00002.jsonl": "a", "data/train-00001-of-00002.jsonl": "b", "train.txt": "-",
             "data/train_sft-00000-of-00001.jsonl": "s", "data/train.jsonl": "c", "test.json": "t",
             "more/train.jsonl": "m", "more/dev.jsonl": "d"}
    for name, mark in files.items():
        put(tmp_path / ("12:00" if sources == "12:00" else "x") / name, [PAIR | {"chosen": mark}])
    if expected == "ambiguous":  # a hub data set of several configurations
        with pytest.raises(UserError, match="'train' is in .*'data/\\*.jsonl', 'more/"):
            read_pairs(sources)
    else:
        assert "".join(row["chosen"] for row in read_pairs(sources)) == expected


def test_data_a_split_is_neither_read_twice_nor_found_in_another(tmp_path):
    for name in ("train.json", "train.jsonl"):
        put(tmp_path / "twice" / name, [PAIR])
    with pytest.raises(UserError, match=r"'train' is in .*\*.json', '\*.jsonl"):
        read_pairs(str(tmp_path / "twice"))
    for name in ("train", "dev"):
        put(tmp_path / "one" / f"train-data/{name}.jsonl", [PAIR | {"chosen": name}])
    assert [row["chosen"] for row in read_pairs(str(tmp_path / "one"))] == ["train"]
    put(tmp_path / "none/train-test-split/test.jsonl", [PAIR])
    with pytest.raises(UserError, match="no files of split 'train'"):
        read_pairs(str(tmp_path / "none"))


# ------------------------------------------------------------------------------------------------------------
# Ids: BOS, EOS, the boundary, truncation


def data_parts(row, tokenizer):
    return [tokenizer.decode(part) for part in encode_pair(row, tokenizer)]


@pytest.mark.parametrize("content, close, expected", [
    ("a", "", "a"),
    ("a", END + "\n", "a"),
    ("a", END + "\n" + END, "a"),
    ("a" + END, END, "a"),
    ("a", "</turn>\n", "a</turn>\n"),
    ("a", END + "</turn>", "a" + END + "</turn>"),
    ("a \n", None, "a \n"),
    ("a" + END + "\n", None, "a"),
    ("a" + END + "b", None, "a" + END + "b")])
def test_data_responses_end_in_eos_exactly_once(content, close, expected):
    """close: what the template writes after a turn; None: the row has strings."""
    tok = byte_tokenizer(template=TURNS.replace("CLOSE", close or ""))  # its pad token is EOS, too
    row = PAIR | {"chosen": content} if close is None else conversation(content, prompt="")
    assert data_parts(row, tok)[1] == expected + END
    assert encode_pair(row, tok)[2][-1] == EOS


@pytest.mark.parametrize("options, written, prompt, expected", [  # written: by the data or the template
    ({}, "", "abc", "abc"),
    ({}, "<s>", "abc", "<s>abc"),
    ({"adds_bos": True}, "", "abc", "<s>abc"),
    ({"post_processor": True}, "", "abc", "<s>abc"),
    ({"post_processor": True}, "<s>", "abc", "<s>abc"),
    ({"adds_bos": True, "bos": False}, "", "abc", "abc"),
    ({}, "", "", "<s>"),
    ({"post_processor": True}, "", "", "<s>"),
    ({"bos": False}, "", "", END)])
def test_data_prompts_begin_with_bos_exactly_once_and_are_never_empty(options, written, prompt, expected):
    tok = byte_tokenizer(template=written + EACH + "{{ m.content }}{% endfor %}", **options)
    as_text = dict(prompt=written + prompt, chosen="c", rejected="r")
    for row in (conversation("c", "r", prompt), as_text):
        assert data_parts(row, tok) == [expected, "c" + END, "r" + END]


@pytest.mark.parametrize("template, row, expected", [  # no template: GPT-2's own tokens
    ("{{ bos_token }}" + PLAIN_TURNS,
     dict(prompt=[], chosen=[G], rejected=[B]), ["<s>", "[a]good", "[a]bad"]),
    pytest.param("", dict(prompt="Hello wor", chosen="ld one", rejected="k two"),
                 ["Hello wor", "ld one", "k two"], marks=needs_shared)])
def test_data_prompt_is_what_a_generator_is_asked_with(template, row, expected):
    if template:
        tok = byte_tokenizer(post_processor="bos" in template, template=template)
    else:
        tok = data_real_tokenizer("tokenizers/gpt2")
    prompt, chosen, rejected = expected
    assert data_parts(row, tok) == [prompt, chosen + END, rejected + END]


@pytest.mark.parametrize("lengths, kept", [
    ((100, 950, 950), (100, 924, 924)),
    ((10, 1020, 400), (10, 1014, 400)),
    ((513, 512, 2), (512, 512, 2)),
    ((1000, 24, 24), (1000, 24, 24)),
    ((1000, 25, 24), (512, 25, 24)),
    ((2000, 2000, 900), (512, 512, 512))])
@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("bos, limit", [(False, None), (True, 512)])  # None: half of max_length
def test_data_truncation_cuts_the_prompt_first_and_keeps_bos(lengths, kept, mode, bos, limit):
    """Lengths in tokens: the prompt's includes BOS, a response's its EOS."""
    tok = byte_tokenizer(post_processor=bos)
    letters = "abcdefghijklmnopqrstuvwxyz" * 100
    asked = letters[: lengths[0] - bos]
    answers = ["A" + letters[: lengths[1] - 2], "B" + letters[: lengths[2] - 2]]
    row = dict(prompt=asked, chosen=answers[0], rejected=answers[1])
    limits = dict(max_length=1024, max_prompt_length=limit, truncation_mode=mode)
    prompt, *responses = encode_pair(row, tok, **limits)
    room = kept[0] - bos
    asked = asked[-room:] if mode == "keep_end" else asked[:room]
    assert prompt == [BOS] * bos + tok.encode(asked)
    for response, answer, length in zip(responses, answers, kept[1:]):
        ids = tok.encode(answer) + [EOS]
        assert response == ids[:length]


def test_data_max_prompt_length_is_what_a_prompt_is_cut_to():
    row = dict(prompt="p" * 20, chosen="g" * 20, rejected="b" * 20)
    parts = encode_pair(row, byte_tokenizer(), max_length=12, max_prompt_length=3)
    assert [len(part) for part in parts] == [3, 9, 9]


LONG = "x" * 30


def data_report(read, kept, equal, empty, cut, none):
    return f"{read} rows read, {kept} kept: {equal} equal, {empty} empty, {cut} cut, {none} without a token"


@pytest.mark.parametrize("rows, kept, report", [  # report: how many equal, empty, cut, without a token
    ([PAIR | {"rejected": "good"}, PAIR | {"chosen": END}, PAIR], [3], (1, 0, 0, 1)),
    ([PAIR, PAIR | {"chosen": ""}, PAIR | {"rejected": " \n\u3000"}], [1], (0, 2, 0, 0)),
    ([PAIR, conversation(), conversation(" "), conversation("bad")], [1, 2], (1, 1, 0, 0)),
    ([PAIR | {"chosen": LONG}, PAIR | {"prompt": LONG}], [1, 2], (0, 0, 2, 0)),
    ([PAIR | {"chosen": LONG + "a", "rejected": LONG + "b"}, PAIR], [2], (1, 0, 0, 0))])  # equal once cut
def test_data_rows_left_out_are_counted_by_reason(rows, kept, report):
    pairs = tokenize_pairs(rows, byte_tokenizer(template=PLAIN_TURNS), max_length=20)
    assert pairs.report.startswith(data_report(len(rows), len(kept), *report))
    assert pairs.rows.tolist() == kept
    assert pairs.spans()[:, 1:].min() > 0


@needs_shared
@pytest.mark.parametrize("file, name, report", [
    ("hh_harmless_test.jsonl.gz", "gpt2", (2312, 2308, 0, 4, 0, 0)),
    ("rasbt_instruction_preference.json", "gpt2", (1100, 1094, 6, 0, 0, 0)),
    ("dpo_en_demo.conv_explicit.jsonl", "minimind3", (300, 300, 0, 0, 137, 0))])
def test_data_real_files_are_counted_kept_within_the_length_and_held_in_little_memory(file, name, report):
    rows = data_real_rows(file)
    tok = data_real_tokenizer(f"tokenizers/{name}")
    encode_pair(rows[0], tok)  # compiles the template, which is held, too
    tracemalloc.start()
    pairs = tokenize_pairs(rows, tok)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert pairs.report.startswith(data_report(*report))
    assert held <= 6 * len(pairs.tokens) + 20_000
    lengths = pairs.spans() + [1, 0, 0]
    assert lengths[:, 1:].min() >= 1
    longest = lengths[:, 0] + lengths[:, 1:].max(1)
    assert longest.max() <= 1024
    for i in range(100):
        for response in pairs[i][1:]:
            assert response.tolist().count(tok.eos_id) <= 1


# ------------------------------------------------------------------------------------------------------------
# Pairs as flat arrays, packs, the order of the steps


def test_data_pairs_are_flat_arrays():
    rows = []
    for i in range(520):
        row = dict(prompt="p" * i, chosen="c" * (i + 1), rejected="r" * (2 * i + 1))
        rows.append(row)
    tok = byte_tokenizer()
    pairs = tokenize_pairs(rows, tok, max_length=500)
    few = pairs.select([5, 3, 519])
    assert pairs.tokens.dtype == few.tokens.dtype == np.int32
    assert pairs.spans()[7].tolist() == [6, 9, 16]
    assert pairs.rows.tolist() == list(range(1, 521))
    assert few.rows.tolist() == [6, 4, 520]
    for i in (0, 511, 512):
        expected = list(encode_pair(rows[i], tok, max_length=500))
        assert [ids.tolist() for ids in pairs[i]] == expected
    for place, i in enumerate([5, 3, 519]):
        for ids, expected in zip(few[place], pairs[i]):
            assert ids.tolist() == expected.tolist()


def test_data_a_pack_is_the_drawing():
    first = [10, 11, 12, 13], [20, 21, 22], [30, 31]
    second = [40], [50], [60, 61]  # it has no prefix
    batch = pack([first, second])
    #                                prefix     | chosen    | rejected || chosen | rejected
    assert batch.inputs.tolist() == [10, 11, 12, 13, 20, 21, 13, 30, 40, 40, 60]
    assert batch.targets.tolist() == [11, 12, 13, 20, 21, 22, 30, 31, 50, 60, 61]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 0, 0, 1]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 4, 5, 5]
    assert batch.counts.tolist() == [[3, 3, 2], [0, 1, 2]]
    assert batch.cu_q.tolist() == [0, 6, 8, 9, 11]
    assert batch.cu_k.tolist() == [0, 6, 11, 12, 14]
    assert batch.kv_index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 9, 10]
    assert batch.cu_q.dtype == torch.int32
    assert (batch.max_q, batch.max_k) == (6, 6)
    assert batch.scored is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("capacity", [50, 64, 500, 10**6])
def test_data_deal_makes_few_and_even_packs_for_every_rank(ranks, capacity):
    lengths = np.random.default_rng(ranks).integers(1, 51, 200)
    packs = data.deal(lengths, capacity, ranks)
    sums = [lengths[members].sum() for members in packs]
    assert sorted(sum(packs, [])) == list(range(200))
    assert len(packs) % ranks == 0
    assert max(sums) <= capacity
    assert max(sums) - min(sums) <= lengths.max()
    assert len(packs) <= 11 / 9 * math.ceil(lengths.sum() / capacity) + ranks  # as first-fit decreasing


@pytest.mark.parametrize("ranks, packs", [(1, 2), (2, 2), (3, 3)])
def test_data_deal_makes_as_few_packs_as_the_ranks_allow(ranks, packs):
    assert len(data.deal([10] * 8, 40, ranks)) == packs


@pytest.mark.parametrize("max_tokens", [40, 100, 10**6])
@pytest.mark.parametrize("prompt_loss, ranks", [(True, 1), (False, 2), (True, 7), (False, 40)])
def test_data_packs_predict_every_token_once_and_are_as_many_on_every_rank(ranks, max_tokens, prompt_loss):
    lengths = np.random.default_rng(0).integers(1, 12, 180)
    tokens = np.arange(lengths.sum(), dtype=np.int32)  # all differ
    parts = np.split(tokens, lengths.cumsum()[:-1])
    pairs = Pairs.joined(parts, np.arange(60))
    indices = data.step_indices(60, 60, 0, 0)[0][:33]
    of_ranks = []
    for rank in range(ranks):
        packs = make_packs(pairs, indices, max_tokens, rank=rank, ranks=ranks, prompt_loss=prompt_loss)
        of_ranks.append(packs)
    assert len(set(map(len, of_ranks))) == 1
    predicted, wanted = [], []
    for batch in sum(of_ranks, []):
        assert len(batch.inputs) <= max_tokens
        assert batch.share in (0.0, 1.0)  # 0: keeps a rank in step, and does not count
        if batch.share:
            scored = slice(None) if batch.scored is None else batch.scored
            predicted += batch.targets[scored].tolist()
    for i in indices:
        first = 1 if prompt_loss else len(pairs[i][0])
        wanted += np.concatenate(pairs[i])[first:].tolist()
    assert sorted(predicted) == sorted(wanted)


def test_data_order_of_an_epoch_depends_on_seed_and_epoch_alone_and_steps_take_all_of_it():
    first = data.step_indices(100, 100, 3, 5)[0]
    assert sorted(first) == list(range(100))
    assert (data.step_indices(100, 100, 3, 5)[0] == first).all()
    for seed, epoch in [(3, 6), (4, 5), (5, 3)]:
        assert (data.step_indices(100, 100, seed, epoch)[0] != first).any()
    steps = [data.step_indices(10, 4, 3, step) for step in range(6)]
    assert [done for _, done in steps] == [0.4, 0.8, 1, 1.4, 1.8, 2]
    assert [len(indices) for indices, _ in steps] == [4, 4, 2, 4, 4, 2]
    order = [*data.step_indices(10, 10, 3, 0)[0], *data.step_indices(10, 10, 3, 1)[0]]
    assert np.concatenate([indices for indices, _ in steps]).tolist() == order


# ------------------------------------------------------------------------------------------------------------
# Bad input: one line that says where

GOOD_LINE = json.dumps(PAIR).encode() + b"\n"


def data_reading(name, content):
    return lambda d: read_pairs(put(d / name, content))


def data_second(row):
    """A good line, then this one."""
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    return data_reading("a.jsonl", GOOD_LINE + line)


def data_other_split(d):
    put(d / "test.jsonl", [PAIR])
    return read_pairs(d)


def data_of_two_files(d):
    """What fails is the second row of the second one."""
    one = put(d / "a.jsonl", [PAIR])
    two = put(d / "b.jsonl", [conversation(), conversation(prompt="?")])
    template = "{% if messages[0].content == '?' %}{{ raise_exception('Only yes') }}{% endif %}"
    return tokenize_pairs(read_pairs([one, two]), byte_tokenizer(template=template))


BAD_DATA = {  # what is wrong: (what meets it, what the line says)
    "no file": (lambda d: read_pairs(d / "no.jsonl"), r"no\.jsonl: "),
    "blank file": (data_reading("a.jsonl", "\n \n\r\n"), r"a\.jsonl: no rows"),
    "no such split": (data_other_split, r"'train'.*test\.jsonl"),
    "no network": (lambda d: read_pairs("no-such-owner/no-such-set"), "no-such-owner/no-such-set.* hub"),
    "cut off": (data_reading("a.jsonl.gz", gzip.compress(GOOD_LINE * 9999)[:-9]), r"\.jsonl\.gz: EOFError"),
    "not UTF-8": (data_second(b'{"prompt": "\xff"}'), r"a\.jsonl, line 2: .*utf"),
    "broken line": (data_second(b'\n{"prompt": \n'), r"a\.jsonl, line 3: "),
    "broken list": (data_reading("a.json", b"[\n" + GOOD_LINE + b",\n{]"), r"a\.json: .*line 4"),
    "a string as row": (data_reading("a.json", json.dumps([PAIR, "text"])), r"a\.json, row 2: .*str"),
    "no rejected": (data_second(dict(question="q", chosen="c")), "line 2: .*columns found: question, chosen"),
    "turn without content": (data_second(dict(chosen=[{"role": "a"}], rejected=[B])), "line 2: .*messages"),
    "an image": (data_second(conversation(prompt=[{"type": "image_url"}])), "line 2: .*image_url"),
    "other prompt": (data_reading("a.jsonl", [dict(prompt="x", chosen=[Q, G], rejected=[Q, B])]), "line 1: "),
    "nothing left": (lambda d: tokenize_pairs([conversation("bad")], byte_tokenizer()), "0 kept: 1 equal"),
    "template refuses": (data_of_two_files, r"b\.jsonl, line 2\b.*Only yes"),
    "no EOS": (lambda d: encode_pair(PAIR, tokenizer_of(demo_tokenizer().backend)), "eos_token"),
    "no tokenizer": (lambda d: Tokenizer.from_pretrained(d), r"no tokenizer\.json"),
    "broken tokenizer.json": (data_loading({"tokenizer.json": '{"model": '}), r"model: tokenizer\.json"),
    "JSON of another kind": (lambda d: read_json(put(d / "config.json", "3")), r"config\.json: .*int"),
}


@pytest.mark.parametrize("wrong", BAD_DATA)
def test_data_bad_input_ends_in_one_line_that_says_where(wrong, tmp_path):
    meet, expected = BAD_DATA[wrong]
    with pytest.raises(UserError, match=expected) as caught:
        meet(tmp_path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# Fuzz: a result or a UserError, never anything else


def data_mutated(original, place, cut, inserted):
    """The bytes, `cut` of them at a place (a fraction of the whole) replaced."""
    at = int(place * len(original))
    return original[:at] + inserted + original[at + cut :]


@pytest.mark.parametrize("target", ["a.jsonl", "a.json.gz", "rows.jsonl", "tokenizer"])
def test_data_fuzz_gives_a_result_or_a_user_error(target, tmp_path):
    st, run_on = fuzz(tmp_path / "notes", 200)
    texts = st.text(st.characters(), max_size=8) | st.sampled_from(["a b", "\ud800", " ", HI + " x", END])
    turns = st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), max_size=3)
    leaves = st.none() | st.integers() | st.floats() | texts | turns
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=5)
    columns = st.sampled_from(["prompt", "chosen", "rejected", "instruction", "input"])
    snippets = st.sampled_from([b"\\ud800", b"null", b"[", b"{", b"\n", b"1e999"]) | st.binary(max_size=4)
    edit = st.floats(0, 1), st.integers(0, 20), snippets
    originals = [json.dumps(row).encode() + b"\n" for row, *_ in FORMS.values()]
    originals.append(b"[" + GOOD_LINE + b"]")
    mutated = st.builds(data_mutated, st.sampled_from(originals), *edit) | st.binary(max_size=99)
    contents = {
        "a.jsonl": mutated,
        "a.json.gz": st.builds(data_mutated, mutated.map(gzip.compress), *edit),
        "rows.jsonl": st.lists(st.dictionaries(columns, values) | values, min_size=1, max_size=3),
        "tokenizer": st.dictionaries(st.sampled_from(["eos_token", "chat_template"]), values)}

    def check(content):
        try:
            if target == "tokenizer":
                rows = [conversation(), PAIR]
                tok = data_loading({"tokenizer_config.json": content})(tmp_path)
            else:
                rows = read_pairs(put(tmp_path / target, content))
                tok = byte_tokenizer()
            for row in rows:
                assert set(row) == set(PAIR)
                assert len(set(map(type, row.values()))) == 1
            tokenize_pairs(rows, tok, max_length=16)
        except UserError as error:
            assert str(error)
            assert "\n" not in str(error)

    run_on(check, contents[target])


# ---------------------------------------------------------------------------------------------------------
# Tiny checkpoints whose weights are a formula, so that everyone has the same: odd sizes, few key/value heads,
# heads wider than hidden / heads where a family allows it, an epsilon that is large enough to be missed

SIZES = dict(vocab_size=53, hidden_size=48, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=128)
OPT = dict(vocab_size=53, hidden_size=80, ffn_dim=44, num_hidden_layers=3, num_attention_heads=5)
GPT2 = dict(vocab_size=53, n_embd=80, n_layer=3, n_head=5, n_positions=128, layer_norm_epsilon=0.02)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)  # Mixtral has names of its own
LAYER_NORM = dict(SIZES, layer_norm_eps=0.02)
BASES = {"opt": OPT, "gpt2": GPT2, "phi": LAYER_NORM, "stablelm": LAYER_NORM}


def plain(model_type="llama", **changes):
    """config.json of a tiny model, as a dict."""
    return {"model_type": model_type} | BASES.get(model_type, dict(SIZES, rms_norm_eps=0.02)) | changes


def build(model_type="llama", **changes):
    hf = plain(model_type, **changes)
    return Transformer(Config.from_hf(hf), hf).initialise(7).eval()


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, OPT_EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"
TIED, APART = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
LINEAR = {"type": "linear", "factor": 4.0}
SLOWED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
SLOWED["original_max_position_embeddings"] = 64
WINDOW, FULL, SLIDING = dict(sliding_window=6, use_sliding_window=True), "full_attention", "sliding_attention"
GEMMA3 = dict(num_hidden_layers=7, head_dim=16)
OF_TYPES = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
            SLIDING: {"rope_type": "default", "rope_theta": 70.0}}
CHECKPOINTS = {  # but one in the spellings of transformers 4; version 5 writes others, see there_and_back
    "llama": plain("llama", **TIED, head_dim=16),
    "llama3": plain("llama", rope_scaling=SLOWED, attention_bias=True, mlp_bias=True),
    "llama-linear": plain("llama", head_dim=24, rope_theta=500.0, rope_scaling=LINEAR, hidden_act="gelu"),
    "mistral": plain("mistral", head_dim=24, sliding_window=7),
    "qwen2": plain("qwen2", **TIED, **WINDOW, layer_types=[SLIDING, FULL, SLIDING]),
    "qwen3": plain("qwen3", **TIED, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
    "qwen3-biases": plain("qwen3", **WINDOW, max_window_layers=2, head_dim=10, attention_bias=True),
    "smollm3": plain("smollm3", num_hidden_layers=4, pad_token_id=1),  # the last layer not rotated
    "smollm3-list": plain("smollm3", **APART, pad_token_id=1, no_rope_layers=[0, 1, 0], attention_bias=True),
    "olmo2": plain("olmo2", pad_token_id=1),
    "olmo2-biases": plain("olmo2", **TIED, attention_bias=True, pad_token_id=1, hidden_act="gelu"),
    "gemma": plain("gemma", head_dim=16, hidden_act="gelu"),
    "gemma-untied": plain("gemma", **APART, head_dim=10, attention_bias=True, rope_theta=500.0),
    "gemma3": plain("gemma3_text", **GEMMA3, sliding_window=7),
    "gemma3-large": plain("gemma3_text", **GEMMA3, sliding_window=5, sliding_window_pattern=2,
                          rope_theta=500.0, rope_local_base_freq=50.0,
                          rope_scaling=dict(LINEAR, rope_type="linear"),
                          query_pre_attn_scalar=24, attention_bias=True, **APART),
    "gemma3-types": plain("gemma3_text", head_dim=24, sliding_window=6, layer_types=[FULL, SLIDING, FULL],
                          query_pre_attn_scalar=24, rope_parameters=OF_TYPES),
    "phi3": plain("phi3", sliding_window=7, pad_token_id=1),
    "phi3-partial": plain("phi3", **TIED, partial_rotary_factor=0.5, pad_token_id=1),
    "stablelm": plain("stablelm", hidden_size=96, use_qkv_bias=True),  # 4 of 16 rotated
    "stablelm-parallel": plain("stablelm", use_parallel_residual=True, partial_rotary_factor=0.5),
    "phi": plain("phi", hidden_size=96, partial_rotary_factor=0.4),  # 6 of 16 rotated
    "phi-norms": plain("phi", qk_layernorm=True, rope_theta=300.0),
    "opt": plain("opt"),
    "opt-350m": plain("opt", word_embed_proj_dim=24, do_layer_norm_before=False),
    "opt-bare": plain("opt", **APART, enable_bias=False),
    "gpt2": plain("gpt2"),
    "gpt2-untied": plain("gpt2", **APART, n_inner=44, activation_function="gelu"),
    "mixtral": plain("mixtral", intermediate_size=32, num_local_experts=5, num_experts_per_tok=2,
                     sliding_window=7),
    "mixtral-all": plain("mixtral", **TIED, intermediate_size=24, num_local_experts=3, num_experts_per_tok=3),
    "qwen3moe": plain("qwen3_moe", **EXPERTS, head_dim=16, norm_topk_prob=True),
    "qwen3moe-biases": plain("qwen3_moe", **EXPERTS, attention_bias=True),
}
# empty prefix, one-token responses, long ones, many: longer than any window
LENGTHS = [(1, 1, 1), (1, 5, 9), (13, 1, 7), (9, 12, 1), (17, 11, 14), (2, 3, 20), (1, 19, 1), (16, 9, 13)]


def by_formula(name, shape):
    """The tensor that a file holds under this name: waves; norms near one, biases near zero."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    phase = int.from_bytes(name.encode(), "big") % 997
    wave = torch.sin(0.37 * i * i + phase).view(shape)
    if len(shape) > 1:
        return wave * 1.7 / math.sqrt(shape[-1])
    is_scale = ("norm" in name or "ln_" in name) and name.endswith("weight")
    return 0.4 * wave + is_scale


def rewrite(path, change):
    """Pass the tensors of a file through `change`, a function from {name: tensor} to the same."""
    tensors = {key: value.contiguous() for key, value in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> the directory of a model under Hugging Face's names, made once."""
    @functools.cache
    def make(name, dtype=torch.float32):
        directory = tmp_path_factory.mktemp(name)
        build(**CHECKPOINTS[name]).save_pretrained(directory, dtype=dtype)
        tensors = load_file(directory / WEIGHTS)
        for key in tensors:
            tensors[key] = by_formula(key, tensors[key].shape).to(dtype)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        return directory

    return make


load = Transformer.from_pretrained


def load_in_transformers(directory):
    """The same files as transformers reads them; nothing missing, nothing left over."""
    auto = pytest.importorskip("transformers", reason="transformers is the reference").AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, output_loading_info=True, experts_implementation="eager")
    assert not any(info.values()), info
    return model.eval()


def close(ours, theirs, atol=1e-5, rtol=0.0):
    """Tensors, or lists or dicts of them."""
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def mixture(values):
    """A number that depends on each of the values (T,) in its own way: in place of a loss."""
    factors = torch.arange(float(len(values)), device=values.device).cos()
    return values @ factors / len(values)


def with_gradients(model, values):
    """values (T,), and the gradient of each parameter of a mixture of them."""
    model.zero_grad(set_to_none=True)
    mixture(values).backward()
    return {"values": values.detach()} | {name: p.grad for name, p in model.named_parameters()}


def plain_logps(logits, pairs):
    """Log-probabilities in the order of a pack, by two plain passes for each pair."""
    found = []
    for prompt, chosen, rejected in pairs:
        found.append(sequence_logps(logits, prompt, chosen))
        found.append(sequence_logps(logits, prompt, rejected)[len(prompt) - 1 :])
    return torch.cat(found)


# ---------------------------------------------------------------------------------------------------------
# Adapters


def adapted(directory, by=0.25, **more):
    """A model with adapters of rank 3, alpha 5, moved `by` so much from their start."""
    model = Transformer.outline(directory)
    model.add_adapters(3, 5.0)
    model.load(**more).start_adapters()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += by * by_formula(name, p.shape).float()
    return model.eval()


@pytest.mark.parametrize("name", ["llama3", "qwen3", "opt", "mixtral", "gemma3", "phi3", "gpt2"])
@torch.no_grad()
def test_model_adapters_start_from_nothing_and_merge(name, checkpoint, tmp_path):
    """W x + alpha / r B A x, with the adapters and in the merged model."""
    model = adapted(checkpoint(name))
    layer = model.model.layers[1].self_attn.q_proj
    x = torch.linspace(-1, 1, layer.in_features)
    update = layer(x) - F.linear(x, layer.weight, layer.bias)
    close(update, 5 / 3 * (layer.lora_B @ layer.lora_A @ x))
    tokens = torch.tensor(IDS[None])
    model.save_pretrained(tmp_path, torch.float32)
    close(load(tmp_path).logits(tokens), model.logits(tokens), atol=1e-4)
    at_the_start = adapted(checkpoint(name), by=0)
    close(at_the_start.logits(tokens), load(checkpoint(name)).logits(tokens))


@pytest.mark.parametrize("name", "llama3 mistral qwen2 qwen3 smollm3 stablelm phi opt mixtral olmo2 gemma "
                                 "gemma3-large phi3 gpt2".split())
def test_model_adapters_are_pefts(name, checkpoint, tmp_path):
    """In PEFT the same logits, with the adapters and merged."""
    peft = pytest.importorskip("peft", reason="peft is the reference")
    directory = checkpoint(name)
    model = adapted(directory)
    weights = {key: p for key, p in model.named_parameters() if p.requires_grad}
    model.save_adapters(tmp_path / "adapter", weights, str(directory), 3, 5.0)
    theirs = peft.PeftModel.from_pretrained(load_in_transformers(directory), tmp_path / "adapter").eval()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == sum("lora" in key for key, _ in theirs.named_parameters())
    tokens = torch.tensor(IDS[None])
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (expected - load(directory).logits(tokens)).abs().max() > 0.1
        close(model.logits(tokens), expected, atol=1e-4)
        model.save_pretrained(tmp_path / "merged", torch.float32)
        close(load_in_transformers(tmp_path / "merged")(tokens).logits, expected, atol=1e-4)


def test_model_adapters_freeze_the_rest_in_the_dtype_asked_for(checkpoint):
    model = adapted(checkpoint("llama3"), frozen_dtype=torch.bfloat16)
    batch = pack(random_pairs([(5, 3, 4)]))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch).sum().backward()
    for name, p in model.named_parameters():
        expected = (torch.float32, True) if "lora" in name else (torch.bfloat16, False)
        assert (p.dtype, p.grad is not None) == expected, name
    assert model.training_flops(batch.counts) < load(checkpoint("llama3")).training_flops(batch.counts)


# ---------------------------------------------------------------------------------------------------------
# What everyone can check: golden numbers, and Llama as one writes it on a blackboard

IDS = np.array([(7 * n * n + 3) % 53 for n in range(20)])
GOLDEN = {  # transformers 5.23: four logits; log-probabilities of the chosen and the rejected response
    "llama": [-0.76092, 2.99386, -1.73461, 0.60324, -29.76840, -33.16969],
    "llama3": [-3.26735, -1.13066, -1.91915, 1.70967, -31.23161, -27.06326],
    "llama-linear": [-0.60868, -0.30521, 1.06501, 1.66688, -36.54134, -36.47046],
    "mistral": [-0.71148, -0.03441, 0.10236, 1.67119, -36.47426, -33.25074],
    "qwen2": [2.44034, 2.79630, 1.84556, -2.19681, -31.95827, -37.99078],
    "qwen3": [1.49082, -0.95035, 1.99415, -0.49908, -29.23729, -41.16958],
    "smollm3": [1.43386, 1.96399, -0.29412, -0.65184, -27.97367, -35.68438],
    "phi3": [-0.01654, 2.77734, -2.46458, -0.70989, -26.90919, -34.96687],
    "stablelm": [-3.44063, -0.11261, 2.23628, -0.15516, -30.00021, -31.36618],
    "phi": [-0.05015, 1.01958, 1.62838, -0.64446, -27.59469, -35.06314],
    "opt": [-0.29413, 0.83844, 0.47223, 0.50490, -35.40018, -38.44374],
    "gpt2": [-1.04127, 1.31219, 0.87534, 2.75560, -32.06234, -32.90264],
    "mixtral": [0.11377, 0.02749, 0.25212, 0.30841, -31.25917, -40.36221],
    "qwen3moe": [-0.37839, 0.1002, -0.87022, -1.13987, -30.33102, -34.02042],
    "olmo2": [-2.03331, -1.64860, 0.12706, 0.78231, -31.94813, -34.83180],
    "gemma": [-2.53339, 3.03910, 2.86554, 0.77596, -51.85965, -48.34861],
    "gemma3": [-3.07618, 0.93214, 3.53391, 0.28179, -51.25784, -45.72124],
}


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_model_gives_the_golden_numbers(name, checkpoint):
    model = load(checkpoint(name))
    logits = model.logits(torch.tensor(IDS[None]))[0]
    batch = pack([(IDS[:6], IDS[6:13], IDS[13:])])
    logps = model(batch)
    ours = [logits[0, 1], logits[6, 2], logits[7, 3], logits[19, 4]]
    for branch in (data.CHOSEN, data.REJECTED):
        ours.append(logps[batch.owner == branch].sum())
    close(torch.stack(ours), torch.tensor(GOLDEN[name]), atol=1e-4)


def plain_llama(w, tokens, heads=6, kv_heads=2, layers=3, eps=0.02, theta=1e4):
    """w: {name in the file: tensor}, tokens (T,) -> (T, vocab) logits."""
    T = len(tokens)
    D = len(w["model.layers.0.self_attn.q_proj.weight"]) // heads
    frequencies = theta ** -(torch.arange(0, D, 2).double() / D)
    angles = torch.arange(T)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (T, 1, D / 2)

    def norm(x, name):
        mean_square = x.square().mean(-1, keepdim=True)
        return x / (mean_square + eps).sqrt() * w[name + ".weight"]

    def project(x, name):
        return x @ w[name + "_proj.weight"].T

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for n in range(layers):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        h = norm(x, f"model.layers.{n}.input_layernorm")
        q = rotate(project(h, f"{attention}.q").view(T, -1, D))
        k = rotate(project(h, f"{attention}.k").view(T, -1, D))
        v = project(h, f"{attention}.v").view(T, -1, D)
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        v = v.repeat_interleave(heads // kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(D)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        x = x + project(torch.einsum("hqk,khd->qhd", weights, v).flatten(1), f"{attention}.o")
        h = norm(x, f"model.layers.{n}.post_attention_layernorm")
        gate = F.silu(project(h, f"{mlp}.gate"))
        x = x + project(gate * project(h, f"{mlp}.up"), f"{mlp}.down")
    return norm(x, "model.norm") @ w["model.embed_tokens.weight"].T


def test_model_is_the_llama_of_the_blackboard(checkpoint):
    directory = checkpoint("llama")
    w = {key: value.double() for key, value in load_file(directory / WEIGHTS).items()}
    tokens = torch.tensor(IDS)
    close(load(directory).logits(tokens[None])[0], plain_llama(w, tokens).float())


# ---------------------------------------------------------------------------------------------------------
# Against transformers, and on real models


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_model_equals_transformers_there_and_back(name, checkpoint, tmp_path, monkeypatch):
    """Our files in transformers, its files here, those saved again, in shards, in transformers."""
    reference = load_in_transformers(checkpoint(name))
    reference.save_pretrained(tmp_path)
    ours = load(tmp_path)
    monkeypatch.setattr(model_module, "SHARD_BYTES", 30_000)
    ours.save_pretrained(tmp_path / "again")
    again = load_in_transformers(tmp_path / "again")
    tokens = torch.tensor(np.resize(IDS, 61)[None])
    with torch.no_grad():
        expected = reference(tokens).logits
        close(load(checkpoint(name)).logits(tokens), expected, atol=1e-4)
        close(ours.logits(tokens), expected, atol=1e-4)
        close(again(tokens).logits, expected, atol=1e-4)
    again.config._name_or_path = reference.config._name_or_path
    assert again.config.to_dict() == reference.config.to_dict()
    assert again.generation_config.to_dict() == reference.generation_config.to_dict()
    index = read_json(tmp_path / "again" / INDEX)
    assert index["weight_map"].keys() == load_file(tmp_path / WEIGHTS).keys()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_model_gradients_equal_transformers(name, checkpoint, tmp_path):
    """Those of unpadded forward passes by transformers, and no tensor is left out."""
    model = load(checkpoint(name))
    reference = load_in_transformers(checkpoint(name))
    pairs = random_pairs(LENGTHS[2:6])
    logps = model(pack(pairs))
    expected_logps = plain_logps(lambda ids: reference(ids).logits, pairs)
    close(logps, expected_logps, atol=1e-4)
    (mixture(logps) + mixture(expected_logps)).backward()
    for parameter in reference.parameters():  # saved as if they were weights, to be read under our names
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    reference.save_pretrained(tmp_path)
    ours = {key: p.grad for key, p in model.named_parameters() if p.grad.any()}
    close(ours, dict(load(tmp_path).named_parameters()), atol=2e-5, rtol=1e-5)


@needs_shared
@pytest.mark.parametrize("name", ["stories260K", "slm4096-gpt2"])
def test_model_real_ones_equal_their_references(name):
    model = load(MODELS / name).requires_grad_(False)
    for case in read_json(MODELS / name / "reference_logprobs.json").values():
        ids = np.array(case["ids"])
        expected = torch.tensor(case["logprob_of_next"])
        close(sequence_logps(model.logits, ids), expected, atol=1e-4)
        both = torch.cat([expected, expected[39:41]])
        close(model(pack([(ids[:40], ids[40:], ids[40:42])])), both, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# A pack gives what its sequences give alone; a cache gives what the whole sequence gives


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_model_packed_equals_plain(name, checkpoint):
    """Log-probabilities and gradients of two plain forward passes for each pair; then of responses alone."""
    model = load(checkpoint(name))
    pairs = random_pairs(LENGTHS)
    batch = pack(pairs)
    expected = with_gradients(model, plain_logps(model.logits, pairs))
    close(with_gradients(model, model(batch)), expected, rtol=1e-5)
    alone = model(pack(pairs, prompt_loss=False))
    masked = model(batch) * (batch.owner % data.PARTS != data.PREFIX)
    close(with_gradients(model, alone), with_gradients(model, masked), rtol=1e-5)


@pytest.mark.parametrize("lengths", [[3], [2, 23, 1, 9]], ids=["one", "batch"])
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_model_cached_equals_uncached(name, lengths, checkpoint):
    """Prompts with padding that must not matter, 12 steps of a token, then 8 at once, as a chat goes on."""
    model = load(checkpoint(name))
    longest = max(lengths)
    rows = torch.arange(len(lengths))
    ends = torch.tensor(lengths)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 53, (len(rows), longest + 20), generator=generator)
    expected = model.logits(tokens)
    positions = torch.arange(longest).expand(len(rows), -1)
    padded = tokens[:, :longest].masked_fill(positions >= ends[:, None], 7)
    cache = Cache()
    first = model.next_logits(padded, positions, cache, longest, ends - 1)
    close(first, expected[rows, ends - 1], atol=1e-4)
    steps = [(done, 1) for done in range(12)] + [(12, 8)]
    for done, count in steps:
        at = ends[:, None] + torch.arange(done, done + count)
        after = model.next_logits(tokens.gather(1, at), at, cache, longest + done + count)
        close(after, expected[rows, at[:, -1]], atol=1e-4)


def test_model_rows_of_a_batch_end_at_their_own_last_positions():
    """Learned positions end; a short prompt may use all of them, however long its neighbours are, and
    nothing is held for a limit that is never reached."""
    model = build("gpt2", n_positions=16)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [7] * 15]
    together = sample.continuations(model, prompts, 10**12)
    for prompt, answer in zip(prompts, together):
        assert [answer] == sample.continuations(model, [prompt], 30)
        assert len(prompt + answer) == 16


# ---------------------------------------------------------------------------------------------------------
# Mixtures of experts


def test_model_idle_experts_are_not_computed_and_have_zero_gradients():
    """Zero and not None, which DDP could not reduce; each of the two positions visits one expert."""
    model = build("qwen3_moe", **EXPERTS | {"num_experts_per_tok": 1})
    batch = pack([([3], [4], [5])])
    expected = with_gradients(model, model(batch))
    for key in [key for key in expected if ".experts." in key]:
        idle = (expected[key].flatten(1) == 0).all(1)
        assert 3 <= idle.sum() <= 4
        model.get_parameter(key).data[idle] = math.nan
    close(with_gradients(model, model(batch)), expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# What must change nothing


def varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, **_):
    """What torch.nn.attention.varlen.varlen_attn computes, one segment after the other."""
    assert cu_q.dtype == torch.int32
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
    out = []
    window = window_size[0] if window_size[0] >= 0 else max_k
    for segment in range(len(cu_q) - 1):
        rows = slice(cu_q[segment], cu_q[segment + 1])
        columns = slice(cu_k[segment], cu_k[segment + 1])
        queries, keys, values = q[rows], k[columns], v[columns]  # (T, heads, D)
        places = torch.arange(len(keys) - len(queries), len(keys))  # of the queries: at the end of the keys
        back = places[:, None] - torch.arange(len(keys))
        sees = (back >= 0) & (back <= window)
        heads_first = [x.transpose(0, 1)[None] for x in (queries, keys, values)]
        found = F.scaled_dot_product_attention(*heads_first, sees, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


def flash_attention(model, patch):
    from unittest.mock import create_autospec  # refuses arguments that the installed torch would refuse

    stand_in = create_autospec(model_module.varlen_attn, side_effect=varlen_reference)
    patch.setattr(model_module, "varlen_attn", stand_in)
    patch.setattr(model_module, "Packed", lambda batch, flash: Packed(batch, True))


def gradient_checkpointing(model, patch):
    model.gradient_checkpointing = True


def compiled(model, patch, **more):
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(dynamic=True, **more)


def compiled_to_code(model, patch):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    compiled(model, patch)


def compiled_without_code(model, patch):
    """All of torch.compile that looks at our source; the rest takes seconds."""
    compiled(model, patch, backend="eager")


@pytest.mark.parametrize("change, name", [
    *itertools.product([flash_attention, gradient_checkpointing],
                       ["mistral", "gpt2", "qwen3moe", "olmo2", "gemma3"]),
    (compiled_to_code, "gpt2"), (compiled_without_code, "mistral"), (compiled_without_code, "qwen3moe")])
def test_model_what_changes_nothing(change, name, checkpoint, monkeypatch):
    """Log-probabilities and all gradients."""
    model = load(checkpoint(name))
    batch = pack(random_pairs(LENGTHS))

    def results():
        return with_gradients(model, model(batch))

    expected = results()
    change(model, monkeypatch)
    close(results(), expected, rtol=1e-5)


def test_model_compiles_once_for_all_layers_and_sizes(monkeypatch):
    from torch._dynamo.utils import counters

    def graphs(layers, sizes):
        model = build(num_hidden_layers=layers)
        compiled_without_code(model, monkeypatch)
        counters.clear()
        for n in sizes:
            model(pack(random_pairs(LENGTHS[:n]))).mean().backward()
        return counters["stats"]["unique_graphs"]

    one_size = graphs(3, [3])
    assert one_size > 0
    assert graphs(3, [3, 5, 7, 8]) == one_size
    assert graphs(12, [3, 5]) == one_size


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", GOLDEN)
def test_model_bf16_autocast_is_close(name, device, checkpoint, monkeypatch):
    """Gradients and sums are fp32, all near the exact ones; on a GPU with flash."""
    monkeypatch.setattr(torch.cuda, "is_available", has_gpu)
    flashes = []

    def spy(batch, flash):
        flashes.append(flash)
        return Packed(batch, flash)

    monkeypatch.setattr(model_module, "Packed", spy)
    model = load(checkpoint(name)).to(device)
    batch = pack(random_pairs(LENGTHS)).to(device)
    exact = with_gradients(model, model(batch))
    with torch.autocast(device, dtype=torch.bfloat16):
        rough = model(batch)
    rough = with_gradients(model, rough)
    assert flashes == [False, device == "cuda"]
    assert {tensor.dtype for tensor in rough.values()} == {torch.float32}
    assert (rough.pop("values") - exact["values"]).abs().mean() < 0.1
    ours = torch.cat([rough[key].flatten() for key in rough])
    theirs = torch.cat([exact[key].flatten() for key in rough])
    assert F.cosine_similarity(ours, theirs, 0) > 0.95


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])  # the latter: as with adapters
def test_model_bf16_error_does_not_grow_with_depth(frozen):
    """As the residual stream is fp32; in bf16 the error of 48 layers is more than twice that of 2."""
    errors = []
    batch = pack(random_pairs(LENGTHS))
    generator = torch.Generator().manual_seed(0)
    for layers in (2, 48):
        model = build(num_hidden_layers=layers, hidden_size=96, head_dim=16)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1)
                if p.ndim > 1:
                    p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
                p.copy_(p.bfloat16())  # exact in both dtypes
            exact = model(batch)
            model.to(frozen)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                error = model(batch) - exact
            errors.append(error.square().mean().sqrt().item())
    assert errors[1] < 1.6 * errors[0], errors


@pytest.mark.parametrize("kept", [0, 50 * 200])
@pytest.mark.parametrize("chunk", [1, 7 * 200, 2**23])  # one row of the logits at a time, 7 of 50, all
def test_model_target_logps_equal_log_softmax_without_its_memory(chunk, kept, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))
            return out

    monkeypatch.setattr(model_module, "CHUNK", {"cpu": chunk})
    monkeypatch.setattr(model_module, "KEPT", kept)
    computed = []
    original = model_module.vocabulary_logps
    monkeypatch.setattr(model_module, "vocabulary_logps", lambda *a: computed.append(1) or original(*a))
    inputs = [by_formula("w", shape).requires_grad_() for shape in [(50, 8), (200, 8), (200,)]]
    targets = torch.arange(50) * 17 % 200
    weights = torch.linspace(-1, 2, 50, dtype=torch.float64)
    expected = F.linear(*inputs).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad(expected @ weights, inputs)
    with Watch():
        ours = target_logps(*inputs, targets)
        gradients = torch.autograd.grad(ours @ weights, inputs)
    close([ours, *gradients], [expected, *wanted], atol=1e-10)
    assert max(sizes) <= max(chunk, 200 * 8)  # of 50 * 200
    chunks = math.ceil(50 / max(1, chunk // 200))
    assert len(computed) == (chunks if kept else 2 * chunks)  # kept: they are not computed again


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("model_type, more", [
    ("llama", {}), ("mistral", {"sliding_window": 6}), ("gpt2", {}),
    ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 24})])
def test_model_steps_without_looking_at_a_tensor(model_type, more, scored, monkeypatch):
    """Tensors on the meta device have no values: whatever made the host wait for a GPU's raises here."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which does not know this device
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **more: nullcontext())
    model = build(model_type, **more).to("meta", torch.bfloat16)
    batch = pack(random_pairs(LENGTHS), prompt_loss=scored)
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, name, value.to("meta"))
    loss, _ = orpo_loss(model(batch), batch, 0.1, 100, len(LENGTHS))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    assert norm.is_meta
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype, masked, grouped", [
    (torch.float32, False, False), (torch.float32, True, False),
    (torch.bfloat16, True, False), (torch.bfloat16, False, True)])
def test_model_gives_a_gpu_grouped_heads_only_where_flash_takes_them(dtype, masked, grouped, monkeypatch):
    """Elsewhere there it would hold the scores of all heads, (B, heads, Q, K)."""
    asked = []

    def attention(q, k, v, mask, is_causal, enable_gqa):
        asked.append((enable_gqa, k.shape[1], mask is not None))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    q = torch.empty(1, 9, 6, 16, dtype=dtype, device="meta")
    k = torch.empty(1, 9, 2, 16, dtype=dtype, device="meta")
    model_module.causal_attention(q, k, k, window=4 if masked else None)
    assert asked == [(grouped, 2 if grouped else 6, masked)]


def test_model_generation_waits_once_a_token(monkeypatch):
    asked = []
    tolist = torch.Tensor.tolist

    def watched(x):
        asked.append(x.shape)
        return tolist(x)

    monkeypatch.setattr(torch.Tensor, "tolist", watched)
    steps = list(sample.generate(build(), [[3, 4], [5]], 7))
    assert len(steps) == 7
    assert len(asked) == 7 + 1  # the first: the prompts' lengths


# ---------------------------------------------------------------------------------------------------------
# Configs: spellings old and new, keys that do not belong

SAME_CONFIGS = [  # each on top of plain(family)
    ("llama", dict(head_dim=None, num_key_value_heads=None), dict(head_dim=8, num_key_value_heads=6)),
    ("mistral", {}, dict(sliding_window=4096)),
    ("mistral", dict(sliding_window=None), dict(layer_types=[FULL] * 3)),
    ("qwen2", dict(WINDOW, use_sliding_window=False, max_window_layers=0), dict(sliding_window=None)),
    ("qwen2", dict(WINDOW, max_window_layers=3), dict(sliding_window=None)),
    ("mixtral", dict(EXPERTS, rms_norm_eps=None), dict(EXPERTS, rope_theta=1e6, rms_norm_eps=1e-5)),
    ("qwen3_moe", dict(EXPERTS), dict(EXPERTS, num_experts=None, num_local_experts=5)),
    ("gemma", dict(hidden_act="gelu"), dict(hidden_activation="gelu_pytorch_tanh")),
    ("gemma3_text", dict(rope_scaling={"rope_type": "linear", "factor": 8.0}), dict(
        layer_types=[SLIDING] * 3, head_dim=256, query_pre_attn_scalar=256, rope_parameters={
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4}})),
]
MEANINGS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
            "num_experts", "norm_eps", "hidden_act", "ropes", "rotated", "windows")


@pytest.mark.parametrize("family, one, other", SAME_CONFIGS)
def test_model_configs_that_mean_the_same(family, one, other):
    shapes = []
    for changes in (one, other):
        shape = vars(Config.from_hf(plain(family, **changes)))
        shapes.append({name: shape[name] for name in MEANINGS})
    assert shapes[0] == shapes[1]


# ---------------------------------------------------------------------------------------------------------
# Files as people have them


def same(a, b):
    tokens = torch.arange(8)[None]
    return torch.equal(a.logits(tokens), b.logits(tokens))


def test_model_shards_take_the_place_of_a_single_file(tmp_path, monkeypatch):
    """A stray single file beside the shards is an error or ignored, never silently read."""
    old = build("qwen3_moe", **EXPERTS).requires_grad_(False)
    new = copy.deepcopy(old)
    new.model.norm.weight.fill_(2)
    old.save_pretrained(tmp_path)
    stray = (tmp_path / WEIGHTS).read_bytes()
    monkeypatch.setattr(model_module, "SHARD_BYTES", 12_000)
    new.save_pretrained(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 12_000
    assert same(load(tmp_path), new)
    put(tmp_path / WEIGHTS, stray)
    try:
        assert same(load(tmp_path), new)
    except UserError as error:
        assert {WEIGHTS, INDEX} <= set(re.findall(r"[\w.]+\w", str(error)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3moe"])
def test_model_dtype_of_files_is_kept(name, dtype, checkpoint, tmp_path):
    """Any float file -> fp32 parameters -> the same file; transformers follows the dtype in the config."""
    model = load(checkpoint(name, dtype))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    before = load_file(checkpoint(name, dtype) / WEIGHTS)
    expected = {key: tensor.float().to(dtype) for key, tensor in before.items()}
    close(load_file(tmp_path / WEIGHTS), expected, atol=0)
    assert load_in_transformers(tmp_path).dtype == dtype


def without(prefix, tensors):
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


CONSTANTS = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4)}
ROTARY = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
OTHER_FILES = {
    "gpt2 without prefix, with constants": ("gpt2", lambda t: without("transformer.", t) | CONSTANTS),
    "opt without prefix, twice": ("opt", lambda t: without("model.", t) | {HEAD: t[OPT_EMBEDDING].clone()}),
    "head alone, with constants": ("llama", lambda t: {HEAD: t.pop(EMBEDDING)} | t | ROTARY),
}


@pytest.mark.parametrize("model_type, change", OTHER_FILES.values(), ids=OTHER_FILES)
def test_model_files_of_other_shapes(model_type, change, tmp_path):
    """As found on the hub: no prefix, constants among the weights, either half of tied weights."""
    model = build(model_type, **TIED)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / WEIGHTS, change)
    again = load(tmp_path)
    assert same(again, model)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())


def tell_peak_memory(directory, answer):
    """In a process of its own: the most memory that it ever had, once it has loaded a model."""
    load(directory)
    kilobytes = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]
    Path(answer).write_text(str(1024 * int(kilobytes)))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_model_peak_memory_of_loading(tmp_path):
    """At most 1.15 times the fp32 parameters, the file's mapped pages included."""
    def peak(model, dtype):
        model.save_pretrained(tmp_path, dtype=dtype)
        process = PROCESSES.Process(target=tell_peak_memory, args=(tmp_path, tmp_path / "peak"))
        process.start()
        process.join()
        return int((tmp_path / "peak").read_text())

    large = build(vocab_size=16_000, hidden_size=576, intermediate_size=1536, num_hidden_layers=5)  # 150 MB
    allowed = 1.15 * 4 * sum(p.numel() for p in large.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        assert peak(large, dtype) - peak(build(), dtype) <= allowed


# ---------------------------------------------------------------------------------------------------------
# Models that cannot be: one line that says what and where, soon, and nothing else raised


def config(**changes):
    return {"config.json": plain(**changes)}


BAD_MODELS = {  # name: ({file: its content; None: removed; a function: of its tensors}, words to be found)
    "foreign model_type": (config(model_type="t5"), "config.json t5 llama qwen3_moe"),
    "truth for a size": (config(num_key_value_heads=True), "config.json num_key_value_heads"),
    "size of nought": (config(hidden_size=0), "config.json hidden_size"),
    "unknown activation": (config(hidden_act="swoosh"), "config.json swoosh"),
    "norm of each head": (config(model_type="stablelm", qk_layernorm=True), "config.json"),
    "capped scores": (config(model_type="gemma2"), "config.json Gemma caps"),
    "capped logits": (config(model_type="gemma3_text", final_logit_softcapping=30.0), "json softcapping"),
    "looks ahead": (config(model_type="gemma3_text", use_bidirectional_attention=True), "json bidirect"),
    "rotation every second": (config(model_type="smollm3", no_rope_layer_interval=2), "config.json interval"),
    "unknown rope": (config(model_type="phi3", rope_scaling={"type": "longrope"}), "config.json longrope"),
    "rope_theta of nought": (config(rope_theta=0), "config.json rope_theta"),
    "odd rotary part": (config(partial_rotary_factor=0.4), "config.json rotary"),
    "window of nought": (config(model_type="mistral", sliding_window=0), "config.json window"),
    "unknown layer type": (config(layer_types=[FULL, FULL, "chunked"]), "config.json chunked"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "config.json quantiz"),
    "other scale": (config(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), "config.json scale"),
    "no config": ({"config.json": None}, "config.json"),
    "generation config": ({"generation_config.json": "nonsense"}, "generation_config.json"),
    "pickled weights": ({WEIGHTS: None, "pytorch_model.bin": b""}, "safetensors pickle"),
    "truncated": ({WEIGHTS: bytes([200, *[0] * 7]) + b"{"}, WEIGHTS),
    "index reaches up": ({WEIGHTS: None, INDEX: {"weight_map": {NORM: "\ud800/../x.safetensors"}}}, INDEX),
    "index of no map": ({WEIGHTS: None, INDEX: {"weight_map": {NORM: 3}}}, INDEX),
    "missing tensor": ({WEIGHTS: lambda t: t.pop(NORM) is None or t}, f"missing {NORM}"),
    "unexpected tensor": ({WEIGHTS: lambda t: t | {"model.extra": torch.ones(1)}}, "unexpected model.extra"),
    "mis-shaped tensor": ({WEIGHTS: lambda t: t | {NORM: torch.ones(9)}}, f"{NORM} [9]"),
    "integer tensor": ({WEIGHTS: lambda t: t | {NORM: t[NORM].to(torch.int8)}}, f"{NORM} int8"),
}


@pytest.mark.parametrize("files, words", BAD_MODELS.values(), ids=BAD_MODELS)
def test_model_bad_directories(files, words, tmp_path):
    build().save_pretrained(tmp_path)
    for name, content in files.items():
        if content is None:
            (tmp_path / name).unlink()
        elif callable(content):
            rewrite(tmp_path / name, content)
        else:
            put(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        load(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    assert [word for word in words.split() if word not in message] == []


@torch.no_grad()
def test_model_reads_the_text_model_of_a_gemma_that_reads_images(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    vision = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                  image_size=28, patch_size=14)
    text = dict(CHECKPOINTS["gemma3"], rms_norm_eps=0.02)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                                       image_token_index=52, boi_token_index=50, eoi_token_index=51)
    reference = transformers.Gemma3ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path / "both")
    tokens = torch.arange(3, 33)[None]
    expected = reference(tokens).logits
    model = load(tmp_path / "both")
    assert "without what reads images" in capsys.readouterr().err
    close(model.logits(tokens), expected)
    model.save_pretrained(tmp_path / "text")
    again = load_in_transformers(tmp_path / "text")
    assert type(again).__name__ == "Gemma3ForCausalLM"
    close(again(tokens).logits, expected)


def test_model_config_fuzz(tmp_path):
    """Whatever stands in config.json: a UserError, or a shape."""
    st, run_on = fuzz(tmp_path, 300)
    names = set(vars(Config.from_hf(plain())))
    for hf in CHECKPOINTS.values():
        names |= set(hf)
    words = st.sampled_from(["llama3", "linear", "gelu", SLIDING, FULL])
    numbers = st.booleans() | st.integers(-2, 9) | st.integers(-10**400, 10**400) | st.floats()
    scalars = st.none() | numbers | words | st.text()
    rope = st.dictionaries(st.sampled_from(["type", "partial_rotary_factor", "rope_theta", *SLOWED]), scalars)
    values = scalars | st.lists(scalars, max_size=3) | rope
    changes = st.dictionaries(st.sampled_from(sorted(names - {"model_type"})), values, max_size=4)

    def check(name, changes):
        with suppress(UserError):
            assert Config.from_hf(CHECKPOINTS[name] | changes).vocab_size > 0

    run_on(check, st.sampled_from(list(CHECKPOINTS)), changes)


# ------------------------------------------------------------------------------------------------------------
# Helpers for train.py and sample.py. Most runs are in this process: tiny models, tenths of a second each.

KILLS = int(os.environ.get("ORPO_KILLS", 2))  # runs that are killed; 20: the thorough version
SHAPE = dict(model_type="llama", vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
             tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
MOE = SHAPE | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
POSITIONS_24 = dict(model_type="gpt2", vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=24)
TIMES = ("pairs_per_second", "tokens_per_second", "peak_memory_gb")
STEPS = 8  # of the run `whole`: 23 pairs to train on, 5 a step, so the fifth step of an epoch has 3


def make_model(directory, shape=SHAPE, tokenizer=None, scale=4.0):
    """Save a model of random weights, large ones, so that the routes of a mixture's tokens differ."""
    model = Transformer(Config.from_hf(shape), shape).initialise(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1)
    model.save_pretrained(str(directory), torch.float32)
    tokenizer = tokenizer or demo_tokenizer()
    tokenizer.save_pretrained(str(directory))
    return directory


def command(flags=(), **more):
    """Flags as a command line: True stands for --name, False for --no-name."""
    words = []
    for name, value in dict(flags, **more).items():
        words.append(f"--no-{name}" if value is False else f"--{name}")
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, list) else [value])
    return words


@contextmanager
def own_signals():
    """SIGINT means what it does in a terminal, also where the suite runs in the background; the handlers that
    a program sets are taken back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def run(out, flags=(), **more):
    """train.py in this process -> exit status."""
    with own_signals():
        return train.main(command(flags, output_dir=out, **more))


def ask(model, **flags):
    """sample.py in this process."""
    with own_signals():
        return sample.main(command(flags, model=model))


@pytest.fixture
def script(capsys, monkeypatch):
    """script(name, *words) -> (exit status, standard output, standard error) of a program as one types it,
    in this process, which has imported torch already."""
    def begin(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        status = 0
        with own_signals():
            try:
                runpy.run_path(str(HERE / name), run_name="__main__")
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
        if isinstance(status, str):  # Python prints it
            print(status, file=sys.stderr)
            status = 1
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return begin


def on_step(monkeypatch, action):
    """Calls action(step, logps) in each training step (of one pack); the log-probabilities that it returns,
    if any, go on to the loss. Here the tests put faults in, whatever the objective is."""
    step = 0
    forward = Transformer.forward

    def watched(model, *arguments):
        nonlocal step
        logps = forward(model, *arguments)
        if not torch.is_grad_enabled():  # an evaluation
            return logps
        step += 1
        changed = action(step, logps)
        return logps if changed is None else changed

    monkeypatch.setattr(Transformer, "forward", watched)


# Runs in processes of their own: where they are killed, and ranks. They are forked from a server that has
# imported torch and this file, since that import takes longer than the run.
PROCESSES = multiprocessing.get_context("forkserver")


def as_child(words, environment, before, place):
    """What such a process does: `before`, then train.py as one types it."""
    signal.alarm(120)  # ends it if nothing else does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT), number)
    if before is not None:
        before()
    sys.argv = ["train.py", *words]
    try:
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    finally:
        if "RANK" in environment:  # gloo's threads may abort a rank that comes to Python's end
            traceback.print_exc()
            os.abort()


class Child:
    """train.py in a process of its own, after the function `before`."""

    def __init__(self, out, flags=(), *, before=None, environment=(), **more):
        self.place = f"{out}-{next(CHILDREN)}"
        words = command(flags, output_dir=out, **more)
        arguments = words, dict(environment), before, self.place
        self.process = PROCESSES.Process(target=as_child, args=arguments)
        self.process.start()

    def running(self):
        return self.process.is_alive()

    def send(self, number):
        os.kill(self.process.pid, number)

    def finish(self):
        """(exit status, standard error), once it has ended."""
        self.process.join()
        return self.process.exitcode, Path(f"{self.place}.stderr").read_text()


CHILDREN = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def server(tmp_path_factory):
    """Start the server in this environment; it has to find this file, and no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        PROCESSES.set_forkserver_preload(["test_orpo"])
        multiprocessing.forkserver.ensure_running()


def free_port():
    """Of those that the system hands out to nobody, so that it is still free when the ranks have started."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                return str(port)


def start_ranks(out, count, flags=(), **more):
    """The processes of some ranks, as torchrun would start them."""
    world = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    started = []
    for rank in range(count):
        place = world | dict(RANK=str(rank), LOCAL_RANK=str(rank))
        started.append(Child(out, flags, environment=place, **more))
    return started


def run_ranks(out, count, flags=(), **more):
    ended = [child.finish() for child in start_ranks(out, count, flags, **more)]
    assert [status for status, _ in ended] == [0] * count, ended


def lines(directory, name="metrics.jsonl"):
    """Strict JSON: no NaN."""
    with open(Path(directory) / name) as file:
        return [json.loads(line, parse_constant=pytest.fail) for line in file]


def curve(directory, key="step"):
    """The lines of metrics.jsonl that have a key, without what the clock says."""
    found = []
    for line in lines(directory):
        if key in line:
            found.append({name: value for name, value in line.items() if name not in TIMES})
    return found


def steps_of(directory, key="step"):
    return [line["step"] for line in curve(directory, key)]


def checkpoints(out):
    """The steps of a run's checkpoints, in order."""
    names = " ".join(os.listdir(out))
    return sorted(map(int, re.findall(r"(?<!\S)checkpoint-([1-9][0-9]*)(?!\S)", names)))


def weights(directory):
    """Bytes of the model and, where it is a checkpoint, of the optimizer."""
    return [file.read_bytes() for file in sorted(Path(directory).glob("*.safetensors"))]


def same_run(one, other, steps=STEPS):
    """The final weights, the last checkpoint, and each line of the metrics, bit for bit."""
    last = f"checkpoint-{steps}"
    same_weights = weights(one) == weights(other) and weights(one / last) == weights(other / last)
    return same_weights and curve(one) == curve(other)


def is_whole(checkpoint, model_checkpoint):
    """Has a checkpoint the files of another one, and can each be read?"""
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            read_json(path)
        if path.suffix == ".safetensors":
            load_file(path)
    return set(os.listdir(checkpoint)) == set(os.listdir(model_checkpoint))


def cut_off(whole, copy, *steps):
    """A copy of a run that was killed before the checkpoints of these steps; where it is."""
    return shutil.copytree(whole, copy, ignore=shutil.ignore_patterns(*map("checkpoint-{}".format, steps)))


def listing(directory):
    """Everything in a directory but locks."""
    found = {}
    for path in Path(directory).rglob("*"):
        if not path.name.startswith("."):
            found[path.relative_to(directory)] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def flags(tmp_path_factory, model):
    """Of runs on 26 pairs whose prompts and answers have many lengths."""
    chance = random.Random(0)

    def text(first, most):
        return first + "".join(chance.choices("abcdefgh ", k=chance.randrange(2, most)))

    rows = []
    for _ in range(26):
        row = dict(prompt=text("q", 19), chosen=text("x", 25), rejected=text("y", 25))
        rows.append(row)
    file = put(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)
    return dict(
        model=model, data=file, eval_pairs=3, batch_size=5,
        learning_rate=3e-3, warmup_steps=3, lr_scheduler_type="constant",
        logging_steps=1, save_steps=2, save_total_limit=0, generate_during_eval=0)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, flags):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(out, flags, max_steps=STEPS)
    return out


@pytest.fixture
def interrupted(whole, tmp_path):
    """The same run as after a kill in step 7: checkpoints 2, 4 and 6, longer metrics, no model. The last
    sample is cut off inside a character."""
    out = cut_off(whole, tmp_path / "out", 8)
    put(out / "metrics.jsonl", (out / "metrics.jsonl").read_text() + '{"step": 9, "loss": 0.1')
    samples = ['{"step": 6, "a": "ä"}', '{"step": 7, "a": "b"}', '{"step": 6, "a": "ä']
    put(out / "samples.jsonl", "\n".join(samples).encode()[:-1])
    (out / "model.safetensors").unlink()
    return out


# ------------------------------------------------------------------------------------------------------------
# train.py: the demo, and what a run writes


def test_train_demo_and_what_it_writes(tmp_path):
    """The demo, shortened: `python train.py` as one types it, in a process that begins with Python."""
    words = command(max_steps=20, logging_steps=5, eval_steps=10)
    typed = [sys.executable, HERE / "train.py", *words]
    done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?s)step 20/20.*reward accuracy +0\.\d+ +0\.\d+\n.*right greedy answers", done.stdout)
    assert done.stdout.rstrip().endswith('python sample.py --model out --prompt "Name a number above 57."')
    out = tmp_path / "out"
    assert steps_of(out, "loss") == [5, 10, 15, 20]
    assert steps_of(out, "eval_loss") == [0, 10, 20]
    for line in lines(out):
        names = [f"eval_{name}" for name in NAMES]
        if "loss" in line:
            names = [*NAMES, "grad_norm", "learning_rate", *TIMES]
        assert line.keys() >= {"step", "epoch", *names}
    epoch = 20 * 32 / 5800  # steps, pairs a step, pairs
    assert lines(out)[-1]["epoch"] == pytest.approx(epoch, abs=1e-5)
    assert read_json(out / "train_config.json")["beta"] == 0.5
    files = "config.json model.safetensors tokenizer.json tokenizer_config.json chat_template.jinja"
    files += " checkpoint-20 metrics.jsonl samples.jsonl train_config.json"
    assert {path.name for path in out.glob("[!.]*")} == set(files.split())


def test_train_demo_answers_are_judged():
    rows = data.demo_pairs(300)
    for row in rows:
        question, right, wrong = [row[name][0]["content"] for name in PAIR]
        assert data.demo_right(question, right)
        limit = re.search(r"\d\d", question)[0]
        for answer in (wrong, limit + ".", "", right[:-1], "1" + right):
            assert not data.demo_right(question, answer)
    assert len({str([row[name] for name in PAIR]) for row in rows}) == 300


def test_train_seed_changes_the_order_but_not_what_is_held_out(flags, whole, tmp_path):
    run(tmp_path, flags, max_steps=STEPS, seed=1)
    assert weights(tmp_path) != weights(whole)
    assert curve(tmp_path)[0] == curve(whole)[0]  # the evaluation before step 1


def test_train_dry_run_shows_what_is_read_and_trained_and_writes_nothing(model, tmp_path, capsys):
    for name in ("train-1.jsonl", "train-2.jsonl", "test.jsonl"):
        put(tmp_path / "set" / name, [dict(prompt="ab", chosen="c\n", rejected="d")] * 10)
    run(tmp_path / "out", model=model, data=tmp_path / "set", dry_run=True, prompt_loss=False)
    printed = capsys.readouterr().out
    assert re.search(r"set/train-1\.jsonl.*set/train-2\.jsonl.*prompt(.*\n)?.*20 rows read", printed)
    assert "test.jsonl" not in printed
    assert "prompt: 2 tokens, scored by nothing\n    a|b\n" in printed
    assert "chosen: 3 tokens, scored by L_SFT and L_OR\n    c|\\n|<|endoftext|> <- EOS\n" in printed
    assert "\n3 steps of 32 pairs" in printed
    assert not (tmp_path / "out").exists()


def test_train_counts_what_is_cut_and_warns_of_a_short_model(tmp_path, capsys):
    file = put(tmp_path / "pairs.jsonl", [dict(prompt="abcd", chosen="c", rejected="d")] * 20)
    short = make_model(tmp_path / "model", SHAPE | dict(max_position_embeddings=3))
    run(tmp_path / "out", model=short, data=file, dry_run=True, max_length=4)
    printed = capsys.readouterr().out
    assert "20 cut, 0 without a token" in printed
    assert re.search("note: sequences of 4 tokens.* 3", printed)


def test_train_save_dtype_and_samples(flags, tmp_path):
    run(tmp_path, flags, max_steps=2, eval_steps=2, save_dtype="bfloat16", generate_during_eval=2)
    for place, dtype in (("", torch.bfloat16), ("checkpoint-2", torch.float32)):
        assert load_file(tmp_path / place / "model.safetensors")["model.norm.weight"].dtype == dtype
    assert read_json(tmp_path / "config.json")["dtype"] == "bfloat16"
    assert [line["step"] for line in lines(tmp_path, "samples.jsonl")] == [0, 0, 2, 2]


def test_train_evaluates_about_ten_times(flags, tmp_path):
    run(tmp_path, flags, num_train_epochs=4.3, save_steps=0)
    evaluated = steps_of(tmp_path, "eval_loss")
    assert 10 <= len(evaluated) <= 13
    assert (evaluated[0], evaluated[-1]) == (0, 22)
    assert not checkpoints(tmp_path)


def test_train_speed_is_without_evaluations_and_checkpoints(flags, tmp_path, monkeypatch):
    """These take a second and more here, a step much less."""
    forward = Transformer.forward

    def slow_in_evaluations(model, *arguments):
        if not torch.is_grad_enabled():
            time.sleep(0.6)
        return forward(model, *arguments)

    monkeypatch.setattr(Transformer, "forward", slow_in_evaluations)
    monkeypatch.setattr(os, "fsync", lambda handle: time.sleep(0.06))
    run(tmp_path, flags, eval_steps=1, save_steps=1, max_steps=2)
    for line in lines(tmp_path):
        if "loss" in line:
            assert line["pairs_per_second"] > flags["batch_size"] / 0.6


def test_train_evaluates_a_model_as_it_is(flags, model, tmp_path):
    """Several files apart; nothing is trained, and no model is written."""
    one = put(tmp_path / "a.jsonl", [PAIR])
    two = put(tmp_path / "b.jsonl", [PAIR, PAIR | {"chosen": "fine"}])
    assert run(tmp_path / "out", model=model, eval_data=[one, two], max_steps=0) == 0
    told = lines(tmp_path / "out")
    assert [line["step"] for line in told] == [0, 0]
    assert [line["eval_data"] for line in told] == [one, two]
    assert told[0]["eval_nll_loss"] != told[1]["eval_nll_loss"]
    assert not (tmp_path / "out/model.safetensors").exists()


def test_train_evaluates_each_file_as_if_it_were_alone(tmp_path, capsys):
    """Also where the rows settle the template: Alpaca's text for one, turns for the other."""
    model = make_model(tmp_path / "model", tokenizer=BARE)
    files = [put(tmp_path / "turns.jsonl", [conversation()]),
             put(tmp_path / "alpaca.jsonl", [dict(instruction="Do.", chosen="good", rejected="bad")])]
    found = {}
    for number, sources in enumerate((files, files[:1], files[1:])):
        run(tmp_path / str(number), model=model, eval_data=sources, max_steps=0)
        found[number] = [line["eval_loss"] for line in lines(tmp_path / str(number))]
    assert found[0] == found[1] + found[2]


@pytest.mark.parametrize("template, shown", [
    ("{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}>>", "How are you?"),
    ("{{ messages[-1].content }}", "How are you?"),  # nothing stands around the words
    ("{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}|",
     "How are you?|"),  # has no words for a lone question
    (None, "Hi.How are you?")])
def test_train_shows_the_last_question(template, shown):
    tokenizer = byte_tokenizer(template=template)
    turns = [turn("system", "s"), user("Hi."), user("How are you?")]
    prompt = "Hi.How are you?"
    if template:
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert train.last_words(tokenizer, prompt) == shown


BARE = tokenizer_of(demo_tokenizer().backend, eos_token="<|endoftext|>")  # without a chat template


@pytest.mark.parametrize("row, template, asked", [
    (conversation(), "", "<|user|>\nq<|endoftext|>\n<|assistant|>\n"),  # the authors' turns
    (PAIR | dict(prompt=None, instruction="q", input=""), "",
     data.ALPACA_TEMPLATE.split("%}")[2].split("{%")[0].replace("{{ m.content }}", "q")),
    (conversation(), "{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}", "<q>")])
def test_train_saves_the_template_it_asked_through(row, template, asked, tmp_path):
    """With a model that has none; BOS included, here and in transformers."""
    given = {"chat_template": put(tmp_path / "t.jinja", template)} if template else {}
    file = put(tmp_path / "rows.jsonl", [row] * 3)
    tokenizer = byte_tokenizer(post_processor=True)
    model = make_model(tmp_path / "model", SHAPE | dict(vocab_size=258), tokenizer)
    out = tmp_path / "out"
    run(out, given, model=model, data=file, max_steps=1, eval_pairs=0, save_steps=0)
    tokenizer = Tokenizer.from_pretrained(out)
    trained = encode_pair(read_pairs(file)[0], tokenizer)[0]
    ids = sample.prompt_ids("q", tokenizer)
    assert ids == trained == [BOS, *tokenizer.encode(asked)]
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
    assert ids == theirs.apply_chat_template([Q], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("kind, module, opener", [
    ("wandb", "wandb", "init"), ("tensorboard", "torch.utils.tensorboard", "SummaryWriter")])
def test_train_reports_under_transformers_names(flags, tmp_path, monkeypatch, kind, module, opener):
    class Reporter:
        def __init__(self, directory="", **more):
            self.opened = {"directory": directory} | more
            self.told = []
            reporters.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.told.append("closed")

        def log(self, metrics, step):
            self.told += [(step, name) for name in metrics]

        def add_scalar(self, name, value, step):
            self.told.append((step, name))

    reporters = []
    monkeypatch.setitem(sys.modules, module, type("", (), {opener: Reporter}))
    run(tmp_path, flags, max_steps=1, report_to=kind, run_name="first")
    [reporter] = reporters
    if kind == "tensorboard":
        assert reporter.opened["directory"] == str(tmp_path / "runs/first")
    else:
        assert reporter.opened["name"] == "first"
        assert reporter.opened["config"]["max_steps"] == 1
    *told, last = reporter.told
    assert last == "closed"
    assert {step for step, _ in told} == {0, 1}
    assert {(0, "eval/loss"), (1, "train/grad_norm"), (1, "eval/rewards/margins")} < {*told}
    files = [put(tmp_path / name, [PAIR]) for name in ("a.jsonl", "b.jsonl")]
    run(tmp_path / "only", model=flags["model"], eval_data=files, max_steps=0, report_to=kind)
    assert {(0, f"{file}/loss") for file in files} < {*reporters[1].told}


def test_train_push_to_hub_uploads_the_model_and_the_tokenizer(flags, tmp_path, monkeypatch):
    """By the hub library's own two calls."""
    called = []

    def create_repo(*arguments, **more):
        called.append(("create_repo", *arguments, *more.values()))

    def upload_folder(*, folder_path, allow_patterns=None, ignore_patterns=None, **more):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        names = [str(path.relative_to(folder_path)) for path in files]
        patterns = dict(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        sent = huggingface_hub.utils.filter_repo_objects(names, **patterns)
        called.append(("upload_folder", *more.values(), sorted(sent)))

    for owner in (huggingface_hub, train):
        for function in (create_repo, upload_folder):
            monkeypatch.setattr(owner, function.__name__, function, raising=False)
    run(tmp_path, flags, max_steps=1, push_to_hub="me/mine")
    assert [call[0] for call in called] == ["create_repo", "upload_folder"]
    assert all("me/mine" in call for call in called)
    files = "chat_template.jinja config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert called[1][-1] == files.split()


# ------------------------------------------------------------------------------------------------------------
# train.py: where a flag's value comes from


def recorded(out, *names):
    flags = read_json(out / "train_config.json")
    return [flags[name] for name in names]


def test_train_flags_the_last_of_demo_record_config_and_command_line_wins(tmp_path, capsys):
    """beta is given by all of them, and each of the other flags by one less."""
    quick = dict(generate_during_eval=0, eval_steps=0, batch_size=2)
    config = put(tmp_path / "config.json", dict(beta=0.2, seed=2, adam_beta2=0.2))
    names = "beta", "seed", "adam_beta2", "max_length"
    out = tmp_path / "out"
    run(out, quick, config=config, beta=0.1, seed=1, max_steps=1)
    assert recorded(out, *names) == [0.1, 1, 0.2, 64]  # 64 is the demo's own
    capsys.readouterr()
    config = put(tmp_path / "config.json", dict(beta=0.3, seed=3))
    run(out, resume=True, config=config, beta=0.4, max_steps=2)
    assert recorded(out, *names) == [0.4, 3, 0.2, 64]
    changes = capsys.readouterr().out.splitlines()[0]
    for name in ("beta", "seed", "max_steps"):
        assert name in changes
    for name in ("adam_beta2", "max_length", "batch_size"):
        assert name not in changes
    assert steps_of(out) == [1, 2]


def test_train_config_may_be_the_record_of_another_run(whole, tmp_path):
    run(tmp_path, config=whole / "train_config.json", beta=0.7, max_steps=1)
    assert recorded(tmp_path, "beta", "max_steps", "batch_size") == [0.7, 1, 5]


def test_train_resume_without_a_checkpoint_starts_the_run_and_says_so(flags, whole, tmp_path, capsys):
    """Twice, as a cluster restarts a job that was killed before its first checkpoint."""
    for _ in range(2):
        run(tmp_path / "out", flags, resume=True, max_steps=STEPS)
        assert same_run(whole, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    assert "no checkpoint" in capsys.readouterr().out


def test_train_a_second_run_in_the_directory_is_refused(flags, whole, tmp_path, monkeypatch):
    def begin_another(step, logps):
        if step != 3:
            return
        for more in ({}, dict(resume=True), dict(overwrite_output_dir=True)):
            with pytest.raises(UserError, match="another run"):
                run(tmp_path, flags, max_steps=STEPS, **more)

    on_step(monkeypatch, begin_another)
    run(tmp_path, flags, max_steps=STEPS)
    assert same_run(tmp_path, whole)


def test_train_deletes_and_replaces_what_a_run_wrote_and_nothing_else(flags, whole, tmp_path, monkeypatch):
    """An older model's shards and generation_config.json would be read with the new one's files."""
    out = tmp_path / "out"
    model = make_model(tmp_path / "model", tokenizer=BARE)
    put(model / "generation_config.json", {"temperature": 0.5})
    monkeypatch.setattr(model_module, "SHARD_BYTES", 40_000)
    run(out, flags, model=model, max_steps=3)
    mine = ["notes.txt", "final/x", "checkpoint-x/y", "checkpoint-007/x", "checkpoint-²/x",
            "model-best.safetensors", "model_old.safetensors"]
    for name in mine:
        put(out / name, "mine")
    run(out, resume=True, max_steps=4)
    (model / "generation_config.json").unlink()
    monkeypatch.undo()
    run(out, flags, model=model, max_steps=1, overwrite_output_dir=True)
    ours = {path.name for path in whole.glob("[!.]*") if "checkpoint" not in path.name}
    ours -= {"chat_template.jinja"}  # this model has none
    theirs = {name.partition("/")[0] for name in mine}
    assert {path.name for path in out.glob("[!.]*")} == ours | {"checkpoint-1"} | theirs
    assert {(out / name).read_text() for name in mine} == {"mine"}
    assert steps_of(out) == [0, 1, 1]


# ------------------------------------------------------------------------------------------------------------
# train.py: resuming


def test_train_resume_after_a_kill_is_exact(whole, interrupted):
    for _ in range(2):  # the second time it has ended already, and nothing changes
        run(interrupted, resume=True)  # nothing else: the flags are the recorded ones
        assert same_run(whole, interrupted)
        assert (interrupted / "samples.jsonl").read_text() == '{"step": 6, "a": "ä"}\n'
        assert set(os.listdir(interrupted)) == {*os.listdir(whole), "samples.jsonl"}


def test_train_resume_takes_reports_and_records_another_future(interrupted, capsys):
    run(interrupted, resume=True, learning_rate=1e-4, num_train_epochs=2, max_steps=10)
    assert "learning_rate" in capsys.readouterr().out
    assert recorded(interrupted, "learning_rate") == [1e-4]
    used = {line["step"]: line["learning_rate"] for line in curve(interrupted, "loss")}
    assert max(used) == 10
    for step in range(4, 11):
        assert used[step] == (3e-3 if step <= 6 else 1e-4)


def test_train_resume_needs_only_the_checkpoint_and_equal_data(whole, flags, model, tmp_path, monkeypatch):
    """The model's directory goes in the first step, the data move later; flags without effect have none."""
    out = tmp_path / "out"
    copy = shutil.copytree(model, tmp_path / "model")
    moved = shutil.copy(flags["data"], tmp_path / "moved.jsonl")
    on_step(monkeypatch, lambda step, logps: shutil.rmtree(copy, ignore_errors=True))
    run(out, flags, model=copy, max_steps=2)
    other = dict(max_tokens=4000, logging_steps=2, eval_steps=0, save_total_limit=1)
    run(out, other, resume=True, data=moved, max_steps=4)
    assert checkpoints(out) == [4]
    assert weights(out / "checkpoint-4") == weights(whole / "checkpoint-4")
    for place in (out, out / "checkpoint-4"):
        assert (place / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    put(Path(moved), Path(moved).read_text().replace('"chosen": "x', '"chosen": "z', 1))
    with pytest.raises(UserError, match="pairs"):
        run(out, resume=True, data=moved, max_steps=6)


def test_train_resume_on_a_full_disk_keeps_the_lines(whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "out")
    kept = (out / "metrics.jsonl").read_bytes()
    write_text = Path.write_text

    def full(path, text, **more):
        write_text(path, text[:99], **more)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        patched.setattr(train, "write_json", lambda path, value: None)
        with pytest.raises(UserError, match="out could not be written to; make room, then --resume"):
            run(out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == kept
    run(out, resume=True)
    assert same_run(out, whole)


def test_train_a_run_goes_on_without_the_file_of_its_template(flags, tmp_path):
    template = put(tmp_path / "t.jinja", "\ufeff{% for m in messages %}{{ m.content }}|{% endfor %}")
    file = put(tmp_path / "c.jsonl", [conversation(f"good {i}") for i in range(8)])
    common = flags | dict(data=file, chat_template=template)
    run(tmp_path / "whole", common, max_steps=4)
    run(tmp_path / "out", common, max_steps=2)
    Path(template).unlink()
    run(tmp_path / "out", resume=True, max_steps=4)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert "\ufeff" not in Tokenizer.from_pretrained(tmp_path / "out").chat_template


def test_train_a_run_killed_while_it_removed_another_can_be_overwritten(flags, tmp_path, monkeypatch):
    run(tmp_path, flags, max_steps=1)
    for _ in range(3):
        with pytest.raises(InterruptedError), monkeypatch.context() as patch:
            removed = []

            def unlink(path):
                if len(removed) == 2:
                    raise InterruptedError
                removed.append(path)
                os.unlink(path)

            patch.setattr(Path, "unlink", unlink)
            run(tmp_path, flags, max_steps=1, overwrite_output_dir=True)
    run(tmp_path, flags, max_steps=1, overwrite_output_dir=True)


def test_train_adapters_resume_where_config_json_alone_names_the_end(flags, tmp_path):
    files = demo_tokenizer().files | {"tokenizer_config.json": b"{}"}
    files["config.json"] = json.dumps(dict(eos_token_id=256)).encode()
    model = make_model(tmp_path / "model", SHAPE | dict(eos_token_id=256), Tokenizer(files))
    put(model / "generation_config.json", dict(eos_token_id=[*range(0, 256, 2)]))  # ends of answers, too
    common = flags | dict(model=model, lora_r=2, eval_steps=1, generate_during_eval=1)
    run(tmp_path / "whole", common, max_steps=4)
    run(tmp_path / "out", common, max_steps=2)
    run(tmp_path / "out", resume=True, max_steps=4)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    answers = [line["answer"] for line in lines(tmp_path / "out", "samples.jsonl")]
    assert answers == [line["answer"] for line in lines(tmp_path / "whole", "samples.jsonl")]
    assert len(answers) == 5 and answers[0] == ""  # an end at once


@pytest.mark.parametrize("first, then", [(2, 4), (0, 2), (2, 0), (1, 2)])
def test_train_a_resumed_run_cannot_change_its_adapters(flags, tmp_path, capsys, first, then):
    run(tmp_path, flags, max_steps=2, lora_r=first)
    with pytest.raises(SystemExit):
        run(tmp_path, resume=True, max_steps=4, lora_r=then)
    assert f"--lora_r {then}: the run was started with {first}" in capsys.readouterr().err


def test_train_a_template_that_reads_the_clock_resumes_later(flags, model, tmp_path):
    """With the time at which the run began: else its pairs would be others, and be refused."""
    copy = shutil.copytree(model, tmp_path / "model")
    put(copy / "chat_template.jinja", "{{ strftime_now('%f') }}{{ messages[-1].content }}")
    file = put(tmp_path / "c.jsonl", [conversation(f"good {i}") for i in range(8)])
    common = flags | dict(model=copy, data=file)
    for name, steps in (("a", 2), ("a", 4), ("b", 4)):
        run(tmp_path / name, common, resume=True, max_steps=steps)
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


class Counted(torch.optim.SGD):
    """Keeps a number of each weight, on which its steps depend."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = self.state[p].get("count", 0) + 1
            p.data -= 2**-10 / (1 + self.state[p]["count"] % 2) * p.grad  # exact in both number formats


OPTIMIZERS = {  # name: (optimizer, what it keeps of each weight)
    "RMSprop": (lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, centered=True), 4),
    "SGD": (lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9), 1),
    "a number": (Counted, 1),
    "fused SGD": (lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=True), 1),
    "AdamW": (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True), 4)}


def use_optimizer(monkeypatch, name):
    """As a fork would: another optimizer, and nothing else."""
    make, _ = OPTIMIZERS[name]
    monkeypatch.setattr(train, "make_optimizer", lambda flags, model: make(model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_train_whatever_an_optimizer_keeps_is_saved_and_resumed(flags, tmp_path, monkeypatch, name):
    use_optimizer(monkeypatch, name)
    one = tmp_path / "one"
    run(one, flags, max_steps=4)
    other = cut_off(one, tmp_path / "other", 4)
    run(other, resume=True)
    assert same_run(one, other, 4)
    kept = load_file(one / "checkpoint-4/optimizer.safetensors")
    assert len(kept) == OPTIMIZERS[name][1] * len(load_file(one / "model.safetensors"))


DAMAGES = {  # name: what is done to a checkpoint
    "cut off": lambda at: os.truncate(at / "optimizer.safetensors", 5000),
    "garbage": lambda at: put(at / "state.json", b"\xff\x00{"),
    "a file is missing": lambda at: (at / "train_config.json").unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_train_a_damaged_checkpoint_is_an_error_that_says_to_remove_it(whole, interrupted, name):
    damaged = interrupted / "checkpoint-6"
    DAMAGES[name](damaged)
    before = listing(interrupted)
    with pytest.raises(UserError, match="checkpoint-6.*remove"):
        run(interrupted, resume=True)
    assert listing(interrupted) == before
    shutil.rmtree(damaged)
    run(interrupted, resume=True)
    assert same_run(whole, interrupted)


# ------------------------------------------------------------------------------------------------------------
# train.py: kills and signals


def slow_writes():
    """So that a kill is likely to come while a checkpoint is written."""
    flush = os.fsync

    def slow(handle):
        time.sleep(0.05)
        flush(handle)

    os.fsync = slow


@pytest.mark.parametrize("number", range(KILLS))
def test_train_killed_runs_resume(flags, whole, tmp_path, number):
    """SIGKILL twice, in even runs at any moment, in odd ones while a checkpoint is written."""
    out = tmp_path / "out"
    chance = random.Random(number)
    for steps in ((2, 4), (6, 8)):
        child = Child(out, flags, resume=True, max_steps=STEPS, before=slow_writes)
        if number % 2:
            target = chance.choice(steps)
            while child.running() and not list(out.glob(f"*checkpoint-{target}*/*")):
                time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4 if number % 2 else 3))
        child.process.kill()
        child.finish()
        for step in checkpoints(out) if out.exists() else ():
            assert is_whole(out / f"checkpoint-{step}", whole / "checkpoint-2")  # complete or absent
    assert run(out, flags, resume=True, max_steps=STEPS) == 0
    assert same_run(whole, out)
    assert set(os.listdir(out)) == set(os.listdir(whole))


@pytest.mark.parametrize("number, status, last", [
    (signal.SIGTERM, 143, 1), (signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 5)])  # with 5 an epoch ends
def test_train_a_signal_finishes_the_step_saves_and_ends(
        flags, whole, tmp_path, monkeypatch, number, status, last):
    """And --resume, which began the run, goes on behind that step."""
    trained = []

    def interrupt(step, logps):
        trained.append(step)
        if step == last:
            os.kill(os.getpid(), number)

    on_step(monkeypatch, interrupt)
    assert run(tmp_path, flags, resume=True, save_steps=100, max_steps=STEPS) == status
    assert checkpoints(tmp_path) == [last]
    assert steps_of(tmp_path)[-1] == last
    assert not weights(tmp_path)
    assert run(tmp_path, resume=True) == 0
    assert len(trained) == STEPS
    assert same_run(whole, tmp_path)


@pytest.mark.parametrize("number, status, left", [(signal.SIGTERM, 143, 1), (signal.SIGKILL, 1, 0)])
def test_train_what_one_rank_meets_ends_all(flags, whole, tmp_path, number, status, left):
    """SIGTERM: none ends before the checkpoint is whole: torchrun would kill the rest. SIGKILL: one line."""
    out = tmp_path / "out"
    endless = dict(flags, eval_steps=0, save_steps=0, logging_steps=5, max_steps=10_000)
    first, second = start_ranks(out, 2, endless, before=slow_writes)
    while first.running() and not any(path.stat().st_size for path in out.glob("*.jsonl")):
        time.sleep(0.002)
    second.send(number)
    assert second.finish()[0] == (status if left else -number)
    assert len(checkpoints(out)) == left
    for step in checkpoints(out):
        assert is_whole(out / f"checkpoint-{step}", whole / "checkpoint-2")
    ended, errors = first.finish()
    assert ended == status
    assert left or re.fullmatch("train.py: .*rank.*\n", errors)


def test_train_ranks_that_see_different_checkpoints_say_so(flags, tmp_path):
    """As nodes do that do not share --output_dir."""
    run(tmp_path / "one", flags, max_steps=2)
    started = []
    world = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for rank, name in enumerate(("one", "other")):
        place = world | dict(RANK=str(rank), LOCAL_RANK=str(rank))
        started.append(Child(tmp_path / name, flags, environment=place, resume=True, max_steps=4))
    ended = [child.finish() for child in started]
    assert [status for status, _ in ended] == [1, 1]
    assert re.fullmatch("train.py: other ranks see a newer checkpoint.*\n", ended[1][1])
    assert re.fullmatch("train.py: .*rank.*\n", ended[0][1])


# ------------------------------------------------------------------------------------------------------------
# train.py: the trajectory does not depend on the hardware


def close_runs(one, other):
    """Every number of metrics.jsonl, evaluations included."""
    for line, again in zip(curve(one), curve(other), strict=True):
        assert again == pytest.approx(line, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("count, shape, given", [
    (3, SHAPE, dict(batch_size=7, max_tokens=150)),  # an uneven batch, and a short last one
    (2, SHAPE, dict(batch_size=1, prompt_loss=False)),  # fewer pairs than ranks
    (2, MOE, dict(batch_size=7, max_tokens=90)),
    (2, SHAPE | dict(tie_word_embeddings=False),
     dict(shard=True, gradient_checkpointing=True, generate_during_eval=1)),
    (2, MOE, dict(shard=True)),
    (2, SHAPE, dict(shard=True, batch_size=1, lora_r=2))])
def test_train_on_ranks_is_as_one_process_and_resumes(flags, tmp_path, count, shape, given):
    """Exactly on two ranks, closely on three, whose sums depend on the order of DDP's buckets, and in one
    process; and max_tokens changes nothing."""
    one, many, again, alone = [tmp_path / name for name in ("one", "many", "again", "alone")]
    model = make_model(tmp_path / "model", shape)
    common = flags | dict(model=model, max_steps=4) | given
    common |= dict(eval_steps=4, logging_steps=3)  # resumed after step 2, in the middle of a line
    run(one, common, shard=False, max_tokens=8192)
    run_ranks(many, count, common)
    close_runs(one, many)
    close(load_file(many / WEIGHTS), load_file(one / WEIGHTS), atol=1e-4)
    assert not ("shard" in given and lines(many, "samples.jsonl"))
    cut_off(many, again, 4)
    run_ranks(again, count, resume=True)
    assert count > 2 or same_run(many, again, 4)
    close_runs(many, again)
    cut_off(many, alone, 4)
    run(alone, resume=True, max_tokens=70, shard=False)
    close_runs(one, alone)


def test_train_every_rank_has_the_template_that_the_rows_settled(flags, tmp_path, monkeypatch):
    """Only the first reads them; all have the whole tokenizer afterwards."""
    template = put(tmp_path / "turns.jinja", "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    file = put(tmp_path / "c.jsonl", [conversation(f"good {i}") for i in range(8)])
    model = make_model(tmp_path / "model", tokenizer=BARE)
    common = train.Flags(**flags | dict(model=str(model), data=[file], chat_template=template))
    sent = []

    def broadcast(shared, device):
        sent.append(pickle.dumps(shared))
        shared[:] = pickle.loads(sent[0])

    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(train.dist, "broadcast_object_list", broadcast)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        tokenizer, _ = train.outline_model(common, None)
        tokenizer, pairs, _ = train.load_pairs(common, tokenizer)
        found.append((tokenizer.chat_template, tokenizer.encode("a<|end|>"), tokenizer.clock, len(pairs)))
    assert found[0] == found[1]
    assert "<|end|>" in found[1][0]


def test_train_adapters_learn_resume_and_leave_both_models(flags, tmp_path):
    out = tmp_path / "out"
    model = make_model(tmp_path / "model")
    run(out, flags, model=model, lora_r=4, learning_rate=1e-2, eval_steps=8, max_steps=STEPS)
    first, *_, last = [line["eval_loss"] for line in curve(out, "eval_loss")]
    assert last < first - 0.1
    assert sorted(os.listdir(out / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    before = load_file(model / WEIGHTS)
    after = load_file(out / WEIGHTS)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == {key for key in after if "_proj" in key}
    copied = cut_off(out, tmp_path / "copied", 8)
    run(copied, resume=True)
    assert same_run(out, copied)


def test_train_bfloat16_is_refused_before_anything_is_read(monkeypatch, tmp_path):
    card = dict(is_available=lambda: True, device_count=lambda: 1, set_device=lambda device: None,
                is_bf16_supported=lambda including_emulation=True: including_emulation)
    for name, answer in card.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(data, "demo_pairs", lambda count: pytest.fail("read too early"))
    with pytest.raises(UserError, match="no bfloat16.*--dtype float32"):
        run(tmp_path, dtype="bfloat16")


def test_train_names_a_max_tokens_that_works_and_gives_up_its_lock(flags, tmp_path):
    """Also while the error that ended the run is still held."""
    out = tmp_path / "out"
    common = flags | dict(model=make_model(tmp_path / "model", MOE), max_steps=5)
    with pytest.raises(UserError, match="--max_tokens 30") as refused:
        run(out, common, max_tokens=30)
    needed = max(map(int, re.findall(r"\d+", str(refused.value))))
    assert run(out, common, max_tokens=needed) == 0
    assert refused


# ------------------------------------------------------------------------------------------------------------
# train.py: schedules, normalisation, optimizer


@pytest.mark.parametrize("kind", ["linear", "cosine", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("warmup, given", [(0, {}), (5, dict(warmup_steps=5)), (5, dict(warmup_ratio=0.1))])
def test_train_schedules_are_transformers(kind, warmup, given):
    """After the warmup; within it, ours is a step ahead: it begins above 0 and its last step has the peak."""
    flags = train.Flags(**(dict(learning_rate=2.0, lr_scheduler_type=kind, warmup_ratio=0.0) | given))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = pytest.importorskip("transformers").get_scheduler
    theirs = schedule("constant_with_warmup" if kind == "constant" else kind, optimizer, warmup, 50)
    for step in range(50):
        expected = 2.0 * (step + 1) / warmup if step < warmup else theirs.get_last_lr()[0]
        assert train.learning_rate(flags, step, 50) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("max_tokens, beta, prompt_loss", [(75, 0.7, True), (999, 0, False)])
def test_train_a_step_is_adamw_on_the_mean_over_its_pairs(flags, tmp_path, max_tokens, beta, prompt_loss):
    """All of an epoch, the last step with one pair, by plain passes; small packs, or one a step. Matrices
    alone decay, the norm is logged as before clipping, the learning rate as it is used."""
    given = dict(max_tokens=max_tokens, beta=beta, prompt_loss=prompt_loss, eval_pairs=0, weight_decay=1.0,
                 max_grad_norm=0.25, adam_beta1=0.8, adam_beta2=0.98, adam_epsilon=1e-3)
    run(tmp_path, flags | given, max_steps=6)
    pairs = tokenize_pairs(read_pairs(flags["data"]), demo_tokenizer())
    model = load(flags["model"])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=1.0), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.98), eps=1e-3)
    for step, line in enumerate(lines(tmp_path)):
        indices = data.step_indices(26, 5, 0, step)[0]
        expected = plain_metrics(model.logits, [pairs[i] for i in indices], beta, prompt_loss)
        expected["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        assert norm > 0.3
        rate = 3e-3 * min(1, (step + 1) / 3)
        numbers = {name: value.item() for name, value in expected.items()}
        numbers |= {"step": step + 1, "grad_norm": norm.item(), "learning_rate": rate}
        logged = {name: line[name] for name in numbers}
        assert logged == pytest.approx(numbers, rel=1e-4, abs=1e-5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    close(dict(load(tmp_path).named_parameters()), dict(model.named_parameters()))


# ------------------------------------------------------------------------------------------------------------
# train.py: faults while running


def infinite_loss(logps):
    return logps * math.inf


def infinite_gradient(logps):
    """The loss stays finite."""
    logps.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("fault", [infinite_loss, infinite_gradient])
def test_train_leaves_out_a_step_that_is_not_finite(flags, tmp_path, monkeypatch, capsys, fault):
    """The third of four, in a line of two steps; the third of three."""
    a, b = tmp_path / "a", tmp_path / "b"
    for out, steps in ((a, 4), (b, 3)):
        on_step(monkeypatch, lambda step, logps: fault(logps) if step == 3 else None)
        run(out, flags, eval_pairs=0, save_steps=1, logging_steps=2, max_steps=steps)
    printed = capsys.readouterr().out
    assert re.search(r"step 4/4.*\n1 steps skipped", printed)
    assert printed.count("1 steps skipped") == 2  # also where a line's only step is
    assert steps_of(a) == [2, 4]
    assert weights(b / "checkpoint-2") == weights(a / "checkpoint-2")
    assert weights(b / "checkpoint-3") == weights(b / "checkpoint-2")  # the optimizer, too
    assert weights(b) == weights(b / "checkpoint-2")[:1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_train_such_a_step_changes_nothing_whatever_the_optimizer(flags, tmp_path, monkeypatch, name):
    use_optimizer(monkeypatch, name)
    on_step(monkeypatch, lambda step, logps: infinite_loss(logps) if step == 3 else None)
    run(tmp_path, flags, save_steps=1, max_steps=4)
    assert weights(tmp_path / "checkpoint-3") == weights(tmp_path / "checkpoint-2")
    assert weights(tmp_path / "checkpoint-4") != weights(tmp_path / "checkpoint-3")


def test_train_ends_after_five_such_steps_in_a_row(flags, tmp_path, monkeypatch):
    """Also where they are looked at late, after finite ones."""
    def fault(step, logps):
        return infinite_loss(logps) if step in (2, 4, 5, 6, 7, 8) else None

    for logging_steps in (4, 10):
        out = tmp_path / str(logging_steps)
        on_step(monkeypatch, fault)
        with pytest.raises(UserError, match="finite"):
            run(out, flags, max_steps=20, save_steps=0, logging_steps=logging_steps)
        assert not (out / "model.safetensors").exists()


def test_train_a_short_run_without_a_finite_step_fails(flags, tmp_path):
    broken = make_model(tmp_path / "m", scale=math.nan)
    with pytest.raises(UserError, match="finite"):
        run(tmp_path / "out", flags, model=broken, max_steps=2)
    assert not curve(tmp_path / "out", "loss")  # nor NaN


def test_train_the_summary_leaves_out_an_evaluation_that_was_not_finite(flags, tmp_path, monkeypatch, capsys):
    """Its numbers are null in metrics.jsonl; the table shows the first and the last that have any."""
    evaluate = train.evaluate
    evaluated = []

    def fault(*arguments):
        metrics = evaluate(*arguments)
        evaluated.append(metrics["eval_logps/chosen"])
        return metrics if len(evaluated) < 3 else dict.fromkeys(metrics, math.nan)

    monkeypatch.setattr(train, "evaluate", fault)
    run(tmp_path, flags, eval_steps=1, max_steps=2)
    told = [line["eval_loss"] for line in lines(tmp_path) if "eval_loss" in line]
    assert [loss is None for loss in told] == [False, False, True]
    row = re.search(r"^log-prob chosen +(\S+) +(\S+)$", capsys.readouterr().out, re.M)
    assert row.groups() == (f"{evaluated[0]:.3f}", f"{evaluated[1]:.3f}")


def fault_on_rank_1():
    if os.environ["RANK"] == "1":
        on_step(pytest.MonkeyPatch(), lambda step, logps: infinite_loss(logps))


def test_train_an_infinite_loss_on_one_rank_counts_for_all(flags, tmp_path):
    started = start_ranks(tmp_path, 2, flags, max_steps=20, before=fault_on_rank_1)
    for child in started:
        status, errors = child.finish()
        assert status == 1, errors
        assert re.fullmatch("train.py: 5 steps in a row .*\n", errors)


def test_train_a_full_disk_leaves_the_checkpoint_before(flags, whole, tmp_path, script):
    """A limit on the size of a file stands for it: the optimizer's file is over it, the model's is not."""
    out = tmp_path / "out"
    run(out, flags, max_steps=2)
    size = (out / "model.safetensors").stat().st_size * 3 // 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        status, _, errors = script("train.py", *command(output_dir=out, resume=True, max_steps=9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert re.fullmatch("train.py: .*checkpoint-4.*\n", errors)
    assert checkpoints(out) == [2]
    assert is_whole(out / "checkpoint-2", whole / "checkpoint-2")


NO_COMPILER = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
FAULTS = {  # what a step raises: what the line says
    "memory": (MemoryError(), "--max_tokens"),
    "the GPU's memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--max_tokens"),
    "NCCL's memory": (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), "--max_tokens"),
    "cuBLAS's memory": (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "--max_tokens"),
    "a CPU's memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--max_tokens"),
    "no compiler": (NO_COMPILER("no g++"), "--compile"),
    "a mistake of ours": (ValueError("oh"), ""),  # its traceback
}


@pytest.mark.parametrize("name", FAULTS)
def test_train_explains_what_is_not_its_fault(flags, tmp_path, monkeypatch, script, name):
    error, said = FAULTS[name]

    def fault(step, logps):
        raise error

    on_step(monkeypatch, fault)
    status, _, errors = script("train.py", *command(flags, output_dir=tmp_path))
    assert status == 1
    if said:
        assert re.fullmatch(f"train.py: .*{said}.*\n", errors)
    else:
        assert "Traceback" in errors and errors.endswith("ValueError: oh\n")


def test_train_and_sample_end_with_a_line_and_with_debug_in_the_traceback(flags, tmp_path, script):
    """Of what is behind the line, too, as a mistake in a fork's own code may be."""
    for name in ("train.py", "sample.py"):
        words = ["--model", tmp_path / "no/such"]
        words += command(data=flags["data"], output_dir=tmp_path) if name == "train.py" else ["--prompt", "x"]
        status, printed, errors = script(name, *words)
        assert status == 1
        assert re.fullmatch(f"{name}: .*/no/such.*\n", errors)
    bad = put(tmp_path / "bad.json", "{")
    words = command(flags, output_dir=tmp_path, config=bad)
    status, _, errors = script("train.py", *words)
    assert (status, errors.count("\n")) == (1, 1)
    status, _, errors = script("train.py", *words, "--debug")
    assert status == 1
    assert "Traceback" in errors and "JSONDecodeError" in errors and "read_json" in errors


def test_train_sigint_before_the_loop_needs_no_traceback(flags, tmp_path, monkeypatch, script):
    def interrupt(*arguments, **more):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(data, "read_pairs", interrupt)
    assert script("train.py", *command(flags, output_dir=tmp_path)) == (130, "", "")


# ------------------------------------------------------------------------------------------------------------
# sample.py

@pytest.mark.parametrize("choice, expected", [
    (dict(), [0.5, 0.3, 0.15, 0.05]),
    (dict(top_k=2), [0.625, 0.375, 0, 0]),
    (dict(top_p=1e-6), [1, 0, 0, 0]),
    (dict(top_p=0.8), [0.625, 0.375, 0, 0]),
    (dict(top_p=0.81), [0.526, 0.316, 0.158, 0]),
    (dict(top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),  # top_p of what top_k leaves: 0.53, 0.32, 0.16
    (dict(temperature=0.5, top_k=99), [0.685, 0.247, 0.062, 0.007]),
    (dict(temperature=1e-50), [1, 0, 0, 0])])
def test_sample_pick(choice, expected):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20_000, 4)
    chance = torch.Generator().manual_seed(0)
    picked = sample.pick(logits, **(dict(temperature=1.0, generator=chance) | choice))
    shares = torch.bincount(picked, minlength=4) / 20_000
    assert shares.tolist() == pytest.approx(expected, abs=0.015)


def test_sample_logits_that_are_not_finite_are_a_line():
    with pytest.raises(UserError, match="weights are broken"):
        sample.pick(torch.full((1, 4), math.nan), temperature=1.0)


def test_sample_streams_what_temperature_and_seed_give(model, capsys):
    """Characters in several pieces, bytes that are none; at temperature 0 the likeliest by a plain pass."""
    tokenizer = Tokenizer.from_pretrained(model)
    network = Transformer.from_pretrained(model)
    ids = tokenizer.encode("héllo 世")
    said = []
    for temperature, seed in ((5.0, 1), (5.0, 1), (5.0, 2), (0.0, 0)):
        ask(model, prompt="héllo 世", raw=True, temperature=temperature, seed=seed, max_new_tokens=100)
        said.append(capsys.readouterr().out)
        choice = dict(temperature=temperature, generator=torch.Generator().manual_seed(seed))
        [new] = sample.continuations(network, [ids], 100, [EOS], **choice)
        assert tokenizer.decode(new, after=ids).startswith(said[-1][:-1])  # not half a one
    assert said[0] == said[1] != said[2]
    for i, token in enumerate(new):
        logits = network.logits(torch.tensor([ids + new[:i]]))[0, -1]  # (V,)
        assert token == logits.argmax()
    assert sample.prompt_ids("hi", tokenizer) == tokenizer.encode("hi\n")


def test_sample_goes_on_where_the_cache_has_to_grow(checkpoint):
    network = load(checkpoint("llama"))
    ids = [5, 6, 7]
    [new] = sample.continuations(network, [ids], 200)
    logits = network.logits(torch.tensor([ids + new[:-1]]))[0]  # (T, V)
    assert new == logits[len(ids) - 1 :].argmax(-1).tolist()
    assert len(new) == 200


def test_sample_chat_keeps_its_history_and_survives_errors(model, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(model, tmp_path / "model")
    put(copy / "chat_template.jinja", "{% for m in messages %}{{ m.content }}|{% endfor %}")
    asked = []

    def generate(model, prompts, *arguments, **choice):
        asked.append(demo_tokenizer().decode(prompts[0]))
        if "bad" in asked[-1]:
            raise UserError("too long")
        return ([token] for token in demo_tokenizer().encode("answer"))

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nbad\ntwo\n/new\nthree\n"))
    ask(copy, system="brief")
    assert asked == ["brief|one|", "brief|one|answer|bad|", "brief|one|answer|two|", "brief|three|"]
    errors = capsys.readouterr().err
    assert "too long" in errors
    assert errors.count("Ctrl-C stops an answer") == 1


def test_sample_a_system_message_also_goes_before_prompts_that_are_messages():
    tokenizer = byte_tokenizer(template="{% for m in messages %}{{ m.content }}|{% endfor %}")
    for prompt in ("one", [user("one")]):
        ids = sample.prompt_ids(prompt, tokenizer, [turn("system", "brief")])
        assert ids == tokenizer.encode("brief|one|")


def test_sample_survives_bytes_that_cannot_be_streamed(monkeypatch, capsys):
    """With byte fallback, tokenizers' stream raises "Invalid prefix encountered" at the token after them."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"hi": 256}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.ByteFallback()
    tokens = [[0xC3], [0xB8], [0x96], [0xC3], [0xFF], [256]]
    monkeypatch.setattr(sample, "generate", lambda *arguments, **choice: iter(tokens))
    said = sample.answer(None, tokenizer_of(backend), [256], {})
    assert said.endswith("hi")
    assert capsys.readouterr().out.endswith("hi\n")


def test_sample_file_is_answered_in_its_order_as_one_by_one(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "pick", lambda logits, **choice: logits[:, :90].argmax(-1))  # printable
    common = dict(model=model, max_new_tokens=20)
    questions = ["Which is larger, 45 or 23?", "hello", "Which is larger, 12 or 90?", "Which?"]
    prompts = [*questions[:3], [user(questions[3])]]
    put(tmp_path / "q.jsonl", [{"prompt": prompt} for prompt in prompts])
    put(tmp_path / "q.txt", "\ufeff".encode() + "\r\n\r\n".join(questions).encode())  # BOM, CRLF, blank lines
    ask(**common, prompts=tmp_path / "q.jsonl", output=tmp_path / "a.jsonl", batch_size=3)
    ask(**common, prompts=tmp_path / "q.txt", batch_size=3)  # to standard output
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in shown] == questions
    assert len({row["answer"] for row in shown}) > 1
    expected = [row | {"prompt": prompt} for row, prompt in zip(shown, prompts)]
    assert lines(tmp_path, "a.jsonl") == expected
    for row in shown:  # as alone, without padding
        ask(**common, prompt=row["prompt"])
        assert capsys.readouterr().out == row["answer"] + "\n"
    put(tmp_path / "eval.jsonl", [{"instruction": questions[1]}])  # AlpacaEval's name
    ask(**common, prompts=tmp_path / "eval.jsonl", output=tmp_path / "b.jsonl")
    assert lines(tmp_path, "b.jsonl") == [dict(instruction=questions[1], answer=shown[1]["answer"])]
    put(tmp_path / "list.txt", "[INST] hi \n")  # not JSON, whatever it begins with; its space stays
    ask(**common, prompts=tmp_path / "list.txt", output=tmp_path / "d.jsonl")
    assert [row["prompt"] for row in lines(tmp_path, "d.jsonl")] == ["[INST] hi "]
    put(tmp_path / "column.jsonl", [{"prompt": "no", "ask": questions[1]}])
    ask(**common, prompts=tmp_path / "column.jsonl", prompt_column="ask", output=tmp_path / "e.jsonl")
    assert lines(tmp_path, "e.jsonl") == [dict(prompt="no", ask=questions[1], answer=shown[1]["answer"])]
    put(tmp_path / "half.jsonl", '{"prompt": "\\ud83d"}')  # half a surrogate pair
    ask(**common, prompts=tmp_path / "half.jsonl", output=tmp_path / "c.jsonl")
    assert [row["prompt"] for row in lines(tmp_path, "c.jsonl")] == ["?"]


def test_sample_asks_a_file_to_train_on_as_it_was_trained(tmp_path, monkeypatch):
    """Whatever the columns: with the system, the tools, the history and the input, without the answers."""
    template = ("{{ tools | tojson if tools }}" + EACH + "<{{ m.role }}>{{ m.content }}{% endfor %}"
                "{{ '<assistant>' if add_generation_prompt }}")
    tokenizer = tokenizer_of(demo_tokenizer().backend, eos_token="<|endoftext|>", chat_template=template)
    model = make_model(tmp_path / "model", tokenizer=tokenizer)
    rows = [conversation(), conversation() | {"tools": [TOOL]},
            dict(chosen=[Q, G, Q, G], rejected=[Q, G, Q, B]),
            dict(instruction="Do.", input="in", history=[["a", "b"]], **TEXTS_OF_PAIR),
            dict(question="q", system="s", **TEXTS_OF_PAIR),
            dict(prompt="q", preferred_output=[S, Q, G], non_preferred_output=[S, Q, B]),
            dict(chosen_response=[Q, G, Q, G], rejected_response=[Q, G, Q, B], chosen=None, answer="5")]
    for path in (put(tmp_path / "rows.jsonl", rows), put(tmp_path / "rows.json", json.dumps(rows))):
        pairs = tokenize_pairs(read_pairs(path), tokenizer)
        asked = []

        def generate(network, prompts, *arguments, **choice):
            asked.extend(prompts)
            yield [None] * len(prompts)

        monkeypatch.setattr(sample, "generate", generate)
        ask(model, prompts=path, output=tmp_path / "a.jsonl")
        assert asked == [pairs[i][0].tolist() for i in range(len(rows))]
        assert lines(tmp_path, "a.jsonl") == [row | {"answer": ""} for row in rows]


def test_sample_an_interrupted_file_keeps_the_first_answers(model, tmp_path, monkeypatch):
    generate = sample.generate
    batches = []

    def interrupted(*arguments, **choice):
        batches.append(arguments)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return generate(*arguments, **choice)

    monkeypatch.setattr(sample, "generate", interrupted)
    prompts = put(tmp_path / "p.txt", "a\nb\nc\nd\n")
    with pytest.raises(KeyboardInterrupt):
        ask(model, prompts=prompts, output=tmp_path / "a.jsonl", batch_size=2, max_new_tokens=5)
    assert [row["prompt"] for row in lines(tmp_path, "a.jsonl")] == ["a", "b"]


# ------------------------------------------------------------------------------------------------------------
# Bad input to both programs: one line that names the place, and nothing damaged

BAD_FLAGS = {  # the message names the first word, or what is behind the arrow
    train: """
        --beta
        --beta -0.1
        --beta nan
        --batch_size many
        --batch_size 0
        --max_steps 1.5
        --seed -1
        --seed 9223372036854775808
        --lora_alpha 0
        --learning_rate 0
        --learning_rate inf
        --lr_scheduler_type step
        --save_steps -2
        --adam_beta2 1
        --weight_decay inf
        --learningrate 1
        --max_step 1
        data.jsonl
        --resume
        --resume --overwrite_output_dir
        --max_prompt_length 99 --max_length 99
        --eval_data x --eval_pairs 5 --model m --data d
        --model m -> --data
        --data d -> --model
        --eval_data d --max_steps 0 -> --model""",
    sample: """
        --promt x
        --temperature nan
        --top_p 0
        --seed many
        --max_new_tokens 0
        --output x
        --prompt_column x
        --prompts y --prompt x"""}
BAD_WORDS = []
for module, listed in BAD_FLAGS.items():
    BAD_WORDS += [(module, line.strip()) for line in listed.strip().split("\n")]


@pytest.mark.parametrize("module, words", BAD_WORDS)
def test_train_and_sample_refuse_flags(tmp_path, monkeypatch, capsys, module, words):
    monkeypatch.chdir(tmp_path)
    words, _, named = words.partition(" -> ")
    with pytest.raises(SystemExit) as refused:
        module.main(words.split())
    assert refused.value.code == 2
    assert (named or words.split()[0]) in capsys.readouterr().err
    assert not os.listdir(tmp_path)


ON = dict(output_dir="run", resume=True)  # in `run` is a run of two steps
BAD_RUNS = {  # name: files written first, flags, what the line names
    "train: the output is a file": ({"out": "mine"}, {}, "out"),
    "train: a run is there": ({}, dict(output_dir="run"), "run.*--resume.*--overwrite_output_dir"),
    "train: a model is there": ({"out/config.json": "mine"}, dict(overwrite_output_dir=True), "out.*no run"),
    "train: a checkpoint is there": ({"out/checkpoint-9/a": "mine"}, {}, "out.*checkpoint-9.*no run"),
    "train: a log is there": ({"out/metrics.jsonl": "mine"}, dict(overwrite_output_dir=True), "out.*no run"),
    "train: more steps than asked for": ({}, ON | dict(max_steps=1), "checkpoint-2.*1 steps"),
    "train: only damage to resume": ({"run/checkpoint-2/state.json": "{"}, ON, "checkpoint-2.*remove"),
    "train: ids beyond the model": ({}, dict(model="few"), "100"),
    "train: another family": ({"model/config.json": '{"model_type": "t5"}', "b.jsonl": "{"},
                              dict(data="b.jsonl"), "t5.*llama"),  # said before data are read
    "train: too few positions": ({}, dict(model="short"), "44 tokens in a model of 24"),
    "train: a package is missing": ({}, dict(report_to="tensorboard"), "pip install tensorboard"),
    "train: an upload without network": ({}, dict(push_to_hub="me/mine", max_steps=1), "--push_to_hub"),
    "sample: broken JSON": ({"p.jsonl": '{"prompt": "x"}\n{"prompt": \n'}, {}, "p.jsonl.* line 2"),
    "sample: a list of numbers": ({"p.json": '[\n 1\n]'}, dict(prompts="p.json"), "p.json, row 1: .* object"),
    "sample: no prompt": ({"p.jsonl": [{"text": "x"}]}, {}, "line 1: no prompt; columns found: text"),
    "sample: tools, no template": (
        {"p.jsonl": [{"prompt": "x", "tools": [{}]}]}, dict(raw=True), "p.jsonl: .*tools need a chat"),
    "sample: turns, no template": ({"p.jsonl": [{"prompt": [Q, G, Q]}]}, dict(raw=True), "p.jsonl: several"),
    "sample: a template without system": (
        {"p.jsonl": [PAIR], "model/chat_template.jinja": "{{ messages[-1].content }}|"}, dict(system="y"),
        "leaves out system"),
    "sample: not UTF-8": ({"p.txt": b"caf\xe9\n"}, dict(prompts="p.txt"), "p.txt"),
    "sample: nowhere to write": ({"p.jsonl": [PAIR]}, dict(output="no/a.jsonl"), "--output|no/a.jsonl"),
    "sample: a system without template": ({"p.jsonl": [PAIR]}, dict(raw=True, system="y"), "--system"),
    "sample: too long": ({"p.jsonl": [PAIR, {"prompt": "x" * 24}]}, dict(model="short"), "p.jsonl"),
}


@pytest.fixture(scope="session")
def scene(tmp_path_factory, flags):
    home = tmp_path_factory.mktemp("scene")
    make_model(home / "model")
    make_model(home / "few", SHAPE | dict(vocab_size=100))
    make_model(home / "short", POSITIONS_24)
    pairs = shutil.copy(flags["data"], home / "pairs.jsonl")
    run(home / "run", flags, data=pairs, max_steps=2)
    put(home / "a.jsonl", "mine")
    return home


@pytest.mark.parametrize("name", BAD_RUNS)
def test_train_and_sample_bad_run(scene, tmp_path, monkeypatch, name):
    files, flags, named = BAD_RUNS[name]
    here = shutil.copytree(scene, tmp_path / "here")
    for path, content in files.items():
        put(here / path, content)
    before = listing(here)
    monkeypatch.chdir(here)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=named) as refused:
        if name.startswith("sample"):
            ask(**(dict(model="model", prompts="p.jsonl", output="a.jsonl") | flags))
        elif "resume" in flags:
            train.main(command(flags))
        else:
            train.main(command(dict(model="model", data="pairs.jsonl") | flags))
    assert "\n" not in str(refused.value)
    assert listing(here).items() >= before.items()


# ------------------------------------------------------------------------------------------------------------
# Rows as people have them

N, M = assistant("Noted."), user("My name is Bo.")
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
CALLING = turn("assistant", None, tool_calls=CALLS)
TEXTS_OF_PAIR = dict(chosen="good", rejected="bad")
TURNS_OF_PAIR = dict(chosen=[G], rejected=[B])
MORE_FORMS = {  # name: a row as people have it, then prompt, chosen, rejected as read_pairs gives it
    "answers that are JSON": (dict(prompt="q", chosen='[{"role": "admin"}]', rejected='[{"value": 1}]'), "q",
                              '[{"role": "admin"}]', '[{"value": 1}]'),
    "turns of the answer among the messages": (
        dict(messages=[Q, G, Q, G], chosen=[Q, G, Q, G], rejected=[Q, B, Q, B]), [Q], [G, Q, G], [B, Q, B]),
    "columns that say nothing": (PAIR | dict(context="", image=False, input=False), *PAIR.values()),
    "system beside text": (dict(system="s", prompt="q", **TEXTS_OF_PAIR), [S, Q], [G], [B]),
    "system_prompt": (dict(system_prompt="s", question="q", **TEXTS_OF_PAIR), [S, Q], [G], [B]),
    "system as turns": (dict(system=[S], prompt=[Q], **TURNS_OF_PAIR), [S, Q], [G], [B]),
    "system that is there": (dict(system="s", prompt="q", chosen=[S, Q, G], rejected=[S, Q, B]),
                             [S, Q], [G], [B]),
    "history of pairs": (dict(system="s", instruction="q", history=[["My name is Bo.", "Noted."]],
                              **TEXTS_OF_PAIR), [S, M, N, Q], [G], [B]),
    "history of turns": (dict(question="q", history=[M, N], **TEXTS_OF_PAIR), [M, N, Q], [G], [B]),
    "empty frame": (dict(prompt="q", system="", history=[], tools=None, **TEXTS_OF_PAIR), "q", "good", "bad"),
    "an empty answer": (dict(question="q", chosen_response="", rejected_response="bad"), [Q],
                        [assistant("")], [B]),
    "null beside other answers": (dict(prompt="q", chosen=None, rejected=None, chosen_response="good",
                                       rejected_response="bad"), "q", "good", "bad"),
    "a column without a name": ({"": "3", "prompt": "q", **TEXTS_OF_PAIR}, "q", "good", "bad"),
    "no turns": (dict(prompt=[Q], chosen=[], rejected=[B]), [Q], [], [B]),
    "no turns at all": (dict(prompt=[user("Who founded it?")], chosen=[], rejected=[]),
                        [user("Who founded it?")], [], []),
    "text, and no turns at all": (dict(prompt="q", chosen=[], rejected=[]), [Q], [], []),
    "input alone": (dict(input="q", **TEXTS_OF_PAIR), [Q], [G], [B]),
    "query": (dict(query="q", **TEXTS_OF_PAIR), [Q], [G], [B]),
    "messages": (dict(messages=[S, Q], chosen=G, rejected=B), [S, Q], [G], [B]),
    "messages, text": (dict(messages=[S, Q], **TEXTS_OF_PAIR), [S, Q], [G], [B]),
    "OpenAI": (dict(input={"messages": [S, Q], "tools": [], "parallel_tool_calls": True},
                    preferred_output=[G], non_preferred_output=[B]), [S, Q], [G], [B]),
    "distilabel": (dict(instruction="q", chosen_response="good", rejected_response="bad"), [Q], [G], [B]),
    "human, gpt": (dict(prompt=[turn("human", "q")], chosen=[turn("gpt", "good")],
                        rejected=[turn("GPT", "bad")]), [Q], [G], [B]),
    "Human, Assistant": (dict(chosen=[turn("Human", "q"), turn("Assistant", "good")],
                              rejected=[turn("Human", "q"), turn("Assistant", "bad")]), [Q], [G], [B]),
    "calls and observations": (
        dict(conversations=[{"from": "human", "value": "q"},
                            {"from": "function_call", "value": json.dumps(CALLS[0]["function"])},
                            {"from": "observation", "value": "20"}],
             chosen={"from": "gpt", "value": "good"}, rejected={"from": "gpt", "value": "bad"}),
        [Q, turn("assistant", "", tool_calls=CALLS), turn("tool", "20")], [G], [B]),
    "a call is an answer": (dict(prompt=[Q], chosen=[CALLING], rejected=[B]), [Q], [CALLING], [B]),
    "prompt repeated": (dict(prompt=[S, Q], chosen=[S, Q, G], rejected=[S, Q, B]), [S, Q], [G], [B]),
    "prompt repeated in text": (dict(prompt="Who founded it?", chosen="Who founded it? Jo.",
                                     rejected="Who founded it? No."), "Who founded it?", " Jo.", " No."),
    "a greeting returned": (dict(prompt="Hi", chosen="Hi there", rejected="Hi!"), "Hi", "Hi there", "Hi!"),
    "the question twice": (dict(prompt="s q", question="q", chosen=[S, Q, G], rejected=[S, Q, B]),
                           [S, Q], [G], [B]),
    "ultrafeedback's messages": (dict(prompt="q", messages=[Q, G], chosen=[Q, G], rejected=[Q, B]),
                                 [Q], [G], [B]),
}


@pytest.mark.parametrize("form", MORE_FORMS)
def test_data_rows_as_people_have_them_from_every_kind_of_file(form, tmp_path):
    row, *parts = MORE_FORMS[form]
    files = [put(tmp_path / "a.jsonl", [row, row]), put(tmp_path / "a.json", json.dumps([row, row]))]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    files.append(str(tmp_path / "a.parquet"))
    for file in files:
        assert read_pairs(file) == [dict(zip(PAIR, parts))] * 2


@pytest.mark.parametrize("row, given, expected", [
    (dict(prompt="q", **TEXTS_OF_PAIR), {}, ([Q], [G], [B])),
    (dict(prompt="q", system="s", **TEXTS_OF_PAIR), {}, ([S, Q], [G], [B])),
    (dict(task="q", **TEXTS_OF_PAIR), dict(prompt_column="task"), ([Q], [G], [B]))])
def test_data_as_conversation_makes_turns_of_text(row, given, expected, tmp_path):
    [read] = read_pairs(put(tmp_path / "a.jsonl", [row]), as_conversation=True, **given)
    assert read == dict(zip(PAIR, expected))


@pytest.mark.parametrize("column", ["input", "question", "task"])
def test_data_text_in_the_column_that_is_named_stays_as_it_stands(column, tmp_path):
    """Such as texts that somebody has put through a chat template already."""
    file = put(tmp_path / "a.jsonl", [{column: "[u]q[a]", **TEXTS_OF_PAIR}])
    assert read_pairs(file, prompt_column=column) == [dict(prompt="[u]q[a]", **TEXTS_OF_PAIR)]


def test_data_prompt_column_none_means_none(tmp_path):
    row = dict(prompt="s q", question="x", chosen=[S, Q, G], rejected=[S, Q, B])
    file = put(tmp_path / "a.jsonl", [row])
    assert read_pairs(file, prompt_column="none") == [dict(zip(PAIR, ([S, Q], [G], [B])))]
    with pytest.raises(UserError, match="line 1: its question: prompt does not say this; .*none"):
        read_pairs(file)


BAD_ROWS = {  # what is wrong: a row, and what the line says
    "text without prompt": (dict(task="q", chosen="ab", rejected="xy"), "--prompt_column.*task, chosen, rej"),
    "text in a frame": (dict(task="q", system="s", chosen="It is", rejected="It was"), "--prompt_column"),
    "turns without a user's": (dict(task="q", chosen=[S, G], rejected=[S, B]), "--prompt_column"),
    "text that begins alike": (dict(task="q", chosen="It is", rejected="It was"), "--prompt_column .*task"),
    "user's answer": (dict(prompt=[Q], chosen=[G], rejected=[user("Yes.")]), "the role user"),
    "an unknown role": (dict(prompt=[turn("critic", "x"), Q], **TURNS_OF_PAIR), "critic"),
    "no role": (dict(prompt=[{"content": "x"}], **TURNS_OF_PAIR), "role"),
    "no content": (dict(prompt=[{"role": "user"}], **TURNS_OF_PAIR), "content"),
    "numbers": (dict(prompt=[Q], chosen=1, rejected=2), "int is neither text"),
    "text and texts": (dict(prompt=["q"], **TURNS_OF_PAIR), "str is neither text"),
    "two questions": (dict(prompt="p", input="more", **TEXTS_OF_PAIR), "its input: prompt does not say"),
    "another prompt": (dict(prompt="other", chosen=[Q, G], rejected=[Q, B]), "its prompt: "),
    "a prompt with a system of its own": (dict(prompt=[turn("system", "!"), Q], chosen=[Q, G],
                                               rejected=[Q, B]), "its prompt: "),
    "two systems": (dict(system="s", system_prompt="t", prompt="q", **TEXTS_OF_PAIR), "its system_prompt"),
    "an input that an answer repeats": (dict(prompt="Correct.", input="He go.", chosen="He goes.",
                                             rejected="He go."), "its input: prompt does not say"),
    "a picture": (dict(prompt="What is it?", images=[{"path": "y"}], **TEXTS_OF_PAIR), "its images"),
    "a text to read": (dict(question="Who?", context="Ann came.", **TEXTS_OF_PAIR), "its context: question"),
    "the answer in the prompt": (dict(messages=[Q, G], **TEXTS_OF_PAIR), "that the assistant did not write"),
    "no question": (dict(chosen=[G], rejected=[B]), "needs a message before it"),
    "an answer that ends with the user": (dict(chosen=[Q, G, Q], rejected=[Q, B, Q]), "the role user"),
    "messages as text": (dict(prompt=json.dumps([Q]), **TEXTS_OF_PAIR), "lists of messages are expected"),
    "messages as text, answers not": (dict(prompt=json.dumps([Q]), **TURNS_OF_PAIR), "lists of messages"),
    "ShareGPT's": (dict(prompt="q", chosen='[{"value": "a", "from": "gpt"}]', rejected="b"), "as text"),
    "messages as Python's text": (dict(prompt="q", chosen=str([Q, G]), rejected=str([Q, B])), "as text"),
    "a block that is none": (dict(prompt=[turn("user", ["q"])], **TURNS_OF_PAIR), "the block q"),
    "broken call": (dict(prompt=[Q, {"from": "function_call", "value": "f("}], **TURNS_OF_PAIR), "JSON"),
}


for column in data.UNREAD[3:]:
    for value in ("x", ["x"], {"path": "x"}):
        BAD_ROWS[f"{column}: {value}"] = (PAIR | {column: value}, f"its {column}: ")


@pytest.mark.parametrize("wrong", BAD_ROWS)
def test_data_rows_that_would_lose_something_are_refused_by_name(wrong, tmp_path):
    row, expected = BAD_ROWS[wrong]
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: .*{expected}"):
        read_pairs(put(tmp_path / "a.jsonl", [row]))


def test_data_a_prompt_column_is_the_only_one(tmp_path):
    row = PAIR | {"question": "x?", "context": "y"}
    [read] = read_pairs(put(tmp_path / "a.jsonl", [row]), prompt_column="question")
    assert read["prompt"] == "x?"
    for empty in ("", None):
        with pytest.raises(UserError, match="a.jsonl, line 1: not a pair: chosen, rejected and question"):
            read_pairs(put(tmp_path / "a.jsonl", [row | {"question": empty}]), prompt_column="question")


def test_data_a_prompt_column_that_no_row_has_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(UserError, match="columns found: prompt, chosen, rejected"):
        read_pairs(put(tmp_path / "a.jsonl", [PAIR]), prompt_column="typo")


@pytest.mark.parametrize("files, expected", [
    (["orca_rlhf.jsonl"], "orca_rlhf.jsonl"), (["test.jsonl"], None), (["validation.json"], None),
    (["a.jsonl", "b.jsonl"], None), (["data/train.jsonl", "other.jsonl"], "data/train.jsonl")])
def test_data_a_lone_file_of_a_hub_data_set_is_its_train_split(files, expected, tmp_path, monkeypatch):
    """snapshot_download fetches what matches the patterns, as the hub's does."""
    from fnmatch import fnmatch
    for file in files:
        put(tmp_path / "hub" / file, [PAIR | {"chosen": file}])

    def fetch(name, revision=None, patterns=None, repo_type="model"):
        for file in files:
            if any(fnmatch(file, pattern) for pattern in patterns):
                put(tmp_path / "here" / file, (tmp_path / "hub" / file).read_bytes())
        return tmp_path / "here"

    monkeypatch.setattr(data, "fetch", fetch)
    if expected:
        assert [row["chosen"] for row in read_pairs("owner/set")] == [expected]
    else:
        with pytest.raises(UserError, match="no files of split 'train' among"):
            read_pairs("owner/set")


# ------------------------------------------------------------------------------------------------------------
# Templates

SHOWS = (EACH + "<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
         "{{ tools }}")
HIDES = EACH + "{% if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("part, row", [
    ("system", conversation() | {"prompt": [S, Q]}),
    ("tool", conversation() | {"prompt": [Q, turn("assistant", "", tool_calls=None), turn("tool", "20")]}),
    ("tool_calls", conversation() | {"prompt": [Q, turn("assistant", "", tool_calls=CALLS), Q]}),
    ("tool_calls", conversation() | {"rejected": [turn("assistant", "", tool_calls=CALLS)]}),
    ("tools", conversation() | {"tools": [TOOL]}), ("tools", conversation() | {"tools": json.dumps([TOOL])})])
def test_data_what_a_template_leaves_out_is_refused_by_name(part, row, tmp_path):
    rows = read_pairs(put(tmp_path / "a.jsonl", [row]))
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: the chat template leaves out {part};"):
        tokenize_pairs(rows, byte_tokenizer(template=HIDES))
    tokenize_pairs(rows, byte_tokenizer(template=SHOWS))


@needs_shared
@pytest.mark.parametrize("name", ["qwen2_5.jinja", "qwen3.jinja", "llama3_1.jinja"])
def test_data_tools_and_calls_are_rendered_as_transformers_renders_them(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (REAL / "chat_templates" / name).read_text("utf-8")
    prompt = [S, Q, CALLING, turn("tool", '{"t": 20}', tool_call_id="c1")]
    file = put(tmp_path / "a.jsonl", [dict(tools=[TOOL], messages=prompt, chosen=G, rejected=B)])
    [row] = read_pairs(file)
    ours = byte_tokenizer(template=template)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours.backend, bos_token="<s>",
                                                  eos_token=END, pad_token=END, chat_template=template)
    expected = theirs.apply_chat_template(prompt, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert "weather" in expected and '"city": "Rome"' in expected
    assert data.pair_texts(row, ours)[0] == expected


def test_data_a_template_that_opens_otherwise_than_it_answers_is_followed_and_counted():
    """As DeepSeek's, which asks with <think> and leaves it out of an answer."""
    template = TURNS.replace("CLOSE", "").replace("[a]{% endif", "[a]<think>{% endif")
    tok = byte_tokenizer(template=template)
    pairs = tokenize_pairs([conversation(), PAIR], tok)
    assert [tok.decode(part) for part in pairs[0]] == ["[u]q[a]<think>", "good" + END, "bad" + END]
    assert sample.prompt_ids([Q], tok) == pairs[0][0].tolist()
    assert "\n  1: the chat template writes an answer otherwise than it asks for one" in pairs.report


# ------------------------------------------------------------------------------------------------------------
# Asked as trained

LINES = ["What is 2+2? Four it is. Five it is.", "Name a tree. Oak is one. Dog is one.",
         "Capital of Peru? Lima of course. Quito maybe.", "「木は？」 「かし」です。", "a) b) (c) [d] {e}"]
CHAT = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")


def byte_level(**settings):
    """GPT-2's kind, trained on LINES, so that spaces and brackets merge with what follows."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(LINES * 9, vocab_size=420, min_frequency=2, show_progress=False,
                             special_tokens=[END])
    return tokenizer_of(tokenizers.Tokenizer.from_str(made.to_str()), eos_token=END, **settings)


def sentencepiece(metaspace=False, **settings):
    """Llama 2's kind: a marker stands for the space, also for one that is put before a text; what has no
    piece is spelt in bytes."""
    decoders, normalizers = tokenizers.decoders, tokenizers.normalizers
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    if metaspace:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, show_progress=False,
                                             special_tokens=["<unk>", "<s>", "</s>", *spelt])
    backend.train_from_iterator(LINES * 9, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    return tokenizer_of(backend, bos_token="<s>", eos_token="</s>", add_bos_token=True, **settings)


KINDS = {"byte level": byte_level, "Llama 2": sentencepiece,
         "metaspace": functools.partial(sentencepiece, metaspace=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_data_prompt_ids_are_those_that_a_generator_starts_from(kind):
    """And with the responses' they say the text, wherever the prompt ends."""
    pieces = ["Name a tree.", " Oak", "is", " ", "  ", "\n", "\n\n", "「", "」", "(", "é", "🙂", "2", ": "]
    texts = ["".join(three) for three in itertools.product(pieces, repeat=3)]
    chance, merged = random.Random(0), 0
    for tok in KINDS[kind](), KINDS[kind](chat_template=CHAT):
        for _ in range(300):
            prompt, chosen, rejected = chance.sample(texts, 3)
            row = dict(prompt=prompt, chosen=chosen, rejected=rejected)
            if tok.chat_template:
                row = conversation(chosen, rejected, prompt)
            asked, *responses = encode_pair(row, tok)
            whole = data.pair_texts(row, tok)
            assert asked == sample.prompt_ids(row["prompt"], tok)
            for text, response in zip(whole[1:], responses):
                joint = data.with_bos(tok.encode(text.removesuffix(tok.specials["eos_token"] + "\n")), tok)
                assert tok.decode(asked + response[:-1]) == tok.decode(joint)
                if joint[: len(asked)] == asked:  # as TRL encodes it
                    assert asked + response[:-1] == joint
                else:
                    merged += 1
    assert merged > 20


def test_data_merges_across_the_end_of_the_prompt_are_counted():
    rows = [dict(prompt="Name a tree. ", chosen="Oak is one.", rejected="Dog is one."),
            dict(prompt="Name a tree.", chosen=" Oak is one.", rejected=" Dog is one.")]
    pairs = tokenize_pairs(rows, byte_level())
    assert "\n  1: tokens would merge across the end of the prompt" in pairs.report
    tok = byte_level()
    texts = [tok.decode(part) for part in pairs[0]]
    assert texts == ["Name a tree. ", "Oak is one." + END, "Dog is one." + END]


# ------------------------------------------------------------------------------------------------------------
# Overfit and ask

THREE = [("What is 2+2?", "Four it is.", "Five it is."), ("Name a tree.", "Oak is one.", "Dog is one."),
         ("Capital of Peru?", "Lima of course.", "Quito maybe.")]
AS_PEOPLE_HAVE_THEM = {  # name: the row of a question and its answers, and flags
    "text": (lambda q, c, r: dict(prompt=q + "\n", chosen=c, rejected=r), {}),
    "text that ends in a space": (lambda q, c, r: dict(prompt=f"Q: {q} A: ", chosen=c, rejected=r), {}),
    "text as conversation": (lambda q, c, r: dict(prompt=q, chosen=c, rejected=r),
                             dict(as_conversation=True)),
    "text that repeats": (lambda q, c, r: dict(prompt=q, chosen=f"{q} {c}", rejected=f"{q} {r}"), {}),
    "instruction": (lambda q, c, r: dict(instruction="Answer.", input=q, chosen=c, rejected=r), {}),
    "question": (lambda q, c, r: dict(question=q, chosen=c, rejected=r), {}),
    "input alone": (lambda q, c, r: dict(input=q, chosen=c, rejected=r), {}),
    "system": (lambda q, c, r: dict(system="Be brief.", prompt=q, chosen=c, rejected=r), {}),
    "human and gpt": (lambda q, c, r: dict(chosen=[turn("Human", q), turn("gpt", c)],
                                           rejected=[turn("Human", q), turn("gpt", r)]), {}),
    "OpenAI": (lambda q, c, r: dict(input={"messages": [user(q)]}, preferred_output=[assistant(c)],
                                    non_preferred_output=[assistant(r)]), {}),
    "messages": (lambda q, c, r: dict(messages=[user("Hi"), assistant("Yes?"), user(q)],
                                      chosen=assistant(c), rejected=assistant(r)), {}),
}
ASKED = [(form, kind, template) for form in AS_PEOPLE_HAVE_THEM
         for kind, template in [("byte level", CHAT), ("byte level", None), ("Llama 2", None)]
         if template or form != "system"]


@pytest.mark.parametrize("form, kind, template", ASKED)
def test_train_and_ask_by_the_command_that_the_run_ends_with(form, kind, template, tmp_path, capsys):
    make_row, given = AS_PEOPLE_HAVE_THEM[form]
    file = put(tmp_path / "rows.jsonl", [make_row(*three) for three in THREE])
    tokenizer = KINDS[kind](chat_template=template)
    shape = SHAPE | dict(vocab_size=tokenizer.backend.get_vocab_size(), hidden_size=48)
    model = make_model(tmp_path / "model", shape, tokenizer, scale=1.0)
    run(tmp_path / "out", given, model=model, data=file, max_steps=60, learning_rate=1e-2, batch_size=3,
        prompt_loss=False, eval_pairs=0, save_steps=0, logging_steps=60, warmup_ratio=0, max_length=200)
    next_command = re.search(r"Next:\n    python (sample.py .*)", capsys.readouterr().out)[1]
    prompts = []
    for row in read_pairs(file, **given):
        prompt = row["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1:  # as one types it
            prompt = prompt[0]["content"]
        prompts.append({"prompt": prompt})
    more = ["--prompts", put(tmp_path / "prompts.jsonl", prompts), "--max_new_tokens", "40",
            "--output", str(tmp_path / "answers.jsonl")]
    sample.main(shlex.split(next_command)[1:] + more)
    answers = [line["answer"].strip() for line in lines(tmp_path, "answers.jsonl")]
    assert answers == [chosen for _, chosen, _ in THREE]


@pytest.mark.parametrize("row, template, expected", [
    (PAIR, CHAT, "20 rows of prompt, chosen, rejected as text; chat template: the model's, not for text "
                 "(but see --as_conversation)\n  20 rows read"),
    (PAIR, None, "20 rows of prompt, chosen, rejected as text; chat template: none\n"),
    (dict(instruction="q", input="more", **TEXTS_OF_PAIR), CHAT,
     "20 rows of instruction, input, chosen, rejected as conversations; chat template: the model's\n"),
    (dict(instruction="q", **TEXTS_OF_PAIR), None, "chat template: Alpaca's text, saved with the model\n"),
    (conversation(), None, "chat template: <|user|> and <|assistant|> turns, saved with the model\n"),
    (dict(chosen=HI + " yes", rejected=HI + " no"), None,
     "20 rows of chosen, rejected as text, answers begin with the prompt;")])
def test_train_says_in_a_line_what_was_read_as_what(row, template, expected, tmp_path, capsys):
    file = put(tmp_path / "rows.jsonl", [row] * 20)
    tokenizer = byte_level(chat_template=template)
    shape = SHAPE | dict(vocab_size=tokenizer.backend.get_vocab_size())
    run(tmp_path / "out", model=make_model(tmp_path / "model", shape, tokenizer), data=file, dry_run=True)
    assert expected in capsys.readouterr().out


def test_train_text_with_a_system_needs_a_template(tmp_path):
    rows = read_pairs(put(tmp_path / "a.jsonl", [PAIR | {"system": "s"}]))
    with pytest.raises(UserError, match=r"line 1: \['system'\] need a --chat_template"):
        data.adopt_template(byte_level(), rows)


def test_train_an_adapter_is_named_as_such(tmp_path):
    put(tmp_path / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "someone/base"})
    with pytest.raises(UserError, match="a LoRA adapter of someone/base"):
        run(tmp_path / "out", model=tmp_path, data=put(tmp_path / "a.jsonl", [PAIR]), dry_run=True)
