"""HTTP requests by route, under the names of prometheus-fastapi-instrumentator, which dashboards of FastAPI servers read.

Sizes are those of the bodies as they were read and sent, where that library goes by headers and knows no stream. Belongs to the event loop.
"""

from moa_serve.metrics.registered import Registered

HIGHR = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60)
LOWR = (0.1, 0.5, 1)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "OTHER"  # a client may invent one


class HttpMetrics:
    def __init__(self, registered: Registered) -> None:
        self.responses = registered.counter("moa_http_responses", "HTTP responses of any kind, as they begin.", "status")
        self._requests = registered.counter(
            "http_requests", "Requests by route (none for what is no route), method and class of status.", "handler", "method", "status"
        )
        self._in = registered.summary("http_request_size_bytes", "Bodies of requests by route.", "handler")
        self._out = registered.summary("http_response_size_bytes", "Bodies of responses by route.", "handler")
        self._highr = registered.histogram(
            "http_request_duration_highr_seconds", "Head of a request to the last byte of its answer, of all routes together.", HIGHR
        )
        self._lowr = registered.histogram(
            "http_request_duration_seconds", "Head of a request to the last byte of its answer.", LOWR, "handler", "method"
        )

    def observe(self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int) -> None:
        """A request has ended.

        Args:
            handler: its route's template: one of the server's own words.
        """
        method = method if method in METHODS else OTHER_METHOD
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._in.labels(handler).observe(request_bytes)
        self._out.labels(handler).observe(response_bytes)
        self._highr.observe(seconds)
        self._lowr.labels(handler, method).observe(seconds)
