"""Work ahead of whoever consumes an iterator, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Ready(Generic[Item]):
    item: Item


@dataclass(frozen=True)
class _Ended:
    error: BaseException | None


def ahead(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """The same items, of which up to ``depth`` (at least 1) are made before they are asked for.

    The thread starts with the first item asked for. It ends with the last item, with an error, which is raised here,
    or when this generator is closed, which waits for the item that is being made. ``items`` is closed by then.
    """
    ready: SimpleQueue[_Ready[Item] | _Ended] = SimpleQueue()
    slots = threading.Semaphore(depth)
    closed = threading.Event()
    worker = threading.Thread(target=_work, args=(items, ready, slots, closed), name="m3oe_fast prefetch", daemon=True)
    worker.start()
    try:
        while isinstance(found := ready.get(), _Ready):
            slots.release()
            yield found.item
        if found.error is not None:
            raise found.error
    finally:
        closed.set()
        slots.release()  # wakes a thread that waits for room
        if threading.current_thread() is not worker:  # a garbage collection there may close this generator
            worker.join()


def _work(
    items: Generator[Item, None, None],
    ready: SimpleQueue[_Ready[Item] | _Ended],
    slots: threading.Semaphore,
    closed: threading.Event,
) -> None:
    error = None
    try:
        while True:
            slots.acquire()
            if closed.is_set():
                break
            ready.put(_Ready(next(items)))
    except StopIteration:
        pass
    except BaseException as raised:  # the consumer's to handle, whatever it is
        error = raised
    finally:
        items.close()
    ready.put(_Ended(error))
