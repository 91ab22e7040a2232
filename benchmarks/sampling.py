"""Draws, quantiles, scores and conditionals: how many times as long does what one would write instead take?

python benchmarks/sampling.py
"""

import argparse
from functools import partial

import torch
from timing import DEVICE, SMOKE, machine, race, ratio, shown, threads_of, write
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from pyro_mdn import DiagonalCovariance, FullCovariance, GaussianMixture, scores

N, K, D = 1000, 5, 3


def diagonal(rows, dim):
    generator = torch.Generator().manual_seed(0)
    logits, locs = torch.randn(rows, K, generator=generator), 2 * torch.randn(rows, K, dim, generator=generator)
    scale = torch.rand(rows, K, dim, generator=generator) + 0.2
    return logits.to(DEVICE), locs.to(DEVICE), scale.to(DEVICE)


def ours(rows, dim):
    logits, locs, scale = diagonal(rows, dim)
    return GaussianMixture(logits, locs, DiagonalCovariance(scale), validate_args=False)


def theirs(rows, dim):
    logits, locs, scale = diagonal(rows, dim)
    components = Independent(Normal(locs, scale, validate_args=False), 1, validate_args=False)
    return MixtureSameFamily(Categorical(logits=logits, validate_args=False), components, validate_args=False)


def bisected(rows):
    """Quantiles by bisection on the cdf, as precise as single precision is."""
    logits, locs, scale = diagonal(rows, 1)
    weights, normal = logits.softmax(-1), Normal(locs.squeeze(-1), scale.squeeze(-1), validate_args=False)
    q = torch.linspace(0.01, 0.99, rows, device=DEVICE)

    def run():
        low, high = torch.full((rows,), -50.0, device=DEVICE), torch.full((rows,), 50.0, device=DEVICE)
        for _ in range(40):
            middle = (low + high) / 2
            below = (weights * normal.cdf(middle.unsqueeze(-1))).sum(-1) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    return run


def energy_form(rows, draws=1000):
    """CRPS from draws: E|Y - y| - E|Y - Y'| / 2, with a standard error of some per cent."""
    mixture, y = theirs(rows, 1), torch.zeros(rows, 1, device=DEVICE)

    def run():
        first, second = mixture.sample((draws,)), mixture.sample((draws,))
        return (first - y).abs().mean(0) - 0.5 * (first - second).abs().mean(0)

    return run


def full(rows):
    logits, locs, _ = diagonal(rows, D)
    root = torch.randn(rows, K, D, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return logits, locs, root @ root.mT + torch.eye(D, device=DEVICE)


def condition_by_hand(rows):
    """The textbook's formulae on dense matrices."""
    logits, locs, matrix = full(rows)
    value = torch.zeros(rows, 1, device=DEVICE)

    def run():
        known, cross, rest = matrix[..., :1, :1], matrix[..., 1:, :1], matrix[..., 1:, 1:]
        residual = value.unsqueeze(-2) - locs[..., :1]
        gain = torch.linalg.solve(known, cross.mT).mT
        shift = (gain @ residual.unsqueeze(-1)).squeeze(-1)
        weights = logits + MultivariateNormal(locs[..., :1], known, validate_args=False).log_prob(value.unsqueeze(-2))
        components = MultivariateNormal(locs[..., 1:] + shift, rest - gain @ cross.mT, validate_args=False)
        return MixtureSameFamily(Categorical(logits=weights, validate_args=False), components, validate_args=False)

    return run


def condition(rows):
    logits, locs, matrix = full(rows)
    mixture = GaussianMixture(logits, locs, FullCovariance.from_matrix(matrix), validate_args=False)
    return lambda: mixture.condition(torch.zeros(rows, 1, device=DEVICE), [0])


def in_pyro(rows):
    from pyro.distributions import MixtureOfDiagNormals

    logits, locs, scale = diagonal(rows, D)
    return MixtureOfDiagNormals(locs, scale, logits)


def called(make, method, *arguments):
    """A builder of functions that call a method of a mixture, or a function on it."""

    def build(rows):
        mixture = make(rows)
        function = getattr(mixture, method) if isinstance(method, str) else partial(method, mixture)
        return lambda: function(*(a(rows) if callable(a) else a for a in arguments))

    return build


def levels(rows):
    return torch.linspace(0.01, 0.99, rows, device=DEVICE).unsqueeze(-1)


def zeros(rows):
    return torch.zeros(rows, 1, device=DEVICE)


QUESTIONS = {
    "sample (100 each): MixtureSameFamily": (
        called(partial(ours, dim=D), "sample", (100,)),
        called(partial(theirs, dim=D), "sample", (100,)),
    ),
    "rsample (10 each): MixtureOfDiagNormals of Pyro": (
        called(partial(ours, dim=D), "rsample", (10,)),
        called(in_pyro, "rsample", (10,)),
    ),
    "icdf: bisection on the cdf": (called(partial(ours, dim=1), "icdf", levels), bisected),
    "crps: energy form on 1000 draws": (called(partial(ours, dim=1), scores.crps, zeros), energy_form),
    "condition: the textbook's formulae on dense matrices": (condition, condition_by_hand),
}


def build_ours(question, rows):
    return QUESTIONS[question][0](rows)


def build_theirs(question, rows):
    return QUESTIONS[question][1](rows)


def measure(threads, *, smoke):
    settings = SMOKE if smoke else {"rounds": 15, "block": 0.1}
    cases = [(question, 10 if smoke else N) for question in ([*QUESTIONS][::3] if smoke else QUESTIONS)]
    races = race({"ours": build_ours, "theirs": build_theirs}, cases, threads, **settings)
    return [
        {"question": question, "threads": threads, "ratio": ratio(times, "theirs", "ours")}
        for (question, _), times in races.items()
    ]


def table(rows):
    """Markdown: how many times as long the other way takes."""
    lines = ["| function: the other way | threads | ratio |", "|---|---|---|"]
    lines += [f"| {row['question']} | {row['threads']} | {shown(row['ratio'])} |" for row in rows]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    threads_of(parser)
    parser.add_argument("--out", default="sampling", help="name of the results, or a path")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    rows = [row for threads in args.threads for row in measure(threads, smoke=args.smoke)]
    write(args.out, {"machine": machine(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
