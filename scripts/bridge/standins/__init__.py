"""What stands in for what cannot be had: the hub, GSM8K, a model."""
