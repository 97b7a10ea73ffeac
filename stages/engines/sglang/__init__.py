"""SGLang servers over HTTP. Only `plugin` and `plugin_hooks` import sglang, inside the servers."""
