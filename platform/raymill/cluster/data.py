"""Ray Data as the house uses it: one row is one piece of work that reads and writes its own files.

Only the items and small results travel through Ray; text goes through files. Fixed cost: about 3 s for the first
execution of a session, under 1 s for each later one.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from raymill.errors import MachineError, RaymillError
from raymill.memory import give_back_memory

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster

T = TypeVar("T")
R = TypeVar("R")


def map_items(cluster: Cluster, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`work(item)` for every item on as many data workers as the cluster holds; results as they come, in any order.

    A RaymillError in a worker is raised here as itself; an OSError as MachineError. `work` may run twice for an item
    when a machine is lost, so it must write by rename.
    """
    if not items:
        return
    cluster.connect()
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its import set it to INFO
    role = cluster.config.roles.data
    cpus, _ = cluster.capacity("data")
    workers = max(1, min(len(items), int(cpus // role.cpus_per_worker)))
    rows = [{"item": pickle.dumps(item)} for item in items]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Guarded(work),
        compute=ray.data.TaskPoolStrategy(size=workers),
        num_cpus=role.cpus_per_worker,
        num_gpus=role.gpus_per_worker or None,
    )
    for row in results.iter_rows():
        result = pickle.loads(row["result"])  # noqa: S301 - made by our own worker
        if isinstance(result, RaymillError):
            raise result
        yield result


class _Guarded:
    """The work as Ray Data calls it. Users' errors come back as values: Ray would wrap them in its own."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        result: Any
        try:
            result = self._work(pickle.loads(row["item"]))  # noqa: S301 - made by our own driver
        except RaymillError as error:
            result = error
        except OSError as error:
            fix = "mend the disk, its space or its permissions and run again; finished work is kept"
            result = MachineError("a worker could not read or write a file", why=str(error), fix=fix)
        give_back_memory()  # workers wait idle for other stages
        return {"result": pickle.dumps(result)}
