"""Adapters: who is used, who is slow, and where each of them is."""

from panels import (
    ADAPTERS,
    EXPERTS,
    HERE,
    OF_ADAPTER,
    Board,
    Panel,
    Query,
    Step,
    choice,
    graph,
    listing,
    new_dashboard,
    number,
    quantiles,
    rate,
    with_rows,
)


def adapter_board() -> Board:
    text = "Who is used, who is slow, where each of them is and how it comes and goes. The base is among them, under its own name."
    adapter = choice("adapter", "Adapter", f"label_values(moa_requests_total{{{HERE}}}, adapter)")
    board = new_dashboard(ADAPTERS, "moa_serve: adapters", text, adapter)
    return with_rows(
        board, ("Now", _now()), ("Traffic", _traffic()), ("Latency", _latency()), ("Memory", _memory()), ("Coming and going", _moves())
    )


def _now() -> list[Panel]:
    return [
        number(
            "Adapters",
            "By state. Broken ones: GET /v1/adapters says what is wrong with them.",
            "none",
            Query(f"sum by (state) (moa_adapters{{{HERE}}})", "{{state}}"),
            span=8,
        ),
        number(
            "Slots filled",
            "Of those that one batch can mix. All filled and many swaps: raise num_slots.",
            "percentunit",
            Query(f"sum(moa_adapter_slots_filled{{{HERE}}}) / sum(moa_adapter_slots{{{HERE}}})"),
            span=4,
            base="blue",
        ),
        number(
            "Host memory used",
            "Of adapter_cache_bytes. Full with evictions: raise it.",
            "percentunit",
            Query(f"sum(moa_adapter_cache_bytes{{{HERE}}}) / sum(moa_adapter_cache_limit_bytes{{{HERE}}})"),
            span=4,
            base="blue",
        ),
        number(
            "Loads in an hour",
            "Of adapters, in the last hour.",
            "none",
            Query(f"sum(increase(moa_adapter_load_seconds_count{{{HERE}}}[1h]))"),
            span=4,
            base="blue",
        ),
        number(
            "Failed loads in an hour",
            "In the last hour: see MoaAdapterNotLoadable.",
            "none",
            Query(f'sum(increase(moa_adapter_load_seconds_count{{{HERE},result!="ok"}}[1h])) or vector(0)'),
            span=4,
            limits=[Step(0.5)],
        ),
    ]


def _traffic() -> list[Panel]:
    return [
        graph(
            "Requests",
            "That ended, each second. A click opens the adapter's experts.",
            "reqps",
            rate("moa_requests_total", OF_ADAPTER, "adapter"),
            is_stacked=True,
            link=EXPERTS,
        ),
        graph(
            "Generated tokens",
            "Each second.",
            "short",
            rate("moa_generated_tokens_total", OF_ADAPTER, "adapter"),
            is_stacked=True,
            link=EXPERTS,
        ),
        graph(
            "Prompt tokens",
            "Each second, cached ones included.",
            "short",
            rate("moa_prompt_tokens_total", OF_ADAPTER, "adapter"),
            is_stacked=True,
            link=EXPERTS,
        ),
        graph(
            "Errors",
            "Refused or failed, each second. One adapter alone: its files or weights, see the log by adapter.",
            "reqps",
            rate("moa_requests_total", f'{OF_ADAPTER},finish_reason="error"', "adapter"),
            link=EXPERTS,
        ),
        graph(
            "Clients that left",
            "Before the end, each second: one adapter alone is too slow, or says too much.",
            "reqps",
            rate("moa_requests_total", f'{OF_ADAPTER},finish_reason="abort"', "adapter"),
            link=EXPERTS,
        ),
        graph(
            "Rows that hold it",
            "Running and waiting. An adapter that is held cannot be unloaded or evicted.",
            "short",
            Query(f"sum by (adapter) (moa_adapter_leases{{{OF_ADAPTER}}})", "{{adapter}}"),
            is_stacked=True,
            link=EXPERTS,
        ),
    ]


