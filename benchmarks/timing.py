"""Times of rivals that take turns, each in a process of its own, so that none changes memory or settings of another."""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

SMOKE = {"rounds": 2, "block": 0, "together": True}  # settings of a race that shows only that everything runs
RESULTS = Path(__file__).parent / "results"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PACKAGES = ("torch", "pyro-ppl", "numpy", "zuko", "sbi")


class Rival:
    """A process that builds functions and times them when it is told to.

    Args:
        build: ``build(*case)`` gives a function without arguments; importable.
        threads: Threads of torch.
    """

    def __init__(self, build, threads=1):
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, build, threads), daemon=True)
        self.process.start()

    def prepare(self, case, block):
        """Have the function built and called for a while; None, or why it cannot be."""
        self.pipe.send((case, block))
        return self.pipe.recv()

    def time(self):
        """Seconds per call, over one block of calls."""
        self.pipe.send(None)
        return self.pipe.recv()

    def stop(self):
        """Wait for the process to end, which it does once the pipe is closed."""
        self.process.join(10)
        self.process.kill()


def _serve(pipe, build, threads):
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    function = timer = number = None
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # nobody is there any more
            return
        if job is None:
            pipe.send(events(function, number) if GPU else timer.timeit(number).mean)
            continue
        case, block = job
        try:
            torch.manual_seed(0)
            if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and importing it takes a second
                torch.compiler.reset()
            function = build(*case)
            timer = Timer("function()", globals={"function": function}, num_threads=threads)
            timer.timeit(3)  # warms up, and compiles what is to be compiled
            number = max(1, round(block / timer.timeit(2).mean)) if block else 1
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())


def events(function, number):
    """Seconds per call on a GPU, between two of its events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(number):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / number


def race(builders, cases, threads=1, rounds=15, block=0.03, restarts=1, together=False):
    """Seconds per call, one number a round, of each builder in each case: ``{case: {name: [seconds]}}``.

    Builders that a case is not for raise, and are left out of it. Every case has processes of its own, so that no
    case finds the memory that another one left, and everybody starts anew ``restarts`` times: where memory comes to
    lie, and whether it is given back to the system after each call, differs from process to process, and with large
    cases so do the times. Where times mean nothing, all cases may go through the same processes ``together``.
    """
    results = {case: {} for case in cases}
    for group in [cases] if together else [[case] for case in cases for _ in range(restarts)]:
        rivals = {name: Rival(build, threads) for name, build in builders.items()}
        try:
            for case in group:
                for name, times in _rounds(rivals, case, rounds, block).items():
                    results[case].setdefault(name, []).extend(times)
        finally:
            for rival in rivals.values():
                rival.pipe.close()
            for rival in rivals.values():
                rival.stop()
    return results


def _rounds(rivals, case, rounds, block):
    failures = {name: rival.prepare(case, block) for name, rival in rivals.items()}
    fit = {name: rival for name, rival in rivals.items() if failures[name] is None}
    for name, failure in failures.items():
        if failure and "NotImplementedError" not in failure.splitlines()[-1]:
            print(f"{name} {case}: {failure.splitlines()[-1]}", file=sys.stderr)
    times = {name: [] for name in fit}
    for _ in range(rounds):
        for name, rival in fit.items():
            times[name].append(rival.time())
    return times


def ratio(times, slow, fast):
    """Median and quartiles over the rounds of one time over another."""
    ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": median, "quartiles": [low, high]}


def shown(summary):
    return f"{summary['median']:.2f} ({summary['quartiles'][0]:.2f}-{summary['quartiles'][1]:.2f})"


def threads_of(parser):
    """Option for the numbers of threads; with a GPU these do not matter."""
    parser.add_argument("--threads", type=int, nargs="+", default=[1] if GPU else [1, 2])


def machine():
    """What the numbers were taken on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    accelerator = torch.cuda.get_device_name() if GPU else None
    return {
        "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "accelerator": accelerator,
        "python": platform.python_version(),
        "versions": versions,
    }


def path_of(out):
    """A path, or that of a name among the results; those of a GPU have names of their own."""
    return Path(out) if "/" in str(out) else RESULTS / f"{out}{'_gpu' * GPU}.json"


def read(out):
    """What :func:`write` wrote."""
    return json.loads(path_of(out).read_text())


def write(out, results):
    """Results to a file, or by name among the others."""
    path = path_of(out)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
