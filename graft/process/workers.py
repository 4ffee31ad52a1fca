"""A pool of threads for jobs that may block, because a job that blocks in the loop would block every container.

Threads are made when needed, and an idle one ends after IDLE_SECONDS. They are daemon threads, so a job that never
returns does not keep graftd from ending.
"""

import queue
import threading
from collections.abc import Callable

from graft.log import log

Job = Callable[[], None]
IDLE_SECONDS = 1.0


class Workers:
    """At most @most threads. Further jobs wait in a queue without bound, so callers limit what they submit."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.threads = self.waiting = 0  # all threads; the idle ones, less the jobs that are queued for them

    def run(self, job: Job) -> None:
        """Have a thread run @job. Raises RuntimeError if no thread can be made; then the job is not run."""
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
                log.exception("a job in a worker thread failed")
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
                job = self.jobs.get()  # run() has counted on this thread, and its job is on the way
