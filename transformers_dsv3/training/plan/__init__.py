"""What training a model takes on so many GPUs, from its configuration: memory, time, idle time, money."""