def _latency() -> list[Panel]:
    return [
        graph(
            "First token, 95 %",
            "One adapter far above the others: is it loaded again and again (below), or at its limit of rows?",
            "s",
            *quantiles("moa_time_to_first_token_seconds", OF_ADAPTER, 0.95, by="adapter"),
            limits=[Step(2)],
            link=EXPERTS,
        ),
        graph(
            "Between tokens, 95 %",
            "All adapters share the steps, so one alone is slow only where it pauses.",
            "s",
            *quantiles("moa_inter_token_seconds", OF_ADAPTER, 0.95, by="adapter"),
            link=EXPERTS,
        ),
        graph(
            "In the queue, 95 %",
            "One adapter alone waits for itself: its files, a slot, or max_num_seqs_per_adapter.",
            "s",
            *quantiles("moa_queue_seconds", OF_ADAPTER, 0.95, by="adapter"),
            link=EXPERTS,
        ),
        graph(
            "Slower than the rest",
            "Its 95 % of first tokens over that of all other requests. Above 3 for long: see MoaAdapterSlow.",
            "short",
            Query(f"max by (adapter) (adapter:moa_time_to_first_token_slowdown:ratio_rate5m{{{OF_ADAPTER}}})", "{{adapter}}"),
            limits=[Step(3)],
            link=EXPERTS,
            span=12,
        ),
        graph(
            "A request, 95 %",
            "From its arrival to its last byte.",
            "s",
            *quantiles("moa_request_seconds", OF_ADAPTER, 0.95, by="adapter"),
            link=EXPERTS,
            span=12,
        ),
    ]


def _memory() -> list[Panel]:
    return [
        graph(
            "Host memory",
            "What adapters take, and adapter_cache_bytes. At the limit the least recently used one leaves.",
            "bytes",
            Query(f"sum(moa_adapter_cache_bytes{{{HERE}}})", "adapters"),
            Query(f"sum(moa_adapter_cache_limit_bytes{{{HERE}}})", "limit"),
        ),
        graph(
            "By adapter and tier",
            "host is memory, slot is where a batch reads it.",
            "bytes",
            Query(f"sum by (adapter, tier) (moa_adapter_resident_bytes{{{OF_ADAPTER}}})", "{{adapter}}, {{tier}}"),
            is_stacked=True,
        ),
        graph(
            "Slots",
            "Filled, and there.",
            "short",
            Query(f"sum(moa_adapter_slots_filled{{{HERE}}})", "filled"),
            Query(f"sum(moa_adapter_slots{{{HERE}}})", "slots"),
        ),
        listing(
            "States",
            "Of adapters that are more than available. broken: its folder; quarantined ones answer 503 until loaded again.",
            Query(f"max by (adapter, state) (moa_adapter_state{{{OF_ADAPTER}}})"),
            ("adapter", "state"),
        ),
        listing(
            "Revisions",
            "What is served under each name.",
            Query(f"max by (adapter, revision, variant) (moa_adapter_info{{{OF_ADAPTER}}})"),
            ("adapter", "revision", "variant"),
        ),
        listing(
            "Last load",
            "How long each took to read, check and try.",
            Query(f"max by (adapter) (moa_adapter_last_load_seconds{{{OF_ADAPTER}}})"),
            ("adapter",),
            unit="s",
            value="seconds",
        ),
    ]


def _moves() -> list[Panel]:
    hits, misses = (f"sum by (tier) (rate(moa_adapter_cache_{what}_total{{{HERE}}}[$interval]))" for what in ("hits", "misses"))
    return [
        graph(
            "Loads",
            "Each minute, by who asked: evicted ones were here before, and left for want of room.",
            "short",
            Query(f"60 * sum by (source, result) (rate(moa_adapter_load_seconds_count{{{HERE}}}[$interval]))", "{{source}}, {{result}}"),
        ),
        graph(
            "Time of a load",
            "Reading, checking and trying. A slow disk or a pickle that is read in a process of its own: convert it.",
            "s",
            *quantiles("moa_adapter_load_seconds", HERE, 0.5, 0.95),
        ),
        graph(
            "Adapters by state",
            "Broken or unloading for long: see the log.",
            "short",
            Query(f"sum by (state) (moa_adapters{{{HERE}}})", "{{state}}"),
            is_stacked=True,
        ),
        graph(
            "Found where it was looked for",
            "Share of lookups, by tier. Low for host: raise adapter_cache_bytes; for slots: num_slots.",
            "percentunit",
            Query(f"{hits} / ({hits} + {misses})", "{{tier}}"),
            top=1,
        ),
        graph(
            "Swaps",
            "Lookups that did not find the adapter, each minute: it was read into memory (host) or written into a slot.",
            "short",
            Query(f"60 * {misses}", "{{tier}}"),
        ),
        graph(
            "Evictions",
            "Each minute, by tier and why. Steady ones for capacity: too little room, see MoaAdapterCacheThrashes.",
            "short",
            Query(f"60 * sum by (tier, reason) (rate(moa_adapter_evictions_total{{{HERE}}}[$interval]))", "{{tier}}, {{reason}}"),
        ),
    ]
