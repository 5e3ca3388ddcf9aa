"""Service health: rate, errors and duration first, then what makes them: load, cache, engine, process."""

from panels import HERE, SERVICE, Board, Panel, Query, Step, graph, listing, mean, new_dashboard, number, quantiles, rate, with_rows


def service_board() -> Board:
    board = new_dashboard(SERVICE, "moa_serve: service health", "Is it up, is it fast, what does it refuse, and where does the time go.")
    return with_rows(
        board,
        ("Now", _now()),
        ("Rate, errors, duration", _requests()),
        ("Latency", _latency()),
        ("Load", _load()),
        ("Engine", _engine()),
        ("Process", _process()),
    )


def _now() -> list[Panel]:
    return [
        number(
            "Up",
            "Servers that answer Prometheus. Fewer than you started: see MoaServerDown.",
            "none",
            Query(f"sum(up{{{HERE}}})"),
            limits=[Step(1, "green")],
            base="red",
        ),
        number(
            "Ready",
            "Servers that take new requests, as /health/ready says. Fewer than are up: see MoaServerNotReady.",
            "none",
            Query(f"sum(moa_ready{{{HERE}}})"),
            limits=[Step(1, "green")],
            base="red",
        ),
        number("Requests", "Requests that ended, each second.", "reqps", rate("moa_requests_total", HERE)),
        number(
            "Errors",
            "Share of /v1 answers that are 5xx. Above 5 %: see MoaHighErrorRatio; which ones, below.",
            "percentunit",
            Query(f"max(instance:moa_http_errors:ratio_rate5m{{{HERE}}})"),
            limits=[Step(0.01, "orange"), Step(0.05)],
        ),
        number(
            "First token",
            "95 % of first tokens come within this time.",
            "s",
            Query(f"max(instance:moa_time_to_first_token_seconds:p95_rate5m{{{HERE}}})"),
            limits=[Step(1, "orange"), Step(2)],
        ),
        number("Generated", "Tokens each second, of all requests that ended.", "short", rate("moa_generated_tokens_total", HERE)),
        number(
            "KV cache held",
            "Share that is held. Near 100 % with preemptions: raise kv_cache_bytes.",
            "percentunit",
            Query(f"max(moa_kv_usage_ratio{{{HERE}}})"),
            limits=[Step(0.8, "orange"), Step(0.95)],
        ),
        number(
            "Memory used",
            "Share of the limit. From 90 % on new work is refused.",
            "percentunit",
            Query(f"max(moa_memory_used_ratio{{{HERE}}})"),
            limits=[Step(0.85, "orange"), Step(0.9)],
        ),
        listing(
            "Alerts",
            "What fires now; docs/observability.md has a section for each.",
            Query(f'ALERTS{{alertstate="firing",{HERE}}}'),
            ("alertname", "severity", "instance", "adapter"),
            span=24,
            height=5,
        ),
    ]


def _requests() -> list[Panel]:
    return [
        graph(
            "Requests by how they ended",
            "stop and length are answers, abort is a client that left, error is a refusal or a failure. Many aborts: "
            "clients lose patience, "
            "see the latencies.",
            "reqps",
            rate("moa_requests_total", HERE, "finish_reason"),
            is_stacked=True,
        ),
        graph(
            "Responses by status",
            "Of any kind, health checks and scrapes too. 503: no place, memory or time; 429: a key's own limit; 500: a bug "
            "or a broken "
            "adapter, see the log by request id.",
            "reqps",
            rate("moa_http_responses_total", HERE, "status"),
            is_stacked=True,
        ),
        graph(
            "Errors by route and status",
            "Which route answers 4xx or 5xx. 4xx are the clients': tell them; 5xx are the server's.",
            "reqps",
            rate("http_requests_total", f'{HERE},status=~"4xx|5xx"', "handler, status"),
        ),
        graph(
            "Duration of a request",
            "From its arrival to its last byte, streams included: long answers are long requests.",
            "s",
            *quantiles("moa_request_seconds", HERE, 0.5, 0.95, 0.99),
        ),
        graph(
            "Duration by route",
            "Mean over all requests of a route, up to the response's last byte.",
            "s",
            mean("http_request_duration_seconds_sum", "http_request_duration_seconds_count", HERE, "handler"),
        ),
        graph(
            "Tokens",
            "Read (prompt), read without being computed (cached), and generated, each second.",
            "short",
            rate("moa_prompt_tokens_total", HERE, legend="prompt"),
            rate("moa_cached_tokens_total", HERE, legend="cached"),
            rate("moa_generated_tokens_total", HERE, legend="generated"),
        ),
    ]


