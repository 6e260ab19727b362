"""Running jobs obey controls: at once those that are sent while they run, before all else those that were sent before.

Knows which jobs run here, and says so to whoever asked; what an order does to a job, the job's attempt knows.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from mistudio_schemas import TrainProgress
from mistudio_train.settings import Settings

from .controls import Control, Controls
from .patience import patiently
from .register import Register, RunLost
from .running import Running

logger = logging.getLogger(__name__)


class Obedience:
    """The runs of this worker, and the controls that are for them.

    Args:
        publish_progress: sends a progress event.
        speaks_for: whether it is this worker, of all, that speaks for a job that none has begun; told the partitions
            of the requests' topic.

    """

    def __init__(
        self,
        settings: Settings,
        register: Register,
        publish_progress: Callable[[TrainProgress], Awaitable[None]],
        speaks_for: Callable[[str, list[int]], bool],
    ) -> None:
        self._register, self._publish_progress, self._speaks_for = register, publish_progress, speaks_for
        self._requests = settings.topics.requested
        self.controls = Controls(settings, self._on_control)
        """To be followed while the worker runs."""
        self.running: set[Running] = set()
        """The runs that obey; one that has come to its end does not any more."""
        self._heeding: set[asyncio.Task[None]] = set()

    def _on_control(self, control: Control) -> None:
        runs = [running for running in self.running if running.intake.job_id == control.job_id]
        heeding: list[Coroutine[Any, Any, None]] = [self._heed_now(running) for running in runs]
        if not runs and control.action == "cancel":
            heeding.append(self._answer_for_queued(control))
        for one in heeding:
            task = asyncio.create_task(one)
            self._heeding.add(task)
            task.add_done_callback(self._heeding.discard)

    async def _answer_for_queued(self, control: Control) -> None:
        """Say of a job that no worker has ever taken that it is to be cancelled; whoever gets it will see to it."""
        try:
            partitions = await self.controls.partitions_of(self._requests)
            if not self._speaks_for(control.job_id, partitions):
                return
            if await asyncio.to_thread(self._has_begun, control.job_id):
                return
            who = control.requested_by or "somebody"
            message = f"{who} has cancelled the job before a worker has taken it"
            await self._publish_progress(TrainProgress(job_id=control.job_id, status="cancelling", message=message))
        except Exception as error:
            logger.warning("the cancellation of %s is not acknowledged: %s", control.job_id, error)

    def _has_begun(self, job_id: str) -> bool:
        return any(True for _ in self._register.runs(job_id))

    async def _heed_now(self, running: Running) -> None:
        try:
            await self.heed(running)
        except RunLost as error:
            logger.info("a control comes too late: %s", error)
        except Exception:
            logger.exception("a defect keeps job %s from obeying a control", running.intake.job_id)

    async def heed(self, running: Running) -> None:
        """Obey the controls that are for this run: those that an earlier attempt has noted, and those sent since."""
        async with running.heeding:
            for control in await self._controls_for(running):
                if running not in self.running:
                    return  # it has come to its end meanwhile
                await self._answer(running, control)
                obey = partial(self._register.obey, running.claim, control.obeyed)
                running.claim = await patiently(obey)
            for done in running.claim.record.controls:
                running.orders.give(done.action)

    async def _answer(self, running: Running, control: Control) -> None:
        who = control.requested_by or "somebody"
        logger.info("job %s run %d: %s by %s", control.job_id, running.claim.record.run, control.action, who)
        if control.action == "cancel":
            await running.feed.answer(status="cancelling", message=f"{who} has cancelled the job")
        else:
            await running.feed.answer(message=f"{who} wants what there is: training stops")

    async def _controls_for(self, running: Running) -> list[Control]:
        """Those that the run has not obeyed yet."""
        controls = self.controls.of(running.intake.job_id)
        if not controls:
            return []
        record = running.claim.record
        runs = await patiently(lambda: [one.record for one in self._register.runs(record.job_id)])
        others = [one for one in runs if one.run != record.run]
        new = [one for one in controls if not any(one.obeyed.is_same(done) for done in record.controls)]
        return [control for control in new if control.is_for(record, running.message.timestamp, others)]
