"""Several streams as one, for answers of many choices or prompts.

Knows asynchronous generators; must not know what they carry.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

import anyio

Item = TypeVar("Item")

_CLOSE_SECONDS = 7.0


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """The items of all streams as they come.

    Raises what the first failing stream raises. Whoever closes it closes all of them.
    """
    queue: asyncio.Queue[tuple[Item] | Exception | None] = asyncio.Queue()

    async def follow(stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((item,))
            queue.put_nowait(None)
        except Exception as error:  # for the reader, who ends the others
            queue.put_nowait(error)

    tasks = [asyncio.create_task(follow(stream)) for stream in streams]
    num_open = len(tasks)
    try:
        while num_open:
            came = await queue.get()
            if isinstance(came, Exception):
                raise came
            if came is None:
                num_open -= 1
            else:
                yield came[0]
    finally:
        for task in tasks:
            task.cancel()
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            await asyncio.wait(tasks)
