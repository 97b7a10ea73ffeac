"""vLLM servers over HTTP. Nothing here imports vllm."""
