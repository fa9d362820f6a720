"""Threads, memory, devices: runs any Plan and knows no verb."""
