"""What the server counts, for Prometheus. The words are vLLM's, under our own prefix."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from braidsdk import Answer, Braid

PREFIX = "braid"

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, braid: Braid) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(braid))
        self._tokens = Counter(
            f"{PREFIX}_prompt_tokens_by_source",
            "Prompt tokens by where they came from.",
            ("source",),
            registry=self._registry,
        )
        self._generated = Counter(f"{PREFIX}_generation_tokens", "Tokens generated.", registry=self._registry)
        self._finished = Counter(
            f"{PREFIX}_request_success", "Answers that ended, by reason.", ("finished_reason",), registry=self._registry
        )
        self._refused = Counter(
            f"{PREFIX}_http_errors", "Responses that are errors, by status.", ("status",), registry=self._registry
        )
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._between = self._histogram("inter_token_latency_seconds", "Mean time between the tokens of an answer.")
        self._queue = self._histogram("request_queue_time_seconds", "From the request to its admission.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token.")

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", what, buckets=SECONDS, registry=self._registry)

    def answered(self, answer: Answer) -> None:
        """Count an answer."""
        usage, timings = answer.usage, answer.timings
        for source, tokens in (
            ("exact", usage.exact_tokens),
            ("composed", usage.cached_tokens - usage.exact_tokens),
            ("repaired", usage.repaired_tokens),
            ("computed", usage.computed_tokens),
        ):
            self._tokens.labels(source).inc(tokens)
        self._generated.inc(usage.completion_tokens)
        self._finished.labels(answer.finish_reason).inc()
        first_s = timings.first_token_ms / 1e3
        self._first.observe(first_s)
        self._queue.observe(timings.queue_ms / 1e3)
        decoding_s = 0.0
        if timings.decode_tokens_per_s:
            self._between.observe(1 / timings.decode_tokens_per_s)
            decoding_s = (usage.completion_tokens - 1) / timings.decode_tokens_per_s
        self._whole.observe(first_s + decoding_s)

    def refused(self, status: int) -> None:
        """Count an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """What the engine knows, read when somebody asks."""

    def __init__(self, braid: Braid) -> None:
        self._braid = braid

    def describe(self) -> list[Metric]:
        """Nothing is read before somebody asks."""
        return []

    def collect(self) -> list[Metric]:
        """Read it."""
        stats = self._braid.stats()
        used = stats.pool_used_bytes / stats.pool_capacity_bytes if stats.pool_capacity_bytes else 0.0
        gauges = {
            "num_requests_running": ("Requests that are computed now.", stats.running),
            "num_requests_waiting": ("Requests that wait for memory or a place.", stats.waiting),
            "kv_cache_usage_perc": ("Share of the KV memory that is used, from 0 to 1.", used),
        }
        counters = {
            "engine_steps": ("Passes of the model.", stats.steps),
            "engine_step_tokens": ("Tokens that all passes computed.", stats.step_tokens),
        }
        found: list[Metric] = [GaugeMetricFamily(f"{PREFIX}_{name}", *each) for name, each in gauges.items()]
        return [*found, *(CounterMetricFamily(f"{PREFIX}_{name}", *each) for name, each in counters.items())]
