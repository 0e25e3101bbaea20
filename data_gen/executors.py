"""Who makes the shards: processes of this machine, or Ray's actors on one machine or a cluster. The unit is a shard."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from data_gen.config import DatagenConfig
from data_gen.errors import DiskFullError, WorkerDiedError
from data_gen.shards import ShardMaker, ShardReport
from pig.errors import InputError

POLL = 1.0  # seconds between looks at the progress


LOST = "a worker died ({cause}); often one is killed for memory: try fewer workers or smaller batches"


def execute(config: DatagenConfig, numbers: Sequence[int]) -> Iterator[ShardReport | None]:
    """Make these shards with `config.workers` workers: each one's report as it is done, and None at every poll.

    Raises:
        InputError, DiskFullError: as a worker met them.
        WorkerDiedError: a worker was lost.
    """
    yield from (_local if config.executor == "local" else _ray)(config, numbers)


# -- processes of this machine ----------------------------------------------------------------------------------------

_maker: ShardMaker  # of a worker process


def _start(config: DatagenConfig, places: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    quiet()

    def watch() -> None:  # a parent killed with -9 cannot
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    global _maker
    _maker = ShardMaker(config, places.get())


def _make(number: int) -> ShardReport:
    return _maker.make(number)


def _local(config: DatagenConfig, numbers: Sequence[int]) -> Iterator[ShardReport | None]:
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    workers = min(config.workers, len(numbers))
    for worker in range(workers):
        places.put(device_of(worker))
    pool = ProcessPoolExecutor(workers, context, _start, (config, places, os.getpid()))
    try:
        pending: set[Future[ShardReport]] = {pool.submit(_make, number) for number in numbers}
        while pending:
            done, pending = wait(pending, timeout=POLL, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    raise WorkerDiedError(LOST.format(cause="its process ended abruptly")) from error
            yield None
    except BaseException:
        for process in list((pool._processes or {}).values()):  # what they have done is on disk
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def device_of(worker: int) -> str:
    """`cuda:N`, worker after worker, where there are GPUs."""
    return f"cuda:{worker % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def quiet() -> None:
    """No bars and notes of model loading between ours."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


# -- Ray --------------------------------------------------------------------------------------------------------------


def _ray(config: DatagenConfig, numbers: Sequence[int]) -> Iterator[ShardReport | None]:
    config = replace(config, output=str(Path(config.output).absolute()))  # an actor has a working folder of its own
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
        cpus = max(config.workers * config.threads, os.cpu_count() or 1)
        ray.init(num_cpus=cpus, include_dashboard=False, **quietly)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0) > 0)  # an actor each
    places = int(resources["GPU"] if gpus else resources.get("CPU", 0) // config.threads)
    if config.workers > places:
        ray.shutdown()
        raise InputError(
            f"workers={config.workers}, but Ray has room for {places} ({'a GPU' if gpus else 'threads CPUs'} each)"
        )

    class Maker:
        def __init__(self) -> None:
            quiet()
            self.maker = ShardMaker(config, "cuda" if gpus else "cpu")

        def make(self, number: int) -> ShardReport | Exception:
            try:
                return self.maker.make(number)
            except (InputError, DiskFullError) as error:
                return error

    remote: Any = ray.remote(num_cpus=config.threads, num_gpus=gpus)(Maker)
    try:
        waiting = list(reversed(numbers))
        idle = [remote.remote() for _ in range(min(config.workers, len(waiting)))]
        running: dict[Any, Any] = {}
        while waiting or running:
            while idle and waiting:
                actor = idle.pop()
                running[actor.make.remote(waiting.pop())] = actor
            done, _ = ray.wait(list(running), timeout=POLL)
            for reference in done:
                idle.append(running.pop(reference))
                report = ray.get(reference)
                if isinstance(report, Exception):
                    raise report
                yield report
            yield None
    except ray.exceptions.RayActorError as error:
        raise WorkerDiedError(LOST.format(cause=str(error).splitlines()[0])) from error
    finally:
        ray.shutdown()
