"""A micro-batcher: pictures wanted at nearly the same moment are drawn together, off the event loop."""

import asyncio
from asyncio import Future, Task
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from services.generator import Order

Draw = Callable[[Sequence[Order]], Awaitable[list[bytes]]]


class Batcher:
    """Waits `window` seconds for company, then hands up to `limit` orders to `draw`; one batch at a time."""

    def __init__(self, draw: Draw, limit: int, window: float) -> None:
        self.draw, self.limit, self.window = draw, limit, window
        self.waiting: deque[tuple[Order, Future[bytes]]] = deque()
        self.worker: Task[None] | None = None

    async def submit(self, orders: Sequence[Order]) -> list[bytes]:
        """The pictures of these orders; raises what `draw` raised. A cancelled caller's orders are not drawn."""
        loop = asyncio.get_running_loop()
        futures: list[Future[bytes]] = [loop.create_future() for _ in orders]
        self.waiting.extend(zip(orders, futures, strict=True))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        return await asyncio.gather(*futures)

    async def _work(self) -> None:
        while self.waiting:
            if len(self.waiting) < self.limit:
                await asyncio.sleep(self.window)
            batch = self._take()
            if not batch:
                continue
            try:
                drawn = await self.draw([order for order, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), picture in zip(batch, drawn, strict=True):
                if not future.done():
                    future.set_result(picture)

    def _take(self) -> list[tuple[Order, Future[bytes]]]:
        batch: list[tuple[Order, Future[bytes]]] = []
        while self.waiting and len(batch) < self.limit:
            order, future = self.waiting.popleft()
            if not future.done():
                batch.append((order, future))
        return batch
