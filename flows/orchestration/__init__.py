"""Runs a flow under Prefect: servers, tasks, deployments, announcements."""
