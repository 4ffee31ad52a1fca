"""Threads that are kept a while, and what happens where none can be made."""

import threading

import pytest

from graft.process.workers import Workers


def refuse(*_thread: object) -> None:
    raise RuntimeError("can't start new thread")


def test_jobs_share_threads():
    workers, done = Workers(2), threading.Semaphore(0)
    seen: set[int] = set()

    def job():
        seen.add(threading.get_ident())
        done.release()

    for _ in range(50):
        workers.run(job)
    for _ in range(50):
        assert done.acquire(timeout=10)
    assert 1 <= len(seen) <= 2


def test_a_job_that_fails_costs_no_thread():
    workers, done = Workers(1), threading.Event()
    workers.run(refuse)
    workers.run(done.set)
    assert done.wait(10)


def test_no_thread_can_be_made(monkeypatch):
    workers, done = Workers(4), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            workers.run(done.set)
    assert not done.is_set()
    workers.run(done.set)
    assert done.wait(10)
