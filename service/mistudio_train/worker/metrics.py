"""What Prometheus may ask of a worker. Only counts; a job's own figures are its progress events."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class Metrics:
    """The worker's metrics in a registry of their own, so that two applications in one process do not clash."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running = Gauge("mistudio_jobs_running", "Jobs being worked on now", registry=self.registry)
        self.ended = Counter("mistudio_jobs_ended", "Jobs that ended, by status", ["status"], registry=self.registry)
        self.dead_letters = Counter("mistudio_dead_letters", "Messages that were no request", registry=self.registry)
        self.rebalances = Counter("mistudio_rebalances", "Assignments, of every slot", registry=self.registry)
        self.nudges = Counter("mistudio_nudges", "Rebalances that an idle slot asked for", registry=self.registry)
        self.moved = Counter("mistudio_jobs_moved", "Jobs that lost their partition", registry=self.registry)
