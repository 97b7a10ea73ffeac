"""Engines that generate answers, with one interface; stage `rollout`."""
