"""The target model: where it comes from, how it is loaded, decoded and checked."""
