"""SGLang servers over HTTP. `plugin` alone imports sglang, inside the server; nothing here is needed to import it."""
