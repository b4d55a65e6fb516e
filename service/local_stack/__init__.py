"""Starts and stops Ray, service and agent on one machine, for `up` and `down`."""
