"""Independent jobs over processes of this machine, or over Ray's actors on one machine or a cluster.

What is done is on disk when a job returns, so that a run that was ended goes on with the jobs that are missing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

import diffusers
import torch
import transformers

from pig.errors import InputError, WorkerDiedError

ExecutorName = Literal["local", "ray"]
Work = Callable[[Any], Any]  # of one job, in a worker; its results can be pickled
MakeWork = Callable[[str], Work]  # on a device; can be pickled, and loads what the jobs of a worker share

POLL = 1.0  # seconds between looks at the progress
QUIET_TRACKER = "ignore::UserWarning:multiprocessing.resource_tracker"
LOST = "a worker died ({cause}); often one is killed for memory: try fewer workers or smaller batches"


def execute(
    make_work: MakeWork, jobs: Sequence[Any], *, executor: ExecutorName, workers: int, threads: int = 1
) -> Iterator[Any]:
    """Do the jobs with so many workers: each one's result as it is done, and None at every poll.

    Args:
        make_work: called once in each worker, with its device.
        threads: of each worker, which Ray counts.

    Raises:
        WorkerDiedError: a worker was lost.
        Exception: what a job has raised; the other workers are ended.
    """
    if executor == "local":
        yield from _local(make_work, jobs, workers)
    else:
        yield from _ray(make_work, jobs, workers, threads)


def device_of(worker: int) -> str:
    """`cuda:N`, worker after worker, where there are GPUs."""
    return f"cuda:{worker % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def quiet() -> None:
    """No bars and notes of model loading between ours."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


# -- processes of this machine ----------------------------------------------------------------------------------------

_work: Work  # of a worker process


def _start(make_work: MakeWork, places: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    quiet()

    def watch() -> None:  # a parent killed with -9 cannot
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    global _work
    _work = make_work(places.get())


def _do(job: Any) -> Any:
    return _work(job)


def _local(make_work: MakeWork, jobs: Sequence[Any], workers: int) -> Iterator[Any]:
    # A killed worker's semaphores are cleaned up by a process of Python's own, which would say so.
    told = os.environ.get("PYTHONWARNINGS", "")
    if QUIET_TRACKER not in told:
        os.environ["PYTHONWARNINGS"] = f"{told},{QUIET_TRACKER}".lstrip(",")
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    workers = min(workers, len(jobs))
    for worker in range(workers):
        places.put(device_of(worker))
    pool = ProcessPoolExecutor(workers, context, _start, (make_work, places, os.getpid()))
    try:
        pending: set[Future[Any]] = {pool.submit(_do, job) for job in jobs}
        while pending:
            done, pending = wait(pending, timeout=POLL, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    raise WorkerDiedError(LOST.format(cause="its process ended abruptly")) from error
            yield None
    except BaseException:
        # What they have done is on disk. A SIGTERM would not do: Lightning ends a training by an exception then, which
        # the pool takes for this job's result, and the worker begins the next job.
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# -- Ray --------------------------------------------------------------------------------------------------------------


def _ray(make_work: MakeWork, jobs: Sequence[Any], workers: int, threads: int) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise InputError("executor=ray needs Ray: pip install 'pig[ray]'") from error
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address, **quietly)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
    else:
        cpus = max(workers * threads, os.cpu_count() or 1)
        ray.init(num_cpus=cpus, include_dashboard=False, **quietly)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0) > 0)  # an actor each
    places = int(resources["GPU"] if gpus else resources.get("CPU", 0) // threads)
    if workers > places:
        ray.shutdown()
        raise InputError(
            f"workers={workers}, but Ray has room for {places} ({'a GPU' if gpus else 'threads CPUs'} each)"
        )

    class Worker:
        def __init__(self) -> None:
            quiet()
            self.work = make_work("cuda" if gpus else "cpu")

        def do(self, job: Any) -> tuple[Any, Exception | None]:
            try:
                return self.work(job), None
            except Exception as error:  # Ray would wrap it, and its message
                return None, error

    remote: Any = ray.remote(num_cpus=threads, num_gpus=gpus)(Worker)
    try:
        waiting = list(reversed(jobs))
        idle = [remote.remote() for _ in range(min(workers, len(waiting)))]
        running: dict[Any, Any] = {}
        while waiting or running:
            while idle and waiting:
                actor = idle.pop()
                running[actor.do.remote(waiting.pop())] = actor
            done, _ = ray.wait(list(running), timeout=POLL)
            for reference in done:
                idle.append(running.pop(reference))
                result, failed = ray.get(reference)
                if failed is not None:
                    raise failed
                yield result
            yield None
    except ray.exceptions.RayActorError as error:
        raise WorkerDiedError(LOST.format(cause=str(error).splitlines()[0])) from error
    finally:
        ray.shutdown()
