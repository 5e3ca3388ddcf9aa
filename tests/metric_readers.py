"""What programs of others read of a page of metrics, by name, and in which shape. From their sources:

gateway: the endpoint picker of Kubernetes' inference gateway, gateway-api-inference-extension docs/proposals/003-model-server-protocol and
llm-d-inference-scheduler pkg/epp/framework/plugins/datalayer/extractor/metrics (May 2026). Of several series of a gauge it takes the first,
of the LoRA gauge the one with the largest value.
inference-perf: kubernetes-sigs/inference-perf inference_perf/client/modelserver/vllm_client.py (August 2026), through Prometheus, with
`model_name` as a filter.
"""

GATEWAY = "inference gateway, llm-d"
INFERENCE_PERF = "inference-perf"

# Gauges of which there must be exactly one series.
GATEWAY_GAUGES = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
LORA_INFO, LORA_LABELS = "vllm:lora_requests_info", ("running_lora_adapters", "waiting_lora_adapters", "max_lora")
CACHE_INFO, CACHE_LABELS = "vllm:cache_config_info", ("block_size", "num_gpu_blocks")

PERF_COUNTERS = (
    "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success", "vllm:num_preemptions", "vllm:prefix_cache_hits",
    "vllm:prefix_cache_queries", "vllm:prompt_tokens_cached", "vllm:corrupted_requests",
)  # fmt: skip
PERF_GAUGES = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
PERF_OF_A_FULL_CACHE = ("vllm:kv_block_idle_before_evict_seconds", "vllm:kv_block_lifetime_seconds", "vllm:kv_block_reuse_gap_seconds")
PERF_HISTOGRAMS = (
    "vllm:e2e_request_latency_seconds", "vllm:request_time_per_output_token_seconds", "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds", "vllm:request_queue_time_seconds", "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds", "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens", "vllm:request_max_num_generation_tokens", "vllm:request_params_n",
    "vllm:request_params_max_tokens", "vllm:iteration_tokens_total", "vllm:request_prefill_kv_computed_tokens",
    *PERF_OF_A_FULL_CACHE,
)  # fmt: skip
# It asks for these too, and does without them where a server has none, as vLLM itself by default.
PERF_LEFT_OUT = (
    "vllm:external_prefix_cache_hits", "vllm:external_prefix_cache_queries", "vllm:mm_cache_hits", "vllm:mm_cache_queries",
)  # fmt: skip


def readers_of(family: str) -> list[str]:
    """Who reads a family, by the name in its header."""
    found = []
    if family in (*GATEWAY_GAUGES, LORA_INFO, CACHE_INFO):
        found.append(GATEWAY)
    if family in (*PERF_GAUGES, *PERF_HISTOGRAMS) or family.removesuffix("_total") in PERF_COUNTERS:
        found.append(INFERENCE_PERF)
    return found
