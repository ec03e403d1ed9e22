"""ORPO: the loss, its metrics, its gradient in closed form, and the check that they agree.

    python orpo.py      # gradient check, printed as a table; exit status 1 if any row is not as it should be

Hong, Lee & Thorne, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691. For
a prompt x, a chosen response y_w and a rejected response y_l; equation numbers are the paper's:

    log P(y|x) = 1/|y| sum_t log p(y_t | x, y_<t)                   (3)   mean over the response's tokens
    odds(y|x)  = P / (1 - P)                                        (4)
    L          = L_SFT + lambda L_OR                                (6)   lambda: `beta` here and in TRL
    L_OR       = -log sigmoid(log odds(y_w|x) - log odds(y_l|x))    (7)
    dL_OR      = delta h                                            (8)
    delta      = 1 / (1 + odds_w / odds_l)                          (9)
    h          = d log P_l / (1 - P_l) - d log P_w / (1 - P_w)     (10)   printed with the other sign

L_SFT is the mean of -log p over the tokens of prompt and chosen response, as in the authors' code, or over
those of the chosen response alone, as in the paper (data.pack's prompt_loss decides).
"""
import sys

import torch
import torch.nn.functional as F

from data import CHOSEN, PARTS, PREFIX, REJECTED, pack

# The smallest 1 - P that log_odds computes with. It matters at P = 1 alone, since a mean of fp32
# log-probabilities is 0 or below about -1e-11. dL_OR / d log P_l grows as 1 / (1 - P_l): at P_l = 1 it is
# 1e30 and not infinite. dL_OR / d log P_w needs no limit: at P_w = 1 it is -odds_l.
SMALLEST = 1e-30


def log_odds(logps):
    """log(P / (1 - P)), Eq. 4, of mean log-probabilities (any shape, <= 0), in fp32 (float64 stays float64).

    Value and gradient, 1 / (1 - P), are finite for every log P up to and including 0. expm1 keeps 1 - P exact
    near P = 1, where 1 - exp(x) and log1p(-exp(x)) would round it to 0.
    """
    x = logps.to(torch.promote_types(logps.dtype, torch.float32))
    # The value is clamped below 0, but the gradient passes as if it were not: clamp alone would set it to 0.
    x = x + (x.clamp(max=-SMALLEST) - x).detach()
    return x - torch.log(-torch.expm1(x))


def odds_ratio_loss(chosen_logps, rejected_logps):
    """L_OR of each pair, Eq. 7, from mean log-probabilities, Eq. 3: (N,), (N,) -> (N,)."""
    return -F.logsigmoid(log_odds(chosen_logps) - log_odds(rejected_logps))


def part_sums(logps, batch):
    """(T,) log-probabilities -> (N, PARTS): their sums over prompt (0 where it is not scored), chosen and
    rejected response of each pair. batch.owner (T,), PARTS * pair + part, says where each belongs."""
    zeros = logps.new_zeros(batch.counts.numel())
    return zeros.index_add(0, batch.owner, logps).view_as(batch.counts)


