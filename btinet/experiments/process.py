"""One training and its evaluation in a process of their own: its memory goes with it, and its end is not ours."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from btinet.allocator import keep_pages
from btinet.errors import UserError
from btinet.quiet import quiet_libraries
from btinet.training.options import TrainOptions

EVALUATION_NAME = "evaluation-test"


def train_in_own_process(options: TrainOptions) -> str | None:
    """Train or continue the run ``options.out`` and score it on its test part; returns why that failed, if it did.

    The process ends with this one, however this one ends.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare) as pool:
        try:
            pool.submit(_train_and_evaluate, options).result()
        except UserError as error:
            return str(error)
        except BrokenProcessPool:
            return "its process was killed, perhaps because the memory did not suffice"
        except Exception as error:  # whatever it is, the other runs go on
            traceback.print_exception(error)
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _train_and_evaluate(options: TrainOptions) -> None:
    from btinet.evaluation import EvaluateOptions, evaluate_run
    from btinet.training import run_folder
    from btinet.training.train import resume, train

    folder = Path(options.out)
    if (folder / run_folder.CONFIG_NAME).is_file():
        resume(folder)
        run_folder.remove_temporaries(folder)  # a finished run that was killed at its very end still has some
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it began
        train(options)
    evaluation = folder / EVALUATION_NAME
    shutil.rmtree(evaluation, ignore_errors=True)  # half of one
    evaluate_run(EvaluateOptions(folder, out=evaluation, device=options.device, batch_size=options.batch_size))


def _prepare() -> None:
    keep_pages()
    quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
