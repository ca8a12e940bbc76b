"""Pipeline parallelism: `Trainer` over PyTorch's schedules, with the model cut into stages."""