def orpo_loss(logps, batch, beta, tokens=None, pairs=None):
    """What one pack adds to the loss of a step, Eq. 6, and to its metrics.

    logps (T,): log-probability of each target.  batch: data.Batch.  tokens, pairs: how many tokens L_SFT
    averages over, and how many pairs L_OR, in all packs of the step on all ranks (default: in this pack). So
    the loss of a step is the plain sum of its packs' losses, wherever they are computed. Returns the loss, a
    scalar, and {name: scalar} of metrics, which add up in the same way; names and meanings are TRL's.
    """
    if tokens is None:
        tokens = batch.counts[:, [PREFIX, CHOSEN]].sum()
    if pairs is None:
        pairs = len(batch.counts)
    sums = part_sums(logps, batch)  # (N, PARTS)
    chosen = sums[:, CHOSEN] / batch.counts[:, CHOSEN]  # (N,) log P(y_w|x), Eq. 3
    rejected = sums[:, REJECTED] / batch.counts[:, REJECTED]  # (N,) log P(y_l|x), Eq. 3
    nll = -(sums[:, PREFIX] + sums[:, CHOSEN]).sum() / tokens  # L_SFT
    preference = odds_ratio_loss(chosen, rejected)  # (N,) L_OR, Eq. 7
    loss = nll + beta * preference.sum() / pairs  # Eq. 6

    with torch.no_grad():
        per_pair = {  # (N,) each
            "log_odds_ratio": -preference,  # TRL's name for log sigmoid(log OR)
            "log_odds_chosen": log_odds(chosen) - log_odds(rejected),  # log OR
            "rewards/chosen": beta * chosen,
            "rewards/rejected": beta * rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": beta * (chosen - rejected),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        metrics = {"loss": loss.detach(), "nll_loss": nll.detach()}
        for name, values in per_pair.items():
            metrics[name] = values.sum() / pairs
    return loss, metrics


def closed_form(chosen_logps, rejected_logps):
    """dL_OR / d log P_w and dL_OR / d log P_l of each pair by Eqs. 8 to 10, float64: (N,), (N,) -> both."""
    chosen, rejected = chosen_logps.double(), rejected_logps.double()
    odds_ratio = (log_odds(chosen) - log_odds(rejected)).exp()  # odds_w / odds_l
    delta = 1 / (1 + odds_ratio)  # Eq. 9
    not_chosen = -torch.expm1(chosen.clamp(max=-SMALLEST))  # 1 - P_w
    not_rejected = -torch.expm1(rejected.clamp(max=-SMALLEST))  # 1 - P_l
    return -delta / not_chosen, delta / not_rejected  # Eq. 10: the factors of d log P_w and d log P_l


# -----------------------------------------------------------------------------------------------------------
# The check: autograd, finite differences and the closed form have to say the same.

CHECKED_PAIRS = [  # (log P_w, log P_l)
    (-1.0, -1.0), (-0.5, -2.0), (-2.0, -0.5),  # as in training
    (-1e4, -1e4), (-1e4, -1.0), (-1.0, -1e4),  # nearly impossible
    (-1e-4, -1.0), (-1e-8, -0.1), (-1.0, -1e-8),  # nearly certain
    (-1e-10, -1e-9), (-1e-20, -2.0),
    (0.0, -1.0), (-1.0, 0.0), (0.0, 0.0),  # certain
]


def gap(a, b):
    """Relative difference of two vectors or numbers."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def check_pair(chosen, rejected):
    """One pair of mean log-probabilities -> L_OR, its two derivatives by fp32 autograd, and the largest gaps
    to the closed form: of these, and of finite differences in float64 (left out for a log P of 0, which has
    no room above it)."""
    x = torch.tensor([chosen, rejected], requires_grad=True)
    loss = odds_ratio_loss(x[0], x[1])
    loss.backward()
    exact = x.detach().double()
    closed = closed_form(exact[0], exact[1])
    autograd_gap = difference_gap = 0.0
    for i in range(2):
        autograd_gap = max(autograd_gap, gap(x.grad[i].double(), closed[i]))
        if exact[i] < 0:
            step = torch.zeros(2, dtype=torch.float64)
            step[i] = 1e-4 * exact[i].abs().clamp(max=1)
            above = odds_ratio_loss(*(exact + step))
            below = odds_ratio_loss(*(exact - step))
            difference_gap = max(difference_gap, gap((above - below) / (2 * step[i]), closed[i]))
    return loss.item(), x.grad.tolist(), autograd_gap, difference_gap


def small_decoder():
    """A decoder of two layers in float64, and a batch of three pairs."""
    from model import Config, Transformer

    config = Config.from_hf(dict(
        model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    model = Transformer(config).initialise(seed=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # larger than at initialisation, so that responses differ in probability
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    ids = torch.randint(40, (13,), generator=generator).tolist()
    first = (ids[:5], ids[5:9], ids[7:])  # prompt, chosen, rejected
    second = (ids[:1], ids[1:2], ids[4:7])
    third = (ids[6:], ids[:2], ids[2:3])
    return model, pack([first, second, third])


def check_decoder(beta=0.3):
    """Gradients over all parameters of a small decoder: rows of (what is compared with autograd, the gap, the
    tolerance, whether the gap has to be below it)."""
    model, batch = small_decoder()
    parameters = list(model.parameters())

    def gradient(scalar):
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, parameters, retain_graph=True)])

    @torch.no_grad()
    def loss_at(weights):
        torch.nn.utils.vector_to_parameters(weights, parameters)
        return orpo_loss(model(batch), batch, beta)[0]

    logps = model(batch)
    sums = part_sums(logps, batch)
    chosen = sums[:, CHOSEN] / batch.counts[:, CHOSEN]
    rejected = sums[:, REJECTED] / batch.counts[:, REJECTED]
    trained = gradient(orpo_loss(logps, batch, beta)[0])  # the loss of train.py
    l_or = gradient(odds_ratio_loss(chosen, rejected).mean())
    sft = gradient(-logps[batch.owner % PARTS != REJECTED].mean())
    d_chosen, d_rejected = closed_form(chosen.detach(), rejected.detach())
    delta_h = gradient((d_chosen * chosen + d_rejected * rejected).mean())
    odds_ratio = (log_odds(chosen) - log_odds(rejected)).detach().exp()
    # 1 / (1 + odds_l / odds_w) is the right delta times odds_w / odds_l
    upside_down = gradient((odds_ratio * (d_chosen * chosen + d_rejected * rejected)).mean())

    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(2), dtype=start.dtype)
    above = loss_at(start + 1e-6 * direction)
    below = loss_at(start - 1e-6 * direction)
    slope = (above - below) / 2e-6
    return [
        ("L_OR: closed form, Eqs. 8 to 10", gap(delta_h, l_or), 1e-9, True),
        ("L_OR: delta upside down (odds_l / odds_w)", gap(upside_down, l_or), 1e-9, False),
        ("L_OR: h as the paper prints it", gap(-delta_h, l_or), 1e-9, False),
        ("orpo_loss: L_SFT + beta L_OR, closed form", gap(sft + beta * delta_h, trained), 1e-9, True),
        ("orpo_loss: differences, random direction", gap(slope, trained @ direction), 1e-5, True),
    ]


def main():
    """Print the checks as tables; 1 if anything is not as it should be, else 0."""
    wrong = 0
    print("Gradient of L_OR by a pair's mean log-probabilities; relative gaps to the closed form, Eqs. 8-10")
    print(f"{'log P_w':>10} {'log P_l':>10} {'L_OR':>13} {'dL/dlogP_w':>13} {'dL/dlogP_l':>13} "
          f"{'autograd gap':>13} {'differences':>13}")
    for chosen, rejected in CHECKED_PAIRS:
        loss, slopes, autograd_gap, difference_gap = check_pair(chosen, rejected)
        finite = torch.tensor([loss, *slopes]).isfinite().all()
        good = finite and max(autograd_gap, difference_gap) < 1e-4
        wrong += not good
        print(f"{chosen:10.3g} {rejected:10.3g} {loss:13.6g} {slopes[0]:13.6g} {slopes[1]:13.6g} "
              f"{autograd_gap:13.1e} {difference_gap:13.1e} {'ok' if good else 'DISAGREES'}")
    print("\nThrough a small decoder, float64, three pairs in a pack, all parameters: relative gaps")
    for name, found, tolerance, should_agree in check_decoder():
        agrees = found < tolerance
        wrong += agrees != should_agree
        verdict = "agrees" if agrees else "disagrees"
        must = "must" if agrees == should_agree else "MUST NOT"
        print(f"{name:42} {found:8.1e}   {verdict}, as it {must}")
    print(f"\n{wrong} rows are not as they should be." if wrong else "\nAll as it should be.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
