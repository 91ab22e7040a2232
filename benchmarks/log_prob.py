"""How long do log-density of a mixture and its gradients take, from raw channels? Ratios are rival over this package.

Everybody gets the same raw numbers, in the memory layout that is natural to them, constrains them, builds the mixture
(unvalidated), and differentiates the sum of the log-density with respect to the raw numbers. The bound is the larger
of two times: that of moving the raw numbers in and their gradients out at the measured rate of a copy, and that of
the exponentials and logarithms that cannot be avoided at their measured rate. On a GPU it is the first alone, at the
rate of its memory.

    python benchmarks/log_prob.py            # rivals that are not installed are left out
"""

import argparse
import time

import torch
from timing import DEVICE, GPU, events, machine, race, ratio, shown, threads_of, write
from torch import nn
from torch.nn.functional import softplus

DIAGONAL = [(256, 5, 1), (1024, 10, 2), (4096, 20, 8), (65536, 5, 1)]
FULL = [(256, 5, 2), (1024, 10, 4), (2048, 10, 8), (1024, 10, 16), (1024, 5, 32)]
LOW_RANK = [(1024, 5, 32), (256, 5, 128)]
LINEAR = [(2048, 10, 8), (1024, 10, 16)]
RANK, WIDTH, MIN_SCALE = 2, 64, 1e-3


def noise_of(kind):
    from pyro_mdn import Diagonal, Full, LowRank

    kind = kind.removesuffix(" + linear")
    return {"diagonal": Diagonal(min_scale=MIN_SCALE), "full": Full(min_scale=MIN_SCALE), "low rank": LowRank(RANK)}[
        kind
    ]


