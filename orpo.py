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
"""
import sys

import torch
import torch.nn.functional as F

# 1 - P is taken to be at least this. A mean of fp32 log-probabilities is 0 or below about -1e-11, so only P
# = 1 itself is moved. It bounds the gradient towards the rejected response, which truly grows as 1 / (1 -
# P_l), by 1e30; the gradient towards the chosen one stays right, odds_l / P_w at P_w = 1.
SMALLEST = 1e-30

# TRL's names and meanings
METRICS = ("loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected",
           "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def log_odds(logps):
    """log(P / (1 - P)), Eq. 4, of mean log-probabilities (any shape, <= 0), in fp32 (or float64, as given).

    Finite, with a finite gradient 1 / (1 - P), for every log P up to and including 0. One formula serves:
    expm1 keeps 1 - P exact near P = 1, where 1 - exp(x) or log1p(-exp(x)) would lose it, and far from 1 its
    error is below that of x.
    """
    x = logps.to(torch.promote_types(logps.dtype, torch.float32))
    x = x + (x.clamp(max=-SMALLEST) - x).detach()  # moves the value only: the gradient passes through
    return x - torch.log(-torch.expm1(x))


def odds_ratio_loss(chosen_logps, rejected_logps):
    """L_OR of each pair, Eq. 7, from the mean log-probabilities of its responses, Eq. 3: (pairs,), (pairs,)
    -> (pairs,)."""
    return -F.logsigmoid(log_odds(chosen_logps) - log_odds(rejected_logps))


def orpo_loss(logps, batch, beta, tokens=None, pairs=None):
    """What one pack adds to a step's loss, Eq. 6, and to its metrics: sums over the pack, divided by the
    counts of the step.

    logps (T,): log-probability of each target; batch: data.Batch.  tokens, pairs: targets that L_SFT
    averages over, and pairs, in all packs of the step on all ranks; by default the batch's own. So the
    step's loss is the plain sum of its packs' losses, wherever they were computed. Returns the loss, a
    scalar, and the metrics, (10,) detached, as METRICS.
    """
    tokens = batch.counts[:, :2].sum() if tokens is None else tokens
    pairs = len(batch.counts) if pairs is None else pairs
    sums = logps.new_zeros(batch.counts.numel()).index_add(0, batch.owner, logps)
    sums = sums.view(-1, 3)  # (N, 3): prompt, chosen, rejected; the prompt's is 0 where it is not scored
    chosen, rejected = (sums[:, 1:] / batch.counts[:, 1:]).unbind(1)  # Eq. 3, (N,) each
    nll = -(sums[:, 0] + sums[:, 1]).sum() / tokens  # L_SFT
    log_ratio = -odds_ratio_loss(chosen, rejected)  # (N,)
    loss = nll - beta * log_ratio.sum() / pairs  # Eq. 6
    with torch.no_grad():
        odds_gap, wins = log_odds(chosen) - log_odds(rejected), (chosen > rejected).to(chosen.dtype)
        rewards = [beta * chosen, beta * rejected, wins, beta * (chosen - rejected)]
        of_pairs = [log_ratio, odds_gap, *rewards, chosen, rejected]  # (N,) each
        return loss, torch.cat([torch.stack([loss, nll]), torch.stack(of_pairs).sum(1) / pairs])


def closed_form(chosen_logps, rejected_logps):
    """dL_OR / d log P_w and dL_OR / d log P_l of each pair by Eqs. 8 to 10, float64. (pairs,), (pairs,) ->
    the same twice."""
    x_w, x_l = chosen_logps.double(), rejected_logps.double()
    not_w, not_l = (-torch.expm1(x.clamp(max=-SMALLEST)) for x in (x_w, x_l))  # 1 - P
    odds_ratio = (log_odds(x_w) - log_odds(x_l)).exp()  # odds_w / odds_l
    delta = 1 / (1 + odds_ratio)  # Eq. 9
    return -delta / not_w, delta / not_l  # Eq. 10, the coefficients of d log P_w and d log P_l


# -----------------------------------------------------------------------------------------------------------
# The check: autograd, finite differences and the closed form have to say the same.

ORDINARY = [(-1.0, -1.0), (-0.5, -2.0), (-2.0, -0.5), (-0.7, -0.69)]  # (log P_w, log P_l)
EXTREME = [(-1e4, -1e4), (-1e4, -1.0), (-1.0, -1e4), (-50.0, -60.0), (-1e-4, -1.0), (-1e-8, -0.1),
           (-1.0, -1e-8), (-1e-10, -1e-9), (-1e-20, -2.0), (0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)]


def disagreement(a, b):
    """Relative difference of vectors or numbers, float64."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def check_pair(chosen, rejected):
    """One pair of mean log-probabilities -> L_OR, its two derivatives by fp32 autograd, and how far these,
    and float64 finite differences, are from the closed form (differences need room below 0: at 0 itself they
    are left out)."""
    x = torch.tensor([chosen, rejected], requires_grad=True)
    loss = odds_ratio_loss(x[0], x[1])
    auto, = torch.autograd.grad(loss, x)
    exact = x.detach().double()
    closed = torch.stack(closed_form(*exact))
    slopes = closed.clone()
    for i, value in enumerate(exact):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-4 * min(abs(value), 1.0)
        if value < 0:
            slopes[i] = (odds_ratio_loss(*(exact + step)) - odds_ratio_loss(*(exact - step))) / (2 * step[i])
    gaps = [max(map(disagreement, way, closed)) for way in (auto.double(), slopes)]
    return loss.item(), auto.tolist(), gaps


