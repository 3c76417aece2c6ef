"""What a device is made of besides its executors; worker.py puts it together."""
