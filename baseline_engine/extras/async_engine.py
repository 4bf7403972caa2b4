"""The engine for coroutines: `async for event in engine.stream(prompt, params)`.

One thread steps the engine as long as there is work. Requests reach it through a queue; each event goes back to the
loop of the coroutine that waits for it.
"""

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable

from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.engine import Engine
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.prompts import Prompt
from rowint8.baseline_engine.request import Request, TokenEvent

Deliver = Callable[[TokenEvent | EngineError], None]


class AsyncEngine:
    """Serves an `Engine`, which nobody else may use meanwhile. An async context manager: its end stops the thread."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[int, tuple[Request, Deliver]] = {}
        self._indices = itertools.count()
        self._lock = threading.Lock()
        self._accepting = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    async def __aenter__(self) -> "AsyncEngine":
        if self._thread.ident is not None:
            raise EngineError("this AsyncEngine has served already; make a new one")
        self._accepting = True
        self._thread.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        *,
        chat: bool = False,
    ) -> AsyncIterator[TokenEvent]:
        """The events of one request as they come. Leaving the loop early, or its cancellation, aborts the request.

        Raises:
            EngineError: as `Engine.add`; or the engine failed, or was stopped before the request ended.
        """
        request = self._engine.make_request(prompt, params, chat=chat, index=next(self._indices))
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event: TokenEvent | EngineError) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        with self._lock:
            if not self._accepting:
                raise EngineError("the engine is not running; use `async with AsyncEngine(engine)`")
            self._commands.put(lambda: self._add(request, deliver))
        try:
            while True:
                event = await events.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._commands.put(lambda: self._drop(request))

    def _add(self, request: Request, deliver: Deliver) -> None:
        self._listeners[request.index] = request, deliver
        self._engine.scheduler.add(request)

    def _drop(self, request: Request) -> None:
        self._listeners.pop(request.index, None)
        self._engine.abort(request)

    def _stop(self) -> None:
        with self._lock:
            self._accepting = False

    def _serve(self) -> None:
        end = EngineError("the engine was stopped")
        try:
            while self._accepting:
                if not self._engine.has_work:
                    self._commands.get()()  # sleeps until something comes
                self._obey()
                for event in self._engine.step():
                    self._deliver(event.request, event)
        except BaseException as error:  # nobody may wait for a thread that is gone
            end = EngineError(f"the engine failed: {error}")
            end.__cause__ = error
        self._stop()
        self._obey()
        for index in list(self._listeners):  # whoever still waits must learn of it
            self._deliver(index, end)
        self._engine.abort_all()

    def _deliver(self, index: int, event: TokenEvent | EngineError) -> None:
        """Hands an event to who waits for it; a request whose event loop has closed ends, and no other."""
        if index not in self._listeners:
            return
        request, deliver = self._listeners[index]
        try:
            deliver(event)
        except RuntimeError:
            self._drop(request)

    def _obey(self) -> None:
        while not self._commands.empty():
            self._commands.get()()
