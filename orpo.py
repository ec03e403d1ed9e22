"""ORPO: the loss, its metrics, its gradient in closed form, and the check that they agree.

    python orpo.py      # gradient check, printed as a table; exit status 1 if any row is not as it should be

Hong, Lee & Thorne, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691. For a prompt x, a
chosen response y_w and a rejected response y_l; equation numbers are the paper's:

    log P(y|x) = 1/|y| sum_t log p(y_t | x, y_<t)                            (3)   mean over the response's tokens
    odds(y|x)  = P / (1 - P)                                                 (4)
    L          = L_SFT + lambda L_OR                                         (6)   lambda: `beta` here and in TRL
    L_OR       = -log sigmoid(log odds(y_w|x) - log odds(y_l|x))             (7)
    dL_OR      = delta h                                                     (8)
    delta      = 1 / (1 + odds_w / odds_l)                                   (9)
    h          = d log P_l / (1 - P_l) - d log P_w / (1 - P_w)              (10)   printed with the other sign in the paper
"""
import sys

import torch
import torch.nn.functional as F

# 1 - P is taken to be at least this. A mean of fp32 log-probabilities is 0 or below about -1e-11, so only P = 1 itself is moved.
# It bounds the gradient towards the rejected response, which truly grows as 1 / (1 - P_l), by 1e30; the gradient towards the
# chosen one stays right, odds_l / P_w at P_w = 1.
SMALLEST = 1e-30

METRICS = ("loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected",
           "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")  # TRL's names and meanings


def log_odds(logps):
    """log(P / (1 - P)), Eq. 4, of mean log-probabilities (any shape, <= 0), in fp32 (or float64, as given).

    Finite, with a finite gradient 1 / (1 - P), for every log P up to and including 0. One formula serves: expm1 keeps 1 - P exact
    near P = 1, where 1 - exp(x) or log1p(-exp(x)) would lose it, and far from 1 its error is below that of x.
    """
    x = logps.to(torch.promote_types(logps.dtype, torch.float32))
    x = x + (x.clamp(max=-SMALLEST) - x).detach()  # the clamp moves the value only: the gradient passes through
    return x - torch.log(-torch.expm1(x))


def odds_ratio_loss(chosen_logps, rejected_logps):
    """L_OR of each pair, Eq. 7, from the mean log-probabilities of its responses, Eq. 3: (pairs,), (pairs,) -> (pairs,)."""
    return -F.logsigmoid(log_odds(chosen_logps) - log_odds(rejected_logps))


def orpo_loss(logps, batch, beta, tokens, pairs):
    """What one pack adds to a step's loss, Eq. 6, and to its metrics: sums over the pack, divided by the counts of the whole step.

    logps (T,): log-probability of each target; batch: data.Batch.  tokens, pairs: targets that L_SFT averages over, and pairs, in
    all packs of the step on all ranks. So the step's loss is the plain sum of its packs' losses, wherever they were computed.
    Returns the loss, a scalar, and the metrics, (10,) detached, in the order of METRICS.
    """
    sums = logps.new_zeros(batch.counts.numel()).index_add(0, batch.owner, logps).view(-1, 3)  # (N, 3): prompt, chosen, rejected
    chosen, rejected = (sums[:, 1:] / batch.counts[:, 1:]).unbind(1)  # Eq. 3, (N,) each
    nll = -(sums[:, 0] + sums[:, 1]).sum() / tokens  # L_SFT; the prompt's sum is 0 where it is not scored
    log_ratio = -odds_ratio_loss(chosen, rejected)  # (N,)
    loss = nll - beta * log_ratio.sum() / pairs  # Eq. 6
    with torch.no_grad():
        odds_gap = log_odds(chosen) - log_odds(rejected)
        wins = (chosen > rejected).to(chosen.dtype)
        of_pairs = [log_ratio, odds_gap, beta * chosen, beta * rejected, wins, beta * (chosen - rejected), chosen, rejected]  # (N,) each
        return loss, torch.cat([torch.stack([loss, nll]), torch.stack(of_pairs).sum(1) / pairs])


def closed_form(chosen_logps, rejected_logps):
    """dL_OR / d log P_w and dL_OR / d log P_l of each pair by Eqs. 8 to 10, in float64. (pairs,), (pairs,) -> the same twice."""
    x_w, x_l = chosen_logps.double(), rejected_logps.double()
    not_w, not_l = (-torch.expm1(x.clamp(max=-SMALLEST)) for x in (x_w, x_l))  # 1 - P
    odds_ratio = (log_odds(x_w) - log_odds(x_l)).exp()  # odds_w / odds_l
    delta = 1 / (1 + odds_ratio)  # Eq. 9
    return -delta / not_w, delta / not_l  # Eq. 10, the coefficients of d log P_w and d log P_l


# ---------------------------------------------------------------------------------------------------------------------
# The check: autograd, finite differences and the closed form have to say the same.


def finite_differences(f, x, step):
    """Central differences of f at x, float64."""
    return (f(x + step) - f(x - step)) / (2 * step)


def check_pair(chosen, rejected):
    """One pair of mean log-probabilities: largest relative disagreement of fp32 autograd and of float64 finite differences with
    the closed form, over both arguments (differences need room below 0: at 0 itself they are left out)."""
    xs = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (chosen, rejected)]
    loss = odds_ratio_loss(*xs)
    auto = torch.autograd.grad(loss, xs)
    exact = [x.detach().double() for x in xs]
    closed = closed_form(*exact)
    gap = lambda a, b: float(abs(a - b) / max(abs(b), 1e-30))
    auto_gap = max(gap(a.double(), c) for a, c in zip(auto, closed))
    difference_gap = 0.0
    for i in range(2):
        if exact[i] == 0:
            continue
        f = lambda x: odds_ratio_loss(*(x if j == i else exact[j] for j in range(2)))
        slope = finite_differences(f, exact[i], 1e-4 * min(abs(exact[i]), torch.tensor(1.0)))
        difference_gap = max(difference_gap, gap(slope, closed[i]))
    return float(loss.detach()) + 0.0, [float(g) + 0.0 for g in auto], auto_gap, difference_gap  # + 0.0: no "-0" in the table


