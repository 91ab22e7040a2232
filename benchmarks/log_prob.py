"""How long do log-density of a mixture and its gradients take? Ratios are rival over this package.

The first table starts from raw channels. Everybody gets the same raw numbers, in the memory layout that is natural to
them, constrains them, builds the mixture (unvalidated), and differentiates the sum of the log-density with respect to
the raw numbers. The bound is the larger of two times: that of moving the raw numbers in and their gradients out at the
measured rate of a copy, and that of the exponentials and logarithms that cannot be avoided at their measured rate. On a
GPU it is the first alone, at the rate of its memory.

The second starts from the features of a network, as a Pyro model does: a linear layer, the mixture and its log-density
(``network(x)`` as the likelihood), and the gradients of layer and features. Weights are random, or trained: everybody
takes the same steps of Adam, in its own parametrisation, on rows of real data. Outputs are physical measurements of
wines (and of pairs of wines, where there are more outputs than measurements), given the others.

    python benchmarks/log_prob.py                # rivals that are not installed are left out
    python benchmarks/log_prob.py --only linear  # the second table alone; what stands in the first one stays
"""

import argparse
import importlib
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import DEVICE, GPU, SMOKE, events, machine, race, ratio, read, shown, threads_of, write
from torch import nn
from torch.nn.functional import softplus

DIAGONAL = [(256, 5, 1), (1024, 10, 2), (4096, 20, 8), (65536, 5, 1)]
FULL = [(256, 5, 2), (1024, 10, 4), (2048, 10, 8), (1024, 10, 16), (1024, 5, 32)]
LOW_RANK = [(1024, 5, 32), (256, 5, 128)]
LINEAR = [(256, 5, 2), (256, 10, 8), (2048, 10, 8), (1024, 10, 16)]
RANK, WIDTH, MIN_SCALE = 2, 64, 1e-3
STEPS = {"random": 0, "trained": 300, "briefly trained": 3}  # the last for smoke runs


def noise_of(kind):
    from pyro_mdn import Diagonal, Full, LowRank

    return {"diagonal": Diagonal(min_scale=MIN_SCALE), "full": Full(min_scale=MIN_SCALE), "low rank": LowRank(RANK)}[
        kind
    ]