def _latency() -> list[Panel]:
    slow = "job:moa_time_to_first_token_slow:ratio_rate"
    return [
        graph(
            "Time to first token",
            "What users feel first. High with a queue: more servers. High without: prompts are long, see tokens per step.",
            "s",
            *quantiles("moa_time_to_first_token_seconds", HERE, 0.5, 0.95, 0.99),
            limits=[Step(2)],
        ),
        graph(
            "Time between tokens",
            "The pace of a stream. High p99 with a low p50: steps with long prompts, or loads of adapters, hold rows up.",
            "s",
            *quantiles("moa_inter_token_seconds", HERE, 0.5, 0.95, 0.99),
            limits=[Step(0.5)],
        ),
        graph(
            "Time in the queue",
            "Arrival to the first step. Above some steps' time: all rows are taken, see rows.",
            "s",
            *quantiles("moa_queue_seconds", HERE, 0.5, 0.95, 0.99),
        ),
        graph(
            "Slow first tokens",
            "Share of first tokens that took more than 2 s, over 5 minutes, 1 and 6 hours; the objective is 1 % over 30 days.",
            "percentunit",
            *(Query(f'{slow}{window}{{job=~"$job"}}', window) for window in ("5m", "1h", "6h")),
            span=12,
            limits=[Step(0.01, "orange"), Step(0.144)],
        ),
        graph(
            "How fast the month's budget burns",
            "1 uses up the budget of slow first tokens in 30 days, 14.4 in two. Above 14.4: MoaFirstTokenBudgetBurnsFast.",
            "short",
            *(Query(f'{slow}{window}{{job=~"$job"}} / 0.01', window) for window in ("1h", "6h", "3d")),
            span=12,
            limits=[Step(1, "orange"), Step(6, "orange"), Step(14.4)],
        ),
    ]


def _load() -> list[Panel]:
    return [
        graph(
            "Rows",
            "Computed now, waiting for a place, and with a client that is still there. Waiting near max_waiting: more servers, or "
            "shorter requests.",
            "short",
            *(
                Query(f"sum(moa_{name}{{{HERE}}})", legend)
                for name, legend in (("requests_running", "running"), ("requests_waiting", "waiting"), ("streams_open", "open"))
            ),
        ),
        graph(
            "KV cache",
            "Held by rows, and kept for prompts that begin the same (given up as soon as it is needed).",
            "percentunit",
            Query(f"max(moa_kv_usage_ratio{{{HERE}}})", "held"),
            Query(f"max(moa_kv_kept_ratio{{{HERE}}})", "kept"),
            top=1,
        ),
        graph(
            "Prefix cache",
            "Share of prompt tokens that were found computed. Low though prompts begin the same: other keys or adapters "
            "share nothing, or the cache is small.",
            "percentunit",
            Query(f"{rate('moa_prefix_cache_hits_total', HERE).expr} / {rate('moa_prefix_cache_queries_total', HERE).expr}", "hits"),
            top=1,
        ),
        graph(
            "Refusals",
            "503 (no place, memory or time) and 429 (a key over its own limit), each second. Steady 503: more servers.",
            "reqps",
            rate("moa_http_responses_total", f'{HERE},status=~"503|429"', "status"),
            span=12,
        ),
        graph(
            "Preemptions",
            "Rows that lost their pages to older ones and are computed anew. More than a few: raise kv_cache_bytes or lower max_num_seqs.",
            "short",
            rate("moa_preemptions_total", HERE, legend="preemptions"),
            span=12,
        ),
        graph(
            "Factor on thresholds",
            "Of a request that comes now, where pressure_threshold_scale lets a queue raise it. At its highest for long: more servers.",
            "short",
            Query(f"max by (adapter) (moa_threshold_scale{{{HERE}}})", "{{adapter}}"),
            span=12,
        ),
        graph(
            "Requests with raised thresholds",
            "Share of an adapter's requests that came while others waited, so that fewer experts answered. Much, and for long: "
            "see MoaThresholdsRaised.",
            "percentunit",
            Query(
                f"{rate('moa_raised_threshold_requests_total', HERE, 'adapter').expr} / {rate('moa_requests_total', HERE, 'adapter').expr}",
                "{{adapter}}",
            ),
            span=12,
            top=1,
        ),
    ]


