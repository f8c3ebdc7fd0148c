"""What a server is up to: warming up, serving, stopping; and what it lacks to serve."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol, runtime_checkable

import psutil
import uvicorn
from monailabel.utils.async_tasks import utils as background

from apps.samloop.bodies import Disks
from apps.samloop.pool import InferPool

logger = logging.getLogger(__name__)

#: Seconds that requests have to end in when the server is stopped.
GRACE = 30
#: Seconds after which the server ends, whatever still runs: threads cannot be cut short otherwise.
DEADLINE = GRACE + 5.0
#: Seconds that a look at what the server needs may take.
_LOOK_SECONDS = 2.0
OK = "ok"


@runtime_checkable
class Remote(Protocol):
    """A datastore that depends on a server elsewhere."""

    def state(self) -> dict[str, Any]:
        """``reachable``, ``reason`` where it is not, ``waiting``: labels to be sent there. Never blocks."""
        ...


class Lifecycle:
    """The phases of one served application.

    Args:
        instance: The application.
        pool: Where it infers.
        disks: What must not fill.
        folder: Where labels are written.
    """

    def __init__(self, *, instance: Any, pool: InferPool, disks: Disks, folder: Path) -> None:
        self._instance = instance
        self._pool = pool
        self._disks = disks
        self._folder = folder
        self._warming: asyncio.Future[None] | None = None
        self._look: asyncio.Task[dict[str, str]] | None = None
        self.stopping = False
        self.failure: BaseException | None = None

    def begin(self) -> None:
        """Warm up in the pool, while the event loop answers already; who wants an inference waits."""
        loop = asyncio.get_running_loop()
        self._warming = loop.run_in_executor(self._pool, self._instance.warm_up)
        self._warming.add_done_callback(self._warmed)

    def _warmed(self, future: asyncio.Future[None]) -> None:
        self.failure = None if future.cancelled() else future.exception()
        if self.failure is not None and not self.stopping:
            logger.error("The engine cannot be used: %s", self.failure)
        elif self.failure is None:
            logger.info("Ready")

    async def checks(self) -> dict[str, str]:
        """What the server needs, and "ok" or what is wrong with it; in words that tell nothing of its inside.

        A look that hangs, as on a share that is gone, is waited for shortly, and only one at a time.
        """
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(asyncio.to_thread(self._found))
        done, _ = await asyncio.wait({self._look}, timeout=_LOOK_SECONDS)
        found = self._look.result() if done else {"store": "does not answer"}
        return {"server": "is being stopped" if self.stopping else OK, "engine": self._engine(), **found}

    def _engine(self) -> str:
        if self._warming is None or not self._warming.done():
            return "is warming up"
        return OK if self.failure is None else "cannot be used"

    def _found(self) -> dict[str, str]:
        found = {"store": OK if os.access(self._folder, os.W_OK | os.X_OK) else "cannot be written"}
        try:
            found["disk"] = OK if self._disks.look() > 0 else "is nearly full"
        except OSError:
            found["disk"] = "cannot be read"
        store = self._instance.datastore()
        if isinstance(store, Remote):
            found["pacs"] = OK if store.state()["reachable"] else "does not answer"
        return found

    def stop(self) -> None:
        """Take no more work, answer who waits for an inference, stop what runs in processes of its own."""
        self.stopping = True
        self._pool.stop()
        stop_tasks()

    def end(self) -> None:
        """Stop, and wait for what runs; to be called off the event loop."""
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._instance.ahead.close()
        self._instance.server_mode(False)
        self._instance.datastore().close()


def stop_tasks() -> None:
    """Kill trainings and batches with all that they started, and forget those that wait.

    They go on where they were when they are started again. Stock stops the first of each kind, and then
    starts the one that waits behind it.
    """
    for executor in list(background.background_executors.values()):
        executor.shutdown(wait=False, cancel_futures=True)
    background.background_executors.clear()
    for method, processes in list(background.background_processes.items()):
        for task in background.background_tasks.get(method, []):
            if task["status"] in ("SUBMITTED", "RUNNING"):
                task["status"] = "STOPPED"
                task["end_ts"] = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        for process in list(processes.values()):
            kill(process.pid)


def kill(pid: int, *, itself: bool = True) -> None:
    """Kill a process and all that it started, or only the latter."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), *([parent] if itself else [])]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


class GracefulServer(uvicorn.Server):
    """Ends when it is told to, with what it has begun; at once when it is told twice, or after `DEADLINE`.

    Args:
        config: As uvicorn takes it.
        lifecycle: Of the application that it serves.
    """

    def __init__(self, config: uvicorn.Config, *, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self.told: int | None = None

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: also where the engine cannot be used, since then nothing can be answered."""
        return await super().on_tick(counter) or self._lifecycle.failure is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        if self.told is not None:
            self._quit()
        self.told = sig
        self.should_exit = True
        threading.Thread(target=self._lifecycle.stop, daemon=True).start()
        watchdog = threading.Timer(DEADLINE, self._quit)
        watchdog.daemon = True
        watchdog.start()

    def _quit(self) -> NoReturn:
        kill(os.getpid(), itself=False)
        os._exit(128 + (self.told or signal.SIGTERM))