def check_decoder(flip_delta=False, flip_sign=False):
    """A small decoder in float64 on a packed batch: the gradient of the summed L_OR over all its parameters, three ways.
    Returns the relative disagreement of the closed form, and of differences along a random direction, with autograd."""
    from data import pack
    from model import Config, Transformer

    shape = dict(model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = Transformer(Config.from_hf(shape | {"num_key_value_heads": 2})).initialise(seed=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that responses differ in probability
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    ids = lambda n: torch.randint(40, (n,), generator=generator).tolist()
    batch = pack([(ids(p), ids(c), ids(r)) for p, c, r in ((5, 4, 6), (1, 1, 3), (7, 2, 1))])
    parameters = list(model.parameters())

    def responses():
        sums = torch.zeros(9, dtype=torch.float64).index_add(0, batch.owner, model(batch)).view(3, 3)
        return (sums[:, 1:] / batch.counts[:, 1:]).unbind(1)

    flat = lambda gradients: torch.cat([g.flatten() for g in gradients])
    chosen, rejected = responses()
    auto = flat(torch.autograd.grad(odds_ratio_loss(chosen, rejected).sum(), parameters, retain_graph=True))
    d_chosen, d_rejected = closed_form(chosen.detach(), rejected.detach())
    if flip_delta:  # odds_l / odds_w instead of odds_w / odds_l
        ratio = (log_odds(chosen) - log_odds(rejected)).detach().exp()
        d_chosen, d_rejected = d_chosen * ratio, d_rejected * ratio  # 1 / (1 + 1/r) = r / (1 + r)
    if flip_sign:
        d_chosen, d_rejected = -d_chosen, -d_rejected
    closed = flat(torch.autograd.grad((d_chosen * chosen + d_rejected * rejected).sum(), parameters))  # delta h, summed over pairs
    direction = torch.randn(auto.shape, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def along(step):
        start = torch.nn.utils.parameters_to_vector(parameters)
        torch.nn.utils.vector_to_parameters(start + step * direction, parameters)
        value = odds_ratio_loss(*responses()).sum()
        torch.nn.utils.vector_to_parameters(start, parameters)
        return value

    slope = finite_differences(along, torch.tensor(0.0, dtype=torch.float64), 1e-6)
    return float((closed - auto).norm() / auto.norm()), float(abs(slope - auto @ direction) / abs(auto @ direction))


def ratio_spread(count=50_000):
    """Standard deviations of 0.2 log PR, log PR and log OR over pairs of uniform probabilities: the paper's Figure 6."""
    p = torch.rand(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_pr = p[0].log() - p[1].log()
    log_or = log_odds(p[0].log()) - log_odds(p[1].log())
    return [float(x.std()) for x in (0.2 * log_pr, log_pr, log_or)]


def main():
    bad = 0
    print("Gradient of L_OR by one pair's mean log-probabilities. Relative disagreement with the closed form, Eqs. 8 to 10")
    print(f"{'log P_w':>10} {'log P_l':>10} {'L_OR':>12} {'dL/dlogP_w':>13} {'dL/dlogP_l':>13} {'autograd fp32':>14} {'differences':>12}")
    ordinary = [(-1.0, -1.0), (-0.5, -2.0), (-2.0, -0.5), (-0.7, -0.69)]
    extreme = [(-1e4, -1e4), (-1e4, -1.0), (-1.0, -1e4), (-50.0, -60.0), (-1e-4, -1.0), (-1e-8, -0.1), (-1.0, -1e-8),
               (-1e-10, -1e-9), (-1e-20, -2.0), (0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)]
    for chosen, rejected in ordinary + extreme:
        loss, (gw, gl), auto, difference = check_pair(chosen, rejected)
        good = auto < 1e-4 and difference < 1e-4 and all(map(torch.isfinite, torch.tensor([loss, gw, gl])))
        bad += not good
        print(f"{chosen:10.3g} {rejected:10.3g} {loss:12.6g} {gw:13.6g} {gl:13.6g} {auto:14.1e} {difference:12.1e}  {'ok' if good else 'DISAGREES'}")
    print("\nThrough a small decoder in float64, three pairs in one pack, all parameters: relative disagreement with autograd")
    cases = [("closed form, Eqs. 8 to 10", {}, True), ("delta upside down (a public write-up)", {"flip_delta": True}, False),
             ("h as the paper prints it (Eq. 10)", {"flip_sign": True}, False)]
    for name, flips, should_agree in cases:
        closed, slope = check_decoder(**flips)
        good = (closed < 1e-9) == should_agree and slope < 1e-5
        bad += not good
        print(f"{name:40} {closed:10.1e}   {'agrees' if closed < 1e-9 else 'disagrees'}, as it {'must' if good else 'MUST NOT'}")
    print(f"{'finite differences, random direction':40} {slope:10.1e}")
    print("\nStandard deviations over 50,000 uniform pairs: 0.2 log PR {:.2f}, log PR {:.2f}, log OR {:.2f} (the paper's Figure 6)"
          .format(*ratio_spread()))
    print(f"\n{'All as it should be.' if not bad else f'{bad} rows are not as they should be.'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
