"""Servers of any kind over HTTP: started or given, checked, sent requests, and stopped."""