def width_of(kind, d):
    return {"diagonal": d, "full": d * (d + 1) // 2, "low rank": d * (RANK + 1)}[kind]


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

    (logits, locs, factor), y = raw(kind, n, k, d, channels_first=True)
    noise, unit = noise_of(kind), torch.ones(d, device=DEVICE)

    def density():
        covariance = noise.build(factor.permute(2, 1, 0), d, unit)
        return GaussianMixture(logits.mT, locs.permute(2, 1, 0), covariance, validate_args=False).log_prob(y)

    return gradient(density, [logits, locs, factor])


def of_channels(kind, n, k, d):
    """Log-density as a function of channels and points, and such channels."""
    from pyro_mdn import Normal
    from pyro_mdn.distributions.families.family import layout_of
    from pyro_mdn.tensors.channel_density import channel_log_density

    family = Normal(noise_of(kind))
    channels = 0.3 * torch.randn(k * (1 + d + width_of(kind, d)), n, device=DEVICE)
    return partial(channel_log_density, family.kernel, layout_of(family, d, k)), channels.requires_grad_()


def kernel(kind, n, k, d):
    """What ``network.loss`` and ``fit`` go through."""
    density, channels = of_channels(kind, n, k, d)
    y = torch.randn(n, d, device=DEVICE)
    return gradient(lambda: density(channels, y), [channels])


def compiled(kind, n, k, d):
    """The same, compiled."""
    density, channels = of_channels(kind, n, k, d)
    y = torch.randn(n, d, device=DEVICE)
    compiled = torch.compile(lambda c: density(c, y), fullgraph=True)
    return gradient(lambda: compiled(channels), [channels])


# Others


def components(kind, module, locs, factor):
    """Component distributions from torch or Pyro."""
    d = locs.shape[-1]
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
    leaves, y = raw(kind, n, k, d, channels_first=False)
    return gradient(lambda: mixture_of(module, kind, *leaves).log_prob(y), leaves)


def mixture_of(module, kind, logits, locs, factor):
    weights = module.Categorical(logits=logits, validate_args=False)
    return module.MixtureSameFamily(weights, components(kind, module, locs, factor), validate_args=False)


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

    if kind == "low rank" or (kind == "diagonal" and d > 1):
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


# From features, through a linear layer


def wines(n, d):
    """Features ``(n, 64)`` of what is known of each wine, and targets ``(n, d)``, standardised."""
    table = wine_table()
    targets, known = table[:, :8], table[:, 8:]
    rows = torch.randint(len(table), (2, n))
    y = torch.cat([targets[rows[0]], targets[rows[1]]], 1)[:, :d]
    x = torch.cat([known[rows[0]], known[rows[1]]], 1)
    # As hidden layers would: a random one is enough for weights that are trained behind it.
    return nn.functional.gelu(x @ torch.randn(x.shape[1], WIDTH)), y


def wine_table():
    """Eleven measurements of each of 1599 wines, and its quality, standardised."""
    with np.load(Path(__file__).parent / "data" / "uci" / "wine-quality-red.npz") as arrays:
        table = torch.tensor(np.concatenate([arrays["x"], arrays["y"].reshape(-1, 1)], 1), dtype=torch.float32)
    return (table - table.mean(0)) / table.std(0)


def through_layer(prepare, weights, n, k, d):
    """Function for a module and a density that are made by ``prepare(d, k)``, on random or on trained weights."""
    features, y = (t.to(DEVICE) for t in wines(n, d))
    module, density = prepare(d, k)
    module.to(DEVICE)
    if STEPS[weights]:
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(STEPS[weights]):
            optimizer.zero_grad()
            (-density(features, y).mean()).backward()
            optimizer.step()
    features.requires_grad_()
    return gradient(lambda: density(features, y), [*module.parameters(), features])


def our_head(d, k):
    from pyro_mdn import MixtureHead

    return MixtureHead(WIDTH, d, k, noise=noise_of("full"))


def our_loss(d, k):
    """``network.loss``, from the features on."""
    head = our_head(d, k)
    return head, head.log_prob


def our_mixture(d, k, *, validate):
    """``network(x).log_prob(y)``, from the features on."""
    import pyro

    pyro.enable_validation(validate)
    head = our_head(d, k)
    return head, lambda features, y: head(features).log_prob(y)


def layer_and_same_family(d, k, *, package):
    module = importlib.import_module(f"{package}.distributions")
    layer, width = nn.Linear(WIDTH, k * (1 + d + width_of("full", d))), width_of("full", d)

    def density(features, y):
        logits, locs, factor = layer(features).split([k, k * d, k * width], -1)
        return mixture_of(module, "full", logits, locs.unflatten(-1, (k, d)), factor.unflatten(-1, (k, -1))).log_prob(y)

    return layer, density


def zuko_layer(d, k):
    from zuko.mixtures import GMM

    model = GMM(d, WIDTH, k, "full", hidden_features=())  # its network is a linear layer then
    return model, lambda features, y: model(features).log_prob(y)


def sbi_layers(d, k):
    from sbi.neural_nets.estimators.mixture_density_estimator import MultivariateGaussianMDN

    model = MultivariateGaussianMDN(d, WIDTH, WIDTH, k, hidden_net=nn.Identity())
    return model, lambda features, y: model(features).log_prob(y)


THROUGH_LAYER = {
    "network.loss": our_loss,
    "mixture, validated": partial(our_mixture, validate=True),
    "mixture": partial(our_mixture, validate=False),
    "torch MixtureSameFamily": partial(layer_and_same_family, package="torch"),
    "Pyro MixtureSameFamily": partial(layer_and_same_family, package="pyro"),
    "zuko GMM": zuko_layer,
    "sbi MoG": sbi_layers,
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
    cases += [("low rank", *case) for case in LOW_RANK]
    builders = OURS | RIVALS
    if smoke:
        cases = [("diagonal", 8, 2, 1), ("full", 8, 2, 2)]
        builders = {name: builders[name] for name in ("kernel", "GaussianMixture", "torch MixtureSameFamily")}
    rows = results(builders, cases, threads, "kernel", smoke=smoke)
    return [row | {"bound": 1e6 * bound(*row["case"])} for row in rows]


def measure_linear(threads, *, smoke):
    cases = [(weights, *case) for weights in ("random", "trained") for case in LINEAR]
    chosen = tuple(THROUGH_LAYER)
    if smoke:
        cases = [("random", 8, 2, 2), ("briefly trained", 8, 2, 2)]
        chosen = ("network.loss", "mixture, validated", "torch MixtureSameFamily")
    builders = {name: partial(through_layer, THROUGH_LAYER[name]) for name in chosen}
    return results(builders, cases, threads, "network.loss", smoke=smoke, restarts=2)


def results(builders, cases, threads, mine, *, smoke, restarts=3):
    torch.set_num_threads(threads)
    settings = SMOKE if smoke else {"rounds": 7, "block": 0.05, "restarts": 1 if GPU else restarts}
    rows = []
    for case, times in race(builders, cases, threads, **settings).items():
        microseconds = {name: 1e6 * statistics.median(t) for name, t in times.items()}
        ratios = {name: ratio(times, name, mine) for name in times if name != mine}
        row = {"case": list(case), "threads": threads, "microseconds": microseconds, "ratios": ratios}
        if mine == "network.loss":  # how far the others are behind what Pyro users go through
            others = [name for name in times if name in RIVALS]
            row["over mixture"] = {name: ratio(times, name, "mixture") for name in others if "mixture" in times}
        rows.append(row)
    return rows


def table(results):
    """Markdown of both tables."""
    tables = [table_of_channels(results["rows"])]
    if "linear" in results:
        tables.append(table_of_layers(results["linear"]))
    return "\n\n".join(tables)


def table_of_channels(rows):
    """Markdown: time of the kernel, others over it, and over the bound."""
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


def table_of_layers(rows):
    """Markdown: time of ``network.loss``, our mixture over it, and others over that mixture, unvalidated."""
    own, others = ["mixture, validated", "mixture"], [name for name in THROUGH_LAYER if name in RIVALS]
    lines = [
        "| weights, full (N, K, D) | threads | network.loss, µs | "
        + " | ".join([f"{name}, over it" for name in own] + [f"{name}, over mixture" for name in others])
        + " |",
        "|---" * (len(own) + len(others) + 3) + "|",
    ]
    for row in rows:
        weights, *sizes = row["case"]
        cells = [shown(row["ratios"][c]) if c in row["ratios"] else "" for c in own]
        cells += [shown(row["over mixture"][c]) if c in row["over mixture"] else "" for c in others]
        start = f"| {weights} {tuple(sizes)} | {row['threads']} | {row['microseconds']['network.loss']:.0f} | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    threads_of(parser)
    parser.add_argument("--out", default="log_prob", help="name of the results, or a path")
    parser.add_argument("--only", choices=["rows", "linear"], help="one of the tables; the other one stays as it is")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, without meaning")
    args = parser.parse_args()
    found = {} if args.only is None else read(args.out)
    for name, function in {"rows": measure, "linear": measure_linear}.items():
        if args.only in (None, name):
            found[name] = [row for threads in args.threads for row in function(threads, smoke=args.smoke)]
            found[f"machine of {name}"] = machine()
    write(args.out, found)
    print(table(found))


if __name__ == "__main__":
    main()
