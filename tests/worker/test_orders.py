"""Orders end what may be interrupted, once; whoever attends to them decides how."""

import asyncio

import pytest

from mistudio_train.worker.orders import Interrupted, Order, Orders


async def waits(begun: asyncio.Event) -> None:
    begun.set()
    await asyncio.Event().wait()


@pytest.mark.parametrize("order", ["leave", "cancel"])
async def test_an_order_ends_the_work(order: Order) -> None:
    orders, begun = Orders(), asyncio.Event()
    work = asyncio.create_task(orders.interruptible(waits(begun)))
    await begun.wait()
    orders.give(order)
    with pytest.raises(Interrupted):
        await work
    with pytest.raises(Interrupted):  # and whatever would follow
        await orders.interruptible(waits(begun))


async def test_stop_lets_the_work_go_on() -> None:
    orders = Orders()
    orders.give("stop")
    assert await orders.interruptible(asyncio.sleep(0, "done")) == "done"
    assert not orders.ending


async def test_who_attends_is_told_of_each_order_once_and_the_work_goes_on() -> None:
    orders, begun = Orders(), asyncio.Event()
    heard: list[Order] = []
    given: tuple[Order, ...] = ("stop", "cancel", "cancel", "leave")
    work = asyncio.create_task(orders.interruptible(waits(begun)))
    await begun.wait()
    orders.give("stop")
    with orders.attended(heard.append):
        for order in given:
            orders.give(order)
        assert heard == ["stop", "cancel", "leave"]
        assert not work.done()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_a_cancelled_task_is_no_order() -> None:
    """The slot has lost its partition."""
    orders, begun = Orders(), asyncio.Event()
    work = asyncio.create_task(orders.interruptible(waits(begun)))
    await begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_who_says_by_which_orders_is_ended_by_no_other() -> None:
    orders, begun = Orders(), asyncio.Event()
    orders.give("cancel")
    work = asyncio.create_task(orders.interruptible(waits(begun), frozenset({"leave"})))
    await begun.wait()
    orders.give("stop")
    done, _ = await asyncio.wait([work], timeout=0.05)
    assert not done
    orders.give("leave")
    with pytest.raises(Interrupted):
        await work
