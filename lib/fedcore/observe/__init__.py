"""What operators see: logs, metrics, health, the failure event file."""
