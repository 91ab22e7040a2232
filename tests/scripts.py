"""Scripts run in processes that have imported this package already, which takes longer than most smoke runs."""

import multiprocessing
import os
import runpy
import sys
import warnings

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pyro_mdn", "pyro.infer.autoguide", "matplotlib.pyplot", "arviz", "tqdm"])


def run_script(path, *arguments, cwd, warn="default"):
    """Run a Python file as a program of its own; return its exit status, and what it printed and complained about.

    Args:
        path: The file.
        arguments: Its arguments.
        cwd: Folder to run it in; ``stdout`` and ``stderr`` are written there.
        warn: What becomes of warnings, as for ``python -W``.
    """
    process = _CONTEXT.Process(target=_run, args=(str(path), list(arguments), str(cwd), warn))
    process.start()
    process.join()
    return process.exitcode, (cwd / "stdout").read_text(), (cwd / "stderr").read_text()


def _run(path, arguments, cwd, warn):
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.resetwarnings()
    warnings.simplefilter(warn)
    sys.argv, sys.path[0] = [path, *arguments], os.path.dirname(path)
    runpy.run_path(path, run_name="__main__")