def _engine() -> list[Panel]:
    return [
        graph(
            "Time of a step", "One step makes one token of every running row.", "s", *quantiles("moa_step_seconds", HERE, 0.5, 0.95, 0.99)
        ),
        graph(
            "Where a step's time goes",
            "Mean time of each part, of the steps that were timed. Mostly base: as it should be. Experts and router grow "
            "with adapters that "
            "are large or not sparse; attention with long contexts; sampling with log-probabilities and guides.",
            "s",
            Query(
                f"sum by (part) (rate(moa_step_part_seconds_total{{{HERE}}}[$interval])) / ignoring (part) group_left () "
                f"sum(rate(moa_steps_timed_total{{{HERE}}}[$interval]))",
                "{{part}}",
            ),
            is_stacked=True,
        ),
        graph("Steps", "Each second.", "short", rate("moa_engine_steps_total", HERE, legend="steps")),
        graph(
            "Rows in a step",
            "Rows are what makes a step worth its time: few rows and many waiting means that something else is short "
            "(KV cache, slots, limits of a key or an adapter).",
            "short",
            *quantiles("moa_step_rows", HERE, 0.5, 0.95),
            mean("moa_step_rows_sum", "moa_step_rows_count", HERE, legend="mean"),
            span=12,
        ),
        graph(
            "Tokens in a step",
            "Rows that generate, and parts of prompts. Near max_batch_tokens: long prompts.",
            "short",
            *quantiles("moa_step_tokens", HERE, 0.5, 0.95),
            mean("moa_step_tokens_sum", "moa_step_tokens_count", HERE, legend="mean"),
            span=12,
        ),
    ]


def _process() -> list[Panel]:
    return [
        graph(
            "Event loop's lag",
            "How late the loop turns: no token is sent meanwhile. Above 0.25 s: see MoaEventLoopStalls.",
            "s",
            *quantiles("moa_event_loop_lag_seconds", HERE, 0.5, 0.99),
            limits=[Step(0.25)],
        ),
        graph(
            "Stalls of the event loop",
            "Turns that took longer than so many seconds, each hour.",
            "short",
            Query(f"3600 * sum by (longer_than) (rate(moa_event_loop_stalls_total{{{HERE}}}[$interval]))", "> {{longer_than}} s"),
        ),
        graph(
            "Incidents",
            "What went wrong in the engine and was survived, each hour. rebuilt and base_nonfinite: see MoaEngineRebuilt; "
            "adapter_nonfinite: an adapter is broken.",
            "short",
            Query(f"3600 * sum by (kind) (rate(moa_incidents_total{{{HERE}}}[$interval]))", "{{kind}}"),
        ),
        graph("Memory", "Of the process.", "bytes", Query(f"process_resident_memory_bytes{{{HERE}}}", "{{instance}}")),
        graph(
            "Memory, share of the limit",
            "From 90 % on new work is refused, from 95 % on the server is not ready.",
            "percentunit",
            Query(f"moa_memory_used_ratio{{{HERE}}}", "{{instance}}"),
            limits=[Step(0.9, "orange"), Step(0.95)],
            top=1,
        ),
        graph("CPU", "Cores in use.", "short", rate("process_cpu_seconds_total", HERE, "instance")),
        graph(
            "File descriptors",
            "Open, and the most there may be. Near the limit: connections are closed to stay below it.",
            "short",
            Query(f"sum by (instance) (process_open_fds{{{HERE}}})", "{{instance}}"),
            Query(f"sum by (instance) (process_max_fds{{{HERE}}})", "{{instance}}, at most"),
            span=12,
        ),
        graph(
            "Trouble with the registry",
            "Its state could not be read or written, since the start: see the log and state_dir.",
            "short",
            Query(f"sum by (kind) (moa_registry_trouble_total{{{HERE}}})", "{{kind}}"),
            span=12,
        ),
    ]
