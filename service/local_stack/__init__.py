"""Ray, service and agent on one machine: what `up` starts and `down` ends."""
