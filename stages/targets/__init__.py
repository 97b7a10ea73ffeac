"""The target model: its source, loading, cached forwards and checks; stage `target`."""
