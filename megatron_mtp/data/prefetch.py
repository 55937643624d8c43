"""Builds the next batches in a background thread, overlapped with the step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, cast

_WAIT_S = 0.1  # interval at which a blocked thread checks for `close`


class Prefetcher[T]:
    """An iterator over `source` that keeps up to `depth` items ready.

    An error in the source is raised in the caller's thread, after the earlier items. `close` ends the thread. It
    runs at the end of the source and may be called at any time, more than once.

    Args:
        depth: number of items to keep ready; 0 runs the source in the caller's thread.
    """

    def __init__(self, source: Iterator[T], depth: int):
        self._source = source
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(max(depth, 1))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="data-prefetch", daemon=True) if depth > 0 else None
        if self._thread:
            self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        if self._thread is None:
            return next(self._source)
        kind, value = self._queue.get()  # the thread always puts an end or an error last
        if kind == "item":
            return cast(T, value)
        self.close()
        raise value if kind == "error" else StopIteration

    @property
    def closed(self) -> bool:
        """Whether the source has ended or `close` was called."""
        return self._closed.is_set()

    def close(self) -> None:
        """Ends the thread and drops the items that are ready."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        elif hasattr(self._source, "close"):
            self._source.close()

    def _fill(self) -> None:
        try:
            for item in self._source:
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as error:  # the caller must see any error
            self._put("error", error)

    def _put(self, kind: str, value: object) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put((kind, value), timeout=_WAIT_S)
                return True
            except queue.Full:
                continue
        return False