def width_of(kind, d):
    return {"diagonal": d, "full": d * (d + 1) // 2, "low rank": d * (RANK + 1)}[kind.removesuffix(" + linear")]


def raw(kind, n, k, d, *, channels_first):
    """Leaves: logits, locations and factors; targets."""
    shapes = [(k,), (k, d), (k, width_of(kind, d))]
    leaves = [
        0.3 * torch.randn(*(reversed(s) if channels_first else ()), n, *(() if channels_first else s)) for s in shapes
    ]
    return [leaf.to(DEVICE).requires_grad_() for leaf in leaves], torch.randn(n, d, device=DEVICE)


def gradient(density, leaves):
    return lambda: torch.autograd.grad(-density().sum(), leaves)


# This package


def ours(kind, n, k, d):
    """``GaussianMixture(...).log_prob``."""
    from pyro_mdn import GaussianMixture

    if kind.endswith("linear"):
        return head(kind, n, k, d)
    (logits, locs, factor), y = raw(kind, n, k, d, channels_first=True)
    noise, unit = noise_of(kind), torch.ones(d, device=DEVICE)

    def density():
        covariance = noise.build(factor.permute(2, 1, 0), d, unit)
        return GaussianMixture(logits.mT, locs.permute(2, 1, 0), covariance, validate_args=False).log_prob(y)

    return gradient(density, [logits, locs, factor])


def kernel(kind, n, k, d):
    """What ``network.loss`` and ``fit`` go through."""
    from pyro_mdn import layer

    if kind.endswith("linear"):
        raise NotImplementedError
    whitening = noise_of(kind).whitening
    channels = 0.3 * torch.randn(k * (1 + d + width_of(kind, d)), n, device=DEVICE)
    y = torch.randn(n, d, device=DEVICE)
    channels.requires_grad_()
    return gradient(lambda: layer.channel_log_density(whitening, k, width_of(kind, d), channels, y), [channels])


def compiled(kind, n, k, d):
    """The same, compiled."""
    from pyro_mdn import layer

    if kind.endswith("linear"):
        raise NotImplementedError
    whitening, width = noise_of(kind).whitening, width_of(kind, d)
    channels = (0.3 * torch.randn(k * (1 + d + width), n, device=DEVICE)).requires_grad_()
    y = torch.randn(n, d, device=DEVICE)
    density = torch.compile(lambda c: layer.channel_log_density(whitening, k, width, c, y), fullgraph=True)
    return gradient(lambda: density(channels), [channels])


def head(kind, n, k, d):
    from pyro_mdn import MixtureHead

    layer = MixtureHead(WIDTH, d, k, noise=noise_of(kind)).to(DEVICE)
    features = torch.randn(n, WIDTH, device=DEVICE, requires_grad=True)
    y = torch.randn(n, d, device=DEVICE)
    return gradient(lambda: layer.log_prob(features, y), [*layer.parameters(), features])


# Others


def components(kind, module, locs, factor):
    """Component distributions from torch or Pyro."""
    d = locs.shape[-1]
    kind = kind.removesuffix(" + linear")
    if kind == "diagonal":
        return module.Independent(
            module.Normal(locs, softplus(factor) + MIN_SCALE, validate_args=False), 1, validate_args=False
        )
    if kind == "low rank":
        variance, loadings = (softplus(factor[..., :d]) + MIN_SCALE).square(), factor[..., d:].unflatten(-1, (d, RANK))
        return module.LowRankMultivariateNormal(locs, loadings, variance, validate_args=False)
    rows, columns = torch.tril_indices(d, d, device=factor.device)
    positive = torch.where(rows == columns, softplus(factor) + MIN_SCALE, factor)
    tril = factor.new_zeros(*locs.shape, d)
    tril[..., rows, columns] = positive
    return module.MultivariateNormal(locs, scale_tril=tril, validate_args=False)


def same_family(module, kind, n, k, d):
    if kind.endswith("linear"):
        layer = nn.Linear(WIDTH, k * (1 + d + width_of(kind, d))).to(DEVICE)
        features = torch.randn(n, WIDTH, device=DEVICE, requires_grad=True)
        y, leaves = torch.randn(n, d, device=DEVICE), [*layer.parameters(), features]

        def parts():
            logits, locs, factor = layer(features).split([k, k * d, k * width_of(kind, d)], -1)
            return logits, locs.unflatten(-1, (k, d)), factor.unflatten(-1, (k, -1))
    else:
        leaves, y = raw(kind, n, k, d, channels_first=False)

        def parts():
            return leaves

    def density():
        logits, locs, factor = parts()
        weights = module.Categorical(logits=logits, validate_args=False)
        mixture = module.MixtureSameFamily(weights, components(kind, module, locs, factor), validate_args=False)
        return mixture.log_prob(y)

    return gradient(density, leaves)


def in_torch(*case):
    return same_family(torch.distributions, *case)


def in_pyro(*case):
    import pyro.distributions

    return same_family(pyro.distributions, *case)


def pyro_diagonal(kind, n, k, d):
    from pyro.distributions import MixtureOfDiagNormals

    if kind != "diagonal" or d == 1:
        raise NotImplementedError
    (logits, locs, factor), y = raw(kind, n, k, d, channels_first=False)
    return gradient(
        lambda: MixtureOfDiagNormals(locs, softplus(factor) + MIN_SCALE, logits).log_prob(y), [logits, locs, factor]
    )


class Given(nn.Module):
    """Stands where a layer would be, and gives the same numbers whatever comes."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _):
        """Give them."""
        return self.value


def in_zuko(kind, n, k, d):
    from zuko.mixtures import GMM

    if kind not in ("diagonal", "full"):
        raise NotImplementedError
    channels = (0.3 * torch.randn(n, k * (1 + d + width_of(kind, d)), device=DEVICE)).requires_grad_()
    y, model = torch.randn(n, d, device=DEVICE), GMM(d, 1, k, kind)
    model.hyper = Given(channels)
    return gradient(lambda: model(y).log_prob(y), [channels])


def in_sbi(kind, n, k, d):
    from sbi.neural_nets.estimators.mixture_density_estimator import MultivariateGaussianMDN

    if kind.endswith("linear") or kind == "low rank" or (kind == "diagonal" and d > 1):
        raise NotImplementedError  # its covariances are full
    model = MultivariateGaussianMDN(d, 1, 1, k)
    shapes = {"logits": k, "means": k * d, "unconstrained_diagonal": k * d, "upper": k * d * (d - 1) // 2}
    leaves = {name: (0.3 * torch.randn(n, w, device=DEVICE)).requires_grad_() for name, w in shapes.items() if w}
    for name, leaf in leaves.items():
        setattr(model, f"_{name}_layer", Given(leaf))
    context, y = torch.zeros(n, 1, device=DEVICE), torch.randn(n, d, device=DEVICE)
    return gradient(lambda: model(context).log_prob(y), list(leaves.values()))


OURS = {"kernel": kernel, "kernel, compiled": compiled, "GaussianMixture": ours}
RIVALS = {
    "torch MixtureSameFamily": in_torch,
    "Pyro MixtureSameFamily": in_pyro,
    "Pyro MixtureOfDiagNormals": pyro_diagonal,
    "zuko GMM": in_zuko,
    "sbi MoG": in_sbi,
}


def rate(function, count):
    """Things per second: the best of some tries."""
    return count / min(seconds(function) for _ in range(10))


def seconds(function):
    if GPU:
        return events(function, 10)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bound(kind, n, k, d):
    """Seconds that no way of doing it can be below."""
    channels = k * (1 + d + width_of(kind, d))
    source = torch.randn(max(channels * n, 2**27 if GPU else 2**20), device=DEVICE)
    target = torch.empty_like(source)
    copies = rate(lambda: target.copy_(source), 8 * source.numel())
    if GPU:
        return 2 * 4 * channels * n / copies
    exponentials = rate(lambda: torch.exp(source, out=target), source.numel())
    # A softplus (two) and its derivative for each scale; a logarithm of their product, and three for each weight.
    transcendental = n * k * (3 * d + 4)
    return max(2 * 4 * channels * n / copies, transcendental / exponentials)


def measure(threads, *, smoke):
    cases = [("diagonal", *case) for case in DIAGONAL] + [("full", *case) for case in FULL]
    cases += [("low rank", *case) for case in LOW_RANK] + [("full + linear", *case) for case in LINEAR]
    settings = {"rounds": 7, "block": 0.05, "restarts": 1 if GPU else 3}
    if smoke:
        cases, settings = [("diagonal", 8, 2, 1), ("full", 8, 2, 2)], {"rounds": 2, "block": 0}
    torch.set_num_threads(threads)
    builders = OURS | RIVALS
    if smoke:
        builders = {name: builders[name] for name in ("kernel", "GaussianMixture", "torch MixtureSameFamily")}
    results = []
    for case, times in race(builders, cases, threads, **settings).items():
        mine = "GaussianMixture" if case[0].endswith("linear") else "kernel"
        row = {
            "case": list(case),
            "threads": threads,
            "microseconds": {n: 1e6 * sorted(t)[len(t) // 2] for n, t in times.items()},
        }
        row["ratios"] = {name: ratio(times, name, mine) for name in times if name != mine}
        if not case[0].endswith("linear"):
            row["bound"] = 1e6 * bound(*case)
        results.append(row)
    return results


def table(rows):
    """Markdown: time of the kernel (of the head, where there is a linear layer), others over it, and over the bound."""
    columns = ["kernel, compiled", "GaussianMixture", *RIVALS]
    lines = [
        "| case (N, K, D) | threads | µs | " + " | ".join(columns) + " | over the bound |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for row in rows:
        mine = row["microseconds"].get("kernel", row["microseconds"].get("GaussianMixture"))
        cells = [shown(row["ratios"][c]) if c in row["ratios"] else "" for c in columns]
        over = mine / row["bound"] if "bound" in row else None
        over = "" if over is None else f"{over:.{int(over < 100)}f}"
        kind, *sizes = row["case"]
        lines.append(f"| {kind} {tuple(sizes)} | {row['threads']} | {mine:.0f} | " + " | ".join(cells) + f" | {over} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    threads_of(parser)
    parser.add_argument("--out", default="log_prob", help="name of the results, or a path")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    rows = [row for threads in args.threads for row in measure(threads, smoke=args.smoke)]
    write(args.out, {"machine": machine(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