def check_decoder():
    """A small decoder in float64 on a packed batch, the gradient of the summed L_OR over all its parameters:
    how far the closed form, two wrong ones in circulation, and finite differences along a random direction
    are from autograd, by name."""
    from data import pack
    from model import Config, Transformer

    shape = dict(model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2)
    model = Transformer(Config.from_hf(shape)).initialise(seed=1).double()
    generator = torch.Generator().manual_seed(0)
    parameters = list(model.parameters())
    with torch.no_grad():
        for p in parameters:  # larger than at initialisation, so that responses differ in probability
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    ids = torch.randint(40, (13,), generator=generator).tolist()
    batch = pack([(ids[:5], ids[5:9], ids[7:]), (ids[:1], ids[1:2], ids[4:7]), (ids[6:], ids[:2], ids[2:3])])

    def responses():
        sums = torch.zeros(9, dtype=torch.float64).index_add(0, batch.owner, model(batch)).view(3, 3)
        return (sums[:, 1:] / batch.counts[:, 1:]).unbind(1)

    def gradient(scalar):
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, parameters, retain_graph=True)])

    @torch.no_grad()
    def moved_by(step):
        torch.nn.utils.vector_to_parameters(start + step * direction, parameters)
        return odds_ratio_loss(*responses()).sum()

    chosen, rejected = responses()
    auto = gradient(odds_ratio_loss(chosen, rejected).sum())
    d_chosen, d_rejected = closed_form(chosen.detach(), rejected.detach())
    ratio = (log_odds(chosen) - log_odds(rejected)).detach().exp()  # 1 / (1 + 1/r) = r / (1 + r)
    forms = {"closed form, Eqs. 8 to 10": 1, "delta upside down (odds_l / odds_w)": ratio,
             "h as the paper prints it": -1}
    found = {}
    for name, factor in forms.items():
        delta_h = gradient((factor * (d_chosen * chosen + d_rejected * rejected)).sum())  # summed over pairs
        found[name] = disagreement(delta_h, auto)
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    direction = torch.randn(auto.shape, generator=generator, dtype=torch.float64)
    slope = (moved_by(1e-6) - moved_by(-1e-6)) / 2e-6
    return found | {"finite differences, random direction": disagreement(slope, auto @ direction)}


def ratio_spread(count=50_000):
    """Standard deviations of 0.2 log PR, log PR and log OR over pairs of uniform probabilities: the paper's
    Figure 6."""
    logps = torch.rand(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    log_pr, log_or = logps[0] - logps[1], log_odds(logps[0]) - log_odds(logps[1])
    return [float(x.std()) for x in (0.2 * log_pr, log_pr, log_or)]


def main():
    """Print the checks as tables; 1 if anything is not as it should be, else 0."""
    wrong = 0
    print("Gradient of L_OR by a pair's mean log-probabilities; relative gaps to the closed form, Eqs. 8-10")
    names = "log P_w", "log P_l", "L_OR", "dL/dlogP_w", "dL/dlogP_l", "autograd gap", "differences"
    print(("{:>10} " * 2 + "{:>13} " * 5).format(*names))
    for chosen, rejected in ORDINARY + EXTREME:
        loss, derivatives, gaps = check_pair(chosen, rejected)
        good = max(gaps) < 1e-4 and torch.tensor([loss, *derivatives]).isfinite().all()
        wrong += not good
        numbers = chosen, rejected, loss, *derivatives, *gaps
        row = ("{:10.3g} " * 2 + "{:13.6g} " * 3 + "{:13.1e} " * 2).format(*numbers)
        print(row, "ok" if good else "DISAGREES")
    print("\nThrough a small decoder, float64, three pairs in a pack, all parameters: relative gaps")
    for name, gap in check_decoder().items():
        agrees = gap < (1e-5 if "differences" in name else 1e-9)
        good = agrees == ("Eqs." in name or "differences" in name)
        wrong += not good
        verdict = "agrees" if agrees else "disagrees"
        print(f"{name:40} {gap:8.1e}   {verdict}, as it {'must' if good else 'MUST NOT'}")
    print("\nStandard deviations over 50,000 uniform pairs (the paper's Figure 6): "
          "0.2 log PR {:.2f}, log PR {:.2f}, log OR {:.2f}".format(*ratio_spread()))
    print(f"\n{wrong} rows are not as they should be." if wrong else "\nAll as it should be.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
