"""vLLM servers over HTTP. Only `plugin` and `plugin_swap` import vllm, inside the servers."""
