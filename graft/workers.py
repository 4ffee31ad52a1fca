"""Threads for what may wait and must not wait in the loop. One that has nothing to do waits for more, a while."""

import queue
import threading
from collections.abc import Callable

from graft.log import log

Job = Callable[[], None]
IDLE_SECONDS = 1.0


class Workers:
    """At most @most threads; whoever asks for more has to wait, or is counted out before."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.threads = self.waiting = 0  # threads in all; those that wait, less the jobs that wait for them

    def run(self, job: Job) -> None:
        """Have a thread do @job, soon. Raises RuntimeError where no thread can be made: then it is not done."""
        with self.lock:
            if self.waiting > 0 or self.threads >= self.most:
                self.waiting -= 1
                self.jobs.put(job)
                return
            self.threads += 1
        try:
            threading.Thread(target=self._work, args=(job,), daemon=True).start()
        except RuntimeError:
            with self.lock:
                self.threads -= 1
            raise

    def _work(self, job: Job) -> None:
        while True:
            try:
                job()
            except Exception:
                log.exception("a worker")
            with self.lock:
                self.waiting += 1
            try:
                job = self.jobs.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self.lock:
                    if self.waiting > 0:
                        self.waiting -= 1
                        self.threads -= 1
                        return
                job = self.jobs.get()  # one is on its way
